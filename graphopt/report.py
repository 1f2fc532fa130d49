"""Report: what a step was predicted to take and took, what was changed for it, and why not more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from graphopt.budget import format_bytes
from graphopt.candidate import Declined, NearMiss
from graphopt.cost import Cost
from graphopt.decoding.record import DecodingRecord
from graphopt.errors import StaleReportError
from graphopt.group_record import GroupRecord
from graphopt.packing.plan import QuantizationPlan
from graphopt.plans import Plan
from graphopt.plugins.records import PluginRecord
from graphopt.record_json import RecordFormatError, decode, encode
from graphopt.rewrites import Rewrite

__all__ = [
    "REPORT_VERSION",
    "CaptureRecord",
    "Environment",
    "PassRecord",
    "PassStatus",
    "ProgramSummary",
    "Report",
]

REPORT_VERSION = "graphopt/report@1"

PassStatus = Literal["applied", "no-op", "skipped", "rolled-back", "failed", "disabled"]


@dataclass(frozen=True)
class Environment:
    """What ran: versions, and the name of the device that costs were predicted for."""

    torch: str
    python: str
    graphopt: str
    device: str


@dataclass(frozen=True)
class ProgramSummary:
    """One program of the model: ``mode`` is ``"train"`` or ``"infer"``, sizes are in nodes.

    A level that the program did not pass through has no nodes. ``inputs`` are the types that it was
    captured for, ``f32[s77=64,16]``: a size with a name may be another when it is called.
    """

    name: str
    mode: str
    nodes_semantic: int = 0
    nodes_joint: int = 0
    nodes_forward: int = 0
    nodes_backward: int = 0
    inputs: str = ""


@dataclass(frozen=True)
class CaptureRecord:
    """A plugin that captured the model, or was asked to: ``programs`` are the names of those that are made of
    its capture, ``reason`` says why it was not used."""

    plugin: str
    distribution: str
    programs: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class PassRecord:
    """One run of one pass: ``reason`` says why it did what ``status`` tells, ``options`` how it was set.

    ``id`` is the pass's in its pipeline, ``plugin`` who provides it, ``seconds`` how long it ran.
    """

    id: str
    plugin: str
    status: PassStatus
    reason: str = ""
    options: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """Predicted and measured cost of one training or inference step, change by change.

    ``baseline`` is the step without rewrites, ``predicted`` with them (both ``None`` for a model that
    could not be captured: it runs as it did, ``diagnostics`` say why), ``measured`` what running it
    showed (``None`` before it was measured). ``budget`` is the bound on the peak in bytes.
    ``programs`` are those of the step that was captured last, which costs and plan are of; ``earlier``
    those captured for other inputs or another mode, each with a plan of its own. ``captures`` says which
    plugins captured the model, and which were not used and why; what it does not name graphopt captured.
    ``declined`` are rewrites that were offered and not chosen, ``near_misses`` places where a rule
    matched and its guard said no; ``str()`` shows a few of each. ``groups`` are groups of operators that a
    kernel was predicted for, kept or not. ``quantization`` says which weights are packed, and how far off
    they are. ``decoding`` says what is kept from token to token where the model was optimized to generate;
    costs are then of one token, its peak that of the largest part of a prompt. ``rewrites`` are those that
    were chosen, by the names that ``optimize(rewrites=...)`` takes. ``print(report)`` shows a table;
    ``to_json`` and ``from_json`` keep all of it.
    """

    environment: Environment
    baseline: Cost | None
    predicted: Cost | None
    budget: int | None = None
    measured: Cost | None = None
    plan: Plan | None = None
    plugins: tuple[PluginRecord, ...] = ()
    programs: tuple[ProgramSummary, ...] = ()
    steps: tuple[PassRecord, ...] = ()
    diagnostics: tuple[str, ...] = ()
    declined: tuple[Declined, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()
    earlier: tuple[ProgramSummary, ...] = ()
    groups: tuple[GroupRecord, ...] = ()
    quantization: QuantizationPlan | None = None
    decoding: DecodingRecord | None = None
    rewrites: tuple[Rewrite, ...] = ()
    captures: tuple[CaptureRecord, ...] = ()
    schema_version: str = field(default=REPORT_VERSION, init=False)

    def with_measured(self, measured: Cost) -> Report:
        """This report with what a run of the step showed, and a note where that is above the budget."""
        notes = self.diagnostics
        if self.budget is not None and measured.peak_bytes > self.budget:
            over = measured.peak_bytes - self.budget
            notes += (
                f"the measured peak of {format_bytes(measured.peak_bytes)} exceeds the budget of "
                f"{format_bytes(self.budget)} by {format_bytes(over)} ({100 * over / self.budget:.1f} %)",
            )
        return replace(self, measured=measured, diagnostics=notes)

    @property
    def peak_error(self) -> int | None:
        """Measured peak less the predicted one in bytes; ``None`` before it was measured."""
        if self.measured is None or self.predicted is None:
            return None
        return self.measured.peak_bytes - self.predicted.peak_bytes

    def __str__(self) -> str:
        from graphopt.report_table import report_text

        return report_text(self)

    def _repr_html_(self) -> str:
        from graphopt.report_html import report_html

        return report_html(self)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, versioned under ``"schema"``; a stored plan is under ``"plan"``."""
        body = encode(replace(self, plan=None))
        return {"schema": self.schema_version, **body, "plan": self.plan.to_json() if self.plan else None}

    @classmethod
    def from_json(cls, data: Any) -> Report:
        """What ``to_json`` wrote. Raises ``StaleReportError`` for another version or shape, and
        ``StalePlanError`` for a plan in it of another version or shape."""
        if not isinstance(data, Mapping) or "schema" not in data:
            raise StaleReportError(f"not a report: expected an object with schema {REPORT_VERSION!r}")
        if data["schema"] != REPORT_VERSION:
            raise StaleReportError(
                f"the report has schema {data['schema']!r}, this graphopt reads {REPORT_VERSION!r}"
            )
        plan = Plan.from_json(data["plan"]) if data.get("plan") is not None else None
        body = {key: value for key, value in data.items() if key != "schema"}
        # Reports stored before weights could be packed, keys and values kept, rewrites had names, or plugins
        # could capture, do not say so.
        body.setdefault("quantization", None)
        body.setdefault("decoding", None)
        body.setdefault("rewrites", [])
        body.setdefault("captures", [])
        if isinstance(body["decoding"], Mapping):
            # Nor, before these could be, whether weights lie side by side, attentions share, stores round and
            # recurrences keep states.
            before: dict[str, Any] = {"beside": 0, "sharing": None, "lossy": None, "states": []}
            body["decoding"] = {**before, **body["decoding"]}
        for name in ("baseline", "predicted", "measured"):
            if isinstance(body.get(name), Mapping):
                body[name] = {"cache_bytes": 0, **body[name]}
        if isinstance(body.get("plugins"), (list, tuple)):
            # Nor, before plugins were timed, what of them took long.
            body["plugins"] = [
                {"slow": [], **row} if isinstance(row, Mapping) else row for row in body["plugins"]
            ]
        try:
            return replace(decode(cls, {**body, "plan": None}, where="report"), plan=plan)
        except RecordFormatError as error:
            raise StaleReportError(f"malformed report: {error}") from error
