"""Every hook there is: typed, described, on the page, and isolated from those of other plugins."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graphopt import PluginError
from graphopt.plugins import PluginHost, hookimpl
from graphopt.plugins.hookspecs import HookSpecs

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


def breaks_off(*given: Any) -> Any:
    yield from ()
    raise KeyError("later")


CASES = {
    "raises": (raises, r"HOOK raised ValueError: no idea"),
    "exits": (exits, r"HOOK raised SystemExit: 2"),
    "breaks off": (breaks_off, r"HOOK raised KeyError: 'later'|HOOK: expected a mapping .*"),
    "nothing": (lambda: None, r"HOOK: expected (an iterable of|a mapping of) .*, got None"),
    "a number": (lambda: 7, r"HOOK: expected (an iterable of|a mapping of) .*, got 7"),
    "numbers": (lambda: [7], r"HOOK: expected .*, got \[?7\]?"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("hook", REGISTRIES)
def test_a_hook_that_misbehaves_is_named_and_counts_not_at_all(hook: str, case: str) -> None:
    act, error = CASES[case]
    observed = plugin("Good", graphopt_before_pass=lambda: None)
    host = PluginHost([plugin("Bad", **{hook: act}), observed], entry_points=(), disabled=(), strict=False)
    assert not getattr(host, REGISTRIES[hook])()
    bad, good = host.records()
    assert (bad.name, bad.status, good.status) == ("Bad", "failed", "active")
    assert re.fullmatch(error.replace("HOOK", hook), bad.error), bad.error
    strict = PluginHost([plugin("Bad", **{hook: act})], entry_points=(), disabled=(), strict=True)
    with pytest.raises(PluginError, match=f"plugin 'Bad' of inline failed: {hook}"):
        getattr(strict, REGISTRIES[hook])()


def test_every_hook_registers_or_observes() -> None:
    assert {*REGISTRIES, *OBSERVERS} == set(HOOKS)


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
