"""A program as a chain of calls of segments.

    prologue(ids, table)        -> x0, mask
    block(x0, mask, w1, w2)     -> x1        the same compiled function
    block(x1, mask, w3, w4)     -> x2        with other arguments
    epilogue(x2, head)          -> loss

Values are let go at their last use. ``graphopt.chain_run`` runs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from graphopt.candidate import Reason
from graphopt.errors import InputsError

__all__ = ["Call", "Segment", "Segmented", "results_of"]


@dataclass(frozen=True)
class Segment:
    """One part of a program, to be compiled once.

    ``gm`` takes its values by position and returns a tuple. ``trained[i]``: whether some call passes a
    value for input ``i`` that gradients flow to (an activation or a trained parameter). ``nodes`` names
    the nodes of the whole program that the first call stands for.
    """

    name: str
    gm: fx.GraphModule
    fingerprint: str
    trained: tuple[bool, ...]
    nodes: tuple[str, ...]

    def results(self) -> list[Any]:
        """The example values of what a call returns, in order."""
        output = next(node for node in reversed(self.gm.graph.nodes) if node.op == "output")
        return [x.meta.get("val") if isinstance(x, fx.Node) else x for x in output.args[0]]

    def example_inputs(self) -> list[Any]:
        """The example values of the placeholders, each requiring a gradient as ``trained`` says."""
        values = [node.meta.get("val") for node in self.gm.graph.nodes if node.op == "placeholder"]
        examples = []
        for value, trained in zip(values, self.trained, strict=True):
            if isinstance(value, torch.Tensor) and value.requires_grad != trained:
                value = value.detach().requires_grad_(trained)
            examples.append(value)
        return examples


@dataclass(frozen=True)
class Call:
    """Segment number ``segment`` on the values ``args``; ``outs`` names what it returns.

    ``drops`` are those of ``args`` that nothing reads after this call.
    """

    segment: int
    args: tuple[str, ...]
    outs: tuple[str, ...]
    drops: tuple[str, ...]


@dataclass(frozen=True)
class Segmented:
    """A program cut into segments. ``results`` is the program's return value with nodes' names, as
    ``Name``, where values go; ``constants`` are large attributes of the program, passed like inputs."""

    segments: tuple[Segment, ...]
    calls: tuple[Call, ...]
    inputs: tuple[str, ...]
    constants: dict[str, Any]
    results: Any
    declined: tuple[Reason, ...]

    def returned(self) -> set[str]:
        """Values that the program returns."""
        return _names(self.results)

    def begin(self, arguments: list[Any]) -> dict[str, Any]:
        """Values by name as the first call finds them; empties the list of the program's inputs.

        Raises ``InputsError`` where their number is not the program's.
        """
        if len(arguments) != len(self.inputs):
            expected = f"the program takes {len(self.inputs)} inputs, not {len(arguments)}"
            raise InputsError(expected, hint=f"inputs: {', '.join(self.inputs)}")
        values = dict(zip(self.inputs, arguments, strict=True))
        arguments.clear()
        values.update(self.constants)
        read = self.returned() | {arg for call in self.calls for arg in call.args}
        return {name: value for name, value in values.items() if name in read}

    def finish(self, values: dict[str, Any]) -> Any:
        """What the program returns, of the values that the last call leaves."""
        return _fill(self.results, values)


@dataclass(frozen=True)
class Name:
    """Where a value goes in the structure that a program returns."""

    name: str


def results_of(arguments: Any) -> Any:
    """The argument of a graph's output node with ``Name`` in place of nodes."""
    if isinstance(arguments, fx.Node):
        return Name(arguments.name)
    if isinstance(arguments, tuple):
        return tuple(results_of(item) for item in arguments)
    if isinstance(arguments, list):
        return [results_of(item) for item in arguments]
    if isinstance(arguments, dict):
        return {key: results_of(item) for key, item in arguments.items()}
    return arguments


def _names(results: Any) -> set[str]:
    if isinstance(results, Name):
        return {results.name}
    if isinstance(results, (tuple, list)):
        return {name for item in results for name in _names(item)}
    if isinstance(results, dict):
        return {name for item in results.values() for name in _names(item)}
    return set()


def _fill(results: Any, values: dict[str, Any]) -> Any:
    if isinstance(results, Name):
        return values[results.name]
    if isinstance(results, (tuple, list)):
        return type(results)([_fill(item, values) for item in results])
    if isinstance(results, dict):
        return {key: _fill(item, values) for key, item in results.items()}
    return results
