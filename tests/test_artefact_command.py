"""``graphopt dump`` and ``graphopt explain`` of saved artefacts; tuning and kernels that go with one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import graphopt
from graphopt.artefact.save import write_extras
from graphopt.cli.main import main
from graphopt.plugins import PluginHost, ReplacementSpec, hookimpl


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, graphopt.Optimized]:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    with torch.no_grad():
        fast = graphopt.optimize(model, (torch.randn(4, 8),), emit="eager", cache=False)
    return str(fast.save(tmp_path_factory.mktemp("artefacts") / "model.graphopt")), fast


def code_of(arguments: list[str]) -> object:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    return left.value.code


@pytest.mark.parametrize("stage", ["semantic", "joint", "final"])
def test_dump_writes_what_was_saved(
    saved: tuple[str, graphopt.Optimized], stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, fast = saved
    assert code_of(["dump", folder, "--stage", stage]) == 0
    assert capsys.readouterr().out == fast.dump(stage=stage)


def test_dump_writes_other_forms(
    saved: tuple[str, graphopt.Optimized], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(["dump", saved[0], "-f", "html", "-o", str(tmp_path / "page.html")]) == 0
    assert "aten.addmm" in (tmp_path / "page.html").read_text()
    assert code_of(["dump", saved[0], "--json", "-f", "dot"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == saved[1].dump("dot")


def test_explain_writes_report_and_memory(
    saved: tuple[str, graphopt.Optimized], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, fast = saved
    memory = fast.explain_memory().text()
    assert code_of(["explain", folder]) == 0
    assert capsys.readouterr().out == f"{fast.report}\n\n{memory}\n"
    assert code_of(["explain", folder, "--memory"]) == 0
    assert capsys.readouterr().out == f"{memory}\n"
    assert code_of(["explain", folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == fast.report.to_json()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["dump", "--budget", "50%"], "is shown as it was saved: --budget is for what is planned here"),
        (["explain", "--pipeline", "default"], "--pipeline is for what is planned here"),
        (["explain", "--layers"], "an artefact holds programs, not a model"),
    ],
    ids=["budget", "pipeline", "layers"],
)
def test_what_would_plan_anew_is_refused(
    saved: tuple[str, graphopt.Optimized],
    arguments: list[str],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert code_of([arguments[0], saved[0], *arguments[1:]]) == 2
    assert reason in capsys.readouterr().err


def test_all_steps_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    with torch.no_grad():
        fast = graphopt.optimize(
            model, (torch.randn(4, 8),), emit="eager", cache=False, dynamic_shapes=False
        )
        fast(torch.randn(6, 8))
    one, other = fast.steps
    folder = str(fast.save(tmp_path / "a"))
    assert code_of(["dump", folder]) == 0
    assert capsys.readouterr().out == one.dump() + other.dump()
    assert code_of(["explain", folder]) == 0
    parts = [f"{s.name}\n\n{s.report}\n\n{s.explain_memory().text()}\n" for s in (one, other)]
    assert capsys.readouterr().out == "\n".join(parts)
    assert code_of(["explain", folder, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["report"] == other.report.to_json() and said["step"] == "g1 infer f32[6,8]"
    assert [step["report"] for step in said["earlier"]] == [one.report.to_json()]


def test_a_damaged_artefact_is_an_error_with_its_code(
    saved: tuple[str, graphopt.Optimized], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "artefact.json").write_text("{}")
    assert code_of(["dump", str(tmp_path)]) == 1
    assert "error[artefact]" in capsys.readouterr().err


class Kernels:
    graphopt_api = 1

    @hookimpl
    def graphopt_replacements(self) -> tuple[ReplacementSpec, ...]:
        return (ReplacementSpec("some", lambda gm, cost: (), source={"made": "text of made"}.get),)


def test_tuning_and_sources_of_kept_kernels_go_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache" / "tuning").mkdir(parents=True)
    (tmp_path / "cache" / "tuning" / "nvidia-h200.json").write_text("{}")
    made = tmp_path / "made"
    made.mkdir()
    groups = [SimpleNamespace(kernel="made", kept=True), SimpleNamespace(kernel="left", kept=False)]
    write_extras(made, PluginHost((Kernels(),)), groups)
    found = {file.relative_to(made).as_posix(): file.read_text() for file in made.rglob("*.*")}
    assert found == {"tuning/nvidia-h200.json": "{}", "kernels/made.py": "text of made"}
