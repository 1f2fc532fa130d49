"""Weights in fewer bytes: schemes, the conversion of a model's parameters, and what it may cost."""

from graphopt.packing.convert import PackedWeight, converted, pack_weights, packed_weights
from graphopt.packing.scheme import Scheme, scheme_text

__all__ = ["PackedWeight", "Scheme", "converted", "pack_weights", "packed_weights", "scheme_text"]
