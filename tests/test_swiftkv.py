"""share-kv with preset swiftkv: later keys and values out of one early stream, prompts that end there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt import GraphoptError, InputsError
from graphopt.api import make_session
from graphopt.decoding.assigning import Assigned, assign
from graphopt.decoding.assignment import CacheAssignment
from graphopt.decoding.capture import capture_uncached
from graphopt.decoding.freed import flops_of_prompt
from graphopt.decoding.narrow import narrowed
from graphopt.decoding.regions import attention_regions
from graphopt.decoding.reroot import as_assigned, check_streams, rerooted, streams_into
from graphopt.decoding.share import without_dead
from graphopt.decoding.sites import sites_of
from graphopt.plugins.host import default_host
from tests.decoders import HEADS, VOCABULARY, WIDTH, family, plain, tokens

MAX, BATCH = 48, 2


def assigned(model: nn.Module, inputs: Any = None, **options: Any) -> Assigned:
    step = graphopt.use("share-kv", **options)
    session = make_session("cpu", pipeline=[step], emit="eager", on_error="raise")
    return assign(model, inputs or (tokens(),), graphopt.Generate(MAX, BATCH), session)


def decoding(model: nn.Module, inputs: Any = None, **options: Any) -> graphopt.Optimized:
    return graphopt.optimize(
        model, inputs or (tokens(),), generate=graphopt.Generate(MAX, BATCH), emit="eager", verify="off",
        pipeline=[graphopt.use("share-kv", **options)], on_error="raise",
    )  # fmt: skip


def follows_itself(fast: graphopt.Optimized) -> None:
    """What is generated from stores is what the program without any would say."""
    ids: torch.Tensor = fast.generate(tokens(), max_new_tokens=12, do_sample=False)
    logits = fast._model(ids)
    logits = getattr(logits, "logits", logits)
    assert torch.equal(logits[:, 8:-1].argmax(-1), ids[:, 9:])


def by_hand(model: Any, early: int) -> nn.Module:
    """A Llama whose projections of keys and values behind layer ``early`` take what enters that layer,
    through their own layer's norm, in eager mode."""
    eager = copy.deepcopy(model)
    held: dict[str, torch.Tensor] = {}
    layers = eager.model.layers
    layers[early].register_forward_pre_hook(lambda module, args: held.update(x=args[0]))
    for layer in layers[early + 1 :]:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.register_forward_pre_hook(
                lambda module, args, norm=layer.input_layernorm: (norm(held["x"]),)
            )
    made: nn.Module = eager
    return made


@pytest.fixture(scope="module")
def llama() -> Any:
    pytest.importorskip("transformers")
    return family("llama", num_hidden_layers=4)


@pytest.fixture(scope="module")
def fast(llama: Any) -> graphopt.Optimized:
    return decoding(llama, {"input_ids": tokens()}, preset="swiftkv", early=1)


def test_tokens_are_those_of_a_model_that_projects_the_early_stream(
    llama: Any, fast: graphopt.Optimized
) -> None:
    ids = tokens(2, 20)
    expected = by_hand(llama, 1)(ids).logits
    assert (fast._model(ids).logits - expected).abs().max() <= 1e-5
    assert (llama(ids).logits - expected).abs().max() > 1e-2
    follows_itself(fast)
    padded = torch.ones_like(ids)
    padded[1, :7] = 0
    made = fast.generate(ids, attention_mask=padded, max_new_tokens=8, do_sample=False)
    logits = fast._model(made, torch.cat([padded, torch.ones(2, 8, dtype=torch.int64)], 1)).logits
    assert torch.equal(logits[:, 19:-1].argmax(-1), made[:, 20:])


def test_prompts_do_not_go_through_later_layers(llama: Any, fast: graphopt.Optimized) -> None:
    """FLOPs of the programs that take prompts in, counted, against those of layers by hand."""
    record = fast.report.decoding.sharing
    assert record.streams == ((2, 1), (3, 1)) and record.prompt == MAX
    head, kv, hidden = WIDTH // HEADS, 2 * (WIDTH // HEADS), 96
    projections = {"q": WIDTH * WIDTH, "kv": 2 * WIDTH * kv, "o": WIDTH * WIDTH, "mlp": 3 * WIDTH * hidden}
    attending = 2 * HEADS * MAX * head  # multiplications of a row: scores, and values
    layer = projections["q"] + projections["o"] + projections["mlp"] + attending
    # Layers 1 and 2 come to see one row in place of 48; layer 3 sees one as it is.
    assert record.prompt_flops.realised == pytest.approx(2 * 2 * (MAX - 1) * layer, rel=0.01)
    assert record.prompt_flops.promised == 2 * 2 * (MAX - 1) * (layer - attending)
    assert record.cache_bytes.realised == record.weight_bytes.realised == record.flops.realised == 0
    assert "2 attentions make keys and values of what enters attention 1" in str(fast.report)
    report = fast.report
    assert type(report).from_json(report.to_json()) == report


def test_half_of_the_layers_is_about_half_of_a_prompt() -> None:
    model = plain("fused", layers=8)
    session = make_session("cpu", pipeline=[], emit="eager", on_error="raise")
    uncached = capture_uncached(model, (tokens(),), graphopt.Generate(MAX))
    regions = attention_regions(uncached)
    found = []
    for streams in ({}, dict.fromkeys(range(5, 8), 4)):
        after, _ = narrowed(without_dead(as_assigned(uncached, regions, {}, streams)))
        sites = sites_of(after, default_host().stores(), 1, MAX)
        found.append(flops_of_prompt(after, sites, MAX, session.cost))
    assert 0.5 < found[1] / found[0] < 0.72  # keys and values of 8 layers are made all the same


def test_attentions_that_read_the_last_keys_see_no_prompt() -> None:
    """Exact, without this preset: layers behind the last one that makes keys of its own."""
    uncached = capture_uncached(plain("fused", layers=4), (tokens(),), graphopt.Generate(MAX))
    session = make_session("cpu", pipeline=[], emit="eager", on_error="raise")
    flops = []
    for sources in ({}, {2: 1, 3: 1}, {1: 0, 2: 0}):
        after, _ = narrowed(without_dead(as_assigned(uncached, attention_regions(uncached), sources, {})))
        sites = sites_of(after, default_host().stores(), 1, MAX)
        flops.append(flops_of_prompt(after, sites, MAX, session.cost))
    assert flops[1] < 0.55 * flops[0] and flops[2] > 0.8 * flops[0]


def test_fused_projections_are_parted_and_their_checkpoint_loads() -> None:
    model: Any = plain("fused", layers=3)
    fast = decoding(model, preset="swiftkv", early=0)
    follows_itself(fast)
    assert fast._model.blocks[1].qkv.weight.shape == (WIDTH, WIDTH)
    assert fast._model.blocks[1].qkv.weight_early.shape == (2 * WIDTH, WIDTH)
    assert sum(p.numel() for p in fast._model.parameters()) == sum(p.numel() for p in model.parameters())
    before, ids = copy.deepcopy(fast.state_dict()), tokens(2, 16)
    original = copy.deepcopy(model.state_dict())
    logits = fast._model(ids)
    fast.load_state_dict({name: value + 0.01 for name, value in original.items()})
    assert (fast._model(ids) - logits).abs().max() > 1e-3
    fast.load_state_dict(original)
    assert torch.equal(fast._model(ids), logits)
    fast.load_state_dict(before)
    assert torch.equal(fast._model(ids), logits)


def test_neighbours_share_what_the_early_stream_makes() -> None:
    pytest.importorskip("transformers")
    model = family("llama", num_hidden_layers=6)
    made = assigned(model, {"input_ids": tokens()}, preset="swiftkv", early=1, group=2)
    assert made.assignment.sources == {3: 2, 5: 4} and made.assignment.streams == {2: 1, 4: 1}
    assert made.sharing is not None
    for freed in (made.sharing.weight_bytes, made.sharing.prompt_flops):
        assert freed.realised >= 0.99 * freed.promised > 0


def test_recovery_fits_what_makes_keys_and_values() -> None:
    model = plain("fused", layers=3)
    rows = tokens(8, 32, seed=5)
    made = assigned(model, preset="swiftkv", early=0, calibration=rows, recover="local", steps=12)
    before, after = (float(word) for word in made.records[0].reason.rsplit("KL ", 1)[1].split(" -> "))
    assert after < 0.8 * before
    whole = model.get_parameter("blocks.1.qkv.weight")
    assert not torch.equal(made.model.get_parameter("blocks.1.qkv.weight_early"), whole[WIDTH:])
    assert made.sharing is not None and made.sharing.divergence == pytest.approx(after, rel=0.01)


SLOW = ("phi3", "gemma3_text", "deepseek_v2", "bloom", "mixtral")
SPLIT = "heads are split before queries are taken out: theirs are computed with keys and values"


@pytest.mark.parametrize(
    "name",
    [
        # It takes the rows of all sequences together for its products.
        "gpt2",
        *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
        pytest.param("gpt_neox", marks=(pytest.mark.slow, pytest.mark.xfail(reason=SPLIT, strict=True))),
    ],
)
def test_families_decode_out_of_an_early_stream(name: str) -> None:
    pytest.importorskip("transformers")
    fast = decoding(family(name), {"input_ids": tokens()}, preset="swiftkv", early=0)
    follows_itself(fast)
    sharing = fast.report.decoding.sharing
    assert sharing.off <= 1e-5 and sharing.prompt_flops.realised >= 0.99 * sharing.prompt_flops.promised


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"early": 1}, "early=1 is an option of preset 'swiftkv': got preset=''"),
        ({"preset": "cla", "early": 1}, "early=1 is an option of preset 'swiftkv': got preset='cla'"),
        ({"preset": "swiftkv", "early": 2}, "attends 3 times(.|\n)*the nearest valid choice is 1"),
        ({"preset": "swiftkv", "early": -1}, "early=-1(.|\n)*the nearest valid choice is 0"),
        ({"preset": "swiftkv", "group": 0}, "group=0: the nearest valid choice is 1"),
        ({"preset": "swiftkv", "recover": "local"}, "recovery needs calibration"),
    ],
    ids=["none", "other", "last", "negative", "group", "recover"],
)
def test_options_that_do_not_fit_are_refused(options: Any, reason: str) -> None:
    with pytest.raises(GraphoptError, match=reason):
        assigned(plain("fused", layers=3), **options)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"streams": {1: 1}}, "of what enters attention 1, which comes no earlier(.|\n)*that does: 0"),
        ({"streams": {2: 0}, "sources": {2: 1}}, "attention 2 is to make keys and values of what enters"),
        ({"streams": {0: 0}}, "leave attention 0 out"),
    ],
)
def test_streams_that_make_no_sense_are_refused(parts: Any, reason: str) -> None:
    with pytest.raises(InputsError, match=reason):
        CacheAssignment(**parts)


class Widening(nn.Module):
    """Two layers, the second of which is wider; with ``beside``, it also reads what the first began with."""

    def __init__(self, beside: bool) -> None:
        super().__init__()
        self.beside = beside
        self.embed, self.wide, self.head = nn.Embedding(VOCABULARY, 32), nn.Linear(32, 48), nn.Linear(48, 128)
        self.first, self.second = nn.Linear(32, 96), nn.Linear(48, 144)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = start = self.embed(ids)
        for index, qkv in enumerate((self.first, self.second)):
            q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in qkv(x).chunk(3, -1))
            made = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + made.transpose(1, 2).flatten(2)
            if index == 0:
                x = self.wide(x + x.tanh())
        x = x + self.wide(start) if self.beside else x
        logits: torch.Tensor = self.head(x)
        return logits


def test_streams_that_do_not_fit_the_model_are_refused() -> None:
    options = graphopt.Generate(MAX)
    uncached = capture_uncached(Widening(False).eval(), (tokens(),), options)
    with pytest.raises(InputsError, match=r"attention 1 makes keys and values of a stream of 48(.|\n)*32"):
        check_streams(uncached, attention_regions(uncached), {1: 0})
    uncached = capture_uncached(Widening(True).eval(), (tokens(),), options)
    regions = attention_regions(uncached)
    assert streams_into(uncached, regions)[1] is None
    with pytest.raises(InputsError, match=r"what attention 1 is made of is no single stream(.|\n)*one: 0"):
        rerooted(uncached, regions, {1: 0})
