"""Graphs traced again: above autograd as dynamo found them, or taken apart into smaller operators."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import tracing
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from graphopt._torch.fakes import context_fake_mode, fake_inputs, fake_mode_of, is_fake, static_context
from graphopt._torch.inductor import inductor_decompositions
from graphopt._torch.operators import enter_autocast, exit_autocast

__all__ = [
    "decomposed",
    "has_own_gradients",
    "retrace",
    "retraced_at",
    "run_as_captured",
    "stays_as_captured",
    "taken_apart",
    "traced_body",
    "traced_constants",
    "traced_like",
    "transforms_functions",
    "without_writes",
    "wrapped_kinds",
]


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


class _Replaying(fx.Interpreter):
    """Runs dynamo's graph op by op; ``torch.utils.checkpoint`` regions draw the same random numbers again.

    Their operator does not see to it: it is made to be traced, and leaves that to the compiler.
    """

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is not torch.ops.higher_order.tag_activation_checkpoint:
            return super().call_function(target, args, kwargs)
        region, own = args[0], {}
        if (policy := region.meta.get("_checkpoint_context_fn")) is not None:
            own["context_fn"] = policy

        def run(*values: Any) -> Any:
            return _Replaying(region).run(*values)

        return checkpoint(run, *args[1:], use_reentrant=False, **own)


def run_as_captured(gm: fx.GraphModule, args: Sequence[Any]) -> Any:
    """What dynamo's graph computes op by op, and can be differentiated to as the model can."""
    regions = gm.graph.find_nodes(
        op="call_function", target=torch.ops.higher_order.tag_activation_checkpoint
    )
    return _Replaying(gm).run(*args) if regions else gm.forward(*args)


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
    apart: dict[Any, Any] = {op: op.decompose for op in _READ_BY_COMPOSITES}
    apart[torch.ops.aten.dropout.default] = _drop_all
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


def _drop_all(x: torch.Tensor, rate: float, train: bool) -> Any:
    """A dropout of rate 1, as eager computes it; others stay whole.

    AOTAutograd takes dropout apart in Python, and draws numbers at rate 1 as well, where eager draws none.
    """
    if not train or rate != 1:
        return NotImplemented
    return x * torch.zeros((), dtype=x.dtype, device=x.device)


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


def traced_body(function: Callable[..., Any], example: Sequence[torch.Tensor]) -> fx.GraphModule:
    """``function`` of tensors like ``example``, which may have any first size, as a graph of ATen
    operators."""
    with torch.no_grad():
        traced: fx.GraphModule = make_fx(function, tracing_mode="real")(*example)
    return traced
