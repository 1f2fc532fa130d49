"""Which of the steps that are planned may be replayed from CUDA graphs (``graphopt.recording``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import TYPE_CHECKING, Any

import torch

from graphopt import _torch
from graphopt.candidate import Reason
from graphopt.chain_rows import draws_random, written_inputs
from graphopt.cuda_graph import CudaGraphs
from graphopt.program import InputSpec
from graphopt.recording import Recorder, Roles

if TYPE_CHECKING:
    from graphopt.segmented import SegmentedStep
    from graphopt.session import Session

__all__ = ["replayed", "roles_of"]


def replayed(
    session: Session,
    run: Callable[..., Any],
    devices: Set[torch.device],
    roles: Callable[[], Roles | Reason],
) -> Callable[..., Any]:
    """``run``, a compiled step, replayed once it has been recorded; as it is where it cannot be or shall not
    be. The report says which. ``devices``: those of its inputs. ``roles``: see ``roles_of``."""
    plan = session.plan
    if not session.cuda_graphs or session.dry_run or plan is None:
        return run
    if all(device.type != "cuda" for device in devices):
        return run
    found: Roles | Reason = Reason("it reads tensors of several devices")
    if not _torch.runs_alone():
        # What averages gradients over ranks waits for the kernels of a backward one by one.
        found = Reason("other processes take part in training")
    elif len(devices) == 1:
        found = roles()
    if isinstance(found, Reason):
        session.diagnostics.append(f"steps are launched kernel by kernel: {found}")
        return run
    base = session.static_bytes or 0
    recorder = Recorder(
        run,
        found,
        next(iter(devices)),
        CudaGraphs,
        session.diagnostics.append,
        room=None if plan.budget is None else plan.budget - base,
        expected_bytes=plan.predicted.peak_bytes - base,
        strict=session.on_error == "raise",
    )
    session.recorders.append(recorder)
    return recorder


def roles_of(step: SegmentedStep, specs: Sequence[InputSpec]) -> Roles | Reason:
    """What the inputs of a step are, or why it cannot be recorded."""
    symbols = tuple(spec.node for spec in specs if spec.role == "symbol")
    if symbols:
        return Reason("sizes are known at run time alone", symbols)
    if any(c.point is not None and c.point.offloaded for c in step.captured):
        return Reason("values wait in the memory of the host")
    random = any(draws_random(kind) for kind in step.kinds)
    if random and step.session.reruns:
        return Reason("layers that draw random numbers run again under the state of their first run")
    places = {name: k for k, name in enumerate(step.chain.inputs)}
    written = {
        places[call.args[position]]
        for call in step.chain.calls
        for position in written_inputs(step.kinds[call.segment])
        if call.args[position] in places
    }
    lasting = frozenset(k for k, spec in enumerate(specs) if spec.role in ("parameter", "buffer"))
    return Roles(lasting, frozenset(written), random)
