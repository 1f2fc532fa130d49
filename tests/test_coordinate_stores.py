"""Stores of coordinates: what is read is the projection of keys and values, in fewer bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graphopt
from graphopt import InputsError
from graphopt.decoding.masks import MaskSpec
from graphopt.decoding.stores import SiteSpec
from graphopt_kernels.attend_reference import attention_whole
from graphopt_kernels.coordinate_stores import Coordinates, LowRank, StaticChannels
from tests.decoders import family, plain, tokens

ROWS = 64
SITE = SiteSpec(4, 2, 16, 16, torch.float64, MaskSpec(), 0.25)


def rows(length: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    query, key, value = (
        torch.randn(2, heads, length, 16, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)
    )
    return query, key, value


@pytest.mark.parametrize("store", [LowRank(6, 10), StaticChannels(6, 10)], ids=["low-rank", "channels"])
def test_what_is_read_is_the_projection(store: Coordinates) -> None:
    given = rows()
    fitted = store.fit(SITE, *given)
    spec = SiteSpec(4, 2, 16, 16, torch.float64, MaskSpec(), 0.25, fitted=fitted)
    keys, values = fitted["keys"], fitted["values"]
    assert torch.allclose(keys.mT @ keys, torch.eye(6, dtype=torch.float64).expand(2, 6, 6), atol=1e-12)
    projected = given[1] @ keys @ keys.mT, given[2] @ values @ values.mT
    expected = attention_whole(given[0], *projected, None, None, None, 0.25, 0.0, 0)
    assert torch.allclose(store.whole(spec, *given, None, None, None), expected, rtol=1e-12, atol=1e-12)


def test_the_basis_leaves_out_the_least() -> None:
    """Keys of rank 6 come back as they were; channels of most score are those that are kept."""
    query, key, value = rows()
    low = torch.einsum("bhsd,hde->bhse", key[..., :6], torch.randn(2, 6, 16, dtype=torch.float64))
    basis = LowRank(key_rank=6).fit(SITE, query, low, value)["keys"]
    assert torch.allclose(low @ basis @ basis.mT, low, atol=1e-9)
    key[:, :, :, [3, 9]] *= 50
    kept = StaticChannels(key_rank=2).fit(SITE, query, key, value)["keys"]
    assert sorted(kept[0].nonzero()[:, 0].tolist()) == [3, 9]


def decoding(model: torch.nn.Module, store: str, inputs: Any = None, **options: Any) -> graphopt.Optimized:
    step = graphopt.use("keep-kv", store=store, **options)
    return graphopt.optimize(
        model, inputs or (tokens(),), generate=graphopt.Generate(ROWS, 2), emit="eager", on_error="raise",
        pipeline=["default", step],
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize(
    "store", ["low-rank{key_rank=8,value_rank=12}", 'low-rank{key_rank=8,store="quant{bits=4,group=8}"}']
)
def test_families_decode_in_coordinates(name: str, store: str) -> None:
    pytest.importorskip("transformers")
    fast = decoding(family(name), store, {"input_ids": tokens()}, calibration=[tokens(8, 32, seed=4)])
    record, decoder = fast.report.decoding, fast._generator.built.decoder
    assert record.off <= record.lossy.allowed < 1e-2
    assert record.cache_bytes == decoder.cache_bytes


def test_bytes_are_those_of_coordinates_and_bases() -> None:
    fast = decoding(plain("fused"), "low-rank{key_rank=8,value_rank=12}", calibration=[tokens(8, 32, seed=4)])
    decoder = fast._generator.built.decoder
    expected = 2 * 4 * (2 * 4 * ROWS * (8 + 12) + 4 * 16 * (8 + 12))
    assert fast.report.decoding.cache_bytes == decoder.cache_bytes == expected


@pytest.mark.parametrize(
    ("store", "options", "reason"),
    [
        ("low-rank{key_rank=8}", {}, "is fitted to calibration tokens, and keep-kv was given none"),
        ("low-rank", {"calibration": [tokens(4, 32)]}, "neither key_rank nor value_rank is given"),
        ("low-rank{key_rank=16}", {"calibration": [tokens(4, 32)]}, "key_rank=16: expected 1 to 15"),
    ],
    ids=["none", "nothing", "wide"],
)
def test_stores_that_cannot_be_fitted_are_refused(store: str, options: Any, reason: str) -> None:
    with pytest.raises(InputsError, match=reason):
        decoding(plain("fused"), store, **options)
