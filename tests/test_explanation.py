"""What holds the peak: the values alive there add up to it, and each is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt
from graphopt.candidate import CostDelta
from graphopt.cli.main import main
from graphopt.report_table import rewrite_lines
from graphopt.rewrites import Rewrite

X = (torch.randn(512, 64),)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(64, 64), nn.GELU())])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).square().mean()


def target() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return Net(), X


@pytest.fixture(scope="module")
def found() -> graphopt.MemoryExplanation:
    return graphopt.explain_memory(Net(), X, budget="60%", emit="eager")


def test_values_at_the_peak_add_up_to_it(found: graphopt.MemoryExplanation) -> None:
    for profile in (found.before, found.after):
        # What the operator takes for itself is no value.
        itself = profile.peak_bytes - found.static_bytes - sum(t.bytes for t in profile.live_at_peak)
        assert 0 <= itself < 1024
    assert found.after.peak_bytes == found.predicted_bytes <= (found.budget_bytes or 0)
    assert found.after.peak_bytes < found.before.peak_bytes


def test_the_text_says_where_the_peak_is_and_what_is_there(found: graphopt.MemoryExplanation) -> None:
    first, second = found.text(3).split("\n\n")
    at = found.before.peak
    assert at is not None
    assert f"in the backward of g0, while {at.node} runs" in first.splitlines()[0]
    assert second.startswith("as planned: peak ")
    largest = found.before.live_at_peak[0]
    assert f"128.00 KiB  {largest.role}" in first and f"{largest.node} ({largest.layer})" in first
    assert f"{len(found.before.live_at_peak) - 3} smaller values" in first
    assert "by layer: body." in first
    assert str(found) == found.text()


def test_json_holds_every_value(found: graphopt.MemoryExplanation) -> None:
    data = json.loads(json.dumps(found.to_json()))
    assert len(data["before"]["live"]) == len(found.before.live_at_peak)
    assert data["before"]["at"]["node"] in found.text()
    assert any(tensor["layer"].startswith("body.") for tensor in data["before"]["live"])
    assert sum(data["after"]["by_layer"].values()) <= sum(t["bytes"] for t in data["after"]["live"])


def test_the_picture_is_svg(found: graphopt.MemoryExplanation, tmp_path: Path) -> None:
    text = found.picture(tmp_path / "memory.svg").read_text()
    assert text.startswith("<svg") and "as planned" in text
    with pytest.raises(graphopt.InputsError, match=r"cannot draw memory\.png: the picture is SVG"):
        found.picture(tmp_path / "memory.png")


def test_code_that_is_fused_holds_something_else_and_that_is_said() -> None:
    torch._dynamo.reset()
    fused = graphopt.explain_memory(Net(), X, emit="inductor")
    assert fused.after.peak_bytes != fused.predicted_bytes
    assert "Operators one by one; the plan, whose code fuses them" in fused.text()


def test_the_verb_says_what_was_done_what_was_not_and_what_holds_the_peak(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def explained(*flags: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["explain", "tests.test_explanation:target", "--budget", "60%", "--emit", "eager", *flags])
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    code, out, _ = explained()
    assert code == 0
    titles = ("planned in ", "what each rewrite buys", "what was not done, and why", "as it is: peak ")
    places = [out.index(title) for title in titles]
    assert places == sorted(places) and "  insert-checkpoints/schedules: " in out
    assert explained("--memory")[1].startswith("as it is: peak ")
    assert {"report", "target"} <= json.loads(explained("--json")[1]).keys()
    code, _, err = explained("--memory", "--layers")
    assert code == 2 and "--memory and --layers explain different things: give one of them" in err


def test_each_rewrite_says_what_it_buys() -> None:
    fast = graphopt.optimize(Net(), X, emit="eager")
    rewrites = (
        Rewrite("g0/a/x", "up.0", CostDelta(seconds=-1e-3, peak_bytes=2048)),
        Rewrite("g0/b/y", "", CostDelta(seconds=-2e-3, error=0.4), applied=False),
        Rewrite("g0/c/z"),
    )
    assert rewrite_lines(replace(fast.report, rewrites=rewrites)) == [
        "g0/b/y: saves 2.00 ms, error 0.4; rolled back",
        "g0/a/x (up.0): saves 1.00 ms, adds 2.00 KiB at the peak",
        "g0/c/z: weighed with the plan",
    ]
