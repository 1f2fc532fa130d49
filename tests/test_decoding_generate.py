"""transformers' own generate on programs that decode: the same tokens, whatever it is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt import CaptureError, InputsError
from graphopt.decoding.generator import Generator
from tests.decoders import FAMILIES, family, tokens

transformers = pytest.importorskip("transformers")

QUICK = ("gemma2", "bloom")


def generating(model: nn.Module, max_tokens: int, max_batch: int = 6, **options: Any) -> graphopt.Optimized:
    generate = graphopt.Generate(max_tokens, max_batch)
    given = {"emit": "eager", "on_error": "raise", **options}
    return graphopt.optimize(model, {"input_ids": tokens()}, generate=generate, **given)


def agrees(model: Any, fast: graphopt.Optimized, ids: torch.Tensor, **options: Any) -> None:
    torch.manual_seed(7)
    expected = model.generate(ids, **options)
    torch.manual_seed(7)
    assert torch.equal(fast.generate(ids, **options), expected)


def agrees_throughout(model: nn.Module, fast: graphopt.Optimized, count: int, fewer: int) -> None:
    """Greedy, with padding, in beams, drawn."""
    ids = tokens()
    agrees(model, fast, ids, max_new_tokens=count, do_sample=False)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    agrees(model, fast, ids, attention_mask=mask, max_new_tokens=fewer, do_sample=False)
    agrees(model, fast, ids, max_new_tokens=fewer, num_beams=3)
    agrees(model, fast, ids, max_new_tokens=fewer, do_sample=True, top_k=20, temperature=1.3)


@pytest.fixture(scope="module")
def llama() -> Any:
    return family("llama")


@pytest.fixture(scope="module")
def fast(llama: Any) -> graphopt.Optimized:
    return generating(llama, 60)


def test_tokens_are_those_of_a_llama(llama: Any, fast: graphopt.Optimized) -> None:
    agrees_throughout(llama, fast, 48, 12)


@pytest.mark.parametrize("name", QUICK)
def test_tokens_are_the_models_own(name: str) -> None:
    # Longer than the windows of 32.
    model = family(name)
    agrees_throughout(model, generating(model, 60), 40, 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_256_tokens_of_every_family_are_the_models_own(name: str) -> None:
    model = family(name)
    agrees_throughout(model, generating(model, 272), 256, 32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_compiled_steps_give_the_models_tokens(name: str) -> None:
    model = family(name)
    fast = generating(model, 60, 2, emit="inductor", cache=False)
    agrees(model, fast, tokens(), max_new_tokens=48, do_sample=False)
    assert not fast.report.diagnostics


def test_softcaps_are_kept_where_attention_is_written_out() -> None:
    model = family("gemma2", "eager", attn_logit_softcapping=2.0)
    fast = generating(model, 60)
    agrees(model, fast, tokens(), max_new_tokens=36, do_sample=False)
    record = fast.report.decoding
    assert [site.store for site in record.sites] == ["ring", "full"]
    assert all(site.spec.softcap == 2.0 for site in fast._generator.built.decoder.sites)


@pytest.mark.slow
def test_layers_that_share_keys_and_values_share_a_store() -> None:
    model = family("gemma3n_text")
    fast = generating(model, 200)
    agrees(model, fast, tokens(), max_new_tokens=40, do_sample=False)
    # Rings of 32 for each are less than 200 positions for both.
    assert [site.source for site in fast.report.decoding.sites] == [0, 1, 2, 1]
    assert fast.report.decoding.sites[3].bytes == 0


def test_packed_weights_are_read_packed_at_every_step() -> None:
    model = family("qwen3")
    graphopt.quantize(model, {"input_ids": tokens()}, schemes=["int8"])
    fast = generating(model, 48)
    agrees(model, fast, tokens(), max_new_tokens=30, do_sample=False)
    (program,) = fast.programs
    names = [str(node.target) for node in program.nodes()]
    assert sum(name.startswith("graphopt.linear_int8") for name in names) == 2 * 7 + 1
    # Look-ups unpack the rows that they read.
    unpacked = [node for node in program.nodes() if str(node.target).startswith("graphopt.unpack_int8")]
    assert len(unpacked) == 1 and isinstance(unpacked[0].meta["val"].shape[0], torch.SymInt)


def test_keys_are_neither_repeated_for_heads_nor_logits_made_for_prompts(fast: graphopt.Optimized) -> None:
    (program,) = fast.programs
    attended = [node for node in program.nodes() if str(node.target) == "graphopt.attend_full.default"]
    assert [node.args[1].meta["val"].shape[1] for node in attended] == [2, 2]
    assert not any("repeat" in str(node.target) for node in program.nodes())
    logits = next(node for node in program.graph.nodes if node.op == "output").args[0][0]
    assert logits.meta["val"].shape[1] == 1
    assert not any(
        sum(isinstance(size, torch.SymInt) for size in node.meta["val"].shape) > 2
        for node in program.nodes()
        if isinstance(node.meta.get("val"), torch.Tensor)
    )


def test_streams_and_stopping_criteria_are_transformers_own(llama: Any, fast: graphopt.Optimized) -> None:

    class Heard:
        def __init__(self) -> None:
            self.parts: list[list[int]] = []

        def put(self, value: torch.Tensor) -> None:
            self.parts.append(value.flatten().tolist())

        def end(self) -> None:
            self.parts.append([])

    class Stops(transformers.StoppingCriteria):  # type: ignore[misc, name-defined]
        def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((ids.shape[0],), ids.shape[1] >= 20)

    said = []
    for generate in (llama.generate, fast.generate):
        heard = Heard()
        criteria = transformers.StoppingCriteriaList([Stops()])
        found = generate(
            tokens(1), max_new_tokens=30, do_sample=False, streamer=heard, stopping_criteria=criteria
        )
        assert found.shape == (1, 20)
        said.append(heard.parts)
    assert said[0] == said[1] and len(said[0]) == 13


def test_scores_are_given_as_asked(llama: Any, fast: graphopt.Optimized) -> None:
    options = {
        "max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_scores": True,
    }  # fmt: skip
    expected, found = llama.generate(tokens(), **options), fast.generate(tokens(), **options)
    torch.testing.assert_close(torch.stack(found.scores), torch.stack(expected.scores), atol=1e-5, rtol=1e-5)


def test_what_would_bring_a_cache_of_its_own_is_refused(fast: graphopt.Optimized) -> None:
    for options, text in (
        ({"prompt_lookup_num_tokens": 2}, r"generate\(prompt_lookup_num_tokens=...\) brings a cache of its"),
        ({"output_attentions": True}, r"generate\(output_attentions=True\): programs that decode give log"),
        ({"past_key_values": object()}, r"generate\(past_key_values=...\): the stores are the cache"),
        ({"num_beams": 4}, "8 sequences at once, each beam counted: the stores are for max_batch=6"),
        ({"max_new_tokens": 60}, "61 positions are needed: the stores are for max_tokens=60"),
    ):
        with pytest.raises(InputsError, match=text):
            fast.generate(tokens(), **{"max_new_tokens": 4, "do_sample": False, **options})


def test_models_that_cannot_be_captured_generate_as_they_did() -> None:
    config = transformers.BertConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    torch.manual_seed(0)
    # Every token sees all others, those that come later among them.
    model = transformers.BertLMHeadModel(config).eval()
    model.generation_config.pad_token_id = 0
    with pytest.raises(CaptureError):
        generating(model, 40)
    fast = generating(model, 40, on_error="rollback")
    agrees(model, fast, tokens(), max_new_tokens=6, do_sample=False)
    assert any(note.startswith("generates as it did:") for note in fast.report.diagnostics)
    with pytest.raises(CaptureError):
        # A bound that nothing keeps would be no bound.
        generating(model, 40, on_error="rollback", budget="1GiB")


def test_what_goes_wrong_unforeseen_leaves_generating_to_the_model(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> None:
        raise TypeError("lost its way\nand more")

    monkeypatch.setattr("graphopt.decoding.generator.build", fails)
    fast = generating(llama, 40, on_error="rollback")
    agrees(llama, fast, tokens(), max_new_tokens=4, do_sample=False)
    assert "generates as it did: TypeError: lost its way" in fast.report.diagnostics
    for settings in ({"on_error": "raise"}, {"on_error": "rollback", "budget": "1GiB"}):
        with pytest.raises(TypeError, match="lost its way"):
            generating(llama, 40, **settings)


def test_without_generate_an_optimized_model_generates_as_the_model_does() -> None:
    model = family("llama")
    fast = graphopt.optimize(model)
    agrees(model, fast, tokens(), max_new_tokens=4, do_sample=False)
    with pytest.raises(AttributeError, match="generate"):
        graphopt.optimize(nn.Linear(2, 2)).generate(tokens())


def test_a_step_is_captured_when_it_is_called(llama: Any, fast: graphopt.Optimized) -> None:
    assert isinstance(fast._generator, Generator) and not fast._driver.session.captured
    expected = llama(tokens()).logits
    torch.testing.assert_close(fast(tokens()).logits, expected, atol=1e-5, rtol=1e-5)
