"""Readers of packed weights that others wrote."""
