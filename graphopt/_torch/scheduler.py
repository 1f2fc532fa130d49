"""Inductor's kernels after fusion: what they wait for, what memory is between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

__all__ = [
    "KEPT",
    "MADE",
    "KernelBuffer",
    "KernelLaunch",
    "KernelOrder",
    "in_order",
    "kernel_graph",
    "share_inputs",
]


class KernelLaunch(NamedTuple):
    """A kernel or library call: runs after those at the positions ``waits``. ``place`` is that of its first
    operator in the program."""

    waits: frozenset[int]
    place: int = 0


class KernelBuffer(NamedTuple):
    """``bytes`` of memory that comes with the first of the launches ``makers`` (none: it is there before)
    and goes after the last of its ``readers``, unless it is ``returned``. Those in ``overwriters`` may
    write an output of the same size over it if they are the last to read it."""

    bytes: int
    makers: frozenset[int]
    readers: frozenset[int]
    returned: bool = False
    overwriters: frozenset[int] = frozenset()


KEPT, MADE = "primals_kept", "primals_made"
"""How names of inputs begin that a graph writes to and does not release, as Inductor reads the first word:
they have memory already, or are given it by the kernel that writes them."""

KernelOrder = Callable[[list[KernelLaunch], list[KernelBuffer]], list[int]]


def in_order(nodes: list[Any], order: KernelOrder) -> list[Any]:
    if not nodes:
        return nodes
    for node in nodes:
        share_inputs(node)
    positions = order(*kernel_graph(nodes))
    if sorted(positions) != list(range(len(nodes))):
        raise ValueError(f"an order of {len(positions)} kernels was given for {len(nodes)}")
    return [nodes[index] for index in positions]


def kernel_graph(nodes: Sequence[Any]) -> tuple[list[KernelLaunch], list[KernelBuffer]]:
    """The launches that Inductor's scheduler has after fusion, and the memory between them.

    Values that stay inside one fused kernel take none. Graph inputs are there if the graph may
    release them. Call within the scheduler's constructor only.
    """
    from torch._inductor.memory import prepare_planning_info
    from torch._inductor.virtualized import V
    from torch.utils._ordered_set import OrderedSet

    scheduler, returned = nodes[0].scheduler, OrderedSet(V.graph.get_output_names())
    _, inputs = prepare_planning_info(
        list(nodes),
        scheduler.name_to_buf,
        scheduler.name_to_fused_node,
        OrderedSet(V.graph.graph_inputs.keys()),
        returned,
    )
    position = {node: index for index, node in enumerate(nodes)}
    parts = _parts(nodes)
    talking = [index for index, node in enumerate(nodes) if _communicates(node)]
    # Ranks run collectives in one order, whatever memory would say.
    earlier = dict(zip(talking[1:], talking, strict=False))
    launches, buffers = list[KernelLaunch](), list[KernelBuffer]()
    tuples: dict[str, int] = {}
    held_by: dict[str, tuple[set[int], set[int]]] = {}
    for index, node in enumerate(nodes):
        generated = not (node.is_extern() or node.is_template())
        waits = frozenset(position[n] for n in node.mpi_node.pred_nodes)
        waits |= {earlier[index]} if index in earlier else set()
        launches.append(KernelLaunch(waits, node.min_order))
        for buffer in node.get_outputs():
            info, made_by, name = buffer.mpi_buffer, index, buffer.get_name()
            readers = frozenset(position[n] for n in info.succ_nodes) - {index}
            if info.size_alloc and not info.size_free:
                # A call that returns several tensors: each is a buffer of its own that comes with it.
                tuples[name] = index
            elif info.size_free and not info.size_alloc:
                made_by = next((tuples[d.name] for d in node.unmet_dependencies if d.name in tuples), index)
            if name in parts:
                # It is written where it belongs: the whole is there from its first part to its last reader.
                makers, reading = held_by.setdefault(parts[name], (set(), set()))
                makers.add(index)
                reading |= readers
                continue
            if info.size_free and (readers or name in returned or not generated):
                over = frozenset(i for i in readers if _may_overwrite(nodes[i], name))
                makers, reading = held_by.get(name, ({made_by}, set()))
                held = readers | (reading - {index})
                buffers.append(KernelBuffer(info.size_free, frozenset(makers), held, name in returned, over))
    buffers += [
        KernelBuffer(_bytes_of(name), frozenset({index}), frozenset(), returned=True)
        for index, node in enumerate(nodes)
        for output in node.get_outputs()
        for name in output.get_mutations()
        if name.startswith(MADE)
    ]
    for source in inputs.values():
        readers = frozenset(position[n] for n in source.mpi_buffer.succ_nodes)
        over = frozenset(i for i in readers if _may_overwrite(nodes[i], source.name))
        free = source.mpi_buffer.size_free
        buffers.append(KernelBuffer(free, frozenset(), readers, source.name in returned, over))
    return launches, buffers


def _communicates(kernel: Any) -> bool:
    """Whether a kernel of Inductor's is a collective, or waits for one."""
    from torch._inductor.utils import contains_collective, contains_wait

    return bool(contains_collective(kernel) or contains_wait(kernel))


def _bytes_of(name: str) -> int:
    """Bytes of an input of the graph that Inductor compiles."""
    from torch._inductor.virtualized import V

    value = V.graph.get_buffer(name)
    return int(V.graph.sizevars.optimization_hint(value.get_numel())) * int(value.get_dtype().itemsize)


def _parts(nodes: Sequence[Any]) -> dict[str, str]:
    """Of each buffer that is written as a part of a larger one, the name of the whole."""
    from torch._inductor import ir

    found: dict[str, str] = {}
    for node in nodes:
        for part in node.get_nodes():
            if isinstance(part.node, ir.ConcatKernel):
                inputs: list[Any] = list(part.node.inputs)
                inside = [x for x in inputs if isinstance(x.get_output_spec(), ir.NonOwningLayout)]
                found |= {x.get_name(): part.node.get_name() for x in inside}

    def whole(name: str) -> str:
        return whole(found[name]) if name in found else name

    return {name: whole(name) for name in found}


def share_inputs(kernel: Any) -> None:
    """Let each output of a fused elementwise GPU kernel be written over an input that others read too.

    Inductor allows it to one output alone, that every other reader of the input comes before. The parts
    of such a kernel load an element once, before anything is stored, so any one of them may: each
    is given an input of its own size, which the others then do not count as readers of. The backward of a
    gated product has three such outputs and three such inputs. Not on CPUs, whose generator decides
    part by part; not where an input is read at several indices.
    """
    parts = kernel.get_nodes()
    device = kernel.get_device()
    if len(parts) < 2 or device is None or device.type == "cpu" or not _is_elementwise(kernel):
        return
    taken = {output.get_name() for part in parts for output in part.get_outputs()}
    for part in parts:
        for output in part.get_outputs():
            for read in part.read_writes.reads:
                source = _reusable(kernel, read.name)
                if read.name in taken or source is None or not _same_size(source.node, output.node):
                    continue
                own = [user for user in source.users if user.node is part and user.can_inplace]
                deps = (dep for other in parts for dep in other.read_writes.reads_and_writes())
                if own and len({dep for dep in deps if dep.name == read.name}) == 1:
                    source.users = [user for user in source.users if user.node not in parts] + own
                    taken.add(read.name)
                    break


def _reusable(kernel: Any, name: str) -> Any:
    """The buffer of that name if the graph may write over it: its own, or one donated to it."""
    scheduler = kernel.scheduler
    return scheduler.name_to_donated_buffer.get(name) or scheduler.name_to_buf.get(name)


def _same_size(one: Any, other: Any) -> bool:
    return bool(one.get_dtype() == other.get_dtype() and one.get_numel() == other.get_numel())


def _is_elementwise(kernel: Any) -> bool:
    """Whether all parts of a generated kernel are loops over the same elements without a reduction."""
    if kernel.is_extern() or kernel.is_template() or kernel.is_foreach():
        return False
    return not any(part.is_reduction() for part in kernel.get_nodes())


def _may_overwrite(kernel: Any, name: str) -> bool:
    """Whether Inductor lets a kernel write an output over its input ``name``: if of the parts that count
    as readers all but one come before that one (``SchedulerNode.decide_inplace_update``)."""
    source = _reusable(kernel, name)
    if source is None or kernel.is_extern() or kernel.is_template():
        return False
    users = {user.node.get_name() for user in source.users}
    readers = [part for part in kernel.get_nodes() if part.get_name() in users]
    return bool(readers) and all(part.get_name() in readers[-1].ancestors for part in readers[:-1])
