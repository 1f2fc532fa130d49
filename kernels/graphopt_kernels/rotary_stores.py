"""Rotary embeddings of a step's queries and keys; its keys and values are written into their stores.

``graphopt::rotary_to_stores`` is what stands between the projection of a step of decoding and its attention:
the norm of each head, the rotation, and the writes into the stores of ``graphopt::attend_full`` or
``graphopt::attend_ring``, which are then given no keys and no values of their own. Queries, keys and values
are read by their strides, so they may lie in one projection or in three. On a GPU it is one kernel where
there were one or two for queries and as many for keys.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from graphopt.candidate import Reason
from graphopt_kernels.attend_launch import block_of, on_device
from graphopt_kernels.rotary import supports_turn
from graphopt_kernels.rotary_launch import WIDEST, dense, table_strides
from graphopt_kernels.rotary_reference import rotary_reference
from graphopt_kernels.stated_operator import state_operator

__all__ = [
    "StoresLaunch", "rotary_to_stores", "rotary_to_stores_reference", "rotary_to_stores_supports",
    "stores_launch", "stores_rows",
]  # fmt: skip

_LANE = 8
"""Numbers that a lane reads of each half of a head at a time: 16 bytes of narrow ones."""


class StoresLaunch(NamedTuple):
    """``heads`` of a program and its ``warps``; ``half``: pairs of a head and ``rest``: elements that are not
    turned, both rounded up to powers of two."""

    heads: int
    warps: int
    half: int
    rest: int


def rotary_to_stores_supports(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_store: torch.Tensor,
    value_store: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    width: int,
    interleaved: bool,
    eps: float | None,
    weight_offset: float,
    ring: bool,
) -> Reason | None:
    """``None``, or why the operator does not take these arguments."""
    if query.dim() != 4:
        return Reason(f"takes queries [B, H, n, D], got {query.dim()} dimensions")
    batch, _, rows, size = query.shape
    for name, part, wanted in (("keys", key, size), ("values", value, None)):
        if part.dim() != 4 or (part.shape[0], part.shape[2]) != (batch, rows):
            return Reason(
                f"{name} have shape {list(part.shape)}: expected [{batch}, heads, {rows}, elements]"
            )
        if wanted is not None and part.shape[3] != wanted:
            return Reason(f"{name} have {part.shape[3]} elements: expected the {wanted} of queries")
        if part.dtype is not query.dtype:
            return Reason(f"{name} are {part.dtype}: expected {query.dtype}, that of queries")
    if key.shape[1] != value.shape[1]:
        return Reason(
            f"there are {key.shape[1]} heads of keys and {value.shape[1]} of values: expected as many"
        )
    for name, part, store in (("keys", key, key_store), ("values", value, value_store)):
        held = [part.shape[1], part.shape[3]]
        if store.dim() != 4 or store.shape[0] < batch or [store.shape[1], store.shape[3]] != held:
            return Reason(
                f"the store of {name} has shape {list(store.shape)}: "
                f"expected [at least {batch}, {held[0]}, slots, {held[1]}]"
            )
        if not store.is_floating_point():
            return Reason(f"takes a floating-point store of {name}, got {store.dtype}")
    if key_store.shape[2] != value_store.shape[2]:
        return Reason(f"stores have {key_store.shape[2]} and {value_store.shape[2]} slots: expected as many")
    if positions.dtype is not torch.int64 or tuple(positions.shape) != (rows,):
        return Reason(
            f"positions are {positions.dtype} {list(positions.shape)}: expected torch.int64 [{rows}]"
        )
    if ring and rows != 1:
        return Reason(f"{rows} rows of a ring: later ones would take the place of what earlier ones read")
    return supports_turn(query.transpose(1, 2), cos, sin, query_weight, key_weight, width, eps)


def rotary_to_stores_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_store: torch.Tensor,
    value_store: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    width: int,
    interleaved: bool,
    eps: float | None,
    weight_offset: float,
    ring: bool,
) -> torch.Tensor:
    """Turned queries [B, H, n, D] of the dtype of ``query`` [B, H, n, D], dense.

    ``key`` [B, Hkv, n, D], turned, and ``value`` [B, Hkv, n, Dv] go to ``positions`` int64 [n], which differ,
    of the stores [at least B, Hkv, slots, D or Dv], rounded to their dtypes; with ``ring`` position p goes to
    slot ``p % slots``, for one row alone. The first ``width`` elements of a head are turned by ``cos`` and
    ``sin`` [n, R] or [B or 1, n, R], R = ``width`` or ``width / 2``, after a norm with ``eps`` and weights
    [D] plus ``weight_offset`` where ``eps`` is given, as ``graphopt::rotary`` does. A position outside of a
    store raises on the CPU; on CUDA nothing is written for it, and its queries are NaN. There is no gradient.
    """
    batch, dtype = query.shape[0], query.dtype
    turned = []
    for part, weight in ((query, query_weight), (key, key_weight)):
        heads = (1, part.shape[1], 0, 0)
        found, _, _ = rotary_reference(
            part.transpose(1, 2), cos, sin, weight, None, heads, width, interleaved, eps, weight_offset,
            False, dtype if part is query else key_store.dtype,
        )  # fmt: skip
        turned.append(found.transpose(1, 2))
    places = positions.remainder(key_store.shape[2]) if ring else positions
    key_store[:batch].index_copy_(2, places, turned[1])
    value_store[:batch].index_copy_(2, places, value.to(value_store.dtype))
    return turned[0].contiguous()


# --- launches -----------------------------------------------------------------------------------


def _kernels_for(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_store: torch.Tensor,
    value_store: torch.Tensor,
    cos: torch.Tensor,
) -> Any:
    """The module of the jitted kernels where they take these tensors, else ``None``."""
    given = (query, key, value, key_store, value_store, cos)
    if not query.is_cuda or not query.numel() or any(x.dtype is torch.float64 for x in given):
        return None
    if max(query.shape[3], value.shape[3]) > WIDEST:
        return None
    if any(store.stride(3) != 1 and store.shape[3] > 1 for store in (key_store, value_store)):
        return None
    return _kernels()


@functools.cache
def _kernels() -> Any:
    """The module of the jitted kernels, or ``None`` without triton."""
    try:
        from graphopt_kernels import rotary_stores_triton
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("triton"):
            raise
        return None
    return rotary_stores_triton


def stores_launch(heads: int, size: int, width: int) -> StoresLaunch:
    """As many heads as give each lane of a warp ``_LANE`` pairs, at most what there are of keys: more would
    leave multiprocessors idle, of which there are more than programs."""
    half = max(1, 1 << (width // 2 - 1).bit_length())
    rest = 1 << (size - width - 1).bit_length() if size > width else 1
    widest = max(half, rest // 2)
    lanes = 32 * _LANE
    most = max(1, lanes // widest)
    return StoresLaunch(min(most, 1 << (heads - 1).bit_length()), max(1, widest // lanes), half, rest)


def stores_rows(
    kernels: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_store: torch.Tensor,
    value_store: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    width: int,
    interleaved: bool,
    eps: float | None,
    weight_offset: float,
    ring: bool,
    *,
    launch: StoresLaunch | None = None,
) -> torch.Tensor:
    """``rotary_to_stores`` by ``kernels``; elements of heads lie next to each other in the stores."""
    query, key, value = dense(query), dense(key), dense(value)
    cos, sin = dense(cos), dense(sin)
    batch, heads, rows, size = query.shape
    groups, value_size = key.shape[1], value.shape[3]
    turned = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    launch = launch or stores_launch(groups, size, width)
    blocks = -(-heads // launch.heads) + 2 * -(-groups // launch.heads)
    parts = (query, key, value, turned, key_store, value_store)
    with on_device(query):
        kernels.stores_kernel[(batch * rows * blocks,)](
            *parts, positions.contiguous(), cos, sin, query if query_weight is None else query_weight,
            query if key_weight is None else key_weight, *(n for part in parts for n in part.stride()[:3]),
            *table_strides(cos), *table_strides(sin), rows, key_store.shape[2], eps or 0.0, weight_offset,
            RING=ring, NORMED=eps is not None, QUERY_WEIGHTED=query_weight is not None,
            KEY_WEIGHTED=key_weight is not None, INTERLEAVED=interleaved, HALVED=cos.shape[-1] != width,
            QUERIES=heads, KEYS=groups, SIZE=size, VALUE_SIZE=value_size, WIDTH=width, HALF=launch.half,
            REST=launch.rest, BLOCK_V=block_of(value_size), HEADS=launch.heads, num_warps=launch.warps,
        )  # fmt: skip
    return turned


def _launch(*given: Any) -> torch.Tensor | None:
    query, key, value, key_store, value_store, _, cos = given[:7]
    kernels = _kernels_for(query, key, value, key_store, value_store, cos)
    return None if kernels is None else stores_rows(kernels, *given)


rotary_to_stores = state_operator(
    "rotary_to_stores",
    rotary_to_stores_reference,
    mutates=("key_store", "value_store"),
    refuses=rotary_to_stores_supports,
    output=lambda query, *_: query.new_empty(query.shape),
    launch=_launch,
)
