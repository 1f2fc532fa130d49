"""Products with weights of a byte: kernels where there are some, ATen operators elsewhere.

``product`` and ``unpacked`` are what the operators of the schemes ``int8``, ``fp8``, ``int8-dynamic`` and
``fp8-dynamic`` call. A weight is ``codes`` [N, K], int8 or float8_e4m3fn, times ``scales`` float32[N].
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch

from graphopt import _torch
from graphopt_kernels.instructions import has_half_pairs
from graphopt_kernels.quantized.byte_digits import (
    can_multiply,
    product_of_digits,
    product_of_integers,
)
from graphopt_kernels.quantized.byte_launch import (
    LIBRARY,
    LIBRARY_ROWS,
    Launch,
    Problem,
    check_launch,
    launch_for,
    steps_of,
    usual_launch,
)
from graphopt_kernels.quantized.settled import ahead_of, reads_early
from graphopt_kernels.tuning.lookup import Choice, processors_of, rows_class

__all__ = [
    "PRODUCTS", "kernels", "launch_product", "product", "product_reference", "unpacked", "unpacked_reference",
]  # fmt: skip

_BLOCK = 64 * 2**20
"""Bytes of an unpacked weight, or of sums in 32 bits, that are there at a time."""

_MANY = 4096
"""Rows from which on more are alike for a launch."""

PRODUCTS = Choice(
    "packed-bytes", ("graphopt_kernels.quantized.bytes_triton",), usual_launch, check_launch, launch_for
)

Tail = tuple[torch.Tensor, torch.Tensor]
"""Inputs that are not rounded, and their weights."""

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def product(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    x_scales: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    tail: Tail | None = None,
) -> torch.Tensor:
    """``x`` [..., K] times the weight, ``bias`` [N] added: [..., N] of ``dtype``, or that of x.

    With ``x_scales`` [..., 1] x is of the dtype of ``codes`` and stands for ``x * x_scales``. ``tail``
    [..., O] and [O, N], both of ``dtype``: their product is added.
    """
    dtype = dtype or x.dtype
    plain = dtype not in _FLOATS or not (codes.numel() and x.numel())
    if tail is not None and (plain or _kernels_for(codes) is None):
        body = product(x, codes, scales, bias, x_scales, torch.float32)
        return (body + tail[0].float() @ tail[1].float()).to(dtype)
    if plain:
        return product_reference(x, codes, scales, bias, x_scales, dtype)
    rows = x.numel() // codes.shape[1]
    if can_multiply(codes):
        flat, result = x.reshape(rows, -1), None
        if x_scales is None:
            result = product_of_digits(flat, codes, scales, bias)
        else:
            by_row = x_scales.reshape(rows, 1)
            result = product_of_integers(flat, by_row, codes, scales, bias, dtype)
        if result is not None:
            return result.view(*x.shape[:-1], codes.shape[0])
    found = _kernels_for(codes)
    if found is None:
        return product_reference(x, codes, scales, bias, x_scales, dtype)
    like = Problem(
        rows_class(rows, _MANY), codes.shape[0], codes.shape[1], dtype, codes.dtype, x_scales is not None
    )
    launch, problem = PRODUCTS(like, codes.device), like._replace(rows=rows)
    if launch is LIBRARY and x_scales is not None and not _scales_rows(codes):
        launch = launch_for(like, processors_of(codes.device), library=False)
    return launch_product(found, problem, launch, x, codes, scales, bias, x_scales, tail)


def product_reference(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    x_scales: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """What ``product`` computes, with ATen operators. Sums of products of int8 may be rounded to float32 as
    they grow beyond 2**24."""
    result = torch.nn.functional.linear(x.float(), codes.float())
    if x_scales is not None:
        result = result * x_scales
    result = result * scales
    return (result if bias is None else result + bias.float()).to(dtype)


def unpacked(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight [N, K] of ``dtype``."""
    found = _kernels_for(codes)
    if found is None or not codes.numel() or dtype not in _FLOATS:
        return unpacked_reference(codes, scales, dtype)
    n, k = codes.shape
    weight = torch.empty((n, k), dtype=dtype, device=codes.device)
    with _on(codes):
        found.unpack_kernel[(-(-n // 8), -(-k // 1024))](
            codes, scales, weight, n, k, FAST=has_half_pairs(codes), BLOCK_N=8, BLOCK_K=1024, num_warps=8
        )
    return weight


def unpacked_reference(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What ``unpacked`` computes, with ATen operators."""
    return (codes.float() * scales[:, None]).to(dtype)


def launch_product(
    kernels: Any,
    problem: Problem,
    launch: Launch,
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    x_scales: torch.Tensor | None,
    tail: Tail | None = None,
) -> torch.Tensor:
    """``product`` as ``launch`` says, by ``kernels``, the module of the jitted functions."""
    rows, n, k, dtype = problem[:4]
    shape = (*x.shape[:-1], n)
    x = x.reshape(rows, k).contiguous()
    with _on(codes):
        if launch.kind != "library":
            return _launched(kernels, problem, launch, x, codes, scales, bias, x_scales, tail).view(shape)
        if x_scales is None:
            return _dense(x, codes, scales, bias).view(shape)
        by_row = x_scales.reshape(rows, 1)
        result = _library(kernels, x, by_row, codes, scales, bias, dtype)
        if tail is not None:
            result.addmm_(tail[0].reshape(rows, -1), tail[1])
        return result.view(shape)


def _launched(
    kernels: Any,
    problem: Problem,
    launch: Launch,
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    x_scales: torch.Tensor | None,
    tail: Tail | None,
) -> torch.Tensor:
    rows, n, k, dtype = problem[:4]
    result = torch.empty((rows, n), dtype=dtype, device=x.device)
    whole = codes.dtype is torch.int8 and x_scales is not None
    summed = torch.int32 if whole else torch.float32
    into = result
    if launch.parts > 1:
        into = torch.empty((launch.parts, rows, n), dtype=summed, device=x.device)
    beside, exact = tail or (result, result)
    width = 0 if tail is None else exact.shape[0]
    added = result
    if tail is not None and launch.parts > 1:
        added = torch.empty((rows, n), dtype=torch.float32, device=x.device)
    given_bias, row_scales = scales if bias is None else bias, scales if x_scales is None else x_scales
    steps = steps_of(problem, launch)
    constants: dict[str, Any] = {
        "BIASED": bias is not None,
        "PARTS": launch.parts,
        "EVEN": k == steps * launch.parts * launch.inner * launch.slices,
        "FAST": has_half_pairs(codes),
        "BLOCK_N": launch.columns,
        "BLOCK_K": launch.inner,
        "num_warps": launch.warps,
    }
    across = -(-n // launch.columns)
    if launch.kind == "row":
        early = {"EARLY": True, "launch_pdl": True} if reads_early(codes) else {"EARLY": False}
        kernels.row_kernel[(across, launch.parts)](
            x, codes, scales, given_bias, x, x, into, n, k, steps, 0.0, 0.0, WARPS=launch.warps,
            SCALED=True, NORMED=False, WEIGHED=False, ADDED=False, GATE="",
            AHEAD=ahead_of(steps) if constants["EVEN"] else 0, **constants, **early,
        )  # fmt: skip
    else:
        if launch.kind == "slices":
            constants["SLICES"] = launch.slices
        kernel = kernels.slices_kernel if launch.kind == "slices" else kernels.tile_kernel
        kernel[(across * -(-rows // launch.rows), launch.parts)](
            x, row_scales, codes, scales, given_bias, beside, exact, added, into, rows, n, k, width, steps,
            ROUNDED=x_scales is not None, TAIL=tail is not None, BLOCK_M=launch.rows,
            num_stages=launch.stages, **constants,
        )  # fmt: skip
    if launch.parts > 1:
        kernels.sum_kernel[(-(-rows * n // 512),)](
            into, row_scales, scales, given_bias, added, result, rows * n, n,
            BIASED=bias is not None, ROUNDED=x_scales is not None, TAIL=tail is not None,
            PARTS=launch.parts, BLOCK=512,
        )  # fmt: skip
    return result


def _dense(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Dense products of as much of the weight as may be unpacked at a time."""
    n, k = codes.shape
    step = max(1, _BLOCK // (k * x.dtype.itemsize))
    if bias is not None:
        bias = bias.to(x.dtype)
    if n <= step:
        return torch.nn.functional.linear(x, unpacked(codes, scales, x.dtype), bias)
    step = max(128, step // 128 * 128)
    result = torch.empty((x.shape[0], n), dtype=x.dtype, device=x.device)
    for start in range(0, n, step):
        some = slice(start, min(n, start + step))
        weight = unpacked(codes[some], scales[some], x.dtype).t()
        if bias is None:
            torch.mm(x, weight, out=result[:, some])
        else:
            torch.addmm(bias[some], x, weight, out=result[:, some])
    return result


def _library(
    kernels: Any,
    x: torch.Tensor,
    x_scales: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Products of eight-bit numbers by the library, which takes rows of 16 bytes."""
    rows, n = x.shape[0], codes.shape[0]
    if codes.dtype is not torch.int8:
        added = None if bias is None else bias.to(dtype)
        return _torch.scaled_product(x, codes.t(), x_scales, scales[None, :], added, dtype)
    result = torch.empty((rows, n), dtype=dtype, device=x.device)
    # As many rows at a time, and more than the library's least.
    pieces = max(1, -(-rows * n * 4 // _BLOCK))
    step = max(2 * LIBRARY_ROWS, -(-rows // pieces))
    start = 0
    while start < rows:
        stop = rows if rows - start - step <= LIBRARY_ROWS else start + step
        sums = _torch.integer_product(x[start:stop], codes.t())
        kernels.scale_kernel[(stop - start, -(-n // 1024))](
            sums, x_scales[start:stop], scales, scales if bias is None else bias, result[start:stop], n,
            BIASED=bias is not None, BLOCK=1024,
        )  # fmt: skip
        start = stop
    return result


def _scales_rows(codes: torch.Tensor) -> bool:
    """Whether the library multiplies eight-bit numbers here: float8 is scaled by row from sm_90 on."""
    return codes.dtype is torch.int8 or torch.cuda.get_device_capability(codes.device) >= (9, 0)


def _kernels_for(codes: torch.Tensor) -> Any:
    """The kernels where they take ``codes``, else ``None``: devices before sm_89 do not know float8."""
    if not codes.is_cuda or not codes.is_contiguous():
        return None
    if torch.cuda.get_device_capability(codes.device) < ((8, 0) if codes.dtype is torch.int8 else (8, 9)):
        return None
    return kernels()


def _on(codes: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(codes.device) if codes.is_cuda else contextlib.nullcontext()


@functools.cache
def kernels() -> Any:
    """The module of the jitted kernels, or ``None`` without triton."""
    try:
        from graphopt_kernels.quantized import bytes_triton
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("triton"):
            raise
        return None
    return bytes_triton
