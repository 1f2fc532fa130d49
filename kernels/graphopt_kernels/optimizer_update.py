"""The update of an optimizer that a program has written out, over any number of tensors in one launch.

What ``fuse-optimizer`` calls. Beside ``graphopt_kernels.optimizer_step``, which takes an optimizer's settings
and the count of steps, these take the numbers of the formulas themselves. Any of them may be a tensor of one
element on the device, as a program computes it from a count of steps: the kernel reads it, and the host never
waits. Gradients are read alone.

Adam and AdamW, of each parameter ``p``, gradient ``g``, average ``m`` and mean of squares ``v``::

    g = scale * g + decay * p           p = keep * p
    m = m + weight * (g - m)            v = beta * v + share * g * g
    p = p - rate * m / (sqrt(v) / correction + eps)

SGD, with a moving average ``m`` where there is one::

    g = scale * g + decay * p           p = keep * p
    m = momentum * m + share * g        d = g + momentum * m, where nesterov, or m, or g without it
    p = p - rate * d

The kernels compute in float32 and round parameters and states once. References are the operators of torch's
single-tensor optimizers, in their order. Sources: as in ``optimizer_step``.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch

from graphopt.candidate import Reason
from graphopt_kernels.optimizer_step import _BLOCK, _CHUNK, _WARPS, _table, _triton_type, step_supports

__all__ = [
    "ADAM_NUMBERS",
    "SGD_NUMBERS",
    "adam_update",
    "adam_update_reference",
    "sgd_update",
    "sgd_update_reference",
    "update_supports",
]

ADAM_NUMBERS = ("scale", "keep", "decay", "weight", "beta", "share", "rate", "correction", "eps")
SGD_NUMBERS = ("scale", "keep", "decay", "momentum", "share", "rate")
"""What ``numbers`` of the operators are, by place."""

_ADAM, _SGD = "graphopt::adam_update", "graphopt::sgd_update"
# Registered piece by piece: ``custom_op`` looks at every tensor of a list before and after each call.
torch.library.define(
    _ADAM,
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] averages, Tensor(c!)[] squares, float[] numbers, "
    "Tensor[] scalars, int[] places) -> ()",
)
torch.library.define(
    _SGD,
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, float[] numbers, Tensor[] scalars, "
    "int[] places, bool nesterov) -> ()",
)

Tensors = Sequence[torch.Tensor]
Number = float | torch.Tensor


@torch.library.impl(_ADAM, "CompositeExplicitAutograd")
def _adam_update(
    params: Tensors, grads: Tensors, averages: Tensors, squares: Tensors, numbers: Sequence[float],
    scalars: Tensors, places: Sequence[int],
) -> None:  # fmt: skip
    """An update of Adam or AdamW; parameters and states are written in place.

    ``numbers``: by place, as ``ADAM_NUMBERS``; ``scalars[k]``, of one element, is read instead of
    ``numbers[places[k]]``. Raises ``ValueError`` for tensors and numbers that do not fit together.
    """
    given = (params, grads, averages, squares)
    _check("adam_update", ADAM_NUMBERS, given, numbers, scalars, places)
    if not params:
        return
    _written(params, averages, squares)
    if not params[0].is_cuda:
        adam_update_reference(*given, numbers, scalars, places)
        return
    _launch(_kernels().adam_update_kernel, given, ADAM_NUMBERS, numbers, scalars, places)


def adam_update_reference(
    params: Tensors, grads: Tensors, averages: Tensors, squares: Tensors, numbers: Sequence[float],
    scalars: Tensors, places: Sequence[int],
) -> None:  # fmt: skip
    """What ``adam_update`` computes, as ``torch.optim``'s single-tensor Adam does: with numbers alone its
    plain one, else the one that is ``capturable``."""
    scale, keep, decay, weight, beta, share, rate, correction, eps = _resolved(numbers, scalars, places)
    for p, g, m, v in zip(params, grads, averages, squares, strict=True):
        gradient = _gradient(p, g, scale, decay)
        if not _is(keep, 1.0):
            p.mul_(keep)
        m.lerp_(gradient.to(m.dtype), weight)
        squared = gradient.to(v.dtype)
        if isinstance(share, torch.Tensor):
            v.mul_(beta).add_(squared * squared * share)
        else:
            v.mul_(beta).addcmul_(squared, squared, value=share)
        if any(isinstance(number, torch.Tensor) for number in (rate, correction, eps)):
            step = -rate
            p.addcdiv_(m, (v.sqrt() / (correction * step)).add_(eps / step))
        else:
            p.addcdiv_(m, (v.sqrt() / correction).add_(eps), value=-rate)


@torch.library.impl(_SGD, "CompositeExplicitAutograd")
def _sgd_update(
    params: Tensors, grads: Tensors, momenta: Tensors, numbers: Sequence[float], scalars: Tensors,
    places: Sequence[int], nesterov: bool,
) -> None:  # fmt: skip
    """An update of SGD; parameters and states are written in place. ``momenta`` is empty where there is no
    moving average. ``numbers``: by place, as ``SGD_NUMBERS``; the rest as for ``adam_update``."""
    given = (params, grads, momenta) if momenta else (params, grads)
    _check("sgd_update", SGD_NUMBERS, given, numbers, scalars, places)
    if not params:
        return
    _written(params, momenta)
    if not params[0].is_cuda:
        sgd_update_reference(params, grads, momenta, numbers, scalars, places, nesterov)
        return
    flags = {"MOMENTUM": bool(momenta), "NESTEROV": nesterov}
    _launch(_kernels().sgd_update_kernel, given, SGD_NUMBERS, numbers, scalars, places, **flags)


def sgd_update_reference(
    params: Tensors, grads: Tensors, momenta: Tensors, numbers: Sequence[float], scalars: Tensors,
    places: Sequence[int], nesterov: bool,
) -> None:  # fmt: skip
    """What ``sgd_update`` computes, as ``torch.optim``'s single-tensor SGD does."""
    scale, keep, decay, momentum, share, rate = _resolved(numbers, scalars, places)
    for k, (p, g) in enumerate(zip(params, grads, strict=True)):
        gradient = _gradient(p, g, scale, decay)
        if momenta:
            moving = momenta[k].mul_(momentum)
            _add(moving, gradient, share)
            gradient = _plus(gradient, moving, momentum) if nesterov else moving
        if not _is(keep, 1.0):
            p.mul_(keep)
        _add(p, gradient, -rate)


def _nothing(*args: Any) -> None:
    """What the operators return of fake tensors."""


torch.library.register_fake(_ADAM, _nothing)
torch.library.register_fake(_SGD, _nothing)


adam_update = torch.ops.graphopt.adam_update.default
sgd_update = torch.ops.graphopt.sgd_update.default


# --- what both share ----------------------------------------------------------------------------


def update_supports(*lists: Tensors) -> Reason | None:
    """As ``optimizer_step.step_supports``: lists of parameters, gradients and states as long as each other,
    each of one floating-point dtype; the tensors of one parameter lie in memory alike, without gaps."""
    return step_supports(*lists)


def _check(
    name: str, known: Sequence[str], lists: Sequence[Tensors], numbers: Sequence[float], scalars: Tensors,
    places: Sequence[int],
) -> None:  # fmt: skip
    reason = update_supports(*lists)
    if reason is None and len(numbers) != len(known):
        reason = Reason(f"{len(numbers)} numbers: expected {', '.join(known)}")
    if reason is None and (len(scalars) != len(places) or not set(places) <= set(range(len(known)))):
        reason = Reason(f"{len(scalars)} scalars for the places {list(places)} of {len(known)} numbers")
    for scalar in scalars if reason is None else ():
        if scalar.numel() != 1 or not scalar.dtype.is_floating_point:
            reason = Reason(f"a scalar is {scalar.dtype} {list(scalar.shape)}: expected one number")
        elif lists[0] and scalar.device != lists[0][0].device:
            reason = Reason(f"a scalar is on {scalar.device}, parameters on {lists[0][0].device}")
    if reason is not None:
        raise ValueError(f"{name}: {reason}")


def _written(*lists: Tensors) -> None:
    for tensors in lists:
        for tensor in tensors:
            torch.autograd.graph.increment_version(tensor)


def _resolved(numbers: Sequence[float], scalars: Tensors, places: Sequence[int]) -> list[Any]:
    found: list[Any] = list(numbers)
    for scalar, place in zip(scalars, places, strict=True):
        found[place] = scalar.reshape(())
    return found


def _is(number: Number, value: float) -> bool:
    return not isinstance(number, torch.Tensor) and number == value


def _gradient(p: torch.Tensor, g: torch.Tensor, scale: Number, decay: Number) -> torch.Tensor:
    gradient = g if _is(scale, 1.0) else g * scale
    return gradient if _is(decay, 0.0) else _plus(gradient, p, decay)


def _plus(a: torch.Tensor, b: torch.Tensor, factor: Number) -> torch.Tensor:
    return a + b * factor if isinstance(factor, torch.Tensor) else a.add(b, alpha=factor)


def _add(target: torch.Tensor, value: torch.Tensor, factor: Number) -> None:
    if isinstance(factor, torch.Tensor):
        target.add_(value * factor)
    else:
        target.add_(value, alpha=factor)


def _launch(
    kernel: Any, lists: Sequence[Tensors], known: Sequence[str], numbers: Sequence[float], scalars: Tensors,
    places: Sequence[int], **flags: bool,
) -> None:  # fmt: skip
    params = lists[0]
    rows = tuple(tuple(tensor.data_ptr() for tensor in tensors) for tensors in lists)
    device = params[0].device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    table, owner = _table(rows, tuple(tensor.numel() for tensor in params), device, stream)
    if not owner.numel():
        return
    values = _resolved(numbers, scalars, places)
    by_name = dict(zip(known, values, strict=True))
    dtypes = [_triton_type(tensors[0].dtype) for tensors in lists]
    constants = {
        **flags,
        "LOADED": sum(1 << place for place in set(places)),
        "KEPT": not _is(by_name["keep"], 1.0),
        "DECAYED": not _is(by_name["decay"], 0.0),
        "ALIGNED": not any(address % 16 for row in rows for address in row),
        "P": dtypes[0],
        "G": dtypes[1],
        "S": dtypes[-1],
        "BLOCK": _BLOCK,
        "CHUNK": _CHUNK,
    }
    kernel[(owner.numel(),)](table, owner, len(params), *values, **constants, num_warps=_WARPS)


@functools.cache
def _kernels() -> Any:
    return importlib.import_module("graphopt_kernels.optimizer_update_triton")
