"""Parts of prompts that are replayed from CUDA graphs (``graphopt.recording``).

Operators of a prompt run one by one, whatever its length is. Where the host takes longer to queue them than
the device to run them, as for a few hundred tokens, a length that comes again is recorded. Graphs share one
pool, as only one runs at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from graphopt.cuda_graph import CudaGraphs, Graphs
from graphopt.recording import Recorder, Roles

if TYPE_CHECKING:
    from graphopt.session import Session

__all__ = ["Prompts"]

_MOST = 8
"""Lengths that are remembered, the latest ones: each recorded one keeps its inputs and results."""


@dataclass
class Prompts:
    """``prompts(run, lasting, arguments)``: what runs a part of a prompt in place of ``run``.

    ``lasting``: positions of arguments that stay where they are, weights and stores. ``expected_bytes`` is
    what a part of ``chunk`` tokens is predicted to take besides; ``room`` is what a budget leaves beside a
    step, as parts of other lengths run while graphs keep their memory, or ``None`` without one.
    """

    session: Session
    device: torch.device
    chunk: int
    expected_bytes: int
    room: int | None = None
    graphs: Callable[[torch.device], Graphs] = CudaGraphs
    _shared: Graphs | None = field(default=None, init=False)
    _recorders: OrderedDict[tuple[Any, ...], Recorder] = field(default_factory=OrderedDict, init=False)

    def __call__(
        self, run: Callable[..., Any], lasting: frozenset[int], arguments: list[Any]
    ) -> Callable[..., Any]:
        given = [x for k, x in enumerate(arguments) if k not in lasting and isinstance(x, torch.Tensor)]
        key = (id(run), *((x.shape, x.stride(), x.dtype) for x in given))
        if key not in self._recorders:
            if len(self._recorders) >= _MOST:
                self._recorders.popitem(last=False)
            self._recorders[key] = self._recorder(run, lasting, given)
        self._recorders.move_to_end(key)
        return self._recorders[key]

    def _recorder(
        self, run: Callable[..., Any], lasting: frozenset[int], given: list[torch.Tensor]
    ) -> Recorder:
        count = max((x.shape[-1] for x in given if x.dim() == 2), default=1)
        return Recorder(
            run, Roles(lasting), self.device, self._pool, lambda text: self._say(count, text), self.room,
            self.expected_bytes * min(count, self.chunk) // self.chunk,
            strict=self.session.on_error == "raise",
        )  # fmt: skip

    def _pool(self, device: torch.device) -> Graphs:
        self._shared = self._shared or self.graphs(device)
        return self._shared

    def _say(self, count: int, text: str) -> None:
        self.session.diagnostics.append(f"prompts, {count} tokens at once: {text}")
