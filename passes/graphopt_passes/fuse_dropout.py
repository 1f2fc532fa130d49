"""fuse-dropout: dropout draws a seed, from which forward and backward compute the same mask, and holds none.

Before::

    %8 = aten.dropout(%7, 0.1, True) : bf16[8,512,1024]
    %9 = aten.add.Tensor(%x, %8)

After::

    %8 = aten.randint.low(0, 9223372036854775807, [1], dtype=int64, device=cuda) : i64[1]
    %9 = graphopt.dropout_add(%7, %x, 0.1, %8) : bf16[8,512,1024]

Dropout keeps a byte an element for its backward, or has to restore the state of a generator to run again. A
seed is eight bytes whatever the size, and what reads it may run again at will: recomputed, in pieces, or
replayed. The sum with a residual is part of the kernel.

The numbers are others than those that eager mode draws from the same generator, as those of compiled code
are; their distribution is the same. So the pass runs where ``allow`` names it, and then the passes that fuse
attention take its dropout too.
"""

from __future__ import annotations

import operator as python_operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.candidate import Candidate, CostDelta, NearMiss, Reason
from graphopt.capture.aliasing import written_inputs
from graphopt.capture.structure import Line, line_of
from graphopt.edit import Edit
from graphopt.passes import Pass, PassContext, Proposal
from graphopt.plugins import default_host
from graphopt.program import Level, Program
from graphopt.rules import argument
from graphopt_passes.drawn_seed import METRIC, no_known_rate, seed_before
from graphopt_passes.neighbours import is_generated, readers

__all__ = ["FuseDropout"]

_aten = torch.ops.aten
_NATIVE = _aten.native_dropout.default
_DROPOUTS = (_aten.dropout.default, _NATIVE)
_CASTS = (_aten.to.dtype, _aten._to_copy.default)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class _Place:
    """A dropout, the ``value`` that it gives, what converts that, and the ``sum`` with a ``residual``."""

    dropout: fx.Node
    value: fx.Node
    cast: fx.Node | None = None
    sum: fx.Node | None = None
    residual: fx.Node | None = None

    @property
    def root(self) -> fx.Node:
        return self.value if self.sum is None else self.sum

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """In the order of the program, each once."""
        found = (self.dropout, self.value, self.cast, self.sum)
        return tuple(dict.fromkeys(node for node in found if node is not None))

    @property
    def alone(self) -> _Place:
        """Without the sum."""
        return _Place(self.dropout, self.value)


@dataclass(frozen=True)
class FuseDropout(Pass):
    """Lets dropout in training keep a seed for a mask, and takes in the sum with a residual. ``everywhere``:
    also on devices that the operator has no kernel for, where it keeps less but is slower. Not exact: it
    draws other random numbers than eager mode, of the same distribution."""

    name: ClassVar[str] = "fuse-dropout"
    level: ClassVar[Level] = Level.SEMANTIC
    exact: ClassVar[bool] = False
    inexact: ClassVar[str] = "draws other random numbers than eager mode; same distribution"
    summary: ClassVar[str] = "keep a seed for each dropout, not a mask, and sum its residual with it"
    after: ClassVar[dict[str, str]] = {
        "normalize": "dropout that is off is no dropout",
        "functionalize": "sums that are written in place hide who reads them",
        "fuse-attention": "attention takes its dropout with it",
        "chunk": "it knows the operators that models write",
    }
    before: ClassVar[dict[str, str]] = {"fuse-norm": "it sums what is left for it"}

    everywhere: bool = False

    def propose(self, program: Program, ctx: PassContext) -> Iterable[Proposal]:
        found = [node for node in program.nodes() if node.target in _DROPOUTS]
        if not found:
            return
        line = line_of(program.graph)
        sums: set[fx.Node] = set()
        for node in found:
            place = _place_of(node)
            if isinstance(place, Reason):
                yield NearMiss(self.name, node.name, 1, 1, place)
                continue
            if place.value not in line.position:
                continue  # nobody reads it
            reason = self._refusal(place, ctx) or _reason_of_place(place.alone, line)
            if reason is not None:
                yield NearMiss(self.name, node.name, 1, 1, reason)
                continue
            if place.sum in sums:
                place = place.alone  # the other term took it
            if place.sum is not None:
                reason = _reason_of_sum(place) or _reason_of_place(place, line)
                if reason is not None:
                    yield NearMiss(self.name, place.sum.name, 1, len(place.nodes), reason)
                    place = place.alone
            if place.sum is not None:
                sums.add(place.sum)
            names = tuple(each.name for each in place.nodes)
            yield Candidate(
                f"{self.name}@{place.root.name}", self.name, names, _change(place, ctx), _dropping(place),
                exactness="lossy", metric=METRIC,
            )  # fmt: skip

    def _refusal(self, place: _Place, ctx: PassContext) -> Reason | None:
        node = place.dropout
        if argument(node, "train") is not True:
            return Reason("dropout is off", (node.name,))
        wrong = no_known_rate(argument(node, "p"), node.name)
        if wrong is not None:
            return wrong
        if ctx.mode != "train":
            return Reason("in inference no gradient needs the mask", (node.name,))
        if "dropout-add" not in default_host().kernels():
            return Reason("the kernel dropout-add is not installed", (node.name,))
        value = place.value.meta["val"]
        if value.dtype not in _DTYPES:
            return Reason(f"no kernel takes {_short(value.dtype)}", (node.name,))
        if not _together(node.args[0]):
            return Reason("its elements do not lie one after the other", (node.name,))
        if not value.is_cuda and not self.everywhere:
            kind = value.device.type
            return Reason(f"no kernel runs on {kind}, where the operator gains nothing", (node.name,))
        return None


def _place_of(node: fx.Node) -> _Place | Reason:
    value = node
    if node.target is _NATIVE:
        parts = {user.args[1]: user for user in node.users if user.target is python_operator.getitem}
        if len(parts) < len(node.users) or any(parts[n].users for n in parts if n != 0):
            return Reason("its mask is read as well", (node.name,))
        if 0 not in parts:
            return Reason("nobody reads what it gives", (node.name,))
        value = parts[0]
    place = _Place(node, value)
    cast = next((user for user in value.users if user.target in _CASTS), None)
    last = value if cast is None else cast
    total = next((user for user in last.users if user.target is _aten.add.Tensor), None)
    if total is None or last not in total.args:
        return place
    others = [operand for operand in total.args if operand is not last]
    residual = others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None
    return _Place(node, value, cast, total, residual)


def _reason_of_sum(place: _Place) -> Reason | None:
    """Why the sum does not go with the dropout."""
    total, residual = place.sum, place.residual
    assert total is not None
    here = (place.dropout.name, total.name)
    for node in (place.value, place.cast):
        for user in () if node is None else node.users:
            if user not in place.nodes:
                what = "an output of the program" if user.op == "output" else "read by another call as well"
                return Reason(f"what is left is {what}", (place.dropout.name, user.name))
    if residual is None:
        return Reason("what is added to it is a number, or itself", here)
    if total.kwargs:
        return Reason("what is added is scaled", here)
    value, added, result = (node.meta["val"] for node in (place.value, residual, total))
    if not isinstance(added, torch.Tensor) or added.shape != value.shape:
        return Reason("the residual is broadcast", here)
    if any(node.meta["val"].dtype not in _DTYPES for node in (residual, total, place.cast or total)):
        return Reason(f"no kernel adds {_short(added.dtype)} for {_short(result.dtype)}", here)
    if added.device != value.device:
        return Reason("the residual is on another device", here)
    if not _together(residual) or not _together(total):
        return Reason("the elements of the residual do not lie one after the other", here)
    return None


def _reason_of_place(place: _Place, line: Line) -> Reason | None:
    """What stands in the way of computing it all where the last of it stands."""
    root = place.root
    positions = [line.position[node] for node in place.nodes if node in line.position]
    if len(positions) < len(place.nodes):
        return Reason("part of it is never run", (root.name,))
    first, last = min(positions), max(positions)
    ambient = line.ambient
    unknown = ambient.unknown is not None and ambient.unknown[0] <= last
    if unknown or len({ambient.states[k].key for k in positions}) > 1:
        return Reason("autocast or the gradient mode changes within it", (root.name,))
    reads = {ref for node in place.nodes for ref in node.all_input_nodes}
    memory = {part for ref in reads for part in line.aliases.roots.get(ref, ())}
    for node in line.nodes[first : last + 1]:
        if memory & {part for ref in written_inputs(node) for part in line.aliases.roots[ref]}:
            return Reason("what it reads is written within it", (root.name, node.name))
    return None


def _change(place: _Place, ctx: PassContext) -> CostDelta:
    """Predicted: the mask is neither written nor read, nor is what is left before the sum; but where a code
    generator would have made one kernel of it and what is around, that is read again."""
    device = ctx.cost.device
    count = _torch.hint(place.value.meta["val"].numel())
    source = place.dropout.args[0]
    assert isinstance(source, fx.Node)
    moved, launches = -2 * count, 0
    if ctx.emit == "eager":
        if place.sum is not None:
            moved -= 2 * count * place.value.meta["val"].element_size()
            launches -= 1
    else:
        if is_generated(source):
            moved += 2 * count * source.meta["val"].element_size()
            launches += 1
        if any(is_generated(reader) for reader in readers(place.root)):
            moved += count * place.root.meta["val"].element_size()
            launches += 1
    seconds = moved / device.copy_bytes_per_second + launches * device.launch_seconds
    return CostDelta(peak_bytes=-count, seconds=seconds)


def _dropping(place: _Place) -> Callable[[Edit], None]:
    names = [node.name for node in place.nodes]
    dropped = (place.value if place.cast is None else place.cast).name
    root = place.root.name
    adds = place.sum is not None
    result = place.root.meta["val"].dtype
    told = [] if result is _own_dtype(place) else [result]

    def apply(edit: Edit) -> None:
        old = tuple(edit.node(name) for name in names)
        dropout, last = old[0], edit.node(root)
        seed = seed_before(edit, last, (dropout,))
        residual = next(n for n in last.args if n is not edit.node(dropped)) if adds else None
        args = [dropout.args[0], residual, argument(dropout, "p"), seed, *told]
        new = edit.call_before(last, torch.ops.graphopt.dropout_add.default, args, replaces=old)
        edit.replace(last, new)
        # Calls that draw random numbers do not go by themselves.
        for node in reversed(old):
            for user in list(node.users):
                edit.erase(user)
            edit.erase(node)

    return apply


def _own_dtype(place: _Place) -> torch.dtype:
    """That of the operator's result where it is not told another."""
    known: torch.dtype = place.value.meta["val"].dtype
    residual = place.residual if place.sum is not None else None
    return known if residual is None else torch.promote_types(known, residual.meta["val"].dtype)


def _together(node: Any) -> bool:
    return isinstance(node, fx.Node) and bool(node.meta["val"].is_contiguous())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
