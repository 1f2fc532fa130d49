"""Every hook there is: typed, described, on the page, and isolated from those of other plugins."""

from __future__ import annotations

import inspect
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt import PluginError
from graphopt.plugins import PluginHost, hookimpl
from graphopt.plugins.diagnosis import probe_captures
from graphopt.plugins.hookspecs import HookSpecs
from tests.programs import semantic

PAGE = Path(__file__).parent.parent / "docs" / "plugins.md"
HOOKS = [name for name in vars(HookSpecs) if name.startswith("graphopt_")]
OBSERVERS = ("graphopt_before_pass", "graphopt_after_pass")
REGISTRIES = {
    "graphopt_passes": "passes", "graphopt_rules": "passes", "graphopt_kernels": "kernels",
    "graphopt_codecs": "codecs", "graphopt_schemes": "schemes", "graphopt_weight_formats": "weight_formats",
    "graphopt_stores": "stores", "graphopt_scorers": "scorers", "graphopt_share_scores": "share_scores",
    "graphopt_cache_scores": "cache_scores", "graphopt_tunables": "tunables",
    "graphopt_replacements": "replacements", "graphopt_pipelines": "pipelines",
    "graphopt_cost_models": "cost_models", "graphopt_costs": "costs", "graphopt_devices": "devices",
    "graphopt_policies": "policies", "graphopt_formats": "formats", "graphopt_commands": "commands",
}  # fmt: skip
"""By hook, the registry of the host that is made of what it returns."""


def plugin(name: str, **members: Callable[..., Any]) -> Any:
    hooks = {hook: hookimpl(staticmethod(member)) for hook, member in members.items()}
    return type(name, (), {"graphopt_api": 1, **hooks})()


def raises(*given: Any) -> Any:
    raise ValueError("no idea")


def exits(*given: Any) -> Any:
    raise SystemExit(2)


def sleeps() -> list[Any]:
    time.sleep(0.1)
    return []


def breaks_off(*given: Any) -> Any:
    yield from ()
    raise KeyError("later")


def uses(hook: str) -> Callable[[PluginHost], Any]:
    """What makes a host call a hook, and gives what came of it."""
    if hook in REGISTRIES:
        return lambda host: getattr(host, REGISTRIES[hook])()
    if hook == "graphopt_capture":
        return probe_captures
    tell = {"graphopt_before_pass": "notify_before", "graphopt_after_pass": "notify_after"}[hook]
    more = ("record",) if hook == "graphopt_after_pass" else ()
    program = semantic(lambda x: x.sin().cos(), torch.ones(2))
    return lambda host: getattr(host, tell)("ctx", "step", program, *more)


def misbehaving(hook: str, case: str) -> tuple[Callable[..., Any], str]:
    """A function for the hook, and what the host says of it (a pattern); "" where nothing is wrong."""
    act, said = CASES[case]
    if hook in OBSERVERS and case not in ("raises", "exits"):
        return act, ""  # what an observer returns is nobody's
    if hook == "graphopt_capture" and case not in ("raises", "exits"):
        return act, "" if case == "nothing" else "HOOK: expected a Capture or None, got .*"
    return act, said


CASES = {
    "raises": (raises, r"HOOK raised ValueError: no idea"),
    "exits": (exits, r"HOOK raised SystemExit: 2"),
    "breaks off": (breaks_off, r"HOOK raised KeyError: 'later'|HOOK: expected a mapping .*"),
    "nothing": (lambda: None, r"HOOK: expected (an iterable of|a mapping of) .*, got None"),
    "a number": (lambda: 7, r"HOOK: expected (an iterable of|a mapping of) .*, got 7"),
    "a text": (lambda: "text", r"HOOK: expected (an iterable of|a mapping of) .*, got 'text'"),
    "numbers": (lambda: [7], r"HOOK: expected .*, got \[?7\]?"),
}


def host_of(*plugins: Any, **options: Any) -> PluginHost:
    return PluginHost(plugins, entry_points=(), disabled=(), **{"strict": False, **options})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_misbehaves_is_named_and_counts_not_at_all(hook: str, case: str) -> None:
    act, error = misbehaving(hook, case)
    use = uses(hook)
    host = host_of(plugin("Bad", **{hook: act}), plugin("Good", graphopt_formats=list))
    found = use(host)
    bad, good = host.records()
    assert not found and (bad.name, good.status) == ("Bad", "active")
    assert bad.status == ("failed" if error else "active")
    assert re.fullmatch(error.replace("HOOK", hook), bad.error), bad.error
    strict = host_of(plugin("Bad", **{hook: act}), strict=True)
    if error:
        with pytest.raises(PluginError, match=f"plugin 'Bad' of inline failed: {hook}"):
            use(strict)
    else:
        use(strict)


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_hangs_is_named_while_it_does(hook: str, caplog: pytest.LogCaptureFixture) -> None:
    host = host_of(plugin("Sloth", **{hook: sleeps}), patience=0.03)
    use = uses(hook)
    with caplog.at_level(logging.WARNING, logger="graphopt"):
        use(host)
    told = [record.getMessage() for record in caplog.records if record.name == "graphopt"]
    assert told == [f"plugin 'Sloth' of inline: {hook} has not returned for 0.03 s"]
    (record,) = host.records()
    assert [text.rpartition(" took ")[0] for text in record.slow] == [hook]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("off", ["Bad", "all"])
def test_a_hook_of_a_disabled_plugin_is_not_asked(hook: str, off: str) -> None:
    host = PluginHost([plugin("Bad", **{hook: raises})], entry_points=(), disabled=(off,), strict=True)
    uses(hook)(host)
    assert [(record.status, record.error) for record in host.records()] == [("disabled", "")]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("version", [None, 0, 2, "1"])
def test_a_hook_of_another_version_is_not_asked(hook: str, version: Any) -> None:
    bad = plugin("Bad", **{hook: raises})
    bad.graphopt_api = version
    said = "graphopt_api is missing" if version is None else f"graphopt_api is {version}, this graphopt has 1"
    with pytest.raises(PluginError, match=re.escape(said)):
        host_of(bad).records()


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_takes_what_there_is_not_is_named(hook: str) -> None:
    def strange(nonsense: Any) -> Any:
        return []

    with pytest.raises(PluginError, match=f"hook '{hook}'.*nonsense|nonsense.*{hook}"):
        host_of(plugin("Bad", **{hook: strange})).records()


@pytest.mark.parametrize("hook", OBSERVERS)
def test_an_observer_that_changes_the_program_is_named_and_the_program_put_back(hook: str) -> None:
    told: list[str] = []

    def change(program: Any) -> None:
        told.append("changing")
        sine = next(node for node in program.graph.nodes if node.name == "sin")
        sine.replace_all_uses_with(sine.args[0])
        program.graph.erase_node(sine)

    def changing(graph_module: Any) -> list[str]:
        return [node.name for node in graph_module.graph.nodes]

    program = semantic(lambda x: x.sin().cos(), torch.ones(2))
    before = changing(program)
    host = host_of(plugin("Bad", **{hook: change}), plugin("Good", **{hook: lambda: told.append("good")}))
    for _ in range(2):
        arguments: Any = ("ctx", "step", program, "record")[: 3 + (hook == "graphopt_after_pass")]
        (host.notify_before if hook == "graphopt_before_pass" else host.notify_after)(*arguments)
    assert changing(program) == before
    assert told == ["changing", "good", "good"]
    said = f"{hook}: it changed the program, which was put back: observers only look"
    assert [record.error for record in host.records()] == [said, ""]


def test_every_hook_registers_observes_or_captures() -> None:
    assert {*REGISTRIES, *OBSERVERS, "graphopt_capture"} == set(HOOKS)


def test_every_hook_is_typed_described_and_on_the_page() -> None:
    page = PAGE.read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(graphopt_\w+)\((.*?)\)` \|", page, re.M)
    for hook in HOOKS:
        signature = inspect.signature(getattr(HookSpecs, hook))
        taken = [parameter for name, parameter in signature.parameters.items() if name != "self"]
        assert all(parameter.annotation is not parameter.empty for parameter in taken), hook
        assert signature.return_annotation is not inspect.Signature.empty, hook
        assert inspect.getdoc(getattr(HookSpecs, hook)), hook
        assert (hook, ", ".join(parameter.name for parameter in taken)) in listed, hook
    assert len(listed) == len(HOOKS)
