"""Verification: structure against what a program was, numbers against the model."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import graphopt
from graphopt.errors import VerificationError
from graphopt.program import InputSpec, Level, OutputSpec, Program, Signature
from graphopt.verify import Interface, interface_of, verify_numerically, verify_structure
from tests.programs import semantic

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.last(self.drop(self.norm(self.first(x)).relu()))
        return {"loss": y.square().mean(), "y": y}


class Replaced(nn.Module):
    """An optimized model whose forward is another function."""

    def __init__(self, optimized, forward) -> None:
        super().__init__()
        self.programs, self._driver, self._loss = (
            optimized.programs,
            optimized._driver,
            lambda out: out["loss"],
        )
        self._forward = forward

    def forward(self, *args):
        return self._forward(*args)


def loss_of(output: dict[str, torch.Tensor]) -> torch.Tensor:
    return output["loss"]


@functools.cache
def faithful() -> tuple[nn.Module, graphopt.Optimized, tuple[torch.Tensor]]:
    return setup(Net())


def setup(model: nn.Module) -> tuple[nn.Module, graphopt.Optimized, tuple[torch.Tensor]]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    inputs = (torch.randn(4, 8, requires_grad=True),)
    return model, graphopt.optimize(model, inputs, emit="eager", loss_fn=loss_of), inputs


def test_a_faithful_model_passes_and_all_state_is_put_back() -> None:
    model, optimized, inputs = faithful()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    random = torch.get_rng_state()
    verify_numerically(model, optimized, inputs)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert inputs[0].grad is None


def test_optimize_verifies_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    model, inputs = Net(), (torch.randn(4, 8),)
    compared: list[tuple[object, object]] = []

    def comparing(model: object, optimized: object, inputs: object) -> None:
        verify_numerically(model, optimized, inputs)
        compared.append((model, inputs))

    monkeypatch.setattr("graphopt.verify.verify_numerically", comparing)
    graphopt.optimize(model, inputs, emit="eager", loss_fn=loss_of)
    assert not compared
    graphopt.optimize(model, inputs, emit="eager", loss_fn=loss_of, verify="numeric")
    assert compared == [(model, inputs)]


def _detaches_the_last_bias(model: Net, x: torch.Tensor) -> dict[str, torch.Tensor]:
    y = model.drop(model.norm(model.first(x)).relu())
    y = nn.functional.linear(y, model.last.weight, model.last.bias.detach())
    return {"loss": y.square().mean(), "y": y}


def _scales_a_gradient(model: Net, x: torch.Tensor) -> dict[str, torch.Tensor]:
    out = model(x)
    value = model.last.weight.sum() * 1e-3
    return {"loss": out["loss"] + (value - value.detach()), "y": out["y"]}


def _skips_statistics(model: Net, x: torch.Tensor) -> dict[str, torch.Tensor]:
    mean = model.norm.running_mean.clone()
    out = model(x)
    # Past autograd, which would refuse the backward of a norm whose statistics were written.
    model.norm.running_mean.data.copy_(mean)
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m, x: {**m(x), "y": m(x)["y"]},
            r"output 1: the largest difference is .*, allowed is .* \(0.0001 of the largest element",
        ),
        (
            lambda m, x: {**m(x), "y": m(x)["y"].double()},
            "output 1: dtype is torch.float64, the model's is torch.float32",
        ),
        (
            lambda m, x: {**m(x), "y": m(x)["y"][:2]},
            r"output 1: shape is torch.Size\(\[2, 8\]\), the model's is",
        ),
        (lambda m, x: {**m(x), "y": float("nan") * m(x)["y"]}, "output 1: the largest difference is inf"),
        (lambda m, x: tuple(m(x).values()), "the outputs have another structure: the model returns"),
        (_detaches_the_last_bias, "gradient of last.bias: only the model has it"),
        (_scales_a_gradient, "gradient of last.weight: the largest difference is 0.001"),
        (_skips_statistics, "buffer norm.running_mean: the largest difference is"),
    ],
)
def test_what_differs_is_named(change, message: str) -> None:
    model, optimized, inputs = faithful()
    other = Replaced(optimized, lambda x: change(model, x))
    other._loss = lambda out: out["loss"] if isinstance(out, dict) else out[0]
    with pytest.raises(VerificationError, match=message):
        verify_numerically(model, other, inputs)


class Cancelling(nn.Module):
    """Loses all digits in float32: any order of the sum is as good as any other."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = (1e8 + x).sum() - 1e8 * x.numel()
        return {"loss": y, "y": y.detach()}


def test_what_the_type_cannot_tell_is_held_against_float64() -> None:
    model, optimized, inputs = setup(Cancelling())
    exact = float(inputs[0].detach().double().sum())
    closer = Replaced(optimized, lambda x: {"loss": x.sum(), "y": torch.tensor(exact, dtype=torch.float32)})
    verify_numerically(model, closer, inputs)
    further = Replaced(optimized, lambda x: {"loss": x.sum() + 1e9, "y": torch.tensor(exact + 1e9)})
    with pytest.raises(VerificationError, match=r"output 0: the largest difference is 1e\+09"):
        verify_numerically(model, further, inputs)


def test_a_norm_that_nobody_reads_keeps_its_statistics() -> None:
    class Watching(Net):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            self.norm(x)
            return {"loss": self.first(x).sum()}

    model, optimized, inputs = setup(Watching())
    verify_numerically(model, optimized, inputs)
    before = model.norm.running_mean.clone()
    optimized(*inputs)
    assert not torch.equal(model.norm.running_mean, before)


def test_structure_rules_name_node_and_rule() -> None:
    program = semantic(lambda x: x.cos() + 1, torch.randn(4))
    interface = interface_of(program)
    verify_structure(program, interface)
    (cos,) = program.nodes(aten.cos)
    value = cos.meta.pop("val")
    message = r"program g0 @ semantic: node 'cos' \(.*\) has no meta\['val'\]: rule 'values'"
    with pytest.raises(VerificationError, match=message):
        verify_structure(program, interface)
    cos.meta["val"] = value
    (add,) = program.nodes(aten.add)
    add.append(cos)
    with pytest.raises(VerificationError, match=r"used before it has been defined.*: rule 'lint'"):
        verify_structure(program, interface)
    add.prepend(cos)
    with program.graph.inserting_before(cos):
        extra = program.graph.placeholder("extra")
    extra.meta["val"] = value
    with pytest.raises(VerificationError, match="input was nothing, is 'extra': f32"):
        verify_structure(program, interface)


def test_an_output_for_an_input_may_be_that_input_written_in_place() -> None:
    """Where a caller copies a result to an input, the graph may as well write the input itself."""

    def made(*, target: str, written: bool) -> tuple[Program, Interface]:
        with torch._subclasses.FakeTensorMode():
            gm = make_fx(lambda p, q: (p + q, q * 2))(torch.empty(4), torch.empty(4))
        p, q = (node for node in gm.graph.nodes if node.op == "placeholder")
        output = next(node for node in gm.graph.nodes if node.op == "output")
        new, double = output.args[0]
        inputs = tuple(InputSpec(node.name, "parameter", f"w.{k}") for k, node in enumerate((p, q)))
        outputs = (OutputSpec(new.name, "mutation", target), OutputSpec(double.name, "output", "0"))
        program = Program("g0", Level.JOINT, gm, Signature(inputs, outputs))
        before = interface_of(program)
        if written:
            with gm.graph.inserting_before(output):
                copy_ = gm.graph.call_function(aten.copy_.default, (p, new))
            copy_.meta["val"] = p.meta["val"]
        output.args = ((p, double),)
        outputs = (OutputSpec(p.name, "mutation", target), outputs[1])
        program.signature = Signature(inputs, outputs)
        return program, before

    verify_structure(*made(target="w.0", written=True))
    with pytest.raises(VerificationError, match="now with input p_1: rule 'aliasing'"):
        verify_structure(*made(target="w.0", written=False))
    with pytest.raises(VerificationError, match="now with input p_1: rule 'aliasing'"):
        verify_structure(*made(target="w.1", written=True))
