"""rotary: rotary position embeddings of queries and keys become one call each, with the norm of heads before.

Before::

    %10 = aten.mul.Tensor(%q, %cos) : bf16[2,32,512,128]
    %11 = aten.slice.Tensor(%q, 3, 0, 64)
    %12 = aten.slice.Tensor(%q, 3, 64, ...)
    %13 = aten.neg(%12)
    %14 = aten.cat([%13, %11], -1)
    %15 = aten.mul.Tensor(%14, %sin)
    %16 = aten.add.Tensor(%10, %15)

After::

    %10 = graphopt.rotary(%x, %cos, %sin, None, None, [1, 32, 0, 0], 128, False, None, 0.0, False, bf16)
    %11 = getitem(%10, 0)                                %q = transpose(%x, 1, 2)
    %16 = aten.transpose.int(%11, 1, 2)

What autograd derives from ``cat`` reads the gradient in pieces, and code generators make slow kernels of it;
the operator's backward turns the gradient back in one reading. Pairs may be halves of a head (Llama,
GPT-NeoX), or neighbours (GPT-J, Cohere); what is turned may be a part of a head. ``pack-rotary`` makes one
call of those that read one projection.
"""

from __future__ import annotations

import operator as python_operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from graphopt.candidate import Reason
from graphopt.capture.structure import attribute, is_trained_input
from graphopt.passes import PassContext
from graphopt.plugins import default_host
from graphopt.program import Level
from graphopt.rules import Match, RewritePass, Rule, either, operator
from graphopt.rules.matching import Found, match_pattern
from graphopt.rules.pattern import Pattern
from graphopt_passes.memory_place import source_of, upwards, value_of
from graphopt_passes.turned_heads import TurnedHeads, turned_heads

__all__ = ["Rotary", "Rotation", "rotation_at"]

_aten = torch.ops.aten

_cast = operator(_aten.to.dtype, _aten.type_as.default)
_times = operator(_aten.mul.Tensor, commutes=True)
_plus = operator(_aten.add.Tensor, commutes=True)
_minus = operator(_aten.sub.Tensor)
_negated = operator(_aten.neg.default)
_cat = operator(_aten.cat.default)
_stack = operator(_aten.stack.default)
_flatten = operator(_aten.flatten.using_ints, _aten.reshape.default, _aten.view.default)

_BY_LAYOUT = frozenset(
    {
        _aten.view.default, _aten._unsafe_view.default, _aten.as_strided.default, _aten.view.dtype,
        _aten.is_contiguous.default, _aten.sym_stride.int, _aten.sym_storage_offset.default,
    }
)  # fmt: skip
"""Calls that another order in memory may break."""

_WIDEST = 1024
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _as_halves(first: Any, second: Any, axis: Any) -> Any:
    return _cat([first, second], axis)


def _as_pairs(first: Any, second: Any, place: Any) -> Any:
    return _flatten(_stack([first, second], place), ...)


def _joined(first: Any, second: Any, axis: Any, place: Any) -> Any:
    return either(_as_halves(first, second, axis), _as_pairs(first, second, place))


def turned(x: Any, cos: Any, sin: Any, first: Any, second: Any, axis: Any, place: Any) -> Any:
    return _plus(_times(x, cos), _times(_joined(_negated(second), first, axis, place), sin))


def rounded(x: Any, cos: Any, sin: Any, first: Any, second: Any, axis: Any, place: Any, cast: Any) -> Any:
    return _cast(turned(x, cos, sin, first, second, axis, place), cast)


def part(
    x: Any,
    cos: Any,
    sin: Any,
    first: Any,
    second: Any,
    axis: Any,
    place: Any,
    cast: Any,
    rest: Any,
    edge: Any,
) -> Any:
    inner = turned(x, cos, sin, first, second, axis, place)
    return _cat([either(_cast(inner, cast), inner), rest], edge)


def _both(cos: Any, sin: Any, first: Any, second: Any, again: Any, too: Any) -> tuple[Any, Any]:
    """``again`` and ``too``: the same elements, cut once more."""
    return (
        _minus(_times(first, cos), _times(second, sin)),
        _plus(_times(too, cos), _times(again, sin)),
    )


def halves(cos: Any, sin: Any, first: Any, second: Any, again: Any, too: Any, axis: Any) -> Any:
    return _as_halves(*_both(cos, sin, first, second, again, too), axis)


def pairs(cos: Any, sin: Any, first: Any, second: Any, again: Any, too: Any, place: Any) -> Any:
    return _as_pairs(*_both(cos, sin, first, second, again, too), place)


def rounded_apart(
    cos: Any, sin: Any, first: Any, second: Any, again: Any, too: Any, axis: Any, place: Any, cast: Any
) -> Any:
    return _cast(_joined(*_both(cos, sin, first, second, again, too), axis, place), cast)


_FORMS = tuple(Pattern.of(form) for form in (part, rounded, turned, halves, pairs, rounded_apart))


@dataclass(frozen=True)
class Rotation:
    """``heads`` are turned by ``nodes``, in no particular order; ``root`` is the result."""

    heads: TurnedHeads
    root: fx.Node
    nodes: frozenset[fx.Node]


def rotation_at(node: fx.Node) -> Rotation | Reason | None:
    """The rotation that ``node`` is the result of; why the operator does not do it; ``None`` where it is
    none."""
    refused: Reason | None = None
    for form in _FORMS:
        match = match_pattern(form, node)
        if not isinstance(match, Found):
            continue
        heads = _found(match.captures)
        if not isinstance(heads, Reason):
            return Rotation(heads, node, match.nodes | set(heads.path))
        refused = refused or heads
    return refused


# --- what is called instead ---------------------------------------------------------------------


def _found(captures: Mapping[str, Any]) -> TurnedHeads | Reason:
    return turned_heads(
        cos=captures["cos"],
        sin=captures["sin"],
        first=captures["first"],
        second=captures["second"],
        again=(captures.get("again"), captures.get("too")),
        joined_at=captures.get("axis"),
        stacked_at=captures.get("place"),
        x=captures.get("x"),
        rest=captures.get("rest"),
        edge=captures.get("edge"),
        cast=captures.get("cast"),
    )


def _call(captures: Mapping[str, Any]) -> Any:
    """``captures``: what a replacement is given."""
    like = captures["cos"]
    heads = _found({k: v.node if isinstance(v, fx.Proxy) else v for k, v in captures.items()})
    assert isinstance(heads, TurnedHeads)

    def given(node: fx.Node | None) -> Any:
        return None if node is None else fx.Proxy(node, like.tracer)

    data = given(heads.input)
    if heads.heads_first:
        data = _aten.transpose.int(data, 1, 2)
    cos, sin = (
        given(table.node) if table.heads is None else _aten.select.int(given(table.node), table.heads, 0)
        for table in (heads.cos, heads.sin)
    )
    norm = heads.norm
    made = torch.ops.graphopt.rotary.default(
        data, cos, sin, given(norm.weight) if norm else None, None, [1, heads.count, 0, 0], heads.width,
        heads.interleaved, norm.eps if norm else None, norm.offset if norm else 0.0, False, heads.dtype,
    )  # fmt: skip
    found = python_operator.getitem(made, 0)
    return _aten.transpose.int(found, 1, 2) if heads.result_heads_first else found


def _turned(x: Any, cos: Any, sin: Any, first: Any, second: Any, axis: Any, place: Any) -> Any:
    return _call(locals())


def _rounded(x: Any, cos: Any, sin: Any, first: Any, second: Any, axis: Any, place: Any, cast: Any) -> Any:
    return _call(locals())


def _part(
    x: Any,
    cos: Any,
    sin: Any,
    first: Any,
    second: Any,
    axis: Any,
    place: Any,
    cast: Any,
    rest: Any,
    edge: Any,
) -> Any:
    return _call(locals())


def _halves(cos: Any, sin: Any, first: Any, second: Any, again: Any, too: Any, axis: Any) -> Any:
    return _call(locals())


def _pairs(cos: Any, sin: Any, first: Any, second: Any, again: Any, too: Any, place: Any) -> Any:
    return _call(locals())


def _rounded_apart(
    cos: Any, sin: Any, first: Any, second: Any, again: Any, too: Any, axis: Any, place: Any, cast: Any
) -> Any:
    return _call(locals())


# --- guard --------------------------------------------------------------------------------------


def _guard(match: Match, options: Rotary, ctx: PassContext) -> Reason | None:
    root = match.roots[0]
    if "rotary" not in default_host().kernels():
        return Reason("the kernel rotary is not installed", (root.name,))
    found = _found(match.captures)
    if isinstance(found, Reason):
        return found
    value = found.input.meta["val"]
    if value.dtype not in _DTYPES or found.dtype not in _DTYPES:
        dtype = value.dtype if value.dtype not in _DTYPES else found.dtype
        return Reason(f"no kernel takes {_short(dtype)}", (found.input.name,))
    if not value.is_cuda and not options.everywhere:
        return Reason(
            f"no kernel runs on {value.device.type}, where the operator gains nothing", (root.name,)
        )
    gathers = ctx.mode == "train" and _is_part_of_projection(found)
    if found.norm is None and not gathers and not options.everywhere:
        return Reason("generated code turns heads as fast where no norm of them goes with it", (root.name,))
    if not isinstance(found.count, int):
        return Reason("the number of heads is known at run time alone", (found.input.name,))
    if value.shape[-1] > _WIDEST:
        return Reason(f"heads of {value.shape[-1]} elements do not fit a program", (found.input.name,))
    if value.stride(-1) != 1 and value.shape[-1] > 1:
        return Reason("elements of a head are spread over memory", (found.input.name,))
    if _is_trained(found.cos.node) or _is_trained(found.sin.node):
        return Reason("the tables are trained", (found.cos.node.name, found.sin.node.name))
    return _guard_between(found, match) or _guard_layout(root, found)


def _guard_between(found: TurnedHeads, match: Match) -> Reason | None:
    """The operator runs where the rotation ends, and reads what its first call did."""
    line, root = match.line, match.roots[0]
    written = line.aliases.written
    if any(line.aliases.roots[node] & written for node in found.reads):
        return Reason("what it reads is written in place", (root.name,))
    here = line.ambient.states[line.position[root]].key
    for node in found.path:
        if node in line.position and line.ambient.states[line.position[node]].key != here:
            return Reason("autocast or the gradient mode changes within it", (node.name, root.name))
    return None


def _guard_layout(root: fx.Node, found: TurnedHeads) -> Reason | None:
    """The operator gives heads of a position next to each other."""
    old = root.meta["val"]
    shape = tuple(old.shape)
    _, one, two, size = shape
    strides: tuple[Any, ...] = (one * two * size, two * size, size, 1)
    if found.result_heads_first:
        strides = (one * two * size, size, one * size, 1)
    if all(n == 1 or a == b for n, a, b in zip(shape, old.stride(), strides, strict=True)):
        return None
    stack = [root]
    while stack:
        for user in stack.pop().users:
            if user.op == "output" or user.target in _BY_LAYOUT:
                return Reason("what reads it depends on where its elements lie", (root.name, user.name))
            if user.op == "call_function" and source_of(user) is not None:
                stack.append(user)
    return None


def _is_part_of_projection(heads: TurnedHeads) -> bool:
    """Whether they are some of those of a projection [B, S, W], whose gradient the backward of
    ``pack-rotary``'s call gathers while it turns them."""
    *_, root = upwards(heads.input)
    whole = value_of(root)
    if whole is None or root.op != "call_function" or whole.dim() != 3 or not whole.is_contiguous():
        return False
    width, size = whole.shape[2], heads.input.meta["val"].shape[-1]
    known = all(isinstance(number, int) for number in (width, size, heads.count))
    return known and heads.count * size < width


def _is_trained(table: fx.Node) -> bool:
    """Whether a gradient may flow to a table."""
    seen: set[fx.Node] = set()
    stack = [table]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_trained_input(node):
            return True
        if node.op == "get_attr":
            constant = attribute(node.graph, node)
            if isinstance(constant, torch.Tensor) and constant.requires_grad:
                return True
        stack.extend(node.all_input_nodes)
    return False


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Rotary(RewritePass):
    """Fuses rotary embeddings of heads that are normalized, and in training of heads of packed projections.
    ``everywhere``: of others as well, and on devices that the operator has no kernel for, which gains
    nothing."""

    name: ClassVar[str] = "rotary"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = "turn queries and keys in one kernel each way, their norms with them"
    after: ClassVar[dict[str, str]] = {
        "normalize": "casts to the same type hide rotations",
        "pack-linears": "it tells from the operators that models write whether parts of a projection will do",
        "chunk": "it knows the operators that models write",
    }
    before: ClassVar[dict[str, str]] = {
        "fuse-norm": "norms of heads belong to the rotation after them",
    }
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("rotary", turned, _turned, _guard, "reassociated", near=4),
        Rule("rotary-rounded", rounded, _rounded, _guard, "reassociated", near=5),
        Rule("rotary-part", part, _part, _guard, "reassociated", near=6),
        Rule("rotary-halves", halves, _halves, _guard, "reassociated", near=5),
        Rule("rotary-pairs", pairs, _pairs, _guard, "reassociated", near=5),
        Rule("rotary-apart-rounded", rounded_apart, _rounded_apart, _guard, "reassociated", near=6),
    )

    everywhere: bool = False
