"""Operators over stores that are asked for the last of several new rows alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphopt.decoding.masks import MaskSpec
from graphopt.decoding.stores import CacheStore, SiteSpec
from graphopt.packing.scheme import operator_named
from graphopt_kernels.cache_stores import Full, Latent, Ring
from graphopt_kernels.evict_store import Evict
from graphopt_kernels.quant_store import Quant
from graphopt_kernels.split_stores import SinkWindow, SplitHeads

ROWS, CAPACITY, BATCH = 70, 96, 2
STORES: list[CacheStore] = [
    Full(), Latent(), Ring(), Quant(bits=4, group=8), SinkWindow(near=20),
    SplitHeads(near=20, whole_heads=(1,)),
]  # fmt: skip


def site(store: CacheStore) -> SiteSpec:
    window = 24 if isinstance(store, Ring) else 0
    within = isinstance(store, Latent)
    return SiteSpec(4, 2, 16, 16, torch.float64, MaskSpec(window), 0.25, within=within)


@pytest.mark.parametrize("store", STORES, ids=[store.name for store in STORES])
def test_the_last_row_is_that_of_all(store: CacheStore) -> None:
    """In parts of a prompt, some longer than what is kept: the same row, the same stores."""
    spec, generator = site(store), torch.Generator().manual_seed(3)
    query, key, value = (
        torch.randn(BATCH, heads, ROWS, 16, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)
    )
    valid = torch.ones(BATCH, CAPACITY, dtype=torch.bool)
    valid[1, :5] = False
    attend = operator_named(store.attend_op)
    stores = [
        [torch.zeros(shape, dtype=dtype) for shape, dtype in store.tensors(spec, BATCH, CAPACITY).values()]
        for _ in range(2)
    ]
    assert store.last_alone
    for start, stop in ((0, 40), (40, 41), (41, ROWS)):
        rest = (
            torch.arange(start, stop), valid, None, None, spec.scale, 0.0, spec.mask.window, CAPACITY,
            *store.constants(spec),
        )  # fmt: skip
        new = key[:, :, start:stop], value[:, :, start:stop]
        whole = attend(query[:, :, start:stop], *new, *stores[0], *rest)
        last = attend(query[:, :, stop - 1 : stop], *new, *stores[1], *rest)
        assert torch.allclose(last, whole[:, :, -1:], rtol=1e-12, atol=1e-12)
        assert all(torch.equal(one, other) for one, other in zip(*stores, strict=True))


@pytest.mark.parametrize(
    ("store", "asked", "reason"),
    [
        (Evict(keep=20, recent=4), 1, "1 rows ask at positions"),
        (Full(), 2, r"positions are torch.int64 \[8\]: expected torch.int64 of shape \[2\]"),
    ],
    ids=["evict", "two"],
)
def test_queries_that_are_not_of_the_last_row_are_refused(store: CacheStore, asked: int, reason: str) -> None:
    spec = site(store)
    attend: Any = operator_named(store.attend_op)
    with torch.device("meta"):
        held = [torch.zeros(s, dtype=d) for s, d in store.tensors(spec, BATCH, CAPACITY).values()]
        query, key, value = (
            torch.zeros(BATCH, h, n, 16, dtype=torch.float64) for h, n in ((4, asked), (2, 8), (2, 8))
        )
        with pytest.raises(ValueError, match=reason):
            attend(
                query, key, value, *held, torch.arange(8), None, None, None, 0.25, 0.0, 0, CAPACITY,
                *store.constants(spec),
            )  # fmt: skip
