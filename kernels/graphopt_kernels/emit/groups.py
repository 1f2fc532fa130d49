"""Which operators of a program go into one kernel.

Every operator that a kernel can compute starts alone. Producers are then merged with their consumers, largest
value in between first, wherever no other operator has to run between them and one kernel is found for both;
readers of the same large value follow. A group stays if its kernel moves fewer bytes than its operators one
by one. Views are taken along into kernels and stay outside as well: they cost nothing there.

Products of matrices come last: each may take in the groups that read its result and those that make its
operands, where one kernel is faster by the figures of a device (``product_choice``).

Merged operators run together, so what they read is held for longer and what they make is there earlier.
Where others
run in between, a merge has to leave the peak of the program within a limit.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.fx as fx

from graphopt.candidate import Reason
from graphopt_kernels.emit.attention_choice import attention_decision, emitted_attention
from graphopt_kernels.emit.build import NotFusible
from graphopt_kernels.emit.kernel_file import Kernel, KernelFile, kernel_of
from graphopt_kernels.emit.order import Step, is_free, live_bytes, ordered, peak_bytes, root, size
from graphopt_kernels.emit.product_choice import Prices, prices_for

__all__ = ["Grouping", "grouped", "peak_ungrouped"]

MOST_INPUTS = 24
"""Pointers of a kernel; more of them spill registers in the kernels of long groups."""

MOST_NODES = 96


@dataclass(frozen=True)
class Grouping:
    """``kernels`` by the position of their last node. ``left``: operators that stay calls, and why.
    ``taken``: products that kernels compute, and why."""

    kernels: tuple[Kernel, ...]
    left: tuple[tuple[str, Reason], ...]
    taken: tuple[tuple[str, Reason], ...] = ()


def grouped(
    graph: fx.Graph,
    owned: Collection[fx.Node] = (),
    limit: int | None = None,
    prices: Prices | None = None,
) -> Grouping:
    """Kernels for the graph of a lowered program.

    ``owned``: inputs that the program lets go after their last use. ``limit``: the bytes that may be alive
    at once
    (``order.peak_bytes``); ``None`` for what the operators one by one take. ``prices``: of the device that
    products of matrices are decided for; ``None`` for an H200.
    """
    return _Search(graph, owned, limit, prices).found()


def peak_ungrouped(graph: fx.Graph, owned: Collection[fx.Node] = ()) -> int:
    """The most that is alive at once with every operator by itself, in bytes."""
    return _Search(graph, owned, None, None).limit


class _Group:
    def __init__(self, nodes: Iterable[fx.Node], step: Step) -> None:
        self.nodes = set(nodes)
        self.step = step


class _Search:
    def __init__(
        self, graph: fx.Graph, owned: Collection[fx.Node], limit: int | None, prices: Prices | None
    ) -> None:
        self._nodes = [node for node in graph.nodes if node.op == "call_function"]
        self._place = {node: i for i, node in enumerate(self._nodes)}
        self._of: dict[fx.Node, _Group] = {}
        self._left: dict[fx.Node, Reason] = {}
        self._taken: dict[fx.Node, Reason] = {}
        self._products: list[fx.Node] = []
        self._attentions: dict[fx.Node, list[fx.Node]] = {}
        self._prices = prices
        self._tried: dict[Any, NotFusible | KernelFile] = {}
        (output,) = [node for node in graph.nodes if node.op == "output"]
        self._results = list(dict.fromkeys(output.all_input_nodes))
        self._owned = frozenset(owned)
        self._alive: dict[fx.Node, int] | None = None
        self.limit = self._peak(()) if limit is None else limit

    def _peak(self, groups: Iterable[_Group]) -> int:
        steps = ordered(self._nodes, [group.step for group in groups], self._results)
        return peak_bytes(steps, self._owned, self._results)

    def found(self) -> Grouping:
        for node in self._nodes:
            if is_free(node) or node.target is operator.getitem:
                continue
            unit = [node, *(user for user in node.users if user.target is operator.getitem)]
            file = self._file(unit)
            if isinstance(file, NotFusible):
                self._left[node] = file.reason
            elif file.attends:
                self._attentions[node] = unit
            elif file.tiling is not None:
                self._products.append(node)
            else:
                group = self._group(unit)
                self._of.update(dict.fromkeys(unit, group))
        self._merge_along(self._edges())
        self._merge_along(self._siblings())
        for unit in self._attentions.values():
            self._attend(unit)
        for product in self._products:
            self._take_in(product)
        found = {}
        for group in self._groups():
            kernel = self._kernel(group.nodes)
            if kernel is not None and (
                kernel.file.attends or kernel.file.tiling is not None or self._pays(kernel)
            ):
                found[group] = kernel
        while found and self._peak(found) > self.limit:
            # Groups that did not stay took values with them that others counted on.
            del found[min(found, key=lambda g: self._peak([other for other in found if other is not g]))]
        kernels = list(found.values())
        kernels.sort(key=lambda k: self._place[k.nodes[-1]])
        inside = {node for kernel in kernels for node in kernel.nodes}
        for product in [node for node in self._taken if node not in inside]:
            del self._taken[product]
            self._left[product] = Reason("its kernel would hold more at once than the program may")
        left = sorted(self._left, key=self._place.__getitem__)
        return Grouping(
            tuple(kernels),
            tuple((node.name, self._left[node]) for node in left),
            tuple((node.name, reason) for node, reason in self._taken.items()),
        )

    def _groups(self) -> list[_Group]:
        return list(dict.fromkeys(self._of.values()))

    # --- what may merge ----------------------------------------------------------------------

    def _merge_along(self, pairs: Sequence[tuple[fx.Node, fx.Node]]) -> None:
        for left, right in pairs:
            a, b = self._of.get(left), self._of.get(right)
            if a is None or b is None or a is b:
                continue
            if self._between(a, b) or self._between(b, a):
                continue
            nodes = a.nodes | b.nodes
            if len(nodes) <= MOST_NODES and not isinstance(self._file(nodes), NotFusible):
                self._merge(nodes, (a, b))

    def _merge(self, nodes: set[fx.Node], parts: Collection[_Group]) -> bool:
        """Have ``nodes`` run together, in place of ``parts``, where memory allows it."""
        merged = self._group(nodes)
        local = self._adjoining(nodes)
        if local and self._before(nodes) + sum(map(size, merged.step.makes)) <= self.limit:
            self._of.update(dict.fromkeys(nodes, merged))
            return True
        if self._peak([merged, *(g for g in self._groups() if g not in parts)]) <= self.limit:
            self._of.update(dict.fromkeys(nodes, merged))
            self._alive = None
            return True
        return False

    def _attend(self, unit: list[fx.Node]) -> None:
        """Attention in kernels of its own, with what makes its bias, where that pays or nothing else runs."""
        prices = self._prices = self._prices or prices_for()
        node, *parts_of_it = unit
        if any(part.users and not isinstance(part.meta["val"], torch.Tensor) for part in parts_of_it):
            self._left[node] = Reason("something reads a result of attention that is no tensor")
            return
        alone = self._file(unit)
        assert isinstance(alone, KernelFile)
        nodes, file, separate = set(unit), alone, 0.0
        parts: list[_Group] = []
        tried: set[_Group] = set()
        while group := next((g for g in self._makers(nodes) if g not in tried), None):
            tried.add(group)
            together = self._file(nodes | group.nodes)
            if self._between(group, self._group(nodes)) or isinstance(together, NotFusible):
                continue
            makes = self._apart(group, prices)
            if emitted_attention(prices, together) < emitted_attention(prices, file) + makes:
                nodes, file, parts = nodes | group.nodes, together, [*parts, group]
                separate += makes
        pays, reason = attention_decision(prices, alone, file, _listed(parts), separate)
        if not pays:
            self._left[node] = reason
            return
        if self._merge(nodes, parts):
            self._taken[node] = reason
        else:
            self._left[node] = Reason("its kernel would hold more at once than the program may")

    def _makers(self, nodes: set[fx.Node]) -> list[_Group]:
        """Groups that make what some nodes read, largest value first."""
        makers = [s for node in nodes for s in self._sources(node) if s in self._of and s not in nodes]
        makers.sort(key=lambda n: (-size(n), self._place[n]))
        return list(dict.fromkeys(self._of[maker] for maker in makers))

    def _take_in(self, product: fx.Node) -> None:
        """The kernel of a product and its neighbours, if there is one and it pays."""
        prices = self._prices = self._prices or prices_for()
        alone = self._file([product])
        assert isinstance(alone, KernelFile)
        nodes, file = {product}, alone
        parts: list[_Group] = []
        apart = prices.library(alone, product)
        for group in self._neighbours(product):
            if any(node in self._taken for node in group.nodes):
                self._left.setdefault(product, Reason("its neighbours are in the kernel of another product"))
                continue
            whole = self._group(nodes)
            if self._between(whole, group) or self._between(group, whole):
                continue
            together = self._file(nodes | group.nodes)
            if isinstance(together, NotFusible):
                self._left.setdefault(product, together.reason)
                continue
            separate = self._apart(group, prices)
            if prices.emitted(together) < prices.emitted(file) + separate:
                nodes, file, parts = nodes | group.nodes, together, [*parts, group]
                apart += separate
        if not parts:
            self._left.setdefault(product, Reason("nothing goes into one kernel with this product"))
            return
        emitted = prices.emitted(file)
        arithmetic = (
            f"in one kernel with {_listed(parts)} {emitted * 1e6:.1f} us at {prices.share(file):g} of the "
            f"library's rate, apart {apart * 1e6:.1f} us on {prices.device.name}"
        )
        if emitted >= apart:
            self._left[product] = Reason(arithmetic)
        elif not self._merge(nodes, parts):
            self._left[product] = Reason("its kernel would hold more at once than the program may")
        else:
            self._left.pop(product, None)
            self._taken[product] = Reason(arithmetic)

    def _neighbours(self, product: fx.Node) -> list[_Group]:
        """Groups that read a product's result, then those that make its operands, largest value first."""
        readers = [user for node in self._shown(product) for user in node.users if user in self._of]
        makers = [source for source in self._sources(product) if source in self._of]
        readers.sort(key=lambda n: (-size(n), self._place[n]))
        makers.sort(key=lambda n: (-size(n), self._place[n]))
        found = dict.fromkeys(self._of[node] for node in (*readers, *makers))
        return [group for group in found if not group.nodes & self._attentions.keys()]

    def _shown(self, node: fx.Node) -> list[fx.Node]:
        """A node and all views of it."""
        found = [node]
        for shown in found:
            found += [user for user in shown.users if user.op == "call_function" and is_free(user)]
        return found

    def _apart(self, group: _Group, prices: Prices) -> float:
        """Seconds of a group by itself: its kernel if it has one, else its operators."""
        file = self._file(group.nodes)
        members, _ = self._members(group.nodes)
        if isinstance(file, KernelFile) and file.bytes < _bytes_one_by_one(members):
            return prices.moved(file.bytes)
        return prices.one_by_one([n for n in members if not is_free(n) and n.target is not operator.getitem])

    def _before(self, nodes: Iterable[fx.Node]) -> int:
        """Bytes alive before the first of ``nodes`` runs. Merging neighbours only takes values away: what was
        found before such merges is no less."""
        if self._alive is None:
            steps = ordered(self._nodes, [group.step for group in self._groups()], self._results)
            found = live_bytes(steps, self._owned, self._results)
            self._alive = {n: b for step, (b, _) in zip(steps, found, strict=True) for n in step.nodes}
        return min(self._alive[node] for node in nodes)

    def _group(self, nodes: Iterable[fx.Node]) -> _Group:
        members, outputs = self._members(nodes)
        inside = set(members)
        reads = dict.fromkeys(root(source) for node in members for source in node.all_input_nodes)
        return _Group(nodes, Step(tuple(members), tuple(r for r in reads if r not in inside), tuple(outputs)))

    def _adjoining(self, nodes: Collection[fx.Node]) -> bool:
        """Whether nothing else runs between nodes: they can run together and hold nothing for longer."""
        places = [self._place[node] for node in nodes]
        between = self._nodes[min(places) : max(places)]
        return all(node in nodes or is_free(node) or node.target is operator.getitem for node in between)

    def _edges(self) -> list[tuple[fx.Node, fx.Node]]:
        """(producer, consumer), most bytes in between first."""
        pairs = [
            (size(source), -self._place[node], source, node)
            for node in self._of
            for source in self._sources(node)
            if source in self._of
        ]
        pairs.sort(key=lambda p: (-p[0], p[1], self._place[p[2]]))
        return [(source, node) for *_, source, node in pairs]

    def _siblings(self) -> list[tuple[fx.Node, fx.Node]]:
        """Readers of one value from outside of both groups, largest value first."""
        readers: dict[fx.Node, list[fx.Node]] = {}
        for node in self._of:
            for source in self._sources(node):
                readers.setdefault(source, []).append(node)
        pairs = []
        for source, nodes in readers.items():
            nodes.sort(key=self._place.__getitem__)
            pairs += [(size(source), self._place[b], a, b) for a, b in pairwise(nodes)]
        pairs.sort(key=lambda p: (-p[0], p[1]))
        return [(a, b) for *_, a, b in pairs]

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        """What a node reads, views looked through."""
        found = []
        stack = list(node.all_input_nodes)
        while stack:
            source = stack.pop()
            if source.op == "call_function" and is_free(source):
                stack += source.all_input_nodes
            else:
                found.append(source)
        return found

    def _between(self, first: _Group, second: _Group) -> bool:
        """Whether something outside of both has to run after the first group and before the second."""
        inside = first.nodes | second.nodes
        last = max(self._place[node] for node in second.nodes)
        stack = [user for node in first.nodes for user in node.users if user not in inside]
        seen: set[fx.Node] = set()
        while stack:
            node = stack.pop()
            if node in seen or node.op != "call_function":
                continue
            seen.add(node)
            # A group runs as a whole: what one of its nodes waits for all of them do.
            group = self._of.get(node)
            around = group.nodes if group is not None and group not in (first, second) else {node}
            for member in around:
                for user in member.users:
                    if user in second.nodes:
                        if not (is_free(node) and self._only_from(node, first)):
                            return True
                    elif user not in inside and (user in self._of or self._place.get(user, last) < last):
                        stack.append(user)
        return False

    def _only_from(self, view: fx.Node, group: _Group) -> bool:
        """Whether a view shows what the group made and can go into its kernel."""
        (source,) = view.all_input_nodes[:1]
        while source.op == "call_function" and is_free(source):
            (source,) = source.all_input_nodes[:1]
        return source in group.nodes

    # --- kernels -----------------------------------------------------------------------------

    def _members(self, nodes: Iterable[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
        """The nodes of a group with the views between them, in order, and those that others read."""
        core = set(nodes)
        members = set(core)
        for node in core:
            stack = [source for source in node.all_input_nodes if source not in core]
            while stack:
                source = stack.pop()
                if source.op == "call_function" and is_free(source) and source not in members:
                    members.add(source)
                    stack += source.all_input_nodes
        ordered = sorted(members, key=self._place.__getitem__)
        outputs = [
            node
            for node in ordered
            if node in core
            and isinstance(node.meta.get("val"), torch.Tensor)
            and any(not self._taken_along(user, core) for user in node.users)
        ]
        return ordered, outputs

    def _taken_along(self, user: fx.Node, core: set[fx.Node]) -> bool:
        """Whether a reader needs the value in the kernel alone: it is of the group, or a view for it."""
        if user in core:
            return True
        if user.op != "call_function" or not is_free(user):
            return False
        return bool(user.users) and all(self._taken_along(next_, core) for next_ in user.users)

    def _kernel(self, nodes: Iterable[fx.Node]) -> Kernel | None:
        members, outputs = self._members(nodes)
        try:
            return kernel_of(members, outputs) if outputs else None
        except NotFusible:
            return None

    def _file(self, nodes: Iterable[fx.Node]) -> KernelFile | NotFusible:
        """The kernel of nodes, or why they make none; groups alike are tried once."""
        members, outputs = self._members(nodes)
        if not outputs:
            return NotFusible.because("nothing reads it")
        key = _signature(members, outputs)
        if key not in self._tried:
            try:
                kernel = kernel_of(members, outputs)
                if len(kernel.inputs) > MOST_INPUTS:
                    raise NotFusible.because(f"{len(kernel.inputs)} inputs")
                self._tried[key] = kernel.file
            except NotFusible as error:
                self._tried[key] = error
        return self._tried[key]

    def _pays(self, kernel: Kernel) -> bool:
        """Whether a kernel moves fewer bytes than its operators do one by one."""
        return kernel.file.bytes < _bytes_one_by_one(kernel.nodes)


def _bytes_one_by_one(nodes: Iterable[fx.Node]) -> int:
    """What operators read and write, each by itself."""
    calls = [node for node in nodes if not is_free(node) and node.target is not operator.getitem]
    return sum(sum(size(source) for source in node.all_input_nodes) + size(node) for node in calls)


def _listed(groups: Iterable[_Group]) -> str:
    """The operators of groups by name, each once."""
    nodes = [n for group in groups for n in group.step.nodes if not is_free(n)]
    words = dict.fromkeys(str(getattr(n.target, "_opname", "")).strip("_") for n in nodes)
    return ", ".join(word for word in words if word and word != "getitem")


def _signature(members: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Any:
    """Equal for groups that give the same kernel."""
    number: dict[fx.Node, int] = {}
    rows: list[Any] = []

    def numbered(node: fx.Node) -> str:
        if node not in number:
            number[node] = len(number)
            rows.append(("in", _layout(node)))
        return f"%{number[node]}"

    for node in members:
        args = fx.node.map_arg((node.args, dict(node.kwargs)), numbered)
        rows.append((str(node.target), str(args), _layout(node)))
        number[node] = len(number)
    return tuple(rows), tuple(number[node] for node in outputs)


def _layout(node: fx.Node) -> Any:
    value = node.meta.get("val")
    leaves = value if isinstance(value, (tuple, list)) else [value]
    return tuple(
        (leaf.dtype, tuple(leaf.shape), tuple(leaf.stride())) if isinstance(leaf, torch.Tensor) else leaf
        for leaf in leaves
    )
