"""A program as a chain of calls of segments, and the driver that runs it.

    prologue(ids, table)        -> x0, mask
    block(x0, mask, w1, w2)     -> x1        the same compiled function
    block(x1, mask, w3, w4)     -> x2        with other arguments
    epilogue(x2, head)          -> loss

Values are let go at their last use: before the call, where the callee takes over its argument list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    def bind(
        self, functions: Sequence[Callable[..., Any]] | None = None, *, boxed: bool = False
    ) -> Callable[[list[Any]], Any]:
        """A driver over one function per segment, by default the segments' own modules.

        The driver takes a list of the program's inputs and empties it. With ``boxed`` every function
        takes one list, free to empty it too; without, it takes positional arguments. Raises
        ``InputsError`` where the numbers of functions or inputs do not agree.
        """
        chosen = [segment.gm for segment in self.segments] if functions is None else list(functions)
        if len(chosen) != len(self.segments):
            raise InputsError(f"{len(self.segments)} segments need as many functions, not {len(chosen)}")
        unread = set(self.inputs) - _names(self.results) - {arg for call in self.calls for arg in call.args}

        def run(arguments: list[Any]) -> Any:
            if len(arguments) != len(self.inputs):
                expected = f"the program takes {len(self.inputs)} inputs, not {len(arguments)}"
                raise InputsError(expected, hint=f"inputs: {', '.join(self.inputs)}")
            values = dict(zip(self.inputs, arguments, strict=True))
            arguments.clear()
            for name in unread:
                del values[name]
            values.update(self.constants)
            for call in self.calls:
                passed = [values[name] for name in call.args]
                for name in call.drops:
                    del values[name]
                function = chosen[call.segment]
                if boxed:
                    returned = function(passed)
                else:
                    returned = function(*passed)
                    passed.clear()
                values.update(zip(call.outs, returned, strict=True))
                del returned
            return _fill(self.results, values)

        return run


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
