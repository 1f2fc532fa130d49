"""The programs of a step at every level, and all of one level in a dump format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from typing import TYPE_CHECKING

import torch
import torch.fx as fx

from graphopt.captured import Captured
from graphopt.cost import CostModel
from graphopt.dump.page import Sheet
from graphopt.errors import GraphoptError, PluginError, UnknownNameError
from graphopt.plugins.loading import GUARDED
from graphopt.program import InputSpec, Level, OutputSpec, Program, Signature

if TYPE_CHECKING:
    from graphopt.plugins.host import PluginHost
    from graphopt.plugins.records import DumpFormat

__all__ = ["dumped", "lowered_program", "programs_of"]

_LEVELS = {"semantic": Level.SEMANTIC, "joint": Level.JOINT, "final": Level.LOWERED}


def programs_of(group: Sequence[Captured]) -> tuple[Program, ...]:
    """The programs of each of ``group``: semantic, joint, then the lowered halves."""
    found: list[Program] = []
    for captured in group:
        found.append(captured.semantic)
        if captured.joint is not None:
            found.append(captured.joint)
        for half, name in zip(captured.lowered, ("forward", "backward"), strict=False):
            found.append(lowered_program(captured.joint, half, f"{captured.name}.{name}"))
    return tuple(found)


def lowered_program(joint: Program | None, half: fx.GraphModule, name: str) -> Program:
    """One half of a joint program as a program of its own."""
    known = {spec.node: spec for spec in joint.signature.inputs} if joint is not None else {}
    roles = {spec.node: spec for spec in joint.signature.outputs} if joint is not None else {}
    inputs = tuple(
        known.get(node.name, InputSpec(node.name, "saved"))
        for node in half.graph.nodes
        if node.op == "placeholder"
    )
    output = next(node for node in reversed(half.graph.nodes) if node.op == "output")
    flat = [v for v in torch.utils._pytree.tree_leaves(output.args[0]) if isinstance(v, fx.Node)]
    outputs = tuple(roles.get(node.name, OutputSpec(node.name, "saved")) for node in flat)
    return Program(name, Level.LOWERED, half, Signature(inputs, outputs))


def dumped(
    group: Sequence[Captured],
    host: PluginHost,
    cost: CostModel,
    form: str,
    stage: str,
    beside: Sequence[Program] = (),
) -> str:
    """The programs of ``group`` at ``stage`` (``"semantic"``, ``"joint"`` or ``"final"``) in a dump format,
    one after another, or, where the format is for that, all programs as one document that begins there and
    shows those ``beside`` as well. Raises ``UnknownNameError`` for the format, ``PluginError`` where it
    fails."""
    from graphopt.dump.text import dump_joint_with_schedule

    formats = host.formats()
    if form not in formats:
        raise UnknownNameError("dump format", form, formats)
    level = _LEVELS[stage]
    if formats[form].write_all is not None:
        return _together(group, host, cost, formats[form], level, beside)
    if stage == "joint" and form == "text":
        parts = [
            dump_joint_with_schedule(c.joint, c.schedule, pass_id=c.frontier.pass_id if c.frontier else "")
            for c in group
            if c.joint is not None
        ]
        return "\n".join(parts)
    out = StringIO()
    for program in programs_of(group):
        if program.level is level:
            with _blaming(host, form):
                if (write_with := formats[form].write_with) is not None:
                    write_with(program, host.kernels(), out)
                else:
                    formats[form].write(program, out)
    return out.getvalue()


@contextmanager
def _blaming(host: PluginHost, form: str) -> Iterator[None]:
    try:
        with host.using("graphopt_formats", form):
            yield
    except GUARDED as error:
        if isinstance(error, GraphoptError):
            raise
        raise PluginError(host.blame("graphopt_formats", form, error)) from error


def _together(
    group: Sequence[Captured],
    host: PluginHost,
    cost: CostModel,
    form: DumpFormat,
    level: Level,
    beside: Sequence[Program],
) -> str:
    """All programs in one document. Calls of one kind share their programs, which are shown once."""
    sheets: dict[int, Sheet] = {}
    for captured in group:
        for program in programs_of([captured]):
            marks = _marks(captured) if program is captured.joint else {}
            sheets.setdefault(id(program.gm), Sheet(program, marks))
    ordered = [*sheets.values(), *(Sheet(program, before=True) for program in beside)]
    first = next((k for k, sheet in enumerate(ordered) if sheet.program.level is level), 0)
    out = StringIO()
    assert form.write_all is not None
    with _blaming(host, form.name):
        form.write_all(ordered, first, cost, out)
    return out.getvalue()


def _marks(captured: Captured) -> dict[str, str]:
    """What the schedule does with values of the joint program."""
    if captured.point is None:
        return {}
    schedule = captured.schedule
    return dict.fromkeys(schedule.saved, "saved") | dict.fromkeys(schedule.recomputed, "recompute")
