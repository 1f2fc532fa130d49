"""The little SVG that the pictures need: a canvas, axis ticks, and labels that never overlap."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

__all__ = [
    "FONT",
    "Box",
    "Canvas",
    "Label",
    "Labels",
    "along",
    "elided",
    "nice_ticks",
    "number",
    "text_width",
]

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', Arial, sans-serif"
# Advances of glyphs in ems, by kind, of the widest of the fonts above (DejaVu Sans): estimates err
# on the side of too much room.
_NARROW, _WIDE = frozenset("iljtfr.,:;'|!()[] "), frozenset("mwMW@%")
_BOLD = 1.12


def _advance(glyph: str) -> float:
    if glyph in _NARROW:
        return 0.40
    return 0.98 if glyph in _WIDE else 0.66 if glyph.isupper() or glyph.isdigit() else 0.62


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """Estimated width in pixels of ``text`` set ``size`` pixels high; an upper estimate."""
    return size * (_BOLD if bold else 1.0) * sum(map(_advance, text))


def elided(text: str, size: float, width: float, *, bold: bool = False) -> str:
    """``text``, with its middle left out where it would be wider than ``width`` pixels."""
    if text_width(text, size, bold=bold) <= width:
        return text
    for kept in range(len(text) - 1, 0, -1):
        head, tail = text[: (kept + 1) // 2], text[len(text) - kept // 2 :]
        if text_width(f"{head}…{tail}", size, bold=bold) <= width:
            return f"{head}…{tail}"
    return "…"


def number(value: float) -> str:
    """A coordinate with at most two decimals, in its shortest spelling."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round values (1, 2 or 5 times a power of ten apart) within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


@dataclass(frozen=True)
class Box:
    """A rectangle: left, top, right, bottom, in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )

    def within(self, other: Box) -> bool:
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )


class Canvas:
    """Elements in drawing order on a white page of the given size in pixels."""

    def __init__(self, width: float, height: float, *, title: str) -> None:
        self.width, self.height = width, height
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{number(width)}" height="{number(height)}" '
            f'viewBox="0 0 {number(width)} {number(height)}" font-family={quoteattr(FONT)} role="img">',
            f"<title>{escape(title)}</title>",
            '<rect width="100%" height="100%" fill="#ffffff"/>',
        ]

    def rect(self, box: Box, *, fill: str) -> None:
        self._parts.append(
            f'<rect x="{number(box.left)}" y="{number(box.top)}" width="{number(box.right - box.left)}" '
            f'height="{number(box.bottom - box.top)}" fill="{fill}"/>'
        )

    def line(
        self, x1: float, y1: float, x2: float, y2: float, *, stroke: str, width: float = 1, dash: str = ""
    ) -> None:
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self._parts.append(
            f'<line x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}" '
            f'stroke="{stroke}" stroke-width="{number(width)}"{dashes}/>'
        )

    def path(
        self, d: str, *, stroke: str = "none", fill: str = "none", opacity: float = 1, width: float = 1.5
    ) -> None:
        self._parts.append(
            f'<path d="{d}" stroke="{stroke}" stroke-width="{number(width)}" fill="{fill}" '
            f'fill-opacity="{number(opacity)}" stroke-linejoin="round"/>'
        )

    def marker(self, d: str, *, stroke: str, fill: str, tooltip: str) -> None:
        """A closed path with a white rim and a text that shows under the mouse."""
        self._parts.append(
            f'<path d="{d}" stroke="{stroke}" stroke-width="1.8" fill="{fill}">'
            f"<title>{escape(tooltip)}</title></path>"
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 13,
        fill: str = "#1f2933",
        anchor: str = "start",
        bold: bool = False,
        turned: bool = False,
        halo: bool = False,
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        turn = f' transform="rotate(-90 {number(x)} {number(y)})"' if turned else ""
        rim = (
            ' stroke="#ffffff" stroke-width="3" paint-order="stroke" stroke-linejoin="round"' if halo else ""
        )
        self._parts.append(
            f'<text x="{number(x)}" y="{number(y)}" font-size="{number(size)}" fill="{fill}" '
            f'text-anchor="{anchor}"{weight}{turn}{rim}>{escape(text)}</text>'
        )

    def render(self) -> str:
        return "\n".join([*self._parts, "</svg>"]) + "\n"


@dataclass(frozen=True)
class Label:
    """A placed label: its box, and the line that ties it to its point where it stands apart."""

    box: Box
    leader: tuple[float, float, float, float] | None


class Labels:
    """Places labels beside points so that none covers another, a marker or an obstacle.

    ``frame`` is where labels may stand; ``obstacles`` are boxes to keep clear.
    """

    def __init__(self, frame: Box, obstacles: Iterable[Box] = ()) -> None:
        self.frame = frame
        self._taken: list[Box] = list(obstacles)
        self._labels: list[Box] = []

    def place(self, x: float, y: float, text: str, size: float, *, bold: bool = False) -> Label | None:
        """The label nearest to (x, y) that is free, now taken; ``None`` where there is no room."""
        width, height = text_width(text, size, bold=bold), size * 1.2
        for away in (8.0, 16.0, 28.0, 44.0, 64.0, 88.0):
            for left, top in _spots(x, y, width, height, away):
                box = Box(left, top, left + width, top + height)
                if not box.within(self.frame) or any(box.meets(other) for other in self._taken):
                    continue
                leader = _leader(x, y, box) if away > _ADJACENT else None
                track = along(*leader) if leader else []
                if any(part.meets(other) for part in track for other in self._labels):
                    continue
                self._taken += [box, *track]
                self._labels.append(box)
                return Label(box, leader)
        return None


# Up to this many pixels away a label is seen to belong to its point.
_ADJACENT = 16.0


def along(x1: float, y1: float, x2: float, y2: float, *, half: float = 2.0) -> list[Box]:
    """Small boxes that cover a straight line, to keep labels off it."""
    count = int(max(abs(x2 - x1), abs(y2 - y1)) // (2 * half)) + 1
    steps = [(x1 + (x2 - x1) * i / count, y1 + (y2 - y1) * i / count) for i in range(count + 1)]
    return [Box(x - half, y - half, x + half, y + half) for x, y in steps]


def _leader(x: float, y: float, box: Box) -> tuple[float, float, float, float]:
    """From near the point, past its marker, to the nearest edge of the box."""
    to_x, to_y = min(max(x, box.left), box.right), min(max(y, box.top), box.bottom)
    length = math.hypot(to_x - x, to_y - y)
    skip = min(8.0 / length, 1.0)
    return x + (to_x - x) * skip, y + (to_y - y) * skip, to_x, to_y


def _spots(x: float, y: float, width: float, height: float, away: float) -> list[tuple[float, float]]:
    """Top left corners ``away`` pixels around a point: above, right, left, below, and between."""
    middle, centre, slant = y - height / 2, x - width / 2, away * 0.7
    return [
        (centre, y - away - height),
        (x + away, middle),
        (x - away - width, middle),
        (x + slant, y - slant - height),
        (x - slant - width, y - slant - height),
        (centre, y + away),
        (x + slant, y + slant),
        (x - slant - width, y + slant),
        (x + away, y + slant),
        (x - away - width, y + slant),
        (x + away, y - slant - height),
        (x - away - width, y - slant - height),
    ]
