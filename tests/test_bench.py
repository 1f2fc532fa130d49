"""Versions of a model side by side: what is measured of each, and what becomes of one that fails."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from graphopt import InputsError, UnknownNameError
from graphopt.bench import BenchRow, Contender, bench, peer
from graphopt.cli.main import main

Invoke = Callable[..., tuple[int, str, str]]

TINY = """
import torch

def small():
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (torch.nn.Linear(16, 16), torch.nn.SiLU())]
    return torch.nn.Sequential(*layers, torch.nn.BatchNorm1d(16)), (torch.randn(256, 16),)

def mean(output):
    return output.square().mean()

def checkpointed(model):
    from torch.utils.checkpoint import checkpoint_sequential
    return lambda x: checkpoint_sequential(list(model), 3, x, use_reentrant=False)

def doubled(model):
    return lambda x: 2 * model(x)

def broken(model):
    raise RuntimeError("needs libbroken")

number = 3
"""


@pytest.fixture
def invoke(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Invoke]:
    (tmp_path / "bench_targets.py").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "bench_targets", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    yield run


TARGET = ("bench", "bench_targets:small", "--loss", "bench_targets:mean", "--emit", "eager", "--repeats", "2")


def test_a_target_beside_what_others_make_of_it(invoke: Invoke) -> None:
    peers = ("--peer", "checkpoint=bench_targets:checkpointed", "--peer", "twice=bench_targets:doubled")
    code, out, err = invoke(*TARGET, "--budget", "80%", *peers, "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["schema"] == "graphopt/bench@1" and told["torch"] == torch.__version__ and told["device"]
    rows = {row["name"]: row for row in told["rows"]}
    assert list(rows) == ["eager", "graphopt", "checkpoint", "twice"]
    for row in rows.values():
        assert not row["failed"]
        assert len(row["samples"]) == 2 and min(row["samples"]) <= row["seconds"] <= max(row["samples"])
    # What checkpoints, or has to fit a budget, holds less than the model as it is.
    assert rows["graphopt"]["peak_bytes"] <= 0.8 * rows["eager"]["peak_bytes"]
    assert rows["checkpoint"]["peak_bytes"] < rows["eager"]["peak_bytes"]
    assert (
        rows["eager"]["difference"] == rows["graphopt"]["difference"] == rows["checkpoint"]["difference"] == 0
    )
    assert rows["twice"]["difference"] == pytest.approx(1.0)


def test_the_table_has_a_line_for_each(invoke: Invoke) -> None:
    code, out, err = invoke(*TARGET, "--peer", "lost=bench_targets:broken", "--infer")
    assert code == 0
    head, eager, ours, lost = (line.split() for line in out.splitlines())
    assert head[:3] == ["version", "time", "spread"]
    assert eager[0] == "eager" and "100.0" in eager and "1.00" in eager
    assert ours[0] == "graphopt" and lost == ["lost", "failed"]
    assert err == "graphopt: lost failed: RuntimeError: needs libbroken\n"


def test_what_graphopt_cannot_do_is_a_failure(invoke: Invoke) -> None:
    code, out, err = invoke(*TARGET, "--budget", "1KiB", "--peer", "none")
    assert code == 1
    assert [line.split()[0] for line in out.splitlines()] == ["version", "eager", "graphopt"]
    assert "graphopt: graphopt failed: BudgetError: no plan fits 1.00 KiB" in err


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("torch.compil", "unknown peer 'torch.compil'; did you mean 'torch.compile'?"),
        ("x=bench_targets:number", "peer 'bench_targets:number' is int, not a function of the model"),
        ("x=bench_targets:dubled", "did you mean 'doubled'?"),
    ],
)
def test_peers_that_are_not_there(invoke: Invoke, name: str, text: str) -> None:
    code, out, err = invoke(*TARGET, "--peer", name)
    assert (code, out) == (1, "")
    assert text in err


def load() -> tuple[torch.nn.Module, tuple[torch.Tensor]]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5))
    return model, (torch.randn(4, 8),)


def test_steps_are_counted_and_all_is_put_back() -> None:
    calls: list[torch.Tensor] = []
    models: list[torch.nn.Module] = []

    def counted(model: torch.nn.Module, inputs: object) -> Callable[..., torch.Tensor]:
        models.append(model)

        def call(x: torch.Tensor) -> torch.Tensor:
            assert all(p.grad is None for p in model.parameters())
            calls.append(model(x))
            return calls[-1]

        return call

    (row,) = bench([Contender("counted", counted)], load, warmup=3, repeats=5)
    # Three to warm up, one whose memory is watched, five that are timed.
    assert len(calls) == 3 + 1 + 5
    assert len(row.samples) == 5 and row.seconds is not None and row.first_seconds is not None
    assert row.spread is not None and row.spread >= 0
    # Each drops the same elements.
    assert all(torch.equal(call == 0, calls[0] == 0) for call in calls)
    assert all(p.grad is None for p in models[0].parameters())
    assert torch.equal(dict(models[0].named_buffers())["1.running_mean"], torch.zeros(8))


def test_a_model_that_does_not_run_is_the_callers_error() -> None:
    def wrong() -> tuple[torch.nn.Module, tuple[torch.Tensor]]:
        return torch.nn.Linear(2, 2), (torch.ones(3),)

    with pytest.raises(InputsError, match="eager does not run: RuntimeError"):
        list(bench([Contender("eager", lambda model, inputs: model)], wrong))
    with pytest.raises(UnknownNameError, match="unknown peer 'x'"):
        peer("x")
    assert BenchRow("one", 1.0, (1.0,)).spread is None


@pytest.mark.slow
def test_torch_compile_is_the_peer_that_is_always_there(invoke: Invoke) -> None:
    code, out, _ = invoke(*TARGET, "--json")
    assert code == 0
    rows = {row["name"]: row for row in json.loads(out)["rows"]}
    assert list(rows) == ["eager", "graphopt", "torch.compile"]
    assert not rows["torch.compile"]["failed"]
    assert rows["torch.compile"]["first_seconds"] > 0
    assert rows["torch.compile"]["difference"] < 1e-5
