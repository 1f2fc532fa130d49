"""lossless12: bfloat16 weights in twelve bits, bit for bit.

A bfloat16 has eight bits of exponent; weights of a row use few of them::

    codes    uint8[N, K]      sign and mantissa
    pairs    uint8[N, H]      exponent - base: column j in the lower four bits, column H + j in the higher
    bases    uint8[N]         least of the 16 exponents that most weights of the row have
    escapes  int32[N, room]   weights with others: column << 16 | weight, by columns, then -1

``H`` is half of K, up to the next multiple of 16. A weight that escapes stands in ``codes`` and ``pairs`` for
a power of two of its sign, ``2 ** (base + 1 - 127)``: products add x times what is missing. Rows of zeros
have base 0, as zeros and denormal numbers do. Rows have room for a fixed number of escapes, so that packed
tensors have the same sizes whatever is in the weight, and rows can be unpacked alone; a weight with a row
that has more of them is refused.

Products are those of the unpacked weight, added up in float32 in another order. On a CPU they are the
library's own, bit for bit.

After DFloat11 (https://arxiv.org/abs/2504.11651), whose exponents have a Huffman code of variable length:
here a weight is read by its place, in a few instructions.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from graphopt.candidate import Reason
from graphopt.errors import QuantizationError
from graphopt.packing import Layout, Scheme, scheme_text
from graphopt_kernels.quantized.byte_launch import Launch, steps_of
from graphopt_kernels.quantized.exponent_launch import Exponents, check_launch, launch_for, usual_launch
from graphopt_kernels.quantized.operators import define_operators
from graphopt_kernels.quantized.scratch import beside_weight_only
from graphopt_kernels.tuning.lookup import Choice, rows_class

__all__ = [
    "PRODUCTS", "Lossless12", "half_of", "launch_linear", "launch_unpack", "linear_lossless12",
    "unpack_lossless12", "unpack_reference",
]  # fmt: skip

_WINDOW = 16
_WIDEST = 2**16
"""Columns are written in 16 bits."""

_BLOCK = 64 * 2**20
"""Bytes of an unpacked weight that are there at a time."""

_MANY = 4096
"""Rows from which on more are alike for a launch."""

PRODUCTS = Choice(
    "packed-exponents",
    ("graphopt_kernels.quantized.exponents_triton",),
    usual_launch,
    check_launch,
    launch_for,
)

_SORTED = 2**24
"""Weights that are packed at a time."""


def half_of(k: int) -> int:
    """Bytes of exponents of a row of ``k`` weights."""
    return -(-k // 32) * 16


# --- operators ----------------------------------------------------------------------------------


def unpack_lossless12(
    codes: torch.Tensor, pairs: torch.Tensor, bases: torch.Tensor, escapes: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The weight [N, K], exact in bfloat16, converted to ``dtype``."""
    found = _kernels_for(codes)
    if found is None or not codes.numel():
        return unpack_reference(codes, pairs, bases, escapes).to(dtype)
    return launch_unpack(found, codes, pairs, bases, escapes).to(dtype)


def linear_lossless12(
    x: torch.Tensor,
    codes: torch.Tensor,
    pairs: torch.Tensor,
    bases: torch.Tensor,
    escapes: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """``x`` [..., K] times the weight, ``bias`` [N] added: [..., N] of the dtype of ``x``."""
    packed = codes, pairs, bases, escapes
    found = _kernels_for(codes)
    if found is None or not (codes.numel() and x.numel()):
        return torch.nn.functional.linear(x, unpack_lossless12(*packed, x.dtype), bias)
    (n, k), rows = codes.shape, x.numel() // codes.shape[1]
    like = Exponents(rows_class(rows, _MANY), n, k, pairs.shape[1])
    launch, problem = PRODUCTS(like, codes.device), like._replace(rows=rows)
    if launch.kind == "library" or x.dtype is not torch.bfloat16:
        return _dense(x.reshape(rows, k), packed, bias).view(*x.shape[:-1], n)
    return launch_linear(found, problem, launch, x, packed, bias)


def _shape(
    codes: torch.Tensor, pairs: torch.Tensor, bases: torch.Tensor, escapes: torch.Tensor
) -> tuple[int, int]:
    return codes.shape[0], codes.shape[1]


define_operators(
    "lossless12",
    ("codes", "pairs", "bases", "escapes"),
    (),
    unpack=unpack_lossless12,
    linear=linear_lossless12,
    shape=_shape,
    scratch=beside_weight_only,
)


def unpack_reference(
    codes: torch.Tensor, pairs: torch.Tensor, bases: torch.Tensor, escapes: torch.Tensor
) -> torch.Tensor:
    """The weight bfloat16[N, K], with ATen operators."""
    exponents = torch.cat((pairs & 15, pairs >> 4), 1)[:, : codes.shape[1]].to(torch.int32) + bases[:, None]
    wide = codes.to(torch.int32)
    words = ((wide & 0x80) << 8) | (wide & 0x7F) | (exponents << 7)
    if words.numel():
        # What is not used says once more what the first says, or where nothing escapes, what is there.
        first = escapes[:, :1]
        columns, weights = first >> 16 & 0xFFFF, first & 0xFFFF
        columns = torch.where(first != -1, columns, 0)
        weights = torch.where(first != -1, weights, words[:, :1])
        used = escapes != -1
        columns = torch.where(used, escapes >> 16 & 0xFFFF, columns)
        words.scatter_(1, columns.long(), torch.where(used, escapes & 0xFFFF, weights))
    words = torch.where(words > 0x7FFF, words - 0x10000, words)
    return words.to(torch.int16).view(torch.bfloat16)


# --- kernels ------------------------------------------------------------------------------------

Packed = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def launch_unpack(
    kernels: Any, codes: torch.Tensor, pairs: torch.Tensor, bases: torch.Tensor, escapes: torch.Tensor
) -> torch.Tensor:
    """``unpack_reference`` by ``kernels``, the module of the jitted functions."""
    (n, k), half = codes.shape, pairs.shape[1]
    weight = torch.empty((n, k), dtype=torch.bfloat16, device=codes.device)
    with _on(codes):
        kernels.unpack_kernel[(-(-n // 4), -(-half // 1024))](
            codes, pairs, bases, escapes, weight.view(torch.int16), n, k, half,
            FAST=not _is_interpreted(codes), BLOCK_N=4, BLOCK_K=1024, num_warps=8, **_room(escapes),
        )  # fmt: skip
    return weight


def launch_linear(
    kernels: Any,
    problem: Exponents,
    launch: Launch,
    x: torch.Tensor,
    packed: Packed,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """``linear_lossless12`` as ``launch`` says, ``slices`` or ``tiles``, by ``kernels``."""
    codes, _, _, escapes = packed
    rows, n, k, half = problem
    shape = (*x.shape[:-1], n)
    x = x.reshape(rows, k).contiguous()
    result = torch.empty((rows, n), dtype=x.dtype, device=x.device)
    into = result
    if launch.parts > 1:
        into = torch.empty((launch.parts, rows, n), dtype=torch.float32, device=x.device)
    steps = steps_of(problem.steps, launch)
    constants: dict[str, Any] = {
        "BIASED": bias is not None,
        "PARTS": launch.parts,
        "EVEN": k == 2 * half and half == steps * launch.parts * launch.inner * launch.slices,
        "FAST": not _is_interpreted(codes),
        "BLOCK_M": launch.rows,
        "BLOCK_N": launch.columns,
        "BLOCK_K": launch.inner,
        "num_warps": launch.warps,
        "num_stages": launch.stages,
        **_room(escapes),
    }
    if launch.kind == "slices":
        constants["SLICES"] = launch.slices
    kernel = kernels.slices_kernel if launch.kind == "slices" else kernels.tile_kernel
    added = result if bias is None else bias
    with _on(codes):
        kernel[(-(-n // launch.columns) * -(-rows // launch.rows), launch.parts)](
            x, *packed, added, into, rows, n, k, half, steps, **constants
        )
        if launch.parts > 1:
            kernels.add_kernel[(-(-rows * n // 512),)](
                into, added, result, rows * n, n, BIASED=bias is not None, PARTS=launch.parts, BLOCK=512
            )
    return result.view(shape)


def _dense(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    """Dense products of as much of the weight as may be unpacked at a time."""
    n, k = packed[0].shape
    step = max(1, _BLOCK // (k * 2))
    if n <= step:
        return torch.nn.functional.linear(x, unpack_lossless12(*packed, x.dtype), bias)
    step = max(128, step // 128 * 128)
    result = torch.empty((x.shape[0], n), dtype=x.dtype, device=x.device)
    for start in range(0, n, step):
        some = slice(start, min(n, start + step))
        codes, pairs, bases, escapes = (tensor[some] for tensor in packed)
        weight = unpack_lossless12(codes, pairs, bases, escapes, x.dtype).t()
        if bias is None:
            torch.mm(x, weight, out=result[:, some])
        else:
            torch.addmm(bias[some], x, weight, out=result[:, some])
    return result


def _room(escapes: torch.Tensor) -> dict[str, int]:
    room = escapes.shape[1]
    return {"ROOM": room, "WIDE": 1 << (room - 1).bit_length()}


def _is_interpreted(codes: torch.Tensor) -> bool:
    """Instructions are there on devices alone; tensors without memory are taken to be on one."""
    return not (codes.is_cuda or codes.is_meta)


def _kernels_for(codes: torch.Tensor) -> Any:
    """The kernels where they take ``codes``, else ``None``: devices before sm_80 do not know bfloat16."""
    if not codes.is_cuda or torch.cuda.get_device_capability(codes.device) < (8, 0):
        return None
    return _kernels() if codes.is_contiguous() else None


def _on(codes: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(codes.device) if codes.is_cuda else contextlib.nullcontext()


@functools.cache
def _kernels() -> Any:
    """The module of the jitted kernels, or ``None`` without triton."""
    try:
        from graphopt_kernels.quantized import exponents_triton
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("triton"):
            raise
        return None
    return exponents_triton


# --- the scheme ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lossless12(Scheme):
    """Twelve bits a bfloat16, exactly. ``room``: escapes that a row has room for, and one more for each 1,024
    of its weights; short rows have room for one in 32."""

    room: int = 8

    name: ClassVar[str] = "lossless12"
    summary: ClassVar[str] = "bfloat16 in 12 bits, bit for bit"
    lossless: ClassVar[bool] = True
    by_rows: ClassVar[bool] = True
    unpack_op: ClassVar[str] = "graphopt::unpack_lossless12"
    linear_op: ClassVar[str] = "graphopt::linear_lossless12"

    def refuses(self, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Reason | None:
        if dtype is not torch.bfloat16:
            return Reason(f"takes weights of bfloat16, got {dtype}")
        if self.room < 1:
            return Reason(f"room is {self.room}: expected 1 or more")
        if k > _WIDEST:
            return Reason(f"takes rows of up to {_WIDEST} weights, got {k}")
        if (stored := self.stored_bytes(n, k, dtype)) >= 2 * n * k:
            return Reason(f"it would take {stored} bytes, no fewer than the {2 * n * k} that it has")
        return None

    def refuses_numbers(
        self, weight: torch.Tensor, statistics: Mapping[str, torch.Tensor]
    ) -> Reason | None:
        room = self._room(weight.shape[1])
        most = max((int(_escaped(some)[2].sum(1).max()) for _, some in _blocks(weight)), default=0)
        if most > room:
            what = f"{most} weights of a row have other exponents than the {_WINDOW} that most of it have"
            return Reason(f"{what}: room={self.room} has room for {room}")
        return None

    def pack(self, weight: torch.Tensor, statistics: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        (n, k), room = weight.shape, self._room(weight.shape[1])
        half = half_of(k)
        codes = torch.empty((n, k), dtype=torch.uint8, device=weight.device)
        pairs = codes.new_empty((n, half))
        bases = codes.new_empty(n)
        escapes = torch.full((n, room), -1, dtype=torch.int32, device=weight.device)
        for at, some in _blocks(weight):
            words, base, outside = _escaped(some)
            if int(outside.sum(1).max()) > room:
                raise QuantizationError(
                    f"cannot pack a weight as {scheme_text(self)}: {self.refuses_numbers(weight, statistics)}"
                )
            rows, columns = outside.nonzero(as_tuple=True)
            rank = (outside.cumsum(1) - 1)[rows, columns]
            entries = columns << 16 | words[rows, columns].long()
            escapes[at][rows, rank] = torch.where(entries >= 2**31, entries - 2**32, entries).int()
            index = torch.where(outside, 1, (words >> 7 & 0xFF) - base[:, None])
            mantissa = torch.where(outside, 0, words & 0x7F)
            codes[at] = (words >> 8 & 0x80 | mantissa).to(torch.uint8)
            both = torch.nn.functional.pad(index, (0, 2 * half - k))
            pairs[at] = (both[:, :half] | both[:, half:] << 4).to(torch.uint8)
            bases[at] = base.to(torch.uint8)
        return {"codes": codes, "pairs": pairs, "bases": bases, "escapes": escapes}

    def layout(self, n: int, k: int, dtype: torch.dtype) -> Layout:
        return {
            "codes": (torch.uint8, (n, k)),
            "pairs": (torch.uint8, (n, half_of(k))),
            "bases": (torch.uint8, (n,)),
            "escapes": (torch.int32, (n, self._room(k))),
        }

    def refuses_packed(
        self, packed: Mapping[str, torch.Tensor], n: int, k: int, dtype: torch.dtype
    ) -> Reason | None:
        reason = super().refuses_packed(packed, n, k, dtype)
        if reason is not None:
            return reason
        escapes = packed["escapes"]
        # -1 fills up a row; the column of any other is in the upper half.
        if bool(((escapes != -1) & ((escapes >> 16 & 0xFFFF) >= k)).any()):
            return Reason(f"its escapes name columns that are not below {k}")
        return None

    def _room(self, k: int) -> int:
        return max(1, min(self.room + k // 1024, k // 32))


def _blocks(weight: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows, some at a time."""
    n, k = weight.shape
    step = max(1, _SORTED // max(1, k))
    for start in range(0, n if k else 0, step):
        yield slice(start, start + step), weight[start : start + step]


def _escaped(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The words of ``weight`` [M, K] in int32, the base of each row, and what is outside of its window: the
    lowest of those that hold most."""
    words = weight.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
    exponents = words >> 7 & 0xFF
    counts = torch.zeros((len(words), 257), dtype=torch.int32, device=words.device)
    counts.scatter_add_(1, exponents.long() + 1, torch.ones_like(exponents))
    up_to = counts.cumsum(1)
    held = up_to[:, _WINDOW:] - up_to[:, :-_WINDOW]
    order = torch.arange(held.shape[1], device=words.device)
    base = (held * 256 - order).argmax(1).int()
    outside = (exponents < base[:, None]) | (exponents >= base[:, None] + _WINDOW)
    return words, base, outside
