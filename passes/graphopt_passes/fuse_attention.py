"""fuse-attention: attention that was written out becomes one call, which never holds its scores.

Before::

    %9 = aten.matmul(%q, %kT) : f32[2,4,512,512]
    %10 = aten.mul.Tensor(%9, 0.125)
    %11 = aten.masked_fill.Scalar(%10, %hidden, -inf)
    %12 = aten.softmax.int(%11, -1)
    %13 = aten.matmul(%12, %v) : f32[2,4,512,64]

After::

    %9 = aten.bitwise_not(%hidden)
    %10 = aten.scaled_dot_product_attention(%q, %k, %v, %9, scale=0.125) : f32[2,4,512,64]

Scores take memory with the square of the length, and so does what autograd keeps of them; kernels that
hold one tile of them at a time take none (Rabe and Staats 2021; Dao et al. 2022).

A row that a mask hides whole is NaN when softmax is written out and zero in the fused call: where a mask
may hold one, attention stays as it is. So it does under dropout: fused kernels draw other random
numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from graphopt.candidate import Reason
from graphopt.capture.aliasing import Aliases
from graphopt.capture.structure import is_trained_input
from graphopt.program import Level, Program
from graphopt.rules import Match, RewritePass, Rule, either, operator
from graphopt_passes.constant_values import constant_value, hides_a_row

__all__ = ["FuseAttention"]

_aten = torch.ops.aten

_product = operator(_aten.matmul.default, _aten.bmm.default)
_times = operator(_aten.mul.Tensor, _aten.mul.Scalar, commutes=True)
_over = operator(_aten.div.Tensor, _aten.div.Scalar)
_plus = operator(_aten.add.Tensor, commutes=True)
_cast = operator(_aten.to.dtype, _aten._to_copy.default)
_fill = operator(_aten.masked_fill.Scalar)
_choose = operator(_aten.where.self, _aten.where.ScalarOther)
_softmax = operator(_aten.softmax.int)
_dropout = operator(_aten.dropout.default)

_CASTS = (_aten.to.dtype, _aten._to_copy.default)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_INFINITY = float("inf")
_FAR_BELOW = -1e4
"""Scores are taken to lie far above this: their softmax beside one so low is exactly one."""


def _scores(query: Any, keys: Any, scale: Any, divisor: Any) -> Any:
    """Products of queries and transposed keys, scaled."""
    product = _product(query, keys)
    shown = either(_cast(product, dtype=...), product)
    scaled = either(_times(shown, scale), _over(shown, divisor), shown)
    return either(_cast(scaled, dtype=...), scaled)


def _attended(scores: Any, dim: Any, value: Any) -> Any:
    weights = _softmax(scores, dim, ...)
    rounded = either(_cast(weights, dtype=...), weights)
    return _product(either(_dropout(rounded, ..., ...), rounded), value)


def unmasked(query: Any, keys: Any, scale: Any, divisor: Any, dim: Any, value: Any) -> Any:
    return _attended(_scores(query, keys, scale, divisor), dim, value)


def biased(query: Any, keys: Any, scale: Any, divisor: Any, bias: Any, dim: Any, value: Any) -> Any:
    scores = _plus(_scores(query, keys, scale, divisor), bias)
    return _attended(either(_cast(scores, dtype=...), scores), dim, value)


def filled(
    query: Any, keys: Any, scale: Any, divisor: Any, hidden: Any, low: Any, dim: Any, value: Any
) -> Any:
    scores = _fill(_scores(query, keys, scale, divisor), hidden, low)
    return _attended(either(_cast(scores, dtype=...), scores), dim, value)


def chosen(
    query: Any, keys: Any, scale: Any, divisor: Any, visible: Any, low: Any, dim: Any, value: Any
) -> Any:
    scores = _choose(visible, _scores(query, keys, scale, divisor), low)
    return _attended(either(_cast(scores, dtype=...), scores), dim, value)


def _fused(query: Any, keys: Any, value: Any, mask: Any, rank_of_mask: int, factor: float) -> Any:
    """``scaled_dot_product_attention``; ``keys`` are transposed."""
    key = _untransposed(keys)
    if query.node.meta["val"].dim() == 4:
        return _aten.scaled_dot_product_attention.default(query, key, value, mask, scale=factor)
    # Kernels take a dimension of heads.
    query, key, value = (_aten.unsqueeze.default(x, 1) for x in (query, key, value))
    if rank_of_mask == 3:
        mask = _aten.unsqueeze.default(mask, 1)
    fused = _aten.scaled_dot_product_attention.default(query, key, value, mask, scale=factor)
    return _aten.squeeze.dim(fused, 1)


def _untransposed(keys: Any) -> Any:
    node = keys.node
    last = {node.meta["val"].dim() - 1, node.meta["val"].dim() - 2}
    swaps = node.target is _aten.transpose.int and {axis % (max(last) + 1) for axis in node.args[1:]} == last
    return fx.Proxy(node.args[0], keys.tracer) if swaps else _aten.transpose.int(keys, -2, -1)


def _plain(query: Any, keys: Any, value: Any, scale: Any, divisor: Any) -> Any:
    return _fused(query, keys, value, None, 0, _factor(scale, divisor))


def _with_bias(query: Any, keys: Any, value: Any, bias: Any, scale: Any, divisor: Any) -> Any:
    return _fused(query, keys, value, bias, bias.node.meta["val"].dim(), _factor(scale, divisor))


def _with_hidden(query: Any, keys: Any, value: Any, hidden: Any, scale: Any, divisor: Any) -> Any:
    mask = _aten.bitwise_not.default(hidden)
    return _fused(query, keys, value, mask, hidden.node.meta["val"].dim(), _factor(scale, divisor))


def _with_visible(query: Any, keys: Any, value: Any, visible: Any, scale: Any, divisor: Any) -> Any:
    return _fused(query, keys, value, visible, visible.node.meta["val"].dim(), _factor(scale, divisor))


def _with_hidden_added(
    query: Any, keys: Any, value: Any, hidden: Any, low: Any, scale: Any, divisor: Any
) -> Any:
    dtype = query.node.meta["val"].dtype
    mask = _aten.to.dtype(_aten.where.Scalar(hidden, _least(low, dtype), 0.0), dtype)
    return _fused(query, keys, value, mask, hidden.node.meta["val"].dim(), _factor(scale, divisor))


def _with_visible_added(
    query: Any, keys: Any, value: Any, visible: Any, low: Any, scale: Any, divisor: Any
) -> Any:
    dtype = query.node.meta["val"].dtype
    mask = _aten.to.dtype(_aten.where.Scalar(visible, 0.0, _least(low, dtype)), dtype)
    return _fused(query, keys, value, mask, visible.node.meta["val"].dim(), _factor(scale, divisor))


def _least(low: Any, dtype: torch.dtype) -> float:
    """What stands for hidden scores, as low as the dtype has it."""
    return max(_number(low) or 0.0, torch.finfo(dtype).min)


def _number(value: Any, aliases: Aliases | None = None) -> float | None:
    """A literal, or a scalar of the program that depends on no input. ``aliases``: as far as unchecked."""
    if isinstance(value, (int, float)):
        return float(value)
    node = value.node if isinstance(value, fx.Proxy) else value
    found = constant_value(node, "the scale", aliases) if isinstance(node, fx.Node) else None
    return float(found) if isinstance(found, torch.Tensor) and found.numel() == 1 else None


def _factor(scale: Any, divisor: Any) -> float:
    """What the products are multiplied by."""
    if divisor is not None:
        return 1.0 / (_number(divisor) or 1.0)
    return 1.0 if scale is None else _number(scale) or 0.0


# --- guards -------------------------------------------------------------------------------------


def _guard(
    query: Any, keys: Any, value: Any, scale: Any, divisor: Any, dim: Any, match: Match
) -> Reason | None:
    root = match.roots[0]
    sizes = []
    for operand in (query, keys, value):
        known = operand.meta.get("val") if isinstance(operand, fx.Node) else None
        if not isinstance(known, torch.Tensor) or known.dim() not in (3, 4):
            return Reason("queries, keys and values are not batches of matrices", (root.name,))
        if known.dtype not in _DTYPES or known.dtype is not query.meta["val"].dtype:
            return Reason(f"no kernel takes {_short(known.dtype)} here", (operand.name,))
        sizes.append(known.shape)
    batch = sizes[0][:-2]
    if any(len(size) != len(sizes[0]) or size[:-2] != batch for size in sizes):
        return Reason("heads are broadcast in the products", (root.name,))
    if sizes[0][-1] != sizes[2][-1]:
        return Reason("keys and values are of other widths", (root.name,))
    if root.meta["val"].dtype is not query.meta["val"].dtype:
        return Reason("the result is of another dtype than the queries", (root.name,))
    for node in match.nodes:
        if node.target is _aten.softmax.int and dim not in (-1, len(sizes[0]) - 1):
            return Reason("softmax is not over the keys", (node.name,))
        if node.target in _CASTS and node.meta["val"].dtype not in (torch.float32, query.meta["val"].dtype):
            return Reason(f"scores are rounded to {_short(node.meta['val'].dtype)}", (node.name,))
        if node.target is _aten.dropout.default and node.args[1] and node.args[2]:
            return Reason("dropout of weights: a fused kernel draws other random numbers", (node.name,))
    for factor in (scale, divisor):
        if factor is not None and not _number(factor, match.line.aliases):
            return Reason("the scale of the scores is not a known number", (root.name,))
    return None


def _guard_bias(
    query: Any, keys: Any, value: Any, scale: Any, divisor: Any, bias: Any, dim: Any, match: Match,
    program: Program,
) -> Reason | None:  # fmt: skip
    reason = _guard(query, keys, value, scale, divisor, dim, match)
    if reason is not None:
        return reason
    known = bias.meta.get("val") if isinstance(bias, fx.Node) else None
    if not isinstance(known, torch.Tensor) or not 2 <= known.dim() <= query.meta["val"].dim():
        return Reason("what is added to the scores is no mask", (match.roots[0].name,))
    if known.dtype is not query.meta["val"].dtype:
        dtype = _short(query.meta["val"].dtype)
        return Reason(f"the mask is {_short(known.dtype)} and would be rounded to {dtype}", (bias.name,))
    if known.device.type == "cpu" and (source := _trained(bias)) is not None:
        return Reason("the bias is trained, and no fused kernel of a CPU gives its gradient", (source.name,))
    given = [spec.node for spec in program.signature.by_role("input", "activation")]
    return hides_a_row(bias, match.line.aliases, given)


def _guard_hidden(
    query: Any, keys: Any, value: Any, scale: Any, divisor: Any, hidden: Any, low: Any, dim: Any,
    match: Match,
) -> Reason | None:  # fmt: skip
    return _guard(query, keys, value, scale, divisor, dim, match) or _guard_choice(
        query, hidden, low, match, hidden=True
    )


def _guard_visible(
    query: Any, keys: Any, value: Any, scale: Any, divisor: Any, visible: Any, low: Any, dim: Any,
    match: Match,
) -> Reason | None:  # fmt: skip
    return _guard(query, keys, value, scale, divisor, dim, match) or _guard_choice(
        query, visible, low, match, hidden=False
    )


def _guard_hidden_added(
    query: Any, keys: Any, value: Any, scale: Any, divisor: Any, hidden: Any, low: Any, dim: Any,
    match: Match,
) -> Reason | None:  # fmt: skip
    return _guard(query, keys, value, scale, divisor, dim, match) or _guard_choice(query, hidden, low, match)


def _guard_visible_added(
    query: Any, keys: Any, value: Any, scale: Any, divisor: Any, visible: Any, low: Any, dim: Any,
    match: Match,
) -> Reason | None:  # fmt: skip
    return _guard(query, keys, value, scale, divisor, dim, match) or _guard_choice(query, visible, low, match)


def _guard_choice(
    query: Any, choice: Any, low: Any, match: Match, hidden: bool | None = None
) -> Reason | None:
    """``hidden``: the boolean that hides a score, where attention is to be told booleans."""
    root = match.roots[0].name
    known = choice.meta.get("val") if isinstance(choice, fx.Node) else None
    if not isinstance(known, torch.Tensor) or not 2 <= known.dim() <= query.meta["val"].dim():
        return Reason("what hides scores is no mask", (root,))
    if known.dtype is not torch.bool:
        return Reason(f"what hides scores is {_short(known.dtype)}", (choice.name,))
    number = _number(low, match.line.aliases)
    if number is None:
        return Reason("what stands for hidden scores is not a known number", (root,))
    if number > _FAR_BELOW:
        return Reason(f"hidden scores are set to {number:g}, which may still count", (root,))
    if hidden is not None:
        whole = hides_a_row(choice, match.line.aliases, hidden=hidden)
        return whole and Reason(f"a row may be hidden whole, which is zero when fused: {whole}", (root,))
    # Added to a score, a number as low as this leaves nothing of it: rows that are hidden whole stay even.
    if not -_INFINITY < number <= torch.finfo(torch.float32).min / 2:
        return Reason(f"scores show through beside {number:g}", (root,))
    if query.meta["val"].dtype is torch.float16:
        return Reason("float16 has no number so low that scores do not show through", (root,))
    return None


def _trained(node: fx.Node) -> fx.Node | None:
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


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class FuseAttention(RewritePass):
    """Fuses attention that is written out as products, softmax and a mask. No options."""

    name: ClassVar[str] = "fuse-attention"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = "call fused attention where it is written out, so that scores are never held"
    after: ClassVar[dict[str, str]] = {"normalize": "dropout that is off and casts to the same type hide it"}
    before: ClassVar[dict[str, str]] = {"causal-attention": "it looks at masks of fused attention alone"}
    rules: ClassVar[Sequence[Rule]] = (
        Rule("attention", unmasked, _plain, _guard, "reassociated", near=2),
        Rule("attention-with-bias", biased, _with_bias, _guard_bias, "reassociated", near=2),
        Rule("attention-with-masked-fill", filled, _with_hidden, _guard_hidden, "reassociated", near=2),
        Rule("attention-with-where", chosen, _with_visible, _guard_visible, "reassociated", near=2),
        Rule(
            "attention-with-masked-fill-added", filled, _with_hidden_added, _guard_hidden_added,
            "reassociated", near=2,
        ),
        Rule(
            "attention-with-where-added", chosen, _with_visible_added, _guard_visible_added,
            "reassociated", near=2,
        ),
    )
