"""Whose keys and values attentions read, and in which stores: what an assignment may say."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from graphopt import GraphoptError, InputsError
from graphopt.decoding.assignment import CacheAssignment, store_named
from graphopt.decoding.capture import Uncached, capture_uncached
from graphopt.decoding.options import Generate
from graphopt.decoding.sites import Site, sites_of, stored_bytes
from graphopt.plugins.host import default_host
from tests.decoders import family, tokens


def test_an_assignment_comes_back_from_json() -> None:
    made = CacheAssignment({0: "full", 2: "ring"}, {3: 2, 1: 0}, {2: 0}, {5: 4})
    text = json.dumps(made.to_json())
    assert CacheAssignment.from_json(json.loads(text)) == made
    assert hash(CacheAssignment({2: "ring", 0: "full"}, {1: 0, 3: 2}, {2: 0}, {5: 4})) == hash(made)
    assert list(made.sources) == [1, 3] and not CacheAssignment() and CacheAssignment(joins={1: 0})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"format": 2, "stores": {}, "sources": {}, "streams": {}}, "format 2: expected 3"),
        ({"format": 3, "stores": {}, "sources": {}}, "expected format, stores, sources, streams and joins"),
        (
            {"format": 3, "stores": {}, "sources": {"a": 0}, "streams": {}, "joins": {}},
            "expected indices of attentions",
        ),
        ([1], "got list"),
    ],
    ids=["version", "field", "key", "kind"],
)
def test_other_json_is_refused(data: Any, reason: str) -> None:
    with pytest.raises(InputsError, match=reason):
        CacheAssignment.from_json(data)


@pytest.mark.parametrize(
    ("sources", "reason"),
    [
        ([(1, 0)], "sources is .* expected a mapping of indices"),
        ({"1": 0}, "has the key '1': expected the index"),
        ({1: 0.5}, r"sources\[1\] is 0.5"),
        ({True: 0}, "has the key True"),
        ({1: -1}, r"sources\[1\] is -1"),
        ({1: 1}, "that none makes: 1 -> 1"),
        ({1: 2, 2: 1}, "that none makes: 1 -> 2 -> 1"),
        ({1: 3}, "which come later(.|\n)*let attention 3 read those of 1"),
        ({2: 1, 1: 0}, r"which makes none(.|\n)*name what makes them: \{2: 0\}"),
    ],
    ids=["list", "text", "fraction", "bool", "negative", "itself", "round", "later", "chain"],
)
def test_sources_that_make_no_sense_are_refused(sources: Any, reason: str) -> None:
    with pytest.raises(InputsError, match=reason):
        CacheAssignment(sources=sources)


def test_what_reads_another_has_no_store() -> None:
    with pytest.raises(InputsError, match="attention 1 is given the store 'full' and reads that of"):
        CacheAssignment({1: "full"}, {1: 0})


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"joins": {1: 1}}, "which comes no earlier"),
        ({"joins": {1: 2}}, r"which comes no earlier(.|\n)*\{2: 1\}"),
        ({"joins": {2: 1, 1: 0}}, r"which writes into that of attention 0(.|\n)*\{2: 0\}"),
        ({"joins": {2: 1}, "sources": {1: 0}}, "1 makes no keys and values, it reads those of attention 0"),
        ({"joins": {2: 1}, "stores": {2: "full"}}, "2 is given the store 'full' and writes into that"),
        ({"joins": {1: "0"}}, "expected the index of an attention"),
    ],
    ids=["itself", "later", "chain", "reader", "store", "text"],
)  # fmt: skip
def test_joins_that_make_no_sense_are_refused(parts: Any, reason: str) -> None:
    with pytest.raises(InputsError, match=reason):
        CacheAssignment(**parts)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("rings", "unknown store 'rings'; did you mean 'ring'"),
        ("full{size=3}", "unknown option of store full 'size'"),
        ("full,ring", "names 2 stores: expected one"),
    ],
)
def test_stores_that_are_not_known_are_refused(text: str, reason: str) -> None:
    with pytest.raises(GraphoptError, match=reason):
        store_named(text, default_host().stores())


@pytest.fixture(scope="module")
def mixed() -> Uncached:
    """Four layers, of which 0 and 2 have a window and another base of rotary embeddings."""
    layers = ["sliding_attention", "full_attention"] * 2
    model = family("gemma3_text", num_hidden_layers=4, layer_types=layers)
    return capture_uncached(model, (tokens(),), Generate(64))


def assigned(uncached: Uncached, capacity: int = 64, **parts: Any) -> tuple[Site, ...]:
    return sites_of(uncached, default_host().stores(), 1, capacity, CacheAssignment(**parts))


def test_sites_are_as_they_were_assigned(mixed: Uncached) -> None:
    plain, shared = assigned(mixed), assigned(mixed, sources={3: 1})
    assert [site.source for site in plain] == [0, 1, 2, 3]
    assert [site.source for site in shared] == [0, 1, 2, 1]
    assert shared[3].spec.shares and shared[3].store == shared[1].store
    saved = stored_bytes(plain, 1, 64) - stored_bytes(shared, 1, 64)
    assert saved == plain[3].store.stored_bytes(plain[3].spec, 1, 64) > 0
    named = assigned(mixed, stores={0: "full"})
    assert [str(site.store) for site in named] == ["full", "full", "ring", "full"]


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"sources": {3: 0}}, r"its mask is causal(.|\n)*the nearest that it can read: \{3: 1\}"),
        ({"sources": {1: 0}}, "it can read those of no earlier one"),
        ({"sources": {9: 0}}, "attends 4 times, 0 to 3(.|\n)*the nearest is 3"),
        ({"stores": {4: "full"}}, "attention 4 is to have a store"),
        ({"stores": {1: "ring"}}, "store ring does not take attention 1: a ring keeps a window"),
    ],
    ids=["mask", "none-fits", "unknown-source", "unknown-store", "refused-store"],
)
def test_assignments_that_do_not_fit_are_refused(mixed: Uncached, parts: Any, reason: str) -> None:
    with pytest.raises(InputsError, match=reason):
        assigned(mixed, **parts)


def test_another_rotary_embedding_is_no_source(mixed: Uncached) -> None:
    """For sequences within the window masks are alike; keys are rotated by other angles all the same."""
    with pytest.raises(InputsError, match="its rotary embedding has other parameters"):
        assigned(mixed, capacity=16, sources={1: 0})


def test_shapes_are_compared() -> None:
    torch.manual_seed(0)

    class Two(torch.nn.Module):
        """Two attentions, of four heads and of two."""

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(128, 32), torch.nn.Linear(32, 128)
            self.kv = torch.nn.ModuleList(torch.nn.Linear(32, 2 * size) for size in (32, 16))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            for kv, heads in zip(self.kv, (4, 2), strict=True):
                k, v = (part.unflatten(-1, (heads, 8)).transpose(1, 2) for part in kv(x).chunk(2, -1))
                q = x.unflatten(-1, (4, 8)).transpose(1, 2)
                k, v = (part.repeat_interleave(4 // heads, 1) for part in (k, v))
                out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
                x = x + out.transpose(1, 2).flatten(2)
            logits: torch.Tensor = self.head(x)
            return logits

    uncached = capture_uncached(Two().eval(), (tokens(),), Generate(64))
    with pytest.raises(InputsError, match="it has 2 heads of keys, attention 0 has 4"):
        assigned(uncached, sources={1: 0})
