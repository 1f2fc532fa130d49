"""Running a target with some of its rewrites alone, against the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graphopt.errors import BudgetError, TargetError, VerificationError, brief

if TYPE_CHECKING:
    from graphopt.bisection import Outcome
    from graphopt.optimized import Optimized
    from graphopt.rewrites import Rewrite

__all__ = ["Trial"]


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
        from graphopt.cli.target import load_target, step_mode
        from graphopt.verify import verify_numerically

        with step_mode(self.options["infer"]):
            # Packed weights change the model in place: every run has its own.
            loaded = load_target(self.target)
            try:
                optimized = self._optimized(loaded.model, loaded.inputs, some)
                verify_numerically(loaded.model, optimized, loaded.inputs, rtol=self.rtol)
            except BudgetError as error:
                return "untested", error.message.partition(":")[0]
            except TargetError:
                raise
            except VerificationError as error:
                return "fails", error.message
            except Exception as error:
                return "fails", brief(error)
        undone = [r for r in optimized.report.steps if r.status in ("rolled-back", "failed")]
        if undone:
            return "fails", f"{undone[0].id} was rolled back: {undone[0].reason}"
        return "passes", ""

    def _optimized(self, model: Any, inputs: Any, some: Sequence[str] | None) -> Optimized:
        from graphopt.api import optimize

        return optimize(model, inputs, rewrites=some, cache=False, **self._given())

    def _given(self) -> dict[str, Any]:
        from graphopt.cli.target import load_loss

        given = {name: value for name, value in self.options.items() if name not in ("infer", "loss")}
        return {**given, "loss_fn": load_loss(self.options["loss"])}
