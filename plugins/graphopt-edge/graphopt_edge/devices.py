"""Devices that the shipped table lacks."""

from __future__ import annotations

from graphopt import DeviceSpec

__all__ = ["DEVICES"]

DEVICES = (
    DeviceSpec(
        name="l4",
        aliases=("nvidia l4",),
        kind="cuda",
        memory_bytes=24 * 10**9,
        copy_bytes_per_second=300e9,
        read_bytes_per_second=300e9,
        # The sheet's rates are with sparsity; dense products reach half.
        matmul_flops={
            "float32": 30.3e12,
            "tfloat32": 60e12,
            "bfloat16": 121e12,
            "float16": 121e12,
            "float8_e4m3fn": 242.5e12,
            "float8_e5m2": 242.5e12,
            "int8": 242.5e12,
        },
        # One operation a lane where a fused product and sum counts as two.
        vector_flops={"float32": 15.15e12},
        launch_seconds=5e-6,
        host_link_bytes_per_second=32e9,
        allocation_granularity=512,
        multiprocessors=58,
        source="NVIDIA L4 data sheet, peak rates; launches as graphopt's table has them. Not measured.",
    ),
)
