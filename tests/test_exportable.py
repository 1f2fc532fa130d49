"""Inference steps as torch.export and ONNX see them: the rewritten program, not the model's code."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import ArtefactError, CaptureError

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Attention from plain products, which fuse-attention rewrites, and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.register_buffer("scale", torch.tensor(0.25))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).split(16, -1)
        weights = torch.softmax(q @ k.transpose(-1, -2) * 0.25, -1)
        return x + self.out(weights @ v) * self.scale


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.embed = nn.Parameter(torch.randn(16))
        self.tied = self.embed

    def forward(self, x: torch.Tensor, shift: torch.Tensor | None = None, *, twice: bool = False) -> Any:
        y = x * self.embed if shift is None else x * self.embed + shift
        for block in self.blocks:
            y = block(y)
        return {"out": y * 2 if twice else y, "mean": y.mean(), "given": x, "weight": self.tied}


def optimized(model: nn.Module, inputs: Any = (X,), **options: Any) -> graphopt.Optimized:
    torch._dynamo.reset()
    with torch.no_grad():
        return graphopt.optimize(model, inputs, emit="eager", cache=False, on_error="raise", **options)


def called(program: Any) -> set[str]:
    return {node.target.name() for node in program.graph.nodes if hasattr(node.target, "name")}


def round_trip(module: nn.Module, args: Any, kwargs: Any = None, *, strict: bool = False) -> Any:
    """(the exported program, the same saved and loaded)"""
    with torch.no_grad():
        program = torch.export.export(module, args, kwargs, strict=strict)
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    return program, torch.export.load(stream)


@pytest.mark.parametrize("strict", [False, True])
def test_what_is_exported_is_the_rewritten_program(strict: bool) -> None:
    model = Net().eval()
    fast = optimized(model, {"x": X, "shift": X + 1, "twice": True})
    with torch.no_grad():
        right = fast(X, X + 1, twice=True)
    exportable = fast.exportable()
    program, loaded = round_trip(exportable, (X,), {"shift": X + 1, "twice": True}, strict=strict)
    (semantic,) = (p for p in fast.programs if str(p.level) == "semantic")
    rewritten = called(semantic)
    # The model calls softmax, the program does not.
    assert "aten::scaled_dot_product_attention" in rewritten & called(program)
    assert not {"aten::softmax.int", "aten::matmul"} & (rewritten | called(program))
    with torch.no_grad():
        found = loaded.module()(X, shift=X + 1, twice=True)
    assert found.keys() == right.keys()
    assert all(torch.equal(found[name], right[name]) for name in right)
    # Named as the model's, and its values are read when it is exported, not when it was captured.
    assert program.state_dict.keys() <= model.state_dict().keys()
    with torch.no_grad():
        model.blocks[1].out.weight.mul_(2)
        again = exportable(X, X + 1, twice=True)["out"]
        assert torch.equal(again, fast(X, X + 1, twice=True)["out"]) and not torch.equal(again, right["out"])


def packed() -> tuple[graphopt.Optimized, torch.Tensor]:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).eval()
    graphopt.quantize(model, (X,), schemes=["int8"])
    fast = optimized(model)
    with torch.no_grad():
        return fast, fast(X)


def test_operators_of_kernels_are_called_or_are_what_they_compute() -> None:
    fast, right = packed()
    for references in (False, True):
        program, loaded = round_trip(fast.exportable(references=references), (X,))
        namespaces = {name.partition("::")[0] for name in called(program)}
        assert ("graphopt" in namespaces) is not references, called(program)
        with torch.no_grad():
            found = loaded.module()(X)
        torch.testing.assert_close(found, right, rtol=0, atol=0 if not references else 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("references", [False, True])
def test_another_process_runs_it(references: bool, tmp_path: Path) -> None:
    fast, right = packed()
    with torch.no_grad():
        program = torch.export.export(fast.exportable(references=references), (X,))
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((X, right), tmp_path / "example.pt")
    needed = "" if references else "import graphopt_kernels"
    script = f"""
import sys, torch
{needed}
program = torch.export.load({str(tmp_path / "program.pt2")!r})
x, right = torch.load({str(tmp_path / "example.pt")!r})
with torch.no_grad():
    assert (program.module()(x) - right).abs().max() <= {1e-6 if references else 0.0}
assert ("graphopt_kernels" in sys.modules) is {not references}
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


@pytest.mark.slow
def test_the_chain_of_segments_is_exported_as_well() -> None:
    torch._dynamo.reset()
    model = Net().eval()
    with torch.no_grad():
        fast = graphopt.optimize(model, (X,), emit="inductor", cache=False, on_error="raise")
        program, loaded = round_trip(fast.exportable(), (X,))
        assert "aten::scaled_dot_product_attention" in called(program)
        torch.testing.assert_close(loaded.module()(X)["out"], model(X)["out"])


@pytest.mark.slow
def test_onnx_runs_what_was_rewritten(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    from onnx.reference import ReferenceEvaluator

    model = nn.Sequential(*(Block() for _ in range(2))).eval()
    fast = optimized(model)
    quantized, rounded = packed()
    for made, right in ((fast, model(X)), (quantized, rounded)):
        program = torch.onnx.export(made.exportable(references=True), (X,), dynamo=True, verbose=False)
        program.save(tmp_path / "model.onnx")
        checked = onnx.load(tmp_path / "model.onnx")
        onnx.checker.check_model(checked)
        assert {opset.domain for opset in checked.opset_import} <= {"", "pkg.torch.onnx"}
        (found,) = ReferenceEvaluator(checked).run(None, {checked.graph.input[0].name: X.numpy()})
        # ONNX sums in another order; outputs are of the order of one.
        torch.testing.assert_close(torch.from_numpy(found), right.detach(), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_exported_is_told() -> None:
    torch._dynamo.reset()
    with pytest.raises(CaptureError, match=r"^the model was not captured: it was not called yet"):
        graphopt.optimize(Net()).exportable()
    training = graphopt.optimize(Block(), (X,), emit="eager", cache=False)
    with pytest.raises(ArtefactError, match=r"^a training step cannot be exported: exporters take ") as told:
        training.exportable()
    assert told.value.hint == "call eval() and optimize under torch.no_grad()"

    class Broken(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + 1
            torch._dynamo.graph_break()
            return super().forward(x)

    torch._dynamo.reset()
    with torch.no_grad():
        broken = graphopt.optimize(Broken().eval(), (X,), emit="eager", cache=False)
    with pytest.raises(ArtefactError, match=r"^the step is several programs and Python between them"):
        broken.exportable()


def test_the_module_itself_is_not_taken_for_the_program() -> None:
    fast = optimized(Block().eval())
    with torch.no_grad(), pytest.raises(CaptureError, match=r"^an exporter traces the code of the") as told:
        torch.export.export(fast, (X,))
    assert told.value.hint == "export fast.exportable(), or the model itself"
    with torch.no_grad():
        assert torch.equal(fast(X), fast.exportable()(X))
