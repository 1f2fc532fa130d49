"""A step as a chain of segments: each kind planned once, each (kind, schedule) compiled once.

Autograd runs between the segments, so parameters' gradients are handed over as each segment's
backward ends, and the values of one are gone before the one before it begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.alternatives import Offer, begins, joined, united
from graphopt.ambient_state import AmbientState
from graphopt.candidate import Frontier, FrontierPoint
from graphopt.capture.blocks import find_blocks
from graphopt.capture.chain import Segment, Segmented
from graphopt.capture.joint import inference_program, joint_program, save_everything
from graphopt.capture.segments import split
from graphopt.capture.semantic import semantic_program
from graphopt.chain_plan import Link, chain_peak, hull, plan_chain, rerun_calls
from graphopt.chain_rows import draws_random, pinned, written_inputs
from graphopt.chain_run import ChainRunner, Layout
from graphopt.choosing import choose_schedules, infeasible, record_plan, replayed_point, take
from graphopt.emit.inductor import JointSeen
from graphopt.emit.lowered import LoweredMemory, saved_count
from graphopt.errors import CaptureError, HostMemoryError, LoweringError
from graphopt.host_memory import HostMemory
from graphopt.lowered_points import corrected, exact_point, with_bytes
from graphopt.offered_schedules import follows_plan, frontier_of, named_choices, named_forms
from graphopt.order import must_happen
from graphopt.partition import partition
from graphopt.program import InputSpec, Program, copied_module, same_names, tensor_leaves
from graphopt.schedule import Schedule
from graphopt.stored_step import StoredCode, stored_code

if TYPE_CHECKING:
    from graphopt.session import Captured, Session

__all__ = ["SegmentedStep"]

_ROUNDS = 6
"""How often a plan may be corrected by what its code turned out to hold."""

_POINTS = 32
"""Points kept of a frontier that many segments share."""


class SegmentedStep:
    """The segments of one semantic graph; ``captured`` has one entry per call, in order.

    ``code_name(segment, alternative, schedule)``: the name under which code is kept for later processes,
    ``""`` where it is not. ``runner``: what ``compile`` makes. ``sizes``: inputs of the graph that are sizes.
    """

    def __init__(
        self,
        session: Session,
        name: str,
        semantic: fx.GraphModule,
        specs: Sequence[InputSpec],
        code_name: Callable[[int, str, Schedule], str] = lambda number, alternative, schedule: "",
    ) -> None:
        from graphopt.session import Captured

        self.session = session
        self.runner: ChainRunner | None = None
        self._code_name = code_name
        self.sizes = {
            node.name: node.meta["val"]
            for node in semantic.graph.nodes
            if node.op == "placeholder" and isinstance(node.meta.get("val"), torch.SymInt)
        }
        self.chain: Segmented = split(semantic, find_blocks(semantic.graph))
        roles = dict(zip(self.chain.inputs, specs, strict=True))
        names = [
            f"{name}.{index}.{self.chain.segments[call.segment].name}"
            for index, call in enumerate(self.chain.calls)
        ]
        follows = follows_plan(session)
        kinds: list[Captured] = []
        for number, segment in enumerate(self.chain.segments):
            first = next(call for call in self.chain.calls if call.segment == number)
            made = [InputSpec(arg, self._role(number, k)) for k, arg in enumerate(first.args)]
            inputs = [roles.get(spec.node, spec) for spec in made]
            program = semantic_program(f"{name}.{segment.name}", copied_module(segment.gm), inputs)
            called = [
                called
                for called, call in zip(names, self.chain.calls, strict=True)
                if call.segment == number
            ]
            kind = Captured(program.name, program, inputs, calls=tuple(called))
            self._see(kind, segment)
            self._add_alternatives(kind, segment)
            if follows:
                self._follow(kind)
            self._settle_gradients(kind, number)
            if kind.frontier is not None and len(called) > 1:
                kind.frontier = replace(kind.frontier, points=_thinned(kind.frontier.points, _POINTS))
            kinds.append(kind)
        self.kinds = kinds
        for number, kind in enumerate(kinds):
            if kind.frontier is not None and kind.mode == "train":
                points = tuple(replace(p, spared=self._spared(number, kind, p)) for p in kind.frontier.points)
                kind.frontier = replace(kind.frontier, points=points)
        self.captured = [
            replace(kinds[call.segment], name=called, calls=())
            for called, call in zip(names, self.chain.calls, strict=True)
        ]
        if follows:
            context, ambient = _torch.capture_context(), AmbientState.now()

            def look() -> None:
                # Somebody may look when the call that was captured is long over.
                with ambient.again(), _torch.within(context):
                    self._look_at(SegmentedStep(session, name, semantic, specs))

            for captured in self.captured:
                captured.look = look
        self._made = self._values()
        self._pinned = [pinned(kind) for kind in kinds]
        session.chain = self.links
        self._host: HostMemory | None = None
        self._saved: dict[tuple[int, str, Schedule], list[tuple[str, Layout]]] = {}
        self._code: dict[tuple[int, str, Schedule], tuple[Callable[..., Any], FrontierPoint]] = {}
        self._kept: dict[tuple[int, str, Schedule], StoredCode] = {}

    def _role(self, segment: int, position: int) -> str:
        """Of a value that another call made: an activation is one that no call but its own reads after it."""
        calls = [call for call in self.chain.calls if call.segment == segment]
        return "activation" if all(call.args[position] in call.drops for call in calls) else "input"

    def compile(self) -> Callable[..., Any]:
        """Plan, compile, check the plan against the code's own memory, correct, and bind."""
        session = self.session
        base = session.static_bytes or 0
        if session.dry_run:
            choose_schedules(session, self.captured)
            return _never
        for _ in range(_ROUNDS):
            # What is compiled is judged by its code; estimates alone refuse nothing.
            choose_schedules(session, self.captured, tentative=True)
            self._compile_chosen()
            budget = session.plan.budget if session.plan is not None else None
            exact = [c.point for c in self.captured if c.point is not None]
            fits = budget is None or base + chain_peak(exact, self.links(), session.reruns) <= budget
            if fits and self._reserve():
                break
        else:
            # What remains are estimates that did not come true: only what is compiled counts now.
            self._keep_compiled()
            assert budget is not None
            chosen = plan_chain(self.links(), budget - base)
            if chosen is None:
                raise infeasible(session, self.captured, budget)
            picked = take(session, self.captured, chosen, budget - base)
            for captured, point in zip(self.captured, picked.points, strict=True):
                captured.run_at(point)
        record_plan(session, self.captured)
        functions = [
            self._code[_key(call.segment, captured)][0]
            for call, captured in zip(self.chain.calls, self.captured, strict=True)
        ]
        runner = self.runner = ChainRunner(
            self.chain,
            functions,
            session.reruns,
            [written_inputs(self.kinds[call.segment]) for call in self.chain.calls],
            [draws_random(self.kinds[call.segment]) for call in self.chain.calls],
            self._moves(),
            self._host,
        )
        return lambda *args: runner(list(args))

    def kept_codes(self) -> list[StoredCode]:
        """The code of each call as it is kept for later processes; asked for where ``code_name`` names it."""
        keys = (
            _key(call.segment, captured)
            for call, captured in zip(self.chain.calls, self.captured, strict=True)
        )
        return [self._kept[key] for key in keys]

    def _reserve(self) -> bool:
        """Take the host memory that the plan moves values to; without it, take moving off the curves."""
        sizes = [layout.bytes for moved in self._moves().values() for layout in moved.values()]
        if not sizes:
            return True
        self._host = HostMemory(torch.device("cuda", torch.cuda.current_device()))
        try:
            self._host.reserve(sizes)
        except HostMemoryError as error:
            self._host = None
            self.session.diagnostics.append(f"nothing is moved to the host: {error.message}")
            for kind in self.kinds:
                assert kind.frontier is not None
                kept = tuple(point for point in kind.frontier.points if not point.moved_bytes)
                kind.frontier = replace(kind.frontier, points=kept)
            for call, captured in zip(self.chain.calls, self.captured, strict=True):
                captured.frontier = self.kinds[call.segment].frontier
            return False
        return True

    def _moves(self) -> dict[int, dict[int, Layout]]:
        """Which of the values that each call saves are moved, by their place among them."""
        found = {}
        rows = set(rerun_calls(self.session.reruns))
        for k, captured in enumerate(self.captured):
            if captured.point is None or not captured.point.offloaded or k in rows:
                continue
            saved = self._saved[_key(self.chain.calls[k].segment, captured)]
            found[k] = {
                i: layout for i, (name, layout) in enumerate(saved) if name in captured.point.offloaded
            }
        return found

    def links(self) -> list[Link]:
        """The calls for the planner of chains."""
        found = []
        for call, captured, made in zip(self.chain.calls, self.captured, self._made, strict=True):
            assert captured.frontier is not None
            kind = self.kinds[call.segment]
            ahead = kind.reference.forward_seconds if kind.reference is not None else 0.0
            found.append(Link(call.segment, captured.frontier, made, ahead, self._pinned[call.segment]))
        return found

    def _values(self) -> list[tuple[tuple[int, int], ...]]:
        """(bytes, position of the last call that reads it) of each value that each call hands on."""
        step = self.session.cost.device.allocation_granularity
        last = {arg: k for k, call in enumerate(self.chain.calls) for arg in call.args}
        last |= dict.fromkeys(self.chain.returned(), len(self.chain.calls))
        made = []
        for k, call in enumerate(self.chain.calls):
            sizes = {}
            for name, value in zip(call.outs, self.chain.segments[call.segment].results(), strict=True):
                if isinstance(value, torch.Tensor):
                    size = _torch.hint(value.untyped_storage().nbytes())
                    sizes[name] = (-(-size // step) * step, last.get(name, k))
            made.append(tuple(sizes.values()))
        return made

    def _keep_compiled(self) -> None:
        """Take away all points whose code is not there."""
        for number, kind in enumerate(self.kinds):
            assert kind.frontier is not None
            known = {(form, schedule) for (segment, form, schedule) in self._code if segment == number}
            points = [p for p in kind.frontier.points if (p.alternative, p.schedule) in known]
            kind.frontier = replace(kind.frontier, points=tuple(points))
        for call, captured in zip(self.chain.calls, self.captured, strict=True):
            captured.frontier = self.kinds[call.segment].frontier

    def _see(self, kind: Captured, segment: Segment) -> None:
        """The joint (or inference) program of one segment, and the schedules that it could run."""

        def look(joint: fx.GraphModule, num_outputs: int) -> Any:
            kind.mode = "train"
            _torch.eliminate_common_subexpressions(joint, must_happen)
            kind.joint = joint_program(kind.name, joint, kind.specs, num_outputs)
            kind.traced = kind.joint.fingerprint
            kind.baseline = save_everything(kind.joint)
            raise JointSeen

        def look_inference(graph: fx.GraphModule) -> Any:
            kind.mode = "infer"
            kind.joint = inference_program(kind.name, copied_module(graph), kind.specs)
            kind.traced = kind.joint.fingerprint
            kind.baseline = Schedule(tuple(n.name for n in graph.graph.nodes if n.op == "call_function"))
            raise JointSeen

        try:
            gm = copied_module(kind.semantic.gm)
            self.session.emitter.compile(gm, segment.example_inputs(), look, look_inference)
        except Exception as error:
            if not isinstance(_torch.inner_error(error), JointSeen):
                raise
        kind.frontier = frontier_of(self.session, kind)

    def _add_alternatives(self, kind: Captured, segment: Segment) -> None:
        """Plan what passes offer instead of the program, and let its frontier be that of all forms."""
        if kind.frontier is None:
            return

        def make() -> Program:
            gm = copied_module(segment.gm)
            placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
            for node, example in zip(placeholders, segment.example_inputs(), strict=True):
                # Passes look here for what gradients flow to; values above autograd do not say.
                node.meta["val"] = example
            return semantic_program(kind.name, gm, kind.specs)

        from graphopt.session import Captured

        def named(found: Sequence[Offer]) -> list[Offer]:
            wanted = named_forms(self.session, kind)
            taken = [offer for offer in found if any(begins(offer.id, name) for name in wanted)]
            kind.passed_over += tuple(offer.id for offer in found if offer not in taken)
            return taken

        # The joint program of each form may have alternatives of its own.
        forms = {**(kind.forms or {"": replace(kind)})}
        frontiers = {"": (kind.frontier, kind.reference_seconds)}
        look_at = named if follows_plan(self.session) else None
        for candidate, program in self.session.alternatives(make, kind.mode, look_at):
            form = Captured(kind.name, program, kind.specs, form=candidate.id, calls=kind.calls)
            self._see(form, segment)
            if form.frontier is not None:
                own = form.forms or {"": form}
                forms |= {joined(candidate.id, name): known for name, known in own.items()}
                frontiers[candidate.id] = form.frontier, form.reference_seconds
        if len(frontiers) > 1:
            kind.forms = forms
            kind.frontier = united(frontiers)

    def _follow(self, kind: Captured) -> None:
        """Put what a plan that is replayed chose for ``kind`` on its frontier: it was not searched."""
        if kind.frontier is None:
            return
        points = list(kind.frontier.points)
        choices = named_choices(self.session, kind)
        # Most calls of a kind run alike.
        for choice in {(c.alternative, c.schedule, c.offloaded): c for c in choices}.values():
            form = (kind.forms or {"": kind}).get(choice.alternative)
            # Of another program it is refused when all are known.
            if form is not None and form.joint is not None and form.joint.fingerprint == choice.fingerprint:
                points.append(replayed_point(self.session, form, choice))
        known = {(point.alternative, point.schedule, point.offloaded): point for point in points}
        kind.frontier = replace(kind.frontier, points=tuple(known.values()))

    def _look_at(self, every: SegmentedStep) -> None:
        """Let the frontiers of the calls be those of ``every``, the step with all that it could run, what is
        compiled by its code: a plan that was replayed named a part."""
        for number, kind in enumerate(every.kinds):
            if kind.frontier is not None:
                known = {(form, s): point for (k, form, s), (_, point) in self._code.items() if k == number}
                kind.frontier = replace(kind.frontier, points=corrected(kind.frontier.points, known))
        for call, captured, other in zip(self.chain.calls, self.captured, every.captured, strict=True):
            other.frontier = captured.frontier = every.kinds[call.segment].frontier
            # Gradients that calls hand to each other were counted with each kind.
            captured.settled = other.settled = True

    def _settle_gradients(self, kind: Captured, number: int) -> None:
        """What a segment's backward leaves behind: gradients of activations go to the segment
        before; where gradients are held already, a parameter's is added to them, unless hooks
        wait for it, an earlier segment reads the parameter too, and autograd waits for its share."""
        if kind.joint is None or kind.frontier is None or kind.reference is None:
            return
        left = max(
            self._gradient_bytes(index)
            for index, call in enumerate(self.chain.calls)
            if call.segment == number
        )
        kind.reference = replace(kind.reference, gradients=left)
        kind.frontier = replace(
            kind.frontier, points=tuple(replace(point, gradients=left) for point in kind.frontier.points)
        )

    def _spared(self, number: int, kind: Captured, point: FrontierPoint) -> int:
        """Bytes of what is handed to each call of a kind that nobody needs once it has run forward: no later
        call reads it, and neither this backward nor that of its maker does."""
        joint = (kind.forms or {"": kind})[point.alternative].joint
        assert joint is not None
        calls = [call for call in self.chain.calls if call.segment == number]
        makers = {name: call for call in self.chain.calls for name in call.outs}
        held = _held_after(joint, point.schedule)
        step = self.session.cost.device.allocation_granularity
        total = 0
        inputs = joint.signature.inputs[: len(calls[0].args)]
        for k, node in enumerate(joint.find([spec.node for spec in inputs])):
            value = node.meta.get("val")
            if inputs[k].role != "activation" or not isinstance(value, torch.Tensor):
                continue
            made_by = [makers.get(call.args[k]) for call in calls]
            if _torch.storage_key(value) in held or any(
                maker is None or self._keeps_results(maker.segment) for maker in made_by
            ):
                continue
            total += -(-_torch.hint(value.untyped_storage().nbytes()) // step) * step
        return total

    def _keeps_results(self, number: int) -> bool:
        """Whether some schedule of a kind hands what it returns to its own backward as well."""
        kind = self.kinds[number]
        if kind.frontier is None:
            return True
        for point in kind.frontier.points:
            joint = (kind.forms or {"": kind})[point.alternative].joint
            assert joint is not None
            results = [spec.node for spec in joint.signature.outputs if spec.role == "output"]
            if _storages(joint, results) & _storages(joint, point.schedule.saved):
                return True
        return False

    def _gradient_bytes(self, index: int) -> int:
        call = self.chain.calls[index]
        segment = self.chain.segments[call.segment]
        earlier = {arg for before in self.chain.calls[:index] for arg in before.args}
        made = {out for before in self.chain.calls[:index] for out in before.outs}
        held, watched = bool(self.session.held_gradient_bytes), self.session.watched_gradients
        step = self.session.cost.device.allocation_granularity
        total = 0
        for arg, example, trained in zip(call.args, segment.example_inputs(), segment.trained, strict=True):
            if trained and arg not in made and (not held or (watched and arg in earlier)):
                size = _torch.hint(example.numel() * example.element_size())
                total += -(-size // step) * step
        return total

    def _compile_chosen(self) -> None:
        """Compile what is chosen and not compiled yet; put the code's memory into the frontiers."""
        exact: dict[tuple[int, str, Schedule], FrontierPoint] = {}
        for call, captured in zip(self.chain.calls, self.captured, strict=True):
            key = _key(call.segment, captured)
            if key not in self._code:
                self._code[key] = self._compile(
                    call.segment, self.kinds[call.segment], self.chain.segments[call.segment], captured
                )
            exact[key] = self._code[key][1]
        frontiers: dict[int, Frontier] = {}
        for number, kind in enumerate(self.kinds):
            assert kind.frontier is not None
            known = {(form, schedule): point for (k, form, schedule), point in exact.items() if k == number}
            points = corrected(kind.frontier.points, known)
            frontiers[number] = kind.frontier = replace(kind.frontier, points=points)
        for call, captured in zip(self.chain.calls, self.captured, strict=True):
            captured.frontier = frontiers[call.segment]
            assert captured.point is not None
            captured.point = with_bytes(captured.point, exact[_key(call.segment, captured)])

    def _compile(
        self, number: int, kind: Captured, segment: Segment, captured: Captured
    ) -> tuple[Callable[..., Any], FrontierPoint]:
        point = captured.point
        assert point is not None
        emitter = self.session.emitter

        def realise(joint: fx.GraphModule, num_outputs: int) -> tuple[fx.GraphModule, fx.GraphModule]:
            _torch.eliminate_common_subexpressions(joint, must_happen)
            program = joint_program(kind.name, joint, kind.specs, num_outputs)
            halves = partition(_rewritten(captured, program), point.schedule)
            captured.lowered = tuple(copied_module(half) for half in halves)
            return halves

        def as_is(graph: fx.GraphModule) -> fx.GraphModule:
            chosen = _rewritten(captured, inference_program(kind.name, graph, kind.specs)).gm
            captured.lowered = (copied_module(chosen),)
            return graph if chosen is graph else copied_module(chosen)

        name = self._code_name(number, point.alternative, point.schedule)
        run = emitter.compile(
            copied_module(captured.semantic.gm),
            segment.example_inputs(),
            realise,
            as_is,
            self.session.gradients_of(kind.specs),
            keep=name,
        )
        if name:
            self._kept[_key(number, captured)] = stored_code(name, emitter.slots)
        self._saved[_key(number, captured)] = _saved_values(captured, emitter.records)
        return run, exact_point(kind, point, list(emitter.records))


def _storages(joint: Program, names: Iterable[str]) -> set[int]:
    nodes = {node.name: node for node in joint.graph.nodes}
    return {
        _torch.storage_key(tensor) for name in names for tensor in tensor_leaves(nodes[name].meta.get("val"))
    }


def _held_after(joint: Program, schedule: Schedule) -> set[int]:
    """Storages that a call's results, or its backward, still need once its forward has run."""
    nodes = {node.name: node for node in joint.graph.nodes}
    made = set(schedule.backward)
    read = {source.name for name in schedule.backward for source in nodes[name].all_input_nodes}
    results = [spec.node for spec in joint.signature.outputs if spec.role in ("output", "mutation")]
    return _storages(joint, {*schedule.saved, *results, *(read - made)})


def _never(*args: Any) -> Any:
    raise CaptureError("this program was planned, not compiled")


def _rewritten(captured: Captured, traced: Program) -> Program:
    """``traced`` as the passes rewrote it where it was first seen, its values under the names that they had
    then: those of numbers that are made of symbolic sizes may be others each time.

    Raises ``LoweringError`` if it is not what was rewritten then.
    """
    planned = captured.joint
    if planned is None or (planned.fingerprint == captured.traced and same_names(planned, traced)):
        return traced
    if traced.fingerprint != captured.traced:
        raise LoweringError(
            f"{captured.name}: traced again it is another program than the one that passes rewrote",
            hint="drop the passes of the joint level from the pipeline, and report this program",
        )
    return planned


def _key(segment: int, captured: Captured) -> tuple[int, str, Schedule]:
    """What code depends on: the kind of segment, its form, the schedule."""
    assert captured.point is not None
    return segment, captured.point.alternative, captured.schedule


def _saved_values(captured: Captured, records: Sequence[LoweredMemory]) -> list[tuple[str, Layout]]:
    """The values that a compiled call hands to autograd, in order."""
    if captured.mode != "train" or len(records) != 2:
        return []
    forward = captured.lowered[0]
    output = next(node for node in reversed(forward.graph.nodes) if node.op == "output")
    first = len(output.args[0]) - saved_count(*records)
    found = []
    for node in output.args[0][first:]:
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        if isinstance(value, torch.Tensor) and not _torch.ignores_version(node):
            layout = Layout(
                tuple(map(_torch.hint, value.shape)), tuple(map(_torch.hint, value.stride())), value.dtype
            )
            found.append((node.name, layout))
    return found


def _thinned(points: Sequence[FrontierPoint], count: int) -> tuple[FrontierPoint, ...]:
    """At most ``count`` points: those of which sums over many calls are best made, the ends in bytes and
    time, the rest spread over retained bytes."""
    if len(points) <= count:
        return tuple(points)
    ends = [min(points, key=lambda p: p.seconds), min(points, key=lambda p: p.peak_bytes)]
    chosen = dict.fromkeys([*ends, *hull(points)][:count])
    others = sorted((p for p in points if p not in chosen), key=lambda p: (p.retained, p.seconds))
    left = count - len(chosen)
    if left > 0:
        step = max(left - 1, 1)
        chosen |= dict.fromkeys(others[k * (len(others) - 1) // step] for k in range(left))
    return tuple(point for point in points if point in chosen)
