"""Reports: the table, its grouping, HTML, and storage."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from graphopt.cost import Cost
from graphopt.duration import format_seconds
from graphopt.errors import StalePlanError, StaleReportError
from graphopt.plans import Choice, Plan, Recomputed, SavedValue
from graphopt.plugins.records import PluginRecord
from graphopt.price import price_groups
from graphopt.report import Environment, PassRecord, ProgramSummary, Report
from graphopt.report_table import GROUPS_SHOWN
from graphopt.schedule import Schedule

MIB = 2**20


def plan(operators: int = 8) -> Plan:
    recomputed = [
        Recomputed(f"op{op}_{layer}", f"model.layers.{layer}.mlp2.0", f"aten.op{op}", MIB, 1e-4 * (op + 1))
        for layer in range(4)
        for op in range(operators)
    ]
    choice = Choice(
        "g0",
        "0123456789abcdef",
        "insert-checkpoints",
        "point 3",
        Schedule(("a", "b"), ("b",), ("a", "c")),
        sum(item.seconds for item in recomputed),
        tuple(recomputed),
        (SavedValue("b", "layers.0", "aten.mm", MIB),),
    )
    baseline, predicted = Cost(118 * MIB, 20 * MIB, 0.103), Cost(59 * MIB, 20 * MIB, 0.115)
    return Plan(60 * MIB, "cpu", "eager", baseline, predicted, 0.110, 0.83, (choice,))


def report(operators: int = 8) -> Report:
    chosen = plan(operators)
    return Report(
        Environment("2.13.0", "3.11.2", "0.1.0", "cpu"),
        chosen.baseline,
        chosen.predicted,
        chosen.budget,
        None,
        chosen,
        (
            PluginRecord("passes", "graphopt", "0.1.0", "active", hooks=("graphopt_passes",)),
            PluginRecord("acme", "acme-graphopt", "1.0", "failed", "ImportError: no module [red]x[/red]"),
        ),
        (ProgramSummary("g0", "train", 100, 400, 200, 260),),
        (
            PassRecord(
                "insert-checkpoints",
                "passes",
                "applied",
                "least added time within the budget",
                "effort=2",
                0.8,
            ),
            PassRecord("quantize-linear", "passes", "skipped", "lossy: runs only when allow names it"),
        ),
        ("g1 runs as it did: <script>alert('graph break')</script>",),
    )


def test_table(golden) -> None:
    text = str(report().with_measured(Cost(59 * MIB, 20 * MIB, 0.121)))
    golden("report.txt", text + "\n")
    assert max(map(len, text.splitlines())) <= 100


def test_table_without_plan_budget_or_times(golden) -> None:
    bare = Report(Environment("2.13.0", "3.11.2", "0.1.0", "cpu"), Cost(MIB, 0), Cost(MIB, 0))
    golden("report_bare.txt", f"{bare}\n")


def test_table_ignores_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    before = str(report())
    for name, value in {"COLUMNS": "30", "FORCE_COLOR": "1", "TERM": "dumb"}.items():
        monkeypatch.setenv(name, value)
    assert str(report()) == before
    assert "\x1b" not in before


def test_repeated_layers_are_one_group() -> None:
    groups = price_groups(plan())
    assert {group.layer for group in groups} == {"model.layers.*.mlp2.*"}
    assert groups[0].op == "aten.op7"
    assert (groups[0].runs, groups[0].bytes, groups[0].seconds) == (4, 4 * MIB, pytest.approx(0.0032))
    assert sum(group.seconds for group in groups) == pytest.approx(plan().choices[0].seconds)


@pytest.mark.parametrize(
    ("operators", "rest"), [(GROUPS_SHOWN + 1, None), (GROUPS_SHOWN + 2, "and 2 more groups")]
)
def test_the_dearest_groups_are_shown(operators: int, rest: str | None) -> None:
    text = str(report(operators))
    assert ("more groups" in text) == (rest is not None)
    assert rest is None or rest in text


def test_with_measured() -> None:
    measured = Cost(58 * MIB, 20 * MIB, 0.12)
    assert report().with_measured(measured).measured == measured
    assert report().measured is None


@pytest.mark.parametrize(
    "original", [report(), report().with_measured(Cost(1, 2, 3.0, 4)), replace(report(), plan=None)]
)
def test_json_round_trip(original: Report) -> None:
    text = json.dumps(original.to_json(), allow_nan=False)
    assert Report.from_json(json.loads(text)) == original


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda d: d.update(schema="graphopt/report@9"),
            StaleReportError,
            "schema 'graphopt/report@9', this graphopt reads",
        ),
        (
            lambda d: d.clear(),
            StaleReportError,
            "not a report: expected an object with schema 'graphopt/report@1'",
        ),
        (
            lambda d: d["steps"][0].update(status="great"),
            StaleReportError,
            r"steps\[0\].status: expected one of 'applied'",
        ),
        (
            lambda d: d["plan"].update(schema="graphopt/plan@9"),
            StalePlanError,
            "the plan has schema 'graphopt/plan@9'",
        ),
    ],
)
def test_foreign_reports_are_refused(change, error: type[Exception], message: str) -> None:
    data = json.loads(json.dumps(report().to_json()))
    change(data)
    with pytest.raises(error, match=message):
        Report.from_json(data)


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_html_is_escaped_balanced_and_self_contained() -> None:
    html = report().with_measured(Cost(59 * MIB, 20 * MIB, 0.121))._repr_html_()
    tags = _Tags()
    tags.feed(html)
    assert tags.open == []
    assert tags.seen <= {"div", "style", "b", "table", "tr", "td", "th", "details", "summary", "ul", "li"}
    text = "".join(tags.text)
    assert "<script>alert('graph break')</script>" in text and "[red]x[/red]" in text
    for wanted in ("baseline", "budget", "predicted", "measured", "model.layers.*.mlp2.*", "quantize-linear"):
        assert wanted in text
    assert "http" not in html and "src=" not in html


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"), (0, "0 s"), (2, "2.00 s"), (0.9996, "1.00 s"), (0.9994, "999 ms"), (0.0123, "12.3 ms"),
        (1.5e-6, "1.50 us"), (2e-9, "2.00 ns"), (-0.0123, "-12.3 ms"), (123.4, "123 s"), (9.996, "10.0 s"),
    ],
)  # fmt: skip
def test_format_seconds(seconds: float | None, text: str) -> None:
    assert format_seconds(seconds) == text
