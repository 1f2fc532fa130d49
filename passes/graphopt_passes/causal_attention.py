"""causal-attention: tell attention that its mask is the causal one, or that it masks nothing.

Before::

    %9 = aten.arange(16) ...   %20 = aten.expand(...) : bool[2,1,16,16]
    %31 = aten.scaled_dot_product_attention(%q, %k, %v, %20)

After::

    %31 = aten.scaled_dot_product_attention(%q, %k, %v, None, 0.0, True)

Whole models captured in one graph build their masks inside it, from sizes alone. Such a mask is a
constant: its subgraph is evaluated here, on the CPU, and compared element by element with the
triangle that ``is_causal`` stands for. Nothing is concluded from its pattern. Kernels that know the
mask skip the half of the work that it hides and never read it (Dao et al. 2022).
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

__all__ = ["CausalAttention"]

_aten = torch.ops.aten
_ATTENTION = _aten.scaled_dot_product_attention.default
_LARGEST = 2**28
"""Elements of the largest mask that is evaluated: 256 MiB as booleans."""

# What these make depends on the shape and type of their input, not on what it holds.
_SHAPE_ONLY = frozenset(
    {
        _aten.new_ones.default, _aten.new_zeros.default, _aten.new_full.default, _aten.new_empty.default,
        _aten.ones_like.default, _aten.zeros_like.default, _aten.full_like.default,
    }
)  # fmt: skip


@dataclass(frozen=True)
class CausalAttention(Pass):
    """Replaces constant causal or empty masks by ``is_causal`` or none. No options."""

    name: ClassVar[str] = "causal-attention"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = "let attention kernels know a constant mask that is causal or empty"
    after: ClassVar[dict[str, str]] = {"normalize": "identity casts and views hide the mask from its readers"}

    def propose(self, program: Program, ctx: PassContext) -> Iterable[Proposal]:
        verdicts: dict[fx.Node, str | Reason] = {}
        for node in program.nodes(_ATTENTION):
            mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
            if not isinstance(mask, fx.Node):
                continue
            if mask not in verdicts:
                verdicts[mask] = _verdict(mask)
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


def _verdict(mask: fx.Node) -> str | Reason:
    """``"causal"``, ``"empty"``, or why the mask is neither."""
    value = mask.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        return Reason("the mask is not a matrix", (mask.name,))
    if any(isinstance(size, torch.SymInt) for size in value.shape):
        return Reason("the mask's size is not fixed", (mask.name,))
    if value.numel() > _LARGEST:
        return Reason(f"the mask has {value.numel()} elements, more than {_LARGEST}", (mask.name,))
    found = _evaluate(mask)
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


def _evaluate(mask: fx.Node) -> torch.Tensor | Reason:
    """The value of a node that depends on no input, computed on the CPU."""
    values: dict[fx.Node, Any] = {}
    stack = [mask]
    while stack:
        node = stack[-1]
        if node in values:
            stack.pop()
            continue
        if node.op == "placeholder":
            return Reason("the mask depends on an input", (node.name,))
        if node.op != "call_function":
            return Reason("the mask depends on a constant of the model", (node.name,))
        shaped = node.args[0] if node.target in _SHAPE_ONLY else None
        if isinstance(shaped, fx.Node):
            stand_in = shaped.meta["val"]
            values.setdefault(shaped, torch.empty(stand_in.shape, dtype=stand_in.dtype))
        missing = [source for source in node.all_input_nodes if source not in values]
        if missing:
            stack.extend(missing)
            continue
        stack.pop()
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return Reason("the mask is random", (node.name,))
        try:
            values[node] = _run(node, values)
        except Exception as error:
            return Reason(f"the mask could not be evaluated ({type(error).__name__})", (node.name,))
        if isinstance(shaped, fx.Node):
            # The stand-in has the shape alone: whoever needs the value computes it.
            del values[shaped]
    result = values[mask]
    return result if isinstance(result, torch.Tensor) else Reason("the mask is not a tensor", (mask.name,))


def _run(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    def bind(value: Any) -> Any:
        return torch.device("cpu") if isinstance(value, torch.device) else value

    args = fx.node.map_arg(node.args, lambda n: values[n])
    kwargs = fx.node.map_arg(node.kwargs, lambda n: values[n])
    assert callable(node.target)
    return node.target(*map(bind, args), **{key: bind(value) for key, value in kwargs.items()})


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
