"""Every private torch API that graphopt touches, and nothing else.

Each function is tested on every supported torch version in ``tests/test_private_torch.py``.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
import logging
import math
import operator
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.fx as fx
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch import config as functorch_config
from torch._functorch import partitioners
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils.checkpoint import CheckpointPolicy

from graphopt.collectives import is_collective

__all__ = [
    "capture_context",
    "empty_graph_like",
    "extract_halves",
    "fake_inputs",
    "functorch_settings",
    "is_fake",
    "retrace",
    "torch_partition",
]


def is_fake(value: object) -> bool:
    return isinstance(value, FakeTensor)


def capture_context() -> TracingContext | None:
    """Dynamo's tracing context of the compilation under way, to be re-entered later."""
    return TracingContext.try_get()


@contextmanager
def within(context: TracingContext | None) -> Iterator[None]:
    """Run under ``context``, as if dynamo's call of the backend were still under way."""
    with tracing(context):
        yield


def context_fake_mode() -> FakeTensorMode:
    context = TracingContext.try_get()
    if context is not None and context.fake_mode is not None:
        return context.fake_mode
    return FakeTensorMode(shape_env=torch.fx.experimental.symbolic_shapes.ShapeEnv())


def fake_inputs(gm: fx.GraphModule, inputs: Sequence[Any], mode: FakeTensorMode) -> list[Any]:
    """Arguments for dynamo's graph as fakes of ``mode``, sizes symbolic where dynamo made them so.

    Each is an alias of the fake that AOTAutograd will be given later, so that tracing an in-place
    operator leaves that one as it is.
    """
    context = TracingContext.try_get()
    fakes: list[Any] = []
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        example = node.meta.get("example_value")
        if isinstance(example, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            fakes.append(example)
        elif not isinstance(value, torch.Tensor):
            fakes.append(value)
        else:
            if not is_fake(value):
                known: Any = context.tensor_to_context if context is not None else {}
                symbols = known.get(value)
                source = getattr(symbols, "tensor_source", None)
                value = mode.from_tensor(value, symbolic_context=symbols, source=source)
            fakes.append(_alias(value))
    return fakes


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.requires_grad and not tensor.is_leaf:
        # Autograd forbids to write to a leaf, and this is none: it may be written.
        return tensor.detach().requires_grad_().clone()
    return tensor.detach().requires_grad_(tensor.requires_grad)


class _Inlining(fx.Interpreter):
    """Runs dynamo's graph with ``torch.utils.checkpoint`` regions in line, their nodes tagged.

    A region with a policy of its own (``context_fn``) stays one node: its policy is asked about
    operators that exist further down only. Autocast regions are entered, not only written down:
    the types of values depend on them. ``open_regions`` are those not yet left.
    """

    def __init__(self, gm: fx.GraphModule, open_regions: list[Any]) -> None:
        super().__init__(gm)
        self._open = open_regions

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is enter_autocast():
            node = super().call_function(target, args, kwargs)
            with torch._C.DisableTorchFunction():
                self._open.append(target(*args, **kwargs))
            return node
        if target is exit_autocast():
            node = super().call_function(target, args, kwargs)
            with torch._C.DisableTorchFunction():
                target(self._open.pop())
            return node
        if target is not torch.ops.higher_order.tag_activation_checkpoint:
            return super().call_function(target, args, kwargs)
        region = args[0]
        if region.meta.get("_checkpoint_context_fn") is not None:
            return super().call_function(target, args, kwargs)
        number = next(_regions)
        for node in region.graph.nodes:
            if node.op != "placeholder":
                node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
                node.meta["ac_graph_id"] = number
        return _Inlining(region, self._open).run(*args[1:])


_regions = itertools.count()


def retrace(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """Trace dynamo's graph again, above autograd, into ATen with composite operators whole.

    Module provenance, stack traces and the tags of checkpoint regions are kept. Source: the
    pre-dispatch tracing that ``torch.export`` uses.
    """
    mode = context_fake_mode()
    fakes = fake_inputs(gm, inputs, mode)

    regions: list[Any] = []

    def run(*args: Any) -> Any:
        # Under the fake mode what the graph makes from nothing (masks, positions) is fake as well.
        with mode, fx_traceback.preserve_node_meta():
            return _Inlining(gm, regions).run(*args)

    allowed, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, True
    cached = torch.is_autocast_cache_enabled()
    # What autocast keeps of a fake weight must not be found by the program that runs.
    torch.set_autocast_cache_enabled(False)
    apart = {op: op.decompose for op in _READ_BY_COMPOSITES}
    try:
        traced = make_fx(
            run,
            decomposition_table=apart,
            pre_dispatch=True,
            tracing_mode="real",
            _allow_non_fake_inputs=True,
        )
        return traced(*fakes)
    finally:
        for region in reversed(regions):
            exit_autocast()(region)
        torch.set_autocast_cache_enabled(cached)
        mode.allow_non_fake_inputs = allowed


_READ_BY_COMPOSITES = (
    torch.ops.aten.narrow.Tensor,
    torch.ops.aten.tensor_split.tensor_indices_or_sections,
)
"""Composite operators that read numbers out of a tensor: whole, they would hide where these come from, and
nothing could be said of sizes that are made of them."""


def static_context() -> TracingContext:
    """A tracing context of its own, in which every size is a number."""
    return TracingContext(FakeTensorMode())


def retraced_at(
    gm: fx.GraphModule,
    weights: Sequence[torch.Tensor],
    shapes: Sequence[tuple[tuple[int, ...], torch.dtype]],
) -> fx.GraphModule:
    """``gm``, whose placeholders are for ``weights`` and tensors of ``shapes``, traced for these sizes alone.
    Nothing is allocated."""
    context = static_context()
    mode = context.fake_mode
    assert mode is not None
    device = next((weight.device for weight in weights), torch.device("cpu"))
    with mode:
        given = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]
    bare = fx.GraphModule(gm, fx.Graph())
    bare.graph.output(bare.graph.graph_copy(gm.graph, {}))
    for node in bare.graph.nodes:
        node.meta = {}
    bare.recompile()
    with tracing(context), torch.no_grad():
        return retrace(bare, [*weights, *given])


def transforms_functions(gm: fx.GraphModule) -> bool:
    """Whether a graph, or one inside it, calls functorch (``torch.vmap`` and the like) step by step.

    Such calls open and close levels of interpretation; what runs in between cannot be traced above
    autograd.
    """
    graphs = [m.graph for m in gm.modules() if isinstance(m, fx.GraphModule)]
    targets = [node.target for graph in graphs for node in graph.nodes if node.op == "call_function"]
    modules = {getattr(target, "__module__", "") for target in targets}
    return any(isinstance(m, str) and m.startswith("torch._functorch") for m in modules)


_TRACED_FAITHFULLY = frozenset(
    ("associative_scan", "cond", "flex_attention", "map", "map_impl", "scan", "tag_activation_checkpoint")
    + ("triton_kernel_wrapper_functional", "triton_kernel_wrapper_mutation", "while_loop")
)
"""Higher-order operators that a trace above autograd keeps whole, or takes apart with their gradients."""


def has_own_gradients(gm: fx.GraphModule) -> bool:
    """Whether a graph, or one inside it, calls a higher-order operator that may say how gradients flow:
    ``torch.autograd.Function``, hooks on tensors.

    A trace above autograd runs its forward and forgets the rest: gradients would be wrong or missing.
    """
    graphs = [m.graph for m in gm.modules() if isinstance(m, fx.GraphModule)]
    targets = [node.target for graph in graphs for node in graph.nodes if node.op == "call_function"]
    return any(
        isinstance(target, torch._ops.HigherOrderOperator) and str(target) not in _TRACED_FAITHFULLY
        for target in targets
    )


def wrapped_kinds(gm: fx.GraphModule) -> list[str]:
    """Names of the tensor subclasses (``DTensor``) that a graph of dynamo's computes on, which AOTAutograd
    takes apart into the plain tensors that they wrap, below autograd.

    Above it an operator on them is one call, which a trace cannot enter.
    """
    values = [node.meta.get("example_value") for node in gm.graph.nodes]
    return sorted({type(value).__name__ for value in values if is_traceable_wrapper_subclass(value)})


def plain_tensors(value: object) -> list[torch.Tensor]:
    """The tensors with memory of their own that a tensor wraps: of a DTensor this rank's part; of a plain
    tensor itself."""
    if not is_traceable_wrapper_subclass(value):
        return [value] if isinstance(value, torch.Tensor) else []
    names, _ = value.__tensor_flatten__()
    return [tensor for name in names for tensor in plain_tensors(getattr(value, name))]


def stays_as_captured(gm: fx.GraphModule) -> bool:
    """Whether a graph of dynamo's cannot be traced above autograd without becoming another."""
    return transforms_functions(gm) or has_own_gradients(gm) or bool(wrapped_kinds(gm))


def traced_constants(gm: fx.GraphModule) -> list[str]:
    """Names of tensors that a trace took for constants although they depend on its inputs."""
    found = []
    for node in gm.graph.nodes:
        value = getattr(gm, str(node.target), None) if node.op == "get_attr" else None
        if not isinstance(value, torch.Tensor):
            continue
        if is_fake(value) or torch._C._functorch.is_functorch_wrapped_tensor(value):
            found.append(str(node.target))
    return found


def run_with_random_state() -> Any:
    """The operator ``(state, op, *args)``: ``op(*args)`` under a generator state, put back afterwards."""
    from torch._prims.rng_prims import run_with_rng_state

    return run_with_rng_state


def random_state_bytes(device: torch.device) -> int:
    """Size of the state of a device's default generator."""
    with without_modes():
        return torch.Generator(device).get_state().numel()


def fake_mode_of(tensors: Sequence[torch.Tensor]) -> FakeTensorMode:
    """The mode that makes fake tensors to go with the given ones."""
    return next((t.fake_mode for t in tensors if isinstance(t, FakeTensor)), None) or fake_mode()


def traced_like(function: Callable[..., Any], tensors: Sequence[torch.Tensor]) -> fx.Graph:
    """The operators of ATen that ``function`` comes to on tensors like the given fake ones, those that
    Inductor takes apart taken apart."""
    table = inductor_decompositions()
    with fake_mode_of(tensors), torch.no_grad():
        graph: fx.Graph = make_fx(function, decomposition_table=table, tracing_mode="real")(*tensors).graph
    return graph


def decomposed(
    module: fx.GraphModule, values: Sequence[torch.Tensor], keep: Callable[[Any], bool]
) -> fx.Graph:
    """The operators of ATen and prims that ``module`` comes to on fake tensors ``values``: all that torch has
    a decomposition for is taken apart, but for operators that ``keep`` is true of. Nodes have their
    fake results in ``meta["val"]``."""
    from torch._decomp import decomposition_table

    table: dict[Any, Callable[..., Any]] = {
        op: made for op, made in decomposition_table.items() if not keep(op)
    }
    with fake_mode_of(values), torch.no_grad():
        traced = make_fx(module, decomposition_table=table, tracing_mode="real", pre_dispatch=False)(*values)
    traced.graph.eliminate_dead_code()
    graph: fx.Graph = traced.graph
    return graph


def taken_apart(
    module: fx.GraphModule, values: Sequence[Any], table: Mapping[Any, Callable[..., Any]]
) -> fx.GraphModule:
    """The operators that ``module`` comes to on fake tensors and symbolic sizes ``values``: those in
    ``table`` are what the functions there call. Nodes have their fake results in ``meta["val"]``."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    with fake_mode_of(tensors), torch.no_grad(), enable_python_dispatcher():
        trace = make_fx(module, decomposition_table=dict(table), tracing_mode="real")
        traced: fx.GraphModule = trace(*values)
    traced.graph.eliminate_dead_code()
    return traced


def without_writes(module: fx.GraphModule, values: Sequence[Any]) -> fx.GraphModule:
    """``module`` with operators that write in place replaced by those that give new values, on fake tensors
    and symbolic sizes ``values``. What is left of writes to inputs are copies into them at the end."""
    function = torch.func.functionalize(module, remove="mutations")
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    with fake_mode_of(tensors), torch.no_grad(), enable_python_dispatcher():
        traced: fx.GraphModule = make_fx(function, tracing_mode="real")(*values)
    traced.graph.eliminate_dead_code()
    return traced


def implementation_of(name: str) -> Callable[..., Any] | None:
    """The function that ``torch.library.custom_op`` made an operator ``"acme::gate"`` of, or ``None``."""
    from torch._library.custom_ops import OPDEFS

    found = OPDEFS.get(name)
    made: Callable[..., Any] | None = None if found is None else found._init_fn
    return made


def writes_in_place(node: fx.Node) -> bool:
    """Whether the schema of what a node calls says that it writes to an argument."""
    return bool(getattr(schema_of(node.target), "is_mutable", False))


def python_dispatcher() -> contextlib.AbstractContextManager[Any]:
    """Operators are taken apart by torch's decompositions in Python, which know sizes that are symbols; those
    in C++ do not all (``linear`` in torch 2.11)."""
    context: contextlib.AbstractContextManager[Any] = enable_python_dispatcher()
    return context


def call_on_fakes(
    like: torch.Tensor, target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """What a call gives under the mode of the fake tensor ``like``."""
    with fake_mode_of([like]), torch.no_grad(), python_dispatcher():
        return target(*args, **kwargs)


def traced_body(function: Callable[..., Any], example: Sequence[torch.Tensor]) -> fx.GraphModule:
    """``function`` of tensors like ``example``, which may have any first size, as a graph of ATen
    operators."""
    with torch.no_grad():
        traced: fx.GraphModule = make_fx(function, tracing_mode="real")(*example)
    return traced


def symbolic_fakes(fixed: Sequence[torch.Tensor], free: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Fake tensors like those given, in a mode of their own. Sizes of ``free`` ones are symbols, the same
    where they are the same number; those of ``fixed`` ones are numbers."""
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=True), allow_non_fake_inputs=True)
    found: list[torch.Tensor] = []
    for tensors, kind in ((fixed, DimDynamic.STATIC), (free, DimDynamic.DUCK)):
        for tensor in tensors:
            context: Any = StatelessSymbolicContext(dynamic_sizes=[kind] * tensor.dim())
            found.append(mode.from_tensor(tensor, symbolic_context=context))
    return found


def is_symbol(size: Any) -> bool:
    """Whether a size is a symbol still, that nothing has taken for one number."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def can_ignore_versions() -> bool:
    """Whether this torch hands inputs to the backward that are written to in between (``ignore_version``).

    Where it cannot, the backward refuses an input that was written to.
    """
    from torch._functorch._aot_autograd.schemas import ViewAndMutationMeta

    return "num_tensors_saved_with_no_vc_check" in ViewAndMutationMeta.__dataclass_fields__


def ignore_version(node: fx.Node) -> None:
    """Have a graph input handed to the backward whatever is written to it in between."""
    node.meta["saved_tensor_with_no_vc_check"] = True


def ignores_version(node: fx.Node) -> bool:
    """Whether ``ignore_version`` was said of a value of a graph."""
    return bool(node.meta.get("saved_tensor_with_no_vc_check"))


def empty_graph_like(graph: fx.Graph) -> fx.Graph:
    """A graph without nodes that is traced and written as code the way ``graph`` is."""
    empty = fx.Graph(tracer_cls=graph._tracer_cls)
    empty.set_codegen(copy.deepcopy(graph._codegen))
    return empty


def extract_halves(
    joint: fx.GraphModule, saved: Sequence[fx.Node], saved_symbols: Sequence[fx.Node], num_outputs: int
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Forward and backward modules of a joint module that hands over exactly ``saved``.

    Handles what AOTAutograd's runtime expects of the hand-over: symbol bindings, values without
    version counters, opaque objects (meshes of ranks), random offsets.
    """
    numbers = [node for node in saved_symbols if not is_opaque(node)]
    opaque = [node for node in saved_symbols if is_opaque(node)]
    # Older torch tells opaque objects from tensors itself.
    apart: dict[str, Any] = {"saved_opaque_nodes": opaque} if _HANDS_OVER_OPAQUE else {}
    values = [*saved] if _HANDS_OVER_OPAQUE else [*saved, *opaque]
    return partitioners._extract_fwd_bwd_modules(
        joint, values, saved_sym_nodes=numbers, num_fwd_outputs=num_outputs, **apart
    )


_HANDS_OVER_OPAQUE = (
    "saved_opaque_nodes" in inspect.signature(partitioners._extract_fwd_bwd_modules).parameters
)


def is_opaque(node: fx.Node) -> bool:
    """Whether the value of a node of a joint graph is neither a tensor nor a number: a mesh of ranks."""
    numbers = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)
    return not isinstance(node.meta.get("val"), (torch.Tensor, type(None), *numbers))


def eliminate_common_subexpressions(gm: fx.GraphModule) -> None:
    """Dead code and repeated pure computations out of a joint graph, as torch's partitioner does.

    Collectives all stay: ranks count on each other to run the same ones.
    """
    from torch._functorch.compile_utils import fx_graph_cse

    gm.graph.eliminate_dead_code(lambda node: node.is_impure() or is_collective(node.target))
    for number, node in enumerate(gm.graph.nodes):
        if is_collective(node.target):
            # Two calls with other arguments are not the same.
            node.kwargs = {**node.kwargs, _NUMBER: number}
    gm.graph = fx_graph_cse(gm.graph)
    for node in gm.graph.nodes:
        if _NUMBER in node.kwargs:
            node.kwargs = {name: value for name, value in node.kwargs.items() if name != _NUMBER}
    gm.recompile()


_NUMBER = "graphopt_number"


def torch_partition(
    joint: fx.GraphModule, budget: float | None, kwargs: dict[str, Any]
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """torch's own partition: min-cut at ``activation_memory_budget=budget``, or, for ``None``,
    the partition that saves everything (what eager autograd would keep)."""
    if budget is None:
        return partitioners.default_partition(joint, None, **kwargs)
    with functorch_config.patch(activation_memory_budget=budget):
        return partitioners.min_cut_rematerialization_partition(joint, None, **kwargs)


def functorch_settings(**settings: Any) -> Any:
    return functorch_config.patch(**settings)


def joint_compiler(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    inference: Callable[..., Any],
    partition: Callable[..., tuple[fx.GraphModule, fx.GraphModule]],
    decompositions: dict[Any, Any] | None,
) -> Callable[..., Any]:
    """A dynamo backend that goes through AOTAutograd with the given compilers and partition."""
    from torch._dynamo.backends.common import aot_autograd

    return aot_autograd(
        fw_compiler=forward,
        bw_compiler=backward,
        inference_compiler=inference,
        partition_fn=partition,
        decompositions=decompositions,
    )


@contextmanager
def random_calls_kept() -> Iterator[None]:
    """While AOTAutograd traces, a random number that nobody reads is drawn all the same: the generator moves
    on as in eager. By default torch drops such calls under a tracing context, for Inductor's sake."""
    from torch._inductor import config

    with config.patch(fallback_random=True):
        yield


def boxed(function: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """Mark ``function(args: list)`` as taking over its argument list, free to empty it."""
    function._boxed_call = True  # type: ignore[attr-defined]
    return function


def record_allocations(step: Callable[[], object]) -> list[int]:
    """Signed bytes of every CPU allocation (+) and release (-) that ``step()`` made, in time order."""
    return [size for size in record_timeline(step, "") if size is not None]


def record_timeline(step: Callable[[], object], marks: str) -> list[int | None]:
    """What ``record_allocations`` yields, with ``None`` wherever ``mark(marks)`` was called."""
    # Typed as any: torch's stubs of these differ from what they return.
    autograd: Any = torch._C._autograd
    profiler: Any = torch._C._profiler
    config = profiler.ProfilerConfig(
        profiler.ProfilerState.CPU, False, True, False, False, False, profiler._ExperimentalConfig()
    )
    autograd._enable_profiler_legacy(config)
    try:
        step()
    finally:
        threads = autograd._disable_profiler_legacy()
    origin: Any = next((event for thread in threads for event in thread), None)
    events = [
        (origin.cpu_elapsed_us(event), event.cpu_memory_usage() if event.kind() == "memory_alloc" else None)
        for thread in threads
        for event in thread
        if event.kind() == "memory_alloc" or (event.kind() == "push" and event.name() == marks)
    ]
    if len(threads) > 1:
        events.sort(key=lambda pair: pair[0])
    return [size for _, size in events]


def mark(name: str) -> None:
    """Leave a mark in what ``record_allocations`` records."""
    with torch.autograd.profiler.record_function(name):
        pass


def after_backward(function: Callable[[], None]) -> None:
    """Call ``function()`` at the end of the backward pass that is running. For hooks of tensors."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(function)


def weak_storage(storage: torch.UntypedStorage) -> Any:
    """A weak reference to a storage: ``expired()`` says whether its memory is gone."""
    from torch.multiprocessing.reductions import StorageWeakRef

    reference: Any = StorageWeakRef
    return reference(storage)


def weak_tensor(tensor: torch.Tensor) -> Any:
    """A weak reference to a tensor, not to its memory: ``expired()`` says whether nothing holds it any more,
    autograd's graph included."""
    native: Any = torch._C
    return native._WeakTensorRef(tensor)


def hint(size: Any) -> int:
    """The value that a possibly symbolic size had while tracing, without guarding on it.

    A size that depends on values had none: it is the largest that it can be, so that memory is bounded, or 1
    where nothing bounds it.
    """
    if isinstance(size, torch.SymInt):
        value = size.node.hint
        return int(value) if value is not None else _largest(size)
    return int(size)


def _largest(size: torch.SymInt) -> int:
    largest = size.node.shape_env.bound_sympy(size.node.expr).upper
    # Operators that know no bound name the largest number of 64 bits, or one less.
    return int(largest) if largest.is_Integer and largest < sys.maxsize - 1 else 1


def hinted(value: Any) -> Any:
    """A number, in place of a symbolic one that which it had while tracing, without guarding on it."""
    if not isinstance(value, torch.SymInt | torch.SymFloat):
        return value
    number = value.node.hint
    return type(number)(number) if number is not None else 1


def depends_on(size: Any, symbol: torch.SymInt) -> bool:
    """Whether a size is made of the symbol that ``symbol`` is."""
    if not isinstance(size, torch.SymInt):
        return False
    return bool(size.node.expr.free_symbols & symbol.node.expr.free_symbols)


def size_from(size: torch.SymInt, leaf: Callable[[Any], Any], combine: Callable[[Any, Any, Any], Any]) -> Any:
    """A size as a sum of products: ``leaf(symbol)`` for its symbols, which print as their sizes do, and
    ``combine(operator, one, other)`` for ``operator.add`` and ``operator.mul``. Raises ``ValueError`` for a
    size that is made otherwise."""
    import sympy  # type: ignore[import-untyped]

    def of(expression: Any) -> Any:
        if expression.is_Integer:
            return int(expression)
        if expression.is_Symbol:
            return leaf(expression)
        if not isinstance(expression, (sympy.Add, sympy.Mul)):
            raise ValueError(f"the size {expression} is no sum of products")
        function = operator.add if isinstance(expression, sympy.Add) else operator.mul
        return functools.reduce(lambda a, b: combine(function, a, b), map(of, expression.args))

    return of(size.node.expr)


def size_at(size: torch.SymInt, numbers: Sequence[tuple[torch.SymInt, int]]) -> int:
    """What a size is where symbols that it is made of are ``numbers``. Raises ``ValueError`` where it is
    made of others too."""
    expression = size.node.expr.subs({symbol.node.expr: number for symbol, number in numbers})
    if not expression.is_Integer:
        raise ValueError(f"the size {size} is not told by those of the tokens")
    return int(expression)


def is_same_size(one: Any, other: Any) -> bool:
    """Whether two sizes are the same number or the same expression of symbols, without guarding on it."""
    if isinstance(one, torch.SymInt) and isinstance(other, torch.SymInt):
        return bool(one.node.expr == other.node.expr)
    return type(one) is int and type(other) is int and one == other


class SizeSymbol(NamedTuple):
    """A size that is known at run time alone: ``hint`` is what it was while tracing, ``low`` and ``high``,
    both included, bound it where they are given; ``positive``: torch takes it to be above 0."""

    name: str
    hint: int
    low: int | None
    high: int | None
    positive: bool


def size_symbols(values: Any) -> dict[str, SizeSymbol]:
    """The symbols of sizes and strides in ``values``, tensors and symbolic numbers. Raises ``ValueError`` for
    one that depends on values, which has no size while tracing."""
    from torch.utils._sympy.numbers import int_oo

    found: dict[str, SizeSymbol] = {}
    for node in _symbolic_nodes(values):
        known: Any = node.shape_env
        for symbol in sorted(node.expr.free_symbols, key=str):
            if not symbol.is_integer or (value := _known_values(known).get(symbol)) is None:
                raise ValueError(f"the size {symbol} depends on values")
            bounds = known.var_to_range[symbol]
            low = None if bounds.lower == -int_oo else int(bounds.lower)
            high = None if bounds.upper == int_oo else int(bounds.upper)
            found[str(symbol)] = SizeSymbol(str(symbol), int(value), low, high, bool(symbol.is_positive))
    return found


def size_sources(values: Any) -> dict[str, list[str]]:
    """Where dynamo took the symbols of sizes in ``values`` from, as Python of its own:
    ``L['x'].size()[0]``."""
    found: dict[str, list[str]] = {}
    for node in _symbolic_nodes(values):
        for symbol in node.expr.free_symbols:
            names = [source.name for source in node.shape_env.var_to_sources.get(symbol, ())]
            # torch 2.11 has a method there.
            found[str(symbol)] = [str(name() if callable(name) else name) for name in names]
    return found


def size_guards(values: Any) -> list[Any]:
    """What was assumed of the symbols of sizes in ``values``, as ``expression_form`` has it."""
    known = {id(node.shape_env): node.shape_env for node in _symbolic_nodes(values)}
    return [form for env in known.values() for form in _guards_of(env)]


def context_guards(context: TracingContext) -> list[Any]:
    """What was assumed of sizes under ``context``, as ``expression_form`` has it."""
    assert context.fake_mode is not None
    return _guards_of(context.fake_mode.shape_env)


def _guards_of(env: Any) -> list[Any]:
    found = [] if env is None else [env.replace(guard.expr) for guard in env.guards]
    forms = [expression_form(expression) for expression in found]
    return list({str(form): form for form in forms if form is not True}.values())


def _symbolic_nodes(values: Any) -> Iterator[Any]:
    for value in torch.utils._pytree.tree_leaves(values):
        numbers = [value]
        if isinstance(value, torch.Tensor):
            numbers = [*value.shape, *value.stride(), value.storage_offset()]
        for number in numbers:
            if isinstance(number, torch.SymInt | torch.SymBool | torch.SymFloat):
                yield number.node


def _known_values(env: Any) -> Any:
    """What symbols of sizes were while tracing; torch 2.11 has another name for it."""
    return env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val


def symbolic_context(symbols: Iterable[SizeSymbol]) -> TracingContext:
    """A tracing context of its own, in which sizes may be made of ``symbols``."""
    import sympy
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import ShapeEnv, ValueRangesSLoc
    from torch.utils._sympy.numbers import int_oo
    from torch.utils._sympy.value_ranges import ValueRanges

    env: Any = ShapeEnv()
    place = env._get_sloc()
    for symbol in symbols:
        made = _symbol(symbol)
        low = -int_oo if symbol.low is None else sympy.Integer(symbol.low)
        high = int_oo if symbol.high is None else sympy.Integer(symbol.high)
        _known_values(env)[made] = sympy.Integer(symbol.hint)
        env.var_to_range[made] = ValueRanges(low, high)
        # Inductor writes guards of its own code from these.
        env.var_to_range_sloc[made] = ValueRangesSLoc(place, place)
        env.var_to_sources[made] = [ConstantSource(symbol.name)]
    return TracingContext(FakeTensorMode(allow_non_fake_inputs=True, shape_env=env))


def _symbol(symbol: SizeSymbol) -> Any:
    import sympy

    return sympy.Symbol(symbol.name, integer=True, positive=True if symbol.positive else None)


def sized(form: Any, symbols: Mapping[str, SizeSymbol], mode: FakeTensorMode) -> Any:
    """A size under ``mode``, which is of ``symbolic_context(symbols)``: a number, or one made of symbols, as
    ``expression_form`` writes it. Raises ``ValueError`` for what is no size of these symbols."""
    import sympy

    expression = _expression_of(form, {name: _symbol(symbol) for name, symbol in symbols.items()})
    hint = expression.xreplace({_symbol(s): sympy.Integer(s.hint) for s in symbols.values()})
    if not hint.is_Integer or mode.shape_env is None:
        raise ValueError(f"{expression} is no size")
    return mode.shape_env.create_symintnode(expression, hint=int(hint))


def expression_form(expression: Any) -> Any:
    """An expression of symbols of sizes as numbers, names, ``True``, ``False`` and lists of an operator and
    what it is of: ``["*", 2, "s77"]``. Raises ``ValueError`` for an operator that has no name there."""
    import sympy

    if isinstance(expression, torch.SymInt | torch.SymBool):
        expression = expression.node.expr
    if expression is sympy.true or expression is sympy.false:
        return expression is sympy.true
    if expression.is_Integer:
        return int(expression)
    if expression.is_Symbol:
        return str(expression)
    name = {kind: name for name, kind in _size_operators().items()}.get(type(expression))
    if name is None:
        raise ValueError(f"{expression} is computed by {type(expression).__name__}")
    return [name, *map(expression_form, expression.args)]


def _expression_of(form: Any, symbols: Mapping[str, Any]) -> Any:
    import sympy

    if type(form) is int:
        return sympy.Integer(form)
    if isinstance(form, str) and form in symbols:
        return symbols[form]
    kinds = _size_operators()
    if isinstance(form, list) and len(form) > 1 and isinstance(form[0], str) and form[0] in kinds:
        return kinds[form[0]](*(_expression_of(part, symbols) for part in form[1:]))
    raise ValueError(f"{str(form)[:60]!r} is no size")


def _size_operators() -> dict[str, Any]:
    import sympy
    from torch.utils._sympy import functions as f

    return {
        "+": sympy.Add, "*": sympy.Mul, "**": sympy.Pow, "power": f.PowByNatural,
        "//": f.FloorDiv, "/": f.CleanDiv, "%": f.Mod, "modulo": f.PythonMod, "max": f.Max, "min": f.Min,
        "==": sympy.Eq, "!=": sympy.Ne, "<": sympy.Lt, "<=": sympy.Le, ">": sympy.Gt, ">=": sympy.Ge,
        "and": sympy.And, "or": sympy.Or, "not": sympy.Not,
    }  # fmt: skip


def describe_joint(gm: fx.GraphModule) -> tuple[list[tuple[str, str, int]], list[tuple[str, str, int]]]:
    """What AOTAutograd says of a joint graph's inputs and outputs.

    Inputs as (node, role, index): ``input`` with the index of the argument (that wraps it, where one does),
    ``tangent`` with the index of the output, ``other``. Outputs as (node or "", role, index): ``output``,
    ``mutation`` (index of the input written), ``gradient`` (index of the input).
    """
    from torch._functorch._aot_autograd import descriptors as d

    def argument(desc: Any) -> int:
        while not hasattr(desc, "idx"):
            within = ("base_of", "base", "mutated_input")
            desc = next((getattr(desc, key) for key in within if hasattr(desc, key)), None)
            if desc is None:
                return -1
        return int(desc.idx)

    inputs = []
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            continue
        desc = node.meta.get("desc")
        if isinstance(desc, d.TangentAOTInput):
            inputs.append((node.name, "tangent", argument(desc.output)))
        elif isinstance(desc, (d.PlainAOTInput, d.ViewBaseAOTInput, d.SubclassGetAttrAOTInput)):
            inputs.append((node.name, "input", argument(desc)))
        elif node.name.startswith("tangents"):
            inputs.append((node.name, "tangent", -1))
        else:
            inputs.append((node.name, "input" if node.name.startswith("primals") else "other", -1))
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    values = output.args[0] if isinstance(output.args[0], (tuple, list)) else (output.args[0],)
    descs = output.meta.get("desc") or [None] * len(values)
    outputs = []
    for value, desc in zip(values, descs, strict=False):
        name = value.name if isinstance(value, fx.Node) else ""
        while isinstance(desc, d.SubclassGetAttrAOTOutput):
            desc = desc.base
        if isinstance(desc, d.GradAOTOutput):
            # The gradient of a tensor that wraps others names what it is spread over beside the numbers.
            number = "" if isinstance(value, fx.Node) and is_opaque(value) else name
            outputs.append((number, "gradient", argument(desc.grad_of)))
        elif isinstance(desc, d.InputMutationAOTOutput):
            outputs.append((name, "mutation", argument(desc.mutated_input)))
        elif isinstance(desc, d.PlainAOTOutput):
            outputs.append((name, "output", desc.idx))
        else:
            outputs.append((name, "other", -1))
    return inputs, outputs


def source_name(node: fx.Node) -> str:
    """The Python expression that dynamo took a graph input from, or ``""``."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return ""
    name = source.name
    return str(name() if callable(name) else name)


def inner_error(error: BaseException) -> BaseException:
    """The error that a backend raised, from under the one that dynamo wraps it in."""
    from torch._dynamo.exc import BackendCompilerFailed

    while isinstance(error, BackendCompilerFailed) and error.inner_exception is not None:
        error = error.inner_exception
    return error


def graph_break_errors() -> tuple[type[BaseException], ...]:
    """What ``fullgraph=True`` raises for code that cannot be captured in one graph."""
    from torch._dynamo import exc

    names = ("Unsupported", "UserError", "InternalTorchDynamoError", "TorchRuntimeError")
    return tuple(getattr(exc, name) for name in names if hasattr(exc, name))


def splitting(error: BaseException) -> Exception:
    """What a backend raises for dynamo to run a function as it did, and to capture what that calls alone."""
    from torch._subclasses.fake_tensor import UnsupportedFakeTensorException

    return UnsupportedFakeTensorException(f"{type(error).__name__}: {error}")


def compile_errors() -> tuple[type[BaseException], ...]:
    """What a call of something compiled raises where it is compilation that failed, nothing having run."""
    from torch._dynamo import exc

    names = ("TorchDynamoException", "FailOnRecompileLimitHit")
    return tuple(getattr(exc, name) for name in names)


@contextmanager
def outside_of_fake_mode() -> Iterator[None]:
    """Operators run for real, whatever mode is active around."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        yield


def fake_mode() -> FakeTensorMode:
    """A fresh mode in which tensors have shapes, dtypes, devices and storages, but no data."""
    return FakeTensorMode(allow_non_fake_inputs=True)


class CallWatcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Reports every dispatched op after it ran: ``seen(op, args, result)``.

    An op with an ``out`` argument is not run: its result is that argument.
    """

    def __init__(self, seen: Callable[[Any, tuple[Any, ...], Any], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen = seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = kwargs["out"] if kwargs.get("out") is not None else func(*args, **kwargs)
        self._seen(func, args, result)
        return result


def storage_watch(tensor: torch.Tensor) -> Callable[[], bool]:
    """A function that says whether the storage of ``tensor`` is gone; it does not keep it alive."""
    watch: Any = StorageWeakRef
    expired: Callable[[], bool] = watch(tensor.untyped_storage()).expired
    return expired


def storage_key(tensor: torch.Tensor) -> int:
    """Identity of a tensor's storage; not given again while a watch of that storage exists."""
    return int(tensor.untyped_storage()._cdata)


def writes(tensor: torch.Tensor) -> int | None:
    """How often torch has written to the storage of ``tensor``, as it counts; ``None`` where it does not, for
    tensors made in inference mode."""
    return None if tensor.is_inference() else int(tensor._version)


def inductor_kernels() -> Any:
    """Inductor's table of library kernels, which its generated code calls by attribute."""
    from torch._inductor.select_algorithm import extern_kernels

    return extern_kernels


def inductor_inner_compile(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
    """Compile one forward, backward or inference graph; a boxed callable (``CompiledFxGraph``)."""
    from torch._inductor.compile_fx import compile_fx_inner

    if "get_decomp_fn" in kwargs:
        # A table of functions has no key in Inductor's graph cache; a function's is its name.
        kwargs["get_decomp_fn"] = inductor_decompositions
    return compile_fx_inner(gm, list(inputs), **kwargs)


def generated_source(compiled: Any) -> tuple[str, dict[str, Any]] | None:
    """The Python wrapper that Inductor generated and the constants that it reads by name;
    ``None`` where there is no such source (an empty graph, the C++ wrapper)."""
    source = getattr(compiled, "source_code", None)
    if not isinstance(source, str):
        return None
    return source, dict(getattr(compiled, "constants", None) or {})


@contextmanager
def without_modes() -> Iterator[None]:
    """Run on real tensors although a tracing mode (fake, functional, proxy) is active."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        yield


def profiler_running() -> bool:
    """Whether the calling thread is being profiled; profilers do not nest."""
    return torch._C._autograd._profiler_enabled()


@contextmanager
def quiet_capture() -> Iterator[None]:
    """Dynamo settings that graphopt captures under.

    Calls of a logger are no graph break; methods that libraries add to loggers (``warning_once``) go by the
    level that they begin with. How many models of one class were optimized before does not count: dynamo
    limits compilations by code object, so that the ninth budget tried on a model would be refused. A number
    that changes from call to call, or from model to model (the rate of a dropout), stays a number: dynamo
    would make it a tensor that the graph reads back, which no program at the semantic level can say. Random
    numbers of NumPy are drawn from NumPy's generator, as in eager: dynamo would draw them from torch's.
    What ``DistributedDataParallel`` wraps stays one graph: dynamo would cut it where buckets of gradients
    end, and calls of a chain hand their gradients over one by one anyway.
    """
    from torch._dynamo import config

    newer, older = "ignore_logging_functions", "ignore_logger_methods"
    name = newer if hasattr(config, newer) else older
    levels = ("debug", "info", "warning", "error", "exception", "critical")
    loggers = {method for key, method in vars(logging.Logger).items() if key.partition("_")[0] in levels}
    # What a model's operator or a backend refuses is raised, with its reason; torch also writes a traceback.
    # A filter, not a level: changing levels empties the cache of every logger, at each step.
    talkative = [logging.getLogger(f"torch.{name}") for name in ("_subclasses.fake_tensor", "_dynamo.exc")]
    settings: dict[str, Any] = {name: set(getattr(config, name)) | loggers}
    settings["specialize_float"] = True
    settings["use_numpy_random_stream"] = True
    settings["optimize_ddp"] = False
    settings["accumulated_recompile_limit"] = max(config.accumulated_recompile_limit, _MANY)
    if not ISOLATES_RECOMPILES:
        settings["recompile_limit"] = max(config.recompile_limit, _MANY)
    silent = _Silent()
    for logger in talkative:
        logger.addFilter(silent)
    try:
        with config.patch(settings), _loggable_config():
            yield
    finally:
        for logger in talkative:
            logger.removeFilter(silent)


@contextmanager
def _loggable_config() -> Iterator[None]:
    """Leave dynamo's settings out of its compilation metrics where torch cannot write them down.

    torch 2.11 sorts each set among the settings, and functions have no order: each compilation would log
    an error with a traceback.
    """
    from torch._dynamo import utils

    if _config_is_loggable():
        yield
        return
    name = "_get_dynamo_config_for_logging"
    original = getattr(utils, name)
    setattr(utils, name, lambda: None)
    try:
        yield
    finally:
        setattr(utils, name, original)


@functools.cache
def _config_is_loggable() -> bool:
    from torch._dynamo import utils

    written = getattr(utils, "_get_dynamo_config_for_logging", None)
    try:
        if written is not None:
            written()
    except TypeError:
        return False
    return True


class _Silent(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return False


_MANY = 1 << 16
ISOLATES_RECOMPILES = "isolate_recompiles" in inspect.signature(torch.compile).parameters
"""Whether ``torch.compile`` can count compilations of one caller apart from those of others."""


def schema_of(target: Any) -> Any:
    """The schema (arguments with alias annotations, returns) of an operator overload, or ``None``."""
    return target._schema if isinstance(target, torch._ops.OpOverload) else None


def gives_value(target: Any) -> bool:
    """Whether a call gives anything: operators that only check something do not."""
    schema = schema_of(target)
    return schema is None or bool(schema.returns)


def gives_other_bits(target: Any) -> bool:
    """Whether an operator says that a second run on the same inputs may round otherwise."""
    tag = getattr(torch.Tag, "nondeterministic_bitwise", None)
    return tag is not None and tag in getattr(target, "tags", ())


def is_composite(target: Any) -> bool:
    """Whether an operator overload is defined by other operators, for every backend alike."""
    return bool(target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd))


def is_operator(target: Any) -> bool:
    """Whether ``target`` goes through torch's dispatcher: an overload, a packet or a higher-order one."""
    kinds = (torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator)
    return isinstance(target, kinds)


def enter_autocast() -> Callable[..., Any]:
    """What dynamo writes into a graph where an autocast region begins; yields the region's handle."""
    return torch.amp.autocast_mode._enter_autocast


def exit_autocast() -> Callable[..., Any]:
    """What dynamo writes where an autocast region ends; takes the region's handle."""
    return torch.amp.autocast_mode._exit_autocast


def set_grad_enabled() -> Callable[..., Any]:
    """What dynamo writes where gradients are switched on or off."""
    return torch._C._set_grad_enabled


def storage_bytes(values: Any) -> int:
    """Bytes of the distinct storages under a pytree of tensors, on this rank where they are distributed."""
    found: dict[int, int] = {}
    for value in torch.utils._pytree.tree_leaves(values):
        for tensor in plain_tensors(value):
            if tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                found[storage._cdata] = hint(storage.nbytes())
    return sum(found.values())


class KernelLaunch(NamedTuple):
    """A kernel or library call: runs after those at the positions ``waits``. ``place`` is that of its first
    operator in the program."""

    waits: frozenset[int]
    place: int = 0


class KernelBuffer(NamedTuple):
    """``bytes`` of memory that comes with the first of the launches ``makers`` (none: it is there before)
    and goes after the last of its ``readers``, unless it is ``returned``. Those in ``overwriters`` may
    write an output of the same size over it if they are the last to read it."""

    bytes: int
    makers: frozenset[int]
    readers: frozenset[int]
    returned: bool = False
    overwriters: frozenset[int] = frozenset()


KEPT, MADE = "primals_kept", "primals_made"
"""How names of inputs begin that a graph writes to and does not release, as Inductor reads the first word:
they have memory already, or are given it by the kernel that writes them."""

KernelOrder = Callable[[list[KernelLaunch], list[KernelBuffer]], list[int]]


def _in_order(nodes: list[Any], order: KernelOrder) -> list[Any]:
    if not nodes:
        return nodes
    for node in nodes:
        share_inputs(node)
    positions = order(*kernel_graph(nodes))
    if sorted(positions) != list(range(len(nodes))):
        raise ValueError(f"an order of {len(positions)} kernels was given for {len(nodes)}")
    return [nodes[index] for index in positions]


def kernel_graph(nodes: Sequence[Any]) -> tuple[list[KernelLaunch], list[KernelBuffer]]:
    """The launches that Inductor's scheduler has after fusion, and the memory between them.

    Values that stay inside one fused kernel take none. Graph inputs are there if the graph may
    release them. Call within the scheduler's constructor only.
    """
    from torch._inductor.memory import prepare_planning_info
    from torch._inductor.virtualized import V
    from torch.utils._ordered_set import OrderedSet

    scheduler, returned = nodes[0].scheduler, OrderedSet(V.graph.get_output_names())
    _, inputs = prepare_planning_info(
        list(nodes),
        scheduler.name_to_buf,
        scheduler.name_to_fused_node,
        OrderedSet(V.graph.graph_inputs.keys()),
        returned,
    )
    position = {node: index for index, node in enumerate(nodes)}
    parts = _parts(nodes)
    talking = [index for index, node in enumerate(nodes) if _communicates(node)]
    # Ranks run collectives in one order, whatever memory would say.
    earlier = dict(zip(talking[1:], talking, strict=False))
    launches, buffers = list[KernelLaunch](), list[KernelBuffer]()
    tuples: dict[str, int] = {}
    held_by: dict[str, tuple[set[int], set[int]]] = {}
    for index, node in enumerate(nodes):
        generated = not (node.is_extern() or node.is_template())
        waits = frozenset(position[n] for n in node.mpi_node.pred_nodes)
        waits |= {earlier[index]} if index in earlier else set()
        launches.append(KernelLaunch(waits, node.min_order))
        for buffer in node.get_outputs():
            info, made_by, name = buffer.mpi_buffer, index, buffer.get_name()
            readers = frozenset(position[n] for n in info.succ_nodes) - {index}
            if info.size_alloc and not info.size_free:
                # A call that returns several tensors: each is a buffer of its own that comes with it.
                tuples[name] = index
            elif info.size_free and not info.size_alloc:
                made_by = next((tuples[d.name] for d in node.unmet_dependencies if d.name in tuples), index)
            if name in parts:
                # It is written where it belongs: the whole is there from its first part to its last reader.
                makers, reading = held_by.setdefault(parts[name], (set(), set()))
                makers.add(index)
                reading |= readers
                continue
            if info.size_free and (readers or name in returned or not generated):
                over = frozenset(i for i in readers if _may_overwrite(nodes[i], name))
                makers, reading = held_by.get(name, ({made_by}, set()))
                held = readers | (reading - {index})
                buffers.append(KernelBuffer(info.size_free, frozenset(makers), held, name in returned, over))
    buffers += [
        KernelBuffer(_bytes_of(name), frozenset({index}), frozenset(), returned=True)
        for index, node in enumerate(nodes)
        for output in node.get_outputs()
        for name in output.get_mutations()
        if name.startswith(MADE)
    ]
    for source in inputs.values():
        readers = frozenset(position[n] for n in source.mpi_buffer.succ_nodes)
        over = frozenset(i for i in readers if _may_overwrite(nodes[i], source.name))
        free = source.mpi_buffer.size_free
        buffers.append(KernelBuffer(free, frozenset(), readers, source.name in returned, over))
    return launches, buffers


def _communicates(kernel: Any) -> bool:
    """Whether a kernel of Inductor's is a collective, or waits for one."""
    from torch._inductor.utils import contains_collective, contains_wait

    return bool(contains_collective(kernel) or contains_wait(kernel))


def _bytes_of(name: str) -> int:
    """Bytes of an input of the graph that Inductor compiles."""
    from torch._inductor.virtualized import V

    value = V.graph.get_buffer(name)
    return int(V.graph.sizevars.optimization_hint(value.get_numel())) * int(value.get_dtype().itemsize)


def _parts(nodes: Sequence[Any]) -> dict[str, str]:
    """Of each buffer that is written as a part of a larger one, the name of the whole."""
    from torch._inductor import ir

    found: dict[str, str] = {}
    for node in nodes:
        for part in node.get_nodes():
            if isinstance(part.node, ir.ConcatKernel):
                inputs: list[Any] = list(part.node.inputs)
                inside = [x for x in inputs if isinstance(x.get_output_spec(), ir.NonOwningLayout)]
                found |= {x.get_name(): part.node.get_name() for x in inside}

    def whole(name: str) -> str:
        return whole(found[name]) if name in found else name

    return {name: whole(name) for name in found}


def share_inputs(kernel: Any) -> None:
    """Let each output of a fused elementwise GPU kernel be written over an input that others read too.

    Inductor allows it to one output alone, that every other reader of the input comes before. The parts
    of such a kernel load an element once, before anything is stored, so any one of them may: each
    is given an input of its own size, which the others then do not count as readers of. The backward of a
    gated product has three such outputs and three such inputs. Not on CPUs, whose generator decides
    part by part; not where an input is read at several indices.
    """
    parts = kernel.get_nodes()
    device = kernel.get_device()
    if len(parts) < 2 or device is None or device.type == "cpu" or not _is_elementwise(kernel):
        return
    taken = {output.get_name() for part in parts for output in part.get_outputs()}
    for part in parts:
        for output in part.get_outputs():
            for read in part.read_writes.reads:
                source = _reusable(kernel, read.name)
                if read.name in taken or source is None or not _same_size(source.node, output.node):
                    continue
                own = [user for user in source.users if user.node is part and user.can_inplace]
                deps = (dep for other in parts for dep in other.read_writes.reads_and_writes())
                if own and len({dep for dep in deps if dep.name == read.name}) == 1:
                    source.users = [user for user in source.users if user.node not in parts] + own
                    taken.add(read.name)
                    break


def _reusable(kernel: Any, name: str) -> Any:
    """The buffer of that name if the graph may write over it: its own, or one donated to it."""
    scheduler = kernel.scheduler
    return scheduler.name_to_donated_buffer.get(name) or scheduler.name_to_buf.get(name)


def _same_size(one: Any, other: Any) -> bool:
    return bool(one.get_dtype() == other.get_dtype() and one.get_numel() == other.get_numel())


def _is_elementwise(kernel: Any) -> bool:
    """Whether all parts of a generated kernel are loops over the same elements without a reduction."""
    if kernel.is_extern() or kernel.is_template() or kernel.is_foreach():
        return False
    return not any(part.is_reduction() for part in kernel.get_nodes())


def _may_overwrite(kernel: Any, name: str) -> bool:
    """Whether Inductor lets a kernel write an output over its input ``name``: if of the parts that count
    as readers all but one come before that one (``SchedulerNode.decide_inplace_update``)."""
    source = _reusable(kernel, name)
    if source is None or kernel.is_extern() or kernel.is_template():
        return False
    users = {user.node.get_name() for user in source.users}
    readers = [part for part in kernel.get_nodes() if part.get_name() in users]
    return bool(readers) and all(part.get_name() in readers[-1].ancestors for part in readers[:-1])


LARGE = 8 << 20
"""Bytes: kernels that move more take longer than it takes to launch them, several times."""


def shares_too_little(one: Any, other: Any) -> bool:
    """Whether neither of two kernels that could be one would be spared an eighth of what it moves.

    Inductor makes one kernel of any two that share ten bytes, a norm's weight say. Of the slices that
    a region is computed in, or of the branches of a network, all would run first and be
    held together, where each could go before the next.
    """
    size = one.scheduler.dep_size_hint
    moved = [kernel.read_writes.reads | kernel.read_writes.writes for kernel in (one, other)]
    least = min(sum(map(size, deps)) for deps in moved)
    return bool(least > LARGE and 8 * sum(map(size, moved[0] & moved[1])) < least)


def joins_apart(pieces: Sequence[Any]) -> bool:
    """Whether each of the tensors that are concatenated takes another buffer, which could go once it is read.

    On GPUs Inductor computes up to eight pieces in one kernel, for which all that they are computed
    from has to be there. Pieces that are written one by one, where they belong, cost no more unless
    the kernel would take in what reads them.
    """
    from torch._inductor.virtualized import V

    first = pieces[0]
    alike = all(
        piece.get_dtype() == first.get_dtype()
        and piece.get_device() == first.get_device()
        and len(piece.get_size()) == len(first.get_size())
        for piece in pieces
    )
    sizes = [size for piece in pieces for size in piece.get_size()]
    if len(pieces) < 2 or not alike or not all(getattr(size, "is_Integer", True) for size in sizes):
        return False
    count = sum(math.prod(map(int, piece.get_size())) for piece in pieces)
    if count * first.get_dtype().itemsize <= LARGE:
        return False
    read = [set(piece.get_read_names()) for piece in pieces]
    several = {name for k, names in enumerate(read) for other in read[:k] for name in names & other}
    return all(
        any(name not in several and V.graph.get_buffer(name).get_numel() >= 1024 for name in names)
        for names in read
    )


HELD = 16384
"""Elements of a row that fit the registers of one program."""


def holds_rows(features: Any) -> bool:
    """Whether a kernel that reduces rows should hold them in registers instead of reading them again.

    Inductor holds rows of up to 1,024 elements. Longer ones it goes through in a loop for each reduction, and
    once more for what needs their results: a softmax reads its input twice, a norm likewise. ``features`` are
    Inductor's ``SIMDKernelFeatures``. The program has 8 warps, 16 for more than 8,192 elements; a thread's
    share of what is loaded (in its dtype) and of one value made of it (in float32) must leave 40 registers.
    """
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    width = features.reduction_numel
    if not getattr(width, "is_Integer", False) or not 1024 < int(width) <= HELD:
        return False
    if features.get_reduction_hint() is not ReductionHint.INNER:
        return False
    bytes_of = V.graph.sizevars.optimization_hint
    moved = features.memory_stats()
    if bytes_of(moved.looped.memory.bytes) < 1.1 * bytes_of(moved.persistent.memory.bytes):
        return False
    elements = features.numel * width
    nodes = features.scheduler_nodes()
    made = {name for node in nodes for name in node.get_buffer_names()}
    reads = [dep for node in nodes for dep in node.read_writes.reads if dep.name not in made]
    whole = {dep.name for dep in reads if dep.get_numel() == elements}
    loaded = sum(V.graph.get_dtype(name).itemsize for name in whole)
    block = 1 << (int(width) - 1).bit_length()
    threads = 256 if block <= 8192 else 512
    return bool(block // threads * (1 + loaded / 4) <= 65536 // threads - 40)


@contextmanager
def _our_choices() -> Iterator[None]:
    """Inductor without fusions that hold more than they spare (``shares_too_little``, ``joins_apart``), and
    with rows in registers (``holds_rows``)."""
    from torch._inductor import ir
    from torch._inductor.choices import InductorChoices
    from torch._inductor.lowering import lowerings
    from torch._inductor.utils import is_pointwise_use
    from torch._inductor.virtualized import V

    class Choices(InductorChoices):
        @staticmethod
        def can_fuse_horizontal(scheduler: Any, node1: Any, node2: Any, shared_data_score: int) -> bool:
            usual = InductorChoices.can_fuse_horizontal(scheduler, node1, node2, shared_data_score)
            return bool(usual) and not shares_too_little(node1, node2)

        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            usual = InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)
            return bool(usual) or (not cooperative_reduction and holds_rows(features))

    operator = torch.ops.aten.cat.default
    usual = lowerings[operator]

    def cat(inputs: Any, dim: int = 0) -> Any:
        taken_in = all(map(is_pointwise_use, V.current_node.users))
        if taken_in or not joins_apart(inputs):
            return usual(inputs, dim)
        return ir.TensorBox(ir.ConcatKernel.create(inputs, dim % len(inputs[0].get_size())))

    lowerings[operator] = cat
    try:
        with V.set_choices_handler(Choices()):
            yield
    finally:
        lowerings[operator] = usual


def inductor_decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's decompositions but for one: the gradient of an embedding of 16-bit floats on CUDA stays
    a call of the library. Decomposed it is summed up in a float32 tensor as large as two of the weight."""
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.lowering import lowerings, make_fallback

    operator = torch.ops.aten.embedding_dense_backward.default
    if operator not in lowerings:
        make_fallback(operator, warn=False, override_decomp=True)  # type: ignore[no-untyped-call]
    table = dict(select_decomp_table())
    decomposed = table[operator]

    def embedding_dense_backward(grad: torch.Tensor, *args: Any) -> Any:
        if grad.device.type == "cuda" and grad.dtype in (torch.float16, torch.bfloat16):
            return NotImplemented
        return decomposed(grad, *args)

    table[operator] = embedding_dense_backward
    return table


def return_none(output: fx.Node, position: int) -> None:
    """Let a graph return ``None`` instead of a value, before Inductor compiles it.

    Which of the values users see Inductor has noted by position, and takes them to be values.
    """
    returned = list(output.args[0])  # type: ignore[arg-type]
    returned[position] = None
    output.args = (tuple(returned),)
    seen = output.meta.get("user_visible_output_idxs")
    if seen is not None:
        output.meta["user_visible_output_idxs"] = [index for index in seen if index != position]


def _ordering(order: KernelOrder, key: str) -> Callable[[list[Any]], list[Any]]:
    """``order`` as a pass of Inductor's scheduler, which is ``key`` in the keys of its graph cache.

    torch 2.13 asks such a pass for its ``uuid``, 2.11 pickles it with the settings.
    """
    from torch._inductor import custom_graph_pass

    base: type = getattr(custom_graph_pass, "CustomSchedulerPass", object)

    class Ordering(base):  # type: ignore[misc]
        def __call__(self, nodes: list[Any]) -> list[Any]:
            return _in_order(nodes, order)

        def uuid(self) -> str:
            return key

        def __reduce__(self) -> tuple[Any, ...]:
            return str, (key,)

        def __deepcopy__(self, memo: Any) -> Any:
            return self

    made: Callable[[list[Any]], list[Any]] = Ordering()
    return made


_ordered: set[Any] = set()


def read_before_writes(graph: fx.Graph) -> None:
    """Let Inductor compute what reads memory before an operator of ``graph`` that is not torch's writes it.

    It computes elementwise values where they are used, unless a write comes in between. Writes of custom
    operators it notes when their call has its place, and what reads the memory then comes behind.
    """
    from torch._inductor import lowering as inductor_lowering
    from torch._library.utils import get_layout_constraint_tag

    lowering: Any = inductor_lowering
    for node in graph.nodes:
        op = node.target
        if not isinstance(op, torch._ops.OpOverload) or op in _ordered or not op._schema.is_mutable:
            continue
        if op.namespace in ("aten", "prims") or (op in lowering.lowerings and op not in lowering.fallbacks):
            continue
        if op not in lowering.lowerings:
            tag: Any = get_layout_constraint_tag(op, with_default=True)
            lowering.make_fallback(op, layout_constraint=lowering.tag_to_layout_constraint(tag), warn=False)
        lowering.lowerings[op] = _noting_writes(op, lowering.lowerings[op])
        _ordered.add(op)


def _noting_writes(op: Any, lower: Callable[..., Any]) -> Callable[..., Any]:
    from torch._inductor.virtualized import V
    from torch._library.utils import zip_schema

    def call(*args: Any, **kwargs: Any) -> Any:
        graph: Any = V.graph
        for argument, value in zip_schema(op._schema, args, kwargs):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                if tensor is not None:
                    tensor.realize()
                    graph.mark_buffer_mutated(tensor.get_name())
        return lower(*args, **kwargs)

    return call


def compile_with_inductor(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    partition: Callable[[fx.GraphModule, int], tuple[fx.GraphModule, fx.GraphModule]],
    inner: Callable[..., Any],
    operations_limit: int,
    order: KernelOrder,
    cache_key: str = "",
    keep: str = "",
) -> Callable[..., Any]:
    """``compile_fx`` with the given partition and inner compiler.

    A value computed by more than ``operations_limit`` operations is stored, not inlined. ``order``
    puts the kernels in order, instead of Inductor's own reordering for peak memory.
    AOTAutograd's graph cache is not read: on a hit the partition would not be asked. Inductor's, of the
    halves, is where ``cache_key`` says what ``order`` and the choices made here are; without, it is not.
    ``keep``: a name under which the result is put into AOTAutograd's cache, for ``kept_code``; where it
    cannot be, it is not, and nothing is said.
    """
    from torch._inductor.compile_fx import compile_fx

    keeping = _keeping(keep) if keep else nullcontext()
    with _our_settings(partition, operations_limit, order, cache_key), keeping, _our_choices():
        table = inductor_decompositions()
        compiled: Any = compile_fx(gm, list(inputs), inner_compile=inner, decompositions=table)
    function: Callable[..., Any] = compiled
    return function


@contextmanager
def _our_settings(
    partition: Callable[[fx.GraphModule, int], tuple[fx.GraphModule, fx.GraphModule]] | None,
    operations_limit: int,
    order: KernelOrder,
    cache_key: str,
) -> Iterator[None]:
    """Inductor's and AOTAutograd's settings for the code that is compiled here."""
    from torch._inductor import config as inductor_config
    from torch._inductor.custom_graph_pass import CustomPartitionerFn

    class Ours(CustomPartitionerFn):
        def __call__(self, gm: Any, joint_inputs: Any, **kwargs: Any) -> Any:
            assert partition is not None
            return partition(gm, kwargs["num_fwd_outputs"])

        def uuid(self) -> str:
            return cache_key

        def __reduce__(self) -> tuple[Any, ...]:
            return str, (cache_key,)

    settings = {
        "custom_partitioner_fn": Ours(),
        "fx_graph_cache": bool(cache_key) and inductor_config.fx_graph_cache,
        "realize_opcount_threshold": operations_limit,
        "reorder_for_peak_memory": False,
        "_post_fusion_custom_pass": _ordering(order, cache_key),
    }
    # The backward is compiled now, not at its first run: its memory is part of the plan.
    joint_settings = {"enable_autograd_cache": False, "force_non_lazy_backward_lowering": True}
    with inductor_config.patch(settings), functorch_config.patch(joint_settings):
        yield


@contextmanager
def _keeping(name: str) -> Iterator[None]:
    """What AOTAutograd compiles goes to its cache under ``name``; nothing is read from there."""
    from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache

    usual_save, usual_lookup = AOTAutogradCache.save, AOTAutogradCache._lookup

    def save(key: str, entry: Any, remote: bool) -> None:
        usual_save(name, entry, False)

    def lookup(*args: Any) -> None:
        return None

    cache: Any = AOTAutogradCache
    cache.save, cache._lookup = staticmethod(save), staticmethod(lookup)
    try:
        with functorch_config.patch({"enable_autograd_cache": True, "bundled_autograd_cache": False}):
            yield
    finally:
        cache.save, cache._lookup = staticmethod(usual_save), staticmethod(usual_lookup)


def keeps_code() -> bool:
    """Whether torch's caches of compiled code are switched on."""
    from torch._inductor import config as inductor_config

    on = inductor_config.fx_graph_cache and functorch_config.enable_autograd_cache
    return bool(on) and not inductor_config.force_disable_caches


def is_kept(name: str) -> bool:
    """Whether AOTAutograd's cache on this machine has something under ``name``."""
    from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache

    folder = AOTAutogradCache._get_tmp_dir_for_key(name)
    return os.path.isdir(folder) and bool(os.listdir(folder))


def forget_code(prefix: str) -> None:
    """Take what was kept under names that begin with ``prefix`` out of AOTAutograd's cache."""
    from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache

    for folder in Path(AOTAutogradCache._get_tmp_dir()).glob(f"{prefix}*"):
        shutil.rmtree(folder, ignore_errors=True)


def kept_code(
    name: str, around_backward: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
) -> Callable[..., Any] | None:
    """What ``compile_with_inductor`` kept under ``name``, as it returned it; ``None`` where parts are gone.

    ``around_backward`` makes what autograd calls of the code of the backward.
    """
    from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache, FXGraphCacheMiss
    from torch._inductor.cudagraph_utils import BoxedDeviceIndex
    from torch._inductor.utils import BoxedBool

    found = AOTAutogradCache._lookup(name, True, False, [], {}, None)
    if found is None:
        return None
    entry: Any = found[0]
    if around_backward is not None:
        wrap, usual = around_backward, entry.compiled_bw.post_compile

        def post_compile(result: Any, config: Any) -> Any:
            why = "generated code is not traced"
            return torch._dynamo.disable(wrap(usual(result, config)), reason=why)  # type: ignore[no-untyped-call]

        entry.compiled_bw.post_compile = post_compile
    sizes = torch.fx.experimental.symbolic_shapes.ShapeEnv()
    context = TracingContext.try_get() or TracingContext(FakeTensorMode(shape_env=sizes))
    settings = {"cudagraphs": BoxedBool(False), "boxed_forward_device_index": BoxedDeviceIndex(None)}
    try:
        with tracing(context):
            run = entry.wrap_post_compile([], entry.sanitized_aot_config, settings)
    except FXGraphCacheMiss:
        return None
    return lambda *args: run(list(args))


def known_to_caches(code: Callable[..., Any], as_code: Any) -> Any:
    """``code``, which calls the compiled graph ``as_code``, found in torch's caches as that graph is."""
    for name in ("_fx_graph_cache_key", "_fx_graph_cache_debug_lines", "guards_expr"):
        if getattr(as_code, name, None) is not None:
            setattr(code, name, getattr(as_code, name))
    return code


def is_known_to_caches(code: Any) -> bool:
    return getattr(code, "_fx_graph_cache_key", None) is not None


def code_environment(operations_limit: int, order: KernelOrder, cache_key: str) -> str:
    """Names all that generated code depends on besides its graph: the version of torch and of the compilers,
    the machine, settings. Source: what Inductor's graph cache goes by, for a graph that is empty."""
    from torch._inductor.codecache import compiled_fx_graph_hash

    graph = fx.Graph()
    graph.output(())
    with _our_settings(None, operations_limit, order, cache_key):
        key, _ = compiled_fx_graph_hash(fx.GraphModule({}, graph), [], {}, [])
        joint = sorted((name, _setting(value)) for name, value in functorch_config.get_config_copy().items())
    return f"{key} {joint}"


def _setting(value: Any) -> str:
    """The value of a setting, the same in every process: functions by their names."""
    return getattr(value, "__qualname__", None) or repr(sorted(value) if isinstance(value, set) else value)


def qualified_name(target: Any) -> str:
    """The dotted name of what a node calls. Raises what torch raises for functions without one."""
    name: str = fx.node._get_qualified_name(target)
    return name


def keeps_graph() -> bool:
    """Whether the backward that runs now was asked to keep the graph for another one."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def holders(tensor: torch.Tensor) -> tuple[int, ...]:
    """References to a tensor and to its storage, those of Python and those of C++. To be compared with those
    of another tensor in the same place of the same code."""
    storage = tensor.untyped_storage()
    return (
        sys.getrefcount(tensor),
        tensor._use_count(),  # type: ignore[attr-defined]
        sys.getrefcount(storage),
        torch._C._storage_Use_Count(storage._cdata),
    )


def runs_at_once(tensor: torch.Tensor) -> bool:
    """Whether operators on ``tensor`` compute and are seen by nobody: it is no subclass, and neither modes
    nor function transforms are in force."""
    return (
        type(tensor) is torch.Tensor
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def adds_to_gradient_of(leaf: torch.Tensor) -> bool:
    """Whether the backward that runs now will add to ``leaf.grad``: not where it only returns gradients
    (``torch.autograd.grad``), nor where its ``inputs`` leave the tensor out."""
    return _will_run(_accumulation(leaf))


def adds_unseen_to_gradient_of(leaf: torch.Tensor) -> bool:
    """Whether the backward that runs now will add to ``leaf.grad``, and no hook of Python waits at the node
    of autograd's graph that does it."""
    node = _accumulation(leaf)
    if not _will_run(node):
        return False
    for register in (node.register_prehook, node.register_hook):
        # Nothing lists hooks, but who registers one is told where they all are.
        handle = register(_unheard)
        hooks = handle.hooks_dict_ref()
        handle.remove()
        if hooks:
            return False
    return True


def _accumulation(leaf: torch.Tensor) -> Any:
    """The node of autograd's graph that adds to ``leaf.grad``."""
    return torch.autograd.graph.get_gradient_edge(leaf).node


def _will_run(node: Any) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:
        # What autograd says where the leaf is one of those whose gradients it returns.
        return False


def _unheard(*gradients: Any) -> None:
    return None


def running_node() -> Any:
    """The node of autograd's graph whose backward runs in this thread; ``None`` outside of backwards."""
    return torch._C._current_autograd_node()


def takes_gradient(node: Any, position: int) -> tuple[Any, int]:
    """The node of autograd's graph, and the number of its input, that a node hands its gradient number
    ``position`` to: one for each tensor that its function was given. ``None`` where nobody takes it."""
    following = node.next_functions
    found: tuple[Any, int] = following[position] if position < len(following) else (None, 0)
    return found


def is_backward_of(node: Any, function: type[torch.autograd.Function]) -> bool:
    """Whether a node of autograd's graph is the backward, and so the context, of a function of Python."""
    return getattr(type(node), "_forward_cls", None) is function


def accumulates_into(node: Any) -> torch.Tensor | None:
    """The leaf to whose gradient a node of autograd's graph adds what it is given; ``None`` for others."""
    leaf = getattr(node, "variable", None)
    return leaf if type(node).__name__ == "AccumulateGrad" and isinstance(leaf, torch.Tensor) else None


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether hooks of an optimizer, or of all optimizers, wait for its steps."""
    from torch.optim import optimizer as module

    own = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    everyone = (module._global_optimizer_pre_hooks, module._global_optimizer_post_hooks)
    return any(map(bool, (*own, *everyone)))


def note_step(optimizer: torch.optim.Optimizer) -> None:
    """Let schedulers of learning rates know that a step was taken: they warn where none was."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


def fake_attribute(node: fx.Node, mode: FakeTensorMode) -> Any:
    """What a ``get_attr`` node reads, a tensor as a fake one of ``mode``."""
    value: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return mode.from_tensor(value) if isinstance(value, torch.Tensor) and not is_fake(value) else value


def autocast_of(enter: fx.Node) -> torch.autocast:
    """The autocast region that a call of ``enter_autocast()`` in a graph opens."""
    device, dtype, enabled, cache = enter.args
    return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache)  # type: ignore[arg-type]


def is_symbolic_function(target: Any) -> bool:
    """Whether ``target`` is one of torch's functions of symbolic numbers (``torch.sym_max``)."""
    name = getattr(target, "__name__", "")
    return isinstance(name, str) and name.startswith("sym_") and getattr(torch, name, None) is target


def recompile_on_call(gm: fx.GraphModule) -> None:
    """Generate the code of a changed graph when the module is called next, not now.

    Every ``GraphModule`` is the only instance of a class of its own, on which ``recompile`` sets
    ``forward``.
    """

    def forward(self: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        self.recompile()
        return self.forward(*args, **kwargs)

    type(gm).forward = forward


def integer_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """int8 ``x`` [M, K] times int8 ``weight`` [K, N]: int32 [M, N]. On CUDA M is above 16, K and N are
    multiples of 8."""
    return torch._int_mm(x, weight)


def scaled_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scales: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """float8 ``x`` [M, K] times float8 ``weight`` [K, N], columns contiguous, scaled by float32 [M, 1] and
    [1, N], ``bias`` [N] added: [M, N] of ``dtype``. On CUDA K and N are multiples of 16."""
    return torch._scaled_mm(x, weight, x_scales, scales, bias, out_dtype=dtype)


def multiplies_integers() -> bool:
    """Whether the CPU has instructions for products of eight-bit integers that the library uses."""
    known = getattr(torch.cpu, "_is_vnni_supported", None)
    return known is not None and bool(known())


def container_classes() -> list[type]:
    """Classes that pytrees know as containers, torch's internal ones left out."""
    from torch.utils._pytree import SUPPORTED_NODES

    return [kind for kind in SUPPORTED_NODES if not kind.__module__.startswith("torch._")]


def container_parts(value: Any) -> tuple[list[Any], Any] | None:
    """The items of a container and what tells how they go together; ``None`` for what is no container."""
    from torch.utils._pytree import SUPPORTED_NODES

    if type(value) not in container_classes():
        return None
    items, context = SUPPORTED_NODES[type(value)].flatten_fn(value)
    return list(items), context


def container_of(kind: type, items: list[Any], context: Any) -> Any:
    """The container that ``container_parts`` took apart."""
    from torch.utils._pytree import SUPPORTED_NODES

    return SUPPORTED_NODES[kind].unflatten_fn(items, context)


def propagate_fakes(gm: fx.GraphModule, values: Sequence[Any], mode: FakeTensorMode) -> None:
    """Run a graph on fakes of ``mode``: every call gets its value, views of one storage share it."""
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    others = [(node, dict(node.meta)) for node in gm.graph.nodes if node.op != "call_function"]
    FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*values)
    for node, meta in others:
        node.meta = meta


def runs_alone() -> bool:
    """Whether other ranks exist on paper alone (torch's ``fake`` process group) or not at all."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return True
    return distributed.get_world_size() < 2 or distributed.get_backend() == "fake"


def rank_store() -> Any:
    """The key-value store that the default process group was set up with."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def ranks_in_group(group: object) -> list[int] | None:
    """The global ranks of a process group, ``None`` for what is none."""
    if not torch.distributed.is_available() or not isinstance(group, torch.distributed.ProcessGroup):
        return None
    return list(torch.distributed.get_process_group_ranks(group))


@contextmanager
def gathers_ended(model: torch.nn.Module) -> Iterator[None]:
    """Afterwards weights that ``fully_shard`` gathered for a forward are spread over the ranks again.

    Where no backward followed they would stay gathered, and ``parameters()`` would be the gathered ones,
    which no optimizer may be given.
    """
    try:
        yield
    finally:
        if not runs_alone():
            for module in model.modules():
                if isinstance(module, torch.distributed.fsdp.FSDPModule):
                    module.reshard()


def bucket_bytes(model: torch.nn.Module) -> int:
    """Bytes that each ``DistributedDataParallel`` in ``model`` holds to average gradients in: as many as the
    gradients, which lie in them with ``gradient_as_bucket_view``."""
    return sum(
        storage_bytes([parameter for parameter in module.parameters() if parameter.requires_grad])
        for module in model.modules()
        if isinstance(module, torch.nn.parallel.DistributedDataParallel)
    )


def ranks_in(model: torch.nn.Module) -> list[int]:
    """The global ranks that parameters of ``model`` are spread over, or that a ``DistributedDataParallel``
    in it averages gradients over."""
    if runs_alone():
        return []
    from torch.distributed.tensor import DTensor

    found: set[int] = set()
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            found.update(parameter.device_mesh.mesh.flatten().tolist())
    for module in model.modules():
        if isinstance(module, torch.nn.parallel.DistributedDataParallel):
            found.update(torch.distributed.get_process_group_ranks(module.process_group))
    return sorted(found)
