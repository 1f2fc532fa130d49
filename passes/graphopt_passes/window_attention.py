"""window-attention: attention whose mask says how far a query sees is told so, and reads no mask.

Before::

    %31 = aten.__and__(%causal, %near) : bool[2,1,4096,4096]
    %40 = aten.scaled_dot_product_attention(%q, %k, %v, %31)

After::

    %40 = graphopt.attention(%q, %k, %v, None, 0.125, 0.0, 1023, 0)
    %41 = getitem(%40, 0)

Masks of sliding windows (Beltagy et al. 2020, "Longformer"; Jiang et al. 2023, "Mistral 7B") are constants of
a program. Libraries read them element by element and compute what they hide; a kernel that knows the window
skips it. Windows are known by the positions that are compared, whatever the size of the mask
(``mask_proof``), or by evaluating it. A causal mask without a window stays with the library, unless the call
is ``graphopt.attention`` already.
"""

from __future__ import annotations

import operator as python_operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from graphopt.candidate import Candidate, CostDelta, NearMiss, Reason
from graphopt.capture.aliasing import Aliases, alias_map
from graphopt.edit import Edit
from graphopt.passes import Pass, PassContext, Proposal
from graphopt.program import Level, Program
from graphopt.rules import argument
from graphopt_passes.constant_values import constant_value
from graphopt_passes.drawn_seed import ALLOWED_BY, no_known_rate, other_numbers, seed_before
from graphopt_passes.grouped_attention import same_heads, shared_heads
from graphopt_passes.mask_proof import Band, band
from graphopt_passes.written_attention import guard_kernel, number, short

__all__ = ["WindowAttention"]

_aten = torch.ops.aten
_LIBRARY = _aten.scaled_dot_product_attention.default
_ADD = _aten.add.Tensor
_CHOICES = (_aten.where.self, _aten.where.ScalarOther, _aten.where.ScalarSelf, _aten.where.Scalar)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_SEEN = 0.5
"""Share of the scores beyond which a library that computes all of them may well be faster."""

Size = tuple[Any, Any]
"""Numbers of queries and keys."""


@dataclass(frozen=True)
class WindowAttention(Pass):
    """Tells attention the window that its mask stands for. ``everywhere``: also on devices that
    ``graphopt.attention`` has no kernel for."""

    name: ClassVar[str] = "window-attention"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = "let attention skip what a sliding window hides, and read no mask for it"
    after: ClassVar[dict[str, str]] = {
        "fuse-attention": "attention that is written out has to be one call first",
        "causal-attention": "libraries know causal masks without a window",
    }
    before: ClassVar[dict[str, str]] = {"grouped-attention": "it reads heads that are repeated as they are"}

    everywhere: bool = False

    def propose(self, program: Program, ctx: PassContext) -> Iterable[Proposal]:
        known: dict[tuple[fx.Node, bool, Size], tuple[Band | Reason, fx.Node, fx.Node | None]] = {}
        aliases: Aliases | None = None
        for node in program.nodes():
            if node.target is not _LIBRARY and not _is_own(node):
                continue
            mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
            if not isinstance(mask, fx.Node):
                continue
            aliases = aliases or alias_map(program.graph)
            size = (_value(node, 0).shape[-2], _value(node, 1).shape[-2])
            if any(isinstance(count, torch.SymInt) for count in size):
                why = "how many queries and keys there are is known at run time alone"
                yield NearMiss(self.name, node.name, 1, 2, Reason(why, (node.name,)))
                continue
            place = (mask, _is_own(node), size)
            if place not in known:
                # Of a bias and a mask that were added one may be the window.
                part, rest = _apart(mask, size, aliases) if _is_own(node) else (mask, None)
                known[place] = _verdict(part, size, aliases), part, rest
            verdict, part, rest = known[place]
            reason = verdict if isinstance(verdict, Reason) else self._refusal(node, verdict, size, ctx)
            if reason is not None:
                yield NearMiss(self.name, node.name, 1, 2, reason)
                continue
            assert not isinstance(verdict, Reason)
            value = part.meta["val"]
            read = value.numel() * value.element_size() / ctx.cost.device.read_bytes_per_second
            hidden = 1.0 - _share(size, verdict)
            candidate = Candidate(
                f"{self.name}@{node.name}", self.name, (node.name,),
                CostDelta(seconds=-read - hidden * ctx.cost.node(node).seconds),
                _telling(node.name, verdict, None if rest is None else rest.name), exactness="reassociated",
            )  # fmt: skip
            # graphopt's own goes on to drop by the seed that it has.
            dropping = not _is_own(node) and argument(node, "dropout_p")
            yield other_numbers(candidate) if dropping else candidate

    def _refusal(self, node: fx.Node, found: Band, size: Size, ctx: PassContext) -> Reason | None:
        if _is_own(node):
            return None
        root = node.name
        if found in ((None, None), (None, 0)):
            return Reason("libraries know this mask", (root,))
        query, key, value = (_value(node, index) for index in range(3))
        if any(known.dim() != 4 for known in (query, key, value)):
            return Reason("queries, keys and values are not batches of heads", (root,))
        if query.dtype not in _DTYPES or node.meta["val"].dtype is not query.dtype:
            return Reason(f"no kernel takes {short(query.dtype)} here", (root,))
        if key.shape[0] != query.shape[0] or value.shape[:3] != key.shape[:3]:
            return Reason("heads are broadcast", (root,))
        rate = argument(node, "dropout_p")
        if rate and ALLOWED_BY not in ctx.allow:
            return Reason("dropout of weights: another kernel draws other random numbers", (root,))
        if rate and (wrong := no_known_rate(rate, root)) is not None:
            return wrong
        scale = argument(node, "scale")
        if scale is not None and not (isinstance(scale, (int, float)) and scale > 0):
            return Reason("the scale of the scores is not a number above zero", (root,))
        seen = _share(size, found)
        if seen > _SEEN and not self.everywhere:
            return Reason(f"{100 * seen:.0f} % of the scores are seen: the others are too few", (root,))
        assert isinstance(node.args[0], fx.Node)
        return guard_kernel(node.args[0], self.everywhere, root)


def _is_own(node: fx.Node) -> bool:
    return str(node.target) == "graphopt.attention.default"


def _value(node: fx.Node, index: int) -> torch.Tensor:
    operand = node.args[index]
    assert isinstance(operand, fx.Node)
    value = operand.meta["val"]
    assert isinstance(value, torch.Tensor)
    return value


def _apart(mask: fx.Node, size: Size, aliases: Aliases) -> tuple[fx.Node, fx.Node | None]:
    """Of a sum the term that is a window, and the other; the sum itself where neither is."""
    if mask.target is _ADD and len(mask.args) == 2 and not mask.kwargs:
        for term, other in (mask.args, mask.args[::-1]):
            if not isinstance(term, fx.Node) or not isinstance(other, fx.Node):
                continue
            alike = other.meta["val"].dtype is mask.meta["val"].dtype
            if alike and not isinstance(_verdict(term, size, aliases), Reason):
                return term, other
    return mask, None


def _verdict(mask: fx.Node, size: Size, aliases: Aliases) -> Band | Reason:
    """The band that a mask stands for, or why it stands for none."""
    known = mask.meta.get("val")
    if not isinstance(known, torch.Tensor) or tuple(known.shape[-2:]) != size:
        return Reason("the mask is not a matrix of queries and keys", (mask.name,))
    found = band(_condition(mask, aliases) or mask, aliases)
    if found is None:
        value = constant_value(mask, "the mask", aliases)
        if isinstance(value, Reason):
            return value
        visible = value if value.dtype is torch.bool else value == 0
        if value.dtype is not torch.bool and not bool((visible | _hidden(value)).all()):
            return Reason("the mask adds a bias", (mask.name,))
        found = _band_of(visible)
        if found is None:
            return Reason("the mask is constant but no window", (mask.name,))
    if not _every_row_sees(size, found):
        return Reason("a row of the mask hides everything", (mask.name,))
    return found


def _condition(mask: fx.Node, aliases: Aliases) -> fx.Node | None:
    """What is true where a mask that is chosen by it is zero, and hides where not."""
    if mask.target not in _CHOICES or not isinstance(mask.args[0], fx.Node):
        return None
    shown, low = (number(value, aliases) for value in mask.args[1:3])
    if shown != 0.0 or low is None or low > torch.finfo(mask.meta["val"].dtype).min / 2:
        return None
    alike = mask.args[0].meta["val"].shape[-2:] == mask.meta["val"].shape[-2:]
    return mask.args[0] if alike else None


def _hidden(mask: torch.Tensor) -> torch.Tensor:
    """Scores so low that their softmax is exactly zero beside any that is visible."""
    return mask <= torch.finfo(mask.dtype).min / 2


def _band_of(visible: torch.Tensor) -> Band | None:
    rows, columns = visible.shape[-2:]
    first = visible.reshape(-1, rows, columns)[0] if visible.numel() else visible.new_empty(0, 0)
    if not bool(first.any()):
        return None
    distance = torch.arange(columns)[None, :] - torch.arange(rows)[:, None]
    seen = distance[first]
    left, right = -int(seen.min()), int(seen.max())
    found = (None if left >= rows - 1 else left, None if right >= columns - 1 else right)
    within = (distance >= -left) & (distance <= right)
    return found if bool((visible == within).all()) else None


def _every_row_sees(size: Size, found: Band) -> bool:
    """Whether every query sees a key; they do where the first and the last one do."""
    rows, columns = size
    return all(_seen(row, columns, found) > 0 for row in (0, rows - 1)) if rows else True


def _seen(row: int, columns: int, found: Band) -> int:
    first = 0 if found[0] is None else max(0, row - found[0])
    last = columns - 1 if found[1] is None else min(columns - 1, row + found[1])
    return max(0, last - first + 1)


def _share(size: Size, found: Band) -> float:
    """Part of the scores that is visible."""
    rows, columns = size
    visible = sum(_seen(row, columns, found) for row in range(rows))
    return float(visible / max(1, rows * columns))


def _telling(name: str, found: Band, rest: str | None) -> Callable[[Edit], None]:
    def apply(edit: Edit) -> None:
        node = edit.node(name)
        bias = None if rest is None else edit.node(rest)
        if _is_own(node):
            args = [*node.args[:3], bias, *node.args[4:6], *found, *node.args[8:]]
            new = edit.call_before(node, node.target, args, replaces=(node,))
            edit.replace(node, new)
            return
        query, key, value = node.args[:3]
        assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node)
        few = [shared_heads(many) for many in (key, value)]
        if few[0] is not None and few[1] is not None and same_heads(few[0], few[1]):
            key, value = few[0], few[1]
        scale = argument(node, "scale")
        factor = query.meta["val"].shape[-1] ** -0.5 if scale is None else float(scale)
        operator = torch.ops.graphopt.attention.default
        rate = argument(node, "dropout_p")
        dropping = [rate, seed_before(edit, node, (node,))] if rate else []
        made = edit.call_before(
            node, operator, [query, key, value, None, factor, 0.0, *found, *dropping], replaces=(node,)
        )
        output = edit.call_before(node, python_operator.getitem, [made, 0], replaces=(node,))
        edit.replace(node, output)
        edit.erase(node)

    return apply
