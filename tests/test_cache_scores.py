"""Scores by which stores drop keys: what they are told, plugins that bring some, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graphopt
from graphopt import GraphoptError, PluginError, UnknownNameError
from graphopt.decoding import cache_scores
from graphopt.decoding.cache_scores import ScoreContext, cache_score, make_known, scored
from graphopt.plugins import CacheScoreSpec, hookimpl
from graphopt_kernels.attend_evict import attend_evict
from graphopt_kernels.evict_scores import SCORES
from tests.decoders import family, plain, tokens


@pytest.fixture(autouse=True)
def _known_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of this file are known in this file alone."""
    cache_scores.known_cache_scores()
    monkeypatch.setattr(cache_scores, "_KNOWN", dict(cache_scores._KNOWN))


def told(keys: list[list[float]], held: list[bool] | None = None) -> ScoreContext:
    """One head of keys [L, 2], read alike so far and by the row."""
    count = len(keys)
    numbers = torch.tensor(keys).view(1, 1, count, 2)
    alike = torch.full((1, 1, count), 1 / count)
    known = torch.ones(1, 1, count, dtype=torch.bool) if held is None else torch.tensor(held).view(1, 1, -1)
    places = torch.arange(count).view(1, 1, -1)
    return ScoreContext(
        alike, alike, torch.ones(1, 1, 2, 2), numbers, numbers, places, torch.tensor(count - 1), known
    )


def test_keys_unlike_the_others_are_kept() -> None:
    given = told([[1.0, 0.1], [2.0, -0.1], [0.0, 3.0], [1.0, 0.0]])
    assert scored("keydiff", given).argmax() == 2
    assert scored("knorm", given).argmin() == 2
    crowd = [[0.0, 1.0]] * 6
    among = told([[1.0, 0.1], [2.0, -0.1], [0.0, 3.0], *crowd], [True] * 3 + [False] * 6)
    assert scored("keydiff", among)[..., :3].argmax() == 2


def test_reading_counts_as_each_score_says() -> None:
    given = told([[1.0, 1.0], [3.0, 1.0]])
    before, read = given.before, given.weights
    assert torch.equal(scored("h2o", given), before + read)
    assert torch.equal(scored("tova", given), read)
    assert torch.equal(scored("value-aware", given), before + read * torch.tensor([2.0, 4.0]))
    assert torch.allclose(scored("snapkv", given), before)
    assert all(scored(spec.name, given).shape == before.shape for spec in SCORES)


def newest(given: ScoreContext) -> torch.Tensor:
    return given.places.float()


class Newest:
    graphopt_api = 1

    @hookimpl
    def graphopt_cache_scores(self) -> list[CacheScoreSpec]:
        return [CacheScoreSpec("newest", newest, "the oldest goes")]


def optimized(policy: str, *plugins: object) -> graphopt.Optimized:
    text = f"evict{{keep=20,recent=4,policy={policy}}}"
    step = graphopt.use("keep-kv", store=text, plugins=plugins)
    return graphopt.optimize(
        plain("fused"), (tokens(1, 6),), generate=graphopt.Generate(64, 2), emit="eager", plugins=plugins,
        pipeline=["default", step], on_error="raise",
    )  # fmt: skip


def test_plugins_bring_scores() -> None:
    fast = optimized("newest", Newest())
    fast.generate(tokens(2, 30), max_new_tokens=20)
    decoder: Any = fast._generator.built.decoder
    places = decoder.stores["store_0_place"]
    assert sorted(places[0, 0].tolist()) == list(range(49 - 19, 50))
    record = fast.report.decoding
    assert record.sites[0].store == "evict{keep=20,policy=newest,recent=4}"
    assert record.off <= record.lossy.allowed < 1e-3


def test_what_is_left_of_another_sequence_is_not_read() -> None:
    torch.manual_seed(0)

    def rows(count: int) -> list[torch.Tensor]:
        return [torch.randn(2, heads, count, 8) for heads in (4, 2, 2)]

    def taken(made: list[torch.Tensor], store: list[torch.Tensor]) -> torch.Tensor:
        count = made[0].shape[2]
        return attend_evict.reference(
            *made, *store, torch.arange(count), None, None, None, 0.3, 0.0, 0, count, "h2o", 2
        )

    def empty() -> list[torch.Tensor]:
        slots = torch.zeros(2, 2, 6, 8), torch.zeros(2, 2, 6, 8), torch.zeros(2, 2, 6, dtype=torch.int64)
        return [*slots, torch.zeros(2, 2, 6)]

    used, other = empty(), rows(11)
    taken(rows(20), used)
    assert torch.equal(taken(other, used), taken(other, empty()))


def test_masked_models_of_shared_heads_keep_what_is_read_most() -> None:
    fast = graphopt.optimize(
        family("llama"), {"input_ids": tokens()}, generate=graphopt.Generate(64, 2), emit="eager",
        pipeline=["default", graphopt.use("keep-kv", store="evict{keep=6,recent=2}")], on_error="raise",
    )  # fmt: skip
    ids = tokens(2, 20)
    once = fast.generate(ids, max_new_tokens=8, do_sample=False)
    fast.generate(tokens(2, 30, seed=5), max_new_tokens=8, do_sample=False)
    assert torch.equal(fast.generate(ids, max_new_tokens=8, do_sample=False), once)


def test_scores_that_nobody_brings_are_refused() -> None:
    with pytest.raises(GraphoptError, match="policy=oldest: expected one of h2o, keydiff, knorm"):
        optimized("oldest")
    with pytest.raises(UnknownNameError, match="unknown cache score 'tovo'; did you mean 'tova'"):
        cache_score("tovo")


def test_a_name_means_one_score() -> None:
    with pytest.raises(PluginError, match=r"'h2o' is graphopt_kernels\.evict_scores\._h2o in this process"):
        make_known([CacheScoreSpec("h2o", newest)])
    assert cache_score("h2o") is SCORES[0]


@pytest.mark.parametrize(
    ("score", "text"),
    [
        (lambda given: given.before[..., :1], r"gave torch.float32 \[1, 1, 1\]: expected torch.float32"),
        (lambda given: given.before.double(), r"gave torch.float64 \[1, 1, 2\]: expected torch.float32"),
    ],
    ids=["shape", "dtype"],
)
def test_scores_that_are_not_one_a_key_are_refused(score: Any, text: str) -> None:
    make_known([CacheScoreSpec("bad", score)])
    with pytest.raises(PluginError, match=f"cache score 'bad' {text}"):
        scored("bad", told([[1.0, 0.0], [0.0, 1.0]]))
