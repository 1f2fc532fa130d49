"""``graphopt emit``: a folder that runs where graphopt is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import nn

import graphopt
from graphopt.cli.main import cli
from graphopt.errors import EmitError
from graphopt.tensors_file import write_tensors
from graphopt_kernels.emit.write import write_program
from graphopt_passes.window_attention import WindowAttention
from tests.programs import host

pytest.importorskip("triton")

ALONE = """
import os, runpy, sys
for name in ("graphopt", "graphopt_kernels", "graphopt_passes", "graphopt_cost_model", "safetensors"):
    sys.modules[name] = None  # importing it now raises
sys.path.insert(0, "")
import triton
sys.argv = ["program.py", *sys.argv[1:]]
for interpreted in ("1", "0"):
    os.environ["TRITON_INTERPRET"] = interpreted
    try:
        runpy.run_path("program.py", run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, ended.code
"""
"""Checks a program twice: by its kernels in Triton's interpreter, and by separate operators."""


def run_alone(folder: Path, *arguments: str, code: str = ALONE) -> str:
    """Run ``program.py`` of ``folder`` in a process in which graphopt cannot be imported."""
    # Read by triton when it is imported: what it compiles is then interpreted.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


def emitted(model: nn.Module, inputs: Any, folder: Path, **options: Any) -> graphopt.Optimized:
    torch.manual_seed(0)
    fast = graphopt.optimize(model, inputs, emit="eager", dynamic_shapes=False, on_error="raise", **options)
    write_program(fast, inputs, folder / "out", "a test")
    return fast


def checks(folder: Path) -> None:
    """Alone it gives what was recorded, either way."""
    interpreted, plain = run_alone(folder / "out", "--check").splitlines()
    assert "largest error" in plain and "largest error" in interpreted


class Projected(nn.Module):
    """Queries, keys and values of one projection: the gradients of the three are laid into one, in another
    order of memory than they come in."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.out(attended.transpose(1, 2).flatten(2)).square().mean()


def test_kernels_hand_values_on_in_the_layout_that_readers_expect(tmp_path: Path) -> None:
    emitted(Projected(), (torch.randn(2, 6, 32),), tmp_path, pipeline=[])
    checks(tmp_path)


class Block(nn.Module):
    """What most models have: a norm, a gated product, a residual, dropout, tied weights and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.norm = nn.LayerNorm(32)
        self.gate, self.up = nn.Linear(32, 64), nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.batch_norm = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, ids: torch.Tensor, labels: torch.Tensor, rate: float = 0.1) -> dict[str, Any]:
        h = self.embedding(ids)
        n = self.norm(h)
        h = h + F.dropout(self.down(F.silu(self.gate(n)) * self.up(n)), rate, self.training) * self.scale
        h = self.batch_norm(h.flatten(0, 1)).view_as(h)
        logits = self.head(h)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits, "kept": [ids, None, "text"]}


def block_inputs() -> dict[str, Any]:
    ids = torch.randint(0, 50, (4, 8))
    return {"ids": ids, "labels": ids.roll(1), "rate": 0.1}


def test_a_training_step_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = Block(), block_inputs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    emitted(model, inputs, tmp_path)
    checks(tmp_path)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items()), "the model was changed"
    assert all(p.grad is None for p in model.parameters())


def test_a_program_is_a_module_with_the_names_of_the_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Block()
    emitted(model, block_inputs(), tmp_path)
    torch.save(model.state_dict(), tmp_path / "out" / "checkpoint.pt")
    said = run_alone(
        tmp_path / "out",
        code="""
import sys
sys.modules["graphopt"] = None
sys.path.insert(0, "")
import torch
from program import load
program = load()
missing, unexpected = program.load_state_dict(torch.load("checkpoint.pt"), strict=False)
assert not missing, missing
print(sorted(unexpected))
before = program.batch_norm.running_mean.clone()
out = program(torch.zeros(4, 8, dtype=torch.long), torch.zeros(4, 8, dtype=torch.long), 0.1)
assert not torch.equal(before, program.batch_norm.running_mean)
assert out["kept"][1:] == [None, "text"] and out["logits"].shape == (4, 8, 50)
out["loss"].backward()
optimizer = torch.optim.SGD(program.parameters(), 0.1)
optimizer.step()
for wrong in ((torch.zeros(4, 9, dtype=torch.long),) * 2, (torch.zeros(4, 8),) * 2, (None, None)):
    try:
        program(*wrong, 0.1)
    except ValueError as error:
        print(error)
try:
    program(torch.zeros(4, 8, dtype=torch.long), torch.zeros(4, 8, dtype=torch.long), 0.2)
except ValueError as error:
    print(error)
""",
    )
    assert said.splitlines() == [
        # Tied: the program has one of the two names.
        "['head.weight']",
        "ids is (4, 9), torch.int64, on cpu; this program takes (4, 8), torch.int64, on cpu",
        "ids is (4, 8), torch.float32, on cpu; this program takes (4, 8), torch.int64, on cpu",
        "ids is NoneType; expected a tensor of shape (4, 8)",
        "rate is 0.2; this program was made for 0.1",
    ]


def test_inference_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Block().eval()
    with torch.no_grad():
        emitted(model, block_inputs(), tmp_path)
    checks(tmp_path)
    assert "class _Step" not in (tmp_path / "out" / "program.py").read_text()


def tower() -> nn.Module:
    return nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1))])


@pytest.mark.parametrize("share", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_a_budget_is_carried_over(tmp_path: Path, share: float) -> None:
    """Operators that run again, under the random state of their first run, and packed saved values."""
    torch.manual_seed(0)
    model, inputs = tower(), (torch.randn(512, 64),)
    points = graphopt.optimize(model, inputs, emit="eager").frontier()
    least, most = points[0].peak_bytes, points[-1].peak_bytes
    fast = emitted(model, inputs, tmp_path, budget=round(least + share * (most - least)))
    checks(tmp_path)
    text = (tmp_path / "out" / "program.py").read_text()
    assert "_with_random_state(" in text
    packed = fast.plan.choices[0].alternative == "compress-saved"
    assert packed == (tmp_path / "out" / "ops").is_dir()


def test_a_linear_cross_entropy_is_carried_over(tmp_path: Path) -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(500, 32), nn.Linear(32, 500, bias=False)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            h = torch.tanh(self.embedding(ids))
            return F.cross_entropy(self.head(h).flatten(0, 1), ids.flatten())

    torch.manual_seed(0)
    model, inputs = Tagger(), (torch.randint(0, 500, (8, 64)),)
    least = graphopt.optimize(model, inputs, emit="eager").frontier()[0].peak_bytes
    fast = emitted(model, inputs, tmp_path, budget=least)
    assert fast.plan.choices[0].alternative.startswith("linear-cross-entropy")
    checks(tmp_path)
    source = (tmp_path / "out" / "ops" / "linear_cross_entropy.py").read_text()
    assert "import graphopt" not in source and "from graphopt." not in source


class Windowed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        place = torch.arange(x.shape[1])
        near = (place[None, :] <= place[:, None]) & (place[None, :] > place[:, None] - 4)
        return F.scaled_dot_product_attention(q, k, v, near).square().mean()


def test_attention_is_written_out(tmp_path: Path) -> None:
    """graphopt's own, forward and backward: nothing of graphopt is carried along for it."""
    emitted(Windowed(), (torch.randn(2, 12, 32),), tmp_path, pipeline=[WindowAttention(everywhere=True)])
    checks(tmp_path)
    text = (tmp_path / "out" / "program.py").read_text()
    assert "k.attention_" in text and "k.attention_backward_" in text
    assert not (tmp_path / "out" / "ops").exists()


def test_attention_that_no_kernel_computes_is_carried_over(tmp_path: Path) -> None:
    """Files that import each other, kernels among them."""

    class Exact(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = super().forward(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
            return torch.ops.graphopt.attention(q, k, v, None, 0.25, 0.0, 3, 0)[0].square().mean()  # type: ignore[no-any-return]

    emitted(Exact(32, 96).double(), (torch.randn(2, 12, 32).double(),), tmp_path)
    checks(tmp_path)
    folder = tmp_path / "out" / "ops"
    assert {path.name for path in folder.glob("attention*")} == {
        f"attention{part}.py"
        for part in ("", "_launch", "_reference", "_triton", "_backward_triton", "_bias_triton")
    }
    assert not any("from graphopt." in path.read_text() for path in folder.glob("*.py"))


@pytest.mark.slow
def test_dropout_by_a_seed_is_carried_over(tmp_path: Path) -> None:
    """Its seed is drawn by the program."""
    host().kernels()

    class Dropping(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = super().forward(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
            seed = torch.randint(2**63 - 1, (1,))
            mixed = torch.ops.graphopt.attention(q, k, v, None, 0.25, 0.0, 3, 0, 0.5, seed)[0]
            return torch.ops.graphopt.dropout_add(mixed, v, 0.5, seed).square().mean()  # type: ignore[no-any-return]

    emitted(Dropping(32, 96), (torch.randn(2, 12, 32),), tmp_path)
    checks(tmp_path)
    folder = tmp_path / "out" / "ops"
    assert {"philox.py", "philox_triton.py", "dropout_add.py"} <= {path.name for path in folder.glob("*.py")}
    assert not any("graphopt_kernels" in path.read_text() for path in folder.glob("*.py"))


class Padded(nn.Module):
    """A mask computed from positions and from which tokens are padding, as models of text have it."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(32, 96)

    def forward(self, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        place = torch.arange(x.shape[1])
        hidden = (place[None, :] > place[:, None])[None, None] | ~kept[:, None, None, :]
        mask = torch.where(hidden, torch.finfo(x.dtype).min, 0.0)
        return F.scaled_dot_product_attention(q, k, v, mask)


def test_the_library_s_attention_is_written_out_with_its_mask(tmp_path: Path) -> None:
    kept = torch.ones(2, 12, dtype=torch.bool)
    kept[1, 9:] = False
    with torch.no_grad():
        emitted(Padded().eval(), {"x": torch.randn(2, 12, 32), "kept": kept}, tmp_path, pipeline=[])
    checks(tmp_path)
    (path,) = [p for p in (tmp_path / "out" / "kernels").iterdir() if "attention" in p.name]
    assert "``bias`` counts heads over batches" in path.read_text()
    # Queries, keys and values lie in one tensor; nothing of the size of the scores is read.
    assert "reads   in0: float32, 24 x 96" in path.read_text()


def test_sizes_are_fixed(tmp_path: Path) -> None:
    x = torch.randn(4, 8)
    torch._dynamo.mark_dynamic(x, 0)
    fast = graphopt.optimize(nn.Linear(8, 8), (x,), emit="eager")
    with pytest.raises(EmitError, match="takes a size, 4, that is known at run time alone") as error:
        write_program(fast, (x,), tmp_path / "out", "dynamic")
    assert error.value.hint == "optimize with dynamic_shapes=False: programs are written for fixed sizes"


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {}


def _model(make: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> Callable[[], Any]:
    MODELS[make.__name__.strip("_")] = make
    return make


@_model
def _llama() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
    )
    ids = torch.randint(0, 100, (2, 16))
    return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids, "use_cache": False}


@_model
def _convnext() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], image_size=64)
    model = ConvNextForImageClassification(config)
    return model, {"pixel_values": torch.randn(2, 3, 64, 64), "labels": torch.tensor([0, 1])}


@pytest.mark.parametrize("name", ["llama", pytest.param("convnext", marks=pytest.mark.slow)])
def test_models_of_transformers_alone(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    emitted(model, inputs, tmp_path)
    checks(tmp_path)
    kernels = list((tmp_path / "out" / "kernels").glob("*.py"))
    named = [path for path in kernels if "\nlayers  " in path.read_text()]
    assert len(named) >= len(kernels) / 2, "kernels do not say which layers they are for"


def test_equal_layers_share_kernels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = (torch.randn(64, 32),)
    for depth in (2, 8):
        layers = [m for _ in range(depth) for m in (nn.Linear(32, 32), nn.GELU(), nn.LayerNorm(32))]
        fast = graphopt.optimize(nn.Sequential(*layers), x, emit="eager", dynamic_shapes=False)
        made = write_program(fast, x, tmp_path / str(depth), "depth")
        assert made.kernels > depth and made.files <= 8
    first, second = (sorted(p.name for p in (tmp_path / d / "kernels").iterdir()) for d in "28")
    assert first == second


def test_writing_again_replaces_what_was_written_and_nothing_else(tmp_path: Path) -> None:
    x = (torch.randn(4, 8),)
    fast = graphopt.optimize(nn.Linear(8, 8), x, emit="eager", dynamic_shapes=False)
    for _ in range(2):
        write_program(fast, x, tmp_path / "out", "twice")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious.txt").write_text("mine")
    with pytest.raises(EmitError, match="exists and holds something else"):
        write_program(fast, x, other, "twice")
    assert (other / "precious.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(EmitError, match="exists and holds something else"):
        write_program(fast, x, tmp_path / "file", "twice")


def test_graph_breaks_are_refused(tmp_path: Path) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.linear(x)
            torch._dynamo.graph_break()
            return self.linear(h)

    x = (torch.randn(4, 8),)
    fast = graphopt.optimize(Broken(), x, emit="eager", dynamic_shapes=False)
    with pytest.raises(EmitError, match="the model runs as 2 programs with code of its own between them"):
        write_program(fast, x, tmp_path / "out", "broken")
    assert not (tmp_path / "out").exists()


def test_tensors_are_written_as_safetensors_reads_them(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {
        "a": torch.randn(3, 4).t(),
        "b.c": torch.randn(2).to(torch.bfloat16),
        "scalar": torch.tensor(7),
        "none": torch.empty(0, 3),
        "flags": torch.tensor([True, False]),
    }
    write_tensors(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert set(found) == set(tensors)
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


# --- the command ----------------------------------------------------------------------------


def test_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "emit_target.py").write_text(
        "import torch\n\ndef mlp():\n    torch.manual_seed(0)\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8))\n"
        "    return model, (torch.randn(4, 8),)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    runner = CliRunner()
    done = runner.invoke(cli, ["emit", "emit_target:mlp", "-o", "out", "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["directory"] == "out" and said["kernels"] >= 1
    assert "largest error" in run_alone(tmp_path / "out", "--check", "--device", "cpu")
    done = runner.invoke(cli, ["dump", "emit_target:mlp", "--format", "triton"], catch_exceptions=False)
    assert "@jit" in done.stdout and "tl.dot(" in done.stdout
    assert "1 x nothing goes into one kernel with this product" in done.stdout
    done = runner.invoke(cli, ["emit", "emit_target:mlp", "-o", "missing/out"])
    assert done.exit_code == 2 and "there is no folder 'missing' to write out into" in done.output
    with pytest.raises(EmitError, match="is at the joint level; kernels are made of lowered programs"):
        runner.invoke(
            cli, ["dump", "emit_target:mlp", "--format", "triton", "--stage", "joint"], catch_exceptions=False
        )
