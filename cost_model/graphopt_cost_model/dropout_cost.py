"""What the numbers of a seed cost (``graphopt_kernels.philox``): instructions, and memory within calls on the
CPU.

Counted in the source; memory was compared with what calls take.
"""

from __future__ import annotations

import torch

from graphopt_cost_model.call import Call, TensorSpec

__all__ = ["BLOCK_ELEMENTS", "DRAWN", "dropout_workspace", "words_bytes"]

BLOCK_ELEMENTS = 2**17
"""Elements whose words are held at a time."""

DRAWN = 25
"""Instructions for the number of an element: a counter gives four, in ten rounds of two products of 32 by 32
bits, which count twice, and five of other kinds (Salmon et al. 2011), then a comparison and a choice."""

_OF_SCORE, _OF_ELEMENT = 56, 30
"""Bytes of the words, counters and products of an element, int64 each, four elements to a counter; scores
compute each counter for two rows."""


def words_bytes(items: int, of_item: int) -> int:
    """For scores, ``of_item`` of them an item, items at a time."""
    together = max(1, BLOCK_ELEMENTS // max(1, of_item))
    return _OF_SCORE * min(items, together) * of_item


def dropout_workspace(call: Call) -> int:
    """Bytes that ``graphopt.dropout_add`` takes beyond its output, at most."""
    data: TensorSpec = call.argument("input")
    wide = torch.float64 in [spec.dtype for spec in (*call.inputs[:2], *call.outputs)]
    size: int = 8 if wide else 4
    return (_OF_ELEMENT + 2 * size) * min(data.elements, BLOCK_ELEMENTS)
