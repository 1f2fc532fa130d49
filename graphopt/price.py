"""What a plan recomputes and what that costs, grouped so that repeated layers read as one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from graphopt.plans import Plan, Recomputed

__all__ = ["PriceGroup", "price_groups"]

_INDEX = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class PriceGroup:
    """Runs of one operator in layers that differ by their index alone (``model.layers.*.mlp``)."""

    layer: str
    op: str
    runs: int
    bytes: int
    seconds: float


def price_groups(plan: Plan) -> tuple[PriceGroup, ...]:
    """What ``plan`` runs again, by layer and operator, dearest first."""
    groups: dict[tuple[str, str], list[Recomputed]] = {}
    for choice in plan.choices:
        for item in choice.recomputed:
            groups.setdefault((_INDEX.sub("*", item.layer), item.op), []).append(item)
    priced = [_group(layer, op, items) for (layer, op), items in groups.items()]
    return tuple(sorted(priced, key=lambda group: (-group.seconds, -group.bytes, group.layer, group.op)))


def _group(layer: str, op: str, items: Iterable[Recomputed]) -> PriceGroup:
    runs = list(items)
    return PriceGroup(layer, op, len(runs), sum(r.bytes for r in runs), sum(r.seconds for r in runs))
