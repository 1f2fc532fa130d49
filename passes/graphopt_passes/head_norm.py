"""The RMSNorm of heads that a model writes before it turns them (QK-norm), read backwards from its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from graphopt.rules.matching import Found, match_pattern
from graphopt.rules.pattern import Pattern
from graphopt_passes.fuse_norm import (
    rms_norm,
    rounded_first,
    rounded_last,
    rounded_last_like,
    rounded_like,
    unrounded,
)
from graphopt_passes.memory_place import value_of

__all__ = ["HeadNorm", "head_norm"]

_aten = torch.ops.aten
_FORMS = tuple(
    Pattern.of(form)
    for form in (rounded_first, rounded_like, rounded_last, rounded_last_like, unrounded, rms_norm)
)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_STATISTICS = (_aten.rsqrt.default, _aten.mean.dim)


@dataclass(frozen=True)
class HeadNorm:
    """``input`` over its root mean square over the last dimension, times ``weight`` plus ``offset``.
    ``nodes`` compute it."""

    input: fx.Node
    weight: fx.Node | None
    eps: float
    offset: float
    nodes: frozenset[fx.Node]


def head_norm(node: fx.Node) -> HeadNorm | None:
    """The norm that ``node`` is the result of; ``None`` where it is none that kernels of heads compute."""
    for form in _FORMS:
        found = match_pattern(form, node)
        if isinstance(found, Found) and (norm := _read(found)) is not None:
            return norm
    return None


def _read(found: Found) -> HeadNorm | None:
    captures = found.captures
    input, weight, eps = captures["x"], captures["weight"], captures["eps"]
    offset = captures.get("offset") or 0.0
    value = value_of(input)
    if value is None or value.dtype not in _DTYPES or not value.dim():
        return None
    if not isinstance(eps, (int, float)) or not isinstance(offset, (int, float)):
        return None
    known = value_of(weight)
    if weight is not None and (
        known is None or known.dtype not in _DTYPES or known.shape != value.shape[-1:]
    ):
        return None
    return (
        HeadNorm(input, weight, float(eps), float(offset), found.nodes)
        if _over_last(captures, value) and _in_float32(found, value)
        else None
    )


def _over_last(captures: Any, value: torch.Tensor) -> bool:
    if "shape" in captures:
        return len(captures["shape"]) == 1
    dims = captures["dims"]
    return (
        captures["keepdim"] is True
        and isinstance(dims, (list, tuple))
        and [d % value.dim() for d in dims] == [value.dim() - 1]
    )


def _in_float32(found: Found, value: torch.Tensor) -> bool:
    """Whether statistics are float32, and nothing is rounded but to the dtype of the input."""
    for node in found.nodes:
        dtype = node.meta["val"].dtype
        if node.target in _STATISTICS and dtype is not torch.float32:
            return False
        if dtype not in (torch.float32, value.dtype):
            return False
    return True
