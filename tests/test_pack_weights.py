"""Packed weights in the place of parameters: eager mode, compilers, copies, state, and what is refused."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from graphopt.candidate import Reason
from graphopt.errors import QuantizationError, UnknownNameError
from graphopt.packing import Scheme, pack_weights, packed_weights, scheme_text
from graphopt.plugins import PluginHost, default_host
from graphopt_kernels.quantized.int8 import Int8

ROWS = (Int8(), "rows")


class Net(nn.Module):
    """An embedding tied to the head, a linear, a matrix that is read by columns, a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 16)
        self.up = nn.Linear(16, 24)
        self.down = nn.Parameter(torch.randn(24, 16) / 5)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.relu(self.up(self.embed(tokens))) @ self.down
        return self.head(self.conv(x.transpose(1, 2)).transpose(1, 2))


ALL = {"embed.weight": ROWS, "up.weight": ROWS, "down": (Int8(), "columns"), "conv.weight": ROWS}


def tokens() -> Tensor:
    return torch.arange(12).view(3, 4)


def rounded(model: Net) -> Net:
    """The model with each weight as its scheme rounds it, computed here."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for weight, axis in ((model.embed.weight, 1), (model.up.weight, 1), (model.conv.weight, (1, 2))):
            scale = weight.abs().amax(axis, keepdim=True) / 127
            weight.copy_((weight / scale).round() * scale)
        scale = model.down.abs().amax(0, keepdim=True) / 127
        model.down.copy_((model.down / scale).round() * scale)
    return model


def test_a_packed_model_computes_with_rounded_weights() -> None:
    model = Net()
    expected = rounded(model)(tokens())
    pack_weights(model, ALL)
    torch.testing.assert_close(model(tokens()), expected)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens()), expected)


def test_dense_weights_are_freed_and_tied_ones_packed_once() -> None:
    model = Net()
    storages = [
        weakref.ref(model.embed.weight.untyped_storage()),
        weakref.ref(model.up.weight.untyped_storage()),
    ]
    pack_weights(model, ALL)
    gc.collect()
    assert [storage() for storage in storages] == [None, None]
    assert list(packed_weights(model)) == ["down", "embed.weight", "up.weight", "conv.weight"]
    assert model.embed.parametrizations.weight[0] is model.head.parametrizations.weight[0]  # type: ignore[index,union-attr]
    held = {b.data_ptr(): b.numel() * b.element_size() for b in model.buffers()}
    assert sum(held.values()) == sum(
        Int8().stored_bytes(n, k, torch.float32) for n, k in ((50, 16), (24, 16), (16, 24), (16, 48))
    )


def test_state_is_named_after_parameters_and_either_kind_loads() -> None:
    model = Net()
    dense = copy.deepcopy(model.state_dict())
    pack_weights(model, ALL)
    packed = {name: value.clone() for name, value in model.state_dict().items()}
    assert set(packed) == {
        "embed.weight.codes", "embed.weight.scales", "head.weight.codes", "head.weight.scales",
        "up.weight.codes", "up.weight.scales", "up.bias", "down.codes", "down.scales",
        "conv.weight.codes", "conv.weight.scales", "conv.bias",
    }  # fmt: skip
    expected = model(tokens())
    other = Net()
    nn.init.normal_(other.down)
    pack_weights(other, ALL)
    assert not torch.equal(other(tokens()), expected)
    other.load_state_dict(packed)
    torch.testing.assert_close(other(tokens()), expected, rtol=0, atol=0)
    other = Net()
    nn.init.normal_(other.up.weight)
    pack_weights(other, ALL)
    other.load_state_dict(dense)
    torch.testing.assert_close(other(tokens()), expected, rtol=0, atol=0)


def test_a_missing_weight_and_one_that_does_not_fit_are_named() -> None:
    model = Net()
    dense = model.state_dict()
    pack_weights(model, ALL)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r'Missing key.*: "up.weight"\. *$'):
        model.load_state_dict({k: v for k, v in dense.items() if k != "up.weight"})
    with pytest.raises(RuntimeError, match=r"up\.weight: cannot pack a weight of shape \(2, 2\) as int8"):
        model.load_state_dict({**dense, "up.weight": torch.zeros(2, 2)})
    for name, value in model.state_dict().items():
        assert torch.equal(value, kept[name]), name


def test_a_weight_that_is_assigned_is_packed() -> None:
    model = Net()
    pack_weights(model, {"up.weight": ROWS})
    with torch.no_grad():
        model.up.weight = torch.ones(24, 16)  # type: ignore[assignment]
    assert torch.equal(model.up.weight, torch.ones(24, 16))
    assert model.up.parametrizations.weight[0].codes.unique().tolist() == [127]  # type: ignore[index,union-attr]


def test_copies_are_apart() -> None:
    model = Net()
    pack_weights(model, ALL)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.down = torch.zeros(24, 16)  # type: ignore[assignment]
    assert torch.equal(twin.down, torch.zeros(24, 16)) and model.down.abs().sum() > 0
    assert twin.embed.parametrizations.weight[0] is twin.head.parametrizations.weight[0]  # type: ignore[index,union-attr]


def test_gradients_flow_through_packed_weights_to_what_is_trained() -> None:
    model = Net()
    right = rounded(model)
    pack_weights(model, {"up.weight": ROWS, "down": (Int8(), "columns")})
    right.embed.weight = right.head.weight = model.embed.weight
    right.conv = model.conv
    trained = [model.embed.weight, model.up.bias, model.conv.weight]
    theirs = [right.embed.weight, right.up.bias, right.conv.weight]
    ours = torch.autograd.grad(model(tokens()).square().mean(), trained)
    for a, b in zip(ours, torch.autograd.grad(right(tokens()).square().mean(), theirs), strict=True):
        torch.testing.assert_close(a, b)


# --- what is refused -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picky(Int8):
    name: ClassVar[str] = "picky"
    group: int = 32

    def refuses(self, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Reason | None:
        return Reason(f"groups of {self.group} do not divide {k}") if k % self.group else None


@pytest.mark.parametrize(
    ("schemes", "error", "message"),
    [
        ({"up.wieght": ROWS}, UnknownNameError, "unknown parameter 'up.wieght'; did you mean 'up.weight'"),
        ({"up.bias": ROWS}, QuantizationError, r"up.bias \(24,\) .* it is no matrix of floating"),
        ({"conv.weight": (Int8(), "columns")}, QuantizationError, "only matrices are read by columns"),
        ({"embed.weight": ROWS, "head.weight": ROWS}, QuantizationError, "head.weight and embed.weight are"),
        (
            {"down": ROWS, "up.weight": (Picky(), "rows")}, QuantizationError,
            r"up.weight \(24, 16\) cannot be packed as picky: groups of 32 do not divide 16",
        ),
    ],
    ids=["name", "vector", "columns", "tied", "group"],
)  # fmt: skip
def test_what_cannot_be_packed_is_named_and_nothing_is_changed(
    schemes: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        pack_weights(model, schemes)
    assert not packed_weights(model)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_weights_that_are_no_numbers_are_named(value: float, kind: str) -> None:
    model = Net()
    with torch.no_grad():
        model.down[1, 2] = value
    with pytest.raises(
        QuantizationError, match=rf"down \(24, 16\) cannot be packed as int8: it holds {kind}"
    ):
        pack_weights(model, ALL)
    assert not packed_weights(model)


def test_what_is_packed_is_not_packed_again() -> None:
    model = Net()
    pack_weights(model, {"embed.weight": ROWS})
    with pytest.raises(QuantizationError, match=r"head\.weight is packed already, as int8"):
        pack_weights(model, {"head.weight": ROWS})


# --- schemes as plug-ins ---------------------------------------------------------------------------


class Plugin:
    graphopt_api = 1

    def __init__(self, *schemes: Any) -> None:
        from graphopt import hookimpl

        def graphopt_schemes() -> Any:
            return schemes

        self.graphopt_schemes = hookimpl(graphopt_schemes)


def test_schemes_are_spelled_as_passes_are() -> None:
    host = PluginHost([Plugin(Picky)])
    assert host.scheme("picky{group=8}") == Picky(8) and str(Picky(8)) == "picky{group=8}"
    assert scheme_text(host.scheme("int8")) == "int8"
    for text, error, message in (
        ("int9", UnknownNameError, "unknown scheme 'int9'; did you mean 'int8'"),
        ("picky{size=8}", UnknownNameError, "unknown option of scheme picky 'size'"),
        ("picky{group=x}", QuantizationError, "option 'group' of scheme 'picky' must be int, got 'x'"),
        ("picky{group=", Exception, "cannot read scheme 'picky{group='"),
        ("int8,picky", Exception, "expected one scheme"),
    ):
        with pytest.raises(error, match=message):
            host.scheme(text)


def test_a_plugin_that_returns_no_scheme_is_named() -> None:
    class Nameless(Scheme):
        def pack(self, weight: Tensor, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {}

    for bad, message in (
        (3, "expected subclasses of graphopt.Scheme, got 3"),
        (Nameless, "scheme Nameless must be a frozen dataclass"),
        (
            dataclass(frozen=True)(type("Half", (Scheme,), {"name": "half"})),
            "needs a class variable `unpack_op`",
        ),
    ):
        host = PluginHost([Plugin(bad)])
        assert "int8" in host.schemes()
        (record,) = [r for r in host.records() if r.status == "failed"]
        assert message in record.error
    assert "int8" in default_host().schemes()
