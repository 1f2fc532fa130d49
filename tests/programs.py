"""Semantic programs of small functions for tests, and a pass made of a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from graphopt.capture.semantic import semantic_program
from graphopt.passes import Pass, PassContext, Proposal
from graphopt.plugins import PluginHost, default_host
from graphopt.program import InputSpec, Level, Program
from tests.semantic import capture

__all__ = ["context", "host", "proposing", "semantic"]


def semantic(function: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> Program:
    """The semantic program of ``function``, which must be one graph."""
    (captured,) = capture(function, *args, dynamic=dynamic)
    places = [node for node in captured.gm.graph.nodes if node.op == "placeholder"]
    specs = [InputSpec(node.name, "input") for node in places]
    return semantic_program("g0", captured.gm, specs)


def host() -> PluginHost:
    return default_host()


def context(mode: str = "train", *, allow: Iterable[str] = ()) -> PassContext:
    cost = host().cost_model("roofline").build(host().device("cpu"))
    return PassContext(cost, mode, allow=frozenset(allow))


def proposing(propose: Callable[[Program, PassContext], Iterable[Proposal]], **settings: Any) -> Pass:
    """A pass called ``some-pass`` that proposes what ``propose`` does."""

    @dataclass(frozen=True)
    class SomePass(Pass):
        name: ClassVar[str] = "some-pass"
        level: ClassVar[Level] = Level.SEMANTIC

        def propose(self, program: Program, ctx: PassContext) -> Iterable[Proposal]:
            return propose(program, ctx)

    for key, value in settings.items():
        setattr(SomePass, key, value)
    return SomePass()
