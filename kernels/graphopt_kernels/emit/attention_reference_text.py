"""What attention that is written out computes by operators of ATen: ``reference()`` of its file.

The call itself where ATen has it on a CPU, else ``graphopt_kernels.attention_reference``, of which the file
takes along what it needs.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping, Sequence

import torch.fx as fx

from graphopt_kernels import attention_reference
from graphopt_kernels.emit.aten_code import call_text, statements
from graphopt_kernels.emit.attention_sums import sums_read, sums_written
from graphopt_kernels.emit.attentions import Attention
from graphopt_kernels.emit.specialized import broken

__all__ = ["reference_lines"]

_ANYWHERE = ("composite", "cpu")
"""Forms that ATen computes on a CPU."""


def reference_lines(
    of: Attention,
    calls: Sequence[fx.Node],
    inputs: Mapping[fx.Node, str],
    outputs: Sequence[fx.Node],
    roles: Sequence[str],
    device: str,
) -> Iterator[str]:
    """The function for the ``calls`` of a group and what it needs. ``inputs``: names of those of the file;
    ``roles``: what each of ``outputs`` is; ``device``: the expression of it."""
    body: list[str] = []
    names = dict(inputs)
    if of.library in _ANYWHERE:
        body += statements(calls, names, outputs)
    else:
        yield from _functions(_entry(of))
        for node in calls:
            if node is not of.node and node.args[:1] != (of.node,):
                names[node] = node.name
                body.append(f"{names[node]} = {call_text(node, names)}")
        body += _by_reference(
            of, {role: names[node] for role, node in of.operands.items()}, outputs, roles, device
        )
    yield f"def reference({', '.join(inputs.values())}):"
    yield '    """The same by operators of ATen."""'
    if any("device=device" in line for line in body):
        yield f"    device = {device}"
    yield from (f"    {line}" for line in body)


def _entry(of: Attention) -> str:
    return "attention_backward_reference" if of.backward else "attention_reference"


def _by_reference(
    of: Attention, names: Mapping[str, str], outputs: Sequence[fx.Node], roles: Sequence[str], device: str
) -> Iterator[str]:
    sizes = tuple(of.value("query").shape[:3])
    given = [names.get(role, "None") for role in ("query", "key", "value", "bias")]
    settings = [repr(value) for value in of.settings]
    if of.backward:
        sums = sums_read(names["log_sum_exp"], of.value("log_sum_exp"), sizes)
        given = [names["grad"], *given, names["output"], sums]
        settings.append(repr(of.asked_for(roles)))
    yield from broken(f"made = {_entry(of)}({', '.join(given)}, {', '.join(settings)})", 0)
    results = []
    for node, role in zip(outputs, roles, strict=True):
        layout = node.meta["val"]
        if not role:
            results.append(f"torch.zeros({tuple(layout.shape)}, dtype={layout.dtype}, device={device})")
            continue
        number = of.results.index(role)
        if role == "log_sum_exp":
            yield f"log_sum_exp = made[{number}]"
            before, last = sums_written("sums", "log_sum_exp", layout, sizes)
            yield from before
            results.append(last)
            continue
        at = f"{tuple(layout.shape)}, {tuple(layout.stride())}, dtype={layout.dtype}, device={device}"
        yield f"{role} = torch.empty_strided({at})"
        results.append(f"{role}.copy_(made[{number}])")
    yield from broken(f"return ({', '.join(results)},)", 0)


def _functions(name: str) -> Iterator[str]:
    """A function of ``graphopt_kernels.attention_reference``, what it calls and the constants it reads."""
    source = inspect.getsource(attention_reference)
    lines = source.splitlines()
    known: dict[str, ast.stmt] = {}
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.FunctionDef):
            known[statement.name] = statement
        elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            known[statement.targets[0].id] = statement
    wanted: set[str] = set()
    stack = [name]
    while stack:
        each = stack.pop()
        if each in known and each not in wanted:
            wanted.add(each)
            stack += [n.id for n in ast.walk(known[each]) if isinstance(n, ast.Name)]
    for each, statement in known.items():
        if each in wanted:
            yield from lines[statement.lineno - 1 : statement.end_lineno]
            yield from ("", "")
