"""Plugins that capture a model wrongly are named, the model is as it was, and the next one captures."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import nn

import graphopt
from graphopt import InputsError, PluginError
from graphopt.cli.main import main
from graphopt.plugins import Capture, PluginHost
from tests.plugin_captures import WHO, Model, X, exported, optimized, plugin, step, symbolic


class Other(nn.Module):
    """Another model: one parameter more."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.extra = Model(), nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x + self.extra)


def raising(error: BaseException) -> Callable[..., Any]:
    def act(*given: Any) -> Any:
        raise error

    return act


def edited(edit: Callable[[fx.Graph, fx.GraphModule], None]) -> Callable[..., Any]:
    """The model's graph with something changed."""

    def act(model: Any, inputs: Any, options: Any) -> Capture:
        gm = fx.symbolic_trace(copy.deepcopy(model))
        edit(gm.graph, gm)
        gm.recompile()
        return Capture(gm)

    return act


def node(graph: fx.Graph, name: str) -> fx.Node:
    return next(found for found in graph.nodes if found.name == name)


def doubled(graph: fx.Graph, gm: fx.GraphModule) -> None:
    with graph.inserting_after(node(graph, "last")):
        twice = graph.call_function(torch.mul, (node(graph, "last"), 2.0))
    node(graph, "last").replace_all_uses_with(twice, delete_user_cb=lambda user: user is not twice)


def cut_off(graph: fx.Graph, gm: fx.GraphModule) -> None:
    with graph.inserting_after(node(graph, "norm")):
        detached = graph.call_method("detach", (node(graph, "norm"),))
    node(graph, "norm").replace_all_uses_with(detached, delete_user_cb=lambda user: user is not detached)


def halved_gradient(graph: fx.Graph, gm: fx.GraphModule) -> None:
    """The same number, one of its two uses cut off from autograd."""
    first = node(graph, "norm")
    with graph.inserting_after(first):
        half = graph.call_function(torch.mul, (first, 0.5))
    with graph.inserting_after(half):
        rest = graph.call_method("detach", (half,))
    with graph.inserting_after(rest):
        total = graph.call_function(torch.add, (half, rest))
    first.replace_all_uses_with(total, delete_user_cb=lambda user: user not in (half, rest, total))


def baked(graph: fx.Graph, gm: fx.GraphModule) -> None:
    """The weight of the last layer as a constant."""
    gm.register_buffer("constant", gm.last.weight.detach().clone())
    last = node(graph, "last")
    with graph.inserting_before(last):
        weight, bias = graph.get_attr("constant"), graph.get_attr("last.bias")
        made = graph.call_function(nn.functional.linear, (last.args[0], weight, bias))
    last.replace_all_uses_with(made)
    graph.erase_node(last)


def no_statistics(graph: fx.Graph, gm: fx.GraphModule) -> None:
    """A batch norm that reads its statistics' memory but leaves them as they are."""
    norm = node(graph, "norm")
    with graph.inserting_before(norm):
        given = [graph.get_attr(f"norm.{name}") for name in ("running_mean", "running_var", "weight", "bias")]
        read = [graph.call_method("add", (value, 0)) for value in given[:2]]
        graph.call_method("add", (graph.get_attr("norm.num_batches_tracked"), 0))
        made = graph.call_function(
            nn.functional.batch_norm, (norm.args[0], *read, *given[2:]), {"training": True}
        )
    norm.replace_all_uses_with(made)
    graph.erase_node(norm)


def another_structure(graph: fx.Graph, gm: fx.GraphModule) -> None:
    output = node(graph, "output")
    output.args = (list(output.args[0].values()),)


def misshapen(graph: fx.Graph, gm: fx.GraphModule) -> None:
    gm.first = nn.Linear(4, 6)


def extra_parameter(graph: fx.Graph, gm: fx.GraphModule) -> None:
    gm.firts = nn.Parameter(torch.ones(8))


def aliased(model: Any, inputs: Any, options: Any) -> Capture:
    gm = fx.symbolic_trace(model)
    gm.register_buffer("view", model.first.weight.detach().t())
    return Capture(gm)


def of_another_mode(model: nn.Module, inputs: Any, options: Any) -> Any:
    model.eval()
    return symbolic(model, inputs, options)


def writes_weights(model: Any, inputs: Any, options: Any) -> Any:
    model.first.weight.data.mul_(0)
    return symbolic(model, inputs, options)


def runs_the_model(model: Any, inputs: Any, options: Any) -> Any:
    model(*inputs.args)
    return symbolic(model, inputs, options)


def replaces_a_layer(model: Any, inputs: Any, options: Any) -> Any:
    model.last = nn.Linear(8, 4)
    return symbolic(model, inputs, options)


def replaces_a_layer_and_raises(model: Any, inputs: Any, options: Any) -> Any:
    model.last = nn.Identity()
    raise ValueError("gave up in between")


def freezes(model: Any, inputs: Any, options: Any) -> Any:
    model.first.weight.requires_grad_(False)
    return symbolic(model, inputs, options)


def unreadable(model: Any, inputs: Any, options: Any) -> Capture:
    gm = fx.symbolic_trace(model)
    node(gm.graph, "first").target = "fisrt"
    return Capture(gm)


def raises_when_run(graph: fx.Graph, gm: fx.GraphModule) -> None:
    node(graph, "last").args = (node(graph, "x"),)


MISBEHAVIOUR: dict[str, tuple[Callable[..., Any], str]] = {
    "raises": (raising(ValueError("no idea")), "raised ValueError: no idea"),
    "exits": (raising(SystemExit(2)), "raised SystemExit: 2"),
    "a number": (lambda *given: 7, ": expected a Capture or None, got 7"),
    "a bare graph": (
        lambda model, *rest: fx.symbolic_trace(model),
        ": expected a Capture or None, got Model( (first): Linear(",
    ),
    "no graph": (
        lambda model, *rest: Capture(model),
        ": graph is a Model: expected an fx.GraphModule or ExportedProgram",
    ),
    "names that are none": (
        lambda model, *rest: Capture(fx.symbolic_trace(model), names=["first"]),  # type: ignore[arg-type]
        ": names is ['first']: expected a mapping of names in its graph to the model's",
    ),
    "a name of nothing": (
        lambda model, *rest: Capture(fx.symbolic_trace(model), names={"frist": "first.bias"}),
        ": names['frist']: its graph has no tensor of that name",
    ),
    "a name that the model has not": (
        lambda model, *rest: Capture(fx.symbolic_trace(model), names={"first.bias": "frist.bias"}),
        ": names['first.bias'] is 'frist.bias': the model has no parameter or buffer of that name; did you "
        "mean 'first.bias'?",
    ),
    "a name for the model's own": (
        lambda model, *rest: Capture(fx.symbolic_trace(model), names={"norm.weight": "norm.bias"}),
        ": names['norm.weight'] is 'norm.bias': it is of a module of the model's own",
    ),
    "placeholders too few": (
        lambda model, *rest: Capture(fx.symbolic_trace(model), placeholders=(0,)),
        ": placeholders has 1 entries, its graph 2 placeholders",
    ),
    "placeholders of no input": (
        lambda model, *rest: Capture(fx.symbolic_trace(model), placeholders=(0, 1)),
        ": placeholders[1] is 1: expected a name of a parameter or buffer, or the position of one of the 1 "
        "inputs",
    ),
    "another model": (
        lambda *given: Capture(fx.symbolic_trace(Other())),
        ": its graph has a parameter 'extra', which the model has not",
    ),
    "a parameter more": (
        edited(extra_parameter), ": its graph has a parameter 'firts', which the model has not; did you mean "
    ),
    "another shape": (
        edited(misshapen),
        ": 'first.weight' is float32[6, 4] on cpu in its graph and float32[8, 4] on cpu in the model",
    ),
    "a view of a weight": (
        aliased, ": its constant 'view' is memory of 'first.weight', which the model may replace",
    ),
    "a graph that does not hold": (unreadable, ": its graph does not hold together: RuntimeError: "),
    "a graph that raises": (edited(raises_when_run), ": its graph raises RuntimeError: mat1 and mat2 shapes"),
    "another number": (edited(doubled), ": its graph computes something else: output 0 differs by "),
    "another structure": (edited(another_structure), ": its graph returns another structure than the model"),
    "a weight baked in": (edited(baked), ": its graph does not read 'last.weight', which the model reads"),
    "no gradient": (edited(cut_off), ": the model alone has a gradient of 'first.bias'"),
    "half a gradient": (edited(halved_gradient), ": the gradient of 'first.weight' differs by 50.00%"),
    "statistics left": (edited(no_statistics), ": its graph leaves another buffer 'norm.running_mean'"),
    "changes the mode": (of_another_mode, ": it changed the model, which was put back: attribute 'training'"),
    "changes weights": (
        writes_weights, ": it changed the model, which was put back: the values of 'first.weight'",
    ),
    "runs the model": (
        runs_the_model, ": it changed the model, which was put back: the values of 'norm.running_mean'",
    ),
    "replaces a layer": (
        replaces_a_layer, ": it changed the model, which was put back: 'last' in _modules",
    ),
    "replaces a layer and raises": (
        replaces_a_layer_and_raises, "raised ValueError: gave up in between",
    ),
    "freezes": (freezes, ": it changed the model, which was put back: requires_grad of 'first.weight'"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISBEHAVIOUR)
def test_what_misbehaves_is_named_and_the_next_captures(case: str) -> None:
    act, reason = MISBEHAVIOUR[case]
    model, plain = Model(), Model()
    fast = optimized(act, model, plugin(symbolic, "Next"), pipeline=())
    for ours, theirs in zip(step(fast, model), step(plain, plain), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert model.training and model.first.weight.requires_grad
    # What was asked for is the call without bias, step() is another: the bad one is not asked again.
    bad, good = fast.report.captures if fast.report.captures[0].reason else fast.report.captures[::-1]
    assert (bad.plugin, bad.programs, good.plugin, good.reason) == ("Inline", (), "Next", "")
    assert reason.removeprefix(": ").removeprefix("raised ") in bad.reason
    assert f"{WHO} did not capture the model: {bad.reason}" in " ".join(str(fast.report).split())
    (record,) = (record for record in fast.report.plugins if record.name == "Inline")
    told = f"graphopt_capture {reason}".replace(" :", ":")
    assert record.status == "failed" and record.error.startswith(told)


@pytest.mark.parametrize("case", ["raises", "a number", "another number", "changes weights"])
def test_what_misbehaves_is_an_error_where_errors_are_raised(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    act, reason = MISBEHAVIOUR[case]
    said = reason.removeprefix(": ").removeprefix("raised ")
    with pytest.raises(PluginError) as raised:
        optimized(act, Model(), on_error="raise")
    assert f"{WHO} did not capture the model: " in str(raised.value) and said in str(raised.value)
    monkeypatch.setenv("GRAPHOPT_STRICT_PLUGINS", "1")
    with pytest.raises(PluginError) as raised:
        optimized(act, Model())
    assert f"{WHO} failed: graphopt_capture" in str(raised.value) and said in str(raised.value)


def test_with_no_other_plugin_graphopt_captures() -> None:
    fast = optimized(raising(ValueError("no idea")), Model())
    (record,) = fast.report.captures
    assert (record.programs, record.reason) == ((), "it raised ValueError: no idea")
    assert len(fast.report.programs) == 1 and fast.report.plan is not None


def test_a_graph_without_tensors_is_left() -> None:
    class Idle(nn.Module):
        def forward(self, x: torch.Tensor) -> int:
            return 7

    fast = optimized(symbolic, Idle())
    assert fast.report.captures[0].reason == "its graph runs no tensor operation"
    assert fast(X) == 7


@pytest.mark.parametrize(
    ("made", "changed"),
    [
        (lambda table: dict(table), False),
        (lambda table: {**table, "rows": (1, 2, [4])}, True),
        (lambda table: {**table, "more": 1}, True),
        (lambda table: tuple(table.items()), True),
    ],
    ids=["a copy", "another value", "another key", "another type"],
)
def test_equal_copies_of_plain_containers_are_no_change(made: Callable[..., Any], changed: bool) -> None:
    def act(model: Any, inputs: Any, options: Any) -> Capture:
        model.table = made(model.table)
        return symbolic(model, inputs, options)

    model = Model()
    table = model.table = {"rows": (1, 2, [3]), "name": "model"}  # type: ignore[assignment]
    fast = optimized(act, model, pipeline=())
    (record,) = fast.report.captures
    said = "it changed the model, which was put back: attribute 'table'"
    assert (record.reason, bool(record.programs)) == ((said, False) if changed else ("", True))
    assert model.table is table


def test_inputs_that_the_model_refuses_are_the_caller_s() -> None:
    for on_error in ("rollback", "raise"):
        with pytest.raises(InputsError, match="the model does not run with these inputs: RuntimeError: mat1"):
            graphopt.optimize(Model(), (torch.randn(3, 5),), plugins=(plugin(exported),), on_error=on_error)


def test_what_hangs_is_named_while_it_does(caplog: pytest.LogCaptureFixture) -> None:
    def act(model: Any, inputs: Any, options: Any) -> Capture:
        time.sleep(0.3)
        return symbolic(model, inputs, options)

    patient = PluginHost([plugin(act)], entry_points=(), patience=0.1)
    with caplog.at_level(logging.WARNING, logger="graphopt"):
        (record,) = patient.check()
    assert caplog.messages == [f"{WHO}: graphopt_capture has not returned for 0.1 s"]
    assert record.status == "active" and record.slow[0].startswith("graphopt_capture took 0.")


def test_check_has_a_small_model_captured() -> None:
    def checked(act: Callable[..., Any]) -> Any:
        (record,) = PluginHost([plugin(act)], entry_points=(), strict=False).check()
        return record

    for act in (symbolic, exported, lambda *given: None):
        record = checked(act)
        assert (record.status, record.error, record.hooks) == ("active", "", ("graphopt_capture",))
    assert checked(lambda *given: 7).error == "graphopt_capture: expected a Capture or None, got 7"
    assert checked(raising(KeyError("x"))).error == "graphopt_capture raised KeyError: 'x'"
    with pytest.raises(PluginError, match="graphopt_capture: expected a Capture"):
        PluginHost([plugin(lambda *given: 7)], entry_points=(), strict=True).check()


class Sneaky(nn.Module):
    """The same op by op, twice as much compiled."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if torch.compiler.is_compiling() else x * 1


def sneaky(model: Any, inputs: Any, options: Any) -> Capture:
    """For three rows the model's graph; for others one that computes something else when it is compiled."""
    gm = fx.symbolic_trace(model)
    if len(inputs.args[0]) != 3:
        gm.add_module("sneaky", Sneaky())
        last = node(gm.graph, "last")
        with gm.graph.inserting_after(last):
            made = gm.graph.call_module("sneaky", (last,))
        last.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
        gm.recompile()
    return Capture(gm)


def test_what_dynamo_makes_of_a_capture_is_compared_and_earlier_ones_stay() -> None:
    model, plain = Model(), Model()
    fast = optimized(sneaky, model, dynamic_shapes=False)
    for size in (3, 5, 3):
        x = torch.randn(size, 4)
        torch.testing.assert_close(fast(x), plain(x))
    (record,) = fast.report.captures
    said = "compiled, the model computes something else than it does op by op: output 0 differs by "
    assert record.reason.startswith(said) and record.programs == ("g0",)
    assert [program.name for program in (*fast.report.earlier, *fast.report.programs)] == ["g0", "g1"]


def test_the_command_line_shows_and_checks_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(act: Callable[..., Any]) -> tuple[int, str, str]:
        host = PluginHost([plugin(act)], entry_points=(), strict=False)
        monkeypatch.setattr("graphopt.cli.verbs.plugins.default_host", lambda: host)
        with pytest.raises(SystemExit) as stopped:
            main(["plugins", "--check"])
        return (int(stopped.value.code or 0), *capsys.readouterr())

    code, out, err = run(symbolic)
    assert (code, err) == (0, "") and out.splitlines()[-1].split()[-2:] == ["active", "graphopt_capture"]
    code, _, err = run(lambda *given: 7)
    said = "graphopt: plugin 'Inline' (failed): graphopt_capture: expected a Capture or None, got 7\n"
    assert (code, err) == (1, said)


def test_unread_state_of_a_frozen_model_is_noticed() -> None:
    model = Model().eval().requires_grad_(False)
    fast = optimized(edited(baked), model)
    assert fast.report.captures[0].reason == "its graph does not read 'last.weight', which the model reads"


def test_a_model_that_draws_numbers_is_not_held_to_them() -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.dropout(x, 0.5) * (time.perf_counter_ns() % 1009)

    def act(model: Any, inputs: Any, options: Any) -> Capture:
        return Capture(fx.symbolic_trace(model))

    fast = optimized(act, Noisy())
    said = f"what {WHO} captured was not compared with the model: the model does not compute the same twice"
    assert said in fast.report.diagnostics


def test_steps_of_several_calls_are_graphopts_own() -> None:
    model = nn.Linear(4, 4)

    def run(module: nn.Module) -> None:
        (module(X).sum() + module(X * 2).sum()).backward()

    fast = graphopt.optimize(model, step=run, plugins=(plugin(symbolic),), emit="eager", cache=False)
    assert "plugins capture single calls: they were not asked for step=" in fast.report.diagnostics
    assert fast.report.captures == ()
