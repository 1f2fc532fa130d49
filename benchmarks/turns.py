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

READY, GO = "READY", "GO"
IN_TURN = "GRAPHOPT_BENCHMARK_IN_TURN"


def await_turn() -> None:
    """Say that everything is ready, and wait until it is this process's turn. By hand it always is."""
    if IN_TURN not in os.environ:
        return
    print(READY, flush=True)
    sys.stdin.readline()


def in_turns(
    commands: Mapping[str, Sequence[str]], *, at_once: int, seconds: float
) -> Iterator[tuple[str, list[str]]]:
    """Each command's name and the lines that it printed, ``at_once`` getting ready side by side.

    What has not ended after ``seconds``, all commands together, is killed; its lines are those until then.
    """
    end = time.monotonic() + seconds
    names = list(commands)
    for start in range(0, len(names), at_once):
        batch = {name: _start(commands[name]) for name in names[start : start + at_once]}
        killer = _Deadline(list(batch.values()), end)
        lines: dict[str, list[str]] = {name: _until_ready(child) for name, child in batch.items()}
        for name, child in batch.items():
            try:
                out, _ = child.communicate(f"{GO}\n")
            except (BrokenPipeError, ValueError):
                out = ""
            yield name, [*lines[name], *(out or "").splitlines()]
        killer.cancel()


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    env = {**os.environ, IN_TURN: "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)


def _until_ready(child: subprocess.Popen[str]) -> list[str]:
    assert child.stdout is not None
    lines = []
    for line in iter(child.stdout.readline, ""):
        if line.strip() == READY:
            break
        lines.append(line.rstrip("\n"))
    return lines


class _Deadline:
    """Kills what is left of a batch when its time is up."""

    def __init__(self, children: list[subprocess.Popen[str]], end: float) -> None:
        def kill() -> None:
            for child in children:
                if child.poll() is None:
                    child.kill()

        self._timer = threading.Timer(max(0.0, end - time.monotonic()), kill)
        self._timer.daemon = True
        self._timer.start()

    def cancel(self) -> None:
        self._timer.cancel()
