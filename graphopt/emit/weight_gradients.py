"""How a backward graph makes the gradients of weights, as far as they could be added to ``.grad`` on the way.

A gradient is what a product of matrices makes, or its transpose; rows or columns of a product of several
layers, whose weights lie side by side; or a product in the dtype of an autocast region, cast to that of the
weight::

    %p = mm(%dy_t, %x)    %c = convert(%p, float32)    %q = slice(%c, 0, 0, 2048)    return (..., %q, ...)

The gradient of a head's weight may be made by a loss that computes its logits piece by piece.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
import torch.fx as fx

from graphopt.candidate import NearMiss, Reason
from graphopt.cost import CostModel

__all__ = ["KERNELS", "RULE", "Made", "cut_of", "made_gradients"]

RULE = "add-product"

KERNELS = {
    "aten.mm.default": "add-product",
    "graphopt.linear_cross_entropy_backward.default": "linear-cross-entropy-add-backward",
    "graphopt.linear_cross_entropy_blocks_backward.default": "linear-cross-entropy-blocks-add-backward",
}
"""What adds to a gradient, by what makes it."""

_aten = torch.ops.aten
_CHUNKED = "graphopt.linear_cross_entropy_backward.default"
_BLOCKED = "graphopt.linear_cross_entropy_blocks_backward.default"
_OF_WEIGHT = 1
"""Which result of a loss's backward is the gradient of the weight."""


@dataclass(frozen=True)
class Made:
    """Gradient number ``position``, of ``parameter``, which ``steps`` make of ``base`` one after the other: a
    product of matrices, or the result of a loss's backward."""

    position: int
    parameter: torch.Tensor
    base: fx.Node
    steps: tuple[fx.Node, ...]

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return (self.base, *self.steps)

    @property
    def returned(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def loss(self) -> fx.Node | None:
        """The backward of the loss that has this gradient as a result."""
        return _loss_of(self.base)

    @property
    def is_cut(self) -> bool:
        return any(step.target is _aten.slice.Tensor for step in self.steps)

    @property
    def is_cast(self) -> bool:
        return any(_casts(step) for step in self.steps)


def made_gradients(
    output: fx.Node, parameters: Sequence[torch.Tensor | None], *, held: bool, cost: CostModel | None
) -> tuple[list[list[Made]], list[NearMiss]]:
    """Gradients that could be added to ``.grad`` as they are made, those of one product together, and why
    others could not. ``cost`` weighs one product and adding its parts against a product for each."""
    returned = list(output.args[0])  # type: ignore[arg-type]
    times = Counter(node for node in returned if isinstance(node, fx.Node))
    groups: dict[fx.Node, list[Made]] = {}
    for position, (node, parameter) in enumerate(zip(returned, parameters, strict=True)):
        if parameter is None or not isinstance(node, fx.Node) or times[node] != 1:
            continue
        if len(node.users) == 1 and _is_matrix(node, parameter):
            made = _followed(node, position, parameter)
            if made is not None:
                groups.setdefault(made.base, []).append(made)
    found: list[list[Made]] = []
    misses: list[NearMiss] = []
    for group in groups.values():
        if not _all_taken(group, output):
            continue
        reason = _refused(group, held, cost)
        if reason is None:
            found.append(group)
        else:
            misses.append(NearMiss(RULE, group[0].base.name, len(group), len(group), reason))
    return found, misses


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


def _followed(node: fx.Node, position: int, parameter: torch.Tensor) -> Made | None:
    """The way from a returned gradient back to what makes it."""
    steps: list[fx.Node] = []
    base: Any = node
    while isinstance(base, fx.Node):
        if base.target is _aten.mm.default or _loss_of(base) is not None:
            return Made(position, parameter, base, tuple(reversed(steps)))
        if not (_turns(base) or _cuts(base) or _casts(base)):
            return None
        steps.append(base)
        base = base.args[0]
    return None


def _turns(node: fx.Node) -> bool:
    return node.target is _aten.permute.default and list(node.args[1]) == [1, 0]  # type: ignore[arg-type]


def _cuts(node: fx.Node) -> bool:
    numbers = node.args[1:]
    whole = len(numbers) == 3 and all(isinstance(number, int) for number in numbers)
    return node.target is _aten.slice.Tensor and whole and not node.kwargs


def _casts(node: fx.Node) -> bool:
    if node.target is torch.ops.prims.convert_element_type.default:
        return True
    return node.target is _aten._to_copy.default and set(node.kwargs) == {"dtype"}


def _loss_of(node: fx.Node) -> fx.Node | None:
    """The backward of a loss that a node is the weight's gradient of."""
    if node.target is not getitem or node.args[1] != _OF_WEIGHT:
        return None
    source = node.args[0]
    is_loss = isinstance(source, fx.Node) and str(source.target) in (_CHUNKED, _BLOCKED)
    return source if is_loss else None  # type: ignore[return-value]


def _all_taken(group: Sequence[Made], output: fx.Node) -> bool:
    """Whether nothing else reads what the gradients are made of."""
    within = {node for made in group for node in made.nodes}
    return all(user in within or user is output for node in within for user in node.users)


# --- reasons ------------------------------------------------------------------------------------------


def _refused(group: Sequence[Made], held: bool, cost: CostModel | None) -> Reason | None:
    if any(made.is_cast for made in group) and (reason := _cast_refused(group)) is not None:
        return reason
    if group[0].loss is None:
        return _parts_refused(group, held, cost) if any(made.is_cut for made in group) else None
    return _loss_refused(group, held)


def _parts_refused(group: Sequence[Made], held: bool, cost: CostModel | None) -> Reason | None:
    base = group[0].base
    if not held:
        # Nothing is to be added to the first time: each is handed its rows.
        return Reason("new gradients are rows of one product", (base.name,))
    if cost is not None and _packed_is_faster(group, cost):
        return Reason("one product whose parts are added is predicted to be faster", (base.name,))
    return None


def _cast_refused(group: Sequence[Made]) -> Reason | None:
    base = group[0].base
    value, parameter = base.meta["val"], group[0].parameter
    if value.dtype is torch.float16:
        # A loss scale is lowered where a product overflows: in float32 none would.
        return Reason("a product in float16 tells a loss scaler of what overflows", (base.name,))
    if value.dtype is not torch.bfloat16 or parameter.dtype is not torch.float32:
        given, stored = (str(each.dtype).removeprefix("torch.") for each in (value, parameter))
        return Reason(f"no product of {given} is added to {stored}", (base.name,))
    if value.device.type != "cuda":
        why = f"no product on the {value.device.type} has a wider result than its operands"
        return Reason(why, (base.name,))
    return None


def _loss_refused(group: Sequence[Made], held: bool) -> Reason | None:
    base, stored = group[0].base, group[0].parameter.dtype
    if len(group) > 1 or any(not _casts(step) for step in group[0].steps):
        return Reason("what the loss makes is rearranged", (base.name,))
    loss = group[0].loss
    assert loss is not None
    if str(loss.target) == _CHUNKED:
        # The first chunk's share would be rounded as often as there are chunks, with all of ``.grad``.
        if stored.itemsize < torch.float32.itemsize and loss.args[6] != 1:
            name = str(stored).removeprefix("torch.")
            return Reason(f"a sum in {name} would be rounded once a chunk", (base.name,))
        return None
    if not held:
        return Reason("until it is written a new gradient is room for other sums", (base.name,))
    return None


def _packed_is_faster(group: Sequence[Made], cost: CostModel) -> bool:
    base = group[0].base
    left, right = (node.meta["val"] for node in base.args)  # type: ignore[union-attr]
    price = _Price(cost)
    casts = {step for made in group for step in made.steps if _casts(step)}
    packed = price(_aten.mm.default, (left, right), base.meta["val"])
    for step in casts:
        packed += price(_aten._to_copy.default, (step.args[0].meta["val"],), step.meta["val"])  # type: ignore[union-attr]
    apart = 0.0
    for made in group:
        value = made.returned.meta["val"]
        held = value.new_empty(value.shape)
        packed += price(_aten.add.Tensor, (held, value), value.new_empty(value.shape))
        sides = [left, right]
        for step in made.steps:
            if _turns(step):
                sides = [side.t() for side in reversed(sides)]
            elif (place := cut_of(step)) is not None:
                side, start, end = place
                sides[side] = sides[side].narrow(side, start, end - start)
        apart += price(torch.ops.graphopt.add_product.default, (held, *sides), None)
    return packed < apart


def cut_of(step: fx.Node) -> tuple[int, int, int] | None:
    """Of a slice of a product: which dimension it is of, the first row or column and the one behind the last.
    The first operand has the rows, the second the columns."""
    if not _cuts(step):
        return None
    dim, *ends = step.args[1:]
    dim = dim % 2  # type: ignore[operator]
    size = int(step.args[0].meta["val"].shape[dim])  # type: ignore[union-attr]
    start, end, _ = slice(*ends).indices(size)
    return dim, start, end  # type: ignore[return-value]


class _Price:
    """Seconds of calls that are in no graph, by a cost model."""

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost

    def __call__(self, op: Any, args: Sequence[Any], value: Any) -> float:
        graph = fx.Graph()

        def place(item: Any) -> Any:
            if not isinstance(item, torch.Tensor):
                return item
            node = graph.placeholder(f"input_{len(graph.nodes)}")
            node.meta["val"] = item
            return node

        node = graph.call_function(op, tuple(place(item) for item in args))
        node.meta["val"] = value
        return self._cost.node(node).seconds
