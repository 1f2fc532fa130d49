"""Layers, producers of keys and values, masks: read off the graph, whatever modules are called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import graphopt
from graphopt import InputsError
from graphopt.cli.main import cli
from graphopt.decoding.capture import capture_uncached
from graphopt.decoding.options import Generate
from graphopt.decoding.regions import attention_regions
from graphopt.decoding.structure import StackRecord
from tests.decoders import HEADS, WIDTH, family, plain, tokens


def stack(model: nn.Module, max_tokens: int = 64) -> StackRecord:
    return graphopt.explain_layers(model, (tokens(),), max_tokens=max_tokens)


def test_columns_of_fused_projections_are_told_apart() -> None:
    found = stack(plain("fused", layers=3))
    assert [(r.count, r.attentions) for r in found.repeats] == [(3, (0, 1, 2))]
    for index, one in enumerate(found.attentions):
        assert one.layer == f"blocks.{index}" and one.fused and one.source == index and not one.latent
        assert one.query.weights == one.key.weights == (f"blocks.{index}.qkv.weight",)
        assert (one.query.columns, one.key.columns, one.value.columns) == ("0:64", "64:128", "128:192")
        assert not one.key.rotary and not one.key.normed


def test_attention_that_is_written_out_has_the_same_record() -> None:
    fused, written = (stack(plain(kind)).attentions[0] for kind in ("fused", "buffer"))
    assert fused.fused and not written.fused
    assert (fused.query, fused.key, fused.value, fused.mask) == (
        written.query, written.key, written.value, written.mask,
    )  # fmt: skip


def test_caps_and_sinks_are_told() -> None:
    assert stack(plain("softcap")).attentions[0].softcap == pytest.approx(20.0)
    assert stack(plain("sinks")).attentions[0].sinks
    assert "alibi of 4 heads" in stack(plain("linear-bias")).attentions[0].mask


class Routed(nn.Module):
    """Softmaxes that are no attention: a router's, and one over words."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.router = plain("fused"), nn.Linear(128, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.inner(ids)
        weights = self.router(logits).softmax(-1)
        scaled: torch.Tensor = logits.softmax(-1) * weights[..., :1]
        return scaled


def test_softmaxes_of_other_things_are_no_attention() -> None:
    uncached = capture_uncached(Routed().eval(), (tokens(),), Generate(64))
    regions = attention_regions(uncached)
    assert [region.fused for region in regions] == [True, True]
    assert [region.heads for region in regions] == [HEADS, HEADS]
    assert all(region.scale == (WIDTH // HEADS) ** -0.5 for region in regions)


@pytest.mark.parametrize(
    ("name", "rotary", "normed", "latent", "mask"),
    [
        ("llama", True, False, False, "causal, padding"),
        ("qwen3", True, True, False, "causal, padding"),
        ("deepseek_v3", True, True, True, "causal, padding"),
        ("bloom", False, False, False, "causal, padding, alibi of 4 heads"),
    ],
)
def test_what_makes_keys_is_found(name: str, rotary: bool, normed: bool, latent: bool, mask: str) -> None:
    pytest.importorskip("transformers")
    one = stack(family(name)).attentions[-1]
    assert (one.key.rotary, one.key.normed, one.latent, one.mask) == (rotary, normed, latent, mask)
    assert not one.value.rotary
    assert all("weight" in weight for weight in one.key.weights)
    assert len(one.key.weights) == (2 if latent else 1)


def test_windows_and_shared_keys_are_found() -> None:
    pytest.importorskip("transformers")
    found = stack(family("gemma3n_text"), 200)
    assert [one.source for one in found.attentions] == [0, 1, 2, 1]
    assert [one.mask.split(",")[0] for one in found.attentions] == ["window 32", "causal"] * 2
    assert "reads the store of 1" in found.text()


SHOP = """
import torch
from tests.decoders import plain, tokens

def decoder():
    return plain("fused"), (tokens(),)
"""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "decoder_shop.py").write_text(SHOP, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "decoder_shop:decoder"


def test_the_verb_shows_layers(shop: str) -> None:
    result = CliRunner().invoke(cli, ["explain", shop, "--layers"])
    assert result.exit_code == 0, result.output
    assert "2 layers of " in result.output and "attentions 0:2" in result.output
    assert "key blocks.1.qkv.weight[64:128]" in result.output
    told = CliRunner().invoke(cli, ["explain", shop, "--layers", "--json", "--max-tokens", "32"])
    assert json.loads(told.stdout)["attentions"][1]["layer"] == "blocks.1"


def test_the_verb_explains_one_thing_at_a_time(shop: str) -> None:
    result = CliRunner().invoke(cli, ["explain", shop, "--layers", "--memory"])
    assert result.exit_code == 2
    assert "--memory and --layers explain different things: give one of them" in result.output


def test_models_over_other_things_than_tokens_are_refused() -> None:
    with pytest.raises(InputsError, match="generation needs example tokens"):
        graphopt.explain_layers(nn.Linear(2, 2), (torch.zeros(2, 2),))
