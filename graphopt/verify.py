"""What must hold of a program after an edit, whatever the pass: its structure.

``verify_numerically`` (from ``graphopt.verify_numbers``) compares what it computes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.capture.aliasing import alias_map
from graphopt.dump.canonical import dtype_text
from graphopt.errors import VerificationError
from graphopt.program import Program
from graphopt.verify_numbers import verify_numerically

__all__ = [
    "Interface",
    "graph_interface",
    "interface_of",
    "verify_numerically",
    "verify_structure",
    "verify_values",
]


@dataclass(frozen=True)
class Interface:
    """What a caller sees of a program: types of inputs and outputs, which outputs share memory, with
    what, and which inputs are written in place."""

    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[str, ...]
    shared: tuple[tuple[str, ...], ...]
    written: frozenset[str]


def interface_of(program: Program) -> Interface:
    """The interface of a program whose nodes carry ``meta["val"]``."""
    return graph_interface(program.graph)


def graph_interface(graph: fx.Graph) -> Interface:
    """The interface of a program by its graph."""
    places = [node for node in graph.nodes if node.op == "placeholder"]
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    flat = torch.utils._pytree.tree_leaves(output.args[0])
    holders: dict[int, list[str]] = {}
    for node in places:
        _hold(holders, node.meta.get("val"), f"input {node.name}")
    for index, leaf in enumerate(flat):
        if isinstance(leaf, fx.Node):
            _hold(holders, leaf.meta.get("val"), f"output {index}")
    shared = []
    for index, leaf in enumerate(flat):
        key = _storage(leaf.meta.get("val")) if isinstance(leaf, fx.Node) else None
        with_whom = holders.get(key, []) if key is not None else []
        shared.append(tuple(name for name in with_whom if name != f"output {index}"))
    written = {root.name for root in alias_map(graph).written if root.op == "placeholder"}
    return Interface(
        tuple((node.name, _type(node.meta.get("val"))) for node in places),
        tuple(_type(leaf.meta.get("val")) if isinstance(leaf, fx.Node) else repr(leaf) for leaf in flat),
        tuple(shared),
        frozenset(written),
    )


def verify_structure(program: Program, before: Interface) -> None:
    """Check a program against what it was before an edit.

    Rules: ``erased`` (no node reads one that is not in the graph), ``lint`` (fx's own checks),
    ``values`` (every call has ``meta["val"]``), ``inputs`` and ``outputs`` (as many, of the same shapes,
    dtypes and devices), ``signature`` (names the nodes that are returned), ``aliasing`` (the same
    outputs share memory), ``mutation`` (the same inputs are written). Raises ``VerificationError``
    naming node and rule.

    An output that is there to be copied to an input may become that input, written in place: the copy then
    finds its work done.
    """
    _verify_graph(program)
    verify_values(program)
    after = interface_of(program)
    if after.inputs != before.inputs:
        was, now = _first_difference(before.inputs, after.inputs)
        raise _broken(program, "inputs", f"input was {_pair(was)}, is {_pair(now)}")
    in_place = _written_in_place(program, after)
    _verify_outputs(program, before, after, in_place)
    for name in sorted(after.written - before.written - set(in_place.values())):
        raise _broken(program, "mutation", f"input {name!r} is written in place, which it was not before")
    for name in sorted(before.written - after.written):
        raise _broken(program, "mutation", f"input {name!r} is no longer written in place")


def verify_values(program: Program) -> None:
    """Raise ``VerificationError`` for a call without ``meta["val"]`` that gives a value."""
    for node in program.graph.nodes:
        if node.op.startswith("call_") and "val" not in node.meta and _torch.gives_value(node.target):
            raise _broken(program, "values", f"node {node.name!r} ({node.target}) has no meta['val']")


def _verify_graph(program: Program) -> None:
    nodes = set(program.graph.nodes)
    for node in program.graph.nodes:
        for source in node.all_input_nodes:
            if source not in nodes:
                what = f"node {node.name!r} reads {source.name!r}, which was erased"
                raise _broken(program, "erased", what)
    try:
        program.graph.lint()
    except Exception as error:
        raise _broken(program, "lint", " ".join(str(error).split())) from error


def _written_in_place(program: Program, after: Interface) -> dict[int, str]:
    """By position the outputs that are to be copied to an input, and are it, and the graph writes it."""
    names = {name: spec.node for spec in program.signature.inputs for name in (spec.fqn, spec.node) if name}
    found = {}
    for index, spec in enumerate(program.signature.outputs):
        target = names.get(spec.target)
        if spec.role == "mutation" and spec.node == target and target in after.written:
            found[index] = target
    return found


def _verify_outputs(
    program: Program, before: Interface, after: Interface, in_place: Mapping[int, str]
) -> None:
    if len(after.outputs) != len(before.outputs):
        what = f"there were {len(before.outputs)} outputs, now there are {len(after.outputs)}"
        raise _broken(program, "outputs", what)
    output = next(node for node in reversed(program.graph.nodes) if node.op == "output")
    flat = torch.utils._pytree.tree_leaves(output.args[0])
    for index, leaf in enumerate(flat):
        where = f"output {index} ({leaf.name!r})" if isinstance(leaf, fx.Node) else f"output {index}"
        was, now = before.outputs[index], after.outputs[index]
        if was != now:
            raise _broken(program, "outputs", f"{where} was {was}, is {now}")
        if before.shared[index] != after.shared[index] and (
            before.shared[index] or after.shared[index] != (f"input {in_place.get(index)}",)
        ):
            old, new = (", ".join(s.shared[index]) or "nothing" for s in (before, after))
            raise _broken(program, "aliasing", f"{where} shared memory with {old}, now with {new}")
    returned = [leaf.name for leaf in flat if isinstance(leaf, fx.Node)]
    named = [spec.node for spec in program.signature.outputs]
    if named and returned != named:
        was, now = _first_difference(named, returned)
        raise _broken(program, "signature", f"the signature names output {was!r}, the graph returns {now!r}")


def _hold(holders: dict[int, list[str]], value: Any, name: str) -> None:
    key = _storage(value)
    if key is not None:
        holders.setdefault(key, []).append(name)


def _storage(value: Any) -> int | None:
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return None
    return _torch.storage_key(value)


def _type(value: Any) -> str:
    # Text, because comparing symbolic sizes would add guards.
    if isinstance(value, torch.Tensor):
        return f"{dtype_text(value.dtype)}[{','.join(map(str, value.shape))}] on {value.device}"
    return "nothing" if value is None else f"{type(value).__name__} {value}"


def _first_difference(was: Any, now: Any) -> tuple[Any, Any]:
    pairs = itertools.zip_longest(was, now, fillvalue="nothing")
    return next((old, new) for old, new in pairs if old != new)


def _pair(item: Any) -> str:
    return item if isinstance(item, str) else f"{item[0]!r}: {item[1]}"


def _broken(program: Program, rule: str, what: str) -> VerificationError:
    return VerificationError(f"program {program.name} @ {program.level}: {what}: rule {rule!r}")
