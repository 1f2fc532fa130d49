"""The joint level: forward and backward in one functional graph, as AOTAutograd makes it."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.order import must_happen
from graphopt.program import InputSpec, Level, OutputSpec, Program, Signature
from graphopt.replay import is_random_state, random_state_of
from graphopt.schedule import Schedule

__all__ = ["FORWARD_TAG", "drop_unread_statistics", "inference_program", "joint_program", "save_everything"]


FORWARD_TAG = "forward_for_backward"
"""``meta["partitioner_tag"]`` of a node that the forward computes though no output of it needs it: what a
pass makes of a value for the backward to read. Unlike torch's ``must_be_in_forward`` it may run again."""


def drop_unread_statistics(gm: fx.GraphModule) -> None:
    """Take running statistics from the backwards of batch norms that never look at them, in place.

    In training they go by the statistics of the batch; handed over all the same, the running ones
    would have to be kept, and norms that are run again would have to spare the first run's::

        native_batch_norm_backward(%g, %x, %w, %mean, %var, %m, %s, True, ...)
        native_batch_norm_backward(%g, %x, %w, None, None, %m, %s, True, ...)
    """
    for node in gm.graph.nodes:
        if node.target is torch.ops.aten.native_batch_norm_backward.default and node.args[7] is True:
            node.args = (*node.args[:3], None, None, *node.args[5:])
    gm.recompile()


def joint_program(name: str, gm: fx.GraphModule, specs: Sequence[InputSpec], num_outputs: int) -> Program:
    """A ``Program`` over a joint graph; ``specs`` are the roles of the semantic inputs."""
    described_inputs, described_outputs = _torch.describe_joint(gm)
    by_name = {node.name: node for node in gm.graph.nodes}
    inputs = []
    for node, role, index in described_inputs:
        if not isinstance(by_name[node].meta.get("val"), torch.Tensor):
            inputs.append(InputSpec(node, "symbol"))
        elif role == "input" and 0 <= index < len(specs):
            inputs.append(InputSpec(node, specs[index].role, specs[index].fqn))
        else:
            inputs.append(InputSpec(node, "tangent" if role == "tangent" else "input"))
    fqns = {index: spec.fqn for index, spec in enumerate(specs)}
    placeholders = {index: node for node, role, index in described_inputs if role == "input"}
    outputs = []
    for position, (node, role, index) in enumerate(described_outputs):
        if not node:
            continue
        if position < num_outputs:
            target = str(index)
            if role == "mutation":
                target = fqns.get(index) or placeholders.get(index, "")
            outputs.append(OutputSpec(node, "mutation" if role == "mutation" else "output", target))
        else:
            target = fqns.get(index) or placeholders.get(index, "")
            outputs.append(OutputSpec(node, "gradient", target))
    return Program(name, Level.JOINT, gm, Signature(tuple(inputs), tuple(outputs)))


def inference_program(name: str, gm: fx.GraphModule, specs: Sequence[InputSpec]) -> Program:
    """A ``Program`` over AOTAutograd's functional inference graph."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    described = [index for _, role, index in _torch.describe_joint(gm)[0] if role == "input"]
    if len(described) < len(placeholders) or not all(0 <= index < len(specs) for index in described):
        offset = len(placeholders) - len(specs)
        described = [position - offset for position in range(len(placeholders))]
    inputs = []
    for index, node in zip(described, placeholders, strict=True):
        spec = specs[index] if index >= 0 else InputSpec(node.name, "input")
        role = spec.role if isinstance(node.meta.get("val"), torch.Tensor) else "symbol"
        inputs.append(InputSpec(node.name, role, spec.fqn))
    outputs = []
    for position, (node, role, index) in enumerate(_torch.describe_joint(gm)[1]):
        if not node:
            continue
        if role == "mutation" and 0 <= index < len(specs):
            target = specs[index].fqn or placeholders[described.index(index)].name
            outputs.append(OutputSpec(node, "mutation", target))
        else:
            outputs.append(OutputSpec(node, "output", str(position)))
    return Program(name, Level.JOINT, gm, Signature(tuple(inputs), tuple(outputs)))


def save_everything(program: Program, *, random_states: bool = False) -> Schedule:
    """The schedule without recomputation: what eager autograd would keep is kept.

    The forward computes what its outputs need, and what is tagged for it (``FORWARD_TAG``), in the
    graph's order; the backward all the rest.
    Nothing is replayed, so states of random generators are not made unless ``random_states``.
    """
    nodes = [node for node in program.graph.nodes if node.op in ("call_function", "get_attr")]
    wanted = {spec.node for spec in program.signature.outputs if spec.role in ("output", "mutation")}
    forward = {node for node in program.graph.nodes if node.name in wanted}
    for node in reversed(program.graph.nodes):
        if node in forward:
            forward.update(node.all_input_nodes)
    tangents = {spec.node for spec in program.signature.by_role("tangent")}
    backward_only = _descendants(program.graph, tangents)
    for node in nodes:
        if node.meta.get("partitioner_tag") == FORWARD_TAG and node not in backward_only:
            _add_with_sources(node, forward)
    for node in nodes:
        if node in forward or node in backward_only or node.op != "call_function":
            continue
        # An effect that no output carries happens where eager would have it: in the forward. That a
        # random generator moves on is an effect too.
        if must_happen(node) or random_state_of(node):
            _add_with_sources(node, forward)
    for node in nodes:
        # The elements of a multi-output value belong to the half that computes it: only tensors
        # can be handed over.
        if node.target is operator.getitem and node.args[0] in forward:
            forward.add(node)
    live = _needed(program, forward)
    first = [node for node in nodes if node in forward and (random_states or not is_random_state(node))]
    second = [node for node in nodes if node not in forward and node in live]
    read = {source for node in second for source in node.all_input_nodes}
    gradients = {spec.node for spec in program.signature.outputs if spec.role == "gradient"}
    saved = tuple(
        node.name for node in first if node.op == "call_function" and (node in read or node.name in gradients)
    )
    return Schedule(tuple(n.name for n in first), saved, tuple(n.name for n in second))


def _add_with_sources(node: fx.Node, found: set[fx.Node]) -> None:
    """Add ``node`` and all that it is computed from to ``found``, which holds both for its members."""
    found.add(node)
    stack = [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                stack.append(source)


def _descendants(graph: fx.Graph, roots: set[str]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.name in roots or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _needed(program: Program, forward: set[fx.Node]) -> set[fx.Node]:
    """Nodes that some output of either half depends on."""
    outputs = {spec.node for spec in program.signature.outputs}
    live = {node for node in program.graph.nodes if node.name in outputs} | forward
    for node in reversed(program.graph.nodes):
        if node in live:
            live.update(node.all_input_nodes)
    return live
