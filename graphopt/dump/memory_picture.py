"""Memory over a step as a picture: live bytes by operation, one curve a profile, SVG by hand."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from graphopt.cost import MemoryProfile
from graphopt.dump.axes import INK, MUTED, Axes, byte_unit, unit_text
from graphopt.dump.pareto_picture import pareto_svg
from graphopt.dump.svg import Box, Canvas, Labels, elided, number, text_width

__all__ = ["memory_svg", "pareto_svg"]

_WIDTH, _PLOT_HEIGHT = 960.0, 380.0
_LEFT, _RIGHT, _BOTTOM = 88.0, 120.0, 62.0
_COLOURS = ("#8a97a6", "#1f6fb2", "#d9822b", "#5c8f3a", "#8b5fbf")
_BUDGET = "#c0392b"
_PHASES = {"forward": "#f3f7fb", "backward": "#fdf6ec"}
_OTHER_PHASE = "#f7f7f7"
# Finer than a pixel no eye tells steps apart.
_COLUMNS = 760


def memory_svg(
    profiles: Mapping[str, MemoryProfile],
    *,
    budget_bytes: int | None = None,
    title: str = "",
    layers: Mapping[str, str] | None = None,
) -> str:
    """Live bytes over the step of each profile, in one plot, as a self-contained SVG.

    ``profiles`` maps a name for the legend to a profile, the reference first. Curves are lined up
    where the backward begins, so that forward and backward share their shading, which follows the
    last profile. ``layers`` maps node names to the layers that peaks are to be attributed to.
    Raises ``ValueError`` without a profile that has steps.
    """
    drawn = {name: profile for name, profile in profiles.items() if profile.steps}
    if not drawn:
        raise ValueError("nothing to draw: no profile has steps")
    curves = _curves(drawn)
    top = 62.0 + 22.0 * len(curves) + 26.0
    canvas = Canvas(_WIDTH, top + _PLOT_HEIGHT + _BOTTOM, title=title or "memory over a step")
    frame = Box(_LEFT, top, _WIDTH - _RIGHT, top + _PLOT_HEIGHT)
    largest = max([*(curve.peak for curve in curves), budget_bytes or 0, 1])
    axes = Axes(frame, 0, max(curve.end for curve in curves), 0, largest * 1.12)
    unit = byte_unit(largest)

    canvas.text(_LEFT, 34, title or "Memory over a step", size=18, bold=True)
    details = _LEFT + 32 + max(text_width(curve.name, 13, bold=True) for curve in curves) + 16
    for index, curve in enumerate(curves):
        _legend(canvas, curve, 62.0 + 22.0 * index, min(details, _WIDTH / 2), unit, layers or {})
    _shade(canvas, axes, curves[-1])
    axes.draw(
        canvas,
        x_label="operations executed",
        y_label=f"live memory ({unit[0]})",
        y_unit=unit[1],
        x_whole=True,
    )
    for curve in curves:
        canvas.path(_path(curve, axes, closed=True), fill=curve.colour, opacity=0.14)
    if budget_bytes is not None:
        _budget(canvas, axes, budget_bytes, unit)
    for curve in curves:
        canvas.path(_path(curve, axes), stroke=curve.colour, width=1.7)
    _mark_peaks(canvas, axes, curves, unit, budget_bytes)
    return canvas.render()


@dataclass(frozen=True)
class _Curve:
    """Live bytes of one profile; its first step stands at ``start`` on the common axis."""

    name: str
    colour: str
    start: int
    values: tuple[int, ...]
    phases: tuple[str, ...]
    nodes: tuple[str, ...]

    @property
    def end(self) -> int:
        return self.start + len(self.values)

    @property
    def peak(self) -> int:
        return max(self.values)

    @property
    def peak_index(self) -> int:
        return self.values.index(self.peak)


def _curves(profiles: Mapping[str, MemoryProfile]) -> list[_Curve]:
    before = {name: _steps_before_backward(profile) for name, profile in profiles.items()}
    latest = max(before.values())
    return [
        _Curve(
            name,
            _COLOURS[index % len(_COLOURS)],
            latest - before[name],
            tuple(step.bytes for step in profile.steps),
            tuple(step.phase for step in profile.steps),
            tuple(step.node for step in profile.steps),
        )
        for index, (name, profile) in enumerate(profiles.items())
    ]


def _steps_before_backward(profile: MemoryProfile) -> int:
    phases = [step.phase for step in profile.steps]
    return phases.index("backward") if "backward" in phases else 0


def _legend(
    canvas: Canvas,
    curve: _Curve,
    y: float,
    details: float,
    unit: tuple[str, float],
    layers: Mapping[str, str],
) -> None:
    canvas.line(_LEFT, y - 4, _LEFT + 24, y - 4, stroke=curve.colour, width=3)
    canvas.text(_LEFT + 32, y, elided(curve.name, 13, details - _LEFT - 40, bold=True), bold=True)
    node = curve.nodes[curve.peak_index]
    layer = layers.get(node, "")
    where = f"peak {unit_text(curve.peak, unit)} at {node}" + (f" in {layer}" if layer else "")
    canvas.text(details, y, elided(where, 13, _WIDTH - 24 - details), fill=MUTED)


def _shade(canvas: Canvas, axes: Axes, curve: _Curve) -> None:
    frame = axes.frame
    runs = list(_runs(curve))
    room_from = frame.left
    for index, (phase, start, end) in enumerate(runs):
        left = frame.left if index == 0 else axes.x(start)
        right = frame.right if index == len(runs) - 1 else axes.x(end)
        canvas.rect(Box(left, frame.top, right, frame.bottom), fill=_PHASES.get(phase, _OTHER_PHASE))
        # A run too narrow for its name goes without; the colour still tells.
        if phase and right - max(left, room_from) >= text_width(phase, 12) + 8:
            canvas.text((left + right) / 2, frame.top - 8, phase, size=12, fill=MUTED, anchor="middle")
            room_from = right


def _runs(curve: _Curve) -> Iterator[tuple[str, int, int]]:
    """Stretches of one phase: phase, first step, step after the last."""
    start = 0
    for index in range(1, len(curve.phases) + 1):
        if index == len(curve.phases) or curve.phases[index] != curve.phases[start]:
            yield curve.phases[start], curve.start + start, curve.start + index
            start = index


def _budget(canvas: Canvas, axes: Axes, budget: int, unit: tuple[str, float]) -> None:
    y = axes.y(budget)
    canvas.line(axes.frame.left, y, axes.frame.right, y, stroke=_BUDGET, width=1.6, dash="7 4")
    canvas.text(axes.frame.right + 8, y - 2, "budget", size=12, fill=_BUDGET, bold=True)
    canvas.text(axes.frame.right + 8, y + 13, unit_text(budget, unit), size=12, fill=_BUDGET)


def _path(curve: _Curve, axes: Axes, *, closed: bool = False) -> str:
    """A staircase: each step holds its bytes for the width of one operation."""
    points = list(_columns(curve))
    out = [f"M{number(axes.x(points[0][0]))} {number(axes.y(points[0][1]))}"]
    for position, value in points[1:]:
        out.append(f"H{number(axes.x(position))}V{number(axes.y(value))}")
    out.append(f"H{number(axes.x(curve.end))}")
    if closed:
        out.append(f"V{number(axes.y(0))}H{number(axes.x(curve.start))}Z")
    return "".join(out)


def _columns(curve: _Curve) -> Iterator[tuple[float, int]]:
    """(position, bytes) wherever the bytes change; of crowded columns the extremes alone."""
    width = max(1.0, len(curve.values) / _COLUMNS)
    if width == 1.0:
        last = None
        for index, value in enumerate(curve.values):
            if value != last:
                yield curve.start + index, value
                last = value
        return
    for column in range(_COLUMNS):
        low, high = int(column * width), int((column + 1) * width)
        values: Sequence[int] = curve.values[low:high]
        if values:
            yield curve.start + low, max(values)
            yield curve.start + (low + high) / 2, min(values)


def _mark_peaks(
    canvas: Canvas, axes: Axes, curves: Sequence[_Curve], unit: tuple[str, float], budget: int | None
) -> None:
    obstacles = [_around(axes, curve) for curve in curves]
    for curve in curves:
        obstacles += _silhouette(axes, curve)
    if budget is not None:
        y = axes.y(budget)
        obstacles.append(Box(axes.frame.left, y - 2, axes.frame.right, y + 2))
    labels = Labels(axes.frame, obstacles)
    for curve in curves:
        x, y = axes.x(curve.start + curve.peak_index + 0.5), axes.y(curve.peak)
        text = unit_text(curve.peak, unit)
        canvas.marker(_disc(x, y), stroke="#ffffff", fill=curve.colour, tooltip=f"{curve.name}: {text}")
        label = labels.place(x, y, text, 12, bold=True)
        if label is None:
            continue
        if label.leader is not None:
            canvas.line(*label.leader, stroke=MUTED)
        box = label.box
        middle = (box.left + box.right) / 2
        canvas.text(middle, box.bottom - 3, text, size=12, fill=INK, anchor="middle", bold=True, halo=True)


def _around(axes: Axes, curve: _Curve) -> Box:
    x, y = axes.x(curve.start + curve.peak_index + 0.5), axes.y(curve.peak)
    return Box(x - 6, y - 6, x + 6, y + 6)


def _silhouette(axes: Axes, curve: _Curve) -> Iterator[Box]:
    """Thin boxes along the curve, which labels keep clear of."""
    points = [*_columns(curve), (float(curve.end), curve.values[-1])]
    for (position, value), (following, then) in itertools.pairwise(points):
        x, right = axes.x(position), axes.x(following)
        y, turn = axes.y(value), axes.y(then)
        yield Box(x, y - 2, right, y + 2)
        yield Box(right - 1, min(y, turn), right + 1, max(y, turn))


def _disc(x: float, y: float) -> str:
    return f"M{number(x - 5)} {number(y)}a5 5 0 1 0 10 0a5 5 0 1 0 -10 0Z"
