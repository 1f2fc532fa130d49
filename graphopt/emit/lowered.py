"""Exact memory of the code that Inductor generated for one graph, known before it runs.

Inductor fuses, reuses buffers and reorders, so liveness of the graph's nodes is an upper bound
at best. The generated wrapper states each allocation and release; ``graphopt.emit.wrapper``
reads them, and the records here put a forward and its backward together into a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.fx as fx

from graphopt import _torch
from graphopt.emit.wrapper import trace_wrapper
from graphopt.errors import LoweringError
from graphopt.program import tensor_leaves

__all__ = [
    "LoweredCompiler",
    "LoweredMemory",
    "LoweredStorage",
    "Owned",
    "StepMemory",
    "compile_lowered",
    "lowered_memory",
    "saved_count",
    "step_memory",
]


@dataclass(frozen=True)
class Owned:
    """A storage that only the call holds, with the graph inputs that lie in it."""

    inputs: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class LoweredStorage:
    """A storage and its life. ``bytes`` is rounded up as the allocator does.

    It is alive in steps ``born`` to ``dies``, both included; -1 is "on entry", ``None`` "still
    on return". ``input`` is the graph input that it came in with (inputs that share memory are
    told apart here), empty for new memory; ``outputs`` are the positions of the graph outputs
    that lie in it.
    """

    bytes: int
    born: int
    dies: int | None
    input: str = ""
    outputs: tuple[int, ...] = ()


@dataclass(frozen=True)
class LoweredMemory:
    """Memory of one compiled graph: ``phase`` is ``"forward"``, ``"backward"`` or ``"inference"``.

    ``steps`` are the kernel launches and library calls in order, ``scratch`` the bytes that each
    takes and gives back within itself. Byte counts are above the graph inputs, on devices of type
    ``device_type``. ``output_names`` has "" for an output that is a constant; ``static`` are the
    inputs that outlive the step (parameters, buffers).
    """

    phase: str
    device_type: str
    steps: tuple[str, ...]
    scratch: tuple[int, ...]
    storages: tuple[LoweredStorage, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    static: frozenset[str] = frozenset()

    def live(self, owned: Sequence[Owned] = ()) -> list[int]:
        """Live bytes at each step, above what was live on entry.

        Storages in ``owned`` are released after the last use of any input in them and take their
        bytes off from there on; all other inputs stay.
        """
        change = [0] * (len(self.steps) + 1)
        for storage in self.storages:
            if not storage.input:
                change[storage.born] += storage.bytes
                if storage.dies is not None:
                    change[storage.dies + 1] -= storage.bytes
        for item in owned:
            last = self._last_use(item)
            if last is not None:
                change[last + 1] -= item.bytes
        result, now = [], 0
        for delta, scratch in zip(change, self.scratch, strict=False):
            now += delta
            result.append(now + scratch)
        return result

    @property
    def peak_bytes(self) -> int:
        """Peak above the inputs when the caller keeps all of them."""
        return max(self.live(), default=0)

    @property
    def peak_step(self) -> str:
        """Label of the step where ``peak_bytes`` occurs."""
        live = self.live()
        return self.steps[live.index(max(live))] if live else ""

    @property
    def output_bytes(self) -> int:
        """New memory that is alive on return: outputs that do not lie in an input's storage."""
        return sum(s.bytes for s in self.storages if s.dies is None and not s.input)

    @property
    def input_releases(self) -> dict[str, int]:
        """For each input that is not static and does not come out again: the step after which
        the call drops it (-1: unused)."""
        return {
            s.input: s.dies
            for s in self.storages
            if s.input and s.dies is not None and s.input not in self.static
        }

    def releases(self, item: Owned) -> bool:
        """Whether the call lets go of a storage that it was handed over, which nobody else holds."""
        return self._last_use(item) is not None

    def _last_use(self, item: Owned) -> int | None:
        uses = [s.dies for s in self.storages if s.input in item.inputs]
        return None if None in uses else max((u for u in uses if u is not None), default=-1)


@dataclass(frozen=True)
class StepMemory:
    """A forward and its backward put together. Bytes are above parameters, buffers and inputs.

    ``retained`` is alive between the halves (user outputs and saved values); ``gradients`` is
    what the backward returns. ``steps`` gives (phase, label, live bytes) throughout.
    """

    forward_peak: int
    retained: int
    backward_peak: int
    gradients: int
    steps: tuple[tuple[str, str, int], ...]

    @property
    def peak_bytes(self) -> int:
        return max(self.forward_peak, self.backward_peak)


def step_memory(forward: LoweredMemory, backward: LoweredMemory) -> StepMemory:
    """Compose the halves of one step; saved values are matched by name.

    The caller keeps the forward's inputs and its user outputs while the backward runs. A saved
    value that is none of these goes at its last use in the backward, and so does a tangent,
    because autograd hands over its only reference. Raises ``LoweringError`` where the halves do not
    belong together.
    """
    first = len(forward.output_names) - saved_count(forward, backward)
    saved = forward.output_names[first:]
    owned = [
        Owned(tuple(forward.output_names[i] for i in storage.outputs), storage.bytes)
        for storage in forward.storages
        if storage.outputs and not storage.input and all(i >= first for i in storage.outputs)
    ]
    tangents = [Owned((s.input,), s.bytes) for s in backward.storages if s.input and s.input not in saved]
    retained = forward.output_bytes
    in_forward = forward.live()
    entry = retained + sum(item.bytes for item in tangents)
    owned += tangents
    in_backward = [entry + b for b in backward.live(owned)]
    kept = {s.input for s in backward.storages if s.input and s.dies is None}
    gradients = backward.output_bytes + sum(item.bytes for item in owned if kept.intersection(item.inputs))
    return StepMemory(
        forward_peak=max([retained, *in_forward]),
        retained=retained,
        backward_peak=max([entry, *in_backward]),
        gradients=gradients,
        steps=(
            *(("forward", label, b) for label, b in zip(forward.steps, in_forward, strict=True)),
            *(("backward", label, b) for label, b in zip(backward.steps, in_backward, strict=True)),
        ),
    )


def saved_count(forward: LoweredMemory, backward: LoweredMemory) -> int:
    """How many of the forward's last outputs are saved values: those the backward takes, once each."""
    if (forward.phase, backward.phase) != ("forward", "backward"):
        raise LoweringError(
            f"cannot compose a {forward.phase!r} graph with a {backward.phase!r} graph",
            hint="expected a 'forward' and its 'backward'",
        )
    taken = set(backward.input_names)
    count = 0
    for name in reversed(forward.output_names):
        if name not in taken:
            break
        taken.remove(name)
        count += 1
    missing = sorted(name for name in taken if "tangents" not in name)
    if missing and not count:
        raise LoweringError(
            f"the backward takes {', '.join(missing)}, but the forward hands over nothing of that name",
            hint=f"the forward's outputs are {', '.join(forward.output_names)}",
        )
    return count


def lowered_memory(
    source: str,
    inputs: Sequence[Any],
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    phase: str,
    static: Sequence[int] = (),
    device_type: str | None = None,
    granularity: int = 1,
    constants: Mapping[str, Any] | None = None,
) -> LoweredMemory:
    """Memory of the generated wrapper ``source`` on tensors like ``inputs`` (fake or real).

    ``static`` are positions of inputs that outlive the step. ``device_type`` is the kind of
    memory to follow: by default that of the first input that is not on the CPU, else ``"cpu"``.
    ``granularity`` is what the allocator rounds each storage up to, in bytes.
    Raises ``LoweringError`` where the source cannot be read or does not fit the names.
    """
    device_type = device_type or _main_device(inputs)
    trace = trace_wrapper(source, inputs, device_type=device_type, constants=constants)
    if len(trace.outputs) != len(output_names):
        raise LoweringError(
            f"the generated code returns {len(trace.outputs)} values, the graph {len(output_names)}",
            hint="source and graph are not of the same compilation",
        )
    came_with = {index: input_names[i] for i, index in enumerate(trace.inputs) if index is not None}
    lies_in: dict[int, list[int]] = {}
    for position, index in enumerate(trace.outputs):
        if index is not None:
            lies_in.setdefault(index, []).append(position)
    storages = tuple(
        LoweredStorage(
            bytes=-(-life.bytes // granularity) * granularity,
            born=life.born,
            dies=life.dies,
            input=came_with.get(index, ""),
            outputs=tuple(lies_in.get(index, ())),
        )
        for index, life in enumerate(trace.storages)
    )
    return LoweredMemory(
        phase=phase,
        device_type=device_type,
        steps=tuple(trace.steps),
        scratch=tuple(-(-taken // granularity) * granularity for taken in trace.scratch),
        storages=storages,
        input_names=tuple(input_names),
        output_names=tuple(output_names),
        static=frozenset(input_names[i] for i in static),
    )


@dataclass
class LoweredCompiler:
    """An ``inner_compile`` for ``compile_fx`` that also reads the memory of what it compiled.

    ``records`` receives one ``LoweredMemory`` for each graph, in the order of compilation (the
    backward possibly not before the first backward pass). A hit in Inductor's graph cache gives
    a record all the same; a hit in AOTAutograd's cache skips the inner compilation and gives none,
    so that cache must be off.
    """

    granularity: int = 1
    device_type: str | None = None
    compile: Callable[..., Any] = _torch.inductor_inner_compile
    records: list[LoweredMemory] = field(default_factory=list)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        # Inductor's passes rewrite the graph in place: names and inputs are taken before.
        input_names, output_names = _names(gm)
        runs_code = any(node.op not in ("placeholder", "get_attr", "output") for node in gm.graph.nodes)
        is_backward = bool(kwargs.get("is_backward"))
        phase = "backward" if is_backward else "inference" if kwargs.get("is_inference") else "forward"
        compiled = self.compile(gm, example_inputs, **kwargs)
        generated = _torch.generated_source(compiled)
        if generated is None and runs_code:
            raise LoweringError(
                f"Inductor returned {type(compiled).__name__} without Python source for the {phase} graph",
                hint="cpp_wrapper must be off to predict memory from generated code",
            )
        source, constants = generated or (_pass_through(gm), {})
        # In a backward, static_input_idxs means "saved", which says nothing of who holds them.
        static = () if is_backward else tuple(kwargs.get("static_input_idxs") or ())
        self.records.append(
            lowered_memory(
                source,
                example_inputs,
                input_names=input_names,
                output_names=output_names,
                phase=phase,
                static=static,
                device_type=self.device_type,
                granularity=self.granularity,
                constants=constants,
            )
        )
        return compiled


def compile_lowered(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    static_inputs: Sequence[int] = (),
    is_backward: bool = False,
    is_inference: bool = False,
    granularity: int = 1,
) -> tuple[Callable[[list[Any]], Any], LoweredMemory]:
    """Compile one functional ATen graph with Inductor: the boxed callable and its memory.

    Raises ``LoweringError`` for a graph that returns a single value instead of a tuple.
    """
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    if not isinstance(output.args[0], tuple | list):
        raise LoweringError(
            f"the graph returns {output.args[0]} by itself",
            hint="expected a tuple of outputs, as AOTAutograd makes",
        )
    compiler = LoweredCompiler(granularity=granularity)
    compiled = compiler(
        gm,
        example_inputs,
        static_input_idxs=list(static_inputs),
        is_backward=is_backward,
        is_inference=is_inference,
    )
    return compiled, compiler.records[-1]


def _names(gm: fx.GraphModule) -> tuple[list[str], list[str]]:
    inputs = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    values = output.args[0] if isinstance(output.args[0], tuple | list) else (output.args[0],)
    return inputs, [value.name if isinstance(value, fx.Node) else "" for value in values]


def _pass_through(gm: fx.GraphModule) -> str:
    """The wrapper of a graph without calls, which Inductor does not generate code for."""
    inputs, outputs = _names(gm)
    unpack = f"    {', '.join(inputs)}, = args\n" if inputs else ""
    results = "".join(f"{name if name in inputs else None}, " for name in outputs)
    return f"def call(args):\n{unpack}    args.clear()\n    return ({results})\n"


def _main_device(inputs: Sequence[Any]) -> str:
    kinds = [tensor.device.type for tensor in tensor_leaves(list(inputs))]
    return next((kind for kind in kinds if kind != "cpu"), "cpu")
