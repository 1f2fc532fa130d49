"""From a model to a checked decoder under a budget."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from graphopt import _torch
from graphopt.budget import format_bytes, parse_bytes
from graphopt.cost import Cost
from graphopt.decoding.absorb import absorbed
from graphopt.decoding.arithmetic import Arithmetic, NoRoom
from graphopt.decoding.beside import SideBySide
from graphopt.decoding.capture import Uncached, capture_uncached
from graphopt.decoding.check_decoder import check_decoder
from graphopt.decoding.decoder import Decoder
from graphopt.decoding.distance_bias import biased_by
from graphopt.decoding.insert import step_graph
from graphopt.decoding.last_row import last_row
from graphopt.decoding.options import Generate
from graphopt.decoding.prompts import Prompts
from graphopt.decoding.reading import shown_tensors
from graphopt.decoding.record import DecodingRecord, LossyRecord, site_records, state_records
from graphopt.decoding.recurrence import recurrences_in
from graphopt.decoding.rewritten import rewritten, roles
from graphopt.decoding.singles import Singles
from graphopt.decoding.site_pass import SitePass, site_passes
from graphopt.decoding.sites import Site, sites_of, stored_bytes
from graphopt.decoding.source_programs import source_programs
from graphopt.decoding.states import kept_bytes
from graphopt.decoding.unroll import STRETCH, unrolled
from graphopt.errors import BudgetError
from graphopt.program import Program

if TYPE_CHECKING:
    from graphopt.decoding.assigning import Assigned
    from graphopt.session import Session

__all__ = ["Built", "build"]

@dataclass(frozen=True)
class Built:
    """A decoder that was checked, what it is predicted to take, and programs to look at."""

    decoder: Decoder
    record: DecodingRecord
    baseline: Cost
    predicted: Cost
    programs: tuple[Program, ...]


def build(
    model: torch.nn.Module, inputs: Any, options: Generate, session: Session, assigned: Assigned
) -> Built:
    """Capture ``model``, give every attention the store that it was assigned, rewrite, check.

    Raises ``InputsError``, ``CaptureError``, ``VerificationError`` with what is in the way, and
    ``BudgetError`` where stores, or the least step, do not fit.
    """
    uncached = assigned.uncached or capture_uncached(model, inputs, options)
    batch, capacity = options.max_batch, options.max_tokens
    assignment, stores = assigned.assignment, session.host.stores()
    made = sites_of(uncached, stores, batch, capacity, assignment, assigned.fitted)
    # What passes chose stores for was priced as it is.
    shared = (*assignment.sources.items(), *assignment.joins.items())
    low = absorbed(uncached, made, {*assignment.stores, *(index for pair in shared for index in pair)})
    sites = made if low is uncached else sites_of(low, stores, batch, capacity, assignment, assigned.fitted)
    uncached = low
    device = next(iter(uncached.weights.values())).device
    kept = _kept_beside(uncached, sites, options)
    cache_bytes = stored_bytes(sites, batch, capacity) + kept
    bound = _check_cache(session, uncached, sites, made, cache_bytes, options)
    beside = None
    if session.cost.device.multiprocessors:
        beside = SideBySide(tuple(session.host.schemes().values()))
    step = step_graph(uncached, sites, batch, capacity, capacity)
    prompts = None
    if recurrences_in(uncached.gm.graph):
        whole, step = step, unrolled(step, uncached, 1)
        prompts = unrolled(last_row(whole, uncached, sites), uncached, min(STRETCH, capacity))
    if beside is not None:
        step = beside(step)
        prompts = None if prompts is None else beside(prompts)
    if prompts is None:
        step = last_row(step, uncached, sites)
    general = rewritten("decode", step.gm, roles(step, uncached), (uncached.tokens,), session)
    stretch = None
    if prompts is not None:
        stretch = rewritten("prompt", prompts.gm, roles(prompts, uncached), (uncached.tokens,), session)
    once = source_programs(uncached, sites, options, session)
    weight_bytes = _torch.storage_bytes([*model.parameters(), *model.buffers()])
    arithmetic = Arithmetic(
        uncached, sites, step, general, prompts, stretch, session, options, weight_bytes, cache_bytes,
        () if once is None else once.before,
    )  # fmt: skip
    baseline = arithmetic.baseline()
    budget = session.budget.resolve(baseline.peak_bytes)
    try:
        chunk, predicted = arithmetic.fitted(budget)
    except NoRoom as refused:
        if hint := _saving(session, made, refused.room - kept, options):
            raise NoRoom(
                refused.message, room=refused.room, least_bytes=refused.least_bytes,
                budget_bytes=refused.budget_bytes, hint=refused.hint + hint,
            ) from None  # fmt: skip
        raise
    decoder = Decoder(
        uncached, sites, options, step, general.gm, lambda *_: None, chunk, device, beside, once
    )
    if stretch is not None and chunk > 1:
        decoder.stretch, decoder.prompts = stretch.gm, prompts
    checked = check_decoder(decoder)
    _name(session, uncached, decoder)
    if budget is not None:
        # A share was one of the step without a cache: compiled steps are held to what it came to.
        session.budget = replace(session.budget, memory=budget, reserve=0)
    decoder.single = Singles(session)
    if device.type == "cuda" and session.cuda_graphs and session.emitter.name != "eager":
        peak = predicted.peak_bytes
        decoder.several = Prompts(
            session, device, chunk, peak - arithmetic.base, None if budget is None else budget - peak
        )  # fmt: skip
    sharing = assigned.sharing
    if sharing is not None:
        # That attentions beside them keep latents frees bytes without any sharing.
        latent = stored_bytes(made, batch, capacity) - stored_bytes(sites, batch, capacity)
        freed = assigned.cache_bytes_before + kept - decoder.cache_bytes - latent
        sharing = replace(sharing, cache_bytes=replace(sharing.cache_bytes, realised=freed))
    record = DecodingRecord(
        capacity, batch, chunk, cache_bytes, bound, checked.off, site_records(sites, batch, capacity),
        0 if beside is None else beside.count, sharing, _lossy(sites, checked.allowed, assigned),
        state_records(uncached, batch),
    )  # fmt: skip
    programs = (general, *(() if stretch is None else (stretch,)), *(() if once is None else once.programs))
    return Built(decoder, record, baseline, predicted, programs)


def _kept_beside(uncached: Uncached, sites: tuple[Site, ...], options: Generate) -> int:
    """Bytes that last from step to step besides keys and values."""
    batch, capacity = options.max_batch, options.max_tokens
    padding = batch * capacity if uncached.mask is not None else 0
    padding += sum(math.prod(shape) for shape in shown_tensors(sites, batch).values())
    tables = {name: sites[index].spec.heads for index, name in biased_by(sites).items()}
    return padding + kept_bytes(uncached, batch) + sum(tables.values()) * capacity * torch.float32.itemsize


def _check_cache(
    session: Session, uncached: Uncached, sites: tuple[Site, ...], made: tuple[Site, ...], cache_bytes: int,
    options: Generate,
) -> int | None:
    """The bound on stores alone, which they keep; ``made``: sites as passes see them. Raises ``BudgetError``,
    naming the largest."""
    if session.budget.cache is None:
        return None
    bound = parse_bytes(session.budget.cache)
    if cache_bytes <= bound:
        return bound
    hint = f"allow Budget(cache={cache_bytes}), or ask for fewer tokens or sequences"
    hint += _saving(session, made, bound - cache_bytes + _stored(sites, options), options)
    records = site_records(sites, options.max_batch, options.max_tokens)
    found = [(record.bytes, record.layer or "the first attention", record.store) for record in records]
    found += [(r.bytes, r.layer or r.name, "state") for r in state_records(uncached, options.max_batch)]
    size, layer, store = max(found, key=lambda entry: entry[0])
    raise BudgetError(
        f"the stores of keys and values take {format_bytes(cache_bytes)} ({cache_bytes} bytes) for "
        f"max_tokens={options.max_tokens} and max_batch={options.max_batch}, {format_bytes(bound)} are "
        f"allowed; the largest is that of {layer}: {store}, {format_bytes(size)}",
        least_bytes=cache_bytes,
        budget_bytes=bound,
        hint=hint,
    )


def _lossy(sites: tuple[Site, ...], allowed: float, assigned: Assigned) -> LossyRecord | None:
    """What the report says of stores that are not exact, if there are any."""
    stores = [sites[site.source].store for site in sites]
    count = sum(not store.exact for store in stores)
    if not count:
        return None
    notes = tuple(dict.fromkeys(store.note for store in stores if store.note))
    found = assigned.allocation
    if found is None:
        return LossyRecord(count, allowed, notes)
    return LossyRecord(count, allowed, notes, found.measured, found.predicted, found.tokens, found.frontier)


def _stored(sites: tuple[Site, ...], options: Generate) -> int:
    return stored_bytes(sites, options.max_batch, options.max_tokens)


def _saving(session: Session, sites: tuple[Site, ...], bound: int, options: Generate) -> str:
    """More of a hint: passes that are not allowed and whose stores could take ``bound`` bytes."""
    stores = [store for kind in session.host.stores().values() for store in kind.choices()]
    least = 0
    for index, site in enumerate(sites):
        if site.source == index:
            taken = [s for s in stores if s.refuses(site.spec, options.max_tokens) is None]
            least += min(
                s.stored_bytes(site.spec, options.max_batch, options.max_tokens) for s in (site.store, *taken)
            )
    passes = set(session.passes) - set(site_passes(session.passes, session.allow))
    names = [step.name for step in passes if isinstance(step, SitePass) and least <= bound]
    more = ((name, f"{name}{{calibration=FILE}}") for name in names)
    return "".join(
        f"; pass {name!r} changes results and is not allowed, it would do: allow=({allow!r},)"
        for name, allow in more
    )


def _name(session: Session, uncached: Uncached, decoder: Decoder) -> None:
    """Tell the session what lasts: weights and stores."""
    held = {**decoder.held, **decoder.tables}
    weights, names = dict(decoder.step.weights), uncached.names
    if decoder.once is not None:
        weights |= decoder.once.weights
        names = {**decoder.once.names, **names}
    for node, tensor in weights.items():
        role = "parameter" if isinstance(tensor, torch.nn.Parameter) else "buffer"
        session.names = {**session.names, id(tensor): (role, names.get(node, node))}
    session.names = {**session.names, **{id(t): ("buffer", name) for name, t in held.items()}}
    session.weight_bytes = _torch.storage_bytes([*weights.values(), *held.values()])
