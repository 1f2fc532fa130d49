"""What dynamo captured against the model itself, once, on the inputs of the capture.

A model may compute something else while it is compiled than it does op by op: code that asks
``torch.compiler.is_compiling()`` takes another path, and some of these are not equal (attention masks that
are only left out op by op, for one). No check of a rewrite sees this, as all start from the capture.

Both forwards run without gradients, on copies of the inputs, everything that they change put back. That takes
as much memory as an inference does, and the time of two.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graphopt import _torch
from graphopt.errors import brief
from graphopt.guard import attributes_restored, obstacle
from graphopt.restored import restored
from graphopt.verify_numbers import TOLERANCES

__all__ = ["Comparison", "compared", "differences"]

CHUNK = 1 << 24
"""Elements that are compared at a time: a difference of whole logits would double what they take."""

SLACK = 10.0
"""Times the tolerance of a rewrite. The same operators run in the same order: what rounding alone changes is
far below, another path far above."""

SHARE = 0.01
"""Of the elements of an integer or boolean output that may differ: rounding may decide which of two is
larger."""


@dataclass(frozen=True)
class Comparison:
    """``difference``: what is not the same, or ``""``. ``refused``: why nothing was compared, or ``""``."""

    difference: str = ""
    refused: str = ""


def compared(
    model: torch.nn.Module,
    capture: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    written: Sequence[torch.Tensor] = (),
) -> Comparison:
    """Run ``capture(*args, **kwargs)``, which computes what was captured, and the model's own forward.

    ``written`` are parameters that either may write. A model that does not give the same twice is not held
    to it.
    """
    held = (*model.parameters(), *model.buffers(), *pytree.tree_leaves((args, kwargs)))
    tensors = [t for t in held if isinstance(t, torch.Tensor)]
    if any(_torch.is_fake(t) or t.is_meta for t in tensors):
        return Comparison(refused="tensors have no values")
    if reason := obstacle(model, training=False):
        return Comparison(refused=reason)
    devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    coarsest = max((t.dtype for t in tensors), key=lambda kind: TOLERANCES.get(kind, 0.0), default=None)

    def run(call: Callable[..., Any]) -> list[Any]:
        given, named = copy.deepcopy((args, kwargs))
        with (
            restored(model, (), written),
            attributes_restored(model),
            torch.random.fork_rng(devices=devices),
        ):
            # What a model returns may be one of its buffers, which are put back.
            return [_kept(leaf) for leaf in pytree.tree_leaves(call(*given, **named))]

    def plain(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return model(*args, **kwargs)

    try:
        expected = run(plain)
        difference = differences(run(capture), expected, coarsest)
        if difference and differences(run(plain), expected, coarsest):
            return Comparison(refused="the model does not compute the same twice")
    except Exception as error:
        return Comparison(refused=brief(error))
    return Comparison(difference)


def differences(
    found: Sequence[Any], expected: Sequence[Any], coarsest: torch.dtype | None = None
) -> str:
    """How the first of the outputs that differ does so, or ``""``.

    ``coarsest`` is the least precise type that was computed in, by default that of the outputs.
    """
    if len(found) != len(expected):
        return f"{len(found)} outputs instead of {len(expected)}"
    pairs = [
        (index, ours, theirs)
        for index, (ours, theirs) in enumerate(zip(found, expected, strict=True))
        if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor)
    ]
    types = [theirs.dtype for _, _, theirs in pairs] + ([coarsest] if coarsest is not None else [])
    allowed = SLACK * max((TOLERANCES.get(kind, 0.0) for kind in types), default=0.0)
    for index, ours, theirs in pairs:
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            was, now = (f"{t.dtype}{list(t.shape)}".removeprefix("torch.") for t in (theirs, ours))
            return f"output {index} is {now} instead of {was}"
        inexact = theirs.is_floating_point() or theirs.is_complex()
        share = _share_off(ours, theirs) if inexact else _share_unequal(ours, theirs)
        if share > (min(allowed, 0.1) if inexact else SHARE):
            what = "its largest number" if inexact else "its elements"
            return f"output {index} differs by {share:.2%} of {what}"
    return ""


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(*(torch.split(t.detach().reshape(-1), CHUNK) for t in tensors), strict=True)


def _share_unequal(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    count = sum(int((a != b).sum()) for a, b in _chunks(ours, theirs))
    return count / max(theirs.numel(), 1)


def _share_off(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference as a share of the largest finite number; others have to be the same."""
    worst = largest = 0.0
    for ours_part, theirs_part in _chunks(ours, theirs):
        if not ours_part.numel():
            continue
        wide = torch.complex128 if theirs_part.is_complex() else torch.float64
        a, b = ours_part.to(wide), theirs_part.to(wide)
        same = (a == b) | (a.isnan() & b.isnan())
        finite = a.isfinite() & b.isfinite()
        if bool((~same & ~finite).any()):
            return float("inf")
        worst = max(worst, float(torch.where(same, torch.zeros_like(a), a - b).abs().max()))
        largest = max(largest, float(torch.where(finite, b, torch.zeros_like(b)).abs().max()))
    return worst / largest if largest else worst
