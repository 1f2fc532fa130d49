"""Statistics of what weights read: against hand-written hooks, kept in files, bad batches named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphopt
from graphopt import Calibration, InputsError, QuantizationError, UnknownNameError
from tests.packing_cases import Chain, batches

Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def seen_by_hooks(model: nn.Module, module: nn.Module, given: list[Any]) -> tuple[Tensor, Tensor]:
    """All rows of inputs and results of a module."""
    rows: list[tuple[Tensor, Tensor]] = []

    def hook(_: nn.Module, args: Any, result: Tensor) -> None:
        rows.append((args[0].detach().flatten(0, -2), result.detach().flatten(0, -2)))

    handle = module.register_forward_hook(hook)
    for batch in given:
        model(*batch)
    handle.remove()
    return torch.cat([x for x, _ in rows]), torch.cat([y for _, y in rows])


def test_moments_are_those_of_the_inputs() -> None:
    model = Chain().eval()
    given = batches()
    found = graphopt.calibrate(model, given, observers=("moments", "gram"), gram=["layers.1.up.weight"])
    x, y = seen_by_hooks(model, model.layers[1].up, given)  # type: ignore[union-attr,arg-type]
    up = found.of("layers.1.up.weight")
    assert up["tokens"].item() == len(x) == 48
    torch.testing.assert_close(up["amax"], x.abs().amax(0))
    torch.testing.assert_close(up["second-moment"], x.square().mean(0)[None])
    torch.testing.assert_close(up["gram"], x.T @ x / len(x))
    torch.testing.assert_close(up["energy"], y.square().sum() / len(y))
    assert "gram" not in found.of("layers.0.up.weight")
    # A table that is a head as well: look-ups by row, and inputs of the product.
    tied = found.of("embed.weight")
    counts = torch.bincount(torch.cat([ids.flatten() for (ids,) in given]), minlength=40)
    torch.testing.assert_close(tied["reads"], counts.float())
    assert tied["tokens"].item() == 96 and tied["second-moment"].shape == (1, 32)
    assert found.of("unknown") == {}
    assert found.for_packing("layers.1.up.weight")["second-moment"].shape == (32,)
    assert found.batches == 3 and found.observers == ("moments", "gram")


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False)
        self.b = nn.Conv1d(6, 8, 3, padding="same", groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).flatten(2))


def test_moments_of_convolutions_are_those_of_unfolded_inputs() -> None:
    torch.manual_seed(0)
    model = Convolutions().eval()
    x = torch.randn(3, 4, 6, 6)
    found = graphopt.calibrate(model, [(x,)])
    unfolded = F.unfold(x, 3, padding=1, stride=2)
    a = found.of("a.weight")
    torch.testing.assert_close(a["second-moment"], unfolded.square().mean((0, 2))[None])
    assert a["tokens"].item() == 3 * 9
    hidden = F.pad(model.a(x).flatten(2), (1, 1)).unfold(2, 3, 1)  # B, 6, L, 3
    each = hidden.square().mean((0, 2)).detach()  # 6, 3
    torch.testing.assert_close(found.of("b.weight")["second-moment"], each.view(2, 9))


def test_gradients_and_traces_are_those_of_the_loss() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)).eval()
    x = torch.randn(7, 6)

    def loss(y: Tensor) -> Tensor:
        return y.square().sum()

    names = ("moments", "gradients", "relevance", "curvature")
    found = graphopt.calibrate(model, [(x,)], observers=names, loss_fn=loss, samples=400)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    hidden = (x @ model[0].weight.T).detach().requires_grad_()  # type: ignore[union-attr]
    y = model[2](torch.tanh(hidden))
    y.retain_grad()
    loss(y).backward()
    assert hidden.grad is not None and y.grad is not None
    torch.testing.assert_close(found.of("0.weight")["output-gradient"], hidden.grad.square().mean(0))
    torch.testing.assert_close(found.of("2.weight")["output-gradient"], y.grad.square().mean(0))
    sizes = (y * y.grad).abs().mean(0).detach()
    torch.testing.assert_close(found.of("2.weight")["relevance"], sizes)
    # The loss is quadratic in the last weight: each of its rows has the Hessian 2 h^T h.
    exact = 2 * torch.tanh(hidden).square().sum() * 3 / 15
    assert found.of("2.weight")["trace"].item() == pytest.approx(exact.item(), rel=0.15)


def test_change_is_that_of_the_layer_around_a_weight() -> None:
    model = Chain().eval()
    given = batches()
    found = graphopt.calibrate(model, given, observers=("change",))
    x, y = seen_by_hooks(model, model.layers[2], given)
    wanted = (1 - F.cosine_similarity(x, y, dim=-1)).mean()
    torch.testing.assert_close(found.of("layers.2.down.weight")["change"], wanted)
    assert "change" not in found.of("embed.weight")


def test_the_model_is_put_back() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4)).train()
    model[0].weight.grad = torch.ones(8, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model[1].eval()
    batch = (torch.randn(4, 8),)
    state = torch.get_rng_state()
    graphopt.calibrate(model, [batch], observers=("moments", "gradients", "change"))
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert model.training and not model[1].training and model[0].weight.grad is not None
    assert torch.equal(model[0].weight.grad, torch.ones(8, 8))
    assert model[0].weight.requires_grad and torch.equal(torch.get_rng_state(), state)


def test_batches_of_other_lengths_and_graph_breaks_are_taken() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            torch._dynamo.graph_break()
            return self.b(x)

    given = [{"x": torch.randn(n, 8)} for n in (2, 3, 5)]
    found = graphopt.calibrate(Broken().eval(), given)
    assert {name: s["tokens"].item() for name, s in found.statistics.items()} == {
        "a.weight": 10,
        "b.weight": 10,
    }


BAD: dict[str, tuple[list[Any], str]] = {
    "none": ([], "there are no batches to calibrate with"),
    "empty": ([(torch.empty(0, 8),)], r"batch 0: input 0 of shape \(0, 8\) has no elements"),
    "nan": ([(torch.ones(2, 8),), (torch.full((2, 8), float("nan")),)], "batch 1: input 0 holds NaN"),
    "infinity": ([{"input": torch.full((2, 8), float("inf"))}], "batch 0: input 'input' holds infinity"),
    "shape": ([(torch.ones(2, 7),)], "batch 0: the model does not run with it"),
    "kind": ([torch.ones(2, 8)], "batch 0: inputs is a Tensor: expected a tuple"),
    "name": ([{"inptu": torch.ones(2, 8)}], "batch 0: .* has no argument 'inptu'; did you mean 'input'"),
    "nothing": ([()], "batch 0 holds no tensor"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_batches_are_named(case: str) -> None:
    given, message = BAD[case]
    with pytest.raises(InputsError, match=message):
        graphopt.calibrate(nn.Sequential(nn.Linear(8, 8)), given)


def test_what_cannot_be_observed_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(UnknownNameError, match="unknown observer 'moment'; did you mean 'moments'"):
        graphopt.calibrate(model, [(torch.ones(2, 8),)], observers=("moment",))
    with pytest.raises(UnknownNameError, match=r"unknown parameter '0.wieght'; did you mean '0.weight'"):
        graphopt.calibrate(model, [(torch.ones(2, 8),)], observers=("gram",), gram=["0.wieght"])
    with pytest.raises(QuantizationError, match="no weight was read in any captured program"):
        graphopt.calibrate(nn.LayerNorm(8), [(torch.ones(2, 8),)])
    with torch.no_grad():
        model[0].weight.fill_(1e30)
    deep = nn.Sequential(model[0], nn.Linear(8, 8))
    with pytest.raises(
        QuantizationError, match=r"1.weight: what it reads is not finite|0.weight: what it reads"
    ):
        graphopt.calibrate(deep, [(torch.full((2, 8), 1e30),)])


def test_progress_is_told_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    graphopt.calibrate(model, [(torch.ones(2, 8),)] * 2, progress=True)
    assert "\rgraphopt: calibrating: batch 2, 4 rows\n" in capsys.readouterr().err
    graphopt.calibrate(model, [(torch.ones(2, 8),)])
    assert capsys.readouterr().err == ""


def test_calibration_is_kept_in_a_file_without_code(tmp_path: Path) -> None:
    found = graphopt.calibrate(Chain().eval(), batches(), observers=("moments", "change"))
    path = tmp_path / "chain.calibration"
    found.save(path)
    again = Calibration.load(path)
    assert again.batches == found.batches and again.observers == found.observers
    torch.testing.assert_close(again.statistics, found.statistics, rtol=0, atol=0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["chain.calibration"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"

    def written(header: object, body: bytes = b"") -> Path:
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + body)
        return path

    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for header, body, message in (
        ({"__metadata__": {"format": "graphopt/calibration@0"}}, b"", "has format 'graphopt/calibration@0'"),
        ({}, b"", "has format None"),
        ({"a::amax": entry}, b"1234", "its bytes are not in the file"),
        ({"a::amax": {**entry, "dtype": "F9"}}, b"12345678", "is no description of one"),
        ([], b"", "the header is no object"),
        ({"__metadata__": {"format": "graphopt/calibration@1"}}, b"", "of how many batches"),
    ):
        with pytest.raises(QuantizationError, match=message):
            Calibration.load(written(header, body))
    path.write_bytes(b"\xff" * 20)
    with pytest.raises(QuantizationError, match="the header is longer than the file"):
        Calibration.load(path)
    path.write_bytes((4).to_bytes(8, "little") + b"nope")
    with pytest.raises(QuantizationError, match="the header is no JSON"):
        Calibration.load(path)
    with pytest.raises(FileNotFoundError):
        Calibration.load(tmp_path / "none")
