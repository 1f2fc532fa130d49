"""``optimizer.step()`` of SGD, Adam and AdamW in one launch for all parameters of a kind.

::

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    step = FusedStep(optimizer, max_norm=1.0, zero_gradients=True, random_rounding=True)
    for batch in batches:
        model(batch).loss.backward()
        step()                       # instead of clip_grad_norm_, optimizer.step and optimizer.zero_grad

The optimizer stays what holds parameter groups and states: schedulers change its groups, ``state_dict`` and
``load_state_dict`` are its own, and ``optimizer.step()`` may take over at any time. Beside torch's
``fused=True``, which moves as many bytes for the update alone:

- ``max_norm``: gradients are clipped by the norm of all of them. The norm reads them once; what they are
  multiplied by stays on the device and is applied as they are read for the update, so they are neither
  written nor read again (``clip_grad_norm_`` does both).
- ``zero_gradients``: they are set to 0 in the same pass, in place, as graphopt's replayed steps and its
  products that add to ``.grad`` want them.
- ``random_rounding``: parameters and states of dtype bfloat16 are rounded up or down at random so that their
  mean stays right. Rounded to the nearest, updates below 1/512 of a parameter are lost, and the mean of
  squares of Adam never falls. Draws come from a seed that torch's generator of the CPU gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphopt import _torch
from graphopt.candidate import Reason
from graphopt.errors import InputsError
from graphopt_kernels.optimizer_step import adam_step, sgd_step, step_supports

__all__ = ["FusedStep", "fused_step_supports"]

_UNSUPPORTED = {
    "amsgrad": "it keeps the largest squares (amsgrad=True)",
    "maximize": "it maximizes (maximize=True)",
    "capturable": "its counts of steps are on the device (capturable=True)",
    "fused": "its counts of steps are on the device (fused=True)",
    "differentiable": "its step is to be differentiated (differentiable=True)",
}


_STATES = ("exp_avg", "exp_avg_sq", "momentum_buffer")


def fused_step_supports(optimizer: torch.optim.Optimizer) -> Reason | None:
    """Why ``FusedStep`` cannot take the steps of an optimizer; ``None`` where it can."""
    if type(optimizer) not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        return Reason(f"it is a {type(optimizer).__name__}: SGD, Adam and AdamW are known")
    if _torch.has_step_hooks(optimizer):
        return Reason("hooks wait for its steps")
    for group in optimizer.param_groups:
        for name, what in _UNSUPPORTED.items():
            if group.get(name):
                return Reason(what)
        if any(isinstance(group.get(name), torch.Tensor) for name in ("lr", "weight_decay", "momentum")):
            return Reason("a rate is a tensor")
        if any(isinstance(beta, torch.Tensor) for beta in group.get("betas", ())):
            return Reason("a beta is a tensor")
        for parameter in group["params"]:
            if type(parameter) not in (torch.Tensor, torch.nn.Parameter):
                return Reason(f"a parameter is a {type(parameter).__name__}")
            if (reason := step_supports([parameter])) is not None:
                return reason
    return None


@dataclass(frozen=True)
class _Update:
    """Parameters of one group, device, dtypes and count of steps: one launch. ``states``: by state, then by
    parameter."""

    group: dict[str, Any]
    params: list[torch.Tensor]
    grads: list[torch.Tensor]
    states: list[list[torch.Tensor]]
    step: int


class FusedStep:
    """Takes the steps of ``optimizer``; call it where ``optimizer.step()`` stood.

    ``max_norm``: largest Euclidean norm of all gradients together, as ``torch.nn.utils.clip_grad_norm_``
    has it; the norm of the last step is in ``norm``, a tensor on the device. ``zero_gradients``: gradients
    are 0 afterwards. ``random_rounding``: for parameters of dtype bfloat16.
    Raises ``InputsError`` for an optimizer, or at a step for gradients, that it cannot take.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        max_norm: float | None = None,
        zero_gradients: bool = False,
        random_rounding: bool = False,
    ) -> None:
        self.optimizer, self.max_norm = optimizer, max_norm
        self.zero_gradients, self.random_rounding = zero_gradients, random_rounding
        self.norm: torch.Tensor | None = None
        self._check()

    def _check(self) -> None:
        reason = fused_step_supports(self.optimizer)
        if reason is not None:
            raise InputsError(f"these steps cannot be fused: {reason}", hint="call optimizer.step() itself")
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.random_rounding and any(p.dtype is not torch.bfloat16 for p in params):
            found = next(p.dtype for p in params if p.dtype is not torch.bfloat16)
            raise InputsError(f"random_rounding: a parameter is {found}: bfloat16 alone is rounded at random")
        if self.max_norm is not None and len({p.device for p in params}) > 1:
            raise InputsError("max_norm: parameters are on several devices: expected one")

    def _check_gradients(self) -> None:
        """Before anything is written."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                known = self.optimizer.state.get(parameter, {})
                states = [x for name in _STATES if (x := known.get(name)) is not None]
                reason = step_supports([parameter], [parameter.grad], *([state] for state in states))
                if reason is not None:
                    raise InputsError(
                        f"this step cannot be fused: {reason}", hint="call optimizer.step() itself"
                    )

    @torch.no_grad()
    def __call__(self) -> None:
        """One step, of the parameters that have a gradient."""
        self._check()
        self._check_gradients()
        adam = not isinstance(self.optimizer, torch.optim.SGD)
        updates = list(self._updates(adam))
        factor = self._factor([g for update in updates for g in update.grads])
        for update in updates:
            seed = int(torch.randint(2**31 - 1, ())) if self.random_rounding else None
            group, given = update.group, (update.params, update.grads, *update.states)
            if adam:
                beta1, beta2 = map(float, group["betas"])
                numbers = (
                    float(group["lr"]),
                    beta1,
                    beta2,
                    float(group["eps"]),
                    float(group["weight_decay"]),
                )
                decoupled = bool(
                    group.get("decoupled_weight_decay", self.optimizer.__class__ is torch.optim.AdamW)
                )
                adam_step(*given, factor, *numbers, update.step, decoupled, self.zero_gradients, seed)
            else:
                names = ("lr", "momentum", "dampening", "weight_decay")
                momenta = given[2] if update.states else []
                rates = [float(group[name]) for name in names]
                first = update.step == 1
                flags = (bool(group["nesterov"]), first, self.zero_gradients, seed)
                sgd_step(update.params, update.grads, momenta, factor, *rates, *flags)
        _torch.note_step(self.optimizer)

    def _factor(self, grads: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """What gradients are multiplied by, on the device."""
        if self.max_norm is None or not grads:
            return None
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(list(grads))])
        self.norm = torch.linalg.vector_norm(norms)
        return (self.max_norm / (self.norm + 1e-6)).clamp(max=1.0)

    def _updates(self, adam: bool) -> Iterator[_Update]:
        for group in self.optimizer.param_groups:
            found: dict[tuple[Any, ...], _Update] = {}
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                states, step = self._states(parameter, group, adam)
                kind = (parameter.device, parameter.dtype, gradient.dtype, *(s.dtype for s in states), step)
                update = found.setdefault(kind, _Update(group, [], [], [[] for _ in states], step))
                update.params.append(parameter)
                update.grads.append(gradient)
                for tensors, state in zip(update.states, states, strict=True):
                    tensors.append(state)
            yield from found.values()

    def _states(
        self, parameter: torch.Tensor, group: dict[str, Any], adam: bool
    ) -> tuple[list[torch.Tensor], int]:
        """States of a parameter, made as the optimizer makes them, and which step this is: of SGD whether
        it is the first (1) or a later one (2)."""
        if not adam and not group["momentum"]:
            return [], 2
        state = self.optimizer.state[parameter]
        if adam:
            if not state:
                state["step"] = torch.tensor(0.0, dtype=torch.float32)
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["step"] += 1
            return [state["exp_avg"], state["exp_avg_sq"]], int(state["step"].item())
        first = state.get("momentum_buffer") is None
        if first:
            state["momentum_buffer"] = torch.empty_like(parameter, memory_format=torch.preserve_format)
        return [state["momentum_buffer"]], 1 if first else 2
