"""Runs a model that decodes: stores that are made once, a program for prompts and one for single tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from graphopt.decoding.beside import SideBySide
from graphopt.decoding.capture import Uncached
from graphopt.decoding.distance_bias import DistanceBias, distance_biases
from graphopt.decoding.insert import StepGraph
from graphopt.decoding.options import Generate
from graphopt.decoding.reading import shown_tensors
from graphopt.decoding.sites import Site
from graphopt.decoding.states import kept_tensors
from graphopt.errors import InputsError

if TYPE_CHECKING:
    from graphopt.decoding.source_programs import SourcePrograms

__all__ = ["MOVED", "Decoder", "step_bounds_of"]

Run = Callable[..., Any]

MOVED = 64 << 20
"""Bytes of a store that are copied at once as sequences change places: few launches, little memory."""


@dataclass
class Decoder:
    """Stores for ``options.max_batch`` sequences of ``options.max_tokens`` positions, and what steps on them.

    ``general`` runs any number of new tokens for any batch, or one where ``step.rows`` says so: then
    ``stretch`` runs ``chunk`` of them, on what ``prompts`` takes. ``single(decoder, length, arguments)``
    gives what runs one token where no position is at or beyond ``length``, or ``None`` where ``general`` is
    to do it. A prompt goes in at most ``chunk`` tokens at a time, and never beyond a position that is a
    multiple of one of ``step_bounds``. ``once``: what runs for each source, where there is one. Not for
    several threads at once: it has one set of stores.
    """

    uncached: Uncached
    sites: tuple[Site, ...]
    options: Generate
    step: StepGraph
    general: Run
    single: Callable[[Decoder, int, list[Any]], Run | None]
    chunk: int
    device: torch.device
    beside: SideBySide | None = None
    once: SourcePrograms | None = None
    stretch: Run | None = None
    prompts: StepGraph | None = None
    several: Callable[[Run, frozenset[int], list[Any]], Run] | None = None
    stores: dict[str, torch.Tensor] = field(default_factory=dict)
    valid: torch.Tensor | None = None
    shown: dict[str, torch.Tensor] = field(default_factory=dict)
    biases: dict[str, DistanceBias] = field(default_factory=dict)
    end: torch.Tensor | None = None
    alike: torch.Tensor | None = None
    seen: int = 0
    batch: int = 0
    step_bounds: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        batch, capacity = self.options.max_batch, self.options.max_tokens
        self.step_bounds = step_bounds_of(self.sites)
        kinds: Mapping[tuple[int, str], Any] = kept_tensors(self.uncached, self.sites, batch, capacity)
        for name, key in self.step.stores.items():
            shape, dtype = kinds[key]
            # Zeros: a place that was never written is masked, but NaN times zero is NaN.
            self.stores[name] = torch.zeros(shape, dtype=dtype, device=self.device)
        if self.uncached.mask is not None:
            self.valid = torch.zeros(batch, capacity, dtype=torch.bool, device=self.device)
        self.biases = distance_biases(self.uncached, self.sites, capacity)
        for name, shown in shown_tensors(self.sites, batch).items():
            self.shown[name] = torch.zeros(shown, dtype=torch.bool, device=self.device)

    @property
    def held(self) -> dict[str, torch.Tensor]:
        """All that lasts from step to step, by name."""
        held = {**self.stores, **self.shown}
        return held if self.valid is None else {**held, "valid": self.valid}

    @property
    def states(self) -> list[torch.Tensor]:
        """What convolutions and recurrences keep."""
        return [self.stores[name] for name, (i, _) in self.step.stores.items() if i >= len(self.sites)]

    @property
    def moving(self) -> list[torch.Tensor]:
        """What a step that runs twice leaves otherwise than one that runs once: states, and tensors of stores
        that do not ``repeat``."""
        kept = ((name, index) for name, (index, _) in self.step.stores.items() if index < len(self.sites))
        return [*self.states, *(self.stores[n] for n, i in kept if not self.sites[i].store.repeats)]

    @property
    def cache_bytes(self) -> int:
        own = [site for i, site in enumerate(self.sites) if site.source == i]
        fitted = [tensor for site in own for tensor in site.spec.fitted.values()]
        lasting = (*self.held.values(), *fitted, *self.tables.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in lasting)

    @property
    def tables(self) -> dict[str, torch.Tensor]:
        """What biases add by distance, by name."""
        return {name: bias.table for name, bias in self.biases.items()}

    def reset(self, batch: int) -> None:
        """Begin anew with ``batch`` sequences. Raises ``InputsError`` for more than there are stores for, and
        for weights that were moved since."""
        self._check_batch(batch)
        if self.beside is not None:
            self.beside.settle()
        for bias in self.biases.values():
            bias.renew()
        self.seen, self.batch = 0, batch

    def _check_batch(self, batch: int) -> None:
        if batch > self.options.max_batch:
            raise InputsError(
                f"{batch} sequences at once, each beam counted: the stores are for max_batch="
                f"{self.options.max_batch}",
                hint=f"optimize with generate=graphopt.Generate(max_batch={batch}, ...)",
            )

    def read(self, given: Mapping[str, torch.Tensor]) -> None:
        """Take a source in, ``given`` by placeholder (``Source.inputs``), for as many sequences as come next.

        Raises ``InputsError`` for more rows or sequences than there are stores for, and for a mask that rows
        do not go with.
        """
        source = self.uncached.source
        assert source is not None and self.once is not None
        rows = given[source.leaves[0]]
        batch, length = rows.shape[:2]
        if length > source.most:
            raise InputsError(
                f"the source has {length} rows, as its encoder gives them: the stores are for max_source="
                f"{source.most}",
                hint=f"optimize with generate=graphopt.Generate(max_source={length}, ...)",
            )
        self._check_batch(batch)
        tokens = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)
        self.once.read({**self._inputs(tokens, None, None), **given, **self.held})
        self.end = torch.tensor([length - 1], device=self.device)
        # Beams read one source: sequences that read the same need not change places in it.
        same = torch.ones(batch, dtype=torch.bool, device=self.device)
        for tensor in given.values():
            same[1:] &= (tensor[1:] == tensor[:-1]).flatten(1).all(1)
        self.alike = (~same).cumsum(0)

    def __call__(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [B, 1, V] behind ``tokens`` [B, n], which follow those seen before.

        ``mask`` [B, n] or, with those before, [B, seen + n]: 0 where a token is padding. ``positions`` [B,
        n]; without, tokens that are no padding are counted. Raises ``InputsError`` beyond ``max_tokens``.
        """
        rows, count = tokens.shape
        if rows != self.batch:
            raise InputsError(f"{rows} sequences: the ones before were {self.batch}")
        if self.alike is not None and rows != len(self.alike):
            raise InputsError(f"{rows} sequences: the source that was read is of {len(self.alike)}")
        if self.once is not None and self.alike is None:
            raise InputsError("no source was read: there is nothing to decode from")
        if self.seen + count > self.options.max_tokens:
            raise InputsError(
                f"{self.seen + count} positions are needed: the stores are for max_tokens="
                f"{self.options.max_tokens}",
                hint="ask for fewer new tokens, or optimize with a larger max_tokens",
            )
        given = self._inputs(tokens, mask, positions)
        logits: torch.Tensor | None = None
        start = 0
        for size in self._parts(count):
            # Compiled steps are for one layout: parts of longer rows have another.
            part = {name: value[:, start : start + size].contiguous() for name, value in given.items()}
            logits = self._step(part)
            start += size
        assert logits is not None
        return logits

    def _parts(self, count: int) -> list[int]:
        """How many of ``count`` new tokens go in at once, one part after another."""
        parts: list[int] = []
        position, end = self.seen, self.seen + count
        while position < end:
            ahead = (bound - position % bound for bound in self.step_bounds)
            size = min(self.chunk, end - position, *ahead)
            # A program with recurrences is one for as many rows as it writes out.
            parts.append(1 if self.step.rows and size < self.chunk else size)
            position += parts[-1]
        return parts

    def _inputs(
        self, tokens: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        uncached, (rows, count) = self.uncached, tokens.shape
        given = {uncached.tokens: tokens}
        shown = mask[:, -count:] if mask is not None else torch.ones_like(tokens)
        if uncached.mask is not None:
            given[uncached.mask] = shown.to(tokens.dtype)
        elif mask is not None and not bool(shown.all()):
            raise InputsError("a mask that leaves tokens out: the model takes none, so padding would be read")
        if uncached.positions is not None:
            if positions is None:
                before = torch.zeros(rows, 1, dtype=torch.int64, device=tokens.device)
                if self.valid is not None:
                    before = self.valid[:rows, : self.seen].sum(1, keepdim=True)
                elif self.seen:
                    before = before + self.seen
                positions = (before + shown.long().cumsum(1) - 1).masked_fill(shown == 0, 0)
            given[uncached.positions] = _one_axis(positions)[..., -count:].expand(rows, count)
        return given

    def _step(self, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        count = next(iter(given.values())).shape[1]
        slots = torch.arange(self.seen, self.seen + count, device=self.device)
        values = {**given, "slots": slots, "source_end": self.end, **self.tables, **self.held}
        by_stretch = self.stretch is not None and count == self.chunk > 1
        step = self.prompts if by_stretch and self.prompts is not None else self.step
        arguments = [*step.weights.values(), *(values[name] for name in step.inputs)]
        run = self.single(self, self.seen + 1, arguments) if count == 1 else None
        if run is None:
            run = self.stretch if by_stretch and self.stretch is not None else self.general
            if count > 1 and self.several is not None:
                named = (*step.weights, *step.inputs)
                lasting = {*step.weights, *self.tables, *self.held}
                run = self.several(
                    run, frozenset(k for k, name in enumerate(named) if name in lasting), arguments
                )  # fmt: skip
        with torch.no_grad():
            (logits,) = run(*arguments)
        self.seen += count
        result: torch.Tensor = logits
        return result

    def reorder(self, index: torch.Tensor) -> None:
        """Sequence i goes on from what sequence ``index[i]`` was, in place, ``MOVED`` bytes at a time."""
        index = index.to(self.device)
        held = self.held
        if self.alike is not None and torch.equal(self.alike[: len(index)], self.alike[index]):
            own = {name for name, (i, _) in self.step.stores.items() if not self._crosses(i)} | {"valid"}
            held = {name: tensor for name, tensor in held.items() if name in own}
        for tensor in held.values():
            parts = -(-tensor.numel() * tensor.element_size() // MOVED)
            for part in tensor.chunk(parts, 1):
                part[: len(index)] = part.index_select(0, index)


    def _crosses(self, index: int) -> bool:
        """Whether a store is of a source; those behind the sites' are of convolutions."""
        return index < len(self.sites) and bool(self.sites[index].spec.source)


def step_bounds_of(sites: Sequence[Site]) -> tuple[int, ...]:
    """Beyond multiples of which positions no step goes (``CacheStore.stretch``)."""
    return tuple(sorted({site.store.step_bound(site.spec) for site in sites} - {0}))


def _one_axis(positions: torch.Tensor) -> torch.Tensor:
    """Positions [B, n] of those along several axes [axes, B, n], which are alike where there is text
    alone."""
    if positions.dim() < 3:
        return positions
    if not bool((positions == positions[:1]).all()):
        raise InputsError("positions differ from axis to axis: programs that decode take text alone")
    return positions[0]
