"""What attention that was written out looks like, and what every rule for it asks.

Patterns are functions of captures (docs/rules.md): products of queries and transposed keys, scales, masks,
softmax over the keys, products with values.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from graphopt.candidate import Reason
from graphopt.capture.aliasing import Aliases
from graphopt.capture.structure import is_trained_input
from graphopt.passes import PassContext
from graphopt.plugins import default_host
from graphopt.program import Program
from graphopt.rules import Match, either, operator
from graphopt_passes.constant_values import constant_value, hides_a_row
from graphopt_passes.drawn_seed import ALLOWED_BY, no_known_rate

__all__ = [
    "attended",
    "biased",
    "cast",
    "chosen",
    "drops",
    "factor",
    "fill_for_hidden",
    "filled",
    "guard_bias",
    "guard_choice",
    "guard_dropout",
    "guard_kernel",
    "guard_products",
    "masked",
    "number",
    "over",
    "scaled_scores",
    "short",
    "times",
    "trained_part",
    "twice_biased",
    "unmasked",
    "untransposed",
]

_aten = torch.ops.aten

_product = operator(_aten.matmul.default, _aten.bmm.default)
times = operator(_aten.mul.Tensor, _aten.mul.Scalar, commutes=True)
over = operator(_aten.div.Tensor, _aten.div.Scalar)
_plus = operator(_aten.add.Tensor, commutes=True)
cast = operator(_aten.to.dtype, _aten._to_copy.default)
_cast_like = operator(_aten.type_as.default)
_fill = operator(_aten.masked_fill.Scalar)
_choose = operator(_aten.where.self, _aten.where.ScalarOther)
_softmax = operator(_aten.softmax.int)
_dropout = operator(_aten.dropout.default)

_WIDEST = 256
_WIDEST_FLOAT32 = 128

_CASTS = (_aten.to.dtype, _aten._to_copy.default, _aten.type_as.default)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_INFINITY = float("inf")
_FAR_BELOW = -1e4
"""Scores are taken to lie far above this: their softmax beside one so low is exactly one."""


def scaled_scores(query: Any, keys: Any, scale: Any, divisor: Any) -> Any:
    """Products of queries and transposed keys, scaled."""
    product = _product(query, keys)
    shown = either(cast(product, dtype=...), product)
    scaled = either(times(shown, scale), over(shown, divisor), shown)
    return either(cast(scaled, dtype=...), scaled)


def attended(scores: Any, dim: Any, value: Any, rate: Any, training: Any) -> Any:
    """Values weighted by the softmax of ``scores``, of which dropout leaves some."""
    weights = _softmax(scores, dim, ...)
    rounded = either(cast(weights, dtype=...), _cast_like(weights, ...), weights)
    return _product(either(_dropout(rounded, rate, training), rounded), value)


def masked(scores: Any, **by: Any) -> Any:
    """``scores`` with a ``bias`` added, ``further`` too, or where ``hidden``, or not ``visible``, replaced by
    ``low``."""
    if "further" in by:
        changed = _plus(_plus(scores, by["bias"]), by["further"])
    elif "bias" in by:
        changed = _plus(scores, by["bias"])
    elif "hidden" in by:
        changed = _fill(scores, by["hidden"], by["low"])
    else:
        changed = _choose(by["visible"], scores, by["low"])
    return either(cast(changed, dtype=...), changed)


def unmasked(
    query: Any, keys: Any, scale: Any, divisor: Any, dim: Any, value: Any, rate: Any, training: Any
) -> Any:
    return attended(scaled_scores(query, keys, scale, divisor), dim, value, rate, training)


def biased(
    query: Any, keys: Any, scale: Any, divisor: Any, bias: Any, dim: Any, value: Any, rate: Any, training: Any
) -> Any:
    scores = masked(scaled_scores(query, keys, scale, divisor), bias=bias)
    return attended(scores, dim, value, rate, training)


def twice_biased(
    query: Any, keys: Any, scale: Any, divisor: Any, bias: Any, further: Any, dim: Any, value: Any, rate: Any,
    training: Any,
) -> Any:  # fmt: skip
    scores = scaled_scores(query, keys, scale, divisor)
    return attended(masked(scores, bias=bias, further=further), dim, value, rate, training)


def filled(
    query: Any, keys: Any, scale: Any, divisor: Any, hidden: Any, low: Any, dim: Any, value: Any, rate: Any,
    training: Any,
) -> Any:  # fmt: skip
    scores = masked(scaled_scores(query, keys, scale, divisor), hidden=hidden, low=low)
    return attended(scores, dim, value, rate, training)


def chosen(
    query: Any, keys: Any, scale: Any, divisor: Any, visible: Any, low: Any, dim: Any, value: Any, rate: Any,
    training: Any,
) -> Any:  # fmt: skip
    scores = masked(scaled_scores(query, keys, scale, divisor), visible=visible, low=low)
    return attended(scores, dim, value, rate, training)


def untransposed(keys: Any) -> Any:
    """Keys, a row each, from a proxy of their transpose."""
    node = keys.node
    last = {node.meta["val"].dim() - 1, node.meta["val"].dim() - 2}
    swaps = node.target is _aten.transpose.int and {axis % (max(last) + 1) for axis in node.args[1:]} == last
    return fx.Proxy(node.args[0], keys.tracer) if swaps else _aten.transpose.int(keys, -2, -1)


def fill_for_hidden(low: Any, choice: Any, dtype: torch.dtype, *, hidden: bool) -> Any:
    """What is added to scores where they are hidden: as low as the dtype has it. ``choice`` is ``hidden``
    where scores are."""
    least = max(number(low) or 0.0, torch.finfo(dtype).min)
    added = (least, 0.0) if hidden else (0.0, least)
    return _aten.to.dtype(_aten.where.Scalar(choice, *added), dtype)


def number(value: Any, aliases: Aliases | None = None) -> float | None:
    """A literal, or a scalar of the program that depends on no input. ``aliases``: as far as unchecked."""
    if isinstance(value, (int, float)):
        return float(value)
    node = value.node if isinstance(value, fx.Proxy) else value
    found = constant_value(node, "the scale", aliases) if isinstance(node, fx.Node) else None
    return float(found) if isinstance(found, torch.Tensor) and found.numel() == 1 else None


def factor(scale: Any, divisor: Any) -> float:
    """What values are multiplied by, or divided."""
    if divisor is not None:
        return 1.0 / (number(divisor) or 1.0)
    return 1.0 if scale is None else number(scale) or 0.0


# --- guards -------------------------------------------------------------------------------------


def drops(rate: Any, training: Any) -> bool:
    """Whether weights are dropped: dropout that is off is left in a pattern as well."""
    return bool(rate is not None and training and rate)


def guard_dropout(match: Match, options: Any, ctx: PassContext) -> Reason | None:
    """Dropout of weights, where it may draw other numbers."""
    captures, root = match.captures, match.roots[0].name
    if not drops(captures["rate"], captures["training"]):
        return None
    if ALLOWED_BY not in ctx.allow:
        where = next(node.name for node in match.nodes if node.target is _aten.dropout.default)
        return Reason("dropout of weights: a fused kernel draws other random numbers", (where,))
    if factor(captures["scale"], captures["divisor"]) < 0:
        return Reason("the scale of the scores is below zero", (root,))
    return no_known_rate(captures["rate"], root) or guard_kernel(
        captures["query"], options.everywhere, root
    )


def guard_kernel(query: fx.Node, everywhere: bool, root: str) -> Reason | None:
    """Whether ``graphopt.attention`` has a kernel for heads such as ``query``."""
    if "attention" not in default_host().kernels():
        return Reason("the kernel attention is not installed", (root,))
    known = query.meta["val"]
    if not known.is_cuda and not everywhere:
        return Reason(f"no kernel runs on {known.device.type}, where the operator gains nothing", (root,))
    widest = _WIDEST_FLOAT32 if known.dtype is torch.float32 else _WIDEST
    if not isinstance(known.shape[-1], int) or known.shape[-1] > widest:
        return Reason(f"heads of {known.shape[-1]} elements do not fit the registers of a program", (root,))
    return None


def guard_products(match: Match) -> Reason | None:
    """Operands that kernels take, and nothing in between that they would do otherwise."""
    root = match.roots[0]
    query, keys, value = (match.captures[name] for name in ("query", "keys", "value"))
    sizes = []
    for operand in (query, keys, value):
        known = operand.meta.get("val") if isinstance(operand, fx.Node) else None
        if not isinstance(known, torch.Tensor) or known.dim() not in (3, 4):
            return Reason("queries, keys and values are not batches of matrices", (root.name,))
        if known.dtype not in _DTYPES or known.dtype is not query.meta["val"].dtype:
            return Reason(f"no kernel takes {short(known.dtype)} here", (operand.name,))
        sizes.append(known.shape)
    batch = sizes[0][:-2]
    if any(len(size) != len(sizes[0]) or size[:-2] != batch for size in sizes):
        return Reason("heads are broadcast in the products", (root.name,))
    if sizes[0][-1] != sizes[2][-1]:
        return Reason("keys and values are of other widths", (root.name,))
    if root.meta["val"].dtype is not query.meta["val"].dtype:
        return Reason("the result is of another dtype than the queries", (root.name,))
    for node in match.nodes:
        if node.target is _aten.softmax.int and match.captures["dim"] not in (-1, len(sizes[0]) - 1):
            return Reason("softmax is not over the keys", (node.name,))
        if node.target in _CASTS and node.meta["val"].dtype not in (torch.float32, query.meta["val"].dtype):
            return Reason(f"scores are rounded to {short(node.meta['val'].dtype)}", (node.name,))
    for name in ("scale", "divisor"):
        given = match.captures[name]
        if given is not None and not number(given, match.line.aliases):
            return Reason("the scale of the scores is not a known number", (root.name,))
    return None


def guard_bias(match: Match, program: Program, name: str = "bias") -> Reason | None:
    """What is added to the scores can be told to a kernel as it is, and hides no row whole."""
    query, bias = match.captures["query"], match.captures[name]
    known = bias.meta.get("val") if isinstance(bias, fx.Node) else None
    if not isinstance(known, torch.Tensor) or not 2 <= known.dim() <= query.meta["val"].dim():
        return Reason("what is added to the scores is no mask", (match.roots[0].name,))
    if known.dtype is not query.meta["val"].dtype:
        dtype = short(query.meta["val"].dtype)
        return Reason(f"the mask is {short(known.dtype)} and would be rounded to {dtype}", (bias.name,))
    given = [spec.node for spec in program.signature.by_role("input", "activation")]
    return hides_a_row(bias, match.line.aliases, given)


def guard_choice(match: Match, name: str, *, hidden: bool, added: bool) -> Reason | None:
    """What hides scores. ``hidden``: its value where it does; ``added``: the kernel is told a low number,
    not the choice."""
    root, query, choice = match.roots[0].name, match.captures["query"], match.captures[name]
    known = choice.meta.get("val") if isinstance(choice, fx.Node) else None
    if not isinstance(known, torch.Tensor) or not 2 <= known.dim() <= query.meta["val"].dim():
        return Reason("what hides scores is no mask", (root,))
    if known.dtype is not torch.bool:
        return Reason(f"what hides scores is {short(known.dtype)}", (choice.name,))
    low = number(match.captures["low"], match.line.aliases)
    if low is None:
        return Reason("what stands for hidden scores is not a known number", (root,))
    if low > _FAR_BELOW:
        return Reason(f"hidden scores are set to {low:g}, which may still count", (root,))
    if not added:
        whole = hides_a_row(choice, match.line.aliases, hidden=hidden)
        return whole and Reason(f"a row may be hidden whole, which is zero when fused: {whole}", (root,))
    # Added to a score, a number as low as this leaves nothing of it: rows that are hidden whole stay even.
    if not -_INFINITY < low <= torch.finfo(torch.float32).min / 2:
        return Reason(f"scores show through beside {low:g}", (root,))
    if query.meta["val"].dtype is torch.float16:
        return Reason("float16 has no number so low that scores do not show through", (root,))
    return None


def trained_part(node: fx.Node) -> fx.Node | None:
    """An input that gradients flow to from ``node``."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if is_trained_input(node):
            return node
        if node not in seen and node.target is not _aten.detach.default:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return None


def short(dtype: torch.dtype) -> str:
    """As PyTorch names it, without its prefix."""
    return str(dtype).removeprefix("torch.")
