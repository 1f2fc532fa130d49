"""Launches of kernels: which there are, which is fastest, and where that is remembered (docs/tuning.md)."""
