"""What one process planned and compiled, a later one takes over: the same plan, the same code, or nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import graphopt
from graphopt import _torch, step_store, stored_step
from graphopt.api import make_session
from graphopt.capture.semantic import input_specs
from graphopt.chain_plan import Rerun
from graphopt.optimized import Optimized
from graphopt.passes import Pass, PassContext
from graphopt.plans import Plan
from graphopt.program import Level, Program
from graphopt.step_key import NoKey, step_key
from graphopt.stored_step import StepFormatError, StoredStep, read_step, step_text

HIT = "warm start: plan and code are those of an earlier process"
WIDTH = 16


class Block(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(width, 2 * width), torch.nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


class Net(torch.nn.Module):
    """Six blocks and a loss, scaled by a constant."""

    def __init__(self, width: int = WIDTH, scale: float = 0.5) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block(width) for _ in range(6))
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return (x * self.scale).square().mean()


def made(**options: Any) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Net(**options), torch.randn(4, WIDTH)


def optimized(cache: bool = True, **options: Any) -> Optimized:
    torch._dynamo.reset()
    net, x = made()
    return graphopt.optimize(net, (x,), emit="inductor", on_error="raise", cache=cache, **options)


def gradients(fast: Optimized) -> list[torch.Tensor]:
    fast(made()[1]).backward()
    return [p.grad for p in fast.parameters() if p.grad is not None]


def shown(fast: Optimized) -> Any:
    """All that is shown of the programs of a step and of its memory."""
    dumps = [fast.dump(stage=stage) for stage in ("semantic", "joint", "final")]
    return dumps, fast.frontier(), fast.memory()


def note(fast: Optimized) -> str:
    (found,) = [text for text in fast.report.diagnostics if text.startswith("warm start")]
    return found


def plan_text(plan: Plan) -> str:
    """A plan but for the seconds that making it took."""
    return json.dumps(replace(plan, seconds_to_plan=0.0).to_json())


def generated(make: Callable[[], Optimized]) -> tuple[Optimized, list[str]]:
    """What ``make`` gives, and the text of all code that was generated or loaded for it."""
    from torch._inductor.codecache import PyCodeCache

    before = len(PyCodeCache.modules)
    fast = make()
    files = (module.__file__ for module in PyCodeCache.modules[before:])
    # Which number a graph had in its process stands in its first line.
    return fast, sorted(Path(str(file)).read_text().partition("\n")[2] for file in files)


@dataclass
class Kept:
    """A folder in which a step was kept, the step, and one that was made without the folder."""

    folder: Path
    first: Optimized
    code: list[str]
    plain: Optimized
    plain_code: list[str]
    plain_shown: Any

    file: Path


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GRAPHOPT_CACHE")
        patch.setenv("GRAPHOPT_CACHE_DIR", str(folder / "graphopt"))
        # Its own for each process that runs tests: some of them take code away.
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
        plain, plain_code = generated(lambda: optimized(cache=False))
        first, code = generated(optimized)
        (file,) = (folder / "graphopt" / "steps").glob("*.json")
        yield Kept(folder, first, code, plain, plain_code, shown(plain), file)


def test_the_first_start_says_that_it_kept_the_step(kept: Kept) -> None:
    assert note(kept.first) == (
        "warm start: planned and compiled anew, as none was kept; kept for later ones"
    )
    assert not [text for text in kept.plain.report.diagnostics if text.startswith("warm start")]
    assert plan_text(kept.first.plan) == plan_text(kept.plain.plan)
    assert kept.code == kept.plain_code


def test_plan_and_code_are_the_same_to_the_byte(kept: Kept) -> None:
    fast, code = generated(optimized)
    assert note(fast) == HIT
    assert json.dumps(fast.plan.to_json()) == json.dumps(kept.first.plan.to_json())
    assert code == kept.code
    for mine, theirs in zip(gradients(fast), gradients(kept.plain), strict=True):
        assert torch.equal(mine, theirs)


def test_nothing_is_traced_planned_or_lowered_again(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("done again")

    monkeypatch.setattr("graphopt.session.semantic_graph", refuse)
    monkeypatch.setattr("graphopt.session.run_passes", refuse)
    monkeypatch.setattr("graphopt._torch.compile_with_inductor", refuse)
    assert note(optimized()) == HIT


def test_gradients_are_added_to_those_held(kept: Kept) -> None:
    fast = optimized()
    once = [g.clone() for g in gradients(fast)]
    for twice, single in zip(gradients(fast), once, strict=True):
        assert torch.allclose(twice, 2 * single)


def test_the_report_is_that_of_the_first_start(kept: Kept) -> None:
    found, expected = optimized().report, kept.first.report
    assert len(found.steps) > 10
    assert found.programs == expected.programs
    assert found.steps == expected.steps
    assert (found.declined, found.near_misses) == (expected.declined, expected.near_misses)
    assert found.groups == expected.groups


def test_programs_and_curves_are_made_when_asked_for(kept: Kept) -> None:
    fast = optimized()
    before = fast.report
    assert shown(fast) == kept.plain_shown
    assert fast.report.plan is before.plan
    assert fast.report == before


def test_schedules_are_not_searched_to_show_programs(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = optimized()

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the plan says which schedule runs")

    monkeypatch.setattr("graphopt_passes.insert_checkpoints.search", never)
    assert [fast.dump(stage=stage) for stage in ("semantic", "joint", "final")] == kept.plain_shown[0]
    with pytest.raises(Exception, match="the plan says which schedule runs"):
        fast.frontier()


def test_a_process_of_its_own_takes_over_as_well(kept: Kept) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_warm_start import gradients, note, optimized\n"
        "fast = optimized(); print(note(fast)); print(sum(float(g.sum()) for g in gradients(fast)))\n"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent)]
    # Settings of this process that other tests made are in the key: the second child takes over of the first.
    for _ in range(2):
        shown = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=True)
        said, total = shown.stdout.splitlines()
        assert float(total) == sum(float(g.sum()) for g in gradients(optimized()))
    assert said == HIT


def test_without_gradients_a_step_of_its_own_is_kept(kept: Kept) -> None:
    def run() -> Optimized:
        with torch.no_grad():
            return optimized()

    assert note(run()).endswith("kept for later ones")
    fast = run()
    assert note(fast) == HIT
    with torch.no_grad():
        assert torch.equal(fast(made()[1]), kept.plain(made()[1]))


# --- what does not count --------------------------------------------------------------------


def _truncated(text: str) -> str:
    return text[: len(text) // 2]


def _another_schema(text: str) -> str:
    return text.replace(stored_step.SCHEMA, "graphopt/step@0")


def _another_key(text: str) -> str:
    return text.replace('"key": "', '"key": "0', 1)


def _changed(text: str) -> str:
    return text.replace('"random":false', '"random":true', 1)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_truncated, "it is damaged"),
        (_another_schema, "it is of another version"),
        (_another_key, "it is of another step"),
        (_changed, "it is damaged"),
        (lambda text: "", "it is malformed: "),
        (lambda text: "[]\n[]\n", "it is of another version"),
    ],
    ids=["truncated", "schema", "key", "changed", "empty", "foreign"],
)
def test_a_file_that_is_not_what_was_written_is_a_miss(
    kept: Kept, damage: Callable[[str], str], reason: str
) -> None:
    text = kept.file.read_text()
    kept.file.write_text(damage(text))
    try:
        fast = optimized()
        assert note(fast).startswith(
            f"warm start: planned and compiled anew, as what was kept cannot be used: {reason}"
        )
        assert plan_text(fast.plan) == plan_text(kept.first.plan)
        # What was made in its place is whole again.
        assert note(optimized()) == HIT
    finally:
        kept.file.write_text(text)


def test_a_file_that_is_no_text_is_a_miss(kept: Kept) -> None:
    text = kept.file.read_text()
    kept.file.write_bytes(b"\xff\xfe\x00")
    try:
        assert "what was kept cannot be read (UnicodeDecodeError" in note(optimized())
    finally:
        kept.file.write_text(text)


def test_without_its_code_a_step_is_a_miss(kept: Kept) -> None:
    _torch.forget_code(step_store.code_prefix(kept.file.stem))
    assert note(optimized()) == (
        "warm start: planned and compiled anew, as the code is in torch's caches no more; kept for later ones"
    )
    assert note(optimized()) == HIT


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_folder_that_cannot_be_written_keeps_nothing(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    # Root may write to every folder, but not to a folder that is a file.
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(blocked / "graphopt"))
    text = note(optimized())
    assert text.startswith("warm start: planned and compiled anew, as what was kept cannot be read (NotADir")
    assert "; nothing is kept, as the folder of what is kept cannot be written (NotADirectoryError" in text


def test_it_can_be_switched_off(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", "0")
    assert optimized().report.diagnostics == ()
    monkeypatch.delenv("GRAPHOPT_CACHE")
    with torch._inductor.config.patch(fx_graph_cache=False):
        text = note(optimized())
    assert text == "warm start: nothing can be kept, as torch's caches of code are switched off"


# --- what a step depends on ------------------------------------------------------------------


def key_of(net: torch.nn.Module, *inputs: torch.Tensor, **options: Any) -> str:
    """The key of the step that ``optimize`` would make."""
    torch._dynamo.reset()
    session = make_session("cpu", **{"emit": "inductor", **options})
    found: list[str] = []

    def backend(gm: Any, arguments: Any) -> Any:
        found.append(step_key(session, "g0", gm, arguments, input_specs(gm, arguments, {})))
        return gm

    torch.compile(net, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    return found[0]


def _x(*shape: int) -> torch.Tensor:
    return torch.ones(shape or (4, WIDTH))


def test_the_same_program_has_the_same_key() -> None:
    assert key_of(Net(), _x()) == key_of(Net(), _x())
    # Values of weights and of inputs are nothing that it depends on.
    assert key_of(Net(), _x()) == key_of(Net(), torch.randn(4, WIDTH))


@dataclass(frozen=True)
class Idle(Pass):
    """Offers nothing."""

    name = "idle"
    level = Level.SEMANTIC
    effort: int = 1

    def propose(self, program: Program, ctx: PassContext) -> Iterator[Any]:
        return iter(())


def frozen(net: torch.nn.Module) -> torch.nn.Module:
    next(net.parameters()).requires_grad_(False)
    return net


OTHERS: dict[str, Callable[[], str]] = {
    "weights": lambda: key_of(Net(2 * WIDTH), _x(4, 2 * WIDTH)),
    "constant": lambda: key_of(Net(scale=0.25), _x()),
    "batch": lambda: key_of(Net(), _x(8, WIDTH)),
    "dtype": lambda: key_of(Net().double(), _x().double()),
    "strides": lambda: key_of(Net(), _x(WIDTH, 4).t()),
    "offset": lambda: key_of(Net(), _x(8, WIDTH)[4:]),
    "frozen": lambda: key_of(frozen(Net()), _x()),
    "budget": lambda: key_of(Net(), _x(), budget="1GiB"),
    "allow": lambda: key_of(Net(), _x(), allow=("quantize-saved",)),
    "pipeline": lambda: key_of(Net(), _x(), pipeline="normalize"),
    "pass": lambda: key_of(Net(), _x(), pipeline=("default", Idle())),
    "option": lambda: key_of(Net(), _x(), pipeline=("default", Idle(effort=2))),
    "device": lambda: key_of(Net(), _x(), device="h100"),
    "cuda_graphs": lambda: key_of(Net(), _x(), cuda_graphs=False),
}


def test_anything_else_has_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {name: make() for name, make in OTHERS.items() if name != "device"}
    session = make_session("h100", emit="inductor")
    keys["device"] = str(session.cost.device)
    keys["same"] = key_of(Net(), _x())
    with torch.no_grad():
        keys["no_grad"] = key_of(Net(), _x())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        keys["autocast"] = key_of(Net(), _x())
    with torch._inductor.config.patch(max_autotune=True):
        keys["setting"] = key_of(Net(), _x())
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    keys["threads"] = key_of(Net(), _x())
    torch.set_num_threads(threads)
    monkeypatch.setattr("graphopt.__version__", "0.0.0")
    keys["version"] = key_of(Net(), _x())
    assert len(set(keys.values())) == len(keys)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return 2 * gradient


@torch.library.custom_op("graphopt_warm_start::own", mutates_args=())
def own(x: torch.Tensor) -> torch.Tensor:
    return x + 1


@own.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Calls(torch.nn.Module):
    def __init__(self, call: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x)


@dataclass(frozen=True)
class Watches:
    """A plugin."""

    graphopt_api = 1
    __name__ = "watches"

    @graphopt.hookimpl
    def graphopt_before_pass(self, step: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: key_of(Calls(own), _x()), "the model calls graphopt_warm_start.own"),
        (lambda: key_of(Calls(Double.apply), torch.ones(4, requires_grad=True)), "which takes functions"),
        (lambda: key_of(Net(), _x(), plugins=(Watches(),)), "plugin watches was given as an object"),
    ],
    ids=["operator", "function", "plugin"],
)
def test_what_cannot_be_told_has_no_key(make: Callable[[], str], reason: str) -> None:
    with pytest.raises(Exception, match=reason) as caught:
        make()
    assert isinstance(_torch.inner_error(caught.value), NoKey)


def test_sizes_that_vary_have_no_key() -> None:
    torch._dynamo.reset()
    session = make_session("cpu", emit="inductor")

    def backend(gm: Any, arguments: Any) -> Any:
        with pytest.raises(NoKey, match="sizes are known at run time alone"):
            step_key(session, "g0", gm, arguments, input_specs(gm, arguments, {}))
        return gm

    torch.compile(Net(), backend=backend, fullgraph=True, dynamic=True)(_x())


# --- the folder ------------------------------------------------------------------------------


def stored(kept: Kept, key: str) -> tuple[StoredStep, Plan]:
    step, plan = read_step(kept.file.read_text(), kept.file.stem)
    return replace(step, key=key), plan


def test_the_folder_is_bounded(kept: Kept, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(step_store, "MOST", 3)
    forgotten: list[str] = []
    monkeypatch.setattr("graphopt._torch.forget_code", forgotten.append)
    for number, key in enumerate("abcd"):
        assert step_store.store_step(*stored(kept, key)) == ""
        os.utime(tmp_path / "steps" / f"{key}.json", (number, number))
        if key == "c":
            # What was asked for counts as new.
            assert not isinstance(step_store.find_step("a"), str)
    assert sorted(path.stem for path in (tmp_path / "steps").iterdir()) == ["a", "c", "d"]
    assert forgotten == [step_store.code_prefix("b")]
    monkeypatch.setattr(step_store, "MOST_BYTES", 1)
    left = tmp_path / "steps" / ".a.json.0000.tmp"
    left.write_text("")
    os.utime(left, (0, 0))
    assert step_store.store_step(*stored(kept, "e")) == ""
    assert [path.name for path in (tmp_path / "steps").iterdir()] == ["e.json"]


def _write_and_read(text: str, key: str, rounds: int) -> int:
    step, plan = read_step(text, key)
    good = 0
    for number in range(rounds):
        step_store.store_step(replace(step, diagnostics=(f"{os.getpid()} {number}",)), plan)
        found = step_store.find_step(key)
        good += not isinstance(found, str)
    return good


def test_processes_never_see_half_a_file(kept: Kept, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path))
    work = (kept.file.read_text(), kept.file.stem, 20)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.starmap(_write_and_read, [work, work]) == [20, 20]
    assert [path.name for path in (tmp_path / "steps").iterdir()] == [f"{kept.file.stem}.json"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda step: replace(step, codes=()), "call 0 runs code that it does not have"),
        (lambda step: replace(step, inputs=()), "call 0 reads a value that is not there"),
        (lambda step: replace(step, programs=()), "its parts do not belong together"),
        (lambda step: replace(step, results='{"value":"nothing"}'), "it returns a value that is not there"),
        (lambda step: replace(step, results='{"set":[]}'), "what it returns cannot be read"),
        (
            lambda step: replace(step, calls=(replace(step.calls[0], written=(99,)), *step.calls[1:])),
            "call 0 writes an input that it does not have",
        ),
        (
            lambda step: replace(step, calls=(replace(step.calls[0], drops=("x",)), *step.calls[1:])),
            "call 0 (reads a value that is not there|lets go of a value that it does not read)",
        ),
        (lambda step: replace(step, reruns=(Rerun(0, 99),)), "a row of calls from 0 to 99 is not in it"),
    ],
    ids=["codes", "inputs", "programs", "results", "structure", "written", "drops", "reruns"],
)
def test_a_step_that_could_not_run_is_not_read(
    kept: Kept, change: Callable[[StoredStep], StoredStep], reason: str
) -> None:
    step, plan = stored(kept, kept.file.stem)
    with pytest.raises(StepFormatError, match=reason):
        read_step(step_text(change(step), plan), step.key)


def test_a_step_is_read_as_it_was_written(kept: Kept) -> None:
    step, plan = stored(kept, kept.file.stem)
    assert step_text(step, plan) == kept.file.read_text()


def test_a_graph_of_an_unknown_kind_is_planned_anew(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*args: Any) -> str:
        raise RuntimeError("unheard of")

    monkeypatch.setattr("graphopt.warm_start.step_key", raises)
    fast = optimized()
    said = "warm start: nothing can be kept, as telling the step apart raised RuntimeError: unheard of"
    assert note(fast) == said
    assert plan_text(fast.plan) == plan_text(kept.first.plan)
