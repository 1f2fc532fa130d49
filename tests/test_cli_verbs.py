"""Verbs that take a TARGET: what they ask of the API and what they print of its answers.

The API is replaced by one that remembers its arguments and answers with real records, so that
these tests take no time; what the answers are worth is tested with the API itself.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from graphopt import BudgetError, Plan, Report
from graphopt.cli.main import main
from graphopt.cost import Cost
from graphopt.measure import Measurement
from graphopt.pareto_front import ParetoPoint
from graphopt.program import Program
from graphopt.report import Environment

PLAN = Plan(
    budget_bytes=6000,
    device="cpu",
    emit="eager",
    baseline=Cost(10_240, 4096, 0.002, 1_000_000),
    predicted=Cost(6000, 4096, 0.003, 1_500_000),
    lower_bound=0.0025,
    seconds_to_plan=0.1,
)
REPORT = Report(Environment("2.13.0", "3.11", "0.1.0", "cpu"), PLAN.baseline, PLAN.predicted, 6000, plan=PLAN)


@dataclass
class Optimized:
    report: Report = REPORT
    plan: Plan = PLAN

    def dump(self, format: str, stage: str, *, beside: Sequence[Program] = ()) -> str:
        assert not beside, "for formats that show several programs alone"
        return f"the {stage} graphs as {format}\n"

    def measure(self, inputs: Any) -> Measurement:
        self.report = self.report.with_measured(Cost(5999, 4096, 0.004))
        return Measurement(5999, 0.004)


@dataclass
class Frontier:
    points: tuple[ParetoPoint, ...] = (ParetoPoint(6000, 0.003, 9, "3 again"), ParetoPoint(10_240, 0.002, 0))

    def to_json(self) -> dict[str, Any]:
        return {"points": [point.peak_bytes for point in self.points]}

    def picture(self, path: Path) -> None:
        path.write_text("<svg/>")


@dataclass
class Api:
    """Stands where ``graphopt.api`` stands; ``asked`` is what it was last called with."""

    asked: dict[str, Any] = field(default_factory=dict)

    def optimize(self, model: Any, inputs: Any, **options: Any) -> Optimized:
        self.asked = {"inputs": inputs, **options}
        if options["budget"] == "1B":
            raise BudgetError("nothing fits 1 B", least_bytes=5000, budget_bytes=1, hint="5000 B would")
        return Optimized()

    def plan(self, model: Any, inputs: Any, **options: Any) -> Plan:
        self.asked = {"inputs": inputs, **options}
        return PLAN

    def pareto(self, model: Any, inputs: Any, **options: Any) -> Frontier:
        self.asked = {"inputs": inputs, **options}
        return Frontier()


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Api:
    """The recording API, and ``tiny_model:make`` in the working directory."""
    (tmp_path / "tiny_model.py").write_text(
        "import torch\ndef make(): return torch.nn.Linear(2, 2), (3,)\n"
        "def loss(output): return output.sum()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "tiny_model", raising=False)
    recording, module = Api(), types.ModuleType("graphopt.api")
    vars(module).update(optimize=recording.optimize, plan=recording.plan, pareto=recording.pareto)
    monkeypatch.setitem(sys.modules, "graphopt.api", module)
    return recording


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process: exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


def test_dump_passes_its_flags_on(api: Api, invoke: Any, tmp_path: Path) -> None:
    flags = ["--budget", "60%", "-p", "default", "--allow", "a", "--allow", "b", "--emit", "eager"]
    flags += ["--device", "h200", "--policy", "lean"]
    code, out, err = invoke("dump", "tiny_model:make", *flags, "--stage", "joint", "-f", "dot")
    assert (code, out, err) == (0, "the joint graphs as dot\n", "")
    assert api.asked == {
        "inputs": (3,),
        "budget": "60%",
        "pipeline": "default",
        "allow": ("a", "b"),
        "emit": "eager",
        "device": "h200",
        "loss_fn": None,
        "rewrites": None,
        "policy": "lean",
    }
    code, out, err = invoke("dump", "tiny_model:make", "-o", "graph.txt")
    assert (code, out, err) == (0, "", "wrote graph.txt\n")
    assert (tmp_path / "graph.txt").read_text() == "the final graphs as text\n"
    assert json.loads(invoke("dump", "tiny_model:make", "--json")[1]) == {
        "target": "tiny_model:make",
        "stage": "final",
        "format": "text",
        "text": "the final graphs as text\n",
    }


def test_run_reports_what_was_measured_and_keeps_the_plan(api: Api, invoke: Any) -> None:
    code, out, err = invoke(
        "run", "tiny_model:make", "--budget", "6000B", "--save-plan", "plan.json", "--json"
    )
    assert (code, err) == (0, "wrote plan.json\n")
    report = Report.from_json(json.loads(out))
    assert report.measured == Cost(5999, 4096, 0.004)
    assert api.asked["verify"] == "structure" and api.asked["policy"] is None
    code, out, _ = invoke("run", "tiny_model:make", "--plan", "plan.json", "--loss", "tiny_model:loss")
    assert code == 0
    assert out == str(report) + "\n"
    assert api.asked["plan"] == PLAN
    assert api.asked["loss_fn"].__name__ == "loss"


def test_a_budget_that_nothing_fits_exits_with_1(api: Api, invoke: Any) -> None:
    assert invoke("run", "tiny_model:make", "--budget", "1B") == (
        1,
        "",
        "graphopt: error[budget]: nothing fits 1 B\n  hint: 5000 B would\n",
    )


def test_cost_is_of_the_step_as_it_is(api: Api, invoke: Any) -> None:
    code, out, _ = invoke("cost", "tiny_model:make", "--device", "cpu")
    assert code == 0
    assert api.asked == {"inputs": (3,), "pipeline": (), "device": "cpu", "emit": "auto", "loss_fn": None}
    assert "peak      10.00 KiB  10240 B\n" in out
    assert json.loads(invoke("cost", "tiny_model:make", "--json")[1]) == {
        "target": "tiny_model:make",
        "device": "cpu",
        "emit": "eager",
        "peak_bytes": 10240,
        "weight_bytes": 4096,
        "seconds": 0.002,
        "flops": 1_000_000,
        "cache_bytes": 0,
    }


def test_pareto_is_a_table_data_and_a_picture(api: Api, invoke: Any, tmp_path: Path) -> None:
    code, out, err = invoke("pareto", "tiny_model:make", "-o", "frontier.svg")
    assert (code, err) == (0, "wrote frontier.svg\n")
    assert (tmp_path / "frontier.svg").read_text() == "<svg/>"
    assert out.splitlines() == [
        "     peak     time  plan",
        " 5.86 KiB  3.00 ms  3 again",
        "10.00 KiB  2.00 ms",
    ]
    assert json.loads(invoke("pareto", "tiny_model:make", "--json")[1]) == {"points": [6000, 10240]}
