"""fuse-convolution: in inference a convolution, a residual sum and a ReLU become one kernel.

Before::

    %1 = aten.conv2d(%x, %w, %b, [1, 1], [1, 1])
    %2 = aten.add.Tensor(%1, %r)
    %3 = aten.relu(%2)

After::

    %3 = graphopt.convolution_relu(%x, %w, %b, %r, [1, 1], [1, 1], [1, 1], 1)

Code generators leave convolutions to the library and make a kernel of what follows, which reads the result
and writes it again. The library can do that before it writes. ``fold-batch-norm``, where it is allowed,
removes the norms that stand between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from graphopt.candidate import Reason
from graphopt.passes import PassContext
from graphopt.plugins import default_host
from graphopt.program import Level
from graphopt.rules import Match, RewritePass, Rule, operator

__all__ = ["FuseConvolution"]

_aten = torch.ops.aten

_conv2d = operator(_aten.conv2d.default)
_relu = operator(_aten.relu.default)
_plus = operator(_aten.add.Tensor, commutes=True)

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _plain(x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any) -> Any:
    return _relu(_conv2d(x, weight, bias, stride, padding, dilation, groups))


def _summed(
    x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any, residual: Any
) -> Any:
    return _relu(_plus(_conv2d(x, weight, bias, stride, padding, dilation, groups), residual))


def _pair(numbers: Any, usual: int) -> list[int]:
    """Two numbers for what is given as none, one or two."""
    given = [usual] if numbers is None else [numbers] if isinstance(numbers, int) else list(numbers)
    return given * 2 if len(given) == 1 else given


def _call(
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    residual: Any = None,
) -> Any:
    where = _pair(stride, 1), _pair(padding, 0), _pair(dilation, 1)
    return torch.ops.graphopt.convolution_relu.default(x, weight, bias, residual, *where, groups or 1)


def _fused(x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any) -> Any:
    return _call(x, weight, bias, stride, padding, dilation, groups)


def _guard(
    x: Any, weight: Any, bias: Any, groups: Any, match: Match, options: FuseConvolution, ctx: PassContext
) -> Reason | None:
    root = match.roots[0]
    if "convolution-relu" not in default_host().kernels():
        return Reason("the kernel convolution-relu is not installed", (root.name,))
    if ctx.mode != "infer":
        return Reason("gradients flow through both: in training they stay apart", (root.name,))
    image, filters = x.meta["val"], weight.meta["val"]
    if image.dim() != 4:
        return Reason("the convolution is of one sample", (root.name,))
    known = [image, filters, *(() if bias is None else (bias.meta["val"],)), root.meta["val"]]
    if image.dtype not in _DTYPES or any(value.dtype is not image.dtype for value in known):
        return Reason("operands are of several dtypes, or of one that no kernel takes", (root.name,))
    if groups not in (None, 1):
        return Reason("the convolution is grouped: the library has no such kernel that is fast", (root.name,))
    if options.everywhere:
        return None
    if not image.is_cuda:
        return Reason(f"no kernel runs on {image.device.type}", (root.name,))
    if ctx.emit != "eager" and not _last(image) and not _last(filters):
        return Reason(
            "code generators lay images out channels last, which they do not do for it", (root.name,)
        )
    return None


def _guard_sum(
    x: Any, weight: Any, bias: Any, groups: Any, residual: Any, match: Match, options: FuseConvolution,
    ctx: PassContext,
) -> Reason | None:  # fmt: skip
    reason = _guard(x, weight, bias, groups, match, options, ctx)
    if reason is not None:
        return reason
    root = match.roots[0]
    value = residual.meta.get("val") if hasattr(residual, "meta") else None
    wanted = root.meta["val"]
    if not isinstance(value, torch.Tensor) or value.shape != wanted.shape or value.dtype is not wanted.dtype:
        return Reason("what is added does not look like the result", (root.name,))
    return None


def _last(value: torch.Tensor) -> bool:
    return value.is_contiguous(memory_format=torch.channels_last) and not value.is_contiguous()


@dataclass(frozen=True)
class FuseConvolution(RewritePass):
    """Fuses convolutions with residual sums and ReLUs in inference. ``everywhere``: also on devices that the
    operator has no kernel for, and whatever the layout, which gains nothing."""

    name: ClassVar[str] = "fuse-convolution"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = (
        "compute residual sums and ReLUs within the convolutions before them, in inference"
    )
    after: ClassVar[dict[str, str]] = {
        "normalize": "casts and dropout that do nothing stand between",
        "functionalize": "ReLUs that write in place hide who reads them",
        "fold-batch-norm": "norms stand between",
    }
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("convolution-add-relu", _summed, _call, _guard_sum, "reassociated", near=2),
        Rule("convolution-relu", _plain, _fused, _guard, "reassociated", near=2),
    )

    everywhere: bool = False
