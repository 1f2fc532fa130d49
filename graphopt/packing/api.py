"""``quantize``: weights in fewer bytes, by bounds or by a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from graphopt import _torch
from graphopt.api import cost_model_for
from graphopt.budget import weight_bound
from graphopt.capture.inputs import bind_inputs
from graphopt.errors import BudgetSyntaxError, InputsError
from graphopt.packing.allocate import Allocation, chosen_schemes, default_score, pack_by_plan
from graphopt.packing.calibration import Calibration
from graphopt.packing.discover import Discovery, weights_of
from graphopt.packing.plan import QuantizationPlan
from graphopt.packing.scheme import Scheme
from graphopt.packing.table import WeightFrontier
from graphopt.packing.trace import captured_programs
from graphopt.plugins.host import PluginHost, default_host

__all__ = ["discovered", "quantize", "weight_frontier"]


def quantize(
    model: nn.Module,
    inputs: Any,
    *,
    weights: int | str | None = None,
    bits: float | None = None,
    schemes: Sequence[str | Scheme] | None = None,
    calibration: Calibration | None = None,
    score: str | None = None,
    plan: QuantizationPlan | None = None,
    error: float | None = None,
    seconds: float | None = None,
    device: str | torch.device | None = None,
    plugins: Sequence[object] = (),
    dry_run: bool = False,
) -> QuantizationPlan:
    """Pack weights of ``model`` in place, and say which one how.

    ``inputs`` as for ``optimize``: example inputs, by which the weights are found, whatever modules hold
    them. ``weights`` bounds the bytes of all parameters and buffers: an int, ``"8GiB"``, or ``"40%"`` of what
    they take now; ``bits`` those that a weight is stored in on average, with scales and zeros; ``error`` the
    sum of errors; ``seconds`` those predicted for all reads of weights in one step on ``device``. The error
    is least within ``weights`` and ``bits``; with ``error`` alone bytes are; without bounds every weight that
    a scheme takes gets the one of least error. ``schemes``: those to choose among, as they
    are spelled (``"int4{group=64}"``), by default all that plugins register. ``score`` names what the error
    is (``weights``, ``outputs``, ``fisher``, ...: docs/quantization.md); it is ``"kl"`` where ``calibration``
    observed ``divergence``, else ``"outputs"``, and ``"weights"`` without. ``plan`` packs as a stored
    plan says. ``dry_run``: change nothing.

    In training mode parameters that require gradients are left alone.

    Raises ``BudgetError`` where nothing is within the bounds, ``BudgetSyntaxError``, ``InputsError``,
    ``CaptureError``, ``UnknownNameError`` (scheme, scorer, device), ``StalePlanError`` for a plan of another
    model and ``QuantizationError`` for a model without weights to pack.
    """
    host = PluginHost(tuple(plugins)) if plugins else default_host()
    known: tuple[Scheme, ...] = ()
    if plan is not None:
        given = {
            "weights": weights,
            "bits": bits,
            "schemes": schemes,
            "error": error,
            "score": score,
            "seconds": seconds,
        }
        for name, value in given.items():
            if value is not None:
                raise InputsError(f"quantize() got plan= and {name}=: a plan says that already")
        plan.check(discovered(model, inputs))
    else:
        bound = None
        if weights is not None:
            held = _torch.storage_bytes([*model.parameters(), *model.buffers()])
            bound = weight_bound(weights, held)
        if bits is not None and not (math.isfinite(bits) and bits > 0):
            raise BudgetSyntaxError(f"bits={bits}: expected a finite number above 0")
        allocation = _allocation(model, inputs, schemes, calibration, score, device, host)
        if bits is not None:
            within = allocation.table.bytes_at(bits)
            bound = within if bound is None else min(bound, within)
        plan = allocation.plan(bound, error, seconds)
        known = allocation.schemes
    if not dry_run:
        pack_by_plan(model, plan, calibration, host, known)
    return plan


def weight_frontier(
    model: nn.Module,
    inputs: Any,
    *,
    schemes: Sequence[str | Scheme] | None = None,
    calibration: Calibration | None = None,
    score: str | None = None,
    device: str | torch.device | None = None,
    plugins: Sequence[object] = (),
) -> WeightFrontier:
    """Bytes of all parameters and buffers against the error of weights, over what ``quantize`` would choose.

    Arguments and errors as for ``quantize``; the model is left as it is.
    """
    host = PluginHost(tuple(plugins)) if plugins else default_host()
    return _allocation(model, inputs, schemes, calibration, score, device, host).table.frontier()


def _allocation(
    model: nn.Module,
    inputs: Any,
    schemes: Sequence[str | Scheme] | None,
    calibration: Calibration | None,
    score: str | None,
    device: str | torch.device | None,
    host: PluginHost,
) -> Allocation:
    chosen = chosen_schemes(schemes, host)
    name = score or default_score(calibration)
    host.scorer(name)
    cost = cost_model_for(model, device, host)
    return Allocation.of(model, discovered(model, inputs), chosen, name, calibration, cost, host)


def discovered(model: nn.Module, inputs: Any) -> Discovery:
    """The weights of ``model`` that its programs on ``inputs`` read as such, and the parameters that are
    none.

    Raises ``InputsError``, ``CaptureError``, and ``QuantizationError`` where there are no weights.
    """
    args, kwargs = bind_inputs(model, inputs)
    training = model.training and torch.is_grad_enabled()
    return weights_of(model, captured_programs(model, args, kwargs), training=training)
