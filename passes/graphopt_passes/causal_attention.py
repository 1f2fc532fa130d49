"""causal-attention: tell attention that its mask is the causal one, or that it masks nothing.

Before::

    %9 = aten.arange(16) ...   %20 = aten.expand(...) : bool[2,1,16,16]
    %31 = aten.scaled_dot_product_attention(%q, %k, %v, %20)

After::

    %31 = aten.scaled_dot_product_attention(%q, %k, %v, None, 0.0, True)

Whole models captured in one graph build their masks inside it, from sizes alone. Such a mask is a
constant. Comparisons of positions are decided by their vectors, whatever the size of the mask
(``mask_proof``); other masks are evaluated here, on the CPU, and compared element by element with the
triangle that ``is_causal`` stands for. Kernels that know the mask skip the half of the work that it
hides and never read it (Dao et al. 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx

from graphopt.candidate import Candidate, CostDelta, NearMiss, Reason
from graphopt.capture.aliasing import Aliases, alias_map
from graphopt.edit import Edit
from graphopt.passes import Pass, PassContext, Proposal
from graphopt.program import Level, Program
from graphopt_passes.constant_values import constant_value
from graphopt_passes.mask_proof import proven

__all__ = ["CausalAttention", "mask_verdict"]

_aten = torch.ops.aten
_ATTENTION = _aten.scaled_dot_product_attention.default

@dataclass(frozen=True)
class CausalAttention(Pass):
    """Replaces constant causal or empty masks by ``is_causal`` or none. No options."""

    name: ClassVar[str] = "causal-attention"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = "let attention kernels know a constant mask that is causal or empty"
    after: ClassVar[dict[str, str]] = {"normalize": "identity casts and views hide the mask from its readers"}

    def propose(self, program: Program, ctx: PassContext) -> Iterable[Proposal]:
        verdicts: dict[fx.Node, str | Reason] = {}
        aliases: Aliases | None = None
        for node in program.nodes(_ATTENTION):
            mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
            if not isinstance(mask, fx.Node):
                continue
            if mask not in verdicts:
                aliases = aliases or alias_map(program.graph)
                verdicts[mask] = mask_verdict(mask, aliases)
            verdict = verdicts[mask]
            if isinstance(verdict, Reason):
                yield NearMiss(self.name, node.name, 1, 2, verdict)
                continue
            cost = ctx.cost.node(node)
            size = mask.meta["val"]
            read = size.numel() * size.element_size() / ctx.cost.device.read_bytes_per_second
            saved = read + (cost.seconds / 2 if verdict == "causal" else 0.0)
            yield Candidate(
                f"{self.name}@{node.name}", self.name, (node.name,), CostDelta(seconds=-saved),
                _telling(node.name, causal=verdict == "causal"), exactness="reassociated",
            )  # fmt: skip


def mask_verdict(mask: fx.Node, aliases: Aliases) -> str | Reason:
    """``"causal"``, ``"empty"``, or why the mask is neither."""
    value = mask.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        return Reason("the mask is not a matrix", (mask.name,))
    if verdict := proven(mask, aliases):
        return verdict
    found = constant_value(mask, "the mask", aliases)
    if isinstance(found, Reason):
        return found
    visible = found if found.dtype is torch.bool else found == 0
    if found.dtype is not torch.bool and not bool((visible | _hidden(found)).all()):
        return Reason("the mask adds a bias", (mask.name,))
    if bool(visible.all()):
        return "empty"
    triangle = torch.ones(visible.shape[-2:], dtype=torch.bool).tril()
    if bool((visible == triangle).all()):
        return "causal"
    return Reason("the mask is constant but not causal", (mask.name,))


def _hidden(mask: torch.Tensor) -> torch.Tensor:
    """Scores so low that their softmax is exactly zero beside any that is visible."""
    return mask <= torch.finfo(mask.dtype).min / 2


def _telling(name: str, *, causal: bool) -> Callable[[Edit], None]:
    def apply(edit: Edit) -> None:
        node = edit.node(name)
        positional = list(node.args) + [None, 0.0, False][len(node.args) - 3 :]
        kwargs = {key: value for key, value in node.kwargs.items() if key not in ("attn_mask", "is_causal")}
        positional[3], positional[5] = None, causal
        if "dropout_p" in kwargs:
            positional[4] = kwargs.pop("dropout_p")
        new = edit.call_before(node, _ATTENTION, positional, kwargs, replaces=(node,))
        edit.replace(node, new)
        # Attention may draw random numbers, so it does not go by itself.
        edit.erase(node)

    return apply
