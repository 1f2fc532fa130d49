"""The decision at the joint level: what runs when, what is saved, what runs again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["DeferredSchedule", "Schedule"]


@dataclass(frozen=True)
class Schedule:
    """An execution order of a joint program, split into forward and backward.

    Values are named by their node in the joint graph.

    ``forward``: call nodes in execution order. ``saved``: values handed from forward to backward
    (graph inputs that the backward reads are not listed). ``backward``: call nodes in execution
    order; a node that is also in ``forward`` runs again there (recomputation), and one that
    occurs n times runs n times, each occurrence replacing the value of the one before.

    An inference program has no backward: ``saved`` and ``backward`` are empty.
    """

    forward: tuple[str, ...]
    saved: tuple[str, ...] = ()
    backward: tuple[str, ...] = ()

    @property
    def recomputed(self) -> tuple[str, ...]:
        """Forward nodes that run again in the backward, in order, once for each run."""
        first = set(self.forward)
        return tuple(name for name in self.backward if name in first)

    def to_json(self) -> dict[str, Any]:
        return {"forward": list(self.forward), "saved": list(self.saved), "backward": list(self.backward)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Schedule:
        return cls(tuple(data["forward"]), tuple(data["saved"]), tuple(data["backward"]))


class DeferredSchedule:
    """A schedule that is worked out when it is first asked for: of a frontier few are.

    Pickles and copies as the schedule itself.
    """

    __slots__ = ("_made",)

    def __init__(self, make: Callable[[], Schedule]) -> None:
        self._made: Schedule | Callable[[], Schedule] = make

    @property
    def schedule(self) -> Schedule:
        if not isinstance(self._made, Schedule):
            self._made = self._made()
        return self._made

    def __reduce__(self) -> tuple[type[Schedule], tuple[tuple[str, ...], ...]]:
        made = self.schedule
        return Schedule, (made.forward, made.saved, made.backward)
