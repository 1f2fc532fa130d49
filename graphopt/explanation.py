"""What holds the peak of a step: which values, of which layer, while which operator runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graphopt.atomic import write_atomically
from graphopt.budget import format_bytes
from graphopt.cost import LiveTensor, MemoryProfile
from graphopt.errors import InputsError

__all__ = ["MemoryExplanation"]


@dataclass(frozen=True)
class MemoryExplanation:
    """The memory of a step as it is (``before``) and as planned (``after``), op by op.

    ``static_bytes`` are held throughout: parameters, buffers, inputs, gradients that were there before.
    ``layers`` maps operators to layers. ``predicted_bytes`` is the plan's own figure, which is another where
    kernels are fused or rows of blocks run again. ``budget_bytes``: what the plan was made for.
    """

    before: MemoryProfile
    after: MemoryProfile
    static_bytes: int
    predicted_bytes: int
    budget_bytes: int | None
    layers: dict[str, str]

    def __str__(self) -> str:
        return self.text()

    def text(self, count: int = 12) -> str:
        """A paragraph for each of the two: the peak, where it is, the ``count`` largest values there."""
        parts = [self._paragraph("as it is", self.before, count)]
        if self.after != self.before:
            parts.append(self._paragraph("as planned", self.after, count))
        if self.after.peak_bytes != self.predicted_bytes:
            parts.append(
                f"Operators one by one; the plan, whose code fuses them or runs rows of blocks again, holds "
                f"{format_bytes(self.predicted_bytes)} at most."
            )
        return "\n\n".join(parts)

    def _paragraph(self, name: str, profile: MemoryProfile, count: int) -> str:
        lines = [f"{name}: peak {format_bytes(profile.peak_bytes)} ({profile.peak_bytes} bytes)"]
        if profile.peak is not None:
            at = profile.peak
            layer = self.layers.get(at.node, "")
            lines[0] += f" in the {at.phase} of {at.program}, while {at.node} runs"
            lines[0] += f" ({layer})" if layer else ""
        rows = [(format_bytes(self.static_bytes), "static", "parameters, buffers, inputs, gradients held")]
        for tensor in profile.live_at_peak[:count]:
            rows.append((format_bytes(tensor.bytes), tensor.role, _named(tensor)))
        rest = profile.live_at_peak[count:]
        if rest:
            rows.append((format_bytes(sum(t.bytes for t in rest)), "", f"{len(rest)} smaller values"))
        left = profile.peak_bytes - self.static_bytes - sum(t.bytes for t in profile.live_at_peak)
        if left > 0:
            rows.append((format_bytes(left), "", "of other programs, and what the operator itself takes"))
        wide = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines += [f"  {size.rjust(wide[0])}  {role.ljust(wide[1])}  {what}" for size, role, what in rows]
        by_layer = _by_layer(profile)
        if by_layer:
            most = ", ".join(f"{layer} {format_bytes(size)}" for layer, size in by_layer[:4])
            lines.append(f"  by layer: {most}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: for ``before`` and ``after`` the peak, where it is, every value alive there."""

        def of(profile: MemoryProfile) -> dict[str, Any]:
            at = profile.peak
            return {
                "peak_bytes": profile.peak_bytes,
                "at": asdict(at) | {"layer": self.layers.get(at.node, "")} if at is not None else None,
                "live": [asdict(tensor) for tensor in profile.live_at_peak],
                "by_layer": dict(_by_layer(profile)),
            }

        return {
            "static_bytes": self.static_bytes,
            "predicted_bytes": self.predicted_bytes,
            "budget_bytes": self.budget_bytes,
            "before": of(self.before),
            "after": of(self.after),
        }

    def picture(self, path: str | Path) -> Path:
        """Live bytes over the step, before and after, as SVG.

        Raises ``InputsError`` for a path that says it is something else.
        """
        from graphopt.dump.memory_picture import memory_svg

        target = Path(path)
        if target.suffix.lower() not in ("", ".svg"):
            raise InputsError(f"cannot draw {target.name}: the picture is SVG", hint="end the name in .svg")
        curves = {"as it is": self.before, "as planned": self.after}
        write_atomically(target, memory_svg(curves, budget_bytes=self.budget_bytes, layers=self.layers))
        return target


def _named(tensor: LiveTensor) -> str:
    return f"{tensor.node} ({tensor.layer})" if tensor.layer else tensor.node


def _by_layer(profile: MemoryProfile) -> list[tuple[str, int]]:
    sizes: Counter[str] = Counter()
    for tensor in profile.live_at_peak:
        if tensor.layer:
            sizes[tensor.layer] += tensor.bytes
    return sizes.most_common()
