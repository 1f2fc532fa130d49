"""Plan: the chosen schedules with the arithmetic that chose them; printed, stored, replayed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt.atomic import write_atomically
from graphopt.budget import format_bytes
from graphopt.chain_plan import Rerun
from graphopt.cost import Cost
from graphopt.duration import format_seconds
from graphopt.errors import StalePlanError, nearest
from graphopt.packing.plan import QuantizationPlan
from graphopt.record_json import RecordFormatError, decode, encode
from graphopt.schedule import Schedule

__all__ = ["PLAN_VERSION", "Choice", "Plan", "Recomputed", "SavedValue"]

PLAN_VERSION = "graphopt/plan@1"


@dataclass(frozen=True)
class Recomputed:
    """A forward node that runs again in the backward: bytes it yields, seconds it takes again."""

    node: str
    layer: str
    op: str
    bytes: int
    seconds: float


@dataclass(frozen=True)
class SavedValue:
    """A value handed from forward to backward: bytes of its storage."""

    node: str
    layer: str
    op: str
    bytes: int


@dataclass(frozen=True)
class Choice:
    """The schedule chosen for one joint program.

    ``fingerprint`` is the program's (``Program.fingerprint``), by which a stored plan knows the
    graph that it was made for. ``pass_id`` proposed the schedule, ``label`` is its own name for
    it. ``seconds`` is the predicted time that the schedule adds to the program. ``alternative`` is the id
    of the rewrite that the program was given, ``""`` without one. ``offloaded`` are values that wait in the
    host's memory for the backward.
    """

    program: str
    fingerprint: str
    pass_id: str
    label: str
    schedule: Schedule
    seconds: float
    recomputed: tuple[Recomputed, ...] = ()
    saved: tuple[SavedValue, ...] = ()
    alternative: str = ""
    offloaded: tuple[SavedValue, ...] = ()

    def __str__(self) -> str:
        kept = sum(value.bytes for value in self.saved)
        parts = [f"{self.program} [{self.fingerprint}] {self.pass_id}"]
        if self.label:
            parts.append(f"({self.label})")
        if self.alternative:
            parts.append(f"with {self.alternative}")
        text = " ".join(parts) + f": saves {count_text(len(self.saved), 'value')} ({format_bytes(kept)})"
        if self.recomputed:
            text += f", runs {count_text(len(self.recomputed), 'node')} again"
        if self.offloaded:
            moved = format_bytes(sum(value.bytes for value in self.offloaded))
            text += f", moves {count_text(len(self.offloaded), 'value')} ({moved}) to the host"
        return text + f", adds {format_seconds(self.seconds)}"


@dataclass(frozen=True)
class Plan:
    """The chosen schedule of every program of a model, and what they are predicted to cost.

    ``budget_bytes`` bounds the peak of the whole step (``None``: no bound). ``lower_bound`` is a
    proven lower bound, in seconds, on the predicted time of any plan within the budget;
    ``seconds_to_plan`` is how long choosing took. ``reruns`` are rows of the programs, counted as in
    ``choices``, that keep nothing of their forward but what enters them and run again. ``quantization`` says
    which weights of the model were packed for it, ``policy`` who chose in the planner's place (``""``: nobody
    did).
    """

    budget_bytes: int | None
    device: str
    emit: str
    baseline: Cost
    predicted: Cost
    lower_bound: float
    seconds_to_plan: float
    choices: tuple[Choice, ...] = ()
    reruns: tuple[Rerun, ...] = ()
    quantization: QuantizationPlan | None = None
    policy: str = ""

    @property
    def budget(self) -> int | None:
        """The bound on the peak in bytes, ``None`` without one."""
        return self.budget_bytes

    @property
    def gap(self) -> float:
        """How far the plan may be from the best: ``(predicted - lower_bound) / lower_bound``.

        Infinite where no positive bound was proven for a step that takes time; ``nan`` where the
        predicted time is not known.
        """
        if self.predicted.seconds is None:
            return math.nan
        excess = self.predicted.seconds - self.lower_bound
        if self.lower_bound > 0:
            return excess / self.lower_bound
        return math.inf if excess > 0 else 0.0

    def choice(self, program: str) -> Choice:
        """The choice for the program of that name; raises ``StalePlanError`` without one."""
        for choice in self.choices:
            if choice.program == program:
                return choice
        names = [choice.program for choice in self.choices]
        raise StalePlanError(
            f"the plan has no program {program!r}; it has {_listing(names)}",
            hint=_nearest_hint(program, names),
        )

    def check(self, fingerprints: Mapping[str, str]) -> None:
        """Raise ``StalePlanError`` unless the plan was made for exactly these programs.

        ``fingerprints`` maps the name of each captured program to its fingerprint.
        """
        names = [choice.program for choice in self.choices]
        for choice in self.choices:
            if choice.program not in fingerprints:
                raise StalePlanError(
                    f"the plan has program {choice.program!r}, which the captured model lacks: "
                    f"it has {_listing(fingerprints)}",
                    hint=_REPLAN,
                )
            found = fingerprints[choice.program]
            if found != choice.fingerprint:
                raise StalePlanError(
                    f"program {choice.program!r} has fingerprint {found}, the plan was made for "
                    f"{choice.fingerprint}: the model, its input shapes or its dtypes differ",
                    hint=_REPLAN,
                )
        for program in fingerprints:
            if program not in names:
                raise StalePlanError(
                    f"the captured model has program {program!r}, which the plan lacks: "
                    f"it has {_listing(names)}",
                    hint=_REPLAN,
                )

    def __str__(self) -> str:
        rows = [("", "peak", "weights", "seconds"), _cost_row("baseline", self.baseline)]
        rows.append(("budget", "none" if self.budget is None else format_bytes(self.budget), "", ""))
        rows.append(_cost_row("predicted", self.predicted))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [f"plan for {self.device}, emit {self.emit}, made in {format_seconds(self.seconds_to_plan)}"]
        for row in rows:
            cells = [row[0].ljust(widths[0])] + [row[i].rjust(widths[i]) for i in range(1, 4)]
            lines.append(("  " + "  ".join(cells)).rstrip())
        bound = f"no plan within the budget takes less than {format_seconds(self.lower_bound)}"
        lines.append(f"  {bound} ({gap_text(self.gap)})")
        lines += [f"  {choice}" for choice in self.choices]
        lines += [f"  {row}" for row in self.reruns]
        if self.policy:
            lines.append(f"  chosen by policy {self.policy}")
        if self.quantization is not None:
            lines.append(f"  {self.quantization.summary}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, versioned under ``"schema"``; ``gap`` is there for readers alone."""
        gap = self.gap if math.isfinite(self.gap) else None
        return {"schema": PLAN_VERSION, **encode(self), "gap": gap}

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """What ``to_json`` wrote; raises ``StalePlanError`` for another version or shape."""
        if not isinstance(data, Mapping) or "schema" not in data:
            raise StalePlanError(f"not a plan: expected an object with schema {PLAN_VERSION!r}", hint=_REPLAN)
        if data["schema"] != PLAN_VERSION:
            raise StalePlanError(
                f"the plan has schema {data['schema']!r}, this graphopt reads {PLAN_VERSION!r}", hint=_REPLAN
            )
        body = {key: value for key, value in data.items() if key not in ("schema", "gap")}
        # Plans stored before weights could be packed, or keys and values kept, do not say so.
        body.setdefault("quantization", None)
        for name in ("baseline", "predicted"):
            if isinstance(body.get(name), Mapping):
                body[name] = {"cache_bytes": 0, **body[name]}
        # Nor, before policies, who chose.
        body.setdefault("policy", "")
        try:
            return decode(cls, body, where="plan")
        except RecordFormatError as error:
            raise StalePlanError(f"malformed plan: {error}", hint=_REPLAN) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; ``path`` holds all of it or what it held before."""
        write_atomically(path, json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read what ``save`` wrote; raises ``StalePlanError`` for anything else, ``OSError`` for no file."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:  # malformed JSON or not UTF-8
            raise StalePlanError(f"{os.fspath(path)} is not JSON: {error}", hint=_REPLAN) from error
        try:
            return cls.from_json(data)
        except StalePlanError as error:
            raise StalePlanError(f"{os.fspath(path)}: {error.message}", hint=error.hint) from error


_REPLAN = "make the plan again with graphopt.plan(...)"


def gap_text(gap: float) -> str:
    """``0.012`` -> ``"gap 1.2 %"``."""
    if math.isnan(gap):
        return "gap not known: no predicted time"
    return f"gap {100 * gap:.1f} %" if math.isfinite(gap) else "no bound proven"


def _cost_row(name: str, cost: Cost) -> tuple[str, str, str, str]:
    return name, format_bytes(cost.peak_bytes), format_bytes(cost.weight_bytes), format_seconds(cost.seconds)


def count_text(count: int, noun: str) -> str:
    """``(2, "node")`` -> ``"2 nodes"``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _listing(names: Any) -> str:
    return ", ".join(map(str, names)) or "none"


def _nearest_hint(name: str, known: list[str]) -> str:
    close = nearest(name, known)
    return f"did you mean {close!r}?" if close else ""
