"""From bounds to a plan: which scheme each weight gets, and packing by it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from graphopt.budget import bound_text, format_bytes
from graphopt.cost import CostModel
from graphopt.errors import BudgetError, QuantizationError
from graphopt.packing.calibration import Calibration
from graphopt.packing.convert import Orientation, pack_weights
from graphopt.packing.discover import Discovery
from graphopt.packing.plan import QuantizationPlan, RefusedWeight, WeightChoice
from graphopt.packing.scheme import Scheme, scheme_text
from graphopt.packing.table import Table, make_table
from graphopt.plugins.host import PluginHost
from graphopt.plugins.records import ScorerSpec

__all__ = ["Allocation", "chosen_schemes", "default_score", "observers_for", "pack_by_plan"]

_PROBED = 64
"""Inputs of the weight that schemes are asked about."""


def chosen_schemes(schemes: Sequence[str | Scheme] | None, host: PluginHost) -> tuple[Scheme, ...]:
    """Schemes as they are spelled or given; ``None``: all that plugins register and that need no options.

    Raises as ``PluginHost.scheme`` does, and ``QuantizationError`` for none at all.
    """
    if schemes is None:
        found = []
        for name in sorted(host.schemes()):
            try:
                found.append(host.scheme(name))
            except QuantizationError:
                continue  # It needs an option, which nobody gave.
    else:
        if isinstance(schemes, str):
            raise QuantizationError(
                f"schemes is the text {schemes!r}: expected several", hint=f"write ({schemes!r},)"
            )
        found = [scheme if isinstance(scheme, Scheme) else host.scheme(scheme) for scheme in schemes]
    if not found:
        raise QuantizationError("there is no scheme to pack weights with")
    return tuple(dict.fromkeys(found))


def default_score(calibration: Calibration | None) -> str:
    """What the error of a weight is where nobody says: the best that is known of it (measured by
    benchmarks/quality_packed.py)."""
    if calibration is None:
        return "weights"
    return "kl" if "divergence" in calibration.observers else "outputs"


def observers_for(schemes: Sequence[Scheme], scorer: ScorerSpec | None) -> tuple[str, ...]:
    """What ``calibrate`` has to observe for these schemes and this scorer."""
    ones = torch.ones(_PROBED)
    plain = {"largest": ones, "second-moment": ones, "tokens": torch.tensor(_PROBED)}
    pairs = any(scheme.lacks(_PROBED, plain) is not None for scheme in schemes)
    wanted = ["moments", *(("gram",) if pairs else ()), *(() if scorer is None else scorer.needs)]
    return tuple(dict.fromkeys(wanted))


@dataclass(frozen=True)
class Allocation:
    """The weights of a model, what each could be kept as, and the plan that bounds ask for."""

    discovery: Discovery
    table: Table
    schemes: tuple[Scheme, ...]
    score: str

    @classmethod
    def of(
        cls,
        model: nn.Module,
        discovery: Discovery,
        schemes: Sequence[Scheme],
        score: str,
        calibration: Calibration | None,
        cost: CostModel,
        host: PluginHost,
    ) -> Allocation:
        scorer = host.scorer(score)
        table = make_table(model, discovery, schemes, scorer, calibration, cost)
        return cls(discovery, table, tuple(schemes), score)

    def plan(
        self, bytes: int | None = None, error: float | None = None, seconds: float | None = None
    ) -> QuantizationPlan:
        """Least error within ``bytes`` of all tensors and ``seconds`` of reads; fewest bytes within ``error``
        where that is given without ``bytes``; without bounds every weight is packed.

        Raises ``BudgetError`` where nothing is within the bounds.
        """
        table = self.table
        if bytes is not None or (error is None and seconds is not None):
            found = table.cheapest_error(bytes, seconds)
            if found is None:
                raise self._infeasible(bytes, seconds)
            picked, bound = found.picked, found.bound
        elif error is not None:
            found = table.fewest_bytes(error, seconds)
            if found is None:
                raise self._infeasible(None, seconds)
            picked, bound = found.picked, found.bound
        else:
            picked = table.packed()
            bound = math.fsum(g.options[j].error for g, j in zip(table.groups, picked, strict=True))
        plan = self._plan(picked, bound, bytes, error, seconds)
        if error is not None and plan.error > error:
            raise BudgetError(
                f"within {format_bytes(bytes or 0)} the least error of weights is {plan.error:.3g}, more "
                f"than {error:.3g} ({plan.metric})",
                least_bytes=self.table.least_bytes,
                budget_bytes=bytes or 0,
            )
        return plan

    def _plan(
        self,
        picked: Sequence[int],
        bound: float,
        bytes: int | None,
        error: float | None,
        seconds: float | None,
    ) -> QuantizationPlan:
        choices = {}
        for group, number in zip(self.table.groups, picked, strict=True):
            option = group.options[number]
            for weight, off in zip(group.weights, option.errors, strict=True):
                after = weight.dense_bytes
                if option.scheme is not None:
                    after = option.scheme.stored_bytes(weight.n, weight.k, weight.dtype)
                choices[weight.name] = WeightChoice(
                    weight.name,
                    weight.names,
                    weight.orientation,
                    weight.shape,
                    str(weight.dtype).removeprefix("torch."),
                    "" if option.scheme is None else scheme_text(option.scheme),
                    weight.dense_bytes,
                    after,
                    off,
                )
        chosen = [g.options[j] for g, j in zip(self.table.groups, picked, strict=True)]
        return QuantizationPlan(
            tuple(choices[weight.name] for weight in self.discovery.weights),
            tuple(RefusedWeight(item.name, str(item.reason)) for item in self.discovery.refused),
            tuple(map(scheme_text, self.schemes)),
            self.score,
            self.table.metric,
            self.table.dense_bytes,
            self.table.other_bytes + sum(option.bytes for option in chosen),
            math.fsum(option.error for option in chosen),
            bound,
            math.fsum(group.options[0].seconds for group in self.table.groups),
            math.fsum(option.seconds for option in chosen),
            bytes,
            error,
            seconds,
        )

    def _infeasible(self, bytes: int | None, seconds: float | None) -> BudgetError:
        least = self.table.least_bytes
        names = ", ".join(map(scheme_text, self.schemes))
        what = bound_text(bytes, seconds)
        refused = "; ".join(f"{item.name}: {item.reason}" for item in self.discovery.refused[:3])
        return BudgetError(
            f"no allocation of {names} is within {what}: the least that weights can take is "
            f"{format_bytes(least)} ({least} bytes)",
            least_bytes=least,
            budget_bytes=bytes or 0,
            hint=f"not packed: {refused}" if refused else "",
        )


def pack_by_plan(
    model: nn.Module,
    plan: QuantizationPlan,
    calibration: Calibration | None,
    host: PluginHost,
    schemes: Sequence[Scheme] = (),
) -> None:
    """Pack the weights of ``model`` as ``plan`` says, in place, one after the other. ``schemes``: those that
    it was made with, which need not be registered.

    Raises as ``pack_weights`` and ``PluginHost.scheme`` do, before anything changes.
    """
    parameters = dict(model.named_parameters())
    given = {scheme_text(scheme): scheme for scheme in schemes}
    chosen: dict[str, tuple[Scheme, Orientation]] = {
        choice.weight: (given.get(choice.scheme) or host.scheme(choice.scheme), choice.orientation)
        for choice in plan.packed
    }
    statistics = {
        name: {key: value.to(parameters[name].device) for key, value in calibration.for_packing(name).items()}
        for name in (chosen if calibration is not None else ())
        if calibration is not None and name in parameters
    }
    pack_weights(model, chosen, statistics)
