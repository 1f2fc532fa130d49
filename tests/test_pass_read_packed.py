"""read-packed: which products and look-ups read packed weights, that numbers stay, what it leaves alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import graphopt
from graphopt.candidate import Candidate, NearMiss
from graphopt.packing import pack_weights
from graphopt.testing import check_pass
from graphopt_kernels.quantized.int8 import Int8
from graphopt_passes.read_packed import ReadPacked
from tests.programs import context, semantic

Function = Callable[..., Any]
CODES, SCALES = torch.randint(-127, 128, (12, 16), dtype=torch.int8), torch.rand(12) / 100


def unpacked(codes: Tensor, scales: Tensor) -> Tensor:
    return torch.ops.graphopt.unpack_int8(codes, scales, torch.float32)


def found(function: Function, *args: Any) -> list[Any]:
    program = semantic(function, *args)
    return list(ReadPacked().propose(program, context()))


class Layers(nn.Module):
    """Two layers of each kind of reader, and a table that the head shares."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(30, 16, padding_idx=0)
        self.up = nn.ModuleList(nn.Linear(16, 24) for _ in range(2))
        self.down = nn.ParameterList(torch.randn(24, 16) / 5 for _ in range(2))
        self.shift = nn.Parameter(torch.randn(16))
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + torch.addmm(self.shift, torch.relu(up(x)).flatten(0, -2), down).view(x.shape)
        return self.head(x)


def packed_layers() -> Layers:
    model = Layers()
    rows = ("embed.weight", "up.0.weight", "up.1.weight")
    pack_weights(
        model,
        {name: (Int8(), "rows") for name in rows} | {f"down.{k}": (Int8(), "columns") for k in range(2)},
    )
    return model


def test_products_and_look_ups_read_packed_weights_and_values_and_gradients_stay() -> None:
    tokens = torch.arange(12).view(3, 4)
    model = packed_layers()
    checked = check_pass(ReadPacked(), model, (tokens,))
    assert not checked.near_misses
    fast = graphopt.optimize(model, (tokens,), emit="eager", on_error="raise")
    (record,) = [step for step in fast.report.steps if step.id == "read-packed"]
    assert "6 of 6" in record.reason
    program = fast.programs[0]
    assert len(list(program.nodes(torch.ops.graphopt.linear_int8.default))) == 5
    (rows,) = program.nodes(torch.ops.graphopt.unpack_int8.default)
    assert rows.meta["val"].shape == (12, 16), "rows that are looked up alone are unpacked"


def test_weights_that_are_loaded_later_are_the_ones_that_are_read() -> None:
    tokens = torch.arange(12).view(3, 4)
    model = packed_layers()
    fast = graphopt.optimize(model, (tokens,), emit="eager", on_error="raise")
    fast(tokens)
    other = Layers()
    nn.init.normal_(other.down[1])
    fast.load_state_dict(other.state_dict())
    torch.testing.assert_close(fast(tokens), model(tokens))


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (lambda u, x: F.conv1d(x[:, :, None].expand(-1, -1, 4), u[:, :, None]), None),
        (lambda u, x: F.linear(x[:, :12], u.t()), "rows of the packed weight are not the outputs"),
        (lambda u, x: x[:, :12] @ u, "rows of the packed weight are not the outputs"),
        (lambda u, x: u @ x.t(), "the weight is the left-hand side of the product"),
        (lambda u, x: torch.addmm(x[:, :12], x, u.t()), "what is added is no bias"),
        (lambda u, x: torch.addmm(x[0, :12], x, u.t(), beta=2), "the product is scaled as it is added"),
        (lambda u, x: F.embedding(x[0].long(), u.t()), "rows that are looked up are columns of the weight"),
        (lambda u, x: F.embedding(x[0].long(), u, sparse=True), "are scaled or sparse"),
        (lambda u, x: u.sum() + x, None),
    ],
    ids=["view", "turned", "left", "lhs", "matrix", "scaled", "columns", "sparse", "other"],
)  # fmt: skip
def test_what_reads_it_otherwise_reads_it_unpacked(read: Function, reason: str | None) -> None:
    proposals = found(lambda c, s, x: read(unpacked(c, s), x), CODES, SCALES, torch.rand(5, 16))
    assert not any(isinstance(item, Candidate) for item in proposals)
    assert [reason in item.reason.text for item in proposals] == ([True] if reason else [])


class Pointwise(nn.Module):
    """Convolutions of one place: of few places, of one place, with channels last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv1d(16, 32, 1), nn.Conv1d(32, 16, 1, bias=False)
        self.one, self.last = nn.Conv2d(16, 24, 1), nn.Conv2d(24, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.relu(self.first(x)))
        z = torch.relu(self.one(y.mean(-1)[:, :, None, None])).expand(-1, -1, 8, 64)
        return self.last(z.contiguous(memory_format=torch.channels_last)).contiguous() + y[..., None, :1]


def test_convolutions_of_one_place_and_few_places_are_products() -> None:
    x, model = torch.randn(1, 16, 5), Pointwise()
    names = ("first", "second", "one", "last")
    pack_weights(model, {f"{name}.weight": (Int8(), "rows") for name in names})
    checked = check_pass(ReadPacked(), model, (x,))
    assert not checked.near_misses
    fast = graphopt.optimize(model, (x,), emit="eager", on_error="raise")
    program = fast.programs[0]
    assert len(list(program.nodes(torch.ops.graphopt.linear_int8.default))) == 4
    assert not list(program.nodes(torch.ops.graphopt.unpack_int8.default))
    assert not any("conv" in str(node.target) for node in program.nodes())
    torch.testing.assert_close(fast(x), model(x))
    assert fast(x).stride() == model(x).stride()


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (lambda u, x: F.conv1d(x, u, stride=2), "steps, pads or has groups"),
        (lambda u, x: F.conv1d(x, u, padding=1), "steps, pads or has groups"),
        (lambda u, x: F.conv1d(x.repeat(1, 3, 1), u, groups=3), "steps, pads or has groups"),
        (lambda u, x: F.conv1d(x[0], u), "its input is no batch in the dtype of the weight, float32"),
        (
            lambda u, x: F.conv1d(x.repeat(1, 1, 9), u),
            "moving its channels would take longer than unpacking its weight",
        ),
        (
            lambda u, x: torch.convolution(x[:, :12], u, None, [1], [0], [1], True, [0], 1),
            "the convolution is transposed: rows of its weight are not its outputs",
        ),
        (lambda u, x: F.conv1d(x, u, padding="same"), None),
    ],
    ids=["stride", "padding", "groups", "unbatched", "many", "transposed", "same"],
)  # fmt: skip
def test_other_convolutions_read_it_unpacked(read: Function, reason: str | None) -> None:
    def function(codes: Tensor, scales: Tensor, x: Tensor) -> Tensor:
        return read(unpacked(codes, scales).view(12, 16, 1), x)

    (proposal,) = found(function, CODES, SCALES, torch.rand(1, 16, 4))
    assert isinstance(proposal, Candidate) if reason is None else reason in proposal.reason.text


def test_a_larger_convolution_holds_its_weight_until_it_has_run_and_no_longer() -> None:
    model = nn.Conv1d(16, 8, 3)
    pack_weights(model, {"weight": (Int8(), "rows")})
    unpacked_weights = []
    scheme_op = torch.ops.graphopt.unpack_int8

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if function is scheme_op.default:
                unpacked_weights.append(weakref.ref(result.untyped_storage()))
            return result

    with Watch(), torch.no_grad():
        model(torch.randn(2, 16, 10))
    assert [weight() for weight in unpacked_weights] == [None]


def test_under_autocast_the_product_is_in_another_dtype() -> None:
    def function(codes: Tensor, scales: Tensor, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(x, unpacked(codes, scales))

    (miss,) = found(function, CODES, SCALES, torch.rand(5, 16))
    assert isinstance(miss, NearMiss)
    assert "autocast" in miss.reason.text or "the dtype of the weight" in miss.reason.text


def test_packed_tensors_that_are_written_are_unpacked_first() -> None:
    def function(codes: Tensor, scales: Tensor, x: Tensor) -> Tensor:
        weight = unpacked(codes, scales)
        scales.mul_(2)
        return F.linear(x, weight)

    (miss,) = found(function, CODES.clone(), SCALES.clone(), torch.rand(5, 16))
    assert "packed tensors are written by the program" in miss.reason.text
