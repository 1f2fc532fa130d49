"""Weights in fewer bytes: schemes, the conversion of a model's parameters, and what it may cost."""

from graphopt.quantize.convert import PackedWeight, converted, pack_weights, packed_weights
from graphopt.quantize.scheme import Scheme, scheme_text

__all__ = ["PackedWeight", "Scheme", "converted", "pack_weights", "packed_weights", "scheme_text"]
