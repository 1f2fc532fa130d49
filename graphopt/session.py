"""One call of ``optimize``: its options, the programs captured so far, the plan over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.alternatives import (
    Offer,
    alternatives,
)
from graphopt.budget import Budget
from graphopt.candidate import Declined, FrontierPoint, NearMiss
from graphopt.capture.aliasing import alias_map
from graphopt.capture.joint import inference_program
from graphopt.capture.observe import Observer
from graphopt.capture.semantic import (
    auxiliary_outputs,
    detach_outputs,
    input_specs,
    is_trained,
    returns_loss,
    semantic_graph,
    semantic_program,
)
from graphopt.capture.structure import attribute
from graphopt.captured import Captured, Ran
from graphopt.chain_plan import Link, Rerun
from graphopt.chain_rows import written_names
from graphopt.choosing import choose_schedules
from graphopt.collection import uncollected
from graphopt.cost import Cost, CostModel
from graphopt.emit.eager import EagerEmitter
from graphopt.emit.emitter import NONE, Emitter, Gradients
from graphopt.errors import CaptureError, GraphoptError, LoweringError, brief
from graphopt.first_run import FirstRun
from graphopt.observed import ObservedStep, Ports
from graphopt.observed_plan import ObservedPlan
from graphopt.offered_schedules import see_inference, see_joint
from graphopt.one_program import one_program
from graphopt.packing.plan import QuantizationPlan
from graphopt.partition import ordered, partition
from graphopt.passes import Pass, PassContext
from graphopt.planned_step import PlannedStep, put_back, remember, said_of
from graphopt.plans import Plan
from graphopt.plugins.host import PluginHost
from graphopt.plugins.records import PolicySpec
from graphopt.program import InputSpec, Program
from graphopt.recording import Recorder
from graphopt.report import PassRecord
from graphopt.rewrites import Rewrite, again_id, kernels_id
from graphopt.rewriting import Rewriting, conversion_records, left_out, run_passes
from graphopt.schedule import Schedule
from graphopt.segmented_capture import segmented
from graphopt.several import compile_together
from graphopt.step_cost import settle

if TYPE_CHECKING:
    from graphopt.agreement import Agreement
    from graphopt.warm_start import KeptStep

__all__ = ["Captured", "CapturedAnew", "NotPlanned", "Session"]


class NotPlanned(BaseException):
    """Raised in place of running a program whose capture alone was asked for.

    No ``Exception``: what a model's own handlers do with one would run under dynamo (those of an
    ``fx.GraphModule`` walk the traceback with a generator, which dynamo refuses).
    """


class CapturedAnew(BaseException):
    """Raised in place of capturing a program while one that is there was to be watched. No ``Exception``: see
    ``NotPlanned``."""


@dataclass
class Session:
    """State of one optimized model. ``backend`` is what dynamo calls for each graph.

    While ``whole`` is true every graph is the whole model: it is planned the moment it is
    captured. Otherwise graphs come one after another (graph breaks): each runs its least plan op
    by op until ``finish`` plans them all under the one budget; ``staged`` calls it itself, when
    the first graph is called again.
    ``observer`` watches those provisional runs: by what it saw (``see``) the plan is exact; without it
    what graphs hand on counts as held. ``arguments`` are the call's inputs while it lasts.
    ``held_gradient_bytes`` is what gradients took when the model was handed over: they are there
    throughout, and a step's own are added to them and go, unless hooks wait for them
    (``watched_gradients``); ``all_gradients_held``: every trained parameter has one. ``dry_run``: plan,
    compile no code.
    ``every``: the schedules of all budgets are asked for, not those of one.
    ``only``: the rewrites that may be applied (``graphopt.rewrites``), ``None`` for all.
    ``differentiated``: programs of which an output besides the loss was; ``attached``: such outputs have
    their gradient in the program, as where the scalar beside them turned out to be no loss.
    ``chain``: the present programs as calls that hand values to each other, where they are;
    ``reruns``: rows of them that the plan runs again. ``cuda_graphs``: replay steps where they can be
    recorded; ``recorders`` do that. ``keeps``: keep plan and code for later processes, and take over what
    earlier ones kept; ``kept``: the present step as it is kept; ``uncompared``: what was captured could not
    be compared with the model. ``watching(run, args, ran)`` runs a whole program in place of ``run(*args)``.
    ``policy``: who picks within the budget in the planner's place, ``chosen_by``: its name where it did.
    ``comparing``: a captured call computes what dynamo captured, without gradients and in ``around()``, and
    nothing is captured; ``differentiating``: with gradients.
    ``writes_apart``: plain code between programs writes parameters.
    ``agreement``: with the ranks that share the model; ``confirm``: asks them about programs that are planned
    after the first one.
    ``steps``: whole steps that were planned, the present one last; ``settled``: no other is captured.
    ``modes`` says which modules of the model are in training mode.
    ``generates``: its programs decode. ``quantization``: how the weights of the model were packed for it, and
    ``dense_baseline`` what a step took before.
    """

    budget: Budget
    cost: CostModel
    emitter: Emitter
    provisional_emitter: Emitter
    host: PluginHost
    passes: Sequence[Pass]
    allow: frozenset[str] = frozenset()
    only: frozenset[str] | None = None
    on_error: str = "rollback"
    policy: PolicySpec | None = None
    chosen_by: str = ""
    replay: Plan | None = None
    names: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    static_bytes: int | None = None
    weight_bytes: int | None = None
    arguments: Any = None
    whole: bool = True
    staged: bool = False
    capturing: bool = False
    comparing: bool = False
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    differentiating: bool = False
    writes_apart: bool = False
    captured: list[Captured] = field(default_factory=list)
    current: list[Captured] = field(default_factory=list)
    plan: Plan | None = None
    records: list[PassRecord] = field(default_factory=list)
    declined: list[Declined] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)
    rewrites: list[Rewrite] = field(default_factory=list)
    diagnostics: list[str] = field(default_factory=list)
    differentiated: set[str] = field(default_factory=set)
    attached: bool = False
    _refused: dict[tuple[str, ...], Exception] = field(default_factory=dict)
    held_gradient_bytes: int = 0
    all_gradients_held: bool = False
    watched_gradients: bool = False
    trains: bool = False
    dry_run: bool = False
    every: bool = False
    planning_seconds: float = 0.0
    replay_bytes: int = 0
    lasting_bytes: int = 0
    observer: Observer | None = None
    chain: Callable[[], list[Link]] | None = None
    reruns: tuple[Rerun, ...] = ()
    cuda_graphs: bool = True
    recorders: list[Recorder] = field(default_factory=list)
    _written: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None
    keeps: bool = True
    kept: KeptStep | None = None
    uncompared: bool = False
    generates: bool = False
    _fold: Callable[[], None] | None = None
    quantization: QuantizationPlan | None = None
    dense_baseline: Cost | None = None
    _seen: tuple[tuple[Captured, ...], ObservedPlan] | None = None
    _counted: tuple[tuple[int | None, ...], tuple[FrontierPoint, ...], Cost] | None = None
    watching: Callable[[Callable[..., Any], Sequence[Any], Ran], Any] | None = None
    agreement: Agreement | None = None
    confirm: Callable[[Session], None] | None = None
    steps: list[PlannedStep] = field(default_factory=list)
    settled: bool = False
    modes: Callable[[], tuple[bool, ...]] = tuple
    _made: Ran | None = None

    def backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """A dynamo backend: compiles one graph under this session's budget.

        Of several graphs one that cannot be compiled is none: the function that it is of runs as it did, and
        what that calls is captured alone.
        """
        if self.comparing:
            raise NotPlanned
        if self.settled:
            raise CapturedAnew
        known, present, before = len(self.captured), self.current, said_of(self)
        # Dynamo hands over the same graph again for each function around it that it tries.
        calls = tuple(str(node.target) for node in gm.graph.nodes if node.op.startswith("call"))
        if not self.whole and calls in self._refused:
            raise _torch.splitting(self._refused[calls])
        try:
            made = self._compiled(gm, inputs)
            if self.whole and self.confirm is not None:
                self.confirm(self)
            if self.whole and self._made is not None:
                remember(self, self._made, before)
            return made
        except GraphoptError:
            self._leave_out(known, before)
            raise
        except Exception as error:
            self._leave_out(known, before)
            self._refused[calls] = error.with_traceback(None)
            if self.whole or self.on_error == "raise":
                raise
            del self.captured[known:]
            self.current = present
            reason = f"nodes was split: {brief(error)}"
            if not any(note.endswith(reason) for note in self.diagnostics):
                self.diagnostics.append(f"a graph of {len(gm.graph.nodes)} {reason}")
            raise _torch.splitting(error) from error

    def _leave_out(self, known: int, before: dict[str, Any]) -> None:
        """A step that could not be made is none: the present one is still that of ``before``."""
        if self.whole and self.steps:
            del self.captured[known:]
            put_back(self, before)

    def _compiled(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        specs = input_specs(gm, inputs, self.names)
        cut_off = torch.is_grad_enabled() and not self.attached
        auxiliary: Sequence[int] = auxiliary_outputs(gm) if cut_off else ()
        if auxiliary:
            held = _torch.random_state_bytes(torch.device("cpu")) if self.cost.device.kind == "cpu" else 0
            self.replay_bytes = held if self.whole else self.replay_bytes + held
        self.trains |= is_trained(inputs)
        self._count_static(inputs, specs)
        if self.whole and self.arguments is not None and is_trained(inputs) and not returns_loss(gm):
            # The caller makes the loss: it and the gradient that it starts from are held in the backward.
            granularity = self.cost.device.allocation_granularity
            self.static_bytes = (self.static_bytes or 0) + 2 * max(granularity, torch.float32.itemsize)
        name = f"g{len(self.captured)}"
        self._fold, self.kept = None, None
        # What runs between levels of functorch, or with a gradient of its own, could not be followed from
        # call to call.
        if self.whole and self.emitter.by_segments and not _torch.stays_as_captured(gm):
            return segmented(self, name, gm, inputs, specs, auxiliary)
        return one_program(self, name, gm, inputs, specs, auxiliary)

    def _as_captured(self, gm: fx.GraphModule, args: Sequence[Any]) -> Any:
        """What dynamo's own graph computes, where that is asked for in place of its capture alone."""
        if not self.comparing:
            raise NotPlanned
        # Transforms of functions differentiate within the graph.
        differentiated = self.differentiating or _torch.stays_as_captured(gm)
        with self.around(), torch.set_grad_enabled(torch.is_grad_enabled() and differentiated):
            return _torch.run_as_captured(gm, args)

    def guarded(
        self,
        run: Callable[..., Any],
        plain: Callable[..., Any],
        name: str,
        specs: Sequence[InputSpec] = (),
    ) -> Callable[..., Any]:
        """``run``, with ``plain`` in its place should it fail when it is first called. ``specs``: of the
        arguments, of which buffers may be written before."""
        if self.on_error == "raise":
            return run
        buffers = [k for k, spec in enumerate(specs) if spec.role == "buffer"]
        return FirstRun(run, plain, lambda why: self.diagnostics.append(f"{name}: {why}"), buffers)

    def _ran(self, run: Callable[..., Any], args: Sequence[Any], ran: Ran) -> Any:
        return run(*args) if self.watching is None else self.watching(run, args, ran)

    @contextmanager
    def put_back(self, model: torch.nn.Module) -> Iterator[None]:
        """Runs in the block are for looking: what programs captured in it write is afterwards what it was.
        Parameters of ``model`` that something else writes are noted."""
        self._written = {}
        before = [(name, p, p._version) for name, p in model.named_parameters()]
        try:
            yield
        finally:
            written, self._written = self._written, None
            with torch.no_grad():
                for tensor, value in written.values():
                    # Of a weight that is gathered from other ranks the memory is gone again.
                    if _torch.storage_bytes(tensor):
                        tensor.copy_(value)
            others = [name for name, p, was in before if p._version != was and id(p) not in written]
            self.writes_apart = bool(others)
            if others:
                more = f" and {len(others) - 1} more" if len(others) > 1 else ""
                self.diagnostics.append(
                    f"plain code of the model writes {others[0]}{more}: looking at a step took some steps"
                )

    def writes_inputs(self) -> bool:
        """Whether the present programs write what the model is called with."""
        return any(
            spec.role == "input" and spec.node in written_names(captured.joint)
            for captured in self.current
            if captured.joint is not None
            for spec in captured.joint.signature.inputs
        )

    @property
    def taken_over(self) -> bool:
        """Whether the present step was made by an earlier process, and its programs are not there."""
        return any(captured.joint is None for captured in self.current)

    def written_parameters(self) -> list[str]:
        """Parameters that the present programs write, by their dotted names."""
        found = []
        for captured in self.current:
            if captured.joint is not None:
                names = written_names(captured.joint)
                weights = captured.joint.signature.by_role("parameter")
                found += [spec.fqn for spec in weights if spec.node in names and spec.fqn]
        return list(dict.fromkeys(found))

    def _keep_written(self, program: Program, inputs: Sequence[Any]) -> None:
        """Note what lasts of what a program writes, before it first runs; buffers are kept by whoever runs
        it. On the host, so that no more memory seems taken."""
        if self._written is None:
            return
        given = {id(leaf) for leaf in torch.utils._pytree.tree_leaves(self.arguments)}
        lasting: dict[str, Any] = {
            spec.node: value
            for spec, value in zip(program.signature.inputs, inputs, strict=True)
            if spec.role == "parameter" or (spec.role != "buffer" and id(value) in given)
        }
        if not _torch.stays_as_captured(program.gm):
            roots = alias_map(program.graph).changed
            lasting |= {n.name: attribute(program.graph, n) for n in roots if n.op == "get_attr"}
            lasting = {node.name: lasting[node.name] for node in roots if node.name in lasting}
        for tensor in lasting.values():
            if isinstance(tensor, torch.Tensor) and id(tensor) not in self._written:
                self._written[id(tensor)] = tensor, tensor.detach().to("cpu", copy=True)

    def _semantic(
        self,
        name: str,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        specs: list[InputSpec],
        auxiliary: Sequence[int],
    ) -> tuple[Program, Sequence[int]]:
        """The rewritten program at the semantic level, and which of its outputs are cut off from autograd."""
        if kinds := _torch.wrapped_kinds(gm):
            self.diagnostics.append(
                f"{name}: it computes on {' and '.join(kinds)}, taken apart below autograd: passes of the "
                "semantic level see no operators, those of the joint level do"
            )
        try:
            semantic = semantic_graph(gm, inputs)
        except Exception as error:
            self.fail(
                f"{name}: the semantic level could not be traced ({brief(error)}); "
                "dynamo's graph is used",
                error,
            )
            semantic, auxiliary = gm, ()
        if auxiliary:
            detach_outputs(semantic, auxiliary)
        program = semantic_program(name, semantic, specs)
        self._keep_written(program, inputs)
        self._rewrite(program, inputs)
        return program, auxiliary

    @uncollected()
    def _rewrite(self, program: Program, inputs: Sequence[Any]) -> None:
        """Run the semantic-level passes over a captured program."""
        mode = "train" if is_trained(inputs) else "infer"
        ctx = self.context(mode)
        if not self.whole and (asked := self.asked):
            why = next((note for note in self.diagnostics if note.startswith("not one graph")), "")
            raise CaptureError(
                f"pass {asked!r} makes another model of a whole program, and programs may be parts of one "
                f"here: {why or 'a step= was given'}",
                hint="call the model once in a step, and leave out what breaks its graph",
            )
        budgeted = self.budget.memory is not None
        if not self.captured:
            self.records.extend(left_out(self.passes, self.host))
            converted = conversion_records(
                self.passes, self.host, self.allow, self.quantization, generates=self.generates
            )
            self.records.extend(converted)
        done = run_passes(
            program,
            self.passes,
            ctx,
            self.host,
            on_error=self.on_error,
            budgeted=budgeted,
        )
        self._note(done)

    @property
    def asked(self) -> str:
        """The pass, if any, that makes another model than the one that was given, as it is asked to."""
        return next((step.name for step in self.passes if step.asked), "")

    def context(self, mode: str, *, bounded: bool = True) -> PassContext:
        """What passes are told in ``mode``, ``"train"`` or ``"infer"``."""
        emit, allow, only = self.emitter.name, self.allow, self.only
        if only is not None and self.whole:
            # Captured again for other inputs, the whole model is another program of the same rewrites.
            again = range(1, len(self.captured) + 1)
            only |= {again_id(name, number) for name in only for number in again}
        return PassContext(self.cost, mode, emit, None, allow, bounded=bounded, only=only)

    def chosen_rewrites(self) -> tuple[Rewrite, ...]:
        """What was chosen so far, each once; of kernels, those of every provider where any are used."""
        known = {rewrite.id: rewrite for rewrite in self.rewrites}
        if any(group.kept for group in self.emitter.groups):
            known |= {name: Rewrite(name) for name in map(kernels_id, self.host.replacements())}
        return tuple(known.values())

    def missing_rewrites(self) -> list[str]:
        """A note on rewrites that were asked for by name and not chosen."""
        gone = sorted((self.only or frozenset()) - {rewrite.id for rewrite in self.chosen_rewrites()})
        more = f" and {len(gone) - 3} more" if len(gone) > 3 else ""
        return [f"rewrites that were asked for and not applied: {', '.join(gone[:3])}{more}"] if gone else []

    def _note(self, done: Rewriting) -> None:
        self.rewrites.extend(done.rewrites)
        self.records.extend(done.records)
        self.declined.extend(done.declined)
        self.near_misses.extend(done.near_misses)

    def gradients_of(self, specs: Sequence[InputSpec]) -> Gradients:
        """What becomes of the gradients of a program with these inputs. Where a step that was seen calls it
        more than once, its first call makes gradients that later ones would add to: one plan for all calls
        could not tell which, so each makes its own."""
        several = self._seen is not None and max(self._seen[1].calls) > 1
        if several and not self.all_gradients_held:
            return NONE
        parameters = frozenset(k for k, spec in enumerate(specs) if spec.role == "parameter")
        return Gradients(parameters, self.all_gradients_held and not self.watched_gradients)

    @property
    def bounded(self) -> bool:
        """Whether memory counts: there is a budget, or the plans of others are asked for."""
        asked = self.budget.memory is not None or self.every or self.replay is not None
        return asked or self.policy is not None

    def alternatives(
        self,
        make: Callable[[], Program],
        mode: str,
        look_at: Callable[[Sequence[Offer]], Sequence[Offer]] | None = None,
    ) -> Iterator[tuple[Offer, Program]]:
        """What the passes offer instead of the semantic program that ``make`` copies, or what ``look_at``
        takes of it."""
        ctx = self.context(mode, bounded=self.bounded)
        return alternatives(make, self.passes, ctx, self.fail, look_at)

    def finish(self) -> None:
        """Plan every program that still runs its provisional schedule, and compile it for good."""
        waiting = [captured for captured in self.current if captured.provisional]
        if not waiting:
            return
        for captured in waiting:
            assert captured.look is not None
            try:
                captured.look()
            except GraphoptError:
                raise
            except Exception as error:
                if self.on_error == "raise":
                    raise
                self._leave(captured, error)
        if not self.current:
            return
        if self.observed(self.current) is None:
            settle(self.current, self.cost.device.allocation_granularity)
        compile_together(self, self.current)
        if self.confirm is not None:
            self.confirm(self)

    def plan_again(self, budget: Budget) -> None:
        """Plan the present programs anew under another budget, with all that passes offer instead of them,
        and compile them. Raises ``BudgetError`` where no plan fits and ``CaptureError`` for a step that is
        planned by segments or was taken over: its programs cannot be looked at again."""
        fixed = [captured.name for captured in self.current if captured.recompile is None]
        if fixed or not self.current:
            what = f"program {fixed[0]!r} is planned by segments" if fixed else "nothing was captured"
            raise CaptureError(
                f"no plan can be made again: {what}", hint="call graphopt.optimize(model, inputs, budget=...)"
            )
        self.budget = budget
        for captured in self.current:
            captured.provisional = True
        self.finish()

    def forget(self) -> None:
        """Nothing of what was captured so far is used: the model is captured in another way."""
        self.captured, self.current, self.plan, self._fold, self.kept = [], [], None, None, None
        self.steps.clear()
        for notes in (self.records, self.declined, self.near_misses, self.rewrites, self.diagnostics):
            notes.clear()
        self.differentiated.clear()

    def checkpoint(self) -> Callable[[], None]:
        """What has been captured, planned and noted, to go back to: a function that does."""
        notes = (self.records, self.declined, self.near_misses, self.rewrites, self.diagnostics)
        all_notes: tuple[list[Any], ...] = (*notes, self.recorders, self.steps)
        lists = [(kept, list(kept)) for kept in all_notes]
        names = (
            "plan", "_fold", "chain", "reruns", "chosen_by", "static_bytes", "replay_bytes", "trains",
            "whole", "_seen", "_counted",
        )  # fmt: skip
        values = {name: getattr(self, name) for name in names}
        captured, current, differentiated = list(self.captured), list(self.current), set(self.differentiated)

        def go_back() -> None:
            for kept, were in lists:
                kept[:] = were
            for name, value in values.items():
                setattr(self, name, value)
            self.captured, self.current, self.differentiated = captured, current, differentiated
            for step in self.steps[-1:]:
                step.said = {}

        return go_back

    def _leave(self, captured: Captured, error: Exception) -> None:
        """Let one graph of several run as dynamo captured it."""
        captured.run, captured.provisional = captured.plain, False
        self.current = [other for other in self.current if other is not captured]
        self.diagnostics.append(f"{captured.name}: runs as it did: {brief(error)}")

    def _provisional_emitter(self, captured: Captured) -> Emitter:
        if self.observer is None:
            return self.provisional_emitter
        number = next(k for k, known in enumerate(self.captured) if known is captured)
        return EagerEmitter(partial(self.observer.around, number))

    def see(self, step: ObservedStep) -> bool:
        """Plan the present programs as the parts of ``step``; ``False`` if others were run in it."""
        numbers = [k for k, known in enumerate(self.captured) if any(known is c for c in self.current)]
        group = [self.captured[k] for k in numbers]
        complete = all(run is None or run.program in numbers for run in step.runs)
        ports = {k: Ports.of(c.joint) for k, c in zip(numbers, group, strict=True) if c.joint is not None}
        if not complete or len(ports) < len(group):
            return False
        place = {number: k for k, number in enumerate(numbers)}
        runs = tuple(run and run.at_ports(ports[run.program], place[run.program]) for run in step.runs)
        step = replace(step, runs=runs)
        if self.arguments is None:
            self.lasting_bytes = self._lasting_inputs(step, group)
            self.static_bytes = (self.weight_bytes or 0) + self.held_bytes + self.replay_bytes
            self.static_bytes += self.lasting_bytes
        self._seen = tuple(group), ObservedPlan(self.cost, step, group, fuses=self.emitter.fuses)
        return True

    def _lasting_inputs(self, step: ObservedStep, group: Sequence[Captured]) -> int:
        """Bytes of the inputs of ``group`` that were there before the step and are there after it."""
        made = {number for run in step.runs if run is not None for number in run.outputs.values()}
        found = set()
        for run in step.runs:
            if run is None or run.backward or (joint := group[run.program].joint) is None:
                continue
            ports = Ports.of(joint).inputs
            for spec in joint.signature.by_role("input"):
                number = run.inputs.get(ports[spec.node])
                if number is not None and number not in made and step.storages[number].released is None:
                    found.add(number)
        return sum(step.storages[number].bytes for number in found)

    def looked_anew(self) -> None:
        """Frontiers of programs that make up a step that was seen are others than before."""
        if self._seen is not None:
            self._seen[1].forget()

    def observed(self, group: Sequence[Captured]) -> ObservedPlan | None:
        """What was seen of these programs."""
        if self._seen is None or len(group) != len(self._seen[0]):
            return None
        same = all(a is b for a, b in zip(group, self._seen[0], strict=True))
        return self._seen[1] if same else None

    @property
    def base_bytes(self) -> int:
        """Bytes held throughout. Random states that outputs hold were seen, where a step was."""
        return (self.static_bytes or 0) - (self.replay_bytes if self.observed(self.current) else 0)

    def links(self, group: Sequence[Captured]) -> list[Link]:
        """The programs of a step for the planner of chains."""
        if self.chain is not None and len(group) > 1:
            return self.chain()
        alone = "it is a graph of its own: autograd runs it, and nothing here could run it again"
        return [Link(id(c.frontier), c.frontier, pinned=alone) for c in group if c.frontier is not None]

    def step(self) -> list[tuple[Program, Schedule]]:
        """Programs of the present step with the schedules that they run, in call order."""
        return [(c.joint, c.schedule) for c in self.current if c.joint is not None]

    @property
    def held_bytes(self) -> int:
        """Held throughout besides weights and inputs: gradients, and the workspace that libraries
        keep from the same allocator once they have run: one for each thread that calls them, and
        autograd's backward has a thread of its own."""
        threads = 2 if self.trains else 1
        device = self.cost.device
        return self.held_gradient_bytes + threads * device.workspace_bytes + device.allocator_slack_bytes

    def _count_static(self, inputs: Sequence[Any], specs: Sequence[InputSpec]) -> None:
        """Bytes that are held whatever the plan: weights and the step's inputs."""
        weights = self.weight_bytes
        if weights is None:
            weights = self.weight_bytes = _storage_bytes(inputs, specs, ("parameter", "buffer"))
        elif self.arguments is None and self.staged:
            weights = self.weight_bytes = weights + _storage_bytes(inputs, specs, ("parameter", "buffer"))
        # Outputs that can be differentiated later hold the random state of their forward.
        weights += self.held_bytes + self.replay_bytes
        if self.arguments is not None:
            self.static_bytes = weights + _torch.storage_bytes(self.arguments)
        elif not self.current or self.whole:
            self.static_bytes = weights + _storage_bytes(inputs, specs, ("input",))

    def _begin(self, captured: Captured) -> None:
        open_group = any(c.provisional for c in self.current)
        self.current = [*self.current, captured] if not self.whole and open_group else [captured]
        self.captured.append(captured)

    def _used(self, captured: Captured) -> None:
        if captured.name not in self.differentiated:
            self.differentiated.add(captured.name)
            self.diagnostics.append(
                f"{captured.name}: an output besides the loss was differentiated; its gradient was "
                "computed by running the captured graph again in eager mode"
            )

    def _inference(self, captured: Captured, graph: fx.GraphModule) -> fx.GraphModule:
        planned = captured.point is not None and not (self.whole or captured.provisional)
        if not planned and (captured.point is None or not captured.forms):
            see_inference(self, captured, graph)
            self.pick(captured)
        elif captured.joint is not None and captured.joint.fingerprint != captured.traced:
            traced = inference_program(captured.name, graph, captured.specs).fingerprint
            if traced == captured.traced:
                # Traced again, it is as it was before passes rewrote it.
                graph = fx.GraphModule(captured.joint.gm, captured.joint.graph)
        graph.graph = ordered(graph.graph, captured.schedule.forward)
        graph.recompile()
        captured.lowered = (graph,)
        return graph

    def _partition(
        self, captured: Captured, joint: fx.GraphModule, num_outputs: int
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        see_joint(self, captured, joint, num_outputs)
        if captured.point is None:
            if not (self.whole or captured.provisional):
                raise LoweringError(f"{captured.name}: traced again it is another program than was planned")
            self.pick(captured)
        assert captured.joint is not None
        captured.lowered = partition(captured.joint, captured.schedule)
        return captured.lowered[0], captured.lowered[1]

    def pick(self, captured: Captured) -> None:
        """Pick what ``captured`` runs: for good if it is the whole model, else for the time being."""
        assert captured.frontier is not None
        if self.whole:
            choose_schedules(self, [captured])
            return
        captured.point = min(captured.frontier.points, key=lambda p: (p.retained, p.peak_bytes))

    def fail(self, text: str, error: Exception) -> None:
        if self.on_error == "raise":
            raise error
        self.diagnostics.append(text)


def _storage_bytes(inputs: Sequence[Any], specs: Sequence[InputSpec], roles: tuple[str, ...]) -> int:
    return _torch.storage_bytes(
        [value for value, spec in zip(inputs, specs, strict=True) if spec.role in roles]
    )
