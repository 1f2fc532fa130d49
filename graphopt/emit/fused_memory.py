"""Live bytes of a graph as Inductor is expected to run it, before anything is compiled.

The kernels come from ``graphopt.emit.fusion``. Of the order that the graph states and a greedy
one, the better by its own estimate is taken, as Inductor's scheduler does.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch.fx as fx

from graphopt import _torch
from graphopt.emit.fusion import Fused, Kernel
from graphopt.emit.scratch import scratch_bytes
from graphopt.program import tensor_leaves

__all__ = ["fused_live"]


def fused_live(fused: Fused, owned: Collection[str] = (), *, granularity: int = 1) -> list[tuple[str, int]]:
    """Expected (last value computed, live bytes) at each kernel, above the graph inputs.

    ``owned`` names the inputs that nobody else holds: they go at their last use. ``granularity`` is
    what the allocator rounds each storage up to, in bytes.
    """
    kernels, alive, on_cpu = fused.kernels, fused.alive, fused.device_type == "cpu"
    kept = {fused.bases.get(name, name) for name in fused.outputs}
    books = _Books(
        sizes=_sizes(fused.nodes, granularity, {*alive, *owned}),
        releasable=frozenset({*alive, *owned} - kept),
        on_cpu=on_cpu,
        scratch={
            node.name: -(-_scratch(node) // granularity) * granularity
            for node in fused.nodes
            # What is known of a library's calls is of those on a GPU.
            if not on_cpu or getattr(node.target, "namespace", "") == "graphopt"
        },
    )
    reads = _dependencies(kernels)
    orders = (_stated_order(kernels, reads), _least_peak_first(kernels, reads, books))
    return min(
        (_live(order, books) for order in orders), key=lambda live: max((b for _, b in live), default=0)
    )


@dataclass(frozen=True)
class _Books:
    """Bytes of what takes memory, which of it goes once nobody reads it any more, and what
    library calls take within themselves."""

    sizes: Mapping[str, int]
    releasable: frozenset[str]
    scratch: Mapping[str, int]
    on_cpu: bool

    def allocated(self, kernel: Kernel) -> int:
        return sum(self.sizes.get(name, 0) for name in kernel.members)


def _live(kernels: Sequence[Kernel], books: _Books) -> list[tuple[str, int]]:
    """Live bytes in a given order, with buffers reused by the rules of Inductor's wrapper."""
    last: dict[str, int] = {}
    for index, kernel in enumerate(kernels):
        for name in (*kernel.members, *kernel.reads):
            last[name] = index
    dying = [
        [
            n
            for n in {*kernel.reads, *kernel.members}
            if n in books.sizes and n in books.releasable and last[n] == i
        ]
        for i, kernel in enumerate(kernels)
    ]
    estimate = _without_reuse(kernels, dying, books)
    highest = max(estimate, default=0)
    free: dict[int, list[int]] = {}
    now, live = 0, list[int]()
    for index, kernel in enumerate(kernels):
        released = [books.sizes[n] for n in dying[index]]
        inputs = [(kernel.overwriters(n, on_cpu=books.on_cpu), books.sizes[n]) for n in dying[index]]
        for name in kernel.members:
            if name not in books.sizes:
                continue
            size = books.sizes[name]
            place = next((item for item in inputs if name in item[0] and item[1] == size), None)
            if place is not None:
                # An output of a generated kernel takes the place of an input that dies there.
                inputs.remove(place)
                released.remove(size)
                continue
            now += size
            if kernel.returns:
                continue
            since = free.get(size)
            if (
                since
                and (gap := slice(since[-1] + 1, index))
                and size + max(estimate[gap], default=-size) <= highest
            ):
                # The wrapper holds a dead buffer for this one, where it believes that the peak allows it.
                since.pop()
                for step in range(gap.start, gap.stop):
                    estimate[step] += size
                    live[step] += size
        live.append(now)
        now -= sum(released)
        for size in released:
            free.setdefault(size, []).append(index)
    return [
        (kernel.members[-1], value + books.scratch.get(kernel.members[-1], 0))
        for kernel, value in zip(kernels, live, strict=True)
    ]


def _without_reuse(kernels: Sequence[Kernel], dying: Sequence[list[str]], books: _Books) -> list[int]:
    """The scheduler's own estimate, which knows no reuse in place."""
    now, result = 0, []
    for kernel, names in zip(kernels, dying, strict=True):
        now += books.allocated(kernel)
        result.append(now)
        now -= sum(books.sizes[n] for n in names)
    return result


def _scratch(node: fx.Node) -> int:
    return scratch_bytes(node.target, fx.node.map_arg(node.args, lambda source: source.meta.get("val")))


def _dependencies(kernels: Sequence[Kernel]) -> list[set[int]]:
    """For each kernel, the positions of those whose values it reads."""
    maker = {name: index for index, kernel in enumerate(kernels) for name in kernel.members}
    return [
        {maker[name] for name in kernel.reads if name in maker} - {index}
        for index, kernel in enumerate(kernels)
    ]


def _stated_order(kernels: Sequence[Kernel], reads: Sequence[set[int]]) -> list[Kernel]:
    """Kernels after those that they read from, otherwise by their first members."""
    waits, readers = [set(sources) for sources in reads], _readers(reads)
    ready = [index for index, sources in enumerate(waits) if not sources]
    order = []
    while ready:
        index = heapq.heappop(ready)
        order.append(kernels[index])
        for reader in readers[index]:
            waits[reader].discard(index)
            if not waits[reader]:
                heapq.heappush(ready, reader)
    return order


def _least_peak_first(kernels: Sequence[Kernel], reads: Sequence[set[int]], books: _Books) -> list[Kernel]:
    """The greedy order of ``torch/_inductor/memory.py`` (``topological_sort_lpmf``): of the kernels
    that fit under the peak so far, the one that leaves least behind; otherwise the smallest."""
    waits, readers = [set(sources) for sources in reads], _readers(reads)
    pending: dict[str, set[int]] = {}
    for index, kernel in enumerate(kernels):
        for name in (*kernel.members, *kernel.reads):
            if name in books.releasable:
                pending.setdefault(name, set()).add(index)
    sizes = [books.allocated(kernel) for kernel in kernels]
    frees = [0] * len(kernels)
    for name, users in pending.items():
        if len(users) == 1:
            frees[next(iter(users))] += books.sizes.get(name, 0)
    now = peak = 0
    ready = {index for index, sources in enumerate(waits) if not sources}
    order = []
    while ready:
        gap = peak - now
        index = min(ready, key=lambda i: (sizes[i] if sizes[i] > gap else 0, sizes[i] - frees[i], i))
        ready.remove(index)
        order.append(kernels[index])
        now += sizes[index]
        peak = max(peak, now)
        now -= frees[index]
        for name in {*kernels[index].members, *kernels[index].reads}:
            left = pending.get(name, set()) - {index}
            if name in pending and len(left) == 1:
                frees[next(iter(left))] += books.sizes.get(name, 0)
            pending[name] = left
        for reader in readers[index]:
            waits[reader].discard(index)
            if not waits[reader]:
                ready.add(reader)
    return order


def _readers(reads: Sequence[set[int]]) -> list[list[int]]:
    readers: list[list[int]] = [[] for _ in reads]
    for index, sources in enumerate(reads):
        for source in sources:
            readers[source].append(index)
    return readers


def _sizes(nodes: Sequence[fx.Node], granularity: int, wanted: Collection[str]) -> dict[str, int]:
    """Bytes of the storages of those values and inputs that are ``wanted``."""
    sizes: dict[str, int] = {}
    for node in nodes:
        for item in (node, *node.all_input_nodes):
            if item.name in wanted and item.name not in sizes:
                storages = {
                    _torch.storage_key(t): _torch.hint(t.untyped_storage().nbytes())
                    for t in tensor_leaves(item.meta.get("val"))
                }
                sizes[item.name] = sum(-(-size // granularity) * granularity for size in storages.values())
    return sizes
