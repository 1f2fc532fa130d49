"""Rules of fuse-attention for what libraries have no kernel for: ``graphopt.attention`` does.

Before::

    %9 = aten.matmul(%q, %kT) : bf16[2,8,512,512]
    %10 = aten.mul.Tensor(%9, 0.0625)
    %11 = aten.div.Tensor(%10, 50.0)
    %12 = aten.tanh(%11)
    %13 = aten.mul.Tensor(%12, 50.0)
    %14 = aten.add.Tensor(%13, %mask)
    %15 = aten.softmax.int(%14, -1, f32) ...
    %17 = aten.matmul(%16, %v) : bf16[2,8,512,256]

After::

    %9 = graphopt.attention(%q, %k, %v, %mask, 0.0625, 50.0, None, None)
    %10 = getitem(%9, 0)

Scores are capped by a hyperbolic tangent (Bello et al. 2016; Gemma 2), or a bias is trained, as relative
positions are (Raffel et al. 2020, T5), whose gradient is summed over what shares it where fused kernels of
libraries write it for every batch and head. Heads of keys and values that are repeated for a group are read
as they are.
"""

from __future__ import annotations

import operator as python_operator
from typing import Any

import torch
import torch.fx as fx

from graphopt.candidate import Reason
from graphopt.passes import PassContext
from graphopt.program import Program
from graphopt.rules import Match, Rule, either, operator
from graphopt_passes.drawn_seed import seed_beside
from graphopt_passes.grouped_attention import same_heads, shared_heads
from graphopt_passes.written_attention import (
    attended,
    biased,
    cast,
    drops,
    factor,
    guard_bias,
    guard_choice,
    guard_dropout,
    guard_kernel,
    guard_products,
    masked,
    number,
    over,
    scaled_scores,
    times,
    trained_part,
    twice_biased,
    untransposed,
)

__all__ = ["VARIANTS", "called", "takes_trained_biases"]

_aten = torch.ops.aten
_tanh = operator(_aten.tanh.default)


def _capped(query: Any, keys: Any, scale: Any, divisor: Any, before: Any, below: Any, cap: Any) -> Any:
    """Scores bent by a tanh: scale and cap come in one number or in two."""
    scores = scaled_scores(query, keys, scale, divisor)
    bent = _tanh(either(times(scores, before), over(scores, below), scores))
    high = times(either(cast(bent, dtype=...), bent), cap)
    return either(cast(high, dtype=...), high)


def capped(
    query: Any, keys: Any, scale: Any, divisor: Any, before: Any, below: Any, cap: Any, dim: Any, value: Any,
    rate: Any, training: Any,
) -> Any:  # fmt: skip
    scores = _capped(query, keys, scale, divisor, before, below, cap)
    return attended(scores, dim, value, rate, training)


def capped_with_bias(
    query: Any, keys: Any, scale: Any, divisor: Any, before: Any, below: Any, cap: Any, bias: Any, dim: Any,
    value: Any, rate: Any, training: Any,
) -> Any:  # fmt: skip
    scores = _capped(query, keys, scale, divisor, before, below, cap)
    return attended(masked(scores, bias=bias), dim, value, rate, training)


def capped_and_filled(
    query: Any, keys: Any, scale: Any, divisor: Any, before: Any, below: Any, cap: Any, hidden: Any,
    low: Any, dim: Any, value: Any, rate: Any, training: Any,
) -> Any:  # fmt: skip
    scores = _capped(query, keys, scale, divisor, before, below, cap)
    return attended(masked(scores, hidden=hidden, low=low), dim, value, rate, training)


def capped_and_chosen(
    query: Any, keys: Any, scale: Any, divisor: Any, before: Any, below: Any, cap: Any, visible: Any,
    low: Any, dim: Any, value: Any, rate: Any, training: Any,
) -> Any:  # fmt: skip
    scores = _capped(query, keys, scale, divisor, before, below, cap)
    return attended(masked(scores, visible=visible, low=low), dim, value, rate, training)


# --- replacements -------------------------------------------------------------------------------


def called(
    query: Any, keys: Any, value: Any, bias: Any, scale: float, cap: float, rate: Any, training: Any
) -> Any:
    """``graphopt.attention``; ``bias``, where there is one, with its rank."""
    dropping = (rate, seed_beside(query)) if drops(rate, training) else ()
    key = untransposed(keys)
    has_heads = query.node.meta["val"].dim() == 4
    if has_heads:
        few = [shared_heads(x.node) for x in (key, value)]
        if few[0] is not None and few[1] is not None and same_heads(few[0], few[1]):
            key, value = (fx.Proxy(x, query.tracer) for x in few if x is not None)
    else:
        query, key, value = (_aten.unsqueeze.default(x, 1) for x in (query, key, value))
        if bias is not None and bias[1] == 3:
            bias = _aten.unsqueeze.default(bias[0], 1), 4
    made = torch.ops.graphopt.attention.default(
        query, key, value, None if bias is None else bias[0], scale, cap, None, None, *dropping
    )
    output = python_operator.getitem(made, 0)
    return output if has_heads else _aten.squeeze.dim(output, 1)


def _numbers(scale: Any, divisor: Any, before: Any, below: Any, cap: Any) -> tuple[float, float]:
    """The scale of the products and the cap of the scores."""
    high = number(cap) or 1.0
    return factor(scale, divisor) * factor(before, below) * high, high


def _rank(mask: Any) -> int:
    return int(mask.node.meta["val"].dim())


def _cap(
    query: Any, keys: Any, scale: Any, divisor: Any, before: Any, below: Any, cap: Any, value: Any,
    rate: Any, training: Any,
) -> Any:  # fmt: skip
    return called(query, keys, value, None, *_numbers(scale, divisor, before, below, cap), rate, training)


def _cap_with_bias(
    query: Any, keys: Any, scale: Any, divisor: Any, before: Any, below: Any, cap: Any, bias: Any, value: Any,
    rate: Any, training: Any,
) -> Any:  # fmt: skip
    given = (bias, _rank(bias))
    return called(query, keys, value, given, *_numbers(scale, divisor, before, below, cap), rate, training)


def _cap_and_hide(
    query: Any, keys: Any, scale: Any, divisor: Any, before: Any, below: Any, cap: Any, hidden: Any,
    value: Any, rate: Any, training: Any,
) -> Any:  # fmt: skip
    given = (_aten.bitwise_not.default(hidden), _rank(hidden))
    return called(query, keys, value, given, *_numbers(scale, divisor, before, below, cap), rate, training)


def _cap_and_show(
    query: Any, keys: Any, scale: Any, divisor: Any, before: Any, below: Any, cap: Any, visible: Any,
    value: Any, rate: Any, training: Any,
) -> Any:  # fmt: skip
    given = (visible, _rank(visible))
    return called(query, keys, value, given, *_numbers(scale, divisor, before, below, cap), rate, training)


def _trained(
    query: Any, keys: Any, value: Any, bias: Any, scale: Any, divisor: Any, rate: Any, training: Any
) -> Any:
    return called(query, keys, value, (bias, _rank(bias)), factor(scale, divisor), 0.0, rate, training)


def _trained_twice(
    query: Any, keys: Any, value: Any, bias: Any, further: Any, scale: Any, divisor: Any, rate: Any,
    training: Any,
) -> Any:  # fmt: skip
    rank = max(_rank(bias), _rank(further))
    both = _aten.add.Tensor(bias, further)
    return called(query, keys, value, (both, rank), factor(scale, divisor), 0.0, rate, training)


# --- guards -------------------------------------------------------------------------------------


def takes_trained_biases(match: Match, options: Any) -> bool:
    """Whether attention with a trained bias is for this kernel: libraries of GPUs give its gradient too."""
    return bool(options.everywhere) and guard_kernel(match.captures["query"], True, "") is None


def _guard(match: Match, options: Any, ctx: PassContext) -> Reason | None:
    root, captures = match.roots[0], match.captures
    reason = guard_products(match) or guard_dropout(match, options, ctx)
    reason = reason or guard_kernel(captures["query"], options.everywhere, root.name)
    if reason is not None:
        return reason
    product = 1.0
    for name in ("scale", "divisor", "before", "below", "cap"):
        given = captures.get(name)
        if given is None:
            continue
        value = number(given, match.line.aliases)
        if not value:
            return Reason("the cap of the scores is not a known number", (root.name,))
        if name == "cap" and value < 0:
            return Reason("the cap of the scores is below zero", (root.name,))
        product *= value
    return Reason("the scale of the scores is below zero", (root.name,)) if product < 0 else None


def _guard_bias(match: Match, program: Program, options: Any, ctx: PassContext) -> Reason | None:
    return _guard(match, options, ctx) or guard_bias(match, program)


def _guard_libraries(match: Match, options: Any) -> Reason | None:
    if options.everywhere:
        return None
    return Reason("libraries of GPUs give the gradient of a bias", (match.roots[0].name,))


def _guard_trained(match: Match, program: Program, options: Any, ctx: PassContext) -> Reason | None:
    reason = _guard_bias(match, program, options, ctx) or _guard_libraries(match, options)
    if reason is None and trained_part(match.captures["bias"]) is None:
        return Reason("the bias is not trained: libraries have kernels for it", (match.roots[0].name,))
    return reason


def _guard_trained_twice(match: Match, program: Program, options: Any, ctx: PassContext) -> Reason | None:
    root = match.roots[0].name
    reason = _guard_bias(match, program, options, ctx) or guard_bias(match, program, "further")
    reason = reason or _guard_libraries(match, options)
    if reason is None and match.captures["query"].meta["val"].dtype is torch.float16:
        return Reason("two masks may be too low for float16 together", (root,))
    if reason is None and not any(trained_part(match.captures[name]) for name in ("bias", "further")):
        return Reason("no bias is trained: libraries have kernels for it", (root,))
    return reason


def _guard_hidden(match: Match, options: Any, ctx: PassContext) -> Reason | None:
    return _guard(match, options, ctx) or guard_choice(match, "hidden", hidden=True, added=False)


def _guard_visible(match: Match, options: Any, ctx: PassContext) -> Reason | None:
    return _guard(match, options, ctx) or guard_choice(match, "visible", hidden=False, added=False)


def _rule(name: str, pattern: Any, replacement: Any, guard: Any) -> Rule:
    return Rule(name, pattern, replacement, guard, "reassociated", near=4)


VARIANTS = (
    _rule("capped-attention", capped, _cap, _guard),
    _rule("capped-attention-with-bias", capped_with_bias, _cap_with_bias, _guard_bias),
    _rule("capped-attention-with-masked-fill", capped_and_filled, _cap_and_hide, _guard_hidden),
    _rule("capped-attention-with-where", capped_and_chosen, _cap_and_show, _guard_visible),
    _rule("attention-with-trained-bias", biased, _trained, _guard_trained),
    _rule("attention-with-trained-biases", twice_biased, _trained_twice, _guard_trained_twice),
)
"""Rules that go behind those of ``scaled_dot_product_attention``."""
