"""The demo: what it prints, what it writes, and that it would notice a difference."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import graphopt

pytest.importorskip("transformers")

from examples import demo


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo on a model that takes seconds: two narrow layers, short rows."""

    def make_model() -> torch.nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(demo.SEED)
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 96,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        }
        config = LlamaConfig(vocab_size=256, num_hidden_layers=2, use_cache=False, **sizes)
        return LlamaForCausalLM(config)

    monkeypatch.setattr(demo, "make_model", make_model)
    monkeypatch.setattr(demo, "LENGTH", 64)


@pytest.mark.usefixtures("small")
def test_the_demo_prints_and_writes_what_it_promises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert demo.main(["--out", str(tmp_path / "out"), "--steps", "3", "--budget", "70%"]) == 0
    printed = capsys.readouterr().out
    for line in (
        "baseline",
        "predicted",
        "measured",
        "recomputed: ",
        "against graphopt, no budget: all losses (3)",
    ):
        assert line in printed
    assert "is within the budget" in printed
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "report.txt",
        "joint.txt",
        "final.txt",
        "memory.svg",
        "pareto.svg",
        "plan.json",
        "losses.csv",
    }
    assert "<recompute insert-checkpoints>" in (out / "joint.txt").read_text()
    assert (out / "final.txt").read_text().startswith("program g0.forward @ lowered")
    picture = ElementTree.parse(out / "memory.svg").getroot()
    text = " ".join(picture.itertext())
    assert "baseline" in text and "optimized" in text and "budget" in text
    ElementTree.parse(out / "pareto.svg")
    assert graphopt.Plan.load(out / "plan.json").budget is not None
    with open(out / "losses.csv", newline="") as stream:
        head, *rows = csv.reader(stream)
    assert head == ["step", "plain PyTorch", "graphopt, no budget", "graphopt, budget"]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert all(float(without) == float(within) for _, _, without, within in rows)


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        ("1kB", "demo: error[budget]: no plan fits 1000 B"),
        ("8 gigs", "demo: error[budget-syntax]: cannot read"),
    ],
)
@pytest.mark.usefixtures("small")
def test_a_budget_that_cannot_be_had_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], budget: str, text: str
) -> None:
    assert demo.main(["--out", str(tmp_path), "--steps", "1", "--budget", budget]) == 1
    assert text in capsys.readouterr().err


def test_runs_that_differ_are_said_to_differ() -> None:
    took = graphopt.Measurement(100, 1.0)
    weights = {"w": torch.zeros(2)}
    one = demo.Run("one", took, (1.0, 2.0), weights)
    assert demo.same_bits(one, demo.Run("other", took, (1.0, 2.0), weights))
    other = demo.Run("other", took, (1.0, 2.5), {"w": torch.tensor([0.0, 0.125])})
    assert not demo.same_bits(one, other)
    assert demo.comparison(one, other) == "against other: losses differ by at most 0.5, last weights by 0.125"
    assert not demo.same_bits(one, demo.Run("other", took, (1.0, 2.0), {"w": torch.ones(2)}))


@pytest.mark.slow
def test_the_demo_itself(tmp_path: Path) -> None:
    assert demo.main(["--out", str(tmp_path), "--steps", "2"]) == 0
    report = (tmp_path / "report.txt").read_text()
    assert "recomputed: nothing" not in report
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["predicted"]["peak_bytes"] <= plan["budget_bytes"] < 0.52 * plan["baseline"]["peak_bytes"]
