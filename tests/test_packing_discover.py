"""Weights found by what programs do with parameters, and the reasons why others are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.errors import CaptureError, InputsError
from graphopt.packing.discover import Discovery, discover
from graphopt.packing.trace import captured_programs

Tensor = torch.Tensor


def found(model: nn.Module, *inputs: Any, training: bool = False) -> Discovery:
    torch._dynamo.reset()
    return discover(captured_programs(model, inputs, {}), model, training=training)


class Everything(nn.Module):
    """Every way to read a weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight
        self.up = nn.Parameter(torch.randn(16, 24))
        self.down = nn.Parameter(torch.randn(16, 24))
        self.experts = nn.Parameter(torch.randn(2, 16, 12))
        self.back = nn.Parameter(torch.randn(2, 16, 12))
        self.conv = nn.Conv1d(16, 16, 3, padding=1, groups=2)
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        packed = F.linear(x, torch.cat([self.q.weight, self.k.weight]))
        x = x + packed[..., :16] + packed[..., 16:].repeat(1, 1, 2)
        x = torch.addmm(
            self.q.bias, torch.mm(x.reshape(-1, 16), self.up), self.down.t().contiguous().detach()
        )
        x = x.reshape(2, -1, 16)
        x = torch.bmm(torch.bmm(x, self.experts), self.back.permute(0, 2, 1))
        return self.head(x)


def test_weights_are_found_however_they_are_read() -> None:
    seen = found(Everything().eval(), torch.randint(0, 20, (2, 4)))
    told = {
        w.name: (w.orientation, w.n, w.k, w.blocks, tuple((u.kind, u.rows) for u in w.uses))
        for w in seen.weights
    }
    assert told == {
        "up": ("columns", 24, 16, 1, (("product", 8),)),
        "experts": ("stacked columns", 24, 16, 2, (("product", 4),)),
        "back": ("stacked rows", 32, 12, 2, (("product", 4),)),
        "embed.weight": ("rows", 20, 16, 1, (("look-up", 8), ("product", 8))),
        "conv.weight": ("rows", 16, 24, 2, (("convolution", 8),)),
        "q.weight": ("rows", 16, 16, 1, (("product", 8),)),
        "k.weight": ("rows", 8, 16, 1, (("product", 8),)),
    }
    assert seen.weight("head.weight") is seen.weight("embed.weight")
    assert [w.names for w in seen.weights if w.looked_up] == [("embed.weight", "head.weight")]
    together = [tuple(w.name for w in group) for group in seen.groups() if len(group) > 1]
    assert together == [("q.weight", "k.weight")]
    (other,) = seen.refused
    assert other.name == "down" and "it is read by aten.contiguous" in str(other.reason)


class Reads(nn.Module):
    """One parameter, read by ``how``."""

    def __init__(self, how: Any, shape: tuple[int, ...] = (8, 8)) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.how = how

    def forward(self, x: Tensor) -> Any:
        return self.how(x, self.w)


REFUSED = {
    "elementwise": (lambda x, w: x * w, "it is read by aten.mul.Tensor|it is read by aten.mul"),
    "two-uses": (lambda x, w: F.linear(x, w) + w.sum(), "it is read by aten.sum"),
    "two-ways": (lambda x, w: F.linear(x, w) + x @ w, "it is read in two ways: by columns and by rows"),
    "left": (lambda x, w: torch.mm(w, x), "it is the left-hand side of aten.mm"),
    "both-sides": (lambda x, w: torch.mm(w, w) + x, "it is the left-hand side of aten.mm"),
    "returned": (lambda x, w: (F.linear(x, w), w.t()), "the program returns it"),
    "scaled": (lambda x, w: torch.addmm(x, x, w, alpha=2), "the product is scaled as it is added"),
    "cast": (
        lambda x, w: F.linear(x.double(), w.double()),
        "it is read by aten._to_copy|it is read by aten.to",
    ),
    "unread": (lambda x, w: x + 1, "no captured program reads it"),
    "looked-up-columns": (
        lambda x, w: F.embedding(x.long().clamp(0, 7), w.t()),
        "it is read by aten.embedding",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_other_reads_are_refused_by_name(case: str) -> None:
    how, reasons = REFUSED[case]
    seen = found(Reads(how).eval(), torch.randn(8, 8))
    assert not seen.weights
    (refused,) = seen.refused
    assert refused.name == "w"
    assert any(reason in str(refused.reason) for reason in reasons.split("|")), refused.reason


def test_transposed_convolutions_and_axes_out_of_order_are_refused() -> None:
    seen = found(Reads(lambda x, w: F.conv_transpose1d(x, w), (8, 8, 3)).eval(), torch.randn(1, 8, 8))
    assert not seen.weights and "it is read by aten.conv_transpose1d" in str(seen.refused[0].reason)
    seen = found(Reads(lambda x, w: torch.bmm(x, w.permute(2, 0, 1)), (8, 8, 2)).eval(), torch.randn(2, 8, 8))
    assert not seen.weights
    assert "its axes are read in an order that packed weights do not have" in str(seen.refused[0].reason)


def test_a_stack_that_reads_one_input_is_refused() -> None:
    seen = found(Reads(lambda x, w: torch.matmul(x, w), (2, 8, 8)).eval(), torch.randn(3, 8))
    assert not seen.weights
    assert "the blocks of a stack read one input, or several" in str(seen.refused[0].reason)


def test_convolution_as_a_product_is_flattened() -> None:
    model = Reads(lambda x, w: F.linear(x, w.view(w.shape[0], -1)), (4, 2, 2, 2)).eval()
    (weight,) = found(model, torch.randn(3, 8)).weights
    assert (weight.orientation, weight.n, weight.k) == ("rows", 4, 8)


def test_trained_parameters_are_refused_and_frozen_ones_found() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].weight.requires_grad_(False)
    seen = found(model, torch.randn(2, 8), training=True)
    assert [w.name for w in seen.weights] == ["0.weight"]
    assert [(r.name, str(r.reason)) for r in seen.refused] == [("1.weight", "it is trained")]


def test_memory_shared_with_another_tensor_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    model[1].weight = nn.Parameter(model[0].weight.data)
    seen = found(model, torch.randn(2, 8))
    assert [str(r.reason) for r in seen.refused] == [
        "it shares its memory with 1.weight",
        "it shares its memory with 0.weight",
    ]
    base = torch.randn(2, 8, 8)
    model[0].weight = nn.Parameter(base[0])
    seen = found(model, torch.randn(2, 8))
    assert [(r.name, str(r.reason)) for r in seen.refused] == [
        ("0.weight", "its memory is larger than itself")
    ]


def test_graph_breaks_do_not_hide_weights_and_leave_buffers_alone() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            x = self.a(x)
            torch._dynamo.graph_break()
            return self.b(x)

    model = Broken().eval()
    assert [w.name for w in found(model, torch.randn(2, 8)).weights] == ["a.weight", "b.weight"]
    assert model.calls.item() == 0


def test_inputs_that_the_model_refuses_are_the_callers() -> None:
    torch._dynamo.reset()
    with pytest.raises(InputsError, match="the model does not run with these inputs"):
        captured_programs(nn.Linear(8, 8), (torch.randn(2, 3),), {})
    with pytest.raises(CaptureError, match="could not be captured"):
        captured_programs(Reads(lambda x, w: 3), (torch.randn(2, 3),), {})
