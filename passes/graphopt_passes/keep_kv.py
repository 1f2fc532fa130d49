"""keep-kv: attentions keep keys and values in the store that is named.

Before::

    attention 0: full        attention 1: full        attention 2: ring

After, with ``store="quant{bits=4}"``::

    attention 0: quant       attention 1: quant       attention 2: quant, of the window's blocks

A store that is not exact changes results; the report says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.decoding.assignment import CacheAssignment, store_named
from graphopt.decoding.site_pass import SiteAnswer, SitePass, SiteQuestion
from graphopt.errors import InputsError
from graphopt.program import Level

__all__ = ["KeepKv"]


@dataclass(frozen=True)
class KeepKv(SitePass):
    """Gives attentions the store ``store`` (``graphopt_stores``), spelled with its options.

    ``layers``: indices of attentions; without, all that keep keys and values of their own and that the store
    takes. Raises ``InputsError`` where the store takes none, or not one that was named.
    """

    name: ClassVar[str] = "keep-kv"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = "keep keys and values in the store that is named"
    exact: ClassVar[bool] = False

    store: str
    layers: tuple[int, ...] = ()

    def assign(self, question: SiteQuestion) -> SiteAnswer:
        store = store_named(self.store, question.stores)
        owners = [i for i, site in enumerate(question.sites) if site.source == i]
        layers, refused = list(self.layers), ""
        if not layers:
            capacity = question.options.max_tokens
            reasons = {i: store.refuses(question.sites[i].spec, capacity) for i in owners}
            layers = [i for i, reason in reasons.items() if reason is None]
            left = [i for i in owners if reasons[i] is not None]
            if not layers:
                raise InputsError(f"store {store} takes none of {len(owners)} attentions: {reasons[left[0]]}")
            if left:
                refused = f"; attention {left[0]} keeps {question.sites[left[0]].store}: {reasons[left[0]]}"
        kind = "exact" if store.exact else "lossy"
        reason = f"{store} ({kind}) for {len(layers)} of {len(owners)} attentions{refused}"
        return SiteAnswer(CacheAssignment(dict.fromkeys(layers, str(store))), reason=reason)
