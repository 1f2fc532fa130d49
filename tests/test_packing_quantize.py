"""``graphopt.quantize``: scores, allocations under bounds, plans, exact bytes."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt import (
    BudgetError,
    BudgetSyntaxError,
    InputsError,
    QuantizationError,
    QuantizationPlan,
    StalePlanError,
    UnknownNameError,
    _torch,
)
from graphopt.packing import packed_weights
from graphopt.plugins import PluginHost, ScorerSpec, default_host
from tests.packing_cases import FEW, Chain, Few, Plugin, batches

Tensor = torch.Tensor
IDS = batches(1)[0]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def held(model: nn.Module) -> int:
    return _torch.storage_bytes([*model.parameters(), *model.buffers()])


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().sum() / b.square().sum())


# --- allocation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", ["60%", "35%", "20%"])
def test_bytes_are_those_planned_and_outputs_stay_near(share: str) -> None:
    model = Chain().eval()
    before, exact = held(model), model(*IDS)
    plan = graphopt.quantize(model, IDS, weights=share, schemes=("int8", "few"), plugins=[FEW])
    assert plan.bytes_before == before
    assert plan.bytes_after == held(model) <= float(share[:-1]) / 100 * before
    assert plan.gap == 0.0
    assert {c.weight: c.scheme for c in plan.packed} == {
        name: str(packed.scheme) for name, packed in packed_weights(model).items()
    }
    # Errors of weights add up, and go on through the residual stream.
    assert relative(model(*IDS), exact) < 10 * plan.error
    (table,) = (c for c in plan.choices if c.weight == "embed.weight")
    assert table.names == ("embed.weight", "head.weight")
    assert plan.report.splitlines()[-1].startswith(f"{len(plan.packed)} weights packed: ")


def test_the_predicted_static_bytes_are_the_buffers_own() -> None:
    model = Chain(width=31).eval()
    plan = graphopt.quantize(model, IDS, schemes=("few",), plugins=[FEW])
    fast = graphopt.optimize(model, IDS, emit="eager", plugins=[FEW])
    buffers = _torch.storage_bytes([p.packed() for p in packed_weights(model).values()])
    assert buffers == sum(choice.bytes_after for choice in plan.packed)
    assert fast.plan.predicted.weight_bytes == plan.bytes_after == held(model)


def test_less_error_is_bought_with_more_bytes() -> None:
    model = Chain().eval()
    options: dict[str, Any] = {"schemes": ("int8", "few"), "plugins": [FEW]}
    front = graphopt.weight_frontier(model, IDS, **options)
    sizes, errors = [p.bytes for p in front.points], [p.error for p in front.points]
    assert sizes == sorted(sizes) and errors == sorted(errors, reverse=True)
    assert errors[-1] == 0.0 and sizes[-1] == held(model)
    for point in (front.points[0], front.points[len(sizes) // 2]):
        plan = graphopt.quantize(model, IDS, weights=point.bytes, dry_run=True, **options)
        assert plan.error == pytest.approx(point.error) and plan.bytes_after <= point.bytes
    assert front.at(sizes[0] - 1) is None and front.at(sizes[1]) is front.points[1]
    assert not packed_weights(model)


def test_fewest_bytes_within_an_error() -> None:
    model = Chain().eval()
    options: dict[str, Any] = {"schemes": ("int8", "few"), "plugins": [FEW], "dry_run": True}
    every = graphopt.quantize(model, IDS, **options)
    assert {c.scheme for c in every.choices} == {"int8"}
    loose = graphopt.quantize(model, IDS, error=400 * every.error, **options)
    assert loose.error <= 400 * every.error and loose.bytes_after < every.bytes_after
    exact = graphopt.quantize(model, IDS, error=0.0, **options)
    assert not exact.packed and exact.bytes_after == exact.bytes_before
    both = graphopt.quantize(model, IDS, weights=every.bytes_after, error=every.error, **options)
    assert both.error <= every.error
    with pytest.raises(BudgetError, match="the least error of weights is"):
        graphopt.quantize(model, IDS, weights="20%", error=1e-9, **options)


def test_seconds_bound_what_reads_take() -> None:
    model = Chain().eval()
    options: dict[str, Any] = {"schemes": ("int8",), "device": "h100", "dry_run": True}
    every = graphopt.quantize(model, IDS, **options)
    assert every.seconds_before > 0 and every.seconds > 0
    least = min(every.seconds, every.seconds_before)
    plan = graphopt.quantize(model, IDS, seconds=max(every.seconds, every.seconds_before), **options)
    assert plan.seconds <= max(every.seconds, every.seconds_before)
    with pytest.raises(BudgetError, match="no allocation of int8 is within"):
        graphopt.quantize(model, IDS, seconds=least * 1e-3, **options)


def test_schemes_may_be_given_that_are_not_registered() -> None:
    model = Chain().eval()
    plan = graphopt.quantize(model, IDS, schemes=(Few(least=2),))
    assert {c.scheme for c in plan.packed} == {"few{least=2}"} and packed_weights(model)


def test_what_cannot_be_reached_is_named_with_the_least_bytes() -> None:
    model = Chain().eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        BudgetError, match=r"no allocation of int8 is within .* the least that weights"
    ) as caught:
        graphopt.quantize(model, IDS, weights="10%", schemes=("int8",))
    least = caught.value.least_bytes
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert graphopt.quantize(model, IDS, weights=least, schemes=("int8",)).bytes_after == least == held(model)


def test_weights_that_are_read_as_one_get_one_scheme() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16, bias=False), nn.Linear(16, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, torch.cat([self.a.weight, self.b.weight]))

    plugin = Plugin(Few)
    model, x = Joined().eval(), torch.randn(4, 16)
    # Taken by one of the two alone, the scheme is none for both.
    plan = graphopt.quantize(model, (x,), schemes=("few{least=9}", "int8"), plugins=[plugin], dry_run=True)
    assert [c.scheme for c in plan.choices] == ["int8", "int8"]
    exact = model(x)
    graphopt.quantize(model, (x,), schemes=("int8",))
    assert relative(model(x), exact) < 1e-3


def test_embeddings_take_schemes_of_rows_alone() -> None:
    from dataclasses import dataclass

    model = Chain().eval()
    rows = dataclass(frozen=True)(type("Rows", (Few,), {"name": "rows", "by_rows": True}))
    plan = graphopt.quantize(model, IDS, schemes=("few",), plugins=[FEW], dry_run=True)
    assert next(c for c in plan.choices if c.weight == "embed.weight").scheme == ""
    plan = graphopt.quantize(model, IDS, schemes=("rows",), plugins=[Plugin(rows)], dry_run=True)
    assert next(c for c in plan.choices if c.weight == "embed.weight").scheme == "rows"


# --- scores ------------------------------------------------------------------------------------------


def test_the_error_of_outputs_is_that_of_the_products() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(24, 16, bias=False)).eval()
    # Channels that depend on each other, and differ in size.
    x = torch.randn(300, 4) @ torch.randn(4, 24) * torch.logspace(-1, 1, 24)
    exact = model(x)
    call = {"observers": ("moments", "gram")}
    full = graphopt.calibrate(model, [(x,)], **call)  # type: ignore[arg-type]
    options: dict[str, Any] = {"schemes": ("few",), "plugins": [FEW]}
    told = graphopt.quantize(model, (x,), calibration=full, dry_run=True, **options)
    rough = graphopt.quantize(
        model, (x,), calibration=graphopt.calibrate(model, [(x,)]), dry_run=True, **options
    )
    assert told.metric == "relative squared error of outputs" and told.score == "outputs"
    graphopt.quantize(model, (x,), calibration=full, **options)
    assert told.error == pytest.approx(relative(model(x), exact), rel=1e-3)
    assert rough.error != pytest.approx(told.error, rel=1e-3)
    assert rough.error == pytest.approx(told.error, rel=5.0)


def test_every_scorer_orders_schemes_and_is_nothing_for_the_weight_itself() -> None:
    model = Chain().eval()
    observers = ("moments", "gradients", "relevance", "change", "curvature", "divergence")
    data = graphopt.calibrate(model, batches(), observers=observers)
    for name, scorer in default_host().scorers().items():
        options: dict[str, Any] = {"calibration": data, "score": name, "dry_run": True, "plugins": [FEW]}
        eight = graphopt.quantize(model, IDS, schemes=("int8",), **options)
        four = graphopt.quantize(model, IDS, schemes=("few",), **options)
        by_name = {c.weight: c.error for c in eight.choices}
        assert all(by_name[c.weight] <= c.error for c in four.packed), name
        assert eight.error > 0 and eight.metric == scorer.metric
        weight = model.layers[0].up.weight.detach()  # type: ignore[union-attr]
        assert scorer.score(weight, weight.clone(), data.of("layers.0.up.weight")) == 0.0


def test_scorers_are_plug_ins() -> None:
    def flat(weight: Tensor, unpacked: Tensor, statistics: object) -> float:
        return 1.0

    def bad(weight: Tensor, unpacked: Tensor, statistics: object) -> float:
        return math.nan

    plugin = Plugin(scorers=[ScorerSpec("flat", flat, "count"), ScorerSpec("bad", bad, "nothing")])
    model = Chain().eval()
    plan = graphopt.quantize(model, IDS, score="flat", plugins=[plugin], schemes=("int8",), dry_run=True)
    assert plan.error == len(plan.packed) == 7 and plan.metric == "count"
    with pytest.raises(QuantizationError, match=r"scorer 'bad' gives nan for embed\.weight as int8"):
        graphopt.quantize(model, IDS, score="bad", plugins=[plugin], schemes=("int8",))
    with pytest.raises(UnknownNameError, match="unknown scorer 'flta'; did you mean 'flat'"):
        PluginHost([plugin]).scorer("flta")


def test_calibration_that_does_not_fit_is_refused() -> None:
    model = Chain().eval()
    with pytest.raises(QuantizationError, match="score 'outputs' needs calibration data"):
        graphopt.quantize(model, IDS, score="outputs")
    data = graphopt.calibrate(model, batches(1))
    with pytest.raises(
        QuantizationError, match="score 'hessian' needs calibration with observer 'curvature'"
    ):
        graphopt.quantize(model, IDS, score="hessian", calibration=data)
    with pytest.raises(QuantizationError, match=r"of another model: .* has 16 inputs, it saw \(32,\)"):
        graphopt.quantize(Chain(width=16).eval(), IDS, calibration=data)
    other = nn.Sequential(nn.Linear(4, 4)).eval()
    with pytest.raises(QuantizationError, match=r"knows none of the weights, such as 0\.weight"):
        graphopt.quantize(other, (torch.ones(2, 4),), calibration=data)


def test_a_scheme_that_miscounts_its_bytes_is_named() -> None:
    from dataclasses import dataclass

    def short(self: Any, n: int, k: int, dtype: torch.dtype) -> int:
        return 1

    liar = dataclass(frozen=True)(type("Liar", (Few,), {"name": "liar", "stored_bytes": short}))
    with pytest.raises(QuantizationError, match=r"scheme liar packs .* its stored_bytes\(\) says 1"):
        graphopt.quantize(Chain().eval(), IDS, schemes=("liar",), plugins=[Plugin(liar)])


def test_a_scheme_that_needs_calibration_says_so_and_takes_what_it_found() -> None:
    model = Chain().eval()
    with pytest.raises(QuantizationError, match=r"no weight can be packed: .* as llm-int8: it needs calibra"):
        graphopt.quantize(model, IDS, schemes=("llm-int8",))
    plan = graphopt.quantize(Chain().eval(), IDS, schemes=("llm-int8", "int8"), dry_run=True)
    assert {choice.scheme for choice in plan.choices} <= {"", "int8"}
    data = graphopt.calibrate(model, batches(1))
    scheme = "llm-int8{threshold=0.0,most=0.1}"
    graphopt.quantize(model, IDS, schemes=(scheme,), calibration=data)
    found = {name: len(packed.packed()["columns"]) for name, packed in packed_weights(model).items()}
    assert found and all(found.values()), "a tenth of the channels of each"


# --- plans -------------------------------------------------------------------------------------------


def test_plans_are_stored_and_replayed(tmp_path: Path) -> None:
    model, twin = Chain().eval(), Chain().eval()
    plan = graphopt.quantize(model, IDS, weights="35%", schemes=("int8", "few"), plugins=[FEW])
    plan.save(tmp_path / "plan.json")
    again = QuantizationPlan.load(tmp_path / "plan.json")
    assert again == plan
    assert graphopt.quantize(twin, IDS, plan=again, plugins=[FEW]) is again
    torch.testing.assert_close(twin(*IDS), model(*IDS), rtol=0, atol=0)
    with pytest.raises(InputsError, match=r"plan= and weights="):
        graphopt.quantize(twin, IDS, plan=again, weights="30%")
    with pytest.raises(QuantizationError, match=r"can be packed: [0-9] are packed already"):
        graphopt.quantize(twin, IDS)


def test_stale_plans_say_what_differs(tmp_path: Path) -> None:
    plan = graphopt.quantize(Chain().eval(), IDS, schemes=("int8",), dry_run=True)
    trained = Chain().train()
    for model, message in (
        (Chain(width=16).eval(), r"embed.weight has shape \(40, 16\), the plan was made for \(40, 32\)"),
        (Chain(depth=2).eval(), r"layers.2.up.weight, which the plan packs, is not a weight of the model"),
        (trained, "embed.weight, which the plan packs, cannot be packed: it is trained"),
        (Chain().eval().double(), "embed.weight has dtype float64, the plan was made for float32"),
    ):
        if model is trained:
            model.norm.requires_grad_(False)
            model.layers.requires_grad_(False)
        with pytest.raises(StalePlanError, match=message):
            graphopt.quantize(model, IDS, plan=plan)
        assert not packed_weights(model)
    data = plan.to_json()
    for change, message in (
        ({"schema": "graphopt/quantization@0"}, "this graphopt reads 'graphopt/quantization@1'"),
        ({"choices": 3}, "malformed plan: plan.choices: expected a list"),
        ({"more": 1}, "malformed plan: plan: unknown field 'more'"),
    ):
        with pytest.raises(StalePlanError, match=message):
            QuantizationPlan.from_json({**data, **change})
    with pytest.raises(StalePlanError, match="not a plan for weights"):
        QuantizationPlan.from_json([])
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(StalePlanError, match="is not JSON"):
        QuantizationPlan.load(tmp_path / "x.json")
    assert json.loads(json.dumps(data)) == data


# --- bad input ---------------------------------------------------------------------------------------


def test_bad_arguments_are_named() -> None:
    model = Chain().eval()
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"weights": "a lot"}, BudgetSyntaxError, "cannot read 'a lot' as bytes"),
        ({"weights": "0%"}, BudgetSyntaxError, "a bound of weights must be positive"),
        ({"schemes": ("int9",)}, UnknownNameError, "unknown scheme 'int9'; did you mean 'int8'"),
        ({"schemes": "int8"}, QuantizationError, "schemes is the text 'int8': expected several"),
        ({"schemes": ()}, QuantizationError, "there is no scheme to pack weights with"),
        ({"score": "outptus"}, UnknownNameError, "unknown scorer 'outptus'; did you mean 'outputs'"),
        ({"device": "h1000"}, UnknownNameError, "unknown device 'h1000'"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            graphopt.quantize(model, IDS, **options)
    with pytest.raises(
        QuantizationError,
        match=r"no weight of the model can be packed: 0\.weight: it is trained\n.*call model\.eval\(\)",
    ):
        graphopt.quantize(nn.Sequential(nn.Linear(4, 4)).train(), (torch.ones(2, 4),))
    with pytest.raises(QuantizationError, match="it has no matrices"):
        graphopt.quantize(nn.LayerNorm(4).eval(), (torch.ones(2, 4),))


def test_weights_that_hold_no_numbers_stay_as_they_are() -> None:
    model = Chain().eval()
    with torch.no_grad():
        model.layers[1].up.weight[0, 0] = float("nan")  # type: ignore[union-attr,index]
    plan = graphopt.quantize(model, IDS, schemes=("int8",))
    assert next(c for c in plan.choices if c.weight == "layers.1.up.weight").scheme == ""
    assert len(plan.packed) == 6


def test_frozen_bases_of_trained_adapters_are_packed() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(16, 16)
            self.base.requires_grad_(False)
            self.a, self.b = nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.b(self.a(x))

    model = Adapted().train()
    plan = graphopt.quantize(model, (torch.randn(3, 16),), schemes=("int8",))
    assert [c.weight for c in plan.packed] == ["base.weight"]
    assert [(r.weight, r.reason) for r in plan.refused] == [
        ("a.weight", "it is trained"),
        ("b.weight", "it is trained"),
    ]
    model(torch.randn(3, 16)).sum().backward()
    assert model.a.weight.grad is not None
