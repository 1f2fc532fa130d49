"""Gradients of what dynamo captured against the model's own, once, on the inputs of the capture.

Outputs may be right and gradients not: a gradient that a model states itself may be traced into another, a
``detach`` may be lost. So where a step trains, a forward and a backward of both run from the same inputs and
random state; all that they change is put back.

Of a gradient the norm of its difference counts, by its own norm. Single elements cancel, and have no digits
of their own; over all of a parameter, the same operators in the same order give the same to the last digits.
Where they do not, rounding may still be why: a model may be so ill-conditioned that its gradients have few
digits. Or both read memory that nothing was written to (``torch.empty``), which held something else each
time. So both run again with such memory filled, and where they still differ the model runs once more with
each parameter off by its last digit: what that changes is allowed for, as is what differs from run to run.

Gradients are taken as each is made, and wait on the host for those that they are compared with: on a device
either run takes no more than a step of the model as it is. Where that does not fit, nothing is compared.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graphopt import _torch
from graphopt.budget import format_bytes
from graphopt.capture.faithful import Comparison, chunks, coarsest_of, tensors_of, tried, unrunnable
from graphopt.cost import Cost
from graphopt.errors import brief
from graphopt.guard import obstacle
from graphopt.loss import loss_of

__all__ = ["PART", "free_on_host", "gradients_compared", "no_room", "roots_of"]

PART = 1 << 20
"""Elements of a gradient that are compared at a time, in float64: a few MiB beside what a step takes."""

DIGITS = 32.0
"""Times the last digit of the least precise type: up to there a difference is rounding, and no third step is
needed to tell."""

AT_MOST = 0.05
"""The largest difference that ``DIGITS`` of a half type may explain."""

ALLOWED = 10.0
"""Times what parameters that are off by a digit change: how much rounding may, in another order. Each
parameter is off once, and every operator rounds."""

SHARE = 0.25
"""Of the memory that is free on the host, what a step of the model beyond the budget may take."""

LEAST = 1e-2
"""A gradient below this share of the largest (by root mean square) is held to that share: it is zero but for
rounding, as that of a bias before a norm."""


def no_room(model: torch.nn.Module, plain: Cost, static_bytes: int, budget: int | None) -> str:
    """Why a step of the model as it is, predicted to take ``plain``, would not fit where the model is, or
    ``""``. ``static_bytes`` of it are there already.

    A budget is of the steps that are planned, this is one that is not; on a CPU, where whoever takes too much
    is killed, one beyond the budget may take a small share of what is free.
    """
    peak = plain.peak_bytes
    if peak is None:
        return ""
    what = f"a step of the model as it is takes {format_bytes(peak)}"
    if budget is not None and peak > budget and any(p.device.type == "cpu" for p in model.parameters()):
        free = free_on_host()
        if peak - static_bytes > free * SHARE:
            return f"{what}, which does not fit the budget, and {format_bytes(free)} are free"
    for device in sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"}):
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if peak - static_bytes > free:
            return f"{what}, and {format_bytes(free)} are free besides what it holds"
    return ""


def free_on_host() -> int:
    """Bytes that the system says can be had, and the process's control group leaves; 0 where neither says."""
    found = []
    for line in _lines("/proc/meminfo"):
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            found.append(int(rest.split()[0]) << 10)
    limit, used = (_lines(f"/sys/fs/cgroup/memory.{name}")[:1] for name in ("max", "current"))
    if limit and used and limit[0].isdigit():
        found.append(max(0, int(limit[0]) - int(used[0])))
    return min(found, default=0)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def gradients_compared(
    model: torch.nn.Module,
    capture: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    written: Sequence[torch.Tensor],
    filled: Callable[..., Any],
    loss_fn: Callable[[Any], torch.Tensor] | None = None,
) -> Comparison:
    """Differentiate ``capture(*args, **kwargs)``, which computes what was captured, and the model's own
    forward, to trained parameters and inputs; ``written`` are parameters that either may write. ``filled`` is
    ``capture`` with memory filled that is read before anything was written to it.

    What is differentiated is ``loss_fn`` of the outputs, their loss, or a weighted sum of all of them. Sparse
    gradients and those of tensors that wrap others are left out.
    """
    tensors = tensors_of(model, args, kwargs)
    if reason := unrunnable(model, tensors) or obstacle(model, training=True):
        return Comparison(refused=reason)
    found = _Gradients()

    def plain_filled(*args: Any, **kwargs: Any) -> Any:
        with _torch.FilledMemory():
            return model(*args, **kwargs)

    def step(
        call: Callable[..., Any],
        take: Callable[[str, torch.Tensor], None],
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        trained: dict[str, torch.Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        with tried(model, tensors, written, tuple(trained.values())):
            given, named = copy.deepcopy((args, kwargs))
            for number, leaf in enumerate(pytree.tree_leaves((given, named))):
                if isinstance(leaf, torch.Tensor) and leaf.is_leaf and leaf.requires_grad:
                    trained[f"input {number}"] = leaf
            for leaf in trained.values():
                leaf.grad = None
            output = call(*given, **named)
            if any(leaf.grad is not None for leaf in trained.values()):
                raise RuntimeError("the model computes gradients itself")
            with around():
                roots, weights = roots_of(output, loss_fn)
                found.types.update(root.dtype for root in roots)
                del output
                if roots:
                    _differentiate(roots, weights, trained, take)

    try:
        step(model, found.expect)
        if not found.theirs:
            return Comparison()
        ours = found.compared(lambda take: step(capture, take))
        kind = coarsest_of(tensors, (*found.types, *_autocast_types()))
        digit = torch.finfo(kind).eps if kind is not None and _is_inexact(kind) else 0.0
        sure = min(DIGITS * digit, AT_MOST)
        if all(off <= sure for off in ours.values()):
            return Comparison()
        found = _Gradients()
        step(plain_filled, found.expect, _torch.FilledMemory)
        ours = found.compared(lambda take: step(filled, take, _torch.FilledMemory))
        if all(off <= sure for off in ours.values()):
            return Comparison()
        with _nudged(model, digit):
            noise = found.compared(lambda take: step(plain_filled, take, _torch.FilledMemory))
    except Exception as error:
        return Comparison(refused=brief(error))
    usual = found.overall
    beyond = {
        name: off
        for name, off in ours.items()
        if off > max(sure, ALLOWED * noise.get(name, 0.0), ALLOWED * usual)
    }
    if not beyond:
        return Comparison()
    worst = max(beyond, key=lambda name: beyond[name])
    return Comparison(f"the gradient of {worst!r} {found.told(worst, beyond[worst])}")


def roots_of(
    output: Any, loss_fn: Callable[[Any], torch.Tensor] | None = None
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """What a step is differentiated from, and with which weights.

    Without a loss all outputs are, each element with a weight of its own: equal ones would be blind to what a
    norm takes out. Nothing where nothing can be differentiated.
    """
    leaves = [
        leaf
        for leaf in pytree.tree_leaves(output)
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad and leaf.numel()
    ]
    named = isinstance(getattr(output, "loss", None), torch.Tensor)
    if loss_fn is not None or named or sum(leaf.dim() == 0 for leaf in leaves) == 1:
        loss = loss_of(output, loss_fn)
        return ([loss], [None]) if loss.requires_grad else ([], [])
    return leaves, [_weights(leaf) for leaf in leaves]


def _weights(like: torch.Tensor) -> torch.Tensor:
    made = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
    done = 0
    for (part,) in chunks(made, size=PART):
        numbers = torch.arange(done, done + part.numel(), device=like.device)
        part.copy_(numbers.mul(0.7).cos_())
        done += part.numel()
    return made.reshape(like.shape)


def _differentiate(
    roots: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | None],
    trained: dict[str, torch.Tensor],
    take: Callable[[str, torch.Tensor], None],
) -> None:
    """Give ``take`` each gradient as soon as it is made, and keep none."""

    def taken(name: str, leaf: torch.Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        if type(gradient) is torch.Tensor and gradient.layout is torch.strided:
            take(name, gradient.detach())

    leaves: dict[str, Any] = dict(trained)
    handles = [leaf.register_post_accumulate_grad_hook(partial(taken, n)) for n, leaf in leaves.items()]
    try:
        torch.autograd.backward(roots, weights, inputs=list(trained.values()))
    finally:
        for handle in handles:
            handle.remove()


class _Gradients:
    """The model's own gradients by name, ``theirs``, on the host, and how far others are from them.

    ``types`` are those of what is differentiated; ``overall`` the distance found last, over all gradients, as
    a share of their norm.
    """

    def __init__(self) -> None:
        self.theirs: dict[str, torch.Tensor] = {}
        self.types: set[torch.dtype] = set()
        self.overall = 0.0
        self._size: dict[str, float] = {}

    def expect(self, name: str, gradient: torch.Tensor) -> None:
        self.theirs[name] = gradient.to("cpu")
        self._size[name] = math.sqrt(_squares(gradient) / max(gradient.numel(), 1))

    def compared(self, step: Callable[[Callable[[str, torch.Tensor], None]], None]) -> dict[str, float]:
        """How far each gradient that ``step(take)`` gives is from the model's: root mean squares, the
        difference's by the gradient's. One that is not there is zero."""
        off: dict[str, float] = {}
        counts: dict[str, int] = {}

        def take(name: str, gradient: torch.Tensor) -> None:
            theirs = self.theirs.get(name)
            counts[name] = max(gradient.numel(), 1)
            if theirs is not None and theirs.shape != gradient.shape:
                off[name] = math.inf
            else:
                off[name] = _squares(gradient, theirs)

        step(take)
        for name, theirs in self.theirs.items():
            if name not in off:
                counts[name] = max(theirs.numel(), 1)
                off[name] = _squares(theirs)
        norm = math.fsum(size**2 * self.theirs[name].numel() for name, size in self._size.items())
        self.overall = _share(math.sqrt(math.fsum(off.values())), math.sqrt(norm))
        return {
            name: _share(math.sqrt(square / counts[name]), max(self._size.get(name, 0.0), self._least))
            for name, square in off.items()
        }

    @property
    def _least(self) -> float:
        return LEAST * max(self._size.values(), default=0.0)

    def told(self, name: str, share: float) -> str:
        if self._size.get(name, 0.0) >= self._least:
            return f"differs by {100 * share:.3g}% of its norm"
        return f"differs by {100 * LEAST * share:.3g}% of the largest gradient"


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.inf if part else 0.0


def _squares(gradient: torch.Tensor, less: torch.Tensor | None = None) -> float:
    """The sum of squares of what is finite in a gradient, or in its difference to another, which is infinite
    where numbers that are not finite differ."""
    total = 0.0
    for parts in chunks(gradient, *(() if less is None else (less,)), size=PART):
        wide = torch.complex128 if parts[0].is_complex() else torch.float64
        mine = parts[0].to(wide)
        finite = mine.isfinite()
        if less is not None:
            other = parts[1].to(mine.device).to(wide)
            same = (mine == other) | (mine.isnan() & other.isnan())
            finite = finite & other.isfinite()
            if bool((~same & ~finite).any()):
                return math.inf
            mine = mine - other
        total += float(torch.where(finite, mine, torch.zeros_like(mine)).abs().square().sum())
    return total


def _is_inexact(kind: torch.dtype) -> bool:
    return kind.is_floating_point or kind.is_complex


def _autocast_types() -> list[torch.dtype]:
    return [torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]


@dataclass(frozen=True)
class _Kept:
    parameter: torch.Tensor
    value: torch.Tensor


@contextmanager
def _nudged(model: torch.nn.Module, share: float) -> Iterator[None]:
    """In the block parameters are off by ``share``, up or down at random; afterwards they are what they were,
    to the bit.

    ``data`` is written: a backward that waits finds its parameters unchanged, as they are when it runs.
    """
    kept = [
        _Kept(p, p.data.to("cpu", copy=True))
        for p in model.parameters()
        if type(p.data) is torch.Tensor and p.layout is torch.strided and p.is_floating_point()
    ]
    drawn = torch.Generator()
    drawn.manual_seed(0)
    try:
        for item in kept:
            signs = torch.randint(0, 2, item.value.shape, generator=drawn, dtype=torch.int8).mul_(2).sub_(1)
            item.parameter.data.add_(item.parameter.data * signs.to(item.parameter.device) * share)
        yield
    finally:
        for item in kept:
            item.parameter.data.copy_(item.value)
