"""Bytes of stores: counted, bounded alone and with the rest, and no more than is said."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import graphopt
from graphopt import Budget, BudgetError, CacheStore, Report, _torch
from graphopt.budget import format_bytes
from graphopt.decoding.stores import SiteSpec
from graphopt.errors import BudgetSyntaxError, PluginError
from graphopt.plugins.host import PluginHost
from tests.decoders import WIDTH, greedy, plain, tokens

TOKENS, BATCH = 256, 2
STORES = 2 * BATCH * 2 * TOKENS * WIDTH * 4
"""Two layers, keys and values, of float32."""


def generating(kind: str = "fused", batch: int = BATCH, **options: Any) -> graphopt.Optimized:
    generate = graphopt.Generate(TOKENS, batch)
    return graphopt.optimize(plain(kind), (tokens(),), generate=generate, emit="eager", **options)


@pytest.fixture(scope="module")
def free() -> graphopt.Optimized:
    return generating()


def test_stores_are_counted_and_are_what_is_held(free: graphopt.Optimized) -> None:
    report = free.report
    assert report.predicted is not None and report.predicted.cache_bytes == STORES
    assert report.predicted.peak_bytes > report.predicted.weight_bytes + STORES
    assert report.decoding is not None and sum(site.bytes for site in report.decoding.sites) == STORES
    held = free._generator.built.decoder.held
    assert sum(tensor.untyped_storage().nbytes() for tensor in held.values()) == STORES
    before = [tensor.data_ptr() for tensor in held.values()]
    free.generate(tokens(), max_new_tokens=9)
    assert [tensor.data_ptr() for tensor in held.values()] == before


def test_rings_take_their_window() -> None:
    assert generating("window").report.predicted.cache_bytes == STORES * 6 // TOKENS


def test_a_report_says_what_is_kept_and_comes_back_from_json(free: graphopt.Optimized) -> None:
    report = free.report
    text = str(report)
    assert f"{format_bytes(STORES)} for 2 sequences of 256 positions; prompts go in 256 tokens" in text
    assert "full: 2 attentions (blocks.0, blocks.1), causal" in text
    assert Report.from_json(report.to_json()) == report


def test_reports_from_before_stores_come_back(free: graphopt.Optimized) -> None:
    data = free.report.to_json()
    del data["decoding"]
    for name in ("baseline", "predicted"):
        del data[name]["cache_bytes"]
    assert Report.from_json(data).decoding is None


def test_stores_are_bounded_alone() -> None:
    assert generating(budget=Budget(cache=STORES)).report.decoding.budget == STORES
    with pytest.raises(BudgetError) as caught:
        generating(budget=Budget(cache=STORES - 1))
    assert caught.value.least_bytes == STORES and caught.value.budget_bytes == STORES - 1
    said = (
        f"the stores of keys and values take {format_bytes(STORES)} ({STORES} bytes) for max_tokens=256 and "
        f"max_batch=2, {format_bytes(STORES - 1)} are allowed; the largest is that of blocks.0: full, "
        f"{format_bytes(STORES // 2)}"
    )
    assert caught.value.message == said
    with pytest.raises(BudgetSyntaxError, match="cannot read '10%' as bytes"):
        Budget(cache="10%")


def test_prompts_go_in_by_parts_where_they_would_not_fit_whole(free: graphopt.Optimized) -> None:
    model = plain("fused")
    needed = free.report.predicted.peak_bytes
    bound = needed - 200_000
    fast = generating(budget=bound)
    record = fast.report.decoding
    assert 1 < record.chunk < TOKENS and fast.report.predicted.peak_bytes <= bound
    ids = tokens(2, 200)
    assert torch.equal(fast.generate(ids, max_new_tokens=8), greedy(model, ids, 8))


def test_what_does_not_fit_a_token_is_refused_with_what_takes_it() -> None:
    stores = STORES // BATCH
    with pytest.raises(BudgetError) as caught:
        generating(budget=stores, batch=1)
    assert f"{format_bytes(stores)} stores of keys and values for max_tokens=256" in caught.value.message
    assert "are parameters and buffers" in caught.value.message
    fits = generating(budget=caught.value.least_bytes, batch=1)
    assert fits.report.decoding.chunk == 1
    with pytest.raises(BudgetError, match=re.escape("decoding one token takes")):
        generating(budget=caught.value.least_bytes - 1, batch=1)


def test_sequences_that_change_places_fit_too() -> None:
    """As beams do: their stores move through memory of its own, of 64 MiB at most."""
    with pytest.raises(BudgetError) as caught:
        generating(budget=STORES)
    least = caught.value.least_bytes
    predicted = generating(budget=least).report.predicted
    assert predicted.peak_bytes == least and predicted.peak_bytes >= predicted.weight_bytes + 2 * STORES
    with pytest.raises(BudgetError, match=re.escape("moving sequences takes")) as caught:
        generating(budget=least - 1)
    assert caught.value.least_bytes == least


@pytest.mark.parametrize("length", [1, 64, 255])
def test_no_more_is_taken_than_predicted(free: graphopt.Optimized, length: int) -> None:
    decoder = free._generator.built.decoder
    ids = tokens(BATCH, length)

    def step() -> None:
        decoder.reset(BATCH)
        decoder(ids)

    step()
    live = most = 0
    for change in _torch.record_allocations(step):
        live += change
        most = max(most, live)
    predicted = free.report.predicted
    room = predicted.peak_bytes - predicted.weight_bytes - STORES
    assert most <= room
    if length == 255:
        # Prediction is for a prompt of all positions.
        assert most > 0.8 * room


@dataclass(frozen=True)
class Half(CacheStore):
    """Keeps as little as it likes: only what is chosen is looked at."""

    name = "half"
    exact = True
    attend_op = "graphopt::attend_full"

    def tensors(
        self, site: SiteSpec, batch: int, capacity: int
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        shape = (batch, site.kv_heads, capacity, site.key_width)
        return {"key": (shape, torch.bfloat16), "value": (shape, torch.bfloat16)}


class Offers:
    graphopt_api = 1

    @graphopt.hookimpl
    def graphopt_stores(self) -> Iterable[Any]:
        return [Half]


def test_a_store_of_a_plugin_that_takes_less_is_taken_and_checked_like_any_other() -> None:
    # Numbers of half the bits are too far off for what calls itself exact.
    with pytest.raises(graphopt.VerificationError, match="decoding gives other logits than the model"):
        generating(plugins=(Offers(),), on_error="raise")


class Wrong:
    graphopt_api = 1

    def __init__(self, returned: Any) -> None:
        self.returned = returned

    @graphopt.hookimpl
    def graphopt_stores(self) -> Iterable[Any]:
        return self.returned


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        ([int], "expected subclasses of graphopt.CacheStore, got <class 'int'>"),
        (["graphopt_kernels.cache_stores:Fulll"], "cannot import 'graphopt_kernels.cache_stores:Fulll'"),
        ([type("Bare", (CacheStore,), {})], "store Bare must be a frozen dataclass"),
        ([dataclass(frozen=True)(type("Bare", (CacheStore,), {}))], "needs a class variable `name`"),
    ],
    ids=["other", "missing", "class", "unnamed"],
)
def test_what_is_no_store_is_refused(returned: Any, text: str) -> None:
    host = PluginHost((Wrong(returned),), entry_points=(), strict=True)
    with pytest.raises(PluginError, match=re.escape(text)):
        host.stores()
