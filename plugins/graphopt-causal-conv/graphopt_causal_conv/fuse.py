"""fuse-causal-convolution: short causal convolutions, cut to length and activated, become one call.

Before::

    %1 = aten.conv1d(%0, conv.weight, conv.bias, [1], [3], [1], 64) : bf16[2,64,515]
    %2 = aten.slice.Tensor(%1, 2, 0, 512) : bf16[2,64,512]
    %3 = aten.silu(%2) : bf16[2,64,512]

After::

    %1 = causal_conv.forward(%0, conv.weight, conv.bias, True, False) : bf16[2,64,512]

Libraries compute the padded tail as well, and write the sums before another kernel applies the activation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from graphopt.candidate import Reason
from graphopt.program import Level
from graphopt.rules import Match, RewritePass, Rule, operator
from graphopt_causal_conv.operator import supports

__all__ = ["FuseCausalConvolution"]

_aten = torch.ops.aten
_conv = operator(_aten.conv1d.default)
_slice = operator(_aten.slice.Tensor)
_silu = operator(_aten.silu.default)


def plain(
    x: Any, w: Any, b: Any, stride: Any, padding: Any, dilation: Any, groups: Any,
    dim: Any, start: Any, end: Any, step: Any,
) -> Any:  # fmt: skip
    return _slice(_conv(x, w, b, stride, padding, dilation, groups), dim, start, end, step)


def activated(
    x: Any, w: Any, b: Any, stride: Any, padding: Any, dilation: Any, groups: Any,
    dim: Any, start: Any, end: Any, step: Any,
) -> Any:  # fmt: skip
    return _silu(plain(x, w, b, stride, padding, dilation, groups, dim, start, end, step))


def _plain_call(x: Any, w: Any, b: Any) -> Any:
    return torch.ops.causal_conv.forward.default(x, w, b, False, False)


def _activated_call(x: Any, w: Any, b: Any) -> Any:
    return torch.ops.causal_conv.forward.default(x, w, b, True, False)


def _guard(
    x: Any, w: Any, b: Any, stride: Any, padding: Any, dilation: Any, groups: Any,
    dim: Any, start: Any, step: Any, match: Match, options: FuseCausalConvolution,
) -> Reason | None:  # fmt: skip
    root = match.roots[0]
    value, weight, result = x.meta["val"], w.meta["val"], root.meta["val"]
    if value.dim() != 3:
        return Reason("it has no batch", (x.name,))
    if groups != value.shape[1] or weight.shape[0] != value.shape[1]:
        return Reason("it is not depthwise", (root.name,))
    if list(stride) != [1] or list(dilation) != [1]:
        return Reason("its filter skips values", (root.name,))
    if list(padding) != [weight.shape[-1] - 1]:
        return Reason("what is kept of it is not causal", (root.name,))
    whole = step == 1 and start in (0, None) and dim in (2, -1) and result.shape[-1] == value.shape[-1]
    if not whole:
        return Reason("another part of it is kept than the first values, as many as are given", (root.name,))
    if result.dtype is not value.dtype:
        return Reason("autocast computes it in another dtype", (root.name,))
    reason = supports(value, weight, None if b is None else b.meta["val"], False, False)
    if reason is not None:
        return Reason(f"the kernel {reason.text}", (root.name,))
    if not (value.is_cuda or options.everywhere):
        return Reason(f"no kernel runs on {value.device.type}, where the call gains nothing", (root.name,))
    return None


@dataclass(frozen=True)
class FuseCausalConvolution(RewritePass):
    """Fuses causal depthwise convolutions. ``everywhere``: also on devices that the call has no kernel
    for, which gains nothing."""

    name: ClassVar[str] = "fuse-causal-convolution"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = "call causal depthwise convolution with its activation"
    after: ClassVar[dict[str, str]] = {"normalize": "slices of everything hide what reads a convolution"}
    before: ClassVar[dict[str, str]] = {"fuse-convolution": "it knows convolutions with what follows them"}
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("activated", activated, _activated_call, _guard, "reassociated"),
        Rule("plain", plain, _plain_call, _guard, "reassociated"),
    )

    everywhere: bool = False
