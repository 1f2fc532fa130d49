"""What passes propose: candidates, frontiers, and the reasons for saying no."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graphopt.schedule import DeferredSchedule, Schedule

if TYPE_CHECKING:
    from graphopt.edit import Edit

__all__ = ["Candidate", "CostDelta", "Declined", "Frontier", "FrontierPoint", "NearMiss", "Reason"]


@dataclass(frozen=True)
class Reason:
    """Why something was not done: a sentence and the nodes it is about."""

    text: str
    nodes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.text} ({', '.join(self.nodes)})" if self.nodes else self.text


@dataclass(frozen=True)
class CostDelta:
    """Predicted change; negative is less. ``error`` is the pass's own metric, 0 when exact."""

    peak_bytes: int = 0
    static_bytes: int = 0
    seconds: float = 0.0
    error: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """One rewrite that a pass offers.

    ``exactness`` is ``"exact"``, ``"reassociated"`` (same mathematics, another order of rounding)
    or ``"lossy"``; ``metric`` says what ``delta.error`` measures, and ``allowed_by`` which pass ``allow``
    has to name for it, where that is not the candidate's own. ``conflicts`` are ids of candidates that
    cannot be chosen beside this one. An ``alternative`` trades one resource for another: the planner
    decides, together with the other levers, whether it pays under the budget. Those of one ``family`` do
    the same in several places and are weighed together, under its name.
    """

    id: str
    pass_id: str
    nodes: tuple[str, ...]
    delta: CostDelta
    apply: Callable[[Edit], None]
    exactness: str = "exact"
    metric: str = ""
    conflicts: tuple[str, ...] = ()
    alternative: bool = False
    family: str = ""
    allowed_by: str = ""


@dataclass(frozen=True)
class FrontierPoint:
    """One schedule of a joint program and what it costs.

    Bytes are above the static base (parameters, buffers, inputs), gradients included. ``source`` is
    the schedule, or one that is worked out when ``schedule`` is first read. ``forward_peak`` and
    ``backward_peak`` are the peaks of the two halves, ``retained`` what stays alive between them,
    ``gradients`` what the backward leaves. ``seconds`` is the time added by recomputation, predicted.
    ``alternative`` is the id of the candidate whose program the schedule is of, ``""`` for the program
    itself. ``forward_seconds`` and ``backward_seconds`` are the predicted times of the halves. The values
    ``offloaded`` wait in the host's memory: ``moved_bytes`` of what is ``retained`` are gone once the next
    program of the step has run, and back while its backward runs. ``spared``: bytes of what other programs
    hand to this one, and retain, that nobody needs any more once its forward has run.
    """

    source: Schedule | DeferredSchedule
    forward_peak: int
    backward_peak: int
    retained: int
    gradients: int
    seconds: float
    flops: int = 0
    label: str = ""
    alternative: str = ""
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    offloaded: tuple[str, ...] = ()
    moved_bytes: int = 0
    spared: int = 0

    @property
    def schedule(self) -> Schedule:
        return self.source if isinstance(self.source, Schedule) else self.source.schedule

    @property
    def peak_bytes(self) -> int:
        return max(self.forward_peak, self.backward_peak)


@dataclass(frozen=True)
class Frontier:
    """A whole curve of choices, least peak first; each is best in peak, retained bytes or seconds.

    ``floor_bytes`` is a proven lower bound on the peak of any schedule of the program;
    ``seconds_bound(budget)`` a proven lower bound on the added seconds of any that fits. A frontier that
    ``extends`` holds every point of the one before it (``PassContext.curve``) and more. ``host_bytes``:
    what may be moved to the host's memory, over all programs. ``effort``: the share of the usual work that
    went into it, or into the least of its forms (``PassContext.effort``).
    """

    pass_id: str
    points: tuple[FrontierPoint, ...]
    floor_bytes: int = 0
    seconds_bound: Callable[[int], float] = lambda budget: 0.0
    extends: bool = False
    host_bytes: int = 0
    effort: float = 1.0


@dataclass(frozen=True)
class NearMiss:
    """A place where a rule matched ``matched`` of ``total`` nodes and then failed."""

    rule: str
    at: str
    matched: int
    total: int
    reason: Reason


@dataclass(frozen=True)
class Declined:
    """A candidate that the planner did not choose, and why."""

    candidate: str
    why: str
