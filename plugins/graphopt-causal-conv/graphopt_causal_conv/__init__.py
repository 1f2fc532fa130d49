"""Causal depthwise convolutions for graphopt."""
