"""normalize: drop calls that compute nothing, so that the passes after it see what is computed.

Before::

    %3 = aten.linear(%0, weight, bias) : f32[4,8]           # up
    %4 = aten.dropout(%3, 0.0, True) : f32[4,8]             # drop
    %5 = aten.to.dtype(%4, f32) : f32[4,8]
    %6 = aten.view(%5, [4, 8]) : f32[4,8]
    %7 = aten.gelu(%6) : f32[4,8]

After::

    %3 = aten.linear(%0, weight, bias) : f32[4,8]           # up
    %4 = aten.gelu(%3) : f32[4,8]

Values, gradients and aliasing stay bitwise what they were; where that is not sure, the call stays and
a reason is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from graphopt.candidate import Candidate, CostDelta, NearMiss, Reason
from graphopt.edit import Edit
from graphopt.passes import Pass, PassContext, Proposal
from graphopt.program import Level, Program
from graphopt_passes.identity import Identities

__all__ = ["Normalize"]

_aten = torch.ops.aten

DROPOUTS = frozenset(
    {
        _aten.dropout.default,
        _aten.feature_dropout.default,
        _aten.alpha_dropout.default,
        _aten.feature_alpha_dropout.default,
    }
)

# These hand their input through, the tensor itself, where there is nothing to convert.
CONVERSIONS: dict[Any, str] = {
    _aten.to.dtype: "drop-cast",
    _aten.to.dtype_layout: "drop-cast",
    _aten.to.device: "drop-cast",
    _aten.to.other: "drop-cast",
    _aten.type_as.default: "drop-cast",
    _aten.contiguous.default: "drop-contiguous",
}

VIEWS = frozenset(
    {
        _aten.alias.default,
        _aten.broadcast_to.default,
        _aten.expand.default,
        _aten.expand_as.default,
        _aten.flatten.using_ints,
        _aten.movedim.int,
        _aten.movedim.intlist,
        _aten.narrow.default,
        _aten.permute.default,
        _aten.reshape.default,
        _aten.reshape_as.default,
        _aten.slice.Tensor,
        _aten.squeeze.default,
        _aten.squeeze.dim,
        _aten.squeeze.dims,
        _aten.swapaxes.default,
        _aten.transpose.int,
        _aten.view.default,
        _aten.view_as.default,
    }
)

_NEUTRAL = {_aten.add.Tensor: 0, _aten.add.Scalar: 0, _aten.mul.Tensor: 1, _aten.mul.Scalar: 1}


@dataclass(frozen=True)
class Normalize(Pass):
    """Drops dropout that is off, conversions to what a tensor is already, views of the same shape and
    detaching of what has no gradient. Adding 0 and multiplying by 1 are not exact and stay."""

    name: ClassVar[str] = "normalize"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = "drop calls that compute nothing, bit for bit"

    def propose(self, program: Program, ctx: PassContext) -> Iterable[Proposal]:
        known = Identities(program, trains=ctx.mode == "train")
        found: list[Proposal] = []
        # Backwards: whether a call may go depends on which of its readers stay.
        for node in reversed(list(program.nodes())):
            rule = _rule_of(node, known)
            if not rule:
                continue
            reason = _guard(node, rule, known)
            if reason is not None:
                found.append(NearMiss(rule, node.name, 1, 1, reason))
                continue
            known.drop(node)
            delta = CostDelta(seconds=0.0 - ctx.cost.node(node).seconds)
            id_ = f"{rule}@{node.name}"
            found.append(Candidate(id_, self.name, (node.name,), delta, _dropping(node.name)))
        return reversed(found)


def _rule_of(node: fx.Node, known: Identities) -> str:
    """The rule whose pattern a call matches, or ``""``."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return ""
    target = node.target
    if target in _NEUTRAL:
        other = node.args[1] if len(node.args) > 1 else None
        is_neutral = type(other) in (int, float) and other == _NEUTRAL[target]
        return "drop-neutral" if is_neutral and known.has_floats(node) else ""
    if not known.same_type(node):
        return ""
    if target in DROPOUTS:
        probability, training = node.args[1:3]
        return "drop-dropout" if training is False or probability in (0, 0.0) else ""
    if target is _aten.detach.default:
        return "drop-detach"
    if target in VIEWS:
        # A reshape that copies has the type of its input and memory of its own.
        return "drop-view" if known.same_memory(node) else ""
    return CONVERSIONS.get(target, "")


def _guard(node: fx.Node, rule: str, known: Identities) -> Reason | None:
    """Why a call that matches must stay, or ``None``."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if rule == "drop-neutral":
        return _not_exact(node, known)
    if rule in ("drop-cast", "drop-contiguous") and not known.same_memory(node):
        return Reason("it is asked for a copy", (node.name,))
    if known.cuts_gradient(node, detaches=rule == "drop-detach"):
        return Reason("it cuts off a gradient", (source.name,))
    # A conversion that hands its input through leaves no trace in autograd.
    by_itself = rule in ("drop-cast", "drop-contiguous", "drop-detach")
    return known.written(node) or known.returned(node) or (None if by_itself else known.reorders(node))


def _not_exact(node: fx.Node, known: Identities) -> Reason:
    what = "adding 0" if node.target in (_aten.add.Tensor, _aten.add.Scalar) else "multiplying by 1"
    if not known.same_type(node):
        return Reason(f"{what} changes the type", (node.name,))
    if what == "adding 0":
        return Reason("adding 0 turns -0.0 into 0.0", (node.name,))
    return Reason("multiplying by 1 changes the bits of signalling NaNs", (node.name,))


def _dropping(name: str) -> Callable[[Edit], None]:
    def apply(edit: Edit) -> None:
        node = edit.node(name)
        # Not the input that was seen when this was proposed: that may be gone by now.
        source = node.args[0]
        assert isinstance(source, fx.Node)
        edit.replace(node, source)
        edit.erase(node)

    return apply
