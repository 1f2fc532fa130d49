"""Plugins capture models: what they hand over is used like any capture."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import nn

import graphopt
from graphopt import Report
from graphopt.plugins import Capture, CaptureInputs, CaptureOptions
from graphopt.program import layer_of
from tests.plugin_captures import Model, X, exported, lifted, optimized, plugin, renamed, step, symbolic


@pytest.mark.parametrize("act", [symbolic, exported, lifted, renamed])
def test_a_capture_is_trained_as_the_model_is(act: Callable[..., Any]) -> None:
    model, plain = Model(), Model()
    fast = graphopt.optimize(
        model, {"x": X, "bias": 0.25}, plugins=(plugin(act),), emit="eager", cache=False, verify="numeric"
    )
    fast = graphopt.optimize(model, plugins=(plugin(act),), emit="eager", cache=False)
    for ours, theirs in zip(step(fast, model), step(plain, plain), strict=True):
        torch.testing.assert_close(ours, theirs)
    (record,) = fast.report.captures
    assert (record.plugin, record.distribution, record.reason) == ("Inline", "inline", "")
    assert record.programs == tuple(program.name for program in fast.report.programs) == ("g0",)
    assert "g0: captured by plugin 'Inline' of inline" in str(fast.report)
    assert "captured by plugin" in fast.report._repr_html_()
    assert Report.from_json(fast.report.to_json()).captures == fast.report.captures
    # Reports of before plugins could capture do not say so.
    older = {name: value for name, value in fast.report.to_json().items() if name != "captures"}
    assert Report.from_json(older).captures == ()
    # Names, roles and layers are the model's.
    program = fast.programs[0]
    parameters = {spec.fqn for spec in program.signature.by_role("parameter")}
    assert parameters == set(dict(model.named_parameters()))
    if act is exported:
        assert "first" in {layer_of(node) for node in program.graph.nodes}


def test_a_capture_is_planned_rewritten_and_emitted() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                y = layer(x)
                x = y * torch.sigmoid(y)
            return x.square().mean()

    model, x = Deep(), torch.randn(64, 16)
    options: dict[str, Any] = {"plugins": (plugin(symbolic),), "cache": False}
    least = graphopt.pareto(model, (x,), **options, emit="eager").points[0].peak_bytes
    fast = graphopt.optimize(model, (x,), budget=least, emit="eager", **options)
    assert fast.report.captures[0].programs
    assert fast.plan.predicted.peak_bytes <= least < fast.plan.baseline.peak_bytes
    assert fast.dump(stage="final")
    plain = copy.deepcopy(model)
    fast(x).backward()
    plain(x).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    # A later load_state_dict is seen: nothing of the model is baked in.
    with torch.no_grad():
        model.layers[0].weight.zero_()
        torch.testing.assert_close(fast(x), model(x))


def test_the_first_plugin_that_answers_captures() -> None:
    asked: list[str] = []

    def telling(name: str, act: Callable[..., Any]) -> Any:
        def tell(model: Any, inputs: Any, options: Any) -> Any:
            asked.append(name)
            return act(model, inputs, options)

        return plugin(tell, name)

    plugins = (
        telling("None", lambda *given: None), telling("Second", symbolic), telling("Third", exported),
    )  # fmt: skip
    fast = graphopt.optimize(Model(), (X,), plugins=plugins, emit="eager", cache=False)
    assert asked == ["None", "Second"]
    assert [record.plugin for record in fast.report.captures] == ["Second"]


def test_without_an_answer_graphopt_captures() -> None:
    fast = optimized(lambda *given: None, Model())
    assert fast.report.captures == () and len(fast.report.programs) == 1
    assert "captured by" not in str(fast.report)


def test_other_calls_are_captured_anew() -> None:
    options: list[CaptureOptions] = []
    sizes: list[int] = []

    def tell(model: Any, inputs: CaptureInputs, given: CaptureOptions) -> Capture | None:
        options.append(given)
        sizes.append(len(inputs.args[0]))
        return None if sizes[-1] == 7 else symbolic(model, inputs, given)

    model, plain = Model(), Model()
    fast = optimized(tell, model, dynamic_shapes=False)
    for size in (3, 5, 3, 7, 7, 5):
        x = torch.randn(size, 4)
        ours, theirs = fast(x), plain(x)
        torch.testing.assert_close(ours, theirs)
    assert sizes == [3, 5, 7]
    model.eval(), plain.eval()
    with torch.no_grad():
        torch.testing.assert_close(fast(X), plain(X))
        torch.testing.assert_close(fast(X), plain(X))
    assert [given.mode for given in options] == ["train"] * 3 + ["infer"]
    assert {given.dynamic_shapes for given in options} == {False}
    # That of 7 rows is graphopt's own.
    (record,) = fast.report.captures
    assert record.programs == ("g0", "g1", "g3")
    # Another parameter is another model.
    model.last.weight = nn.Parameter(torch.zeros(4, 8), requires_grad=False)
    plain.last.weight = model.last.weight
    with torch.no_grad():
        torch.testing.assert_close(fast(X), plain(X))
    assert len(options) == 5


def exported_with_sizes(model: nn.Module, inputs: CaptureInputs) -> torch.export.ExportedProgram:
    return torch.export.export(model, inputs.args, dynamic_shapes={"x": {0: torch.export.Dim.AUTO}})


@pytest.mark.parametrize("trace", [lambda model, inputs: fx.symbolic_trace(model), exported_with_sizes])
def test_a_dynamic_capture_is_of_other_sizes_too(trace: Callable[..., Any]) -> None:
    asked: list[int] = []

    def tell(model: Any, inputs: Any, options: Any) -> Capture:
        asked.append(1)
        return Capture(trace(model, inputs), dynamic=True)

    model, plain = Model(), Model()
    fast = optimized(tell, model)
    for size in (3, 5, 9):
        x = torch.randn(size, 4)
        torch.testing.assert_close(fast(x), plain(x))
    assert asked == [1]
    assert re.search(r"f32\[s\d+=5,4\]", fast.report.programs[0].inputs)
    assert fast.report.captures[0].programs == ("g0", "g1")


def test_a_decoder_of_transformers_trains_within_a_budget() -> None:
    pytest.importorskip("transformers")
    from examples.targets import llama

    model, inputs = llama()
    plain, _ = llama()
    torch._dynamo.reset()
    fast = graphopt.optimize(
        model, inputs, budget="75%", plugins=(plugin(exported),), emit="eager", cache=False, on_error="raise"
    )
    assert fast.report.captures[0].programs == ("g0",) and not fast.report.diagnostics
    assert fast.plan.predicted.peak_bytes <= fast.plan.budget < fast.plan.baseline.peak_bytes
    assert {"model.layers.0.mlp.gate_proj", "model.layers.1.input_layernorm"} <= {
        layer_of(node) for node in fast.programs[0].graph.nodes
    }
    ours, theirs = fast(**inputs), plain(**inputs)
    assert type(ours) is type(theirs) and torch.equal(ours.loss, theirs.loss)
    ours.loss.backward(), theirs.loss.backward()
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)


@pytest.mark.parametrize("act", [symbolic, exported, lifted])
def test_what_was_captured_and_deleted_is_gone(act: Callable[..., Any]) -> None:
    gone: list[weakref.ref[Any]] = []

    def telling(model: Any, inputs: Any, options: Any) -> Capture:
        made: Capture = act(model, inputs, options)
        gone.append(weakref.ref(made.graph))
        return made

    model = Model()
    fast = optimized(telling, model)
    step(fast, model)
    gone += [weakref.ref(model), weakref.ref(fast), weakref.ref(fast._driver.session)]
    assert fast.report.captures[0].programs
    del model, fast
    gc.collect()
    assert [kept() for kept in gone] == [None] * len(gone)


def test_plugins_are_asked_about_so_many_kinds_of_calls() -> None:
    from graphopt.capture.plugged import MOST

    asked: list[int] = []

    def tell(model: Any, inputs: Any, options: Any) -> Capture:
        asked.append(1)
        return symbolic(model, inputs, options)

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    fast = optimized(tell, model, verify="off", pipeline=())
    for size in range(2, MOST + 5):
        x = torch.randn(size, 4)
        assert torch.equal(fast(x), model(x))
    assert len(asked) == MOST
