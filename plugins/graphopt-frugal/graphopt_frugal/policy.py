"""Free memory where that costs little time."""

from __future__ import annotations

from collections.abc import Iterator

from graphopt import PolicyQuestion, Selection

__all__ = ["frugal"]


def frugal(question: PolicyQuestion, *, share: float) -> Selection:
    """The planner's choice with leaner schedules in it, one kind of program after another, as long as the
    peak goes down and at most ``share`` of the step's time is added."""
    latest = question.seconds(question.default) + share * question.step_seconds
    best, peak = question.default, question.peak(question.default)
    while True:
        trials = [trial for trial in _changed(question, best) if question.seconds(trial) <= latest]
        judged = [(question.peak(trial), question.seconds(trial), k) for k, trial in enumerate(trials)]
        least = min(judged, default=(peak, 0.0, 0))
        if least[0] >= peak:
            return best
        best, peak = trials[least[2]], least[0]


def _changed(question: PolicyQuestion, selection: Selection) -> Iterator[Selection]:
    """Every selection in which the programs of one kind run another of their schedules. They stay alike: each
    schedule of a kind is compiled on its own."""
    kinds = {id(frontier): frontier for frontier in question.frontiers}
    for kind, frontier in kinds.items():
        for point in frontier.points:
            # How much of the host's memory is left is the planner's to know.
            if point.moved_bytes:
                continue
            points = tuple(
                point if id(own) == kind else chosen
                for own, chosen in zip(question.frontiers, selection.points, strict=True)
            )
            yield Selection(points, selection.reruns)
