"""Artefacts of several steps and of sizes that are known at run time alone: the step is picked by the
call."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt import ArtefactError, InputsError, Optimized
from graphopt.artefact.save import save
from tests.test_artefact_untrusted import edited, rehash

Tensor = torch.Tensor


class Net(nn.Module):
    """Sizes in shapes, in what is computed, and in a choice that the code makes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 12)
        self.drop = nn.Dropout(0.2)
        self.last = nn.Linear(12, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        self.calls.add_(1)
        if x.shape[0] > 10:
            x = x * 2
        batch, length, width = x.shape
        y = self.last(self.drop(self.first(x).relu())).view(batch * length, width)
        z = torch.cat([y, y]) + torch.arange(2 * batch * length).unsqueeze(1)
        return {"loss": z.square().mean() * scale, "rest": z}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def optimized(model: nn.Module, *inputs: Any, train: bool = True, **options: Any) -> Optimized:
    model.train(train)
    settings = {"emit": "eager", "on_error": "raise", "cache": False} | options
    with torch.set_grad_enabled(train):
        return graphopt.optimize(model, inputs, **settings)


def made(dynamic: bool | None = False, **options: Any) -> Optimized:
    torch.manual_seed(0)
    return optimized(Net(), x(4, 3), dynamic_shapes=dynamic, **options)


def x(*sizes: int) -> Tensor:
    return torch.randn(*sizes, 8)


def step(module: nn.Module, value: Tensor, *, train: bool = True, **given: Any) -> list[Tensor]:
    """All that a step gives: results, gradients, buffers."""
    module.train(train)
    module.zero_grad()
    torch.manual_seed(3)
    with torch.set_grad_enabled(train):
        out = module(value, **given)
        if train:
            out["loss"].backward()
    gradients = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    return [out["loss"].detach(), out["rest"].detach(), *gradients, *(b.clone() for b in module.buffers())]


def assert_same(one: nn.Module, other: nn.Module, value: Tensor, **how: Any) -> None:
    found, expected = step(one, value, **how), step(other, value, **how)
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


def names(fast: Optimized) -> list[str]:
    return [view.name for view in fast.steps]


def shown(fast: Optimized) -> list[Any]:
    """What is shown of each step."""
    return [
        (v.name, v.plan, v.memory(), v.frontier(), [v.dump(stage=s) for s in ("semantic", "joint", "final")])
        for v in fast.steps
    ]


# --- several steps ----------------------------------------------------------------------------------------


@pytest.fixture
def several(tmp_path: Path) -> tuple[Optimized, Path]:
    """Two shapes in training, one in inference, one of another constant."""
    fast = made()
    step(fast, x(2, 3))
    step(fast, x(2, 3), train=False)
    step(fast, x(2, 3), train=False, scale=0.5)
    fast.train()
    return fast, fast.save(tmp_path / "a")


def test_each_step_gives_the_same_bits_and_is_shown(several: tuple[Optimized, Path]) -> None:
    fast, folder = several
    loaded = graphopt.load(folder)
    train, infer = ["g0 train f32[4,3,8]", "g1 train f32[2,3,8]"], ["g2 infer f32[2,3,8]"]
    assert names(loaded) == names(fast) == [*train, *infer, "g3 infer f32[2,3,8]"]
    assert shown(loaded) == shown(fast)
    loaded.load_state_dict(fast.state_dict())
    for sizes, how in (((4, 3), {}), ((2, 3), {}), ((2, 3), {"train": False})):
        assert_same(loaded, fast, x(*sizes), **how)
    assert_same(loaded, fast, x(2, 3), train=False, scale=0.5)
    assert "unknown" not in str(loaded.report)


def test_the_step_that_ran_last_is_the_present_one(several: tuple[Optimized, Path]) -> None:
    loaded = graphopt.load(several[1])
    views = {view.name: view for view in loaded.steps}
    assert [p.name for p in loaded.report.programs] == ["g3"] and len(loaded.report.earlier) == 3
    step(loaded, x(4, 3))
    assert loaded.plan is views["g0 train f32[4,3,8]"].plan
    assert loaded.dump() == views["g0 train f32[4,3,8]"].dump()
    assert [p.name for p in loaded.report.earlier] == ["g1", "g2", "g3"]
    taken = loaded.measure((x(4, 3),), repeats=1)
    assert loaded.report.measured is not None and taken.peak_bytes == loaded.report.measured.peak_bytes


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (
            lambda fast: fast.train()(x(3, 3)),
            r"no saved step takes this call\. Nearest is g1 train f32\[2,3,8\]: tensor 0 of the call has "
            r"shape \[3,3,8\], .* for \[2,3,8\]\n  hint: saved are g0 train f32\[4,3,8\]; g1 train",
        ),
        (lambda fast: fast.train()(x(2, 3).double()), "Nearest is g1 train .* dtype float64, .* for float32"),
        (lambda fast: fast.eval()(x(2, 3), scale=2.0), r"g3 infer .*\['scale'\] is 2\.0: .* saved for 0\.5"),
        (lambda fast: fast.eval()(x(4, 3)), r"Nearest is g2 infer f32\[2,3,8\]: .* shape \[4,3,8\]"),
    ],
    ids=["shape", "dtype", "constant", "mode"],
)
def test_an_unknown_call_names_the_nearest_step(
    several: tuple[Optimized, Path], call: Callable[[Optimized], Any], reason: str
) -> None:
    loaded = graphopt.load(several[1])
    with pytest.raises(InputsError, match=reason):
        call(loaded)


def test_a_step_without_a_backward_is_not_run_for_one_that_has(tmp_path: Path) -> None:
    fast = made()
    with torch.no_grad():
        fast(x(2, 3))
    loaded = graphopt.load(fast.save(tmp_path / "a"))
    with torch.no_grad():
        assert not loaded(x(2, 3))["loss"].requires_grad
    reason = r"Nearest is g0 train .* has shape \[2,3,8\](.|\n)*under torch\.no_grad\(\) g1 infer .* takes it"
    with pytest.raises(InputsError, match=reason):
        loaded(x(2, 3))


def test_a_loaded_module_is_saved_with_all_its_steps(several: tuple[Optimized, Path], tmp_path: Path) -> None:
    loaded = graphopt.load(several[1])
    with torch.no_grad():
        loaded.first.weight.mul_(2)
    again = graphopt.load(loaded.save(tmp_path / "b"))
    assert names(again) == names(loaded)
    assert_same(again, loaded, x(4, 3))


def test_a_step_that_another_took_over_is_left_out(tmp_path: Path) -> None:
    """Sizes that change become symbols: the new step runs what the first one ran."""
    fast = made(None)
    step(fast, x(5, 3))
    loaded = graphopt.load(fast.save(tmp_path / "a"))
    assert [name.partition("[")[0] for name in names(loaded)] == ["g1 train f32"]
    (note,) = (note for note in loaded.report.diagnostics if note.startswith("g0"))
    assert note == "g0 train f32[4,3,8] is not in the artefact: the module runs its calls by another step now"
    for count in (4, 5, 9):
        assert_same(loaded, fast, x(count, 3))


class Switched(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.quick, self.drop = nn.Identity(), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2 if self.quick.training else super().forward(x)


def test_steps_that_a_loaded_module_could_not_tell_apart_are_refused(tmp_path: Path) -> None:
    model = Switched(4, 4)
    fast = optimized(model, torch.randn(2, 4), dynamic_shapes=False)
    model.quick.eval()
    fast(torch.randn(2, 4))
    with pytest.raises(ArtefactError, match=r"g0 train .* and g1 train .* take the same calls"):
        fast.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_an_object_of_a_later_call_is_refused_by_name(tmp_path: Path) -> None:
    class Store:
        def __init__(self) -> None:
            self.kept = torch.ones(2, 4)

    class Reads(nn.Linear):
        def forward(self, x: Tensor, store: Any = None) -> Tensor:
            return super().forward(x) if store is None else super().forward(x) + store.kept

    fast = optimized(Reads(4, 4), torch.randn(2, 4))
    fast(torch.randn(2, 4), Store())
    with pytest.raises(ArtefactError, match=r"g1 train .*: a call has a Store, which an artefact"):
        fast.save(tmp_path / "a")


def test_a_step_that_does_not_run_on_zeros_is_refused(tmp_path: Path) -> None:
    class Inverse(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.linalg.inv(x))

    fast = optimized(Inverse(2, 2), torch.eye(2), train=False, dynamic_shapes=False)
    with torch.no_grad():
        fast(torch.eye(2).expand(3, 2, 2).contiguous())
    with pytest.raises(ArtefactError, match=r"g1 infer f32\[3,2,2\]: run on zeros .* it raises .*singular"):
        fast.save(tmp_path / "a")


def test_autocast_is_part_of_the_call(tmp_path: Path) -> None:
    fast = made()
    with torch.autocast("cpu", torch.bfloat16):
        fast(x(4, 3))
    loaded = graphopt.load(fast.save(tmp_path / "a"))
    assert len(loaded.steps) == 2
    value = x(4, 3)
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert_same(loaded, fast, value)
    with torch.autocast("cpu", torch.float16), pytest.raises(InputsError, match="under autocast of cpu"):
        loaded(value)


# --- sizes of run time ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def symbolic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Optimized, Path]:
    torch._dynamo.reset()
    fast = made(True)
    step(fast, x(12, 3))
    step(fast, x(12, 3), train=False)
    fast.train()
    return fast, fast.save(tmp_path_factory.mktemp("artefacts") / "a")


def test_sizes_are_those_of_the_call(symbolic: tuple[Optimized, Path]) -> None:
    loaded = graphopt.load(symbolic[1])
    assert shown(loaded) == shown(symbolic[0])
    fast = made(True)
    fast.load_state_dict(loaded.state_dict())
    for train, sizes in ((True, (7, 2)), (True, (15, 5)), (True, (10, 3)), (False, (11, 9))):
        assert_same(loaded, fast, x(*sizes), train=train)


@pytest.mark.parametrize(
    ("train", "value", "reason"),
    [
        (False, x(9, 3), r"g2 infer .*: s\d+, size 0 of tensor 0 of the call, is 9: .* saved for 11 or more"),
        (True, x(4, 1), r"s\d+, size 1 of tensor 0 of the call, is 1: the step was saved for 2 or more"),
        (True, torch.randn(4, 3, 9), r"has shape \[4,3,9\], the step was saved for \[s\d+,s\d+,8\]"),
        (True, torch.randn(4, 8), r"has shape \[4,8\], the step was saved for \[s\d+,s\d+,8\]"),
        (True, torch.randn(4, 8, 3).mT, r"has stride \[24,1,3\], the step was saved for \[8 \* s\d+,8,1\]"),
        (True, x(4, 3).double(), "has dtype float64"),
    ],
    ids=["bound", "one", "fixed", "dimensions", "stride", "dtype"],
)
def test_calls_are_checked_against_what_was_assumed_of_sizes(
    symbolic: tuple[Optimized, Path], train: bool, value: Tensor, reason: str
) -> None:
    loaded = graphopt.load(symbolic[1]).train(train)
    with torch.set_grad_enabled(train), pytest.raises(InputsError, match=reason):
        loaded(value)


class Halves(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if x.shape[0] % 4 == 0:
            x = x.view(4, x.shape[0] // 4, 8).sum(0)
        return x + y


def test_guards_between_sizes_hold_or_are_told(tmp_path: Path) -> None:
    fast = optimized(Halves(), x(12), x(3), train=False, dynamic_shapes=True)
    loaded = graphopt.load(fast.save(tmp_path / "a"))
    a, b = x(20), x(5)
    assert torch.equal(loaded(a, b), Halves()(a, b))
    with pytest.raises(InputsError, match=r"is 6.*: the step was saved for sizes with s\d+ % 4 == 0"):
        loaded(x(6), x(6))
    with pytest.raises(InputsError, match=r"is 20: the step was saved for sizes with s\d+ // 4 == s\d+"):
        loaded(a, x(4))


class Cuts(nn.Linear):
    def forward(self, x: Tensor, sizes: dict[str, list[int]], scale: int = 2) -> Tensor:
        return super().forward(x)[:, : sizes["to"][0]].sum() * scale


def test_numbers_that_change_are_those_of_the_call(tmp_path: Path) -> None:
    model, value = Cuts(4, 9), torch.randn(3, 4)
    fast = optimized(model, value, {"to": [5, 3]}, train=False)
    with torch.no_grad():
        fast(value, {"to": [6, 3]})
    loaded = graphopt.load(fast.save(tmp_path / "a"))
    for count in (5, 6, 8):
        with torch.no_grad():
            assert torch.equal(loaded(value, {"to": [count, 3]}), model(value, {"to": [count, 3]}))
    with pytest.raises(InputsError, match=r"\['sizes'\]\['to'\]\[0\] is 5\.0: .* saved for a whole number"):
        loaded(value, {"to": [5.0, 3]})
    with pytest.raises(InputsError, match=r"s\d+, number 0 of the call, is 1: the step was saved for"):
        loaded(value, {"to": [1, 3]})
    with pytest.raises(InputsError, match=r"\['to'\]\[1\] is 4: the step was saved for 3"):
        loaded(value, {"to": [6, 4]})


def test_a_size_that_no_tensor_tells_is_refused(tmp_path: Path) -> None:
    class Like(nn.Linear):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x)[:, : y.shape[0]].sum()

    fast = optimized(Like(4, 9), torch.randn(3, 4), torch.randn(5), train=False, dynamic_shapes=True)
    with pytest.raises(ArtefactError, match=r"s\d+ of the program is told by no input of it"):
        fast.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_numbers_that_may_be_made_of_sizes_are_no_results(tmp_path: Path) -> None:
    """The one that was saved would be returned for every size."""

    class Counts(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            return super().forward(x), x.shape[0]

    fast = optimized(Counts(4, 4), torch.randn(3, 4), train=False, dynamic_shapes=True)
    with pytest.raises(ArtefactError, match=r"the result\[1\] is the number 3, which may be made of sizes"):
        fast.save(tmp_path / "a")


def test_sizes_that_values_decide_are_refused(tmp_path: Path) -> None:
    class Counts(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[x.sum(1) > 0].sum()

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):  # type: ignore[attr-defined]
        fast = optimized(Counts(4, 4), torch.randn(3, 4), train=False)
        assert len(fast.report.programs) == 1
        with pytest.raises(ArtefactError, match=r"sizes .* cannot be written: .* depends on values"):
            fast.save(tmp_path / "a")


def test_a_static_and_a_symbolic_model_of_random_numbers_agree_after_a_checkpoint(
    symbolic: tuple[Optimized, Path],
) -> None:
    loaded, plain = graphopt.load(symbolic[1]), Net()
    plain.load_state_dict(loaded.state_dict())
    assert_same(loaded, plain, x(6, 4))


@pytest.mark.slow  # starts a process
def test_another_process_gives_the_same_bits(symbolic: tuple[Optimized, Path]) -> None:
    script = """
import sys, torch, graphopt
loaded = graphopt.load(sys.argv[1])
for train, count in ((True, 5), (True, 13), (False, 13)):
    torch.manual_seed(7)
    loaded.train(train)
    loaded.zero_grad()
    with torch.set_grad_enabled(train):
        out = loaded(torch.randn(count, 4, 8))
        if train:
            out["loss"].backward()
    print(out["loss"].item().hex(), out["rest"].sum().item().hex(), loaded.first.weight.grad is not None)
    if train:
        print(loaded.first.weight.grad.sum().item().hex())
"""
    fast, expected = symbolic[0], []
    for train, count in ((True, 5), (True, 13), (False, 13)):
        torch.manual_seed(7)
        fast.train(train)
        fast.zero_grad()
        with torch.set_grad_enabled(train):
            out = fast(torch.randn(count, 4, 8))
            if train:
                out["loss"].backward()
        expected += [out["loss"].item().hex(), out["rest"].sum().item().hex(), str(train)]
        if train:
            expected.append(fast.first.weight.grad.sum().item().hex())
    command = [sys.executable, "-c", script, str(symbolic[1])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == expected


@pytest.mark.slow  # compiles C++
@pytest.mark.parametrize("dynamic", [None, True])
def test_generated_code_of_symbolic_sizes_gives_the_same_bits(tmp_path: Path, dynamic: bool | None) -> None:
    """Of what numbers are made of sizes for views and ranges the names are others each time it is traced."""
    fast = made(dynamic, emit="inductor")
    step(fast, x(6, 3))
    step(fast, x(6, 3), train=False)
    fast.train()
    loaded = graphopt.load(fast.save(tmp_path / "a"))
    assert [name.split("[")[0] for name in names(loaded)][-1] == names(fast)[-1].split("[")[0]
    kept = fast.steps[len(fast.steps) - len(loaded.steps) :]
    assert [view.dump() for view in loaded.steps] == [view.dump() for view in kept]
    for count in (4, 6, 9):
        assert_same(loaded, fast, x(count, 3))
        assert_same(loaded, fast, x(count, 3), train=False)


# --- formats ----------------------------------------------------------------------------------------------


def first_format(folder: Path) -> None:
    """Make an artefact of one step one of the first format."""
    with edited(folder) as content:
        (said,) = content.pop("steps")
        for name, tensor in said.pop("constants").items():
            assert tensor == f"chain.{name}"
        assert not said.pop("symbols") and not said.pop("guards")
        content |= said
    for name in ("report.json", "memory.json"):
        (only,) = json.loads((folder / name).read_text())["steps"]
        (folder / name).write_text(json.dumps(only))
    rehash(folder, lambda facts: facts.update(schema="graphopt/artefact@1"))


def test_artefacts_of_the_first_format_are_read_and_saved_again(tmp_path: Path) -> None:
    fast = made()
    folder = fast.save(tmp_path / "a")
    first_format(folder)
    loaded = graphopt.load(folder)
    assert names(loaded) == ["g0 train f32[4,3,8]"]
    assert_same(loaded, fast, x(4, 3))
    again = graphopt.load(save(loaded, tmp_path / "b"))
    assert json.loads((tmp_path / "b" / "artefact.json").read_text())["schema"] == "graphopt/artefact@1"
    assert_same(again, loaded, x(4, 3))
