"""What dynamo captures is compared with the model itself before it is used."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import graphopt
from graphopt import _torch
from graphopt.capture import beside
from graphopt.capture.faithful import CHUNK, Comparison, compared, differences, stands_for
from graphopt.errors import CaptureError

X = torch.linspace(-1.0, 1.0, 12).reshape(3, 4)


def optimized(model: nn.Module, *inputs: Any, **options: Any) -> graphopt.Optimized:
    return graphopt.optimize(model, inputs or (X,), emit="eager", cache=False, **options)


class TwoPaths(nn.Module):
    """Another scale under the compiler, as masks that are only left out op by op make another result."""

    def __init__(self, off: float) -> None:
        super().__init__()
        self.off = off
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = 1.0 + self.off if torch.compiler.is_compiling() else 1.0
        return self.linear(x).relu() * scale


class Breaking(TwoPaths):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        torch._dynamo.graph_break()
        return y + 1


@torch.compiler.assume_constant_result
def traced() -> bool:
    return torch._guards.TracingContext.try_get() is not None


class Anyhow(TwoPaths):
    """Another scale under the compiler, whatever it is told."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu() * (1.0 + self.off if traced() else 1.0)


class BreakingAnyhow(Anyhow):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        torch._dynamo.graph_break()
        return y + 1


class Skipping(TwoPaths):
    """As masks do: what it reads from a tensor, unless it is compiled, decides what it computes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() and bool((x < 2).all()):
            return self.linear(x).relu()
        return self.linear(x).relu() * (1.0 + self.off)


@pytest.mark.parametrize(("kind", "graphs"), [(TwoPaths, 1), (Breaking, 2), (Skipping, 2)])
@pytest.mark.parametrize("training", [False, True])
def test_a_model_that_takes_another_path_compiled_is_captured_as_if_it_were_not(
    kind: type[TwoPaths], graphs: int, training: bool
) -> None:
    model = kind(0.25).train(training)
    fast = optimized(model)
    note = fast.report.diagnostics[0]
    assert "compiled, the model computes something else than it does op by op: output 0 differs by " in note
    assert note.endswith("% of its largest number: captured as if it were not compiled")
    assert len(fast.report.programs) == graphs
    # Captured again, for other sizes and another answer, it is told the same.
    for x in (X, X[:2], X + 3):
        assert torch.equal(fast(x), model(x))
    if training:
        fast(X).sum().backward()
        found = model.linear.weight.grad
        model.linear.weight.grad = None
        model(X).sum().backward()
        assert torch.equal(found, model.linear.weight.grad)


def test_what_is_told_holds_for_no_other_code() -> None:
    asked = torch.compile(lambda x: x * 2 if torch.compiler.is_compiling() else x, backend="eager")
    fast = optimized(TwoPaths(0.25))
    assert torch.equal(asked(X), 2 * X)
    fast(X[:2])
    torch._dynamo.reset()
    assert torch.equal(asked(X), 2 * X)


@pytest.mark.parametrize("kind", [Anyhow, BreakingAnyhow])
@pytest.mark.parametrize("training", [False, True])
def test_a_model_that_computes_something_else_anyhow_runs_as_it_did(
    kind: type[TwoPaths], training: bool
) -> None:
    model = kind(0.25).train(training)
    fast = optimized(model)
    assert torch.equal(fast(X), model(X))
    assert fast.report.plan is None
    (note,) = (text for text in fast.report.diagnostics if "runs as it did" in text)
    assert "compiled, the model computes something else than it does op by op: output 0 differs by " in note
    assert note.endswith("% of its largest number")


def test_it_is_an_error_where_errors_are_raised() -> None:
    with pytest.raises(CaptureError, match="computes something else than it does op by op: output 0 differs"):
        optimized(Anyhow(0.25), on_error="raise")


def test_what_is_captured_so_and_cannot_be_compared_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    known = beside.compared
    answers = iter([known, lambda *args: Comparison(refused="for the test")])
    monkeypatch.setattr(beside, "compared", lambda *args: next(answers)(*args))
    model = TwoPaths(0.25)
    fast = optimized(model)
    assert torch.equal(fast(X), model(X))
    assert fast.report.plan is None
    assert fast.report.diagnostics[-1] == (
        "not captured, runs as it did: CaptureError: captured as if it were not compiled, it could not be "
        "compared with the model"
    )


def test_rounding_is_no_difference() -> None:
    fast = optimized(TwoPaths(2**-20))
    assert fast.report.plan is not None
    assert not fast.report.diagnostics


def test_nothing_is_compared_where_verification_is_off() -> None:
    model = TwoPaths(0.25)
    fast = optimized(model, verify="off")
    assert torch.allclose(fast(X), 1.25 * model(X))


def test_a_model_that_is_called_without_example_inputs_is_compared_on_its_first_call() -> None:
    model = TwoPaths(0.25)
    fast = graphopt.optimize(model, emit="eager", cache=False)
    assert torch.equal(fast(X), model(X))
    assert "output 0 differs" in fast.report.diagnostics[0]
    assert fast.report.plan is not None


def test_a_model_that_never_gives_the_same_is_not_held_to_it() -> None:
    ticks = itertools.count()

    class Ticking(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + tick()

    @torch.compiler.assume_constant_result
    def tick() -> int:
        return next(ticks)

    fast = optimized(Ticking())
    assert fast.report.plan is not None
    assert (
        "what was captured was not compared with the model: the model does not compute the same twice"
        in fast.report.diagnostics
    )


class Unwritten(TwoPaths):
    """Returns memory that it never writes to beside what it computes."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty_like(x), super().forward(x)


class BreakingUnwritten(Unwritten):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        unwritten, y = super().forward(x)
        torch._dynamo.graph_break()
        return unwritten, y + 1


class HeldBefore(TorchDispatchMode):
    """Memory that is made without values holds these numbers, one after another."""

    def __init__(self, numbers: Iterable[float]) -> None:
        super().__init__()
        self.numbers = iter(numbers)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.fill_(next(self.numbers)) if func is torch.ops.aten.empty_like.default else result


def filled(call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with _torch.FilledMemory():
            return call(*args)

    return run


def test_what_memory_held_before_is_no_result() -> None:
    model = Unwritten(0.0)

    def other(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        unwritten, y = model(x)
        return unwritten, 1.25 * y

    with HeldBefore(itertools.count(3)):
        assert compared(model, model.__call__, (X,), {}, (), filled(model)) == Comparison()
        found = compared(model, other, (X,), {}, (), filled(other))
        assert found == Comparison("output 1 differs by 25.00% of its largest number")
        assert stands_for(model, model, (X,), {}, training=False) == Comparison()


class UnwrittenAnyhow(Anyhow):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty_like(x), super().forward(x)


class BreakingUnwrittenAnyhow(UnwrittenAnyhow):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        unwritten, y = super().forward(x)
        torch._dynamo.graph_break()
        return unwritten, y + 1


@pytest.mark.parametrize("kind", [UnwrittenAnyhow, BreakingUnwrittenAnyhow])
def test_memory_is_filled_in_what_dynamo_captured_as_well(
    kind: type[Anyhow], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    class Watched(_torch.FilledMemory):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made.append(str(func))
            return super().__torch_dispatch__(func, types, args, kwargs)

    monkeypatch.setattr(_torch, "FilledMemory", Watched)
    fast = optimized(kind(0.25).eval())
    assert "output 1 differs by " in fast.report.diagnostics[0]
    # The model, what was captured of it, and the model again: it does compute the same twice. And once more,
    # captured as if it were not compiled.
    assert made.count("aten.empty_like.default") == 2 * 3


class Remembering(nn.Module):
    """Changes a buffer, an attribute, its input and an object that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: torch.Tensor
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0

    def forward(self, x: torch.Tensor, kept: list[torch.Tensor]) -> torch.Tensor:
        self.seen += 1
        self.calls += 1
        kept.append(x * 2)
        x.mul_(2)
        return x + self.seen + torch.rand(())


def test_what_the_two_runs_change_is_put_back() -> None:
    model, x, kept = Remembering(), X.clone(), [X]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    fast = optimized(model, x, kept)
    assert fast.report.plan is not None
    assert not any("not compared" in note for note in fast.report.diagnostics)
    assert torch.equal(x, X)
    assert len(kept) == 1
    assert (model.seen.item(), model.calls) == (0, 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(0)
    expected = Remembering()(X.clone(), [X])
    torch.manual_seed(0)
    assert torch.equal(fast(x, kept), expected)
    assert len(kept) == 2


class Settings:
    """As configurations are: an object that a module holds, with another in it."""

    def __init__(self, outer: Settings | None = None) -> None:
        self.kind: str | None = None
        self.calls = 0
        self.inner = outer or Settings(self)


class Settling(TwoPaths):
    """Its first call settles in its configuration what later ones find there."""

    def __init__(self, off: float) -> None:
        super().__init__(off)
        self.settings = Settings()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.settings.kind is None:
            self.settings.kind = "regression"
            self.settings.inner.calls = 1
        return super().forward(x)


def test_what_a_first_call_settles_in_a_configuration_is_put_back() -> None:
    model = Settling(0.0)
    fast = optimized(model)
    assert (model.settings.kind, model.settings.inner.calls) == (None, 0)
    assert not fast.report.diagnostics
    expected = model.linear(X).relu()
    for _ in range(2):
        torch.testing.assert_close(fast(X), expected)
    assert (model.settings.kind, model.settings.inner.calls) == ("regression", 1)


def test_a_model_that_settles_its_configuration_is_compared() -> None:
    fast = optimized(Settling(0.1))
    assert "computes something else than it does op by op" in fast.report.diagnostics[-1]


def test_checks_that_give_nothing_do_not_stop_rewrites() -> None:
    class Checked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))

        def forward(self, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
            torch._check(n.sum().item() >= 0)
            return self.parts(x).narrow(0, 0, 2)

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        fast = optimized(Checked(), X, torch.ones(2, dtype=torch.int64))
    assert not [step for step in fast.report.steps if "has no meta" in (step.reason or "")]
    assert fast.report.plan is not None
    with pytest.raises(RuntimeError):
        fast(X, -torch.ones(2, dtype=torch.int64))


def numbers(*values: float, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.tensor(values, dtype=dtype)]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("found", "expected", "difference"),
    [
        (numbers(1.0, NAN, INF), numbers(1.0, NAN, INF), ""),
        (numbers(1.0, NAN), numbers(1.0, 2.0), "output 0 differs by inf% of its largest number"),
        (numbers(1.0, -INF), numbers(1.0, INF), "output 0 differs by inf% of its largest number"),
        (numbers(0.0), numbers(0.0), ""),
        (numbers(), numbers(), ""),
        (numbers(1.0005), numbers(1.0), ""),
        (numbers(1.002), numbers(1.0), "output 0 differs by 0.20% of its largest number"),
        (numbers(1.0625, dtype=torch.bfloat16), numbers(1.0, dtype=torch.bfloat16), ""),
        (
            numbers(1.25, dtype=torch.bfloat16),
            numbers(1.0, dtype=torch.bfloat16),
            "output 0 differs by 25.00% of its largest number",
        ),
        (
            numbers(1, 2, dtype=torch.int64),
            numbers(1, 3, dtype=torch.int64),
            "output 0 differs by 50.00% of its elements",
        ),
        ([torch.arange(1000)], [torch.arange(1000).clamp(max=998)], ""),
        ([torch.ones(2)], [torch.ones(3)], "output 0 is float32[2] instead of float32[3]"),
        ([torch.ones(2), 1], [torch.ones(2)], "2 outputs instead of 1"),
        ([1, torch.ones(2)], [2, torch.zeros(2)], "output 1 differs by 100.00% of its largest number"),
        (
            [torch.ones(1, dtype=torch.complex64)],
            [torch.full((1,), 1 + 1j)],
            "output 0 differs by 70.71% of its largest number",
        ),
    ],
)
def test_what_counts_as_a_difference(found: list[Any], expected: list[Any], difference: str) -> None:
    assert differences(found, expected) == difference


def test_all_of_a_large_output_is_compared() -> None:
    expected = torch.ones(CHUNK + 3)
    found = expected.clone()
    found[-1] = 2
    assert differences([found], [expected]) == "output 0 differs by 100.00% of its largest number"
