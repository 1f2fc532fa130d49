"""Which weights a kernel may read before the kernel ahead of it has ended.

On devices from sm_90 on a kernel can be let in while the one ahead of it in its stream still runs
(programmatic dependent launch, CUDA programming guide); what that one writes may be read after
``griddepcontrol.wait`` alone. A product of one row spends its time on the weight, which nobody writes as a
rule: read ahead of the wait, it comes while the kernel ahead finishes. That is right where no kernel that is
still running writes the weight, and so where a kernel has been started since that the whole stream was
awaited for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from graphopt import _torch

__all__ = ["ahead_of", "reads_early", "settled"]

_seen: dict[int, tuple[Callable[[], bool], int]] = {}
"""By storage: whether it is gone, and how often it had been written when a kernel read it that waited."""

_MOST = 4096
_WRITTEN_OUT = 32


def settled(weight: torch.Tensor, *, runs: bool = True) -> bool:
    """Whether this was asked of ``weight`` before, and nothing was written to it since, by what torch counts
    (views share the count). The first kernel to read a weight is to wait for all that is ahead of it.
    ``runs``: whether the kernel that asks is started now. One that a graph records is started who knows when:
    it may go by what was seen, and is not what others go by."""
    written = _torch.writes(weight)
    if written is None:
        return False
    key = _torch.storage_key(weight)
    found = _seen.get(key)
    # A key is not given to another storage while it is watched.
    if found is not None and found[1] == written:
        return True
    if not runs:
        return False
    if len(_seen) >= _MOST:
        for gone in [key for key, (expired, _) in _seen.items() if expired()]:
            del _seen[gone]
    if len(_seen) < _MOST or key in _seen:
        _seen[key] = (_torch.storage_watch(weight), written)
    return False


def reads_early(weight: torch.Tensor) -> bool:
    """``settled``, on devices that let kernels in early."""
    if not weight.is_cuda or torch.cuda.get_device_capability(weight.device) < (9, 0):
        return False
    return settled(weight, runs=not torch.cuda.is_current_stream_capturing())


def ahead_of(steps: int) -> int:
    """How many steps of a row are written out in its kernel, which reads ahead then; 0: none."""
    return steps if 1 < steps <= _WRITTEN_OUT else 0
