"""What plugins bring may raise, exit, hang or return nonsense: it is named, and the rest goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import graphopt
from graphopt import DeviceSpec, Level, Pass, PluginError, Reason
from graphopt.cost import CostModel, NodeCost
from graphopt.plugins import (
    CostModelFactory,
    DumpFormat,
    OperatorCost,
    PluginHost,
    PolicySpec,
    ReplacementSpec,
    default_host,
    hookimpl,
)
from graphopt.rules import RewritePass, Rule, operator

aten = torch.ops.aten
X = torch.ones(4)


class Model(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sin().cos()


def inline(**members: Any) -> Any:
    hooks = {name: hookimpl(staticmethod(member)) for name, member in members.items()}
    return type("Inline", (), {"graphopt_api": 1, **hooks})()


def raising(error: BaseException) -> Callable[..., Any]:
    def function(*args: Any) -> Any:
        raise error

    return function


@dataclass(frozen=True)
class Foreign(Pass):
    """Proposes what the test says."""

    name: ClassVar[str] = "foreign"
    level: ClassVar[Level] = Level.SEMANTIC
    act: ClassVar[Callable[[], Any]]

    def propose(self, program: Any, ctx: Any) -> Any:
        return type(self).act()


def acting(act: Callable[[], Any]) -> Foreign:
    cls = dataclass(frozen=True)(type("Acting", (Foreign,), {"act": staticmethod(act)}))
    return cls()  # type: ignore[no-any-return]


def optimized(*passes: Pass, **options: Any) -> graphopt.Optimized:
    torch._dynamo.reset()
    return graphopt.optimize(Model(), (X,), pipeline=passes, emit="eager", **options)


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (raising(ValueError("no idea")), "propose() raised ValueError: no idea"),
        (raising(SystemExit(3)), "propose() raised SystemExit: 3"),
        (raising(RecursionError("too deep")), "propose() raised RecursionError: too deep"),
        (lambda: 7, "propose() returned 7: expected an iterable of proposals"),
        (lambda: [7], "propose() yielded 7: expected a Candidate, Frontier, NearMiss or Declined"),
    ],
    ids=["raises", "exits", "recurses", "number", "numbers"],
)
def test_a_pass_that_fails_is_rolled_back(act: Callable[[], Any], reason: str) -> None:
    fast = optimized(acting(act))
    (record,) = fast.report.steps
    assert (record.id, record.status, record.reason) == ("foreign", "rolled-back", reason)
    torch.testing.assert_close(fast(X), Model()(X))


@pytest.mark.parametrize(
    ("guard", "reason"),
    [
        (raising(KeyError("val")), "the guard of rule 'sine' raised KeyError: 'val'"),
        (raising(SystemExit()), "the guard of rule 'sine' raised SystemExit"),
        (lambda x: False, "rule sine: the guard returned False: expected a Reason or None"),
    ],
    ids=["raises", "exits", "nonsense"],
)
def test_a_guard_that_fails_names_its_rule(guard: Callable[..., Reason | None], reason: str) -> None:
    def guarded(x: Any) -> Reason | None:
        return guard(x)

    sine = operator(aten.sin.default)
    rule = Rule("sine", lambda x: sine(x), lambda x: aten.sin.default(x), guarded)
    cls = type("Guarded", (RewritePass,), {"name": "guarded", "level": Level.SEMANTIC, "rules": (rule,)})
    fast = optimized(dataclass(frozen=True)(cls)())  # type: ignore[arg-type]
    (record,) = fast.report.steps
    assert (record.status, record.reason) == ("rolled-back", reason)
    torch.testing.assert_close(fast(X), Model()(X))


def test_an_apply_that_exits_is_rolled_back() -> None:
    gain = graphopt.CostDelta(seconds=-1)
    offer = graphopt.Candidate("c", "foreign", ("sin",), gain, raising(SystemExit(1)))
    (record,) = optimized(acting(lambda: [offer])).report.steps
    assert record.reason == "candidate 'c': apply() raised SystemExit: 1"


def slow(*args: Any) -> list[Any]:
    time.sleep(0.3)
    return []


def test_what_hangs_is_named_while_it_does_and_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "slow_plugin.py").write_text(
        "import time\nfrom graphopt.plugins import hookimpl\ngraphopt_api = 1\ntime.sleep(0.3)\n"
        "@hookimpl\ndef graphopt_formats():\n    yield from ()\n    time.sleep(0.3)\n"
    )
    entry = EntryPoint("sloth", "slow_plugin", "graphopt.plugins")
    host = PluginHost(entry_points=[entry], disabled=(), strict=False, patience=0.1)
    with caplog.at_level(logging.WARNING, logger="graphopt"):
        (record,) = host.check()
    assert caplog.messages == [
        "plugin 'sloth' of unknown: its import has not returned for 0.1 s",
        "plugin 'sloth' of unknown: graphopt_formats has not returned for 0.1 s",
    ]
    assert record.status == "active" and record.error == ""
    assert [text.rpartition(" took ")[0] for text in record.slow] == ["its import", "graphopt_formats"]
    assert "its import took" in str(record)


def test_a_pass_that_hangs_is_its_plugin_s(caplog: pytest.LogCaptureFixture) -> None:
    step = acting(slow)
    plugin = inline(graphopt_passes=lambda: [type(step)])
    host = PluginHost([plugin], entry_points=(), strict=False, patience=0.1)
    with caplog.at_level(logging.WARNING, logger="graphopt"):
        for _ in range(2):
            with host.using("graphopt_passes", "foreign"):
                slow()
    assert caplog.messages == ["plugin 'Inline' of inline: pass 'foreign' has not returned for 0.1 s"] * 2
    (record,) = host.records()
    # Told once, however often it runs.
    (text,) = record.slow
    assert text.startswith("pass 'foreign' took 0.")
    with host.using("graphopt_passes", "of nobody"):
        pass


def test_what_is_fast_is_not_named(caplog: pytest.LogCaptureFixture) -> None:
    host = PluginHost([inline(graphopt_formats=list)], entry_points=(), patience=5.0)
    assert host.check()[0].slow == () and not caplog.messages


def test_a_dump_format_that_raises_is_named() -> None:
    def write(program: Any, stream: Any) -> None:
        raise OSError("no ink")

    plugin = inline(graphopt_formats=lambda: [DumpFormat("ink", ".ink", write)])
    fast = optimized(plugins=(plugin,))
    said = "plugin 'Inline' of inline: dump format 'ink' raised OSError: no ink"
    with pytest.raises(PluginError, match=said):
        fast.dump(format="ink")
    assert fast.dump(format="text")


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (raising(ImportError("no tables")), "cost model 'mine' raised ImportError: no tables"),
        (lambda device: None, "cost model 'mine' gives None, without 'device': expected a graphopt.cost"),
    ],
    ids=["raises", "none"],
)
def test_a_cost_model_that_cannot_be_built_is_named(build: Callable[..., Any], reason: str) -> None:
    plugin = inline(graphopt_cost_models=lambda: [CostModelFactory("mine", build)])
    with pytest.raises(PluginError, match=f"plugin 'Inline' of inline: {reason}"):
        optimized(plugins=(plugin,), cost_model="mine")


def test_a_cost_model_is_chosen_by_name() -> None:
    class Doubled:
        """Takes the roofline's seconds twice."""

        def __init__(self, device: DeviceSpec) -> None:
            self.base: CostModel = default_host().cost_model("roofline").build(device)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.base, name)

        def node(self, node: Any) -> NodeCost:
            found = self.base.node(node)
            return replace(found, seconds=2 * found.seconds)

    plugin = inline(graphopt_cost_models=lambda: [CostModelFactory("doubled", Doubled)])
    usual = optimized(plugins=(plugin,)).plan.baseline
    doubled = optimized(plugins=(plugin,), cost_model="doubled").plan.baseline
    assert usual.seconds is not None and doubled.seconds == pytest.approx(2 * usual.seconds)
    assert doubled.peak_bytes == usual.peak_bytes
    with pytest.raises(graphopt.UnknownNameError, match="model 'doubld'; did you mean 'doubled'"):
        optimized(plugins=(plugin,), cost_model="doubld")


def price(node: Any, device: DeviceSpec) -> NodeCost:
    return NodeCost(5, 0, 0, 0.25)


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (price, ""),
        (raising(KeyError("val")), "cost of operator 'aten::sin' raised KeyError: 'val'"),
        (lambda node, device: 3.0, "cost of operator 'aten::sin': expected a NodeCost, got 3.0"),
        (
            lambda node, device: NodeCost(0, 0, 0, float("nan")),
            "cost of operator 'aten::sin': seconds is nan: expected a finite number that is not negative",
        ),
        (
            lambda node, device: NodeCost(-1, 0, 0, 0.0),
            "cost of operator 'aten::sin': flops is -1: expected a finite number that is not negative",
        ),
        (
            lambda node, device: NodeCost("9", 0, 0, 0.0),  # type: ignore[arg-type]
            "cost of operator 'aten::sin': flops is '9': expected a number",
        ),
        (
            lambda node, device: NodeCost(0, 0, 0, 0.0, 64),
            "cost of operator 'aten::sin': workspace_bytes are said with "
            "graphopt.operator_scratch.state_scratch",
        ),
    ],
    ids=["works", "raises", "number", "nan", "negative", "text", "workspace"],
)
def test_a_price_of_an_operator_counts_or_is_named(function: Callable[..., Any], error: str) -> None:
    plugin = inline(graphopt_costs=lambda: [OperatorCost("aten::sin", function)])
    host = PluginHost([plugin], strict=False)
    usual = optimized().plan.baseline.seconds
    fast = optimized(plugins=(plugin,))
    found = fast.plan.baseline.seconds
    assert usual is not None and found is not None
    if not error:
        assert found == pytest.approx(usual, abs=0.25) and found > 0.25
    else:
        assert found == usual
        record = next(r for r in fast.report.plugins if r.name == "Inline")
        assert (record.status, record.error) == ("failed", error)
    assert host.costs()["aten::sin"].price is function


def proposing_slowly() -> dict[str, Any]:
    step = acting(slow)
    return {"graphopt_passes": lambda: [type(step)]}


def applying_slowly() -> dict[str, Any]:
    gain = graphopt.CostDelta(seconds=-1)
    step = acting(lambda: [graphopt.Candidate("c", "foreign", ("sin",), gain, slow)])
    return {"graphopt_passes": lambda: [type(step)]}


def guarding_slowly() -> dict[str, Any]:
    sine = operator(aten.sin.default)

    def guard(x: Any) -> Reason:
        slow()
        return Reason("not here")

    rule = Rule("sine", lambda x: sine(x), lambda x: aten.sin.default(x), guard)
    cls = type("Guarded", (RewritePass,), {"name": "foreign", "level": Level.SEMANTIC, "rules": (rule,)})
    return {"graphopt_passes": lambda: [dataclass(frozen=True)(cls)]}


def choosing_slowly() -> dict[str, Any]:
    return {"graphopt_policies": lambda: [PolicySpec("mine", lambda question: slow() or None)]}


def pricing_slowly() -> dict[str, Any]:
    return {"graphopt_costs": lambda: [OperatorCost("aten::sin", lambda *given: slow() or price(*given))]}


def building_slowly() -> dict[str, Any]:
    usual = default_host().cost_model("roofline").build
    return {
        "graphopt_cost_models": lambda: [CostModelFactory("mine", lambda device: slow() or usual(device))],  # type: ignore[arg-type, return-value]
    }


def replacing_slowly() -> dict[str, Any]:
    return {"graphopt_replacements": lambda: [ReplacementSpec("mine", slow)]}


HANGING: dict[str, tuple[Callable[[], dict[str, Any]], str, dict[str, Any]]] = {
    "propose": (proposing_slowly, "pass 'foreign'", {"pipeline": "foreign"}),
    "apply": (applying_slowly, "pass 'foreign'", {"pipeline": "foreign"}),
    "guard": (guarding_slowly, "pass 'foreign'", {"pipeline": "foreign"}),
    "policy": (choosing_slowly, "policy 'mine'", {"policy": "mine", "budget": "1GiB"}),
    "price": (pricing_slowly, "cost of operator 'aten::sin'", {}),
    "cost model": (building_slowly, "cost model 'mine'", {"cost_model": "mine"}),
    "replacement": (replacing_slowly, "replacement 'mine'", {"emit": "inductor"}),
}


@pytest.mark.parametrize("where", HANGING)
def test_what_hangs_in_use_is_named_and_noted(
    where: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    members, what, options = HANGING[where]
    monkeypatch.setitem(PluginHost.__init__.__kwdefaults__, "patience", 0.2)
    torch._dynamo.reset()
    given = {"emit": "eager", "cache": False, "pipeline": (), **options}
    fast = graphopt.optimize(Model(), (X,), plugins=(inline(**members()),), **given)
    torch.testing.assert_close(fast(X), Model()(X))
    told = {record.getMessage() for record in caplog.records if record.name == "graphopt"}
    assert f"plugin 'Inline' of inline: {what} has not returned for 0.2 s" in told
    (record,) = (record for record in fast.report.plugins if record.name == "Inline")
    assert record.status == "active" and record.slow[0].startswith(f"{what} took 0.")
    assert f"{what} took" in " ".join(str(fast.report).split())


@pytest.mark.parametrize(
    ("propose", "reason"),
    [
        (raising(KeyError("val")), "raised KeyError: 'val'"),
        (raising(SystemExit(3)), "raised SystemExit: 3"),
        (lambda gm, cost: 7, "raised TypeError: 'int' object is not iterable"),
        (lambda gm, cost: [7], "raised AttributeError: 'int' object has no attribute 'record'"),
    ],
    ids=["raises", "exits", "number", "numbers"],
)
def test_kernels_for_groups_that_fail_are_left_out(
    propose: Callable[..., Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = inline(graphopt_replacements=lambda: [ReplacementSpec("mine", propose)])
    torch._dynamo.reset()
    options: dict[str, Any] = {"plugins": (plugin,), "pipeline": (), "emit": "inductor", "cache": False}
    fast = graphopt.optimize(Model(), (X,), **options)
    torch.testing.assert_close(fast(X), Model()(X))
    assert f"mine failed: {reason.removeprefix('raised ')}" in {group.reason for group in fast.report.groups}
    (record,) = (record for record in fast.report.plugins if record.name == "Inline")
    assert (record.status, record.error) == ("failed", f"replacement 'mine' {reason}")
    monkeypatch.setenv("GRAPHOPT_STRICT_PLUGINS", "1")
    torch._dynamo.reset()
    with pytest.raises(PluginError, match=f"plugin 'Inline' of inline failed: replacement 'mine' {reason}"):
        graphopt.optimize(Model(), (X,), **options)(X)
