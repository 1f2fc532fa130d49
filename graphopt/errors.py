"""Typed errors: each names the culprit, what was expected and the nearest valid choice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

__all__ = [
    "ArtefactError",
    "BudgetError",
    "BudgetSyntaxError",
    "CaptureError",
    "CheckpointError",
    "DumpError",
    "EmitError",
    "GraphoptError",
    "InputsError",
    "LoweringError",
    "PassError",
    "PipelineError",
    "PluginError",
    "QuantizationError",
    "StalePlanError",
    "StaleReportError",
    "TargetError",
    "UnevenRanksError",
    "UnknownNameError",
    "VerificationError",
    "brief",
    "nearest",
]


def brief(error: BaseException) -> str:
    """Type and first line of an error, for a sentence that names it."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to ``name``, or ``None`` where nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return close[0] if close else None


class GraphoptError(Exception):
    """Base of every error that graphopt raises on purpose.

    ``code`` is stable and greppable; ``hint`` says what to do next, or is empty.
    """

    code: ClassVar[str] = "error"

    def __init__(self, message: str, *, hint: str = "") -> None:
        self.message = message
        self.hint = hint
        super().__init__(f"{message}\n  hint: {hint}" if hint else message)


class ArtefactError(GraphoptError, ValueError):
    """A saved module that cannot be written, or not be loaded here: damaged, foreign, of another device or
    version, or calling what it may not."""

    code = "artefact"


class BudgetSyntaxError(GraphoptError, ValueError):
    """A budget that does not parse, such as ``"8 gigs"``."""

    code = "budget-syntax"


class BudgetError(GraphoptError):
    """No allowed plan fits the budget; ``least_bytes`` is the least peak that would."""

    code = "budget"

    def __init__(self, message: str, *, least_bytes: int, budget_bytes: int, hint: str = "") -> None:
        self.least_bytes = least_bytes
        self.budget_bytes = budget_bytes
        super().__init__(message, hint=hint)


class InputsError(GraphoptError, TypeError):
    """Example inputs that do not fit the model's call signature."""

    code = "inputs"


class CaptureError(GraphoptError):
    """A model that could not be captured (raised with ``on_error="raise"`` only)."""

    code = "capture"


class CheckpointError(GraphoptError, ValueError):
    """A file of weights that cannot be read, or that does not fit the model."""

    code = "checkpoint"


class HostMemoryError(GraphoptError):
    """The host has not the memory that a plan would move values to."""


class DumpError(GraphoptError):
    """A program that cannot be written in the form that was asked for, or not without a package."""

    code = "dump"


class EmitError(GraphoptError):
    """A program that cannot be written out to run without graphopt."""

    code = "emit"


class LoweringError(GraphoptError):
    """Generated code that cannot be read, or that does not fit its graph."""

    code = "lowering"


class PassError(GraphoptError):
    """A pass that raised, proposed nonsense or could not be applied."""

    code = "pass"


class PipelineError(GraphoptError, ValueError):
    """A pipeline whose order cannot be satisfied, or a malformed description of one."""

    code = "pipeline"


class PluginError(GraphoptError):
    """A plugin that could not be loaded or returned what the hook does not allow."""

    code = "plugin"


class QuantizationError(GraphoptError, ValueError):
    """A weight that a scheme cannot keep, or a scheme with options that it cannot hold."""

    code = "quantization"


class RuleError(PassError):
    """A rewrite rule whose pattern, guard or replacement is not what a rule needs."""

    code = "rule"


class StalePlanError(GraphoptError):
    """A stored plan that was made for another graph, version or device."""

    code = "stale-plan"


class StaleReportError(GraphoptError):
    """A stored report of another version, or a file that holds no report."""

    code = "stale-report"


class TargetError(GraphoptError):
    """A command-line target that names no model."""

    code = "target"


class UnevenRanksError(GraphoptError):
    """Processes that share a model do not agree: their options, inputs, programs or plans differ, one failed,
    or one did not answer in time. Raised on each of them."""

    code = "uneven-ranks"


class VerificationError(GraphoptError):
    """A rewritten program that failed a structural or numerical check."""

    code = "verify"


class UnknownNameError(GraphoptError, LookupError):
    """A name that nothing is registered under; the message gives the nearest known one.

    ``note`` adds to the hint, such as which plugin failed to load.
    """

    code = "unknown-name"

    def __init__(self, kind: str, name: str, known: Iterable[str], *, note: str = "") -> None:
        self.kind, self.name, self.known = kind, name, tuple(sorted(known))
        close = nearest(name, self.known)
        listing = ", ".join(self.known) or "none"
        super().__init__(
            f"unknown {kind} {name!r}" + (f"; did you mean {close!r}?" if close else ""),
            hint=f"known: {listing}" + (f"; {note}" if note else ""),
        )
