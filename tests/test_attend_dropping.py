"""Stores that drop positions: steps against whole sequences, what is kept, what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from graphopt.decoding.masks import MaskSpec
from graphopt.decoding.stores import CacheStore, SiteSpec
from graphopt_kernels.evict_store import Evict
from graphopt_kernels.split_stores import SinkWindow, SplitHeads

BATCH, HEADS, FEW, WIDTH, VALUE, PLACES = 2, 6, 3, 8, 4, 60
SITE = SiteSpec(HEADS, FEW, WIDTH, VALUE, torch.float32, MaskSpec(), 0.7)
STORES: dict[str, CacheStore] = {
    "sink-window": SinkWindow(near=16),
    "no-sinks": SinkWindow(near=9, first=0),
    "split-heads": SplitHeads(near=11, first=3, whole_heads=(2, 0)),
    **{
        policy: Evict(keep=20, policy=policy, recent=6)
        for policy in ("h2o", "snapkv", "tova", "knorm", "value-aware", "keydiff")
    },
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"slopes": True, "padded": 5, "sinks": True, "softcap": 3.0, "window": 40},
}


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (BATCH, HEADS, PLACES, WIDTH), (BATCH, FEW, PLACES, WIDTH), (BATCH, FEW, PLACES, VALUE)
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


def held_by(store: CacheStore, site: SiteSpec) -> list[Tensor]:
    # More sequences than a call has: the rest must stay as it is.
    return [torch.zeros(shape, dtype=dtype) for shape, dtype in store.tensors(site, 3, PLACES).values()]


def extras(case: dict[str, Any]) -> tuple[SiteSpec, Tensor | None, Tensor | None, Tensor | None]:
    valid = None
    if "padded" in case:
        valid = torch.ones(3, PLACES, dtype=torch.bool)
        valid[1, : case["padded"]] = False
    slopes = torch.arange(1, HEADS + 1) / 50 if "slopes" in case else None
    sinks = torch.arange(HEADS) / 3 - 1 if "sinks" in case else None
    site = replace(SITE, mask=MaskSpec(window=case.get("window", 0)), softcap=case.get("softcap", 0.0))
    return site, valid, slopes, sinks


def arguments(
    store: CacheStore, case: dict[str, Any], held: list[Tensor], start: int, stop: int
) -> tuple[Any, ...]:
    site, valid, slopes, sinks = extras(case)
    given = [x[:, :, start:stop] for x in drawn()]
    rest = torch.arange(start, stop), valid, slopes, sinks, site.scale, site.softcap, site.mask.window, PLACES
    return (*given, *held, *rest, *store.constants(site))


def operator_of(store: CacheStore) -> Any:
    return getattr(torch.ops.graphopt, store.attend_op.removeprefix("graphopt::"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", STORES)
def test_rows_in_parts_give_what_whole_sequences_give(name: str, case: str) -> None:
    store = STORES[name]
    site, valid, slopes, sinks = extras(CASES[case])
    assert store.refuses(site, PLACES) is None
    known = None if valid is None else valid[:BATCH]
    expected = store.whole(site, *drawn(), known, slopes, sinks)
    shown = torch.ones(BATCH, PLACES, dtype=torch.bool) if known is None else known
    for parts in ([PLACES], [3, 1, 20, 1, 1, 2, 32], [30, *[1] * 30]):
        held, start, made = held_by(store, site), 0, []
        for count in parts:
            given = arguments(store, CASES[case], held, start, start + count)
            made.append(operator_of(store)(*given))
            start += count
        found = torch.cat(made, 2)
        assert torch.isfinite(found).all()
        different = (found - expected) * shown[:, None, :, None]
        assert different.abs().max() < 1e-5
        assert not any(tensor[BATCH:].any() for tensor in held)


@pytest.mark.parametrize("name", STORES)
def test_a_row_that_is_taken_in_twice_changes_nothing(name: str) -> None:
    store = STORES[name]
    held = held_by(store, SITE)
    operator_of(store)(*arguments(store, {}, held, 0, 40))
    first = operator_of(store)(*arguments(store, {}, held, 40, 41))
    before = [tensor.clone() for tensor in held]
    assert torch.equal(operator_of(store)(*arguments(store, {}, held, 40, 41)), first)
    assert all(map(torch.equal, held, before))


@pytest.mark.parametrize("name", ["split-heads", "h2o"])
@pytest.mark.parametrize("rows", [1, 5])
def test_operators_are_what_they_declare(name: str, rows: int) -> None:
    store = STORES[name]
    site, *_ = extras(CASES["all"])
    opcheck(operator_of(store).default, arguments(store, CASES["all"], held_by(store, site), 0, rows))


def test_the_newest_and_the_most_read_are_kept() -> None:
    store = Evict(keep=12, policy="h2o", recent=4)
    query, key, value = drawn()
    # Every row reads position 2 most.
    key[:, :, 2] = query.view(BATCH, FEW, -1, PLACES, WIDTH).mean((2, 3)) * 50
    query[:] = key[:, :, 2:3].repeat_interleave(HEADS // FEW, 1)
    held = held_by(store, SITE)
    given = arguments(store, {}, held, 0, PLACES)
    operator_of(store)(query, key, value, *given[3:])
    for places in held[2][:BATCH].flatten(0, 1).tolist():
        assert {3, *range(PLACES - 3, PLACES + 1)} <= set(places) and len(set(places)) == 12


def test_retrieval_heads_read_everything() -> None:
    query, key, value = drawn()
    plain = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=SITE.scale, enable_gqa=True
    )
    made = SplitHeads(near=8, whole_heads=(1,)).whole(SITE, query, key, value, None, None, None)
    off = (made - plain).abs().amax((0, 2, 3))
    assert off[2:4].max() < 1e-5 and off[[0, 1, 4, 5]].min() > 1e-2


@pytest.mark.parametrize(
    ("store", "text"),
    [
        (SinkWindow(near=0), "near=0, first=4: expected 1 or more, and 0 or more"),
        (SinkWindow(near=56), "60 positions are kept of the 60 that are read"),
        (SplitHeads(near=8, whole_heads=(3,)), "heads=[3]: expected some of 0 to 2"),
        (Evict(keep=20, policy="h20"), "policy=h20: expected one of h2o, keydiff, knorm, "),
        (Evict(keep=20), "recent=32, keep=20: expected 0 < recent < keep"),
        (Evict(keep=60), "60 positions are kept of the 60 that are read"),
    ],
)  # fmt: skip
def test_stores_say_when_they_do_not_serve(store: CacheStore, text: str) -> None:
    assert text in str(store.refuses(SITE, PLACES))


def test_stores_that_are_shared_are_refused() -> None:
    for store in (SinkWindow(near=8), Evict(keep=40)):
        assert "may read what that has lost by then" in str(store.refuses(replace(SITE, shares=True), PLACES))


@pytest.mark.parametrize(
    ("name", "index", "value", "text"),
    [
        ("split-heads", 1, None, "what a head keeps of the newest positions is not what"),
        ("split-heads", -2, [1, 0], "whole heads [1, 0]: expected some of 0 to 2, ascending"),
        ("split-heads", -1, 14, "stores have 2 whole heads and 14 slots"),
        ("h2o", 1, None, "what a row has driven out is not what the rows before it read"),
        ("h2o", -2, "h20", "policy 'h20': expected one of h2o, keydiff, "),
        ("h2o", -1, 20, "recent=20: expected 1 to 19, of 20 slots"),
        ("h2o", 5, torch.zeros(3, 3, 20), "places are torch.float32 [3, 3, 20]: expected torch.int64"),
    ],
)
def test_what_operators_do_not_take_is_said(name: str, index: int, value: Any, text: str) -> None:
    store = STORES[name]
    given = list(arguments(store, {}, held_by(store, SITE), 0, 2))
    given[index] = value
    if index == 1:
        given[2] = None
    meta = [v.to("meta") if isinstance(v, Tensor) else v for v in given]
    with pytest.raises(ValueError, match=re.escape(text)):
        operator_of(store)(*meta)


def test_bytes_do_not_grow_with_positions() -> None:
    assert Evict(keep=40).stored_bytes(SITE, 2, 4096) == 2 * 3 * 40 * ((8 + 4) * 4 + 8 + 4)
    assert SinkWindow(near=16).stored_bytes(SITE, 2, 4096) == 2 * 3 * 20 * (8 + 4) * 4
    assert SplitHeads(near=16, whole_heads=(1,)).stored_bytes(SITE, 1, 100) == (2 * 20 + 100) * 12 * 4
