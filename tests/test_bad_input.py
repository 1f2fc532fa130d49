"""What a caller gets wrong: each message names the culprit, what was expected and the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import nn

import graphopt
from graphopt import Budget, Candidate, CostDelta
from graphopt.budget import format_bytes
from graphopt.errors import BudgetSyntaxError, InputsError, UnknownNameError


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        for layer in self.layers:
            x = nn.functional.silu(layer(x))
        return x * scale


X = (torch.ones(64, 8),)


def optimized(**options: Any) -> graphopt.Optimized:
    return graphopt.optimize(Chain(), X, emit="eager", **options)


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        ("8 gigs", "cannot read '8 gigs' as bytes: expected an int of bytes"),
        ("8", "units are B, kB, MB, GB, TB (powers of 1000) and KiB, MiB, GiB, TiB (powers of 1024)"),
        (0.6, 'a fraction of the baseline peak is written "60%"'),
        (True, "cannot read True as bytes"),
        (-5, "a budget must be positive, got -5"),
        ("0%", "a budget must be positive, got '0%'"),
        ([1], "cannot read [1] as bytes"),
    ],
)
def test_budgets_that_do_not_parse(budget: Any, text: str) -> None:
    with pytest.raises(BudgetSyntaxError) as caught:
        optimized(budget=budget)
    assert text in str(caught.value)


@pytest.mark.parametrize("reserve", ["90%", -1, 0.5, "some"])
def test_a_reserve_is_named(reserve: Any) -> None:
    with pytest.raises(BudgetSyntaxError) as caught:
        Budget("60%", reserve=reserve)
    assert f"cannot read reserve={reserve!r}: expected bytes to hold back, 0 or more" in str(caught.value)


def test_a_reserve_that_takes_all_is_refused() -> None:
    with pytest.raises(BudgetSyntaxError, match=r"the reserve \(1\.00 MiB\) leaves nothing of the budget"):
        optimized(budget=Budget("20KiB", reserve="1MiB"))


def test_budgets_in_every_form_mean_the_same() -> None:
    baseline = optimized().plan.baseline.peak_bytes
    bound = baseline * 8 // 10
    for budget in (
        bound,
        f"{bound}B",
        f"{bound / 1000}kB",
        Budget(bound),
        Budget(bound + 1000, reserve="1kB"),
    ):
        assert optimized(budget=budget).plan.budget == pytest.approx(bound, abs=1)
    assert optimized(budget="80%").plan.budget == int(0.8 * baseline)
    assert optimized(budget=Budget("80%", reserve=100)).plan.budget == int(0.8 * baseline) - 100
    assert optimized(budget=None).plan.budget is None


def test_an_impossible_budget_names_the_least_and_passes_that_failed() -> None:
    class Broken(graphopt.Pass):
        name = "broken"
        level = graphopt.Level.JOINT

        def propose(self, program: Any, ctx: Any) -> Any:
            raise ZeroDivisionError("no luck")

    with pytest.raises(graphopt.BudgetError) as caught:
        optimized(budget="1kB", pipeline=[Broken()])
    error = caught.value
    assert error.budget_bytes == 1000
    assert f"({error.least_bytes} bytes)" in error.message
    assert f"ask for budget={error.least_bytes} or more" in error.hint
    assert "pass broken failed: propose() raised ZeroDivisionError: no luck" in error.hint
    assert optimized(budget=error.least_bytes, pipeline=[Broken()]).plan.budget == error.least_bytes


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"device": "h1000"}, UnknownNameError, "unknown device 'h1000'; did you mean 'h100'?"),
        ({"device": "cuda"}, InputsError, "device is 'cuda': torch sees no CUDA device here"),
        ({"device": "cpu:x"}, InputsError, "device is 'cpu:x': Invalid device string"),
        ({"device": 3}, InputsError, "device is 3: expected a name such as 'h100', or a torch.device"),
        ({"emit": "inducter"}, UnknownNameError, "unknown emitter 'inducter'; did you mean 'inductor'?"),
        ({"verify": "numerical"}, UnknownNameError, "unknown value of verify 'numerical'; did you mean 'num"),
        ({"on_error": "rise"}, UnknownNameError, "unknown value of on_error 'rise'; did you mean 'raise'?"),
        ({"allow": ("insert",)}, UnknownNameError, "unknown pass 'insert'"),
        ({"allow": "normalize"}, InputsError, "allow is the text 'normalize': expected names of passes"),
        ({"pipeline": "defaults"}, UnknownNameError, "unknown pass or pipeline 'defaults'; did you mean 'de"),
        ({"loss_fn": 3}, InputsError, "loss_fn is 3: expected a function of the model's output"),
        ({"plan": "plan.json"}, InputsError, "read a stored one with graphopt.Plan.load(path)"),
        ({"buget": 1}, TypeError, "optimize() got an unexpected keyword argument 'buget'"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        graphopt.optimize(Chain(), X, **options)
    assert text in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a CUDA device")
def test_a_device_that_is_not_there() -> None:
    for device in ("cuda", "cuda:0", torch.device("cuda")):
        with pytest.raises(InputsError, match="torch sees no CUDA device here") as caught:
            graphopt.plan(Chain(), X, device=device)
        assert caught.value.hint == "name the one to plan for: a100, cpu, h100, h200, rtx4090"


def test_a_class_is_no_model() -> None:
    with pytest.raises(InputsError, match=r"model is the class Chain: expected a torch\.nn\.Module, not its"):
        graphopt.optimize(Chain, X)  # type: ignore[arg-type]


def test_dry_runs_say_who_was_called() -> None:
    with pytest.raises(TypeError, match=r"plan\(\) got an unexpected keyword argument 'buget'"):
        graphopt.plan(Chain(), X, buget=1)
    with pytest.raises(InputsError, match=r"pareto\(\) takes no budget=: it shows what every budget gives"):
        graphopt.pareto(Chain(), X, budget="60%")
    with pytest.raises(InputsError, match=r"plan\(\) needs inputs: a tuple of positional arguments"):
        graphopt.plan(Chain(), None)
    with pytest.raises(InputsError, match='verify="numeric" needs inputs: a tuple of positional arguments'):
        graphopt.optimize(Chain(), verify="numeric")


@pytest.mark.parametrize(
    ("loss_fn", "text"),
    [
        (lambda output: output, r"loss_fn returned shape \(64, 8\): expected a tensor of one element"),
        (lambda output: None, "loss_fn returned NoneType: expected a tensor of one element"),
    ],
)
def test_a_loss_that_is_no_number(loss_fn: Any, text: str) -> None:
    with pytest.raises(InputsError, match=text):
        optimized(loss_fn=loss_fn).measure()


def test_a_call_with_wrong_inputs_raises_what_the_model_raises(capfd: pytest.CaptureFixture[str]) -> None:
    fast = optimized(budget="80%")
    wrong = torch.ones(2, 5)
    with pytest.raises(RuntimeError) as expected:
        Chain()(wrong)
    with pytest.raises(RuntimeError) as raised:
        fast(wrong)
    assert type(raised.value) is RuntimeError
    assert str(raised.value) == str(expected.value)
    # The model goes on working, and nothing was written behind the caller's back.
    assert fast(*X).shape == (64, 8)
    assert capfd.readouterr() == ("", "")


def test_a_call_that_cannot_be_compiled_runs_as_it_did() -> None:
    class Counts(nn.Module):
        def forward(self, x: torch.Tensor, kind: str) -> torch.Tensor:
            return x * len(kind)

    fast = graphopt.optimize(Counts(), (torch.ones(2), "a"), emit="eager")
    # A new program for each word; dynamo makes eight of one model and then refuses.
    for count in range(1, 12):
        assert fast(torch.ones(2), "a" * count).tolist() == [count, count]
    (note,) = fast.report.diagnostics
    assert note.startswith("calls of other inputs run as they did: FailOnRecompileLimitHit")


def test_one_model_can_be_optimized_many_times() -> None:
    model = Chain()
    for percent in range(80, 100):
        fast = graphopt.optimize(model, X, budget=f"{percent}%", emit="eager")
        assert fast.report.diagnostics == ()
        assert fast.plan.predicted.peak_bytes <= (fast.plan.budget or 0)


def test_a_graph_module_is_a_model() -> None:
    traced = fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8), nn.Sigmoid()))
    fast = graphopt.optimize(traced, X, emit="eager")
    assert fast.report.diagnostics == ()
    assert torch.equal(fast(*X), traced(*X))


def _lossy(name: str, saved: int, level: graphopt.Level = graphopt.Level.SEMANTIC) -> graphopt.Pass:
    """A pass that would change results, and says what it would save at the first call of a program."""

    class Lossy(graphopt.Pass):
        exact = False

        def propose(self, program: Any, ctx: Any) -> Any:
            node = next(program.nodes()).name
            delta = CostDelta(peak_bytes=-saved, seconds=-1e-6, error=0.1)
            yield Candidate("less", name, (node,), delta, lambda edit: None, "lossy", "mean error")

    Lossy.name, Lossy.level = name, level
    return Lossy()


@pytest.mark.parametrize("level", [graphopt.Level.SEMANTIC, graphopt.Level.JOINT])
def test_an_impossible_budget_names_the_pass_that_would_reach_it(level: graphopt.Level) -> None:
    with pytest.raises(graphopt.BudgetError) as caught:
        optimized(budget=1000)
    least = caught.value.least_bytes
    passes = ["default", _lossy("squeeze", least, level), _lossy("pinch", 10, level)]
    with pytest.raises(graphopt.BudgetError) as caught:
        optimized(budget=1000, pipeline=passes)
    assert caught.value.least_bytes == least
    assert caught.value.hint == (
        f"ask for budget={least} or more; pass 'squeeze' changes results and is not allowed; it is predicted "
        f"to save {format_bytes(least)}, which would do: allow=('squeeze',)"
    )
    with pytest.raises(graphopt.BudgetError) as caught:
        optimized(budget=1000, pipeline=passes, allow=("squeeze",))
    assert "not allowed" not in caught.value.hint


def test_an_impossible_budget_names_passes_that_reach_it_together() -> None:
    with pytest.raises(graphopt.BudgetError) as caught:
        optimized(budget=1000, pipeline=["default", _lossy("a", 9000), _lossy("b", 12000), _lossy("c", -1)])
    least = caught.value.least_bytes
    assert 12000 < least - 1000 <= 21000
    assert caught.value.hint.endswith(
        f"; passes 'a', 'b' change results and are not allowed; together they are predicted to save "
        f"{format_bytes(21000)}, which would do: allow=('a', 'b')"
    )
    with pytest.raises(graphopt.BudgetError) as caught:
        optimized(budget=1000, pipeline=["default", _lossy("a", 100)])
    assert caught.value.hint == f"ask for budget={least} or more"


def test_a_loss_function_that_raises_is_named() -> None:
    fast = optimized(loss_fn=lambda output: output.loss)
    with pytest.raises(InputsError, match="loss_fn raised AttributeError: 'Tensor' object has no attribute"):
        fast.measure(X, repeats=1)


def test_a_picture_is_svg(tmp_path: Path) -> None:
    with pytest.raises(InputsError, match=r"cannot draw front\.png: the picture is SVG"):
        graphopt.pareto(Chain(), X, emit="eager").picture(tmp_path / "front.png")
