"""Gradients of what no loss was made of: none, as op by op, not zeros."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.program import InputSpec
from graphopt.unreached import made_of


class Towers(nn.Module):
    """Gives a loss, and something beside it of which none is made, with a graph break between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.main, self.beside, self.head = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.first(x).relu()
        main, beside = self.main(h), self.beside(h)
        torch._dynamo.graph_break()
        return self.head(main.tanh()).square().mean(), beside.exp()


class Chained(nn.Module):
    """What is of no use was made by a graph of its own, of which it is all there is."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.used, self.more, self.head = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        unused = self.unused(x).relu()
        torch._dynamo.graph_break()
        main, beside = self.used(x), self.more(unused)
        torch._dynamo.graph_break()
        return self.head(main.tanh()).square().mean(), beside.exp()


def gradients(module: nn.Module, x: torch.Tensor, loss: Any) -> dict[str, torch.Tensor | None]:
    for parameter in module.parameters():
        parameter.grad = None
    loss(module(x)).backward()
    return {name: p.grad for name, p in module.named_parameters()}


LOSSES: dict[str, Any] = {
    "the first": lambda outputs: outputs[0],
    "both": lambda outputs: outputs[0] + outputs[1].sum(),
    "the second": lambda outputs: outputs[1].sum(),
}


@pytest.mark.parametrize("emit", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [Towers, Chained])
def test_what_no_loss_is_made_of_has_no_gradient(kind: type[nn.Module], emit: str) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(4, 6)
    fast = graphopt.optimize(model, (x,), emit=emit, cache=False)
    assert len(fast.report.programs) > 1
    for name, loss in LOSSES.items():
        expected = gradients(model, x, loss)
        found = gradients(fast, x, loss)
        assert {key for key, g in found.items() if g is None} == {k for k, g in expected.items() if g is None}
        for key, gradient in expected.items():
            if gradient is not None:
                torch.testing.assert_close(found[key], gradient, msg=f"{key}, loss of {name}")


def test_an_optimizer_leaves_such_weights_as_they_are() -> None:
    torch.manual_seed(0)
    model, x = Towers(), torch.randn(4, 6)
    fast = graphopt.optimize(model, (x,), emit="eager", cache=False)
    before = model.beside.weight.detach().clone()
    optimizer = torch.optim.AdamW(fast.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        fast(x)[0].backward()
        optimizer.step()
    assert torch.equal(model.beside.weight, before)


def test_a_backward_may_be_run_again_for_the_rest() -> None:
    torch.manual_seed(0)
    model, x = Towers(), torch.randn(4, 6)
    fast = graphopt.optimize(model, (x,), emit="eager", cache=False)
    loss, beside = fast(x)
    loss.backward(retain_graph=True)
    assert model.beside.weight.grad is None
    beside.sum().backward()
    both = gradients(model, x, LOSSES["both"])
    model.zero_grad()
    loss, beside = fast(x)
    (loss + beside.sum()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, both[name])


def test_what_gradients_are_made_of_is_read_off_the_graph() -> None:
    fast = graphopt.optimize(Towers(), (torch.randn(4, 6),), emit="eager", cache=False)
    joint = fast._driver.session.current[0].joint
    assert joint is not None
    made, count = made_of(joint)
    names = [spec.fqn for spec in joint.signature.inputs if spec.role != "tangent"]
    assert count == 2
    bits = {names[k]: found for k, found in made.items()}
    assert bits["main.weight"] == bits["main.bias"] and bits["beside.weight"] == bits["beside.bias"]
    assert {bits["main.weight"], bits["beside.weight"]} == {1, 2}
    assert bits["first.weight"] == bits["first.bias"] == 3, "what both are made of"


def test_inputs_that_are_no_argument_shift_none() -> None:
    fast = graphopt.optimize(Towers(), (torch.randn(4, 6),), emit="eager", cache=False)
    joint = fast._driver.session.current[0].joint
    assert joint is not None
    made = made_of(joint)
    first = next(iter(joint.graph.nodes))
    with joint.graph.inserting_before(first):
        joint.graph.placeholder("fwd_rng_state_0")
    state = InputSpec("fwd_rng_state_0", "input")
    signature = replace(joint.signature, inputs=(state, *joint.signature.inputs))
    assert made_of(replace(joint, signature=signature)) == made
