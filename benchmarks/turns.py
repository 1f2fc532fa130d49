"""Processes that get ready side by side and then measure one after another.

Compiling keeps the processor busy and the GPU idle, measuring the other way round. ``in_turns`` starts
processes together; each compiles, warms up, calls ``await_turn``, measures when it is told to, alone on the
GPU, and ends. Seconds to compile that are measured so are those of a busy processor.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

__all__ = ["await_turn", "in_turns"]

READY = "READY"
IN_TURN = "GRAPHOPT_BENCHMARK_IN_TURN"
"""Set where a process is one of several that take turns."""


def await_turn() -> None:
    """Say that everything is ready, and wait until it is this process's turn. By hand it always is."""
    if IN_TURN in os.environ:
        print(READY, flush=True)
        sys.stdin.readline()


def in_turns(
    commands: Mapping[str, Sequence[str]], *, at_once: int, seconds: float
) -> Iterator[tuple[str, list[str]]]:
    """Each command's name and the lines that it printed, ``at_once`` getting ready side by side.

    All have ``seconds`` together. Of those of a batch, who is not ready after two thirds of what is left is
    killed, so that the others can measure; its lines are those until then.
    """
    end = time.monotonic() + seconds
    names = list(commands)
    for start in range(0, len(names), at_once):
        batch = {name: _Child(commands[name]) for name in names[start : start + at_once]}
        begun = time.monotonic()
        late = begun + (end - begun) * 2 / 3
        for child in batch.values():
            child.wait_for(child.ready, late)
        for name, child in batch.items():
            child.measure(end)
            yield name, child.lines


class _Child:
    """A process that takes turns, and the lines that it prints."""

    def __init__(self, command: Sequence[str]) -> None:
        env = {**os.environ, IN_TURN: "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        self.lines: list[str] = []
        self.ready, self.ended = threading.Event(), threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip() == READY:
                self.ready.set()
            else:
                self.lines.append(line.rstrip("\n"))
        self.ready.set()
        self.ended.set()

    def wait_for(self, event: threading.Event, end: float) -> None:
        """Until ``event``; without it at ``end``, the process is killed."""
        if not event.wait(max(0.0, end - time.monotonic())):
            self._process.kill()

    def measure(self, end: float) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("GO\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # It has ended.
        self.wait_for(self.ended, end)
        self._process.wait()
