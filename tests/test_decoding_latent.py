"""Attention over latents: what is kept, that the numbers are the same, what is left as it is."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.library import opcheck

import graphopt
from graphopt.decoding.absorb import absorbed
from graphopt.decoding.capture import capture_uncached
from graphopt.decoding.masks import MaskSpec
from graphopt.decoding.sites import sites_of
from graphopt.decoding.stores import SiteSpec
from graphopt.plugins import default_host
from graphopt_kernels.cache_stores import Full, Latent
from tests.decoders import HEADS, VOCABULARY, family, greedy, tokens

RANK, OWN, SHARED, VALUE, WIDTH = 12, 8, 4, 10, 32


class Latents(nn.Module):
    """Keys and values of all heads out of one latent, in one of several ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.rank = 200 if kind == "wide" else RANK
        self.shared = 0 if kind == "alone" else SHARED
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.query = nn.Linear(WIDTH, HEADS * (OWN + self.shared), bias=False)
        self.down, self.norm = nn.Linear(WIDTH, self.rank, bias=False), nn.LayerNorm(self.rank)
        self.same = nn.Linear(WIDTH, SHARED * (HEADS if kind == "each" else 1), bias=False)
        self.up = nn.Linear(self.rank, HEADS * (OWN + VALUE), bias=kind == "bias")
        self.out = nn.Linear(HEADS * VALUE, WIDTH, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        batch, length, _ = x.shape
        query = self.query(x).view(batch, length, HEADS, -1).transpose(1, 2)
        both = self.up(self.norm(self.down(x)))
        if self.kind == "between":
            both = both.view(batch, length, OWN + VALUE, HEADS).permute(0, 3, 1, 2)
        else:
            both = both.view(batch, length, HEADS, OWN + VALUE).transpose(1, 2)
        if self.kind == "values-first":
            value, key = both.split([VALUE, OWN], -1)
        else:
            key, value = both.split([OWN, VALUE], -1)
        if self.kind == "turned":
            key = key * torch.arange(length).cos()[:, None]
        if self.shared:
            same = self.same(x).view(batch, length, -1, SHARED).transpose(1, 2)
            same = same * torch.arange(length)[:, None].sin()
            key = torch.cat([same.expand(-1, HEADS, -1, -1), key], -1)
        made = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.4)
        return self.head(x + self.out(made.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("kind", ["both", "values-first", "alone"])
def test_latents_are_kept_and_nothing_else(kind: str) -> None:
    model = Latents(kind).eval()
    options = graphopt.Generate(40, 2)
    fast = graphopt.optimize(model, (tokens(1, 6),), generate=options, emit="eager", on_error="raise")
    ids = tokens(2, 9)
    assert torch.equal(fast.generate(ids, max_new_tokens=25), greedy(model, ids, 25))
    (site,) = fast.report.decoding.sites
    kept = RANK + (0 if kind == "alone" else SHARED)
    assert (site.store, site.bytes) == ("latent", 2 * 40 * kept * 4)
    assert fast.report.decoding.cache_bytes == site.bytes < 2 * 40 * HEADS * (OWN + VALUE) * 4


@pytest.mark.parametrize("kind", ["both", "bias", "between", "each", "turned", "wide"])
def test_what_is_no_latent_or_no_smaller_stays(kind: str) -> None:
    changed = kind == "both"
    uncached = capture_uncached(Latents(kind).eval(), (tokens(1, 6),), graphopt.Generate(40))
    sites = sites_of(uncached, default_host().stores(), 1, 40)
    low = absorbed(uncached, sites)
    assert (low is not uncached) is changed
    if changed:
        ids = tokens(2, 20)
        assert (low.run(ids) - uncached.run(ids)).abs().max() < 1e-5
        (site,) = sites_of(low, default_host().stores(), 1, 40)
        spec = site.spec
        assert (spec.kv_heads, spec.key_width, spec.value_width) == (1, RANK + SHARED, RANK)
        assert spec.within and spec.scale == 0.4 and spec.heads == HEADS
        assert absorbed(uncached, sites, {0}) is uncached


def test_stores_that_passes_chose_are_those_of_keys_and_values() -> None:
    fast = graphopt.optimize(
        Latents("both").eval(), (tokens(1, 6),), generate=graphopt.Generate(40, 2), emit="eager",
        pipeline=["default", graphopt.use("keep-kv", store="full")], on_error="raise",
    )  # fmt: skip
    fast.generate(tokens(1, 6), max_new_tokens=1)
    (site,) = fast.report.decoding.sites
    assert (site.store, site.bytes) == ("full", 2 * 40 * HEADS * (OWN + SHARED + VALUE) * 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2"])
def test_families_keep_latents(name: str) -> None:
    pytest.importorskip("transformers")
    model: Any = family(name)
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options = graphopt.Generate(40, 2)
    fast = graphopt.optimize(model, {"input_ids": ids}, generate=options, emit="eager", on_error="raise")
    given = {"attention_mask": mask, "max_new_tokens": 25, "do_sample": False}
    assert torch.equal(fast.generate(ids, **given), model.generate(ids, **given))
    record = fast.report.decoding
    # Latents of 32 numbers and 8 rotary ones, in place of 4 heads of 24 and 16.
    assert [(site.store, site.bytes) for site in record.sites] == [("latent", 2 * 40 * 40 * 4)] * 2
    assert record.off < 1e-5


SITE = SiteSpec(4, 1, 12, 8, torch.float32, MaskSpec(), 0.3, within=True)


def test_rows_are_those_of_a_store_of_both() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 20, 12, generator=generator)
    key = torch.randn(2, 1, 20, 12, generator=generator)
    one, two = (
        [torch.zeros(shape) for shape, _ in store.tensors(SITE, 3, 24).values()]
        for store in (Latent(), Full())
    )
    rest = None, None, None, 0.3, 0.0, 0, 24
    for start, stop in ((0, 15), (15, 16), (16, 20)):
        rows = query[:, :, start:stop], key[:, :, start:stop], key[:, :, start:stop, :8]
        at = torch.arange(start, stop)
        made = torch.ops.graphopt.attend_latent(*rows, *one, at, *rest, *Latent().constants(SITE))
        assert torch.equal(made, torch.ops.graphopt.attend_full(*rows, *two, at, *rest))
    assert torch.equal(one[0][:2, :, :20], key) and not one[0][2].any()
    opcheck(torch.ops.graphopt.attend_latent.default, (*rows, *one, at, *rest, 8))
    meta = [x.to("meta") if isinstance(x, Tensor) else x for x in (*rows, *one, at, *rest, 13)]
    with pytest.raises(ValueError, match=re.escape("value_width=13 of a store [3, 1, 24, 12]: exp")):
        torch.ops.graphopt.attend_latent(*meta)


def test_keys_that_hold_no_values_are_refused() -> None:
    site = SiteSpec(4, 1, 12, 8, torch.float32, MaskSpec(), 0.3)
    assert "values are not the first columns of its keys" in str(Latent().refuses(site, 40))
