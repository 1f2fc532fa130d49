"""Two processes that train together through gloo, for tests of what is distributed.

They are started once and run one function after another: starting is what takes long.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["WAIT", "Pair"]

WAIT = timedelta(seconds=60)
"""How long ranks wait for each other."""


class Pair:
    """Ranks 0 and 1 of a process group that lives in ``folder``."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._ends: list[Connection] = []
        self._processes = []
        for rank in range(2):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, str(folder / "store"), there), daemon=True)
            process.start()
            # Ended here, it ends there when this process goes.
            there.close()
            self._ends.append(here)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Any], *args: Any, seconds: float = 240.0) -> list[Any]:
        """``function(rank, *args)`` of both ranks; raises with the traceback of one that failed."""
        for end in self._ends:
            end.send((function, args))
        told = []
        for rank, end in enumerate(self._ends):
            if not end.poll(seconds):
                raise AssertionError(f"rank {rank} did not come back from {function.__name__}")
            failed, value = end.recv()
            told.append((failed, value))
        for rank, (failed, value) in enumerate(told):
            assert not failed, f"rank {rank}:\n{value}"
        return [value for _, value in told]

    def close(self) -> None:
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()


def _serve(rank: int, store: str, end: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=WAIT)
    while True:
        try:
            function, args = end.recv()
        except EOFError:
            # Gloo's threads would be waited for.
            os._exit(0)
        torch._dynamo.reset()
        torch.manual_seed(0)
        try:
            end.send((False, function(rank, *args)))
        except BaseException:
            end.send((True, traceback.format_exc()))
