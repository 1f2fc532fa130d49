"""Pick one point from every program's frontier so that the whole step fits the budget."""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.candidate import Frontier, FrontierPoint

__all__ = ["choose", "least_peak", "seconds_bound", "step_peak"]


def step_peak(points: Sequence[FrontierPoint], base_bytes: int = 0) -> int:
    """Peak of a step whose programs run forward in order, then backward in reverse.

    While program i runs forward, the values retained by the programs before it are held; while it
    runs backward, those and the gradients of the programs after it.
    """
    return base_bytes + max(_loads(points), default=0)


def _loads(points: Sequence[FrontierPoint]) -> list[int]:
    loads = []
    retained = 0
    after = sum(point.gradients for point in points)
    for point in points:
        after -= point.gradients
        loads.append(retained + point.forward_peak)
        loads.append(retained + point.backward_peak + after)
        retained += point.retained
    return loads


def choose(frontiers: Sequence[Frontier], budget_bytes: int | None, base_bytes: int = 0) -> list[FrontierPoint] | None:
    """The fastest combination that fits, or ``None`` if none was found that does.

    One program: the fastest point that fits. Several: starting from the fastest, repeatedly the
    exchange that lowers the excess most per added second, then every exchange back that still
    fits. The least combination is tried before giving up.
    """
    chosen = [frontier.points[-1] for frontier in frontiers]
    if budget_bytes is None or step_peak(chosen, base_bytes) <= budget_bytes:
        return chosen
    if len(frontiers) == 1:
        fitting = [p for p in frontiers[0].points if base_bytes + p.peak_bytes <= budget_bytes]
        return [fitting[-1]] if fitting else None
    room = budget_bytes - base_bytes
    while (excess := _excess(chosen, room)) > 0:
        best: tuple[float, int, FrontierPoint] | None = None
        for index, frontier in enumerate(frontiers):
            for point in frontier.points:
                gain = excess - _excess([*chosen[:index], point, *chosen[index + 1 :]], room)
                if gain <= 0:
                    continue
                rate = gain / max(point.seconds - chosen[index].seconds, 1e-9)
                if best is None or rate > best[0]:
                    best = rate, index, point
        if best is None:
            chosen = _least(frontiers)
            if _excess(chosen, room) > 0:
                return None
            break
        chosen[best[1]] = best[2]
    _relax(chosen, frontiers, room)
    return chosen


def _excess(points: Sequence[FrontierPoint], room: int) -> int:
    return sum(max(0, load - room) for load in _loads(points))


def _relax(chosen: list[FrontierPoint], frontiers: Sequence[Frontier], room: int) -> None:
    """Exchange back towards faster points wherever the step still fits, largest gain first."""
    while True:
        best: tuple[float, int, FrontierPoint] | None = None
        for index, frontier in enumerate(frontiers):
            for point in reversed(frontier.points):
                gain = chosen[index].seconds - point.seconds
                if gain <= 0:
                    break
                if _excess([*chosen[:index], point, *chosen[index + 1 :]], room) == 0:
                    if best is None or gain > best[0]:
                        best = gain, index, point
                    break
        if best is None:
            return
        chosen[best[1]] = best[2]


def _least(frontiers: Sequence[Frontier]) -> list[FrontierPoint]:
    """The combination of least peak that coordinate descent finds from the least points."""
    chosen = [frontier.points[0] for frontier in frontiers]
    improved = True
    while improved:
        improved = False
        for index, frontier in enumerate(frontiers):
            for point in frontier.points:
                trial = [*chosen[:index], point, *chosen[index + 1 :]]
                if step_peak(trial) < step_peak(chosen):
                    chosen, improved = trial, True
    return chosen


def least_peak(frontiers: Sequence[Frontier], base_bytes: int = 0) -> int:
    """The least peak of a whole step that the frontiers reach."""
    return step_peak(_least(frontiers), base_bytes)


def seconds_bound(frontiers: Sequence[Frontier], budget_bytes: int | None, base_bytes: int = 0) -> float:
    """A proven lower bound on the seconds that recomputation adds to any plan within the budget.

    Programs only add to each other's memory, so each one's own bound holds with the rest free.
    """
    if budget_bytes is None:
        return 0.0
    return sum(frontier.seconds_bound(budget_bytes - base_bytes) for frontier in frontiers)
