"""A joint program reduced to what checkpointing is about: storages, the operators that make them,
and the points of the backward that read them.

Views, tuple elements and graph inputs vanish: a value is its storage. What remains:

- forward storages, each made by one forward operator from other storages;
- the backward as *slots*: the operators that read forward storages, in order, with the bytes that
  the backward itself holds before, during and after each. Those do not depend on what is saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.capture.joint import save_everything
from graphopt.collectives import is_collective
from graphopt.cost import CostModel
from graphopt.replay import is_random, is_random_state, random_state_of, statistics_of
from graphopt.values import value_table

if TYPE_CHECKING:
    from graphopt.program import Program
    from graphopt.schedule import Schedule

__all__ = ["Slot", "StepModel", "build_model"]


@dataclass(frozen=True)
class Slot:
    """A backward operator that reads forward storages.

    ``before``: bytes that the backward itself holds when the slot begins; ``during``: those with
    the operator's own outputs; ``gap``: the most it holds until the next slot, this operator's
    inputs released.
    """

    node: str
    reads: tuple[int, ...]
    before: int
    during: int
    gap: int


@dataclass(frozen=True)
class StepModel:
    """Storages are numbered in forward order; operators likewise. Bytes are allocator-rounded.

    ``size[b]``: bytes of storage b. ``maker[b]``: the operator that makes it. ``inputs[i]``,
    ``outputs[i]``: forward storages that operator i reads and makes, in forward order.
    ``seconds[i]``, ``flops[i]``: its cost. ``again[i]``: whether it may run again. ``free[b]``: held in
    the backward anyway (a graph output). ``savable[b]``: may be handed over (false inside a user's
    checkpoint region).
    ``scratch[b]``: bytes that b takes when it is a transient, smaller than ``size`` where the code
    generator fuses its readers into its maker. ``last_read[b]``: position of the last operator of
    the forward that reads it. ``workspace[i]``: kernel-internal bytes of operator i,
    ``workspace_again[i]``: those where it runs again. ``only_saved[b]``: b is not made
    unless it is handed over (a generator's state). ``views``: backward nodes that make no storage.
    """

    program: Program
    baseline: Schedule
    size: list[int]
    scratch: list[int]
    maker: list[int]
    representative: list[str]
    inputs: list[tuple[int, ...]]
    outputs: list[tuple[int, ...]]
    operators: list[str]
    seconds: list[float]
    flops: list[int]
    workspace: list[int]
    workspace_again: list[int]
    again: list[bool]
    free: list[bool]
    savable: list[bool]
    only_saved: list[bool]
    last_read: list[int]
    slots: list[Slot]
    opening: int
    gradient_bytes: int
    output_bytes: int
    views: frozenset[str]


def build_model(program: Program, cost: CostModel, emit: str) -> StepModel:
    """Reduce a joint program. ``emit`` decides which transients are materialised."""
    return _Builder(program, cost, emit).build()


class _Builder:
    def __init__(self, program: Program, cost: CostModel, emit: str) -> None:
        self.program, self.cost, self.emit = program, cost, emit
        self.baseline = save_everything(program, random_states=True)
        self.nodes = {node.name: node for node in program.graph.nodes}
        self.table = value_table(program.graph)
        self.roles = {spec.node: spec.role for spec in program.signature.inputs}
        step = cost.device.allocation_granularity
        self.step = step
        # buffers[name]: storage of each leaf; (True, b) forward, (False, b) backward, None static.
        self.buffers: dict[str, list[tuple[bool, int] | None]] = {}

    def round(self, size: int) -> int:
        """Bytes that the allocator takes for ``size``."""
        return -(-size // self.step) * self.step

    def build(self) -> StepModel:
        self._forward()
        self._pins()
        self._backward()
        outputs = self._results("output")
        mutations = self._results("mutation") - outputs
        read = {b for slot in self.slots for b in slot.reads}
        for _, b in mutations:
            self.last_read[b] = len(self.operators)
        only_saved = [
            is_random_state(self.nodes[self.operators[self.maker[b]]]) for b in range(len(self.size))
        ]
        # What the backward reads of new values of mutated inputs is held: run again, the operators
        # that made them would start from the new values.
        free = [(True, b) in outputs or ((True, b) in mutations and b in read) for b in range(len(self.size))]
        return StepModel(
            self.program,
            self.baseline,
            self.size,
            self._scratch(),
            self.maker,
            self.representative,
            self.op_inputs,
            self.op_outputs,
            self.operators,
            self.seconds,
            self.flops,
            self.workspace,
            self.workspace_again,
            self.again,
            free,
            self.savable,
            only_saved,
            self.last_read,
            self.slots,
            self.opening,
            self.gradient_bytes,
            sum(size for size, held in zip(self.size, free, strict=True) if held),
            frozenset(self.views),
        )

    def _results(self, role: str) -> set[tuple[bool, int]]:
        names = [spec.node for spec in self.program.signature.outputs if spec.role == role]
        return {b for name in names for b in self._storages(name) if b is not None and b[0]}

    def _storages(self, name: str) -> list[tuple[bool, int] | None]:
        return self.buffers.get(name, [])

    def _reads(self, node: fx.Node) -> list[tuple[bool, int]]:
        found: dict[tuple[bool, int], None] = {}
        for source in node.all_input_nodes:
            for buffer in self._storages(source.name):
                if buffer is not None:
                    found[buffer] = None
        return list(found)

    def _forward(self) -> None:
        self.size: list[int] = []
        self.maker: list[int] = []
        self.representative: list[str] = []
        self.op_inputs: list[tuple[int, ...]] = []
        self.op_outputs: list[tuple[int, ...]] = []
        self.operators: list[str] = []
        self.seconds: list[float] = []
        self.flops: list[int] = []
        self.workspace: list[int] = []
        self.workspace_again: list[int] = []
        self.last_read: list[int] = []
        for name, role in self.roles.items():
            self.buffers[name] = [None] * len(self.table[name]) if role != "tangent" else []
        for name in self.baseline.forward:
            node = self.nodes[name]
            made: list[int] = []
            refs: list[tuple[bool, int] | None] = []
            number = len(self.operators)
            for leaf in self.table[name]:
                if leaf.alias is not None:
                    refs.append(
                        (refs if leaf.alias[0] == name else self.buffers[leaf.alias[0]])[leaf.alias[1]]
                    )
                elif node.op == "get_attr":
                    refs.append(None)
                else:
                    made.append(len(self.size))
                    refs.append((True, len(self.size)))
                    self.size.append(self.round(leaf.bytes))
                    self.maker.append(number)
                    self.representative.append("")
                    self.last_read.append(number)
            self.buffers[name] = refs
            self._represent(node, refs)
            reads = [b for forward, b in self._reads(node) if forward]
            if not made:
                continue
            cost = self.cost.node(node)
            self.operators.append(name)
            self.op_inputs.append(tuple(sorted(reads)))
            self.op_outputs.append(tuple(made))
            self.seconds.append(cost.seconds)
            self.flops.append(cost.flops)
            self.workspace.append(cost.workspace_bytes)
            state = random_state_of(node)
            aside = sum(leaf.bytes for leaf in self.table[state.name]) if state is not None else 0
            self.workspace_again.append(cost.workspace_bytes + self.round(aside))
            for b in reads:
                self.last_read[b] = number

    def _represent(self, node: fx.Node, refs: list[tuple[bool, int] | None]) -> None:
        """The node that stands for a storage is the first tensor that covers it."""
        if len(refs) != 1 or refs[0] is None or not isinstance(node.meta.get("val"), torch.Tensor):
            return
        if not self.representative[refs[0][1]]:
            self.representative[refs[0][1]] = node.name

    def _pins(self) -> None:
        """Operators that must not run again, storages that must not be handed over."""
        mutated = self._mutated_inputs()
        self.again = []
        for name in self.operators:
            node = self.nodes[name]
            stale = any(source.name in mutated for source in self._roots(node))
            self.again.append(not (node.is_impure(impure_random=False) or stale or pinned(node)))
        self.savable = [
            bool(self.representative[b]) and not _must_recompute(self.nodes[self.operators[self.maker[b]]])
            for b in range(len(self.size))
        ]

    def _mutated_inputs(self) -> set[str]:
        """Graph inputs that the step writes to: reading them later gives another value."""
        signature = self.program.signature
        written = {spec.target for spec in signature.outputs if spec.role == "mutation"}
        return {spec.node for spec in signature.inputs if spec.node in written or spec.fqn in written - {""}}

    def _roots(self, node: fx.Node) -> list[fx.Node]:
        """Placeholders that a node reads directly or through views."""
        found, stack = [], [source for source in node.all_input_nodes if source not in statistics_of(node)]
        while stack:
            source = stack.pop()
            if source.op == "placeholder":
                found.append(source)
            elif self._storages(source.name) and all(b is None for b in self._storages(source.name)):
                stack.extend(source.all_input_nodes)
        return found

    def _backward(self) -> None:
        sizes: list[int] = []
        born: list[int] = []
        last: list[int] = []
        reads_at: list[tuple[str, tuple[int, ...], int]] = []
        self.views: set[str] = set()
        for name in (s.node for s in self.program.signature.by_role("tangent")):
            refs: list[tuple[bool, int] | None] = []
            for leaf in self.table[name]:
                refs.append((False, len(sizes)))
                sizes.append(self.round(leaf.bytes))
                born.append(-1)
                last.append(-1)
            self.buffers[name] = refs
        position = 0
        for name in self.baseline.backward:
            node = self.nodes[name]
            refs = []
            fresh = 0
            reads = self._reads(node)
            for leaf in self.table[name]:
                if leaf.alias is not None:
                    refs.append(
                        (refs if leaf.alias[0] == name else self.buffers[leaf.alias[0]])[leaf.alias[1]]
                    )
                elif node.op == "get_attr":
                    refs.append(None)
                else:
                    fresh += 1
                    refs.append((False, len(sizes)))
                    sizes.append(self.round(leaf.bytes))
                    born.append(position)
                    last.append(position)
            self.buffers[name] = refs
            if refs and not fresh and not node.is_impure(impure_random=False):
                self.views.add(name)
                continue
            for forward, b in reads:
                if not forward:
                    last[b] = position
            workspace = self.cost.node(node).workspace_bytes if node.op == "call_function" else 0
            reads_at.append((name, tuple(sorted(b for forward, b in reads if forward)), workspace))
            position += 1
        for spec in self.program.signature.by_role("tangent"):
            if not self.nodes[spec.node].meta["val"].dim():
                # Whoever calls backward() on a loss holds what it starts from until it returns.
                for buffer in self._storages(spec.node):
                    assert buffer is not None
                    last[buffer[1]] = position
        gradients = {
            b for s in self.program.signature.outputs if s.role == "gradient" for b in self._storages(s.node)
        }
        for buffer in gradients:
            if buffer is not None and not buffer[0]:
                last[buffer[1]] = position
        self.gradient_bytes = sum(sizes[b[1]] for b in gradients if b is not None and not b[0])
        self.kept_by_gradients = {b[1] for b in gradients if b is not None and b[0]}
        self._slots(sizes, born, last, reads_at, position)

    def _slots(
        self,
        sizes: list[int],
        born: list[int],
        last: list[int],
        reads_at: list[tuple[str, tuple[int, ...], int]],
        count: int,
    ) -> None:
        alloc, release = [0] * (count + 2), [0] * (count + 2)
        held = 0
        for b, size in enumerate(sizes):
            if born[b] < 0:
                held += size
            else:
                alloc[born[b]] += size
            if 0 <= last[b] <= count:
                release[last[b]] += size
        self.opening = held
        held -= sum(size for b, size in enumerate(sizes) if last[b] < 0)
        before, during = [], []
        for position in range(count):
            before.append(held)
            held += alloc[position]
            during.append(held + reads_at[position][2])
            held -= release[position]
        active = [p for p in range(count) if reads_at[p][1]]
        self.slots = []
        self.opening = (
            max([self.opening, *during[: active[0]]]) if active else max([self.opening, *during], default=0)
        )
        for index, position in enumerate(active):
            until = active[index + 1] if index + 1 < len(active) else count
            gap = max(during[position + 1 : until], default=0)
            self.slots.append(
                Slot(reads_at[position][0], reads_at[position][1], before[position], during[position], gap)
            )

    def _scratch(self) -> list[int]:
        if self.emit == "eager":
            return list(self.size)
        return [
            0
            if _fusible(self.nodes[self.operators[self.maker[b]]]) and self._read_by_fusible(b)
            else self.size[b]
            for b in range(len(self.size))
        ]

    def _read_by_fusible(self, storage: int) -> bool:
        return all(
            _fusible(self.nodes[self.operators[reader]])
            for reader, inputs in enumerate(self.op_inputs)
            if storage in inputs
        )


def _fusible(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return (
        torch.Tag.pointwise in tags or torch.Tag.reduction in tags
        if hasattr(torch.Tag, "reduction")
        else (torch.Tag.pointwise in tags)
    )


def pinned(node: fx.Node) -> str:
    """Why an operator never runs again whatever it costs to keep its results, ``""`` where it may."""
    if is_collective(node.target):
        return "a collective never runs again: other ranks would not take part"
    if is_random_state(node):
        return "the state of a random generator is read once"
    if is_random(node):
        return "it draws random numbers, which would be others if it ran again"
    if _writes_statistics(node):
        return "it writes running statistics, once for each step"
    if _torch.gives_other_bits(node.target):
        return "it is not deterministic: run again, it would not give the same bits"
    return ""


def _writes_statistics(node: fx.Node) -> bool:
    """Some operators that normalise a batch write running statistics without saying so."""
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    if "running_mean" not in names or "training" not in names or statistics_of(node):
        return False
    given = [
        node.args[names.index(n)] if names.index(n) < len(node.args) else None
        for n in ("running_mean", "training")
    ]
    return given[0] is not None and bool(given[1]) and "functional" not in str(node.target)


def _policy(node: fx.Node) -> str:
    return getattr(node.meta.get("recompute"), "name", "")


def _must_recompute(node: fx.Node) -> bool:
    """Inside ``torch.utils.checkpoint`` the user has decided."""
    return _policy(node) in ("MUST_RECOMPUTE", "PREFER_RECOMPUTE")
