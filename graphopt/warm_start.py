"""A step that another process planned and compiled is taken over instead of being planned again.

    first process     capture -> key -> nothing kept -> passes, planning, lowering -> kept under the key
    later process     capture -> key -> calls, plan, report from the file; code from torch's caches

What is taken over is what was decided: nothing is decided differently for being kept. What only the report's
reader asks for (programs, dumps, curves) is made when it is asked for (``Session.unfold``), by doing then
what was left out.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import CodeType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.agreement import Offer, plan_digest, program_digest
from graphopt.artefact.operators import Operators
from graphopt.candidate import Declined, NearMiss, Reason
from graphopt.capture.chain import Call
from graphopt.capture.structure import attribute
from graphopt.captured import Captured
from graphopt.chain_run import ChainRunner, Layout
from graphopt.collectives import is_collective
from graphopt.emit.eager import eager_callable
from graphopt.emit.half_text import half_of_text
from graphopt.emit.held_products import Slot, holding
from graphopt.emit.weight_gradients import KERNELS
from graphopt.errors import HostMemoryError, brief
from graphopt.group_record import GroupRecord
from graphopt.host_memory import HostMemory
from graphopt.plans import Plan
from graphopt.program import InputSpec, Level, Program, Signature
from graphopt.recording import Roles
from graphopt.replayed_steps import replayed, roles_of
from graphopt.report import PassRecord
from graphopt.rewrites import Rewrite
from graphopt.step_key import NoKey, step_key
from graphopt.step_store import code_prefix, find_step, store_step
from graphopt.stored_step import (
    StepFormatError,
    StoredCall,
    StoredCode,
    StoredLayout,
    StoredMove,
    StoredSlot,
    StoredStep,
    results_text,
)

if TYPE_CHECKING:
    from graphopt.segmented import SegmentedStep
    from graphopt.session import Session

__all__ = ["KeptStep", "WarmStart", "reserved", "stored_call"]


@dataclass(frozen=True)
class KeptStep:
    """The present step as it is kept under ``key``. ``followed``: the code that dynamo captured it of;
    ``compared``: see ``StoredStep``."""

    key: str
    followed: frozenset[CodeType]
    compared: str = ""


class WarmStart:
    """The start of one graph of ``session``: ``restored`` takes over what was kept, else ``keep`` keeps what
    was made. ``note`` says in the end which, and why.

    ``name`` is the graph's, ``gm`` as dynamo made it, ``inputs`` its arguments; the outputs ``auxiliary``
    are cut off from autograd.
    """

    def __init__(
        self,
        session: Session,
        name: str,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        specs: Sequence[InputSpec],
        auxiliary: Sequence[int],
    ) -> None:
        self.session, self.name, self.specs = session, name, specs
        self.devices = frozenset(x.device for x in inputs if isinstance(x, torch.Tensor))
        self.key = ""
        self.note = ""
        self._before = self._counts()
        if not session.keeps or session.dry_run or session.replay is not None:
            return
        if os.environ.get("GRAPHOPT_CACHE") == "0":
            return
        try:
            if not _torch.keeps_code():
                raise NoKey("torch's caches of code are switched off")
            self.key = step_key(session, name, gm, inputs, specs, auxiliary)
        except NoKey as reason:
            self.note = f"warm start: nothing can be kept, as {reason}"
        except Exception as error:  # a graph, or a setting, of a kind that is not known here
            self.note = f"warm start: nothing can be kept, as telling the step apart raised {brief(error)}"

    def code_name(self, number: int, alternative: str, schedule: object) -> str:
        """The name in torch's cache of the code of a segment of the step, ``""`` where none is kept."""
        return code_prefix(self.key) + _short(number, alternative, schedule) if self.key else ""

    # --- taking over -----------------------------------------------------------------------

    def restored(self) -> Callable[..., Any] | None:
        """What runs the step, the session being as if it had planned and compiled it; ``None`` where nothing
        that was kept can be used, or other ranks cannot use the same."""
        found = self._found()
        offer = found if isinstance(found, str) else _offer(found)
        agreement = self.session.agreement
        if agreement is not None:
            why = agreement.take_over(offer)
        elif isinstance(offer, Offer) and offer.collective and not _torch.runs_alone():
            why = "it holds collectives, and ranks are not asked what they take over"
        else:
            why = offer if isinstance(offer, str) else ""
        if isinstance(found, str) or why:
            if self.key:
                self.note = f"warm start: planned and compiled anew, as {why}"
            return None
        run, step, plan = found
        self._take_over(step, plan)
        self.note = "warm start: plan and code are those of an earlier process"
        return run if step.whole else replayed(self.session, run, self.devices, lambda: _roles(step))

    def _found(self) -> tuple[Callable[..., Any], StoredStep, Plan] | str:
        """The code of a step that was kept, ready to run, the step and its plan, or why there is none."""
        if not self.key:
            return self.note.removeprefix("warm start: ") or "it neither reads nor keeps what was made"
        found = find_step(self.key)
        if isinstance(found, str):
            return found
        step, plan = found
        try:
            run = self._code(step)
        except Exception as error:  # whatever torch's caches raise on files that they cannot use
            return brief(error)
        return run if isinstance(run, str) else (run, step, plan)

    def _code(self, step: StoredStep) -> Callable[..., Any] | str:
        if step.operators:
            # Asked for, plugins bring the operators that the code calls.
            self.session.host.kernels()
            self.session.host.codecs()
        for operator in step.operators:
            if not _provided(operator):
                return f"the code calls {operator}, which nothing provides"
        codes = []
        operators = Operators(self.session.host, _COLLECTIVE) if step.whole else None
        of_text = None if operators is None else partial(_of_text, operators=operators)
        for code in step.codes:
            slots = tuple(map(_slot, code.slots))
            made = _torch.kept_code(code.name, partial(holding, slots=slots) if slots else None, of_text)
            if made is None:
                return "the code is in torch's caches no more"
            codes.append(made)
        if step.whole:
            return codes[0]
        try:
            moves, host = reserved(step.calls)
        except HostMemoryError as error:
            return error.message
        runner = ChainRunner(
            step.chain(),
            [codes[call.code] for call in step.calls],
            step.reruns,
            [call.written for call in step.calls],
            [call.random for call in step.calls],
            moves,
            host,
        )
        return lambda *args: runner(list(args))

    def _take_over(self, step: StoredStep, plan: Plan) -> None:
        session = self.session
        session.kept = KeptStep(self.key, _torch.followed_code(), step.compared)
        session.plan, session.reruns = plan, step.reruns
        session.planning_seconds += plan.seconds_to_plan
        session.records.extend(step.steps)
        session.declined.extend(step.declined)
        session.near_misses.extend(step.near_misses)
        session.rewrites.extend(step.rewrites)
        session.diagnostics.extend(step.diagnostics)
        emitter = session.emitter
        emitter.note([*emitter.groups, *step.groups], [*emitter.near_misses, *step.left])
        session.current = [
            Captured(told.name, _unseen(told.name), list(self.specs), told.mode, told=told, digest=digest)
            for told, digest in zip(step.programs, step.digests, strict=True)
        ]
        session.captured.extend(session.current)

    # --- keeping ---------------------------------------------------------------------------

    def keep(self, step: SegmentedStep | Captured) -> None:
        """Keep what was made of the graph for later processes: a chain of segments, or one program that
        runs op by op and was compiled to be kept as ``whole_name``."""
        if not self.key:
            return
        codes = (StoredCode(self.whole_name),) if isinstance(step, Captured) else tuple(step.kept_codes())
        why = self._not_to_keep(step, codes)
        if not why:
            assert self.session.plan is not None
            try:
                stored = self._stored_program(step) if isinstance(step, Captured) else self._stored(step)
                why = store_step(stored, self.session.plan)
                self.session.kept = None if why else KeptStep(self.key, _torch.followed_code())
            except TypeError as error:
                why = str(error)
        self.note += f"; nothing is kept, as {why}" if why else "; kept for later ones"

    @property
    def whole_name(self) -> str:
        """The name in torch's cache of the code of a step that is one program, ``""`` where none is kept."""
        return code_prefix(self.key) + _short("whole") if self.key else ""

    def _not_to_keep(self, step: SegmentedStep | Captured, codes: Sequence[StoredCode]) -> str:
        bad = [record.id for record in self._new().records if record.status in ("failed", "rolled-back")]
        if bad:
            return f"pass {bad[0]} failed"
        if any(group.kept for group in self._new().groups):
            return "emitted kernels are part of the code"
        if isinstance(step, Captured):
            constants = any(map(_has_constants, step.lowered))
        else:
            segments = [segment.gm for segment in step.chain.segments]
            constants = bool(step.chain.constants) or any(map(_has_constants, segments))
        if constants:
            return "the program holds constants"
        if self.session.written_parameters():
            return "the program updates parameters"
        if not all(_torch.is_kept(code.name) for code in codes):
            return "torch cannot keep the code"
        return ""

    def _stored_program(self, captured: Captured) -> StoredStep:
        return StoredStep(
            key=self.key,
            whole=True,
            inputs=(),
            calls=(),
            codes=(StoredCode(self.whole_name),),
            results=results_text(None),
            reruns=(),
            operators=_operators([captured]),
            roles="it runs operator by operator",
            lasting=(),
            rewritten=(),
            random=False,
            **_known_to_ranks([captured]),
            programs=(captured.summary,),
            **self._news(),
        )

    def _stored(self, step: SegmentedStep) -> StoredStep:
        session = self.session
        numbers = {code: number for number, code in enumerate(dict.fromkeys(step.kept_codes()))}
        runner = step.runner
        assert runner is not None
        calls = [
            stored_call(runner, k, call, numbers[code])
            for k, (call, code) in enumerate(zip(step.chain.calls, step.kept_codes(), strict=True))
        ]
        roles = roles_of(step, self.specs)
        known = roles if isinstance(roles, Roles) else Roles(frozenset())
        return StoredStep(
            key=self.key,
            whole=False,
            inputs=step.chain.inputs,
            calls=tuple(calls),
            codes=tuple(numbers),
            results=results_text(step.chain.results),
            reruns=session.reruns,
            operators=_operators(step.captured, [slot for code in numbers for slot in code.slots]),
            roles="" if isinstance(roles, Roles) else str(roles),
            lasting=tuple(sorted(known.lasting)),
            rewritten=tuple(sorted(known.written)),
            random=known.random,
            **_known_to_ranks(step.captured),
            programs=tuple(captured.summary for captured in step.captured),
            **self._news(),
        )

    def _news(self) -> dict[str, Any]:
        """What the session noted since this start began, as a stored step has it."""
        new = self._new()
        return {
            "steps": tuple(new.records),
            "declined": tuple(new.declined),
            "near_misses": tuple(new.near_misses),
            "rewrites": tuple(new.rewrites),
            "diagnostics": tuple(new.diagnostics),
            "groups": tuple(new.groups),
            "left": tuple(new.left),
        }

    def _counts(self) -> tuple[int, ...]:
        session = self.session
        lists = (
            session.records,
            session.declined,
            session.near_misses,
            session.rewrites,
            session.diagnostics,
        )
        said = session.emitter.groups, session.emitter.near_misses
        return (*(len(notes) for notes in lists), *map(len, said))

    def _new(self) -> _News:
        """What the session noted since this start began."""
        session, (records, declined, misses, rewrites, diagnostics, groups, left) = (
            self.session,
            self._before,
        )
        return _News(
            session.records[records:],
            session.declined[declined:],
            session.near_misses[misses:],
            session.rewrites[rewrites:],
            session.diagnostics[diagnostics:],
            list(session.emitter.groups)[groups:],
            list(session.emitter.near_misses)[left:],
        )


class _News(NamedTuple):
    records: list[PassRecord]
    declined: list[Declined]
    near_misses: list[NearMiss]
    rewrites: list[Rewrite]
    diagnostics: list[str]
    groups: list[GroupRecord]
    left: list[NearMiss]


_COLLECTIVE = ("_c10d_functional",)
"""Where torch's operators are that ranks run together, in the graphs that are kept."""

_NATIVE = ("aten", "prims", "prim", *_COLLECTIVE)


def _short(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _unseen(name: str) -> Program:
    """Stands for a program that nobody has asked for yet."""
    return Program(name, Level.SEMANTIC, fx.GraphModule({}, fx.Graph()), Signature((), ()))


def _known_to_ranks(programs: Sequence[Captured]) -> dict[str, Any]:
    """What ranks tell each other of the programs of a step, as a stored step has it."""
    # Calls of one kind are one program.
    joints = {id(c.joint): c.joint for c in programs if c.joint is not None}
    digests = {key: program_digest(joint) for key, joint in joints.items()}
    return {
        "digests": tuple(digests[id(captured.joint)] for captured in programs),
        "collective": any(is_collective(n.target) for joint in joints.values() for n in joint.graph.nodes),
    }


def _offer(found: tuple[Callable[..., Any], StoredStep, Plan]) -> Offer:
    _, step, plan = found
    return Offer(plan_digest(plan), step.digests, step.collective)


def _roles(step: StoredStep) -> Roles | Reason:
    if step.roles:
        return Reason(step.roles)
    return Roles(frozenset(step.lasting), frozenset(step.rewritten), step.random)


def _of_text(text: str, operators: Operators) -> Callable[..., Any]:
    return eager_callable(half_of_text(text, operators))


def _operators(programs: Sequence[Captured], slots: Sequence[StoredSlot] = ()) -> tuple[str, ...]:
    """Operators that code of a step calls and torch does not have. ``slots``: gradients that are added to."""
    targets = {n.target for c in programs for half in c.lowered for n in half.graph.nodes}
    names = {target._name for target in targets if isinstance(target, torch._ops.OpOverload)}
    if slots:
        names.update(f"graphopt::{kernel.replace('-', '_')}" for kernel in KERNELS.values())
    return tuple(sorted(name for name in names if name.partition("::")[0] not in _NATIVE))


def _provided(operator: str) -> bool:
    space, _, name = operator.partition("::")
    return hasattr(getattr(torch.ops, space), name.partition(".")[0])


def _has_constants(gm: fx.GraphModule) -> bool:
    nodes = gm.graph.find_nodes(op="get_attr")
    return any(isinstance(attribute(gm.graph, node), torch.Tensor) for node in nodes)


def _slot(slot: StoredSlot) -> Slot:
    like = slot.like
    with _torch.fake_mode():
        made = torch.empty_strided(like.shape, like.stride, dtype=_dtype(like.dtype), device=like.device)
    return Slot(slot.position, slot.name, made)


def stored_call(runner: ChainRunner, number: int, call: Call, code: int) -> StoredCall:
    """Call ``number`` of a chain, which runs ``code``, and what it moves to the host, as it is stored."""
    moves = tuple(
        StoredMove(n, StoredLayout(layout.shape, layout.stride, str(layout.dtype)))
        for n, layout in runner.moves.get(number, {}).items()
    )
    return StoredCall(
        code, call.args, call.outs, call.drops, tuple(runner.written[number]), runner.random[number], moves
    )


def reserved(calls: Sequence[StoredCall]) -> tuple[dict[int, dict[int, Layout]], HostMemory | None]:
    """What ``calls`` move to the host, by call, and where to. Raises ``HostMemoryError``."""
    moves = {
        number: {move.number: _layout(move.layout) for move in call.moves}
        for number, call in enumerate(calls)
        if call.moves
    }
    if not moves:
        return {}, None
    host = HostMemory(torch.device("cuda", torch.cuda.current_device()))
    host.reserve([layout.bytes for moved in moves.values() for layout in moved.values()])
    return moves, host


def _layout(layout: StoredLayout) -> Layout:
    return Layout(layout.shape, layout.stride, _dtype(layout.dtype))


def _dtype(text: str) -> torch.dtype:
    found = getattr(torch, text.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise StepFormatError(f"{text!r} is no dtype")
    return found
