"""MLIR of programs: what its text says, what cannot be written, and that it computes what the programs do."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import graphopt
from graphopt import hookimpl
from graphopt.dump.mlir import mlir_module, program_mlir
from graphopt.dump.mlir_operators import operators_apart
from graphopt.errors import DumpError
from graphopt.plugins import KernelSpec, default_host
from graphopt.program import InputSpec, Level, OutputSpec, Program, Signature
from tests.mlir_engine import run_linalg

needs_mlir = pytest.mark.skipif(find_spec("torch_mlir") is None, reason="torch-mlir is not installed")


@torch.library.custom_op("mlir_test::gate", mutates_args=())
def gate(x: torch.Tensor, slope: float) -> torch.Tensor:
    return gate_reference(x, slope)


@gate.register_fake
def _(x: torch.Tensor, slope: float) -> torch.Tensor:
    return torch.empty_like(x)


torch.library.define("mlir_test::sealed", "(Tensor x) -> Tensor")
torch.library.register_fake("mlir_test::sealed", torch.empty_like)


def gate_reference(x: torch.Tensor, slope: float) -> torch.Tensor:
    # Written in place, as references may.
    return x.mul(slope).sigmoid_().mul_(x)


GATE = KernelSpec(
    "gate", "mlir_test::gate", gate_reference, lambda *arguments: None, "x * sigmoid(slope * x)"
)


def program(function: Any, *inputs: torch.Tensor, mode: str = "fake") -> Program:
    gm = make_fx(function, tracing_mode=mode)(*inputs)
    places = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    output = next(node for node in gm.graph.nodes if node.op == "output").args[0]
    results = output if isinstance(output, (list, tuple)) else [output]
    return Program(
        "g0",
        Level.SEMANTIC,
        gm,
        Signature(
            (InputSpec(places[0], "parameter", "proj.weight"), *(InputSpec(p, "input") for p in places[1:])),
            tuple(OutputSpec(node.name, "output", str(k)) for k, node in enumerate(results)),
        ),
    )


def gated(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.mlir_test.gate(x @ weight, 1.5)


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).detach().abs().max() / other.detach().abs().max())


@needs_mlir
def test_text_of_a_small_program_in_both_dialects(golden: Any) -> None:
    small = program(gated, torch.empty(8, 4), torch.empty(2, 8))
    texts = [program_mlir(small, dialect, {"gate": GATE}) for dialect in ("torch", "linalg")]
    assert texts == [program_mlir(small, dialect, {"gate": GATE}) for dialect in ("torch", "linalg")]
    golden("mlir.txt", "".join(texts))
    assert "// mlir_test::gate, 1 x: kept as opaque calls\n" in texts[0]
    assert 'torch.operator "torch.mlir_test.gate"' in texts[0]
    assert "// mlir_test::gate, 1 x: taken apart into its reference\n" in texts[1]
    assert "torch." not in texts[1].partition("module {")[2]


@needs_mlir
def test_an_operator_that_is_no_kernel_is_taken_apart_into_its_own_function() -> None:
    small = program(gated, torch.empty(8, 4), torch.empty(2, 8))
    assert "// mlir_test::gate, 1 x: taken apart into its own function\n" in program_mlir(small, "linalg", {})


@needs_mlir
def test_an_operator_without_a_reference_is_opaque_or_an_error() -> None:
    small = program(lambda w, x: torch.ops.mlir_test.sealed(w * x), torch.empty(3), torch.empty(3))
    assert 'torch.operator "torch.mlir_test.sealed"' in program_mlir(small, "torch", {})
    with pytest.raises(
        DumpError, match="mlir_test::sealed, which has neither a reference nor a function"
    ) as why:
        program_mlir(small, "linalg", {})
    assert "-f mlir keeps it" in why.value.hint and why.value.code == "dump"


@needs_mlir
def test_what_torch_mlir_cannot_lower_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    counted = program(lambda w, x: torch.histc(x * w, 4), torch.empty(3), torch.empty(3))
    assert "torch.aten.histc" in program_mlir(counted, "torch", {})
    with pytest.raises(DumpError, match=r"torch-mlir cannot lower program g0 to linalg: .*aten\.histc"):
        program_mlir(counted, "linalg", {})
    assert not capfd.readouterr().err


def test_without_torch_mlir_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch_mlir", "torch_mlir.extras", "torch_mlir.extras.fx_importer"):
        monkeypatch.setitem(sys.modules, name, None)
    small = program(gated, torch.empty(8, 4), torch.empty(2, 8))
    with pytest.raises(DumpError, match="through torch-mlir, which cannot be imported") as why:
        program_mlir(small, "torch", {})
    assert "pip install 'graphopt[mlir]'" in why.value.hint


@needs_mlir
def test_writes_become_results_and_constants_arguments() -> None:
    table = torch.tensor([1.0, 2.0, 3.0])

    def step(weight: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        count.add_(1)
        return weight * count + table

    gm = make_fx(step)(torch.ones(3), torch.zeros(3))
    fake = torch._subclasses.FakeTensorMode()
    for node in gm.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = fake.from_tensor(torch.empty(3))
    places = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    specs = (InputSpec(places[0], "parameter", "w"), InputSpec(places[1], "buffer", "count"))
    writing = Program("g0", Level.SEMANTIC, gm, Signature(specs, ()))
    for dialect in ("torch", "linalg"):
        text = program_mlir(writing, dialect, {})
        assert "//   %arg2  constant" in text and "//   #1     write      count\n" in text
    made = mlir_module(writing, "linalg", {})
    assert made.inputs == (*places, "_tensor_constant0") and made.written == (places[1],)
    result, count = run_linalg(made.module, "g0", [torch.full((3,), 2.0), torch.zeros(3), table])
    assert count.tolist() == [1.0, 1.0, 1.0] and result.tolist() == [3.0, 4.0, 5.0]


@needs_mlir
def test_symbolic_sizes_stay_symbolic() -> None:
    small = program(gated, torch.empty(8, 4), torch.empty(6, 8), mode="symbolic")
    assert "symbol " in program_mlir(small, "torch", {"gate": GATE})
    made = mlir_module(small, "linalg", {"gate": GATE})
    assert "tensor<?x?xf32>" in str(made.module)
    weight = torch.randn(8, 4)
    x = torch.randn(11, 8)
    (result,) = run_linalg(made.module, "g0", [weight, x])
    assert relative(result, gate_reference(x @ weight, 1.5)) < 1e-5


@pytest.mark.parametrize("masked", ["nothing", "causal", "mask"])
@pytest.mark.parametrize("groups", [4, 2])
def test_attention_is_taken_apart_into_what_it_computes(groups: int, masked: str) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 5, 8) for heads in (4, groups, groups))
    options = {"attn_mask": torch.randn(2, 4, 5, 5)} if masked == "mask" else {}
    causal = masked == "causal"
    aten = torch.ops.aten
    forward = aten._scaled_dot_product_flash_attention_for_cpu.default
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    apart = operators_apart()
    results = forward(query, key, value, 0.0, causal, **options)
    for one, other in zip(apart[forward](query, key, value, 0.0, causal, **options), results, strict=True):
        assert relative(one, other) < 1e-5
    given = torch.randn_like(results[0])
    arguments = (given, query, key, value, *results, 0.0, causal)
    for one, other in zip(
        apart[backward](*arguments, **options), backward(*arguments, **options), strict=True
    ):
        assert relative(one, other) < 1e-5
    assert apart[forward](query, key, value, 0.5, causal) is NotImplemented


_KERNELS: dict[str, tuple[Any, tuple[torch.Tensor, ...]]] = {
    "row-norm": (
        lambda x, w: torch.ops.graphopt.row_norm(x, w, None, 1e-6, False, 0.0, False, torch.float32)[0],
        (torch.randn(6, 32), torch.randn(32)),
    ),
    "linear-cross-entropy": (
        lambda x, w, t: torch.ops.graphopt.linear_cross_entropy(
            x, w, None, t, 2, "mean", -100, 0.0, 1.0, 0.0, torch.float32
        )[0],
        (torch.randn(6, 32), torch.randn(50, 32), torch.arange(6)),
    ),
    "attention": (
        lambda q, k, v: torch.ops.graphopt.attention(q, k, v, None, 0.3, 0.0, None, 0)[0],
        (torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)),
    ),
    "linear-int8": (
        lambda x, codes, scales: torch.ops.graphopt.linear_int8(x, codes, scales, None),
        (torch.randn(6, 32), torch.randint(-127, 128, (8, 32), dtype=torch.int8), torch.rand(8)),
    ),
}


@needs_mlir
@pytest.mark.slow
@pytest.mark.parametrize("name", _KERNELS)
def test_kernels_of_graphopt_compute_the_same_without_it(name: str) -> None:
    kernels = default_host().kernels()
    assert default_host().schemes()
    call, inputs = _KERNELS[name]
    made = mlir_module(program(call, *inputs), "linalg", kernels)
    assert list(made.references.values()) == [1]
    (result,) = run_linalg(made.module, "g0", inputs)
    assert relative(result, call(*inputs)) < 1e-5


class Block(nn.Module):
    """Attention and a perceptron; ``own``: with the operator of these tests, which has no gradient."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.own = own
        self.norm = nn.LayerNorm(16)
        self.qkv, self.up, self.down = nn.Linear(16, 48), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).transpose(1, 3).unbind(2)
        mixed = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + mixed.transpose(1, 2).flatten(-2)
        inner = self.up(x)
        inner = torch.ops.mlir_test.gate(inner, 0.5) if self.own else nn.functional.gelu(inner)
        return x + self.down(inner)


class Kernels:
    """A plugin whose kernel is the operator of these tests."""

    graphopt_api = 1

    @hookimpl
    def graphopt_kernels(self) -> list[KernelSpec]:
        return [GATE]


@needs_mlir
@pytest.mark.slow
def test_an_optimized_model_computes_what_it_did() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(own=True), Block(own=False)), torch.randn(4, 32, 16)
    with torch.no_grad():
        optimized = graphopt.optimize(model, (x,), emit="eager", plugins=(Kernels(),))
        expected = model(x)
    # Only a plugin of this call knows the reference.
    assert "// mlir_test::gate, 1 x: taken apart into its reference\n" in optimized.dump("mlir-linalg")
    found = optimized.programs[0]
    parameters = dict(model.named_parameters())
    inputs = [parameters[s.fqn].detach() if s.role == "parameter" else x for s in found.signature.inputs]
    (result,) = run_linalg(mlir_module(found, "linalg", {"gate": GATE}).module, found.name, inputs)
    assert relative(result, expected) < 1e-4


@needs_mlir
@pytest.mark.slow
def test_an_optimized_step_computes_the_gradients_that_the_model_has() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Block(own=False) for _ in range(3))), torch.randn(4, 32, 16)
    optimized = graphopt.optimize(
        model, (x,), emit="eager", budget="80%", loss_fn=lambda y: y.square().mean()
    )
    assert any(rewrite.id.startswith("insert-checkpoints") for rewrite in optimized.report.rewrites)
    parameters = dict(model.named_parameters())
    expected = model(x)
    tangent = torch.randn_like(expected)
    gradients = dict(
        zip(parameters, torch.autograd.grad(expected, [*parameters.values()], tangent), strict=True)
    )
    held = {"input": x, "tangent": tangent}
    checked: list[str] = []
    for found in optimized.programs:
        if found.level is Level.SEMANTIC:
            continue
        inputs = [
            parameters[spec.fqn].detach()
            if spec.fqn in parameters
            else held.get(spec.role, held.get(spec.node))
            for spec in found.signature.inputs
        ]
        results = run_linalg(mlir_module(found, "linalg", {}).module, found.name, inputs)
        for spec, result in zip(found.signature.outputs, results, strict=True):
            held[spec.node] = result
            target = next(
                (s.fqn for s in found.signature.inputs if spec.target in (s.node, s.fqn)), spec.target
            )
            if spec.role in ("output", "gradient"):
                checked.append(spec.role)
                right = expected if spec.role == "output" else gradients[target]
                assert relative(result, right) < 1e-4, (found.name, target)
    # The joint program has all; of the lowered ones the forward has the output, the backward the gradients.
    assert checked.count("output") == 2 and checked.count("gradient") == 2 * len(parameters)
