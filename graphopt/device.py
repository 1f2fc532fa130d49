"""What the cost model knows of a device: a record, filled from data or by calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["DeviceSpec"]


@dataclass(frozen=True)
class DeviceSpec:
    """Ceilings of one device. Rates are per second, memory in bytes, times in seconds.

    ``matmul_flops`` and ``vector_flops`` map a torch dtype name (``"bfloat16"``) to FLOP/s; a
    dtype that is missing falls back to ``"float32"``. ``emitted_matmul_share``: by dtype, the share
    of ``matmul_flops`` that products in emitted Triton kernels reach; ``emitted_attention_share``: the share
    of the library's rate that emitted attention reaches. ``allocation_granularity`` is what the
    allocator rounds each storage up to. ``workspace_bytes`` is what libraries hold from the
    same allocator for each calling thread (cuBLAS on CUDA). ``allocator_slack_bytes`` is what the
    allocator hands out beyond what is asked for, over a whole run: it gives a cached block whole
    rather than leave a small remainder. ``multiprocessors``: how many tiles of a product of matrices run
    at once, 0 where products are not cut that way. ``source`` names where the figures are from.
    """

    name: str
    kind: str
    memory_bytes: int
    copy_bytes_per_second: float
    read_bytes_per_second: float
    matmul_flops: Mapping[str, float]
    vector_flops: Mapping[str, float]
    launch_seconds: float
    host_link_bytes_per_second: float
    allocation_granularity: int = 1
    workspace_bytes: int = 0
    allocator_slack_bytes: int = 0
    multiprocessors: int = 0
    source: str = ""
    aliases: tuple[str, ...] = field(default=())
    emitted_matmul_share: Mapping[str, float] = field(default_factory=dict)
    emitted_attention_share: Mapping[str, float] = field(default_factory=dict)
