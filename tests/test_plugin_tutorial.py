"""docs/tutorial-plugin.md does what it says: its files are written, its commands run, in order."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Not looked for with find_spec: that of pip makes setuptools unusable in this process.
BUILDERS = {"pip", "setuptools"}
TUTORIAL = ROOT / "docs" / "tutorial-plugin.md"
_BLOCK = re.compile(
    r"(?:<!-- (?P<what>part of|is|file): (?P<path>[\w./-]+) -->\n)?"
    r"```(?P<kind>\w*)\n(?P<text>.*?)^```$",
    re.M | re.S,
)
_OFFLINE = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--upgrade")


class Reader:
    """Someone who does what the page says, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.at, self.target = folder, folder / "installed"
        self.said = ""

    def block(self, what: str, path: str, kind: str, text: str) -> None:
        if kind == "sh":
            for line in text.splitlines():
                self.run(line)
        elif what == "file":
            (self.at / path).write_text(text, encoding="utf-8")
        elif what == "is":
            assert (self.at / path).read_text(encoding="utf-8") == text
        elif what == "part of":
            assert text in (self.at / path).read_text(encoding="utf-8")
        else:
            assert kind == "text", f"a block of {kind!r} is neither a file nor a command: {text}"

    def run(self, line: str) -> None:
        name, *arguments = shlex.split(line)
        if name == "cd":
            (folder,) = arguments
            self.at /= folder
            return
        if name == "pip":
            assert arguments == ["install", "."]
            arguments = ["install", *_OFFLINE, "--target", str(self.target), "."]
        if name == "pytest":
            # The folder of the test's own project is not theirs.
            arguments = ["-q", "-p", "no:cacheprovider", "--rootdir", str(self.at), "-c", os.devnull, "tests"]
        assert name in ("graphopt", "pip", "pytest"), line
        places = [str(self.target), *(place for place in sys.path if place)]
        done = subprocess.run(
            [sys.executable, "-m", name, *arguments],
            cwd=self.at,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(places), "GRAPHOPT_CACHE": "0"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (line, done.stdout[-2000:], done.stderr[-2000:])
        self.said += done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not BUILDERS.issubset(packages_distributions()), reason="needs pip and setuptools")
def test_the_tutorial_does_what_it_says(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    blocks = list(_BLOCK.finditer(TUTORIAL.read_text(encoding="utf-8")))
    assert len(blocks) > 8
    for found in blocks:
        reader.block(found["what"] or "", found["path"] or "", found["kind"], found["text"])
    assert "hello from acme-fusions" in reader.said
    assert "     4  aten.silu.default" in reader.said
    assert "chosen by policy acme-least" in reader.said


def test_code_of_the_tutorial_is_what_new_plugin_writes() -> None:
    from graphopt.plugins.scaffold import project_files

    written = project_files("acme-fusions")
    shown = [
        f for f in _BLOCK.finditer(TUTORIAL.read_text(encoding="utf-8")) if f["what"] in ("is", "part of")
    ]
    assert len(shown) == 2
    for found in shown:
        whole = written[found["path"]]
        assert found["text"] == whole if found["what"] == "is" else found["text"] in whole
