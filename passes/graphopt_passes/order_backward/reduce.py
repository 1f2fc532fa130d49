"""A joint program as two halves to be ordered, and an order of operators as one of nodes."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch.fx as fx

from graphopt.capture.aliasing import alias_map, written_inputs
from graphopt.capture.joint import save_everything
from graphopt.cost import CostModel
from graphopt.order import has_effect
from graphopt.program import Program
from graphopt.replay import is_random_state, random_state_of
from graphopt.schedule import Schedule
from graphopt.values import value_table
from graphopt_passes.order_backward.half import Half

__all__ = ["Ordered", "Reduced"]


@dataclass(frozen=True)
class Ordered:
    """A half and its nodes. ``kept``: what the backward needs of the forward is handed over; ``again``:
    none of it is. ``operators[i]`` is the node of operator i, ``names`` are all nodes of the half in the
    order given."""

    kept: Half
    again: Half
    operators: tuple[str, ...]
    names: tuple[str, ...]


class Reduced:
    """Views, tuple elements and constants vanish, as they do for the search of checkpoints: they come
    with their first reader. Effects keep their order: see ``_felt``."""

    def __init__(self, program: Program, cost: CostModel) -> None:
        self.program, self.cost = program, cost
        self.schedule: Schedule = save_everything(program)
        self._nodes = {node.name: node for node in program.graph.nodes}
        self._size: list[int] = []
        self._buffers: dict[str, list[int | None]] = {}
        self._made: dict[str, tuple[int, ...]] = {}
        self._allocate()
        self._waits = self._felt()

        tangents = [spec.node for spec in program.signature.by_role("tangent")]
        outputs, mutations, gradients = (self._results(role) for role in ("output", "mutation", "gradient"))
        forward_made = {b for name in self.schedule.forward for b in self._made[name]}
        read = {b for name in self.schedule.backward for b in self._reads(self._nodes[name])}
        handed = ((read | gradients | self._of(self.schedule.saved)) & forward_made) - outputs
        # Whoever calls backward() on a loss holds what it starts from until it returns.
        held = self._of(name for name in tangents if not self._nodes[name].meta["val"].dim())
        entry, lasting = frozenset(self._of(tangents)), frozenset(gradients | held)

        kept, operators = self._half(self.schedule.forward, set(), outputs | mutations | handed, set())
        again = kept.alone(frozenset(), frozenset(outputs | mutations))
        self.forward = Ordered(kept, again, operators, self.schedule.forward)
        # What the caller holds is there in whatever order.
        kept, operators = self._half(self.schedule.backward, entry | handed, lasting, outputs)
        self.backward = Ordered(kept, kept.alone(entry, lasting), operators, self.schedule.backward)

    @property
    def unscheduled(self) -> list[str]:
        """Effects that neither half lists."""
        listed = {*self.schedule.forward, *self.schedule.backward}
        return [n.name for n in self.program.nodes() if n.name not in listed and has_effect(n) and n.users]

    def nodes_of(self, half: Ordered, order: Sequence[int]) -> tuple[str, ...]:
        """All nodes of a half, its operators in ``order``: views right before their first reader, elements
        right behind their tuple, views that nobody reads at the end."""
        own, operators = set(half.names), set(half.operators)
        done: set[str] = set()
        names: list[str] = []

        def place(name: str) -> None:
            stack = [name]
            while stack:
                top = stack[-1]
                sources = (source.name for source in self._nodes[top].all_input_nodes)
                missing = [source for source in sources if source in own and source not in done]
                if missing:
                    stack.extend(reversed(missing))
                    continue
                stack.pop()
                if top in done:
                    continue
                done.add(top)
                names.append(top)
                for user in self._nodes[top].users:
                    if user.target is operator.getitem and user.name in own and user.name not in operators:
                        done.add(user.name)
                        names.append(user.name)

        for i in order:
            place(half.operators[i])
        for name in half.names:
            if name not in done:
                place(name)
        return tuple(names)

    def peak(self, forward: tuple[str, ...], backward: tuple[str, ...]) -> int:
        """Bytes of the step at most in these orders of nodes, above what is held throughout."""
        return self.cost.memory([(self.program, Schedule(forward, self.schedule.saved, backward))]).peak_bytes

    # --- inside ----------------------------------------------------------------------------

    def _allocate(self) -> None:
        """Give every node the buffers that it refers to, ``None`` for memory of the graph's inputs."""
        step = self.cost.device.allocation_granularity
        table = value_table(self.program.graph)
        static = {s.node for s in self.program.signature.inputs if s.role != "tangent"}
        for name, leaves in table.items():
            fixed = name in static or self._nodes[name].op == "get_attr"
            refs: list[int | None] = []
            made: list[int] = []
            for leaf in leaves:
                if leaf.alias is not None:
                    origin, index = leaf.alias
                    refs.append((refs if origin == name else self._buffers[origin])[index])
                elif fixed:
                    refs.append(None)
                else:
                    made.append(len(self._size))
                    refs.append(len(self._size))
                    self._size.append(-(-leaf.bytes // step) * step)
            self._buffers[name], self._made[name] = refs, tuple(made)

    def _felt(self) -> dict[str, set[str]]:
        """Nodes that each must run after, besides what it reads: effects stay in their order, and so do
        a write in place and whatever refers to the memory that is written."""
        graph = self.program.graph
        waits: dict[str, set[str]] = {}
        effects = [node for node in self.program.nodes() if has_effect(node)]
        for earlier, later in itertools.pairwise(effects):
            waits.setdefault(later.name, set()).add(earlier.name)
        writes = [node for node in effects if written_inputs(node)]
        if not writes:
            return waits
        roots = alias_map(graph).roots
        place = {node: i for i, node in enumerate(graph.nodes)}
        for write in writes:
            memory = {root for ref in written_inputs(write) for root in roots[ref]}
            for node in self.program.nodes():
                if node is not write and any(memory & roots[n] for n in (node, *node.all_input_nodes)):
                    first, second = (write, node) if place[write] < place[node] else (node, write)
                    waits.setdefault(second.name, set()).add(first.name)
        return waits

    def _half(
        self, names: Sequence[str], entry: Iterable[int], lasting: Iterable[int], ignored: set[int]
    ) -> tuple[Half, tuple[str, ...]]:
        operators: list[str] = []
        reads: list[tuple[int, ...]] = []
        extra: list[int] = []
        before: list[frozenset[int]] = []
        behind: dict[str, frozenset[int]] = {}
        for name in names:
            node = self._nodes[name]
            sources = [*(source.name for source in node.all_input_nodes), *self._waits.get(name, ())]
            waits = frozenset(i for source in sources for i in behind.get(source, ()))
            is_view = bool(self._buffers[name]) and not self._made[name] and not has_effect(node)
            if node.op == "get_attr" or is_view:
                behind[name] = waits
                continue
            behind[name] = frozenset((len(operators),))
            operators.append(name)
            reads.append(tuple(b for b in self._reads(node) if b not in ignored))
            extra.append(self._besides(node, replays=names is self.schedule.backward))
            before.append(waits)
        makes = tuple(self._made[name] for name in operators)
        there = {*entry, *(b for made in makes for b in made), *(b for read in reads for b in read)}
        # Buffers of the other half weigh nothing here.
        size = tuple(size if b in there else 0 for b, size in enumerate(self._size))
        half = Half(
            size, tuple(reads), makes, tuple(extra), tuple(before), frozenset(entry), frozenset(lasting)
        )
        return half, tuple(operators)

    def _besides(self, node: fx.Node, *, replays: bool) -> int:
        """Bytes that a call takes while it runs: its kernel's workspace, a generator's state put aside where
        it ``replays`` one."""
        state = random_state_of(node) if replays else None
        aside = sum(self._size[b] for b in self._of([state.name])) if state is not None else 0
        return self.cost.node(node).workspace_bytes + aside

    def _reads(self, node: fx.Node) -> dict[int, None]:
        """Buffers that a call reads. States of generators are made only where something runs again."""
        sources = [source.name for source in node.all_input_nodes if not is_random_state(source)]
        return dict.fromkeys(self._refs(sources))

    def _of(self, names: Iterable[str]) -> set[int]:
        return set(self._refs(names))

    def _refs(self, names: Iterable[str]) -> Iterable[int]:
        return (b for name in names for b in self._buffers.get(name, ()) if b is not None)

    def _results(self, role: str) -> set[int]:
        return self._of(spec.node for spec in self.program.signature.outputs if spec.role == role)
