"""Products that make the gradient of a weight add it to ``.grad`` instead of writing it.

Before, the backward of one call, as AOTAutograd made it::

    %dw = aten.mm(%dy_t, %x)             writes the gradient;  autograd, or graphopt.hand_over, then reads it
    return (%dx, %dw)                    and .grad, and writes .grad

After::

    %held = placeholder                  .grad, put there when the backward runs
    graphopt.add_product(%held, %dy_t, %x)
    return (%dx, None)

Whether ``.grad`` may be added to is known when the backward runs and not before
(``hand_over.held_gradient``). Where it may not, because it is not there, hooks wait for the gradient, or it
was only asked for, ``%held`` is a matrix without memory: the product takes some, and is returned as ever. So
nothing but a rounding differs: the sum is rounded once, not the product first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import getitem
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.candidate import NearMiss
from graphopt.cost import CostModel
from graphopt.emit.lowered import LoweredMemory, LoweredStorage
from graphopt.emit.weight_gradients import KERNELS, Made, cut_of, made_gradients
from graphopt.hand_over import after_adding, held_gradient, leaf_of
from graphopt.plugins import default_host

__all__ = ["Slot", "add_to_held", "holding", "settled"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class Slot:
    """Gradient number ``position`` of a backward graph, which its input ``name`` stands for. ``like``: a
    tensor of its shape, strides, dtype and device, those of its parameter."""

    position: int
    name: str
    like: torch.Tensor

    def fits(self, held: torch.Tensor, leaf: torch.Tensor) -> bool:
        """Whether ``held`` looks like the gradient and has memory apart from the parameter's."""
        return _layout(held) == _layout(self.like) and _torch.storage_key(held) != _torch.storage_key(leaf)


def add_to_held(
    gm: fx.GraphModule,
    parameters: Sequence[torch.Tensor | None],
    *,
    held: bool = False,
    cost: CostModel | None = None,
) -> tuple[list[Slot], list[NearMiss]]:
    """Rewrite a backward graph in place; what its new inputs, behind the others, stand for, and why some
    gradients stay as they are.

    ``parameters[k]`` is an example of the parameter that gradient ``k`` belongs to, ``None`` for what is no
    parameter. ``held``: see ``settled``. ``cost``: see ``made_gradients``.
    """
    graph = gm.graph
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    last = next((node for node in reversed(graph.nodes) if node.op == "placeholder"), None)
    if last is None or len(output.args[0]) != len(parameters):
        return [], []
    if not set(KERNELS.values()) <= set(default_host().kernels()):
        return [], []
    groups, misses = made_gradients(output, parameters, held=held, cost=cost)
    slots: list[Slot] = []
    replaced: list[fx.Node] = []
    for made in sorted((made for group in groups for made in group), key=lambda made: made.position):
        with graph.inserting_after(last):
            last = graph.placeholder(f"{_torch.KEPT if held else _torch.MADE}_{made.position}")
        value, parameter = made.returned.meta["val"], made.parameter
        like = value.new_empty_strided(parameter.shape, parameter.stride())
        last.meta["val"] = like
        slots.append(Slot(made.position, last.name, like))
        if made.loss is None:
            _add_product(graph, made, last)
        else:
            replaced.append(_add_in_loss(graph, made, last))
        _torch.return_none(output, made.position)
    gone = {node for group in groups for made in group for node in made.nodes}
    for node in [*(node for node in reversed(graph.nodes) if node in gone), *replaced]:
        graph.erase_node(node)
    gm.recompile()
    return slots, misses


def _add_product(graph: fx.Graph, made: Made, into: fx.Node) -> None:
    """Add what ``made`` says to ``into``, before the product that it is a part of."""
    with graph.inserting_before(made.base):
        sides: list[Any] = list(made.base.args)
        for step in made.steps:
            if (place := cut_of(step)) is not None:
                side, start, end = place
                sides[side] = _called(graph, _aten.slice.Tensor, sides[side], side, start, end)
            elif step.target is _aten.permute.default:
                sides = [_called(graph, _aten.permute.default, side, [1, 0]) for side in reversed(sides)]
        graph.call_function(torch.ops.graphopt.add_product.default, (into, *sides))


def _add_in_loss(graph: fx.Graph, made: Made, into: fx.Node) -> fx.Node:
    """Let the backward of a loss add the weight's gradient to ``into``. Returned is the call that goes, once
    nothing reads its result."""
    loss = made.loss
    assert loss is not None
    name = KERNELS[str(loss.target)].replace("-", "_")
    of_input, _, of_bias = loss.meta["val"]
    with graph.inserting_before(loss):
        target = getattr(torch.ops.graphopt, name).default
        added = graph.call_function(target, (into, *loss.args), dict(loss.kwargs))
        added.meta["val"] = (of_input, of_bias)
        for user in [user for user in loss.users if user is not made.base]:
            kept = graph.call_function(getitem, (added, 1 if user.args[1] else 0))
            kept.meta["val"] = user.meta["val"]
            user.replace_all_uses_with(kept)
            graph.erase_node(user)
    return loss


def _called(graph: fx.Graph, op: Any, *args: Any) -> fx.Node:
    """A call whose result is known by the values of what it is given."""
    made = graph.call_function(op, args)
    made.meta["val"] = op(*(arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args))
    return made


def holding(compiled: Callable[[list[Any]], Any], slots: Sequence[Slot]) -> Callable[[list[Any]], Any]:
    """``compiled``, the code of a rewritten backward graph, as autograd calls that of the graph as it was."""
    empty = [_without_memory(slot.like) for slot in slots]

    def call(arguments: list[Any]) -> Any:
        node = _torch.running_node()
        into: list[torch.Tensor] = []
        held: list[bool] = []
        for slot, blank in zip(slots, empty, strict=True):
            # A view: what is given memory is the view's, not that of the next call.
            gradient = _held(node, slot)
            held.append(gradient is not None)
            into.append(blank.detach() if gradient is None else gradient)
        arguments.extend(into)
        returned = list(compiled(arguments))
        for slot, made, added in zip(slots, into, held, strict=True):
            returned[slot.position] = None if added else made
        device = slots[0].like.device
        if any(held) and device.type == "cuda":
            after_adding(torch.cuda.current_stream(device))
        return returned

    return _torch.boxed(call)


def _held(node: Any, slot: Slot) -> torch.Tensor | None:
    """The tensor that a gradient may be added to; ``None`` where it has to be returned."""
    if node is None or _torch.keeps_graph():
        # A graph that is kept may be one of which gradients of gradients are wanted.
        return None
    leaf = leaf_of(node, slot.position)
    held = None if leaf is None else held_gradient(leaf)
    return held if leaf is not None and held is not None and slot.fits(held, leaf) else None


def _without_memory(like: torch.Tensor) -> torch.Tensor:
    """A tensor like the given one whose storage has no bytes."""
    with _torch.without_modes():
        made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
        made.untyped_storage().resize_(0)
    return made


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def settled(record: LoweredMemory, slots: Sequence[Slot], *, held: bool) -> LoweredMemory:
    """What the code of a rewritten backward graph holds, by the inputs and outputs of the graph as it was.

    ``held``: gradients are there throughout and counted elsewhere, whether a step adds to them or, where a
    loop has let go of them, makes them anew. Else a product takes the memory of its result.
    """
    by_name = {slot.name: slot for slot in slots}
    storages: list[LoweredStorage] = []
    for storage in record.storages:
        slot = by_name.get(storage.input)
        if slot is None:
            storages.append(storage)
        elif not held:
            assert storage.dies is not None
            storages.append(LoweredStorage(storage.bytes, storage.dies, None, outputs=(slot.position,)))
    names = list(record.output_names)
    for slot in slots:
        names[slot.position] = slot.name
    return replace(
        record,
        storages=tuple(storages),
        input_names=tuple(name for name in record.input_names if name not in by_name),
        output_names=tuple(names),
    )
