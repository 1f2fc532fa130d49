"""Weights packed where a step does not fit: as few as do, tried before the model is changed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt import Budget, BudgetError, BudgetSyntaxError, InputsError, PipelineError, Plan, Report, _torch
from graphopt.packing import packed_weights
from tests.packing_cases import FEW, Chain, batches

Tensor = torch.Tensor
IDS = batches(1)[0]
PASSES = "normalize,functionalize,quantize-linear,read-packed,insert-checkpoints"
ALLOW = ("quantize-linear{schemes=[int8,few]}",)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def wide() -> Chain:
    """Weights that are more than what reads of them take beside."""
    return Chain(depth=2, width=128)


def held(model: nn.Module) -> int:
    return _torch.storage_bytes([*model.parameters(), *model.buffers()])


def optimized(model: nn.Module, **options: Any) -> Any:
    with torch.no_grad():
        return graphopt.optimize(
            model, IDS, **{"emit": "eager", "plugins": [FEW], "pipeline": PASSES, **options}
        )


def test_weights_are_packed_as_far_as_the_budget_asks() -> None:
    baseline = optimized(wide().eval()).plan.predicted
    errors = []
    for share in ("95%", "70%"):
        model = wide().eval()
        exact = model(*IDS)
        fast = optimized(model, budget=share, allow=ALLOW)
        report = fast.report
        assert report.baseline == baseline
        assert (
            report.predicted.peak_bytes <= report.budget == int(float(share[:-1]) / 100 * baseline.peak_bytes)
        )
        assert report.predicted.weight_bytes == held(model) == report.quantization.bytes_after
        assert fast.measure().peak_bytes <= report.budget
        assert len(packed_weights(model)) == len(report.quantization.packed) > 0
        assert fast.state_dict().keys() == model.state_dict().keys()
        with torch.no_grad():
            torch.testing.assert_close(fast(*IDS), model(*IDS), rtol=1e-4, atol=1e-4)
            assert not torch.equal(fast(*IDS), exact)
        errors.append(report.quantization.error)
        assert "weights packed:" in str(report)
        assert '<td class="t">layers.0.up.weight</td>' in report._repr_html_()
        (step,) = (step for step in report.steps if step.id == "quantize-linear")
        assert step.status == "applied" and "(relative squared error of weights)" in step.reason
    assert errors == sorted(errors) and errors[0] < errors[-1]


def test_nothing_is_packed_where_it_fits_without() -> None:
    model = wide().eval()
    fast = optimized(model, budget="100%", allow=ALLOW)
    assert not packed_weights(model) and fast.report.quantization is None
    (step,) = (step for step in fast.report.steps if step.id == "quantize-linear")
    assert (step.status, step.reason) == ("no-op", "the budget is met by weights as they are")
    exact = wide().eval()
    with torch.no_grad():
        assert torch.equal(fast(*IDS), exact(*IDS))


def test_the_error_without_it_names_the_pass() -> None:
    model = wide().eval()
    with pytest.raises(
        BudgetError, match=r"no plan fits (.|\n)*'quantize-linear' changes results and is not allowed"
    ):
        optimized(model, budget="50%")
    with pytest.raises(BudgetError) as caught:
        optimized(model, budget="5%")
    assert "quantize-linear" not in str(caught.value)
    assert not packed_weights(model)


def test_what_packing_cannot_reach_is_named_and_nothing_is_changed() -> None:
    model = wide().eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BudgetError, match="the least with all weights packed as int8, few is") as caught:
        optimized(model, budget="5%", allow=ALLOW)
    assert not packed_weights(model) and all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    fast = optimized(model, budget=caught.value.least_bytes, allow=ALLOW)
    assert fast.plan.predicted.peak_bytes <= caught.value.least_bytes


def test_a_bound_of_weights_alone() -> None:
    model = wide().eval()
    before = held(model)
    fast = optimized(model, budget=Budget(weights="35%"), allow=ALLOW)
    assert fast.plan.predicted.weight_bytes == held(model) <= 0.35 * before
    assert fast.plan.budget is None and fast.report.baseline.weight_bytes == before
    both = optimized(wide().eval(), budget=Budget("80%", weights="35%"), allow=ALLOW)
    assert both.plan.predicted.peak_bytes <= both.plan.budget
    assert both.plan.budget == int(0.8 * both.report.baseline.peak_bytes)
    met = optimized(wide().eval(), budget=Budget(weights="100%"))
    assert met.report.quantization is None
    with pytest.raises(BudgetSyntaxError, match="cannot read 'half' as bytes"):
        Budget(weights="half")
    with pytest.raises(BudgetError, match=r"parameters and buffers take (.|\n)*allow=\('quantize-linear',\)"):
        optimized(wide().eval(), budget=Budget(weights="35%"))
    with pytest.raises(
        BudgetError, match=r"the budget has .* for weights: packed as int8, few they take"
    ) as caught:
        optimized(wide().eval(), budget=Budget(weights="5%"), allow=ALLOW)
    again = optimized(wide().eval(), budget=Budget(weights=caught.value.least_bytes), allow=ALLOW)
    assert again.plan.predicted.weight_bytes == caught.value.least_bytes


def test_a_plan_is_made_without_touching_the_model_and_replayed() -> None:
    model = wide().eval()
    with torch.no_grad():
        plan = graphopt.plan(
            model, IDS, budget="60%", allow=ALLOW, emit="eager", pipeline=PASSES, plugins=[FEW]
        )
    assert not packed_weights(model) and plan.quantization is not None
    assert plan.quantization.summary in str(plan)
    stored = Plan.from_json(plan.to_json())
    assert stored == plan
    fast = optimized(model, plan=stored)
    assert held(model) == plan.quantization.bytes_after == fast.plan.predicted.weight_bytes
    # What is packed that way already is left as it is.
    again = optimized(model, plan=stored)
    with torch.no_grad():
        assert torch.equal(again(*IDS), fast(*IDS))
    old = {key: value for key, value in plan.to_json().items() if key != "quantization"}
    assert Plan.from_json(old).quantization is None
    told = Report.from_json(fast.report.to_json())
    assert told.quantization == plan.quantization


def test_it_happens_on_the_first_call_too_and_copies_are_packed() -> None:
    model = wide().eval()
    with torch.no_grad():
        fast = graphopt.optimize(
            model, budget="60%", allow=ALLOW, emit="eager", pipeline=PASSES, plugins=[FEW]
        )
        assert not packed_weights(model)
        result = fast(*IDS)
        assert packed_weights(model)
        for other in (copy.deepcopy(fast), copy.copy(fast)):
            assert torch.equal(other(*IDS), result)
            assert other.plan.budget == fast.plan.budget


def test_training_packs_what_is_frozen() -> None:
    model = wide().train()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() == 1)
    whole = graphopt.optimize(model, IDS, emit="eager", pipeline="read-packed,quantize-linear")
    budget = int(0.8 * whole.plan.predicted.peak_bytes)
    fast = graphopt.optimize(
        model, IDS, emit="eager", budget=budget, allow=("quantize-linear{schemes=[int8]}",)
    )
    assert fast.report.quantization is not None and fast.plan.predicted.peak_bytes <= budget
    fast(*IDS).sum().backward()
    assert model.norm.weight.grad is not None
    everything = wide().train()
    with pytest.raises(
        BudgetError, match=r"but no weight of the model can be packed: .* is trained; call model\.eval\(\)"
    ):
        graphopt.optimize(everything, IDS, emit="eager", budget="30%", allow=("quantize-linear",))


def test_calibration_and_score_are_options_of_the_pass(tmp_path: Path) -> None:
    path = tmp_path / "chain.calibration"
    graphopt.calibrate(wide().eval(), batches()).save(path)
    fast = optimized(
        wide().eval(), budget="70%", allow=(f'quantize-linear{{schemes=[int8],calibration="{path}"}}',)
    )
    assert fast.report.quantization.score == "outputs"
    fast = optimized(wide().eval(), budget="70%", allow=("quantize-linear{schemes=[int8],score=z-score}",))
    assert fast.report.quantization.score == "z-score"


def test_where_it_cannot_be_done_that_is_said() -> None:
    with pytest.raises(Exception, match=r"changes the model, which torch\.compile does not hand over"):
        torch.compile(
            wide().eval(), backend="graphopt", options={"budget": "50%", "allow": ("quantize-linear",)}
        )(*IDS)
    with pytest.raises(PipelineError, match="allow gives options to 'quantize-linear', which is not in"):
        optimized(wide().eval(), pipeline="read-packed", allow=ALLOW)
    with pytest.raises(InputsError, match="a bound of weights is met for single calls, not for step="):
        graphopt.optimize(wide(), budget=Budget(weights="50%"), step=lambda m: m(*IDS).sum().backward())


def test_a_model_that_cannot_be_copied_is_left_alone() -> None:
    class Stubborn(Chain):
        def __deepcopy__(self, memo: object) -> Any:
            raise RuntimeError("there is one of me")

    model = Stubborn(depth=1).eval()
    with pytest.raises(
        BudgetError, match=r"is allowed, but the model cannot be copied .* there is one of me"
    ):
        optimized(model, budget="60%", allow=ALLOW)
    assert not packed_weights(model)


def test_a_model_of_several_graphs() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = wide()
            self.out = nn.Linear(40, 40)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.inner(ids)
            torch._dynamo.graph_break()
            return self.out(x)

    model = Broken().eval()
    fast = optimized(model, budget="60%", allow=ALLOW)
    assert fast.report.quantization is not None and len(fast.report.programs) == 2
    assert fast.plan.predicted.peak_bytes <= fast.plan.budget
    assert fast.plan.predicted.weight_bytes == held(model)
