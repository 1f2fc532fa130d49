"""Gradients of what dynamo captures are compared with the model's own before it is used."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import graphopt
from graphopt import _torch
from graphopt.capture import faithful_gradients
from graphopt.capture.faithful import Comparison
from graphopt.capture.faithful_gradients import PART, gradients_compared, no_room, roots_of
from graphopt.cost import Cost
from graphopt.errors import CaptureError
from tests.test_capture_faithful import HeldBefore, filled

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


def optimized(model: nn.Module, x: torch.Tensor = X, **options: Any) -> graphopt.Optimized:
    torch._dynamo.reset()
    return graphopt.optimize(model, (x,), emit="eager", cache=False, **options)


def compared(fast: graphopt.Optimized) -> bool:
    return not any("not compared" in note for note in fast.report.diagnostics)


def against(model: nn.Module, capture: Callable[..., Any], x: torch.Tensor = X) -> Comparison:
    """``capture`` against ``model``."""
    return gradients_compared(model, capture, (x,), {}, (), filled(capture))


class Net(nn.Module):
    def __init__(self, *, breaks: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.breaks = breaks

    def middle(self, h: torch.Tensor) -> torch.Tensor:
        return h

    def forward(self, x: torch.Tensor) -> Any:
        h = self.middle(self.norm(self.a(x)).relu())
        if self.breaks:
            torch._dynamo.graph_break()
        return self.b(h)


class Lost(Net):
    """Loses part of a gradient under the compiler: outputs are the same."""

    def __init__(self, lost: float = 1.0, *, breaks: bool = False) -> None:
        super().__init__(breaks=breaks)
        self.lost = lost

    def middle(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.lost * (h.detach() - h) if torch.compiler.is_compiling() else h


class Doubled(torch.autograd.Function):
    """Its gradient is another when its backward is traced."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * (2 if torch.compiler.is_compiling() else 1)


class Stated(Net):
    def middle(self, h: torch.Tensor) -> torch.Tensor:
        return Doubled.apply(h)  # type: ignore[no-any-return]


class LosesLoss(Lost):
    def forward(self, x: torch.Tensor) -> Any:
        y = super().forward(x)
        return {"loss": y.square().mean(), "logits": y}


REFUSED = "gradients of what was captured were not compared with the model's"
WRONG = "compiled, the model computes something else than it does op by op: the gradient of "


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize(
    ("make", "share"),
    [(lambda: Lost(1.0), "100%"), (lambda: Lost(2.4e-4), "0.024%"), (Stated, "100%"), (LosesLoss, "100%")],
)
def test_a_model_whose_gradients_are_others_compiled_runs_as_it_did(
    make: Callable[[], Net], share: str, breaks: bool
) -> None:
    model = make()
    model.breaks = breaks
    fast = optimized(model)
    (note,) = (text for text in fast.report.diagnostics if "runs as it did" in text)
    assert WRONG in note and note.endswith(f" differs by {share} of its norm")
    # Whichever of those below the fault is off most.
    assert any(f"{name!r}" in note for name in ("a.weight", "a.bias", "norm.weight", "norm.bias"))
    assert fast.report.plan is None
    total = lambda y: (y["loss"] if isinstance(y, dict) else y).square().sum()  # noqa: E731
    weights = list(model.parameters())
    found = torch.autograd.grad(total(fast(X)), weights)
    assert all(map(torch.equal, found, torch.autograd.grad(total(model(X)), weights)))


def test_the_loss_that_is_given_is_differentiated() -> None:
    class Two(Lost):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x), self.b(x)

    assert optimized(Two(), loss_fn=lambda y: y[1].sum()).report.plan is not None
    fast = optimized(Two(), loss_fn=lambda y: y[0].square().sum())
    assert fast.report.plan is None and WRONG in fast.report.diagnostics[0]


def test_it_is_an_error_where_errors_are_raised() -> None:
    with pytest.raises(CaptureError, match=r"op by op: the gradient of '.*' differs by 100% of its norm"):
        optimized(Lost(), on_error="raise")


@pytest.mark.parametrize(
    "options", [{"verify": "off"}, {"budget": 4096 * 2}], ids=["verification off", "no room"]
)
def test_nothing_is_compared_where_that_is_not_wanted_or_does_not_fit(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wide(Lost):
        """Squares of what the budget has no room for, which can be computed again."""

        def middle(self, h: torch.Tensor) -> torch.Tensor:
            for _ in range(12):
                h = h.sin().cos()
            return super().middle(h)

    monkeypatch.setattr(faithful_gradients, "free_on_host", lambda: 1000)
    fast = optimized(Wide(), **options)
    assert fast.report.plan is not None
    notes = [text for text in fast.report.diagnostics if "gradients" in text]
    if "budget" in options:
        (note,) = notes
        assert note.startswith(f"{REFUSED}: a step of the model as it is takes ")
        assert note.endswith(", which does not fit the budget, and 1000 B are free")
    else:
        assert not notes


def test_nothing_is_differentiated_in_inference() -> None:
    fast = optimized(Lost().eval())
    assert fast.report.plan is not None and not fast.report.diagnostics


def test_a_gradient_of_an_input_is_compared() -> None:
    class Read(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.detach() * 2 if torch.compiler.is_compiling() else x * 2

    fast = optimized(Read(), X.clone().requires_grad_())
    assert fast.report.plan is None
    assert f"{WRONG}'input 0' differs by 100% of its norm" in fast.report.diagnostics[0]


class Dropping(Net):
    def middle(self, h: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(h, 0.5, self.training)


class Counting(Net):
    """Normalizes by batches, keeps statistics and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = nn.BatchNorm1d(8)
        self.calls = 0

    def middle(self, h: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.batches(h)


class Looking(Net):
    """A hook on a value changes its gradient."""

    def middle(self, h: torch.Tensor) -> torch.Tensor:
        if h.requires_grad:
            h.register_hook(lambda gradient: gradient * 2)
        return h


class Frozen(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a.requires_grad_(False)
        self.norm.bias.requires_grad_(False)


class Rounded(Net):
    """Differs by a digit when compiled."""

    def middle(self, h: torch.Tensor) -> torch.Tensor:
        return h * (1 + 2.0**-23) if torch.compiler.is_compiling() else h


class Sensitive(Rounded):
    """Of its gradients not one digit is certain, of its outputs most are."""

    def middle(self, h: torch.Tensor) -> torch.Tensor:
        return h + 1e-7 * torch.sin(1e7 * super().middle(h))


class Again(Net):
    """Part of it runs again in the backward, with the numbers that it drew."""

    def middle(self, h: torch.Tensor) -> torch.Tensor:
        return checkpoint(  # type: ignore[no-any-return]
            lambda h: nn.functional.dropout(h.sin(), 0.5), h, use_reentrant=False
        )


class Centred(Net):
    """The gradient of a bias is zero but for rounding, which is another under the compiler."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.batches = nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False)

    def forward(self, x: torch.Tensor) -> Any:
        h = self.first(x * (1 + 2.0**-23) if torch.compiler.is_compiling() else x)
        return super().forward(self.batches(h))


SAME = [Net, Dropping, Counting, Looking, Frozen, Rounded, Sensitive, Again, Centred]


@pytest.mark.parametrize("make", SAME)
def test_a_model_whose_gradients_are_the_same_is_planned_and_left_as_it_was(
    make: Callable[[], nn.Module],
) -> None:
    model = make()
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained[:2]:
        p.grad = torch.full_like(p, 3.0)
    values = [(t, t.detach().clone(), t._version) for t in (*model.parameters(), *model.buffers())]
    gradients = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    before = torch.get_rng_state()
    fast = optimized(model)
    assert fast.report.plan is not None and compared(fast)
    assert torch.equal(torch.get_rng_state(), before)
    for tensor, value, version in values:
        assert torch.equal(tensor, value)
        assert tensor._version == version or not isinstance(tensor, nn.Parameter)
    for parameter, gradient, number in gradients:
        assert parameter.grad is gradient
        assert number is None or torch.equal(parameter.grad, number)
        assert not parameter._backward_hooks and not parameter._post_accumulate_grad_hooks
    if isinstance(model, Counting):
        assert model.calls == 0


def test_all_of_a_large_gradient_is_compared() -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(PART + 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.w * x

    model, x = Large(), torch.ones(PART + 3)
    assert against(model, model, x).difference == ""
    last = torch.ones(PART + 3).index_fill(0, torch.tensor([PART + 2]), 100.0)
    result = against(model, lambda x: model(x * last), x)
    assert result.difference.startswith("the gradient of 'w' differs by ")


Weighing = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def product(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (w * x).sum()


def root(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (w * x).sqrt().sum()


@pytest.mark.parametrize(
    ("right", "found", "difference"),
    [
        (product, product, ""),
        (root, root, ""),
        (root, lambda w, x: root(w, x.abs()), "the gradient of 'w' differs by inf% of its norm"),
        (product, lambda w, x: product(0 * w, x), "the gradient of 'w' differs by 100% of its norm"),
        (product, lambda w, x: x.sum(), "the gradient of 'w' differs by 100% of its norm"),
        (product, lambda w, x: product(1.5 * w, x), "the gradient of 'w' differs by 50% of its norm"),
    ],
    ids=["same", "same that is no number", "a number instead of none", "zero", "none", "more"],
)
def test_what_counts_as_a_difference(right: Weighing, found: Weighing, difference: str) -> None:
    """Sparse gradients are left out."""

    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(8))
            self.rows = nn.Embedding(3, 8, sparse=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rare = self.rows(torch.zeros(1, dtype=torch.int64)).sum() * 1e-3
            return right(self.w, x) + rare

    model = Weighted()
    result = against(model, lambda x: found(model.w, x))
    assert (result.difference, result.refused) == (difference, "")


class Unwritten(Net):
    """Its gradients hold what memory held that it does not write to, and what another did in its backward."""

    def middle(self, h: torch.Tensor) -> torch.Tensor:
        return Scaled.apply(h * torch.empty_like(h))  # type: ignore[no-any-return]


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * torch.empty_like(gradients[0])


# What the model reads in its forward and backward, then what was captured of it, and so on.
HELD = [[3.0, 3.0, 5.0, 5.0], [3.0, 3.0, 3.0, 5.0], [1.0, 1.0, math.nan, 1.0]]


@pytest.mark.parametrize("held", HELD, ids=["both", "the backward alone", "no number"])
def test_what_memory_held_before_is_no_gradient(held: list[float]) -> None:
    model = Unwritten()
    with HeldBefore(itertools.cycle(held)):
        assert against(model, lambda x: model(x)) == Comparison()


def test_a_gradient_is_compared_whatever_memory_held() -> None:
    """Were what memory changes from run to run allowed for, half of a gradient might be lost."""
    model = Unwritten()

    def half(x: torch.Tensor) -> torch.Tensor:
        y = model(x)
        return (y + y.detach()) / 2

    with HeldBefore(itertools.count(3)):
        found = against(model, half)
    assert found.difference.startswith("the gradient of ")
    assert found.difference.endswith(" differs by 50% of its norm")


@pytest.mark.parametrize("breaks", [False, True])
def test_memory_is_filled_in_what_is_differentiated_as_well(
    breaks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled: list[float] = []

    class Watched(_torch.FilledMemory):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = super().__torch_dispatch__(func, types, args, kwargs)
            if func is torch.ops.aten.empty_like.default:
                filled.append(float(result.flatten()[0]))
            return result

    class Both(Lost):
        def middle(self, h: torch.Tensor) -> torch.Tensor:
            return super().middle(h * torch.empty_like(h).fill_(2.0))

    monkeypatch.setattr(_torch, "FilledMemory", Watched)
    fast = optimized(Both(breaks=breaks))
    assert f"{WRONG}" in fast.report.diagnostics[-1]
    # The model, what was captured of it, and the model with each parameter off by a digit.
    assert filled == [1.0] * 3


def test_a_backward_that_waits_is_not_disturbed() -> None:
    model = Sensitive()
    weights = list(model.parameters())
    waiting = model(X).square().sum()
    optimized(model)
    found = torch.autograd.grad(waiting, weights)
    assert all(map(torch.equal, found, torch.autograd.grad(model(X).square().sum(), weights)))


def test_gradients_that_are_never_the_same_are_not_held_to_it() -> None:
    ticks = itertools.count(1)

    @torch.compiler.assume_constant_result
    def tick() -> int:
        return next(ticks)

    class Ticking(Net):
        def middle(self, h: torch.Tensor) -> torch.Tensor:
            more = h * (1.0 + tick())
            return h + more - more.detach()

    fast = optimized(Ticking())
    assert fast.report.plan is not None and compared(fast)


def test_hooks_of_parameters_are_not_called() -> None:
    model, called = Lost(), []
    model.a.weight.register_hook(lambda gradient: called.append(1))
    fast = optimized(model)
    assert fast.report.plan is not None and not called
    assert f"{REFUSED}: hooks wait for its gradients" in fast.report.diagnostics


def test_a_model_that_computes_gradients_itself_is_not_differentiated() -> None:
    class Training(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            super().forward(x).square().sum().backward()
            return super().forward(x)

    model = Training()
    fast = optimized(model)
    assert f"{REFUSED}: RuntimeError: the model computes gradients itself" in fast.report.diagnostics
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_writes_parameters_between_graphs_takes_no_more_steps() -> None:
    class Updating(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            torch._dynamo.graph_break()
            update(self.b.bias)
            return y

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def update(bias: torch.Tensor) -> None:
        with torch.no_grad():
            bias.add_(1)

    fast = optimized(Updating())
    assert any("plain code of the model writes b.bias" in text for text in fast.report.diagnostics)
    assert f"{REFUSED}: plain code of the model writes parameters" in fast.report.diagnostics


def test_without_a_loss_each_number_has_a_weight_of_its_own() -> None:
    x = torch.ones(3, requires_grad=True)
    (root,), weights = roots_of({"loss": x.sum(), "other": x})
    assert root.dim() == 0 and weights == [None]
    (root,), weights = roots_of((x, x.sum()), lambda output: output[0].sum() * 2)
    assert root.item() == 6 and weights == [None]
    roots, weights = roots_of([x, x.reshape(1, 3).half(), torch.ones(2), 1, x[:0]])
    assert [root.shape for root in roots] == [(3,), (1, 3)]
    for root, weight in zip(roots, weights, strict=True):
        assert weight is not None and weight.dtype == root.dtype
        right = torch.tensor([1.0, 0.7648, 0.1700]).reshape(root.shape).to(root.dtype)
        torch.testing.assert_close(weight, right, atol=1e-3, rtol=0)
    assert roots_of(torch.ones(2)) == ([], [])


def test_what_a_step_of_the_model_takes_is_held_against_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = Net(), Cost(3 << 20, 0, None)
    monkeypatch.setattr(faithful_gradients, "free_on_host", lambda: 8 << 20)
    assert no_room(model, plain, 0, None) == "" and no_room(model, plain, 0, 3 << 20) == ""
    told = "a step of the model as it is takes 3.00 MiB, which does not fit the budget, and 8.00 MiB are free"
    assert no_room(model, plain, 0, 2 << 20) == told
    # A quarter of what is free may be taken, and what is there already is not taken.
    assert no_room(model, plain, 1 << 20, 2 << 20) == ""
    assert no_room(model, Cost(None, 0, None), 0, 1) == ""


def test_gradients_are_compared_under_a_budget_that_the_model_itself_exceeds() -> None:
    class Wide(Lost):
        def middle(self, h: torch.Tensor) -> torch.Tensor:
            for _ in range(12):
                h = h.sin().cos()
            return super().middle(h)

    assert faithful_gradients.free_on_host() > 64 << 20
    with pytest.raises(CaptureError, match=r"op by op: the gradient of '.*' differs by"):
        optimized(Wide(), budget=4096 * 2, on_error="raise")
