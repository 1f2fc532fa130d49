"""The page of two programs that are compared: facts of both sides, and, where a browser is there, that it
opens and answers."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt.cli.main import main
from graphopt.dump.difference import difference
from graphopt.dump.difference_page import KINDS, difference_page
from graphopt.dump.rows import ProgramRows, Row, Side
from tests.browser import Browser, browser_path
from tests.pages import opened

BROWSER = browser_path()
NO_BROWSER = pytest.mark.skipif(BROWSER is None, reason="no Chromium on the path, nor in GRAPHOPT_BROWSER")


def row(name: str, op: str, *operands: str, layer: str, **more: Any) -> Row:
    places = ", ".join("\0" for _ in operands)
    given = {"mark": "", "own": name.strip("%"), "seconds": 1e-6, "flops": 1, "bytes": 64, **more}
    return Row(name, op, f"{op}({places})", operands, "f32[4,4]", layer, **given)


def layers(count: int, *, fused: bool) -> ProgramRows:
    """Layers of three calls; ``fused``: the last two of the first layer are one call that a pass made."""
    rows, last = [], "%0"
    for k in range(count):
        path = f"body.{k}"
        names = [f"%{3 * k + n}" for n in (1, 2, 3)]
        rows.append(row(names[0], "aten.mm", last, f"w{k}", layer=f"{path}.fc", own=f"mm{k}"))
        if fused and not k:
            made = {"mark": "fuse", "own": "", "origin": frozenset({"sigmoid0", "mul0"})}
            rows.append(row(names[2], "aten.silu", names[0], layer=path, **made))
        else:
            rows.append(row(names[1], "aten.sigmoid", names[0], layer=path, own=f"sigmoid{k}"))
            rows.append(row(names[2], "aten.mul", names[0], names[1], layer=path, own=f"mul{k}"))
        last = names[2]
    inputs = {"%0": "input 1", **{f"w{k}": f"parameter body.{k}.fc.weight" for k in range(count)}}
    types = dict.fromkeys(inputs, "f32[4,4]")
    return ProgramRows("g0", "semantic", "", inputs, tuple(rows), (("output", "0", last),), types)


def page_of(count: int = 3) -> str:
    before = Side("old", (layers(count, fused=False),), 2048, 2e-3, "one")
    after = Side("<new>", (layers(count, fused=True),), 1024, 1e-3, "one")
    return difference_page(difference(before, after))


def data_of(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_page_needs_nothing_else_and_shows_both_sides() -> None:
    page = page_of()
    assert not re.search(r"https?:|\bsrc=|<link|@import|url\(", page)
    data = data_of(page)
    assert [program["title"] for program in data["programs"]] == ["A: g0 @ semantic", "B: g0 @ semantic"]
    assert (data["first"], data["beside"], data["compare"]) == (0, 1, True)
    assert "&lt;new&gt;" in page and "<new>" not in page
    assert "<td>peak of a step</td><td>2.00 KiB</td><td>1.00 KiB</td><td>-1.00 KiB</td>" in page
    assert "program g0: 7 calls the same, 1 added, 2 removed" in page


def test_rows_say_what_became_of_them_and_who_they_are_on_the_other_side() -> None:
    before, after = data_of(page_of())["programs"]

    def place(program: Any, op: str, layer: str) -> int:
        return next(
            k for k, number in enumerate(program["op"])
            if program["ops"][number] == op and program["layers"][program["layer"][k]] == layer
        )  # fmt: skip

    silu = place(after, "aten.silu", "body.0")
    gone = [place(before, op, "body.0") for op in ("aten.sigmoid", "aten.mul")]
    assert KINDS[after["change"][silu]] == "added"
    assert [KINDS[before["change"][k]] for k in gone] == ["removed", "removed"]
    assert after["note"][silu] == "in place of %2, %3"
    assert after["twin"][silu] == gone and [before["twin"][k] for k in gone] == [[silu], [silu]]
    mine, theirs = place(before, "aten.mm", "body.2.fc"), place(after, "aten.mm", "body.2.fc")
    assert before["twin"][mine] == [theirs] and before["change"][mine] == 0
    weight = before["name"].index("body.1.fc.weight")
    assert before["layers"][before["layer"][weight]] == "body.1.fc"
    assert after["name"][before["twin"][weight][0]] == "body.1.fc.weight"
    assert before["seconds"][mine] == 1e-6 and before["bytes"][mine] == 64
    for side in (before, after):
        assert len(side["twin"]) == len(side["change"]) == len(side["note"]) == len(side["name"])


def test_a_program_of_one_side_alone_stands_beside_nothing() -> None:
    one = layers(1, fused=False)
    more = replace(layers(1, fused=True), name="g1")
    found = difference(Side("a", (one, more)), Side("b", (one,)))
    data = data_of(difference_page(found))
    assert (data["first"], data["beside"]) == (2, 3)
    *_, before, after = data["programs"]
    assert after["title"] == "B: g1, which is not there" and after["name"] == []
    assert {KINDS[k] for k in before["change"]} == {"", "removed"}


def test_the_command_writes_it_from_a_file_and_from_a_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "diff_gates.py").write_text(
        "import torch\n"
        "class Gate(torch.nn.Module):\n"
        "    def __init__(self, half=0.5):\n        super().__init__()\n        self.half = half\n"
        "        self.fc = torch.nn.Linear(4, 4)\n"
        "    def forward(self, x):\n        return self.fc(x).relu() * self.half\n"
        "def half():\n    return Gate(), (torch.ones(2, 4),)\n"
        "def third():\n    return Gate(0.3), (torch.ones(2, 4),)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def run(*arguments: str) -> None:
        torch._dynamo.reset()
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--emit", "eager"])
        assert not stopped.value.code

    run("dump", "diff_gates:half", "-f", "json", "-o", "before.json", "--stage", "semantic")
    run("diff", "before.json", "diff_gates:third", "-f", "html", "-o", "diff.html")
    before, after = data_of((tmp_path / "diff.html").read_text())["programs"]
    for side in (before, after):
        assert [KINDS[k] for k in side["change"] if k] == ["changed"]
    assert re.fullmatch(r"was aten\.mul\.Tensor\(%\d+, 0\.5\)", next(filter(None, after["note"])))


# --- in a browser -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Any:
    assert BROWSER is not None
    with Browser(BROWSER, tmp_path_factory.mktemp("profile")) as found:
        yield found


SPOT = (
    "(() => {const v = graphopt.views[SIDE], l = v.m.d.layers.indexOf('LAYER'), b = v.at.get(~l);"
    "const r = v.canvas.getBoundingClientRect(), s = v.scale;"
    "return [r.x + v.tx + (b.x + 20) * s, r.y + v.ty + (b.y + 10) * s]})()"
)


@NO_BROWSER
@pytest.mark.slow
def test_both_sides_are_zoomed_searched_and_coloured(browser: Browser, tmp_path: Path) -> None:
    opened(browser, tmp_path / "diff.html", page_of())
    shown = "graphopt.views.map((v) => [...v.open].map((l) => v.m.d.layers[l]).sort().join())"
    assert browser.run("graphopt.views[1].pane.hidden") is False
    # Layers with a change are open, others are not; what changed is listed, and leads to both sides.
    assert browser.run(shown) == [",body,body.0"] * 2
    listed = browser.run("[...document.querySelectorAll('#about details a')].map((a) => a.textContent)")
    assert listed == [
        "- %2 = aten.sigmoid(%1)", "- %3 = aten.mul(%1, %2)", "+ %3 = aten.silu(%1)  # in place of %2, %3",
    ]  # fmt: skip
    browser.run("document.querySelectorAll('#about details a')[2].onclick(); 0")
    chosen = "graphopt.views.map((v) => v.m.d.ops[v.m.d.op[v.selected]])"
    assert browser.run(chosen) == ["aten.sigmoid", "aten.silu"]
    assert "added: in place of %2, %3" in browser.run("byId('about').textContent")
    # Layers open and close on both sides.
    browser.click(*browser.run(SPOT.replace("SIDE", "0").replace("LAYER", "body.0")))
    assert browser.run(shown) == [",body"] * 2
    browser.run("byId('changed').onclick(); 0")
    assert browser.run(shown) == [",body,body.0"] * 2
    # What is in B alone is found; what is in both is found once.
    browser.run("byId('find').value = 'silu'; graphopt.find(0); graphopt.find(1); 0")
    assert browser.run("byId('found').textContent") == "1 of 1 found"
    browser.run("byId('find').value = 'aten.mm'; graphopt.find(0); 0")
    assert browser.run("byId('found').textContent") == "3 found"
    # Colours: by change, cost and memory.
    fill = "graphopt.views[1].fill(graphopt.views[1].m.d.change.findIndex((k) => k))"
    assert browser.run(fill) == "#c9ecd0" and browser.run("byId('key').hidden") is False
    browser.run("byId('colour').value = 'seconds'; byId('colour').onchange(); 0")
    assert browser.run(fill) != "#c9ecd0" and browser.run("byId('key').hidden") is True
    assert browser.run("byId('legend').textContent").strip().endswith("s")
    browser.picture(tmp_path / "diff.png")
    assert (tmp_path / "diff.png").stat().st_size > 10_000


@NO_BROWSER
@pytest.mark.slow
def test_long_programs_open_at_once(browser: Browser, tmp_path: Path) -> None:
    assert opened(browser, tmp_path / "long.html", page_of(6000)) < 3000
    browser.run("byId('open').onclick(); 0")
    assert browser.run("graphopt.views[0].leaves.length") == 6000 * 4 + 2
