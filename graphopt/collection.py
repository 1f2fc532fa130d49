"""Garbage collection put off while a program is planned.

Every full collection walks all nodes of all graphs that are there, and planning makes many small objects, so
a program of 40,000 nodes is walked many times: a quarter to a half of the time that planning takes.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["uncollected"]


@contextmanager
def uncollected() -> Iterator[None]:
    """Leave cycles where they are until the block, or the decorated function, ends."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
