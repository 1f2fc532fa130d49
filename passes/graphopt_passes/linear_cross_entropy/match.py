"""Finding ``linear -> (slice, view, cast, scale, softcap) -> cross_entropy`` in a semantic graph.

Log-sum-exps of the same logits, as a z-loss reads them, are found with it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.candidate import NearMiss, Reason
from graphopt.rules import argument
from graphopt_passes.linear_cross_entropy.sums import ORDERS, ROWS, SCALES, SUM, sum_refused

__all__ = ["PASSED", "REDUCTIONS", "Match", "Walk", "follow", "loss_refused", "match_loss", "rounded_scale"]

_aten = torch.ops.aten
REDUCTIONS = ("none", "mean", "sum")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

_PRODUCTS = frozenset({_aten.linear.default, _aten.matmul.default, _aten.mm.default, _aten.addmm.default})
_CASTS = frozenset(
    {_aten.to.dtype, _aten.to.dtype_layout, _aten.to.device, _aten.to.other, _aten.type_as.default,
     _aten._to_copy.default}
)  # fmt: skip
_SAME = frozenset({_aten.contiguous.default, _aten.alias.default, _aten.clone.default})
_RESHAPES = frozenset(
    {_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default, _aten.flatten.using_ints,
     _aten.squeeze.default, _aten.squeeze.dim, _aten.unsqueeze.default, _aten.view_as.default,
     _aten.reshape_as.default}
)  # fmt: skip
_SIZES = frozenset({_aten.sym_size.int, _aten.sym_numel.default})


@dataclass(frozen=True)
class Match:
    """A loss that may be computed in chunks.

    ``chain`` holds the calls from the ``product`` to the ``loss``, both left out, ``sums`` those that give
    log-sum-exps of the logits that the loss reads. ``weight`` is [V, D],
    or [D, V] if ``transposed``. ``row_steps`` select rows of the logits and are to be applied to the
    ``input`` instead. ``class_weight`` [V] weighs rows by their target. ``rows``, ``width`` and ``columns``
    are N, D and V as traced.
    """

    loss: fx.Node
    product: fx.Node
    chain: tuple[fx.Node, ...]
    sums: tuple[fx.Node, ...]
    input: fx.Node
    weight: fx.Node
    transposed: bool
    bias: fx.Node | None
    target: fx.Node
    class_weight: fx.Node | None
    reduction: str
    ignore_index: int
    label_smoothing: float
    logit_scale: float
    softcap: float
    row_steps: tuple[fx.Node, ...]
    rows: int
    width: int
    columns: int

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return (self.product, *self.chain, *self.sums, self.loss)

    @property
    def by_row(self) -> str:
        """The reduction that the operator does: where rows weigh differently their losses are summed up
        behind it."""
        return self.reduction if self.class_weight is None else "none"

    @property
    def operands(self) -> tuple[fx.Node, ...]:
        """What the operator reads beside the target."""
        return tuple(node for node in (self.input, self.weight, self.bias) if node is not None)

    @property
    def first(self) -> fx.Node:
        """The call that read them."""
        return self.product

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the product, in which chunks of logits are held."""
        dtype: torch.dtype = self.product.meta["val"].dtype
        return dtype


@dataclass
class Walk:
    """What the calls between product and loss do to the logits, in order."""

    row_steps: list[fx.Node] = field(default_factory=list)
    scale: float = 1.0
    softcap: float = 0.0
    is_capped: bool = False
    reshaped: bool = False
    moved: bool = False


def match_loss(loss: fx.Node, rule: str) -> Match | NearMiss | None:
    """The match that ends in the ``cross_entropy_loss`` call ``loss``; where it is not, how far it went
    and why; ``None`` where the loss is not of a matrix product at all."""
    chain: list[fx.Node] = []
    node = argument(loss, "self")
    while isinstance(node, fx.Node) and node.target in PASSED:
        chain.insert(0, node)
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target not in _PRODUCTS:
        return None
    found = (node, *chain, loss)

    def miss(matched: int, reason: Reason) -> NearMiss:
        return NearMiss(rule, loss.name, matched, len(found), reason)

    sums: list[tuple[fx.Node, int]] = []
    for index, (call, reader) in enumerate(itertools.pairwise(found)):
        others = [user for user in call.users if user is not reader]
        sums += [(user, index) for user in others if user.target is SUM]
        if (read := _read_elsewhere(call, [user for user in others if user.target is not SUM])) is not None:
            return miss(index + 1, read)
    if (refused := loss_refused(loss) or _smoothed_weights(loss)) is not None:
        return miss(len(found) - 1, refused)
    operands = _operands(node)
    if isinstance(operands, Reason):
        return miss(len(found) - 1, operands)
    input, weight, transposed, bias = operands
    columns = node.meta["val"].shape[-1]
    walk = Walk()
    for index, call in enumerate(chain):
        if (reason := follow(walk, call, columns, chain[index + 1 :])) is not None:
            return miss(index + 1, reason)
    values = argument(loss, "self").meta["val"]
    if values.dim() != 2 and not walk.moved:
        return miss(len(found) - 1, Reason("the classes are not the columns of the product", (loss.name,)))
    target = argument(loss, "target")
    for call, index in sums:
        if (other := sum_refused(call, chain[:index], chain[index:], node, target)) is not None:
            return miss(index + 1, other)
    return Match(
        loss, node, tuple(chain), tuple(call for call, _ in sums), input, weight, transposed, bias, target,
        argument(loss, "weight"),
        REDUCTIONS[argument(loss, "reduction")], argument(loss, "ignore_index"),
        float(argument(loss, "label_smoothing")), rounded_scale(walk.scale), walk.softcap,
        tuple(walk.row_steps), _torch.hint(target.meta["val"].numel()),
        _torch.hint(input.meta["val"].shape[-1]), _torch.hint(columns),
    )  # fmt: skip


def _read_elsewhere(call: fx.Node, others: Sequence[fx.Node]) -> Reason | None:
    """Whoever reads logits beside the loss needs them whole."""
    if not others:
        return None
    returned = [user for user in others if _reaches_output(user)]
    if returned:
        return Reason("the logits are an output of the program as well", (call.name,))
    if others[0].target in _SIZES:
        return Reason("the size of the logits is read at run time", (call.name, others[0].name))
    return Reason("the logits are read by another call as well", (call.name, others[0].name))


def _reaches_output(node: fx.Node) -> bool:
    """Whether a reader is the output, or hands its input on to it."""
    if node.op == "output":
        return True
    hands_on = node.target in PASSED or node.target is _aten.detach.default
    return hands_on and any(_reaches_output(user) for user in node.users)


def loss_refused(loss: fx.Node) -> Reason | None:
    target = argument(loss, "target")
    if target.meta["val"].dtype is not torch.int64:
        dtype = str(target.meta["val"].dtype).removeprefix("torch.")
        return Reason(f"the targets are {dtype}, not int64 class numbers", (target.name,))
    if not isinstance(argument(loss, "ignore_index"), int):
        return Reason("the index to ignore is not a constant", (loss.name,))
    if argument(loss, "self").meta["val"].dim() < 2:
        return Reason("the loss is of one row", (loss.name,))
    return None


def _smoothed_weights(loss: fx.Node) -> Reason | None:
    if argument(loss, "weight") is None or not argument(loss, "label_smoothing"):
        return None
    return Reason("smoothed labels take the weights of all classes for every row", (loss.name,))


def _operands(product: fx.Node) -> tuple[fx.Node, fx.Node, bool, fx.Node | None] | Reason:
    """Input, weight, whether the weight is [D, V], bias."""
    bias: fx.Node | None = None
    if product.target is _aten.linear.default:
        input, weight = product.args[:2]
        given = argument(product, "bias")
        bias = given if isinstance(given, fx.Node) else None
        transposed = False
    elif product.target is _aten.addmm.default:
        bias, input, weight = product.args[:3]  # type: ignore[assignment]
        transposed = True
        if any(argument(product, factor) != 1 for factor in ("alpha", "beta")):
            return Reason("the product is scaled", (product.name,))
    else:
        input, weight = product.args[:2]
        transposed = True
    assert isinstance(input, fx.Node) and isinstance(weight, fx.Node)
    if weight.meta["val"].dim() != 2 or input.meta["val"].dim() < 2:
        return Reason("the product is not of rows with one matrix", (product.name,))
    if bias is not None and bias.meta["val"].dim() != 1:
        return Reason("the bias is not a vector", (bias.name,))
    if transposed and (source := _untransposed(weight)) is not None:
        weight, transposed = source, False
    dtype = product.meta["val"].dtype
    if dtype not in _DTYPES:
        return Reason(f"the logits are {str(dtype).removeprefix('torch.')}", (product.name,))
    return input, weight, transposed, bias


def _untransposed(matrix: fx.Node) -> fx.Node | None:
    """What a matrix is the transpose of."""
    source = matrix.args[0] if matrix.args else None
    if not isinstance(source, fx.Node) or source.meta["val"].dim() != 2:
        return None
    swaps = matrix.target is _aten.transpose.int and set(_normalised(matrix.args[1:], 2)) == {0, 1}
    return source if swaps or matrix.target in (_aten.t.default, _aten.numpy_T.default) else None


def _normalised(values: Sequence[Any], rank: int) -> list[int]:
    flat: list[int] = []
    for value in values:
        items = value if isinstance(value, (list, tuple)) else [value]
        flat += [item % rank for item in items if isinstance(item, int)]
    return flat


# --- calls between product and loss ------------------------------------------------------------


def follow(walk: Walk, call: fx.Node, columns: Any, rest: Sequence[fx.Node]) -> Reason | None:
    """Take note of one call of the chain, or say why it stands in the way."""
    target = call.target
    value, source = call.meta["val"], call.args[0].meta["val"]  # type: ignore[union-attr]
    if target in _SAME:
        return None
    if target in _CASTS:
        if value.device != source.device:
            return Reason("the logits move to another device", (call.name,))
        if not value.is_floating_point() or torch.promote_types(value.dtype, source.dtype) is not value.dtype:
            return Reason("the logits are rounded before the loss", (call.name,))
        return None
    if target in SCALES or target is _aten.tanh.default:
        return _follow_scale(walk, call, rest)
    if walk.moved:
        return Reason("the logits are rearranged before the loss", (call.name,))
    if target in _RESHAPES:
        if str(value.shape[-1]) != str(columns) or str(source.shape[-1]) != str(columns):
            return Reason("a view cuts or joins rows of the logits", (call.name,))
        walk.reshaped = walk.reshaped or str(value.shape) != str(source.shape)
        return None
    if target in ROWS:
        return _follow_rows(walk, call, value, source)
    return _follow_order(walk, call, source)


def _follow_rows(walk: Walk, call: fx.Node, value: torch.Tensor, source: torch.Tensor) -> Reason | None:
    dim = argument(call, "dim")
    if not isinstance(dim, int) or walk.reshaped:
        return Reason("rows are taken of logits that were reshaped", (call.name,))
    if dim % source.dim() != source.dim() - 1:
        walk.row_steps.append(call)
        return None
    if call.target is not _aten.select.int and str(value.shape[-1]) == str(source.shape[-1]):
        return None
    return Reason("the loss reads some of the columns only", (call.name,))


def _follow_order(walk: Walk, call: fx.Node, source: torch.Tensor) -> Reason | None:
    """A permutation that puts the classes second, where the loss wants them, or leaves them last."""
    rank = source.dim()
    order = list(range(rank))
    arguments = call.args[1:]
    if call.target is _aten.permute.default:
        order = _normalised(arguments, rank)
    elif call.target is _aten.movedim.int:
        start, end = _normalised(arguments, rank)
        order.insert(end, order.pop(start))
    else:
        first, second = _normalised(arguments, rank)
        order[first], order[second] = order[second], order[first]
    if order == [0, rank - 1, *range(1, rank - 1)]:
        walk.moved = True
        return None
    return Reason("the logits are rearranged before the loss", (call.name,))


def _follow_scale(walk: Walk, call: fx.Node, rest: Sequence[fx.Node]) -> Reason | None:
    if call.target is _aten.tanh.default:
        # tanh of scaled logits, times the softcap: that factor must follow.
        following = next((other for other in rest if other.target in SCALES), None)
        softcap = None if following is None else _factor(following)
        if walk.softcap or softcap is None or softcap <= 0:
            return Reason("the logits go through a tanh that is no softcap", (call.name,))
        walk.softcap = softcap
        return None
    factor = _factor(call)
    if factor is None:
        return Reason("the logits are scaled by something else than a constant", (call.name,))
    if walk.is_capped:
        return Reason("the logits are scaled after their softcap", (call.name,))
    # Before the tanh stand the scale and 1 / softcap, after it the softcap: their product is the scale.
    walk.scale *= factor
    walk.is_capped = walk.softcap != 0
    return None


def _factor(call: fx.Node) -> float | None:
    divides, other = SCALES[call.target], call.args[1]
    if type(other) not in (int, float) or (divides and other == 0):
        return None
    assert isinstance(other, (int, float))
    return 1.0 / other if divides else float(other)


def rounded_scale(scale: float) -> float:
    """1 / 30 * 30 is meant to be 1."""
    return 1.0 if math.isclose(scale, 1.0, rel_tol=1e-12) else scale


PASSED = frozenset({*_CASTS, *_SAME, *_RESHAPES, *ROWS, *ORDERS, *SCALES, _aten.tanh.default})
"""Calls that may stand between the product and the loss."""
