"""Random whole models through every pass, under random budgets, against eager: ``tests/fuzzing.py``.

A failure has the model as text.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt.plugins import default_host
from tests.drawn_models import drawn_model
from tests.fuzzing import (
    ANOTHER_RESULT,
    WIDE,
    check_seed,
    check_untraced,
    compare,
    forced_passes,
    run_once,
)

QUICK = (*range(100), 162, 1142, 1997)


@pytest.mark.parametrize("seed", QUICK)
def test_random_models_compute_what_eager_does(seed: int) -> None:
    check_seed(seed)


@pytest.mark.parametrize("seed", [1203, 1498])
def test_models_that_aotautograd_fails_on_run_as_they_did(seed: int) -> None:
    """They write statistics and counters before the error comes."""
    assert check_untraced(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 2000, 50))
def test_many_random_models_compute_what_eager_does(first: int) -> None:
    for seed in range(first, first + 50):
        check_seed(seed)


def test_every_pass_that_keeps_results_is_forced() -> None:
    assert {p.name for p in forced_passes(True)} == default_host().passes().keys() - set(ANOTHER_RESULT)
    everywhere = [p for p in forced_passes(True) if hasattr(p, "everywhere")]
    assert len(everywhere) > 5 and all(p.everywhere for p in everywhere)


def test_models_are_drawn_the_same_each_time_and_are_worth_something() -> None:
    drawn = [drawn_model(seed) for seed in range(30)]
    assert [d.source for d in drawn] == [drawn_model(seed).source for seed in range(30)]
    text = "".join(d.source.partition("def forward")[2] for d in drawn)
    for what in ("self.seen.mul_", "n.mul_", "self.count +=", ".add_(", "scaled_dot", "softmax", "[..., "):
        assert what in text, what
    assert "bfloat16" in text and "double()" in text and "'out1'" in text


def test_a_wrong_result_is_told() -> None:
    net, x = torch.nn.Linear(3, 2).double(), torch.randn(4, 3, dtype=torch.float64)
    right = run_once(net, net, (x,), train=True)
    with torch.no_grad():
        net.weight[0, 0] += 1e-6
    with pytest.raises(AssertionError, match=r"output 0 is off by .*, eager by 0"):
        compare(run_once(net, net, (x,), train=True), right, right, WIDE)
    compare(right, right, right, 0.0)


@pytest.mark.slow
def test_the_figure_goes_on_from_the_last_graph_and_fewer_than_asked_for_do_not_meet_it(
    tmp_path: Path,
) -> None:
    root = Path(__file__).parent.parent
    out = tmp_path / "random_graphs.json"

    def run(*options: str) -> dict[str, Any]:
        script = [sys.executable, str(root / "benchmarks" / "random_graphs.py"), "--out", str(out), *options]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
        subprocess.run(script, env=environment, check=True, capture_output=True, text=True)
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    first = run("--first", "3", "--graphs", "2", "--block", "2")
    assert [(r["first"], r["last"], r["graphs"], r["failed"]) for r in first["rows"]] == [(3, 4, 2, {})]
    assert not first["summary"]["met"]
    more = run("--first", "3", "--graphs", "3", "--block", "3")
    assert more["rows"][0] == first["rows"][0]
    assert [(r["first"], r["last"], r["graphs"]) for r in more["rows"][1:]] == [(5, 5, 1)]
