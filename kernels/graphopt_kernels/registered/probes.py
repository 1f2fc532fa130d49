"""What ``graphopt calibrate`` measures with."""

from __future__ import annotations

from graphopt_kernels import bandwidth
from graphopt_kernels.registered.kernel import kernel

__all__ = ["KERNELS"]

KERNELS = (
    kernel(
        "probe-copy",
        bandwidth.copy_reference,
        bandwidth.copy_supports,
        "copies a vector, to measure the copy bandwidth",
    ),
    kernel(
        "probe-read",
        bandwidth.read_reference,
        bandwidth.read_supports,
        "sums a vector block by block, to measure the read bandwidth",
    ),
)
