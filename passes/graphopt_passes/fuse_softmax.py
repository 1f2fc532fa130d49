"""fuse-softmax: softmax of long rows, and its logarithm, reads every row once.

Before::

    %4 = aten.softmax.int(%3, -1) : bf16[4096,14336]

After::

    %4 = graphopt.softmax(%3, False, bf16) : bf16[4096,14336]

Code generators read a row for its maximum and sum, and again for the result; the operator holds it in
registers. The gradient stays ATen's, of which code generators make one kernel.

Attention is fused before, with its softmax inside. Where what is around a softmax would be one kernel with
it, such as a scale, a mask or dropout, it stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from graphopt.candidate import CostDelta, Reason
from graphopt.passes import PassContext
from graphopt.plugins import default_host
from graphopt.program import Level
from graphopt.rules import Match, RewritePass, Rule, operator
from graphopt_passes.neighbours import is_generated, readers

__all__ = ["FuseSoftmax"]

_aten = torch.ops.aten
_softmax = operator(_aten.softmax.int)
_log_softmax = operator(_aten.log_softmax.int)

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_WIDEST = 16384
_NARROWEST = 1025
"""Elements of rows that generated kernels read again; shorter ones they hold in registers."""


def softmax(x: Any, dim: Any, dtype: Any) -> Any:
    return _softmax(x, dim, dtype)


def log_softmax(x: Any, dim: Any, dtype: Any) -> Any:
    return _log_softmax(x, dim, dtype)


def _call(x: Any, dtype: Any, *, logarithm: bool) -> Any:
    result = x.node.meta["val"].dtype if dtype is None else dtype
    return torch.ops.graphopt.softmax.default(x, logarithm, result)


def _plain(x: Any, dtype: Any) -> Any:
    return _call(x, dtype, logarithm=False)


def _logarithm(x: Any, dtype: Any) -> Any:
    return _call(x, dtype, logarithm=True)


def _guard(
    x: Any, dim: Any, dtype: Any, match: Match, options: FuseSoftmax, ctx: PassContext
) -> Reason | None:
    root = match.roots[0]
    if "softmax" not in default_host().kernels():
        return Reason("the kernel softmax is not installed", (root.name,))
    value = x.meta["val"]
    if value.dtype not in _DTYPES:
        return Reason(f"no kernel takes {_short(value.dtype)}", (x.name,))
    if not isinstance(dim, int) or not value.dim() or dim % value.dim() != value.dim() - 1:
        return Reason("it is not over the last dimension", (root.name,))
    result = root.meta["val"].dtype
    if result is not (value.dtype if dtype is None else dtype):
        return Reason("autocast computes it in another dtype", (root.name,))
    if torch.promote_types(value.dtype, result) is not result:
        return Reason(f"rows of {_short(value.dtype)} are rounded to {_short(result)} first", (root.name,))
    if not value.is_contiguous():
        return Reason("rows are spread over memory", (x.name,))
    if not options.everywhere:
        if not value.is_cuda:
            kind = value.device.type
            return Reason(f"no kernel runs on {kind}, where the operator gains nothing", (root.name,))
        if not isinstance(value.shape[-1], int):
            return Reason("the width of the rows is known at run time alone", (x.name,))
        if value.shape[-1] < _NARROWEST:
            why = f"code generators hold rows of {value.shape[-1]} elements in registers"
            return Reason(why, (x.name,))
    if value.shape[-1] > _WIDEST:
        why = f"rows of {value.shape[-1]} elements do not fit the registers of a program"
        return Reason(why, (x.name,))
    around = [x, *readers(root)] if ctx.emit != "eager" and not options.everywhere else []
    beside = next((node for node in around if is_generated(node)), None)
    if beside is not None:
        return Reason("code generators make one kernel of it and what is around it", (root.name, beside.name))
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class FuseSoftmax(RewritePass):
    """Fuses softmax of rows. ``everywhere``: also on devices that the operator has no kernel for, where
    rows are short and where it would be one kernel with its neighbours, which gains nothing."""

    name: ClassVar[str] = "fuse-softmax"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = "call softmax that reads long rows once"
    after: ClassVar[dict[str, str]] = {
        "normalize": "dropout that does nothing hides what reads a softmax",
        "fuse-attention": "attention takes its softmax with it",
        "chunk": "it knows the operators that models write",
    }
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("softmax", softmax, _plain, _guard, "reassociated"),
        Rule("log-softmax", log_softmax, _logarithm, _guard, "reassociated"),
    )

    everywhere: bool = False

    def gain(self, match: Match, ctx: PassContext) -> CostDelta:
        """The forward reads its input once less."""
        read = match.captures["x"].meta["val"]
        size = read.numel() * read.element_size()
        return CostDelta(seconds=-size / ctx.cost.device.copy_bytes_per_second)
