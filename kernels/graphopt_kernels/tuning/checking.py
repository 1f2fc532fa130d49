"""Whether a configuration computes what the reference does, before its time counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from graphopt.candidate import Reason

__all__ = ["copied", "difference", "poisoned"]

_TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 1e-4, torch.float64: 1e-10}
"""Of the largest element: a few units of rounding of 16-bit dtypes, and in float32 what the order of a sum of
some ten thousand terms comes to. A lane or a row that is left out errs by about one."""


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors hold NaN in the block, so that what a kernel leaves out shows: their memory may well hold
    the right results of the one before."""
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    filling: Any = torch.utils.deterministic
    fills = filling.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    filling.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        filling.fill_uninitialized_memory = fills


def copied(operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """Operands in memory of their own, of the same strides."""
    return tuple(_copy(x) if isinstance(x, torch.Tensor) else x for x in operands)


def _copy(x: torch.Tensor) -> torch.Tensor:
    made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return made.copy_(x)


def difference(found: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> Reason | None:
    """``None`` where results are those of the reference up to rounding, else where they differ first."""
    if len(found) != len(right):
        return Reason(f"it gives {len(found)} results: expected {len(right)}")
    for number, (a, b) in enumerate(zip(found, right, strict=True)):
        if a.shape != b.shape or a.dtype is not b.dtype:
            return Reason(f"result {number} is {a.dtype} {list(a.shape)}: expected {b.dtype} {list(b.shape)}")
        if not a.numel():
            continue
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return Reason(f"result {number} differs from the reference")
            continue
        finite = torch.isfinite(b)
        if not torch.equal(torch.isfinite(a), finite):
            return Reason(f"result {number} is finite where the reference is not, or the other way around")
        wide = b.masked_fill(~finite, 0).to(torch.promote_types(b.dtype, torch.float32))
        off = (a.masked_fill(~finite, 0).to(wide.dtype) - wide).abs().amax().item()
        allowed = _TOLERANCE[b.dtype] * wide.abs().amax().item()
        if off > allowed:
            return Reason(f"result {number} is off by {off:.3g}: at most {allowed:.3g} is rounding")
        if not torch.equal(a.masked_fill(finite, 0).nan_to_num(), b.masked_fill(finite, 0).nan_to_num()):
            return Reason(f"result {number} has other infinities than the reference")
    return None
