"""Models that know nothing of caches decode: however attention is written, or the reason why not is given."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt import CaptureError, InputsError, VerificationError
from tests.decoders import POSITIONS, VOCABULARY, Plain, greedy, plain, tokens

WRITTEN = ("fused", "buffer", "added", "window", "softcap", "sinks", "linear-bias", "einsum", "module")


def generating(model: nn.Module, **options: Any) -> graphopt.Optimized:
    given = {"max_tokens": 64, "max_batch": 3, **options}
    return graphopt.optimize(model, (tokens(1, 6),), generate=graphopt.Generate(**given), emit="eager")


@pytest.fixture(scope="module")
def fast() -> graphopt.Optimized:
    return generating(plain("fused"))


@pytest.mark.parametrize("kind", WRITTEN)
def test_tokens_are_those_of_the_whole_sequence_run_again(kind: str) -> None:
    model = plain(kind)
    fast = generating(model)
    ids = tokens(3, 7)
    assert torch.equal(fast.generate(ids, max_new_tokens=50), greedy(model, ids, 50))
    sites = fast.report.decoding.sites
    assert len(sites) == 2
    assert {site.store for site in sites} == {"ring" if kind == "window" else "full"}


def test_positions_may_be_counted_or_be_the_first_rows_of_a_table() -> None:
    model = plain("fused", "counted")
    ids = tokens(2, 5)
    assert torch.equal(generating(model).generate(ids, max_new_tokens=20), greedy(model, ids, 20))


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("both-ways", CaptureError, "blocks.0: the mask lets position 0 read position 1, which comes later"),
        ("prefix", CaptureError, "blocks.0: the mask lets position 0 read position 1, which comes later"),
        ("blocks", CaptureError, "position 8 does not read position 7, but position 1 reads position 0"),
        ("learned-keys", CaptureError, "no function of how far it is before the query: position"),
        ("rolled", VerificationError, "first value that differs is roll_1 (aten.roll.default) of blocks.1"),
    ],
)
def test_what_is_not_understood_is_refused_with_the_reason(
    kind: str, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=re.escape(text)):
        generating(plain(kind))


def test_blocks_longer_than_the_sequence_are_just_causal() -> None:
    model = plain("blocks")
    fast = generating(model, max_tokens=8)
    assert fast.report.decoding.sites[0].mask == "causal"
    ids = tokens(1, 3)
    assert torch.equal(fast.generate(ids, max_new_tokens=5), greedy(model, ids, 5))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.words(ids).cumsum(1))
        return logits


def test_models_without_attention_are_refused() -> None:
    with pytest.raises(CaptureError, match="no attention was found in the model"):
        generating(Recurrent())


class Keeping(Recurrent):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.state = self.words(ids).cumsum(1)
        logits: torch.Tensor = self.head(self.state)
        return logits


def test_what_a_module_keeps_of_being_captured_is_taken_back() -> None:
    model = Keeping()
    with pytest.raises(CaptureError):
        generating(model)
    assert not hasattr(model, "state")


class Pooled(Recurrent):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.words(ids).mean(1))
        return logits


def test_models_that_give_no_row_for_each_token_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"gives \[3, 128\] for tokens \[3, 7\]: expected logits"):
        generating(Pooled())


class Fixed(Plain):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids.view(3, 7))


def test_models_of_one_length_are_refused() -> None:
    with pytest.raises(CaptureError, match="could not be captured without a cache"):
        generating(Fixed("fused").eval())


def test_bad_inputs_are_named() -> None:
    model = plain("fused")
    ids = tokens(1, 6)
    with pytest.raises(InputsError, match=r"Generate\(max_tokens=1\): expected an int of 2 or more"):
        graphopt.Generate(1)
    with pytest.raises(InputsError, match=r"Generate\(max_batch='4'\)"):
        graphopt.Generate(8, "4")  # type: ignore[arg-type]
    with pytest.raises(InputsError, match=r"generate is 16: expected graphopt.Generate"):
        graphopt.optimize(model, (ids,), generate=16)  # type: ignore[arg-type]
    with pytest.raises(InputsError, match="needs inputs: example tokens"):
        graphopt.optimize(model, generate=graphopt.Generate(16))
    with pytest.raises(InputsError, match="generation needs example tokens, integers"):
        graphopt.optimize(model, (ids.float(),), generate=graphopt.Generate(16))
    with pytest.raises(InputsError, match="step= and generate= exclude each other"):
        graphopt.optimize(model, (ids,), generate=graphopt.Generate(16), step=lambda module: None)
    with pytest.raises(InputsError, match=r"plan\(\) takes no generate="):
        graphopt.plan(model, (ids,), generate=graphopt.Generate(16))


def test_what_the_stores_do_not_hold_is_refused() -> None:
    fast = generating(plain("fused"), max_tokens=16, max_batch=2)
    with pytest.raises(InputsError, match="3 sequences at once, each beam counted: the stores are for max_b"):
        fast.generate(tokens(3, 4), max_new_tokens=2)
    with pytest.raises(InputsError, match="a prompt of 10 tokens and 7 new ones: the stores are for max_tok"):
        fast.generate(tokens(1, 10), max_new_tokens=7)
    with pytest.raises(InputsError, match="a mask that leaves tokens out: the model takes none"):
        mask = torch.tensor([[0, 1, 1, 1]])
        fast.generate(tokens(1, 4), max_new_tokens=2, attention_mask=mask)
    with pytest.raises(InputsError, match=r"temperature=0: expected a positive number"):
        fast.generate(tokens(1, 4), max_new_tokens=2, do_sample=True, temperature=0)
    # Nothing of that spoils what follows.
    model = plain("fused")
    ids = tokens(2, 4)
    assert torch.equal(fast.generate(ids, max_new_tokens=12), greedy(model, ids, 12))


def test_sampling_is_that_of_the_distribution_it_was_asked_for(fast: graphopt.Optimized) -> None:
    model = plain("fused")
    ids = tokens(1, 5)
    drawn = [
        fast.generate(ids, max_new_tokens=20, do_sample=True, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    only = fast.generate(ids, max_new_tokens=20, do_sample=True, top_k=1)
    assert torch.equal(only, greedy(model, ids, 20))
    assert torch.equal(fast.generate(ids, max_new_tokens=20, do_sample=True, top_p=1e-6), only)


class Heard:
    def __init__(self) -> None:
        self.parts: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.parts.append(value.flatten().tolist())

    def end(self) -> None:
        self.parts.append([])


def test_generation_streams_and_stops(fast: graphopt.Optimized) -> None:
    model = plain("fused")
    ids = tokens(1, 5)
    whole = greedy(model, ids, 20)[0].tolist()
    heard = Heard()
    last = whole[9]
    stopped = fast.generate(ids, max_new_tokens=20, eos_token_id=last, streamer=heard)
    first = whole.index(last, 5)
    assert stopped[0].tolist() == whole[: first + 1]
    assert heard.parts == [whole[:5], *([token] for token in whole[5 : first + 1]), []]
    short = fast.generate(ids, max_new_tokens=20, stopping_criteria=[lambda t, logits: t.shape[1] >= 8])
    assert short[0].tolist() == whole[:8]


def test_without_a_number_of_new_tokens_the_stores_are_filled(fast: graphopt.Optimized) -> None:
    assert fast.generate(tokens(1, 62)).shape == (1, 64)


def test_more_positions_than_the_model_has_are_refused() -> None:
    with pytest.raises(InputsError, match="the model does not take sequences of max_tokens=520 positions"):
        generating(plain("fused"), max_tokens=POSITIONS + 8)


def test_copies_generate_the_same(fast: graphopt.Optimized) -> None:
    model = plain("fused")
    ids = tokens(1, 5)
    expected = greedy(model, ids, 10)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(other.generate(ids, max_new_tokens=10), expected)
    assert other._generator is not fast._generator


def test_weights_that_are_loaded_later_are_those_that_decode() -> None:
    model, other = plain("fused"), Plain("fused").eval()
    fast = generating(model)
    fast.load_state_dict(other.state_dict())
    ids = tokens(1, 5)
    assert torch.equal(fast.generate(ids, max_new_tokens=10), greedy(other, ids, 10))


def test_a_training_model_generates_in_evaluation_and_trains_on(fast: graphopt.Optimized) -> None:
    fast.train()
    fast.generate(tokens(1, 5), max_new_tokens=2)
    assert fast.training and all(module.training for module in fast.modules())
    fast.eval()
