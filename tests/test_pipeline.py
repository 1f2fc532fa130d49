"""Pipelines: three spellings, one meaning; order checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt import Level, Pass, PassError, Pipeline, PipelineError, UnknownNameError
from graphopt.options import OptionError, format_value, typed_value
from graphopt.plugins import PluginHost, hookimpl

SCHEMA = "schema: graphopt/pipeline@1"


@dataclass(frozen=True)
class Pack(Pass):
    """Packs."""

    name: ClassVar[str] = "pack"
    level: ClassVar[Level] = Level.JOINT
    bits: int = 8
    rate: float = 0.5
    scheme: str = "int"
    sizes: tuple[int, ...] = ()
    scale: float | None = None
    side: Literal["left", "right"] = "left"
    fast: bool = False


@dataclass(frozen=True)
class Fold(Pass):
    """Folds."""

    name: ClassVar[str] = "fold"
    level: ClassVar[Level] = Level.JOINT
    before: ClassVar[dict[str, str]] = {"pack": "packing hides views"}


@dataclass(frozen=True)
class Clash(Pass):
    """Wants to be between pack and fold, which cannot be."""

    name: ClassVar[str] = "clash"
    level: ClassVar[Level] = Level.JOINT
    after: ClassVar[dict[str, str]] = {"pack": "it reads packed values"}
    before: ClassVar[dict[str, str]] = {"fold": "folding drops them"}


@dataclass(frozen=True)
class Fuse(Pass):
    """At the semantic level."""

    name: ClassVar[str] = "fuse"
    level: ClassVar[Level] = Level.SEMANTIC
    mandatory: ClassVar[bool] = True


@dataclass(frozen=True)
class Late(Pass):
    """Asks for what levels forbid."""

    name: ClassVar[str] = "late"
    level: ClassVar[Level] = Level.LOWERED
    before: ClassVar[dict[str, str]] = {"fuse": ""}


@dataclass(frozen=True)
class Needy(Pass):
    """Has a required option."""

    size: int
    name: ClassVar[str] = "needy"
    level: ClassVar[Level] = Level.JOINT


class Plugin:
    graphopt_api = 1

    def __init__(self, presets: dict[str, Path]) -> None:
        self.presets = presets

    @hookimpl
    def graphopt_passes(self) -> list[Any]:
        return [Pack, Fold, Clash, Fuse, Late, Needy]

    @hookimpl
    def graphopt_pipelines(self) -> dict[str, Path]:
        return self.presets


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> PluginHost:
    preset = tmp_path_factory.mktemp("presets") / "default.yaml"
    preset.write_text("schema: graphopt/pipeline@1\npasses: [fuse, {use: pack, with: {bits: 4}}]\n")
    return PluginHost([Plugin({"default": preset})], entry_points=())


def test_three_spellings_are_one_pipeline(host: PluginHost, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "schema: graphopt/pipeline@1\npasses:\n  - fold\n"
        "  - {use: pack, with: {bits: 4, rate: 1e-6, sizes: [1, 2]}}\n"
    )
    python = Pipeline((Fold(), Pack(bits=4, rate=1e-6, sizes=(1, 2))))
    assert Pipeline.parse("fold, pack{bits=4, rate=1e-6, sizes=[1,2]}", host) == python
    assert Pipeline.of(file, host) == Pipeline.of(str(file), host) == python
    assert Pipeline.of([Fold, "pack{bits=4,rate=1e-6,sizes=[1,2]}"], host) == python
    assert str(python) == "fold,pack{bits=4,rate=1e-06,sizes=[1,2]}"


def test_what_optimize_accepts(host: PluginHost) -> None:
    assert Pipeline.of(None, host).passes == (Fuse(), Pack(bits=4))
    assert Pipeline.of("default", host).name == "default"
    assert Pipeline.of(Pack(), host).passes == (Pack(),)
    assert Pipeline.of((), host) == Pipeline.of("", host) == Pipeline()
    assert Pipeline.of(["default", Fold()], host).passes == (Fuse(), Pack(bits=4), Fold())
    assert str(Pipeline.of("fold,default", host)) == "fold,fuse,pack{bits=4}"
    ready = Pipeline((Fold(),))
    assert Pipeline.of(ready, host) is ready
    with pytest.raises(PipelineError, match="expected a pass, a pass class or the name of one, got 3"):
        Pipeline.of(3, host)


words = st.text(max_size=8)
floats = st.floats(allow_nan=False)


@given(
    bits=st.integers(),
    rate=floats,
    scheme=words,
    sizes=st.lists(st.integers(), max_size=3).map(tuple),
    scale=st.none() | floats,
    side=st.sampled_from(["left", "right"]),
    fast=st.booleans(),
)
def test_text_round_trips(host: PluginHost, **options: Any) -> None:
    pipeline = Pipeline((Pack(**options), Fold()))
    assert Pipeline.parse(str(pipeline), host) == pipeline


def test_steps_follow_levels_then_constraints_then_the_listing(host: PluginHost) -> None:
    listed = Pipeline((Pack(), Fuse(), Pack(bits=2), Fold()))
    assert listed.steps == (Fuse(), Fold(), Pack(), Pack(bits=2))
    assert listed.passes[0] == Pack()


def test_a_cycle_is_an_error_with_its_reasons() -> None:
    with pytest.raises(PipelineError) as caught:
        Pipeline((Pack(), Fold(), Clash()))
    assert caught.value.message.startswith("no order satisfies these passes: ")
    assert caught.value.message.count("->") == 3
    for reason in (
        "fold runs before pack (packing hides views)",
        "clash runs after pack (it reads packed values)",
        "clash runs before fold (folding drops them)",
    ):
        assert reason in caught.value.hint
    # Constraints bind only passes that are present.
    assert Pipeline((Clash(), Fold())).steps == (Clash(), Fold())


def test_an_order_against_the_levels_is_an_error() -> None:
    with pytest.raises(PipelineError, match=r"late -> fuse -> late|fuse -> late -> fuse") as caught:
        Pipeline((Late(), Fuse()))
    assert "fuse is at level semantic, late at level lowered" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("pak", UnknownNameError, "unknown pass 'pak'; did you mean 'pack'?"),
        ("defualt", UnknownNameError, "unknown pass or pipeline 'defualt'; did you mean 'default'?"),
        ("default{bits=2}", PipelineError, "'default' is a pipeline and has no options"),
        ("pack{bit=2}", UnknownNameError, "unknown option of pass pack 'bit'; did you mean 'bits'?"),
        ("pack{bits=many}", PassError, "option 'bits' of pass 'pack' must be int, got 'many'"),
        ("pack{bits=true}", PassError, "option 'bits' of pass 'pack' must be int, got True"),
        ("pack{fast=1}", PassError, "option 'fast' of pass 'pack' must be bool, got 1"),
        ("pack{side=up}", PassError, "option 'side' of pass 'pack' must be one of 'left', 'right', got 'up'"),
        ("pack{sizes=[1,x]}", PassError, "option 'sizes' of pass 'pack' must be int, got 'x'"),
        ("needy", PassError, "pass 'needy' needs option 'size'"),
        ("pack{bits=1", PipelineError, "at character 12: expected ',' or '}'"),
        ("pack{bits}", PipelineError, "at character 10: expected '=' after option 'bits'"),
        ("pack{bits=}", PipelineError, "at character 11: expected a value for option 'bits'"),
        ("pack{bits=1,bits=2}", PipelineError, "option 'bits' of pass 'pack' is given twice"),
        ("pack fold", PipelineError, "at character 6: expected ',' or the end"),
        ("pack,", PipelineError, "at character 6: expected the name of a pass"),
        ('pack{scheme="x}', PipelineError, "a quoted string does not end"),
        ('pack{scheme="\\x"}', PipelineError, "is no string"),
    ],
)
def test_text_that_is_wrong(host: PluginHost, text: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        Pipeline.parse(text, host)
    assert message in str(caught.value)


def test_a_file_extends_another_and_drops_from_it(host: PluginHost, tmp_path: Path) -> None:
    base, mine = tmp_path / "base.yaml", tmp_path / "mine.yml"
    base.write_text("schema: graphopt/pipeline@1\nextends: default\npasses: [fold]\n")
    mine.write_text(
        f"{SCHEMA}\nextends: base.yaml\ndrop: [pack]\npasses: [{{use: pack, with: {{fast: true}}}}]\n"
    )
    pipeline = Pipeline.of(mine, host)
    assert pipeline.passes == (Fuse(), Fold(), Pack(fast=True))
    assert pipeline.name == "mine"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("passes: []", "expected `schema: graphopt/pipeline@1`, got None"),
        ("schema: graphopt/pipeline@2", "expected `schema: graphopt/pipeline@1`, got 'graphopt/pipeline@2'"),
        ("[1", "is no YAML"),
        ("- fold", "expected a mapping with the keys schema, extends, drop, passes"),
        (f"{SCHEMA}\npases: []", "unknown key 'pases'; did you mean 'passes'?"),
        (f"{SCHEMA}\npasses: fold", "passes is a list, got 'fold'"),
        (f"{SCHEMA}\npasses: [{{use: fold, whit: {{}}}}]", "passes[0]: unknown key 'whit'"),
        (f"{SCHEMA}\npasses: [fold, 3]", "passes[1]: expected a pass's name"),
        (f"{SCHEMA}\npasses: [fol]", "passes[0]: unknown pass 'fol'; did you mean 'fold'?"),
        (
            f"{SCHEMA}\npasses: [{{use: pack, with: {{bits: x}}}}]",
            "passes[0]: option 'bits' of pass 'pack' must be int, got 'x'",
        ),
        (f"{SCHEMA}\npasses: [{{use: pack, with: [1]}}]", "`with` maps options to values"),
        (
            f"{SCHEMA}\nextends: defalt",
            "unknown pipeline 'defalt'; did you mean 'default'?",
        ),
        (f"{SCHEMA}\nextends: [a]", "extends is a preset's name or a file, got ['a']"),
        (f"{SCHEMA}\nextends: gone.yaml", "cannot read pipeline"),
        (f"{SCHEMA}\nextends: bad.yaml", "pipelines extend each other in a circle"),
        (
            f"{SCHEMA}\nextends: default\ndrop: [pck]",
            "cannot drop 'pck', which is not inherited; did you mean 'pack'?",
        ),
        (
            f"{SCHEMA}\nextends: default\ndrop: [fuse]",
            "cannot drop 'fuse', which is mandatory",
        ),
    ],
)
def test_files_that_are_wrong(host: PluginHost, tmp_path: Path, body: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(body)
    with pytest.raises((PipelineError, UnknownNameError)) as caught:
        Pipeline.of(file, host)
    assert message in str(caught.value)


def test_an_option_without_a_spelling_is_refused() -> None:
    with pytest.raises(PipelineError, match=r"pass 'pack': options are None, bool, int"):
        Pipeline((Pack(sizes=[1, 2]),))  # type: ignore[arg-type]


def test_typed_values() -> None:
    assert typed_value([1, "2"], tuple[int, str]) == (1, "2")
    assert typed_value([1], tuple) == (1,)
    assert isinstance(typed_value(1, int | float), int)
    assert typed_value("1e-6", float) == 1e-6
    assert typed_value("anything", Any) == "anything"
    with pytest.raises(OptionError, match="must have 2 elements, got 1"):
        typed_value([1], tuple[int, str])
    with pytest.raises(OptionError, match=r"must be float \| None, got 'x'"):
        typed_value("x", float | None)


def test_words_that_look_like_something_else_are_quoted() -> None:
    for text in ("", "1", "1e5", "true", "null", "nan", "a b", "a,b", "a=b", 'q"', "[x]"):
        assert format_value(text).startswith('"')
    assert format_value("int8-weight") == "int8-weight"


def test_the_shipped_default_runs_insert_checkpoints() -> None:
    host = PluginHost(disabled=())
    names = [instance.name for instance in Pipeline.of(None, host).steps]
    assert names[0] == "normalize" and names[-2:] == ["insert-checkpoints", "offload"]
