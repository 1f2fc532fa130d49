"""How the kernel of a product runs over its axes, and the shape of its tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch

from graphopt_kernels.emit.index import Affine, Axis
from graphopt_kernels.emit.loops import Loop, Loops, merged, power_of_two, stepped_through
from graphopt_kernels.emit.product_build import BuiltProduct
from graphopt_kernels.emit.tile import Value

__all__ = ["ProductLoops", "Tiling", "product_loops", "tiling_of", "tilings_for"]

_PROCESSORS = 132
"""Of an H100 or H200. Fixed, so that kernels do not depend on the device."""

_FEW_PROGRAMS = 96
"""Fewer programs than this leave a quarter of the processors idle: the sums are then split."""

_PARTS = 16
"""Sums are split in at most so many parts, each of at least as many steps as there are loads under way."""

_WORTH = 160 * 1024
"""Bytes that one processor reads in the five microseconds of the launch that parts cost."""

_MANY_PARTIAL = 2**20
"""Elements of all parts together: what a kernel holds beside its inputs and outputs, 4 MiB at most."""

Kind = Literal["tiles", "row", "column"]


@dataclass(frozen=True)
class ProductLoops(Loops):
    """``outer`` are the loops of ``batch``, ``of_rows`` and ``of_columns``, ``inner`` those along which
    products are added up."""

    batch: tuple[Loop, ...] = ()
    of_rows: tuple[Loop, ...] = ()
    of_columns: tuple[Loop, ...] = ()

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(batch, rows, columns, inner)."""
        parts = (self.batch, self.of_rows, self.of_columns, self.inner)
        batch, rows, columns, inner = (prod(loop.extent for loop in loops) for loops in parts)
        return batch, rows, columns, inner


@dataclass(frozen=True)
class Tiling:
    """``kind``: ``tiles`` of the result by tensor cores; a result of one ``row`` or one ``column`` by
    multiplying and adding. ``rows`` x ``columns``: elements of a program's tile; ``inner``: products in a
    step; ``tall``: rows of tiles that follow each other, so that what they read stays in the cache;
    ``parts``: programs that share the sums of a tile; ``warps`` of a program, ``stages`` of its loads."""

    kind: Kind
    rows: int
    columns: int
    inner: int
    tall: int
    parts: int
    warps: int
    stages: int

    def programs(self, loops: ProductLoops) -> int:
        """Tiles of the result, of all of its matrices."""
        batch, rows, columns, _ = loops.sizes
        return batch * -(-rows // self.rows) * -(-columns // self.columns)


def product_loops(built: BuiltProduct) -> ProductLoops:
    """The loops of a product's kernel."""
    positions, single = stepped_through(built)
    roles = built.roles
    batch, rows, columns, inner = (
        _named(merged(axes, positions, single, letter), index)
        for axes, letter, index in (
            (roles.batch, "b", "batch"),
            (roles.rows, "m", "mindex"),
            (roles.columns, "n", "nindex"),
            (roles.inner, "k", "kindex"),
        )
    )
    return ProductLoops("product", (*batch, *rows, *columns), inner, False, batch, rows, columns)


def _named(loops: Sequence[Loop], index: str) -> tuple[Loop, ...]:
    """Loops; one by itself is called what the index is that runs through it."""
    return (Loop(index, loops[0].axes),) if len(loops) == 1 else tuple(loops)


def tiling_of(built: BuiltProduct, loops: ProductLoops) -> Tiling:
    """The tiles of a kernel, by the sizes of its product and the way its operands lie in memory."""
    return _split(loops, _in_one_part(built, loops), built.dtype.itemsize)


def _in_one_part(built: BuiltProduct, loops: ProductLoops) -> Tiling:
    _, rows, columns, inner = loops.sizes
    if rows == 1:
        return _vector(built, loops, "row", columns)
    if columns == 1:
        return _vector(built, loops, "column", rows)
    if built.dtype == torch.float32:
        # Without tensor cores: operands of a step are held in registers.
        tile = _tile(rows, columns, 64, 64)
        return Tiling("tiles", *tile, 16, 8, 1, 4, 3)
    least = 32 if built.dtype == torch.int8 else 16
    depth = 128 // built.dtype.itemsize
    if min(rows, columns) <= 32:
        few = max(least if columns <= rows else 16, power_of_two(min(rows, columns)))
        tile = (few, 32) if rows <= columns else (32, few)
        return Tiling("tiles", *tile, _depth(inner, 4 * depth, least), 8, 1, 4, 4)
    if not _aligned(built):
        # Elements are loaded one by one, and each takes a pointer.
        tile = _tile(rows, columns, 64, 64)
        return Tiling("tiles", *tile, _depth(inner, depth // 2, least), 8, 1, 4, 2)
    narrow = _is_full_of_values(built)
    for tile, warps, stages in (((128, 256), 8, 3), ((128, 128), 8, 3), ((64, 128), 4, 4), ((64, 64), 4, 4)):
        if tile[1] == 256 and narrow:
            continue
        if rows >= tile[0] and columns >= tile[1]:
            tiling = Tiling("tiles", *tile, _depth(inner, depth, least), 8, 1, warps, stages)
            if tiling.programs(loops) >= _PROCESSORS:
                return tiling
    tile = _tile(rows, columns, 64, 64)
    return Tiling("tiles", *tile, _depth(inner, depth, least), 8, 1, 4, 4)


_LARGE = (
    (128, 256, 1, 8, 3),
    (128, 256, 1, 8, 4),
    (256, 128, 1, 8, 3),
    (128, 128, 1, 4, 4),
    (128, 128, 1, 8, 3),
    (64, 256, 1, 4, 4),
    (64, 128, 1, 4, 4),
    (64, 64, 2, 4, 4),
)
_SMALL = ((32, 4, 4, 4), (32, 2, 4, 6), (64, 2, 4, 4), (64, 4, 4, 3), (16, 8, 4, 3))
_VECTOR = ((4, 1024, 4), (8, 512, 4), (16, 256, 4), (8, 1024, 8), (32, 128, 4), (64, 64, 4))


def tilings_for(built: BuiltProduct, loops: ProductLoops) -> list[Tiling]:
    """Tilings worth trying for a kernel, the usual one first: other tiles, depths, warps and stages, and the
    sums of few tiles whole and in parts."""
    usual = tiling_of(built, loops)
    _, rows, columns, _ = loops.sizes
    found = [usual]
    depth = 128 // built.dtype.itemsize
    if usual.kind != "tiles":
        for block, deep, warps in _VECTOR:
            tile = (1, block) if usual.kind == "row" else (block, 1)
            found.append(replace(usual, rows=tile[0], columns=tile[1], inner=deep, warps=warps, parts=1))
    elif built.dtype == torch.float32 or not _aligned(built):
        for tile in ((64, 64), (64, 32), (32, 64), (128, 64)):
            found.append(replace(usual, rows=tile[0], columns=tile[1], parts=1))
    elif min(rows, columns) <= 32:
        for wide, times, warps, stages in _SMALL:
            tile = (usual.rows, wide) if rows <= columns else (wide, usual.columns)
            found.append(
                replace(
                    usual,
                    rows=tile[0],
                    columns=tile[1],
                    inner=times * depth,
                    warps=warps,
                    stages=stages,
                    parts=1,
                )
            )
    else:
        for high, wide, times, warps, stages in _LARGE:
            found.append(Tiling("tiles", high, wide, times * depth, usual.tall, 1, warps, stages))
    in_parts = [_split(loops, tiling, built.dtype.itemsize) for tiling in found]
    return list(dict.fromkeys(found + in_parts))


def _tile(rows: int, columns: int, most_rows: int, most_columns: int) -> tuple[int, int]:
    return (
        max(16, min(most_rows, power_of_two(rows))),
        max(16, min(most_columns, power_of_two(columns))),
    )


def _depth(inner: int, most: int, least: int) -> int:
    return max(least, min(most, power_of_two(inner)))


def _is_full_of_values(built: BuiltProduct) -> bool:
    """Whether the widest tiles leave too few registers: something is computed before it is multiplied, or
    much from the result, the more so where tiles of other tensors are at hand meanwhile."""
    if any(operand.kind != "load" for operand in built.dot.args):
        return True
    tile = set(built.roles.rows), set(built.roles.columns)
    after = [v for v in built.values if v.number > built.dot.number and not v.axes & set(built.roles.inner)]
    ops = sum(value.kind == "op" for value in after)
    loads = sum(value.kind == "load" and all(value.axes & axes for axes in tile) for value in after)
    return len(built.stores) > 1 or loads > 1 or ops > (8 if loads else 20)


def _aligned(built: BuiltProduct) -> bool:
    """Whether what is loaded for the operands can be loaded 16 bytes at a time, along one axis of each."""
    stack, seen = list(built.dot.args), set()
    inner = set(built.roles.inner)
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        stack += value.args
        if value.kind == "load" and value.axes & inner:
            position: Affine = value.payload[1]
            steps = [abs(factor) * value.dtype.itemsize for _, factor in position.terms]
            if sum(step % 16 != 0 for step in steps) > 1 or position.constant * value.dtype.itemsize % 16:
                return False
    return True


def _vector(built: BuiltProduct, loops: ProductLoops, kind: Kind, length: int) -> Tiling:
    """A matrix by a vector: as fast as the matrix is read, along the way in which it lies in memory."""
    matrix = built.dot.args[1 if kind == "row" else 0]
    along = _neighbours(matrix, loops)
    inner = loops.sizes[-1]
    block, depth = (8, 512) if along == "inner" else (32, 128)
    block, depth = min(block, power_of_two(length)), min(depth, power_of_two(inner))
    tile = (1, block) if kind == "row" else (block, 1)
    return Tiling(kind, *tile, depth, 1, 1, 4, 3)


def _neighbours(value: Value, loops: ProductLoops) -> str:
    """Along which loops the largest tensor that ``value`` is made from steps by one element."""
    inner = {axis for loop in loops.inner for axis in loop.axes}
    stack, steps = [value], {"inner": 0, "other": 0}
    while stack:
        found = stack.pop()
        if found.kind == "load":
            position: Affine = found.payload[1]
            for atom, factor in position.terms:
                if factor == 1 and isinstance(atom, Axis):
                    steps["inner" if atom in inner else "other"] += len(position.terms)
        stack += found.args
    return "inner" if steps["inner"] >= steps["other"] else "other"


def _split(loops: ProductLoops, tiling: Tiling, itemsize: int) -> Tiling:
    """``tiling`` with the sums in parts where its tiles are too few for the processors of a GPU."""
    programs = tiling.programs(loops)
    batch, rows, columns, inner = loops.sizes
    if programs >= _FEW_PROGRAMS:
        return tiling
    read = (tiling.rows + tiling.columns) * inner * itemsize
    steps = -(-inner // tiling.inner)
    parts = min(
        -(-2 * _PROCESSORS // programs),
        _PARTS,
        steps // tiling.stages,
        _MANY_PARTIAL // (batch * rows * columns),
    )
    if parts < 2 or read - read // parts < _WORTH:
        return tiling
    # Every part has the same number of steps, the last perhaps fewer: none has nothing to do.
    each = -(-steps // parts)
    return replace(tiling, parts=-(-steps // each))
