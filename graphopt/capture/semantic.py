"""The semantic level: dynamo's graph traced again into ATen, above autograd."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.order import has_effect
from graphopt.program import InputSpec, Level, OutputSpec, Program, Signature

__all__ = [
    "auxiliary_outputs",
    "detach_outputs",
    "input_specs",
    "is_trained",
    "returns_loss",
    "semantic_graph",
    "semantic_program",
]


def semantic_graph(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """``gm`` as pre-autograd ATen, composite operators whole, same inputs and outputs.

    Metadata assertions are dropped: they compute nothing, and they keep dead code alive. A graph
    that calls function transforms (``torch.vmap``), has gradients of its own (``torch.autograd.Function``,
    hooks on tensors) or computes on tensors that wrap others (``DTensor``) stays as dynamo wrote it.
    """
    if _torch.stays_as_captured(gm):
        return _copied(gm)
    traced = _torch.retrace(gm, inputs)
    if constants := _torch.traced_constants(traced):
        raise RuntimeError(
            f"values that depend on the inputs were traced as constants: {', '.join(constants[:3])}"
        )
    for node in list(traced.graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten._assert_tensor_metadata.default:
            traced.graph.erase_node(node)
    for source, node in zip(_placeholders(gm), _placeholders(traced), strict=True):
        node.meta.update({k: v for k, v in source.meta.items() if k not in node.meta and k != "grapharg"})
    # fx alone takes a batch norm that nobody reads for dead, and its statistics with it.
    traced.graph.eliminate_dead_code(is_impure_node=has_effect)
    traced.recompile()
    return traced


def input_specs(
    gm: fx.GraphModule, inputs: Sequence[Any], names: Mapping[int, tuple[str, str]]
) -> list[InputSpec]:
    """Roles of dynamo's graph inputs. ``names`` maps ``id(tensor)`` to (role, dotted name)."""
    specs = []
    for node, value in zip(_placeholders(gm), inputs, strict=True):
        if not isinstance(value, torch.Tensor):
            specs.append(InputSpec(node.name, "symbol"))
            continue
        role, fqn = names.get(id(value), ("", ""))
        if not role:
            fqn = _dotted(_torch.source_name(node))
            is_parameter = isinstance(value, torch.nn.Parameter)
            is_buffer = not is_parameter and isinstance(value, torch.nn.Buffer)
            role = "parameter" if is_parameter else "buffer" if is_buffer else "input"
            if role == "input" and "._buffers[" in _torch.source_name(node):
                role = "buffer"
            if role == "input" and value.requires_grad and not value.is_leaf:
                role = "activation"
        specs.append(InputSpec(node.name, role, fqn))
    return specs


def semantic_program(name: str, gm: fx.GraphModule, specs: Sequence[InputSpec]) -> Program:
    """A ``Program`` over a semantic graph whose inputs have the roles of ``specs``."""
    inputs = tuple(
        InputSpec(node.name, spec.role, spec.fqn) for node, spec in zip(_placeholders(gm), specs, strict=True)
    )
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    flat = torch.utils._pytree.tree_leaves(output.args[0])
    outputs = tuple(
        OutputSpec(v.name, "output", str(i)) for i, v in enumerate(flat) if isinstance(v, fx.Node)
    )
    return Program(name, Level.SEMANTIC, gm, Signature(inputs, outputs))


def auxiliary_outputs(gm: fx.GraphModule) -> tuple[int, ...]:
    """Outputs beside a scalar loss that could be differentiated but hardly ever are (logits).

    AOTAutograd would add a zero gradient for each to the backward: as many bytes as the output
    and a sum nobody asked for. Empty where no scalar output needs a gradient.
    """
    differentiable = list(_differentiable(gm))
    if not any(scalar for _, scalar, _ in differentiable):
        return ()
    return tuple(
        index for index, scalar, passed_through in differentiable if not scalar and not passed_through
    )


def returns_loss(gm: fx.GraphModule) -> bool:
    """Whether a scalar that can be differentiated is among the outputs."""
    return any(scalar for _, scalar, _ in _differentiable(gm))


def _differentiable(gm: fx.GraphModule) -> Iterator[tuple[int, bool, bool]]:
    """Flat outputs that can be differentiated: index, whether it is a scalar, whether it is an input."""
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    for index, node in enumerate(torch.utils._pytree.tree_leaves(output.args[0])):
        value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
        if isinstance(value, torch.Tensor) and value.requires_grad and value.is_floating_point():
            yield index, value.dim() == 0, node.op == "placeholder"


def detach_outputs(gm: fx.GraphModule, indices: Sequence[int]) -> None:
    """Cut the given flat outputs off from autograd."""
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    flat, spec = torch.utils._pytree.tree_flatten(output.args[0])
    with gm.graph.inserting_before(output):
        for index in indices:
            node = flat[index]
            detached = gm.graph.call_function(torch.ops.aten.detach.default, (node,))
            detached.meta = dict(node.meta)
            flat[index] = detached
    output.args = (torch.utils._pytree.tree_unflatten(flat, spec),)
    gm.recompile()


def _copied(gm: fx.GraphModule) -> fx.GraphModule:
    """Dynamo's graph as a module of its own, what it says of values under ``meta["val"]``."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    copy = fx.GraphModule(gm, graph)
    for source, node in zip(gm.graph.nodes, graph.nodes, strict=True):
        node.meta = dict(source.meta)
        node.meta.pop("grapharg", None)
        if "example_value" in node.meta:
            node.meta.setdefault("val", node.meta["example_value"])
    return copy


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def _dotted(expression: str) -> str:
    """``L['self']._modules['model']._parameters['weight']`` -> ``model.weight``."""
    for noise in ("L['self']", "L['fn']", "._modules", "._parameters", "._buffers", "'", "]"):
        expression = expression.replace(noise, "")
    return expression.replace("[", ".").strip(".")


def is_trained(inputs: Sequence[Any]) -> bool:
    """Whether a graph on these inputs is differentiated."""
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)
