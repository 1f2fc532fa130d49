"""Products with weights of four bits and fewer in groups: kernels where there are some, else ATen operators.

``product`` and ``unpacked`` are what the operators of ``int4``, ``int3``, ``int2`` and ``nf4`` call.
``GroupWeight`` holds the packed tensors and knows how they are read.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, replace
from typing import Any

import torch

from graphopt_kernels.instructions import has_half_pairs
from graphopt_kernels.quantized.group_launch import (
    LIBRARY,
    GroupLaunch,
    GroupProblem,
    check_launch,
    launch_for,
    steps_of,
    usual_launch,
)
from graphopt_kernels.quantized.nibbles import SCALE, SHORT_SCALE, unpack_nibbles
from graphopt_kernels.quantized.planes import Planes, unit_of, unpack_planes
from graphopt_kernels.tuning.lookup import Choice, rows_class

__all__ = [
    "GROUPS", "GROUP_PRODUCTS", "NF4_LEVELS", "GroupWeight", "half_of", "int4_weight", "kernels",
    "launch_product", "product", "product_reference", "unpacked", "unpacked_reference",
]  # fmt: skip

_BLOCK = 64 * 2**20
"""Bytes of an unpacked weight that are there at a time."""

_MANY = 4096
"""Rows from which on more are alike for a launch."""

GROUPS = (128, 64, 32)
"""How many neighbours may share a scale."""

_RANGED = 256
"""Groups that share a range where scales are codes."""

GROUP_PRODUCTS = Choice(
    "packed-groups",
    ("graphopt_kernels.quantized.groups_triton", "graphopt_kernels.quantized.group_numbers_triton"),
    usual_launch,
    check_launch,
    launch_for,
)

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)

NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of a normal distribution, zero among them: those of QLoRA (https://arxiv.org/abs/2305.14314)."""


@dataclass(frozen=True)
class GroupWeight:
    """A weight [N, ``inner``] in four bits or fewer.

    ``codes`` uint8[N, blocks * ``half``] as ``nibbles`` says. ``words`` are by
    row and group of ``group`` neighbours: int32, the zero in the last seven bits, in eighths of a code and
    below 128, and a scale, float32 without its last eight bits; the bits of a float32 scale for ``levels``;
    or, where there are ``ranges`` float32[N, one for 256 groups], codes uint8 of scales, which are their
    products. ``offsets`` float32[N, groups] are added to numbers times scales.

    With two or three ``bits`` codes are those of four whose lowest bits are 0, in ``planes`` of ``half``
    bytes: ``codes`` is the plane of pairs, ``thirds`` that of thirds. Some units of a row may have all four
    bits: what is missing is in ``extra`` uint8[N, slots * ``half``], and the word of the first group of such
    a unit has, from its bit 7 up, the slot's number, counted from 1; others have 0 there. Where there are
    slots scales are bfloat16.
    """

    codes: torch.Tensor
    words: torch.Tensor
    ranges: torch.Tensor
    inner: int
    group: int
    half: int
    levels: bool
    bits: int = 4
    thirds: torch.Tensor | None = None
    extra: torch.Tensor | None = None
    offsets: torch.Tensor | None = None

    @property
    def double(self) -> bool:
        return self.words.dtype is torch.uint8

    @property
    def slots(self) -> int:
        """Units of a row that have four bits though others have fewer."""
        return 0 if self.extra is None else self.extra.shape[1] // self.half

    @property
    def scale_bits(self) -> int:
        """Bits of a word that are the scale."""
        return SHORT_SCALE if self.slots else SCALE

    def rows(self, some: slice) -> GroupWeight:
        """Some of the rows."""
        return replace(
            self,
            codes=self.codes[some],
            words=self.words[some],
            ranges=self.ranges[some] if self.double else self.ranges,
            thirds=None if self.thirds is None else self.thirds[some],
            extra=None if self.extra is None else self.extra[some],
            offsets=None if self.offsets is None else self.offsets[some],
        )

    def problem(self, rows: int, dtype: torch.dtype) -> GroupProblem:
        """Of a product with ``rows`` rows of ``dtype``."""
        return GroupProblem(
            rows, self.codes.shape[0], self.inner, dtype, self.group, self.half, self.levels, self.double,
            self.bits, self.slots,
        )  # fmt: skip


def half_of(group: int, k: int) -> int:
    """Bytes of a block of codes of a row of ``k``: 64; 32 where that takes fewer, or groups are 32."""
    return 32 if group == 32 or k % 128 else 64


def int4_weight(codes: torch.Tensor, words: torch.Tensor, group: int) -> GroupWeight:
    """The weight that they hold."""
    inner = words.shape[1] * group
    return GroupWeight(codes, words, words, inner, group, half_of(group, inner), levels=False)


def product(x: torch.Tensor, weight: GroupWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """``x`` [..., K] times the weight, ``bias`` [N] added: [..., N] of the dtype of x."""
    found = _kernels_for(weight)
    if found is None or not (weight.codes.numel() and x.numel()) or x.dtype not in _FLOATS:
        return product_reference(x, weight, bias)
    rows = x.numel() // weight.inner
    launch = GROUP_PRODUCTS(weight.problem(rows_class(rows, _MANY), x.dtype), weight.codes.device)
    return launch_product(found, launch, x, weight, bias)


def product_reference(x: torch.Tensor, weight: GroupWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """What ``product`` computes, with ATen operators."""
    result = torch.nn.functional.linear(x.float(), unpacked_reference(weight, None, torch.float32))
    return (result if bias is None else result + bias.float()).to(x.dtype)


def unpacked(weight: GroupWeight, factors: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The weight [N, K] of ``dtype``, its columns times ``factors`` float32[K]."""
    found = _kernels_for(weight)
    if found is None or not weight.codes.numel() or dtype not in _FLOATS:
        return unpacked_reference(weight, factors, dtype)
    result = torch.empty((weight.codes.shape[0], weight.inner), dtype=dtype, device=weight.codes.device)
    return launch_unpack(found, weight, factors, result)


def unpacked_reference(weight: GroupWeight, factors: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """What ``unpacked`` computes, with ATen operators."""
    codes = _codes(weight)
    n, groups = weight.words.shape
    grouped = (n, groups, weight.group)
    if weight.levels:
        levels = torch.tensor(NF4_LEVELS, dtype=torch.float32, device=codes.device)
        numbers, scales = levels[codes.int()], _scales(weight)
        wide = numbers.view(grouped) * scales[:, :, None]
    else:
        zeros = (weight.words & 127).float() * 0.125
        wide = codes.float().view(grouped) - zeros[:, :, None]
        wide = wide * _scales(weight)[:, :, None]
    if weight.offsets is not None:
        wide = wide + weight.offsets[:, :, None]
    result = wide.reshape(n, weight.inner)
    return (result if factors is None else result * factors.float()).to(dtype)


def launch_product(
    kernels: Any, launch: GroupLaunch, x: torch.Tensor, weight: GroupWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    """``product`` as ``launch`` says, by ``kernels``, the module of the jitted functions."""
    n, k = weight.codes.shape[0], weight.inner
    shape = (*x.shape[:-1], n)
    x = x.reshape(-1, k).contiguous()
    with _on(weight.codes):
        if launch == LIBRARY:
            return _dense(x, weight, bias).view(shape)
        rows = x.shape[0]
        problem = weight.problem(rows, x.dtype)
        # Offsets are added before the result is rounded.
        kind = x.dtype if weight.offsets is None else torch.float32
        result = torch.empty((rows, n), dtype=kind, device=x.device)
        into = result
        if launch.parts > 1:
            into = torch.empty((launch.parts, rows, n), dtype=torch.float32, device=x.device)
        steps = steps_of(problem, launch)
        constants: dict[str, Any] = {} if launch.kind == "tiles" else {"SLICES": launch.slices}
        kernel = kernels.tile_kernel if launch.kind == "tiles" else kernels.slices_kernel
        added = result if bias is None else bias
        kernel[(-(-n // launch.columns) * -(-rows // launch.rows), launch.parts)](
            x, *_pointers(weight), added, into,
            rows, n, k, weight.words.shape[1], _ranges(weight), weight.slots, steps,
            BIASED=bias is not None, PARTS=launch.parts,
            EVEN=k == steps * launch.parts * launch.slices * problem.block,
            BLOCK_M=launch.rows, BLOCK_N=launch.columns,
            num_warps=launch.warps, num_stages=launch.stages, **_constants(weight), **constants,
        )  # fmt: skip
        if launch.parts > 1:
            kernels.sum_kernel[(-(-rows * n // 512),)](
                into, added, result, rows * n, n, BIASED=bias is not None, PARTS=launch.parts, BLOCK=512
            )
        if weight.offsets is not None:
            sums = x.view(rows, weight.offsets.shape[1], weight.group).sum(-1, dtype=torch.float32)
            result = torch.addmm(result, sums, weight.offsets.t()).to(x.dtype)
        return result.view(shape)


def launch_unpack(
    kernels: Any, weight: GroupWeight, factors: torch.Tensor | None, result: torch.Tensor
) -> torch.Tensor:
    """``unpacked`` into ``result`` [N, K], by ``kernels``."""
    n, k = result.shape
    problem = weight.problem(1, result.dtype)
    with _on(weight.codes):
        kernels.unpack_kernel[(-(-n // 4), -(-problem.blocks // 8))](
            *_pointers(weight), weight.ranges if factors is None else factors,
            weight.ranges if weight.offsets is None else weight.offsets, result,
            n, k, weight.words.shape[1], _ranges(weight), weight.slots, FACTORED=factors is not None,
            OFFSET=weight.offsets is not None, BLOCK_N=4, WIDE=8, num_warps=4, **_constants(weight),
        )  # fmt: skip
    return result


def _codes(weight: GroupWeight) -> torch.Tensor:
    """Of four bits, uint8[N, K]."""
    if weight.bits == 4:
        return unpack_nibbles(weight.codes, weight.half, weight.inner)
    n, unit = weight.codes.shape[0], unit_of(weight.bits, weight.half)
    if weight.extra is None or not weight.slots:
        extra = weight.codes.new_zeros((n, -(-weight.inner // unit), weight.half))
    else:
        slots = weight.words[:, :: unit // weight.group] >> 7 & 511
        kept = weight.codes.new_zeros((n, 1 + weight.slots, weight.half))
        kept[:, 1:] = weight.extra.view(n, weight.slots, weight.half)
        extra = kept.gather(1, slots.long()[:, :, None].expand(-1, -1, weight.half))
    return unpack_planes(Planes(weight.codes, weight.thirds, extra), weight.bits, weight.half, weight.inner)


def _constants(weight: GroupWeight) -> dict[str, Any]:
    return {
        "FAST": has_half_pairs(weight.codes),
        "BITS": weight.bits,
        "OUTLIERS": weight.slots > 0,
        "LEVELS": weight.levels,
        "DOUBLE": weight.double,
        "GROUP": weight.group,
        "HALF": weight.half,
    }


def _pointers(weight: GroupWeight) -> tuple[torch.Tensor, ...]:
    """Codes, thirds, extra bits, words, ranges; what there is not is not read."""
    thirds = weight.codes if weight.thirds is None else weight.thirds
    extra = weight.codes if weight.extra is None else weight.extra
    return weight.codes, thirds, extra, weight.words, weight.ranges


def _ranges(weight: GroupWeight) -> int:
    """Of a row."""
    return weight.ranges.shape[1] if weight.double else 1


def _scales(weight: GroupWeight) -> torch.Tensor:
    """float32[N, groups]."""
    if weight.double:
        ranges = weight.ranges.repeat_interleave(_RANGED, 1)[:, : weight.words.shape[1]]
        return weight.words.float() * ranges
    if weight.levels:
        return weight.words.view(torch.float32)
    return (weight.words & weight.scale_bits).view(torch.float32)


def _dense(x: torch.Tensor, weight: GroupWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Dense products of as much of the weight as may be unpacked at a time."""
    n, k = weight.codes.shape[0], weight.inner
    step = max(1, _BLOCK // (k * x.dtype.itemsize))
    if bias is not None:
        bias = bias.to(x.dtype)
    if n <= step:
        return torch.nn.functional.linear(x, unpacked(weight, None, x.dtype), bias)
    step = max(128, step // 128 * 128)
    result = torch.empty((x.shape[0], n), dtype=x.dtype, device=x.device)
    for start in range(0, n, step):
        some = slice(start, min(n, start + step))
        turned = unpacked(weight.rows(some), None, x.dtype).t()
        if bias is None:
            torch.mm(x, turned, out=result[:, some])
        else:
            torch.addmm(bias[some], x, turned, out=result[:, some])
    return result


def _kernels_for(weight: GroupWeight) -> Any:
    """The kernels where they take the weight, else ``None``: bfloat16 came with sm_80."""
    if not weight.codes.is_cuda or not all(tensor.is_contiguous() for tensor in _pointers(weight)[:4]):
        return None
    if torch.cuda.get_device_capability(weight.codes.device) < (8, 0):
        return None
    return kernels()


def _on(codes: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(codes.device) if codes.is_cuda else contextlib.nullcontext()


@functools.cache
def kernels() -> Any:
    """The module of the jitted kernels, or ``None`` without triton."""
    try:
        from graphopt_kernels.quantized import groups_triton
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("triton"):
            raise
        return None
    return groups_triton
