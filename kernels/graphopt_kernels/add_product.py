"""A product of matrices that is added to a matrix as it is computed.

::

    into += left @ right         one call of the library, which reads what it adds to

Separately the product is written, both are read, and the sum is written: for the gradient of a weight that
is three times what adding within the product moves. A matrix that has a shape but no memory yet (its storage
has 0 bytes) becomes the product, in memory that is taken now.

What is added to may be float32 where the operands are bfloat16, on CUDA, whose library has such products: the
gradient of a float32 weight in an autocast region. The product is not rounded to bfloat16 then.
"""

from __future__ import annotations

import torch

from graphopt.candidate import Reason

__all__ = ["add_product", "add_product_reference", "add_product_supports", "memory_of"]


_NAME = "graphopt::add_product"
# Registered piece by piece: a step makes a hundred of these calls and more, and what ``custom_op`` puts
# around each takes the host longer than all the rest of it.
torch.library.define(_NAME, "(Tensor(a!) into, Tensor left, Tensor right) -> ()")


@torch.library.impl(_NAME, "CompositeExplicitAutograd")
def _add_product(into: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``into`` [m, n] ``+= left`` [m, k] ``@ right`` [k, n], in place; all of one dtype, or float32 of
    bfloat16 on CUDA.

    The product is added in the precision of the library's accumulator, and the sum rounded once. Where the
    storage of ``into`` has no bytes it gets new memory, in the layout that its strides say, and is the
    product. Raises ``ValueError`` for operands that do not fit together.
    """
    reason = add_product_supports(into, left, right)
    if reason is not None:
        raise ValueError(f"add_product: {reason}")
    torch.autograd.graph.increment_version(into)
    made = memory_of(into)
    if made is not into:
        if into.dtype is left.dtype:
            torch.mm(left, right, out=made)
        else:
            torch.ops.aten.mm.dtype_out(left, right, into.dtype, out=made)
        into.set_(made.untyped_storage(), 0, made.shape, made.stride())
    elif into.dtype is not left.dtype:
        torch.ops.aten.addmm.dtype_out(into, left, right, into.dtype, out=into)
    elif into.data_ptr() and _shares_memory(into, left, right):
        into.add_(left @ right)
    else:
        into.addmm_(left, right)


def memory_of(into: torch.Tensor) -> torch.Tensor:
    """``into``, or where its storage has no bytes a tensor like it that has."""
    if not into.numel() or into.untyped_storage().nbytes():
        return into
    return torch.empty_strided(into.shape, into.stride(), dtype=into.dtype, device=into.device)


def _nothing(into: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """What the operator returns of fake tensors."""


torch.library.register_fake(_NAME, _nothing)


add_product = torch.ops.graphopt.add_product.default


def _shares_memory(into: torch.Tensor, *operands: torch.Tensor) -> bool:
    place = into.untyped_storage().data_ptr()
    return any(operand.untyped_storage().data_ptr() == place for operand in operands)


def add_product_reference(into: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """What ``add_product`` computes of a matrix that has memory, with ATen operators."""
    into.add_(left.to(into.dtype) @ right.to(into.dtype))


def add_product_supports(into: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> Reason | None:
    """Three matrices of one device whose shapes fit together and whose floating-point dtypes are the same, or
    on CUDA bfloat16 and what is added to float32."""
    if into.dim() != 2 or left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0]:
        return Reason(f"{list(left.shape)} times {list(right.shape)} is no product of matrices")
    if tuple(into.shape) != (left.shape[0], right.shape[1]):
        made = [left.shape[0], right.shape[1]]
        return Reason(f"the product is {made}, what it is added to {list(into.shape)}")
    widens = into.dtype is torch.float32 and into.is_cuda
    for operand in (left, right):
        if operand.dtype is not into.dtype and not (widens and left.dtype is right.dtype is torch.bfloat16):
            return Reason(f"an operand is {operand.dtype}, what is added to {into.dtype}")
        if operand.device != into.device:
            return Reason(f"an operand is on {operand.device}, what is added to on {into.device}")
    if not into.dtype.is_floating_point:
        return Reason(f"{into.dtype} is no floating-point type")
    return None
