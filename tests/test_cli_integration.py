"""Verbs on real models, end to end: examples.targets, saved programs, files that they write."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import graphopt
from graphopt.cli.main import main

Invoke = Callable[..., tuple[int, str, str]]

TINY = """
import torch

class Noisy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(6))

    def forward(self, x):
        for layer in self.layers:
            x = torch.nn.functional.dropout(torch.nn.functional.silu(layer(x)), 0.1, self.training)
        return x

def chain():
    torch.manual_seed(0)
    return Noisy(), (torch.randn(512, 16),)

def classes():
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module("class", torch.nn.Linear(4, 4))
    model.add_module("1", torch.nn.Linear(4, 4))
    return model, (torch.randn(2, 4),)

def mean(output):
    return output.mean()
"""


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Runs the command in this process, in a folder with ``tiny_targets``: exit code, stdout, stderr."""
    (tmp_path / "tiny_targets.py").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "tiny_targets", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


def test_run_keeps_the_budget_and_its_plan_is_replayed(invoke: Invoke) -> None:
    asked = ("run", "tiny_targets:chain", "--budget", "60%", "--loss", "tiny_targets:mean", "--json")
    code, out, err = invoke(*asked, "--verify", "numeric", "--save-plan", "plan.json")
    assert (code, err) == (0, "wrote plan.json\n")
    report = graphopt.Report.from_json(json.loads(out))
    assert report.measured is not None and report.budget is not None
    assert report.measured.peak_bytes <= report.budget == int(0.6 * report.baseline.peak_bytes)
    assert report.measured.peak_bytes < report.baseline.peak_bytes
    assert report.plan == graphopt.Plan.load("plan.json")
    code, out, _ = invoke(
        "run", "tiny_targets:chain", "--plan", "plan.json", "--loss", "tiny_targets:mean", "--json"
    )
    assert code == 0
    replayed = graphopt.Report.from_json(json.loads(out))
    assert replayed.plan is not None and report.plan is not None
    assert [c.schedule for c in replayed.plan.choices] == [c.schedule for c in report.plan.choices]
    assert replayed.measured is not None
    assert replayed.measured.peak_bytes == report.measured.peak_bytes

    code, out, err = invoke("run", "tiny_targets:classes", "--plan", "plan.json")
    assert (code, out) == (1, "")
    assert "error[stale-plan]: program 'g0' has fingerprint" in err


def test_run_says_what_the_least_budget_is(invoke: Invoke) -> None:
    code, out, err = invoke("run", "tiny_targets:chain", "--budget", "20KiB")
    assert (code, out) == (1, "")
    assert "error[budget]: no plan fits 20.00 KiB: the least that fits is" in err
    least = err.partition("ask for budget=")[2].split()[0]
    assert invoke("run", "tiny_targets:chain", "--budget", f"{least}B")[0] == 0
    assert invoke("run", "tiny_targets:chain", "--budget", f"{int(least) - 1}B")[0] == 1


@pytest.mark.parametrize("stage", ["semantic", "joint", "final"])
def test_dump_writes_each_stage_in_each_format(invoke: Invoke, stage: str) -> None:
    heads = {"text": "program g0", "json": "{", "py": "# program g0", "dot": "digraph"}
    for form, head in heads.items():
        code, out, err = invoke("dump", "tiny_targets:chain", "--budget", "60%", "--stage", stage, "-f", form)
        assert (code, err) == (0, "")
        assert out.startswith(head)
        if stage == "joint" and form == "text":
            assert "<recompute insert-checkpoints>" in out
        if form == "py":
            compile(out, "dumped", "exec")


def test_python_dumps_name_layers_that_are_no_identifiers(invoke: Invoke) -> None:
    code, out, _ = invoke("dump", "tiny_targets:classes", "-f", "py", "--stage", "joint")
    assert code == 0
    compile(out, "dumped", "exec")
    assert "class_weight" in out
    assert "_1_weight" in out


def test_wishes_that_cannot_be_met_cost_no_work(invoke: Invoke, tmp_path: Path) -> None:
    """A target that fails when loaded shows what is looked at first."""
    (tmp_path / "bomb.py").write_text("raise RuntimeError('loaded')\n")
    for arguments, expected, text in [
        (("dump", "bomb:x", "-f", "dto"), 1, "unknown dump format 'dto'; did you mean 'dot'?"),
        (("dump", "bomb:x", "--stage", "low"), 2, "'low' is not one of 'semantic', 'joint', 'final'"),
        (("dump", "bomb:x", "-o", "gone/x.txt"), 2, "there is no folder 'gone' to write x.txt into"),
        (("pareto", "bomb:x", "-o", "gone/x.svg"), 2, "there is no folder 'gone' to write x.svg into"),
        (("pareto", "bomb:x", "-o", "x.png"), 2, "cannot write x.png: the file is SVG"),
        (("run", "bomb:x", "--save-plan", "gone/x"), 2, "there is no folder 'gone' to write x into"),
        (("run", "bomb:x", "--plan", "gone.json"), 2, "File 'gone.json' does not exist"),
    ]:
        code, out, err = invoke(*arguments)
        assert (code, out) == (expected, "")
        assert text in err


def test_a_disk_that_refuses_is_no_traceback(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: object, text: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("graphopt.atomic.write_atomically", full)
    code, out, err = invoke("dump", "tiny_targets:classes", "-o", "graph.txt")
    assert (code, out) == (1, "")
    assert err == "graphopt: error[file]: graph.txt: No space left on device\n"


def test_cost_counts_a_step_and_an_inference(invoke: Invoke) -> None:
    train = json.loads(invoke("cost", "tiny_targets:chain", "--json")[1])
    infer = json.loads(invoke("cost", "tiny_targets:chain", "--json", "--infer")[1])
    forward = 6 * 2 * 512 * 16 * 16  # six matrix products
    assert infer["flops"] == forward
    # The input needs no gradient: the first layer has one product less in the backward.
    assert train["flops"] == 3 * forward - forward // 6
    assert train["weight_bytes"] == infer["weight_bytes"] == 6 * 4 * (16 * 16 + 16)
    assert infer["peak_bytes"] < train["peak_bytes"] / 2
    code, out, _ = invoke("cost", "tiny_targets:chain", "--device", "h100")
    assert code == 0
    assert out.splitlines()[0].split() == ["one", "step", "on", "h100", "exactly"]
    code, _, err = invoke("cost", "tiny_targets:chain", "--device", "h1000")
    assert code == 1
    assert "unknown device 'h1000'; did you mean 'h100'?" in err


def test_pareto_falls_from_left_to_right_and_is_drawn(invoke: Invoke, tmp_path: Path) -> None:
    code, out, err = invoke("pareto", "tiny_targets:chain", "-o", "front.svg", "--json")
    assert (code, err) == (0, "wrote front.svg\n")
    points = json.loads(out)["points"]
    assert len(points) > 1
    for less, more in itertools.pairwise(points):
        assert less["peak_bytes"] < more["peak_bytes"]
        assert less["seconds"] > more["seconds"]
    assert (tmp_path / "front.svg").read_text().startswith("<svg")
    table = invoke("pareto", "tiny_targets:chain")[1].splitlines()
    assert table[0].split() == ["peak", "time", "plan"]
    assert len(table) == len(points) + 1


def test_a_saved_program_is_a_target(invoke: Invoke, tmp_path: Path) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(3)), torch.nn.Sigmoid())
    torch.export.save(torch.export.export(model, (torch.randn(64, 16),)), tmp_path / "small.pt2")
    cost = json.loads(invoke("cost", "small.pt2", "--json")[1])
    assert cost["weight_bytes"] == 3 * 4 * (16 * 16 + 16)
    code, out, err = invoke("dump", "small.pt2", "--stage", "semantic", "--infer")
    assert (code, err) == (0, "")
    assert "parameter  0.weight : f32[16,16]" in out
    code, out, _ = invoke("run", "small.pt2", "--json")
    assert code == 0
    # The sum that stands for a loss, and the gradient of it, come on top.
    assert json.loads(out)["measured"]["peak_bytes"] == pytest.approx(cost["peak_bytes"], abs=64)


def test_a_program_that_does_not_load_says_why(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "broken.pt2").write_text("no archive")
    code, out, err = invoke("cost", "broken.pt2")
    assert (code, out) == (1, "")
    assert "error[target]: 'broken.pt2' is not a program that this torch can load" in err
    assert "Traceback" not in err and "warnings above" not in err


def test_a_path_is_told_how_to_name_its_module(invoke: Invoke) -> None:
    code, _, err = invoke("cost", "pkg/tiny_targets.py:chain")
    assert code == 1
    assert "'pkg/tiny_targets.py' is a path: a target names a module" in err
    assert "write pkg.tiny_targets:..., from its root folder" in err


@pytest.mark.parametrize("target", ["cnn", "gpt2", "llama"])
def test_the_example_targets_run_within_a_budget(invoke: Invoke, target: str) -> None:
    if target != "cnn":
        pytest.importorskip("transformers")
    loss = ("--loss", "examples.targets:squared_mean") if target == "cnn" else ()
    code, out, err = invoke("run", f"examples.targets:{target}", "--budget", "65%", "--json", *loss)
    assert (code, err) == (0, "")
    report = graphopt.Report.from_json(json.loads(out))
    assert report.measured is not None and report.budget is not None
    assert report.measured.peak_bytes <= report.budget
    assert [program.mode for program in report.programs] == ["train"]
