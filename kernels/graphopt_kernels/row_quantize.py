"""Rows in eight bits, each with a scale of its own, and the norm that comes before them in the same reading.

``graphopt::quantize_rows`` gives for each row of the last dimension::

    scale = max(max(abs(y)) / limit, least)
    code  = y / scale        clamped to [-limit, limit], in float8_e4m3fn, or rounded to even, in int8

(dynamic quantization by row, or token, as in Dettmers et al. 2022, "LLM.int8()", and Micikevicius et al.
2022, "FP8 Formats for Deep Learning"). ``graphopt::row_norm_quantize`` does so with the norm of a row
(``graphopt_kernels.row_norm``), rounded to the dtype that it would have been stored in. A row is read once
and stays in registers: three bytes an element for rows of 16 bits, where the norm alone moves four.

Arithmetic is float32. NaN in a row makes its scale and all of it NaN, infinity its scale infinite and its
finite elements zero, as in separate operators. Neither operator has a gradient.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch

from graphopt.candidate import Reason
from graphopt_kernels.row_norm import row_norm_supports
from graphopt_kernels.row_norm_launch import WIDEST, tile
from graphopt_kernels.row_norm_reference import row_norm_reference

__all__ = [
    "CODES",
    "launch_rows",
    "quantize_reference",
    "quantize_rows",
    "quantize_scaled_rows",
    "quantize_supports",
    "row_norm_quantize",
    "row_norm_quantize_reference",
    "row_norm_quantize_supports",
    "warps_and_registers",
]

CODES = (torch.float8_e4m3fn, torch.int8)
_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_TINY = 1e-30
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Rows = tuple[torch.Tensor, torch.Tensor]


@torch.library.custom_op("graphopt::quantize_rows", mutates_args=())
def quantize_rows(
    input: torch.Tensor, codes: torch.dtype, limit: float, least: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``input`` [..., D] in ``codes`` (float8_e4m3fn or int8), and a float32 scale a row [..., 1]."""
    if (kernels := _kernels_for(input)) is not None:
        return launch_rows(kernels, input, None, codes, limit, least)
    return quantize_reference(input, codes, limit, least)


@quantize_rows.register_fake
def _(
    input: torch.Tensor, codes: torch.dtype, limit: float, least: float
) -> tuple[torch.Tensor, torch.Tensor]:
    reason = quantize_supports(input, codes, limit, least)
    if reason is not None:
        raise ValueError(f"quantize_rows: {reason}")
    return _empty(input, codes)


@torch.library.custom_op("graphopt::row_norm_quantize", mutates_args=())
def row_norm_quantize(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    centered: bool,
    weight_offset: float,
    rounds_first: bool,
    dtype: torch.dtype,
    codes: torch.dtype,
    limit: float,
    least: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``quantize_rows`` of what ``graphopt::row_norm`` gives for the arguments before ``codes``."""
    if (kernels := _kernels_for(input)) is not None:
        norm = (weight, bias, eps, centered, weight_offset, rounds_first, dtype)
        return launch_rows(kernels, input, norm, codes, limit, least)
    return row_norm_quantize_reference(
        input, weight, bias, eps, centered, weight_offset, rounds_first, dtype, codes, limit, least
    )


@row_norm_quantize.register_fake
def _(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    centered: bool,
    weight_offset: float,
    rounds_first: bool,
    dtype: torch.dtype,
    codes: torch.dtype,
    limit: float,
    least: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    reason = row_norm_quantize_supports(
        input, weight, bias, eps, centered, weight_offset, rounds_first, dtype, codes, limit, least
    )
    if reason is not None:
        raise ValueError(f"row_norm_quantize: {reason}")
    return _empty(input, codes)


def _empty(input: torch.Tensor, codes: torch.dtype) -> Rows:
    scale = input.new_empty((*input.shape[:-1], 1), dtype=torch.float32)
    return input.new_empty(input.shape, dtype=codes), scale


def launch_rows(
    kernels: Any,
    input: torch.Tensor,
    norm: tuple[Any, ...] | None,
    codes: torch.dtype,
    limit: float,
    least: float,
    *,
    factors: torch.Tensor | None = None,
    block: int | None = None,
    rows: int | None = None,
    started: dict[str, Any] | None = None,
) -> Rows:
    """Both operators by ``kernels``, the module of the jitted function; ``norm`` are the arguments of
    ``row_norm`` behind the input. ``factors`` float32[D]: what columns are multiplied by first, in float32,
    where there is no norm. ``rows`` of ``block`` elements a program, which is ``started`` as
    ``warps_and_registers`` says, chosen where they are not given."""
    result = torch.empty(input.shape, dtype=codes, device=input.device)
    scale = torch.empty((*input.shape[:-1], 1), dtype=torch.float32, device=input.device)
    if not input.numel():
        return quantize_reference(input, codes, limit, least)
    if factors is not None and norm is not None:
        raise ValueError("columns of a norm have weights: factors are for rows without one")
    weight, bias, eps, centered, offset, rounds_first, dtype = norm or (
        None,
        None,
        0.0,
        False,
        0.0,
        False,
        None,
    )
    weight = weight if factors is None else factors
    width = input.shape[-1]
    count = input.numel() // width
    chosen = tile(width)
    block, rows = block or chosen[0], rows or chosen[1]
    data = input.contiguous()
    with torch.cuda.device(input.device) if input.is_cuda else contextlib.nullcontext():
        kernels.quantize_kernel[(-(-count // rows),)](
            data,
            data if weight is None else weight,
            data if bias is None else bias,
            result,
            scale,
            count,
            eps,
            offset,
            limit,
            least,
            NORMALIZED=norm is not None,
            CENTERED=centered,
            WEIGHTED=weight is not None,
            BIASED=bias is not None,
            ROUNDED=rounds_first,
            OFFSET=offset != 0,
            DTYPE=kernels.DTYPES[dtype or input.dtype],
            WHOLE=codes is torch.int8,
            CLAMPED=limit != _LARGEST and (codes is not torch.int8 or limit != int(limit)),
            TINY=least < _TINY,
            WIDTH=width,
            BLOCK=block,
            ROWS=rows,
            **(started or warps_and_registers(block, norm is not None and not centered)),
        )
    return result, scale


def warps_and_registers(block: int, fits: bool) -> dict[str, Any]:
    """Of a program for rows of ``block`` elements, measured on an H200
    (benchmarks/results/gpu_sweep_rows.json). Left alone, the assembler would give long rows so many registers
    that a multiprocessor holds one program, and nothing hides its loads: what ``fits`` fewer without a spill,
    an RMSNorm, gets fewer."""
    if block < WIDEST // 2:
        return {"num_warps": 4}
    if fits:
        return {"num_warps": 8, "maxnreg": 96}
    return {"num_warps": 4 if block < WIDEST else 8}


def _kernels_for(input: torch.Tensor) -> Any:
    """The kernels where they take rows of ``input``, else ``None``. Devices before sm_89 have no instruction
    that makes float8 of float32."""
    if not input.is_cuda or input.dtype not in _DTYPES or input.shape[-1] > WIDEST:
        return None
    return _kernels() if torch.cuda.get_device_capability(input.device) >= (8, 9) else None


@functools.cache
def _kernels() -> Any:
    """The module of the jitted kernel, or ``None`` without triton."""
    try:
        from graphopt_kernels import row_quantize_triton
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("triton"):
            raise
        return None
    return row_quantize_triton


# --- what is taken -----------------------------------------------------------------------------


def quantize_supports(input: torch.Tensor, codes: torch.dtype, limit: float, least: float) -> Reason | None:
    """``None``, or why the operator does not take these arguments."""
    if not input.dim():
        return Reason("takes rows, got a number")
    if input.dtype not in _DTYPES:
        return Reason(f"takes rows of 16 or 32 bits, got {input.dtype}")
    if codes not in CODES:
        return Reason(f"quantizes to {' or '.join(map(str, CODES))}, got {codes}")
    most = 127 if codes is torch.int8 else torch.finfo(codes).max
    if not 0 < limit <= most:
        return Reason(f"{codes} holds no numbers up to {limit}: expected a limit above 0, up to {most:g}")
    if not least >= 0:
        return Reason(f"the least scale is {least}: expected 0 or more")
    return None


def row_norm_quantize_supports(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    centered: bool,
    weight_offset: float,
    rounds_first: bool,
    dtype: torch.dtype,
    codes: torch.dtype,
    limit: float,
    least: float,
) -> Reason | None:
    """As ``quantize_supports`` and ``row_norm_supports``."""
    if dtype not in _DTYPES:
        return Reason(f"takes norms of 16 or 32 bits, got {dtype}")
    return row_norm_supports(input, weight, bias) or quantize_supports(input, codes, limit, least)


# --- references --------------------------------------------------------------------------------


def quantize_scaled_rows(
    input: torch.Tensor, factors: torch.Tensor, codes: torch.dtype, limit: float, least: float
) -> Rows:
    """``quantize_rows`` of ``input`` [..., D] times ``factors`` float32[D], a product in float32 that is
    never stored where there is a kernel. No operator: for use within those of others."""
    if (kernels := _kernels_for(input)) is not None:
        return launch_rows(kernels, input, None, codes, limit, least, factors=factors)
    return quantize_reference(input.float() * factors, codes, limit, least)


def quantize_reference(input: torch.Tensor, codes: torch.dtype, limit: float, least: float) -> Rows:
    """What ``quantize_rows`` computes, with ATen operators."""
    y = input.float()
    largest = y.abs().amax(-1, keepdim=True) if y.shape[-1] else y.new_zeros(*y.shape[:-1], 1)
    scale = (largest / limit).clamp(min=least)
    y = y / scale
    y = y.round() if codes is torch.int8 else y
    return y.clamp(-limit, limit).to(codes), scale


def row_norm_quantize_reference(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    centered: bool,
    weight_offset: float,
    rounds_first: bool,
    dtype: torch.dtype,
    codes: torch.dtype,
    limit: float,
    least: float,
) -> Rows:
    """What ``row_norm_quantize`` computes, with ATen operators."""
    norm = (weight, bias, eps, centered, weight_offset, rounds_first, dtype)
    return quantize_reference(row_norm_reference(input, *norm)[0], codes, limit, least)
