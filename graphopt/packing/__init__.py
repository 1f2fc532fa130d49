"""Weights in fewer bytes: schemes, the conversion of a model's parameters, and what it may cost."""

from graphopt.packing.convert import PackedWeight, converted, pack_weights, packed_weights
from graphopt.packing.low_rank import LowRank, low_rank_correction
from graphopt.packing.scheme import Layout, Scheme, scheme_text

__all__ = [
    "Layout", "LowRank", "PackedWeight", "Scheme", "converted", "low_rank_correction", "pack_weights",
    "packed_weights", "scheme_text",
]  # fmt: skip
