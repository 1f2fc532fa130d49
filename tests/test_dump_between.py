"""Programs between passes, printed and as files; pictures that Graphviz draws."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.cli.main import main
from graphopt.dump.between import BetweenPasses, Tree
from graphopt.dump.dot import write_svg
from graphopt.errors import DumpError
from graphopt.program import Program
from tests.programs import semantic

Invoke = Callable[..., tuple[int, str, str]]
TARGET = '''
import torch
from torch import nn

torch.manual_seed(0)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
    def forward(self, x):
        return nn.functional.dropout(self.norm(x), 0.0).sum()
def net():
    return Net(), (torch.ones(2, 8),)
'''


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Invoke:
    (tmp_path / "between_target.py").write_text(TARGET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(*arguments: str) -> tuple[int, str, str]:
        torch._dynamo.reset()
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


PASSES = "normalize,functionalize"
DUMP = ("dump", "between_target:net", "-p", PASSES, "--emit", "eager", "--stage", "semantic")


def test_programs_are_printed_beside_the_dump(invoke: Invoke) -> None:
    code, out, err = invoke(*DUMP, "--print-before", "normalize", "--print-after", "normalize")
    assert code == 0 and out.startswith("program g0 @ semantic") and "dropout" not in out
    before, after = err.split("# before normalize\n")[1].split("# after normalize\n")[:2]
    assert before.startswith("program g0 @ semantic") and "dropout" in before and "dropout" not in after
    assert "functionalize" not in err


def test_what_changed_is_printed_alone(invoke: Invoke) -> None:
    _, _, err = invoke(*DUMP, "--print-after-change")
    assert "# after normalize\n" in err and "# after functionalize\n" not in err
    _, _, err = invoke(*DUMP, "--print-after", "all")
    assert "# after normalize\n" in err and "# after functionalize\n" in err


def test_a_folder_of_programs(invoke: Invoke, tmp_path: Path) -> None:
    code, out, err = invoke(*DUMP, "-f", "dot", "--tree-dir", "tree", "--print-before", "all")
    names = sorted(path.name for path in (tmp_path / "tree").iterdir())
    assert code == 0 and f"wrote {len(names)} programs into tree" in err and "# before" not in err
    assert names[:2] == ["001-g0-before-normalize.dot", "002-g0-before-functionalize.dot"]
    assert (tmp_path / "tree" / names[1]).read_text() == out
    invoke(*DUMP, "--tree-dir", "changes")
    assert [path.name for path in (tmp_path / "changes").iterdir()] == ["001-g0-after-normalize.txt"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--print-after", "normalise"), "unknown pass 'normalise'; did you mean 'normalize'?"),
        (("--tree-dir", "gone/tree"), "there is no folder 'gone' to make tree in"),
        (("--tree-dir", "."), "folder '.' is not empty: give one that is, or a new name"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(invoke: Invoke, flags: Any, said: str) -> None:
    code, out, err = invoke(*DUMP, *flags)
    assert code != 0 and not out and said in " ".join(err.split())


def test_a_disk_that_is_full_fails_the_verb(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Tree, when: str, name: str, program: Program) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Tree, "write", full)
    code, out, err = invoke(*DUMP, "--tree-dir", "tree")
    assert code == 1 and not out and "No space left on device" in err and "wrote" not in err


def test_observers_are_for_python_as_well() -> None:
    seen: list[tuple[str, str, str]] = []

    def note(when: str, name: str, program: Program) -> None:
        seen.append((when, name, program.name))

    watcher = BetweenPasses(note, before=("normalize",), after=("functionalize",))
    graphopt.optimize(
        nn.Linear(4, 4), (torch.ones(2, 4),), pipeline=PASSES, emit="eager", plugins=(watcher,)
    )
    assert seen[:2] == [("before", "normalize", "g0"), ("after", "functionalize", "g0")]


def drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> str:
    """What the svg format writes where ``dot`` is that script."""
    command = tmp_path / "dot"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    program = semantic(nn.Linear(4, 4), torch.ones(2, 4))
    stream = io.StringIO()
    write_svg(program, stream)
    return stream.getvalue()


def test_graphviz_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Stands for Graphviz, which CI does not have: it is given DOT and asked for SVG.
    found = drawing(tmp_path, monkeypatch, 'test "$1" = -Tsvg && echo "<svg>" && cat')
    assert found.startswith('<svg>\ndigraph "g0" {') and found.endswith("}\n")


def test_what_graphviz_cannot_draw_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DumpError, match="Graphviz could not draw g0: syntax error in line 3"):
        drawing(tmp_path, monkeypatch, 'echo "syntax error in line 3" >&2; exit 1')


def test_without_graphviz_the_error_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    program = semantic(nn.Linear(4, 4), torch.ones(2, 4))
    with pytest.raises(DumpError, match="whose command 'dot' is not installed") as raised:
        write_svg(program, io.StringIO())
    assert "html is a page to zoom in" in str(raised.value)
