"""keep-kv: attentions keep keys and values in the store that is named.

Before::

    attention 0: full        attention 1: full        attention 2: ring

After, with ``store="quant{bits=4}"``::

    attention 0: quant       attention 1: quant       attention 2: quant, of the window's blocks

With ``store='low-rank{key_rank=32,store="quant{bits=4}"}'``, fitted to ``calibration``::

    attention 0: bases of 32 columns, coordinates in quant      attention 1: ..

A store that is not exact changes results; the report says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from graphopt.decoding.assignment import CacheAssignment, store_named
from graphopt.decoding.fitting import fit_stores
from graphopt.decoding.site_pass import SiteAnswer, SiteQuestion
from graphopt.decoding.sites import sites_of
from graphopt.decoding.sources import check_indices, first_reader
from graphopt.decoding.stores import CacheStore
from graphopt.errors import InputsError
from graphopt.program import Level
from graphopt_passes.share_kv.calibration import CalibratedPass, rows_of

__all__ = ["KeepKv"]


@dataclass(frozen=True)
class KeepKv(CalibratedPass):
    """Gives attentions the store ``store`` (``graphopt_stores``), spelled with its options.

    ``layers``: indices of attentions; without, all that keep keys and values of their own and that the store
    takes. ``calibration``, for stores that are fitted to tokens: rows of token ids without padding, a
    safetensors file of ``input_ids`` int64[N, S], or, in Python, batches. Raises ``InputsError`` where the
    store takes none, or not one that was named, and where it is to be fitted and ``calibration`` is missing,
    too short, or no tokens of the model.
    """

    name: ClassVar[str] = "keep-kv"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = "keep keys and values in the store that is named"
    exact: ClassVar[bool] = False

    store: str
    layers: tuple[int, ...] = ()
    calibration: str | tuple[tuple[int, ...], ...] = ()

    def assign(self, question: SiteQuestion) -> SiteAnswer:
        store = store_named(self.store, question.stores)
        joined = {*question.assigned.joins, *question.assigned.joins.values()}
        owners = [i for i, site in enumerate(question.sites) if site.source == i and i not in joined]
        if not owners:
            raise InputsError(f"store {store} is left no attention: all write into joint stores (join-kv)")
        layers, refused = list(self.layers), ""
        if not layers:
            capacity = question.options.max_tokens
            reasons = {i: store.refuses(question.sites[i].spec, capacity) for i in owners}
            layers = [i for i, reason in reasons.items() if reason is None]
            left = [i for i in owners if reasons[i] is not None]
            if not layers:
                raise InputsError(f"store {store} takes none of {len(owners)} attentions: {reasons[left[0]]}")
            # Rings of a window are smaller apart: of another kind one serves all that read the same.
            layers = [i for i in layers if not _is_served(i, layers, store, question)]
            if left:
                refused = f"; attention {left[0]} keeps {question.sites[left[0]].store}: {reasons[left[0]]}"
        kind = "exact" if store.exact else "lossy"
        reason = f"{store} ({kind}) for {len(layers)} of {len(owners)} attentions{refused}"
        assignment = CacheAssignment(dict.fromkeys(layers, str(store)))
        return SiteAnswer(assignment, reason=reason, fitted=self._fitted(store, layers, question))

    def _fitted(
        self, store: CacheStore, layers: Sequence[int], question: SiteQuestion
    ) -> dict[int, Mapping[str, torch.Tensor]]:
        if not store.needs_fit:
            if self.calibration:
                raise InputsError(
                    f"store {store} is not fitted to calibration tokens, and keep-kv was given some",
                    hint="leave calibration out",
                )
            return {}
        if not self.calibration:
            raise InputsError(
                f"store {store} is fitted to calibration tokens, and keep-kv was given none",
                hint='use("keep-kv", store=..., calibration=batches), batches of token ids',
            )
        program, options = question.program(), question.options
        sites = sites_of(program, question.stores, options.max_batch, options.max_tokens)
        check_indices([site.region for site in sites], layers, f"the store {store}")
        for index in layers:
            if (reason := store.refuses(sites[index].spec, options.max_tokens)) is not None:
                where = sites[index].region.layer or sites[index].region.output.name
                raise InputsError(f"{where}: store {store} does not take attention {index}: {reason}")
        rows = rows_of(self.calibration).to(program.placeholder(program.tokens).meta["val"].device)
        batches = [(part, None) for part in torch.split(rows, 1)]
        found = fit_stores(program, sites, {index: [store] for index in layers}, batches)
        return {index: tensors for (index, _), tensors in found.items()}


def _is_served(index: int, layers: Sequence[int], store: CacheStore, question: SiteQuestion) -> bool:
    """Whether the ``store`` of an earlier one of ``layers`` has what attention ``index`` reads."""
    first = first_reader(question.regions, index)
    if first == index or first not in layers:
        return False
    here, there = question.sites[index].spec, question.sites[first].spec
    refused = store.refuses(replace(here, shares=True), question.options.max_tokens)
    return refused is None and here.mask.window == there.mask.window
