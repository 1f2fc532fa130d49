"""fuse-cross-entropy: a loss reads its logits once, and so does its gradient, which takes their memory.

Before::

    %7 = aten.to.dtype(%logits, f32) : f32[8192,128256]
    %8 = aten.cross_entropy_loss(%7, %labels) : f32[]

After::

    %7 = graphopt.cross_entropy(%logits, %labels, 'mean', -100, 0.0, 1.0, 0.0, f32, True) : (f32[], f32[8192])
    %8 = getitem(%7, 0) : f32[]

What autograd derives from ``cross_entropy_loss`` holds the logarithm of the softmax, as large as the logits
and twice as wide after a cast, and its gradient is a sum over each row before it is anything else. With a
log-sum-exp for each row the gradient of a logit needs that logit alone. For a code generator it is written
out in elementwise operators, which it may compute over the logits where nobody reads them any more.

Casts to a wider type, views, slices of rows, constant scales and a softcap before the loss go into the
operator, and log-sum-exps of the same logits, as a z-loss reads them, are its second result. Weights of
classes are an argument of it.

A loss of a linear layer may be computed in pieces as well (``linear-cross-entropy``), so there this is an
alternative, which the planner weighs. Elsewhere it is done where it is predicted to gain.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from graphopt.candidate import Candidate, CostDelta, NearMiss, Reason
from graphopt.edit import Edit
from graphopt.errors import PassError
from graphopt.passes import Pass, PassContext, Proposal
from graphopt.plugins import default_host
from graphopt.program import Level, Program
from graphopt.rules import argument
from graphopt_passes.linear_cross_entropy.facts import Facts
from graphopt_passes.linear_cross_entropy.match import (
    PASSED,
    REDUCTIONS,
    Match,
    Walk,
    follow,
    loss_refused,
    match_loss,
    rounded_scale,
)
from graphopt_passes.linear_cross_entropy.rewrite import hand_out, rows_of, targets_of
from graphopt_passes.linear_cross_entropy.sums import ORDERS, SUM, sum_refused

__all__ = ["FuseCrossEntropy", "Logits", "match_logits"]

_LOSS = torch.ops.aten.cross_entropy_loss.default
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FEWEST = 2048
"""Classes of a row from which on code generators do not hold it in registers."""


@dataclass(frozen=True)
class Logits:
    """A loss of logits that exist. ``chain`` are the calls from ``source``, which stays, to the ``loss``;
    ``sums`` give log-sum-exps of the logits that the loss reads. ``row_steps`` select rows of ``source``."""

    loss: fx.Node
    source: fx.Node
    chain: tuple[fx.Node, ...]
    sums: tuple[fx.Node, ...]
    target: fx.Node
    class_weight: fx.Node | None
    reduction: str
    ignore_index: int
    label_smoothing: float
    logit_scale: float
    softcap: float
    row_steps: tuple[fx.Node, ...]
    first: fx.Node

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return (*self.chain, *self.sums, self.loss)

    @property
    def operands(self) -> tuple[fx.Node, ...]:
        return (self.source,)


def match_logits(loss: fx.Node, position: Callable[[fx.Node], int]) -> Logits | Reason:
    """What the ``cross_entropy_loss`` call ``loss`` is of, or why no operator can take its place.
    ``position`` tells the order of calls."""
    if (refused := loss_refused(loss)) is not None:
        return refused
    values = argument(loss, "self").meta["val"]
    if values.dim() != 2:
        return Reason("the classes are not the last dimension", (loss.name,))
    chain, others = _chain(loss)
    columns = values.shape[-1]
    for start in range(len(chain) + 1):
        walk, steps = Walk(), chain[start:]
        if any(follow(walk, call, columns, steps[k + 1 :]) is not None for k, call in enumerate(steps)):
            continue
        source = steps[0].args[0] if steps else argument(loss, "self")
        assert isinstance(source, fx.Node)
        read_by = others[start:]
        sums = _sums(read_by, steps, source, argument(loss, "target"))
        if any(len(taken) < len(calls) for taken, calls in zip(sums[1:], read_by[1:], strict=True)):
            continue
        found = tuple(call for calls in sums for call in calls)
        return Logits(
            loss, source, tuple(steps), found, argument(loss, "target"), argument(loss, "weight"),
            REDUCTIONS[argument(loss, "reduction")], argument(loss, "ignore_index"),
            float(argument(loss, "label_smoothing")), rounded_scale(walk.scale), walk.softcap,
            tuple(walk.row_steps), min((loss, *steps, *found), key=position),
        )  # fmt: skip
    raise AssertionError("a loss of what it reads itself always matches")


def _chain(loss: fx.Node) -> tuple[list[fx.Node], list[list[fx.Node]]]:
    """Calls before the loss that may go into the operator, and who else reads what: the log-sum-exps of what
    the first reads, of what the second does, ..."""
    chain: list[fx.Node] = []
    reader, node = loss, argument(loss, "self")
    others: list[list[fx.Node]] = []
    while True:
        beside = [user for user in node.users if user is not reader]
        others.insert(0, [user for user in beside if user.target is SUM])
        if node.target not in PASSED or node.target in ORDERS or len(others[0]) < len(beside):
            return chain, others
        chain.insert(0, node)
        reader, node = node, node.args[0]


def _sums(
    others: list[list[fx.Node]], steps: list[fx.Node], source: fx.Node, target: fx.Node
) -> list[list[fx.Node]]:
    """Those of the log-sum-exps that the operator gives as well."""
    return [
        [call for call in calls if sum_refused(call, steps[:index], steps[index:], source, target) is None]
        for index, calls in enumerate(others)
    ]


@dataclass(frozen=True)
class FuseCrossEntropy(Pass):
    """Fuses cross entropy of logits. ``everywhere``: also on devices that the operator has no kernel for and
    where classes are few, which gains nothing."""

    name: ClassVar[str] = "fuse-cross-entropy"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = "read logits once for their loss, and once for its gradient"
    after: ClassVar[dict[str, str]] = {
        "normalize": "casts to the same type hide what the loss is of",
        "linear-cross-entropy": "it looks for the loss that models write",
        "chunk": "it knows the operators that models write",
    }

    everywhere: bool = False

    def propose(self, program: Program, ctx: PassContext) -> Iterable[Proposal]:
        losses = list(program.nodes(_LOSS))
        if not losses:
            return
        facts = Facts.of(program, trains=ctx.mode == "train")
        for loss in losses:
            if loss not in facts.line.position:
                continue
            found = match_logits(loss, facts.line.position.__getitem__)
            reason = found if isinstance(found, Reason) else self._refused(found) or facts.reason(found)
            if reason is not None:
                count = 1 if isinstance(found, Reason) else len(found.nodes)
                yield NearMiss(self.name, loss.name, count, count, reason)
            elif isinstance(found, Logits):
                yield self._candidate(found, ctx)

    def _refused(self, match: Logits) -> Reason | None:
        value = match.source.meta["val"]
        if "cross-entropy" not in default_host().kernels():
            return Reason("the kernel cross-entropy is not installed", (match.loss.name,))
        if value.dtype not in _DTYPES:
            name = str(value.dtype).removeprefix("torch.")
            return Reason(f"no kernel takes {name}", (match.source.name,))
        if self.everywhere:
            return None
        if not value.is_cuda:
            kind = value.device.type
            return Reason(f"no kernel runs on {kind}, where the operator gains nothing", (match.loss.name,))
        columns = value.shape[-1]
        if not isinstance(columns, int):
            return Reason("the number of classes is known at run time alone", (match.source.name,))
        if columns < _FEWEST:
            why = f"code generators hold rows of {columns} classes in registers"
            return Reason(why, (match.source.name,))
        return None

    def _candidate(self, match: Logits, ctx: PassContext) -> Candidate:
        return Candidate(
            f"{self.name}@{match.loss.name}",
            self.name,
            tuple(node.name for node in match.nodes),
            _gain(match, ctx),
            _writing(match.loss.name, ctx.emit != "eager"),
            exactness="reassociated",
            alternative=isinstance(match_loss(match.loss, self.name), Match),
        )


def _gain(match: Logits, ctx: PassContext) -> CostDelta:
    """The forward reads the logits once less, and the backward the gradient of the logarithm of the softmax;
    values in between are neither written nor read."""
    value = match.source.meta["val"]
    size = value.numel() * value.element_size()
    between = sum(
        node.meta["val"].numel() * node.meta["val"].element_size()
        for node in match.chain
        if node.meta["val"].dtype is not value.dtype
    )
    moved = (2 if ctx.mode == "train" else 1) * (size + between)
    return CostDelta(seconds=-moved / ctx.cost.device.copy_bytes_per_second)


def _writing(name: str, written_out: bool) -> Callable[[Edit], None]:
    def apply(edit: Edit) -> None:
        # Matched again: the program may be another copy of the one that this was proposed for.
        order = {node: number for number, node in enumerate(edit.graph.nodes)}
        match = match_logits(edit.node(name), order.__getitem__)
        if isinstance(match, Reason):
            raise PassError(f"{FuseCrossEntropy.name}: {name!r} no longer matches: {match}")
        edit.rule = "cross-entropy"

        def call(target: Any, *args: Any) -> fx.Node:
            return edit.call_before(match.loss, target, args, replaces=[match.loss])

        rows, shaped = rows_of(call, match.source, match.source.meta["val"].dim(), match.row_steps)
        results = call(
            torch.ops.graphopt.cross_entropy.default,
            rows,
            targets_of(call, match.target),
            match.reduction,
            match.ignore_index,
            match.label_smoothing,
            match.logit_scale,
            match.softcap,
            match.loss.meta["val"].dtype,
            written_out,
            *(() if match.class_weight is None else (match.class_weight,)),
        )
        hand_out(edit, call, match, call(operator.getitem, results, 0), results, shaped)

    return apply
