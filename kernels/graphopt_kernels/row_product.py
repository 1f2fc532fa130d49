"""A row times a weight, with the norm ahead of it and what follows it.

``graphopt::row_product`` is what a token's step consists of, where one sequence decodes: RMSNorm, a product,
a gate of its halves or a residual that is added. The row is small, the weight is read once, and every kernel
of its own in between would wait for memory that lies idle meanwhile. On a GPU one kernel does all for a
weight of numbers or of bytes (``quantized.bytes_triton.row_kernel``); elsewhere, and for several rows, ATen
operators do.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch

from graphopt.candidate import Reason
from graphopt_kernels.quantized.settled import reads_early
from graphopt_kernels.tuning.lookup import Choice

__all__ = [
    "GATES", "ROW_PRODUCTS", "RowLaunch", "RowProblem", "check_row_launch", "launch_row_product",
    "row_launch", "row_launches", "row_product", "row_product_reference", "row_product_supports",
]  # fmt: skip

GATES = ("", "silu", "gelu", "gelu_tanh")
"""Functions of the first half of the results, which is multiplied by the other."""

_CODES = (torch.int8, torch.float8_e4m3fn)
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_LANES = 32
_VECTOR = 16
_HELD = 256
"""Bytes of codes that a lane holds of a step: 64 registers, and as many of the next."""

_MOST = 2048
"""Numbers of x in a step: a lane has 64 of them in registers."""


class RowProblem(NamedTuple):
    """``columns`` results of ``inner`` products each; ``dtype`` of x, ``codes`` of the weight."""

    columns: int
    inner: int
    dtype: torch.dtype
    codes: torch.dtype
    normed: bool
    gated: bool


class RowLaunch(NamedTuple):
    """A program reads ``rows`` of the weight, ``inner`` numbers of each at a time, by ``warps``."""

    rows: int
    inner: int
    warps: int


def row_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm: torch.Tensor | None,
    normed: bool,
    eps: float,
    offset: float,
    added: torch.Tensor | None,
    gate: str,
) -> torch.Tensor:
    """[..., N] of the dtype of ``x`` [..., K], dense: ``added + gate(norm(x) @ weight.T + bias)``.

    ``weight`` [N, K] of the dtype of x, or int8 or float8_e4m3fn with ``scales`` float32[N]. ``normed``: x is
    divided by its root mean square, ``eps`` added to the mean of squares, and multiplied by ``norm`` [K] plus
    ``offset`` where there is one. ``gate``: with ``weight`` [2 N, K] the results are a function (one of
    ``GATES``) of the first half times the other. ``bias`` is as long as the weight, ``added`` [..., N]. All
    is computed in float32 and rounded once. There is no gradient.
    """
    found = _kernels(x, weight, norm, added)
    if found is None:
        return row_product_reference(x, weight, scales, bias, norm, normed, eps, offset, added, gate)
    half = 2 if gate else 1
    problem = RowProblem(weight.shape[0] // half, weight.shape[1], x.dtype, weight.dtype, normed, bool(gate))
    launch = ROW_PRODUCTS(problem, weight.device)
    return launch_row_product(
        found, problem, launch, x, weight, scales, bias, norm, eps, offset, added, gate
    )


def launch_row_product(
    module: Any,
    problem: RowProblem,
    launch: RowLaunch,
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm: torch.Tensor | None,
    eps: float,
    offset: float,
    added: torch.Tensor | None,
    gate: str,
) -> torch.Tensor:
    """``row_product`` of one row as ``launch`` says, by the kernels of ``module``."""
    n, k = problem.columns, problem.inner
    result = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    row = x.reshape(k).contiguous()
    steps = -(-k // launch.inner)
    even = steps * launch.inner == k
    held = launch.rows // 2 if gate else launch.rows
    early = {"EARLY": True, "launch_pdl": True} if reads_early(weight) else {"EARLY": False}
    with torch.cuda.device(weight.device) if weight.is_cuda else contextlib.nullcontext():
        module.row_kernel[(-(-n // held), 1)](
            row, weight, row if scales is None else scales, row if bias is None else bias,
            row if norm is None else norm, row if added is None else added.contiguous(), result, n, k, steps,
            eps, offset, SCALED=scales is not None, BIASED=bias is not None, NORMED=problem.normed,
            WEIGHED=norm is not None, ADDED=added is not None, GATE=gate, PARTS=1, EVEN=even,
            AHEAD=even and steps > 1, FAST=weight.is_cuda or weight.is_meta, BLOCK_N=launch.rows,
            BLOCK_K=launch.inner, WARPS=launch.warps, num_warps=launch.warps, **early,
        )  # fmt: skip
    return result


def row_product_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm: torch.Tensor | None,
    normed: bool,
    eps: float,
    offset: float,
    added: torch.Tensor | None,
    gate: str,
) -> torch.Tensor:
    """What ``row_product`` computes, with ATen operators, for any number of rows. Weights of the dtype of x
    are multiplied by rows of that dtype, where a kernel rounds once, at the end."""
    given = x
    if normed:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        given = (wide if norm is None else wide * (norm.float() + offset)).to(x.dtype)
    if scales is None:
        y = torch.nn.functional.linear(given, weight).float()
    else:
        y = torch.nn.functional.linear(given.float(), weight.float()) * scales
    if bias is not None:
        y = y + bias.float()
    if gate:
        first, second = y.chunk(2, -1)
        y = _gate_of(first, gate) * second
    if added is not None:
        y = y + added.float()
    return y.to(x.dtype).contiguous()


def _gate_of(x: torch.Tensor, gate: str) -> torch.Tensor:
    if gate == "silu":
        return torch.nn.functional.silu(x)
    return torch.nn.functional.gelu(x, approximate="tanh" if gate == "gelu_tanh" else "none")


def row_product_supports(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm: torch.Tensor | None,
    normed: bool,
    eps: float,
    offset: float,
    added: torch.Tensor | None,
    gate: str,
) -> Reason | None:
    """``None``, or why the operator does not take these arguments."""
    if x.dtype not in _FLOATS:
        return Reason(f"takes rows of float32, float16 and bfloat16, got {x.dtype}")
    if weight.dim() != 2 or not x.dim() or x.shape[-1] != weight.shape[1]:
        return Reason(f"the weight is {list(weight.shape)}, for rows of {list(x.shape[-1:])}")
    if weight.dtype not in (_CODES if scales is not None else (x.dtype,)):
        return Reason(f"the weight is {weight.dtype}: takes int8 and float8_e4m3fn with scales, or {x.dtype}")
    if gate not in GATES:
        return Reason(f"gate is {gate!r}: it takes {', '.join(map(repr, GATES))}")
    rows = weight.shape[0]
    if gate and rows % 2:
        return Reason(f"the weight has {rows} rows, which have no halves")
    for name, one, size in (("scales", scales, rows), ("bias", bias, rows), ("norm", norm, weight.shape[1])):
        if one is not None and tuple(one.shape) != (size,):
            return Reason(f"{name} is {list(one.shape)}: expected [{size}]")
    if norm is not None and not normed:
        return Reason("norm is given, and normed is False")
    columns = rows // 2 if gate else rows
    if added is not None and (added.shape[:-1] != x.shape[:-1] or added.shape[-1] != columns):
        return Reason(f"added is {list(added.shape)}: expected {[*x.shape[:-1], columns]}")
    return None


_operator = torch.library.custom_op(
    "graphopt::row_product",
    row_product,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? scales, Tensor? bias, Tensor? norm, bool normed, float eps, "
    "float offset, Tensor? added, str gate) -> Tensor",
)


@_operator.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm: torch.Tensor | None,
    normed: bool,
    eps: float,
    offset: float,
    added: torch.Tensor | None,
    gate: str,
) -> torch.Tensor:
    reason = row_product_supports(x, weight, scales, bias, norm, normed, eps, offset, added, gate)
    if reason is not None:
        raise ValueError(f"row_product: {reason}")
    return x.new_empty((*x.shape[:-1], weight.shape[0] // (2 if gate else 1)))


def _kernels(
    x: torch.Tensor, weight: torch.Tensor, norm: torch.Tensor | None, added: torch.Tensor | None
) -> Any:
    """The kernels where they take this row, else ``None``: devices before sm_89 do not know float8."""
    if not weight.is_cuda or not weight.is_contiguous() or x.numel() != weight.shape[1] or not weight.numel():
        return None
    if weight.shape[1] * weight.dtype.itemsize % _VECTOR or weight.data_ptr() % _VECTOR:
        return None
    least = (8, 9) if weight.dtype is torch.float8_e4m3fn else (8, 0)
    return _module() if torch.cuda.get_device_capability(weight.device) >= least else None


@functools.cache
def _module() -> Any:
    """The module of the jitted kernels, or ``None`` without triton."""
    try:
        from graphopt_kernels.quantized import bytes_triton
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("triton"):
            raise
        return None
    return bytes_triton


# --- launches -----------------------------------------------------------------------------------


def row_launch(problem: RowProblem) -> RowLaunch:
    """Short rows take two steps, which are on their way at once; longer ones small steps, by more warps.
    Source: benchmarks/results/gpu_row_product.json."""
    size = problem.codes.itemsize
    unit = _LANES * _VECTOR // size
    rows, inner = 8, problem.inner
    if 2 * unit <= inner <= 2 * _MOST and not inner & (inner - 1):
        return RowLaunch(rows, inner // 2, 4)
    steps = 1024
    while steps > unit and inner % steps:
        steps //= 2
    return RowLaunch(16, max(unit, steps), 8) if size == 1 else RowLaunch(rows, max(unit, steps), 4)


def row_launches(problem: RowProblem) -> list[RowLaunch]:
    """All that are weighed as the kernel is tuned."""
    found = [
        RowLaunch(rows, inner, warps)
        for warps in (4, 8)
        for rows in (8, 16, 32)
        for inner in (256, 512, 1024, 2048)
    ]
    return [launch for launch in found if check_row_launch(problem, launch) is None]


def check_row_launch(problem: RowProblem, launch: RowLaunch) -> Reason | None:
    """``None``, or why ``launch`` would not compute ``problem``."""
    size = problem.codes.itemsize
    if any(value < 1 or value & (value - 1) for value in launch):
        return Reason("sizes are powers of two")
    if launch.inner * size < _LANES * _VECTOR:
        return Reason(f"a warp reads {_LANES * _VECTOR} bytes of a row or more")
    if launch.rows < launch.warps * (2 if problem.gated else 1):
        return Reason("every warp has a row, and both rows of a gate")
    if launch.inner > _MOST or launch.rows // launch.warps * launch.inner * size > _LANES * _HELD:
        return Reason("what a lane has on its way does not fit its registers")
    return None


ROW_PRODUCTS = Choice(
    "row-product", ("graphopt_kernels.quantized.bytes_triton",), row_launch, check_row_launch
)
