"""Lossy stores in decoders: what is assigned is kept and checked, what is not allowed is refused."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import graphopt
from graphopt import BudgetError, InputsError, VerificationError
from graphopt.budget import Budget
from graphopt.decoding.allocate import StoreChoice, allocate_stores
from graphopt.decoding.capture import Uncached, capture_uncached
from graphopt.decoding.sites import Site, sites_of
from graphopt.decoding.whole import single_divergences, with_stores
from graphopt.plugins import default_host, hookimpl
from graphopt.quality import row_divergences
from graphopt.tensors_file import write_tensors
from graphopt_kernels.quant_store import Quant
from tests.decoders import family, plain, tokens

ROWS = 200


def optimized(model: torch.nn.Module, *passes: object, ids: Any = None, **options: Any) -> graphopt.Optimized:
    inputs = (tokens(1, 6),) if ids is None else ids
    generate = graphopt.Generate(max_tokens=ROWS, max_batch=2)
    listed = ["default", *passes]
    return graphopt.optimize(model, inputs, generate=generate, emit="eager", pipeline=listed, **options)


def rounded(fast: graphopt.Optimized, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the captured graph whose attentions round as the stores of the decoder do."""
    decoder = fast._generator.built.decoder
    stores = {i: decoder.sites[site.source].store for i, site in enumerate(decoder.sites)}
    lossy = {i: store for i, store in stores.items() if not store.exact}
    regions, specs = [s.region for s in decoder.sites], [s.spec for s in decoder.sites]
    return with_stores(decoder.uncached, regions, specs, lossy).run(ids)


@pytest.mark.parametrize(
    "kind",
    [
        "fused",
        pytest.param("sinks", marks=pytest.mark.slow),
        pytest.param("linear-bias", marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_the_graph_that_rounds(kind: str) -> None:
    model = plain(kind)
    fast = optimized(model, graphopt.use("keep-kv", store="quant{bits=3,group=8}", layers=(0,)))
    ids = fast.generate(tokens(2, 50), max_new_tokens=90)
    expected = rounded(fast, ids)[:, 49:-1].argmax(-1)
    assert torch.equal(ids[:, 50:], expected)
    record = fast.report.decoding
    assert record.sites[0].store == "quant{bits=3,group=8}"
    assert record.lossy.attentions == 1 and record.off <= record.lossy.allowed
    assert "1 attentions keep less than the model makes (lossy)" in str(fast.report)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [("mistral", {"sliding_window": 70}), ("gemma3n_text", {"sliding_window": 48}), ("deepseek_v2", {})],
    ids=["mistral", "gemma3n", "deepseek"],
)
def test_families_decode_with_rounded_stores(name: str, changes: dict[str, Any]) -> None:
    model = family(name, **changes)
    ids = tokens(2, 40)
    fast = optimized(
        model, graphopt.use("keep-kv", store="quant{group=8}"), ids={"input_ids": ids}, on_error="raise"
    )
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    made = fast.generate(ids, attention_mask=mask, max_new_tokens=100, do_sample=False)
    record = fast.report.decoding
    assert made.shape[1] > 40 and record.lossy.attentions == len(record.sites)
    assert record.off <= record.lossy.allowed < 1e-2
    if name == "gemma3n_text":
        assert [site.source for site in record.sites] == [0, 1, 0, 1]


def captured(layers: int = 3) -> tuple[Uncached, tuple[Site, ...], list[tuple[torch.Tensor, None]]]:
    uncached = capture_uncached(plain("fused", layers=layers), (tokens(1, 6),), graphopt.Generate(ROWS))
    batches = [(tokens(1, 120, seed=seed), None) for seed in (1, 2)]
    return uncached, sites_of(uncached, default_host().stores(), 1, ROWS), batches


def test_single_prices_are_those_of_the_whole_program() -> None:
    uncached, sites, batches = captured()
    regions, specs = [site.region for site in sites], [site.spec for site in sites]
    stores = [Quant(bits=2), Quant(key_bits=4, value_bits=2)]
    found = single_divergences(uncached, regions, specs, {0: stores, 2: stores}, batches)
    assert set(found) == {(index, store) for index in (0, 2) for store in stores}
    for (index, store), price in found.items():
        changed = with_stores(uncached, regions, specs, {index: store})
        rows = [row_divergences(uncached.run(ids), changed.run(ids)) for ids, _ in batches]
        assert price == pytest.approx(float(torch.cat(rows).double().mean()), rel=1e-4)
        assert price > 1e-7


def test_the_least_sum_that_fits_is_taken() -> None:
    uncached, sites, batches = captured()
    offered = [Quant(bits=4), Quant(bits=2)]
    prices = {0: (1.0, 2.0), 1: (0.1, 0.2), 2: (0.5, 3.0)}
    choices = [
        choice
        for site, (four, two) in prices.items()
        for choice in (
            StoreChoice(site, "full", 100, 0.0),
            StoreChoice(site, "quant", 50, four),
            StoreChoice(site, "quant{bits=2}", 30, two),
        )
    ]
    found = allocate_stores(uncached, sites, choices, offered, batches, 185)
    assert found.assignment.stores == {0: "full", 1: "quant{bits=2}", 2: "quant"}
    assert (found.bytes, found.predicted, found.gap) == (180, 0.7, 0.0)
    assert found.measured > 0 and found.tokens == 240
    assert found.frontier[0].bytes == 90 and found.frontier[-1].divergence == 0
    with pytest.raises(BudgetError, match=r"take 90 B \(90 bytes\) at least, 80 B are allowed"):
        allocate_stores(uncached, sites, choices, offered, batches, 80)
    within = allocate_stores(uncached, sites, choices, offered, batches, None, max_kl=0.7)
    assert within.measured <= 0.7 and within.bytes <= 180
    with pytest.raises(BudgetError, match="nats a token, max_kl=1e-12 is allowed"):
        allocate_stores(uncached, sites, choices, offered, batches, 185, max_kl=1e-12)
    assert not found.gave_up and not within.gave_up
    # Prices that promise no change at all are contradicted by what is measured, whatever they are scaled by.
    free = [StoreChoice(choice.site, choice.store, choice.bytes, 0.0) for choice in choices]
    left = allocate_stores(uncached, sites, free, offered, batches, None, max_kl=1e-12)
    assert left.gave_up and set(left.assignment.stores.values()) == {"full"} and left.bytes == 300


def test_budgets_of_stores_are_kept_where_loss_is_allowed(tmp_path: Path) -> None:
    file = tmp_path / "tokens.safetensors"
    write_tensors(file, {"input_ids": tokens(2, 100)}, {})
    model = plain("fused")
    exact = optimized(model).report.decoding.cache_bytes
    budget = Budget(cache=exact * 2 // 5)
    with pytest.raises(BudgetError, match="pass 'lossy-cache' changes results and is not allowed"):
        optimized(model, budget=budget).generate(tokens(1, 6))
    with pytest.raises(InputsError, match="needs calibration tokens to price stores with"):
        optimized(model, budget=budget, allow=("lossy-cache",))
    allow = (f'lossy-cache{{calibration="{file}"}}',)
    fast = optimized(model, budget=budget, allow=allow)
    record = fast.report.decoding
    assert record.cache_bytes <= exact * 2 // 5
    assert record.lossy.tokens == 200 and 0 < record.lossy.divergence < 0.1
    assert record.lossy.frontier[0].bytes < record.cache_bytes
    report = fast.report
    assert type(report).from_json(report.to_json()).decoding == record
    assert "bytes and predicted KL: " in str(report)
    assert optimized(model, allow=allow).report.decoding.lossy is None


def test_stores_are_lossy_where_a_budget_of_all_memory_needs_it(tmp_path: Path) -> None:
    file = tmp_path / "tokens.safetensors"
    write_tensors(file, {"input_ids": tokens(2, 100)}, {})
    model = plain("fused")
    allow = (f'lossy-cache{{calibration="{file}"}}',)
    exact = optimized(model).report.decoding.cache_bytes
    with pytest.raises(BudgetError) as refused:
        optimized(model, budget=1000, allow=allow)
    assert "decoding one token takes" in str(refused.value)
    least = refused.value.least_bytes

    def within(budget: int, **options: Any) -> graphopt.Optimized:
        fast = optimized(model, budget=budget, **options)
        predicted = fast.report.predicted
        assert predicted is not None and predicted.peak_bytes is not None
        assert predicted.peak_bytes <= budget and predicted.cache_bytes == fast.report.decoding.cache_bytes
        return fast

    # What fits as it is stays exact.
    assert within(least, allow=allow).report.decoding.lossy is None
    budget = least - exact // 3
    with pytest.raises(BudgetError, match="'lossy-cache' changes results and is not allowed, it would do"):
        optimized(model, budget=budget)
    fast = within(budget, allow=allow)
    record = fast.report.decoding
    assert record.cache_bytes < exact and record.lossy.divergence > 0
    assert any("stores are held to" in note for note in fast.report.diagnostics)
    # More than one token goes at a time.
    assert record.chunk > 1
    assert fast.generate(tokens(2, 6), max_new_tokens=4).shape == (2, 10)
    assert copy.deepcopy(fast).report.decoding.cache_bytes == record.cache_bytes
    with pytest.raises(BudgetError, match="are allowed") as last:
        optimized(model, budget=least - 2 * exact + 40000, allow=allow)
    assert last.value.least_bytes > last.value.budget_bytes


def test_a_bound_of_stores_is_not_changed_by_one_of_all_memory(tmp_path: Path) -> None:
    file = tmp_path / "tokens.safetensors"
    write_tensors(file, {"input_ids": tokens(2, 100)}, {})
    model = plain("fused")
    with pytest.raises(BudgetError) as refused:
        optimized(model, budget=1000)
    budget = Budget(memory=refused.value.least_bytes - 100, cache="1GiB")
    with pytest.raises(BudgetError, match=r"moving sequences takes .* are allowed"):
        optimized(model, budget=budget, allow=(f'lossy-cache{{calibration="{file}"}}',))


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        (None, "cannot be read"),
        ({"ids": torch.zeros(1, 200).long()}, "has no input_ids: expected token ids"),
        ({"input_ids": torch.zeros(1, 20).long()}, "has input_ids torch.int64 [1, 20]"),
        ({"input_ids": torch.full((1, 200), 9999)}, "has token 9999: the model has"),
    ],
    ids=["none", "name", "short", "vocabulary"],
)
def test_calibration_that_does_not_serve_is_said(tmp_path: Path, tensors: Any, text: str) -> None:
    file = tmp_path / "tokens.safetensors"
    if tensors is not None:
        write_tensors(file, tensors, {})
    with pytest.raises(InputsError) as caught:
        optimized(plain("fused"), budget=Budget(cache=40000), allow=(f'lossy-cache{{calibration="{file}"}}',))
    assert text in str(caught.value)


def test_stores_that_serve_no_attention_are_refused() -> None:
    with pytest.raises(InputsError, match="takes none of 2 attentions: the newest 512 pos"):
        optimized(plain("fused"), graphopt.use("keep-kv", store="quant{residual=512}"))


@dataclass(frozen=True)
class Wrong(Quant):
    """Says that it gives something else than it does."""

    name = "wrong"

    def whole(self, site: Any, *given: Any) -> torch.Tensor:
        return super().whole(site, *given) * 1.05


class WrongPlugin:
    graphopt_api = 1

    @hookimpl
    def graphopt_stores(self) -> Any:
        return (Wrong,)


def test_decoders_that_do_not_give_what_stores_say_are_refused() -> None:
    plugin = WrongPlugin()
    with pytest.raises(VerificationError, match="store wrong of attention 0 does not give what it says"):
        optimized(
            plain("fused"),
            graphopt.use("keep-kv", store="wrong", plugins=(plugin,)),
            plugins=(plugin,),
            on_error="raise",
        ).generate(tokens(1, 6))


def test_attentions_that_share_read_one_store_of_rounded_rows() -> None:
    model = plain("fused", layers=3)
    passes = graphopt.use("share-kv", plan={2: 0}), graphopt.use("keep-kv", store="quant{bits=3,group=8}")
    fast = optimized(model, *passes, on_error="raise")
    ids = fast.generate(tokens(2, 50), max_new_tokens=60)
    assert torch.equal(ids[:, 50:], rounded(fast, ids)[:, 49:-1].argmax(-1))
    record = fast.report.decoding
    assert [site.source for site in record.sites] == [0, 1, 0] and record.lossy.attentions == 3
    assert record.off <= record.lossy.allowed
