"""Emitted kernels inside of compiled programs: what is proposed, what is put in, what tuning has to say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import graphopt
import graphopt_kernels.emit.replace as replacing
from graphopt import _torch
from graphopt.emit.replacing import Group, proposed, replaced
from graphopt.group_record import GroupRecord
from graphopt.plugins import PluginHost, ReplacementSpec, default_host, hookimpl
from graphopt.report import Report
from graphopt_kernels.emit.replace import groups_for, propose
from graphopt_kernels.emit.running import file_of
from graphopt_kernels.tuning import groups, lookup, store, table
from graphopt_kernels.tuning.compiling import calls_of, usage_of
from graphopt_kernels.tuning.groups import GROUPS, GroupCode, GroupProblem, group_tunable
from graphopt_kernels.tuning.lookup import asked_for, fields_text, forget_choices
from graphopt_kernels.tuning.model import Usage
from graphopt_kernels.tuning.store import Entry, cached_file, code_of, write_entries
from graphopt_kernels.tuning.tuner import tune
from tests.tunables import H200

pytest.importorskip("triton")

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
YES: Callable[[GroupProblem], tuple[bool, bool]] = lambda problem: (True, True)  # noqa: E731


def price() -> Any:
    host = default_host()
    return host.cost_model("roofline").build(host.device("h200"))


def normed(x: torch.Tensor, w: torch.Tensor, r: torch.Tensor, m: torch.Tensor) -> tuple[torch.Tensor, ...]:
    h = x + r
    return torch.softmax(F.layer_norm(h, (512,), w) @ m, -1), h * 2


SHAPES = ((4096, 512), (512,), (4096, 512), (512, 512))


def lowered(function: Callable[..., Any], *shapes: tuple[int, ...]) -> fx.GraphModule:
    with torch.no_grad():
        inputs = [torch.randn(shape) for shape in shapes]
        table_of = _torch.inductor_decompositions()
        return make_fx(function, decomposition_table=table_of, tracing_mode="fake")(*inputs)


# --- put in ----------------------------------------------------------------------------------


def test_groups_become_calls_and_values_keep_their_names() -> None:
    gm = lowered(normed, *SHAPES)
    before = gm.code
    made, records = replaced(gm, groups_for(gm, price(), YES))
    assert gm.code == before, "the graph itself was changed"
    kept = [record for record in records if record.kept]
    calls = [n for n in made.graph.nodes if n.target is torch.ops.graphopt.emitted_kernel.default]
    assert [call.args[0] for call in calls] == [record.kernel for record in kept] and kept
    outputs = [
        next(n for n in reversed(g.graph.nodes) if n.op == "output").all_input_nodes for g in (gm, made)
    ]
    assert [node.name for node in outputs[0]] == [node.name for node in outputs[1]]
    for one, other in zip(*outputs, strict=True):
        assert one.meta["val"].stride() == other.meta["val"].stride()
    torch.manual_seed(0)
    inputs = [torch.randn(shape) for shape in SHAPES]
    for value, right in zip(made(*inputs), gm(*inputs), strict=True):
        assert torch.equal(value, right)


def _group(gm: fx.GraphModule, names: str, outputs: str) -> Group:
    nodes = {node.name: node for node in gm.graph.nodes}
    inside = tuple(nodes[name] for name in names.split())
    record = GroupRecord("kernel", (), (), True, "measured faster", 2.0, 1.0)
    made = tuple(nodes[name] for name in outputs.split())
    return Group(inside, made, torch.ops.graphopt.emitted_kernel.default, ("kernel", []), record)


def test_a_group_waits_for_what_it_reads_and_others_wait_for_it() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = x.exp()
        early = first.cos()
        late = y.sin()
        return early, first + late

    gm = lowered(function, (4,), (4,))
    made, records = replaced(gm, [_group(gm, "exp add", "exp add")])
    assert records[0].kept
    assert [node.name for node in made.graph.nodes] == [
        "x_1",
        "y_1",
        "sin",
        "kernel",
        "exp",
        "add",
        "cos",
        "output",
    ]


def test_a_group_that_others_run_between_is_left_out_with_the_reason() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        first = x.exp()
        return first + first.cumsum(0)

    gm = lowered(function, (4,))
    made, (record,) = replaced(gm, [_group(gm, "exp add", "exp add")])
    assert made is gm
    assert not record.kept and record.reason == "other operators have to run in between"


def test_nothing_passes_an_operator_whose_effect_it_feels() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = y.exp()
        x.mul_(2)
        return first, first + x

    for read, kept in ((lambda x, y: function(x, y), True), (lambda x, y: function(y, y), False)):
        gm = lowered(read, (4,), (4,))
        assert any(node.target is aten.mul_.Tensor for node in gm.graph.nodes), gm.code
        made, (record,) = replaced(gm, [_group(gm, "exp add", "exp add")])
        assert record.kept is kept and (made is gm) is not kept
    assert record.reason == "other operators have to run in between"


def test_a_plugin_that_fails_is_left_out() -> None:
    class Plugin:
        graphopt_api = 1

        @hookimpl
        def graphopt_replacements(self) -> list[ReplacementSpec]:
            def fails(gm: fx.GraphModule, cost: Any) -> list[Group]:
                raise RuntimeError("no good")

            return [ReplacementSpec("bad", fails)]

    gm = lowered(lambda x: x.exp(), (4,))
    made, records = proposed(gm, PluginHost((Plugin(),)), price())
    assert made is gm
    assert [record.reason for record in records if record.kernel == "bad"] == [
        "bad failed: RuntimeError: no good"
    ]


# --- chosen ----------------------------------------------------------------------------------


def test_a_group_is_kept_only_where_it_is_predicted_and_measured_to_be_faster() -> None:
    gm = lowered(normed, *SHAPES)
    asked: list[str] = []

    def answer(problem: GroupProblem) -> tuple[bool, bool]:
        asked.append(problem.file)
        return len(asked) > 1, False

    found = [group.record for group in groups_for(gm, price(), answer)]
    # Inductor makes the same kernel of the softmax: there is nothing to measure.
    (softmax,) = [record for record in found if record.kernel.startswith("amax")]
    assert softmax.reason == "predicted to be no faster than Inductor's kernels" and not softmax.kept
    (norm,) = [record for record in found if record.kernel.startswith("add_var_mean")]
    assert asked == [norm.kernel] and norm.together < norm.apart
    assert norm.reason == "not measured on this device: graphopt tune" and not norm.kept
    (again,) = [r.record for r in groups_for(gm, price(), answer) if r.record.kernel == norm.kernel]
    assert again.reason == "measured: Inductor's kernels are as fast" and not again.kept
    (kept,) = [g.record for g in groups_for(gm, price(), YES) if g.record.kernel == norm.kernel]
    assert kept.kept and kept.reason == "measured faster"
    assert "getitem" not in " ".join(kept.operators) and kept.operators[:2] == ("add", "var_mean")


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An H200 of which nothing is known."""
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "_SHIPPED", tmp_path / "shipped")
    for module in (lookup, groups):
        monkeypatch.setattr(module, "device_text", lambda device: H200.name)
    (tmp_path / "shipped").mkdir()
    table.forget_table()
    forget_choices()
    yield H200.name
    table.forget_table()
    forget_choices()


def stored(problem: GroupProblem, device: str, code: GroupCode | None) -> Entry:
    torch_version, triton_version = store.versions()
    return Entry(
        kernel=GROUPS.kernel,
        problem=fields_text(problem),
        device=device,
        torch=torch_version,
        triton=triton_version,
        code=code_of(GROUPS.sources),
        configuration=None if code is None else fields_text(code),
        default_us=20.0,
        us=20.0 if code is None else 10.0,
    )


def on_cuda(gm: fx.GraphModule, monkeypatch: pytest.MonkeyPatch) -> fx.GraphModule:
    """A torch without CUDA has no graphs of it: what is asked is where the tensors are."""
    monkeypatch.setattr(replacing, "_device", lambda node: CUDA)
    return gm


def test_without_measurements_nothing_is_searched(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gm = lowered(normed, *SHAPES)
    assert propose(gm, price()) == [], "tensors are on the CPU"

    def fails(*_: Any, **__: Any) -> None:
        raise AssertionError("searched")

    with monkeypatch.context() as patch:
        patch.setattr(replacing, "grouped", fails)
        assert propose(on_cuda(gm, patch), price()) == []
        host = default_host()
        assert propose(gm, host.cost_model("roofline").build(host.device("cpu"))) == []


def test_tuning_asks_and_what_it_found_is_used(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gm = on_cuda(lowered(normed, *SHAPES), monkeypatch)
    with asked_for() as asked:
        first = propose(gm, price())
    ((kernel, problem),) = asked
    assert kernel == "emitted-group" and not any(group.record.kept for group in first)
    write_entries(cached_file(device), [stored(problem, device, GroupCode("emitted"))])
    table.forget_table()
    forget_choices()
    kept = [group.record for group in propose(gm, price()) if group.record.kept]
    assert [record.kernel for record in kept] == [problem.file]
    # Measured, and no faster.
    write_entries(cached_file(device), [stored(problem, device, None)])
    table.forget_table()
    forget_choices()
    records = {group.record.kernel: group.record for group in propose(gm, price())}
    assert records[problem.file].reason == "measured: Inductor's kernels are as fast"


# --- measured --------------------------------------------------------------------------------


def some_problem() -> GroupProblem:
    gm = lowered(normed, *SHAPES)
    (group,) = [g for g in groups_for(gm, price(), YES) if g.record.kept]
    return GroupProblem(group.record.kernel)


def test_a_kernel_is_compiled_ahead_as_it_is_launched() -> None:
    problem, spec = some_problem(), group_tunable()
    (call,) = calls_of(spec, problem, GroupCode("emitted"), H200.processors)
    assert call.grid == file_of(problem.file).launch.grid
    usage = usage_of([call], H200)
    assert isinstance(usage, Usage) and not usage.spilled
    assert calls_of(spec, problem, GroupCode("inductor"), H200.processors) == []


def test_the_faster_of_both_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, spec = some_problem(), group_tunable()
    launched: list[str] = []

    def instead(name: str) -> Callable[..., Any]:
        reference = groups.module_of(problem.file).reference

        def run(*operands: torch.Tensor) -> Any:
            launched.append(name)
            return reference(*operands)

        return run

    # Neither Triton nor Inductor has a device here.
    monkeypatch.setattr(groups, "_launching", lambda kernels, file: instead("emitted"))
    monkeypatch.setattr(groups, "_compiled", lambda file, reference: instead("inductor"))
    monkeypatch.setattr("graphopt_kernels.tuning.tuner.calls_of", lambda *_: [])

    class Meter:
        device = torch.device("cpu")
        seconds = {"inductor": 2e-5, "emitted": 1e-5}

        def __call__(self, runs: Any, operands: Any) -> list[float]:
            times = []
            for run in runs:
                run(operands)
                times.append(self.seconds[launched[-1]])
            return times

    (outcome,) = tune([(spec, problem)], Meter(), H200, threads=1)
    assert outcome.chosen is not None and outcome.chosen.configuration == GroupCode("emitted")
    entry = outcome.entry(spec, H200.name)
    assert entry is not None and entry.configuration == "by=emitted"
    Meter.seconds = {"inductor": 1e-5, "emitted": 0.99e-5}
    (outcome,) = tune([(spec, problem)], Meter(), H200, threads=1)
    entry = outcome.entry(spec, H200.name)
    assert entry is not None and entry.configuration is None, "2 % are luck"


# --- run -------------------------------------------------------------------------------------


def test_the_operator_passes_opcheck_and_takes_other_strides() -> None:
    name = some_problem().file
    inputs = [torch.randn(x.shape) for x in file_of(name).built.inputs]
    check: Any = torch.library.opcheck
    check(torch.ops.graphopt.emitted_kernel.default, (name, inputs))
    turned = [x.t().contiguous().t() if x.dim() == 2 else x for x in inputs]
    run = torch.ops.graphopt.emitted_kernel
    for value, right in zip(run(name, turned), run(name, inputs), strict=True):
        assert torch.equal(value, right)


def test_the_operator_says_what_it_does_not_take() -> None:
    name = some_problem().file
    inputs = [torch.randn(x.shape) for x in file_of(name).built.inputs]
    run = torch.ops.graphopt.emitted_kernel
    with pytest.raises(ValueError, match=f"{name} takes 3 tensors, got 2"):
        run(name, inputs[:2])
    with pytest.raises(ValueError, match=rf"{name} takes torch.float32 \[4096, 512\], got torch.float64"):
        run(name, [inputs[0].double(), *inputs[1:]])
    with pytest.raises(ValueError, match="no kernel 'nothing' was made in this process"):
        run("nothing", inputs)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(256, 256), nn.LayerNorm(256), nn.Linear(256, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x + self.first(x)
        return torch.softmax(self.last(self.norm(h)), -1).square().mean()


@pytest.mark.slow
def test_an_optimized_step_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through Inductor, forward and backward; what is kept and what not is in the report."""
    monkeypatch.setattr(replacing, "propose", lambda gm, cost: groups_for(gm, price(), YES))
    torch.manual_seed(0)
    model, x = Model(), torch.randn(512, 256)
    plain = Model()
    plain.load_state_dict(model.state_dict())
    plain(x).backward()
    fast = graphopt.optimize(
        model, (x,), emit="inductor", dynamic_shapes=False, pipeline=[], on_error="raise"
    )
    fast(x).backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    report = fast.report
    assert any(group.kept for group in report.groups) and not all(group.kept for group in report.groups)
    assert "kernels in place of Inductor's" in str(report) and "measured faster" in str(report)
    assert Report.from_json(report.to_json()).groups == report.groups


def test_a_report_says_what_was_kept_and_why_others_were_not() -> None:
    fast = graphopt.optimize(nn.Linear(4, 4), (torch.randn(2, 4),), emit="eager")
    assert fast.report.groups == () and "in place of Inductor" not in str(fast.report)
    record = GroupRecord("exp_1f", ("exp", "sum"), (), True, "measured faster", 3e-5, 1e-5)
    other = replace(record, kernel="sin_2e", kept=False, reason="not measured on this device: graphopt tune")
    report = replace(fast.report, groups=(record, other, replace(other, kernel="cos_3d")))
    text = " ".join(str(report).split())
    assert "exp_1f: exp, sum: 20.0 us, measured faster" in text
    assert "not 2: not measured on this device: graphopt tune" in text
    assert Report.from_json(report.to_json()).groups == report.groups
