"""Triton source from groups of ATen operators (docs/emit-triton.md)."""
