"""narrow-rotary: turned queries and keys are written in the dtype that attention reads them in.

Before::

    %6 = graphopt.rotary(%x, %cos, %sin, ..., f32)     %7 = getitem(%6, 0) : f32[2,512,32,128]
    %9 = aten.scaled_dot_product_attention(%8, ...) : bf16[2,32,512,128]       %8 is a view of %7

After::

    %6 = graphopt.rotary(%x, %cos, %sin, ..., bf16)    %7 = getitem(%6, 0) : bf16[2,512,32,128]

Under autocast projections are narrow, but tables are float32 and so is their product, until attention rounds
it. The operator computes in float32 and rounds once, to the same numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.candidate import Candidate, CostDelta, NearMiss, Reason
from graphopt.edit import Edit
from graphopt.passes import Pass, PassContext, Proposal
from graphopt.program import Level, Program
from graphopt.rules import argument
from graphopt_passes.memory_place import source_of, value_of

__all__ = ["NarrowRotary"]

_aten = torch.ops.aten
_NARROW = (torch.bfloat16, torch.float16)
_MOVES = frozenset(
    {
        _aten.reshape.default, _aten.contiguous.default, _aten.clone.default, _aten.expand.default,
        _aten.repeat_interleave.self_int,
    }
)  # fmt: skip
"""Calls that copy elements as they are."""

_ROUNDING = frozenset(
    {_aten.scaled_dot_product_attention.default, _aten.matmul.default, _aten.bmm.default, _aten.to.dtype}
)
"""Calls whose result says what dtype they round what they read to: by themselves, or under autocast."""


@dataclass(frozen=True)
class NarrowRotary(Pass):
    """Rounds turned heads where they are written. No options."""

    name: ClassVar[str] = "narrow-rotary"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = "write turned queries and keys in the dtype that attention reads them in"
    after: ClassVar[dict[str, str]] = {"rotary": "it makes the calls that this looks for"}
    before: ClassVar[dict[str, str]] = {"pack-rotary": "queries and keys of one call have one dtype"}

    def propose(self, program: Program, ctx: PassContext) -> Iterable[Proposal]:
        for node in program.nodes():
            name = getattr(getattr(node.target, "_schema", None), "name", "")
            if name != "graphopt::rotary" or argument(node, "dtype") is not torch.float32:
                continue
            asked = _asked(node)
            if isinstance(asked, Reason):
                yield NearMiss(self.name, node.name, 1, 2, asked)
            elif asked is not None:
                size = sum(_torch.hint(value.numel()) for value in node.meta["val"][:2])
                # Written in half the bytes, and not read again to be rounded.
                saved = (2 + 4 + 2) * size / ctx.cost.device.copy_bytes_per_second
                yield Candidate(
                    f"{self.name}@{node.name}", self.name, (node.name,), CostDelta(seconds=-saved),
                    _narrowing(node.name, asked),
                )  # fmt: skip


def _asked(call: fx.Node) -> torch.dtype | Reason | None:
    """The narrow dtype that all readers of turned heads round them to; ``None`` where none does."""
    found: set[torch.dtype] = set()
    others: list[fx.Node] = []
    stack = [element for element in call.users if element.args[1] in (0, 1)]
    while stack:
        for user in stack.pop().users:
            value = value_of(user)
            if user.target in _MOVES or source_of(user) is not None:
                stack.append(user)
            elif user.target in _ROUNDING and value is not None and value.dtype in _NARROW:
                found.add(value.dtype)
            else:
                others.append(user)
    if not found:
        return None
    if others or len(found) > 1:
        names = (call.name, *(node.name for node in others[:1]))
        return Reason("turned heads are read in other dtypes as well", names)
    return found.pop()


def _narrowing(name: str, dtype: torch.dtype) -> Callable[[Edit], None]:
    def apply(edit: Edit) -> None:
        old = edit.node(name)
        schema = _torch.schema_of(old.target)
        args = tuple(argument(old, parameter.name) for parameter in schema.arguments)
        new = edit.call_before(old, old.target, (*args[:-1], dtype), replaces=(old,))
        for element in list(old.users):
            index = element.args[1]
            edit.replace(
                element, edit.call_before(element, operator.getitem, (new, index), replaces=(element,))
            )

    return apply
