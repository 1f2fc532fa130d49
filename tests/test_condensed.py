"""share-kv with sources that come later: training programs in iterations (layer-condensed models)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphopt
from graphopt import GraphoptError, InputsError, PassError
from graphopt.capture.aliasing import alias_map
from graphopt.passes import pass_text
from graphopt.pipeline import Pipeline
from graphopt.plugins.host import default_host
from graphopt.program import Level
from graphopt_passes.mask_proof import hides_later
from graphopt_passes.share_kv.presets import condensed_plan
from tests.decoders import family, tokens
from tests.semantic import capture

LENGTH = 10
CONDENSED = "layer-condensed"


@dataclass(frozen=True)
class Layer:
    """A layer of a decoder in three parts, for references that are written by hand: queries, keys and values
    [B, heads, S, D] of what enters, and what leaves where attention gave [B, heads, S, D]."""

    query: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    key_value: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    rest: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Decoder:
    layers: list[Layer]
    embed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    logits: Callable[[torch.Tensor], torch.Tensor]


def llama(model: Any) -> Decoder:
    def heads(x: torch.Tensor, count: int) -> torch.Tensor:
        return x.unflatten(-1, (count, -1)).transpose(1, 2)

    def turned(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        cos, sin = (part[:, None] for part in model.model.rotary_emb(x, places))
        half = x.shape[-1] // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def layer(made: Any) -> Layer:
        attention, config = made.self_attn, model.config

        def query(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
            q = heads(attention.q_proj(made.input_layernorm(x)), config.num_attention_heads)
            return turned(q, places)

        def key_value(x: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            normed = made.input_layernorm(x)
            k, v = (
                heads(project(normed), config.num_key_value_heads)
                for project in (attention.k_proj, attention.v_proj)
            )
            return turned(k, places), v

        def rest(x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
            x = x + attention.o_proj(attended.transpose(1, 2).flatten(2))
            found: torch.Tensor = x + made.mlp(made.post_attention_layernorm(x))
            return found

        return Layer(query, key_value, rest)

    return Decoder(
        [layer(made) for made in model.model.layers],
        lambda ids, places: model.model.embed_tokens(ids),
        lambda x: model.lm_head(model.model.norm(x)),
    )


def gpt2(model: Any) -> Decoder:
    def layer(made: Any) -> Layer:
        def parts(x: torch.Tensor) -> list[torch.Tensor]:
            made_of = made.attn.c_attn(made.ln_1(x)).chunk(3, -1)
            return [part.unflatten(-1, (model.config.n_head, -1)).transpose(1, 2) for part in made_of]

        def key_value(x: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            _, k, v = parts(x)
            return k, v

        def rest(x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
            x = x + made.attn.c_proj(attended.transpose(1, 2).flatten(2))
            found: torch.Tensor = x + made.mlp(made.ln_2(x))
            return found

        return Layer(lambda x, places: parts(x)[0], key_value, rest)

    return Decoder(
        [layer(made) for made in model.transformer.h],
        lambda ids, places: model.transformer.wte(ids) + model.transformer.wpe(places),
        lambda x: model.lm_head(model.transformer.ln_f(x)),
    )


DECODERS = {"llama": llama, "gpt2": gpt2}


class Trained(nn.Module):
    """A language model with its loss, in float64 from end to end: transformers computes norms of Llama and
    losses in float32."""

    def __init__(self, name: str, layers: int = 5, attention: str | None = None, **changes: Any) -> None:
        super().__init__()
        pytest.importorskip("transformers")
        given: dict[str, Any] = {"num_hidden_layers": layers}
        if name == "gpt2":
            given = {"n_layer": layers, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        self.model: Any = family(name, attention, **given | changes)
        for module in list(self.model.modules()):
            for child, norm in list(module.named_children()):
                if type(norm).__name__ == "LlamaRMSNorm":
                    setattr(module, child, nn.RMSNorm(norm.weight.shape, norm.variance_epsilon))
        self.double().train()
        self.decoder = DECODERS[name](self.model) if name in DECODERS else None

    def forward(self, ids: torch.Tensor, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.model(ids, **{"use_cache": False, **more}).logits
        return loss_of(logits, ids), logits


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    """Softmax attention where ``shown`` [B or 1, S, T]; rows that are shown nothing give zeros."""
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    weights = scores.exp() * shown[:, None]
    return weights @ v / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)


def in_iterations(
    decoder: Decoder | None,
    ids: torch.Tensor,
    plan: Mapping[int, int],
    iterations: int,
    backward: int,
    shown: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits, written by hand: each stretch from a consumer to its source runs whole, again and again."""
    assert decoder is not None
    length = ids.shape[1]
    places = torch.arange(length)[None] if places is None else places
    shown = torch.ones(1, length, length, dtype=torch.bool).tril() if shown is None else shown
    x = decoder.embed(ids, places)
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def run(x: torch.Tensor, first: int, last: int) -> torch.Tensor:
        made = {}
        for index in range(first, last + 1):
            layer = decoder.layers[index]
            source = plan.get(index, index)
            if index not in plan:
                made[index] = layer.key_value(x, places)
            q = layer.query(x, places)
            if source <= index:
                y = attended(q, *(kept | made)[source], shown)
            elif source in kept:
                y = attended(q, *kept[source], shown.tril(-1))
            else:
                y = torch.zeros_like(q)
            x = layer.rest(x, y)
        kept.update(made)
        return x

    index = 0
    while index < len(decoder.layers):
        last = index
        if plan.get(index, index) > index:
            last = plan[index]
            while (more := max(plan.get(i, i) for i in range(index, last + 1))) > last:
                last = more
            for number in range(iterations - 1):
                with torch.set_grad_enabled(number >= iterations - backward):
                    run(x, index, last)
        x = run(x, index, last)
        index = last + 1
    return decoder.logits(x)


def token_by_token(decoder: Decoder, ids: torch.Tensor, plan: Mapping[int, int]) -> torch.Tensor:
    """Logits as decoding gives them: a token runs through all layers, then the next one does."""
    stores: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    rows = []
    for place in range(ids.shape[1]):
        at = torch.tensor([[place]])
        x = decoder.embed(ids[:, place : place + 1], at)
        for index, layer in enumerate(decoder.layers):
            if index not in plan:
                new = layer.key_value(x, at)
                old = stores.get(index)
                k, v = new if old is None else (torch.cat(pair, 2) for pair in zip(old, new, strict=True))
                stores[index] = k, v
            q, source = layer.query(x, at), plan.get(index, index)
            if source in stores:
                k, v = stores[source]
                y = attended(q, k, v, torch.ones(1, 1, k.shape[2], dtype=torch.bool))
            else:
                y = torch.zeros_like(q)
            x = layer.rest(x, y)
        rows.append(decoder.logits(x))
    return torch.cat(rows, 1)


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor | None]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def example(length: int = LENGTH, **more: Any) -> dict[str, Any]:
    return {"ids": tokens(2, length), **more}


def condensed(
    model: nn.Module, given: Any, *, listed: str = "default", asked: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:  # fmt: skip
    """The model with ``share-kv`` behind what is ``listed``; ``asked`` is for optimize()."""
    pipeline = [*filter(None, [listed]), graphopt.use("share-kv", **options)]
    chosen: dict[str, Any] = {"emit": "eager", "pipeline": pipeline, "cache": False}
    return graphopt.optimize(model, given, **chosen | dict(asked or {}))


def same_step(
    model: Trained, fast: Any, given: Any, plan: Mapping[int, int], iterations: int, backward: int,
    **more: Any,
) -> None:  # fmt: skip
    """Loss and gradients are those of the reference; weights that it does not read have none."""
    logits = in_iterations(model.decoder, given["ids"], plan, iterations, backward, **more)
    expected = gradients(model, loss := loss_of(logits, given["ids"]))
    found_loss, found_logits = fast(**given)
    found = gradients(fast, found_loss)
    assert (found_logits - logits).abs().max() <= 1e-12
    assert (found_loss - loss).abs() <= 1e-12
    for weight, gradient in expected.items():
        mine = found[f"{weight}"]
        assert (mine is None) == (gradient is None), weight
        if gradient is not None and mine is not None:
            assert (mine - gradient).abs().max() <= 1e-12, weight


@pytest.mark.parametrize(
    ("name", "options", "plan"),
    [
        ("llama", {"preset": CONDENSED}, {1: 3, 2: 3}),
        ("llama", {"preset": CONDENSED, "warmup": 1, "iterations": 5, "backward_iterations": 1},
         {1: 4, 2: 4, 3: 4}),
        ("llama", {"plan": {0: 1, 2: 4, 3: 4}, "iterations": 3, "backward_iterations": 3},
         {0: 1, 2: 4, 3: 4}),
        ("llama", {"plan": {1: 3, 2: 0, 4: 3}, "iterations": 4}, {1: 3, 2: 0, 4: 3}),
        ("llama", {"plan": {0: 2, 1: 4, 3: 4}, "iterations": 4}, {0: 2, 1: 4, 3: 4}),
        ("gpt2", {"preset": CONDENSED, "warmup": 0, "iterations": 4}, {0: 4, 1: 4, 2: 4, 3: 4}),
    ],
    ids=["preset", "odd", "groups", "both-ways", "two-sources", "gpt2"],
)  # fmt: skip
def test_loss_and_gradients_are_those_of_iterations_by_hand(name: str, options: Any, plan: Any) -> None:
    model, given = Trained(name), example()
    fast = condensed(model, given, **options)
    passes, passing = options.get("iterations", 9), options.get("backward_iterations", 2)
    same_step(model, fast, given, plan, passes, passing)
    (record,) = [one for one in fast.report.steps if one.id == "share-kv"]
    assert record.status == "applied"


def semantic_nodes(fast: Any) -> tuple[Any, list[Any]]:
    (program,) = [one for one in fast._driver.programs() if one.level is Level.SEMANTIC]
    return program, list(program.nodes())


def test_projections_of_consumers_are_out_of_the_program() -> None:
    model, given = Trained("llama"), example()
    fast = condensed(model, given, preset=CONDENSED, iterations=3)
    program, _ = semantic_nodes(fast)
    read = {spec.fqn for spec in program.signature.inputs if program.find([spec.node])[0].users}
    held = {name for name, _ in model.named_parameters()}
    gone = {f"model.model.layers.{i}.self_attn.{p}_proj.weight" for i in (1, 2) for p in "kv"}
    assert held - read == gone
    found = gradients(fast, fast(**given)[0])
    assert {name for name, gradient in found.items() if gradient is None} == gone


def test_columns_of_one_projection_for_all_three_are_not_computed() -> None:
    """Of GPT-2's queries, keys and values in one product, consumers compute queries, in every iteration."""
    model, given = Trained("gpt2"), example()
    _, nodes = semantic_nodes(condensed(model, given, plan={1: 3, 2: 3}, iterations=3))
    widths = [n.meta["val"].shape[-1] for n in nodes if n.target is torch.ops.aten.addmm.default]
    # Attentions 0, 3 and 4 make all; attention 3 its keys and values in each of three iterations; attention 1
    # queries once, ahead of what is repeated, and attention 2 where it attends.
    assert widths.count(3 * 64) == 3 + 2 and widths.count(64) > 0
    found = gradients(model, condensed(model, given, plan={1: 3, 2: 3}, iterations=3)(**given)[0])
    weight = found["model.transformer.h.1.attn.c_attn.weight"]
    assert weight is not None and not weight[:, 64:].any() and weight[:, :64].any()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_enough_iterations_are_decoding_token_by_token(name: str) -> None:
    model, given = Trained(name), example()
    assert model.decoder is not None
    with torch.no_grad():
        expected = token_by_token(model.decoder, given["ids"], {1: 3, 2: 3})
    off = {}
    for iterations in (3, LENGTH):
        _, logits = condensed(model, given, preset=CONDENSED, iterations=iterations)(**given)
        off[iterations] = float((logits - expected).detach().abs().max())
    assert off[LENGTH] <= 1e-12 < 1e-6 < off[3]


def masks(kind: str) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """Arguments of a model, which rows read which, and places of rows."""
    lower = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(2, -1, -1)
    places = torch.arange(LENGTH).expand(2, -1)
    if kind == "packed":
        places = torch.tensor([[*range(4), *range(6)], [*range(7), *range(3)]])
        document = (places == 0).cumsum(-1)
        return {"position_ids": places}, lower & (document[:, :, None] == document[:, None, :]), places
    padding = torch.ones(2, LENGTH, dtype=torch.int64)
    padding[1, :3 if kind == "left" else None] = 0 if kind == "left" else 1
    padding[1, -3:] = 0 if kind == "right" else 1
    shown = lower & padding[:, None, :].bool()
    return {"attention_mask": padding}, shown, places


@pytest.mark.parametrize("kind", ["left", "right", "packed"])
def test_masks_of_the_model_hold(kind: str) -> None:
    """Rows that are shown nothing but themselves, as the first of each document, read zeros."""
    model = Trained("llama", layers=4)
    more, shown, places = masks(kind)
    given = example(**more)
    fast = condensed(model, given, preset=CONDENSED, iterations=4)
    loss, logits = fast(**given)
    expected = in_iterations(model.decoder, given["ids"], {1: 2}, 4, 2, shown, places)
    seen = shown.diagonal(dim1=1, dim2=2)
    assert (logits - expected)[seen].abs().max() <= 1e-12
    found = gradients(fast, loss)
    assert all(bool(g.isfinite().all()) for g in found.values() if g is not None)
    if kind == "packed":
        same_step(model, fast, given, {1: 2}, 4, 2, shown=shown, places=places)


@pytest.mark.parametrize("listed", ["", "default"])
def test_lengths_may_be_symbols(listed: str) -> None:
    model, given = Trained("llama", layers=3), example()
    fast = condensed(model, given, listed=listed, plan={1: 2}, iterations=3, asked={"dynamic_shapes": True})
    for length in (LENGTH, 14):
        same_step(model, fast, example(length), {1: 2}, 3, 2)
    assert len(fast._driver.session.captured) == 1


@pytest.mark.parametrize(
    ("last", "strictly", "turned", "hides"),
    [(0, False, False, True), (1, False, False, False), (1, True, False, True), (-2, False, True, True),
     (2, True, True, False)],
)  # fmt: skip
def test_masks_whose_size_is_a_symbol_are_proven(
    last: int, strictly: bool, turned: bool, hides: bool
) -> None:
    """Key j is shown to query i where j <= i + last, or j < i + last, and where the input says so."""

    def masked(given: torch.Tensor) -> torch.Tensor:
        places = torch.arange(given.shape[1])
        keys, queries = places[None, :], places[:, None] + last
        if turned:
            shown = queries > keys if strictly else queries >= keys
        else:
            shown = keys < queries if strictly else keys <= queries
        return shown & given[:, None, :]

    given = torch.ones(3, 7, dtype=torch.bool)
    torch._dynamo.mark_dynamic(given, 1)
    (captured,) = capture(masked, given)
    graph = captured.gm.graph
    (found,) = next(node for node in graph.nodes if node.op == "output").args[0]
    assert not isinstance(found.meta["val"].shape[-1], int)
    assert hides_later(found, alias_map(graph)) is hides


def test_it_is_planned_within_a_budget() -> None:
    model, given = Trained("llama", layers=3), example(32)
    options: dict[str, Any] = {"plan": {1: 2}, "iterations": 3, "backward_iterations": 2}
    pipeline = ["default", graphopt.use("share-kv", **options)]
    whole = graphopt.plan(model, given, pipeline=pipeline, emit="eager")
    static = sum(p.numel() * p.element_size() for p in model.parameters())
    budget = int(static * 2 + 0.6 * (whole.predicted.peak_bytes - 2 * static))
    fast = condensed(model, given, asked={"budget": budget}, **options)
    assert fast.plan.predicted.peak_bytes <= budget < whole.predicted.peak_bytes
    same_step(model, fast, given, {1: 2}, 3, 2)


def test_iterations_without_gradients_keep_nothing_for_the_backward() -> None:
    model, given = Small().train(), (tokens(4, 64),)
    peaks = []
    for count, passing in ((3, 2), (6, 2), (6, 5)):
        step = graphopt.use("share-kv", plan={0: 2, 1: 2}, iterations=count, backward_iterations=passing)
        peaks.append(graphopt.plan(model, given, pipeline=[step], emit="eager").predicted.peak_bytes)
    assert peaks[1] <= 1.02 * peaks[0] < 1.2 * peaks[0] < peaks[2]


def test_presets_leave_attentions_of_their_own_at_both_ends() -> None:
    def fits(consumer: int, source: int) -> str:
        return ""

    assert condensed_plan(6, fits, 2) == {1: 4, 2: 4, 3: 4}
    assert condensed_plan(4, fits, 1) == {1: 3, 2: 3}
    assert condensed_plan(4, fits, 0) == {0: 3, 1: 3, 2: 3}
    alternating = condensed_plan(8, lambda a, b: "" if (a - b) % 2 == 0 else "another mask", 2)
    assert alternating == {1: 5, 2: 6, 3: 5, 4: 6}


class Small(nn.Module):
    """A decoder that can be told what its attentions are like, layer by layer."""

    def __init__(self, mask: str = "causal", heads: tuple[int, ...] = (2, 2, 2, 2), turns: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mask, self.heads, self.turns = mask, heads, turns
        self.embed, self.head = nn.Embedding(128, 32), nn.Linear(32, 128)
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 16 * kept), nn.Linear(32, 16 * kept)])
            for kept in heads
        )
        self.register_buffer("bands", torch.rand(8))

    def turned(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Rotary embedding, of another base where ``index`` is that of the layer which turns otherwise."""
        places = torch.arange(x.shape[2]) * (0.5 if index == self.turns else 1.0)
        angles = places[:, None] * self.bands
        return torch.cat([x[..., :8] * angles.cos() - x[..., 8:] * angles.sin(), x[..., 8:]], -1)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        length = q.shape[2]
        match self.mask:
            case "none":
                return F.scaled_dot_product_attention(q, k, v)
            case "prefix":
                shown = torch.ones(length, length, dtype=torch.bool).tril()
                shown[:, :3] = True
                return F.scaled_dot_product_attention(q, k, v, shown)
            case "written":
                hidden = torch.full((length, length), float("-inf")).triu(1)
                return ((q @ k.mT) * 0.25 + hidden).softmax(-1) @ v
            case "dropped":
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.5)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for index, layer in enumerate(self.layers):
            q, k, v = (part(x).unflatten(-1, (-1, 16)).transpose(1, 2) for part in layer)
            if self.turns:
                q, k = self.turned(q, index), self.turned(k, index)
            k, v = (part.repeat_interleave(2 // self.heads[index], 1) for part in (k, v))
            if self.mask == "writes":
                k, made = torch.empty_like(k), k
                k[..., :8], k[..., 8:] = made[..., :8], made[..., 8:]
            y = self.attend(q, k, v).transpose(1, 2).flatten(2)
            if self.mask == "break" and index == 1:
                torch._dynamo.graph_break()
            x = x + y
            if self.mask == "counts":
                self.bands.add_(y.detach().mean())
                x = x * self.bands.sum()
            with torch.set_grad_enabled(self.mask != "switch" or index != 2):
                x = x + x.relu()
        logits: torch.Tensor = self.head(x)
        return logits


@pytest.mark.parametrize(
    ("made", "options", "reason"),
    [
        ({}, {"plan": {7: 8}}, "attention 7 is to have a part in sharing: the model attends 4 times"),
        ({"mask": "none"}, {"plan": {1: 3}},
         "attention 1 cannot read the keys and values of attention 3, which come later: rows are to read "
         "earlier ones alone, and it has no mask"),
        ({"mask": "prefix"}, {"plan": {1: 3}}, "its mask is (constant but not|not known)"),
        ({"heads": (2, 1, 2, 2)}, {"plan": {1: 3}}, "it has 1 heads of keys, attention 3 has 2"),
        ({"heads": (2, 1, 2, 2)}, {"plan": {1: 3}}, "leave it out"),
        ({"turns": 2}, {"plan": {1: 2}},
         "its rotary embedding has other parameters than that of attention 2\\n.*can read: {1: 3}"),
        ({"mask": "switch"}, {"plan": {1: 3}}, "is to be computed several times: .*gradient mode"),
        ({"mask": "break"}, {"plan": {0: 1}}, "another model of a whole program.*not one graph"),
        ({}, {"preset": CONDENSED, "warmup": 3}, "warmup=3 lets none of 4 attentions share.*\n.*warmup=2"),
    ],
    ids=["index", "no-mask", "prefix", "heads", "heads-hint", "rotary", "switch", "break", "warmup"],
)  # fmt: skip
def test_programs_that_a_plan_does_not_fit_are_refused(made: Any, options: Any, reason: str) -> None:
    with pytest.raises(GraphoptError, match=reason):
        condensed(Small(**made).train(), (tokens(),), **options)


@pytest.mark.parametrize("listed", ["", "default"])
def test_written_out_attention_has_to_be_one_call(listed: str) -> None:
    model, given = Small("written").train(), (tokens(),)
    # fuse-attention takes a mask of minus infinity whose numbers it knows, so its size is to be known.
    asked = {"dynamic_shapes": False}
    if not listed:
        with pytest.raises(InputsError, match=r"attention 0 cannot .* it is written out, and no"):
            condensed(model, given, listed=listed, plan={0: 2}, iterations=3, asked=asked)
        return
    found, expected = (
        condensed(one, given, listed=listed, plan={0: 2, 1: 2}, iterations=3, asked=asked)(*given)
        for one in (model, Small("causal").train())
    )
    assert (found - expected).abs().max() <= 1e-5


def test_what_is_written_is_written_anew_in_each_iteration() -> None:
    given = (tokens(),)
    found, expected = (
        condensed(Small(kind).double().train(), given, plan={0: 2, 1: 2}, iterations=3)(*given)
        for kind in ("writes", "causal")
    )
    assert (found - expected).abs().max() <= 1e-12
    with pytest.raises(InputsError, match=r"add_.* writes into arg\d+_1, which is made once"):
        condensed(Small("counts").train(), given, plan={0: 2}, iterations=3)


def test_attention_may_drop_weights() -> None:
    model, given = Small("dropped").double().train(), (tokens(),)
    fast = condensed(model, given, plan={0: 2, 1: 2}, iterations=3)
    torch.manual_seed(1)
    first = fast(*given)
    assert not torch.equal(first, fast(*given))
    torch.manual_seed(1)
    assert torch.equal(first, fast(*given))
    fast(*given).sum().backward()


def test_outside_training_it_is_refused() -> None:
    model, given = Trained("llama", layers=4), example()
    outside = "layers.1.*attention 1 cannot read .* attention 2, which come later: that works in training"
    with pytest.raises(InputsError, match=outside):
        condensed(copy.deepcopy(model).eval(), given, preset=CONDENSED, listed="")
    fast = condensed(model, given, plan={1: 2}, iterations=2, listed="causal-attention")
    with torch.no_grad(), pytest.raises(InputsError, match=outside):
        fast(**given)
    fast(**given)[0].backward()


@pytest.mark.parametrize("options", [{"preset": CONDENSED}, {"plan": {1: 2}}], ids=["preset", "plan"])
def test_programs_that_generate_are_refused(options: Any) -> None:
    pytest.importorskip("transformers")
    model = family("llama", num_hidden_layers=4)
    step = graphopt.use("share-kv", **options)
    with pytest.raises(InputsError, match=r"layers.1.*: attention 1 cannot .* works in training alone"):
        graphopt.optimize(
            model, {"input_ids": tokens()}, generate=graphopt.Generate(48), pipeline=[step], emit="eager"
        )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"plan": {1: 2, 2: 1}}, "attention 1 would read keys and values that none makes: 1 -> 2 -> 1"),
        ({"plan": {1: 1}}, "attention 1 would read keys and values that none makes: 1 -> 1"),
        ({"plan": {1: 2, 2: 3}}, "attention 2, which makes none.*\\n.*name what makes them: {1: 3}"),
        ({"plan": {1: 0}, "iterations": 3}, "iterations=3 is an option of plans with a source that comes"),
        ({"preset": "cla", "warmup": 2}, "warmup=2 is an option of preset 'layer-condensed'"),
        ({"plan": {1: 2}, "warmup": 2}, "warmup=2 is an option of preset 'layer-condensed'"),
        ({"preset": CONDENSED, "warmup": -1}, "warmup=-1: expected 0 or more"),
        ({"preset": CONDENSED, "iterations": 1}, "iterations=1: expected 2 or more"),
        ({"preset": CONDENSED, "backward_iterations": 0}, "backward_iterations=0: expected 1 or more"),
        ({"preset": CONDENSED, "iterations": 3, "backward_iterations": 4},
         "backward_iterations=4 of iterations=3 .*\\n.*valid choice is backward_iterations=3"),
        ({"preset": CONDENSED, "group": 2}, "group is none of the options of layer-condensed plans"),
        ({"preset": CONDENSED, "recover": "local", "calibration": [tokens(8, 32)]}, "recover is none of the"),
        ({"preset": "layer-condense"}, "did you mean 'layer-condensed'"),
    ],
    ids=["round", "itself", "chain", "earlier", "cla", "plan", "less", "one", "none", "more", "group",
         "recover", "name"],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(options: Any, reason: str) -> None:
    with pytest.raises(GraphoptError, match=reason):
        condensed(Small().train(), (tokens(),), **options)


def test_keys_that_the_model_returns_are_named() -> None:
    model = Trained("llama", layers=4)

    class Returning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> Any:
            found = self.model.model(ids, use_cache=True)
            return found.logits.sum(), [layer.keys for layer in found.past_key_values.layers]

    with pytest.raises(InputsError, match=r"keys of attention 1 are read by .* as well.*\n.*use_cache=False"):
        condensed(Returning().train(), (tokens(),), plan={1: 2})


def test_what_another_model_rules_out_is_refused() -> None:
    model, given = Small().train(), (tokens(),)
    with pytest.raises(InputsError, match="compares with the model as it is, and pass 'share-kv'"):
        condensed(model, given, plan={0: 2}, asked={"verify": "numeric"})
    with pytest.raises(GraphoptError, match="programs may be parts of one here: a step= was given"):
        condensed(
            model, None, plan={0: 2}, asked={"step": lambda fast: fast(*given).sum().backward()}
        )
    compiled = torch.compile(
        model, backend="graphopt", options={"pipeline": [graphopt.use("share-kv", plan={0: 2})]}
    )
    with pytest.raises(Exception, match=r"hands over parts of a model .*: use graphopt.optimize"):
        compiled(*given)


def test_it_is_not_measured_against_the_model_as_it_was() -> None:
    """That is faster, and another one."""
    model, given = Small().train(), (tokens(),)
    fast = condensed(model, given, plan={0: 2}, iterations=9, asked={"guard": "measure"})
    first = fast(*given)
    assert not torch.equal(first, model(*given)) and torch.equal(first, fast(*given))
    assert any("not measured against" in note and "share-kv" in note for note in fast.report.diagnostics)


def test_what_fails_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rolled back, the model as it was would be trained, which nobody asked for."""
    from graphopt_passes.share_kv import condense

    def failing(*given: Any) -> None:
        raise RuntimeError("no iterations today")

    monkeypatch.setattr(condense._Unrolled, "make", failing)
    with pytest.raises(PassError, match="no iterations today"):
        condensed(Small().train(), (tokens(),), plan={0: 2})


def test_plans_have_one_spelling() -> None:
    step = graphopt.use("share-kv", preset=CONDENSED, warmup=4, iterations=5)
    text = "share-kv{preset=layer-condensed,warmup=4,iterations=5}"
    assert pass_text(step) == text
    assert Pipeline.parse(text, default_host()).passes == (step,)
