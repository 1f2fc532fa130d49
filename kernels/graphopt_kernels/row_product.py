"""A row times a weight, with the norm ahead of it and what follows it.

``graphopt::row_product`` is what a token's step consists of, where one sequence decodes: RMSNorm, a product,
a gate of its halves or a residual that is added. The row is small, the weight is read once, and every kernel
of its own in between would wait for memory that lies idle meanwhile. On a GPU one kernel does all: for a
weight of numbers or of bytes in floats (``quantized.bytes_triton.row_kernel``), for one of int4 in integers
(``quantized.row_digits_triton``), which int8 may as well; elsewhere, and for several rows, ATen operators do.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch

from graphopt.candidate import Reason
from graphopt_kernels.quantized.group_products import GROUPS, half_of, int4_weight, unpacked_reference
from graphopt_kernels.quantized.settled import ahead_of, reads_early
from graphopt_kernels.tuning.lookup import Choice

__all__ = [
    "GATES", "ROW_PRODUCTS", "RowKernels", "RowLaunch", "RowProblem", "check_row_launch",
    "launch_row_product", "row_kernels", "row_launch", "row_launches", "row_problem", "row_product",
    "row_product_reference", "row_product_supports",
]  # fmt: skip

GATES = ("", "silu", "gelu", "gelu_tanh")
"""Functions of the first half of the results, which is multiplied by the other."""

_CODES = (torch.int8, torch.float8_e4m3fn)
_HALVES = (torch.bfloat16, torch.float16)
_FLOATS = (*_HALVES, torch.float32)
_LANES = 32
_VECTOR = 16
_HELD = 256
"""Bytes of codes that a lane holds of a step: 64 registers, and as many of the next."""

_PLACE = 32 * _VECTOR * 8
"""Bits of a row that a warp multiplies by digits at a time."""

_MANY = 8192
"""Results from which on programs of 16 rows are enough to go round."""

_FEW = 4096
"""Results up to which more warps share a row, as programs are few."""

_LONG = 8192
"""Products of a result from which on a row takes several steps whatever the warps."""

_MOST_ROWS = 16
_WRITTEN_OUT = 16
_STEPS = 14
_MOST = 2048
"""Numbers of x in a step: a lane has 64 of them in registers."""


class RowProblem(NamedTuple):
    """``columns`` results of ``inner`` products each; ``dtype`` of x, ``codes`` of the weight, ``group``: how
    many of int4's share a scale."""

    columns: int
    inner: int
    dtype: torch.dtype
    codes: torch.dtype
    normed: bool
    gated: bool
    group: int = 0

    @property
    def bits(self) -> int:
        return 4 if self.codes is torch.uint8 else 8 * self.codes.itemsize


class RowLaunch(NamedTuple):
    """A program reads ``rows`` of the weight, ``inner`` numbers of each at a time, by ``warps``. ``kind``:
    ``floats``, where warps share the rows, or ``digits``, where they share a row's products."""

    rows: int
    inner: int
    warps: int
    kind: str = "floats"


class RowKernels(NamedTuple):
    """The jitted kernels of either kind of launch."""

    row_kernel: Any
    row_digits_kernel: Any


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

    ``weight`` [N, K] of the dtype of x, or int8 or float8_e4m3fn with ``scales`` float32[N], or codes and
    words of int4 (``quantized.int4``): uint8[N, K / 2] with int32[N, K / group]. ``normed``: x is
    divided by its root mean square, ``eps`` added to the mean of squares, and multiplied by ``norm`` [K] plus
    ``offset`` where there is one. ``gate``: with ``weight`` [2 N, K] the results are a function (one of
    ``GATES``) of the first half times the other. ``bias`` is as long as the weight, ``added`` [..., N]. All
    is computed in float32 and rounded once. There is no gradient.
    """
    found = _kernels(x, weight, scales)
    if found is None:
        return row_product_reference(x, weight, scales, bias, norm, normed, eps, offset, added, gate)
    problem = row_problem(x, weight, scales, normed, gate)
    launch = ROW_PRODUCTS(problem, weight.device)
    return launch_row_product(
        found, problem, launch, x, weight, scales, bias, norm, eps, offset, added, gate
    )


def row_problem(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None, normed: bool, gate: str
) -> RowProblem:
    inner, columns = x.shape[-1], weight.shape[0] // (2 if gate else 1)
    group = inner // scales.shape[1] if scales is not None and weight.dtype is torch.uint8 else 0
    return RowProblem(columns, inner, x.dtype, weight.dtype, normed, bool(gate), group)


def launch_row_product(
    kernels: RowKernels,
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
    """``row_product`` of one row as ``launch`` says."""
    n, k = problem.columns, problem.inner
    result = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    row = x.reshape(k).contiguous()
    steps = -(-k // launch.inner)
    even = steps * launch.inner == k
    held = launch.rows // 2 if gate else launch.rows
    read = [weight] if scales is None else [weight, scales]
    # Asked of each: the first kernel to read one waits.
    early = sum(map(reads_early, read)) == len(read)
    digits = launch.kind == "digits"
    given = (
        row, weight.view(torch.int32) if digits else weight, row if scales is None else scales,
        row if bias is None else bias, row if norm is None else norm,
        row if added is None else added.contiguous(), result, n, k,
    )  # fmt: skip
    constants: dict[str, Any] = {
        "BIASED": bias is not None, "NORMED": problem.normed, "WEIGHED": norm is not None,
        "ADDED": added is not None, "GATE": gate, "EVEN": even, "FAST": weight.is_cuda or weight.is_meta,
        "BLOCK_N": launch.rows, "WARPS": launch.warps, "num_warps": launch.warps, "EARLY": early,
    }  # fmt: skip
    if early:
        constants["launch_pdl"] = True
    with torch.cuda.device(weight.device) if weight.is_cuda else contextlib.nullcontext():
        if digits:
            groups = k // problem.group if problem.group else 1
            kernels.row_digits_kernel[(-(-n // held),)](
                *given, groups, eps, offset, BITS=problem.bits, GROUP=problem.group,
                HALF=half_of(problem.group, k) if problem.group else 0, STEPS=steps, **constants,
            )  # fmt: skip
        else:
            kernels.row_kernel[(-(-n // held), 1)](
                *given, steps, eps, offset, SCALED=scales is not None, PARTS=1,
                AHEAD=ahead_of(steps) if even else 0, BLOCK_K=launch.inner, **constants,
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
    elif weight.dtype is torch.uint8:
        packed = int4_weight(weight, scales, x.shape[-1] // scales.shape[1])
        y = torch.nn.functional.linear(given.float(), unpacked_reference(packed, None, torch.float32))
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
    packed = weight.dtype is torch.uint8
    inner = weight.shape[-1] * (2 if packed else 1)
    if weight.dim() != 2 or not x.dim() or x.shape[-1] != inner:
        held = " bytes of two codes" if packed else ""
        return Reason(f"the weight is {list(weight.shape)}{held}, for rows of {list(x.shape[-1:])}")
    if packed:
        if scales is None or scales.dtype is not torch.int32 or scales.dim() != 2 or not inner:
            return Reason("codes of int4 need words int32[N, K / group]")
        fits = [[weight.shape[0], inner // group] for group in GROUPS if inner % group == 0]
        if list(scales.shape) not in fits:
            expected = " or ".join(map(str, fits)) or "rows of a multiple of 32"
            return Reason(f"words are {list(scales.shape)}: expected {expected}")
    elif weight.dtype not in (_CODES if scales is not None else (x.dtype,)):
        return Reason(f"the weight is {weight.dtype}: takes int8 and float8_e4m3fn with scales, or {x.dtype}")
    if gate not in GATES:
        return Reason(f"gate is {gate!r}: it takes {', '.join(map(repr, GATES))}")
    rows = weight.shape[0]
    if gate and rows % 2:
        return Reason(f"the weight has {rows} rows, which have no halves")
    of_rows = None if packed else scales
    for name, one, size in (("scales", of_rows, rows), ("bias", bias, rows), ("norm", norm, inner)):
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


def _kernels(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None) -> RowKernels | None:
    """The kernels where they take this row, else ``None``: devices before sm_89 do not know float8."""
    if not weight.is_cuda or not weight.is_contiguous() or not weight.numel() or x.numel() != x.shape[-1]:
        return None
    if weight.shape[1] * weight.dtype.itemsize % _VECTOR or weight.data_ptr() % _VECTOR:
        return None
    # Digits leave out more than rows of float32 are precise to.
    if weight.dtype is torch.uint8 and (
        x.dtype not in _HALVES or scales is None or not scales.is_contiguous()
    ):
        return None
    least = (8, 9) if weight.dtype is torch.float8_e4m3fn else (8, 0)
    return row_kernels() if torch.cuda.get_device_capability(weight.device) >= least else None


@functools.cache
def row_kernels() -> RowKernels | None:
    """``None`` without triton."""
    try:
        from graphopt_kernels.quantized import bytes_triton, row_digits_triton
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("triton"):
            raise
        return None
    return RowKernels(bytes_triton.row_kernel, row_digits_triton.row_digits_kernel)


# --- launches -----------------------------------------------------------------------------------


def row_launch(problem: RowProblem) -> RowLaunch:
    """Codes that digits multiply are multiplied so. Of others short rows take two steps, which are on their
    way at once; longer ones small steps, by more warps. benchmarks/gpu_row_product.py measures others."""
    by_digits = _usual_digits(problem)
    if check_row_launch(problem, by_digits) is None:
        return by_digits
    size = problem.codes.itemsize
    unit = _LANES * _VECTOR // size
    rows, inner = 8, problem.inner
    if 2 * unit <= inner <= 2 * _MOST and not inner & (inner - 1):
        if size == 1 and inner > 2 * unit:
            return RowLaunch(16 if problem.columns > _FEW else 8, inner // 4, 4)
        return RowLaunch(rows, inner // 2, 4)
    steps = 1024
    while steps > unit and inner % steps:
        steps //= 2
    return RowLaunch(16, max(unit, steps), 8) if size == 1 else RowLaunch(rows, max(unit, steps), 4)


def _usual_digits(problem: RowProblem) -> RowLaunch:
    """A few rows of a long weight, in many steps; of a short one as many as leave programs to go round."""
    if problem.inner > _LONG:
        return _by_digits(problem, 4, 2)
    if problem.bits == 4:
        return _by_digits(problem, 16 if problem.columns > _MANY else 8, 4)
    return _by_digits(problem, 16, 4 if problem.columns <= _FEW else 2)


def _by_digits(problem: RowProblem, rows: int, warps: int) -> RowLaunch:
    while -(-problem.inner // (warps * _PLACE // problem.bits)) > _WRITTEN_OUT and warps < 16:
        warps *= 2
    return RowLaunch(rows, warps * _PLACE // problem.bits, warps, "digits")


def row_launches(problem: RowProblem) -> list[RowLaunch]:
    """All that are weighed as the kernel is tuned."""
    by_digits = [_by_digits(problem, rows, warps) for warps in (2, 4, 8) for rows in (4, 8, 16)]
    found = [
        RowLaunch(rows, inner, warps)
        for warps in (4, 8)
        for rows in (8, 16)
        for inner in (512, 1024, 2048)
    ]
    # Steps that are written out take their time to compile.
    few = [launch for launch in found if problem.inner <= _STEPS * launch.inner]
    chosen = dict.fromkeys([row_launch(problem), *few, *by_digits])
    return [launch for launch in chosen if check_row_launch(problem, launch) is None]


def check_row_launch(problem: RowProblem, launch: RowLaunch) -> Reason | None:
    """``None``, or why ``launch`` would not compute ``problem``."""
    size = problem.codes.itemsize
    if any(value < 1 or value & (value - 1) for value in launch[:3]):
        return Reason("sizes are powers of two")
    if launch.kind == "digits":
        return _check_digits(problem, launch)
    if launch.kind != "floats" or problem.bits == 4:
        takes = "digits" if problem.bits == 4 else "floats or digits"
        return Reason(f"kind is {launch.kind!r}: a weight of {problem.codes} takes {takes}")
    if launch.inner * size < _LANES * _VECTOR:
        return Reason(f"a warp reads {_LANES * _VECTOR} bytes of a row or more")
    if launch.rows < launch.warps * (2 if problem.gated else 1):
        return Reason("every warp has a row, and both rows of a gate")
    if launch.inner > _MOST or launch.rows // launch.warps * launch.inner * size > _LANES * _HELD:
        return Reason("what a lane has on its way does not fit its registers")
    return None


def _check_digits(problem: RowProblem, launch: RowLaunch) -> Reason | None:
    if problem.codes not in (torch.uint8, torch.int8) or problem.dtype not in _HALVES:
        return Reason("digits are for int4 and int8, and rows of bfloat16 and float16")
    if problem.inner * problem.bits % (8 * _VECTOR):
        return Reason(f"rows of the weight do not begin on {_VECTOR} bytes")
    if launch.inner * problem.bits != launch.warps * _PLACE:
        return Reason(f"a step is {_PLACE // 8} bytes of a row for each warp")
    if launch.rows < (2 if problem.gated else 1):
        return Reason("a program has both rows of a gate")
    if launch.rows > _MOST_ROWS:
        return Reason("what a lane has on its way does not fit its registers")
    if -(-problem.inner // launch.inner) > _WRITTEN_OUT:
        return Reason(f"more than {_WRITTEN_OUT} steps are not written out")
    return None


ROW_PRODUCTS = Choice(
    "row-product",
    ("graphopt_kernels.quantized.bytes_triton", "graphopt_kernels.quantized.row_digits_triton"),
    row_launch,
    check_row_launch,
)
