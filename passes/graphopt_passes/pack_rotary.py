"""pack-rotary: queries and keys that lie in one projection are turned by one call.

Before::

    %p = aten.linear(%x, %w) : bf16[2,512,6144]          queries, keys and values of a position in a row
    %q = view of %p    %a = graphopt.rotary(%q, %cos, %sin, None, None, [1, 32, 0, 0], ...)
    %k = view of %p    %b = graphopt.rotary(%k, %cos, %sin, None, None, [1, 8, 0, 0], ...)
    %v = view of %p

After::

    %h = aten.unflatten.int(%p, -1, [48, 128])
    %a = graphopt.rotary(%h, %cos, %sin, None, None, [1, 32, 8, 8], ..., True, bf16)
    %q, %k, %v = getitem(%a, 0), getitem(%a, 1), getitem(%a, 2)

One launch forward; and the backward gathers the gradients of queries, keys and values while it turns them,
where they were put side by side by a copy of their own. Where gradients flow, values are copied forward: the
projection, which they would keep for the backward with queries and keys in it, can go. Without gradients they
stay where they are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.candidate import Candidate, CostDelta, NearMiss, Reason
from graphopt.capture.aliasing import written_inputs
from graphopt.capture.ambient import is_state_call
from graphopt.capture.structure import Line, line_of
from graphopt.capture.trained import trained_values
from graphopt.edit import Edit
from graphopt.passes import Pass, PassContext, Proposal
from graphopt.program import Level, Program
from graphopt.rules import argument
from graphopt_passes.memory_place import same_place, source_of, upwards, value_of

__all__ = ["PackRotary"]

_aten = torch.ops.aten
_SETTINGS = ("width", "interleaved", "eps", "weight_offset", "dtype")


@dataclass(frozen=True)
class _Packed:
    """``projection`` [B, S, W] holds heads of ``size`` elements; ``heads`` as ``graphopt.rotary`` counts.
    ``calls`` turn queries and keys, ``values`` are values as they are read."""

    projection: fx.Node
    heads: tuple[int, int, int, int]
    size: int
    calls: tuple[fx.Node, fx.Node]
    values: tuple[fx.Node, ...]
    copies_values: bool


@dataclass(frozen=True)
class PackRotary(Pass):
    """Turns queries and keys of one projection in one call. No options."""

    name: ClassVar[str] = "pack-rotary"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = "turn queries and keys of one projection in one kernel each way"
    after: ClassVar[dict[str, str]] = {"rotary": "it makes the calls that this looks for"}

    def propose(self, program: Program, ctx: PassContext) -> Iterable[Proposal]:
        by_root: dict[fx.Node, list[fx.Node]] = {}
        for node in program.nodes():
            if _is_rotary(node) and argument(node, "heads")[2:] == [0, 0]:
                *_, root = upwards(argument(node, "input"))
                by_root.setdefault(root, []).append(node)
        groups = [(root, calls) for root, calls in by_root.items() if len(calls) > 1]
        if not groups:
            return
        line = line_of(program.graph)
        trained = trained_values(line) if ctx.mode == "train" else frozenset[fx.Node]()
        for root, calls in groups:
            found = _packed(root, calls, line, copies_values=root in trained)
            if isinstance(found, Reason):
                yield NearMiss(self.name, calls[0].name, len(calls), len(calls) + 1, found)
                continue
            nodes = (root, *found.calls, *found.values)
            last = max(calls, key=lambda node: line.position[node])
            yield Candidate(
                f"{self.name}@{root.name}", self.name, tuple(node.name for node in nodes),
                _gain(found, ctx), _packing(found, last.name),
            )  # fmt: skip


def _is_rotary(node: fx.Node) -> bool:
    return getattr(getattr(node.target, "_schema", None), "name", "") == "graphopt::rotary"


def _gain(packed: _Packed, ctx: PassContext) -> CostDelta:
    """A launch; with gradients, the copy that puts them side by side, less two of the values."""
    device = ctx.cost.device
    saved = device.launch_seconds
    if packed.copies_values:
        value = packed.projection.meta["val"]
        heads = sum(packed.heads[1:])
        share = 2 * (heads - packed.heads[3]) / heads
        saved += share * _torch.hint(value.numel()) * value.element_size() / device.copy_bytes_per_second
    return CostDelta(seconds=-saved)


# --- where heads lie ---------------------------------------------------------------------------


def _packed(root: fx.Node, calls: Sequence[fx.Node], line: Line, *, copies_values: bool) -> _Packed | Reason:
    names = (root.name, *(call.name for call in calls))
    whole = value_of(root)
    if len(calls) != 2:
        return Reason(f"{len(calls)} parts of one value are turned, not queries and keys", names)
    if whole is None or whole.dim() != 3 or not whole.is_contiguous():
        return Reason("what holds queries and keys is no projection [B, S, W] without gaps", names)
    if root.op != "call_function":
        return Reason("queries and keys lie in an input of the program", names)
    first, second = sorted(calls, key=lambda call: argument(call, "input").meta["val"].storage_offset())
    reason = _difference(first, second)
    if reason is not None:
        return reason
    layout = _layout(whole, first, second)
    if isinstance(layout, Reason):
        return layout
    heads, size = layout
    values: tuple[fx.Node, ...] = ()
    if copies_values:
        found = _values(root, whole, heads, size, (first, second))
        if isinstance(found, Reason):
            return found
        values = found
    reason = _effect_between((first, second, *values), line)
    return reason or _Packed(root, heads, size, (first, second), values, copies_values and bool(values))


def _difference(first: fx.Node, second: fx.Node) -> Reason | None:
    """What keeps two calls from being one."""
    names = (first.name, second.name)
    for setting in _SETTINGS:
        one, other = argument(first, setting), argument(second, setting)
        if one != other:
            return Reason(f"queries and keys differ in {setting}: {one} and {other}", names)
    for table in ("cos", "sin"):
        if not same_place(argument(first, table).meta["val"], argument(second, table).meta["val"]):
            return Reason("queries and keys are turned by other tables", names)
    return None


def _layout(
    whole: torch.Tensor, first: fx.Node, second: fx.Node
) -> tuple[tuple[int, int, int, int], int] | Reason:
    """Heads as ``graphopt.rotary`` counts them, and the elements of one."""
    names = (first.name, second.name)
    batch, length, width = whole.shape
    parts = [argument(call, "input").meta["val"] for call in (first, second)]
    size = parts[0].shape[3]
    starts = [part.storage_offset() - whole.storage_offset() for part in parts]
    counts = [part.shape[2] for part in parts]
    known = (size, width, *starts, *counts)
    if not all(isinstance(number, int) for number in known):
        return Reason("where heads lie is known at run time alone", names)
    steps = [size if n == 1 else part.stride(2) for n, part in zip(counts, parts, strict=True)]
    for part in parts:
        rows = part.shape[:2] == (batch, length) and part.shape[3] == size and part.stride(3) == 1
        if not rows or any(
            n != 1 and a != b
            for n, a, b in zip((batch, length), part.stride()[:2], whole.stride()[:2], strict=True)
        ):
            return Reason("heads of a position do not lie in its row of the projection", names)
    if width % size == 0 and starts[0] == 0:
        # One behind the other; or a head of each in turn, as many of one as of the other.
        if steps == [size, size] and starts[1] == counts[0] * size:
            rest = width // size - sum(counts)
            return (1, counts[0], counts[1], rest), size
        each = width // size // counts[0]
        in_turn = each in (2, 3) and counts == [counts[0]] * 2 and width == counts[0] * each * size
        if in_turn and starts[1] == size and steps == [each * size] * 2:
            return (counts[0], 1, 1, each - 2), size
    return Reason("the projection does not hold queries, keys and values in this order", names)


def _values(
    root: fx.Node,
    whole: torch.Tensor,
    heads: tuple[int, int, int, int],
    size: int,
    calls: tuple[fx.Node, fx.Node],
) -> tuple[fx.Node, ...] | Reason:
    """Views of the projection that are its values and nothing else, the first of each chain."""
    found: list[fx.Node] = []
    stack = [root]
    while stack:
        node = stack.pop()
        for user in node.users:
            value = value_of(user)
            if user in calls:
                continue
            if user.op == "output":
                return Reason("the projection is an output of the program", (root.name, node.name))
            if value is not None and heads[3] and _form(value, whole, heads, size) is not None:
                found.append(user)
            elif isinstance(user.meta.get("val"), (list, tuple)) or _is_view(user):
                stack.append(user)
            else:
                return Reason("the projection is read by another call as well", (root.name, user.name))
    if heads[3] and not found:
        return Reason("nobody reads the values of the projection", (root.name,))
    return tuple(found)


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_function" and source_of(node) is not None


def _form(
    value: torch.Tensor, whole: torch.Tensor, heads: tuple[int, int, int, int], size: int
) -> str | None:
    """How ``value`` holds the values: ``"flat"`` [B, S, Hv D], ``"heads"`` [B, S, Hv, D] or ``"transposed"``
    [B, Hv, S, D]; ``None`` where it is something else."""
    groups, queries, keys, values = heads
    batch, length, width = whole.shape
    each = queries + keys + values
    count = groups * values
    step = size if groups == 1 else each * size
    # The same view, made by arithmetic: of any values, where heads are not one behind the other, of [G, 1].
    expected = whole.as_strided(
        (batch, length, count, size),
        (*whole.stride()[:2], step, 1),
        whole.storage_offset() + (queries + keys) * size,
    )
    forms = {"heads": expected, "transposed": expected.transpose(1, 2)}
    if groups == 1:
        forms["flat"] = whole.narrow(2, width - count * size, count * size)
    return next((name for name, form in forms.items() if same_place(value, form)), None)


def _effect_between(nodes: Sequence[fx.Node], line: Line) -> Reason | None:
    """The one call stands where the last of these did; who reads the others may have to move behind it."""
    positions = [line.position[node] for node in nodes if node in line.position]
    for node in line.nodes[min(positions) : max(positions) + 1]:
        if is_state_call(node) or written_inputs(node):
            return Reason("a call between them has an effect", (nodes[0].name, node.name))
    return None


# --- rewriting ---------------------------------------------------------------------------------


def _packing(found: _Packed, last_name: str) -> Callable[[Edit], None]:
    """What rewrites; ``last_name`` is the call that runs last. Until all of the pass is rewritten, the graph
    is not in order, and says nothing of what shares memory."""

    def apply(edit: Edit) -> None:
        root, last = edit.node(found.projection.name), edit.node(last_name)
        first, second = (edit.node(call.name) for call in found.calls)
        packed = replace(
            found,
            projection=root,
            calls=(first, second),
            values=tuple(edit.node(value.name) for value in found.values),
        )
        groups, *counts = packed.heads
        heads = edit.call_before(
            last, _aten.unflatten.int, (root, -1, [groups * sum(counts), packed.size]), replaces=(last,)
        )
        given = {name: argument(first, name) for name in ("cos", "sin", *_SETTINGS)}
        made = edit.call_before(
            last,
            first.target,
            (
                heads, given["cos"], given["sin"], argument(first, "query_weight"),
                argument(second, "query_weight"), list(packed.heads), given["width"], given["interleaved"],
                given["eps"], given["weight_offset"], packed.copies_values, given["dtype"],
            ),
            replaces=(first, second),
        )  # fmt: skip
        for index, call in enumerate((first, second)):
            for element in list(call.users):
                edit.replace(
                    element, edit.call_before(last, operator.getitem, (made, index), replaces=(element,))
                )
        if packed.values:
            copied = edit.call_before(last, operator.getitem, (made, 2), replaces=packed.values)
            for value in packed.values:
                formed = _formed(edit, value, packed, copied, last)
                if (again := _copy_of(value, formed)) is not None:
                    edit.replace(again, formed)
                edit.replace(value, formed)

    return apply


def _copy_of(value: fx.Node, formed: fx.Node) -> fx.Node | None:
    """The call that copies values out of the projection for the same reason, if it alone reads them."""
    (reader, *others) = value.users
    copies = reader.target is _aten.clone.default
    rows = copies and reader.kwargs.get("memory_format") is torch.contiguous_format
    return reader if rows and formed.target is not _aten.transpose.int and not others else None


def _formed(edit: Edit, value: fx.Node, packed: _Packed, copied: fx.Node, last: fx.Node) -> fx.Node:
    """The values as ``value`` held them."""
    whole = packed.projection.meta["val"]
    form = _form(value.meta["val"], whole, packed.heads, packed.size)
    if form == "heads":
        return copied
    if form == "flat":
        return edit.call_before(last, _aten.flatten.using_ints, (copied, 2, 3), replaces=(value,))
    return edit.call_before(last, _aten.transpose.int, (copied, 1, 2), replaces=(value,))
