"""Decoders that attend to what an encoder gave: its keys and values are made once, and tokens are the
model's."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphopt
from graphopt import BudgetError, CaptureError, InputsError, VerificationError
from graphopt.decoding.distance_bias import DistanceBias
from tests.decoders import ENCODERS, HEADS, VOCABULARY, WIDTH, encoder_family, plain, source_inputs, tokens

Tensor = torch.Tensor
SIZE = WIDTH // HEADS


def heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], HEADS, SIZE).transpose(1, 2)


class Encoder(nn.Module):
    """Rows that read each other, padding left out."""

    def __init__(self, words: nn.Embedding) -> None:
        super().__init__()
        self.words, self.qkv = words, nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        x = self.words(input_ids)
        shown = None if attention_mask is None else attention_mask.bool()[:, None, None]
        made = F.scaled_dot_product_attention(*map(heads, self.qkv(x).split(WIDTH, -1)), shown)
        return {"rows": x + made.transpose(1, 2).flatten(2)}


class Translator(nn.Module):
    """An encoder and a decoder of one layer, with another mask of the source for each ``kind``."""

    def __init__(self, kind: str = "padding") -> None:
        super().__init__()
        self.kind = kind
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(64, WIDTH)
        self.encoder = Encoder(self.words)
        self.qkv, self.query = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.kv, self.head = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def get_encoder(self) -> nn.Module:
        return self.encoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: Any = None,
    ) -> Tensor:
        if encoder_outputs is None:
            assert input_ids is not None
            encoder_outputs = self.encoder(input_ids, attention_mask)
        assert decoder_input_ids is not None and attention_mask is not None
        rows = encoder_outputs["rows"]
        x = self.words(decoder_input_ids) + self.places.weight[: decoder_input_ids.shape[1]]
        q, k, v = map(heads, self.qkv(x).split(WIDTH, -1))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        k, v = map(heads, self.kv(rows).split(WIDTH, -1))
        crossed = F.scaled_dot_product_attention(heads(self.query(x)), k, v, self.mask(x, attention_mask))
        x = x + crossed.transpose(1, 2).flatten(2)
        if self.kind == "reads-on":
            x = x + rows.mean(1, keepdim=True)
        return self.head(x)

    def mask(self, x: Tensor, attention_mask: Tensor) -> Tensor | None:
        shown = attention_mask.bool()[:, None, None, :]
        here, there = torch.arange(x.shape[1])[:, None], torch.arange(attention_mask.shape[1])
        match self.kind:
            case "none":
                return None
            case "every-other":
                return shown & (there % 2 == 0)
            case "later":
                return shown & (there <= here + 4)
            case "weighed":
                return torch.where(shown, -0.1 * there, float("-inf"))
        return shown


def translator(kind: str = "padding") -> Translator:
    torch.manual_seed(0)
    model = Translator(kind).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    return model


def source(length: int = 9, padded: int = 3) -> dict[str, Tensor]:
    ids = tokens(2, length, length)
    mask = torch.ones_like(ids)
    mask[1, length - padded :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def decoding(model: nn.Module, max_tokens: int = 32, **options: Any) -> graphopt.Optimized:
    generate = graphopt.Generate(max_tokens, 2, max_source=options.pop("max_source", 16))
    given = {"emit": "eager", "on_error": "raise", **options}
    inputs = {**source(), "decoder_input_ids": tokens(2, 2)}
    return graphopt.optimize(model, inputs, generate=generate, **given)


def greedy(model: nn.Module, read: dict[str, Tensor], ids: Tensor, count: int) -> Tensor:
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(**read, decoder_input_ids=ids)[:, -1:].argmax(-1)], 1)
    return ids


@pytest.fixture(scope="module")
def model() -> Translator:
    return translator()


@pytest.fixture(scope="module")
def fast(model: Translator) -> graphopt.Optimized:
    return decoding(model)


def test_tokens_are_the_models_for_one_source_after_another(model: Any, fast: graphopt.Optimized) -> None:
    ids = tokens(2, 3)
    # The second is shorter than the first, whose rows are still in the stores; the third is the longest.
    for read in (source(12, 4), source(5, 2), source(16, 7), source(9, 0)):
        made = fast.generate(ids, source=read, max_new_tokens=14)
        assert torch.equal(made, greedy(model, read, ids, 14))
        assert len(set(made.flatten().tolist())) > 6
    unpadded = {"input_ids": source()["input_ids"]}
    whole = greedy(model, source(9, 0), ids, 6)
    assert torch.equal(fast.generate(ids, source=unpadded, max_new_tokens=6), whole)


@pytest.mark.parametrize("kind", ["none", "every-other"])
def test_whatever_rows_a_mask_shows_are_those_that_are_read(kind: str) -> None:
    model = translator(kind)
    fast = decoding(model)
    ids, read = tokens(2, 3), source(11, 4)
    assert torch.equal(fast.generate(ids, source=read, max_new_tokens=10), greedy(model, read, ids, 10))
    (_, cross) = fast.report.decoding.sites
    assert cross.mask == ("source" if kind == "none" else "source, padding")


def test_stores_of_a_source_are_counted_and_written_once(fast: graphopt.Optimized) -> None:
    own, cross = fast.report.decoding.sites
    assert (own.store, cross.store) == ("full", "cross")
    assert cross.bytes == 2 * 2 * 16 * WIDTH * 4
    decoder = fast._generator.built.decoder
    # Padding of the source; the model's own tokens have none.
    assert fast.report.decoding.cache_bytes == own.bytes + cross.bytes + 2 * 16 == decoder.cache_bytes
    assert [program.name for program in fast.programs] == ["decode", "read", "encode"]
    read = {name for node in fast.programs[0].nodes() for name in map(str, node.all_input_nodes)}
    assert any("_query_" in name for name in read) and not any("_kv_" in name for name in read)
    products = [node.args[1].name for node in fast.programs[1].nodes() if "linear" in str(node.target)]
    assert products == ["p_model_kv_weight"]


def test_layers_say_what_they_read() -> None:
    made = graphopt.explain_layers(translator(), {**source(), "decoder_input_ids": tokens(2, 2)})
    own, cross = made.attentions
    assert (own.crosses, cross.crosses) == (False, True)
    assert (str(cross.query), str(cross.key), str(cross.value)) == (
        "query.weight", "kv.weight[0:64]", "kv.weight[64:128]",
    )  # fmt: skip
    assert "source, padding, reads an encoder's output" in made.text()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("later", "position 1 of head 0 reads other rows of the source than position 0 of head 0"),
        ("weighed", "something is added to the scores of rows of the source that differs from row to row"),
        ("reads-on", "reads the source at every step: only attention to it is understood"),
    ],
)
def test_other_uses_of_a_source_are_refused_with_the_reason(kind: str, text: str) -> None:
    with pytest.raises(CaptureError, match=re.escape(text)):
        decoding(translator(kind))


def test_sources_that_do_not_fit_are_refused(fast: graphopt.Optimized) -> None:
    ids = tokens(2, 2)
    with pytest.raises(InputsError, match=r"source has 17 rows.*the stores are for max_source=16") as caught:
        fast.generate(ids, source=source(17), max_new_tokens=2)
    assert "Generate(max_source=17" in str(caught.value)
    with pytest.raises(InputsError, match=r"generate\(source=...\) is not given"):
        fast.generate(ids, max_new_tokens=2)
    three = {name: value[:1].expand(3, -1).contiguous() for name, value in source().items()}
    with pytest.raises(InputsError, match="3 sequences at once, each beam counted: the stores are for max_b"):
        fast.generate(ids[:1].expand(3, -1), source=three, max_new_tokens=2)
    one = {name: value[:1] for name, value in source().items()}
    with pytest.raises(InputsError, match="2 sequences: the source that was read is of 1"):
        fast.generate(ids, source=one, max_new_tokens=2)


def test_inputs_that_say_too_little_are_refused(model: Translator) -> None:
    options: dict[str, Any] = {"generate": graphopt.Generate(16), "on_error": "raise", "emit": "eager"}
    with pytest.raises(InputsError, match="inputs hold no decoder_input_ids: a decoder that reads an enco"):
        graphopt.optimize(model, source(), **options)
    with pytest.raises(InputsError, match="inputs hold nothing for the encoder to read"):
        graphopt.optimize(model, {"decoder_input_ids": tokens(1, 2)}, **options)
    with pytest.raises(InputsError, match=r"Generate\(max_source=0\): expected an int of 1 or more"):
        graphopt.Generate(16, max_source=0)

    class Bare(nn.Module):
        def forward(self, decoder_input_ids: Tensor) -> Tensor:
            return decoder_input_ids

    with pytest.raises(CaptureError, match="its encoder cannot be told from its decoder: expected a method"):
        graphopt.optimize(Bare(), {"decoder_input_ids": tokens(1, 2)}, **options)


def test_a_mask_that_is_dropped_is_found_before_the_model_is_handed_over(
    model: Translator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphopt.decoding.insert.shown_by", lambda sites: {})
    with pytest.raises(VerificationError, match="decoding gives other logits than the model without a cache"):
        decoding(model)


def test_rows_of_an_earlier_source_that_are_read_are_found(
    model: Translator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphopt_kernels.attend_cross import attend_cross

    def forgetful(query: Tensor, *rest: Any) -> Tensor:
        keys, values, valid = rest[2], rest[3], rest[5]
        shown = valid[: query.shape[0], None, None]
        return F.scaled_dot_product_attention(query, keys[: len(query)], values[: len(query)], shown)

    # What masks show of a shorter source stays as it was behind it: only ``source_end`` tells.
    monkeypatch.setattr(attend_cross, "reference", forgetful)
    with pytest.raises(VerificationError, match="decoding gives other logits than the model without a cache"):
        decoding(model)


def test_an_encoder_that_is_captured_wrongly_is_found(
    model: Translator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphopt.decoding import encode

    capture = encode.capture_encoder

    def wrong(encoder: Any) -> Any:
        graph = capture(encoder)
        product = next(node for node in graph.gm.graph.nodes if "linear" in str(node.target))
        product.args = (*product.args[:2],)  # its bias is lost
        graph.gm.recompile()
        return graph

    monkeypatch.setattr("graphopt.decoding.source_programs.capture_encoder", wrong)
    with pytest.raises(VerificationError, match="the captured encoder gives another rows for"):
        decoding(model)
    fast = decoding(model, on_error="rollback")
    assert any("the encoder runs as it did: the captured" in line for line in fast.report.diagnostics)
    ids, read = tokens(2, 3), source(11, 4)
    assert torch.equal(fast.generate(ids, source=read, max_new_tokens=5), greedy(model, read, ids, 5))


def test_a_bound_on_stores_counts_those_of_the_source(model: Translator) -> None:
    least = 2 * 2 * (32 + 512) * WIDTH * 4 + 2 * 512
    with pytest.raises(BudgetError, match=r"the largest is that of the first attention: cross") as caught:
        decoding(model, max_source=512, budget=graphopt.Budget(cache=least - 1))
    assert caught.value.least_bytes == least
    fast = decoding(model, max_source=512, budget=graphopt.Budget(cache=least))
    assert fast.report.decoding.budget == least


def test_a_budget_that_encoding_does_not_keep_says_so(model: Translator) -> None:
    fast = decoding(model, max_tokens=4, max_source=400)
    assert fast.report.predicted is not None
    peak = fast.report.predicted.peak_bytes
    with pytest.raises(BudgetError, match="encoding a source takes") as caught:
        decoding(model, max_tokens=4, max_source=400, budget=peak - 1)
    assert caught.value.least_bytes == peak


def test_passes_over_stores_leave_such_models_alone(model: Translator) -> None:
    pipeline = ["default", graphopt.use("keep-kv", store="quant")]
    with pytest.raises(CaptureError, match="it reads an encoder's output: such passes compare programs over"):
        decoding(model, pipeline=pipeline)
    fast = decoding(model, pipeline=pipeline, on_error="rollback")
    (step,) = (step for step in fast.report.steps if step.id == "keep-kv")
    assert step.status == "failed" and "it reads an encoder's output" in step.reason
    assert {site.store for site in fast.report.decoding.sites} == {"full", "cross"}


def test_sequences_that_change_places_take_their_source_along(fast: graphopt.Optimized) -> None:
    decoder = fast._generator.built.decoder
    reads = decoder.uncached.source
    assert reads is not None
    given = reads.given(source(9, 3))
    decoder.read(given)
    before = {name: tensor.clone() for name, tensor in decoder.held.items()}
    decoder.reorder(torch.tensor([1, 0]))
    assert all(torch.equal(decoder.held[name], tensor.flip(0)) for name, tensor in before.items())
    # Beams of one source leave it where it is.
    decoder.read({name: value[:1].repeat_interleave(2, 0) for name, value in given.items()})
    crossing = next(name for name, (index, _) in decoder.step.stores.items() if index == 1)
    decoder.held[crossing][1] += 1.0
    kept = decoder.held[crossing].clone()
    decoder.reorder(torch.tensor([1, 1]))
    assert torch.equal(decoder.held[crossing], kept)
    decoder.reset(1)
    decoder.alike = None


def learned() -> tuple[nn.Module, graphopt.Optimized]:
    model = plain("learned-distances")
    fast = graphopt.optimize(
        model, {"ids": tokens()}, generate=graphopt.Generate(160, 2), emit="eager", on_error="raise"
    )
    return model, fast


def said(model: nn.Module, ids: Tensor, count: int) -> Tensor:
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    return ids


def test_learned_biases_of_distances_are_added_and_read_anew() -> None:
    model, fast = learned()
    ids = tokens(2, 6)
    (site, _) = fast.report.decoding.sites
    assert (site.store, site.mask) == ("relative", "causal, bias of distances")
    assert fast.report.decoding.cache_bytes == 2 * site.bytes + 2 * HEADS * 160 * 4
    first = said(model, ids, 50)
    assert torch.equal(fast.generate(ids, max_new_tokens=50), first)
    with torch.no_grad():
        for block in model.blocks:
            block.near.weight.mul_(-9.0)
    second = said(model, ids, 50)
    assert not torch.equal(first, second)
    assert torch.equal(fast.generate(ids, max_new_tokens=50), second)


def test_biases_that_are_dropped_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DistanceBias, "renew", lambda self: None)
    with pytest.raises(VerificationError, match="decoding gives other logits than the model without a cache"):
        learned()


# Models of transformers ------------------------------------------------------------------------------------


def generating(name: str, max_tokens: int, **options: Any) -> tuple[Any, graphopt.Optimized]:
    pytest.importorskip("transformers")
    model = encoder_family(name)
    generate = graphopt.Generate(max_tokens, 6, max_source=24)
    given = {"emit": "eager", "on_error": "raise", **options}
    return model, graphopt.optimize(model, source_inputs(name), generate=generate, **given)


def agrees(model: Any, fast: graphopt.Optimized, **options: Any) -> Tensor:
    torch.manual_seed(7)
    expected: Tensor = model.generate(**options)
    torch.manual_seed(7)
    assert torch.equal(fast.generate(**options), expected)
    return expected


def agrees_throughout(name: str, model: Any, fast: graphopt.Optimized, count: int, fewer: int) -> None:
    """Greedy, with padded sources and without, in beams, drawn, from tokens that are given."""
    padded = source_inputs(name)
    prompt = padded.pop("decoder_input_ids")
    whole = {key: value for key, value in padded.items() if key != "attention_mask"}
    varied: dict[str, Any] = {"do_sample": False, "no_repeat_ngram_size": 2}
    made = agrees(model, fast, **padded, max_new_tokens=count, **varied)
    assert len(set(made.flatten().tolist())) > min(10, count // 3)
    agrees(model, fast, **whole, max_new_tokens=fewer, do_sample=False)
    agrees(model, fast, **padded, decoder_input_ids=prompt, max_new_tokens=fewer, **varied)
    agrees(model, fast, **padded, max_new_tokens=fewer, num_beams=3)
    agrees(model, fast, **padded, max_new_tokens=fewer, do_sample=True, top_k=20, temperature=1.3)


@pytest.mark.parametrize("name", ["bart", "t5", "whisper"])
def test_tokens_are_the_models_own(name: str) -> None:
    model, fast = generating(name, 40)
    agrees_throughout(name, model, fast, 24, 8)
    stores = [site.store for site in fast.report.decoding.sites]
    assert stores == (["relative", "cross"] if name == "t5" else ["full", "cross"]) * 2
    assert not fast.report.diagnostics


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "prophetnet"])
def test_128_tokens_of_every_family_are_the_models_own(name: str) -> None:
    model, fast = generating(name, 136)
    agrees_throughout(name, model, fast, 128, 24)


@pytest.mark.slow
def test_several_streams_of_tokens_are_refused_with_the_reason() -> None:
    with pytest.raises(CaptureError, match="rows of a table from 512 on: only the first ones"):
        generating("prophetnet", 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_compiled_steps_give_the_models_tokens(name: str) -> None:
    model, fast = generating(name, 40, emit="inductor", cache=False)
    given = source_inputs(name)
    agrees(model, fast, **given, max_new_tokens=30, do_sample=False, no_repeat_ngram_size=2)
    assert not fast.report.diagnostics


@pytest.mark.slow
def test_sounds_of_other_lengths_are_encoded_as_the_model_does() -> None:
    model, fast = generating("moonshine", 40)
    given = source_inputs("moonshine")
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "no_repeat_ngram_size": 2}
    agrees(model, fast, input_values=given["input_values"], attention_mask=given["attention_mask"], **options)
    assert not fast.report.diagnostics
    longer = torch.cat([given["input_values"], given["input_values"][:, :2500]], 1)
    mask = torch.ones_like(longer, dtype=torch.int64)
    mask[0, 3000:] = 0
    agrees(model, fast, input_values=longer, attention_mask=mask, **options)
    (line,) = fast.report.diagnostics
    assert "[2, 6500]" in line and line.endswith("are encoded as the model does")


@pytest.mark.slow
def test_stores_are_not_handed_out_for_a_cache() -> None:
    _, fast = generating("whisper", 40)
    features = source_inputs("whisper")["input_features"]
    with pytest.raises(InputsError, match="the cache is asked for its keys and values, as where generate re"):
        fast.generate(features, max_new_tokens=4, return_dict_in_generate=True)


@pytest.mark.slow
def test_an_encoders_output_may_be_given() -> None:
    model, fast = generating("bart", 40)
    given = source_inputs("bart")
    with torch.no_grad():
        encoded = model.get_encoder()(given["input_ids"], given["attention_mask"])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    for _ in range(2):
        agrees(
            model, fast, encoder_outputs=copy.copy(encoded), attention_mask=given["attention_mask"], **options
        )
    long = source_inputs("bart", 30)
    with pytest.raises(InputsError, match="the source has 30 rows"):
        fast.generate(input_ids=long["input_ids"], **options)
