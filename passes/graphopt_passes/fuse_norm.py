"""fuse-norm: RMSNorm and LayerNorm become one call, whose backward reads every row once.

Before::

    %22 = aten.to.dtype(%2, f32) : f32[2,16,64]
    %23 = aten.pow.Tensor_Scalar(%22, 2)
    %24 = aten.mean.dim(%23, [-1], True) : f32[2,16,1]
    %25 = aten.add.Tensor(%24, 1e-06)
    %26 = aten.rsqrt(%25)
    %27 = aten.mul.Tensor(%22, %26)
    %28 = aten.to.dtype(%27, bf16) : bf16[2,16,64]
    %29 = aten.mul.Tensor(weight, %28)

After::

    %22 = graphopt.row_norm(%2, weight, None, 1e-06, False, 0.0, True, bf16)
    %29 = getitem(%22, 0)

What autograd derives from single operators is two reductions over the same rows, one along them for the
input and one across them for the weight. Code generators make a kernel of each, and both read the gradient
and the input. ``graphopt.row_norm_backward`` does both in one reading.
"""

from __future__ import annotations

import operator as python_operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from graphopt.candidate import CostDelta, Reason
from graphopt.passes import PassContext
from graphopt.plugins import default_host
from graphopt.program import Level
from graphopt.rules import Match, RewritePass, Rule, either, operator

__all__ = ["FuseNorm"]

_aten = torch.ops.aten

_cast = operator(_aten.to.dtype, _aten._to_copy.default)
_cast_like = operator(_aten.type_as.default)
_power = operator(_aten.pow.Tensor_Scalar)
_times = operator(_aten.mul.Tensor, commutes=True)
_plus = operator(_aten.add.Tensor, commutes=True)
_mean = operator(_aten.mean.dim)
_rsqrt = operator(_aten.rsqrt.default)
_rms_norm = operator(_aten.rms_norm.default)
_layer_norm = operator(_aten.layer_norm.default)

_CASTS = (_aten.to.dtype, _aten._to_copy.default, _aten.type_as.default)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_WIDEST = 16384
_NARROWEST = 512


def _normalized(x: Any, dims: Any, keepdim: Any, eps: Any) -> Any:
    """``x`` over its root mean square, in float32."""
    wide = either(_cast(x, dtype=...), x)
    square = either(_power(wide, 2), _times(wide, wide))
    return _times(wide, _rsqrt(_plus(_mean(square, dims, keepdim), eps)))


def _factor(weight: Any, offset: Any) -> Any:
    wide = either(_cast(weight, dtype=...), weight)
    return either(_plus(wide, offset), wide)


def rounded_first(x: Any, dims: Any, keepdim: Any, eps: Any, dtype: Any, weight: Any) -> Any:
    return _times(weight, _cast(_normalized(x, dims, keepdim, eps), dtype))


def rounded_like(x: Any, dims: Any, keepdim: Any, eps: Any, like: Any, weight: Any) -> Any:
    return _times(weight, _cast_like(_normalized(x, dims, keepdim, eps), like))


def rounded_last(x: Any, dims: Any, keepdim: Any, eps: Any, weight: Any, offset: Any, dtype: Any) -> Any:
    return _cast(_times(_normalized(x, dims, keepdim, eps), _factor(weight, offset)), dtype)


def rounded_last_like(x: Any, dims: Any, keepdim: Any, eps: Any, weight: Any, offset: Any, like: Any) -> Any:
    return _cast_like(_times(_normalized(x, dims, keepdim, eps), _factor(weight, offset)), like)


def unrounded(x: Any, dims: Any, keepdim: Any, eps: Any, weight: Any, offset: Any) -> Any:
    return _times(_normalized(x, dims, keepdim, eps), _factor(weight, offset))


def rms_norm(x: Any, shape: Any, weight: Any, eps: Any) -> Any:
    return _rms_norm(x, shape, weight, eps)


def layer_norm(x: Any, shape: Any, weight: Any, bias: Any, eps: Any) -> Any:
    return _layer_norm(x, shape, weight, bias, eps, ...)


def _value(node: Any) -> torch.Tensor | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def _call(
    x: Any, weight: Any, bias: Any, eps: Any, *, centered: bool, offset: Any, rounds: bool, dtype: torch.dtype
) -> Any:
    made = torch.ops.graphopt.row_norm.default(
        x, weight, bias, float(eps), centered, float(offset or 0.0), rounds, dtype
    )
    return python_operator.getitem(made, 0)


def _first(x: Any, eps: Any, dtype: Any, weight: Any) -> Any:
    result = torch.promote_types(dtype, weight.node.meta["val"].dtype)
    narrow = dtype is not torch.float32
    return _call(x, weight, None, eps, centered=False, offset=0, rounds=narrow, dtype=result)


def _first_like(x: Any, eps: Any, like: Any, weight: Any) -> Any:
    return _first(x, eps, like.node.meta["val"].dtype, weight)


def _last(x: Any, eps: Any, weight: Any, offset: Any, dtype: Any) -> Any:
    return _call(x, weight, None, eps, centered=False, offset=offset, rounds=False, dtype=dtype)


def _last_like(x: Any, eps: Any, weight: Any, offset: Any, like: Any) -> Any:
    return _last(x, eps, weight, offset, like.node.meta["val"].dtype)


def _wide(x: Any, eps: Any, weight: Any, offset: Any) -> Any:
    return _last(x, eps, weight, offset, torch.float32)


def _rms(x: Any, weight: Any, eps: Any) -> Any:
    return _last(x, eps, weight, None, x.node.meta["val"].dtype)


def _layer(x: Any, weight: Any, bias: Any, eps: Any) -> Any:
    dtype = x.node.meta["val"].dtype
    return _call(x, weight, bias, eps, centered=True, offset=0, rounds=False, dtype=dtype)


# --- guards -------------------------------------------------------------------------------------


def _guard(x: Any, weight: Any, eps: Any, match: Match, options: FuseNorm, ctx: PassContext) -> Reason | None:
    root = match.roots[0]
    if "row-norm" not in default_host().kernels():
        return Reason("the kernel row-norm is not installed", (root.name,))
    value = _value(x)
    if value is None or not value.dim():
        return Reason("what is normalized is no tensor of rows", (root.name,))
    if value.dtype not in _DTYPES:
        return Reason(f"no kernel takes {_short(value.dtype)}", (x.name,))
    if not value.is_cuda and not options.everywhere:
        return Reason(
            f"no kernel runs on {value.device.type}, where the operator gains nothing", (root.name,)
        )
    width = value.shape[-1]
    if not isinstance(width, int):
        return Reason("the width of the rows is known at run time alone", (x.name,))
    if width > _WIDEST:
        return Reason(f"rows of {width} elements do not fit the registers of a program", (x.name,))
    if width < _NARROWEST and not options.everywhere:
        return Reason(f"code generators fuse rows of {width} elements with what is around them", (x.name,))
    if not value.is_contiguous():
        return Reason("rows are spread over memory", (x.name,))
    if not isinstance(eps, (int, float)):
        return Reason("eps is not a known number", (root.name,))
    known = _value(weight)
    if weight is not None and (known is None or known.shape != value.shape[-1:]):
        return Reason("the weight is not one number for each column", (root.name,))
    if known is not None and known.dtype not in _DTYPES:
        return Reason(f"no kernel takes a weight of {_short(known.dtype)}", (root.name,))
    return None


def _guard_mean(
    x: Any, dims: Any, keepdim: Any, weight: Any, eps: Any, match: Match, options: FuseNorm, ctx: PassContext
) -> Reason | None:
    reason = _guard(x, weight, eps, match, options, ctx)
    if reason is not None:
        return reason
    rank = x.meta["val"].dim()
    if keepdim is not True or not isinstance(dims, (list, tuple)) or [d % rank for d in dims] != [rank - 1]:
        return Reason("the mean is not over the last dimension", (match.roots[0].name,))
    for node in match.inner:
        if (
            node.target in (_aten.rsqrt.default, _aten.mean.dim)
            and node.meta["val"].dtype is not torch.float32
        ):
            return Reason(f"statistics are {_short(node.meta['val'].dtype)}", (node.name,))
        if node.target in _CASTS and node.meta["val"].dtype not in (torch.float32, x.meta["val"].dtype):
            return Reason(f"it is rounded to {_short(node.meta['val'].dtype)} in between", (node.name,))
    return None


def _guard_offset(
    x: Any, dims: Any, keepdim: Any, weight: Any, eps: Any, offset: Any, match: Match, options: FuseNorm,
    ctx: PassContext,
) -> Reason | None:  # fmt: skip
    if offset is not None and not isinstance(offset, (int, float)):
        return Reason("what is added to the weight is not a known number", (match.roots[0].name,))
    return _guard_mean(x, dims, keepdim, weight, eps, match, options, ctx)


def _guard_wide(
    x: Any, dims: Any, keepdim: Any, weight: Any, eps: Any, offset: Any, match: Match, options: FuseNorm,
    ctx: PassContext,
) -> Reason | None:  # fmt: skip
    root = match.roots[0]
    if _value(root) is None or root.meta["val"].dtype is not torch.float32:
        return Reason("the result is rounded in between", (root.name,))
    if len(root.users) == 1 and (reader := next(iter(root.users))).target in _CASTS:
        return Reason("its rounding belongs to it", (reader.name,))
    return _guard_offset(x, dims, keepdim, weight, eps, offset, match, options, ctx)


def _guard_whole(
    x: Any, shape: Any, weight: Any, eps: Any, match: Match, options: FuseNorm, ctx: PassContext
) -> Reason | None:
    if len(shape) != 1:
        return Reason("it normalizes over several dimensions", (match.roots[0].name,))
    reason = _guard(x, weight, eps, match, options, ctx)
    if reason is None and match.roots[0].meta["val"].dtype is not x.meta["val"].dtype:
        return Reason("autocast computes it in another dtype", (match.roots[0].name,))
    return reason


def _guard_layer(
    x: Any, shape: Any, weight: Any, bias: Any, eps: Any, match: Match, options: FuseNorm, ctx: PassContext
) -> Reason | None:
    reason = _guard_whole(x, shape, weight, eps, match, options, ctx)
    known = _value(bias)
    if reason is None and bias is not None and (known is None or known.shape != x.meta["val"].shape[-1:]):
        return Reason("the bias is not one number for each column", (match.roots[0].name,))
    return reason


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class FuseNorm(RewritePass):
    """Fuses norms of rows. ``everywhere``: also on devices that the operator has no kernel for and where
    rows are short, which gains nothing."""

    name: ClassVar[str] = "fuse-norm"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = "call RMSNorm and LayerNorm whose backward reads every row once"
    after: ClassVar[dict[str, str]] = {
        "normalize": "casts to the same type hide norms",
        "chunk": "it knows the operators that models write",
    }
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("rms-norm", rounded_first, _first, _guard_mean, "reassociated", near=5),
        Rule("rms-norm-as", rounded_like, _first_like, _guard_mean, "reassociated", near=5),
        Rule("rms-norm-rounded-last", rounded_last, _last, _guard_offset, "reassociated", near=5),
        Rule(
            "rms-norm-rounded-last-as", rounded_last_like, _last_like, _guard_offset, "reassociated", near=5
        ),
        Rule("rms-norm-float32", unrounded, _wide, _guard_wide, "reassociated", near=5),
        Rule("rms-norm-call", rms_norm, _rms, _guard_whole, "reassociated"),
        Rule("layer-norm-call", layer_norm, _layer, _guard_layer, "reassociated"),
    )

    everywhere: bool = False

    def gain(self, match: Match, ctx: PassContext) -> CostDelta:
        """Beside values in between: the forward reads its input once less, for generated kernels read rows
        again that they do not hold, and the backward gradient and input."""
        written = super().gain(match, ctx).seconds
        value = match.roots[0].meta["val"]
        read = (3 if ctx.mode == "train" else 1) * value.numel() * value.element_size()
        return CostDelta(seconds=written - read / ctx.cost.device.copy_bytes_per_second)
