"""Values that a forward saved and its backward may write over.

Inductor's code of a backward reuses the memory of saved values that nobody else has ("donated buffers").
Where the graph is kept for another backward (``retain_graph=True``, ``create_graph=True``) they are still
needed, and torch refuses to run such code. Here it runs on copies of them then, and on themselves otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._guards import TracingContext

from graphopt._torch.autograd import keeps_graph

__all__ = ["donated_by", "notes_of_compiled", "permit_kept_graphs", "sparing"]


def notes_of_compiled() -> Any:
    """AOTAutograd's notes of the graph that is being compiled; ``None`` where there are none."""
    context = TracingContext.try_get()
    return None if context is None else context.fw_metadata


def donated_by(about: Any) -> tuple[int, ...]:
    """Positions of donated values among the arguments of a backward, by AOTAutograd's notes of its graph."""
    return () if about is None else tuple(about.bw_donated_idxs or ())


def permit_kept_graphs(about: Any) -> None:
    """Have torch run a backward whose graph is kept, whatever was donated to it.

    Of a graph on tensors that wrap others AOTAutograd has two sets of notes, which share the list: it is
    emptied, not replaced. Where donation is switched off there is none, and torch takes that to be some.
    """
    if about is None:
        return
    if about.bw_donated_idxs is None:
        about.bw_donated_idxs = []
    else:
        about.bw_donated_idxs.clear()


def sparing(compiled: Callable[[list[Any]], Any], donated: Sequence[int]) -> Callable[[list[Any]], Any]:
    """``compiled``, a boxed callable that may write over its arguments at the positions ``donated``, as one
    that gets copies of them where the backward that runs keeps its graph."""
    if not donated:
        return compiled
    positions = tuple(donated)

    def call(arguments: list[Any]) -> Any:
        if keeps_graph():
            for position in positions:
                if isinstance(arguments[position], torch.Tensor):
                    arguments[position] = _copy(arguments[position])
        return compiled(arguments)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor in memory of its own, whatever its strides: code was made for these."""
    memory = tensor.untyped_storage().clone()  # type: ignore[no-untyped-call]
    made = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    with torch.no_grad():
        return made.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())
