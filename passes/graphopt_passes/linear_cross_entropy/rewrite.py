"""Writing the operator into a program in the place of a match."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.edit import Edit
from graphopt.rules import argument
from graphopt_passes.linear_cross_entropy.match import Match
from graphopt_passes.linear_cross_entropy.modes import holds_gradients, operator_of

__all__ = ["Loss", "hand_out", "rewrite", "rows_of", "targets_of"]

_aten = torch.ops.aten


def rewrite(edit: Edit, match: Match, mode: str, cuts: int, output_mask: Sequence[bool]) -> None:
    """Let the readers of ``match.loss`` and ``match.sums`` read what is computed piece by piece.

    ``mode`` is one of ``modes.MODES``, ``cuts`` the number of chunks or the classes of a block,
    ``output_mask`` says whether input, weight and bias need a gradient. The nodes of the match go as dead
    code.
    """

    def call(target: Any, *args: Any) -> fx.Node:
        return edit.call_before(match.loss, target, args, replaces=[match.product])

    def in_dtype(node: fx.Node) -> fx.Node:
        # An autocast region casts what a product reads; the operator takes its inputs as they are.
        return node if node.meta["val"].dtype is match.dtype else call(_aten.to.dtype, node, match.dtype)

    rows, shaped = rows_of(call, in_dtype(match.input), match.input.meta["val"].dim(), match.row_steps)
    weight = in_dtype(match.weight)
    if match.transposed:
        weight = call(_aten.t.default, weight)
    bias = None if match.bias is None else in_dtype(match.bias)
    target = targets_of(call, match.target)
    wide = torch.float64 if match.dtype is torch.float64 else torch.float32
    settings = (
        cuts,
        match.by_row,
        match.ignore_index,
        match.label_smoothing,
        match.logit_scale,
        match.softcap,
        match.loss.meta["val"].dtype if match.class_weight is None else wide,
    )
    if holds_gradients(mode):
        settings = (*settings, list(output_mask))  # type: ignore[assignment]
    results = call(operator_of(mode), rows, weight, bias, target, *settings)
    loss = call(operator.getitem, results, 0)
    if match.class_weight is not None:
        loss = _weighted(call, match, loss, target, wide)
    hand_out(edit, call, match, loss, results, shaped)


def _weighted(
    call: Callable[..., fx.Node], match: Match, losses: fx.Node, target: fx.Node, dtype: torch.dtype
) -> fx.Node:
    """The loss of rows that weigh what the class of their target does, with ``losses`` of ``dtype``."""
    ignored = call(_aten.eq.Scalar, target, match.ignore_index)
    label = call(_aten.masked_fill.Scalar, target, ignored, 0)
    taken = call(_aten.index_select.default, match.class_weight, 0, label)
    weights = call(_aten.masked_fill.Scalar, call(_aten.to.dtype, taken, dtype), ignored, 0)
    loss = call(_aten.mul.Tensor, losses, weights)
    if match.reduction != "none":
        loss = call(_aten.sum.default, loss)
    if match.reduction == "mean":
        loss = call(_aten.div.Tensor, loss, call(_aten.sum.default, weights))
    given = match.loss.meta["val"].dtype
    return loss if given is dtype else call(_aten.to.dtype, loss, given)


class Loss(Protocol):
    """What is replaced: the loss, and the calls that give log-sum-exps."""

    @property
    def loss(self) -> fx.Node: ...

    @property
    def sums(self) -> tuple[fx.Node, ...]: ...

    @property
    def target(self) -> fx.Node: ...

    @property
    def reduction(self) -> str: ...


def rows_of(
    call: Callable[..., fx.Node], rows: fx.Node, rank: int, steps: Sequence[fx.Node]
) -> tuple[fx.Node, fx.Node]:
    """The rows of a tensor of ``rank`` that ``steps`` select, as a matrix and as they are shaped."""
    for step in steps:
        # Rows of the logits are rows of the input.
        others = _torch.schema_of(step.target).arguments[1:]
        rows = call(step.target, rows, *[argument(step, parameter.name) for parameter in others])
        rank -= step.target is _aten.select.int
    shaped = rows
    if rank == 1:
        rows = call(_aten.unsqueeze.default, rows, 0)
    elif rank > 2:
        rows = call(_aten.flatten.using_ints, rows, 0, rank - 2)
    return rows, shaped


def targets_of(call: Callable[..., fx.Node], target: fx.Node) -> fx.Node:
    """The targets as a vector."""
    return target if target.meta["val"].dim() == 1 else call(_aten.flatten.using_ints, target, 0, -1)


def hand_out(
    edit: Edit, call: Callable[..., fx.Node], match: Loss, loss: fx.Node, results: fx.Node, shaped: fx.Node
) -> None:
    """Let the readers of ``match`` read the ``loss`` and the log-sum-exps among ``results``; rows are those
    of ``shaped``."""
    if match.reduction == "none" and match.target.meta["val"].dim() != 1:
        loss = call(_aten.view_as.default, loss, match.target)
    edit.replace(match.loss, loss)
    for summed in match.sums:
        found = call(operator.getitem, results, 1)
        value = summed.meta["val"]
        keeps = bool(argument(summed, "keepdim"))
        if value.dim() - keeps != 1:
            # Any column of the input has the shape of its rows, whatever the symbols.
            found = call(_aten.view_as.default, found, call(_aten.select.int, shaped, -1, 0))
        if keeps:
            found = call(_aten.unsqueeze.default, found, argument(summed, "dim")[0])
        if value.dtype is not torch.float32:
            found = call(_aten.to.dtype, found, value.dtype)
        edit.replace(summed, found)
