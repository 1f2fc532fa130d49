"""What configurations can be told apart by before any is launched: how much of a GPU they keep busy.

A kernel that is bound by memory is as fast as its loads in flight allow (Little's law; Volkov 2010, "Better
performance at lower occupancy"). From registers, shared memory and warps follows how many programs a
multiprocessor holds at once, from that how many bytes they have asked for and not got. Lanes that lie beyond
a row, and a last wave that fills the device in part, count as time. The figures rank configurations of one
kernel on one problem; they are no times.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Gpu", "Usage", "memory_bound", "resident"]

_WARP = 32
_REGISTERS_AT_ONCE = 256
"""What a warp's registers are rounded up to."""


@dataclass(frozen=True)
class Usage:
    """What the compiler gave a program: ``registers`` of a thread, bytes of a thread ``spilled`` to memory,
    bytes ``shared`` by the program."""

    registers: int
    spilled: int
    shared: int


@dataclass(frozen=True)
class Gpu:
    """Limits of one multiprocessor, and how many there are. ``shared``: bytes for all of its programs;
    ``shared_of_program``: for one."""

    name: str
    capability: tuple[int, int]
    processors: int
    shared: int
    shared_of_program: int
    registers: int = 65536
    warps: int = 64
    programs: int = 32
    in_flight: int = 20480
    """Bytes asked for that keep the memory busy: 4.3 TB/s of an H200 for 0.6 us, on 132 multiprocessors."""

    @classmethod
    def of(cls, name: str, capability: tuple[int, int], processors: int) -> Gpu:
        """From NVIDIA's tables of compute capabilities (CUDA C++ Programming Guide); one that is not known
        counts as the smallest of those that are."""
        large = {(8, 0): 164, (8, 7): 164, (9, 0): 228, (10, 0): 228, (10, 3): 228}
        kib = large.get(capability, 100)
        few = capability not in large
        return cls(
            name, capability, processors, kib * 1024, (kib - 1) * 1024,
            warps=48 if few else 64, programs=16 if few else 32,
        )  # fmt: skip


def resident(usage: Usage, warps: int, gpu: Gpu) -> int:
    """Programs of ``warps`` that a multiprocessor holds at once; 0 where none fits."""
    if usage.shared > gpu.shared_of_program:
        return 0
    a_warp = -(-usage.registers * _WARP // _REGISTERS_AT_ONCE) * _REGISTERS_AT_ONCE
    fitting = [gpu.warps // warps, gpu.programs, gpu.registers // max(1, a_warp * warps)]
    # Each program takes 1 KiB of shared memory beside its own.
    fitting.append(gpu.shared // (usage.shared + 1024))
    return min(fitting)


def memory_bound(
    usage: Usage,
    gpu: Gpu,
    *,
    warps: int,
    groups: int,
    programs: int,
    tile_bytes: int,
    ahead: bool,
    useful: float,
) -> float:
    """Relative time of a kernel that streams ``groups`` tiles of ``tile_bytes``; 1 is the memory's own.

    ``programs``: how many of each multiprocessor share the groups (0: each has one of its own); ``ahead``:
    whether a tile is loaded while the one before is computed; ``useful``: the share of lanes that lie within
    a row.
    """
    held = resident(usage, warps, gpu)
    if not held:
        return float("inf")
    at_once = min(held, programs) if programs else held
    busy = gpu.processors * at_once
    if programs:
        # Programs that stay take equally many groups; those that do not fit wait for the others to end.
        each = -(-groups // (gpu.processors * programs))
        rounds = each * -(-programs // held)
    else:
        rounds = -(-groups // busy)
    # A program that loads, computes and stores in turn waits for loads about half of its time.
    flying = at_once * tile_bytes * (1.0 if ahead else 0.5)
    starved = max(1.0, gpu.in_flight / flying)
    idle_lanes = 1 + 0.1 * (1 / useful - 1)
    uneven = rounds * busy / groups
    spill = 1 + usage.spilled / 256
    return starved * idle_lanes * max(1.0, uneven) * spill
