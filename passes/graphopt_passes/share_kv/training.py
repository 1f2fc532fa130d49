"""A training program as sharing looks at it: where it attends, which rows that reads, what fits what.

Decoders are captured for that by themselves (``graphopt.decoding.capture``), with sizes that are symbols and
weights at hand. A program that is trained is looked at as it was captured: its sizes may be numbers, and what
its weights hold is not known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.candidate import Reason
from graphopt.capture.aliasing import Aliases, alias_map, written_inputs
from graphopt.decoding.capture import Uncached
from graphopt.decoding.columns import PRODUCTS
from graphopt.decoding.layouts import name_of, same_numbers
from graphopt.decoding.regions import Region, attention_regions, positional_values, token_values
from graphopt.errors import CaptureError, InputsError
from graphopt.order import has_effect
from graphopt.program import Program, layer_of
from graphopt_passes.causal_attention import mask_verdict
from graphopt_passes.mask_proof import hides_later

__all__ = ["CAUSAL", "Trained", "check_trained", "place_of", "trained"]

_aten = torch.ops.aten

_OWN = "graphopt.attention.default"
"""Attention as rewritten by passes whose result this one does not read."""

CAUSAL, MASKED = "causal", "masked"
"""Rows read those before them and themselves: all of these, or those of them that the mask shows."""


@dataclass(frozen=True)
class _Captured(Uncached):
    """A program with sizes that may be numbers."""

    def has_length(self, size: Any) -> bool:
        return self.is_length(size) or (
            isinstance(self.length, torch.SymInt) and _torch.depends_on(size, self.length)
        )


@dataclass(frozen=True)
class Trained:
    """The attentions of a training program, in order."""

    view: Uncached
    regions: tuple[Region, ...]
    aliases: Aliases

    @cached_property
    def tokens(self) -> set[fx.Node]:
        """Nodes whose numbers depend on the tokens."""
        return token_values(self.view)

    @cached_property
    def positional(self) -> set[fx.Node]:
        return positional_values(self.view, self.tokens)

    @cached_property
    def writers(self) -> dict[fx.Node, list[fx.Node]]:
        """What writes into memory, by the nodes that make that."""
        found: dict[fx.Node, list[fx.Node]] = {}
        for node in self.view.gm.graph.nodes:
            for root in self.written_by(node):
                found.setdefault(root, []).append(node)
        return found

    def written_by(self, node: fx.Node) -> list[fx.Node]:
        """What makes the memory that ``node`` writes into."""
        roots = self.aliases.roots
        return [root for one in written_inputs(node) for root in roots.get(one, (one,))]

    def made_of(self, node: fx.Node) -> list[fx.Node]:
        """What ``node`` reads, and what writes into its memory."""
        roots = self.aliases.roots.get(node, (node,))
        return [*node.all_input_nodes, *(one for root in roots for one in self.writers.get(root, ()))]

    @cached_property
    def reads(self) -> tuple[str | Reason, ...]:
        """By attention ``CAUSAL`` or ``MASKED``, or why rows may read later ones."""
        return tuple(self._reads(region) for region in self.regions)

    def _reads(self, region: Region) -> str | Reason:
        if not region.fused:
            return Reason("it is written out, and no pass made it one call", (region.output.name,))
        if not region.added:
            return Reason("it has no mask", (region.output.name,))
        (entry,) = region.added
        if entry.node is None:
            return CAUSAL
        verdict = mask_verdict(entry.node, self.aliases)
        if verdict == "causal":
            return CAUSAL
        if verdict == "empty":
            return Reason("its mask hides nothing", (entry.node.name,))
        if entry.node.meta["val"].dtype is not torch.bool:
            assert isinstance(verdict, Reason)
            return Reason(f"what is added to its scores is not known to hide later rows: {verdict.text}")
        if hides_later(entry.node, self.aliases):
            return MASKED
        return Reason("its mask is not known to hide later rows", (entry.node.name,))

    def fits(self, consumer: int, source: int) -> str:
        """``""``, or why attention ``consumer`` cannot read the keys and values of attention ``source``."""
        here, there = self.regions[consumer], self.regions[source]
        for what, one, other in (
            ("heads of keys", here.kv_heads, there.kv_heads),
            ("numbers in a key", _width(here.key), _width(there.key)),
            ("numbers in a value", _width(here.value), _width(there.value)),
            ("for the dtype", here.key.meta["val"].dtype, there.key.meta["val"].dtype),
        ):
            if one != other:
                return f"it has {one} {what}, attention {source} has {other}"
        if self._mask(here) != self._mask(there):
            return f"its mask is another than that of attention {source}"
        one_way, other_way = self._positions(here), self._positions(there)
        if [name for name, _ in one_way] != [name for name, _ in other_way]:
            count = f"{len(one_way)} steps against {len(other_way)}"
            return f"positions enter its keys otherwise than those of attention {source} ({count})"
        for (_, mine), (_, others) in zip(one_way, other_way, strict=True):
            if not _is_same(mine, others):
                return f"its rotary embedding has other parameters than that of attention {source}"
        return ""

    def _mask(self, region: Region) -> object:
        if self.reads[region.index] == CAUSAL:
            return CAUSAL
        return tuple(same_numbers(entry.node) for entry in region.added if entry.node is not None)

    def _positions(self, region: Region) -> list[tuple[str, fx.Node]]:
        """Operators by which positions come into keys, behind the projection, and what they read."""
        return [
            (name_of(node), arg)
            for node in self.behind_projection(region.key)
            for arg in node.all_input_nodes
            if arg in self.positional
        ]

    def behind_projection(self, end: fx.Node) -> Iterator[fx.Node]:
        """``end`` and what it is made of, up to the products with weights, those included."""
        seen: set[fx.Node] = set()
        pending = [end]
        while pending:
            node = pending.pop()
            if node in seen or node not in self.tokens or node.op == "placeholder":
                continue
            seen.add(node)
            yield node
            if not self.is_projection(node):
                pending.extend(self.made_of(node))

    def is_projection(self, node: fx.Node) -> bool:
        """Whether a node is a product with a weight, or looks one up."""
        return name_of(node) in (*PRODUCTS, "embedding") and any(
            source not in self.tokens for source in node.all_input_nodes
        )


def trained(program: Program) -> Trained:
    """The attentions of ``program``. Raises ``InputsError`` where they cannot be told."""
    graph = program.graph
    other = next((node for node in program.nodes() if str(node.target) == _OWN), None)
    if other is not None:
        raise InputsError(
            f"{place_of(other)}: this attention calls {other.target}, of which keys and values are not "
            "shared in training",
            hint="leave out what makes such calls: fuse-attention makes them of capped scores, dropout and "
            "trained biases, window-attention of windows",
        )
    if _torch.stays_as_captured(program.gm):
        raise InputsError(
            f"program {program.name} states gradients of its own (torch.autograd.Function), calls transforms "
            "of functions or computes on tensors that wrap others: where it attends is not seen",
            hint="leave that out of the model",
        )
    tokens = _tokens(program)
    if tokens is None:
        raise InputsError(f"program {program.name} reads no tokens: nothing in it attends to any")
    batch, length = tokens.meta["val"].shape[:2]
    view = _Captured(
        program.gm, _not_run, {}, {}, tokens.name, None, None, cast(Any, batch), cast(Any, length), 0
    )
    try:
        regions = attention_regions(view)
    except CaptureError as error:
        raise InputsError(error.message) from error
    return Trained(view, regions, alias_map(graph))


def check_trained(found: Trained, plan: Mapping[int, int]) -> None:
    """Raises ``InputsError``, naming the layer, for a consumer that cannot read its source, and for one of a
    later source of which rows may read others than those before them."""
    for consumer, source in plan.items():
        where = place_of(found.regions[consumer])
        if source > consumer:
            reads = found.reads[consumer]
            if isinstance(reads, Reason):
                raise InputsError(
                    f"{where}: attention {consumer} cannot read the keys and values of attention {source}, "
                    f"which come later: rows are to read earlier ones alone, and {reads}",
                    hint=f"leave {consumer} out of the plan",
                )
            length = found.regions[consumer].query.meta["val"].shape[2]
            if isinstance(length, int) and length < 2:
                raise InputsError(
                    f"{where}: attention {consumer} is to read keys and values of earlier tokens: sequences "
                    f"of {length} have none",
                    hint="train on sequences of two tokens or more",
                )
        if why := found.fits(consumer, source):
            nearest = [i for i in range(len(found.regions)) if i != consumer and i not in plan]
            nearest = sorted(
                (i for i in nearest if not found.fits(consumer, i)), key=lambda i: abs(i - source)
            )
            raise InputsError(
                f"{where}: attention {consumer} cannot read the keys and values of attention {source}: {why}",
                hint=f"the nearest that it can read: {{{consumer}: {nearest[0]}}}"
                if nearest
                else "it can read those of no other one: leave it out",
            )


def place_of(node: fx.Node | Region) -> str:
    """The layer of an attention, or its node where that is not known."""
    found = node.output if isinstance(node, Region) else node
    return layer_of(found) or found.name


def _tokens(program: Program) -> fx.Node | None:
    """The input [B, S] that is looked up first, or the first that is rows [B, S, width] already."""
    by_name: dict[str, fx.Node] = {node.name: node for node in program.graph.nodes}
    given = [by_name[spec.node] for spec in program.signature.by_role("input", "activation")]
    looked_up = {node for call in program.nodes(_aten.embedding) for node in _made_of(call.args[1])}
    for node in given:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            is_rows = value.is_floating_point() and value.dim() == 3
            if is_rows or (node in looked_up and value.dim() == 2):
                return node
    return None


def _made_of(end: object) -> Iterator[fx.Node]:
    pending = [end] if isinstance(end, fx.Node) else []
    seen: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            yield node
            pending.extend(node.all_input_nodes)


def _not_run(*values: torch.Tensor) -> torch.Tensor:
    raise AssertionError("a training program is looked at, never run by itself")


def _width(node: fx.Node) -> Any:
    return node.meta["val"].shape[-1]


def _is_same(one: fx.Node, other: fx.Node) -> bool:
    """Whether two values, which no tokens enter, are computed alike of the same inputs."""
    pending: list[tuple[Any, Any]] = [(one, other)]
    seen: set[tuple[fx.Node, fx.Node]] = set()
    while pending:
        here, there = pending.pop()
        if isinstance(here, (list, tuple)) and isinstance(there, (list, tuple)) and len(here) == len(there):
            pending.extend(zip(here, there, strict=True))
        elif isinstance(here, fx.Node) and isinstance(there, fx.Node):
            if here is there or (here, there) in seen:
                continue
            seen.add((here, there))
            alike = here.op == there.op == "call_function" and here.target is there.target
            if not alike or has_effect(here) or set(here.kwargs) != set(there.kwargs):
                return False
            pending.append((here.args, there.args))
            pending.extend((here.kwargs[name], there.kwargs[name]) for name in here.kwargs)
        elif type(here) is not type(there) or here != there:
            return False
    return True
