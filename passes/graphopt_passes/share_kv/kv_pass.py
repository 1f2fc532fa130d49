"""share-kv: attentions read the keys and values of earlier ones, in place of making their own.

Before::

    attention 0: keys, values <- x0;   store 0
    attention 1: keys, values <- x1;   store 1

After, with ``plan={1: 0}``::

    attention 0: keys, values <- x0;   store 0
    attention 1:                       store 0

Projections, norms, rotary embeddings and the store of attention 1 are gone, from program, weights and FLOPs
(KVSharer, arXiv 2410.18517; CLA, arXiv 2405.12981). It changes results: models that were not trained so lose
by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from graphopt.decoding.assignment import CacheAssignment
from graphopt.decoding.site_pass import SiteAnswer, SitePass, SiteQuestion
from graphopt.program import Level

__all__ = ["ShareKv"]


@dataclass(frozen=True)
class ShareKv(SitePass):
    """Lets attentions share keys and values.

    ``plan``: pairs (consumer, source) of indices of attentions; in Python also a mapping ``{1: 0, 3: 2}``.
    """

    name: ClassVar[str] = "share-kv"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = "let attentions read the keys and values of earlier ones"
    exact: ClassVar[bool] = False

    plan: tuple[tuple[int, int], ...] = ()

    @classmethod
    def configured(cls, **options: Any) -> ShareKv:
        if "plan" in options and isinstance(options["plan"], Mapping):
            # The assignment says what is wrong with a mapping.
            options["plan"] = tuple(CacheAssignment(sources=options["plan"]).sources.items())
        made = super().configured(**options)
        assert isinstance(made, ShareKv)
        return made

    def assign(self, question: SiteQuestion) -> SiteAnswer:
        sources = dict(self.plan)
        return SiteAnswer(CacheAssignment(sources=sources), reason=f"{len(sources)} as planned")
