"""Watching the time that plugins take: code of others cannot be stopped, but named while it hangs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["PATIENCE_SECONDS", "watched"]

PATIENCE_SECONDS = 10.0
"""How long a plugin may take before it is named."""

_log = logging.getLogger("graphopt")


@contextmanager
def watched(what: str, seconds: float, slow: Callable[[str], None]) -> Iterator[None]:
    """Name ``what`` on the log ``graphopt`` (stderr where nothing else is set up) as soon as the block has
    taken ``seconds``, and tell ``slow`` how long it took once it ends, if it does."""
    start = time.perf_counter()

    def warn() -> None:
        _log.warning("%s has not returned for %g s", what, seconds)

    timer = threading.Timer(seconds, warn)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        taken = time.perf_counter() - start
        if taken >= seconds:
            slow(f"{what} took {taken:.1f} s")
