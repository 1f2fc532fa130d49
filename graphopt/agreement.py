"""Ranks that share a model run the same programs under the same plan, or none of them goes on.

    asked     options, inputs, local shapes of weights     others elsewhere: refused before anything runs
    kept      what an earlier process made of the graph    the same everywhere: taken over; else by none
    outcome   did capture and planning succeed             an error of one rank is one of all
    planned   programs, digest of the plan                 same: go on
              one budget, plans differ                     what the tightest rank chose is tried on all
              plans differ with the budgets                refused

Plans of the same program differ where what is measured goes in: memory between the graphs of a step, tuned
kernels. The plan taken is that of the rank with the smallest budget in bytes, of equals that with the least
predicted peak, then the lowest. It has to fit the budget of every rank.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from graphopt import _torch
from graphopt.budget import format_bytes
from graphopt.collectives import is_collective
from graphopt.errors import UnevenRanksError, brief
from graphopt.plans import Plan
from graphopt.program import Program, tensor_leaves
from graphopt.ranks import Ranks, ranks_text

if TYPE_CHECKING:
    from graphopt.captured import Captured
    from graphopt.session import Session

__all__ = ["Agreement", "Offer", "plan_digest", "program_digest"]

_ALONE = 'process_group="off" lets each rank decide alone, where nothing depends on the others'


@dataclass(frozen=True)
class Offer:
    """A step that an earlier process made and this one could take over: digests of its ``plan`` and of its
    ``programs``, and whether one of them is ``collective``, holds operators that ranks run together."""

    plan: str
    programs: tuple[str, ...]
    collective: bool


@dataclass
class Agreement:
    """What ``ranks`` agree on for one optimized model. ``asked``: options of ``optimize`` as text, which have
    to be the same everywhere, ``budget`` the one that need not. ``note`` is told what was agreed."""

    ranks: Ranks
    asked: Mapping[str, str]
    budget: str
    note: Callable[[str], object]
    _budgets: dict[int, str] = field(default_factory=dict)
    _answered: bool = False
    _settled: bool = False

    def compare(self, model: torch.nn.Module, inputs: Any) -> None:
        """Raise ``UnevenRanksError`` on every rank where options, inputs or weights differ."""
        weights = (*model.named_parameters(), *model.named_buffers())
        training = torch.is_grad_enabled() and model.training
        said = {
            **{name: [text] for name, text in self.asked.items()},
            "mode": ["training" if training else "inference"],
            "inputs": list(map(_look, torch.utils._pytree.tree_leaves(inputs))),
            "weights": [f"{name}: {_look(weight)}" for name, weight in weights],
        }
        told = self.ranks.exchange("what it was asked", [self.budget, said])
        self._budgets = {rank: budget for rank, (budget, _) in told.items()}
        first = self.ranks.members[0]
        for rank, (_, other) in told.items():
            for name in said:
                pairs = itertools.zip_longest(told[first][1][name], other[name], fillvalue="nothing")
                for here, there in pairs:
                    if here == there:
                        continue
                    raise UnevenRanksError(
                        f"ranks are uneven in {name}: rank {first} has {here}, rank {rank} has {there}",
                        hint=f"give all of {ranks_text(self.ranks.members)} the same; {_ALONE}",
                    )

    def together(self, what: str, act: Callable[[], None]) -> None:
        """``act()`` on every rank. Raises its error, and where it was another rank's alone,
        ``UnevenRanksError``."""
        failed: Exception | None = None
        try:
            act()
        except UnevenRanksError:
            raise
        except Exception as error:
            failed = error
        told = self.ranks.exchange(f"whether {what} succeeded", None if failed is None else brief(failed))
        if failed is not None:
            raise failed
        for rank, why in told.items():
            if why is not None:
                raise UnevenRanksError(
                    f"{what} failed on rank {rank}: {why}",
                    hint="what failed there is to be mended: no rank goes on alone",
                )

    def capture(self, act: Callable[[], None]) -> None:
        """``together`` for ``act``, which captures and plans; ranks agree meanwhile on what they take over,
        each telling once what it could."""
        self._answered = self._settled = False

        def answered() -> None:
            try:
                act()
            except Exception:
                self._answer()
                raise
            self._answer()

        self.together("capture", answered)

    def _answer(self) -> None:
        # Ranks that captured the whole model wait for it.
        if not self._answered:
            self.take_over("it captured no whole model")

    def take_over(self, offer: Offer | str) -> str:
        """Why this rank may not take over what an earlier process made, which it could (an ``Offer``) or
        could not (why); ``""`` where it may. During a capture all ranks do, and what they offer is the same,
        or none does."""
        if self._settled:
            # Which rank captures another program when is its own affair, but for collectives.
            apart = isinstance(offer, Offer) and offer.collective
            why = "it holds collectives, and ranks ask each other about their first program alone"
            return offer if isinstance(offer, str) else why if apart else ""
        if self._answered:
            return offer if isinstance(offer, str) else "ranks agree on one program of a capture alone"
        self._answered = True
        said = offer if isinstance(offer, str) else [offer.plan, list(offer.programs)]
        told = self.ranks.exchange("what an earlier process kept for it", said)
        if isinstance(offer, str):
            return offer
        for rank, other in told.items():
            if isinstance(other, str):
                return f"rank {rank} takes nothing over: {other}"
        first = self.ranks.members[0]
        for rank, other in told.items():
            for what, here, there in zip(("plan", "programs"), told[first], other, strict=True):
                if here != there:
                    return f"the {what} that ranks {first} and {rank} kept differ"
        return ""

    def settle(self, session: Session, adopt: Callable[[Plan], None]) -> None:
        """See that the programs of ``session`` are everyone's, and have all run one plan: ``adopt(plan)``
        takes over another rank's."""
        told = self._plans(session)
        self._settled = True
        digests = {rank: said["plan"] for rank, said in told.items()}
        if len(set(digests.values())) > 1:
            leader = self._settle_on_one(session, told, adopt)
            self.note(f"the plan is that of rank {leader}: those that ranks made themselves differed")
        elif session.plan is not None:
            digest = next(iter(digests.values()))
            self.note(f"{ranks_text(self.ranks.members)} run the same programs and plan [{digest}]")

    def _settle_on_one(self, session: Session, told: Mapping[int, Any], adopt: Callable[[Plan], None]) -> int:
        """The rank whose plan all run by now: the first one that fits everywhere. Ranks that saw a step see
        the memory of other threads in it, and what is exactly in the budget of one may be beyond another's.
        """
        plan = session.plan
        sent = self.ranks.exchange("its plan", None if plan is None else plan.to_json())
        digests = {rank: said["plan"] for rank, said in told.items()}
        order = self._tightest_first(told)
        known = [digests[rank] for rank in order]
        leaders = [rank for k, rank in enumerate(order) if digests[rank] not in known[:k]]
        for leader in leaders:
            present = told[self.ranks.rank]["plan"]
            chosen = Plan.from_json(sent[leader])
            self.together(
                f"taking over the plan of rank {leader}",
                partial(_unless, present == digests[leader], adopt, chosen),
            )
            told = self._plans(session)
            self._check_same(told, leader)
            if self._beyond(told) is None:
                return leader
        beyond = self._beyond(told)
        assert beyond is not None
        said = told[beyond]
        raise UnevenRanksError(
            f"the plan of rank {leaders[-1]} takes {said['peak']} bytes on rank {beyond}, which has a budget "
            f"of {said['budget']} bytes, and no other rank's fits everywhere",
            hint=f"ask for budget={max(other['peak'] for other in told.values())} or more",
        )

    def _beyond(self, told: Mapping[int, Any]) -> int | None:
        """A rank that its plan takes more memory on than its budget, furthest first."""
        over = {
            rank: said["peak"] - said["budget"] for rank, said in told.items() if said["budget"] is not None
        }
        worst = max(over, key=lambda rank: over[rank], default=None)
        return worst if worst is not None and over[worst] > 0 else None

    def confirm(self, session: Session) -> None:
        """Raise ``UnevenRanksError`` where programs planned later, which ranks run together, differ."""
        programs = [captured.joint for captured in session.current if captured.joint is not None]
        if any(is_collective(node.target) for program in programs for node in program.graph.nodes):
            told = self._plans(session)
            digests = {rank: said["plan"] for rank, said in told.items()}
            first, *others = digests
            for rank in others:
                if digests[rank] != digests[first]:
                    raise UnevenRanksError(
                        f"ranks {first} and {rank} planned a program with collectives differently: "
                        f"{digests[first]} and {digests[rank]}",
                        hint="give optimize() the plan of one as plan=",
                    )

    def _plans(self, session: Session) -> dict[int, Any]:
        """What each rank has planned; checked to be of the same programs."""
        plan = session.plan
        said = {
            "programs": [
                [s.name, s.mode, s.inputs, _digest_of(captured)]
                for captured in session.current
                for s in [captured.summary]
            ],
            "plan": "" if plan is None else plan_digest(plan),
            "budget": None if plan is None else plan.budget,
            "peak": 0 if plan is None else plan.predicted.peak_bytes,
        }
        told = self.ranks.exchange("its plan in short", said)
        first = self.ranks.members[0]
        without = [rank for rank, other in told.items() if not other["plan"]]
        if without and len(without) < len(told):
            raise UnevenRanksError(
                f"the model could not be captured on {ranks_text(without)}, and was on the others",
                hint=f'on_error="raise" there says why; {_ALONE}',
            )
        for rank, other in told.items():
            if difference := _difference(told[first]["programs"], other["programs"]):
                raise UnevenRanksError(
                    f"ranks {first} and {rank} captured different programs: {difference}",
                    hint=f"ranks have to run the same model on inputs of the same shapes; {_ALONE}",
                )
        return told

    def _tightest_first(self, told: Mapping[int, Any]) -> list[int]:
        """Whose plans are tried. Raises ``UnevenRanksError`` where budgets made the difference."""
        if len(set(self._budgets.values())) > 1:
            tight, *_, loose = _by_tightness(told)
            raise UnevenRanksError(
                f"budgets differ, and so do the plans: rank {tight} has {self._budgets[tight]} and plans "
                f"{format_bytes(told[tight]['peak'])}, rank {loose} has {self._budgets[loose]} and plans "
                f"{format_bytes(told[loose]['peak'])}",
                hint=f"give all of {ranks_text(self.ranks.members)} the budget of rank {tight}",
            )
        return _by_tightness(told)

    def _check_same(self, told: Mapping[int, Any], leader: int) -> None:
        for rank, said in told.items():
            if said["plan"] != told[leader]["plan"]:
                raise UnevenRanksError(
                    f"rank {rank} could not take over the plan of rank {leader}: it runs {said['plan']}, not "
                    f"{told[leader]['plan']}",
                    hint="report this program",
                )


def plan_digest(plan: Plan) -> str:
    """Equal for plans that run the same: schedules, rewrites, what is moved and packed. Not what programs
    hold of numbers (a rank's offset into a table), nor predictions."""
    runs = [
        [c.program, c.alternative, *map(list, (c.schedule.forward, c.schedule.saved, c.schedule.backward))]
        + [value.node for value in c.offloaded]
        for c in plan.choices
    ]
    packed = None if plan.quantization is None else plan.quantization.summary
    return _hash([runs, list(map(str, plan.reruns)), packed, plan.emit])


def program_digest(program: Program) -> str:
    """Equal for programs that ranks may run together: names, operators, wiring, types. Numbers and names of
    groups are each rank's own."""
    lines = []
    for node in program.graph.nodes:
        types = [(str(t.dtype), list(map(str, t.shape))) for t in tensor_leaves(node.meta.get("val"))]
        target = "" if node.op in ("placeholder", "output") else str(node.target)
        lines.append([node.name, target, [source.name for source in node.all_input_nodes], types])
    return _hash(lines)


def _digest_of(captured: Captured) -> str:
    return captured.digest if captured.joint is None else program_digest(captured.joint)


def for_programs(plan: Plan, session: Session) -> Plan:
    """Another rank's plan of the programs of ``session``, which numbers in them may tell apart."""
    own = {c.name: c.joint.fingerprint for c in session.current if c.joint is not None}
    return replace(
        plan,
        choices=tuple(replace(c, fingerprint=own.get(c.program, c.fingerprint)) for c in plan.choices),
    )


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _look(value: Any) -> str:
    parts = _torch.plain_tensors(value)
    if not parts:
        return repr(value) if isinstance(value, (bool, int, float, str, type(None))) else type(value).__name__
    return " + ".join(
        f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)} on {t.device.type}" for t in parts
    )


def _difference(one: list[list[str]], other: list[list[str]]) -> str:
    if len(one) != len(other):
        return f"{len(one)} and {len(other)} of them"
    for left, right in zip(one, other, strict=True):
        for what, a, b in zip(("name", "mode", "inputs", "graph"), left, right, strict=True):
            if a != b:
                return f"{what} of {left[0]} is {a} and {b}"
    return ""


def _by_tightness(told: Mapping[int, Any]) -> list[int]:
    """Ranks by their budgets, the tightest first, and by what they plan to take."""

    def key(rank: int) -> tuple[float, int, int]:
        budget = told[rank]["budget"]
        return (float("inf") if budget is None else budget), told[rank]["peak"], rank

    return sorted(told, key=key)


def _unless(done: bool, act: Callable[[Plan], None], plan: Plan) -> None:
    if not done:
        act(plan)
