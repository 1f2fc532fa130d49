"""Log-sum-exps of the logits that a loss reads: which ones the operator gives as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from graphopt.candidate import Reason
from graphopt.rules import argument

__all__ = ["ORDERS", "ROWS", "SCALES", "SUM", "class_dim", "sum_refused"]

_aten = torch.ops.aten

SUM = _aten.logsumexp.default

ROWS = frozenset({_aten.slice.Tensor, _aten.narrow.default, _aten.select.int})
"""Calls that take some of the rows."""

ORDERS = frozenset({_aten.transpose.int, _aten.permute.default, _aten.movedim.int, _aten.swapaxes.default})
"""Calls that change the order of dimensions."""

SCALES: dict[Any, bool] = {
    _aten.mul.Tensor: False, _aten.mul.Scalar: False, _aten.div.Tensor: True, _aten.div.Scalar: True,
}  # fmt: skip
"""Calls that multiply, and whether by the inverse."""

_CHANGES = frozenset({*ROWS, *SCALES, _aten.tanh.default})
"""Calls after which the loss reads other logits than what came before."""


def sum_refused(
    call: fx.Node, before: Sequence[fx.Node], after: Sequence[fx.Node], product: fx.Node, target: fx.Node
) -> Reason | None:
    """Why the log-sum-exps ``call`` are not those of the loss's rows. ``before`` and ``after`` are the calls
    between ``product`` and what it reads, and between that and the loss."""
    if any(step.target in _CHANGES for step in after):
        return Reason("the log-sum-exps are of other logits than those of the loss", (call.name,))
    logits = argument(call, "self").meta["val"]
    classes = class_dim(logits, before)
    dims = argument(call, "dim")
    if [dim % logits.dim() for dim in dims] != [classes]:
        return Reason("the log-sum-exps are not over the classes", (call.name,))
    taken = next((step for step in reversed(before) if step.target in ROWS), product)
    found = [str(size) for dim, size in enumerate(logits.shape) if dim != classes]
    if len(found) != 1 and found != [str(size) for size in taken.meta["val"].shape[:-1]]:
        return Reason("the log-sum-exps have another shape than the rows of the product", (call.name,))
    if _depends(target, call):
        return Reason("the targets are computed from the log-sum-exps", (target.name, call.name))
    return None


def class_dim(logits: torch.Tensor, before: Sequence[fx.Node]) -> int:
    """The dimension of the classes behind the calls ``before``: the last, or the second once they were
    moved there."""
    return 1 if any(step.target in ORDERS for step in before) else logits.dim() - 1


def _depends(node: fx.Node, source: fx.Node) -> bool:
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        found = waiting.pop()
        if found is source:
            return True
        if found not in seen:
            seen.add(found)
            waiting += found.all_input_nodes
    return False
