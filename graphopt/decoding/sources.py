"""Which attentions may read the keys and values of which: same heads, same mask, same rotary embedding.

Keys carry positions: where those of the source are rotated by other angles than the consumer's queries, or
are kept for another window, the consumer would read something else than keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.fx as fx

from graphopt.capture.aliasing import Aliases, alias_map
from graphopt.decoding.capture import Uncached, arguments_of
from graphopt.decoding.evaluate import values_of
from graphopt.decoding.layouts import name_of, same_numbers
from graphopt.decoding.regions import Region, positional_values, token_values
from graphopt.decoding.stores import SiteSpec
from graphopt.errors import InputsError

__all__ = ["Fits", "check_indices", "check_sources", "first_reader"]

_PRODUCTS = ("linear", "addmm", "mm", "matmul", "bmm", "embedding")
_LOOKED_AT = 24
"""Positions at which rotary embeddings are compared: other bases and scales show from position 1 on."""


def first_reader(regions: Sequence[Region], index: int) -> int:
    """The first region that reads the keys and values that region ``index`` reads."""
    here = _read(regions[index])
    return next(earlier for earlier in range(index + 1) if _read(regions[earlier]) == here)


def _read(region: Region) -> tuple[object, ...]:
    return same_numbers(region.key), same_numbers(region.value), region.flat, region.key_transposed


def check_indices(regions: Sequence[Region], indices: Iterable[int], what: str) -> None:
    """Raises ``InputsError`` for the index of no attention; ``what`` was to be given to it."""
    for index in indices:
        if index >= len(regions):
            layers = ", ".join(region.layer or region.output.name for region in regions[:2])
            raise InputsError(
                f"attention {index} is to have {what}: the model attends {len(regions)} times, 0 to "
                f"{len(regions) - 1} ({layers}, ..); layers that do not attend are not counted",
                hint=f"the nearest is {len(regions) - 1}; graphopt explain TARGET --layers lists them",
            )


class Fits:
    """``fits(consumer, source)``: ``""``, or why the one cannot read the keys and values of the other."""

    def __init__(self, uncached: Uncached, regions: Sequence[Region], specs: Sequence[SiteSpec]) -> None:
        self.uncached, self.regions, self.specs = uncached, regions, specs
        self.values = token_values(uncached)
        self.positional = positional_values(uncached, self.values)
        self.aliases: Aliases = alias_map(uncached.gm.graph)
        self._rotations: dict[int, tuple[tuple[str, fx.Node], ...]] = {}
        self._numbers: dict[fx.Node, torch.Tensor] = {}

    def __call__(self, consumer: int, source: int) -> str:
        one, other = self.specs[consumer], self.specs[source]
        if one.mask != other.mask:
            return f"its mask is {one.mask}, that of attention {source} {other.mask}"
        for name, what in (
            ("kv_heads", "heads of keys"), ("key_width", "numbers in a key"),
            ("value_width", "numbers in a value"), ("dtype", "for the dtype"),
        ):  # fmt: skip
            here, there = getattr(one, name), getattr(other, name)
            if here != there:
                return f"it has {here} {what}, attention {source} has {there}"
        here, there = self.regions[consumer], self.regions[source]
        if (here.flat, here.key_transposed) != (there.flat, there.key_transposed):
            return f"its keys are laid out otherwise than those of attention {source}"
        return self._rotated_otherwise(consumer, source)

    def _rotated_otherwise(self, consumer: int, source: int) -> str:
        one, other = self._rotation(consumer), self._rotation(source)
        if [name for name, _ in one] != [name for name, _ in other]:
            count = f"{len(one)} steps against {len(other)}"
            return f"positions enter its keys otherwise than those of attention {source} ({count})"
        for (_, here), (_, there) in zip(one, other, strict=True):
            if here is not there and not torch.equal(self._number(here), self._number(there)):
                return f"its rotary embedding has other parameters than that of attention {source}"
        return ""

    def _rotation(self, index: int) -> tuple[tuple[str, fx.Node], ...]:
        """Operators by which positions come into keys, behind the projection, and what they read."""
        if index not in self._rotations:
            found: list[tuple[str, fx.Node]] = []
            seen: set[fx.Node] = set()
            pending = [self.regions[index].key]
            while pending:
                node = pending.pop()
                if node in seen or node not in self.values or name_of(node) in _PRODUCTS:
                    continue
                seen.add(node)
                found += [(name_of(node), arg) for arg in node.all_input_nodes if arg in self.positional]
                pending.extend(node.all_input_nodes)
            self._rotations[index] = tuple(found)
        return self._rotations[index]

    def _number(self, node: fx.Node) -> torch.Tensor:
        if node not in self._numbers:
            device = self.uncached.placeholder(self.uncached.tokens).meta["val"].device
            tokens = torch.zeros(2, _LOOKED_AT, dtype=torch.int64, device=device)
            given = arguments_of(self.uncached, tokens, None, None)
            (value,) = values_of(self.uncached, [node], self.aliases, given)
            self._numbers[node] = value
        return self._numbers[node]


def check_sources(
    uncached: Uncached, regions: Sequence[Region], specs: Sequence[SiteSpec], sources: Mapping[int, int]
) -> None:
    """Raises ``InputsError`` for a consumer that cannot read its source, naming both and the nearest one that
    it can."""
    if not sources:
        return
    check_indices(regions, [*sources, *sources.values()], "a part in sharing")
    fits = Fits(uncached, regions, specs)
    for consumer, source in sources.items():
        if why := fits(consumer, source):
            makes = [i for i in range(consumer) if i not in sources and not fits(consumer, i)]
            close = min(makes, key=lambda i: abs(i - source), default=None)
            where = regions[consumer].layer or regions[consumer].output.name
            raise InputsError(
                f"{where}: attention {consumer} cannot read the keys and values of attention {source}: {why}",
                hint=f"the nearest that it can read: {{{consumer}: {close}}}"
                if close is not None
                else "it can read those of no earlier one: leave it out",
            )
        for reader in range(consumer + 1, len(regions)):
            if _read(regions[reader]) == _read(regions[consumer]) and sources.get(reader) != source:
                raise InputsError(
                    f"attention {reader} reads the keys and values of attention {consumer} as the model is: "
                    f"they would stay although attention {consumer} reads those of {source}",
                    hint=f"let it read them too: {{{consumer}: {source}, {reader}: {source}}}",
                )
