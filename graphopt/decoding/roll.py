"""Finds loops over positions in a graph that was captured for one length, where they are written out.

Before, for four rows x [B, 4, D]::

    h0 = zeros(B, D)
    h1 = mul(h0, a) + select(x, 1, 0)        h2 = mul(h1, a) + select(x, 1, 1)        h3 = ..    h4 = ..
    y  = stack([h1, h2, h3, h4], 1)

After::

    y, h = recurrence([h0], [x], [a])        body: h, x, a -> mul(h, a) + x

No name plays a part. What a row number is written into (``select``) is of that row, and so is all that is
made of it, up to where all rows are laid side by side in order (``stack``). What is made of row t + 1 is
compared with what is made of row t, backwards from what is laid: operators and arguments must be the same,
row numbers one higher, and what is of row t in the one must be of row t - 1 in the other: that is a state.
Where row 0 has something in that place that is of no row, the state begins with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import getitem
from typing import Any

import torch
import torch.fx as fx

from graphopt.capture.aliasing import Aliases, alias_map, written_inputs
from graphopt.decoding.layouts import name_of
from graphopt.decoding.recurrence import Recurrence
from graphopt.decoding.rows import as_rows, shared
from graphopt.errors import CaptureError
from graphopt.order import has_effect
from graphopt.program import layer_of

__all__ = ["roll"]

_SHAPE_ONLY = (
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "sym_size",
)
"""What they give depends on no number of what they are given."""


def roll(graph: fx.Graph, length: int) -> None:
    """Replace loops over the ``length`` rows of a sequence by calls of a ``Recurrence``, in place.

    Raises ``CaptureError``, naming the value that is in the way, for rows that are read one by one in
    another way.
    """
    as_rows(graph, length)
    graph.eliminate_dead_code(is_impure_node=_stays)
    times = _Times(graph, length)
    times.free_of_writes()
    shared(graph)
    times = _Times(graph, length)
    if made := times.late():
        times = _Times(graph, length, made)
    for stacks in times.loops():
        _Loop(times, stacks).replace()
    graph.eliminate_dead_code(is_impure_node=_stays)
    _check_rest(graph, times)
    graph.lint()


def _check_rest(graph: fx.Graph, times: _Times) -> None:
    """Refuse what is made of single rows and is no part of a loop."""
    for_kinds: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        # Zeros like a row are of no row.
        if name_of(node) in _SHAPE_ONLY or (node.users and all(user in for_kinds for user in node.users)):
            for_kinds.add(node)
    for node in graph.nodes:
        if times.of.get(node) is not None and node not in for_kinds:
            raise CaptureError(
                f"{where(node)} is made of row {times.of[node]} of a sequence alone, and is laid "
                "beside those "
                "of the other rows nowhere: no loop over positions was recognised there"
            )


def _stays(node: fx.Node) -> bool:
    return node.op == "placeholder" or (has_effect(node) and not isinstance(node.target, Recurrence))


def where(node: fx.Node) -> str:
    """``"mul_3 of layers.0"``."""
    layer = layer_of(node)
    return f"{node.name} of {layer}" if layer else node.name


class _Times:
    """Of which row each value is: ``of[node]``, ``None`` where it is of none, or of all."""

    def __init__(self, graph: fx.Graph, length: int, known: Mapping[fx.Node, int] | None = None) -> None:
        self.graph, self.length, self.known = graph, length, known or {}
        self.place = {node: index for index, node in enumerate(graph.nodes)}
        self.of: dict[fx.Node, int | None] = {}
        for node in graph.nodes:
            self.of[node] = self._time(node)

    def _time(self, node: fx.Node) -> int | None:
        if node in self.known:
            return self.known[node]
        if node.op != "call_function" or name_of(node) in _SHAPE_ONLY:
            return None
        if (row := self.row(node)) is not None:
            return row
        found = [time for source in node.all_input_nodes if (time := self.of[source]) is not None]
        if not found or self.is_laid(node):
            return None
        return max(found)

    def row(self, node: fx.Node) -> int | None:
        """The row that ``node`` takes of a sequence of all rows."""
        if name_of(node) != "select":
            return None
        source, dim, index = node.args
        assert isinstance(source, fx.Node) and isinstance(dim, int)
        if self.of[source] is not None or source.meta["val"].shape[dim] != self.length:
            return None
        return index if isinstance(index, int) else None

    def is_laid(self, node: fx.Node) -> bool:
        """Whether ``node`` lays what is made of all rows side by side."""
        if name_of(node) != "stack":
            return False
        parts: Any = node.args[0]
        return [self.of[part] for part in parts] == list(range(self.length))

    def late(self) -> dict[fx.Node, int]:
        """What lays rows, each made of what the rows before it left alone, is given them anew, which are of
        the rows that they are laid as: new nodes, and their rows."""
        made = {}
        for node in list(self.graph.nodes):
            if name_of(node) != "stack" or self.of[node] is None:
                continue
            parts: Any = node.args[0]
            if [self.of[part] for part in parts] != [None, *range(self.length - 1)]:
                continue
            rows = []
            for row, part in enumerate(parts):
                with self.graph.inserting_before(node):
                    rows.append(self.graph.call_function(torch.ops.aten.alias.default, (part,)))
                rows[-1].meta = dict(part.meta)
                made[rows[-1]] = row
            node.args = (rows, *node.args[1:])
        return made

    def free_of_writes(self) -> None:
        """Operators that write into what one row made give something new instead. Raises ``CaptureError``
        where others would see what is written."""
        aliases = alias_map(self.graph)
        for node in list(self.graph.nodes):
            into = written_inputs(node)
            if not into or all(self.of[source] is None for source in node.all_input_nodes):
                continue
            pure = getattr(torch.ops.aten, name_of(node).removesuffix("_"), None)
            overload = getattr(pure, str(node.target).rsplit(".", 1)[-1], None)
            if len(into) > 1 or overload is None or self._is_seen(node, into[0], aliases):
                raise CaptureError(
                    f"{where(node)} ({node.target}) writes what is made of one row into "
                    f"{into[0].name}, which "
                    "others read: rows that are written one by one are understood as out[:, t] = row for all "
                    "rows of a sequence"
                )
            node.target = overload

    def _is_seen(self, node: fx.Node, written: fx.Node, aliases: Aliases) -> bool:
        """Whether what ``node`` writes is read by another way than through itself."""
        roots = aliases.roots[written]
        if any(root.op != "call_function" for root in roots):
            return True
        before = [
            one
            for one in self.graph.nodes
            if one.op == "call_function" and self.place[one] < self.place[node] and aliases.roots[one] & roots
        ]
        return any(self.place[user] > self.place[node] for one in before for user in one.users)

    def loops(self) -> list[list[fx.Node]]:
        """What lays rows side by side, those together whose rows are made of one another."""
        parent: dict[fx.Node, fx.Node] = {}

        def find(node: fx.Node) -> fx.Node:
            root = node
            while parent.setdefault(root, root) is not root:
                root = parent[root]
            while parent[node] is not root:
                node, parent[node] = parent[node], root
            return root

        stacks = []
        for node in self.graph.nodes:
            rows = [source for source in node.all_input_nodes if self.of[source] is not None]
            if self.of[node] is not None:
                rows.append(node)
            elif rows and self.is_laid(node):
                stacks.append(node)
            for one in rows[1:]:
                parent[find(one)] = find(rows[0])
        groups: dict[fx.Node, list[fx.Node]] = {}
        for node in stacks:
            parts: Any = node.args[0]
            groups.setdefault(find(parts[0]), []).append(node)
        return list(groups.values())


class _Loop:
    """The rows that ``stacks`` lay side by side, compared with one another."""

    def __init__(self, times: _Times, stacks: list[fx.Node]) -> None:
        self.times, self.stacks = times, stacks
        self.layer = stacks[0]
        # By number of the earlier of two rows: nodes of the later one and those of the earlier in their
        # place, and what the later one takes over with what the earlier one did.
        self.same: list[dict[fx.Node, fx.Node]] = [{} for _ in range(times.length - 1)]
        self.taken: list[dict[fx.Node, fx.Node]] = [{} for _ in range(times.length - 1)]
        self.pending: list[tuple[int, fx.Node, fx.Node]] = []

    def replace(self) -> None:
        """Put a recurrence in the place of the loop."""
        for stack in self.stacks:
            parts: Any = stack.args[0]
            self.pending += [(t, parts[t], parts[t + 1]) for t in range(self.times.length - 1)]
        while self.pending:
            self._match(*self.pending.pop())
        place = self.times.place
        taken = sorted(self.taken[0], key=place.__getitem__)
        again = [node for node in taken if self._is_made_of_others(node)]
        before = [node for node in taken if node not in again]
        behind = self._behind(before)
        body, rows, fixed = self._body(before, again, behind)
        dims: Any = [node.args[1] for node in rows]
        recurrence = Recurrence(body, len(before), tuple(dims), tuple(self._dim(s) for s in self.stacks))
        initial = [self.taken[0][node] for node in before]
        sequences = [node.args[0] for node in rows]
        self._check_order([*initial, *sequences, *fixed])
        graph = self.times.graph
        with graph.inserting_before(min(self.stacks, key=place.__getitem__)):
            made = graph.call_function(recurrence, (initial, sequences, fixed))
            parts = [graph.call_function(getitem, (made, index)) for index in range(len(self.stacks))]
        made.meta["val"] = (*(s.meta["val"] for s in self.stacks), *(c.meta["val"] for c in behind))
        for stack, part in zip(self.stacks, parts, strict=True):
            part.meta["val"] = stack.meta["val"]
            for node in (made, part):
                node.meta["nn_module_stack"] = stack.meta.get("nn_module_stack")
                # Other loops may read it.
                self.times.of[node], place[node] = None, place[stack]
            stack.replace_all_uses_with(part)

    def _dim(self, stack: fx.Node) -> int:
        dim: Any = stack.args[1] if len(stack.args) > 1 else 0
        return int(dim) % int(stack.meta["val"].dim())

    def _match(self, row: int, one: fx.Node, other: fx.Node) -> None:
        """Compare ``one`` of ``row`` with ``other`` of the next."""
        known = self.same[row].get(other)
        if known is one:
            return
        if known is not None or self.times.of[one] != row or self.times.of[other] != row + 1:
            self._differ(row, one, other)
        self.same[row][other] = one
        if one.target is not other.target:
            self._differ(row, one, other)
        if self.times.row(other) is not None:
            if self.times.row(one) is None or one.args[:2] != other.args[:2]:
                self._differ(row, one, other)
            return
        if not self._alike(row, one.args, other.args) or not self._alike(row, one.kwargs, other.kwargs):
            self._differ(row, one, other)

    def _alike(self, row: int, one: Any, other: Any) -> bool:
        if isinstance(other, fx.Node):
            return isinstance(one, fx.Node) and self._alike_nodes(row, one, other)
        if isinstance(other, (list, tuple)):
            if not isinstance(one, (list, tuple)) or len(one) != len(other):
                return False
            return all(self._alike(row, a, b) for a, b in zip(one, other, strict=True))
        if isinstance(other, dict):
            return one.keys() == other.keys() and all(self._alike(row, one[k], other[k]) for k in other)
        return type(one) is type(other) and bool(one == other)

    def _alike_nodes(self, row: int, one: fx.Node, other: fx.Node) -> bool:
        time = self.times.of[other]
        if time is None:
            return one is other
        if time == row + 1:
            self.pending.append((row, one, other))
            return True
        if time < row:
            raise CaptureError(
                f"row {row + 1} of {where(self.layer)} is made of {where(other)}, which is of row "
                f"{time}: only "
                "what the row right before makes is kept"
            )
        if (
            self.times.of[one] != (row - 1 if row else None)
            or self.taken[row].setdefault(other, one) is not one
        ):
            return False
        if row:
            self.pending.append((row - 1, one, other))
        return True

    def _differ(self, row: int, one: fx.Node, other: fx.Node) -> None:
        raise CaptureError(
            f"row {row + 1} of {where(self.layer)} is not made as row {row} is: {where(one)} "
            f"({one.target}) stands "
            f"where {where(other)} ({other.target}) does, so no step takes one row to the next"
        )

    def _is_made_of_others(self, node: fx.Node) -> bool:
        """Whether a state is made of other states alone, in the same way from the first row on: it is worked
        out again where it is read."""
        taken, first = self.taken[0], self.taken[0][node]
        of = self.times.of
        timed = [source for source in node.all_input_nodes if of[source] is not None]
        if not timed or any(source not in taken for source in timed) or first.target is not node.target:
            return False

        def begun(source: fx.Node) -> fx.Node:
            return taken[source] if of[source] is not None else source

        expected: Any = fx.node.map_arg((node.args, node.kwargs), begun)
        return bool((first.args, first.kwargs) == (expected[0], expected[1]))

    def _behind(self, before: list[fx.Node]) -> list[fx.Node]:
        """What row 1 makes in the place of each of ``before``, which row 0 made."""
        made = {one: other for other, one in self.taken[1].items()}
        if len(made) < len(self.taken[1]):
            raise CaptureError(
                f"{where(self.layer)}: two values that row 1 takes over are one in row 0: which "
                "of them is kept "
                "cannot be told"
            )
        for node in before:
            if node not in made:
                raise CaptureError(
                    f"{where(self.layer)}: what takes the place of {where(node)} in the next row "
                    "was not found"
                )
        return [made[node] for node in before]

    def _body(
        self, before: list[fx.Node], again: list[fx.Node], behind: list[fx.Node]
    ) -> tuple[fx.GraphModule, list[fx.Node], list[fx.Node]]:
        """The graph of row 1, which works out ``again`` what is made of states alone; what takes rows of
        sequences in it, and what it reads that is of no row."""
        order = sorted({*self.same[0], *again}, key=self.times.place.__getitem__)
        rows = [node for node in order if self.times.row(node) is not None]
        inside = [node for node in order if self.times.row(node) is None]
        known = {*order, *before}
        fixed = [s for node in inside for s in node.all_input_nodes if s not in known]
        fixed = sorted(dict.fromkeys(fixed), key=self.times.place.__getitem__)
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in (*before, *rows, *fixed):
            copies[node] = graph.placeholder(node.name)
            copies[node].meta["val"] = node.meta["val"]
        for node in inside:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        laid: Any = [stack.args[0] for stack in self.stacks]
        made = [parts[1] for parts in laid]
        graph.output(tuple(copies[node] for node in (*behind, *made)))
        return fx.GraphModule(torch.nn.Module(), graph), rows, fixed

    def _check_order(self, inputs: list[Any]) -> None:
        place = self.times.place
        first = min(place[stack] for stack in self.stacks)
        late = next((node for node in inputs if place[node] > first), None)
        if late is not None:
            raise CaptureError(
                f"{where(late)} is read by rows that are laid before it is made, "
                f"{where(self.layer)}: one loop is in "
                "the middle of another"
            )
