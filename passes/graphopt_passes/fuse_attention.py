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

Where libraries have no kernel, for capped scores and trained biases, it is ``graphopt.attention``
(``attention_variants``).

A row that a mask hides whole is NaN when softmax is written out and zero in the fused call: where a mask
may hold one, attention stays as it is. So it does under dropout, as fused kernels draw other random
numbers, unless ``allow`` names ``fuse-dropout``: then it is ``graphopt.attention`` with a seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from graphopt.candidate import Candidate, Reason
from graphopt.passes import PassContext
from graphopt.program import Level, Program
from graphopt.rules import Match, RewritePass, Rule
from graphopt_passes.attention_variants import VARIANTS, called, takes_trained_biases
from graphopt_passes.drawn_seed import other_numbers
from graphopt_passes.written_attention import (
    biased,
    chosen,
    drops,
    factor,
    fill_for_hidden,
    filled,
    guard_bias,
    guard_choice,
    guard_dropout,
    guard_products,
    trained_part,
    twice_biased,
    unmasked,
    untransposed,
)

__all__ = ["FuseAttention"]

_aten = torch.ops.aten


def _fused(
    query: Any, keys: Any, value: Any, mask: Any, rank_of_mask: int, scale: float, rate: Any, training: Any
) -> Any:
    """``scaled_dot_product_attention``, or graphopt's own where weights are dropped; ``keys`` are
    transposed."""
    if drops(rate, training):
        bias = None if mask is None else (mask, rank_of_mask)
        return called(query, keys, value, bias, scale, 0.0, rate, training)
    key = untransposed(keys)
    if query.node.meta["val"].dim() == 4:
        return _aten.scaled_dot_product_attention.default(query, key, value, mask, scale=scale)
    # Kernels take a dimension of heads.
    query, key, value = (_aten.unsqueeze.default(x, 1) for x in (query, key, value))
    if rank_of_mask == 3:
        mask = _aten.unsqueeze.default(mask, 1)
    fused = _aten.scaled_dot_product_attention.default(query, key, value, mask, scale=scale)
    return _aten.squeeze.dim(fused, 1)


def _rank(mask: Any) -> int:
    return int(mask.node.meta["val"].dim())


def _plain(
    query: Any, keys: Any, value: Any, scale: Any, divisor: Any, rate: Any, training: Any
) -> Any:
    return _fused(query, keys, value, None, 0, factor(scale, divisor), rate, training)


def _with_bias(
    query: Any, keys: Any, value: Any, bias: Any, scale: Any, divisor: Any, rate: Any, training: Any
) -> Any:
    return _fused(query, keys, value, bias, _rank(bias), factor(scale, divisor), rate, training)


def _with_biases(
    query: Any, keys: Any, value: Any, bias: Any, further: Any, scale: Any, divisor: Any, rate: Any,
    training: Any,
) -> Any:  # fmt: skip
    rank = max(_rank(bias), _rank(further))
    both = _aten.add.Tensor(bias, further)
    return _fused(query, keys, value, both, rank, factor(scale, divisor), rate, training)


def _with_hidden(
    query: Any, keys: Any, value: Any, hidden: Any, scale: Any, divisor: Any, rate: Any, training: Any
) -> Any:
    mask = _aten.bitwise_not.default(hidden)
    return _fused(query, keys, value, mask, _rank(hidden), factor(scale, divisor), rate, training)


def _with_visible(
    query: Any, keys: Any, value: Any, visible: Any, scale: Any, divisor: Any, rate: Any, training: Any
) -> Any:
    return _fused(query, keys, value, visible, _rank(visible), factor(scale, divisor), rate, training)


def _with_hidden_added(
    query: Any, keys: Any, value: Any, hidden: Any, low: Any, scale: Any, divisor: Any, rate: Any,
    training: Any,
) -> Any:  # fmt: skip
    mask = fill_for_hidden(low, hidden, query.node.meta["val"].dtype, hidden=True)
    return _fused(query, keys, value, mask, _rank(hidden), factor(scale, divisor), rate, training)


def _with_visible_added(
    query: Any, keys: Any, value: Any, visible: Any, low: Any, scale: Any, divisor: Any, rate: Any,
    training: Any,
) -> Any:  # fmt: skip
    mask = fill_for_hidden(low, visible, query.node.meta["val"].dtype, hidden=False)
    return _fused(query, keys, value, mask, _rank(visible), factor(scale, divisor), rate, training)


# --- guards -------------------------------------------------------------------------------------


def _guard(match: Match, options: FuseAttention, ctx: PassContext) -> Reason | None:
    return guard_products(match) or guard_dropout(match, options, ctx)


def _guard_bias(match: Match, program: Program, options: FuseAttention, ctx: PassContext) -> Reason | None:
    reason = _guard(match, options, ctx) or guard_bias(match, program)
    return reason or _guard_trained(match, options, "bias")


def _guard_biases(match: Match, program: Program, options: FuseAttention, ctx: PassContext) -> Reason | None:
    reason = _guard(match, options, ctx)
    for name in ("bias", "further"):
        reason = reason or guard_bias(match, program, name) or _guard_trained(match, options, name)
    return reason or _guard_overflow(match)


def _guard_overflow(match: Match) -> Reason | None:
    if match.captures["query"].meta["val"].dtype is torch.float16:
        return Reason("two masks may be too low for float16 together", (match.roots[0].name,))
    return None


def _guard_trained(match: Match, options: FuseAttention, name: str) -> Reason | None:
    bias = match.captures[name]
    source = trained_part(bias)
    if source is None:
        return None
    if takes_trained_biases(match, options):
        return Reason("the bias is trained: another kernel sums its gradient up", (source.name,))
    if bias.meta["val"].device.type == "cpu":
        return Reason("the bias is trained, and no fused kernel of a CPU gives its gradient", (source.name,))
    return None


def _guard_hidden(match: Match, options: FuseAttention, ctx: PassContext) -> Reason | None:
    return _guard(match, options, ctx) or guard_choice(match, "hidden", hidden=True, added=False)


def _guard_visible(match: Match, options: FuseAttention, ctx: PassContext) -> Reason | None:
    return _guard(match, options, ctx) or guard_choice(match, "visible", hidden=False, added=False)


def _guard_hidden_added(match: Match, options: FuseAttention, ctx: PassContext) -> Reason | None:
    return _guard(match, options, ctx) or guard_choice(match, "hidden", hidden=True, added=True)


def _guard_visible_added(match: Match, options: FuseAttention, ctx: PassContext) -> Reason | None:
    return _guard(match, options, ctx) or guard_choice(match, "visible", hidden=False, added=True)


@dataclass(frozen=True)
class FuseAttention(RewritePass):
    """Fuses attention that is written out as products, softmax and a mask. ``everywhere``: capped scores and
    trained biases also on devices that ``graphopt.attention`` has no kernel for, where it holds less but
    gains no time."""

    name: ClassVar[str] = "fuse-attention"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = "call fused attention where it is written out, so that scores are never held"
    after: ClassVar[dict[str, str]] = {"normalize": "dropout that is off and casts to the same type hide it"}
    before: ClassVar[dict[str, str]] = {"causal-attention": "it looks at masks of fused attention alone"}
    rules: ClassVar[Sequence[Rule]] = (
        Rule("attention", unmasked, _plain, _guard, "reassociated", near=2),
        Rule("attention-with-bias", biased, _with_bias, _guard_bias, "reassociated", near=2),
        Rule("attention-with-biases", twice_biased, _with_biases, _guard_biases, "reassociated", near=2),
        Rule("attention-with-masked-fill", filled, _with_hidden, _guard_hidden, "reassociated", near=2),
        Rule("attention-with-where", chosen, _with_visible, _guard_visible, "reassociated", near=2),
        Rule(
            "attention-with-masked-fill-added",
            filled,
            _with_hidden_added,
            _guard_hidden_added,
            "reassociated",
            near=2,
        ),
        Rule(
            "attention-with-where-added",
            chosen,
            _with_visible_added,
            _guard_visible_added,
            "reassociated",
            near=2,
        ),
        *VARIANTS,
    )

    everywhere: bool = False

    def _candidate(self, match: Match, node: fx.Node, ctx: PassContext) -> Candidate:
        found = super()._candidate(match, node, ctx)
        dropping = drops(match.captures["rate"], match.captures["training"])
        return other_numbers(found) if dropping else found
