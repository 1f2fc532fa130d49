"""Which weight is kept how, and what that makes of bytes and errors; printed, stored, replayed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.atomic import write_atomically
from graphopt.budget import format_bytes
from graphopt.errors import StalePlanError
from graphopt.record_json import RecordFormatError, decode, encode

if TYPE_CHECKING:
    from graphopt.packing.discover import Discovery

__all__ = ["QUANTIZATION_VERSION", "QuantizationPlan", "RefusedWeight", "WeightChoice"]

QUANTIZATION_VERSION = "graphopt/quantization@1"

_REPLAN = "make the plan again with graphopt.quantize(...)"
_KEPT = "as it is"


@dataclass(frozen=True)
class WeightChoice:
    """How one weight is kept: ``scheme`` as it is spelled, empty for the dense tensor that it was.

    ``names`` are all that the parameter goes by, ``weight`` first. Bytes are of its tensors. ``error`` is in
    the plan's metric,
    """

    weight: str
    names: tuple[str, ...]
    orientation: str
    shape: tuple[int, ...]
    dtype: str
    scheme: str
    bytes_before: int
    bytes_after: int
    error: float


@dataclass(frozen=True)
class RefusedWeight:
    """A parameter of two dimensions or more that cannot be packed, and why."""

    weight: str
    reason: str


@dataclass(frozen=True)
class QuantizationPlan:
    """A scheme for each weight of a model.

    ``bytes_before`` and ``bytes_after`` are those of all parameters and buffers. ``error`` is the sum over
    weights, measured on them by ``score``, in the unit that ``metric`` names; ``lower_bound``: no allocation
    of the schemes given that is within the bounds has less (fewer bytes, where ``bound_error`` was given
    alone). ``seconds`` are those predicted for all reads of weights in one step, ``seconds_before`` those
    without.
    """

    choices: tuple[WeightChoice, ...]
    refused: tuple[RefusedWeight, ...]
    schemes: tuple[str, ...]
    score: str
    metric: str
    bytes_before: int
    bytes_after: int
    error: float
    lower_bound: float
    seconds_before: float
    seconds: float
    bound_bytes: int | None = None
    bound_error: float | None = None
    bound_seconds: float | None = None
    schema_version: str = field(default=QUANTIZATION_VERSION, init=False)

    @property
    def packed(self) -> tuple[WeightChoice, ...]:
        """The weights that are not as they were."""
        return tuple(choice for choice in self.choices if choice.scheme)

    @property
    def bits(self) -> float:
        """Mean bits that a weight is stored in, with scales and zeros, over all that were found."""
        elements = sum(math.prod(choice.shape) for choice in self.choices)
        return 8 * sum(choice.bytes_after for choice in self.choices) / elements if elements else 0.0

    @property
    def gap(self) -> float:
        """Share by which the plan may be above the best: 0 where it is proven best."""
        by_bytes = self.bound_bytes is None and self.bound_error is not None
        value = float(sum(c.bytes_after for c in self.choices)) if by_bytes else self.error
        excess = max(0.0, value - self.lower_bound)
        if excess <= 1e-9 * abs(value):
            return 0.0
        return excess / self.lower_bound if self.lower_bound > 0 else math.inf

    @property
    def report(self) -> str:
        """A table: weight, scheme, bytes before and after, error; then sums, and what is refused and why."""
        from graphopt.plans import gap_text

        rows = [("weight", "kept as", "before", "after", "error")]
        for choice in self.choices:
            tied = f" (= {', '.join(choice.names[1:])})" if choice.names[1:] else ""
            rows.append(
                (
                    choice.weight + tied,
                    choice.scheme or _KEPT,
                    format_bytes(choice.bytes_before),
                    format_bytes(choice.bytes_after),
                    f"{choice.error:.3g}",
                )
            )
        before, after = self.bytes_before, self.bytes_after
        rows.append(("all tensors", "", format_bytes(before), format_bytes(after), f"{self.error:.3g}"))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0]), row[1].ljust(widths[1])]
                + [row[k].rjust(widths[k]) for k in range(2, 5)]
            ).rstrip()
            for row in rows
        ]
        lines.append(f"{self.summary}; {gap_text(self.gap)}")
        lines += [f"not packed: {refused.weight}: {refused.reason}" for refused in self.refused]
        return "\n".join(lines)

    @property
    def summary(self) -> str:
        """``"12 weights packed: 2.30 GiB -> 1.10 GiB (47.8 %), 4.50 bits a weight, error 0.0031 (relative
        squared error of outputs)"``."""
        from graphopt.plans import count_text

        share = f" ({100 * self.bytes_after / self.bytes_before:.1f} %)" if self.bytes_before else ""
        return (
            f"{count_text(len(self.packed), 'weight')} packed: {format_bytes(self.bytes_before)} -> "
            f"{format_bytes(self.bytes_after)}{share}, {self.bits:.2f} bits a weight, "
            f"error {self.error:.3g} ({self.metric})"
        )

    def __str__(self) -> str:
        return self.report

    def check(self, discovery: Discovery) -> None:
        """Raise ``StalePlanError``, saying what differs, unless every weight packed is there to be packed."""
        refused = {item.name: item.reason for item in discovery.refused}
        for choice in self.packed:
            weight = discovery.weight(choice.weight)
            if weight is None:
                why = refused.get(choice.weight)
                what = f"cannot be packed: {why}" if why is not None else "is not a weight of the model"
                raise StalePlanError(f"{choice.weight}, which the plan packs, {what}", hint=_REPLAN)
            for what, planned, found in (
                ("shape", choice.shape, weight.shape),
                ("dtype", choice.dtype, str(weight.dtype).removeprefix("torch.")),
                ("orientation", choice.orientation, weight.orientation),
                ("names", choice.names, weight.names),
            ):
                if planned != found:
                    raise StalePlanError(
                        f"{choice.weight} has {what} {found}, the plan was made for {planned}", hint=_REPLAN
                    )

    def without(self, names: Collection[str]) -> QuantizationPlan:
        """The same plan for the weights that are not among ``names``."""
        return replace(self, choices=tuple(c for c in self.choices if not {*c.names} & {*names}))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, versioned under ``"schema"``."""
        body = {key: value for key, value in encode(self).items() if key != "schema_version"}
        return {"schema": self.schema_version, **body}

    @classmethod
    def from_json(cls, data: Any) -> QuantizationPlan:
        """What ``to_json`` wrote; raises ``StalePlanError`` for another version or shape."""
        if not isinstance(data, Mapping) or "schema" not in data:
            raise StalePlanError(
                f"not a plan for weights: expected an object with schema {QUANTIZATION_VERSION!r}",
                hint=_REPLAN,
            )
        if data["schema"] != QUANTIZATION_VERSION:
            raise StalePlanError(
                f"the plan has schema {data['schema']!r}, this graphopt reads {QUANTIZATION_VERSION!r}",
                hint=_REPLAN,
            )
        body = {key: value for key, value in data.items() if key != "schema"}
        try:
            return decode(cls, body, where="plan")
        except RecordFormatError as error:
            raise StalePlanError(f"malformed plan: {error}", hint=_REPLAN) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; ``path`` holds all of it or what it held before."""
        write_atomically(path, json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> QuantizationPlan:
        """Read what ``save`` wrote; raises ``StalePlanError`` for anything else, ``OSError`` for no file."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise StalePlanError(f"{os.fspath(path)} is not JSON: {error}", hint=_REPLAN) from error
        try:
            return cls.from_json(data)
        except StalePlanError as error:
            raise StalePlanError(f"{os.fspath(path)}: {error.message}", hint=error.hint) from error
