"""One graph of a model on its way down: programs at each level, choices, what runs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch.fx as fx

from graphopt.candidate import Frontier, FrontierPoint
from graphopt.capture.shapes import input_shapes
from graphopt.errors import StalePlanError
from graphopt.program import InputSpec, Program
from graphopt.report import ProgramSummary
from graphopt.schedule import Schedule

if TYPE_CHECKING:
    from graphopt.rewriting import Rewriting
    from graphopt.segmented import SegmentedStep

__all__ = ["Captured", "Ran"]


@dataclass
class Captured:
    """One graph of a model on its way down: programs at each level, choices, what runs.

    ``forms`` are what it may be instead: itself under ``""`` and its alternatives by candidate.
    """

    name: str
    semantic: Program
    specs: list[InputSpec]
    mode: str = "infer"
    joint: Program | None = None
    traced: str = ""
    """Fingerprint of the joint program as it was traced, before passes rewrote it."""
    baseline: Schedule | None = None
    frontier: Frontier | None = None
    reference: FrontierPoint | None = None
    reference_seconds: float = 0.0
    flops: Mapping[str, int] = field(default_factory=dict)
    point: FrontierPoint | None = None
    lowered: tuple[fx.GraphModule, ...] = ()
    provisional: bool = False
    ran: bool = False
    settled: bool = False
    run: Callable[..., Any] | None = None
    plain: Callable[..., Any] | None = None
    """What runs the graph as it was captured, nothing compiled."""
    recompile: Callable[[], Callable[..., Any]] | None = None
    look: Callable[[], None] | None = None
    """See the program as it will be compiled, with its forms."""
    forms: Mapping[str, Captured] = field(default_factory=dict)
    form: str = ""
    """Which form of another program it is: the names of the alternatives that were applied."""
    effort: float = 1.0
    """Share of their usual work that passes which search spend on it: less than 1 for a form of another."""
    room: int | None = None
    """Bytes that a form of another program may take, by what that one takes as it is."""
    passed: tuple[Hashable, Program, Rewriting] | None = None
    """What joint-level passes made of a trace, and what that depended on."""
    budget_decides: bool = False
    """Whether passes choose otherwise for it, or for one of its forms, with a budget than without."""
    partly: bool = False
    """Whether there may be more schedules and forms than were looked at: what is faster was enough."""
    calls: tuple[str, ...] = ()
    """The names in plans of the calls of a program that is several; its own where it is one."""
    passed_over: tuple[str, ...] = ()
    """Forms that passes offer and that were not looked at, as a plan that is replayed names others."""
    seen: Hashable = None
    """What its frontier and forms depended on when they were found; ``None`` while they are not."""
    told: ProgramSummary | None = None
    """What the report says of a program that was taken over from another process and not seen here yet."""
    digest: str = ""
    """What such a program is compared with those of other ranks by (``graphopt.agreement``)."""

    @property
    def summary(self) -> ProgramSummary:
        """The graph in the report."""
        if self.told is not None:
            return self.told
        sizes = [len(half.graph.nodes) for half in self.lowered]
        return ProgramSummary(
            self.name,
            self.mode,
            len(self.semantic.graph.nodes),
            len(self.joint.graph.nodes) if self.joint else 0,
            sizes[0] if sizes else 0,
            sizes[1] if len(sizes) > 1 else 0,
            input_shapes(self.semantic),
        )

    @property
    def schedule(self) -> Schedule:
        assert self.point is not None
        return self.point.schedule

    def program_at(self, point: FrontierPoint) -> Program | None:
        """The joint program that the schedule of ``point`` is of."""
        form = self.forms.get(point.alternative)
        return self.joint if form is None else form.joint

    def run_at(self, point: FrontierPoint) -> None:
        """Decide for ``point``, and for the form that its schedule is of."""
        self.point = point
        self.become(point.alternative)

    def start_over(self) -> None:
        """Be again what was captured, nothing seen or chosen of it. Forms are made of that alone: seen from
        one that was chosen, the others would be lost and its own name stand for another program."""
        self.become("")
        self.forms = {}
        self.joint, self.traced, self.baseline = None, "", None
        self.frontier, self.reference, self.point = None, None, None
        self.settled, self.budget_decides, self.partly, self.seen = False, False, False, None
        self.passed_over = ()

    def become(self, alternative: str) -> None:
        """Take on the programs of a form. Raises ``StalePlanError`` for one that is not offered."""
        if alternative not in self.forms:
            if alternative:
                known = sorted({*filter(None, self.forms), *self.passed_over})
                offered = ", ".join(known) or "none"
                raise StalePlanError(
                    f"the plan runs program {self.name!r} with {alternative!r}, which no pass offers here: "
                    f"there is {offered}",
                    hint="make the plan again with graphopt.plan(...)",
                )
            return
        form = self.forms[alternative]
        self.semantic, self.joint, self.traced, self.baseline, self.flops = (
            form.semantic,
            form.joint,
            form.traced,
            form.baseline,
            form.flops,
        )


@dataclass
class Ran:
    """A whole program that runs: the roles of its inputs, outputs that are ``detached`` from autograd, and
    what it was made as: one program, or a chain of segments."""

    specs: Sequence[InputSpec]
    detached: tuple[int, ...]
    step: Captured | SegmentedStep | None = None
