"""lossy-cache: stores of fewer bytes where the exact ones do not fit, with the least change of predictions.

Before::

    attentions 0 .. 29: full, 90 MiB; Budget(cache="26MiB")

After::

    attentions 0, 4, ..: quant{bits=4}    1, 2, ..: quant{key_bits=4,value_bits=3}    ..: 26 MiB

Each attention and store is priced alone by what it does to predictions on calibration tokens, and the least
sum that fits is taken (``graphopt.decoding.allocate``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from graphopt.budget import format_bytes
from graphopt.decoding.allocate import allocate_stores, store_choices
from graphopt.decoding.assignment import store_named
from graphopt.decoding.capture import Uncached
from graphopt.decoding.fitting import fit_stores
from graphopt.decoding.site_pass import SiteAnswer, SitePass, SiteQuestion
from graphopt.decoding.sites import sites_of, stored_bytes
from graphopt.decoding.stores import CacheStore
from graphopt.errors import InputsError
from graphopt.program import Level
from graphopt.tensors_file import TensorsFileError, read_tensors

__all__ = ["LossyCache"]

_LEAST_TOKENS = 128
"""Fewer tokens say too little of predictions."""


@dataclass(frozen=True)
class LossyCache(SitePass):
    """Allocates stores: the least change of predictions within ``Budget(cache=...)``, or the fewest bytes
    within ``max_kl`` nats a token.

    ``calibration``: a safetensors file with ``input_ids`` int64 [N, S] and, where there is padding,
    ``attention_mask`` [N, S]. ``stores``: those to choose among beside the exact ones, as they are spelled;
    without, what each lossy store that is registered offers. Raises ``InputsError`` for calibration that
    cannot be read or has fewer than 128 tokens, and ``BudgetError`` where nothing fits.
    """

    name: ClassVar[str] = "lossy-cache"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = "keep keys and values in fewer bytes where the budget asks for it"
    exact: ClassVar[bool] = False
    on_demand: ClassVar[bool] = True

    calibration: str = ""
    stores: tuple[str, ...] = ()
    max_kl: float = 0.0

    def assign(self, question: SiteQuestion) -> SiteAnswer:
        batch, capacity = question.options.max_batch, question.options.max_tokens
        if joins := question.assigned.joins:
            raise InputsError(
                f"pass 'lossy-cache' cannot price attention {min(joins)}, which writes into the store of "
                f"attention {joins[min(joins)]}: prices are those of single attentions",
                hint="leave out lossy-cache or join-kv",
            )
        exact = stored_bytes(question.sites, batch, capacity)
        bound = question.bound
        if bound is not None and exact <= bound:
            return SiteAnswer(question.assigned, reason=f"exact stores fit: {format_bytes(exact)}")
        if bound is None and not self.max_kl:
            return SiteAnswer(question.assigned, reason="nothing bounds stores: no Budget(cache=), no max_kl")
        batches = self._batches(question.uncached)
        uncached, sites = question.uncached, question.sites
        assigned = question.assigned
        if assigned.sources or assigned.streams:
            # Prices are those of the model that shares.
            uncached = question.program()
            sites = sites_of(uncached, question.stores, batch, capacity)
        offered = self._offered(question)
        own = [index for index, site in enumerate(sites) if site.source == index]
        taken = {i: [s for s in offered if s.refuses(sites[i].spec, capacity) is None] for i in own}
        fitted = fit_stores(uncached, sites, taken, batches)
        choices = store_choices(
            uncached, sites, offered, batches, batch, capacity,
            lambda done, of: question.tell(f"lossy-cache: {done} of {of} stores priced"),
            fitted,
        )  # fmt: skip
        found = allocate_stores(
            uncached, sites, choices, offered, batches, bound, self.max_kl or None, fitted
        )
        reason = (
            f"{format_bytes(exact)} -> {format_bytes(found.bytes)}; KL {found.measured:.3g} nats a token "
            f"(sum of prices {found.predicted:.3g}) on {found.tokens} tokens"
        )
        if found.gave_up:
            reason = f"exact stores are left: no others were measured to stay within max_kl={self.max_kl:g}"
        return SiteAnswer(
            found.assignment, reason=reason, divergence=found.measured, tokens=found.tokens, allocation=found,
            fitted={i: fitted[i, text] for i, text in found.assignment.stores.items() if (i, text) in fitted},
        )  # fmt: skip

    def _offered(self, question: SiteQuestion) -> list[CacheStore]:
        if self.stores:
            return [store_named(text, question.stores) for text in self.stores]
        return [store for kind in question.stores.values() if not kind.exact for store in kind.choices()]

    def _batches(self, uncached: Uncached) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Sequences one by one: logits of all are not needed at once."""
        if not self.calibration:
            raise InputsError(
                "pass 'lossy-cache' needs calibration tokens to price stores with",
                hint='allow=("lossy-cache{calibration=FILE}",), a safetensors file with input_ids [N, S]',
            )
        try:
            tensors, _ = read_tensors(Path(self.calibration))
        except (OSError, TensorsFileError) as error:
            raise InputsError(f"calibration {self.calibration!r} cannot be read: {error}") from error
        ids = tensors.get("input_ids")
        if ids is None or ids.dim() != 2 or ids.is_floating_point() or ids.numel() < _LEAST_TOKENS:
            what = "no input_ids" if ids is None else f"input_ids {ids.dtype} {list(ids.shape)}"
            raise InputsError(
                f"calibration {self.calibration!r} has {what}: expected token ids [N, S], {_LEAST_TOKENS} or "
                "more"
            )
        if int(ids.max()) >= uncached.vocabulary:
            raise InputsError(
                f"calibration {self.calibration!r} has token {int(ids.max())}: the model has "
                f"{uncached.vocabulary} of them"
            )
        device = uncached.placeholder(uncached.tokens).meta["val"].device
        mask = tensors.get("attention_mask") if uncached.mask is not None else None
        rows = torch.split(ids.long().to(device), 1)
        masks = [None] * len(rows) if mask is None else list(torch.split(mask.to(device), 1))
        return list(zip(rows, masks, strict=True))
