"""Products of matrices one side of which is no multiple of 16 bytes, as two products.

Libraries have fast kernels for matrices whose every row begins on 16 bytes and whose sides are whole
multiples of that. With 50,257 classes they fall back to kernels for elements that lie anywhere. So the
classes are cut where the last whole 16 bytes end: one large product on fast kernels, and one of the few
classes that are left::

    x @ W.T      ->  [x @ W[:50256].T, x @ W[50256:].T]       written side by side
    dz @ W       ->  dz[:, 50256:] @ W[50256:]  +  dz[:, :50256] @ W[:50256]
    dz.T @ x     ->  [dz[:, :50256].T @ x, dz[:, 50256:].T @ x]

The sum of the second line is made within the large product, in the precision that it accumulates in.
"""

from __future__ import annotations

import torch

from graphopt_kernels.class_blocks import add_matrices

__all__ = ["even_classes", "gradient_of_input", "gradient_of_weight", "logits"]

_ALIGNED = 16
"""Bytes that fast kernels load at once."""


def even_classes(classes: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many of ``classes`` a first product takes: all on the CPU, or where they are even."""
    if device.type != "cuda":
        return classes
    even = classes - classes % (_ALIGNED // dtype.itemsize)
    return even or classes


def logits(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, even: int
) -> None:
    """``input`` [N, D] ``@ weight.T`` [D, V] (``+ bias`` [V]) into ``out`` [N, V], cut at ``even``
    classes."""
    for part in _parts(weight.shape[0], even):
        if bias is None:
            torch.mm(input, weight[part].t(), out=out[:, part])
        else:
            torch.addmm(bias[part], input, weight[part].t(), out=out[:, part])


def gradient_of_input(grad: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, even: int) -> None:
    """``grad`` [N, V] ``@ weight`` [V, D] into ``out`` [N, D]."""
    first, *rest = reversed(_parts(weight.shape[0], even))
    torch.mm(grad[:, first], weight[first], out=out)
    for part in rest:
        out.addmm_(grad[:, part], weight[part])


def gradient_of_weight(
    grad: torch.Tensor, input: torch.Tensor, out: torch.Tensor, even: int, *, adds: bool
) -> None:
    """``grad.T`` [V, N] ``@ input`` [N, D] into ``out`` [V, D], or added to it. On CUDA ``out`` may be
    float32 where they are bfloat16."""
    for part in _parts(out.shape[0], even):
        add_matrices(out[part], grad[:, part].t(), input, is_first=not adds)


def _parts(classes: int, even: int) -> list[slice]:
    return [slice(0, classes)] if even >= classes else [slice(0, even), slice(even, classes)]
