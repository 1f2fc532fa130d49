"""Frontier points with the bytes that generated code states in place of those expected of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from graphopt.candidate import FrontierPoint
from graphopt.captured import Captured
from graphopt.emit.lowered import LoweredMemory, step_memory
from graphopt.errors import LoweringError
from graphopt.schedule import Schedule

__all__ = ["corrected", "exact_point", "with_bytes"]


def corrected(
    points: Sequence[FrontierPoint], exact: Mapping[tuple[str, Schedule], FrontierPoint]
) -> tuple[FrontierPoint, ...]:
    """``points`` with the exact ones in their place and the others of their form moved by the same error.

    Estimates of one program err alike: what one schedule's code holds above its estimate, the
    others' will too.
    """
    moved: list[FrontierPoint] = []
    for form in dict.fromkeys(point.alternative for point in points):
        known = {schedule: point for (name, schedule), point in exact.items() if name == form}
        moved += _moved([point for point in points if point.alternative == form], known)
    return tuple(moved)


def _moved(
    points: Sequence[FrontierPoint], exact: Mapping[Schedule, FrontierPoint]
) -> tuple[FrontierPoint, ...]:
    known = [(p, exact[p.schedule]) for p in points if p.schedule in exact]
    if not known:
        return tuple(points)
    ahead = max(q.forward_peak - p.forward_peak for p, q in known)
    behind = max(q.backward_peak - p.backward_peak for p, q in known)
    return tuple(
        with_bytes(p, exact[p.schedule])
        if p.schedule in exact
        else replace(
            p,
            forward_peak=max(p.forward_peak + ahead, p.retained),
            backward_peak=max(p.backward_peak + behind, p.retained),
        )
        for p in points
    )


def with_bytes(point: FrontierPoint, compiled: FrontierPoint) -> FrontierPoint:
    """A point with the bytes that its code states; values that it moves stay its own."""
    return replace(
        point,
        forward_peak=compiled.forward_peak,
        backward_peak=compiled.backward_peak,
        retained=compiled.retained,
    )


def exact_point(kind: Captured, point: FrontierPoint, records: Sequence[LoweredMemory]) -> FrontierPoint:
    """``point`` with the bytes that the generated code states."""
    if kind.mode == "train":
        if len(records) != 2:
            raise LoweringError(
                f"{kind.name}: {len(records)} graphs were compiled: expected a forward and a backward"
            )
        step = step_memory(records[0], records[1])
        return replace(
            point,
            forward_peak=step.forward_peak,
            backward_peak=step.backward_peak,
            retained=step.retained,
        )
    peak = max((record.peak_bytes for record in records), default=0)
    return replace(point, forward_peak=peak, retained=sum(record.output_bytes for record in records))
