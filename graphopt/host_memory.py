"""Copies between the device and pinned host memory, beside what the device computes.

One stream carries values away, another brings them back; the stream that computes waits for neither but
where it needs the memory or the value. Host memory is taken once and used again by every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from graphopt.errors import HostMemoryError

__all__ = ["HostMemory", "Moved"]


@dataclass(eq=False)
class Moved:
    """A value on its way. ``value`` is there until ``release``, and again from ``prefetch`` on."""

    value: torch.Tensor | None
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    host: torch.Tensor | None = None
    copied: torch.cuda.Event | None = None


@dataclass
class HostMemory:
    """Moves values of one CUDA device. Buffers are pinned, kept by size, and reused.

    Values must be dense. ``device``: the one that the values live on.
    """

    device: torch.device
    _free: dict[int, list[tuple[torch.Tensor, torch.cuda.Event | None]]] = field(default_factory=dict)
    _away: torch.cuda.Stream | None = None
    _back: torch.cuda.Stream | None = None

    def __getstate__(self) -> dict[str, object]:
        # Streams and pinned memory are this process's own.
        return {"device": self.device, "_free": {}, "_away": None, "_back": None}

    def _streams(self) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        if self._away is None or self._back is None:
            self._away, self._back = (torch.cuda.Stream(self.device) for _ in range(2))  # type: ignore[no-untyped-call]
        return self._away, self._back

    def _buffer(self, size: int, stream: torch.cuda.Stream) -> torch.Tensor:
        """Pinned memory that ``stream`` may write."""
        waiting = self._free.get(size)
        if not waiting:
            return _pinned(size)
        buffer, last_used = waiting.pop()
        if last_used is not None:
            stream.wait_event(last_used)
        return buffer

    def reserve(self, sizes: Sequence[int]) -> None:
        """Take buffers of the given bytes now, so that no step has to. Raises ``HostMemoryError`` if the
        host has no memory left to pin; what was taken until then is given back."""
        taken = []
        try:
            taken = [_pinned(size) for size in sizes]
        finally:
            if len(taken) == len(sizes):
                for buffer in taken:
                    self._free.setdefault(buffer.numel(), []).append((buffer, None))

    def move(self, value: torch.Tensor) -> Moved:
        """Begin to copy a value away. It stays where it is until ``release``."""
        away, _ = self._streams()
        moved = Moved(value.detach(), tuple(value.shape), value.stride(), value.dtype, value.device)
        flat = _flat(value)
        away.wait_event(torch.cuda.current_stream(self.device).record_event())
        host = self._buffer(flat.numel(), away)
        with torch.cuda.stream(away):
            host.copy_(flat, non_blocking=True)
        moved.host, moved.copied = host, away.record_event()
        return moved

    def release(self, moved: Moved) -> None:
        """Let the device's memory go, once the copy is there: what computes next may use it."""
        if moved.value is not None and moved.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(moved.copied)
            moved.value = moved.copied = None

    def prefetch(self, moved: Moved) -> None:
        """Begin to bring a value back."""
        if moved.value is not None or moved.host is None:
            return
        _, back = self._streams()
        value = torch.empty_strided(moved.shape, moved.stride, dtype=moved.dtype, device=moved.device)
        # The memory may still be in use by what was computed before.
        back.wait_event(torch.cuda.current_stream(self.device).record_event())
        with torch.cuda.stream(back):
            _flat(value).copy_(moved.host, non_blocking=True)
        moved.value, moved.copied = value, back.record_event()

    def fetch(self, moved: Moved, *, keep: bool = False) -> torch.Tensor:
        """The value, for what computes next; with ``keep`` it may be asked for again."""
        self.prefetch(moved)
        assert moved.value is not None
        if moved.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(moved.copied)
        value = moved.value
        if not keep:
            self._give(moved)
            moved.value = None
        return value

    def _give(self, moved: Moved) -> None:
        if moved.host is not None:
            self._free.setdefault(moved.host.numel(), []).append((moved.host, moved.copied))
            moved.host = None

    def forget(self, moved: Moved) -> None:
        """Take the buffer of a value back that nobody will ask for."""
        if moved.value is not None and moved.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(moved.copied)
        self._give(moved)
        moved.value = None


def _pinned(size: int) -> torch.Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        raise HostMemoryError(
            f"the host has no {size} bytes left to pin for values that wait for the backward",
            hint='allow less with option host of pass "offload", or drop the pass',
        ) from error


def _flat(value: torch.Tensor) -> torch.Tensor:
    """The bytes under a dense tensor, in memory order."""
    size = value.numel()
    line = value.as_strided((size,), (1,))
    return line.view(torch.uint8)
