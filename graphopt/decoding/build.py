"""From a model to a checked decoder under a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from graphopt import _torch
from graphopt.budget import format_bytes, parse_bytes
from graphopt.capture.semantic import semantic_program
from graphopt.cost import Cost
from graphopt.decoding.absorb import absorbed
from graphopt.decoding.beside import SideBySide
from graphopt.decoding.capture import Uncached, capture_uncached
from graphopt.decoding.check_decoder import check_decoder
from graphopt.decoding.convolutions import causal_convolutions, kept_tensors
from graphopt.decoding.decoder import MOVED, Decoder
from graphopt.decoding.insert import StepGraph, step_graph
from graphopt.decoding.last_row import last_row
from graphopt.decoding.options import Generate
from graphopt.decoding.record import DecodingRecord, LossyRecord, site_records
from graphopt.decoding.singles import Singles
from graphopt.decoding.site_pass import SitePass, site_passes
from graphopt.decoding.sites import Site, sites_of, stored_bytes
from graphopt.decoding.sizes import compute_sizes
from graphopt.errors import BudgetError, InputsError, brief
from graphopt.program import InputSpec, Program
from graphopt.schedule import Schedule

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
    low = absorbed(uncached, made, {*assignment.stores, *assignment.sources, *assignment.sources.values()})
    sites = made if low is uncached else sites_of(low, stores, batch, capacity, assignment, assigned.fitted)
    uncached = low
    device = next(iter(uncached.weights.values())).device
    padding = batch * capacity if uncached.mask is not None else 0
    kept = padding + batch * sum(
        one.channels * one.reach * one.dtype.itemsize for one in causal_convolutions(uncached)
    )
    cache_bytes = stored_bytes(sites, batch, capacity) + kept
    bound = _check_cache(session, sites, made, cache_bytes, options)
    beside = None
    if session.cost.device.multiprocessors:
        beside = SideBySide(tuple(session.host.schemes().values()))
    step = step_graph(uncached, sites, batch, capacity, capacity)
    step = last_row(step if beside is None else beside(step), uncached, sites)
    general = _rewritten("decode", step, uncached, session)
    weight_bytes = _torch.storage_bytes([*model.parameters(), *model.buffers()])
    arithmetic = _Arithmetic(uncached, sites, step, general, session, options, weight_bytes, cache_bytes)
    baseline = arithmetic.baseline()
    budget = session.budget.resolve(baseline.peak_bytes)
    chunk, predicted = arithmetic.fitted(budget)
    decoder = Decoder(uncached, sites, options, step, general.gm, lambda *_: None, chunk, device, beside)
    checked = check_decoder(decoder)
    _name(session, uncached, decoder)
    if budget is not None:
        # A share was one of the step without a cache: compiled steps are held to what it came to.
        session.budget = replace(session.budget, memory=budget, reserve=0)
    decoder.single = Singles(session)
    sharing = assigned.sharing
    if sharing is not None:
        freed = assigned.cache_bytes_before + kept - decoder.cache_bytes
        sharing = replace(sharing, cache_bytes=replace(sharing.cache_bytes, realised=freed))
    record = DecodingRecord(
        capacity, batch, chunk, cache_bytes, bound, checked.off, site_records(sites, batch, capacity),
        0 if beside is None else beside.count, sharing, _lossy(sites, checked.allowed, assigned),
    )  # fmt: skip
    return Built(decoder, record, baseline, predicted, (general,))


def _check_cache(
    session: Session, sites: tuple[Site, ...], made: tuple[Site, ...], cache_bytes: int, options: Generate
) -> int | None:
    """The bound on stores alone, which they keep; ``made``: sites as passes see them. Raises ``BudgetError``,
    naming the largest."""
    if session.budget.cache is None:
        return None
    bound = parse_bytes(session.budget.cache)
    if cache_bytes <= bound:
        return bound
    hint = f"allow Budget(cache={cache_bytes}), or ask for fewer tokens or sequences"
    for name in _saving(session, made, bound - cache_bytes + _stored(sites, options), options):
        allow = f"{name}{{calibration=FILE}}"
        hint += f"; pass {name!r} changes results and is not allowed, it would do: allow=({allow!r},)"
    records = site_records(sites, options.max_batch, options.max_tokens)
    largest = max(records, key=lambda record: record.bytes)
    raise BudgetError(
        f"the stores of keys and values take {format_bytes(cache_bytes)} ({cache_bytes} bytes) for "
        f"max_tokens={options.max_tokens} and max_batch={options.max_batch}, {format_bytes(bound)} are "
        f"allowed; the largest is that of {largest.layer or 'the first attention'}: {largest.store}, "
        f"{format_bytes(largest.bytes)}",
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


def _saving(session: Session, sites: tuple[Site, ...], bound: int, options: Generate) -> list[str]:
    """Passes that are not allowed and whose stores could take ``bound`` bytes."""
    stores = [store for kind in session.host.stores().values() for store in kind.choices()]
    least = 0
    for index, site in enumerate(sites):
        if site.source == index:
            taken = [s for s in stores if s.refuses(site.spec, options.max_tokens) is None]
            least += min(
                s.stored_bytes(site.spec, options.max_batch, options.max_tokens) for s in (site.store, *taken)
            )
    passes = set(session.passes) - set(site_passes(session.passes, session.allow))
    return [step.name for step in passes if isinstance(step, SitePass) and least <= bound]


def _rewritten(name: str, step: StepGraph, uncached: Uncached, session: Session) -> Program:
    """The step as a program at the semantic level, passes run over it."""
    program = semantic_program(name, step.gm, _specs(step, uncached))
    session._rewrite(program, ())
    tokens = next(node for node in program.graph.nodes if node.name == uncached.tokens)
    compute_sizes(program.graph, tokens)
    program.gm.recompile()
    return program


def _specs(step: StepGraph, uncached: Uncached) -> list[InputSpec]:
    specs = []
    for node in step.gm.graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in step.weights:
            is_parameter = isinstance(step.weights[node.name], torch.nn.Parameter)
            fqn = uncached.names.get(node.name, "")
            specs.append(InputSpec(node.name, "parameter" if is_parameter else "buffer", fqn))
        elif node.name in step.stores or node.name == "valid":
            specs.append(InputSpec(node.name, "buffer", node.name))
        else:
            specs.append(InputSpec(node.name, "input", node.name))
    return specs


def _name(session: Session, uncached: Uncached, decoder: Decoder) -> None:
    """Tell the session what lasts: weights and stores."""
    for node, tensor in decoder.step.weights.items():
        role = "parameter" if isinstance(tensor, torch.nn.Parameter) else "buffer"
        session.names = {**session.names, id(tensor): (role, uncached.names.get(node, node))}
    session.names = {**session.names, **{id(t): ("buffer", name) for name, t in decoder.held.items()}}
    session.weight_bytes = _torch.storage_bytes([*decoder.step.weights.values(), *decoder.held.values()])


class _Arithmetic:
    """Predicted bytes and seconds of steps of this decoder."""

    def __init__(
        self,
        uncached: Uncached,
        sites: tuple[Site, ...],
        step: StepGraph,
        general: Program,
        session: Session,
        options: Generate,
        weight_bytes: int,
        cache_bytes: int,
    ) -> None:
        self.uncached, self.sites, self.step, self.general = uncached, sites, step, general
        self.cost, self.options = session.cost, options
        self.weight_bytes, self.cache_bytes = weight_bytes, cache_bytes
        device = session.cost.device
        self.base = weight_bytes + cache_bytes + device.workspace_bytes + device.allocator_slack_bytes

    def baseline(self) -> Cost:
        """A token without a cache: the whole sequence again."""
        batch, length = self.options.max_batch, self.options.max_tokens
        shapes = dict.fromkeys(self.uncached.inputs, ((batch, length), torch.int64))
        weights = self.uncached.weights
        try:
            program = _sized("uncached", self.uncached.gm, weights, shapes)
        except (RuntimeError, IndexError) as error:
            raise InputsError(
                f"the model does not take sequences of max_tokens={length} positions: {brief(error)}"
            ) from error
        return self._cost(program, self.base - self.cache_bytes, 0)

    def fitted(self, budget: int | None) -> tuple[int, Cost]:
        """The most tokens of a prompt at once whose step fits, and what one token takes, at the peak of
        all."""
        single = self._step(1)
        chunk = self.options.max_tokens
        peak = self._step(chunk).peak_bytes
        if budget is not None and peak > budget:
            fitting = [(1, single.peak_bytes)]
            size = chunk // 2
            while size > 1:
                # Halves from above: steps are few, and the largest that fits takes the fewest.
                found = self._step(size).peak_bytes
                if found <= budget:
                    fitting.append((size, found))
                    break
                size //= 2
            chunk, peak = fitting[-1]
            if peak > budget:
                self._refuse(peak, budget)
        if self.options.max_batch > 1:
            # Sequences may change places.
            peak = max(peak, self.base + min(MOVED, self.cache_bytes))
        return chunk, Cost(
            max(peak, single.peak_bytes), self.weight_bytes, single.seconds, single.flops, self.cache_bytes
        )

    def _refuse(self, peak: int, budget: int) -> None:
        stores = format_bytes(self.cache_bytes)
        raise BudgetError(
            f"decoding one token takes {format_bytes(peak)} ({peak} bytes), {format_bytes(budget)} are "
            f"allowed: {format_bytes(self.weight_bytes)} are parameters and buffers, {stores} stores of keys "
            f"and values for max_tokens={self.options.max_tokens} and max_batch={self.options.max_batch}",
            least_bytes=peak,
            budget_bytes=budget,
            hint=f"ask for budget={peak} or more, for fewer tokens or sequences, or pack weights "
            "(graphopt.quantize) before",
        )

    def _step(self, count: int) -> Cost:
        batch = self.options.max_batch
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = dict.fromkeys(
            self.uncached.inputs, ((batch, count), torch.int64)
        )
        shapes["slots"] = ((count,), torch.int64)
        shapes["valid"] = ((batch, self.options.max_tokens), torch.bool)
        kinds = kept_tensors(self.uncached, self.sites, batch, self.options.max_tokens)
        shapes |= {name: kinds[key] for name, key in self.step.stores.items()}
        given = {name: shapes[name] for name in self.step.inputs}
        program = _sized("step", self.general.gm, self.step.weights, given)
        return self._cost(program, self.base, self.cache_bytes)

    def _cost(self, program: Program, base: int, cache_bytes: int) -> Cost:
        calls = tuple(n.name for n in program.graph.nodes if n.op in ("call_function", "get_attr"))
        profile = self.cost.memory([(program, Schedule(calls))], base_bytes=base)
        prices = [self.cost.node(node) for node in program.nodes()]
        return Cost(
            profile.peak_bytes, self.weight_bytes, sum(p.seconds for p in prices), sum(p.flops for p in
            prices), cache_bytes,
        )  # fmt: skip


def _sized(
    name: str,
    gm: torch.fx.GraphModule,
    weights: Mapping[str, torch.Tensor],
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
) -> Program:
    """``gm`` traced again for inputs of these shapes."""
    traced = _torch.retraced_at(gm, list(weights.values()), list(shapes.values()))
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    roles = ["parameter"] * len(weights) + [
        "buffer" if name.startswith("store_") or name == "valid" else "input" for name in shapes
    ]
    specs = [InputSpec(node.name, role) for node, role in zip(placeholders, roles, strict=True)]
    return semantic_program(name, traced, specs)
