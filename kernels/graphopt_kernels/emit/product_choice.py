"""Whether a product of matrices pays in a kernel of its own kind, together with its neighbours.

The library multiplies faster than what is emitted; a kernel that takes neighbours in moves fewer bytes and is
launched once. It pays where::

    max(flops / (r F) + computed, bytes / B) + launches  <  max(flops / F, bytes / B) + neighbours + launches

with the ceilings ``F`` and ``B`` of the device, ``r`` the share of the library's rate that emitted products
reach (``DeviceSpec.emitted_matmul_share``), and ``computed`` what is computed of operands before they are
multiplied, again for every tile that they are part of. A product of few rows is bound by reading its weights:
there the shares do not matter, and whatever is taken in is gained.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch.fx as fx

from graphopt.device import DeviceSpec
from graphopt.plugins import default_host
from graphopt_kernels.emit.kernel_file import KernelFile
from graphopt_kernels.emit.order import size
from graphopt_kernels.emit.product_build import BuiltProduct
from graphopt_kernels.emit.product_loops import ProductLoops
from graphopt_kernels.emit.tile import Value

__all__ = ["Prices", "prices_for", "slots_of"]

_USUAL = "h200"
"""Kernels are made for this one where a program is planned for no GPU."""

_UNKNOWN_SHARE = 0.5
"""Taken for dtypes of which a device does not say how fast emitted products are."""

_SLOW = frozenset(
    ("exp", "exp2", "expm1", "log", "log2", "log1p", "sqrt", "rsqrt", "reciprocal", "div", "sin", "cos")
    + ("tanh", "sigmoid", "erf", "remainder", "fmod", "floordiv")
)
_SLOW_SLOTS = 8
_MOVED_SLOTS = 2
"""Instructions for a function, and to bring a computed operand to where tensor cores read it, as counted in
disassemblies for sm_90; others take one."""


@dataclass(frozen=True)
class Prices:
    """Seconds of calls and kernels on a ``device``."""

    device: DeviceSpec

    def moved(self, count: int) -> float:
        """A kernel that moves ``count`` bytes."""
        return count / self.device.copy_bytes_per_second + self.device.launch_seconds

    def one_by_one(self, nodes: Iterable[fx.Node]) -> float:
        """Operators that move data, each by itself."""
        return sum(self.moved(sum(map(size, node.all_input_nodes)) + size(node)) for node in nodes)

    def library(self, file: KernelFile, node: fx.Node) -> float:
        """The library's call for the product ``node``, of which ``file`` is the kernel by itself."""
        multiplied = self._flops(file) / self._rate(file)
        moved = sum(map(size, node.all_input_nodes)) + size(node)
        return max(multiplied, moved / self.device.copy_bytes_per_second) + self.device.launch_seconds

    def emitted(self, file: KernelFile) -> float:
        """The kernel of a product with what it takes in."""
        tiling, loops = file.tiling, file.text.loops
        assert tiling is not None and isinstance(loops, ProductLoops)
        batch, rows, columns, _ = loops.sizes
        multiplied = self._flops(file) / (self._rate(file) * self.share(file)) + self._computed(file)
        moved, launches = file.bytes, 1
        if tiling.parts > 1:
            moved += 2 * tiling.parts * batch * rows * columns * 4
            launches = 2
        bound = max(multiplied, moved / self.device.copy_bytes_per_second)
        return bound + launches * self.device.launch_seconds

    def share(self, file: KernelFile) -> float:
        """The share of the library's rate that the kernel is taken to reach."""
        return self.device.emitted_matmul_share.get(self._dtype(file), _UNKNOWN_SHARE)

    def _dtype(self, file: KernelFile) -> str:
        assert isinstance(file.built, BuiltProduct)
        return str(file.built.dtype).removeprefix("torch.")

    def _rate(self, file: KernelFile) -> float:
        rates = self.device.matmul_flops
        return rates.get(self._dtype(file), rates["float32"])

    def _flops(self, file: KernelFile) -> float:
        loops = file.text.loops
        assert isinstance(loops, ProductLoops)
        batch, rows, columns, inner = loops.sizes
        return 2.0 * batch * rows * columns * inner

    def _computed(self, file: KernelFile) -> float:
        """Seconds for computing the elements of operands, once for each tile that they are part of."""
        built, tiling, loops = file.built, file.tiling, file.text.loops
        assert isinstance(built, BuiltProduct) and isinstance(loops, ProductLoops) and tiling is not None
        batch, rows, columns, inner = loops.sizes
        times = -(-columns // tiling.columns), -(-rows // tiling.rows)
        along = set(built.roles.inner)
        slots = 0
        for operand, elements, again in zip(
            built.dot.args, (rows * inner, inner * columns), times, strict=True
        ):
            if operand.kind == "load":
                continue
            each, stack, seen = _MOVED_SLOTS, [operand], set()
            while stack:
                value = stack.pop()
                if value in seen or not value.axes & along:
                    continue
                seen.add(value)
                stack += value.args
                each += slots_of([value])
            slots += each * batch * elements * again
        return slots / self.device.vector_flops["float32"]


def slots_of(values: Iterable[Value]) -> int:
    """Instructions that computing each of some values takes."""
    return sum(_SLOW_SLOTS if value.payload in _SLOW else 1 for value in values if value.kind == "op")


def prices_for(name: str | None = None) -> Prices:
    """Prices on the device of that name if it is a CUDA device, else on an H200."""
    host = default_host()
    device = host.device(name) if name is not None else None
    return Prices(device if device is not None and device.kind == "cuda" else host.device(_USUAL))
