"""What products of one value cost apart and packed, where they fill a device by tiles.

A product of matrices is computed in tiles of its result, one for each multiprocessor at a time, so its
time comes in *waves*: 128 x 256 tiles of a 512 x 2,048 result are 32, a quarter of an H200's 132
multiprocessors, and take as long as four times as many. Libraries know several tiles and cut the depth as
well where that fills more ("split-K", whose parts are added up afterwards); the best of them is taken. Source
of the tiles: CUTLASS (Thakkar et al. 2023), configurations of its Hopper kernels; smaller tiles read their
operands more often from shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.fx as fx

from graphopt.candidate import CostDelta
from graphopt.cost import CostModel
from graphopt.device import DeviceSpec

__all__ = ["Pack", "ProductTimes"]

_TILES = (
    (128, 256, 1.0), (256, 128, 1.0), (128, 192, 1.0), (192, 128, 1.0), (256, 96, 0.9), (96, 256, 0.9),
    (128, 128, 0.9), (64, 128, 0.65), (128, 64, 0.65), (64, 64, 0.4),
)  # fmt: skip
"""Rows and columns of a tile, and the share of the largest tiles' rate that it is computed at. Shapes are
those of cuBLAS's kernels for Hopper, shares fitted to benchmarks/results/gpu_pack_linears.json."""

_SPLITS = (1, 2, 4, 8)
"""Parts that libraries cut the depth into."""
_LARGE = 8192
"""Width of a square product that runs at the device's full rate."""

_AROUND = 160
"""Depth that a tile's time is longer by, for its first loads and its stores: on an H200 products of 8,192
rows with 2,048 columns reach 534 TFLOP/s at depth 512, 725 at 2,048 and 826 at 8,192
(benchmarks/results/gpu_matmul.json)."""


@dataclass(frozen=True)
class Pack:
    """Products of one value, all of whose ``rows`` and ``depth`` they read.

    ``columns`` of each; ``copied``: whether its gradient has to be copied next to the others', because what
    makes it writes to memory of its own; ``waits``: whether the backward needs it, and so holds all that lies
    beside it. ``stored`` is the dtype of the weights, ``computed`` that of the products. ``input_trained``
    and ``weights_trained`` say which gradients the backward makes. ``fused``: a code generator makes one
    kernel of neighbouring pointwise calls.
    """

    rows: int
    depth: int
    columns: tuple[int, ...]
    copied: tuple[bool, ...]
    waits: tuple[bool, ...]
    stored: torch.dtype
    computed: torch.dtype
    biased: bool
    input_trained: bool
    weights_trained: bool
    fused: bool


class ProductTimes:
    """Seconds of products on the device of a cost model."""

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self._rates: dict[torch.dtype, float] = {}

    @property
    def device(self) -> DeviceSpec:
        return self._cost.device

    def delta(self, pack: Pack) -> CostDelta:
        """Predicted change of a step by packing. Bytes are of what waits for the backward and would not
        apart: the packed weights, and results beside those that the backward needs, unless these are copied
        out."""
        seconds = self._forward(pack)
        kept = 0
        if pack.input_trained or pack.weights_trained:
            seconds += self._backward(pack)
        if pack.input_trained and pack.stored is pack.computed:
            kept = sum(pack.columns) * pack.depth * pack.stored.itemsize
        if self.copies_out(pack):
            seconds += self._copying_out(pack)
        else:
            kept += self._beside(pack)
        return CostDelta(peak_bytes=kept, seconds=seconds)

    def copies_out(self, pack: Pack) -> bool:
        """Whether results that wait for the backward are copied out of the packed one: where they would hold
        more beside them than is copied in the same time."""
        return self._copying_out(pack) < self._copied(self._beside(pack))

    def _beside(self, pack: Pack) -> int:
        """Bytes of results that nothing waits for, next to some that wait."""
        if not any(pack.waits):
            return 0
        beside = sum(n for n, waits in zip(pack.columns, pack.waits, strict=True) if not waits)
        return pack.rows * beside * pack.computed.itemsize

    def _copying_out(self, pack: Pack) -> float:
        waiting = [n for n, waits in zip(pack.columns, pack.waits, strict=True) if waits]
        moved = 2 * pack.rows * sum(waiting) * pack.computed.itemsize
        return len(waiting) * self.device.launch_seconds + self._copied(moved)

    def worth(self, delta: CostDelta) -> float:
        """Seconds gained, less those that the device takes to copy the bytes that are held."""
        return -delta.seconds - self._copied(delta.peak_bytes)

    def product(self, rows: int, columns: int, depth: int, dtype: torch.dtype) -> float:
        """Seconds of one product, a launch included."""
        if not rows * columns * depth:
            return self.device.launch_seconds
        rate = self._rate(dtype)
        moved = (rows * depth + depth * columns + rows * columns) * dtype.itemsize
        flops = 2 * rows * columns * depth
        busy = flops / rate
        if self.device.multiprocessors:
            busy = self._tiled(rows, columns, depth, rate)
        return max(busy, self._copied(moved)) + self.device.launch_seconds

    def _tiled(self, rows: int, columns: int, depth: int, rate: float) -> float:
        """Seconds in the tiles that suit best."""
        flops = 2 * rows * columns * depth
        return min(
            self._in_tiles(rows, columns, depth, flops / parts, parts, tile, rate)
            for tile in _TILES
            for parts in _SPLITS
        )

    def _in_tiles(
        self,
        rows: int,
        columns: int,
        depth: int,
        flops: float,
        parts: int,
        tile: tuple[int, int, float],
        rate: float,
    ) -> float:
        """``flops`` of each of the ``parts`` that the depth is cut into."""
        high, wide, share = tile
        tiles = -(-rows // high) * -(-columns // wide)
        waves = -(-tiles * parts // self.device.multiprocessors)
        # What lies over the edge of the result is computed as well.
        each = flops * high * wide / (rows * columns)
        each *= 1 + _AROUND * parts / depth
        sums = 0 if parts == 1 else 2 * parts * rows * columns * torch.float32.itemsize
        return waves * each * self.device.multiprocessors / (rate * share) + self._copied(sums)

    def _forward(self, pack: Pack) -> float:
        apart = [self.product(pack.rows, n, pack.depth, pack.computed) for n in pack.columns]
        whole = self.product(pack.rows, sum(pack.columns), pack.depth, pack.computed)
        weights = sum(pack.columns) * pack.depth * pack.stored.itemsize
        launch = self.device.launch_seconds
        laid = launch + self._copied(2 * weights)
        if pack.stored is not pack.computed:
            # The weights are rounded one by one now, and in one go then; with a code generator on the way.
            laid -= len(pack.columns) * launch
            laid = laid - self._copied(2 * weights) if pack.fused else laid + launch
        if pack.biased:
            laid += launch
        return whole - sum(apart) + laid

    def _backward(self, pack: Pack) -> float:
        """Gradients: packed for the products, of the input summed inside one, of the weights in one."""
        launch = self.device.launch_seconds
        size = pack.computed.itemsize
        seconds = 0.0
        if pack.input_trained:
            apart = [self.product(pack.rows, pack.depth, n, pack.computed) for n in pack.columns]
            seconds += self.product(pack.rows, pack.depth, sum(pack.columns), pack.computed) - sum(apart)
            # A sum reads two values and writes one; fused with its reader, it reads one more.
            more = len(pack.columns) - 1
            passes = more if pack.fused else 3 * more
            seconds -= self._copied(passes * pack.rows * pack.depth * size)
            seconds -= 0 if pack.fused else more * launch
        if pack.weights_trained:
            apart = [self.product(n, pack.depth, pack.rows, pack.computed) for n in pack.columns]
            seconds += self.product(sum(pack.columns), pack.depth, pack.rows, pack.computed) - sum(apart)
        copied = [n for n, needs in zip(pack.columns, pack.copied, strict=True) if needs or not pack.fused]
        if copied:
            seconds += launch + self._copied(2 * pack.rows * sum(copied) * size)
        return seconds

    def _copied(self, moved: float) -> float:
        return moved / self.device.copy_bytes_per_second

    def _rate(self, dtype: torch.dtype) -> float:
        """FLOP/s inside of tiles, so that a product that fills the device takes what the cost model says."""
        if dtype not in self._rates:
            price = self._cost.node(_square_product(dtype))
            self._rates[dtype] = rate = price.flops / (price.seconds - self.device.launch_seconds)
            if self.device.multiprocessors:
                tiled = self._tiled(_LARGE, _LARGE, _LARGE, rate)
                self._rates[dtype] = rate * tiled / (price.seconds - self.device.launch_seconds)
        return self._rates[dtype]


def _square_product(dtype: torch.dtype) -> fx.Node:
    graph = fx.Graph()
    operands = (graph.placeholder("left"), graph.placeholder("right"))
    node = graph.call_function(torch.ops.aten.mm.default, operands)
    for value in (*operands, node):
        value.meta["val"] = torch.empty(_LARGE, _LARGE, dtype=dtype, device="meta")
    return node
