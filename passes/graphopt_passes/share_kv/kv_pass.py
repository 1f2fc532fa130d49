"""share-kv: attentions read the keys and values of earlier ones, in place of making their own.

Before::

    attention 0: keys, values <- x0;   store 0
    attention 1: keys, values <- x1;   store 1

After, with ``plan={1: 0}``::

    attention 0: keys, values <- x0;   store 0
    attention 1:                       store 0

With ``preset="swiftkv", early=0``::

    attention 0: keys, values <- x0;   store 0
    attention 1: keys, values <- x0;   store 1        prompts do not go through what is behind x0

Projections, norms, rotary embeddings and the store of attention 1 are gone, from program, weights and FLOPs
(KVSharer, arXiv 2410.18517; CLA, arXiv 2405.12981; SwiftKV, arXiv 2410.03960). It changes results: models
that were not trained so lose by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from graphopt.decoding.assignment import CacheAssignment
from graphopt.decoding.look import Look
from graphopt.decoding.reroot import check_streams
from graphopt.decoding.site_pass import SiteAnswer, SitePass, SiteQuestion
from graphopt.decoding.sources import check_sources
from graphopt.errors import InputsError
from graphopt.passes import pass_text
from graphopt.program import Level
from graphopt_passes.share_kv.calibration import rows_from_batches, rows_of
from graphopt_passes.share_kv.presets import preset_plan, preset_streams
from graphopt_passes.share_kv.recover import recovered
from graphopt_passes.share_kv.search import candidate_pairs, search

__all__ = ["ShareKv"]

_MEASURED = 2048
"""Tokens on which predictions are compared where nothing is searched: logits of all are held."""


@dataclass(frozen=True)
class ShareKv(SitePass):
    """Lets attentions share keys and values, by one of three:

    ``plan``: pairs (consumer, source) of indices of attentions; in Python also a mapping ``{1: 0, 3: 2}``.
    ``preset``: ``"cla"`` (in every ``group`` that follow each other all read the first), ``"sandwich"`` (all
    but ``group`` at either end read one) or ``"swiftkv"`` (attentions behind ``early``, by default the one in
    the middle, make keys and values of the stream that enters it, and in every ``group`` of them all read the
    first). ``layers`` and ``max_kl``: so many consumers, and no more than
    that much KL in nats, chosen on ``calibration`` by ``score`` (``graphopt_share_scores``) among the
    ``reach`` nearest sources of each.

    ``calibration``: rows of token ids, a safetensors file of ``input_ids`` int64[N, S], or, in Python,
    batches. ``recover``: ``"local"`` fits queries and outputs of consumers to what they read now, and with
    ``"swiftkv"`` what makes keys and values too, for ``steps`` steps each on ``calibration``.
    """

    name: ClassVar[str] = "share-kv"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = "let attentions read the keys and values of earlier ones"
    exact: ClassVar[bool] = False

    plan: tuple[tuple[int, int], ...] = ()
    preset: str = ""
    group: int | None = None
    early: int | None = None
    layers: int | None = None
    max_kl: float | None = None
    score: str = "single-kl"
    reach: int = 3
    calibration: str | tuple[tuple[int, ...], ...] = ()
    recover: str = ""
    steps: int = 200

    def __post_init__(self) -> None:
        searches = self.layers is not None or self.max_kl is not None
        asked = [
            name for name, given in (
                ("plan", bool(self.plan)), ("preset", bool(self.preset)), ("layers or max_kl", searches)
            ) if given
        ]  # fmt: skip
        if len(asked) > 1:
            raise InputsError(f"share-kv is given {' and '.join(asked)}: each says what is shared; give one")
        if self.early is not None and self.preset != "swiftkv":
            raise InputsError(
                f"share-kv: early={self.early} is an option of preset 'swiftkv': got preset={self.preset!r}"
            )
        for name, least in (("layers", 1), ("max_kl", 0), ("reach", 1), ("steps", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputsError(f"share-kv: {name}={value}: expected {least} or more")
        if self.recover not in ("", "local"):
            raise InputsError(f"share-kv: recover={self.recover!r}: the nearest valid choice is 'local'")
        if (searches or self.recover) and not self.calibration:
            what = "a search" if searches else "recovery"
            raise InputsError(
                f"share-kv: {what} needs calibration: batches of token ids that the model is used for",
                hint='use("share-kv", ..., calibration=batches), or name what is shared with plan=',
            )

    @classmethod
    def configured(cls, **options: Any) -> ShareKv:
        if "plan" in options and not isinstance(options["plan"], tuple):
            # The assignment says what is wrong with what is no mapping of indices.
            options["plan"] = tuple(CacheAssignment(sources=options["plan"]).sources.items())
        given = options.get("calibration", ())
        if not isinstance(given, str):
            options["calibration"] = rows_from_batches(given)
        made = super().configured(**options)
        assert isinstance(made, ShareKv)
        return made

    def spelled(self) -> str:
        text = super().spelled()
        if self.calibration and not isinstance(self.calibration, str):
            rows = f"[{len(self.calibration)} rows of token ids]"
            bare = pass_text(ShareKv(self.plan, calibration=self.calibration)).split("calibration=")[1]
            text = text.replace(bare.removesuffix("}"), rows)
        return text

    def assign(self, question: SiteQuestion) -> SiteAnswer:
        rows = rows_of(self.calibration) if self.calibration else None
        look = None
        divergence = None
        streams: dict[int, int] = {}
        if self.layers is not None or self.max_kl is not None:
            assert rows is not None
            spec = question.host.share_score(self.score)
            pairs = candidate_pairs(len(question.regions), question.fits, self.reach)
            look = Look(question.uncached, question.regions, rows)
            found = search(look, pairs, spec, self.layers, self.max_kl, question.tell)
            sources, divergence = found.sources, found.measured
            reason = f"{len(sources)} chosen by {self.score} of {len(pairs)} pairs"
            if found.predicted is not None:
                reason += f", KL {found.predicted:.3g} by single pairs, {found.measured:.3g} together"
        elif self.preset:
            count, first = len(question.regions), 0
            if self.preset == "swiftkv":
                streams = preset_streams(count, self.early)
                first = min(streams)
            sources = preset_plan(self.preset, count, question.fits, self.group, first)
            streams = {index: early for index, early in streams.items() if index not in sources}
            check_streams(question.uncached, question.regions, streams)
            reason = f"{len(sources)} by preset {self.preset}"
            if streams:
                reason += f", {len(streams)} out of what enters attention {min(streams.values())}"
        else:
            sources, reason = dict(self.plan), f"{len(self.plan)} as planned"
        if not sources and not streams:
            return SiteAnswer(CacheAssignment(), reason=reason)
        assignment = CacheAssignment(sources=sources, streams=streams)
        weights: Mapping[str, torch.Tensor] = {}
        if self.recover:
            assert rows is not None
            specs = [site.spec for site in question.sites]
            check_sources(question.uncached, question.regions, specs, sources)
            some = rows[: max(1, _MEASURED // rows.shape[1])]
            look = look or Look(question.uncached, question.regions, some)
            before = look.divergence(sources, streams=streams)
            weights = recovered(
                question.uncached, question.regions, sources, rows, self.steps, question.tell, streams
            )
            divergence = look.divergence(sources, weights, streams)
            reason += f"; fitted to what they read: KL {before:.3g} -> {divergence:.3g}"
        tokens = look.tokens if look is not None else 0
        return SiteAnswer(assignment, weights, reason, divergence, tokens)
