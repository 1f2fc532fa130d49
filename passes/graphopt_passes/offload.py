"""offload: wait in the host's memory instead of the device's between forward and backward.

Before, what the backward reads stays where it was made::

    forward:   %5 = aten.mm(%x, %w)        keeps %5
    backward:  %9 = aten.mm(%g, %5)

After, a copy engine moves it while the next call computes, and brings it back while the backward of the
call after it does::

    forward:   %5 = aten.mm(%x, %w)        %5 -> pinned host memory, beside the next call
    backward:  %5 <- host, beside the backward of the next call;   %9 = aten.mm(%g, %5)

What is moved is what the host's link can carry in the time that the neighbours compute, which costs them
little; and everything, which costs what the link takes beyond that. Every schedule of the curve so
far is offered with either, and the planner weighs them against recomputation and each other.

Sources: Rhu et al. 2016 (vDNN), Beaumont et al. 2020 (which activations to offload), SuperOffload and
torch's activation offloading for the two copy engines.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from graphopt import _torch
from graphopt.budget import parse_bytes
from graphopt.candidate import Declined, FrontierPoint
from graphopt.errors import BudgetSyntaxError, PassError
from graphopt.passes import Pass, PassContext, Proposal
from graphopt.program import Level, Program

__all__ = ["Offload"]

_LEAST = 2**20
"""Bytes below which a value is not worth a copy of its own: a copy costs about ten microseconds to start,
in which the link carries half a mebibyte."""

_MARGIN = 0.9
"""Share of the neighbours' time that copies may fill: predictions of it are not exact."""


_BESIDE = 0.1
"""Seconds that what computes loses for each second of a copy beside it: products of matrices on an H200
took 1.0 ms longer beside a copy of 9.8 ms, in either direction."""


@dataclass(frozen=True)
class Offload(Pass):
    """``host``: bytes of pinned host memory that may be used (``"64GiB"``), by default half of what the
    machine has."""

    name: ClassVar[str] = "offload"
    level: ClassVar[Level] = Level.JOINT
    summary: ClassVar[str] = "let values wait in pinned host memory for the backward, copied beside compute"
    after: ClassVar[dict[str, str]] = {"insert-checkpoints": "it moves what those schedules keep"}

    host: str = ""

    def __post_init__(self) -> None:
        if self.host:
            try:
                parse_bytes(self.host)
            except BudgetSyntaxError as error:
                raise PassError(f"offload: host={self.host!r}: {error.message}", hint=error.hint) from error

    @property
    def host_bytes(self) -> int:
        if self.host:
            return parse_bytes(self.host)
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2

    def propose(self, program: Program, ctx: PassContext) -> Iterable[Proposal]:
        if ctx.mode != "train" or ctx.curve is None:
            return
        reason = _unable(ctx)
        if reason:
            yield Declined("offload", reason)
            return
        points = list(ctx.curve.points)
        rate = ctx.cost.device.host_link_bytes_per_second
        for point in ctx.curve.points:
            points += _moved(program, point, rate, self.host_bytes)
        if len(points) > len(ctx.curve.points):
            yield replace(ctx.curve, points=tuple(points), extends=True, host_bytes=self.host_bytes)


def _unable(ctx: PassContext) -> str:
    if ctx.cost.device.kind == "cpu":
        return "the device's memory is the host's"
    if ctx.emit == "eager":
        return 'programs that run op by op are not overlapped with copies: compile them (emit="inductor")'
    return ""


def _moved(program: Program, point: FrontierPoint, rate: float, host_bytes: int) -> Iterator[FrontierPoint]:
    """The point with what the link carries beside compute moved, and with everything moved."""
    values = sorted(_movable(program, point), key=lambda item: -item[1])
    hidden = min(host_bytes, _MARGIN * rate * min(point.forward_seconds, point.backward_seconds))
    free: list[tuple[str, int]] = []
    for name, size in values:
        if sum(s for _, s in free) + size <= hidden:
            free.append((name, size))
    for chosen in dict.fromkeys((tuple(free), tuple(values))):
        moved = sum(size for _, size in chosen)
        if not chosen or moved > host_bytes:
            continue
        waits = sum(
            max(_BESIDE * moved / rate, moved / rate - _MARGIN * beside)
            for beside in (point.forward_seconds, point.backward_seconds)
        )
        yield replace(
            point,
            seconds=point.seconds + waits,
            offloaded=tuple(name for name, _ in chosen),
            moved_bytes=moved,
        )


def _movable(program: Program, point: FrontierPoint) -> Iterator[tuple[str, int]]:
    """Values that wait for the backward and can be copied as they lie: large, dense, handed over by
    the forward, whole storages."""
    results = {spec.node for spec in program.signature.outputs if spec.role != "gradient"}
    roles = {spec.node: spec.role for spec in program.signature.inputs}
    nodes = {node.name: node for node in program.graph.nodes}
    read = {source.name for name in point.schedule.backward for source in nodes[name].all_input_nodes}
    entering = [name for name, role in roles.items() if role == "activation" and name in read]
    seen: set[int] = set()
    for name in (*point.schedule.saved, *entering):
        if name in results:
            continue
        value = nodes[name].meta.get("val")
        if not isinstance(value, torch.Tensor) or not _whole(value):
            continue
        size, key = _torch.hint(value.untyped_storage().nbytes()), _torch.storage_key(value)
        if size >= _LEAST and key not in seen:
            seen.add(key)
            yield name, size


def _whole(value: torch.Tensor) -> bool:
    """Whether a tensor covers its storage without gaps or overlaps."""
    dense = 1
    for stride, size in sorted(
        (_torch.hint(b), _torch.hint(a)) for a, b in zip(value.shape, value.stride(), strict=True)
    ):
        if size == 1:
            continue
        if stride != dense:
            return False
        dense *= size
    return dense * value.element_size() == _torch.hint(value.untyped_storage().nbytes())
