"""Values that are kept in fewer bytes between forward and backward."""

from __future__ import annotations

from graphopt_kernels.registered.kernel import kernel
from graphopt_kernels.saved_codecs import codes, groups, levels

__all__ = ["KERNELS"]

KERNELS = (
    kernel(
        "pack-bits",
        codes.pack_bits_reference,
        codes.pack_bits_supports,
        "booleans as bits",
    ),
    kernel(
        "unpack-bits",
        codes.unpack_bits_reference,
        codes.unpack_bits_supports,
        "booleans out of bits",
    ),
    kernel(
        "quantize-groups",
        groups.quantize_groups_reference,
        groups.quantize_groups_supports,
        "floating-point values in a few bits, rounded at random, a range for each group",
    ),
    kernel(
        "dequantize-groups",
        groups.dequantize_groups_reference,
        groups.dequantize_groups_supports,
        "floating-point values out of a few bits",
    ),
    kernel(
        "pack-levels",
        levels.pack_levels_reference,
        levels.pack_levels_supports,
        "which of a few intervals each element lies in, in a few bits",
    ),
    kernel(
        "unpack-levels",
        levels.unpack_levels_reference,
        levels.unpack_levels_supports,
        "a number for each interval that elements lie in",
    ),
)
