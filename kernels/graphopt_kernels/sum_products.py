"""The sum of products of matrices, each added to the one before as it is computed.

::

    out = a0 @ b0                one product
    out += a1 @ b1               the next ones, in place: the library reads what it adds to

Separate operators write every product, read all of them and write the sum. Where an operator adds to a
matrix that it is given it copies that first; here nobody else has seen it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphopt.candidate import Reason

__all__ = ["sum_products", "sum_products_reference", "sum_products_supports"]


@torch.library.custom_op("graphopt::sum_products", mutates_args=())
def sum_products(lefts: Sequence[torch.Tensor], rights: Sequence[torch.Tensor]) -> torch.Tensor:
    """``lefts[0] @ rights[0] + lefts[1] @ rights[1] + ...``: [m, k_i] times [k_i, n] give [m, n].

    Each product is added in the precision of the library's accumulator to the sum of those before it, which
    is rounded to the operands' dtype. Raises ``ValueError`` for operands that do not fit together.
    """
    reason = sum_products_supports(lefts, rights)
    if reason is not None:
        raise ValueError(f"sum_products: {reason}")
    out = torch.mm(lefts[0], rights[0])
    for left, right in zip(lefts[1:], rights[1:], strict=True):
        out.addmm_(left, right)
    return out


@sum_products.register_fake
def _(lefts: Sequence[torch.Tensor], rights: Sequence[torch.Tensor]) -> torch.Tensor:
    return lefts[0].new_empty(lefts[0].shape[0], rights[0].shape[1])


def _save(ctx: Any, inputs: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]], output: Any) -> None:
    lefts, rights = inputs
    ctx.count = len(lefts)
    ctx.save_for_backward(*lefts, *rights)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    lefts, rights = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
    return [gradient @ right.t() for right in rights], [left.t() @ gradient for left in lefts]


sum_products.register_autograd(_backward, setup_context=_save)


def sum_products_reference(lefts: Sequence[torch.Tensor], rights: Sequence[torch.Tensor]) -> torch.Tensor:
    """What ``sum_products`` computes, with ATen operators."""
    total = lefts[0] @ rights[0]
    for left, right in zip(lefts[1:], rights[1:], strict=True):
        total = total + left @ right
    return total


def sum_products_supports(lefts: Sequence[torch.Tensor], rights: Sequence[torch.Tensor]) -> Reason | None:
    """Pairs of matrices of one dtype whose products have one shape."""
    if not lefts or len(lefts) != len(rights):
        return Reason(f"{len(lefts)} left and {len(rights)} right operands: expected as many, one at least")
    first = lefts[0]
    for left, right in zip(lefts, rights, strict=True):
        if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0]:
            return Reason(f"{list(left.shape)} times {list(right.shape)} is no product of matrices")
        if left.dtype is not first.dtype or right.dtype is not first.dtype:
            return Reason(f"an operand is {left.dtype} or {right.dtype}, not {first.dtype} as the first")
        if (left.shape[0], right.shape[1]) != (first.shape[0], rights[0].shape[1]):
            return Reason("products are of different shapes")
    return None
