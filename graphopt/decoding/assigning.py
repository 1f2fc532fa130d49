"""Runs passes over what a decoder keeps, and makes the model that they ask for.

::

    capture -- site passes, one after another --> assignment
                                                   | sources: consumers are redirected, what is dead goes
                                                   v
              a model without what is gone, compared with the program in which everything still is
                                                   v
                                                  sites, with the stores that were assigned
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from graphopt import _torch
from graphopt.budget import parse_bytes
from graphopt.decoding.allocate import CacheAllocation
from graphopt.decoding.assignment import NOTHING, CacheAssignment
from graphopt.decoding.capture import Uncached, capture_uncached
from graphopt.decoding.freed import (
    Promise,
    flops_of_prompt,
    flops_of_token,
    promised,
    promised_prompt,
)
from graphopt.decoding.narrow import narrowed
from graphopt.decoding.options import Generate
from graphopt.decoding.record import Freed, SharingRecord
from graphopt.decoding.regions import Region
from graphopt.decoding.reroot import as_assigned
from graphopt.decoding.share import without_dead
from graphopt.decoding.shared_model import SharedProgram, program_of, shared_model
from graphopt.decoding.site_pass import SiteAnswer, SitePass, SiteQuestion, site_passes
from graphopt.decoding.sites import Site, sites_of, specs_of, stored_bytes
from graphopt.decoding.sources import Fits
from graphopt.decoding.states import kept_bytes
from graphopt.decoding.stores import CacheStore
from graphopt.errors import (
    CaptureError,
    GraphoptError,
    InputsError,
    PluginError,
    VerificationError,
    brief,
)
from graphopt.plugins.loading import GUARDED
from graphopt.report import PassRecord

if TYPE_CHECKING:
    from graphopt.session import Session

__all__ = ["Assigned", "assign", "smaller_stores"]

_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""By how much of the largest logit the rewritten program may be off the one that everything is still in: only
products with fewer columns are computed otherwise."""

_CHECKED = 24
"""Tokens of the sequences on which they are compared."""


@dataclass(frozen=True)
class Assigned:
    """The model to go on with, its program where it was rewritten, the stores of its attentions, and what is
    reported of it. ``cache_bytes_before``: of stores as they would have been. ``allocation``: how stores were
    chosen among several, if they were. ``fitted``: what stores were fitted to, by attention."""

    model: torch.nn.Module
    assignment: CacheAssignment = NOTHING
    uncached: Uncached | None = None
    sharing: SharingRecord | None = None
    cache_bytes_before: int = 0
    allocation: CacheAllocation | None = None
    records: tuple[PassRecord, ...] = ()
    fitted: Mapping[int, Mapping[str, torch.Tensor]] = field(default_factory=dict)


def assign(model: torch.nn.Module, inputs: Any, options: Generate, session: Session) -> Assigned:
    """What the site passes of the session's pipeline make of ``model``; the model itself stays as it is.

    A model that cannot be captured for decoding goes on as it is, with a record of why; with
    ``on_error="raise"`` ``CaptureError`` is raised. ``InputsError`` and other errors about options of passes
    are raised always, and so is ``VerificationError`` where the program comes to give something else.
    """
    passes = site_passes(session.passes, session.allow)
    if not passes:
        return Assigned(model)
    if inputs is None:
        raise InputsError(f"pass {passes[0].name!r} needs inputs: example tokens, as a tuple or a dict")
    try:
        uncached = capture_uncached(model, inputs, options)
        if uncached.source is not None:
            raise CaptureError("it reads an encoder's output: such passes compare programs over tokens alone")
        regions, question = _question(uncached, options, session)
    except CaptureError as error:
        if session.on_error == "raise":
            raise
        why = f"the model cannot be captured for passes over stores: {error.message}"
        return Assigned(model, records=tuple(_record(step, session, "failed", why) for step in passes))
    answers: list[SiteAnswer] = []
    records: list[PassRecord] = []
    for step in passes:
        began = time.perf_counter()
        answer = _answer(step, question, session)
        answers.append(answer)
        seconds = time.perf_counter() - began
        records.append(
            _record(step, session, "applied" if answer.assignment else "no-op", answer.reason, seconds)
        )
        question = _after(question, answer, session, options)
    assignment = question.assigned
    allocation = next((answer.allocation for answer in answers if answer.allocation is not None), None)
    if not assignment.sources and not assignment.streams:
        return Assigned(
            model, assignment, allocation=allocation, records=tuple(records), fitted=question.fitted
        )
    done = _shared(model, uncached, regions, assignment, answers, options, session, question.fitted)
    return replace(done, allocation=allocation, records=tuple(records), fitted=question.fitted)


def smaller_stores(
    assigned: Assigned, inputs: Any, options: Generate, fresh: Callable[[Any], Session], budget: Any
) -> Callable[[int], tuple[Assigned, Session]] | None:
    """What assigns stores of so many bytes at most, where ``budget`` bounds all memory and does not fit those
    that were ``assigned``, with a session for them of ``fresh``, which takes a budget. ``None`` where no pass
    may choose others, or one made another model."""
    session, model = fresh(budget), assigned.model
    within = session.budget
    chooses = any(step.on_demand for step in site_passes(session.passes, session.allow))
    other = assigned.assignment.sources or assigned.assignment.streams
    if within.memory is None or within.cache is not None or not chooses or other:
        return None

    def smaller(room: int) -> tuple[Assigned, Session]:
        bounded = replace(within, cache=room)
        return assign(model, inputs, options, fresh(bounded)), fresh(bounded)

    return smaller


def _question(
    uncached: Uncached, options: Generate, session: Session
) -> tuple[tuple[Region, ...], SiteQuestion]:
    stores = session.host.stores()
    sites = sites_of(uncached, stores, options.max_batch, options.max_tokens)
    regions = tuple(site.region for site in sites)
    specs = specs_of(uncached, regions, options.max_tokens)
    fits = Fits(uncached, regions, specs)
    # What is kept of padding, of convolutions and of recurrences counts against the bound as well.
    padding = options.max_batch * options.max_tokens if uncached.mask is not None else 0
    padding += kept_bytes(uncached, options.max_batch)
    return regions, SiteQuestion(
        uncached, regions, sites, CacheAssignment(), fits, options, stores, session.host, _tell,
        None if session.budget.cache is None else parse_bytes(session.budget.cache) - padding,
    )  # fmt: skip


def _tell(line: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"graphopt: {line}\n")


def _answer(step: SitePass, question: SiteQuestion, session: Session) -> SiteAnswer:
    try:
        with session.host.using("graphopt_passes", step.name):
            answer = step.assign(question)
    except GraphoptError:
        raise
    except GUARDED as error:
        raise PluginError(session.host.blame("graphopt_passes", step.name, error)) from error
    if not isinstance(answer, SiteAnswer):
        raise PluginError(f"pass {step.name!r} assigns {answer!r}: expected a SiteAnswer")
    return answer


def _after(
    question: SiteQuestion, answer: SiteAnswer, session: Session, options: Generate
) -> SiteQuestion:
    """What the next pass is asked: what was assigned before it stays."""
    before, new = question.assigned, answer.assignment
    stores = {**before.stores, **new.stores}
    sources = {**before.sources, **new.sources}
    streams = {**before.streams, **new.streams}
    joins = {**before.joins, **new.joins}
    stores = {i: text for i, text in stores.items() if i not in sources and i not in new.joins}
    assigned = CacheAssignment(stores, sources, streams, joins)
    fitted = {**question.fitted, **answer.fitted}
    sites = sites_of(
        question.uncached, question.stores, options.max_batch, options.max_tokens, assigned, fitted
    )
    return replace(
        question, sites=sites, assigned=assigned, weights={**question.weights, **answer.weights},
        fitted=fitted,
    )  # fmt: skip


def _record(
    step: SitePass, session: Session, status: Any, reason: str, seconds: float = 0.0
) -> PassRecord:
    plugin = session.host.owner("graphopt_passes", step.name).plugin
    return PassRecord(step.name, plugin, status, reason, step.spelled(), seconds)


def _shared(
    model: torch.nn.Module,
    uncached: Uncached,
    regions: tuple[Region, ...],
    assignment: CacheAssignment,
    answers: Sequence[SiteAnswer],
    options: Generate,
    session: Session,
    fitted: Mapping[int, Mapping[str, torch.Tensor]],
) -> Assigned:
    """The model that shares, compared with the program in which nothing was taken away."""
    batch, capacity = options.max_batch, options.max_tokens
    stores = session.host.stores()
    plain = sites_of(uncached, stores, batch, capacity)
    sites = sites_of(uncached, stores, batch, capacity, assignment, fitted)
    promise: Promise = promised(uncached, regions, assignment.sources)
    replaced: Mapping[str, torch.Tensor] = {k: v for one in answers for k, v in one.weights.items()}
    reference = as_assigned(uncached, regions, assignment.sources, assignment.streams, replaced)
    after, narrow = narrowed(without_dead(reference))
    made = shared_model(model, uncached, after, narrow, replaced, options)
    off = _compared(made, reference)
    before_bytes = _torch.storage_bytes([*model.parameters(), *model.buffers()])
    after_bytes = _torch.storage_bytes([*made.parameters(), *made.buffers()])
    flops = flops_of_token(uncached, session.cost) - flops_of_token(after, session.cost)
    before = stored_bytes(plain, batch, capacity)
    measured = [answer for answer in answers if answer.divergence is not None]
    record = SharingRecord(
        tuple(sorted(assignment.sources.items())),
        Freed(before - stored_bytes(sites, batch, capacity), 0),
        Freed(promise.weight_bytes, before_bytes - after_bytes),
        Freed(promise.flops, flops),
        off,
        measured[-1].divergence if measured else None,
        measured[-1].tokens if measured else 0,
    )
    if assignment.streams:
        record = replace(
            record,
            streams=tuple(sorted(assignment.streams.items())),
            prompt=capacity,
            prompt_flops=Freed(
                promised_prompt(uncached, regions, assignment.sources, assignment.streams, capacity),
                flops_of_prompt(uncached, plain, capacity, session.cost)
                - flops_of_prompt(after, _plain_sites(after, stores, options), capacity, session.cost),
            ),
        )
    program = program_of(made)

    def eager(*values: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return program.logits(made, **dict(zip(_given(program), values, strict=True)))

    rewritten = replace(after, eager=eager, weights=program.weights(made))
    return Assigned(made, assignment, rewritten, record, before)


def _plain_sites(
    after: Uncached, stores: Mapping[str, type[CacheStore]], options: Generate
) -> tuple[Site, ...]:
    """Sites of the rewritten program with exact stores: what lossy ones compute is no saving of sharing."""
    return sites_of(after, stores, options.max_batch, options.max_tokens)


def _given(program: SharedProgram) -> list[str]:
    """What ``logits`` is told, in the order of the program's inputs."""
    roles = {program.tokens: "tokens", program.mask: "mask", program.positions: "positions"}
    return [roles[name] for name in program.inputs]


def _compared(made: torch.nn.Module, reference: Uncached) -> float:
    """By how much logits of the model are off those of ``reference``, with and without padding.

    Raises ``VerificationError`` where that is more than products of fewer columns explain.
    """
    program = program_of(made)
    device = reference.placeholder(reference.tokens).meta["val"].device
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(reference.vocabulary, (2, _CHECKED), generator=generator).to(device)
    off = 0.0
    for padded in (0, 2) if reference.mask is not None else (0,):
        mask = torch.ones_like(tokens)
        mask[-1, :padded] = 0
        given = mask if reference.mask is not None else None
        expected = reference.run(tokens, given)
        try:
            with torch.no_grad():
                found = program.logits(made, tokens, given)
        except (RuntimeError, IndexError) as error:
            raise VerificationError(f"the model that shares keys does not run: {brief(error)}") from error
        different = (found - expected).masked_fill((mask == 0)[..., None], 0.0)
        here = float(different.abs().max())
        allowed = _TOLERANCE.get(expected.dtype, 1e-5) * max(1.0, float(expected.abs().max()))
        if not here <= allowed:
            raise VerificationError(
                f"without what makes keys and values that nobody reads the model gives other logits: off by "
                f"{here:.3g}, at most {allowed:.3g} is allowed"
            )
        off = max(off, here)
    return off
