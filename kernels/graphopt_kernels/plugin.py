"""What this package registers: its kernels."""

from __future__ import annotations

from collections.abc import Iterable

from graphopt.plugins import KernelSpec, hookimpl

__all__ = ["graphopt_api", "graphopt_kernels"]

graphopt_api = 1


@hookimpl
def graphopt_kernels() -> Iterable[KernelSpec]:
    """The bandwidth probes that ``graphopt calibrate`` uses."""
    # Imported when asked: it needs torch, and `graphopt --help` loads this module.
    from graphopt_kernels import bandwidth

    return (
        KernelSpec(
            name="probe-copy",
            op="graphopt::probe_copy",
            reference=bandwidth.copy_reference,
            supports=bandwidth.copy_supports,
            summary="copies a vector, to measure the copy bandwidth",
        ),
        KernelSpec(
            name="probe-read",
            op="graphopt::probe_read",
            reference=bandwidth.read_reference,
            supports=bandwidth.read_supports,
            summary="sums a vector block by block, to measure the read bandwidth",
        ),
    )
