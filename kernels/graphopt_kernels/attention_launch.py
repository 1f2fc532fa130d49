"""How the kernels of ``graphopt_kernels.attention`` are started: tiles, strides, grids.

Tiles are those that tuning found for a problem on the device, else a default by rule (``tuning.lookup``).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from graphopt.candidate import Reason
from graphopt_kernels.attention_reference import gradient_buffers, result_buffers
from graphopt_kernels.philox import cut_of
from graphopt_kernels.tuning.lookup import Choice, rows_class

__all__ = [
    "BIAS",
    "FORWARD",
    "KEYS",
    "QUERIES",
    "WIDEST",
    "WIDEST_FLOAT32",
    "AttentionProblem",
    "Launch",
    "backward",
    "backward_into",
    "bias_launch",
    "check_launch",
    "forward",
    "forward_into",
    "forward_launch",
    "jitted",
    "kernels_for",
    "kernels_take",
    "keys_launch",
    "queries_launch",
    "rows_together",
]

WIDEST = 256
"""Elements of a head that the registers of a program have room for, in 16 bits."""

WIDEST_FLOAT32 = 128


class Launch(NamedTuple):
    """How a kernel is started: ``rows`` of queries and ``columns`` of keys of a tile, warps of a program, and
    ``stages``: tiles that are on their way at a time."""

    rows: int
    columns: int
    warps: int
    stages: int


class AttentionProblem(NamedTuple):
    """What a launch is for: ``heads`` of queries over batches, ``group`` of them for each of the keys, the
    lengths of both, widths of heads, whether scores are biased and capped, how many keys behind it a query
    sees in a ``window`` (0: all), whether what it sees ahead is bounded (``causal``), and whether weights are
    dropped."""

    heads: int
    group: int
    rows: int
    columns: int
    width: int
    value_width: int
    dtype: torch.dtype
    biased: bool
    capped: bool
    window: int
    causal: bool
    drops: bool = False

    @property
    def size(self) -> tuple[int, int, bool, bool, bool]:
        """What the rules for launches go by."""
        widest = _block(max(self.width, self.value_width))
        return widest, self.dtype.itemsize, self.biased, self.capped, self.drops


_MOST_HEADS, _MOST_LENGTH = 256, 8192

LEAST_DROPPED = 1024
"""Weights of a tile where some are dropped: with 16 queries and 32 keys, masked, gradients of keys were wrong
on an H200 (triton 3.6), in any number of warps and stages, while the interpreter has them right."""


def check_launch(problem: AttentionProblem, launch: Launch) -> Reason | None:
    """``None``, or why the kernels cannot be started so."""
    for name, size in (("rows", launch.rows), ("columns", launch.columns), ("warps", launch.warps)):
        if size < 1 or size & (size - 1):
            return Reason(f"{name} is {size}: expected a power of two")
    if min(launch.rows, launch.columns) < 16 or launch.warps > 16 or launch.stages < 1:
        return Reason("tiles are of 16 rows and columns or more, of up to 16 warps and one stage or more")
    if problem.drops and launch.rows * launch.columns < LEAST_DROPPED:
        return Reason(f"weights are dropped {LEAST_DROPPED} or more at a time")
    return None


def forward_launch(width: int, itemsize: int, biased: bool, capped: bool, drops: bool = False) -> Launch:
    """For heads of up to ``width`` elements of ``itemsize`` bytes, a power of two. Where scores are both
    capped and biased, or either beside dropout, registers are fewest."""
    full = _fills_registers(biased, capped, drops)
    if itemsize == 4:
        # Products of float32 are three of tensor cores each: tiles are small.
        return Launch(32, 16, 4, 2) if width > 64 else Launch(32 if biased else 64, 32, 4, 2)
    if width <= 64:
        return Launch(128, 64 if biased else 128, 8, 3)
    if width <= 128:
        return Launch(128, 32 if full else 64, 8, 3)
    if drops:
        return Launch(64, 16, 8, 2) if full else Launch(128, 32, 8, 3)
    return Launch(64 if full else 128, 32, 8, 2)


def keys_launch(width: int, itemsize: int, biased: bool, capped: bool, drops: bool = False) -> Launch:
    """Programs that hold ``columns`` keys and go along the queries."""
    full = _fills_registers(biased, capped, drops)
    if itemsize == 4:
        return Launch(16, 32, 4, 2) if width <= 64 else Launch(16, 16, 4, 1)
    if width <= 64:
        return Launch(32, 128, 8, 3) if full else Launch(64, 128, 8, 2)
    if width <= 128:
        return Launch(32, 64 if biased and drops else 128, 8, 3)
    if drops:
        return Launch(32, 32, 8, 2) if full else Launch(16, 64, 8, 2)
    return Launch(16 if biased else 32, 64, 8, 2)


def queries_launch(width: int, itemsize: int, biased: bool, capped: bool, drops: bool = False) -> Launch:
    """Programs that hold ``rows`` queries and go along the keys."""
    full = _fills_registers(biased, capped, drops)
    if itemsize == 4:
        return Launch(32, 16, 4, 2) if width <= 64 else Launch(16, 32, 8, 1)
    if width <= 64:
        return Launch(128, 64, 8, 3)
    if width <= 128:
        return Launch(128, 32, 8, 3) if full else Launch(128, 64, 8, 2)
    if drops:
        return Launch(32, 32, 8, 2) if full else Launch(128, 16, 8, 2)
    return Launch(64, 16, 8, 2) if full else Launch(128, 32, 8, 2)


def _fills_registers(biased: bool, capped: bool, drops: bool) -> bool:
    return biased + capped + drops >= 2


def bias_launch(width: int, itemsize: int) -> Launch:
    """Programs that hold a tile of the bias and go through what shares it."""
    if itemsize == 4:
        return Launch(32, 16, 4, 1) if width <= 64 else Launch(16, 32, 4, 1)
    if width <= 64:
        return Launch(64, 64, 4, 2)
    return Launch(64, 64, 8, 2) if width <= 128 else Launch(64, 32, 8, 1)


_SHARED = ("graphopt_kernels.attention_triton", "graphopt_kernels.philox_triton")
_BACKWARD = ("graphopt_kernels.attention_backward_triton", *_SHARED)
FORWARD = Choice("attention-forward", _SHARED, lambda p: forward_launch(*p.size), check_launch)
KEYS = Choice("attention-keys", _BACKWARD, lambda p: keys_launch(*p.size), check_launch)
QUERIES = Choice("attention-queries", _BACKWARD, lambda p: queries_launch(*p.size), check_launch)
BIAS = Choice(
    "attention-bias",
    ("graphopt_kernels.attention_bias_triton", *_BACKWARD),
    lambda p: bias_launch(*p.size[:2]),
    check_launch,
)


def kernels_for(query: torch.Tensor, value: torch.Tensor) -> Any:
    """The kernels where they take these heads, else ``None``."""
    if not query.is_cuda or kernels_take(query, value) is not None:
        return None
    return jitted()


def kernels_take(query: torch.Tensor, value: torch.Tensor) -> Reason | None:
    """``None``, or why the kernels do not take heads that the operators take."""
    if query.dtype is torch.float64:
        return Reason("the kernels of attention do not compute in float64")
    widest = WIDEST_FLOAT32 if query.dtype is torch.float32 else WIDEST
    width = max(query.shape[-1], value.shape[-1])
    if width > widest:
        return Reason(f"heads of {width} elements do not fit the registers: at most {widest} do")
    return None


@functools.cache
def jitted() -> Any:
    """The jitted kernels by name, or ``None`` without triton."""
    try:
        from graphopt_kernels import attention_backward_triton, attention_bias_triton, attention_triton
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("triton"):
            raise
        return None
    return SimpleNamespace(
        forward=attention_triton.forward_kernel,
        rows=attention_backward_triton.rows_kernel,
        keys=attention_backward_triton.keys_kernel,
        queries=attention_backward_triton.queries_kernel,
        bias=attention_bias_triton.bias_kernel,
    )


class _Problem:
    """What all kernels of a call are told."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        scale: float,
        softcap: float,
        left: int | None,
        right: int | None,
        dropout_p: float,
        seed: torch.Tensor | None,
    ) -> None:
        self.query, self.key, self.value = (rows_together(x) for x in (query, key, value))
        self.batch, self.heads, self.rows, self.width = query.shape
        self.few, self.columns, self.value_width = key.shape[1], key.shape[2], value.shape[3]
        # Without one the kernels do not look at it.
        self.bias = self.query if bias is None else bias.expand(*query.shape[:3], key.shape[2])
        self.bias_strides = (0, 0, 0, 0) if bias is None else self.bias.stride()
        drops = dropout_p != 0.0
        self.seed = seed if drops and seed is not None else self.query
        # Bounds beyond the last key or the first hide nothing, and kernels take 32 bits.
        far = self.rows + self.columns
        self.left = None if left is None or left >= self.rows - 1 else max(left, -far)
        self.right = None if right is None or right >= self.columns - 1 else max(right, -far)
        self.tuned = AttentionProblem(
            rows_class(self.batch * self.heads, _MOST_HEADS),
            self.heads // self.few,
            rows_class(self.rows, _MOST_LENGTH),
            rows_class(self.columns, _MOST_LENGTH),
            self.width,
            self.value_width,
            query.dtype,
            bias is not None,
            softcap != 0.0,
            0 if self.left is None else rows_class(max(self.left, 0) + 1, _MOST_LENGTH),
            self.right is not None,
            drops,
        )
        dropping = (cut_of(dropout_p), 1.0 / (1.0 - dropout_p))
        self.numbers = (scale, softcap, self.left or 0, self.right or 0, *dropping)
        self.sizes = (self.heads, self.heads // self.few, self.rows, self.columns)
        self.flags: dict[str, Any] = {
            "DROPS": drops,
            "CAPPED": softcap != 0.0,
            "APPROXIMATE": query.dtype is torch.bfloat16,
            "LEFT": self.left is not None,
            "RIGHT": self.right is not None,
            "WIDTH": self.width,
            "VALUE_WIDTH": self.value_width,
            "BLOCK_D": _block(self.width),
            "BLOCK_V": _block(self.value_width),
            "PRECISION": _precision(),
        }
        boolean = bias is not None and bias.dtype is torch.bool
        self.bias_flags = {
            "BIAS": 0 if bias is None else 2 if boolean else 1,
            "BY_ROW": self.bias_strides[2] != 0,
        }

    @property
    def operands(self) -> tuple[torch.Tensor, ...]:
        return self.query, self.key, self.value, self.bias, self.seed

    @property
    def strides(self) -> tuple[int, ...]:
        inner = (stride for x in (self.query, self.key, self.value) for stride in x.stride()[:3])
        return *inner, *self.bias_strides


def forward(
    kernels: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
    left: int | None,
    right: int | None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    *,
    launch: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``graphopt::attention`` by its kernel. ``launch``: in place of the one for the problem."""
    results = result_buffers(query, value)
    if results[0].numel():
        settings = (scale, softcap, left, right, dropout_p, seed)
        forward_into(kernels, results, query, key, value, bias, *settings, launch=launch)
    return results


def forward_into(
    kernels: Any,
    results: tuple[torch.Tensor, torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
    left: int | None,
    right: int | None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    *,
    launch: Launch | None = None,
) -> None:
    """Write ``results``: an output of any strides with the elements of a row together, and a contiguous
    log-sum-exp. Neither is empty."""
    output, lse = results
    problem = _Problem(query, key, value, bias, scale, softcap, left, right, dropout_p, seed)
    launch = launch or FORWARD(problem.tuned, query.device)
    with _on(query):
        kernels.forward[(_blocks(problem.rows, launch.rows) * problem.batch * problem.heads,)](
            *problem.operands,
            output,
            lse,
            *problem.strides,
            *output.stride()[:3],
            *problem.sizes,
            *problem.numbers,
            **problem.flags,
            **problem.bias_flags,
            **_tiles(launch),
        )


def backward(
    kernels: Any,
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    softcap: float,
    left: int | None,
    right: int | None,
    output_mask: Sequence[bool],
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    *,
    launch: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``graphopt::attention_backward`` by its kernels. ``launch``: of each that is asked for, in place of
    those for the problem."""
    found = gradient_buffers(query, key, value, bias, output_mask)
    if not output.numel() or not key.shape[2]:
        for each in found:
            each.zero_()
        return found
    settings = (scale, softcap, left, right)
    given = (grad, query, key, value, bias, output, lse, *settings)
    backward_into(kernels, found, *given, output_mask, dropout_p, seed, launch=launch)
    return found


def backward_into(
    kernels: Any,
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    softcap: float,
    left: int | None,
    right: int | None,
    output_mask: Sequence[bool],
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    *,
    launch: Launch | None = None,
) -> None:
    """Write the gradients ``found`` that ``output_mask`` asks for: of any strides with the elements of a row
    together, that of the bias contiguous. Nothing is empty, and ``lse`` is contiguous."""
    d_query, d_key, d_value, d_bias = found
    problem = _Problem(query, key, value, bias, scale, softcap, left, right, dropout_p, seed)
    grad, output = rows_together(grad), rows_together(output)
    shifts, along = torch.empty_like(lse), torch.empty_like(lse)
    common = (*problem.operands, grad, shifts, along)
    strides = (*problem.strides, *grad.stride()[:3])
    given = {**problem.flags, **problem.bias_flags}
    heads, few = problem.batch * problem.heads, problem.batch * problem.few
    block = problem.flags["BLOCK_V"]
    with _on(query):
        kernels.rows[(_blocks(problem.rows, 32) * heads,)](
            grad,
            output,
            lse,
            shifts,
            along,
            *grad.stride()[:3],
            *output.stride()[:3],
            problem.heads,
            problem.rows,
            VALUE_WIDTH=problem.value_width,
            BLOCK_V=block,
            ROWS=32,
            num_warps=4,
        )
        if output_mask[1] or output_mask[2]:
            # One kernel makes both.
            d_key = d_key if output_mask[1] else gradient_buffers(query, key, value, None, _KEYS)[1]
            d_value = d_value if output_mask[2] else gradient_buffers(query, key, value, None, _KEYS)[2]
            tiles = launch or KEYS(problem.tuned, query.device)
            kernels.keys[(_blocks(problem.columns, tiles.columns) * few,)](
                *common,
                d_key,
                d_value,
                *strides,
                *d_key.stride()[:3],
                *d_value.stride()[:3],
                *problem.sizes,
                *problem.numbers,
                **given,
                **_tiles(tiles),
            )
        if output_mask[0]:
            tiles = launch or QUERIES(problem.tuned, query.device)
            kernels.queries[(_blocks(problem.rows, tiles.rows) * heads,)](
                *common,
                d_query,
                *strides,
                *d_query.stride()[:3],
                *problem.sizes,
                *problem.numbers,
                **given,
                **_tiles(tiles),
            )
        if d_bias.numel():
            tiles = launch or BIAS(problem.tuned, query.device)
            _bias_gradient(kernels.bias, problem, common, strides, d_bias, tiles)


_KEYS = (False, True, True, False)


def _bias_gradient(
    kernel: Any,
    problem: _Problem,
    common: tuple[torch.Tensor, ...],
    strides: tuple[int, ...],
    d_bias: torch.Tensor,
    launch: Launch,
) -> None:
    shape = (1,) * (4 - d_bias.dim()) + tuple(d_bias.shape)
    whole = (problem.batch, problem.heads, problem.rows, problem.columns)
    over = [size == 1 and end != 1 for size, end in zip(shape, whole, strict=True)]
    programs = shape[0] * shape[1]
    programs *= 1 if over[2] else _blocks(problem.rows, launch.rows)
    programs *= 1 if over[3] else _blocks(problem.columns, launch.columns)
    names = ("OVER_BATCHES", "OVER_HEADS", "OVER_ROWS", "OVER_COLUMNS")
    kernel[(programs,)](
        *common,
        d_bias,
        *strides,
        problem.batch,
        *problem.sizes,
        *problem.numbers,
        **dict(zip(names, over, strict=True)),
        **problem.flags,
        **_tiles(launch),
    )


def _on(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Where kernels are started: the device of ``tensor``. Launches that are written down have none."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _tiles(launch: Launch) -> dict[str, int]:
    return {
        "ROWS": launch.rows,
        "COLUMNS": launch.columns,
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }


def _blocks(size: int, step: int) -> int:
    return -(-size // step)


def _block(width: int) -> int:
    """Elements of a tile of heads: tensor cores take 16 and more."""
    return max(16, 1 << (width - 1).bit_length())


def rows_together(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` with the elements of a row one after the other."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _precision() -> str:
    """How products of float32 are computed: by tensor cores, in three parts where torch wants them exact."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
