"""Which values Inductor will put in memory, guessed from the graph before anything is compiled.

A planner tries thousands of schedules and can compile none of them. This follows the rules by
which Inductor's lowering decides between storing a value and computing it again in each
reader, and then groups what is stored into kernels, so that a value all of whose readers are in
its own kernel needs no memory. Rules and thresholds: ``torch/_inductor/graph.py`` (``run_node``),
``ir.py`` (``StorageBox``) and ``scheduler.py`` of torch 2.11 to 2.13. An approximation: layouts,
tilings, split reductions and Inductor's own reordering are left out.
``graphopt.emit.lowered`` gives the exact answer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from operator import is_

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.program import tensor_leaves

__all__ = ["OPERATIONS_LIMIT", "Fused", "Kernel", "Kind", "fuse", "kind_of"]

_KNOWN = "_graphopt_kinds"


class Kind(StrEnum):
    """How Inductor treats a call: free, written into an input, inlined into its readers, reduced in
    a loop, written piece by piece into a buffer of its own, or opaque."""

    VIEW = "view"
    WRITE = "write"
    POINTWISE = "pointwise"
    REDUCTION = "reduction"
    PIECEWISE = "piecewise"
    LIBRARY = "library"


_REDUCTIONS = frozenset({
    "sum", "mean", "amax", "amin", "max", "min", "var", "var_mean", "std", "prod", "any", "all",
    "argmax", "argmin", "logsumexp",
})  # fmt: skip
# Loops over the output that read inputs at computed places: lowered like elementwise operators.
_GATHERS = frozenset({
    "_low_memory_max_pool_offsets_to_indices", "_to_copy", "_unsafe_index", "_unsafe_view",
    "arange", "cat", "clone", "constant_pad_nd", "copy",
    "convert_element_type", "embedding", "empty", "expand", "flip", "fma", "full", "full_like", "gather",
    "index", "inductor_lookup_seed", "inductor_random", "iota", "new_full", "new_zeros", "ones",
    "permute", "repeat", "reshape", "scalar_tensor", "select_scatter", "slice_scatter", "where",
    "zeros", "zeros_like",
})  # fmt: skip
# Loops over the source that write at computed places of a new buffer.
_SCATTERS = frozenset({
    "_unsafe_index_put", "_unsafe_masked_index_put_accumulate", "index_put", "scatter", "scatter_add",
    "scatter_reduce",
})  # fmt: skip
# Costly enough on a CPU that Inductor stores the result when it is read more than once.
_HEAVY_ON_CPU = frozenset({"exp", "log", "log10", "log1p", "log2", "sigmoid", "tanh"})


# Library calls that Inductor gives a buffer to write into.
_GIVEN_OUTPUTS = frozenset({"_int_mm", "_scaled_mm", "addmm", "baddbmm", "bmm", "mm"})
_ALONE = frozenset({Kind.LIBRARY, Kind.PIECEWISE})


@dataclass(frozen=True)
class _Limits:
    """Beyond these an expression is stored: reads when reused, reads in all, operations in all."""

    reused_reads: int
    reads: int
    operations: int
    heavy: frozenset[str] = frozenset()


OPERATIONS_LIMIT = 64
"""Operations of an expression beyond which Inductor, as graphopt calls it, stores the value.

Its own 30 on GPUs cuts the backward of a cross entropy in two inside one kernel, and what is cut
cannot be written over the logits: twice their bytes. A longer expression costs arithmetic, which
such kernels have to spare.
"""

_CPU_LIMITS = _Limits(4, 12, OPERATIONS_LIMIT, _HEAVY_ON_CPU)
_GPU_LIMITS = _Limits(4, 8, OPERATIONS_LIMIT)


@dataclass(frozen=True)
class _Expression:
    """What a value is computed from: reads from memory, operations, and whether any is costly."""

    reads: frozenset[str]
    operations: int
    heavy: bool


def kind_of(node: fx.Node, device_type: str = "cpu") -> Kind:
    """How Inductor treats the call ``node``, which must carry ``meta["val"]``."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return Kind.VIEW
    # A planner asks hundreds of times about the same calls.
    known: dict[tuple[fx.Node, str], tuple[list[object], Kind]] | None = getattr(node.graph, _KNOWN, None)
    if known is None:
        known = {}
        setattr(node.graph, _KNOWN, known)
    if _operator(node) == "cat":
        return _kind_of(node, node.target, device_type)  # it depends on who reads it
    key = node, device_type
    made_from = [node.target, node.args, node.kwargs, node.meta.get("val")]
    made_from += [source.meta.get("val") for source in node.all_input_nodes]
    found = known.get(key)
    if found is None or len(found[0]) != len(made_from) or not all(map(is_, found[0], made_from)):
        found = known[key] = made_from, _kind_of(node, node.target, device_type)
    return found[1]


def _kind_of(node: fx.Node, target: torch._ops.OpOverload, device_type: str) -> Kind:
    results = {_torch.storage_key(t) for t in tensor_leaves(node.meta.get("val"))}
    sources = {_torch.storage_key(t) for n in node.all_input_nodes for t in tensor_leaves(n.meta.get("val"))}
    if results and results <= sources:
        return Kind.WRITE if target._schema.is_mutable else Kind.VIEW
    name = _operator(node)
    if name in _REDUCTIONS:
        return Kind.REDUCTION
    if name in _SCATTERS or (
        name == "cat" and (device_type == "cpu" or not all(map(_is_elementwise, node.users)))
    ):
        return Kind.PIECEWISE
    single = isinstance(node.meta.get("val"), torch.Tensor) and not target._schema.is_mutable
    return Kind.POINTWISE if single and _is_elementwise(node) else Kind.LIBRARY


def _is_elementwise(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or _operator(node) in _GATHERS


@dataclass
class Kernel:
    """Stored values computed by one launch, and what it reads from memory.

    ``level`` orders it after the kernels that it reads from; ``elements`` and ``reduced`` are the
    size of its loops, and how much of that is reduced to one result (``inner``: from neighbouring
    elements); ``library`` kernels take nothing else in, and those with ``returns`` allocate their
    own results. ``sources`` has what each member is computed from, ``reductions`` the operators of those that
    reduce; ``readers`` are the ids of those that read it.
    """

    level: int
    elements: int
    reduced: int
    inner: bool
    library: bool
    returns: bool = False
    members: list[str] = field(default_factory=list)
    reads: set[str] = field(default_factory=set)
    sources: dict[str, frozenset[str]] = field(default_factory=dict)
    reductions: dict[str, str] = field(default_factory=dict)
    readers: set[int] = field(default_factory=set)

    def overwriters(self, name: str, *, on_cpu: bool) -> list[str]:
        """The members that may be written over the input ``name``: one that all others reading the input
        come before; on GPUs, in kernels that reduce nothing, any that reads it
        (``graphopt._torch.share_inputs``)."""
        if self.library or name in self.members:
            return []
        reading = [member for member in self.members if name in self.sources[member]]
        if not reading or (not on_cpu and self.reduced == 1):
            return reading
        before, waiting = set[str](), [reading[-1]]
        while waiting:
            found = self.sources.get(waiting.pop(), frozenset()) - before
            before |= found
            waiting += found
        return reading[-1:] if before.issuperset(reading[:-1]) else []


@dataclass(frozen=True)
class Fused:
    """A graph as Inductor is expected to run it.

    ``nodes`` are call nodes in execution order; all else that they read counts as graph input. ``outputs``
    names the nodes that are graph outputs. ``kernels`` are ordered by their first members: a node that is in
    none is a view or is computed again by each reader. ``alive`` names what outlives its kernel: views are
    never in it, operators of libraries always. ``bases``: for each view (and item of a tuple), the node
    whose memory it shows.
    """

    nodes: Sequence[fx.Node]
    outputs: Collection[str]
    device_type: str
    kernels: list[Kernel]
    alive: frozenset[str]
    bases: Mapping[str, str]


def fuse(nodes: Sequence[fx.Node], outputs: Collection[str], *, device_type: str = "cpu") -> Fused:
    """What Inductor is expected to make of ``nodes``; see ``Fused``."""
    kinds = {node.name: kind_of(node, device_type) for node in nodes}
    base = _bases(nodes, kinds)
    kernels = _kernels(nodes, kinds, _needed(nodes, kinds, base, outputs, device_type), device_type)
    alive = _in_memory(kinds, base, outputs, kernels)
    return Fused(nodes, outputs, device_type, kernels, alive, base)


def _kernels(
    nodes: Sequence[fx.Node], kinds: Mapping[str, Kind], needed: Collection[str], device_type: str
) -> list[Kernel]:
    limits = _CPU_LIMITS if device_type == "cpu" else _GPU_LIMITS
    expressions: dict[str, _Expression] = {}
    kernels: dict[str, Kernel] = {}
    for node in nodes:
        kind = kinds[node.name]
        expression = _expression(node, kind, expressions, limits)
        users = sum(user.name in kinds for user in node.users)
        inlined = (
            kind is Kind.POINTWISE and node.name not in needed and not _too_much(expression, users, limits)
        )
        if kind is Kind.VIEW or inlined:
            expressions[node.name] = expression
            continue
        expressions[node.name] = _Expression(frozenset((node.name,)), 1, False)
        _place(node, kind, expression.reads, kernels)
    return list({id(kernel): kernel for kernel in kernels.values()}.values())


def _operator(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else str(schema.name).split("::")[-1]


def _bases(nodes: Sequence[fx.Node], kinds: Mapping[str, Kind]) -> dict[str, str]:
    base: dict[str, str] = {}
    for node in nodes:
        if kinds[node.name] is Kind.VIEW and node.all_input_nodes:
            source = node.all_input_nodes[0].name
            base[node.name] = base.get(source, source)
    return base


def _needed(
    nodes: Sequence[fx.Node],
    kinds: Mapping[str, Kind],
    base: Mapping[str, str],
    outputs: Collection[str],
    device_type: str,
) -> set[str]:
    """Values that must be in memory: what libraries read, and what is returned."""
    names = set(outputs)
    for node in nodes:
        sources = [source.name for source in node.all_input_nodes]
        if kinds[node.name] is Kind.LIBRARY:
            names.update(sources)
        elif device_type == "cpu" and _operator(node).startswith("scatter"):
            # Left to ATen on a CPU, into a buffer that starts out as the first argument.
            names.update(sources[1:])
    return {base.get(name, name) for name in names}


def _expression(
    node: fx.Node, kind: Kind, expressions: Mapping[str, _Expression], limits: _Limits
) -> _Expression:
    parts = [
        expressions.get(source.name) or _Expression(frozenset((source.name,)), 1, False)
        for source in node.all_input_nodes
        if tensor_leaves(source.meta.get("val"))
    ]
    constants = sum(isinstance(argument, int | float) for argument in node.args)
    own = 0 if kind is Kind.VIEW else 1 + constants
    return _Expression(
        reads=frozenset[str]().union(*(part.reads for part in parts)),
        operations=own + sum(part.operations for part in parts),
        heavy=_operator(node) in limits.heavy or any(part.heavy for part in parts),
    )


def _too_much(expression: _Expression, users: int, limits: _Limits) -> bool:
    """Whether Inductor stores an expression although nothing demands it."""
    reads, operations = len(expression.reads), expression.operations
    if reads > limits.reads or operations > limits.operations:
        return True
    return users > 1 and (expression.heavy or reads > limits.reused_reads)


def _place(node: fx.Node, kind: Kind, reads: Collection[str], kernels: dict[str, Kernel]) -> None:
    """Put ``node`` into the latest kernel that it reads from, if the loops fit, else into a new one.

    Kernels that only this one reads then move into it: their values need no memory any more.
    """
    sources = list({id(kernels[name]): kernels[name] for name in reads if name in kernels}.values())
    latest = max(sources, key=lambda kernel: kernel.level, default=None)
    own = Kernel(0 if latest is None else latest.level + 1, *_loops(node, kind), kind in _ALONE)
    own.returns = kind is Kind.LIBRARY and _operator(node) not in _GIVEN_OUTPUTS
    home = own
    if latest is not None and latest.level > max((k.level for k in sources if k is not latest), default=-1):
        home = latest if _join(latest, own) else own
    for kernel in sources:
        if kernel is not home and kernel.readers <= {id(home)} and _join(home, kernel):
            home.members[:0] = kernel.members
            home.reads |= kernel.reads
            home.sources |= kernel.sources
            home.reductions |= kernel.reductions
            for name in kernel.reads & kernels.keys():
                kernels[name].readers.discard(id(kernel))
                kernels[name].readers.add(id(home))
            for name in kernel.members:
                kernels[name] = home
    home.members.append(node.name)
    home.reads.update(reads)
    home.sources[node.name] = frozenset(reads)
    if kind is Kind.REDUCTION:
        home.reductions[node.name] = _operator(node)
    kernels[node.name] = home
    for name in home.reads & kernels.keys():
        if kernels[name] is not home:
            kernels[name].readers.add(id(home))


def _join(into: Kernel, other: Kernel) -> bool:
    """Whether the loops of two kernels can be one; if so, ``into`` takes on the larger loops.

    They can where both run over the same elements and reduce, if at all, the same innermost
    part of them; or where one runs over what the other's reduction yields.
    """
    if into.library or other.library or not (into.inner and other.inner):
        return False
    small, large = sorted((into, other), key=lambda kernel: kernel.elements)
    same = small.elements == large.elements and (
        1 in (small.reduced, large.reduced) or small.reduced == large.reduced
    )
    yielded = small.reduced == 1 and small.elements == large.elements // large.reduced
    if same or yielded:
        into.elements, into.reduced = large.elements, max(small.reduced, large.reduced)
        return True
    return False


def _loops(node: fx.Node, kind: Kind) -> tuple[int, int, bool]:
    """Elements looped over, how many of them go into one result, whether those lie side by side."""
    out = sum(_elements(t) for t in tensor_leaves(node.meta.get("val"))[:1])
    if kind is not Kind.REDUCTION:
        return out, 1, True
    value = node.all_input_nodes[0].meta["val"]
    total, rank = _elements(value), value.dim()
    dims = node.args[1] if len(node.args) > 1 and node.args[1] is not None else list(range(rank))
    reduced = sorted(d % max(rank, 1) for d in (dims if isinstance(dims, list | tuple) else [dims]))
    return total, max(total // max(out, 1), 1), reduced == list(range(rank - len(reduced), rank))


def _elements(tensor: torch.Tensor) -> int:
    return _torch.hint(tensor.numel())


def _in_memory(
    kinds: Mapping[str, Kind], base: Mapping[str, str], outputs: Collection[str], kernels: Sequence[Kernel]
) -> frozenset[str]:
    """Of what ``kernels`` compute, that which outlives its kernel."""
    result = {base.get(name, name) for name in outputs}
    for kernel in kernels:
        result.update(kernel.reads.difference(kernel.members))
        if kernel.library:
            result.update(kernel.members)
    return frozenset(
        name
        for kernel in kernels
        for name in kernel.members
        if name in result and kinds[name] is not Kind.WRITE
    )
