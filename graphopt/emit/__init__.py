"""Code generators: what runs a lowered program."""

from __future__ import annotations

import torch

from graphopt.cost import CostModel
from graphopt.emit.emitter import Emitter
from graphopt.emit.replacing import Replacing
from graphopt.errors import UnknownNameError

__all__ = ["EMITTERS", "resolve_emitter"]

EMITTERS = ("auto", "eager", "inductor")


def resolve_emitter(
    name: str, device: torch.device, replacing: Replacing | None = None, cost: CostModel | None = None
) -> Emitter:
    """The emitter of that name; ``"auto"`` compiles on CUDA and runs op by op on the CPU, where
    compiling C++ costs minutes and memory is what is asked for. What compiles asks ``replacing`` first, and
    ``cost`` for what is faster. Raises ``UnknownNameError``."""
    if name not in EMITTERS:
        raise UnknownNameError("emitter", name, EMITTERS)
    if name == "inductor" or (name == "auto" and device.type == "cuda"):
        from graphopt.emit.inductor import InductorEmitter

        return InductorEmitter(replacing=replacing, cost=cost)
    from graphopt.emit.eager import EagerEmitter

    return EagerEmitter()
