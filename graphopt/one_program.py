"""A captured graph as one program: planned and compiled here, or taken over from an earlier process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch.fx as fx

from graphopt import _torch
from graphopt.alternatives import copied
from graphopt.ambient_state import AmbientState
from graphopt.capture.auxiliary import reattach
from graphopt.capture.semantic import is_trained
from graphopt.captured import Captured, Ran
from graphopt.forms import see, weigh_forms
from graphopt.kept_inputs import TracedInputs
from graphopt.offered_schedules import depends
from graphopt.program import InputSpec
from graphopt.unfolding import Made, fold
from graphopt.unreached import leaving_unreached

if TYPE_CHECKING:
    from graphopt.session import Session

__all__ = ["one_program"]


def one_program(
    session: Session,
    name: str,
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    specs: list[InputSpec],
    auxiliary: Sequence[int],
) -> Callable[..., Any]:
    """What runs dynamo's graph ``gm`` as one program. Where it is the whole model and runs op by op, what an
    earlier process made of the same graph is taken over."""
    from graphopt.warm_start import WarmStart

    warm = None
    if session.whole and not session.emitter.fuses:
        warm = WarmStart(session, name, gm, inputs, specs, auxiliary)

    def plain(*args: Any) -> Any:
        return _torch.run_as_captured(gm, args)

    run = warm.restored() if warm is not None else None
    if run is not None:
        ran = session._made = Ran(specs, tuple(auxiliary))
        last = session.current[-1]
        if auxiliary:
            run = reattach(run, gm, auxiliary, lambda: session._used(last))
        run = session.guarded(run, plain, name, specs)
        traced = TracedInputs(gm, inputs, specs)

        def make() -> Made:
            made, _ = _made(session, name, gm, traced.inputs(), specs, auxiliary)
            return [made], made

        fold(session, gm, ran, make)
    else:
        captured, detached = _made(
            session, name, gm, inputs, specs, auxiliary, warm.whole_name if warm is not None else ""
        )
        ran = session._made = Ran(specs, tuple(detached), captured)
        if warm is not None and detached == auxiliary and not session.dry_run:
            warm.keep(captured)
        if session.whole:
            captured.seen = depends(session, captured)
            assert captured.run is not None
            captured.run = session.guarded(captured.run, plain, name, specs)
    if warm is not None and warm.note:
        session.diagnostics.append(warm.note)

    def call(*args: Any) -> Any:
        if session.capturing and session.whole:
            return session._as_captured(gm, args)
        if session.differentiating:
            with session.around():
                return plain(*args)
        made = ran.step if isinstance(ran.step, Captured) else None
        if made is not None and made.provisional and session.staged:
            if made.ran:
                session.finish()
            made.ran = True
        chosen = run if made is None else made.run
        assert chosen is not None
        if session.comparing:
            with session.around():
                return session._ran(chosen, args, ran)
        return session._ran(chosen, args, ran)

    return call


def _made(
    session: Session,
    name: str,
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    specs: list[InputSpec],
    auxiliary: Sequence[int],
    keep: str = "",
) -> tuple[Captured, Sequence[int]]:
    """The program of ``gm``, planned and compiled, and which of its outputs are cut off from autograd.
    ``keep``: the name under which its code is kept for later processes."""
    program, auxiliary = session._semantic(name, gm, inputs, specs, auxiliary)
    captured = Captured(name, program, specs, provisional=not session.whole)
    session._begin(captured)
    context, ambient = _torch.capture_context(), AmbientState.now()
    traced = TracedInputs(gm, inputs, specs)
    mode = "train" if is_trained(inputs) else "infer"
    if session.whole:
        weigh_forms(session, captured, inputs, mode)

    def look() -> None:
        captured.provisional = False
        known = captured.seen is not None and captured.seen == depends(session, captured)
        if known and not captured.partly:
            return
        captured.start_over()
        session.looked_anew()
        # Somebody may look when the call that was captured is long over.
        with ambient.again(), _torch.within(context):
            given = traced.inputs()
            weigh_forms(session, captured, given, mode)
            if captured.joint is None:
                see(session, captured, given)
        captured.seen = depends(session, captured)

    def compile_now(keep: str = "") -> Callable[..., Any]:
        emitter = session._provisional_emitter(captured) if captured.provisional else session.emitter
        with _torch.within(context):
            run = emitter.compile(
                # Compilation takes its module over.
                copied(captured.semantic).gm,
                traced.inputs(),
                lambda joint, outputs: session._partition(captured, joint, outputs),
                lambda graph: session._inference(captured, graph),
                session.gradients_of(specs),
                keep,
            )
        if auxiliary:
            return reattach(run, gm, auxiliary, lambda: session._used(captured))
        # Of the whole model, what is returned beside the loss is cut off before.
        several = mode == "train" and not session.whole
        return leaving_unreached(run, lambda: captured.joint) if several else run

    def plain(*args: Any) -> Any:
        return _torch.run_as_captured(gm, args)

    captured.recompile, captured.look, captured.plain = compile_now, look, plain
    captured.run = compile_now(keep)
    return captured, auxiliary
