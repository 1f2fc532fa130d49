"""grouped-attention: attention reads the keys and values of a group of heads without copies of them.

Before::

    %5 = aten.unsqueeze(%k, 2)
    %6 = aten.expand(%5, [2, 8, 4, 512, 64])
    %7 = aten.reshape(%6, [2, 32, 512, 64])
    ...
    %12 = aten.scaled_dot_product_attention(%q, %7, %11, None, 0.0, True)

After::

    %12 = aten.scaled_dot_product_attention(%q, %k, %v, None, 0.0, True, enable_gqa=True)

Grouped-query attention (Ainslie et al. 2023) shares each head of keys and values among several heads of
queries. Models that repeat them write, keep and read as many copies, and sum the copies' gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from graphopt.candidate import Candidate, Reason
from graphopt.passes import PassContext
from graphopt.program import Level
from graphopt.rules import Match, RewritePass, Rule, either, operator
from graphopt.rules.matching import Missed, match_pattern
from graphopt.rules.pattern import Pattern
from graphopt_passes.drawn_seed import ALLOWED_BY, other_numbers

__all__ = ["GroupedAttention", "same_heads", "shared_heads"]

_aten = torch.ops.aten

_attention = operator(_aten.scaled_dot_product_attention.default)
_unsqueeze = operator(_aten.unsqueeze.default)
_expand = operator(_aten.expand.default)
_flatten = operator(_aten.reshape.default, _aten.view.default, _aten._unsafe_view.default)
_copy = operator(_aten.clone.default, _aten.contiguous.default)
_repeat = operator(_aten.repeat_interleave.self_int)

_ON_CPU = (torch.float16, torch.bfloat16, torch.float32)
_ON_GPU = (torch.float16, torch.bfloat16)


def _spread(heads: Any, axis: Any, repeats: Any) -> Any:
    """Every head several times, one after the other."""
    copies = _expand(_unsqueeze(heads, axis), ..., implicit=...)
    whole = either(_copy(copies, memory_format=...), copies)
    return either(_flatten(whole, ...), _repeat(heads, repeats, axis, output_size=...))


def spread(
    query: Any, keys: Any, values: Any, axis: Any, repeats: Any, other_axis: Any, other_repeats: Any,
    mask: Any, dropout: Any, causal: Any, scale: Any,
) -> Any:  # fmt: skip
    keys = _spread(keys, axis, repeats)
    values = _spread(values, other_axis, other_repeats)
    return _attention(query, keys, values, mask, dropout, causal, scale=scale)


def _grouped(query: Any, keys: Any, values: Any, mask: Any, dropout: Any, causal: Any, scale: Any) -> Any:
    return _aten.scaled_dot_product_attention.default(
        query, keys, values, mask, dropout, causal, scale=scale, enable_gqa=True
    )


def _guard(
    query: Any, keys: Any, values: Any, axis: Any, other_axis: Any, mask: Any, dropout: Any, match: Match,
    ctx: PassContext,
) -> Reason | None:  # fmt: skip
    root = match.roots[0]
    heads = query.meta["val"] if isinstance(query, fx.Node) else None
    if not isinstance(heads, torch.Tensor) or heads.dim() != 4:
        return Reason("queries are not batches of heads", (root.name,))
    for few, many, place in ((keys, root.args[1], axis), (values, root.args[2], other_axis)):
        if (reason := _guard_heads(few, many, place, heads)) is not None:
            return reason
    if keys.meta["val"].shape[1] != values.meta["val"].shape[1]:
        return Reason("keys and values are of other groups", (root.name,))
    if dropout and ALLOWED_BY not in ctx.allow:
        return Reason("dropout of weights: another kernel may draw other random numbers", (root.name,))
    # Kernels that take groups; without one of them the keys would be repeated after all.
    on_cpu = heads.device.type == "cpu"
    if dropout and on_cpu:
        return Reason("no kernel takes groups beside dropout here", (root.name,))
    if heads.dtype not in (_ON_CPU if on_cpu else _ON_GPU):
        dtype = str(heads.dtype).removeprefix("torch.")
        return Reason(f"no kernel takes {dtype} in groups here", (query.name,))
    if not on_cpu and mask is not None:
        return Reason("no kernel takes groups beside a mask here", (mask.name,))
    width = heads.shape[-1]
    if not on_cpu and not (width == values.meta["val"].shape[-1] <= 128 and width % 8 == 0):
        return Reason("no kernel takes groups of heads of this width here", (root.name,))
    return None


def _guard_heads(few: Any, many: Any, axis: Any, query: torch.Tensor) -> Reason | None:
    """``few``: heads as they are; ``many``: as they are spread."""
    known = few.meta.get("val") if isinstance(few, fx.Node) else None
    if not isinstance(known, torch.Tensor) or known.dim() != 4:
        return Reason("keys and values are not batches of heads", (many.name,))
    # Heads are spread in place by a new axis after theirs, or by repeating along theirs.
    expected = (1, -3) if many.target is _aten.repeat_interleave.self_int else (2, -3)
    if axis not in expected:
        return Reason("heads are not repeated one by one", (many.name,))
    batch, count, length, width = known.shape
    shape = many.meta["val"].shape
    if len(shape) != 4 or (shape[0], shape[2], shape[3]) != (batch, length, width):
        return Reason("more is repeated than heads", (many.name,))
    if shape[1] != query.shape[1] or count == 0 or shape[1] % count:
        return Reason("heads are not shared evenly", (many.name,))
    return None


def _expanded(heads: Any, axis: Any) -> Any:
    copies = _expand(_unsqueeze(heads, axis), ..., implicit=...)
    return _flatten(either(_copy(copies, memory_format=...), copies), ...)


def _repeated(heads: Any, axis: Any) -> Any:
    return _repeat(heads, ..., axis, output_size=...)


_REPEATED = (Pattern.of(_expanded), Pattern.of(_repeated))


def shared_heads(many: fx.Node) -> fx.Node | None:
    """The heads [B, Hkv, N, D] that ``many`` [B, H, N, D] holds several times each, one after the other;
    ``None`` where it does not."""
    for pattern in _REPEATED:
        found = match_pattern(pattern, many)
        if isinstance(found, Missed):
            continue
        few = found.captures["heads"]
        if _guard_heads(few, many, found.captures["axis"], many.meta["val"]) is None:
            assert isinstance(few, fx.Node)
            return few
    return None


def same_heads(keys: fx.Node, values: fx.Node) -> bool:
    """Whether keys and values have as many heads."""
    return bool(keys.meta["val"].shape[1] == values.meta["val"].shape[1])


@dataclass(frozen=True)
class GroupedAttention(RewritePass):
    """Lets attention share heads of keys and values instead of repeating them. No options."""

    name: ClassVar[str] = "grouped-attention"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = "let attention share the heads of keys and values that a model repeats"
    after: ClassVar[dict[str, str]] = {
        "fuse-attention": "attention that is written out has to be one call first",
        "causal-attention": "masks that only say causal are in the way",
    }
    rules: ClassVar[Sequence[Rule]] = (
        Rule("grouped-attention", spread, _grouped, _guard, "reassociated", near=4),
    )

    def _candidate(self, match: Match, node: fx.Node, ctx: PassContext) -> Candidate:
        found = super()._candidate(match, node, ctx)
        return other_numbers(found) if match.captures["dropout"] else found
