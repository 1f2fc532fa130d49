"""What is wrong with a pipeline file, all of it, and the JSON Schema that editors check it with."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml

from graphopt.cli.main import main
from graphopt.errors import GraphoptError
from graphopt.passes import Pass
from graphopt.pipeline import Pipeline
from graphopt.pipeline_schema import option_schema, pipeline_schema
from graphopt.plugins import PluginHost, default_host, hookimpl
from graphopt.program import Level

Invoke = Callable[..., tuple[int, str, str]]
DEFAULT = Path(str(files("graphopt_passes") / "presets" / "default.yaml"))


@pytest.fixture
def invoke(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Invoke]:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    yield run


HEAD = "schema: graphopt/pipeline@1\n"

WRONG = {
    "extends: defalt\n": "2:10: unknown pipeline 'defalt'; did you mean 'default'? [extends]",
    "extends: gone.yaml\n": "2:10: cannot read pipeline gone.yaml",
    "passses: []\n": "2:1: unknown key 'passses'; did you mean 'passes'? [key]",
    "passes: []\npasses: []\n": "3:1: key 'passes' is given twice [key]",
    "passes: fuse-norm\n": "2:9: passes is a list, got 'fuse-norm' [key]",
    "passes: [fuse-nrom]\n": "2:10: unknown pass 'fuse-nrom'; did you mean 'fuse-norm'? [pass]",
    "passes: [3]\n": "2:10: expected a pass's name or {use: name, with: {...}}, got 3 [pass]",
    "passes: [{with: {effort: 2}}]\n": "2:10: expected a pass's name or {use: name, with: {...}} [key]",
    "passes: [{use: normalize, wth: {}}]\n": "2:27: unknown key 'wth'; did you mean 'with'? [key]",
    "passes: [{use: normalize, with: 3}]\n": "2:33: `with` maps options to values, got 3 [option]",
    "passes: [{use: insert-checkpoints, with: {efort: 2}}]\n": (
        "2:43: unknown option of pass insert-checkpoints 'efort'; did you mean 'effort'? [option]"
    ),
    "passes: [{use: insert-checkpoints, with: {effort: many}}]\n": (
        "2:51: option 'effort' of pass 'insert-checkpoints' must be int, got 'many' [option]"
    ),
    "extends: default\ndrop: [normalise]\n": (
        "3:8: cannot drop 'normalise', which is not inherited; did you mean 'normalize'? [drop]"
    ),
    "passes: [insert-checkpoints, normalize]\n": (
        "2:30: normalize is listed after insert-checkpoints, but runs before it: normalize is at level "
        "semantic, insert-checkpoints at level joint [order]"
    ),
}


@pytest.mark.parametrize(("text", "problem"), WRONG.items(), ids=range(len(WRONG)))
def test_each_problem_has_its_place_and_the_nearest_choice(
    invoke: Invoke, tmp_path: Path, text: str, problem: str
) -> None:
    (tmp_path / "p.yaml").write_text(HEAD + text)
    code, out, err = invoke("lint", "p.yaml")
    assert code == 1
    assert err == "1 problems in 1 files\n"
    assert out.startswith(f"p.yaml:{problem}")


def test_all_problems_are_told_at_once(invoke: Invoke, tmp_path: Path) -> None:
    text = "passes:\n  - fuse-nrom\n  - {use: insert-checkpoints, with: {effort: x, efort: 1}}\ndrop: [a]\n"
    (tmp_path / "p.yaml").write_text(text)
    code, out, _ = invoke("lint", "p.yaml", str(DEFAULT), "--json")
    assert code == 1
    found = [(p["file"], p["line"], p["code"]) for p in json.loads(out)]
    assert found == [
        ("p.yaml", 1, "schema"), ("p.yaml", 2, "pass"), ("p.yaml", 3, "option"), ("p.yaml", 3, "option"),
        ("p.yaml", 4, "drop"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("passes: [a\n", "2:1: expected ',' or ']', but got '<stream end>' [yaml]"),
        ("- a\n", "1:1: expected a mapping with the keys schema, extends, drop, passes [schema]"),
        ("", "1:1: expected a mapping with the keys schema, extends, drop, passes [schema]"),
    ],
)
def test_what_is_no_pipeline_at_all(invoke: Invoke, tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    code, out, _ = invoke("lint", "p.yaml")
    assert (code, out) == (1, f"p.yaml:{problem}\n")


def test_what_ships_and_what_extends_it_is_right(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        HEAD + "extends: default\ndrop: [offload]\npasses: [{use: insert-checkpoints, with: {effort: 2}}]\n"
    )
    assert invoke("lint", "mine.yaml", str(DEFAULT)) == (0, "", "nothing is wrong\n")
    assert invoke("lint", "gone.yaml")[0] == 2


@dataclass(frozen=True)
class First(Pass):
    name: ClassVar[str] = "first"
    level: ClassVar[Level] = Level.SEMANTIC
    before: ClassVar[dict[str, str]] = {"second": "it hides what this one looks for"}
    mode: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Second(Pass):
    name: ClassVar[str] = "second"
    level: ClassVar[Level] = Level.SEMANTIC
    size: int
    mandatory: ClassVar[bool] = True


@dataclass(frozen=True)
class Third(Pass):
    name: ClassVar[str] = "third"
    level: ClassVar[Level] = Level.SEMANTIC
    after: ClassVar[dict[str, str]] = {"second": ""}
    before: ClassVar[dict[str, str]] = {"first": "so it says"}


class Acme:
    graphopt_api = 1

    @hookimpl
    def graphopt_passes(self) -> list[type[Pass]]:
        return [First, Second, Third]


def test_orders_are_told_with_their_reasons(tmp_path: Path) -> None:
    from graphopt.pipeline_lint import lint_pipeline

    host = PluginHost((Acme(),))
    path = tmp_path / "p.yaml"

    def told(text: str) -> list[str]:
        path.write_text(HEAD + text)
        return [problem.message for problem in lint_pipeline(path, host)]

    assert told("passes: [{use: second, with: {size: 1}}, first]\n") == [
        "first is listed after second, but runs before it: first runs before second (it hides what this one "
        "looks for)"
    ]
    assert told("passes: [first, second]\n") == ["pass 'second' needs option 'size'"]
    (circle,) = told("passes: [third, first, {use: second, with: {size: 1}}]\n")
    assert circle.startswith("no order satisfies these passes: ")
    assert "third runs before first (so it says)" in circle
    (tmp_path / "base.yaml").write_text(HEAD + "passes: [{use: second, with: {size: 1}}]\n")
    assert told("extends: base.yaml\ndrop: [second]\n") == ["cannot drop 'second', which is mandatory"]


def accepts(schema: dict[str, Any], value: Any) -> bool:
    """Whether a value is valid, for the keywords that are used here; any other is an error."""
    known = {
        "$schema", "title", "description", "default", "type", "required", "additionalProperties",
        "properties", "const", "enum", "anyOf", "pattern", "items", "prefixItems",
    }  # fmt: skip
    assert schema.keys() <= known
    types = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    if kind := schema.get("type"):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        fits = {"number": number, "integer": number and isinstance(value, int)}
        if not (fits[kind] if kind in fits else isinstance(value, types[kind])):
            return False
    if "const" in schema and value != schema["const"]:
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "anyOf" in schema and not any(accepts(choice, value) for choice in schema["anyOf"]):
        return False
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        return False
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        if not schema.get("additionalProperties", True) and not value.keys() <= properties.keys():
            return False
        needed = set(schema.get("required", ())) <= value.keys()
        return needed and all(
            accepts(properties[key], item) for key, item in value.items() if key in properties
        )
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        rest, more = schema.get("items", {}), value[len(first) :]
        if not all(accepts(kind, item) for kind, item in zip(first, value, strict=False)):
            return False
        return not more if rest is False else all(accepts(rest, item) for item in more)
    return True


def test_the_schema_accepts_what_loads_and_refuses_what_does_not(tmp_path: Path) -> None:
    schema = json.loads(json.dumps(pipeline_schema(default_host())))
    left_to_lint = ("given twice", "gone.yaml", "is listed after")
    for text, problem in WRONG.items():
        if not any(word in problem for word in left_to_lint):
            assert not accepts(schema, yaml.safe_load(HEAD + text)), text
    assert accepts(schema, yaml.safe_load(DEFAULT.read_text()))
    acme = pipeline_schema(PluginHost((Acme(),)))
    for step, right in [
        ("first", True), ("{use: first}", True), ("{use: first, with: {mode: b}}", True),
        ("{use: first, with: {mode: c}}", False), ("second", False), ("{use: second}", False),
        ("{use: second, with: {size: 1}}", True), ("{use: second, with: {size: true}}", False),
    ]:  # fmt: skip
        document = yaml.safe_load(HEAD + f"passes: [{step}]\n")
        assert accepts(acme, document) is right, step
        path = tmp_path / "p.yaml"
        path.write_text(yaml.safe_dump(document))
        try:
            Pipeline.of(path, PluginHost((Acme(),)))
            loads = True
        except GraphoptError:
            loads = False
        assert loads is right, step


@pytest.mark.parametrize(
    ("annotation", "right", "wrong"),
    [
        (float, [1, 1.5, "1e-6"], ["x", None]),
        (int | None, [1, None], [1.5, "1"]),
        (tuple[int, ...], [[], [1, 2]], [["a"], 1]),
        (tuple[int, str], [[1, "a"]], [[1, "a", 2], ["a", 1]]),
        (tuple, [[1, "a"]], [1]),
        (bool, [True], [1]),
        (Any, [1, "a", None], []),
    ],
)
def test_options_of_every_kind(annotation: Any, right: list[Any], wrong: list[Any]) -> None:
    schema = option_schema(annotation)
    assert all(accepts(schema, value) for value in right)
    assert not any(accepts(schema, value) for value in wrong)


def test_the_schema_is_written(invoke: Invoke, tmp_path: Path) -> None:
    code, out, _ = invoke("schema")
    assert code == 0
    assert invoke("schema", "-o", "s.json") == (0, "", "wrote s.json\n")
    assert json.loads(out) == json.loads((tmp_path / "s.json").read_text())
    assert json.loads(out)["title"] == "graphopt/pipeline@1"
