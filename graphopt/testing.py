"""For authors of passes: ``check_pass`` runs what every pass must stand.

::

    def test_fuse_tanh(golden):
        checked = check_pass(FuseTanh(), Net(), (torch.randn(4, 8),))
        golden("fuse_tanh.txt", checked.text)
        assert not checked.near_misses

That places which must not match are declined, and why, only the pass's author knows: assert on
``near_misses`` for a model that has one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graphopt.api import optimize
from graphopt.candidate import Declined, NearMiss
from graphopt.dump.text import program_text
from graphopt.errors import VerificationError
from graphopt.optimized import Optimized
from graphopt.passes import Pass
from graphopt.pipeline import Pipeline
from graphopt.program import Level, Program
from graphopt.provenance import note_of
from graphopt.report import PassRecord
from graphopt.rewriting import run_pass
from graphopt.verify import interface_of, verify_numerically, verify_structure

__all__ = ["CheckedPass", "check_pass", "semantic_programs"]


@dataclass(frozen=True)
class CheckedPass:
    """What a pass did to a model: ``text`` is each program before and after it, for a golden file."""

    text: str
    records: tuple[PassRecord, ...]
    declined: tuple[Declined, ...]
    near_misses: tuple[NearMiss, ...]


def check_pass(
    pass_: Pass, model: torch.nn.Module, inputs: Any, *, dtypes: Sequence[torch.dtype] = (torch.float32,)
) -> CheckedPass:
    """Run ``pass_`` alone over ``model`` and check what must hold of any pass.

    1. Outputs, buffers and, in training mode, gradients are the model's, in each of ``dtypes``.
    2. A second run finds nothing more to do.
    3. Every call has its value, every node that the pass made says so.
    4. Weights loaded later are the ones used: none is built into the graph.

    The model is run op by op, so that nothing but the pass can make a difference. Raises
    ``VerificationError`` naming the check, and whatever the pass raises.
    """
    results = [_checked(pass_, *_in_type(model, inputs, dtype)) for dtype in dtypes]
    return results[0]


def semantic_programs(
    model: torch.nn.Module, inputs: Any, passes: Sequence[Pass] = (), *, allow: Sequence[str] = ()
) -> tuple[Program, ...]:
    """The model's programs at the semantic level after ``passes``; a pass that fails raises."""
    return _programs(_optimized(model, inputs, passes, allow), Level.SEMANTIC)


def _checked(pass_: Pass, model: torch.nn.Module, inputs: Any) -> CheckedPass:
    allow = () if pass_.exact else (pass_.name,)
    before = _programs(_optimized(model, inputs, (), ()), pass_.level)
    optimized = _optimized(model, inputs, (pass_,), allow)
    programs = _programs(optimized, pass_.level)
    if pass_.exact:
        verify_numerically(model, optimized, inputs)
    for program in programs:
        verify_structure(program, interface_of(program))
    _check_provenance(pass_, before, programs)
    _check_idempotence(pass_, optimized, programs)
    _check_reload(pass_, model, optimized, inputs)
    report = optimized.report
    pairs = zip(before, programs, strict=True)
    text = "\n".join(f"# before\n{program_text(a)}\n# after\n{program_text(b)}" for a, b in pairs)
    return CheckedPass(text, report.steps, report.declined, report.near_misses)


def _optimized(
    model: torch.nn.Module, inputs: Any, passes: Sequence[Pass], allow: Sequence[str]
) -> Optimized:
    torch._dynamo.reset()
    pipeline = Pipeline(tuple(passes))
    return optimize(model, inputs, pipeline=pipeline, emit="eager", on_error="raise", allow=allow)


def _programs(optimized: Optimized, level: Level) -> tuple[Program, ...]:
    return tuple(program for program in optimized.programs if program.level is level)


def _in_type(model: torch.nn.Module, inputs: Any, dtype: torch.dtype) -> tuple[torch.nn.Module, Any]:
    def cast(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
            return leaf
        return leaf.detach().to(dtype).requires_grad_(leaf.requires_grad)

    return copy.deepcopy(model).to(dtype), pytree.tree_map(cast, inputs)


def _check_provenance(pass_: Pass, before: Sequence[Program], after: Sequence[Program]) -> None:
    for old, new in zip(before, after, strict=True):
        captured = {node.name for node in old.graph.nodes}
        for node in new.nodes():
            note = note_of(node)
            if node.name not in captured and (note is None or note.pass_id != pass_.name):
                raise VerificationError(f"{pass_.name}: node {node.name!r} does not say who made it")


def _check_idempotence(pass_: Pass, optimized: Optimized, programs: Sequence[Program]) -> None:
    session = optimized._driver.session
    for program in programs:
        before = program.fingerprint
        mode = "train" if optimized._driver.training_step() else "infer"
        ctx = session.context(mode)
        again = run_pass(program, pass_, ctx, session.host, on_error="raise")
        if program.fingerprint != before:
            raise VerificationError(
                f"{pass_.name}: a second run changes program {program.name} again: {again.records[0].reason}"
            )


def _check_reload(pass_: Pass, model: torch.nn.Module, optimized: Optimized, inputs: Any) -> None:
    if not pass_.exact:
        return
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    changed = {
        name: value * 0.5 if value.is_floating_point() else value.clone() for name, value in kept.items()
    }
    try:
        optimized.load_state_dict(changed)
        verify_numerically(model, optimized, inputs)
    except VerificationError as error:
        raise VerificationError(f"{pass_.name}: after loading other weights: {error.message}") from error
    finally:
        optimized.load_state_dict(kept)
