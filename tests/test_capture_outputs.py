"""Gradients through outputs besides the loss, the state dict, and torch.compile's own entry point."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from tests.steps import assert_close, run_step


class Outputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.tanh(self.drop(self.a(x)))
        logits = self.b(hidden)
        return {"loss": logits.square().mean(), "logits": logits, "hidden": hidden}


LOSSES: dict[str, Callable[[dict[str, torch.Tensor]], torch.Tensor]] = {
    "loss": lambda o: o["loss"],
    "logits": lambda o: o["logits"].sum(),
    "all": lambda o: o["loss"] + o["logits"].pow(2).sum() + o["hidden"].exp().sum(),
}


@pytest.mark.parametrize("which", LOSSES)
def test_gradients_through_any_output(which: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain, x = Outputs(), torch.randn(4, 8, requires_grad=True)
    fast = graphopt.optimize(copy.deepcopy(plain), (x,), emit="eager", on_error="raise")
    for _ in range(2):
        ours = run_step(fast, (x,), LOSSES[which])
        assert_close(ours, run_step(plain, (x,), LOSSES[which]))
    said = any("an output besides the loss was differentiated" in text for text in fast.report.diagnostics)
    assert said is (which != "loss")


def test_an_output_is_differentiated_twice() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain, x = Outputs(), torch.randn(4, 8, requires_grad=True)
    fast = graphopt.optimize(copy.deepcopy(plain), (x,), emit="eager", on_error="raise")
    torch.manual_seed(1)
    logits = fast(x)["logits"].sum()
    first = torch.autograd.grad(logits, [x, fast.a.weight], retain_graph=True)
    second = torch.autograd.grad(logits, [x, fast.a.weight])
    torch.manual_seed(1)
    expected = torch.autograd.grad(plain(x)["logits"].sum(), [x, plain.a.weight])
    for a, b, c in zip(first, second, expected, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


def test_the_state_dict_is_the_models() -> None:
    torch._dynamo.reset()
    model, x = Outputs(), torch.randn(4, 8)
    fast = graphopt.optimize(model, (x,), emit="eager", on_error="raise")
    kept = copy.deepcopy(fast.state_dict())
    assert list(kept) == list(model.state_dict())
    stream = io.BytesIO()
    torch.save(fast.state_dict(), stream)
    with torch.no_grad():
        model.b.bias.add_(1.0)
    fast.load_state_dict(kept)
    assert torch.equal(model.b.bias, kept["b.bias"])
    assert [name for name, _ in fast.named_parameters()] == [name for name, _ in model.named_parameters()]


def test_the_signature_is_the_models() -> None:
    model = Outputs()
    fast = graphopt.optimize(model, emit="eager")
    assert inspect.signature(fast.forward) == inspect.signature(model.forward)


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.gelu(self.a(x))
        print(end="")
        return self.b(nn.functional.dropout(h, 0.3)).square().mean()


@pytest.mark.parametrize("options", [None, {"budget": "98%", "emit": "eager"}, {"emit": "eager"}])
def test_torch_compile_knows_the_backend(options: dict[str, Any] | None) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain, x = Broken(), torch.randn(64, 16)
    chosen = options or {"emit": "eager", "budget": "1GiB"}
    fast = torch.compile(copy.deepcopy(plain), backend="graphopt", options=chosen)
    for seed in range(3):
        ours, theirs = run_step(fast, (x,), seed=seed), run_step(plain, (x,), seed=seed)
        ours.gradients = {name.removeprefix("_orig_mod."): value for name, value in ours.gradients.items()}
        assert_close(ours, theirs)


def test_the_backend_names_an_unknown_option() -> None:
    torch._dynamo.reset()
    fast = torch.compile(Broken(), backend="graphopt", options={"bugdet": "95%"})
    text = r"unknown option of the graphopt backend 'bugdet'; did you mean 'budget'\?"
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=text):
        fast(torch.randn(4, 16))
