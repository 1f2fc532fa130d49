"""One half of a step as what its order is about: operators, the memory they make and read, what must
come before what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

__all__ = ["Half"]


@dataclass(frozen=True)
class Half:
    """Operators and buffers by number; the order given is 0, 1, 2, ...

    ``size[b]``: bytes. ``reads[i]``, ``makes[i]``: buffers that operator i reads and makes. ``extra[i]``:
    bytes that it takes besides, while it runs. ``before[i]``: operators that must have run. ``entry``:
    buffers that are there from the start. ``lasting``: those that outlive the half.
    """

    size: tuple[int, ...]
    reads: tuple[tuple[int, ...], ...]
    makes: tuple[tuple[int, ...], ...]
    extra: tuple[int, ...]
    before: tuple[frozenset[int], ...]
    entry: frozenset[int]
    lasting: frozenset[int]

    @property
    def count(self) -> int:
        return len(self.reads)

    @cached_property
    def after(self) -> tuple[tuple[int, ...], ...]:
        """Operators that must wait for each."""
        found: list[list[int]] = [[] for _ in self.reads]
        for i, earlier in enumerate(self.before):
            for j in earlier:
                found[j].append(i)
        return tuple(map(tuple, found))

    @cached_property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        found: list[list[int]] = [[] for _ in self.size]
        for i, read in enumerate(self.reads):
            for b in read:
                found[b].append(i)
        return tuple(map(tuple, found))

    @cached_property
    def opening(self) -> int:
        """Bytes held as the half begins."""
        return sum(self.size[b] for b in self.entry)

    def levels(self, order: Sequence[int]) -> list[int]:
        """Bytes held while each operator of ``order`` runs: what it reads and what it makes included."""
        remaining = [len(found) for found in self.readers]
        size, lasting = self.size, self.lasting
        live, levels = self.opening, []
        for i in order:
            live += sum(size[b] for b in self.makes[i])
            levels.append(live + self.extra[i])
            for b in self.reads[i]:
                remaining[b] -= 1
                if not remaining[b] and b not in lasting:
                    live -= size[b]
            for b in self.makes[i]:
                if not self.readers[b] and b not in lasting:
                    live -= size[b]
        return levels

    @cached_property
    def least_peak(self) -> int:
        """Bytes that are held at some moment of every order: by an operator alone, by whatever runs first,
        at the end."""
        size = self.size
        made = [
            sum(size[b] for b in makes) + extra for makes, extra in zip(self.makes, self.extra, strict=True)
        ]
        alone = [more + sum(size[b] for b in reads) for more, reads in zip(made, self.reads, strict=True)]
        first = [more for more, before in zip(made, self.before, strict=True) if not before]
        last = sum(size[b] for b in self.lasting)
        return max([self.opening + min(first, default=0), last, *alone])

    def peak(self, order: Sequence[int]) -> int:
        return max(self.levels(order), default=0)

    def alone(self, entry: frozenset[int], lasting: frozenset[int]) -> Half:
        """The same half where nothing is handed over: of what is there from the start all but ``entry`` is
        held only while it is read, and only ``lasting`` outlives it. No recomputation gets below its peak."""
        made_again = self.entry - entry
        held = tuple(0 if b in made_again else size for b, size in enumerate(self.size))
        extra = tuple(
            more + sum(self.size[b] for b in reads if b in made_again)
            for more, reads in zip(self.extra, self.reads, strict=True)
        )
        return replace(self, size=held, extra=extra, entry=entry, lasting=lasting)
