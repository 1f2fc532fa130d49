"""Which segments of a chain may run forward again in the backward, and what that takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.fx as fx

from graphopt.capture.aliasing import written_inputs as arguments_written
from graphopt.collectives import is_collective
from graphopt.program import InputSpec, Program
from graphopt.replay import is_random, statistics_of

if TYPE_CHECKING:
    from graphopt.session import Captured

__all__ = ["draws_random", "pinned", "written_inputs", "written_names"]


def pinned(kind: Captured) -> str:
    """Why a segment must not run again, ``""`` where it may."""
    program = kind.joint
    if program is None or kind.mode != "train":
        return "it has no backward"
    if kind.frontier is None or kind.frontier.pass_id == "none":
        return "no pass of the pipeline recomputes"
    if len(_given(program)) != len(kind.specs):
        return "its inputs are not those of its joint program, one for one"
    for node in program.graph.nodes:
        if is_collective(node.target):
            return f"{node.name} waits for other ranks"
    for name in written_names(program):
        reader = _result_that_depends_on(program, name)
        if reader:
            return f"{reader} depends on {name}, which is written in place"
    return ""


def written_inputs(kind: Captured) -> tuple[int, ...]:
    """Positions of the inputs that a segment writes in place. Means nothing for one that is pinned."""
    program = kind.joint
    if program is None:
        return ()
    written = written_names(program)
    return tuple(k for k, spec in enumerate(_given(program)) if spec.node in written)


def draws_random(kind: Captured) -> bool:
    """Whether a segment draws random numbers."""
    return kind.joint is not None and any(
        node.op == "call_function" and is_random(node) for node in kind.joint.graph.nodes
    )


def _given(program: Program) -> list[InputSpec]:
    return [spec for spec in program.signature.inputs if spec.role != "tangent"]


def written_names(program: Program) -> set[str]:
    """Inputs that are written, by name: by the caller from an output, or by an operator of the graph."""
    by_name = {spec.fqn: spec.node for spec in program.signature.inputs if spec.fqn}
    found = {
        by_name.get(spec.target, spec.target) for spec in program.signature.outputs if spec.role == "mutation"
    }
    for node in program.graph.nodes:
        found |= {source.name for source in arguments_written(node) if source.op == "placeholder"}
    return found


def _result_that_depends_on(program: Program, name: str) -> str:
    """The first output or gradient that is computed from an input, ``""`` if none is."""
    reached: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.name == name:
            reached.add(node)
        elif node.op == "call_function":
            sources = set(node.all_input_nodes) - set(statistics_of(node))
            if sources & reached:
                reached.add(node)
    names = {node.name for node in reached}
    results = (spec for spec in program.signature.outputs if spec.role in ("output", "gradient"))
    return next((spec.node for spec in results if spec.node in names), "")
