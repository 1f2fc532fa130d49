"""The frontier of a whole step: peak bytes against predicted time."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graphopt.atomic import write_atomically
from graphopt.errors import InputsError

__all__ = ["Pareto", "ParetoPoint"]


@dataclass(frozen=True)
class ParetoPoint:
    """One plan: peak bytes of the whole step, its predicted seconds, FLOPs run again."""

    peak_bytes: int
    seconds: float
    recomputed_flops: int
    label: str = ""


@dataclass(frozen=True)
class Pareto:
    """Plans none of which is beaten in both, least peak first."""

    points: tuple[ParetoPoint, ...]
    device: str
    emit: str

    def to_json(self) -> dict[str, Any]:
        return {"device": self.device, "emit": self.emit, "points": [asdict(point) for point in self.points]}

    def picture(self, path: str | Path) -> Path:
        """Write the curve as SVG. Raises ``InputsError`` for a path that says it is something else."""
        from graphopt.dump.pareto_picture import pareto_svg

        rows = [(point.peak_bytes, point.seconds, "") for point in self.points]
        target = Path(path)
        if target.suffix.lower() not in ("", ".svg"):
            raise InputsError(f"cannot draw {target.name}: the picture is SVG", hint="end the name in .svg")
        write_atomically(target, pareto_svg(rows))
        return target
