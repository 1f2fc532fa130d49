"""What it takes to run an operator of the forward again and get the same result.

Random operators draw from a generator that has moved on by then. Where the state in which the
operator found it can be had, it becomes a value of the graph, kept if the operator runs again::

    %1 = aten.native_dropout(%0, 0.1, True)

    %1 = graphopt.random_state(device(cpu))
    %2 = run_with_rng_state(%1, aten.native_dropout, %0, 0.1, True)

In the forward half the second line is the plain operator and the first is gone unless ``%1`` is
saved; in the backward half both are what they say.

Operators that normalise a batch read running statistics only to write new ones: they may run again
although the statistics have changed in between.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.program import tensor_leaves

__all__ = [
    "is_random",
    "is_random_state",
    "make_random_states_explicit",
    "plain_call",
    "random_state_of",
    "run_plainly",
    "statistics_of",
]

_FUNCTIONAL_NORM = torch.ops.aten._native_batch_norm_legit_functional.default


@torch.library.custom_op("graphopt::random_state", mutates_args=())
def _random_state(device: torch.device) -> torch.Tensor:
    """The present state of the device's default generator, a copy."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@_random_state.register_fake
def _(device: torch.device) -> torch.Tensor:
    return torch.empty(_torch.random_state_bytes(device), dtype=torch.uint8)


_STATE = torch.ops.graphopt.random_state.default


def is_random(node: fx.Node) -> bool:
    """Whether a call draws random numbers. Attention operators do so only when they drop something, and
    dropout only in training; torch's tags, and with them ``fx.Node.is_impure``, say that both always do."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    if _has(node, "dropout_p") and _argument(node, "dropout_p", 0.0) == 0.0:
        return False
    return not (_has(node, "train") and _argument(node, "train", None) is False)


def is_random_state(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is _STATE


def random_state_of(node: fx.Node) -> fx.Node | None:
    """The state that a call is replayed under, ``None`` for a plain call."""
    if node.op != "call_function" or node.target is not _torch.run_with_random_state():
        return None
    state = node.args[0]
    assert isinstance(state, fx.Node)
    return state


def plain_call(node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Target and arguments of a call as they are where it runs for the first time."""
    if random_state_of(node) is None:
        return node.target, node.args, node.kwargs
    return node.args[1], node.args[2:], node.kwargs


def run_plainly(node: fx.Node) -> None:
    """Turn a replayed call back into the plain one, in place."""
    node.target, node.args, node.kwargs = plain_call(node)


def make_random_states_explicit(gm: fx.GraphModule) -> None:
    """Give every random operator whose result is read a state to be replayed under, in place.

    Left alone: operators that draw from a generator that they are given, and those on devices other
    than the CPU and CUDA.
    """
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or not node.users or not is_random(node):
            continue
        device = next((t.device for t in tensor_leaves(node.meta.get("val"))), None)
        if device is None or device.type not in ("cpu", "cuda"):
            continue
        if _argument(node, "generator", None) is not None:
            continue
        if not any(tensor_leaves(source.meta.get("val")) for source in node.all_input_nodes):
            # Nothing but the device tells which generator a factory draws from.
            node.kwargs = {**node.kwargs, "device": device}
        with gm.graph.inserting_before(node):
            state = gm.graph.call_function(_STATE, (device,))
        state.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
        with _torch.fake_mode_of(tensor_leaves(node.meta["val"])):
            state.meta["val"] = _STATE(device)
        node.args = (state, node.target, *node.args)
        node.target = _torch.run_with_random_state()
    gm.recompile()


def statistics_of(node: fx.Node) -> tuple[fx.Node, ...]:
    """Running statistics that a call reads only to yield new ones: its other results do not depend
    on them. None where this torch could not hand them to a backward that runs the call again: such
    calls run once."""
    if node.target is not _FUNCTIONAL_NORM or not _argument(node, "training", False):
        return ()
    if not _torch.can_ignore_versions():
        return ()
    found = (_argument(node, "running_mean", None), _argument(node, "running_var", None))
    return tuple(value for value in found if isinstance(value, fx.Node))


def _has(node: fx.Node, name: str) -> bool:
    schema = _torch.schema_of(node.target)
    return schema is not None and any(argument.name == name for argument in schema.arguments)


def _argument(node: fx.Node, name: str, default: Any) -> Any:
    """An argument of a call of an operator by its name in the schema."""
    schema = _torch.schema_of(node.target)
    for position, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.name == name:
            return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)
    return default
