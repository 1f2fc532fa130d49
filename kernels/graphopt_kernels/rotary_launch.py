"""Launches of the kernels of ``graphopt_kernels.rotary``: which tensors they take, how programs are cut."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from graphopt_kernels.rotary_reference import empty_weights, given_gradient

__all__ = [
    "WIDEST", "Launch", "backward_rows", "cached_rows", "dense", "forward_rows", "kernels_for", "launch_for",
    "table_strides",
]  # fmt: skip

_TILE = 2048
"""Elements that a program works on at a time: norms of rows were fastest so on an H200."""

WIDEST = 1024
"""Elements of a head that the kernels take."""

_COLUMNS = 32

_HEADS, _TILES = 8, 10
"""Heads of a tile that is turned, and how many tiles one program has after one another, at most."""


class Launch(NamedTuple):
    """``half``: pairs of a head and ``rest``: elements that are not turned, both rounded up to powers of two;
    ``positions`` and ``heads`` of a tile; ``programs`` for each multiprocessor that stay where gradients of
    weights are summed up; ``whole``: a program has all heads of its positions, tile by tile."""

    half: int
    rest: int
    positions: int
    heads: int
    warps: int
    programs: int
    whole: bool = False


def launch_for(
    heads: Sequence[int], size: int, width: int, *, sums: bool = False, whole: bool = True
) -> Launch:
    """Tiles of some positions and of as many heads as leave the fewest lanes idle, the more the better.

    ``heads``: groups, and queries, keys and values of each; ``size``: elements of a head; ``sums``: gradients
    of weights are summed up, which takes registers, more of them where a part of a head is not turned.
    ``whole``: a program may have all heads of its positions, and has where they are few tiles, which are
    written out one after the other. Measured on an H200 (benchmarks/results/gpu_sweep_rotary.json).
    """
    half = _power(width // 2)
    rest = _power(size - width) if size > width else 1
    most = max(1, _TILE // (_power(size) * (2 if sums and size > width else 1)))
    counts = [heads[0] * count for count in heads[1:] if count]
    candidates = [1 << k for k in range(most.bit_length()) if 1 << k <= most and (sums or 1 << k <= _HEADS)]
    best = min(candidates, key=lambda n: (sum(-(-count // n) * n for count in counts), -n))
    few = not sums and whole and sum(-(-count // best) for count in counts) <= _TILES
    # As many as registers of sm_90 hold at a time: one more would run alone after the others.
    return Launch(half, rest, most // best, best, 4, 3 if size > width else 5, few)


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()


def kernels_for(rows: torch.Tensor, table: torch.Tensor, dtype: torch.dtype | None = None) -> Any:
    """The module of the jitted kernels where they take ``rows`` [..., D], else ``None``."""
    exact = torch.float64 in (rows.dtype, table.dtype, dtype)
    if not rows.is_cuda or exact or not rows.dim() or rows.shape[-1] > WIDEST:
        return None
    return _kernels()


@functools.cache
def _kernels() -> Any:
    """The module of the jitted kernels, or ``None`` without triton."""
    try:
        from graphopt_kernels import rotary_triton
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("triton"):
            raise
        return None
    return rotary_triton


def forward_rows(
    kernels: Any,
    input: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    heads: Sequence[int],
    width: int,
    interleaved: bool,
    eps: float | None,
    weight_offset: float,
    copies_values: bool,
    dtype: torch.dtype,
    *,
    launch: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``rotary`` by ``kernels``, the module of the jitted functions."""
    groups, queries, keys, values = heads
    batch, length, _, size = input.shape
    counts = (groups * queries, groups * keys, groups * values if copies_values else 0)
    query, key, value = (
        torch.empty((batch, length, count, size), dtype=kind, device=input.device)
        for count, kind in zip(counts, (dtype, dtype, input.dtype), strict=True)
    )
    if query.numel() + key.numel() + value.numel():
        _turn(
            kernels, dense(input), (query, key, value), (cos, sin), (query_weight, key_weight), heads, width,
            interleaved, eps, weight_offset, launch, given=(True,) * 3, moves_values=copies_values,
            back=False,
        )  # fmt: skip
    return query, key, value


def cached_rows(
    kernels: Any,
    input: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    places: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    heads: Sequence[int],
    width: int,
    interleaved: bool,
    eps: float | None,
    weight_offset: float,
    *,
    launch: Launch | None = None,
) -> torch.Tensor:
    """``rotary_to_cache`` by ``kernels``; elements of heads lie next to each other in the caches."""
    batch, length, _, size = input.shape
    shape = (batch, length, heads[0] * heads[1], size)
    query = torch.empty(shape, dtype=key_cache.dtype, device=input.device)
    if input.numel():
        parts = (query, key_cache.transpose(1, 2), value_cache.transpose(1, 2))
        _turn(
            kernels, dense(input), parts, (cos, sin), (query_weight, key_weight), heads, width, interleaved,
            eps, weight_offset, launch, given=(True,) * 3, moves_values=True, back=False,
            places=places.contiguous(), capacity=key_cache.shape[2],
        )  # fmt: skip
    return query


def backward_rows(
    kernels: Any,
    d_query: torch.Tensor | None,
    d_key: torch.Tensor | None,
    d_value: torch.Tensor | None,
    input: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    heads: Sequence[int],
    width: int,
    interleaved: bool,
    eps: float | None,
    weight_offset: float,
    dtype: torch.dtype,
    output_mask: Sequence[bool],
    *,
    launch: Launch | None = None,
    processors: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``rotary_backward`` by ``kernels``; the number of multiprocessors is looked up where it is not
    given."""
    gradients = (d_query, d_key, d_value)
    like = given_gradient(*gradients)
    batch, length, _, size = like.shape
    whole = (batch, length, heads[0] * sum(heads[1:]), size)
    d_input = torch.empty(whole if output_mask[0] else (0,), dtype=dtype, device=like.device)
    weights = (query_weight, key_weight)
    d_weights = empty_weights(like, query_weight, key_weight, output_mask)
    if not batch * length * whole[2]:
        return d_input, d_weights[0].zero_(), d_weights[1].zero_()
    parts = tuple(like if gradient is None else dense(gradient) for gradient in gradients)
    given = tuple(gradient is not None for gradient in gradients)
    if eps is None:
        if output_mask[0]:
            _turn(
                kernels, d_input, parts, (cos, sin), weights, heads, width, interleaved, eps, weight_offset,
                launch, given=given, moves_values=True, back=True,
            )  # fmt: skip
        return d_input, *d_weights
    from graphopt_kernels import rotary_norm_triton

    assert input is not None
    data = dense(input)
    launch = launch or launch_for(heads, size, width, sums=True)
    blocks = [-(-heads[0] * count // launch.heads) for count in heads[1:]]
    if not output_mask[0]:
        blocks[2] = 0
    tiles = -(-batch * length // launch.positions)
    staying = launch.programs * (processors or _multiprocessors(like.device))
    programs = min(tiles, max(1, staying // sum(blocks)))
    sums = [
        torch.empty((count * programs if found.numel() else 0, size), dtype=torch.float32, device=like.device)
        for count, found in zip(blocks[:2], d_weights, strict=True)
    ]
    tables = (dense(cos), dense(sin))
    with _on(like.device):
        rotary_norm_triton.norm_backward_kernel[(programs, sum(blocks))](
            data, *parts, d_input, *tables, *(data if weight is None else weight for weight in weights),
            *sums, *_strides(data), *(stride for gradient in parts for stride in _strides(gradient)),
            *(stride for table in tables for stride in table_strides(table)),
            batch * length, length, eps, weight_offset,
            **_parts(heads), **_given(given), D_DATA=bool(output_mask[0]),
            QUERY_WEIGHTED=query_weight is not None, KEY_WEIGHTED=key_weight is not None,
            QUERY_SUMMED=d_weights[0].numel() > 0, KEY_SUMMED=d_weights[1].numel() > 0,
            **_tile_of(launch, size, width, interleaved, cos),
        )  # fmt: skip
        for found, partial in zip(d_weights, sums, strict=True):
            if found.numel():
                _sum(partial, found)
    return d_input, *d_weights


def _sum(partial: torch.Tensor, found: torch.Tensor) -> None:
    """Sums over rows, always in the same order."""
    from graphopt_kernels import row_norm_triton

    rows, size = partial.shape
    row_norm_triton.columns_kernel[(-(-size // _COLUMNS),)](
        partial, partial, found, found, rows,
        D_WEIGHT=True, D_BIAS=False, WIDTH=size, COLUMNS=_COLUMNS, ROWS=64, num_warps=4,
    )  # fmt: skip


def _turn(
    kernels: Any,
    whole: torch.Tensor,
    parts: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | None],
    heads: Sequence[int],
    width: int,
    interleaved: bool,
    eps: float | None,
    weight_offset: float,
    launch: Launch | None,
    *,
    given: Sequence[bool],
    moves_values: bool,
    back: bool,
    places: torch.Tensor | None = None,
    capacity: int = 0,
) -> None:
    batch, length, _, size = whole.shape
    # Neighbours that are normalized before are held twice, and spill where tiles follow each other.
    launch = launch or launch_for(heads, size, width, whole=eps is None or not interleaved)
    counts = (*heads[1:3], heads[3] if moves_values else 0)
    blocks = sum(-(-heads[0] * count // launch.heads) for count in counts)
    tables = [dense(table) for table in tables]
    grid = (-(-batch * length // launch.positions) * (1 if launch.whole else blocks),)
    with _on(whole.device):
        kernels.turn_kernel[grid](
            whole, *parts, *tables, *(whole if weight is None else weight for weight in weights),
            whole if places is None else places, *_strides(whole),
            *(stride for part in parts for stride in _strides(part)),
            *(stride for table in tables for stride in table_strides(table)),
            batch * length, length, capacity, eps or 0.0, weight_offset, CACHED=places is not None,
            **_parts(heads), VALUES_MOVED=int(moves_values), **_given(given), BACK=back,
            NORMED=eps is not None,
            QUERY_WEIGHTED=weights[0] is not None, KEY_WEIGHTED=weights[1] is not None,
            WHOLE=launch.whole, **_tile_of(launch, size, width, interleaved, tables[0]),
        )  # fmt: skip


def _parts(heads: Sequence[int]) -> dict[str, int]:
    return dict(zip(("GROUPS", "QUERIES", "KEYS", "VALUES"), heads, strict=True))


def _given(given: Sequence[bool]) -> dict[str, bool]:
    return dict(zip(("QUERY_GIVEN", "KEY_GIVEN", "VALUE_GIVEN"), given, strict=True))


def _tile_of(
    launch: Launch, size: int, width: int, interleaved: bool, table: torch.Tensor
) -> dict[str, int | bool]:
    return {
        "INTERLEAVED": interleaved,
        "HALVED": table.shape[-1] != width,
        "SIZE": size,
        "WIDTH": width,
        "HALF": launch.half,
        "REST": launch.rest,
        "POSITIONS": launch.positions,
        "HEADS": launch.heads,
        "num_warps": launch.warps,
    }


def dense(rows: torch.Tensor) -> torch.Tensor:
    """Kernels take any strides but that of the last dimension."""
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def _strides(rows: torch.Tensor) -> tuple[int, int, int]:
    batch, position, head, _ = rows.stride()
    return batch, position, head


def table_strides(table: torch.Tensor) -> tuple[int, int]:
    """Of samples and positions; a table that all samples share stays where it is."""
    shared = table.dim() == 2 or table.shape[0] == 1
    return (0 if shared else table.stride(0)), table.stride(-2)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the present device of CUDA; elsewhere (the interpreter, no memory) there is none."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
