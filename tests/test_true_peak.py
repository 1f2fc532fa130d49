"""The peak that is predicted is the allocator's where kernels or autograd hold more than shapes tell."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt


def peaks(model: nn.Module, *inputs: torch.Tensor) -> tuple[int, int]:
    """Peak of a training step op by op: predicted, measured."""
    fast = graphopt.optimize(model, inputs, emit="eager", cache=False)
    return fast.report.plan.predicted.peak_bytes, fast.measure(repeats=1).peak_bytes


class Across(nn.Module):
    """Gradients that autograd has to copy: transposed, one for two parameters, expanded."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.which = which
        self.weight = nn.Parameter(torch.rand(200, 300))
        self.other = nn.Parameter(torch.rand(200, 300))
        if which == "permuted":
            self.weight = nn.Parameter(torch.rand(300, 200).t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.which == "shared":
            return ((self.weight + self.other) @ x).sum()
        if self.which == "expanded":
            return self.weight.sum()
        read = self.weight.t() if self.which == "transposed" else self.weight
        return (read.contiguous() @ x).sum()


@pytest.mark.parametrize("which", ["transposed", "shared", "expanded", "permuted"])
def test_copies_that_autograd_makes_of_gradients_count(which):
    model = Across(which)
    given = torch.rand({"transposed": (200,)}.get(which, (300,)))
    model(given).backward()
    expected = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    predicted, measured = peaks(model, given)
    assert predicted == measured
    fast = graphopt.optimize(model, (given,), emit="eager", cache=False)
    fast(given).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (expected[name] is None)
        if parameter.grad is not None:
            assert parameter.grad.equal(expected[name])
            assert parameter.grad.stride() == parameter.stride()


class Loss(nn.Module):
    """The gradient of the input is one number a row: the loss is what is held."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self.weight = nn.Parameter(torch.rand(()))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        # What is made after the loss: its memory is held meanwhile.
        return self.loss((x * self.weight).sigmoid(), y) + (x * self.weight).cos().sin().exp().sum()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", [nn.MSELoss, nn.SmoothL1Loss, nn.SoftMarginLoss, nn.BCELoss])
def test_the_memory_of_a_loss_is_that_of_what_it_is_summed_from(loss, reduction):
    predicted, measured = peaks(Loss(loss(reduction=reduction)), torch.rand(50, 20), torch.rand(50, 20))
    assert predicted == measured


def test_the_memory_of_a_loss_is_counted_of_one_value_read_twice_and_of_shapes_that_differ():
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
            loss = nn.functional.mse_loss
            return loss(x, x) + loss(x, row) + loss(x.view(-1)[:1], x) + x.sin().exp().sum()

    with pytest.warns(UserWarning, match="target size"):
        predicted, measured = peaks(Twice(), torch.rand(50, 20, requires_grad=True), torch.rand(20))
    assert predicted == measured


class Norms(nn.Module):
    """A view behind a batch norm of a transposed input, which is possible only as it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(8) for _ in range(3))
        self.linears = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, linear in zip(self.norms, self.linears, strict=True):
            x = linear(norm(x.transpose(1, 2)).transpose(1, 2)).sin()
        return x.sum()


@pytest.mark.parametrize("training", [True, False])
def test_copies_count_that_views_are_where_kernels_lay_out_otherwise_than_traced(training):
    model = Norms().train(training)
    predicted, measured = peaks(model, torch.rand(40, 60, 8, requires_grad=training))
    assert predicted == measured
