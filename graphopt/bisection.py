"""The smallest set of rewrites that makes a run fail, by delta debugging.

Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input" (TSE 2002), algorithm ddmin:
halves, then their complements, then finer parts, until no single rewrite can be left out. Which set is tried
next follows from the results so far alone, so they are all the state there is.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from graphopt.errors import GraphoptError

__all__ = ["Bisection", "BisectionError", "Found", "Outcome"]

Outcome = Literal["passes", "fails", "untested"]
_LETTERS: dict[str, Outcome] = {"p": "passes", "f": "fails", "u": "untested"}


class BisectionError(GraphoptError, ValueError):
    """A state that belongs to other rewrites, or a search that cannot begin."""

    code = "bisect"


@dataclass(frozen=True)
class Found:
    """``rewrites`` fail together, and none of them can be left out. Empty: the run fails without any.

    ``complete`` is false where the tests were used up before: they still fail together.
    """

    rewrites: tuple[str, ...]
    tests: int
    complete: bool = True


@dataclass
class Bisection:
    """A search among ``rewrites``, in the order in which they were applied.

    ``state`` is what ``str()`` of an earlier search of the same rewrites gave: a hash of them and a letter
    for each test so far (``p`` passes, ``f`` fails, ``u`` could not be tested). Raises ``BisectionError``
    for another state.
    """

    rewrites: tuple[str, ...]
    state: str = ""
    outcomes: list[Outcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.state:
            return
        digest, colon, letters = self.state.partition(":")
        if not colon or set(letters) - set(_LETTERS):
            raise BisectionError(
                f"cannot read state {self.state!r}: expected {self.digest}: and letters of p, f and u"
            )
        if digest != self.digest:
            raise BisectionError(
                f"state {self.state!r} is of other rewrites: these are {self.digest}",
                hint="give the target, flags and versions that it was begun with, or begin anew",
            )
        self.outcomes = [_LETTERS[letter] for letter in letters]

    @property
    def digest(self) -> str:
        return hashlib.sha256("\n".join(self.rewrites).encode()).hexdigest()[:8]

    def __str__(self) -> str:
        return f"{self.digest}:{''.join(outcome[0] for outcome in self.outcomes)}"

    def run(self, test: Callable[[tuple[str, ...]], Outcome], *, most: int | None = None) -> Found:
        """Search with ``test``, which runs with some rewrites alone; at most ``most`` new tests.

        Raises ``BisectionError`` if all of them together do not fail, or that cannot be tested.
        """
        told = iter(tuple(self.outcomes))
        tests, new = 0, 0
        known: dict[tuple[str, ...], Outcome] = {}

        def outcome(some: tuple[str, ...]) -> Outcome:
            nonlocal tests, new
            if some in known:
                return known[some]
            found = next(told, None)
            if found is None:
                if most is not None and new >= most:
                    raise _UsedUp
                found = test(some)
                new += 1
                self.outcomes.append(found)
            tests += 1
            known[some] = found
            return found

        smallest = self.rewrites
        try:
            whole = outcome(self.rewrites)
            if whole != "fails":
                what = "does not fail" if whole == "passes" else "could not be tested"
                whole_set = f"all {len(self.rewrites)} rewrites"
                raise BisectionError(f"with {whole_set} the run {what}: there is nothing to find")
            if self.rewrites and outcome(()) == "fails":
                return Found((), tests)
            for some in _shrinking(self.rewrites, outcome):
                smallest = some
        except _UsedUp:
            return Found(smallest, tests, complete=False)
        return Found(smallest, tests)


class _UsedUp(Exception):
    """No more tests are allowed."""


def _shrinking(
    items: tuple[str, ...], outcome: Callable[[tuple[str, ...]], Outcome]
) -> Iterator[tuple[str, ...]]:
    """Sets that fail, each smaller than the one before; the last is as small as it gets."""
    yield items
    parts = 2
    while len(items) > 1:
        pieces = _pieces(items, parts)
        rests = [tuple(x for x in items if x not in set(piece)) for piece in pieces]
        # With two parts each rest is the other part.
        tried = [*pieces, *(rests if parts > 2 else ())]
        failing = next((some for some in tried if outcome(some) == "fails"), None)
        if failing is not None:
            parts = 2 if failing in pieces else max(parts - 1, 2)
            items = failing
            yield items
        elif parts < len(items):
            parts = min(2 * parts, len(items))
        else:
            return


def _pieces(items: Sequence[str], count: int) -> list[tuple[str, ...]]:
    cuts = [len(items) * k // count for k in range(count + 1)]
    return [tuple(items[start:stop]) for start, stop in itertools.pairwise(cuts)]
