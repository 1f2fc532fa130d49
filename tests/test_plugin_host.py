"""The plugin host: isolation, provenance, duplicates, switches."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import graphopt
from graphopt import Level, Pass, PluginError, UnknownNameError
from graphopt.plugins import CostModelFactory, DumpFormat, KernelSpec, OperatorCost, PluginHost, hookimpl
from graphopt.plugins.records import PluginRecord
from tests.programs import semantic


@dataclass(frozen=True)
class Tidy(Pass):
    """Does nothing, tidily."""

    name: ClassVar[str] = "tidy"
    level: ClassVar[Level] = Level.JOINT


class Installed(Distribution):
    """A distribution that exists for its name alone."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def metadata(self) -> Any:
        return {"Name": self._name, "Version": "1.2"}

    def read_text(self, filename: str) -> str | None:
        return None

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(path)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``install(plugin, source, dist)`` writes a module and returns its entry point."""
    monkeypatch.syspath_prepend(tmp_path)
    written: list[str] = []

    def make(name: str, source: str, distribution: str) -> EntryPoint:
        module = f"installed_{len(written)}_{name.replace('-', '_')}"
        (tmp_path / f"{module}.py").write_text(f"from graphopt.plugins import hookimpl\n{source}")
        written.append(module)
        entry = EntryPoint(name, module, "graphopt.plugins")
        vars(entry).update(dist=Installed(distribution))
        return entry

    yield make
    for module in written:
        sys.modules.pop(module, None)


FORMAT = """
graphopt_api = 1
from graphopt.plugins import DumpFormat
@hookimpl
def graphopt_formats():
    return [DumpFormat({name!r}, ".x", print)]
"""


def host_of(*entries: EntryPoint, **options: Any) -> PluginHost:
    return PluginHost(entry_points=entries, **{"disabled": (), "strict": False, **options})


def record(host: PluginHost, name: str) -> PluginRecord:
    return next(record for record in host.records() if record.name == name)


def test_a_plugin_contributes_and_is_credited(install: Any) -> None:
    host = host_of(install("acme", FORMAT.format(name="acme"), "acme-graphopt"))
    assert list(host.formats()) == ["acme"]
    assert host.owner("graphopt_formats", "acme").distribution == "acme-graphopt"
    assert record(host, "acme") == PluginRecord(
        "acme", "acme-graphopt", "1.2", "active", "", ("graphopt_formats",)
    )
    assert host.owner("graphopt_formats", "nobody").plugin == ""


@pytest.mark.parametrize(
    ("source", "status", "error"),
    [
        ("raise ImportError('no acme runtime')", "failed", "ImportError: no acme runtime"),
        ("raise SystemExit(3)", "failed", "SystemExit: 3"),
        (
            "x = 1",
            "incompatible",
            "graphopt_api is missing; a plugin for this graphopt sets graphopt_api = 1",
        ),
        ("graphopt_api = 7", "incompatible", "graphopt_api is 7, this graphopt has 1"),
        ("graphopt_api = 1", "failed", "it implements no hook of the group graphopt.plugins"),
        (
            "graphopt_api = 1\n@hookimpl\ndef graphopt_pases(): return []",
            "failed",
            "there is no hook 'graphopt_pases'; did you mean 'graphopt_passes'?",
        ),
        (
            "graphopt_api = 1\ndef graphopt_passes(): return []",
            "failed",
            "graphopt_passes is not marked with @graphopt.hookimpl",
        ),
    ],
)
def test_a_plugin_that_cannot_load_is_recorded_alone(
    install: Any, source: str, status: str, error: str
) -> None:
    bad = install("bad", source, "bad-dist")
    host = host_of(bad, install("good", FORMAT.format(name="good"), "good-dist"))
    assert list(host.formats()) == ["good"]
    assert (record(host, "bad").status, record(host, "bad").error) == (status, error)
    with pytest.raises(PluginError, match="plugin 'bad' of bad-dist"):
        host_of(bad, strict=True).records()


@pytest.mark.parametrize(
    ("returned", "error"),
    [
        ("1 / 0", "graphopt_formats raised ZeroDivisionError: division by zero"),
        ("None", "graphopt_formats: expected an iterable of DumpFormats, got None"),
        ("'text'", "graphopt_formats: expected an iterable of DumpFormats, got 'text'"),
        ("[1]", "graphopt_formats: expected DumpFormat records, got 1"),
    ],
)
def test_a_hook_that_fails_counts_not_at_all(install: Any, returned: str, error: str) -> None:
    source = f"graphopt_api = 1\n@hookimpl\ndef graphopt_formats(): return {returned}"
    bad, good = install("bad", source, "b"), install("good", FORMAT.format(name="good"), "g")
    host = host_of(bad, good)
    assert list(host.formats()) == ["good"]
    assert record(host, "bad").status == "failed"
    assert record(host, "bad").error == error
    with pytest.raises(PluginError, match="plugin 'bad' of b failed"):
        host_of(bad, good, strict=True).formats()


def test_two_records_of_one_name_name_both_distributions(install: Any) -> None:
    host = host_of(
        install("one", FORMAT.format(name="same"), "dist-one"),
        install("two", FORMAT.format(name="same"), "dist-two"),
    )
    assert host.owner("graphopt_formats", "same").plugin == "one"
    assert record(host, "two").error == (
        "graphopt_formats: dump format 'same' is registered twice: by 'one' of dist-one and by 'two' of "
        "dist-two"
    )


def test_two_plugins_of_one_name_name_both_distributions(install: Any) -> None:
    host = host_of(
        install("same", FORMAT.format(name="b"), "z-dist"), install("same", FORMAT.format(name="a"), "a-dist")
    )
    assert list(host.formats()) == ["a"]
    assert host.records()[1].error == (
        "plugin 'same' is registered twice: by distribution a-dist and by distribution z-dist; "
        "the first counts"
    )


def test_disabled_plugins_are_not_imported(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = install("bad", "raise RuntimeError('imported')", "b")
    monkeypatch.setenv("GRAPHOPT_DISABLE_PLUGINS", "bad, bda")
    host = PluginHost(entry_points=[bad], strict=False)
    assert [(r.name, r.status, r.error) for r in host.records()] == [
        ("bad", "disabled", ""),
        ("bda", "disabled", "no plugin of that name; did you mean 'bad'?"),
    ]
    monkeypatch.setenv("GRAPHOPT_DISABLE_PLUGINS", "all")
    assert PluginHost(entry_points=[bad]).records()[0].status == "disabled"


def test_strict_can_come_from_the_environment(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_STRICT_PLUGINS", "1")
    with pytest.raises(PluginError, match="imported"):
        PluginHost(entry_points=[install("bad", "raise RuntimeError('imported')", "b")]).records()


def inline(**members: Any) -> Any:
    hooks = {name: hookimpl(staticmethod(m)) if callable(m) else m for name, m in members.items()}
    return type("Inline", (), {"graphopt_api": 1, **hooks})()


def test_inline_passes_by_class_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "lazy_pass.py").write_text(
        "from dataclasses import dataclass\nimport graphopt\n@dataclass(frozen=True)\n"
        "class Late(graphopt.Pass):\n    name = 'late'\n    level = graphopt.Level.LOWERED\n"
    )
    host = PluginHost([inline(graphopt_passes=lambda: [Tidy, "lazy_pass:Late"])], entry_points=())
    assert host.passes()["tidy"] is Tidy
    assert host.pass_class("late").__name__ == "Late"
    assert host.pass_class("Inline/tidy") is Tidy
    with pytest.raises(UnknownNameError, match=r"unknown pass 'other/tidy'; did you mean 'tidy'\?"):
        host.pass_class("other/tidy")


def test_rules_are_a_pass_of_their_plugin() -> None:
    from graphopt.rules import Rule, operator

    sine = operator(torch.ops.aten.sin.default)
    # Wrong on purpose: its work can be seen.
    rule = Rule("cosine", lambda x: sine(x), lambda x: torch.ops.aten.cos.default(x))

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin()

    plugin, x = inline(graphopt_rules=lambda: [rule]), torch.ones(3)
    fast = graphopt.optimize(Model(), (x,), plugins=(plugin,), pipeline="Inline-rules", emit="eager")
    assert torch.equal(fast(x), x.cos())
    (step,) = fast.report.steps
    assert (step.id, step.plugin, step.status) == ("Inline-rules", "Inline", "applied")
    host = PluginHost([plugin], entry_points=())
    assert host.pass_class("Inline/Inline-rules").summary == "rewrite by the rules of plugin Inline"
    assert host.owner("graphopt_rules", "Inline-rules").plugin == "Inline"
    assert dict(PluginHost([inline(graphopt_rules=list)], entry_points=()).passes()) == {}
    for returned, error in (
        ([3], "graphopt_rules: expected graphopt.rules.Rule records, got 3"),
        ([rule, rule], "graphopt_rules: two rules have the name 'cosine'"),
        (None, "graphopt_rules: expected an iterable of Rules, got None"),
    ):
        bad = inline(graphopt_rules=lambda returned=returned: returned, graphopt_passes=lambda: [Tidy])
        host = PluginHost([bad], entry_points=(), strict=False)
        assert list(host.passes()) == ["tidy"] and host.records()[0].error == error


class NotFrozen(Pass):
    name: ClassVar[str] = "loose"
    level: ClassVar[Level] = Level.JOINT


@dataclass(frozen=True)
class Nameless(Pass):
    level: ClassVar[Level] = Level.JOINT


@dataclass(frozen=True)
class Levelless(Pass):
    name: ClassVar[str] = "floating"


@pytest.mark.parametrize(
    ("offered", "error"),
    [
        (int, "expected subclasses of graphopt.Pass, got <class 'int'>"),
        ("nonsense", "expected 'package.module:Class', got 'nonsense'"),
        ("graphopt.passes:Nope", "cannot import 'graphopt.passes:Nope'"),
        ("no_such_module:Nope", "ModuleNotFoundError: No module named 'no_such_module'"),
        (NotFrozen, "pass NotFrozen must be a frozen dataclass: its fields are its options"),
        (Nameless, "pass Nameless needs a class variable `name`, got None"),
        (Levelless, "pass 'floating' needs a class variable `level` (a Level), got None"),
    ],
)
def test_what_is_no_pass_is_refused(offered: Any, error: str) -> None:
    host = PluginHost([inline(graphopt_passes=lambda: [offered])], entry_points=(), strict=False)
    assert dict(host.passes()) == {}
    assert error in host.records()[0].error
    with pytest.raises(UnknownNameError, match="Inline' \\(failed\\)"):
        host.pass_class("tidy")


def test_pipelines_are_a_mapping_to_files() -> None:
    host = PluginHost(
        [inline(graphopt_pipelines=lambda: {"mine": "text.yaml"})], entry_points=(), strict=False
    )
    assert dict(host.pipelines()) == {}
    assert "expected a mapping of names to files, got 'mine': 'text.yaml'" in host.records()[0].error


def test_an_inline_object_that_is_no_plugin_raises() -> None:
    with pytest.raises(PluginError, match=r"'object' of inline \(incompatible\): graphopt_api is missing"):
        PluginHost([object()], entry_points=(), strict=False).records()


def test_other_hooks_of_a_failed_plugin_still_count() -> None:
    def fail() -> Any:
        raise ValueError("broken formats")

    factory = CostModelFactory("mine", lambda device: None)  # type: ignore[arg-type, return-value]
    plugin = inline(graphopt_formats=fail, graphopt_cost_models=lambda: [factory])
    host = PluginHost([plugin], entry_points=(), strict=False)
    assert dict(host.formats()) == {}
    assert host.cost_model("mine") is factory
    assert host.check()[0].status == "failed"
    with pytest.raises(UnknownNameError, match=r"unknown cost model 'mien'; did you mean 'mine'\?"):
        host.cost_model("mien")


def test_each_hook_is_asked_once() -> None:
    asked: list[int] = []

    def formats() -> list[DumpFormat]:
        asked.append(1)
        return [DumpFormat("x", ".x", lambda program, stream: None)]

    host = PluginHost([inline(graphopt_formats=formats)], entry_points=())
    assert host.formats() == host.formats()
    assert asked == [1]


def test_an_observer_that_raises_is_dropped_and_the_others_go_on() -> None:
    told: list[str] = []

    class Bad:
        graphopt_api = 1

        @hookimpl
        def graphopt_before_pass(self, step: Any) -> None:
            told.append("bad")
            raise ValueError("observer broke")

    class Good:
        graphopt_api = 1

        @hookimpl
        def graphopt_before_pass(self, step: Any, program: Any) -> None:
            told.append(f"{step.name} on {program.name}")

        @hookimpl
        def graphopt_after_pass(self, record: Any) -> None:
            told.append(record)

    host = PluginHost([Bad(), Good()], entry_points=(), strict=False)
    program = semantic(lambda x: x.sin(), torch.ones(2))
    for _ in range(2):
        host.notify_before(None, Tidy(), program)  # type: ignore[arg-type]
    host.notify_after(None, Tidy(), program, "applied")  # type: ignore[arg-type]
    assert told == ["bad", "tidy on g0", "tidy on g0", "applied"]
    assert record(host, "Bad").error == "graphopt_before_pass raised ValueError: observer broke"


def test_devices_are_found_by_alias_and_nearest() -> None:
    spec = graphopt.DeviceSpec("h200", "cuda", 1, 1.0, 1.0, {}, {}, 0.0, 1.0, aliases=("NVIDIA H200",))
    host = PluginHost([inline(graphopt_devices=lambda: [spec])], entry_points=())
    assert host.device("nvidia h200") is spec
    with pytest.raises(UnknownNameError, match=r"unknown device 'h20'; did you mean 'h200'\?"):
        host.device("h20")


@dataclass(frozen=True)
class Listing(Pass):
    """A default that it does not take itself, an order that is none."""

    name: ClassVar[str] = "listing"
    level: ClassVar[Level] = Level.JOINT
    after: ClassVar[Any] = ["normalize"]
    value: int = 0

    def __post_init__(self) -> None:
        if not self.value:
            raise ValueError("value is 0")


def test_check_looks_into_what_is_registered(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("schema: graphopt/pipeline@1\npasses: [tidi]\n")
    device = graphopt.DeviceSpec("slow", "cuda", 1, 0.0, 1.0, {"float32": 1.0}, {}, 0.0, 1.0)

    def refuse(x: Any) -> None:
        return None

    plugin = inline(
        graphopt_passes=lambda: [Tidy, Listing],
        graphopt_pipelines=lambda: {"p": tmp_path / "p.yaml"},
        graphopt_devices=lambda: [device],
        graphopt_formats=lambda: [DumpFormat("x", ".x", "write")],  # type: ignore[arg-type]
        graphopt_costs=lambda: [OperatorCost("gate", refuse)],  # type: ignore[arg-type]
        graphopt_kernels=lambda: [
            KernelSpec("a", "acme::absent", refuse, refuse), KernelSpec("b", "absent", refuse, refuse),
        ],
    )  # fmt: skip
    (record,) = PluginHost([plugin], entry_points=(), strict=False).check()
    assert record.status == "failed"
    assert record.error.split("; ") == [
        "dump format 'x': write is 'write': expected a function",
        "kernel 'a': there is no operator 'acme::absent': the hook has to import the module that defines it",
        "kernel 'b': op is 'absent': expected the name of an operator, such as 'acme::gate'",
        "cost of operator 'gate': expected the name of an operator, such as 'acme::gate'",
        "device 'slow': vector_flops has no 'float32', which stands for the dtypes that it lacks",
        "device 'slow': copy_bytes_per_second is 0.0: expected a positive number",
        "pass 'tidy': it does not define propose()",
        "pass 'listing': after is ['normalize']: expected a mapping of names of passes to reasons",
        "pass 'listing': it does not define propose()",
        "pass 'listing': it cannot be made with its defaults: ValueError: value is 0",
        f"pipeline 'p': {tmp_path / 'p.yaml'}: passes[0]: unknown pass 'tidi'",
        "did you mean 'tidy'?",
    ]


def test_the_installed_plugins_all_work() -> None:
    records = PluginHost(disabled=(), strict=False).check()
    own = {record.name: record for record in records if record.distribution == "graphopt"}
    assert set(own) >= {"cost-model", "formats", "kernels", "passes"}
    assert [str(record) for record in own.values() if record.error] == []


def test_importing_graphopt_imports_neither_torch_nor_plugins() -> None:
    code = (
        "import sys, graphopt, graphopt.plugins\n"
        "assert callable(graphopt.hookimpl)\n"
        "graphopt.plugins.default_host().commands()\n"
        "print('torch' in sys.modules, 'rich' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_every_public_name_resolves() -> None:
    for name in graphopt.__all__:
        assert getattr(graphopt, name) is not None
    with pytest.raises(AttributeError, match="module 'graphopt' has no attribute 'optimise'"):
        graphopt.optimise  # noqa: B018


def test_functions_are_not_hidden_by_modules_of_their_name() -> None:
    code = (
        "from graphopt.plans import Plan\nimport graphopt\n"
        "print(callable(graphopt.plan), callable(graphopt.pareto))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
