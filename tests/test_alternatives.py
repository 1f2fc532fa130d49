"""Alternatives: each applied to a copy of its own, failures said, frontiers put together and replayed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import register_flop_formula

import graphopt
from graphopt.alternatives import Form, Grade, alternatives, coordinate_wise, united
from graphopt.budget import Budget
from graphopt.candidate import Candidate, CostDelta, Frontier, FrontierPoint
from graphopt.capture.chain import Segment
from graphopt.captured import Captured
from graphopt.edit import Edit
from graphopt.errors import BudgetError, CaptureError, GraphoptError, StalePlanError
from graphopt.passes import Pass
from graphopt.plans import Plan
from graphopt.program import Level, Program
from graphopt.schedule import Schedule
from graphopt.segmented import SegmentedStep
from graphopt.selection import choose
from tests.programs import context, proposing, semantic

aten = torch.ops.aten


def _make() -> Program:
    return semantic(lambda x, w: (x @ w).cos().sin(), torch.randn(4, 8), torch.randn(8, 8))


def _double(edit: Edit) -> None:
    old = edit.node("cos")
    edit.replace(old, edit.call_before(old, aten.sin.default, old.args))


def _break(edit: Edit) -> None:
    raise ZeroDivisionError("no chunks")


def candidate(name: str = "swap", **settings: object) -> Candidate:
    made = Candidate(name, "some-pass", ("cos",), CostDelta(), _double, alternative=True)
    return replace(made, **settings)  # type: ignore[arg-type]


def offered(
    *candidates: Candidate, allow: tuple[str, ...] = (), **settings: object
) -> tuple[list[tuple[str, list[str]]], list[str]]:
    step = proposing(lambda p, c: list(candidates), **settings)  # type: ignore[arg-type]
    said: list[str] = []

    def failed(text: str, error: GraphoptError) -> None:
        said.append(text)

    found = alternatives(_make, [step], context(allow=allow), failed)
    return [(c.id, [node.name for node in program.nodes()]) for c, program in found], said


def test_each_alternative_is_applied_to_a_copy_of_its_own() -> None:
    found, said = offered(candidate(), candidate("again"), candidate("plain", alternative=False))
    assert found == [
        ("swap", ["matmul", "sin_default", "sin"]),
        ("again", ["matmul", "sin_default", "sin"]),
    ]
    assert not said


def test_what_fails_is_said_and_left_out() -> None:
    found, said = offered(candidate("bad", apply=_break), candidate())
    assert [name for name, _ in found] == ["swap"]
    assert len(said) == 1
    assert said[0].endswith("alternative bad was left out: bad: apply() raised ZeroDivisionError: no chunks")


def test_a_lossy_alternative_needs_to_be_allowed() -> None:
    lossy = candidate(exactness="lossy", metric="relative error", delta=CostDelta(error=0.1))
    assert offered(lossy, exact=False)[0] == []
    assert [name for name, _ in offered(lossy, exact=False, allow=("some-pass",))[0]] == ["swap"]


def test_the_planner_alone_decides_on_alternatives() -> None:
    gains = candidate(delta=CostDelta(seconds=-1.0))
    step = proposing(lambda p, c: ())
    assert choose(step, [gains], context(), budgeted=True) == ([], [])


def point(peak: int, seconds: float, retained: int = 0) -> FrontierPoint:
    return FrontierPoint(Schedule(("a",), (), ()), peak, peak, retained, 0, seconds)


def test_times_count_from_the_program_itself() -> None:
    own = Frontier("p", (point(10, 0.0), point(6, 2.0)), 5, lambda budget: 1.0)
    other = Frontier("q", (point(4, 0.0),), 3, lambda budget: 0.0)
    both = united({"": (own, 7.0), "chunk": (other, 8.5)})
    found = [(p.alternative, p.peak_bytes, p.seconds) for p in both.points]
    assert found == [("chunk", 4, 1.5), ("", 10, 0.0)]
    assert both.floor_bytes == 3
    assert both.seconds_bound(0) == 1.0
    assert both.pass_id == "p"


def test_a_point_is_kept_for_what_it_retains_alone() -> None:
    own = Frontier("p", (point(10, 0.0, retained=8),))
    other = Frontier("q", (point(12, 0.0, retained=2),))
    assert len(united({"": (own, 1.0), "x": (other, 2.0)}).points) == 2


@torch.library.custom_op("tests::halved_product_loss", mutates_args=())
def halved_product_loss(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The mean square of ``x @ w.t()`` without all of the product at once."""
    total = sum((part @ w.t()).square().sum() for part in x.chunk(8))
    return torch.as_tensor(total) / (x.shape[0] * w.shape[0])


@halved_product_loss.register_fake
def _(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x.new_empty(())


@torch.library.custom_op("tests::halved_product_gradient", mutates_args=())
def halved_product_gradient(
    grad: torch.Tensor, x: torch.Tensor, w: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the above, piece by piece as well."""
    scale = 2 * grad / (x.shape[0] * w.shape[0])
    dx, dw = torch.empty_like(x), torch.zeros_like(w)
    for part, out in zip(x.chunk(8), dx.chunk(8), strict=True):
        product = part @ w.t() * scale
        out.copy_(product @ w)
        dw += product.t() @ part
    return dx, dw


@halved_product_gradient.register_fake
def _(grad: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(w)


@register_flop_formula([torch.ops.tests.halved_product_loss, torch.ops.tests.halved_product_gradient])
def _flops(*shapes, out_shape=None, **settings) -> int:
    """Said to be so much arithmetic that only a budget makes it worth while."""
    return 10**11


torch.library.register_autograd(
    "tests::halved_product_loss",
    lambda ctx, grad: halved_product_gradient(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@dataclass(frozen=True)
class HalveProduct(Pass):
    """Offers the operator above for ``linear(x, w).square().mean()``."""

    name: ClassVar[str] = "halve-product"
    level: ClassVar[Level] = Level.SEMANTIC

    def propose(self, program: Program, ctx):
        for mean in program.nodes(aten.mean.default):
            square = mean.args[0]
            product = square.args[0]

            def apply(edit: Edit, place: str = mean.name, args: tuple[str, ...] = ()) -> None:
                old = edit.node(place)
                linear = old.args[0].args[0]
                x, w = linear.args[:2]
                flat = edit.call_before(old, aten.reshape.default, (x, [-1, 32]))
                loss = torch.ops.tests.halved_product_loss.default
                edit.replace(old, edit.call_before(old, loss, (flat, w)))

            nodes = (product.name, square.name, mean.name)
            yield Candidate(f"halve:{mean.name}", self.name, nodes, CostDelta(), apply, alternative=True)


class Wide(nn.Module):
    """A few blocks and a wide product at the end: its result is most of the memory."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.wide = nn.Linear(32, 4096, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.relu(block(x))
        return self.wide(x).square().mean()


class Plugin:
    """Registers the pass."""

    graphopt_api = 1

    @graphopt.hookimpl
    def graphopt_passes(self):
        return [HalveProduct]


def optimized(**settings) -> graphopt.Optimized:
    torch.manual_seed(0)
    return graphopt.optimize(
        Wide(),
        (torch.randn(512, 32),),
        emit="inductor",
        on_error="raise",
        plugins=(Plugin(),),
        pipeline="halve-product,insert-checkpoints",
        **settings,
    )


@pytest.fixture(scope="module")
def roomy() -> graphopt.Optimized:
    return optimized(budget="16GiB")


@pytest.fixture(scope="module")
def tight(roomy: graphopt.Optimized) -> graphopt.Optimized:
    # Below the whole product and its gradient, above an eighth of it.
    return optimized(budget=int(0.5 * roomy.report.baseline.peak_bytes))


def test_the_planner_takes_an_alternative_only_where_the_budget_needs_it(
    roomy: graphopt.Optimized, tight: graphopt.Optimized
) -> None:
    assert {choice.alternative for choice in roomy.plan.choices} == {""}
    (taken,) = {choice.alternative for choice in tight.plan.choices} - {""}
    assert taken.startswith("halve:")
    assert f"with {taken}" in str(tight.plan)


def test_values_are_the_models_and_the_budget_is_kept(
    roomy: graphopt.Optimized, tight: graphopt.Optimized
) -> None:
    torch.manual_seed(1)
    x = torch.randn(512, 32)
    results = []
    for module in (roomy, tight):
        module.zero_grad()
        loss = module(x)
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in module.parameters()]))
    torch.testing.assert_close(results[0], results[1])
    assert tight.report.predicted.peak_bytes <= tight.plan.budget


def test_a_plan_with_an_alternative_is_replayed_and_refused_without_its_pass(
    tight: graphopt.Optimized,
) -> None:
    again = optimized(plan=tight.plan)
    assert [c.alternative for c in again.plan.choices] == [c.alternative for c in tight.plan.choices]
    with pytest.raises(StalePlanError, match="which no pass offers here: there is none"):
        graphopt.optimize(Wide(), (torch.randn(512, 32),), emit="inductor", on_error="raise", plan=tight.plan)


def test_a_compiled_plan_that_is_replayed_searches_nothing_and_traces_its_forms_alone(
    roomy: graphopt.Optimized, tight: graphopt.Optimized, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    usual = SegmentedStep._see

    def see(step: SegmentedStep, kind: Captured, segment: Segment) -> None:
        seen.append(f"{kind.name} {kind.form}".strip())
        usual(step, kind, segment)

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("the plan says which schedule runs")

    (form,) = {choice.alternative for choice in tight.plan.choices}
    monkeypatch.setattr(SegmentedStep, "_see", see)
    for first, forms in ((roomy, ["g0.whole0"]), (tight, ["g0.whole0", f"g0.whole0 {form}"])):
        seen.clear()
        with monkeypatch.context() as patch:
            patch.setattr("graphopt_passes.insert_checkpoints.search", never)
            again = optimized(plan=first.plan)
        assert seen == forms
        told = replace(first.plan, budget_bytes=None, seconds_to_plan=0.0)
        assert replace(again.plan, seconds_to_plan=0.0) == told
        assert again.report.rewrites == first.report.rewrites
        # Whoever asks for all schedules has them looked for.
        plan, report = again.plan, str(again.report)
        shown = [(point.peak_bytes, point.label) for point in again.frontier()]
        assert shown == [(point.peak_bytes, point.label) for point in first.frontier()]
        assert len(shown) > 1 and len(seen) == len(forms) + 2
        assert again.plan is plan and str(again.report) == report


@pytest.mark.parametrize("emit", ["eager", "inductor"])
def test_a_plan_is_refused_where_it_names_what_is_not_there(
    tight: graphopt.Optimized, eager: graphopt.Optimized, emit: str
) -> None:
    def again(plan: Plan, **settings: object) -> graphopt.Optimized:
        torch._dynamo.reset()
        return op_by_op(plan=plan, **settings) if emit == "eager" else optimized(plan=plan, **settings)

    plan = eager.plan if emit == "eager" else tight.plan
    (choice,) = plan.choices
    with pytest.raises(
        StalePlanError, match="with 'halve:none', which no pass offers here: there is halve:mean"
    ):
        again(replace(plan, choices=(replace(choice, alternative="halve:none"),)))
    with pytest.raises(
        StalePlanError, match=f"has fingerprint {choice.fingerprint}, the plan was made for other"
    ):
        again(replace(plan, choices=(replace(choice, fingerprint="other"),)))
    if emit == "inductor":
        with pytest.raises(BudgetError, match=r"no plan fits 1\.00 KiB: the least that fits is 1\.33 MiB"):
            again(plan, budget="1KiB")


def test_the_report_says_what_was_offered_and_taken(tight: graphopt.Optimized) -> None:
    text = str(tight.report)
    (taken,) = {choice.alternative for choice in tight.plan.choices} - {""}
    where = [choice.program for choice in tight.plan.choices if choice.alternative]
    assert f"rewritten: {taken} in {', '.join(where)}" in text
    assert "1 alternative for the planner" in text


def op_by_op(**settings) -> graphopt.Optimized:
    torch.manual_seed(0)
    torch._dynamo.reset()
    chosen = {"plugins": (Plugin(),), "pipeline": "halve-product,insert-checkpoints", **settings}
    return graphopt.optimize(Wide(), (torch.randn(512, 32),), emit="eager", on_error="raise", **chosen)


@pytest.fixture(scope="module")
def eager() -> graphopt.Optimized:
    return op_by_op(budget="50%")


def test_op_by_op_an_alternative_is_taken_where_the_budget_needs_it(eager: graphopt.Optimized) -> None:
    assert [choice.alternative for choice in op_by_op(budget="16GiB").plan.choices] == [""]
    (taken,) = (choice.alternative for choice in eager.plan.choices)
    assert taken.startswith("halve:")
    assert f"rewritten: {taken} in g0" in str(eager.report)
    assert "1 alternative for the planner" in str(eager.report)


def test_op_by_op_what_is_predicted_is_of_the_alternative(eager: graphopt.Optimized) -> None:
    budget = eager.plan.budget
    assert budget is not None and eager.plan.predicted.peak_bytes <= budget
    assert eager.measure((torch.randn(512, 32),), repeats=1).peak_bytes <= budget
    # The alternative's arithmetic is counted, not the program's.
    assert eager.plan.predicted.flops >= 2 * 10**11


def test_op_by_op_values_are_the_models(eager: graphopt.Optimized) -> None:
    torch.manual_seed(1)
    x = torch.randn(512, 32)
    torch.manual_seed(0)
    plain = Wide()
    results = []
    for module in (plain, eager):
        module.zero_grad()
        loss = module(x)
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in module.parameters()]))
    torch.testing.assert_close(results[1], results[0])


def test_op_by_op_inference_is_weighed_as_well() -> None:
    torch.manual_seed(0)
    module, x = Wide().eval(), torch.randn(512, 32)
    settings = {"plugins": (Plugin(),), "pipeline": "halve-product", "on_error": "raise", "emit": "eager"}
    torch._dynamo.reset()
    with torch.no_grad():
        within = graphopt.optimize(module, (x,), budget="50%", **settings)
        torch.testing.assert_close(within(x), module(x))
    assert [choice.alternative for choice in within.plan.choices] == ["halve:mean"]


def test_op_by_op_a_plan_with_an_alternative_is_replayed() -> None:
    plan = op_by_op(budget="50%").plan
    again = op_by_op(plan=plan).plan
    assert again.choices == plan.choices
    assert again.choices[0].alternative
    assert again.predicted.peak_bytes == plan.predicted.peak_bytes
    with pytest.raises(StalePlanError, match="which no pass offers here: there is none"):
        op_by_op(plan=plan, plugins=(), pipeline="insert-checkpoints")


def test_op_by_op_a_plan_that_is_replayed_searches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = op_by_op(budget="50%")

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("the plan says which schedule runs")

    with monkeypatch.context() as patch:
        patch.setattr("graphopt_passes.insert_checkpoints.search", never)
        again = op_by_op(plan=fast.plan)
    assert again.plan.choices == fast.plan.choices and again.plan.predicted == fast.plan.predicted
    # Whoever asks for all schedules has them looked for.
    shown = [(point.peak_bytes, point.label) for point in again.frontier()]
    assert len(shown) > 1 and again.plan.choices == fast.plan.choices


def test_op_by_op_what_was_not_taken_is_open_again_under_another_budget() -> None:
    roomy = op_by_op(budget="16GiB").plan
    fast = op_by_op(budget="50%")
    session, tight = fast._driver.session, fast.plan
    assert tight.choices[0].alternative
    session.plan_again(Budget.of("16GiB"))
    free = fast.plan
    assert [choice.alternative for choice in free.choices] == [""]
    assert free.predicted == roomy.predicted
    test_op_by_op_values_are_the_models(fast)
    session.plan_again(Budget.of("50%"))
    assert fast.plan.choices == tight.choices and fast.plan.predicted == tight.predicted
    test_op_by_op_values_are_the_models(fast)


def test_what_cannot_be_planned_again_is_told(tight: graphopt.Optimized) -> None:
    session = tight._driver.session
    name, budget = session.current[0].name, session.budget
    with pytest.raises(CaptureError, match=rf"^no plan can be made again: program '{name}' is planned by "):
        session.plan_again(Budget.of(None))
    with pytest.raises(CaptureError, match=r"^no plan can be made again: nothing was captured"):
        graphopt.optimize(Wide(), emit="eager")._driver.session.plan_again(Budget.of(None))
    assert session.budget is budget


@pytest.mark.parametrize("emit", ["eager", "inductor"])
def test_alternatives_of_several_graphs_are_weighed_together(emit: str) -> None:
    class Broken(Wide):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.tanh(x)
            torch._dynamo.graph_break()
            return super().forward(h)

    torch.manual_seed(0)
    module, inputs = Broken(), (torch.randn(512, 32),)

    def made(**options: object) -> graphopt.Optimized:
        torch._dynamo.reset()
        settings = {"plugins": (Plugin(),), "pipeline": "halve-product", "on_error": "raise", "emit": emit}
        return graphopt.optimize(module, inputs, **settings | options)

    free = made()
    assert "1 alternative for the planner" in str(free.report)
    assert all(not choice.alternative for choice in free.plan.choices)
    within = made(budget="70%")
    assert [choice.alternative for choice in within.plan.choices] == ["", "halve:mean"]
    assert within.plan.predicted.peak_bytes <= within.plan.budget < free.plan.predicted.peak_bytes
    torch.testing.assert_close(within(*inputs), module(*inputs))
    again = made(plan=within.plan)
    assert again.plan.choices == within.plan.choices
    assert again.plan.predicted.peak_bytes == within.plan.predicted.peak_bytes


def looked_at(
    *passes: Pass, peaks: dict[str, int | None], least: int = 100
) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """Names of the forms that are looked at, with the calls of each, where they reach ``peaks``."""
    seen: list[tuple[str, list[str]]] = []
    said: list[str] = []

    def look(form: Form) -> Grade | None:
        seen.append((form.name, [str(node.target) for node in form.program.nodes()]))
        peak = peaks.get(form.name, least)
        return None if peak is None else Grade(True, 0.0, peak)

    own = Grade(True, 0.0, least)
    left = coordinate_wise(_make(), passes, context(), lambda text, error: said.append(text), look, own)
    assert left == []
    return seen, said


def test_where_a_form_fits_what_takes_longer_is_not_looked_at() -> None:
    first = proposing(
        lambda p, c: [
            _swapping("a", "cos", aten.tan.default, peak_bytes=-5, seconds=1.0),
            _swapping("b", "cos", aten.exp.default, peak_bytes=-9, seconds=2.0),
            _swapping("c", "cos", aten.neg.default, peak_bytes=-11, seconds=2.5),
        ]
    )
    second = replace_pass_id(
        proposing(
            lambda p, c: [
                _swapping("d", "sin", aten.neg.default, seconds=0.5),
                _swapping("e", "sin", aten.abs.default, peak_bytes=-1, seconds=0.6),
            ],
            name="other-pass",
        )
    )
    seen: list[str] = []

    def look(form: Form) -> Grade:
        seen.append(form.name)
        return {"a": Grade(False, 2.0, 90), "b": Grade(False, 2.1, 80)}.get(form.name, Grade(False, 1.5, 90))

    left = coordinate_wise(_make(), [first, second], context(), _unexpected, look, Grade(True, 0.0, 100))
    # "b" takes as long as the best so far before anything runs again: it may be leaner.
    assert seen == ["a", "b", "a+d"]
    assert [offer.id for offer in left] == ["c", "e"]


def _unexpected(text: str, error: GraphoptError) -> None:
    raise AssertionError(text)


def test_what_fits_is_better_than_what_is_smaller() -> None:
    frontier = Frontier("p", (point(4, 3.0), point(10, 1.0), point(9, 1.0)))
    fits = Grade.of(frontier, 0.5, 10)
    assert fits == Grade(False, 1.5, 9)
    assert Grade.of(frontier, 0.5, 4) == Grade(False, 3.5, 4)
    assert Grade.of(frontier, 0.5, 3) == Grade.of(frontier, 9.0, None) == Grade(True, 0.0, 4)
    assert fits < Grade.of(frontier, 0.5, 4) < Grade.of(frontier, 0.5, 3)
    assert fits.may_gain_from(1.5) and not fits.may_gain_from(1.6)
    assert Grade(True, 0.0, 4).may_gain_from(100.0)


def _swapping(name: str, place: str, target: object, **delta: float) -> Candidate:
    def swap(edit: Edit) -> None:
        old = edit.node(place)
        edit.replace(old, edit.call_before(old, target, old.args))

    return candidate(name, apply=swap, nodes=(place,), delta=CostDelta(**delta))  # type: ignore[arg-type]


def test_each_pass_is_tried_on_top_of_the_best_of_those_before() -> None:
    first = proposing(
        lambda p, c: [
            _swapping("a", "cos", aten.tan.default, peak_bytes=-5, seconds=1.0),
            _swapping("b", "cos", aten.exp.default, peak_bytes=-9, seconds=2.0),
        ]
    )
    second = proposing(lambda p, c: [_swapping("c", "sin", aten.neg.default)], name="other-pass")
    second = replace_pass_id(second)
    found, said = looked_at(first, second, peaks={"b": 60, "a": 50, "a+c": 40})
    assert not said
    assert found == [
        ("a", ["aten.matmul.default", "aten.tan.default", "aten.sin.default"]),
        ("b", ["aten.matmul.default", "aten.exp.default", "aten.sin.default"]),
        ("a+c", ["aten.matmul.default", "aten.tan.default", "aten.neg.default"]),
    ]


def replace_pass_id(step: Pass) -> Pass:
    """The pass with its candidates under its own name."""
    inner = type(step).propose

    def propose(self: Pass, program: Program, ctx: object) -> list[Candidate]:
        return [replace(c, pass_id=self.name) for c in inner(self, program, ctx)]  # type: ignore[arg-type]

    type(step).propose = propose  # type: ignore[assignment,method-assign]
    return step


def test_what_frees_nothing_is_no_ground_for_what_follows() -> None:
    first = proposing(lambda p, c: [_swapping("a", "cos", aten.tan.default)])
    second = replace_pass_id(
        proposing(lambda p, c: [_swapping("c", "sin", aten.neg.default)], name="other-pass")
    )
    assert [name for name, _ in looked_at(first, second, peaks={"a": 100})[0]] == ["a", "c"]
    assert [name for name, _ in looked_at(first, second, peaks={"a": None})[0]] == ["a", "c"]


def test_of_many_offers_a_few_are_looked_at() -> None:
    offers = [
        _swapping(f"k{k}", "cos", aten.tan.default, peak_bytes=-100 // k, seconds=-k) for k in range(1, 10)
    ]
    worse = _swapping("worse", "cos", aten.exp.default, peak_bytes=-20, seconds=5.0)
    step = proposing(lambda p, c: [worse, *offers])
    assert [name for name, _ in looked_at(step, peaks={})[0]] == ["k9", "k5", "k1"]


def test_a_family_is_weighed_as_one() -> None:
    family = [
        replace(_swapping(f"at-{place}/{k}", place, target), family=f"all/{k}")
        for place, target in (("cos", aten.tan.default), ("sin", aten.neg.default))
        for k in (2, 4)
    ]
    found, said = offered(*family)
    calls = ["matmul", "tan_default", "neg_default"]
    assert found == [("all/2", calls), ("all/4", calls)]
    assert not said
