"""AOTAutograd: joint graphs, what their inputs and outputs are, and the two halves made of them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx as fx
from torch._functorch import config as functorch_config
from torch._functorch import partitioners

from graphopt._torch.donated import notes_of_compiled, permit_kept_graphs
from graphopt._torch.kept_code import keeping_code
from graphopt.collectives import is_collective

__all__ = [
    "boxed",
    "can_ignore_versions",
    "describe_joint",
    "eliminate_common_subexpressions",
    "empty_graph_like",
    "extract_halves",
    "functorch_settings",
    "ignore_version",
    "ignores_version",
    "is_opaque",
    "joint_compiler",
    "random_calls_kept",
    "recompile_on_call",
    "torch_partition",
]


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


def eliminate_common_subexpressions(gm: fx.GraphModule, must_happen: Callable[[fx.Node], bool]) -> None:
    """Dead code and repeated pure computations out of a joint graph, as torch's partitioner does. What
    ``must_happen`` names stays although nobody reads it.

    Collectives all stay: ranks count on each other to run the same ones.
    """
    from torch._functorch.compile_utils import fx_graph_cse

    # What is read stays anyway, and whether a call has an effect takes long to tell.
    gm.graph.eliminate_dead_code(lambda node: bool(node.users) or must_happen(node))
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
    keep: str = "",
) -> Callable[..., Any]:
    """A dynamo backend that goes through AOTAutograd with the given compilers and partition.

    What ``backward`` returns must not write over what was saved for it: the graph may be kept for another.
    ``keep``: a name under which what is compiled is put into AOTAutograd's cache, where the compilers say as
    what (``kept_as_text``).
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch._aot_autograd.schemas import SerializableAOTDispatchCompiler
    from torch._inductor.output_code import OutputCode

    def writing_nothing(half: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        permit_kept_graphs(notes_of_compiled())
        return backward(half, inputs)

    compiler = aot_autograd(
        # What is compiled otherwise has no entry in the cache.
        fw_compiler=SerializableAOTDispatchCompiler(OutputCode, forward) if keep else forward,
        bw_compiler=writing_nothing,
        inference_compiler=inference,
        partition_fn=partition,
        decompositions=decompositions,
    )
    if not keep:
        return compiler

    def compiled(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        with functorch_config.patch(force_non_lazy_backward_lowering=True), keeping_code(keep):
            return compiler(gm, inputs)

    return compiled


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


def recompile_on_call(gm: fx.GraphModule) -> None:
    """Generate the code of a changed graph when the module is called next, not now.

    Every ``GraphModule`` is the only instance of a class of its own, on which ``recompile`` sets
    ``forward``.
    """

    def forward(self: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        self.recompile()
        return self.forward(*args, **kwargs)

    type(gm).forward = forward
