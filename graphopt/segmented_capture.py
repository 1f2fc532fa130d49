"""A whole step as a chain of segments, made here or taken over from an earlier process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch.fx as fx

from graphopt import _torch
from graphopt.capture.auxiliary import reattach
from graphopt.captured import Ran
from graphopt.program import InputSpec
from graphopt.unfolding import Made, fold

if TYPE_CHECKING:
    from graphopt.session import Session

__all__ = ["segmented"]


def segmented(
    session: Session,
    name: str,
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    specs: list[InputSpec],
    auxiliary: Sequence[int],
) -> Callable[..., Any]:
    """Repeated blocks planned once and compiled once: the chain of segments is the step. What an earlier
    process made of the same program is taken over."""
    from graphopt.replayed_steps import replayed, roles_of
    from graphopt.segmented import SegmentedStep
    from graphopt.warm_start import WarmStart

    warm = WarmStart(session, name, gm, inputs, specs, auxiliary)
    restored = warm.restored()
    ran = session._made = Ran(specs, tuple(auxiliary))
    if restored is not None:
        run = restored

        def make() -> Made:
            program, _ = session._semantic(name, gm, inputs, specs, auxiliary)
            step = SegmentedStep(session, name, program.gm, specs)
            step.compile()
            return step.captured, step

        fold(session, gm, ran, make)
    else:
        program, attached = session._semantic(name, gm, inputs, specs, auxiliary)
        step = SegmentedStep(session, name, program.gm, specs, warm.code_name)
        session.current = step.captured
        session.captured.extend(step.captured)
        run = step.compile()
        if not session.dry_run and attached == auxiliary:
            warm.keep(step)
        auxiliary = attached
        ran.detached, ran.step = tuple(auxiliary), step
        run = replayed(session, run, warm.devices, lambda: roles_of(step, specs))
    if warm.note:
        session.diagnostics.append(warm.note)
    last = session.current[-1]
    if auxiliary:
        run = reattach(run, gm, auxiliary, lambda: session._used(last))
    run = session.guarded(run, lambda *args: _torch.run_as_captured(gm, args), name, specs)

    def call(*args: Any) -> Any:
        if session.capturing:
            return session._as_captured(gm, args)
        return session._ran(run, args, ran)

    return call
