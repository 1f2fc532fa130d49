"""What ``save`` writes, ``load`` runs again: the same bits, or a reason why not."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt import ArtefactError, CaptureError, InputsError, Optimized, _torch
from graphopt.errors import GraphoptError
from graphopt.plugins import KernelSpec, hookimpl

Tensor = torch.Tensor
IDS = torch.arange(12).view(3, 4) % 9


class Net(nn.Module):
    """Tied weights, statistics, dropout, a tensor that is no buffer, results of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.embed.weight
        self.shift = torch.full((8,), 0.25)
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, ids: Tensor, *, power: int = 2, extra: tuple[Tensor, ...] = ()) -> dict[str, Any]:
        x = self.drop(self.norm(self.embed(ids).flatten(0, 1)) + self.shift) * self.scale
        for other in extra:
            x = x + other
        logits = self.head(x**power)
        return {"loss": F.cross_entropy(logits, ids.flatten()), "rest": (logits, [None, 3, "text"])}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def optimized(model: nn.Module, inputs: Any, *, train: bool, **options: Any) -> Optimized:
    model.train(train)
    settings = {"emit": "eager", "on_error": "raise", "cache": False} | options
    with torch.set_grad_enabled(train):
        return graphopt.optimize(model, inputs, **settings)


@dataclass
class Saved:
    folder: Path
    fast: Optimized
    shown: tuple[Any, ...]


def shown(fast: Optimized) -> tuple[Any, ...]:
    """All that is shown of a step, its report apart."""
    dumps = [fast.dump(stage=stage) for stage in ("semantic", "joint", "final")]
    return fast.plan, fast.report.steps, fast.explain_memory(), fast.frontier(), dumps


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    torch._dynamo.reset()
    fast = optimized(net(), (IDS,), train=True)
    folder = tmp_path_factory.mktemp("artefacts") / "net.graphopt"
    assert fast.save(folder) == folder
    yield Saved(folder, fast, shown(fast))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def step(module: nn.Module) -> tuple[Any, dict[str, Tensor]]:
    module.zero_grad()
    torch.manual_seed(5)
    out = module(IDS)
    out["loss"].backward()
    return out, gradients(module)


def assert_same(one: Any, other: Any) -> None:
    leaves = torch.utils._pytree.tree_leaves(one), torch.utils._pytree.tree_leaves(other)
    assert len(leaves[0]) == len(leaves[1])
    for a, b in zip(*leaves, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


# --- what is loaded -----------------------------------------------------------------------------------


def test_a_training_step_gives_the_same_bits(training: Saved) -> None:
    loaded = graphopt.load(training.folder)
    ours, gradient = step(loaded)
    theirs, expected = step(training.fast)
    assert_same(ours, theirs)
    assert gradient.keys() == expected.keys() and len(gradient) == 3
    assert_same(gradient, expected)
    assert type(ours["rest"]) is tuple and ours["rest"][1] == [None, 3, "text"]
    assert not ours["rest"][0].requires_grad
    # Statistics were updated alike.
    assert_same(loaded.state_dict(), training.fast.state_dict())


def test_the_state_is_the_models_and_takes_its_checkpoint(training: Saved) -> None:
    loaded = graphopt.load(training.folder)
    assert list(loaded.state_dict()) == list(training.fast.state_dict())
    assert loaded.embed.weight is loaded.head.weight
    other = net(seed=3)
    loaded.load_state_dict(other.state_dict())
    torch.manual_seed(5)
    expected = other.train()(IDS)["loss"]
    torch.manual_seed(5)
    torch.testing.assert_close(loaded(IDS)["loss"], expected)


def test_tied_weights_are_written_once(training: Saved) -> None:
    from graphopt.tensors_file import TensorsFile

    entries = TensorsFile(training.folder / "weights.safetensors").entries
    assert sum(entry.shape == (9, 8) for entry in entries.values()) == 1


def test_report_plan_and_programs_are_those_that_were_saved(training: Saved) -> None:
    loaded = graphopt.load(training.folder)
    assert shown(loaded) == training.shown
    note = "outputs besides the loss are cut off from autograd in a loaded step"
    assert loaded.report.diagnostics == (note,)
    # Logits that could be differentiated would hold the state of the random generator.
    spared = _torch.random_state_bytes(torch.device("cpu"))
    assert loaded.measure((IDS,), repeats=1).peak_bytes == loaded.plan.predicted.peak_bytes - spared


def test_copies_and_pickles_run(training: Saved) -> None:
    loaded = graphopt.load(training.folder)
    expected, _ = step(loaded)
    for made in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert made.embed.weight is not loaded.embed.weight
        assert_same(step(made)[0]["loss"], expected["loss"])


def test_an_inference_step_gives_the_same_bits_under_any_mode_of_gradients(tmp_path: Path) -> None:
    model, inputs = net(), {"ids": IDS, "power": 3, "extra": (torch.ones(12, 8),)}
    fast = optimized(model, inputs, train=False)
    fast.save(tmp_path / "a")
    loaded = graphopt.load(tmp_path / "a")
    assert not loaded.training
    with torch.no_grad():
        expected = fast(**inputs)
    found = loaded(**inputs)
    assert_same(found, expected)
    assert not found["loss"].requires_grad


def test_a_model_takes_the_place_of_the_weights(tmp_path: Path, training: Saved) -> None:
    training.fast.save(tmp_path / "bare", weights=False)
    assert (tmp_path / "bare" / "weights.safetensors").stat().st_size < 300
    with pytest.raises(ArtefactError, match="saved without weights"):
        graphopt.load(tmp_path / "bare")
    other = net(seed=4)
    loaded = graphopt.load(tmp_path / "bare", other)
    assert loaded.embed is other.embed
    assert_same(step(loaded), step(optimized(other, (IDS,), train=True)))
    wide = Net()
    wide.norm = nn.BatchNorm1d(16)
    with pytest.raises(ArtefactError, match=r"does not fit .* norm\.\w+ has shape \[16\], .* for \[8\]"):
        graphopt.load(tmp_path / "bare", wide)
    with pytest.raises(ArtefactError, match=r"the model has no embed\.weight"):
        graphopt.load(tmp_path / "bare", nn.Linear(2, 2))


def test_a_loaded_step_is_saved_with_the_weights_of_now(tmp_path: Path, training: Saved) -> None:
    loaded = graphopt.load(training.folder)
    with torch.no_grad():
        loaded.embed.weight.mul_(2)
    loaded.save(tmp_path / "again")
    again = graphopt.load(tmp_path / "again")
    assert torch.equal(again.head.weight, loaded.embed.weight)
    assert_same(again.state_dict(), loaded.state_dict())
    assert_same(step(again), step(loaded))
    loaded.save(tmp_path / "again", weights=False)
    with pytest.raises(ArtefactError, match="saved without weights"):
        graphopt.load(tmp_path / "again")


def test_a_joint_program_that_passes_rewrote_is_run_as_rewritten(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1))])
    x, passes = torch.randn(256, 64), ("compress-saved{least_bytes=0}", "insert-checkpoints")
    least = optimized(model, (x,), train=True, pipeline=passes).frontier()[0].peak_bytes
    fast = optimized(model, (x,), train=True, pipeline=passes, budget=least)
    assert fast.plan.choices[0].alternative == "compress-saved"
    fast.save(tmp_path / "a")
    loaded = graphopt.load(tmp_path / "a")
    for module in (fast, loaded):
        module.zero_grad()
        torch.manual_seed(2)
        module(x).square().sum().backward()
        if module is fast:
            expected = gradients(module)
    assert_same(gradients(loaded), expected)


def test_packed_weights_stay_packed(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).bfloat16().eval()
    x = torch.randn(4, 64).bfloat16()
    graphopt.quantize(model, (x,), bits=8.0)
    fast = optimized(model, (x,), train=False)
    fast.save(tmp_path / "a")
    loaded = graphopt.load(tmp_path / "a")
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert "0.weight.codes" in loaded.state_dict()
    with torch.no_grad():
        assert_same(loaded(x), fast(x))
    assert '"scheme":"int8' in (tmp_path / "a" / "programs.json").read_text()
    loaded.load_state_dict(model.state_dict())


def test_weights_keep_their_strides(tmp_path: Path) -> None:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    fast = optimized(model, (x,), train=False)
    fast.save(tmp_path / "a")
    loaded = graphopt.load(tmp_path / "a")
    assert loaded.weight.stride() == model.weight.stride()
    with torch.no_grad():
        assert_same(loaded(x), fast(x))
    with pytest.raises(InputsError, match=r"tensor 0 of the call has stride"):
        loaded(x.contiguous())


@pytest.mark.slow  # compiles C++
def test_a_chain_of_generated_code_gives_the_same_bits(tmp_path: Path) -> None:
    from tests.test_warm_start import made

    model, x = made()
    fast = optimized(model, (x,), train=True, emit="inductor")
    fast.save(tmp_path / "a")
    loaded = graphopt.load(tmp_path / "a")
    assert len(loaded.report.programs) > 2
    for module in (fast, loaded):
        module.zero_grad()
        loss = module(x)
        loss.backward()
        found = loss.detach(), gradients(module)
        if module is fast:
            expected = found
    assert_same(found, expected)
    assert loaded.dump() == fast.dump()


@pytest.mark.slow  # starts a process
def test_another_process_gives_the_same_bits(tmp_path: Path, training: Saved) -> None:
    script = """
import sys, torch, graphopt
loaded = graphopt.load(sys.argv[1])
torch.manual_seed(5)
loss = loaded(torch.arange(12).view(3, 4) % 9)["loss"]
loss.backward()
print(loss.item().hex(), loaded.embed.weight.grad.sum().item().hex())
"""
    loaded = graphopt.load(training.folder)
    out, gradient = step(loaded)
    expected = [out["loss"].item().hex(), gradient["embed.weight"].sum().item().hex()]
    command = [sys.executable, "-c", script, str(training.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == expected


# --- calls that are not those that were saved -----------------------------------------------------------


def test_other_calls_are_refused(training: Saved) -> None:
    loaded = graphopt.load(training.folder)
    with pytest.raises(InputsError, match=r"tensor 0 of the call has shape \[3,5\], .* for \[3,4\]"):
        loaded(torch.zeros(3, 5, dtype=torch.long))
    with pytest.raises(InputsError, match="tensor 0 of the call has dtype float32"):
        loaded(IDS.float())
    with pytest.raises(InputsError, match=r"\['power'\] is 3: the step was saved for 2"):
        loaded(IDS, power=3)
    with pytest.raises(InputsError, match=r"\['extra'\] is a tuple: the step was saved for a tuple of 0"):
        loaded(IDS, extra=(IDS,))
    with pytest.raises(InputsError, match="unexpected keyword argument 'mask'"):
        loaded(IDS, mask=None)
    with pytest.raises(InputsError, match="saved in training mode, the module is in evaluation mode"):
        loaded.eval()(IDS)
    loaded.train()
    with pytest.raises(InputsError, match="saved under no autocast"), torch.autocast("cpu", torch.bfloat16):
        loaded(IDS)
    loaded.embed.weight.requires_grad_(False)
    with pytest.raises(InputsError, match=r"embed\.weight requires no gradient; .* it required a gradient"):
        loaded(IDS)


# --- what cannot be saved --------------------------------------------------------------------------------


class Counts(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


class Keeps(nn.Linear):
    seen: list[Tensor]

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.seen.append(y * 2)
        return y


class Breaks(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        torch._dynamo.graph_break()
        return y * 2


class Odd:
    pass


class ReturnsOdd(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), frozenset((1,))


class Views(nn.Linear):
    """Two parameters that are parts of one tensor."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        whole = torch.randn(2, *self.weight.shape)
        self.weight = nn.Parameter(whole[0])
        self.other = nn.Parameter(whole[1])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ self.other


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Counts, "forward sets calls of the model"),
        (Keeps, "forward keeps value . of its program without returning it"),
        (Breaks, "the model is . programs with Python of its own between them"),
        (ReturnsOdd, r"the result\[1\] is a builtins.frozenset"),
        (Views, "other shares part of its memory with weight"),
    ],
)
def test_what_an_artefact_cannot_hold_is_refused(kind: Any, reason: str, tmp_path: Path) -> None:
    model = kind(4, 4)
    if kind is Keeps:
        model.seen = []
    fast = optimized(model, (torch.randn(2, 4),), train=False)
    with pytest.raises(ArtefactError, match=reason):
        fast.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_what_was_not_captured_or_compiled_is_refused(tmp_path: Path) -> None:
    from graphopt.api import dry_run

    with pytest.raises(CaptureError, match="not called yet"):
        graphopt.optimize(nn.Linear(4, 4)).save(tmp_path / "a")
    with pytest.raises(ArtefactError, match="planned, not compiled"):
        dry_run(nn.Linear(4, 4), (torch.randn(2, 4),), {"emit": "eager"}).save(tmp_path / "a")


# --- operators and classes of others -----------------------------------------------------------------------


@torch.library.custom_op("artefacttest::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class TwicePlugin:
    graphopt_api = 1

    @hookimpl
    def graphopt_kernels(self) -> Iterable[KernelSpec]:
        return (KernelSpec("twice", "artefacttest::twice", lambda x: x * 2, lambda x: None),)


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return twice(super().forward(x))


def test_operators_of_others_need_their_plugin_or_trust(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    fast = optimized(Twice(4, 4), (x,), train=False, plugins=[TwicePlugin()])
    fast.save(tmp_path / "a")
    with torch.no_grad():
        expected = fast(x)
    with pytest.raises(ArtefactError, match=r"artefacttest::twice.*; plugin TwicePlugin provides") as refused:
        graphopt.load(tmp_path / "a")
    assert 'operators=("artefacttest",)' in refused.value.hint
    assert_same(graphopt.load(tmp_path / "a", plugins=[TwicePlugin()])(x), expected)
    assert_same(graphopt.load(tmp_path / "a", operators=("artefacttest",))(x), expected)


@dataclass
class Output:
    loss: Tensor
    name: str


class Returns(nn.Linear):
    def forward(self, x: Tensor) -> Output:
        return Output(super().forward(x).sum(), "y")


def test_registered_classes_are_looked_up_never_imported(tmp_path: Path) -> None:
    from tests.test_artefact_untrusted import edited

    torch.export.register_dataclass(Output)
    x = torch.randn(2, 4)
    fast = optimized(Returns(4, 4), (x,), train=False)
    fast.save(tmp_path / "a")
    found = graphopt.load(tmp_path / "a")(x)
    assert type(found) is Output and found.name == "y"
    assert torch.equal(found.loss, fast(x).loss)
    with edited(tmp_path / "a") as content:
        content["steps"][0]["results"]["class"] = "shutil.rmtree"
    with pytest.raises(GraphoptError, match=r"'shutil\.rmtree', which is no container that is registered"):
        graphopt.load(tmp_path / "a")
