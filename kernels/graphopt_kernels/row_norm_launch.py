"""How the kernels of norms of rows are started: tiles, launches for a problem, what they must not be.

A row stays in the registers of one program between its statistics and their use. The backward's sums over
rows are kept by each program and added up by a second small kernel.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from graphopt.candidate import Reason
from graphopt_kernels.row_norm_reference import empty_gradients, empty_statistics
from graphopt_kernels.tuning.lookup import Choice, rows_class

__all__ = [
    "BACKWARD",
    "FORWARD",
    "WIDEST",
    "BackwardProblem",
    "ForwardProblem",
    "Launch",
    "backward_launch",
    "backward_rows",
    "check_launch",
    "forward_launch",
    "forward_rows",
    "norm_kernels",
    "staged_bytes",
    "tile",
]

WIDEST = 16384
"""Elements of a row that fit the registers of one program."""

_GROUP = 2048
"""Elements that a program works on at a time, where rows are shorter."""

_MANY = 16384
"""Groups of rows from which on more are alike for a launch: some for every program of any device."""

_COLUMNS = 16
_AT_ONCE = 512
"""Programs whose sums are added up at a time: reading them in turn takes longer than adding them."""

_STAGED = 208 * 2**10
"""Bytes of shared memory for rows on their way; sums are exchanged in the rest."""


class Launch(NamedTuple):
    """How a kernel is started. ``block``: elements of a row, rounded up to a power of two; ``rows`` of a
    group; ``programs`` for each multiprocessor (0: one for each group); ``ahead``, ``held`` and, of the
    backward alone, ``stages`` as the kernels say."""

    block: int
    rows: int
    warps: int
    programs: int
    ahead: bool
    held: bool
    stages: int = 1


class ForwardProblem(NamedTuple):
    """What the forward is launched for: ``rows`` by their class (``rows_class``), dtypes of input, result,
    weight and bias (``None``: there is none). Rows always lie one behind the other."""

    rows: int
    width: int
    dtype: torch.dtype
    result: torch.dtype
    weight: torch.dtype | None
    bias: torch.dtype | None
    added: bool
    centered: bool
    rounded: bool


class BackwardProblem(NamedTuple):
    """What the backward is launched for: as ``ForwardProblem``, and which gradients are asked."""

    rows: int
    width: int
    dtype: torch.dtype
    weight: torch.dtype | None
    passed: bool
    centered: bool
    d_input: bool
    d_weight: bool
    d_bias: bool


def forward_launch(problem: ForwardProblem) -> Launch:
    """Measured on an H200: many small programs hide each other's loads best, and need not read ahead."""
    block, rows = tile(problem.width)
    if problem.added and not problem.centered and block == WIDEST:
        return Launch(block, rows, 4, 0, ahead=False, held=False)
    return Launch(block, rows, 4 if block < WIDEST else 8, 0, ahead=False, held=not problem.centered)


def backward_launch(problem: BackwardProblem) -> Launch:
    """Measured on an H200: reading ahead pays until registers run out. LayerNorm's sums leave it no registers
    for that, so its rows wait in shared memory. Beside a third row the longest do best without either
    (benchmarks/results/gpu_sweep_rows.json; beside a third row: gpu_kernels.json)."""
    block, rows = tile(problem.width)
    launch = (_centered_launch if problem.centered else _plain_launch)(problem, block, rows)
    while launch.stages > 1 and staged_bytes(problem, launch) > _STAGED:
        launch = launch._replace(stages=launch.stages - 1)
    return launch


def _plain_launch(problem: BackwardProblem, block: int, rows: int) -> Launch:
    if block <= 2048:
        return Launch(block, rows, 4, 4, True, True)
    if block == 4096:
        return Launch(block, rows, 8, 2, True, True)
    if block == 8192:
        if problem.width <= 6144:
            # Lanes beyond the row would idle: fewer of them, each with more elements.
            return Launch(block, rows, 4, 2, True, True)
        return Launch(block, rows, 16, 1, True, True)
    # Faster by reading ahead, but for that the registers run out.
    warps, stages = (16, 1) if problem.passed else (8, 3)
    return Launch(block, rows, warps, 1, False, False, stages)


def _centered_launch(problem: BackwardProblem, block: int, rows: int) -> Launch:
    if block <= 2048:
        return Launch(block, rows, 8, 3, False, True, 4)
    if block == 4096:
        return Launch(block, rows, 8, 2, False, True, 3)
    if block == 8192:
        return Launch(block, rows, 16 if problem.passed else 8, 1, False, True, 3)
    return Launch(block, rows, 8, 1, False, False, 1 if problem.passed else 3)


def staged_bytes(problem: BackwardProblem, launch: Launch) -> int:
    """Shared memory of rows, and of a weight that is not held, on their way."""
    row = (2 + problem.passed) * launch.rows * problem.dtype.itemsize
    weight = problem.weight.itemsize if problem.weight is not None and not launch.held else 0
    return (launch.stages - 1) * launch.block * (row + weight)


def check_launch(problem: ForwardProblem | BackwardProblem, launch: Launch) -> Reason | None:
    """``None``, or why kernels would not compute the same with ``launch``."""
    block, _ = tile(problem.width)
    if launch.block != block:
        return Reason(f"a block of {launch.block} elements does not hold rows of {problem.width}: {block} do")
    for name, value, most in (("rows", launch.rows, WIDEST), ("warps", launch.warps, 32)):
        if not 1 <= value <= most or value & (value - 1):
            return Reason(f"{value} {name} are no power of two up to {most}")
    if launch.rows * block > WIDEST:
        return Reason(f"{launch.rows} rows of {block} elements do not fit the registers of a program")
    if launch.programs < 0:
        return Reason(f"{launch.programs} programs cannot be launched")
    if not isinstance(problem, BackwardProblem):
        return None if launch.stages == 1 else Reason("the forward has one stage")
    if not launch.programs:
        return Reason("sums over rows need programs that stay")
    if not 1 <= launch.stages <= 8 or (launch.ahead and launch.stages > 1):
        return Reason(f"{launch.stages} stages are not from 1 to 8, or beside rows that are read ahead")
    if (needed := staged_bytes(problem, launch)) > _STAGED:
        return Reason(f"{launch.stages} stages take {needed} bytes of shared memory: {_STAGED} are there")
    return None


_KERNELS = ("graphopt_kernels.row_norm_triton",)
FORWARD = Choice("row-norm-forward", _KERNELS, forward_launch, check_launch)
BACKWARD = Choice("row-norm-backward", _KERNELS, backward_launch, check_launch)


def tile(width: int) -> tuple[int, int]:
    """Elements of a block that holds a row of ``width``, and how many rows a program takes at a time."""
    block = max(16, 1 << (width - 1).bit_length())
    return block, max(1, _GROUP // block)


def forward_rows(
    kernels: Any,
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    centered: bool,
    weight_offset: float,
    rounds_first: bool,
    dtype: torch.dtype,
    *,
    launch: Launch | None = None,
    processors: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``add_row_norm`` (``row_norm`` without a residual) by ``kernels``, the module of the jitted functions;
    ``launch`` and the number of multiprocessors are looked up where they are not given."""
    result = torch.empty(input.shape, dtype=dtype, device=input.device)
    total = torch.empty(input.shape if residual is not None else (0,), dtype=input.dtype, device=input.device)
    mean, rstd = empty_statistics(input, centered)
    if not input.numel():
        return result, total, mean, rstd
    width = input.shape[-1]
    rows = input.numel() // width
    if launch is None:
        problem = ForwardProblem(
            rows_class(rows, _MANY * tile(width)[1]),
            width,
            input.dtype,
            dtype,
            None if weight is None else weight.dtype,
            None if bias is None else bias.dtype,
            residual is not None,
            centered,
            rounds_first,
        )
        launch = FORWARD(problem, input.device)
    data = input.contiguous()
    with _on(input.device):
        kernels.forward_kernel[(_grid(launch, rows, processors or _multiprocessors(input.device)),)](
            data,
            data if residual is None else residual.contiguous(),
            data if weight is None else weight,
            data if bias is None else bias,
            result,
            total,
            mean,
            rstd,
            rows,
            eps,
            weight_offset,
            ADDED=residual is not None,
            CENTERED=centered,
            WEIGHTED=weight is not None,
            BIASED=bias is not None,
            ROUNDED=rounds_first,
            WIDTH=width,
            BLOCK=launch.block,
            ROWS=launch.rows,
            AHEAD=launch.ahead,
            HELD=launch.held,
            num_warps=launch.warps,
        )
    return result, total, mean, rstd


def backward_rows(
    kernels: Any,
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    passed: torch.Tensor | None,
    centered: bool,
    weight_offset: float,
    output_mask: Sequence[bool],
    *,
    launch: Launch | None = None,
    processors: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``row_norm_backward`` by ``kernels``; the rest as in ``forward_rows``."""
    d_input, d_weight, d_bias = empty_gradients(input, weight, bias, output_mask)
    if not input.numel():
        return d_input, d_weight.zero_(), d_bias.zero_()
    width = input.shape[-1]
    rows = input.numel() // width
    has_weight, has_bias = d_weight.numel() > 0, d_bias.numel() > 0
    if launch is None:
        problem = BackwardProblem(
            rows_class(rows, _MANY * tile(width)[1]),
            width,
            input.dtype,
            None if weight is None else weight.dtype,
            passed is not None,
            centered,
            output_mask[0],
            has_weight,
            has_bias,
        )
        launch = BACKWARD(problem, input.device)
    programs = _grid(launch, rows, processors or _multiprocessors(input.device))
    if has_bias and launch.block == WIDEST:
        # Sums for weight and bias do not both fit the registers.
        d_bias = grad.reshape(rows, width).sum(0, dtype=torch.float32).to(d_bias.dtype)
        has_bias = False
    sums = [
        torch.empty((programs if has else 0, width), dtype=torch.float32, device=input.device)
        for has in (has_weight, has_bias)
    ]
    data = input.contiguous()
    with _on(input.device):
        kernels.backward_kernel[(programs,)](
            grad.contiguous(),
            data,
            data if weight is None else weight,
            mean,
            rstd,
            data if passed is None else passed.contiguous(),
            d_input,
            sums[0],
            sums[1],
            rows,
            weight_offset,
            PASSED=passed is not None,
            CENTERED=centered,
            WEIGHTED=weight is not None,
            D_DATA=output_mask[0],
            D_WEIGHT=has_weight,
            D_BIAS=has_bias,
            WIDTH=width,
            BLOCK=launch.block,
            ROWS=launch.rows,
            AHEAD=launch.ahead,
            STAGES=launch.stages,
            HELD=launch.held,
            num_warps=launch.warps,
        )
        if has_weight or has_bias:
            together = min(_AT_ONCE, max(64, 1 << (programs - 1).bit_length()))
            columns = _COLUMNS
            if launch.block == WIDEST:
                # Enough columns for every multiprocessor: wider pieces of fewer rows are read faster.
                together, columns = 64, 2 * _COLUMNS
            kernels.columns_kernel[(-(-width // columns),)](
                sums[0],
                sums[1],
                d_weight,
                d_bias,
                programs,
                D_WEIGHT=has_weight,
                D_BIAS=has_bias,
                WIDTH=width,
                COLUMNS=columns,
                ROWS=together,
                num_warps=max(4, together // 32),
            )
    return d_input, d_weight, d_bias


def _grid(launch: Launch, rows: int, processors: int) -> int:
    groups = -(-rows // launch.rows)
    return min(groups, processors * launch.programs) if launch.programs else groups


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the present device of CUDA; elsewhere (the interpreter, no memory) there is none."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def norm_kernels() -> Any:
    """The module of the jitted kernels, or ``None`` without triton."""
    try:
        from graphopt_kernels import row_norm_triton
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("triton"):
            raise
        return None
    return row_norm_triton
