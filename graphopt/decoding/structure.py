"""What a decoder is made of, read off its graph: layers that repeat, what makes keys and values, what is
kept.

Nothing here goes by names of modules; those of weights and layers are there for people to read. Records of
this module are what passes over stores decide by: who produces a key, who consumes it, what stands between.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from graphopt.capture.repeats import find_repeats
from graphopt.capture.structure import line_of
from graphopt.decoding.capture import Uncached, capture_uncached
from graphopt.decoding.columns import PRODUCTS, columns_of, through_layout
from graphopt.decoding.layouts import name_of
from graphopt.decoding.options import Generate
from graphopt.decoding.regions import positional_values, row_values, token_values
from graphopt.decoding.sites import Site, sites_of
from graphopt.plugins.host import PluginHost, default_host
from graphopt.record_json import encode

__all__ = ["AttentionRecord", "Operand", "RepeatRecord", "StackRecord", "explain_layers", "stack_of"]

_NORMS = ("rsqrt", "layer_norm", "rms_norm", "native_layer_norm", "row_norm", "group_norm")
_LEAST_LAYER = 8
"""Operators that a layer has at least."""


@dataclass(frozen=True)
class Operand:
    """What makes the queries, keys or values of an attention, from what all three are made of.

    ``weights``: dotted names, those read last first; ``columns``: which columns of the last one's result they
    are, where others are used elsewhere (``"64:96"``), empty where all are. ``rotary``: multiplied by
    something that depends on positions; ``normed``: normalised after the projection.
    """

    weights: tuple[str, ...]
    columns: str
    rotary: bool
    normed: bool

    def __str__(self) -> str:
        text = " <- ".join(self.weights) or "?"
        text += f"[{self.columns}]" if self.columns else ""
        return text + (" norm" if self.normed else "") + (" rope" if self.rotary else "")


@dataclass(frozen=True)
class AttentionRecord:
    """One attention. ``fused``: one operator as captured; ``source``: the attention whose keys and values it
    reads, its own index where it makes them; ``latent``: keys and values come out of one smaller value;
    ``crosses``: they are made of an encoder's output."""

    index: int
    layer: str
    fused: bool
    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    mask: str
    softcap: float
    sinks: bool
    source: int
    latent: bool
    query: Operand
    key: Operand
    value: Operand
    crosses: bool = False


@dataclass(frozen=True)
class RepeatRecord:
    """``count`` stretches of ``nodes`` operators, one behind the other, that compute the same on other
    values; ``attentions``: indices of those that they hold."""

    count: int
    nodes: int
    attentions: tuple[int, ...]


@dataclass(frozen=True)
class StackRecord:
    """Attentions in order, and what repeats, largest first."""

    attentions: tuple[AttentionRecord, ...]
    repeats: tuple[RepeatRecord, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        found: dict[str, Any] = encode(self)
        return found

    def text(self) -> str:
        """A line for what repeats, three for each attention."""
        lines = [
            f"{repeat.count} layers of {repeat.nodes} operators, attentions {_ranges(repeat.attentions)}"
            for repeat in self.repeats
        ] or ["no layers repeat"]
        for one in self.attentions:
            kind = "fused" if one.fused else "written out"
            lines.append(
                f"{one.index:3d} {one.layer or '-'}: {kind}, {one.heads} heads on {one.kv_heads}, keys "
                f"{one.key_width}, values {one.value_width}, {one.mask}"
                + (f", softcap {one.softcap:g}" if one.softcap else "")
                + (", sinks" if one.sinks else "")
                + (", latent" if one.latent else "")
                + (", reads an encoder's output" if one.crosses else "")
                + (f", reads the store of {one.source}" if one.source != one.index else "")
            )
            lines += [f"      {name} {getattr(one, name)}" for name in ("query", "key", "value")]
        return "\n".join(lines)


def explain_layers(
    model: torch.nn.Module, inputs: Any, *, max_tokens: int = 4096, plugins: Sequence[object] = ()
) -> StackRecord:
    """The layers of a decoder over tokens, for sequences of up to ``max_tokens`` positions.

    ``inputs``: example tokens, as for ``graphopt.optimize``. Raises ``InputsError`` and ``CaptureError`` as
    ``optimize(generate=...)`` does.
    """
    options = Generate(max_tokens)
    host = PluginHost(tuple(plugins)) if plugins else default_host()
    uncached = capture_uncached(model, inputs, options)
    return stack_of(uncached, sites_of(uncached, host.stores(), options.max_batch, max_tokens))


def stack_of(uncached: Uncached, sites: Sequence[Site]) -> StackRecord:
    """The structure of a captured decoder whose attentions are ``sites``."""
    reader = _Reader(uncached)
    attentions = tuple(reader.attention(index, site) for index, site in enumerate(sites))
    return StackRecord(attentions, tuple(_repeats(uncached, sites)))


def _repeats(uncached: Uncached, sites: Sequence[Site]) -> Iterable[RepeatRecord]:
    line = line_of(uncached.gm.graph)
    place = {site.region.output: i for i, site in enumerate(sites)}
    where = {index: i for index, node in enumerate(line.nodes) if (i := place.get(node)) is not None}
    free = [True] * len(line.nodes)
    for repeat in find_repeats(line.labels, least=_LEAST_LAYER):
        start, stop = repeat.start, repeat.start + repeat.count * repeat.period
        inside = tuple(where[i] for i in range(start, stop) if i in where)
        if repeat.count < 2 or not inside or not all(free[start:stop]):
            continue
        free[start:stop] = [False] * (stop - start)
        yield RepeatRecord(repeat.count, repeat.period, inside)


class _Reader:
    def __init__(self, uncached: Uncached) -> None:
        self.uncached = uncached
        self.values, self.tokens = row_values(uncached), token_values(uncached)
        self.place = {node: i for i, node in enumerate(uncached.gm.graph.nodes)}
        self.positional = positional_values(uncached, self.values)

    def attention(self, index: int, site: Site) -> AttentionRecord:
        region, spec = site.region, site.spec
        roots = (region.query, region.key, region.value)
        if region.crosses:
            operands = self._crossing(roots)
        else:
            above = [self._above(root) for root in roots]
            common = above[0] & above[1] & above[2]
            stream = max(common, key=self.place.__getitem__, default=None)
            operands = [self._operand(root, stream) for root in roots]
        key, value = operands[1:]
        # Both are projected again out of what one projection gave.
        latent = len(value.weights) > 1 and value.weights[-1] in key.weights
        return AttentionRecord(
            index, region.layer, region.fused, spec.heads, spec.kv_heads, spec.key_width, spec.value_width,
            str(spec.mask), spec.softcap, spec.sinks, site.source, latent, operands[0], key, value,
            region.crosses,
        )  # fmt: skip

    def _crossing(self, roots: Sequence[fx.Node]) -> list[Operand]:
        """Queries are made of the stream, keys and values of the source: each of what is projected last, keys
        and values of what both are made of."""
        query, key, value = roots
        projected = next(
            (node for node in self._backwards(query) if self._weight(node) is not None), None
        )
        given = projected.all_input_nodes if projected is not None else []
        stream = next((node for node in given if node in self.tokens), None)
        common = self._above(key) & self._above(value)
        source = max(common, key=self.place.__getitem__, default=None)
        return [self._operand(query, stream), self._operand(key, source), self._operand(value, source)]

    def _backwards(self, root: fx.Node) -> Iterable[fx.Node]:
        """What ``root`` is made of, the last first."""
        return sorted(self._above(root), key=self.place.__getitem__, reverse=True)

    def _above(self, root: fx.Node) -> set[fx.Node]:
        """``root`` and what it is made of, as far as that depends on the tokens."""
        found: set[fx.Node] = set()
        pending = [root]
        while pending:
            node = pending.pop()
            if node in found or node not in self.values or node.op == "placeholder":
                continue
            found.add(node)
            pending.extend(node.all_input_nodes)
            # Memory that is written into is made of what is written.
            pending.extend(self._written_into(node))
        return found

    def _written_into(self, node: fx.Node) -> Iterable[fx.Node]:
        for user in node.users:
            if name_of(user) == "copy_" and user.args[0] is node:
                yield from (arg for arg in user.args[1:2] if isinstance(arg, fx.Node))
            elif name_of(user) in ("slice", "select", "narrow") and name_of(node) in ("new_empty", "empty"):
                yield from self._written_into(user)

    def _operand(self, root: fx.Node, stream: fx.Node | None) -> Operand:
        start = self.place[stream] if stream is not None else -1
        between = [node for node in self._above(root) if self.place[node] > start]
        between = [node for node in between if stream is None or stream in self._above(node)]
        weights = [
            weight for node in sorted(between, key=self.place.__getitem__, reverse=True)
            if (weight := self._weight(node)) is not None
        ]  # fmt: skip
        columns = ""
        if not weights and stream is not None:
            projection = through_layout(stream)
            if (weight := self._weight(projection)) is not None:
                weights = [weight]
                columns = _columns(projection, root, set(between))
        rotary = any(
            name_of(node) == "mul" and any(arg in self.positional for arg in node.all_input_nodes)
            for node in between
        )
        normed = any(name_of(node) in _NORMS for node in between)
        return Operand(tuple(dict.fromkeys(weights)), columns, rotary, normed)

    def _weight(self, node: fx.Node) -> str | None:
        """The name of the weight that a product with one reads."""
        if name_of(node) not in PRODUCTS:
            return None
        for source in node.all_input_nodes:
            if source in self.values:
                continue
            while source.op == "call_function" and source.all_input_nodes:
                source = source.all_input_nodes[0]
            if source.name in self.uncached.weights and self.uncached.weights[source.name].dim() >= 2:
                return self.uncached.names[source.name]
        return None


def _columns(projection: fx.Node, root: fx.Node, wanted: set[fx.Node]) -> str:
    """Which columns of a projection's result ``root`` is, or those of ``wanted`` start from, as ranges."""
    known = columns_of(projection)
    live: set[int] = set()
    for node, held in known.items():
        if isinstance(held, torch.Tensor) and any(u in wanted and u not in known for u in node.users):
            live.update(held.flatten().tolist())
    if isinstance(known.get(root), torch.Tensor):
        live.update(known[root].flatten().tolist())
    width = int(projection.meta["val"].shape[-1])
    return _ranges(sorted(live)) if 0 < len(live) < width else ""


def _ranges(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` as ``"0:3,5:6"``, stops excluded."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number:
            parts[-1][1] = number + 1
        else:
            parts.append([number, number + 1])
    return ",".join(f"{start}:{stop}" for start, stop in parts)
