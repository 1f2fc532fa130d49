"""Plans: arithmetic, text, storage, and refusing to serve another graph or version."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from graphopt.cost import Cost
from graphopt.errors import StalePlanError
from graphopt.plans import Choice, Plan, Recomputed, SavedValue
from graphopt.schedule import Schedule

MIB = 2**20


def plan() -> Plan:
    choice = Choice(
        "g0",
        "0123456789abcdef",
        "insert-checkpoints",
        "point 3",
        Schedule(("a", "b"), ("b",), ("a", "c")),
        0.012,
        (Recomputed("a", "layers.0.mlp", "aten.silu", 4 * MIB, 0.012),),
        (SavedValue("b", "layers.0", "aten.mm", MIB),),
    )
    return Plan(
        60 * MIB,
        "cpu",
        "eager",
        Cost(118 * MIB, 20 * MIB, 0.103, 7),
        Cost(59 * MIB, 20 * MIB, 0.115),
        0.110,
        0.83,
        (choice,),
    )


def test_text(golden) -> None:
    golden("plan.txt", f"{plan()}\n\n{replace(plan(), budget_bytes=None, lower_bound=0.0, choices=())}\n")


def test_gap() -> None:
    assert plan().gap == pytest.approx(0.005 / 0.110)
    assert replace(plan(), lower_bound=0.115).gap == 0
    assert replace(plan(), lower_bound=0.0).gap == math.inf
    assert math.isnan(replace(plan(), predicted=Cost(1, 1)).gap)
    assert plan().budget == 60 * MIB


@pytest.mark.parametrize(
    "original", [plan(), replace(plan(), budget_bytes=None, lower_bound=0.0, choices=())]
)
def test_json_round_trip(original: Plan) -> None:
    text = json.dumps(original.to_json(), allow_nan=False)
    assert Plan.from_json(json.loads(text)) == original


def test_plans_from_before_keys_and_values_were_kept_come_back() -> None:
    data = plan().to_json()
    for name in ("baseline", "predicted"):
        del data[name]["cache_bytes"]
    assert Plan.from_json(data) == plan()


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan().save(path)
    assert Plan.load(path) == plan()
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    plan().save(path)

    def broken(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="disk full"):
        replace(plan(), device="h200").save(path)
    monkeypatch.undo()
    assert Plan.load(path) == plan()
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d.update(schema="graphopt/plan@9"),
            "has schema 'graphopt/plan@9', this graphopt reads 'graphopt/plan@1'",
        ),
        (lambda d: d.pop("schema"), "not a plan: expected an object with schema 'graphopt/plan@1'"),
        (lambda d: d.pop("device"), "malformed plan: plan: field 'device' is missing"),
        (
            lambda d: d.update(devise="cpu"),
            "malformed plan: plan: unknown field 'devise'; fields are budget_bytes",
        ),
        (
            lambda d: d.update(budget_bytes="60"),
            "malformed plan: plan.budget_bytes: expected int, got str '60'",
        ),
        (
            lambda d: d.update(budget_bytes=True),
            "malformed plan: plan.budget_bytes: expected int, got bool 'True'",
        ),
        (lambda d: d.update(lower_bound=None), "malformed plan: plan.lower_bound: expected float, got null"),
        (
            lambda d: d["choices"][0].update(schedule=3),
            r"plan.choices\[0\].schedule: expected an object, got int '3'",
        ),
        (
            lambda d: d["choices"][0]["schedule"].update(forward="ab"),
            "schedule.forward: expected a list, got str 'ab'",
        ),
    ],
)
def test_malformed_plans_are_refused(change, message: str) -> None:
    data = json.loads(json.dumps(plan().to_json()))
    change(data)
    with pytest.raises(StalePlanError, match=message) as caught:
        Plan.from_json(data)
    assert "graphopt.plan" in caught.value.hint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"schema": ', "plan.json is not JSON"),
        (b"\xff\xfe", "plan.json is not JSON"),
        (b"[1]", "plan.json: not a plan"),
    ],
)
def test_files_that_hold_no_plan_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(StalePlanError, match=message):
        Plan.load(path)


def test_check() -> None:
    plan().check({"g0": "0123456789abcdef"})
    with pytest.raises(
        StalePlanError, match="program 'g0' has fingerprint ffff, the plan was made for 0123456789abcdef"
    ):
        plan().check({"g0": "ffff"})
    with pytest.raises(
        StalePlanError, match="the plan has program 'g0', which the captured model lacks: it has g1"
    ):
        plan().check({"g1": "0123456789abcdef"})
    with pytest.raises(
        StalePlanError, match="the captured model has program 'g1', which the plan lacks: it has g0"
    ):
        plan().check({"g0": "0123456789abcdef", "g1": "ffff"})


def test_choice_by_program() -> None:
    assert plan().choice("g0") is not None
    with pytest.raises(StalePlanError, match="the plan has no program 'g9'; it has g0") as caught:
        plan().choice("g9")
    assert caught.value.hint == "did you mean 'g0'?"
