"""The update of an optimizer over any number of tensors, in one launch for those of one kind.

Reads every parameter, gradient and state once and writes parameters and states once, as torch's fused
optimizers do. In the same pass gradients may be multiplied by a number on the device (that of clipping by
their norm) and set to 0, and bfloat16 may be rounded at random. Arithmetic is float32 (float64 for float64,
on the CPU). Formulas: Kingma and Ba, "Adam"; Loshchilov and Hutter, "Decoupled Weight Decay
Regularization"; momentum as ``torch.optim.SGD`` has it. Rounding at random: Zamirai et al., "Revisiting
BFloat16 Training".
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

from graphopt.candidate import Reason

__all__ = ["adam_step", "adam_step_reference", "sgd_step", "sgd_step_reference", "step_supports"]

_CHUNK, _BLOCK, _WARPS = 16384, 1024, 4
"""Elements that a program updates, and how many at a time: 16 bytes of bfloat16 for each thread."""

_TABLES = 32

_ADAM, _SGD = "graphopt::adam_step", "graphopt::sgd_step"
# Registered piece by piece: ``custom_op`` looks at every tensor of a list before and after each call.
torch.library.define(
    _ADAM,
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] averages, Tensor(d!)[] squares, Tensor? factor, "
    "float lr, float beta1, float beta2, float eps, float weight_decay, int step, bool decoupled, "
    "bool zero_grads, int? seed) -> ()",
)
torch.library.define(
    _SGD,
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momenta, Tensor? factor, float lr, "
    "float momentum, float dampening, float weight_decay, bool nesterov, bool first, bool zero_grads, "
    "int? seed) -> ()",
)

Tensors = Sequence[torch.Tensor]


@torch.library.impl(_ADAM, "CompositeExplicitAutograd")
def _adam_step(
    params: Tensors, grads: Tensors, averages: Tensors, squares: Tensors, factor: torch.Tensor | None,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int, decoupled: bool,
    zero_grads: bool, seed: int | None,
) -> None:  # fmt: skip
    """Step number ``step``, from 1, of Adam, of AdamW where the decay is ``decoupled``: parameters and
    states are written in place, and gradients where ``zero_grads``.

    ``factor``: a float32 number on the device that gradients are multiplied by. ``seed``: results of dtype
    bfloat16 are rounded at random by it. Raises ``ValueError`` for tensors that do not fit together.
    """
    given = (params, grads, averages, squares)
    _check("adam_step", given, factor, seed)
    if not params:
        return
    _written(params, averages, squares, grads if zero_grads else ())
    if not params[0].is_cuda:
        rates = (lr, beta1, beta2, eps, weight_decay)
        adam_step_reference(*given, factor, *rates, step, decoupled, zero_grads, seed)
        return
    kernel = _kernels().adam_kernel
    numbers = (
        lr / (1 - beta1**step), 1 - lr * weight_decay, weight_decay, 1 - beta1, beta2, 1 - beta2, eps,
        1 / math.sqrt(1 - beta2**step),
    )  # fmt: skip
    _launch(
        kernel, given, factor, numbers, seed, DECAYED=bool(weight_decay), DECOUPLED=decoupled, ZERO=zero_grads
    )


def adam_step_reference(
    params: Tensors, grads: Tensors, averages: Tensors, squares: Tensors, factor: torch.Tensor | None,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int, decoupled: bool,
    zero_grads: bool, seed: int | None,
) -> None:  # fmt: skip
    """What ``adam_step`` computes, with ATen operators."""
    generator = _generator(params, seed)
    for p, g, m, v in zip(params, grads, averages, squares, strict=True):
        value, gradient, average, square = (_wide(x) for x in (p, g, m, v))
        gradient = gradient if factor is None else gradient * factor
        if decoupled:
            value = value * (1 - lr * weight_decay)
        elif weight_decay:
            gradient = gradient + weight_decay * value
        average = average + (1 - beta1) * (gradient - average)
        square = beta2 * square + (1 - beta2) * gradient * gradient
        denominator = square.sqrt() / math.sqrt(1 - beta2**step) + eps
        value = value - lr / (1 - beta1**step) * average / denominator
        for target, result in ((p, value), (m, average), (v, square)):
            target.copy_(_rounded(result, target.dtype, generator))
        if zero_grads:
            g.zero_()


@torch.library.impl(_SGD, "CompositeExplicitAutograd")
def _sgd_step(
    params: Tensors, grads: Tensors, momenta: Tensors, factor: torch.Tensor | None, lr: float,
    momentum: float, dampening: float, weight_decay: float, nesterov: bool, first: bool, zero_grads: bool,
    seed: int | None,
) -> None:  # fmt: skip
    """A step of SGD, in place; ``momenta`` is empty where ``momentum`` is 0. ``first``: they are written
    without being read. The rest as for ``adam_step``."""
    given = (params, grads, momenta) if momentum else (params, grads)
    _check("sgd_step", given, factor, seed)
    if not params:
        return
    _written(params, momenta, grads if zero_grads else ())
    if not params[0].is_cuda:
        settings = (lr, momentum, dampening, weight_decay, nesterov, first, zero_grads, seed)
        sgd_step_reference(params, grads, momenta, factor, *settings)
        return
    numbers = (lr, momentum, 1 - dampening, weight_decay)
    flags = {
        "DECAYED": bool(weight_decay),
        "MOMENTUM": bool(momentum),
        "FIRST": first,
        "NESTEROV": nesterov,
        "ZERO": zero_grads,
    }
    _launch(_kernels().sgd_kernel, given, factor, numbers, seed, **flags)


def sgd_step_reference(
    params: Tensors, grads: Tensors, momenta: Tensors, factor: torch.Tensor | None, lr: float,
    momentum: float, dampening: float, weight_decay: float, nesterov: bool, first: bool, zero_grads: bool,
    seed: int | None,
) -> None:  # fmt: skip
    """What ``sgd_step`` computes, with ATen operators."""
    generator = _generator(params, seed)
    for k, (p, g) in enumerate(zip(params, grads, strict=True)):
        value, gradient = _wide(p), _wide(g)
        gradient = gradient if factor is None else gradient * factor
        if weight_decay:
            gradient = gradient + weight_decay * value
        if momentum:
            moving = gradient
            if not first:
                moving = momentum * _wide(momenta[k]) + (1 - dampening) * gradient
            momenta[k].copy_(_rounded(moving, momenta[k].dtype, generator))
            gradient = gradient + momentum * moving if nesterov else moving
        p.copy_(_rounded(value - lr * gradient, p.dtype, generator))
        if zero_grads:
            g.zero_()


def _nothing(*args: Any) -> None:
    """What the operators return of fake tensors."""


torch.library.register_fake(_ADAM, _nothing)
torch.library.register_fake(_SGD, _nothing)


adam_step = torch.ops.graphopt.adam_step.default
sgd_step = torch.ops.graphopt.sgd_step.default


# --- what both share ----------------------------------------------------------------------------


def step_supports(*lists: Tensors) -> Reason | None:
    """Lists as long as each other: of parameters, gradients and states. All parameters are of one
    floating-point dtype and device, so are gradients, and states; the tensors of one parameter lie in memory
    alike, without gaps."""
    params = lists[0]
    if any(len(other) != len(params) for other in lists):
        return Reason(f"lists of {', '.join(str(len(x)) for x in lists)} tensors: expected as many of each")
    for together in (lists[:1], lists[1:2], lists[2:]):
        kinds = {(tensor.dtype, tensor.device) for tensors in together for tensor in tensors}
        if len(kinds) > 1:
            return Reason(f"tensors of {len(kinds)} dtypes or devices in one call")
    for tensors in zip(*lists, strict=True):
        parameter = tensors[0]
        for tensor in tensors:
            if tensor.layout is not torch.strided:
                return Reason(
                    f"a tensor is {str(tensor.layout).removeprefix('torch.')}: expected a dense one"
                )
            if not tensor.dtype.is_floating_point:
                return Reason(f"a tensor is {tensor.dtype}, no floating-point type")
            if tensor.device != parameter.device:
                return Reason(f"a tensor is on {tensor.device}, its parameter on {parameter.device}")
            if (tensor.shape, tensor.stride()) != (parameter.shape, parameter.stride()):
                return Reason(
                    f"a gradient or state is laid out as {list(tensor.shape)}, {list(tensor.stride())}, its "
                    f"parameter as {list(parameter.shape)}, {list(parameter.stride())}"
                )
        if not _is_dense(parameter):
            return Reason(
                f"a parameter has gaps in memory: {list(parameter.shape)}, {list(parameter.stride())}"
            )
        if parameter.is_cuda and parameter.dtype is torch.float64:
            return Reason("float64 is not computed on the GPU")
    return None


def _check(name: str, lists: Sequence[Tensors], factor: torch.Tensor | None, seed: int | None) -> None:
    reason = step_supports(*lists)
    if reason is None and factor is not None and (factor.numel() != 1 or factor.dtype is not torch.float32):
        reason = Reason(f"factor is {factor.dtype} {list(factor.shape)}: expected one float32")
    if reason is None and seed is not None and lists[0] and lists[0][0].dtype is not torch.bfloat16:
        reason = Reason(f"parameters are {lists[0][0].dtype}: bfloat16 alone is rounded at random")
    if reason is not None:
        raise ValueError(f"{name}: {reason}")


def _written(*lists: Tensors) -> None:
    for tensors in lists:
        for tensor in tensors:
            torch.autograd.graph.increment_version(tensor)


def _is_dense(tensor: torch.Tensor) -> bool:
    if tensor.is_contiguous():
        return True
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return bool(tensor.numel() == reach and min(tensor.stride()) > 0)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def _generator(params: Tensors, seed: int | None) -> torch.Generator | None:
    return None if seed is None else torch.Generator(params[0].device).manual_seed(seed)


def _rounded(value: torch.Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> torch.Tensor:
    """``value`` in ``dtype``; to bfloat16, where there is a ``generator``, up or down at random."""
    nearest = value.to(dtype)
    if generator is None or dtype is not torch.bfloat16:
        return nearest
    bits = value.contiguous().view(torch.int32)
    noise = torch.randint(0, 2**16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    drawn = ((bits + noise) & -65536).view(torch.float32).to(dtype)
    return torch.where(value.isfinite(), drawn, nearest)


# --- launching ----------------------------------------------------------------------------------


def _launch(
    kernel: Any, lists: Sequence[Tensors], factor: torch.Tensor | None, numbers: Sequence[float],
    seed: int | None, **flags: bool,
) -> None:  # fmt: skip
    params = lists[0]
    rows = tuple(tuple(tensor.data_ptr() for tensor in tensors) for tensors in lists)
    device = params[0].device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    table, owner = _table(rows, tuple(tensor.numel() for tensor in params), device, stream)
    if not owner.numel():
        return
    dtypes = [_triton_type(tensors[0].dtype) for tensors in lists]
    constants = {
        **flags,
        "DRAWN": seed is not None,
        "DRAWN_STATES": seed is not None and lists[-1][0].dtype is torch.bfloat16,
        "SCALED": factor is not None,
        "ALIGNED": not any(address % 16 for row in rows for address in row),
        "P": dtypes[0],
        "G": dtypes[1],
        "S": dtypes[-1],
        "BLOCK": _BLOCK,
        "CHUNK": _CHUNK,
    }
    given = (table, owner, table if factor is None else factor, len(params), seed or 0, *numbers)
    kernel[(owner.numel(),)](*given, **constants, num_warps=_WARPS)


Rows = tuple[tuple[int, ...], ...]


def _table(
    rows: Rows, counts: tuple[int, ...], device: torch.device, stream: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Addresses, sizes and first chunks of tensors, and whose each chunk is. Kept: steps use the same memory
    again and again. For one ``stream``: others would have to wait for the copy to the device.

    A CUDA graph that is recorded copies them again each time that it is replayed, from memory of the host
    that is pinned before and stays as it is.
    """
    if device.type != "cuda":
        return _kept_table(rows, counts, device, stream)
    place = rows[0], counts
    if not torch.cuda.is_current_stream_capturing():
        if place not in _spare:
            _spare[place] = tuple(torch.empty_like(x, pin_memory=True) for x in _host_table(rows, counts))
            for gone in list(_spare)[:-_TABLES]:
                del _spare[gone]
        return _kept_table(rows, counts, device, stream)
    if place not in _spare:
        raise RuntimeError("these tensors were not updated before recording: run the step once without it")
    pinned = _spare.pop(place)
    _recorded.append(pinned)
    for target, source in zip(pinned, _host_table(rows, counts), strict=True):
        target.copy_(source)
    table, owner = (x.to(device, non_blocking=True) for x in pinned)
    return table, owner


_spare: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[torch.Tensor, ...]] = {}
"""Pinned memory for tables, by addresses and sizes of parameters: none can be had while recording."""

_recorded: list[tuple[torch.Tensor, ...]] = []
"""What recorded graphs copy from, some KiB each."""


@functools.lru_cache(maxsize=_TABLES)
def _kept_table(
    rows: Rows, counts: tuple[int, ...], device: torch.device, stream: int
) -> tuple[torch.Tensor, torch.Tensor]:
    whole, owner = _host_table(rows, counts)
    if device.type != "cuda":
        return whole, owner
    table, owners = (x.pin_memory().to(device, non_blocking=True) for x in (whole, owner))
    return table, owners


def _host_table(rows: Rows, counts: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    chunks = [-(-count // _CHUNK) for count in counts]
    firsts = tuple(itertools.accumulate(chunks, initial=0))[:-1]
    empty = (0,) * len(counts)
    whole = torch.tensor([*rows, *([empty] * (4 - len(rows))), counts, firsts], dtype=torch.int64)
    owner = torch.repeat_interleave(
        torch.arange(len(counts), dtype=torch.int32), torch.tensor(chunks, dtype=torch.int64)
    )
    return whole, owner


def _triton_type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    known = {
        torch.float32: tl.float32,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
        torch.float64: tl.float64,
    }
    return known[dtype]


@functools.cache
def _kernels() -> Any:
    return importlib.import_module("graphopt_kernels.optimizer_step_triton")
