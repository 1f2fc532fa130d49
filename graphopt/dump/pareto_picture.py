"""Peak memory against time as a picture: one point a plan, rivals beside them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from graphopt.dump.axes import INK, MUTED, Axes, byte_unit, unit_text
from graphopt.dump.svg import Box, Canvas, Labels, along, number, text_width
from graphopt.duration import format_seconds

__all__ = ["Point", "pareto_svg"]

Point = tuple[int, float, str]
"""Peak bytes, seconds, label (may be empty)."""

_WIDTH, _HEIGHT = 860.0, 540.0
_OURS, _PEERS, _BUDGET = "#1f6fb2", "#d9822b", "#c0392b"
_TIMES = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))


def pareto_svg(
    points: Sequence[Point],
    budget: int | None = None,
    peers: Sequence[Point] | None = None,
    *,
    title: str = "Peak memory against time",
) -> str:
    """Peak bytes against seconds as a self-contained SVG.

    A line joins those of ``points`` that no other one beats on both axes. ``peers`` are drawn as
    diamonds. A label that finds no free place beside its point shows under the mouse alone.
    Raises ``ValueError`` without points.
    """
    if not points:
        raise ValueError("nothing to draw: no points")
    peers = peers or ()
    every = [*points, *peers]
    canvas = Canvas(_WIDTH, _HEIGHT, title=title)
    frame = Box(88, 100, _WIDTH - 32, _HEIGHT - 62)
    x0, x1 = _padded([point[0] for point in every] + ([budget] if budget is not None else []))
    y0, y1 = _padded([point[1] for point in every])
    axes = Axes(frame, x0, x1, y0, y1)
    unit = byte_unit(x1)
    time_name, time_size = next((t for t in _TIMES if y1 >= t[1]), _TIMES[-1])
    canvas.text(88, 34, title, size=18, bold=True)
    _legend(canvas, bool(peers))
    axes.draw(
        canvas,
        x_label=f"peak memory ({unit[0]})",
        y_label=f"time of a step ({time_name})",
        x_unit=unit[1],
        y_unit=time_size,
    )
    if budget is not None:
        _budget(canvas, axes, budget, unit)
    front = _front(points)
    stairs = "".join(
        f"{'L' if i else 'M'}{number(axes.x(p[0]))} {number(axes.y(p[1]))}" for i, p in enumerate(front)
    )
    canvas.path(stairs, stroke=_OURS, width=1.4)
    for point in points:
        x, y = axes.x(point[0]), axes.y(point[1])
        disc = f"M{number(x - 5)} {number(y)}a5 5 0 1 0 10 0a5 5 0 1 0 -10 0Z"
        canvas.marker(disc, stroke="#ffffff", fill=_OURS, tooltip=_tooltip(point))
    for point in peers:
        x, y = axes.x(point[0]), axes.y(point[1])
        diamond = f"M{number(x)} {number(y - 6)}l6 6l-6 6l-6 -6Z"
        canvas.marker(diamond, stroke="#ffffff", fill=_PEERS, tooltip=_tooltip(point))
    _label(canvas, axes, points, peers, budget, front)
    return canvas.render()


def _padded(values: Iterable[float]) -> tuple[float, float]:
    """The range of the values with room at both ends; never empty, never below zero."""
    listed = list(values)
    low, high = min(listed), max(listed)
    room = 0.08 * (high - low) or 0.1 * high or 1.0
    return max(low - room, 0.0), high + room


def _front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats on both axes, least memory first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p[0], p[1])):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def _legend(canvas: Canvas, peers: bool) -> None:
    canvas.path("M89 58a5 5 0 1 0 10 0a5 5 0 1 0 -10 0Z", fill=_OURS)
    canvas.text(108, 62, "graphopt", size=13)
    if peers:
        canvas.path("M200 52l6 6l-6 6l-6 -6Z", fill=_PEERS)
        canvas.text(214, 62, "others", size=13)


def _budget(canvas: Canvas, axes: Axes, budget: int, unit: tuple[str, float]) -> None:
    x = axes.x(budget)
    canvas.line(x, axes.frame.top, x, axes.frame.bottom, stroke=_BUDGET, width=1.6, dash="7 4")
    text = f"budget {unit_text(budget, unit)}"
    half = text_width(text, 12, bold=True) / 2
    middle = min(max(x, axes.frame.left + half), axes.frame.right - half)
    canvas.text(middle, axes.frame.top - 7, text, size=12, fill=_BUDGET, anchor="middle", bold=True)


def _label(
    canvas: Canvas,
    axes: Axes,
    points: Sequence[Point],
    peers: Sequence[Point],
    budget: int | None,
    front: Sequence[Point],
) -> None:
    every = [*peers, *points]
    obstacles = [Box(axes.x(p[0]) - 7, axes.y(p[1]) - 7, axes.x(p[0]) + 7, axes.y(p[1]) + 7) for p in every]
    for one, two in itertools.pairwise(front):
        obstacles += along(axes.x(one[0]), axes.y(one[1]), axes.x(two[0]), axes.y(two[1]), half=3)
    if budget is not None:
        obstacles.append(Box(axes.x(budget) - 3, axes.frame.top, axes.x(budget) + 3, axes.frame.bottom))
    labels = Labels(axes.frame, obstacles)
    for point in every:
        x, y = axes.x(point[0]), axes.y(point[1])
        label = labels.place(x, y, point[2], 12) if point[2] else None
        if label is None:
            continue
        if label.leader is not None:
            canvas.line(*label.leader, stroke=MUTED)
        middle = (label.box.left + label.box.right) / 2
        canvas.text(middle, label.box.bottom - 3, point[2], size=12, fill=INK, anchor="middle", halo=True)


def _tooltip(point: Point) -> str:
    peak = unit_text(point[0], byte_unit(point[0]))
    return ", ".join(part for part in (point[2], peak, format_seconds(point[1])) if part)
