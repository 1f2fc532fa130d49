"""Schemes for weights in fewer bytes: packing, operators, kernels."""
