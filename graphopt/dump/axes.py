"""Two linear axes with ticks, units and grid, shared by the pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from graphopt.dump.svg import Box, Canvas, nice_ticks, number

__all__ = ["GRID", "INK", "MUTED", "Axes", "byte_unit", "unit_text"]

INK, MUTED, GRID = "#1f2933", "#5b6770", "#e4e8ec"


@dataclass(frozen=True)
class Axes:
    """Data ranges [x0, x1] and [y0, y1] mapped onto ``frame``; y grows upwards."""

    frame: Box
    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        share = (value - self.x0) / (self.x1 - self.x0)
        return self.frame.left + share * (self.frame.right - self.frame.left)

    def y(self, value: float) -> float:
        share = (value - self.y0) / (self.y1 - self.y0)
        return self.frame.bottom - share * (self.frame.bottom - self.frame.top)

    def draw(
        self,
        canvas: Canvas,
        *,
        x_label: str,
        y_label: str,
        x_unit: float = 1,
        y_unit: float = 1,
        x_ticks: int = 8,
        y_ticks: int = 6,
        x_whole: bool = False,
    ) -> None:
        """Grid, ticks in multiples of the units, and what the axes show.

        ``x_whole``: the x axis counts, so that a tick between two units means nothing.
        """
        frame = self.frame
        across = nice_ticks(self.x0 / x_unit, self.x1 / x_unit, x_ticks)
        if x_whole:
            across = [tick for tick in across if tick == round(tick)]
        self._ticks(canvas, across, x_unit, self._x_tick)
        self._ticks(canvas, nice_ticks(self.y0 / y_unit, self.y1 / y_unit, y_ticks), y_unit, self._y_tick)
        canvas.line(frame.left, frame.bottom, frame.right, frame.bottom, stroke=MUTED)
        canvas.text((frame.left + frame.right) / 2, frame.bottom + 42, x_label, fill=MUTED, anchor="middle")
        middle = (frame.top + frame.bottom) / 2
        canvas.text(24, middle, y_label, fill=MUTED, anchor="middle", turned=True)

    def _ticks(
        self,
        canvas: Canvas,
        ticks: list[float],
        unit: float,
        draw: Callable[[Canvas, float, str], None],
    ) -> None:
        # As many decimals as the distance of ticks needs, the same for all of them.
        step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
        decimals = max(len(number(step).partition(".")[2]), 0)
        for tick in ticks:
            draw(canvas, tick * unit, f"{tick:,.{decimals}f}")

    def _x_tick(self, canvas: Canvas, value: float, text: str) -> None:
        x, bottom = self.x(value), self.frame.bottom
        canvas.line(x, bottom, x, bottom + 5, stroke=MUTED)
        canvas.text(x, bottom + 20, text, size=12, fill=MUTED, anchor="middle")

    def _y_tick(self, canvas: Canvas, value: float, text: str) -> None:
        y = self.y(value)
        canvas.line(self.frame.left, y, self.frame.right, y, stroke=GRID)
        canvas.text(self.frame.left - 8, y + 4, text, size=12, fill=MUTED, anchor="end")


def byte_unit(largest: float) -> tuple[str, float]:
    """The unit in which ``largest`` bytes is a handy figure: name and bytes."""
    for name, size in (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10)):
        if largest >= (4 if name == "GiB" else 1) * size:
            return name, size
    return "B", 1.0


def unit_text(count: float, unit: tuple[str, float]) -> str:
    """``count`` bytes in ``unit``, three figures or more."""
    name, size = unit
    value = count / size
    decimals = 0 if value >= 1000 or name == "B" else 1 if value >= 100 else 2
    return f"{value:,.{decimals}f} {name}"
