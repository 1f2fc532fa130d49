"""The table of features names tests that there are; the public API is typed."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import graphopt

ROOT = Path(__file__).parent.parent
_ROW = re.compile(r"^\| (?P<feature>[^|]+) \|[^|]+\| `(?P<test>[^`|]+)` \|$", re.M)


def test_the_tests_that_the_table_names_exist() -> None:
    text = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
    rows = list(_ROW.finditer(text))
    # A header and a rule, and every row has the form that is read here.
    assert len(rows) == text.count("\n|") - 2 and len(rows) >= 30
    for row in rows:
        file, _, name = row["test"].partition("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        known = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in known, f"{row['feature']}: {file} has no test {name}"


def test_the_tests_of_misbehaviour_that_the_page_names_exist() -> None:
    text = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/\w+\.py)::(\w+)` \|$", text, re.M)
    assert len(named) >= 25 and len(named) == text.count("`tests/")
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (file, name)


def test_every_public_signature_is_annotated() -> None:
    bare = [label for label, function in _public_functions() if _lacks_annotations(function)]
    assert not bare


def _public_functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Public functions, and functions in the bodies of public classes."""
    for name in graphopt.__all__:
        thing = getattr(graphopt, name)
        if inspect.isfunction(thing):
            yield name, thing
        elif inspect.isclass(thing):
            for key, member in vars(thing).items():
                function = getattr(member, "__func__", member)
                # Not what a field has as its default.
                if inspect.isfunction(function) and not key.startswith("_") and function.__name__ == key:
                    yield f"{name}.{key}", function


def _lacks_annotations(function: Callable[..., Any]) -> bool:
    signature = inspect.signature(function)
    given = [p.annotation for p in signature.parameters.values() if p.name not in ("self", "cls")]
    return inspect.Signature.empty in (*given, signature.return_annotation)


def test_packages_say_that_they_are_typed() -> None:
    for package in ("graphopt", "graphopt_passes", "graphopt_kernels", "graphopt_cost_model"):
        assert files(importlib.import_module(package)).joinpath("py.typed").is_file()
