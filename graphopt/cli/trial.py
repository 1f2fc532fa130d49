"""Running a target with some of its rewrites alone, against the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graphopt.errors import BudgetError, VerificationError, brief

if TYPE_CHECKING:
    from graphopt.bisection import Outcome
    from graphopt.optimized import Optimized
    from graphopt.rewrites import Rewrite

__all__ = ["Ran", "Trial"]


@dataclass(frozen=True)
class Ran:
    """How a step fared, why it did not pass, and which rewrites were chosen (``None``: it did not come to
    that)."""

    outcome: Outcome
    why: str = ""
    chosen: frozenset[str] | None = None


@dataclass(frozen=True)
class Trial:
    """A target under the flags of a verb (``budget``, ``pipeline``, ``allow``, ``device``, ``emit``,
    ``loss``, ``infer``); ``rtol`` as ``verify_numerically`` takes it."""

    target: str
    options: dict[str, Any]
    rtol: float | None = None

    def rewrites(self) -> tuple[Rewrite, ...]:
        """What passes choose for the target, and kernels where there can be any; nothing is compiled."""
        from graphopt.api import dry_run
        from graphopt.cli.target import load_target, step_mode
        from graphopt.plugins import default_host
        from graphopt.rewrites import Rewrite, kernels_id

        with step_mode(self.options["infer"]):
            loaded = load_target(self.target)
            planned = dry_run(loaded.model, loaded.inputs, self._given(), "bisect")
        found = {rewrite.id: rewrite for rewrite in planned.report.rewrites}
        if planned.plan.emit != "eager":
            found |= {name: Rewrite(name) for name in map(kernels_id, default_host().replacements())}
        return tuple(found.values())

    def outcome(self, some: Sequence[str] | None) -> tuple[Outcome, str]:
        """How a step fares with these rewrites alone, and why it does not pass."""
        ran = self.run(some)
        return ran.outcome, ran.why

    def run(self, some: Sequence[str] | None) -> Ran:
        """A step with these rewrites alone, ``None`` for all; raises ``TargetError``."""
        from graphopt.cli.target import load_target, step_mode
        from graphopt.verify import verify_numerically

        with step_mode(self.options["infer"]):
            # Packed weights change the model in place: every run has its own.
            loaded = load_target(self.target)
            chosen: frozenset[str] | None = None
            try:
                optimized = self._optimized(loaded.model, loaded.inputs, some)
                chosen = frozenset(rewrite.id for rewrite in optimized.report.rewrites)
                verify_numerically(loaded.model, optimized, loaded.inputs, rtol=self.rtol)
            except BudgetError as error:
                return Ran("untested", error.message.partition(":")[0], chosen)
            except VerificationError as error:
                return Ran("fails", error.message, chosen)
            except Exception as error:
                return Ran("fails", brief(error), chosen)
        undone = [r for r in optimized.report.steps if r.status in ("rolled-back", "failed")]
        if undone:
            return Ran("fails", f"{undone[0].id} was rolled back: {undone[0].reason}", chosen)
        return Ran("passes", "", chosen)

    def _optimized(self, model: Any, inputs: Any, some: Sequence[str] | None) -> Optimized:
        from graphopt.api import optimize

        return optimize(model, inputs, rewrites=some, cache=False, **self._given())

    def _given(self) -> dict[str, Any]:
        from graphopt.cli.target import load_loss

        given = {name: value for name, value in self.options.items() if name not in ("infer", "loss")}
        return {**given, "loss_fn": load_loss(self.options["loss"])}
