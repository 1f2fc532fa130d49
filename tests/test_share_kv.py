"""share-kv: attentions read the keys and values of others, what made theirs is gone, and it is said."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

import graphopt
from graphopt import GraphoptError, InputsError, Report
from graphopt.api import make_session
from graphopt.decoding.assigning import Assigned, assign
from graphopt.decoding.capture import Uncached, capture_uncached
from graphopt.decoding.look import Look
from graphopt.decoding.narrow import narrowed
from graphopt.decoding.regions import attention_regions
from graphopt.decoding.share import redirected, without_dead
from graphopt.plugins import ShareScoreSpec, hookimpl
from graphopt.plugins.host import default_host
from graphopt.quality import row_divergences
from graphopt_passes.share_kv.presets import preset_plan
from graphopt_passes.share_kv.search import candidate_pairs, search
from tests.decoders import FAMILIES, WIDTH, family, plain, tokens

MAX, BATCH = 48, 2
CALIBRATION = tokens(8, 32, seed=5)


def shared(model: nn.Module, example: Any = None, **options: Any) -> graphopt.Optimized:
    given = {"emit": "eager", "on_error": "raise", "verify": "off"}
    plugins = options.pop("plugins", ())
    step = graphopt.use("share-kv", plugins=plugins, **options)
    return graphopt.optimize(
        model, example or (tokens(),), generate=graphopt.Generate(MAX, BATCH), pipeline=[step],
        plugins=plugins, **given,
    )  # fmt: skip


def assigned(model: nn.Module, **options: Any) -> Assigned:
    """What the pass makes of a model, without what decodes around it."""
    plugins = options.pop("plugins", ())
    step = graphopt.use("share-kv", plugins=plugins, **options)
    session = make_session("cpu", pipeline=[step], emit="eager", on_error="raise", plugins=plugins)
    return assign(model, (tokens(),), graphopt.Generate(MAX, BATCH), session)


def sources_of(made: Assigned) -> tuple[tuple[int, int], ...]:
    return tuple(made.assignment.sources.items())


def greedy(fast: graphopt.Optimized, count: int = 16) -> torch.Tensor:
    found: torch.Tensor = fast.generate(tokens(), max_new_tokens=count, do_sample=False)
    return found


def follows_itself(fast: graphopt.Optimized) -> None:
    """What is generated from stores is what the program without any would say."""
    ids = greedy(fast)
    logits = fast._model(ids)
    logits = getattr(logits, "logits", logits)
    assert torch.equal(logits[:, tokens().shape[1] - 1 : -1].argmax(-1), ids[:, tokens().shape[1] :])


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return plain("fused", layers=3)


@pytest.fixture(scope="module")
def fast(model: nn.Module) -> graphopt.Optimized:
    return shared(model, plan={1: 0})


def test_tokens_are_those_of_a_model_that_reads_the_sources_keys(
    model: nn.Module, fast: graphopt.Optimized
) -> None:
    """The reference is written in eager mode, by hand: projections of keys and values of layer 1 take what
    enters those of layer 0."""
    held: dict[str, torch.Tensor] = {}

    def keep(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        held["qkv"] = output

    def put(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.cat([output[..., :WIDTH], held["qkv"][..., WIDTH:]], -1)

    eager = copy.deepcopy(model)
    eager.blocks[0].qkv.register_forward_hook(keep)
    eager.blocks[1].qkv.register_forward_hook(put)
    expected = eager(tokens(2, 20))
    assert (fast._model(tokens(2, 20)) - expected).abs().max() <= 1e-5
    assert (model(tokens(2, 20)) - expected).abs().max() > 1e-3
    follows_itself(fast)


def test_what_is_promised_is_freed(model: nn.Module, fast: graphopt.Optimized) -> None:
    record = fast.report.decoding
    assert record is not None and record.sharing is not None
    sharing = record.sharing
    for freed in (sharing.cache_bytes, sharing.weight_bytes, sharing.flops):
        assert freed.promised > 0 and freed.realised >= 0.99 * freed.promised
    assert sharing.cache_bytes.realised == 2 * MAX * BATCH * WIDTH * 4
    held = fast._generator.built.decoder.held
    assert sum(t.untyped_storage().nbytes() for t in held.values()) == 2 * sharing.cache_bytes.realised
    assert sharing.weight_bytes.realised == 2 * WIDTH * (WIDTH + 1) * 4
    before, after = (sum(p.numel() for p in one.parameters()) for one in (model, fast))
    assert 4 * (before - after) == sharing.weight_bytes.realised
    assert [site.source for site in record.sites] == [0, 0, 2] and record.sites[1].bytes == 0
    assert record.sites[1].layer == "blocks.1"
    text = str(fast.report)
    assert "1 attentions read the keys and values of others: 1 <- 0" in text and "freed:" in text
    assert Report.from_json(fast.report.to_json()) == fast.report


def test_the_original_checkpoint_loads(model: nn.Module, fast: graphopt.Optimized) -> None:
    before = fast._model(tokens())
    other = copy.deepcopy(fast)
    changed = {name: value + 0.01 for name, value in model.state_dict().items()}
    other.load_state_dict(changed)
    assert not torch.equal(other._model(tokens()), before)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other._model(tokens()), before)
    other.load_state_dict(fast.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})
    assert torch.equal(greedy(other, 4), greedy(fast, 4))


def test_the_model_itself_stays_as_it_is(model: nn.Module) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frozen = copy.deepcopy(model).requires_grad_(False)
    made = assigned(frozen, plan={1: 0}, calibration=CALIBRATION, recover="local", steps=4).model
    assert not any(parameter.requires_grad for parameter in made.parameters())
    assert not torch.equal(made.blocks[1].qkv.weight, before["blocks.1.qkv.weight"][:WIDTH])
    assert made.blocks[2].qkv.weight.data_ptr() == frozen.blocks[2].qkv.weight.data_ptr()
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())


def test_tied_projections_are_not_narrowed(model: nn.Module) -> None:
    tied = copy.deepcopy(model)
    tied.blocks[1].qkv.weight = tied.blocks[2].qkv.weight
    made = assigned(tied, plan={1: 0})
    assert made.model.get_parameter("blocks.2.qkv.weight").shape == (3 * WIDTH, WIDTH)
    assert made.sharing is not None and made.sharing.off == 0


class Interleaved(nn.Module):
    """Queries of which the last half is added to keys: columns that are left do not come to be one value."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(128, 32), nn.Linear(32, 128)
        self.qkv = nn.ModuleList(nn.Linear(32, 96) for _ in range(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for qkv in self.qkv:
            parts = qkv(x).unflatten(-1, (4, 3, 8))
            q = torch.cat([parts[:, :, :, 0, 4:].tanh(), parts[:, :, :, 0, :4]], -1)
            q, k, v = (part.transpose(1, 2) for part in (q, parts[:, :, :, 1], parts[:, :, :, 2]))
            out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + out.transpose(1, 2).flatten(2)
        logits: torch.Tensor = self.head(x)
        return logits


def test_columns_that_are_left_apart_are_put_back() -> None:
    torch.manual_seed(0)
    uncached = capture_uncached(Interleaved().eval(), (tokens(),), graphopt.Generate(MAX))
    reference = redirected(uncached, attention_regions(uncached), {1: 0})
    after, (done, bias) = narrowed(without_dead(reference))
    assert done.columns.tolist() == [24 * head + i for head in range(4) for i in range(8)]
    assert bias.dim == 0 and after.weights[done.placeholder].shape == (32, 32)
    assert torch.allclose(after.run(tokens()), reference.run(tokens()), atol=1e-6)


@pytest.fixture(scope="module")
def uncached(model: nn.Module) -> Uncached:
    return capture_uncached(model, (tokens(),), graphopt.Generate(MAX))


def test_divergences_are_those_of_whole_runs(uncached: Uncached) -> None:
    regions = attention_regions(uncached)
    look = Look(uncached, regions, CALIBRATION)
    for sources in ({2: 1}, {1: 0, 2: 0}):
        after = redirected(uncached, regions, sources).run(CALIBRATION)
        expected = float(row_divergences(uncached.run(CALIBRATION), after).double().mean())
        assert look.divergence(sources) == pytest.approx(expected, rel=1e-5)
    assert look.divergence({}) == 0


def test_a_search_takes_the_cheapest(model: nn.Module, uncached: Uncached) -> None:
    made = assigned(model, layers=1, calibration=CALIBRATION)
    look = Look(uncached, attention_regions(uncached), CALIBRATION)
    costs = {pair: look.divergence(dict([pair])) for pair in ((1, 0), (2, 1), (2, 0))}
    best = min(costs, key=costs.__getitem__)
    assert made.sharing is not None and made.sharing.sources == (best,)
    assert made.sharing.tokens == CALIBRATION.numel()
    assert made.sharing.divergence == pytest.approx(costs[best])
    (record,) = made.records
    assert record.status == "applied" and "calibration=[8 rows of token ids]" in record.options


def test_a_choice_is_corrected_by_what_it_measures() -> None:
    """Shares that are cheap alone and dear together are exchanged."""

    class Told:
        tokens = 1

        def divergence(self, sources: dict[int, int]) -> float:
            together = 5.0 if {1, 2} <= set(sources) else 0.0
            return together + sum(0.1 * consumer for consumer in sources)

    spec = default_host().share_score("single-kl")
    pairs = candidate_pairs(5, lambda consumer, source: "" if source == 0 else "no", 3)
    assert pairs == [(1, 0), (2, 0), (3, 0), (4, 0)]
    found = search(cast(Look, Told()), pairs, spec, 2, None, lambda line: None)
    assert found.sources == {1: 0, 3: 0} and found.measured == pytest.approx(0.4)
    bounded = search(cast(Look, Told()), pairs, spec, None, 0.45, lambda line: None)
    assert bounded.measured <= 0.45 and len(bounded.sources) == 2


def test_a_bound_on_kl_is_kept(model: nn.Module) -> None:
    made = assigned(model, max_kl=0.0, calibration=CALIBRATION)
    assert made.records[0].status == "no-op" and made.sharing is None and made.model is model


@pytest.mark.slow
def test_recovery_brings_predictions_back(model: nn.Module) -> None:
    rows = tokens(16, 32, seed=6)
    made = assigned(model, plan={1: 0, 2: 0}, calibration=rows, recover="local", steps=60)
    before, after = (float(word) for word in made.records[0].reason.rsplit("KL ", 1)[1].split(" -> "))
    assert after < 0.7 * before
    assert made.sharing is not None and made.sharing.divergence == pytest.approx(after, rel=0.01)


def test_presets(model: nn.Module) -> None:
    assert sources_of(assigned(model, preset="cla", group=3)) == ((1, 0), (2, 0))
    assert preset_plan("sandwich", 6, lambda consumer, source: "", 1) == {2: 1, 3: 1, 4: 1}


class Late:
    """A plugin that would share late layers first."""

    graphopt_api = 1

    @hookimpl
    def graphopt_share_scores(self) -> list[ShareScoreSpec]:
        return [ShareScoreSpec("late", lambda look, pairs: [-float(c) for c, _ in pairs], "minus the index")]


@pytest.mark.parametrize("score", ["late", "dissimilarity", "cka"])
def test_scores_are_plugins(model: nn.Module, score: str) -> None:
    made = assigned(model, layers=1, score=score, calibration=CALIBRATION, plugins=[Late()])
    ((consumer, source),) = sources_of(made)
    assert 0 <= source < consumer <= 2 and (score != "late" or consumer == 2)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"plan": {1: 0}, "preset": "cla"}, "given plan and preset"),
        ({"plan": [1]}, "expected a mapping of indices"),
        ({"layers": 2}, "a search needs calibration"),
        ({"plan": {1: 0}, "recover": "locally"}, "the nearest valid choice is 'local'"),
        ({"layers": 0}, "layers=0: expected 1 or more"),
        ({"layer": 1}, "unknown option of pass share-kv 'layer'; did you mean 'layers'"),
        ({"plan": {1: 0}, "calibration": 3}, "calibration is 3: expected batches"),
    ],
    ids=["two", "list", "no-data", "recover", "zero", "unknown", "kind"],
)
def test_options_that_make_no_sense_are_refused(options: Any, reason: str) -> None:
    with pytest.raises(GraphoptError, match=reason):
        graphopt.use("share-kv", **options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"plan": {7: 0}}, "attends 3 times, 0 to 2"),
        ({"layers": 9, "calibration": CALIBRATION}, "the nearest valid choice is layers=2"),
        ({"layers": 1, "calibration": tokens(2, 8)}, "calibration has 16 tokens"),
        ({"layers": 1, "calibration": "/nowhere"}, "is no file of token ids"),
        ({"layers": 1, "score": "single", "calibration": CALIBRATION}, "unknown share score 'single'"),
        ({"preset": "clay"}, "unknown preset of share-kv 'clay'"),
    ],
    ids=["index", "many", "short", "file", "score", "preset"],
)
def test_what_does_not_fit_the_model_is_refused(model: nn.Module, options: Any, reason: str) -> None:
    with pytest.raises(GraphoptError, match=reason):
        assigned(model, **options)


def test_without_generation_it_does_nothing(model: nn.Module) -> None:
    step = graphopt.use("share-kv", plan={1: 0})
    made = graphopt.optimize(model, (tokens(),), pipeline=[step], emit="eager")
    (record,) = [one for one in made.report.steps if one.id == "share-kv"]
    assert record.status == "skipped" and "generate=" in record.reason


def layers_of(name: str) -> tuple[nn.Module, dict[int, int]]:
    """Four layers of a family and a plan of consumers among those of one kind."""
    count = "num_hidden_layers" if "num_hidden_layers" in FAMILIES[name] else "n_layer"
    changes: dict[str, Any] = {count: 4}
    if "layer_types" in FAMILIES[name]:
        changes["layer_types"] = ["sliding_attention", "full_attention"] * 2
    model: Any = family(name, **changes)
    mixed = len(set(getattr(model.config, "layer_types", None) or ())) > 1
    return model, {3: 1} if mixed else {1: 0, 2: 0}


def decodes_shared(model: nn.Module, plan: dict[int, int]) -> None:
    original = copy.deepcopy(model.state_dict())
    made = shared(model, {"input_ids": tokens()}, plan=plan)
    follows_itself(made)
    sharing = made.report.decoding.sharing
    assert sharing.off <= 1e-5
    for freed in (sharing.cache_bytes, sharing.weight_bytes, sharing.flops):
        assert 1.01 * freed.promised >= freed.realised >= 0.99 * freed.promised > 0
    ids = greedy(made, 4)
    made.load_state_dict(original)
    assert torch.equal(greedy(made, 4), ids)


def test_a_llama_decodes_with_shared_keys() -> None:
    pytest.importorskip("transformers")
    decodes_shared(family("llama"), {1: 0})


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gemma3n_text"])
def test_every_family_decodes_with_shared_keys(name: str) -> None:
    pytest.importorskip("transformers")
    decodes_shared(*layers_of(name))


@pytest.mark.slow
def test_healing_helps_and_goes_on_where_it_stopped(model: nn.Module, tmp_path: Path) -> None:
    batches = [(tokens(4, 24, seed),) for seed in range(4)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole, parts = (assigned(model, plan={1: 0, 2: 0}).model for _ in range(2))
    seen: list[float] = []
    done = graphopt.heal(
        whole, batches, reference=model, steps=24, rate=3e-3, progress=lambda step, kl: seen.append(kl)
    )
    assert len(seen) == 24 and done.last < 0.5 * done.first
    assert "blocks.1.qkv.weight" in done.trained and not any("mlp" in name for name in done.trained)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    class Stopped(Exception):
        pass

    def stop(step: int, kl: float) -> None:
        if step == 13:
            raise Stopped

    file = tmp_path / "state.safetensors"
    options: Any = {"reference": model, "steps": 24, "rate": 3e-3, "state": file, "every": 6}
    with pytest.raises(Stopped):
        graphopt.heal(parts, batches, progress=stop, **options)
    graphopt.heal(parts, batches, **options)
    for name, value in whole.state_dict().items():
        assert torch.allclose(value, parts.state_dict()[name], atol=1e-6), name
    with pytest.raises(InputsError, match="of a run of 24 steps"):
        graphopt.heal(parts, batches, **{**options, "steps": 30})
    with pytest.raises(InputsError, match="whose attentions read their own keys"):
        graphopt.heal(model, batches, **options)
