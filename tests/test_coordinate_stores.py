"""Stores of coordinates: what is read is the projection of keys and values, in fewer bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import graphopt
from graphopt import InputsError, UnknownNameError
from graphopt.budget import Budget
from graphopt.decoding.assignment import CacheAssignment, store_named
from graphopt.decoding.capture import arguments_of, capture_uncached
from graphopt.decoding.fitting import fit_stores
from graphopt.decoding.masks import MaskSpec
from graphopt.decoding.part import Part
from graphopt.decoding.reroot import as_assigned
from graphopt.decoding.sites import sites_of
from graphopt.decoding.stores import SiteSpec
from graphopt.plugins import default_host, hookimpl
from graphopt.plugins.host import PluginHost
from graphopt.tensors_file import write_tensors
from graphopt_kernels.attend_reference import asked_whole, attention_whole
from graphopt_kernels.cache_stores import Full
from graphopt_kernels.coordinate_stores import Coordinates, KeyChannels, LowRank
from tests.decoders import family, plain, tokens

ROWS = 64
SITE = SiteSpec(4, 2, 16, 16, torch.float64, MaskSpec(), 0.25)
BATCHES = [tokens(8, 32, seed=4)]
BOTH = pytest.mark.parametrize("store", [LowRank(6, 10), KeyChannels(6, 10)], ids=["low-rank", "channels"])


def rows(length: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    query, key, value = (
        torch.randn(2, heads, length, 16, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)
    )
    return query, key, value


def fitted(store: Coordinates, query: torch.Tensor, *rest: torch.Tensor) -> dict[str, torch.Tensor]:
    """What ``store`` is fitted to of rows [B, heads, S, width]."""
    asked = query.unflatten(1, (2, -1)).transpose(0, 1).flatten(1, 3)
    return dict(store.fit(SITE, asked, *(one.transpose(0, 1).flatten(1, 2) for one in rest)))


@BOTH
def test_what_is_read_is_the_projection(store: Coordinates) -> None:
    given = rows()
    made = fitted(store, *given)
    keys, values = made["keys"], made["values"]
    assert torch.allclose(keys.mT @ keys, torch.eye(6, dtype=torch.float64).expand(2, 6, 6), atol=1e-12)
    projected = given[1] @ keys @ keys.mT, given[2] @ values @ values.mT
    expected = attention_whole(asked_whole(SITE, given[0], *projected, None, None, None))
    found = store.whole(replace(SITE, fitted=made), *given, None, None, None)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_the_basis_leaves_out_the_least() -> None:
    """Keys of rank 6 come back as they were; channels of most score are those that are kept."""
    query, key, value = rows()
    low = torch.einsum("bhsd,hde->bhse", key[..., :6], torch.randn(2, 6, 16, dtype=torch.float64))
    basis = fitted(LowRank(key_rank=6), query, low, value)["keys"]
    assert torch.allclose(low @ basis @ basis.mT, low, atol=1e-9)
    loud = key.clone()
    loud[:, :, :, [3, 9]] *= 50
    kept = fitted(KeyChannels(key_rank=2), query, loud, value)["keys"]
    assert sorted(kept[0].nonzero()[:, 0].tolist()) == [3, 9]
    # What no query reads is left out, whatever keys have there; of both heads that read the first one.
    asked = query.clone()
    asked[..., 3] = 0
    asked[:, 1, :, 5] *= 1000
    kept = fitted(KeyChannels(key_rank=2), asked, loud, value)["keys"]
    assert sorted(kept[0].nonzero()[:, 0].tolist()) == [5, 9]
    assert 9 in kept[1].nonzero()[:, 0] and not {3, 5} & set(kept[1].nonzero()[:, 0].tolist())


def decoding(model: torch.nn.Module, *steps: Any, inputs: Any = None, **options: Any) -> graphopt.Optimized:
    return graphopt.optimize(
        model, inputs or (tokens(),), generate=graphopt.Generate(ROWS, 2), emit="eager", on_error="raise",
        pipeline=steps, **options,
    )  # fmt: skip


def kept(store: str, **options: Any) -> Any:
    return graphopt.use("keep-kv", store=store, **options)


def projected_model(
    model: torch.nn.Module, bases: list[dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch, ids: Any
) -> torch.Tensor:
    """Logits of the model itself, run with attentions whose keys and values are projected."""
    attend, layers = functional.scaled_dot_product_attention, iter(bases)

    def projecting(query: Any, key: Any, value: Any, **options: Any) -> torch.Tensor:
        own = next(layers)
        key, value = (
            x @ (basis := own[name]) @ basis.mT for x, name in ((key, "keys"), (value, "values"))
        )
        return attend(query, key, value, **options)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(functional, "scaled_dot_product_attention", projecting)
        logits: torch.Tensor = model(ids)
    return logits


@pytest.mark.parametrize("name", ["low-rank", "key-channels"])
def test_a_decoder_is_the_model_whose_keys_and_values_are_projected(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token by token against eager in float64; the bytes are those of coordinates and bases."""
    model = plain("fused").double()
    fast = decoding(model, kept(f"{name}{{key_rank=8,value_rank=12}}", calibration=BATCHES))
    ids = fast.generate(tokens(2, 20), max_new_tokens=40)
    decoder = fast._generator.built.decoder
    bases = [dict(site.spec.fitted) for site in decoder.sites]
    assert [basis["keys"].shape for basis in bases] == [(4, 16, 8)] * 2
    expected = projected_model(model, bases, monkeypatch, ids)
    assert torch.equal(ids[:, 20:], expected[:, 19:-1].argmax(-1))
    decoder.reset(2)
    prompt, then = decoder(ids[:, :20]), decoder(ids[:, 20:21])
    assert torch.allclose(torch.cat([prompt, then], 1), expected[:, 19:21], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(expected, model(ids), atol=1e-3)
    sizes = 2 * 8 * (2 * 4 * ROWS * (8 + 12) + 4 * 16 * (8 + 12))
    record = fast.report.decoding
    assert record.cache_bytes == decoder.cache_bytes == sizes and record.lossy.attentions == 2
    assert [step.options for step in fast.report.steps] == [
        f'store="{name}{{key_rank=8,value_rank=12}}",calibration=[8 rows of token ids]'
    ]


INNER = 'low-rank{key_rank=8,store="quant{bits=4,group=8}"}'


def test_coordinates_are_kept_in_another_store() -> None:
    """Rounded coordinates, read by attentions that share them; what is checked is what is generated."""
    model = plain("fused", layers=3)
    fast = decoding(model, graphopt.use("share-kv", plan={2: 0}), kept(INNER, calibration=BATCHES))
    record, decoder = fast.report.decoding, fast._generator.built.decoder
    assert [site.store for site in record.sites] == [INNER] * 3
    assert [site.source for site in record.sites] == [0, 1, 0]
    assert record.off <= record.lossy.allowed and record.lossy.attentions == 3
    names = {name.removeprefix("store_0_") for name in decoder.stores if name.startswith("store_0_")}
    assert names == {f"{x}_{y}" for x in ("key", "value") for y in ("codes", "scales", "ring")}
    assert decoder.stores["store_0_key_ring"].shape[-1] == 8
    assert decoder.sites[2].spec.fitted is decoder.sites[0].spec.fitted
    assert fast.generate(tokens(2, 20), max_new_tokens=30).shape == (2, 50)


@pytest.mark.parametrize(
    ("kind", "store", "slots"),
    [
        ("fused", "sink-window{near=20}", 24),
        ("fused", "evict{keep=24,recent=8}", 24),
        ("fused", "split-heads{near=20,whole_heads=[1]}", 24),
        ("window", "ring", 6),
    ],
    ids=["sink", "evict", "split", "ring"],
)
@pytest.mark.slow
def test_coordinates_are_dropped_as_rows_are(kind: str, store: str, slots: int) -> None:
    text = f'low-rank{{key_rank=8,value_rank=8,store="{store}"}}'
    fast = decoding(plain(kind), kept(text, calibration=BATCHES))
    record, decoder = fast.report.decoding, fast._generator.built.decoder
    assert record.off <= record.lossy.allowed and record.lossy.attentions == 2
    assert (slots, 8) in {tuple(tensor.shape[2:]) for tensor in decoder.stores.values()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("store", ["low-rank{key_rank=8,value_rank=12}", "key-channels{key_rank=8}", INNER])
def test_families_decode_in_coordinates(name: str, store: str) -> None:
    pytest.importorskip("transformers")
    ids = tokens(2, 20)
    steps = "default", kept(store, calibration=BATCHES)
    fast = decoding(family(name), *steps, inputs={"input_ids": ids})
    record, decoder = fast.report.decoding, fast._generator.built.decoder
    assert record.off <= record.lossy.allowed < 1e-2
    assert record.cache_bytes == decoder.cache_bytes
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    made = fast.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False)
    assert made.shape == (2, 50)


def test_stores_of_coordinates_are_priced_among_others(tmp_path: Path) -> None:
    file = tmp_path / "tokens.safetensors"
    write_tensors(file, {"input_ids": tokens(2, 100)}, {})
    model = plain("fused")
    exact = 2 * 2 * 2 * 4 * ROWS * 16 * 4
    offered = '["low-rank{key_rank=8,value_rank=8}"]'
    allow = (f'lossy-cache{{calibration="{file}",stores={offered}}}',)
    budget = Budget(cache=exact * 7 // 10)
    record = decoding(model, "lossy-cache", budget=budget, allow=allow).report.decoding
    assert {site.store for site in record.sites} == {"low-rank{key_rank=8,value_rank=8}"}
    assert record.lossy.divergence > 0 and record.lossy.tokens == 200
    assert record.lossy.frontier[0].bytes == record.cache_bytes


SHORT = {"calibration": [tokens(1, 15)]}
GIVEN = {"calibration": BATCHES}


@pytest.mark.parametrize(
    ("store", "options", "reason"),
    [
        ("low-rank{key_rank=8}", {}, "is fitted to calibration tokens, and keep-kv was given none"),
        ("quant{group=8}", GIVEN, "is not fitted to calibration tokens, and keep-kv was given some"),
        ("low-rank", GIVEN, "neither key_rank nor value_rank is given: nothing would be left out"),
        ("low-rank{key_rank=16}", GIVEN, "key_rank=16: expected 1 to 15, or 0 for all of 16"),
        ("low-rank{value_rank=17}", GIVEN, "value_rank=17: expected 1 to 15, or 0 for all of 16"),
        ("key-channels{key_rank=-1}", GIVEN, "key_rank=-1: expected 1 to 15, or 0 for all of 16"),
        ("key-channels{key_rank=17}", {**GIVEN, "layers": (1,)}, "take attention 1: key_rank=17: expected"),
        ("low-rank{key_rank=4}", {**GIVEN, "layers": (7,)}, "attention 7 is to have the store low-rank"),
        ("low-rank{key_rank=4}", SHORT, "is fitted to 15 tokens of calibration: expected 16 or more"),
        ("low-rank{key_rank=4}", {"calibration": [torch.full((1, 32), 200)]}, "has token 200: the model has"),
        ("low-rank{key_rank=4}", {"calibration": [tokens(1, 600)]}, "not take calibration of 600 tokens a s"),
        ('low-rank{key_rank=4,store="low-rank{key_rank=2}"}', GIVEN, "expected one that is not fitted to to"),
        ("low-rank{key_rank=4,store=latent}", GIVEN, "store=latent: it does not say what whole sequences"),
        ('low-rank{key_rank=4,store="quant{bits=5}"}', GIVEN, "store=quant{bits=5}: 5 bits: expected 2, 3"),
    ],
    ids=[
        "none", "some", "nothing", "all", "wide", "negative", "layer", "attention", "short", "vocabulary",
        "long", "twice", "latent", "inner",
    ],
)  # fmt: skip
def test_stores_that_cannot_be_fitted_are_refused(store: str, options: Any, reason: str) -> None:
    with pytest.raises(InputsError) as caught:
        decoding(plain("fused"), kept(store, **options))
    assert reason in str(caught.value)


def test_rows_that_are_not_finite_are_refused() -> None:
    model = plain("fused")
    with torch.no_grad():
        model.words.weight[5] = float("inf")
    ids = tokens(1, 32).clamp(min=6)
    ids[0, 3] = 5
    with pytest.raises(InputsError, match="of attention 0 cannot be fitted: 4 of 128 queries are not finite"):
        decoding(model, kept("low-rank{key_rank=4}", calibration=[ids]))


def test_fits_of_other_stores_are_refused() -> None:
    uncached = capture_uncached(plain("fused"), (tokens(),), graphopt.Generate(ROWS))
    stores, assignment = default_host().stores(), CacheAssignment({0: "low-rank{key_rank=4}"})
    sites = sites_of(uncached, stores, 1, ROWS)
    with pytest.raises(InputsError, match="of attention 0 is to be fitted to calibration tokens: it was not"):
        sites_of(uncached, stores, 1, ROWS, assignment)
    found = fit_stores(uncached, sites, {0: [LowRank(key_rank=5)], 1: [Full()]}, [(BATCHES[0], None)])
    assert list(found) == [(0, "low-rank{key_rank=5}")]
    other = {0: found[0, "low-rank{key_rank=5}"]}
    with pytest.raises(InputsError, match=r"fitted as another, with keys torch.float32 \[4, 16, 5\]"):
        sites_of(uncached, stores, 1, ROWS, assignment, other)
    with pytest.raises(InputsError, match="fitted to calibration tokens: there are none"):
        fit_stores(uncached, sites, {0: [LowRank(key_rank=5)]}, [])


@dataclass(frozen=True)
class Told(LowRank):
    """Says what it was told of, in the place of a basis."""

    name = "told"

    def fit(self, site: Any, query: Any, key: Any, value: Any) -> dict[str, torch.Tensor]:
        return {"query": query, "key": key, "value": value}

    def fitted(self, site: Any) -> Any:
        sizes = {"query": (4, 2 * 64, 16), "key": (4, 64, 16), "value": (4, 64, 16)}
        return {name: (size, torch.float32) for name, size in sizes.items()}


def test_stores_are_told_of_all_that_read_them_and_of_no_padding() -> None:
    uncached = capture_uncached(plain("fused", layers=3), (tokens(),), graphopt.Generate(ROWS))
    regions = [site.region for site in sites_of(uncached, default_host().stores(), 1, ROWS)]
    shared = as_assigned(uncached, regions, {2: 0}, {})
    sites = sites_of(shared, default_host().stores(), 1, ROWS)
    ids = tokens(3, 32, seed=4)
    mask = torch.ones_like(ids)
    mask[2] = 0
    (made,) = fit_stores(shared, sites, {0: [Told(key_rank=4)]}, [(ids, mask)]).values()
    ends = [sites[0].region.query, sites[2].region.query, sites[0].region.key, sites[0].region.value]
    values = Part(shared.gm.graph, {end.name for end in ends})(
        {**shared.weights, **arguments_of(shared, ids[:2], None, None)}
    )
    asked, later, key, value = (values[end.name].transpose(0, 1).flatten(1, 2) for end in ends)
    assert torch.allclose(made["query"], torch.cat([asked, later], 1), atol=1e-6)
    assert torch.allclose(made["key"], key, atol=1e-6)
    assert torch.allclose(made["value"], value, atol=1e-6)


@dataclass(frozen=True)
class Own(Full):
    """A store that no installed plugin brings."""

    name = "own"


class Plugin:
    graphopt_api = 1

    @hookimpl
    def graphopt_stores(self) -> Any:
        return (Own,)


def test_stores_inside_are_those_of_the_session() -> None:
    plugin, text = Plugin(), "low-rank{key_rank=8,store=own}"
    with pytest.raises(UnknownNameError, match="own"):
        store_named(text, default_host().stores())
    made = store_named(text, PluginHost((plugin,)).stores())
    assert str(made) == text and made.inside(SITE)[0] == Own() and made.last_alone
