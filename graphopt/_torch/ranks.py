"""Process groups, and models that are spread over them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from graphopt._torch.memory import storage_bytes

__all__ = ["bucket_bytes", "gathers_ended", "rank_store", "ranks_in", "ranks_in_group", "runs_alone"]


def runs_alone() -> bool:
    """Whether other ranks exist on paper alone (torch's ``fake`` process group) or not at all."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return True
    return distributed.get_world_size() < 2 or distributed.get_backend() == "fake"


def rank_store() -> Any:
    """The key-value store that the default process group was set up with."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def ranks_in_group(group: object) -> list[int] | None:
    """The global ranks of a process group, ``None`` for what is none."""
    if not torch.distributed.is_available() or not isinstance(group, torch.distributed.ProcessGroup):
        return None
    return list(torch.distributed.get_process_group_ranks(group))


@contextmanager
def gathers_ended(model: torch.nn.Module) -> Iterator[None]:
    """Afterwards weights that ``fully_shard`` gathered for a forward are spread over the ranks again.

    Where no backward followed they would stay gathered, and ``parameters()`` would be the gathered ones,
    which no optimizer may be given.
    """
    try:
        yield
    finally:
        if not runs_alone():
            for module in model.modules():
                if isinstance(module, torch.distributed.fsdp.FSDPModule):
                    module.reshard()


def bucket_bytes(model: torch.nn.Module) -> int:
    """Bytes that each ``DistributedDataParallel`` in ``model`` holds to average gradients in: as many as the
    gradients, which lie in them with ``gradient_as_bucket_view``."""
    return sum(
        storage_bytes([parameter for parameter in module.parameters() if parameter.requires_grad])
        for module in model.modules()
        if isinstance(module, torch.nn.parallel.DistributedDataParallel)
    )


def ranks_in(model: torch.nn.Module) -> list[int]:
    """The global ranks that parameters of ``model`` are spread over, or that a ``DistributedDataParallel``
    in it averages gradients over."""
    if runs_alone():
        return []
    from torch.distributed.tensor import DTensor

    found: set[int] = set()
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            found.update(parameter.device_mesh.mesh.flatten().tolist())
    for module in model.modules():
        if isinstance(module, torch.nn.parallel.DistributedDataParallel):
            found.update(torch.distributed.get_process_group_ranks(module.process_group))
    return sorted(found)
