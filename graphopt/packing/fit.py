"""Packs weights where a step does not fit as it is: no more than the budget asks for, tried before done.

::

    capture, plan ── fits ─────────────────────────────▶ run
        │ does not fit, by so many bytes
        ▼
    allocate: least error within what the budget leaves for weights
        │
        ▼
    a copy of the model that shares its tensors: pack, capture, plan ── does not fit: as many bytes fewer
        │ fits
        ▼
    the packed weights move into the model, whose dense ones are freed
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphopt import _torch
from graphopt.budget import Budget, format_bytes, weight_bound
from graphopt.conversion import Conversion, conversion_among
from graphopt.cost import Cost
from graphopt.errors import BudgetError, CaptureError, QuantizationError, StalePlanError, brief
from graphopt.packing.allocate import Allocation, chosen_schemes, default_score, pack_by_plan
from graphopt.packing.convert import converted, install_packed, packed_weights
from graphopt.packing.discover import Discovery, weights_of
from graphopt.packing.plan import QuantizationPlan
from graphopt.packing.scheme import scheme_text
from graphopt.packing.table import refusal
from graphopt.packing.trace import captured_programs
from graphopt.session import Session
from graphopt.step_cost import last_baseline

__all__ = ["Fitted", "WeightFit", "sharing"]

_TRIALS = 6
"""Captures of packed copies before giving up: each is off by what the one before was too large."""


@dataclass(frozen=True)
class Fitted:
    """The model to capture, the session to do it in."""

    model: nn.Module
    session: Session


@dataclass
class WeightFit:
    """What to do about ``model`` where it does not fit under ``session``'s budget.

    ``make(model, budget)`` gives a fresh session with the same options; ``attempt(model, budget, args,
    kwargs)`` captures and plans a copy, and raises ``BudgetError`` where it does not fit. With ``dry_run``
    the model is left as it is, and the copy is what is captured.
    """

    model: nn.Module
    session: Session
    make: Callable[[nn.Module, Budget], Session]
    attempt: Callable[[nn.Module, Budget, tuple[Any, ...], dict[str, Any]], Session]
    dry_run: bool = False

    @property
    def conversion(self) -> Conversion | None:
        """The pass that packs weights, where it is in the pipeline and allowed."""
        found = conversion_among(self.session.passes)
        return found if found is not None and found.name in self.session.allow else None

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Fitted | None:
        """Meet what is asked of weights alone, or what a plan that is replayed says of them, before anything
        is captured; ``None`` where nothing has to be done.

        Raises ``BudgetError`` where weights cannot be kept within their bound.
        """
        replayed = self.session.replay.quantization if self.session.replay is not None else None
        if replayed is not None:
            return self._replay(replayed, args, kwargs)
        asked = self.session.budget.weights
        if asked is None or self.session.replay is not None:
            return None
        held = self._weight_bytes()
        bound = weight_bound(asked, held)
        if held <= bound:
            return None
        if self.conversion is None:
            raise self._unmet(held, bound, args, kwargs)
        # A share is one of the model as it is.
        baseline = last_baseline(self.attempt(self.model, Budget(), args, kwargs))
        memory = self.session.budget.resolve(baseline.peak_bytes)
        return self._pack(held - bound, memory, bound, baseline, args, kwargs)

    def after(self, error: BudgetError, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Fitted:
        """A step of the model as it is does not fit: ``error`` says how many bytes are missing.

        Raises ``BudgetError`` where packed weights do not make it fit, or may not be made.
        """
        missing = error.least_bytes - error.budget_bytes
        if self.conversion is None:
            raise self._advised(error, missing, args, kwargs)
        try:
            baseline = last_baseline(self.session)
            return self._pack(missing, error.budget_bytes, None, baseline, args, kwargs)
        except QuantizationError as nothing:
            why = f"{nothing.message}; {nothing.hint}" if nothing.hint else nothing.message
            raise BudgetError(
                error.message,
                least_bytes=error.least_bytes,
                budget_bytes=error.budget_bytes,
                hint=f"{error.hint}; pass {self.conversion.name!r} is allowed, but {why}",
            ) from None

    def _pack(
        self,
        missing: int,
        memory: int | None,
        bound: int | None,
        baseline: Cost,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Fitted:
        """Pack so that the model takes ``missing`` bytes fewer, and then some until its step fits."""
        conversion = self.conversion
        assert conversion is not None
        allocation = self._allocation(conversion, args, kwargs)
        table = allocation.table
        budget = Budget(memory)
        if bound is not None and bound < table.least_bytes:
            raise self._unreached(allocation, bound)
        target = table.dense_bytes - missing
        for trial in range(_TRIALS):
            # What schemes take beside weights is not known before: the last trial is the least of weights.
            target = table.least_bytes if trial == _TRIALS - 1 else max(target, table.least_bytes)
            plan = allocation.plan(bytes=target)
            copied = sharing(self.model)
            pack_by_plan(copied, plan, conversion.wanted_calibration(), self.session.host)
            try:
                self.attempt(copied, budget, args, kwargs)
            except BudgetError as error:
                if target == table.least_bytes:
                    raise self._exhausted(allocation, error) from None
                target = plan.bytes_after - (error.least_bytes - error.budget_bytes)
                continue
            return self._installed(copied, plan, budget, baseline)
        raise AssertionError("the last trial fits or raises")

    def _installed(self, copied: nn.Module, plan: QuantizationPlan, budget: Budget, baseline: Cost) -> Fitted:
        model = copied
        if not self.dry_run:
            install_packed(self.model, packed_by(copied, plan))
            model = self.model
        session = self.make(model, budget)
        session.quantization, session.dense_baseline = plan, baseline
        return Fitted(model, session)

    def _replay(self, plan: QuantizationPlan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Fitted | None:
        """Pack as a plan says, but for what is packed that way already."""
        done = {name: scheme_text(packed.scheme) for name, _, _, packed in converted(self.model)}
        for choice in plan.packed:
            if choice.weight in done and done[choice.weight] != choice.scheme:
                raise StalePlanError(
                    f"{choice.weight} is packed as {done[choice.weight]}, the plan has {choice.scheme}"
                )
        rest = plan.without(done)
        model = self.model
        if rest.packed:
            discovery = self._discovery(args, kwargs)
            rest.check(discovery)
            model = sharing(self.model) if self.dry_run else self.model
            conversion = conversion_among(self.session.passes)
            calibration = conversion.wanted_calibration() if conversion is not None else None
            pack_by_plan(model, rest, calibration, self.session.host)
        session = self.make(model, self.session.budget)
        session.quantization = plan
        return Fitted(model, session)

    def _allocation(
        self, conversion: Conversion, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Allocation:
        discovery = self._discovery(args, kwargs)
        calibration = conversion.wanted_calibration()
        score = conversion.wanted_score() or default_score(calibration)
        schemes = chosen_schemes(conversion.wanted_schemes(), self.session.host)
        host = self.session.host
        return Allocation.of(self.model, discovery, schemes, score, calibration, self.session.cost, host)

    def _discovery(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Discovery:
        programs = captured_programs(self.model, args, kwargs)
        training = self.model.training and torch.is_grad_enabled()
        return weights_of(self.model, programs, training=training)

    def _weight_bytes(self) -> int:
        return _torch.storage_bytes([*self.model.parameters(), *self.model.buffers()])

    def _savings(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, int] | None:
        """A pass that is not allowed, and the bytes that it could take off weights, by the schemes' own
        word."""
        conversion = conversion_among(self.session.passes)
        if conversion is None:
            return None
        try:
            discovery = self._discovery(args, kwargs)
            schemes = chosen_schemes(conversion.wanted_schemes(), self.session.host)
            calibration = conversion.wanted_calibration()
        except (CaptureError, QuantizationError):
            # The error that this would advise on is raised either way, with its own reason.
            return None
        device = next(self.model.parameters()).device
        saved = 0

        def known(name: str) -> dict[str, torch.Tensor]:
            return {} if calibration is None else calibration.for_packing(name)

        for weights in discovery.groups():
            sizes = [
                sum(scheme.stored_bytes(w.n, w.k, w.dtype) for w in weights)
                for scheme in schemes
                if all(refusal(scheme, w, device, known(w.name)) is None for w in weights)
            ]
            dense = sum(w.dense_bytes for w in weights)
            saved += max(0, dense - min(sizes, default=dense))
        return (conversion.name, saved) if saved else None

    def _advised(
        self, error: BudgetError, missing: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BudgetError:
        """``error``, and whether packed weights would do where they are not allowed."""
        found = self._savings(args, kwargs)
        if found is None or found[1] < missing:
            return error
        return BudgetError(
            error.message,
            least_bytes=error.least_bytes,
            budget_bytes=error.budget_bytes,
            hint=f"{error.hint}; {_advice(*found)}" if error.hint else _advice(*found),
        )

    def _unmet(self, held: int, bound: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BudgetError:
        found = self._savings(args, kwargs)
        enough = found is not None and held - found[1] <= bound
        return BudgetError(
            f"parameters and buffers take {format_bytes(held)} ({held} bytes), more than the "
            f"{format_bytes(bound)} that the budget has for weights",
            least_bytes=held,
            budget_bytes=bound,
            hint=_advice(*found) if found is not None and enough else f"ask for weights={held} or more",
        )

    def _unreached(self, allocation: Allocation, bound: int) -> BudgetError:
        least = allocation.table.least_bytes
        names = ", ".join(map(scheme_text, allocation.schemes))
        return BudgetError(
            f"the budget has {format_bytes(bound)} for weights: packed as {names} they take "
            f"{format_bytes(least)} ({least} bytes) at least",
            least_bytes=least,
            budget_bytes=bound,
            hint=f"ask for weights={least} or more, or allow schemes of fewer bits",
        )

    def _exhausted(self, allocation: Allocation, last: BudgetError) -> BudgetError:
        """Not even with all weights packed as far as can be."""
        names = ", ".join(map(scheme_text, allocation.schemes))
        lowest, weights = last.least_bytes, allocation.table.least_bytes
        return BudgetError(
            f"no plan fits {format_bytes(last.budget_bytes)}: the least with all weights packed as {names} "
            f"is {format_bytes(lowest)} ({lowest} bytes), {format_bytes(weights)} of it weights",
            least_bytes=lowest,
            budget_bytes=last.budget_bytes,
            hint=f"ask for budget={lowest} or more, or allow schemes of fewer bits",
        )


def packed_by(model: nn.Module, plan: QuantizationPlan) -> dict[str, Any]:
    """The packed weights that ``plan`` made, by name."""
    found = packed_weights(model)
    return {choice.weight: found[choice.weight] for choice in plan.packed}


def _advice(name: str, saved: int) -> str:
    return (
        f"pass {name!r} changes results and is not allowed; it is predicted to save {format_bytes(saved)}, "
        f"which would do: allow=({name!r},)"
    )


def sharing(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose parameters and buffers have the same memory. Raises ``QuantizationError``."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        twin = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        twin.grad = parameter.grad
        memo[id(parameter)] = twin
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise QuantizationError(f"the model cannot be copied to be tried: {brief(error)}") from error
