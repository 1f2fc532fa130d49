"""The README and the guide do what they say: their Python blocks and commands are run."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from graphopt.cli.main import main

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "docs/getting-started.md")
_BLOCK = re.compile(
    r"(?:<!-- needs: (?P<needs>[\w ]+) -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def blocks(document: str, kind: str) -> Iterator[tuple[int, str]]:
    """Line and text of each block of that kind whose requirements are installed."""
    text = (ROOT / document).read_text(encoding="utf-8")
    for found in _BLOCK.finditer(text):
        missing = [name for name in (found["needs"] or "").split() if importlib.util.find_spec(name) is None]
        if found["kind"] == kind and not missing:
            yield text[: found.start("text")].count("\n") + 1, found["text"]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory from which the repository can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    torch._dynamo.reset()
    return tmp_path


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    "document", (*DOCUMENTS, "docs/integrations.md", "docs/plugins.md", "docs/rules.md")
)
def test_python_blocks_run(document: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("document")
    monkeypatch.setitem(sys.modules, "document", module)
    ran = 0
    for line, text in blocks(document, "python"):
        # Blank lines in front, so that a traceback names the document's own lines.
        exec(compile("\n" * (line - 1) + text, document, "exec"), vars(module))
        ran += 1
    assert ran


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("document", (*DOCUMENTS, "docs/cli.md", "docs/debugging.md"))
def test_commands_succeed(document: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for _, text in blocks(document, "sh") for line in text.splitlines() if line]
    assert lines
    for line in lines:
        torch._dynamo.reset()
        command, *arguments = shlex.split(line, comments=True)
        assert command == "graphopt"
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert not stopped.value.code, (line, capsys.readouterr().err)


@pytest.mark.parametrize(
    "document", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(document: str) -> None:
    for target in _LINK.findall((ROOT / document).read_text(encoding="utf-8")):
        assert ((ROOT / document).parent / target).exists(), target
