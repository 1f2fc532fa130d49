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
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.emit.lowered import LoweredMemory, LoweredStorage
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
    gm: fx.GraphModule, parameters: Sequence[torch.Tensor | None], *, held: bool = False
) -> list[Slot]:
    """Rewrite a backward graph in place; what its new inputs, behind the others, stand for.

    ``parameters[k]`` is an example of the parameter that gradient ``k`` belongs to, ``None`` for what is no
    parameter. Gradients that are anything but a product of two matrices stay as they are. ``held``: see
    ``settled``.
    """
    graph = gm.graph
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    returned = list(output.args[0])
    if len(returned) != len(parameters) or "add-product" not in default_host().kernels():
        return []
    last = [node for node in graph.nodes if node.op == "placeholder"][-1:]
    slots: list[Slot] = []
    for position, (made, parameter) in enumerate(zip(returned, parameters, strict=True)):
        if parameter is None or not last or (product := _product(made, parameter)) is None:
            continue
        with graph.inserting_after(last[0]):
            into = graph.placeholder(f"{_torch.KEPT if held else _torch.MADE}_{position}")
        like = made.meta["val"].new_empty_strided(parameter.shape, parameter.stride())
        into.meta["val"] = like
        last = [into]
        left, right = product.all_input_nodes[0], product.all_input_nodes[-1]
        with graph.inserting_before(product):
            if product is not made:
                left, right = _transposed(graph, right), _transposed(graph, left)
            graph.call_function(torch.ops.graphopt.add_product.default, (into, left, right))
        _torch.return_none(output, position)
        for node in dict.fromkeys((made, product)):
            graph.erase_node(node)
        slots.append(Slot(position, into.name, like))
    gm.recompile()
    return slots


def _product(made: Any, parameter: torch.Tensor) -> fx.Node | None:
    """The product of matrices that a gradient is, or is the transpose of, where nothing else reads it."""
    if not isinstance(made, fx.Node) or len(made.users) != 1 or not _is_matrix(made, parameter):
        return None
    (output,) = made.users
    node: Any = made
    if node.target is _aten.permute.default and list(node.args[1]) == [1, 0]:
        node = node.args[0]
    alone = len(node.users) == 1 and list(output.args[0]).count(made) == 1  # type: ignore[arg-type]
    return node if alone and node.target is _aten.mm.default else None


def _is_matrix(made: fx.Node, parameter: torch.Tensor) -> bool:
    """Whether a gradient is a matrix like its parameter, which lies in memory row by row or column by
    column, with sizes that are known."""
    value = made.meta.get("val")
    if not isinstance(value, torch.Tensor) or parameter.dim() != 2 or parameter.layout != torch.strided:
        return False
    if not all(isinstance(size, int) for size in (*parameter.shape, *parameter.stride())):
        return False
    if not (parameter.is_contiguous() or parameter.t().is_contiguous()):
        return False
    return (value.shape, value.dtype, value.device) == (parameter.shape, parameter.dtype, parameter.device)


def _transposed(graph: fx.Graph, node: fx.Node) -> fx.Node:
    made = graph.call_function(_aten.permute.default, (node, [1, 0]))
    made.meta["val"] = node.meta["val"].t()
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
