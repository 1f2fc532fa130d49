"""The HTML dump: facts and escapes of the page, and, where a browser is there, that it opens and answers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import nn

import graphopt
from graphopt import _torch
from graphopt.dump.page import Sheet, page_text
from graphopt.program import Level, Program, Signature
from tests.browser import Browser, browser_path
from tests.pages import long_program, opened

BROWSER = browser_path()
NO_BROWSER = pytest.mark.skipif(BROWSER is None, reason="no Chromium on the path, nor in GRAPHOPT_BROWSER")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def data_of(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


@pytest.fixture(scope="module")
def page() -> str:
    torch._dynamo.reset()
    torch.manual_seed(0)
    inputs = (torch.randn(128, 8),)
    plain = graphopt.optimize(Net(), inputs, emit="eager", pipeline=(), cache=False)
    fast = graphopt.optimize(Net(), inputs, emit="eager", budget="84%", cache=False)
    return fast.dump("html", "joint", beside=plain.programs)


def test_a_page_needs_nothing_else_and_holds_every_level(page: str) -> None:
    assert not re.search(r"https?:|\bsrc=|<link|@import|url\(", page)
    data = data_of(page)
    titles = [program["title"] for program in data["programs"]]
    assert titles[:4] == ["g0 @ semantic", "g0 @ joint", "g0.forward @ lowered", "g0.backward @ lowered"]
    assert data["first"] == 1 and titles[data["beside"]] == "g0 @ joint as captured" and data["compare"]


def test_columns_say_what_is_made_of_what_at_which_cost(page: str) -> None:
    semantic = data_of(page)["programs"][0]
    columns = ("name", "op", "type", "layer", "bytes", "seconds", "reads", "id")
    assert len({len(semantic[name]) for name in columns}) == 1
    relu = next(k for k, op in enumerate(semantic["op"]) if semantic["ops"][op] == "aten.relu")
    assert semantic["bytes"][relu] == 128 * 16 * 4 and semantic["seconds"][relu] > 0
    (source,) = semantic["reads"][relu]
    assert semantic["layers"][semantic["layer"][source]].endswith("blocks.0.up")
    weight = semantic["name"].index("blocks.1.down.weight")
    assert semantic["layers"][semantic["layer"][weight]].endswith("blocks.1.down")
    assert all(parent < k for k, parent in enumerate(semantic["parent"]) if k)


def test_marks_of_the_schedule_are_shown_in_the_joint_program(page: str) -> None:
    joint = data_of(page)["programs"][1]
    assert {"saved", "recompute"} <= set(joint["marks"])


def test_texts_cannot_leave_the_script_that_holds_them() -> None:
    graph = fx.Graph()
    node = graph.placeholder("x")
    with _torch.fake_mode():
        node.meta["val"] = torch.empty(2)
    graph.output((node,))
    bad = "</script><script>alert(1)</script>"
    program = Program(bad, Level.SEMANTIC, fx.GraphModule({}, graph), Signature((), ()))
    page = page_text([Sheet(program)])
    assert bad not in page and data_of(page)["programs"][0]["title"] == f"{bad} @ semantic"


def test_a_notebook_shows_the_report_or_that_there_is_none_yet() -> None:
    torch._dynamo.reset()
    waiting = graphopt.optimize(nn.Linear(2, 2))
    assert "optimized Linear: the model was not captured" in waiting._repr_html_()
    fast = graphopt.optimize(nn.Linear(2, 2), (torch.randn(1, 2),), emit="eager", cache=False)
    assert fast._repr_html_() == fast.report._repr_html_()


# --- in a browser -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Any:
    assert BROWSER is not None
    with Browser(BROWSER, tmp_path_factory.mktemp("profile")) as found:
        yield found


@NO_BROWSER
@pytest.mark.slow
def test_forty_thousand_values_open_in_three_seconds(browser: Browser, tmp_path: Path) -> None:
    text = page_text([Sheet(long_program(100, 400))])
    assert opened(browser, tmp_path / "long.html", text) < 3000
    assert browser.run("graphopt.views[0].leaves.length") == 100 + 1
    browser.run("byId('open').onclick(); 0")
    assert browser.run("graphopt.views[0].leaves.length") == 40_002
    frames = browser.run(
        "[0.004, 0.05, 0.3, 1].flatMap((s) => [0, 1, 2, 3, 4].map((k) => {"
        "const v = graphopt.views[0]; v.scale = s; v.ty = -k * v.h * s / 5; v.paint(); return v.paintMs;}))"
    )
    assert sorted(frames)[len(frames) // 2] < 50, frames


@NO_BROWSER
@pytest.mark.slow
def test_layers_open_and_both_sides_follow(browser: Browser, tmp_path: Path, page: str) -> None:
    opened(browser, tmp_path / "page.html", page)
    assert browser.run("graphopt.views[1].pane.hidden") is False
    before = browser.run("graphopt.views[0].leaves.length")
    spot = browser.run(
        "(() => {const v = graphopt.views[0], b = v.leaves.find((b) => b.u < 0);"
        "const r = v.canvas.getBoundingClientRect(), s = v.scale;"
        "return [r.x + v.tx + (b.x + 20) * s, r.y + v.ty + (b.y + 10) * s]})()"
    )
    browser.click(*spot)
    assert browser.run("graphopt.views[0].leaves.length") != before
    browser.run("byId('find').value = 'aten.relu'; graphopt.find(0); graphopt.find(1); 0")
    assert browser.run("byId('found').textContent") == "1 of 2 found"
    about = browser.run("byId('about').textContent")
    assert "aten.relu" in about and "blocks.0" in about
    left, right = (browser.run(f"graphopt.views[{k}].m.d.id[graphopt.views[{k}].selected]") for k in (0, 1))
    assert left == right != ""
    browser.run("byId('colour').value = 'bytes'; byId('colour').onchange(); 0")
    assert browser.run("byId('legend').textContent").strip().endswith("B")
    browser.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000
