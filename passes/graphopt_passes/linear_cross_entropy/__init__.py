"""linear-cross-entropy: compute a loss over a large vocabulary without ever holding the whole logits.

Before::

    %3 = aten.linear(%x, lm_head.weight) : bf16[4,2048,128256]
    %4 = aten.to.dtype(%3, f32) : f32[4,2048,128256]
    %5 = aten.view(%4, [-1, 128256]) : f32[8192,128256]
    %6 = aten.cross_entropy_loss(%5, %labels) : f32[]

After::

    %3 = aten.flatten.using_ints(%x, 0, 1) : bf16[8192,2048]
    %4 = graphopt.linear_cross_entropy(%3, lm_head.weight, none, %labels, 8, 'mean', ...) : (f32[], f32[8192])
    %5 = getitem(%4, 0) : f32[]

Views, casts to a wider type, constant scales and a softcap between the two go into the operator; slices
of rows are taken of the input instead. Labels stay as they are computed. Log-sum-exps of the same logits,
which a z-loss adds to the loss, are the operator's second result. Where classes weigh differently the rows'
losses are multiplied and summed up behind the operator.

Whether that pays depends on the budget and on what else would make room, so each candidate is an
alternative, which the planner weighs (docs/kernels.md). ``forward`` computes the gradients with the loss, at
no more arithmetic, in chunks of rows; they are then held until the backward. ``recompute`` computes the
logits twice and holds nothing. ``forward-blocks`` and ``blocks`` do the like in blocks of classes, each
gradient rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from graphopt.candidate import Candidate, NearMiss, Reason
from graphopt.edit import Edit
from graphopt.errors import PassError
from graphopt.passes import Pass, PassContext, Proposal
from graphopt.plugins import default_host
from graphopt.program import Level, Program
from graphopt_passes.linear_cross_entropy.facts import Facts
from graphopt_passes.linear_cross_entropy.match import Match, match_loss
from graphopt_passes.linear_cross_entropy.modes import KERNELS, MODES, cuts_classes, holds_gradients
from graphopt_passes.linear_cross_entropy.price import LossPrices
from graphopt_passes.linear_cross_entropy.rewrite import rewrite

__all__ = ["LinearCrossEntropy"]

_LOSS = torch.ops.aten.cross_entropy_loss.default


@dataclass(frozen=True)
class LinearCrossEntropy(Pass):
    """Offers to compute a loss in so many ``chunks``, each of ``least_rows`` rows or more: with fewer,
    the products of matrices are far from a device's peak. And in ``blocks`` of so many classes, at least
    two of them."""

    chunks: tuple[int, ...] = (2, 4, 8, 16)
    blocks: tuple[int, ...] = (4096,)
    least_rows: int = 256

    name: ClassVar[str] = "linear-cross-entropy"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = "compute the loss in pieces, so that the whole logits are never held"
    after: ClassVar[dict[str, str]] = {
        "normalize": "views and casts that do nothing hide which rows are read"
    }

    def propose(self, program: Program, ctx: PassContext) -> Iterable[Proposal]:
        losses = list(program.nodes(_LOSS))
        if not losses:
            return
        facts = Facts.of(program, trains=ctx.mode == "train")
        for loss in losses:
            found = match_loss(loss, self.name)
            if isinstance(found, Match):
                found = self._guard(found, facts) or found
            if isinstance(found, Match):
                yield from self._candidates(found, _output_mask(found, facts), ctx)
            elif found is not None:
                yield found

    def _guard(self, match: Match, facts: Facts) -> NearMiss | None:
        reason = _no_kernels(match) or facts.reason(match)
        if reason is None and not self._counts(match):
            least = min(self.chunks, default=0) * self.least_rows
            reason = Reason(
                f"it has {match.rows} rows: cutting them takes {least} or more", (match.loss.name,)
            )
        if reason is None:
            return None
        count = len(match.nodes)
        return NearMiss(self.name, match.loss.name, count, count, reason)

    def _counts(self, match: Match) -> list[int]:
        return [count for count in self.chunks if match.rows >= count * self.least_rows]

    def _cuts(self, match: Match, mode: str) -> list[int]:
        if cuts_classes(mode):
            return [block for block in self.blocks if match.columns >= 2 * block]
        return self._counts(match)

    def _candidates(
        self, match: Match, output_mask: tuple[bool, bool, bool], ctx: PassContext
    ) -> Iterable[Candidate]:
        # A loss scale would come too late for gradients in float16 that are rounded in the forward.
        # Who reads log-sum-exps adds to the gradient, and so do rows that weigh differently.
        ahead = any(output_mask) and match.by_row != "none" and match.dtype is not torch.float16
        ids = {
            (mode, cuts): f"{self.name}@{match.loss.name}/{mode}/{cuts}"
            for mode in MODES
            if not holds_gradients(mode) or (ahead and not match.sums)
            for cuts in self._cuts(match, mode)
        }
        prices = LossPrices(match, ctx.cost, ctx.emit, output_mask)
        for (mode, cuts), id_ in ids.items():
            yield Candidate(
                id_,
                self.name,
                tuple(node.name for node in match.nodes),
                prices.delta(mode, cuts),
                _writing(match.loss.name, mode, cuts, output_mask),
                exactness="reassociated",
                conflicts=tuple(other for other in ids.values() if other != id_),
                alternative=True,
            )


def _output_mask(match: Match, facts: Facts) -> tuple[bool, bool, bool]:
    """Whether the gradients of input, weight and bias are needed."""
    if match.loss not in facts.trained:
        return (False, False, False)
    return (match.input in facts.trained, match.weight in facts.trained, match.bias in facts.trained)


def _no_kernels(match: Match) -> Reason | None:
    """Asking for the kernels also registers their operators."""
    missing = [name for name in sorted(KERNELS.values()) if name not in default_host().kernels()]
    if missing:
        return Reason(f"no plugin offers kernel {missing[0]!r}")
    return None


def _writing(name: str, mode: str, cuts: int, output_mask: tuple[bool, bool, bool]) -> Callable[[Edit], None]:
    def apply(edit: Edit) -> None:
        # Matched again: the program may be another copy of the one that this was proposed for.
        found = match_loss(edit.node(name), LinearCrossEntropy.name)
        if not isinstance(found, Match):
            why = "it is not the loss of a linear layer" if found is None else str(found.reason)
            raise PassError(f"{LinearCrossEntropy.name}: {name!r} no longer matches: {why}")
        edit.rule = f"{mode}/{cuts}"
        rewrite(edit, found, mode, cuts, output_mask)

    return apply
