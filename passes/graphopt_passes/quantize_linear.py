"""quantize-linear: weights in fewer bytes, where the budget leaves no room for them as they are.

Before::

    layers.0.q.weight        Parameter bf16[4096,4096]

After::

    layers.0.q.weight        packed: codes int8[4096,4096], scales f32[4096]

It changes the model before it is captured, not a program; ``read-packed`` then reads what is packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from graphopt.conversion import Conversion
from graphopt.packing.calibration import Calibration
from graphopt.program import Level

__all__ = ["QuantizeLinear"]


@dataclass(frozen=True)
class QuantizeLinear(Conversion):
    """Packs weights that products, convolutions and look-ups read, as many and as far as the budget asks for,
    with the least error.

    ``schemes``: those to choose among as they are spelled, all that are registered by default. ``score``:
    what the error is (``graphopt_scorers``), by default as in ``graphopt.quantize``.
    ``calibration``: a file that ``Calibration.save`` wrote.
    """

    name: ClassVar[str] = "quantize-linear"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = "keep weights in fewer bytes where the budget asks for it, with the least error"
    exact: ClassVar[bool] = False
    before: ClassVar[dict[str, str]] = {"read-packed": "it packs what that reads"}

    schemes: tuple[str, ...] = ()
    score: str = ""
    calibration: str = ""

    def wanted_schemes(self) -> Sequence[str] | None:
        return self.schemes or None

    def wanted_score(self) -> str | None:
        return self.score or None

    def wanted_calibration(self) -> Calibration | None:
        return Calibration.load(self.calibration) if self.calibration else None
