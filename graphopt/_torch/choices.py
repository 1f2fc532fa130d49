"""Which kernels Inductor makes one of, and how one goes through its rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["HELD", "LARGE", "holds_rows", "joins_apart", "our_choices", "shares_too_little"]

LARGE = 8 << 20
"""Bytes: kernels that move more take longer than it takes to launch them, several times."""


def shares_too_little(one: Any, other: Any) -> bool:
    """Whether neither of two kernels that could be one would be spared an eighth of what it moves.

    Inductor makes one kernel of any two that share ten bytes, a norm's weight say. Of the slices that
    a region is computed in, or of the branches of a network, all would run first and be
    held together, where each could go before the next.
    """
    size = one.scheduler.dep_size_hint
    moved = [kernel.read_writes.reads | kernel.read_writes.writes for kernel in (one, other)]
    least = min(sum(map(size, deps)) for deps in moved)
    return bool(least > LARGE and 8 * sum(map(size, moved[0] & moved[1])) < least)


def joins_apart(pieces: Sequence[Any]) -> bool:
    """Whether each of the tensors that are concatenated takes another buffer, which could go once it is read.

    On GPUs Inductor computes up to eight pieces in one kernel, for which all that they are computed
    from has to be there. Pieces that are written one by one, where they belong, cost no more unless
    the kernel would take in what reads them.
    """
    from torch._inductor.virtualized import V

    first = pieces[0]
    alike = all(
        piece.get_dtype() == first.get_dtype()
        and piece.get_device() == first.get_device()
        and len(piece.get_size()) == len(first.get_size())
        for piece in pieces
    )
    sizes = [size for piece in pieces for size in piece.get_size()]
    if len(pieces) < 2 or not alike or not all(getattr(size, "is_Integer", True) for size in sizes):
        return False
    count = sum(math.prod(map(int, piece.get_size())) for piece in pieces)
    if count * first.get_dtype().itemsize <= LARGE:
        return False
    read = [set(piece.get_read_names()) for piece in pieces]
    several = {name for k, names in enumerate(read) for other in read[:k] for name in names & other}
    return all(
        any(name not in several and V.graph.get_buffer(name).get_numel() >= 1024 for name in names)
        for names in read
    )


HELD = 16384
"""Elements of a row that fit the registers of one program."""


def holds_rows(features: Any) -> bool:
    """Whether a kernel that reduces rows should hold them in registers instead of reading them again.

    Inductor holds rows of up to 1,024 elements. Longer ones it goes through in a loop for each reduction, and
    once more for what needs their results: a softmax reads its input twice, a norm likewise. ``features`` are
    Inductor's ``SIMDKernelFeatures``. The program has 8 warps, 16 for more than 8,192 elements; a thread's
    share of what is loaded (in its dtype) and of one value made of it (in float32) must leave 40 registers.
    """
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    width = features.reduction_numel
    if not getattr(width, "is_Integer", False) or not 1024 < int(width) <= HELD:
        return False
    if features.get_reduction_hint() is not ReductionHint.INNER:
        return False
    bytes_of = V.graph.sizevars.optimization_hint
    moved = features.memory_stats()
    if bytes_of(moved.looped.memory.bytes) < 1.1 * bytes_of(moved.persistent.memory.bytes):
        return False
    elements = features.numel * width
    nodes = features.scheduler_nodes()
    made = {name for node in nodes for name in node.get_buffer_names()}
    reads = [dep for node in nodes for dep in node.read_writes.reads if dep.name not in made]
    whole = {dep.name for dep in reads if dep.get_numel() == elements}
    loaded = sum(V.graph.get_dtype(name).itemsize for name in whole)
    block = 1 << (int(width) - 1).bit_length()
    threads = 256 if block <= 8192 else 512
    return bool(block // threads * (1 + loaded / 4) <= 65536 // threads - 40)


@contextmanager
def our_choices() -> Iterator[None]:
    """Inductor without fusions that hold more than they spare (``shares_too_little``, ``joins_apart``), and
    with rows in registers (``holds_rows``)."""
    from torch._inductor import ir
    from torch._inductor.choices import InductorChoices
    from torch._inductor.lowering import lowerings
    from torch._inductor.utils import is_pointwise_use
    from torch._inductor.virtualized import V

    class Choices(InductorChoices):
        @staticmethod
        def can_fuse_horizontal(scheduler: Any, node1: Any, node2: Any, shared_data_score: int) -> bool:
            usual = InductorChoices.can_fuse_horizontal(scheduler, node1, node2, shared_data_score)
            return bool(usual) and not shares_too_little(node1, node2)

        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            usual = InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)
            return bool(usual) or (not cooperative_reduction and holds_rows(features))

    operator = torch.ops.aten.cat.default
    usual = lowerings[operator]

    def cat(inputs: Any, dim: int = 0) -> Any:
        taken_in = all(map(is_pointwise_use, V.current_node.users))
        if taken_in or not joins_apart(inputs):
            return usual(inputs, dim)
        return ir.TensorBox(ir.ConcatKernel.create(inputs, dim % len(inputs[0].get_size())))

    lowerings[operator] = cat
    try:
        with V.set_choices_handler(Choices()):
            yield
    finally:
        lowerings[operator] = usual
