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

With ``preset="layer-condensed", warmup=2``, in training programs alone::

    attentions 1 to 5: keys, values of attention 6, of the iteration before; attentions 0, 6 and 7: their own

Projections, norms, rotary embeddings and the store of attention 1 are gone, from program, weights and FLOPs
(KVSharer, arXiv 2410.18517; CLA, arXiv 2405.12981; SwiftKV, arXiv 2410.03960; LCKV, arXiv 2405.10637). It
changes results: models that were not trained so lose by it. Listing it asks for it: it needs no ``allow``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from graphopt.candidate import Candidate, CostDelta, Declined
from graphopt.decoding.assignment import CacheAssignment, plan_of
from graphopt.decoding.look import Look
from graphopt.decoding.regions import Region
from graphopt.decoding.reroot import check_streams
from graphopt.decoding.site_pass import SiteAnswer, SitePass, SiteQuestion
from graphopt.decoding.sources import check_indices, check_sources
from graphopt.errors import InputsError, UnknownNameError
from graphopt.passes import PassContext, Proposal, pass_text
from graphopt.program import Level, Program
from graphopt.provenance import note_of
from graphopt_passes.share_kv.calibration import rows_from_batches, rows_of
from graphopt_passes.share_kv.condense import Condensing, repeated
from graphopt_passes.share_kv.presets import CONDENSED, PRESETS, condensed_plan, preset_plan, preset_streams
from graphopt_passes.share_kv.recover import recovered
from graphopt_passes.share_kv.search import candidate_pairs, search
from graphopt_passes.share_kv.training import check_trained, place_of, trained

__all__ = ["ShareKv"]

_WARMUP, _ITERATIONS, _BACKWARD_ITERATIONS = 2, 9, 2
"""As in the paper: two attentions that make their own; 7 iterations without gradients, and 2 with them."""

_MEASURED = 2048
"""Tokens on which predictions are compared where nothing is searched: logits of all are held."""


@dataclass(frozen=True)
class ShareKv(SitePass):
    """Lets attentions share keys and values, by one of three:

    ``plan``: pairs (consumer, source) of indices of attentions; in Python also a mapping ``{1: 0, 3: 2}``.
    ``preset``: ``"cla"`` (in every ``group`` that follow each other all read the first), ``"sandwich"`` (all
    but ``group`` at either end read one) or ``"swiftkv"`` (attentions behind ``early``, by default the one in
    the middle, make keys and values of the stream that enters it, and in every ``group`` of them all read the
    first); ``"layer-condensed"``: attentions but the first and the last, ``warmup`` in all (2), read those of
    the last one between. ``layers`` and ``max_kl``: so many consumers, and no more than
    that much KL in nats, chosen on ``calibration`` by ``score`` (``graphopt_share_scores``) among the
    ``reach`` nearest sources of each.

    Where a source comes later than its consumer, as with ``"layer-condensed"``, training programs are
    rewritten (docs/decoding.md): ``iterations`` (9) run what lies between, the last ``backward_iterations``
    (2) of them with gradients.

    ``calibration``: rows of token ids, a safetensors file of ``input_ids`` int64[N, S], or, in Python,
    batches. ``recover``: ``"local"`` fits queries and outputs of consumers to what they read now, and with
    ``"swiftkv"`` what makes keys and values too, for ``steps`` steps each on ``calibration``.
    """

    name: ClassVar[str] = "share-kv"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = "let attentions read the keys and values of others"
    exact: ClassVar[bool] = False
    after: ClassVar[dict[str, str]] = {
        "normalize": "identity casts and views hide masks from their readers",
        "fuse-attention": "attention that is written out has to be one call first",
        "causal-attention": "masks that only say causal are in the way",
    }
    before: ClassVar[dict[str, str]] = {
        "window-attention": "it reads masks, which that takes away",
        "grouped-attention": "it makes calls that repeat heads for that",
        "pack-linears": "projections of keys and values go, those of queries stay",
        "rotary": "how positions come into keys has to be seen",
        "fuse-dropout": "attention that draws a mask of its own is no call that it knows",
    }

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
    warmup: int | None = None
    iterations: int | None = None
    backward_iterations: int | None = None

    def __post_init__(self) -> None:
        searches = self.layers is not None or self.max_kl is not None
        asked = [
            name for name, given in (
                ("plan", bool(self.plan)), ("preset", bool(self.preset)), ("layers or max_kl", searches)
            ) if given
        ]  # fmt: skip
        if len(asked) > 1:
            raise InputsError(f"share-kv is given {' and '.join(asked)}: each says what is shared; give one")
        if self.preset and self.preset not in PRESETS and self.preset != CONDENSED:
            raise UnknownNameError("preset of share-kv", self.preset, [*PRESETS, CONDENSED])
        if self.early is not None and self.preset != "swiftkv":
            raise InputsError(
                f"share-kv: early={self.early} is an option of preset 'swiftkv': got preset={self.preset!r}"
            )
        self._check_condensed()
        for name, least in (
            ("layers", 1), ("max_kl", 0), ("reach", 1), ("steps", 1), ("warmup", 0), ("iterations", 2),
            ("backward_iterations", 1),
        ):  # fmt: skip
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

    def _check_condensed(self) -> None:
        """Raises ``InputsError`` for options of plans whose sources come later beside others."""
        if self.warmup is not None and self.preset != CONDENSED:
            raise InputsError(
                f"share-kv: warmup={self.warmup} is an option of preset {CONDENSED!r}: got "
                f"preset={self.preset!r}"
            )
        for name in ("iterations", "backward_iterations"):
            if getattr(self, name) is not None and not self.asked:
                raise InputsError(
                    f"share-kv: {name}={getattr(self, name)} is an option of plans with a source that comes "
                    f"later than its consumer, and of preset {CONDENSED!r}"
                )
        if not self.asked:
            return
        for name in ("group", "recover", "calibration"):
            if getattr(self, name):
                raise InputsError(
                    f"share-kv: {name} is none of the options of layer-condensed plans, which take warmup, "
                    "iterations and backward_iterations"
                )
        if self._backward_iterations > self._iterations:
            raise InputsError(
                f"share-kv: backward_iterations={self._backward_iterations} of iterations={self._iterations} "
                "are to pass gradients",
                hint=f"the nearest valid choice is backward_iterations={self._iterations}",
            )

    @property
    def asked(self) -> bool:
        later = any(source > consumer for consumer, source in self.plan)
        return later or self.preset == CONDENSED

    @property
    def _iterations(self) -> int:
        return _ITERATIONS if self.iterations is None else self.iterations

    @property
    def _backward_iterations(self) -> int:
        given = self.backward_iterations
        return min(_BACKWARD_ITERATIONS, self._iterations) if given is None else given

    def propose(self, program: Program, ctx: PassContext) -> Iterable[Proposal]:
        if not self.asked:
            return ()
        if any(note is not None and note.pass_id == self.name for note in map(note_of, program.nodes())):
            return (Declined(self.name, "keys and values are shared already"),)
        found = trained(program)
        plan = self._later_plan(len(found.regions), found.fits)
        check_indices(found.regions, [*plan, *plan.values()], "a part in sharing")
        self._check_training(found.regions, plan, ctx.mode == "train")
        check_trained(found, plan)
        condensing = Condensing(found, plan, self._iterations, self._backward_iterations)
        again = [node for group in condensing.groups for node in repeated(found, group)]
        seconds = (self._iterations - 1) * sum(ctx.cost.node(node).seconds for node in again)
        first = found.regions[min(plan)].output.name
        return (
            Candidate(
                f"{self.name}@{first}", self.name, (first,), CostDelta(seconds=seconds), condensing,
                exactness="lossy", metric="another model, to be trained so",
            ),
        )  # fmt: skip

    def _later_plan(self, count: int, fits: Callable[[int, int], str]) -> dict[int, int]:
        if self.preset:
            return condensed_plan(count, fits, _WARMUP if self.warmup is None else self.warmup)
        return plan_of(dict(self.plan))

    def _check_training(self, regions: Sequence[Region], plan: Mapping[int, int], training: bool) -> None:
        """Raises ``InputsError`` outside training, naming the first consumer of a later source."""
        consumer = next(consumer for consumer, source in plan.items() if source > consumer)
        if not training:
            raise InputsError(
                f"{place_of(regions[consumer])}: attention {consumer} cannot read the keys and values of "
                f"attention {plan[consumer]}, which come later: that works in training alone, where the "
                "program runs in iterations",
                hint="call a model in train(), with gradients on; elsewhere sources come earlier",
            )

    @classmethod
    def configured(cls, **options: Any) -> ShareKv:
        if "plan" in options and not isinstance(options["plan"], tuple):
            # It says what is wrong with what is no mapping of indices.
            options["plan"] = tuple(plan_of(options["plan"]).items())
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
        if self.asked:
            plan = self._later_plan(len(question.regions), question.fits)
            check_indices(question.regions, [*plan, *plan.values()], "a part in sharing")
            self._check_training(question.regions, plan, False)
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
