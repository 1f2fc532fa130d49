"""``optimize`` is safe on whatever runs eagerly: never wrong, never failing, each step down said."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphopt
from tests.steps import assert_close, assert_same, run_step

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Three layers to be put together."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)


class Square(torch.autograd.Function):
    """Its gradient is three times what autograd would find."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 6 * grad * x


class OwnBackward(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        squared: torch.Tensor = Square.apply(self.a(x))  # type: ignore[no-untyped-call]
        return self.b(squared)


class Hooked(Net):
    """A hook on a value, one on a parameter, one on a module."""

    def __init__(self) -> None:
        super().__init__()
        self.b.weight.register_hook(lambda grad: 3 * grad)
        self.c.register_forward_hook(lambda module, inputs, output: 2 * output)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        if h.requires_grad:
            h.register_hook(lambda grad: 5 * grad)
        return self.c(self.b(h))


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.c.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.tanh(self.b(self.a(x))))


class Mapped(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        slope = torch.func.grad(lambda z: self.a(z).sin().sum())(x)
        return torch.vmap(lambda row: self.b(row) * self.c(row))(slope)


class Cast(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.b(self.a(x))
        return self.c(h.float())


class Counting(Net):
    """Writes one buffer in place and puts another in the place of one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("last", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        h = self.a(x)
        self.last = h.detach().sum(0)
        return self.b(h) * self.steps


class Differentiating(Net):
    """Needs a second derivative, which nothing compiled has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (slope,) = torch.autograd.grad(self.a(x).square().sum(), self.a.weight, create_graph=True)
        return self.b(x) + slope.square().sum()


class Masked(Net):
    """Its backward has sizes that depend on values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        torch._dynamo.graph_break()
        h = h.clone()
        h[x > 0] = self.b.bias.sum()
        return self.c(h)


class Judged(Net):
    """Branches on a scalar beside which it returns nothing that is a loss."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.a(x))
        return self.b(h) if h.mean().item() > 10 else self.c(h)


@pytest.mark.parametrize(
    ("make", "programs", "note"),
    [
        (OwnBackward, 1, ""),
        (Hooked, 1, ""),
        (Tied, 1, ""),
        (Mapped, 1, ""),
        (Cast, 1, ""),
        (Counting, 1, ""),
        (Differentiating, 0, "runs as it did: RuntimeError: torch.compile with aot_autograd does"),
        (Masked, 1, "nodes was split: DynamicOutputShapeException: aten.nonzero.default"),
        (Judged, 2, "not one graph: "),
    ],
)
def test_a_step_is_the_models(make: Callable[[], nn.Module], programs: int, note: str) -> None:
    torch._dynamo.reset()
    plain = make()
    # Not a copy: copies of parameters have no hooks.
    fast = graphopt.optimize(make(), (X,), emit="eager", cache=False)
    for seed in (1, 2):
        expected, found = (run_step(module, (X.clone(),), seed=seed) for module in (plain, fast))
        (assert_close if make is Counting else assert_same)(found, expected)
    report = fast.report
    assert len(report.programs) == programs
    assert note in "; ".join(report.diagnostics)
    assert not any("an output besides the loss" in text for text in report.diagnostics)


class Drawing(Net):
    """Draws from every generator, and what it draws first it does not use."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.rand([])
        h = self.a(x) * random.random()
        noise = torch.from_numpy(np.random.rand(8)).float()
        return nn.functional.dropout(self.b(h + noise), 0.5)


class DroppingAll(Net):
    """A dropout that keeps nothing draws nothing, and the next one draws first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dropped = nn.functional.dropout(self.a(x), 1.0)
        return nn.functional.dropout(self.b(x + dropped), 0.5)


@pytest.mark.parametrize("make", [Drawing, DroppingAll])
@pytest.mark.parametrize("training", [True, False])
def test_random_numbers_are_those_of_eager(training: bool, make: type[Net]) -> None:
    torch._dynamo.reset()
    model = make().train(training)

    def run(module: nn.Module) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(3), random.seed(3), np.random.seed(3)  # type: ignore[func-returns-value]
        with torch.set_grad_enabled(training):
            output = module(X).detach()
        return output, torch.rand(1), torch.tensor(random.random()), torch.tensor(np.random.rand())

    expected = run(model)
    random.seed(4), np.random.seed(4)  # type: ignore[func-returns-value]
    states = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[union-attr,call-overload]
    fast = graphopt.optimize(model, (X,), emit="eager", cache=False)
    assert states == (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[union-attr,call-overload]
    for ours, theirs in zip(run(fast), expected, strict=True):
        assert torch.equal(ours, theirs)


class Keyed(Net):
    """Inputs by keyword alone, nested; nested outputs; one layer that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.b.requires_grad_(False)

    def forward(self, *, batch: dict[str, list[torch.Tensor]], scale: float = 1.0) -> dict[str, Any]:
        h = self.a(batch["rows"][0]) + self.b(batch["rows"][1])
        return {"loss": self.c(torch.relu(h)).square().mean() * scale, "parts": (h.detach(), "text", None)}


def test_a_loop_of_training_is_the_models() -> None:
    """Scaled losses, gradients added up over two calls and clipped, an optimizer, a frozen layer."""
    torch._dynamo.reset()
    batch = {"rows": [X, X.flip(0)]}
    left: list[list[torch.Tensor]] = []
    for optimized in (False, True):
        model: nn.Module = Keyed()
        if optimized:
            model = graphopt.optimize(model, {"batch": batch, "scale": 2.0}, emit="eager", cache=False)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        seen = []
        for _ in range(2):
            for _ in range(2):
                output = model(batch=batch, scale=2.0)
                assert output["parts"][1:] == ("text", None)
                scaler.scale(output["loss"]).backward()
                seen.append(output["loss"].detach())
            scaler.unscale_(optimizer)
            seen.append(nn.utils.clip_grad_norm_(model.parameters(), 0.01))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        left.append([*seen, *(p.detach() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*left, strict=True))


def test_function_transforms_see_the_model() -> None:
    torch._dynamo.reset()
    model = Tied().eval()
    fast = graphopt.optimize(model, (X,), emit="eager", cache=False)
    weights = {name: 2 * value.detach() for name, value in model.named_parameters()}
    call = torch.func.functional_call
    assert torch.equal(call(fast, weights, (X,)), call(model, weights, (X,)))

    def loss(module: nn.Module) -> Callable[..., torch.Tensor]:
        return lambda values: call(module, values, (X,)).square().sum()

    found, expected = (torch.func.grad(loss(module))(weights) for module in (fast, model))
    assert all(torch.allclose(found[name], expected[name], rtol=1e-5) for name in expected)
    assert torch.allclose(torch.vmap(fast)(X), torch.vmap(model)(X))


def test_a_pickled_module_is_optimized_again() -> None:
    torch._dynamo.reset()
    fast = graphopt.optimize(Tied(), (X,), emit="eager", budget="1MiB", cache=False)
    again = pickle.loads(pickle.dumps(fast))
    assert torch.equal(again(X), fast(X))
    assert again.a.weight is again.c.weight and again.report.budget == fast.report.budget


class Turned(Net):
    """On the CPU a batch norm lays its result out otherwise than torch says when tracing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x.view(2, 2, 8).transpose(1, 2)).transpose(1, 2)
        return h @ self.a.weight


@pytest.mark.parametrize("training", [True, False])
def test_values_may_lie_otherwise_than_traced(training: bool) -> None:
    torch._dynamo.reset()
    plain, model = Turned().train(training), Turned().train(training)
    fast = graphopt.optimize(model, (X,), emit="eager", cache=False)
    assert_close(run_step(fast, (X.clone(),)), run_step(plain, (X.clone(),)))
    assert len(fast.report.programs) == 1 and fast.report.diagnostics == ()


class Picking(Net):
    """Sizes that depend on values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        return self.b(h[x[:, 0] < 9]).sum() + h.sum()


def test_rows_that_are_picked_count_as_all() -> None:
    torch._dynamo.reset()
    fast = graphopt.optimize(Picking(), (X.repeat(256, 1),), emit="eager", cache=False)
    assert fast.plan.predicted.peak_bytes >= fast.measure(repeats=1).peak_bytes
    assert len(fast.report.programs) == 1
