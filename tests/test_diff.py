"""Two programs compared: what is matched, what is said of the rest, as text, HTML and JSON."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from graphopt import InputsError
from graphopt.cli.main import main
from graphopt.dump.difference import difference
from graphopt.dump.rows import ProgramRows, Row, Side

TINY = """
import torch
from torch.nn import functional as F

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.RMSNorm(16)
        self.up = torch.nn.Linear(16, 32)
        self.down = torch.nn.Linear(32, 16)
        self.scale = 2.0
    def forward(self, x):
        y = self.norm(x.to(torch.float32))
        return x + self.down(F.gelu(self.up(y))) * self.scale

def two():
    torch.manual_seed(0)
    return torch.nn.Sequential(Block(), Block()), (torch.randn(4, 16),)

def other():
    model, inputs = two()
    model[1].scale = 3.0
    return model, inputs
"""

Invoke = Callable[..., tuple[int, str, str]]


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    (tmp_path / "diff_targets.py").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "diff_targets", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


def program(*rows: Row, outputs: tuple[tuple[str, str, str], ...] = ()) -> ProgramRows:
    inputs = {"%0": "input 1", "w": "parameter w"}
    return ProgramRows("g0", "semantic", "", inputs, rows, outputs)


def row(name: str, op: str, *operands: str, layer: str = "", **more: object) -> Row:
    places = ", ".join("\0" for _ in operands)
    form = f"{op}({places})"
    return Row(name, op, form, operands, "f32[4]", layer, **{"mark": "", **more})  # type: ignore[arg-type]


def kinds(a: ProgramRows, b: ProgramRows, capture: str = "one") -> list[tuple[str, str, str]]:
    found = difference(Side("a", (a,), capture=capture), Side("b", (b,), capture=capture))
    return [
        (c.kind, c.before.name if c.before else "", c.after.name if c.after else "")
        for layer in found.programs[0].layers
        for c in layer.changes
    ]


def test_calls_are_matched_by_what_they_compute_not_by_their_numbers() -> None:
    a = program(row("%1", "exp", "%0"), row("%2", "sin", "%0"), row("%3", "add", "%1", "%2"))
    b = program(row("%1", "sin", "%0"), row("%2", "exp", "%0"), row("%3", "add", "%2", "%1"))
    assert kinds(a, b) == []
    # The same numbers, other values: nothing is the same merely because it is called the same.
    c = program(row("%1", "sin", "%0"), row("%2", "exp", "%0"), row("%3", "add", "%1", "%2"))
    assert kinds(a, c) == [("rewired", "%3", "%3")]


def test_equal_calls_of_two_layers_are_told_apart_by_their_layer() -> None:
    first, second = row("%1", "exp", "%0", layer="a"), row("%2", "exp", "%0", layer="b")
    found = kinds(program(first, second), program(row("%1", "exp", "%0", layer="b")))
    assert found == [("removed", "%1", "")]


def test_what_passes_made_stands_in_place_of_what_it_was_made_of() -> None:
    a = program(
        row("%1", "pow", "%0", own="pow_1"),
        row("%2", "mean", "%1", own="mean"),
        row("%3", "neg", "%2", own="neg"),
    )
    b = program(
        row("%1", "norm", "%0", own="norm", mark="fuse", origin=frozenset({"pow_1", "mean"})),
        row("%2", "neg", "%1", own="neg"),
    )
    found = difference(Side("a", (a,), capture="one"), Side("b", (b,), capture="one"))
    added = next(c for layer in found.programs[0].layers for c in layer.changes if c.kind == "added")
    assert added.replaces == ("%1", "%2")
    assert ("rewired", "%3", "%2") in kinds(a, b)


def test_one_captured_node_is_found_again_among_its_like() -> None:
    """Without provenance the first of two equal operators would be taken for the one that is left."""
    a = program(
        row("%1", "neg", "%0", own="neg"),
        row("%2", "exp", "%1", own="exp"),
        row("%3", "neg", "%2", own="neg_1"),
    )
    b = program(row("%1", "tan", "%0", own="tan"), row("%2", "neg", "%1", own="neg_1"))
    assert ("rewired", "%3", "%2") in kinds(a, b)
    assert ("rewired", "%1", "%2") in kinds(a, b, capture="")


def test_outputs_that_are_other_values_are_told() -> None:
    a = program(row("%1", "exp", "%0"), outputs=(("output", "", "%1"),))
    b = program(row("%1", "exp", "%0"), outputs=(("output", "", "%0"),))
    found = difference(Side("a", (a,)), Side("b", (b,)))
    assert found.differs
    assert found.programs[0].outputs == ("output 0 (output) is %0, was %1",)


def test_levels_cannot_be_mixed() -> None:
    joint = ProgramRows("g0", "joint", "", {}, ())
    with pytest.raises(InputsError, match="A is at the semantic level, B at the joint level"):
        difference(Side("a", (program(),)), Side("b", (joint,)))


def test_diff_of_a_target_before_and_after_its_passes(invoke: Invoke, tmp_path: Path) -> None:
    asked = ("diff", "diff_targets:two@captured", "diff_targets:two", "--emit", "eager", "-p", "normalize")
    code, out, err = invoke(*asked, "-f", "text", "-o", "diff.txt")
    assert (code, out, err) == (0, "", "wrote diff.txt\n")
    text = (tmp_path / "diff.txt").read_text()
    assert text.startswith("A  diff_targets:two@captured\nB  diff_targets:two\n\n")
    assert re.search(r"^calls +\d+ +\d+ +-\d+$", text, re.M)
    assert re.search(r"^peak of a step +[\d.]+ KiB", text, re.M)
    # Rows without gradients: the casts to the type that values have already.
    assert re.search(r"^  - %\d+ = aten\.to\.dtype\(%0, f32\) : f32\[4,16\]$", text, re.M)
    assert "+ " not in text.partition("program g0")[2].replace("-> ", "")
    data = json.loads(invoke(*asked, "--json")[1])
    removed = [
        c
        for p in data["programs"]
        for layer in p["layers"]
        for c in layer["changes"]
        if c["kind"] == "removed"
    ]
    assert len(removed) == 2 and data["schema"] == "graphopt/diff@1"
    assert data["programs"][0]["calls"][0] - data["programs"][0]["calls"][1] == 2
    assert invoke(*asked, "--exit-code")[0] == 1


def test_diff_of_two_models_names_the_constant_that_differs(invoke: Invoke) -> None:
    eager = ("--emit", "eager")
    code, out, _ = invoke(
        "diff", "diff_targets:two@captured", "diff_targets:other@captured", *eager, "--exit-code"
    )
    assert code == 1
    changed = [line for line in out.splitlines() if line.startswith("  ~")]
    assert len(changed) == 1
    assert re.search(r"= aten\.mul\.Tensor\(%\d+, 3\.0\) .*was aten\.mul\.Tensor\(%\d+, 2\.0\)", changed[0])
    assert "\n1: " in out
    code, out, _ = invoke(
        "diff", "diff_targets:two@captured", "diff_targets:two@captured", *eager, "--exit-code"
    )
    assert code == 0
    assert "0 added" not in out and "calls the same" in out


def test_diff_of_stored_dumps(invoke: Invoke, tmp_path: Path) -> None:
    for name in ("two", "other"):
        invoke(
            "dump",
            f"diff_targets:{name}",
            "--emit",
            "eager",
            "--stage",
            "joint",
            "-f",
            "json",
            "-o",
            f"{name}.json",
        )
    code, out, _ = invoke("diff", "two.json", "other.json")
    assert code == 0
    # The constant stands in the forward and in the backward.
    assert len(re.findall(r"mul\.Tensor\(%\d+, 3\.0\)", out)) == 2
    assert "peak of a step" not in out
    code, out, _ = invoke("diff", "two.json", "diff_targets:two@joint", "--emit", "eager", "--exit-code")
    assert code == 0


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.linked: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.linked += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_notebook_shows_a_table_that_needs_nothing_else() -> None:
    gelu = row("%1", "gelu", "%0", layer="up")
    before, after = program(gelu), program(row("%1", "fast_gelu", "%0", layer="up"))
    found = difference(Side("old", (before,), peak_bytes=2048), Side("new <b>", (after,), peak_bytes=1024))
    page = _Reader()
    page.feed(found._repr_html_())
    assert page.tags.count("details") == 1 and not page.linked
    assert "fast_gelu" in page.text and "peak of a step" in page.text and "new <b>" in page.text


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        (
            "diff_targets:two@capturd",
            "diff_targets:two",
            "unknown stage 'capturd' of 'diff_targets:two'; did you mean 'captured'?",
        ),
        (
            "gone.json",
            "diff_targets:two",
            "there is no file 'gone.json'\n  hint: write one with graphopt dump -f json",
        ),
        ("bad.json", "bad.json", "bad.json has schema None, expected 'graphopt/program@1'"),
        ("cut.json", "cut.json", "cut.json is no dump of programs: JSONDecodeError"),
        ("void.json", "void.json", "void.json holds no program"),
    ],
)
def test_what_cannot_be_compared_is_said(invoke: Invoke, tmp_path: Path, a: str, b: str, text: str) -> None:
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "cut.json").write_text('{"schema": ')
    (tmp_path / "void.json").write_text("\n")
    code, out, err = invoke("diff", a, b)
    assert (code, out) == (1, "")
    assert text in err
