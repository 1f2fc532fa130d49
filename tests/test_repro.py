"""Folders that reproduce a failure in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from graphopt.cli.main import main
from tests.faulty import faulty_plugin

Invoke = Callable[..., tuple[int, str, str]]

MORE = """

class Holding(torch.nn.Module):
    def forward(self, x):
        return torch.relu(x) + torch.tensor([1.0, 2.0, 3.0, 4.0])

def holding():
    return Holding(), (torch.zeros(2, 4),)

class Trained(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(7, 8)
        self.norm = torch.nn.BatchNorm1d(8)
        self.out = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(8, 3))
    def forward(self, ids, mask):
        return self.out(self.norm(self.table(ids))) * mask[:, None]

def trained():
    torch.manual_seed(1)
    return Trained(), {"ids": torch.randint(0, 7, (16,)), "mask": torch.rand(16) < 0.5}
"""


@pytest.fixture
def invoke(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Invoke]:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        torch._dynamo.reset()
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    with faulty_plugin(tmp_path):
        with (tmp_path / "faulty_targets.py").open("a") as stream:
            stream.write(MORE)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        yield run


def rerun(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "repro.py"], cwd=folder, capture_output=True, text=True)


def test_a_failure_is_found_and_written_down_without_the_model(invoke: Invoke, tmp_path: Path) -> None:
    pipeline = ("-p", "normalize,spoil{bad=[4]},insert-checkpoints")
    code, out, err = invoke("repro", "faulty_targets:small", "--emit", "eager", *pipeline, "--json")
    assert code == 0, err
    told = json.loads(out)
    folder = tmp_path / told["folder"]
    assert folder.name.startswith("graphopt-repro-")
    assert told["run"] == f"cd {told['folder']} && python repro.py"
    assert (told["rewrites"], told["passes"], told["alone"]) == (["g0/spoil/spoil@4"], ["spoil"], True)
    assert {path.name for path in folder.iterdir()} == {
        "repro.py", "repro_model.py", "pipeline.yaml", "rewrites.txt", "tensors.json", "env.json",
    }  # fmt: skip
    assert json.loads((folder / "env.json").read_text())["schema"] == "graphopt/repro@1"
    # The model's own code is gone: what is in the folder is all it takes.
    (tmp_path / "faulty_targets.py").unlink()
    ran = rerun(folder)
    assert ran.returncode == 1
    assert ran.stdout.startswith("fails: output 0: the largest difference is")
    # Mended, it says so; a rewrite that is not there is not taken for a mended one.
    mended = (folder / "pipeline.yaml").read_text().replace("- 4", "- 9")
    (folder / "pipeline.yaml").write_text(mended)
    ran = rerun(folder)
    assert (ran.returncode, ran.stdout) == (0, "passes\n")
    (folder / "rewrites.txt").write_text("g0/spoil/spoil@77\n")
    ran = rerun(folder)
    assert (ran.returncode, ran.stdout) == (2, "cannot tell: g0/spoil/spoil@77 cannot be applied here\n")


def test_named_rewrites_with_the_weights_themselves(invoke: Invoke, tmp_path: Path) -> None:
    from faulty_targets import trained

    asked = ("repro", "faulty_targets:trained", "--emit", "eager", "-p", "spoil{bad=[0],how=raise}")
    code, out, err = invoke(*asked, "--rewrites", "g0/spoil/spoil@0", "--weights", "-o", "kept")
    assert code == 0, err
    assert out == "cd kept && python repro.py\n"
    ran = rerun(tmp_path / "kept")
    assert ran.returncode == 1
    assert "spoil was rolled back: candidate 'spoil@0': apply() raised RuntimeError: spoilt 0" in ran.stdout
    code = (
        "import torch, repro_model\nmodel, inputs = repro_model.make()\n"
        "print(model.held.table.weight.sum().item(), [*map(len, inputs)], inputs[0].sum().item())"
    )
    made = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "kept", capture_output=True, text=True, check=True
    )
    model, inputs = trained()
    weight, ids = model.table.weight.sum().item(), int(inputs["ids"].sum())
    assert made.stdout == f"{weight} [16, 16] {ids}\n"


def test_a_model_that_cannot_be_written_down_is_named(invoke: Invoke, tmp_path: Path) -> None:
    asked = ("repro", "faulty_targets:holding", "--emit", "eager", "-p", "spoil{bad=[0]}", "-o", "named")
    code, _, err = invoke(*asked)
    assert code == 0, err
    assert "graphopt: the model is not in the folder: it holds " in err
    assert "TARGET = 'faulty_targets:holding'" in (tmp_path / "named" / "repro.py").read_text()
    assert rerun(tmp_path / "named").returncode == 1


def test_what_cannot_be_reproduced_leaves_nothing_behind(invoke: Invoke, tmp_path: Path) -> None:
    target = ("repro", "faulty_targets:small", "--emit", "eager")
    code, _, err = invoke(*target, "-p", "spoil")
    assert code == 1
    assert "error[bisect]: with all 6 rewrites the run does not fail: there is nothing to find" in err
    code, _, err = invoke(*target, "-p", "spoil", "--rewrites", "g0/spoil/spoil@8", "-o", "x")
    assert code == 1
    assert "error[repro]: rewrites that are not applied to faulty_targets:small: g0/spoil/spoil@8" in err
    (tmp_path / "there").mkdir()
    code, _, err = invoke(*target, "-p", "spoil{bad=[1]}", "-o", "there")
    assert code == 1
    assert "error[repro]: there is there already" in err


def test_a_folder_that_does_otherwise_is_not_kept(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In a process of its own the run passes.
    passes = subprocess.CompletedProcess([], 0, stdout="passes\n", stderr="")
    monkeypatch.setattr("graphopt.cli.repro_folder.subprocess.run", lambda *args, **options: passes)
    target = ("repro", "faulty_targets:small", "--emit", "eager", "-p", "spoil{bad=[1]}", "-o", "lost")
    code, _, err = invoke(*target)
    assert code == 1
    assert "error[repro]: no folder does the same in a process of its own: the last one said 'passes'" in err
    assert not [path.name for path in tmp_path.iterdir() if "lost" in path.name]
