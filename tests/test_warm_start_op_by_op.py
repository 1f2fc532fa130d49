"""A program that runs op by op is taken over as it was planned: no trace, no pass, no search."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt import _torch
from graphopt.artefact.operators import Operators
from graphopt.emit.eager import eager_callable
from graphopt.emit.half_text import half_of_text, half_text
from graphopt.errors import ArtefactError
from graphopt.optimized import Optimized
from graphopt.plugins.host import PluginHost

HIT = "warm start: plan and code are those of an earlier process"
KEPT = "warm start: planned and compiled anew, as none was kept; kept for later ones"


class Plain(nn.Sequential):
    """Blocks that are worth running again."""

    def __init__(self) -> None:
        super().__init__(*[m for _ in range(6) for m in (nn.Linear(32, 32), nn.GELU())])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).square().mean()


class Random(Plain):
    """Draws random numbers, which run again under their first state."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in list(self)[:-1]:
            x = self.drop(module(x))
        return x.square().mean()


class Norms(nn.Module):
    """Writes buffers: running statistics, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x.square().mean()


class Beside(Plain):
    """Returns values beside the loss, in a structure."""

    def forward(self, x: torch.Tensor) -> Any:
        hidden = nn.Sequential.forward(self, x)
        return {"loss": hidden.square().mean(), "hidden": (hidden, x.shape[0])}


class Aliased(Plain):
    """Returns a view of its input beside the loss."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), x.view(-1)


def loss_of(output: Any) -> torch.Tensor:
    if isinstance(output, dict):
        return output["loss"]
    return output[0] if isinstance(output, tuple) else output


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("GRAPHOPT_CACHE")
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path / "graphopt"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    return tmp_path / "graphopt" / "steps"


def optimized(kind: type[nn.Module] = Plain, **options: Any) -> Optimized:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = kind(), torch.randn(64, 32)
    options = {"emit": "eager", "on_error": "raise", "budget": "80%", **options}
    return graphopt.optimize(model, (x,), **options)


def note(fast: Optimized) -> str:
    (found,) = [text for text in fast.report.diagnostics if text.startswith("warm start")]
    return found


def step(fast: Optimized) -> list[torch.Tensor]:
    """Everything that two steps give and leave behind."""
    found: list[torch.Tensor] = []
    for seed in range(2):
        torch.manual_seed(seed)
        x = torch.randn(64, 32)
        output = fast(x)
        loss_of(output).backward()
        leaves = torch.utils._pytree.tree_leaves(output)
        found += [leaf.detach() for leaf in leaves if isinstance(leaf, torch.Tensor)]
        found += [torch.get_rng_state()]
    return found + [p.grad for p in fast.parameters() if p.grad is not None] + list(fast.buffers())


@pytest.mark.parametrize("kind", [Plain, Random, Norms, Beside, Aliased])
def test_a_step_is_taken_over_with_all_its_results(kind: type[nn.Module]) -> None:
    first = optimized(kind)
    expected = step(first)
    again = optimized(kind)
    assert [note(fast) for fast in (first, again)] == [KEPT, HIT]
    assert json.dumps(again.plan.to_json()) == json.dumps(first.plan.to_json())
    for found in (step(again), step(optimized(kind, cache=False))):
        assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def test_nothing_is_traced_and_no_pass_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    optimized()

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a step that was kept is not made again")

    monkeypatch.setattr("graphopt.session.semantic_graph", never)
    monkeypatch.setattr("graphopt.rewriting.run_pass", never)
    monkeypatch.setattr(_torch, "joint_compiler", never)
    fast = optimized()
    assert note(fast) == HIT
    step(fast)


def test_the_report_is_that_of_the_first_process() -> None:
    first, again = optimized().report, optimized().report
    told = "steps", "declined", "near_misses", "programs", "rewrites", "predicted", "baseline", "budget"
    for name in told:
        assert getattr(again, name) == getattr(first, name), name
    assert first.steps and first.programs


def test_it_takes_the_memory_that_was_predicted() -> None:
    optimized()
    again = optimized()
    assert note(again) == HIT
    measured = again.measure((torch.randn(64, 32),), repeats=1).peak_bytes
    assert abs(measured - again.plan.predicted.peak_bytes) <= 64
    assert measured < again.plan.baseline.peak_bytes


def test_programs_and_curves_are_made_when_they_are_asked_for() -> None:
    def shown(fast: Optimized) -> Any:
        dumps = [fast.dump(stage=stage) for stage in ("semantic", "joint", "final")]
        return dumps, fast.memory(), fast.frontier()

    optimized()
    plain, again = optimized(cache=False), optimized()
    before = step(again)
    report, plan = str(again.report), again.plan
    assert shown(again) == shown(plain)
    assert str(again.report) == report and again.plan is plan
    again.zero_grad()
    assert all(map(torch.equal, step(again), before))


def test_schedules_are_not_searched_to_show_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    optimized()
    again = optimized()

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the plan says which schedule runs")

    monkeypatch.setattr("graphopt_passes.insert_checkpoints.search", never)
    assert again.dump(stage="final")
    with pytest.raises(Exception, match="the plan says which schedule runs"):
        again.frontier()


def test_inference_is_taken_over() -> None:
    with torch.no_grad():
        x = torch.randn(64, 32)
        first = optimized(budget=None)
        expected = first(x)
        again = optimized(budget=None)
        assert [note(fast) for fast in (first, again)] == [KEPT, HIT]
        assert torch.equal(again(x), expected)
        assert note(again) == HIT


def test_graphs_may_be_kept_for_another_backward() -> None:
    optimized()
    again = optimized()
    loss = again(torch.randn(64, 32))
    weights = [*again.parameters()]
    first, second = (torch.autograd.grad(loss, weights, retain_graph=keep) for keep in (True, False))
    assert all(map(torch.equal, first, second))


def test_other_steps_have_other_keys(caches: Path) -> None:
    optimized()
    others = {"budget": "85%"}, {"budget": None}, {"kind": Random}, {"pipeline": "insert-checkpoints"}
    for options in others:
        assert note(optimized(**options)) == KEPT, options
    assert len(list(caches.glob("*.json"))) == 5


def test_what_cannot_be_written_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(half: torch.fx.GraphModule) -> str:
        raise ArtefactError("it calls a function of the model's own")

    monkeypatch.setattr("graphopt.emit.eager.half_text", refused)
    for _ in range(2):
        fast = optimized()
        assert "as none was kept; nothing is kept, as torch cannot keep the code" in note(fast)


def test_code_that_is_gone_is_made_anew(caches: Path) -> None:
    optimized()
    (file,) = caches.glob("*.json")
    _torch.forget_code(f"graphopt-{file.stem[:32]}")
    assert note(optimized()) == (
        "warm start: planned and compiled anew, as the code is in torch's caches no more; kept for later ones"
    )
    assert note(optimized()) == HIT


def test_a_file_that_does_not_belong_together_is_refused(caches: Path) -> None:
    from graphopt.stored_step import StepFormatError, read_step, step_text

    optimized()
    (file,) = caches.glob("*.json")
    stored, plan = read_step(file.read_text(), file.stem)
    assert stored.whole and not stored.calls
    for parts in ({"codes": ()}, {"programs": ()}, {"digests": ()}, {"whole": False}):
        wrong = replace(stored, **parts)
        with pytest.raises(StepFormatError, match="its parts do not belong together"):
            read_step(step_text(wrong, plan), file.stem)


def halves() -> Iterator[torch.fx.GraphModule]:
    for kind in (Plain, Random, Norms):
        for captured in optimized(kind, cache=False)._driver.session.current:
            yield from captured.lowered


def test_halves_are_read_as_they_were_written() -> None:
    operators = Operators(PluginHost())
    for half in halves():
        read = half_of_text(half_text(half), operators)
        assert half_text(read) == half_text(half)
        assert [node.target for node in read.graph.nodes if node.op == "call_function"] == [
            node.target for node in half.graph.nodes if node.op == "call_function"
        ]


def changed(text: str, change: Callable[[dict[str, Any]], object]) -> str:
    nodes = json.loads(text)
    change(next(node for node in nodes if node["op"] == "call_function"))
    return json.dumps(nodes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda node: node.update(target="os.system"), "which is no operator"),
        (lambda node: node.update(target="aten::from_file.default"), "reads or writes files"),
        (lambda node: node.update(target="mine::op.default"), "namespace 'mine' is not one"),
        (lambda node: node.update(args=[{"ref": "nothing"}]), "which no node before it makes"),
        (lambda node: node.update(op="call_module"), "'call_module' is no kind of node"),
        (lambda node: node.update(name="x, y"), "'x, y' is no node"),
        (lambda node: node.pop("name"), "malformed: KeyError"),
    ],
)
def test_halves_that_call_anything_else_are_refused(change: Any, message: str) -> None:
    text = half_text(next(halves()))
    with pytest.raises(ArtefactError, match=message):
        half_of_text(changed(text, change), Operators(PluginHost()))


def test_what_torch_keeps_of_a_half_is_its_text() -> None:
    """What is pickled in torch's folder holds no code of graphopt's but the record of a text."""
    half = _torch.KeptText("[]")
    assert copy.deepcopy(half) == pickle.loads(pickle.dumps(half)) == half
    code = _torch.kept_as_text(eager_callable(torch.fx.GraphModule({}, torch.fx.Graph())), "[]")
    assert _torch.is_known_to_caches(code)


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was compared with the model, in order."""
    from graphopt.capture import beside

    seen: list[str] = []

    def noting(name: str) -> None:
        usual = getattr(beside, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return usual(*args, **kwargs)

        monkeypatch.setattr(beside, name, call)

    noting("compared")
    noting("gradients_compared")
    return seen


@pytest.mark.parametrize("emit", ["eager", "inductor"])
def test_what_an_earlier_process_compared_is_not_compared_again(emit: str, compared: list[str]) -> None:
    first = optimized(emit=emit, budget=None)
    assert compared == ["compared", "gradients_compared"]
    again = optimized(emit=emit, budget=None)
    assert note(again) == HIT and len(compared) == 2
    told = "an earlier process compared what was captured with the model, whose code is the same"
    assert told in again.report.diagnostics and told not in first.report.diagnostics


def test_code_that_changed_is_compared_again(
    compared: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph is the same, what the model does op by op is not: another branch, in a module beside."""
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "changing"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "model.py").write_text(
        "import torch\n"
        "from changing import beside\n"
        "class Model(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        if torch.compiler.is_compiling():\n"
        "            return super().forward(x).square().mean()\n"
        "        return beside.eager(super().forward(x))\n"
    )

    def made(scale: str) -> Optimized:
        import importlib
        import sys

        (package / "beside.py").write_text(f"def eager(x):\n    return x.square().mean() * {scale}\n")
        for name in [name for name in sys.modules if name.startswith("changing")]:
            del sys.modules[name]
        importlib.invalidate_caches()
        model = importlib.import_module("changing.model").Model
        torch._dynamo.reset()
        torch.manual_seed(0)
        return graphopt.optimize(model(8, 8), (torch.randn(4, 8),), emit="eager")

    monkeypatch.setattr("sys.dont_write_bytecode", True)
    for _ in range(2):
        assert note(made("1.0")).startswith("warm start")
    assert len(compared) == 2
    other = made("2.00")
    assert len(compared) > 2
    assert any("computes something else" in text for text in other.report.diagnostics)


def test_without_a_comparison_nothing_is_noted(compared: list[str]) -> None:
    optimized(verify="off")
    assert not compared
    optimized()
    assert len(compared) == 2
    optimized()
    assert len(compared) == 2


def test_code_without_a_file_has_no_hash() -> None:
    from graphopt.model_code import code_digest

    space: dict[str, Any] = {"__name__": "nowhere", "nn": nn}
    exec("class Made(nn.Linear):\n    pass", space)
    made = space["Made"](2, 2)
    assert code_digest(made, ()) == ""
    plain = nn.Linear(2, 2)
    one, other = map(text_code, ("x + 1", "x + 2"))
    hashes = {code_digest(plain, followed) for followed in ((), (one,), (other,))}
    assert len(hashes) == 3 and "" not in hashes
    assert code_digest(plain, (text_code("x + 1"),)) in hashes


def text_code(text: str) -> Any:
    """Code of a function in no file, as dataclasses make."""
    return compile(text, "<string>", "eval")


def test_a_step_that_was_taken_over_is_saved_and_recorded(tmp_path: Path) -> None:
    from graphopt.recorded import record_call

    optimized()
    again = optimized()
    x = torch.randn(64, 32)
    recorded = record_call(again, (x,))
    assert len(recorded.calls) == 1 and torch.equal(recorded.output, again(x))
    again.save(tmp_path / "net.graphopt")
    assert note(again) == HIT
    loaded = graphopt.load(tmp_path / "net.graphopt")
    assert torch.equal(loaded(x), again(x))


def test_other_shapes_are_steps_of_their_own() -> None:
    def shapes() -> Optimized:
        fast = optimized(dynamic_shapes=False)
        for rows in (64, 32):
            fast(torch.randn(rows, 32)).backward()
        return fast

    assert [text for text in shapes().report.diagnostics if text.startswith("warm start")] == [KEPT, KEPT]
    again = shapes()
    assert [text for text in again.report.diagnostics if text.startswith("warm start")] == [HIT, HIT]
    assert [len(step.programs) for step in again.steps] == [4, 4], "semantic, joint, both halves"
