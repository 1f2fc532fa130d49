"""Budgets: how many bytes the whole step may hold at its peak."""

from __future__ import annotations

import re
from dataclasses import dataclass

from graphopt.duration import format_seconds
from graphopt.errors import BudgetSyntaxError

__all__ = ["Budget", "bound_text", "format_bytes", "parse_bytes", "weight_bound"]

_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_BYTES = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?b)\s*", re.IGNORECASE)
_PERCENT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*")
_EXPECTED = 'an int of bytes, "8GiB", "8GB", "512MiB" or "60%" (of the baseline peak)'


def parse_bytes(text: str | int) -> int:
    """``"8GiB"`` -> 8589934592. Raises ``BudgetSyntaxError`` naming what was expected."""
    if isinstance(text, bool) or not isinstance(text, (int, str)):
        fraction = isinstance(text, float) and 0 < text <= 1
        hint = f'a fraction of the baseline peak is written "{100 * text:g}%"' if fraction else ""
        raise BudgetSyntaxError(f"cannot read {text!r} as bytes: expected {_EXPECTED}", hint=hint)
    if isinstance(text, int):
        if text <= 0:
            raise BudgetSyntaxError(f"a budget must be positive, got {text}")
        return text
    match = _BYTES.fullmatch(text)
    if match is None:
        raise BudgetSyntaxError(
            f"cannot read {text!r} as bytes: expected {_EXPECTED}",
            hint="units are B, kB, MB, GB, TB (powers of 1000) and KiB, MiB, GiB, TiB (powers of 1024)",
        )
    value = int(float(match[1]) * _UNITS[match[2].lower()])
    if value <= 0:
        raise BudgetSyntaxError(f"a budget must be positive, got {text!r}")
    return value


def format_bytes(count: int | float) -> str:
    """Bytes for people: ``1536`` -> ``"1.50 KiB"``."""
    value, sign = abs(float(count)), "-" if count < 0 else ""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{sign}{value:.0f} B" if unit == "B" else f"{sign}{value:.2f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def weight_bound(value: int | str, weight_bytes: int) -> int:
    """``"8GiB"``, an int, or ``"40%"`` of ``weight_bytes`` in bytes. Raises ``BudgetSyntaxError``."""
    match = _PERCENT.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return parse_bytes(value)
    if float(match[1]) == 0:
        raise BudgetSyntaxError(f"a bound of weights must be positive, got {value!r}")
    return int(float(match[1]) / 100 * weight_bytes)


def bound_text(count: int | None, seconds: float | None) -> str:
    """``"1.00 GiB and 2.00 ms"``: the bounds that are there."""
    parts = [] if count is None else [format_bytes(count)]
    return " and ".join(parts if seconds is None else [*parts, format_seconds(seconds)])


@dataclass(frozen=True)
class Budget:
    """An upper bound on the peak of a whole step, in bytes.

    The peak counts parameters, buffers, inputs, gradients, saved activations and every
    transient of forward and backward.

    ``memory`` is an int of bytes, a text such as ``"8GiB"``, or ``"60%"`` of the baseline peak
    (the peak of the same program without rewrites). ``reserve`` is held back for what graphopt
    does not plan, such as optimizer states or library workspaces: the plan must fit
    ``memory - reserve``.

    ``weights`` bounds parameters and buffers alone, in the same forms, ``"40%"`` of what they take. It is met
    by passes that keep weights in fewer bytes (docs/quantization.md).

    ``cache`` bounds what a model that generates keeps of keys and values alone, in bytes (docs/decoding.md);
    ``memory`` counts it too.
    """

    memory: int | str | None = None
    reserve: int | str = 0
    weights: int | str | None = None
    cache: int | str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.memory, str) and _PERCENT.fullmatch(self.memory):
            if self.fraction() == 0:
                raise BudgetSyntaxError(f"a budget must be positive, got {self.memory!r}")
        elif self.memory is not None:
            parse_bytes(self.memory)
        if self.weights is not None:
            weight_bound(self.weights, 100)
        if self.cache is not None:
            parse_bytes(self.cache)
        if self.reserve != 0:
            try:
                parse_bytes(self.reserve)
            except BudgetSyntaxError:
                raise BudgetSyntaxError(
                    f"cannot read reserve={self.reserve!r}: expected bytes to hold back, 0 or more, "
                    'such as "1GiB"'
                ) from None

    @classmethod
    def of(cls, value: Budget | int | str | None) -> Budget:
        """Whatever ``optimize(budget=...)`` accepts, as a ``Budget``."""
        return value if isinstance(value, Budget) else cls(value)

    def fraction(self) -> float | None:
        """The fraction of the baseline peak that ``"60%"`` asks for, or ``None``."""
        match = _PERCENT.fullmatch(self.memory) if isinstance(self.memory, str) else None
        return float(match[1]) / 100 if match else None

    def resolve(self, baseline_peak: int) -> int | None:
        """The bound in bytes, reserve taken off; ``None`` without a bound."""
        if self.memory is None:
            return None
        fraction = self.fraction()
        memory = int(fraction * baseline_peak) if fraction is not None else parse_bytes(self.memory)
        reserve = parse_bytes(self.reserve) if self.reserve else 0
        if reserve >= memory:
            raise BudgetSyntaxError(
                f"the reserve ({format_bytes(reserve)}) leaves nothing of the budget ({format_bytes(memory)})"
            )
        return memory - reserve
