"""fuse-quantize: dynamic quantization of rows reads them once, with the norm before it.

Before::

    %3 = graphopt.row_norm(%x, weight, None, 1e-06, False, 0.0, True, bf16)
    %4 = getitem(%3, 0)
    %5 = aten.abs(%4)               %6 = aten.amax(%5, [-1], True)
    %7 = aten.to.dtype(%6, f32)     %8 = aten.div.Tensor(%7, 448.0)    %9 = aten.clamp_min(%8, 1e-12)
    %10 = aten.to.dtype(%4, f32)    %11 = aten.div.Tensor(%10, %9)     %12 = aten.clamp(%11, -448.0, 448.0)
    %13 = aten.to.dtype(%12, f8e4m3fn)

After::

    %3 = graphopt.row_norm_quantize(%x, weight, None, 1e-06, False, 0.0, True, bf16, f8e4m3fn, 448.0, 1e-12)
    %13 = getitem(%3, 0)            %9 = getitem(%3, 1)

A norm reads a row for its statistics, its result once more for the largest element and again for the codes;
in one operator the row stays in registers, and its norm is never written. Rows that are quantized without a
norm before them take ``graphopt.quantize_rows``. Programs that are trained keep it: neither has a gradient.
"""

from __future__ import annotations

import operator as python_operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from graphopt.candidate import CostDelta, Reason
from graphopt.capture.aliasing import written_inputs
from graphopt.passes import PassContext
from graphopt.plugins import default_host
from graphopt.program import Level
from graphopt.rules import Match, RewritePass, Rule, argument, either, operator
from graphopt_passes.neighbours import is_generated

__all__ = ["FuseQuantize"]

_aten = torch.ops.aten

_cast = operator(_aten.to.dtype, _aten._to_copy.default)
_abs = operator(_aten.abs.default)
_amax = operator(_aten.amax.default)
_over = operator(_aten.div.Tensor, _aten.div.Scalar)
_clamp = operator(_aten.clamp.default)
_at_least = operator(_aten.clamp_min.default, _aten.clamp.default)
_round = operator(_aten.round.default)

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_CODES = (torch.float8_e4m3fn, torch.int8)
_WIDEST = 16384
_NARROWEST = 512
_NORM = ("input", "weight", "bias", "eps", "centered", "weight_offset", "rounds_first", "dtype")


def _raw_scale(y: Any, dims: Any, keepdim: Any, limit: Any, least_largest: Any) -> Any:
    """A row's largest magnitude over the limit."""
    found = _amax(_abs(either(_cast(y, dtype=...), y)), dims, keepdim)
    largest = either(_cast(found, dtype=...), found)
    return _over(either(_at_least(largest, least_largest), largest), limit)


def _coded(y: Any, scale: Any, low: Any, high: Any, codes: Any, *, whole: bool) -> Any:
    found = _over(either(_cast(y, dtype=...), y), scale)
    found = _round(found) if whole else found
    return _cast(either(_clamp(found, low, high), found), codes)


def floats(
    y: Any,
    dims: Any,
    keepdim: Any,
    limit: Any,
    least: Any,
    least_largest: Any,
    low: Any,
    high: Any,
    codes: Any,
) -> Any:
    scale = _at_least(_raw_scale(y, dims, keepdim, limit, least_largest), least)
    return _coded(y, scale, low, high, codes, whole=False), scale


def unbounded_floats(
    y: Any, dims: Any, keepdim: Any, limit: Any, least_largest: Any, low: Any, high: Any, codes: Any
) -> Any:
    scale = _raw_scale(y, dims, keepdim, limit, least_largest)
    return _coded(y, scale, low, high, codes, whole=False), scale


def integers(
    y: Any,
    dims: Any,
    keepdim: Any,
    limit: Any,
    least: Any,
    least_largest: Any,
    low: Any,
    high: Any,
    codes: Any,
) -> Any:
    scale = _at_least(_raw_scale(y, dims, keepdim, limit, least_largest), least)
    return _coded(y, scale, low, high, codes, whole=True), scale


def unbounded_integers(
    y: Any, dims: Any, keepdim: Any, limit: Any, least_largest: Any, low: Any, high: Any, codes: Any
) -> Any:
    scale = _raw_scale(y, dims, keepdim, limit, least_largest)
    return _coded(y, scale, low, high, codes, whole=True), scale


def _least(limit: Any, least: Any, least_largest: Any) -> float:
    """The least scale, by a bound of the scale and one of what is divided by the limit."""
    return max(float(least or 0), float(least_largest or 0) / float(limit))


def _norm_of(y: fx.Node) -> fx.Node | None:
    """The norm of rows whose result is ``y``."""
    if y.target is not python_operator.getitem or y.args[1] != 0:
        return None
    norm = y.args[0]
    schema = getattr(getattr(norm, "target", None), "_schema", None)
    is_norm = isinstance(norm, fx.Node) and schema is not None and schema.name == "graphopt::row_norm"
    return norm if is_norm else None  # type: ignore[return-value]


def _quantized(y: Any, limit: Any, least: Any, least_largest: Any, codes: Any) -> Any:
    settings = (codes, float(limit), _least(limit, least, least_largest))
    ops = torch.ops.graphopt
    norm = _norm_of(y.node)
    if norm is None:
        made = ops.quantize_rows.default(y, *settings)
    else:
        given = [argument(norm, name) for name in _NORM]
        proxies = [fx.Proxy(value, y.tracer) if isinstance(value, fx.Node) else value for value in given]
        made = ops.row_norm_quantize.default(*proxies, *settings)
    return python_operator.getitem(made, 0), python_operator.getitem(made, 1)


def _quantized_unbounded(y: Any, limit: Any, least_largest: Any, codes: Any) -> Any:
    return _quantized(y, limit, None, least_largest, codes)


# --- guards -------------------------------------------------------------------------------------


def _guard(
    y: Any, dims: Any, keepdim: Any, limit: Any, least: Any, least_largest: Any, low: Any, high: Any,
    codes: Any, match: Match, options: FuseQuantize, ctx: PassContext,
) -> Reason | None:  # fmt: skip
    root, value = match.roots[0], y.meta["val"]
    missing = {"quantize-rows", "row-norm-quantize"} - set(default_host().kernels())
    if missing:
        return Reason(f"the kernel {min(missing)} is not installed", (root.name,))
    if codes not in _CODES:
        return Reason(f"no kernel quantizes to {_short(codes)}", (root.name,))
    if ctx.mode == "train":
        return Reason("the program is trained, and the operator has no gradient", (root.name,))
    reason = _numbers(limit, least, least_largest, low, high, codes, root)
    if reason is not None:
        return reason
    if not value.dim() or keepdim is not True or [d % value.dim() for d in dims] != [value.dim() - 1]:
        return Reason("the scale is not one of each row", (root.name,))
    for node in match.nodes:
        dtype = node.meta["val"].dtype
        is_exact = node.target in (_aten.abs.default, _aten.amax.default)
        if node is not root and not is_exact and dtype is not torch.float32:
            return Reason(f"scale or quotient are {_short(dtype)}", (node.name,))
    return _rows(y, match, options, ctx)


def _guard_unbounded(
    y: Any, dims: Any, keepdim: Any, limit: Any, least_largest: Any, low: Any, high: Any, codes: Any,
    match: Match, options: FuseQuantize, ctx: PassContext,
) -> Reason | None:  # fmt: skip
    return _guard(y, dims, keepdim, limit, None, least_largest, low, high, codes, match, options, ctx)


def _numbers(
    limit: Any, least: Any, least_largest: Any, low: Any, high: Any, codes: torch.dtype, root: fx.Node
) -> Reason | None:
    """Whether bounds are those that the operator keeps to."""
    most = 127 if codes is torch.int8 else torch.finfo(codes).max
    if type(limit) not in (int, float) or not 0 < limit <= most:
        return Reason(f"the limit is no known number above 0 and up to {most:g}", (root.name,))
    for bound in (least, least_largest):
        if bound is not None and (type(bound) not in (int, float) or bound < 0):
            return Reason("the least scale is not a known number", (root.name,))
    if codes is torch.int8 and limit != int(limit):
        return Reason("the limit of integers is none", (root.name,))
    # A whole code is never below -limit, so that of -limit - 1 is the same bound.
    lowest = (None, -limit, -limit - 1) if codes is torch.int8 else (None, -limit)
    if low not in lowest or high not in (None, limit):
        return Reason(f"codes are clamped to something else than {limit:g}", (root.name,))
    return None


def _rows(y: fx.Node, match: Match, options: FuseQuantize, ctx: PassContext) -> Reason | None:
    """Whether the kernels take the rows ``y``."""
    root, norm = match.roots[0], _norm_of(y)
    source = y if norm is None else argument(norm, "input")
    value = source.meta["val"]
    for rows in (value, y.meta["val"]):
        if rows.dtype not in _DTYPES:
            return Reason(f"no kernel takes {_short(rows.dtype)}", (source.name,))
    if not value.is_contiguous():
        return Reason("rows are spread over memory", (source.name,))
    if not options.everywhere:
        if not value.is_cuda:
            kind = value.device.type
            return Reason(f"no kernel runs on {kind}, where the operator gains nothing", (root.name,))
        if isinstance(value.shape[-1], int) and value.shape[-1] < _NARROWEST:
            why = f"code generators hold rows of {value.shape[-1]} elements in registers"
            return Reason(why, (source.name,))
    if not isinstance(value.shape[-1], int):
        return Reason("the width of the rows is known at run time alone", (source.name,))
    if value.shape[-1] > _WIDEST:
        why = f"rows of {value.shape[-1]} elements do not fit the registers of a program"
        return Reason(why, (source.name,))
    if norm is not None:
        return _unwritten(norm, match)
    if ctx.emit != "eager" and not options.everywhere and is_generated(y):
        return Reason("code generators make one kernel of it and what is before it", (root.name, y.name))
    return None


def _unwritten(norm: fx.Node, match: Match) -> Reason | None:
    """Whether the operator, which runs where the codes did, reads what the norm read."""
    line = match.line
    last = max(line.position[node] for node in match.nodes)
    roots = {root for ref in norm.all_input_nodes for root in line.aliases.roots.get(ref, ())}
    for node in line.nodes[line.position[norm] : last]:
        if roots & {root for ref in written_inputs(node) for root in line.aliases.roots[ref]}:
            return Reason("what the norm reads is written before its result is quantized", (node.name,))
    return None


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class FuseQuantize(RewritePass):
    """Fuses dynamic quantization of rows with the norm before it. ``everywhere``: also on devices that the
    operators have no kernel for and where rows are short, which gains nothing."""

    name: ClassVar[str] = "fuse-quantize"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = "quantize rows as they are normalized"
    after: ClassVar[dict[str, str]] = {
        "normalize": "casts to the same type hide what is quantized",
        "fuse-norm": "it makes the norms that this takes in",
    }
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("quantize-floats", floats, _quantized, _guard, "reassociated", near=5),
        Rule(
            "quantize-floats-unbounded", unbounded_floats, _quantized_unbounded, _guard_unbounded,
            "reassociated", near=5,
        ),
        Rule("quantize-integers", integers, _quantized, _guard, "reassociated", near=5),
        Rule(
            "quantize-integers-unbounded", unbounded_integers, _quantized_unbounded, _guard_unbounded,
            "reassociated", near=5,
        ),
    )  # fmt: skip

    everywhere: bool = False

    def gain(self, match: Match, ctx: PassContext) -> CostDelta:
        """Beside values in between: rows are read once less, and a norm is not written."""
        y = match.captures["y"]
        size = y.meta["val"].numel() * y.meta["val"].element_size()
        moved = size * (1 if _norm_of(y) is None else 3)
        seconds = super().gain(match, ctx).seconds - moved / ctx.cost.device.copy_bytes_per_second
        return CostDelta(seconds=seconds)
