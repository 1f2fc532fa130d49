"""The ways to compute a loss piece by piece, by name: which operator each is, and what it cuts."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["KERNELS", "MODES", "backward_of", "cuts_classes", "holds_gradients", "operator_of"]

KERNELS = {
    "forward": "linear-cross-entropy-with-gradients",
    "recompute": "linear-cross-entropy",
    "forward-blocks": "linear-cross-entropy-blocks-with-gradients",
    "blocks": "linear-cross-entropy-blocks",
}
"""The kernel of each mode."""

MODES = tuple(KERNELS)


def operator_of(mode: str) -> Any:
    """The operator of a mode, which asking for its kernel has registered."""
    packet = getattr(torch.ops.graphopt, KERNELS[mode].replace("-", "_"))
    return packet.default


def backward_of(mode: str) -> Any:
    """The operator of the backward of a mode that computes the logits again."""
    packet = getattr(torch.ops.graphopt, f"{KERNELS[mode].replace('-', '_')}_backward")
    return packet.default


def holds_gradients(mode: str) -> bool:
    """Whether the gradients are computed in the forward and held."""
    return mode.startswith("forward")


def cuts_classes(mode: str) -> bool:
    """Whether the pieces are blocks of classes, not chunks of rows."""
    return mode.endswith("blocks")
