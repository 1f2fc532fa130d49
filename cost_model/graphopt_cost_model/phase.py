"""One kernel of an operator that runs several."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Phase"]


@dataclass(frozen=True, slots=True)
class Phase:
    """One kernel: FLOPs of matrix products, elements touched, bytes read and written, and the dtype that
    it computes in, as torch names it."""

    flops: int
    elements: int
    read: int
    written: int
    dtype: str
