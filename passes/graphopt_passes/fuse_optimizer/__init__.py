"""fuse-optimizer: parameters that a program updates itself are updated in one launch.

Before, for each parameter::

    %20 = aten.mul.Tensor(w.0, 0.999)              %21 = aten.lerp.Scalar(m.0, %g0, 0.1)
    %22 = aten.mul.Tensor(v.0, 0.999)              %23 = aten.addcmul(%22, %g0, %g0, value=0.001)
    %24 = aten.sqrt(%23)                           %25 = aten.div.Tensor(%24, %root)
    %26 = aten.add.Tensor(%25, 1e-08)              %27 = aten.addcdiv(%20, %21, %26, value=-0.01)
    %28 = aten.copy_(w.0, %27)                     %29 = aten.copy_(m.0, %21), aten.copy_(v.0, %23)

After, for all of them::

    %20 = graphopt.adam_update([w.0, w.1, ...], [%g0, %g1, ...], [m.0, ...], [v.0, ...],
                               [1.0, 0.999, 0.0, 0.1, 0.999, 0.001, 0.01, 1.0, 1e-08], [%root], [7])

What an update is, it finds by arithmetic (``forms``): how it is written, in place or not, tensor by tensor
or on lists, does not matter. Numbers that a count of steps on the device gives stay there. Each parameter and
state is read and written once; op by op an update of Adam reads and writes some ten times as often.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.fx as fx

from graphopt.candidate import Candidate, CostDelta, NearMiss, Reason
from graphopt.capture.aliasing import Aliases, alias_map, written_inputs
from graphopt.edit import Edit
from graphopt.order import has_effect
from graphopt.passes import Pass, PassContext, Proposal
from graphopt.plugins import default_host
from graphopt.program import Level, Program, tensor_leaves
from graphopt_passes.fuse_optimizer.scalars import Scalar, built, leaves_of
from graphopt_passes.fuse_optimizer.updates import Update, updates_in, writes_in
from graphopt_passes.neighbours import is_generated

__all__ = ["FuseOptimizer"]

_KERNELS = {"adam": "adam-update", "sgd": "sgd-update"}


@dataclass(frozen=True)
class FuseOptimizer(Pass):
    """Updates parameters in one launch. ``everywhere``: also on devices that the operators have no kernel
    for, and where a code generator makes as few kernels, which gains nothing."""

    name: ClassVar[str] = "fuse-optimizer"
    level: ClassVar[Level] = Level.JOINT
    summary: ClassVar[str] = "update the parameters that a program writes in one launch"
    before: ClassVar[dict[str, str]] = {
        "insert-checkpoints": "schedules are of the operators that are there in the end"
    }

    everywhere: bool = False

    def propose(self, program: Program, ctx: PassContext) -> Iterable[Proposal]:
        found, missed = updates_in(writes_in(program))
        if any(spec.role == "gradient" for spec in program.signature.outputs):
            # Statistics of norms are written as well: of many a trained program that is all.
            weights = {spec.node for spec in program.signature.by_role("parameter")}
            update = next((u for u in found if u.places[0].name in weights), None)
            if update is not None:
                reason = Reason("the program has a backward", (update.places[0].name,))
                yield NearMiss(self.name, update.writes[0].value.name, 5, 5, reason)
            return
        for write, matched, why in missed:
            yield NearMiss(self.name, write.value.name, matched, 5, why)
        surroundings = _Surroundings(program, found)
        groups: dict[Any, list[Update]] = {}
        for update in found:
            stays = self._declines(update, surroundings)
            if stays is not None:
                yield NearMiss(self.name, update.writes[0].value.name, 5, 5, stays)
                continue
            groups.setdefault(_group_of(update), []).append(update)
        for updates in groups.values():
            group = surroundings.independent(updates)
            for update, reason in group.declined:
                yield NearMiss(self.name, update.writes[0].value.name, 5, 5, reason)
            if not group.updates:
                continue
            idle = self._gains_nothing(group, ctx)
            if idle is not None:
                yield NearMiss(self.name, group.updates[0].writes[0].value.name, 5, 5, idle)
                continue
            yield _candidate(self.name, group, surroundings, ctx)

    def _declines(self, update: Update, surroundings: _Surroundings) -> Reason | None:
        """Why an update stays as it is, whatever is around it."""
        place, value = update.writes[0].place, update.writes[0].place.meta["val"]
        name = _KERNELS[update.kind]
        kernel = default_host().kernels().get(name)
        if kernel is None:
            return Reason(f"the kernel {name} is not installed", (place.name,))
        if not value.is_cuda and not self.everywhere:
            kind = value.device.type
            return Reason(f"no kernel runs on {kind}, where the operator gains nothing", (place.name,))
        lists = [[node.meta["val"]] for node in (place, update.gradient, *update.places[1:])]
        if any(isinstance(n, torch.SymInt) for (tensor,) in lists for n in (*tensor.shape, *tensor.stride())):
            return Reason("sizes are known at run time alone", (place.name,))
        if (reason := kernel.supports(*lists)) is not None:
            return Reason(reason.text, (place.name, update.gradient.name))
        for leaf in leaves_of(update.numbers):
            if leaf.meta["val"].device != value.device:
                where = leaf.meta["val"].device
                return Reason(f"a number is on {where}, the parameter on {value.device}", (leaf.name,))
        return surroundings.shared(update)

    def _gains_nothing(self, group: _Group, ctx: PassContext) -> Reason | None:
        """Why a code generator's kernels are as good."""
        if ctx.emit == "eager" or self.everywhere:
            return None
        first = group.updates[0].writes[0]
        if len(group.updates) == 1:
            return Reason("code generators make one kernel of one parameter's update", (first.value.name,))
        if group.on_lists:
            return Reason("code generators make one kernel of calls on lists", (first.value.name,))
        return None


def _group_of(update: Update) -> Any:
    dtypes = tuple(node.meta["val"].dtype for node in (update.gradient, *update.places))
    return update.kind, update.nesterov, update.numbers, dtypes, update.places[0].meta["val"].device


# --- what is around updates -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Updates that one call makes, right before ``anchor``. ``gone``: calls that nobody needs then."""

    updates: tuple[Update, ...]
    anchor: fx.Node
    gone: tuple[fx.Node, ...]
    declined: tuple[tuple[Update, Reason], ...]

    @property
    def on_lists(self) -> bool:
        return any("_foreach_" in str(node.target) for node in self.gone)


class _Surroundings:
    """The graph that updates are in."""

    def __init__(self, program: Program, updates: Sequence[Update]) -> None:
        self.nodes: list[fx.Node] = list(program.graph.nodes)
        self.order = {node: k for k, node in enumerate(self.nodes)}
        self.output: fx.Node = next(node for node in reversed(self.nodes) if node.op == "output")
        self.results = torch.utils._pytree.tree_leaves(self.output.args[0])
        self.aliases: Aliases = alias_map(program.graph)
        places = [node for node in self.nodes if node.op == "placeholder"]
        owners: dict[int, list[fx.Node]] = {}
        for node in places:
            for tensor in tensor_leaves(node.meta.get("val")):
                owners.setdefault(_storage(tensor), []).append(node)
        self.owners = owners
        self.updated = {place for update in updates for place in update.places}

    def shared(self, update: Update) -> Reason | None:
        """Why memory that an update writes is not its own."""
        for place in update.places:
            holders = self.owners.get(_storage(place.meta["val"]), [])
            if len(holders) > 1:
                names = tuple(holder.name for holder in holders)
                return Reason("another input shares its memory", names)
        if self.updated & self.aliases.roots[update.gradient]:
            # Which of two updates comes first would decide what is read.
            return Reason("its gradient is memory that an update writes", (update.gradient.name,))
        return None

    def independent(self, updates: Sequence[Update]) -> _Group:
        """Those of ``updates`` that one call can make, nobody reading what they wrote or read."""
        kept = list(updates)
        declined: list[tuple[Update, Reason]] = []
        while True:
            anchor = self._anchor(kept)
            copies = {write.copy for update in kept for write in update.writes if write.copy is not None}
            outputs = {write.output for update in kept for write in update.writes if write.copy is None}
            given = [node for update in kept for node in (update.gradient, *leaves_of(update.numbers))]
            needed = self._needed(copies, outputs, given)
            reasons = {id(update): self._read(update, needed, copies, outputs, anchor) for update in kept}
            out = [update for update in kept if reasons[id(update)] is not None]
            if not out:
                gone = [n for n in self.nodes if n.op == "call_function" and n not in needed]
                reached = self._sources(kept)
                return _Group(tuple(kept), anchor, tuple(n for n in gone if n in reached), tuple(declined))
            for update in out:
                reason = reasons[id(update)]
                assert reason is not None
                declined.append((update, reason))
            kept = [update for update in kept if reasons[id(update)] is None]

    def _anchor(self, updates: Sequence[Update]) -> fx.Node:
        """The call stands before whatever writes to gradients and numbers, else last."""
        read = [node for u in updates for node in (u.gradient, *leaves_of(u.numbers))]
        roots = {root for node in read for root in self.aliases.roots[node]}
        for node in self.nodes:
            written = {root for ref in written_inputs(node) for root in self.aliases.roots[ref]}
            if written & roots and node.op == "call_function":
                return node
        return self.output

    def _needed(self, copies: set[fx.Node], outputs: set[int], given: Sequence[fx.Node]) -> set[fx.Node]:
        """Calls that are there for something else than what ``copies`` and ``outputs`` write."""
        stack = [node for node in self.nodes if node.op == "call_function" and has_effect(node)]
        stack = [node for node in stack if node not in copies]
        stack += [
            leaf for k, leaf in enumerate(self.results) if isinstance(leaf, fx.Node) and k not in outputs
        ]
        stack += given
        needed: set[fx.Node] = set()
        while stack:
            node = stack.pop()
            if node not in needed:
                needed.add(node)
                stack.extend(node.all_input_nodes)
        return needed

    def _sources(self, updates: Sequence[Update]) -> set[fx.Node]:
        stack = [node for u in updates for w in u.writes for node in (w.copy or w.value, w.value)]
        found: set[fx.Node] = set()
        while stack:
            node = stack.pop()
            if node not in found:
                found.add(node)
                stack.extend(node.all_input_nodes)
        return found

    def _read(
        self, update: Update, needed: set[fx.Node], copies: set[fx.Node], outputs: set[int], anchor: fx.Node
    ) -> Reason | None:
        """Who else reads new values of an update, or old ones when they are gone."""
        for write in update.writes:
            for node in (write.value, write.copy):
                if node is not None and node in needed:
                    reader = next((user for user in node.users if user in needed), self.output)
                    if reader is self.output:
                        return Reason("its new value is returned as well", (node.name,))
                    return Reason("its new value is read by another call", (node.name, reader.name))
        places = set(update.places)
        for k, leaf in enumerate(self.results):
            if k not in outputs and isinstance(leaf, fx.Node) and places & self.aliases.roots[leaf]:
                return Reason("its old value is returned", (leaf.name,))
        limit = self.order[anchor]
        for node in self.nodes[limit:]:
            reads = {root for source in node.all_input_nodes for root in self.aliases.roots[source]}
            if node in needed and node not in copies and node is not self.output and places & reads:
                return Reason("its old value is read after what it reads is overwritten", (node.name,))
        values = [write.value for write in update.writes]
        for node in (update.gradient, *leaves_of(update.numbers), *values):
            if self.order[node] >= limit:
                return Reason("it is made after what it reads is overwritten", (node.name,))
        return None


def _storage(tensor: torch.Tensor) -> int:
    if tensor.layout is not torch.strided:
        return id(tensor)
    return int(tensor.untyped_storage()._cdata)


# --- the rewrite ----------------------------------------------------------------------------------


def _candidate(name: str, group: _Group, surroundings: _Surroundings, ctx: PassContext) -> Candidate:
    updates = group.updates
    touched = sorted({node.name for u in updates for w in u.writes for node in (w.value, w.place)})
    return Candidate(
        f"{name}@{updates[0].places[0].name}", name, tuple(touched), _delta(group, ctx),
        partial(_apply, group=group, order=surroundings.order), exactness="reassociated",
    )  # fmt: skip


def _delta(group: _Group, ctx: PassContext) -> CostDelta:
    """Op by op: what the calls that go take, against one that reads and writes all once. Behind a code
    generator: launches; gradients that it would make on the way are written and read instead."""
    device = ctx.cost.device
    if ctx.emit == "eager":
        moved = sum(2 * sum(map(_bytes, update.places)) + _bytes(update.gradient) for update in group.updates)
        before = sum(ctx.cost.node(node).seconds for node in group.gone)
        copied = [w for update in group.updates for w in update.writes if w.copy is None]
        before += sum(2 * _bytes(w.place) / device.copy_bytes_per_second for w in copied)
        before += len(copied) * device.launch_seconds
        after = moved / device.copy_bytes_per_second + device.launch_seconds
        return CostDelta(seconds=after - before)
    made = sum(2 * _bytes(u.gradient) for u in group.updates if is_generated(u.gradient))
    launches = (len(group.updates) - 1) * device.launch_seconds
    return CostDelta(seconds=made / device.copy_bytes_per_second - launches)


def _bytes(node: fx.Node) -> int:
    value = node.meta["val"]
    return int(value.numel() * value.element_size())


def _apply(edit: Edit, *, group: _Group, order: dict[fx.Node, int]) -> None:
    updates, anchor = group.updates, group.anchor
    writes = [write for update in updates for write in update.writes]
    replaced = [write.value for write in writes]

    def call(target: Any, *args: Any) -> fx.Node:
        return edit.call_before(anchor, target, args, replaces=replaced[:1])

    numbers, scalars, places = [], [], []
    made: dict[Scalar, fx.Node] = {}
    for place, number in enumerate(updates[0].numbers):
        numbers.append(number.coefficient if number.value is None else number.value)
        if number.value is None:
            scalars.append(built(number, call, order, made))
            places.append(place)
    params, grads = [u.places[0] for u in updates], [u.gradient for u in updates]
    states = [[u.places[k] for u in updates] for k in range(1, len(updates[0].places))]
    ops = torch.ops.graphopt
    if updates[0].kind == "adam":
        args: tuple[Any, ...] = (params, grads, *states, numbers, scalars, places)
        edit.call_before(anchor, ops.adam_update.default, args, replaces=replaced)
    else:
        momenta = states[0] if states else []
        args = (params, grads, momenta, numbers, scalars, places, updates[0].nesterov)
        edit.call_before(anchor, ops.sgd_update.default, args, replaces=replaced)
    _unwrite(edit, [write for write in writes if write.copy is None])
    for write in writes:
        if write.copy is not None:
            edit.erase(write.copy)


def _unwrite(edit: Edit, writes: Sequence[Any]) -> None:
    """Let the caller, who copies outputs to the inputs, get the inputs themselves."""
    if not writes:
        return
    output = next(node for node in reversed(edit.graph.nodes) if node.op == "output")
    leaves, structure = torch.utils._pytree.tree_flatten(output.args[0])
    for write in writes:
        leaves[write.output] = write.place
    output.args = (torch.utils._pytree.tree_unflatten(leaves, structure),)
