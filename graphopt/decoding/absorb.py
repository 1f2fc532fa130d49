"""Attention over a latent itself, where keys and values are made of one (DeepSeek-V2, 2024, section 2.1.2).

Before, for each head h::

    k[h] = [Wk[h] latent, shared]      v[h] = Wv[h] latent      y[h] = attention(q[h], k[h], v[h])

After::

    k = [latent, shared]               v = k[.., :rank]
    q'[h] = [q[h] Wk[h], q[h] rest]    y[h] = attention(q'[h], k, v) Wv[h]^T

since ``<q, W l> = <q W, l>`` and a mean of ``W l`` is W times the mean of ``l``. All heads read one key of
``rank`` numbers and what they share (rotary embeddings, mostly), and values are a part of it: that is all
that a store has to keep. Parts are told apart by what they are made of, columns of the projection by pushing
their numbers through views; weights are read where they are. The numbers are those of before but for the
order of sums, which decoders are checked for as any.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.capture.aliasing import written_inputs
from graphopt.decoding.capture import Uncached
from graphopt.decoding.columns import columns_of, through_layout
from graphopt.decoding.dead import remove_dead
from graphopt.decoding.layouts import base_of_keys, name_of
from graphopt.decoding.regions import Region
from graphopt.decoding.sites import Site

__all__ = ["absorbed"]

aten = torch.ops.aten


@dataclass(frozen=True)
class _Columns:
    """``count`` columns for each head of a projection that has ``stride`` a head, from ``offset`` on."""

    stride: int
    offset: int
    count: int


@dataclass(frozen=True)
class _Part:
    """``width`` columns of keys: made of the latent by ``columns``, or ``shared`` [B, 1, S, width]."""

    width: int
    columns: _Columns | None = None
    shared: fx.Node | None = None


@dataclass(frozen=True)
class _Latent:
    """Keys and values of a region: the ``latent`` [B, S, rank] or [B, 1, S, rank] and the ``weight`` [O,
    rank] that they are made with."""

    latent: fx.Node
    weight: fx.Node
    rank: int
    parts: tuple[_Part, ...]
    value: _Columns

    @property
    def width(self) -> int:
        """Numbers that are kept of a position."""
        return self.rank + sum(part.width for part in self.parts if part.shared is not None)


def absorbed(uncached: Uncached, sites: Sequence[Site], left: Collection[int] = ()) -> Uncached:
    """The same program, with attentions over latents where their stores take fewer bytes so.

    ``left``: sites that stay as they are. So do sites that share keys, and those with a window, which have
    rings. ``uncached`` itself where none is changed.
    """
    readers = [site.source for site in sites]
    found: dict[int, _Latent] = {}
    for index, site in enumerate(sites):
        if index in left or readers.count(index) != 1 or site.spec.mask.window:
            continue
        latent = _latent_of(site.region, uncached)
        spec = site.spec
        if latent is not None and latent.width < spec.kv_heads * (spec.key_width + spec.value_width):
            found[index] = latent
    if not found:
        return uncached
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(uncached.gm.graph, copies))
    for index, latent in found.items():
        _Absorbing(graph, copies, sites[index].region, latent).replace()
    remove_dead(graph)
    graph.lint()
    return replace(uncached, gm=fx.GraphModule(torch.nn.Module(), graph))


def _latent_of(region: Region, uncached: Uncached) -> _Latent | None:
    """What keys and values of a region are made of, or ``None`` where that is not one latent."""
    if not region.fused or region.kv_heads != region.heads:
        return None
    product = through_layout(region.value)
    known = columns_of(product) if name_of(product) == "linear" else {}
    value = _columns(known.get(region.value), product, region.heads)
    pieces = _pieces(region.key)
    if value is None or pieces is None:
        return None
    latent, weight, *bias = product.args
    if any(one is not None for one in (*bias, *product.kwargs.values())):
        return None
    if not isinstance(latent, fx.Node) or not isinstance(weight, fx.Node):
        return None
    shape = latent.meta["val"].shape
    is_row = len(shape) == 3 or (len(shape) == 4 and _torch.is_same_size(shape[1], 1))
    if weight.name not in uncached.weights or not is_row or not uncached.is_length(shape[-2]):
        return None
    parts: list[_Part] = []
    for piece in pieces:
        width = int(piece.meta["val"].shape[-1])
        base = base_of_keys(piece, region.heads)
        columns = _columns(known.get(piece), product, region.heads)
        if columns is not None:
            parts.append(_Part(width, columns))
        elif _torch.is_same_size(base.meta["val"].shape[1], 1):
            parts.append(_Part(width, shared=base))
        else:
            return None
    if not any(part.columns for part in parts):
        return None
    kinds = {node.meta["val"].dtype for node in (region.query, region.key, region.value, latent, weight)}
    if len(kinds) != 1:
        return None
    return _Latent(latent, weight, int(shape[-1]), tuple(parts), value)


def _columns(numbers: object, product: fx.Node, heads: int) -> _Columns | None:
    """``numbers`` [1, H, 1, D] of columns, where each head has as many, the same way in its own stretch."""
    if not isinstance(numbers, torch.Tensor) or numbers.dim() != 4 or numbers.shape[:3] != (1, heads, 1):
        return None
    total = int(product.meta["val"].shape[-1])
    stride, offset, count = total // heads, int(numbers[0, 0, 0, 0]), numbers.shape[3]
    expected = torch.arange(heads)[:, None] * stride + offset + torch.arange(count)
    if total % heads or offset + count > stride or not torch.equal(numbers[0, :, 0], expected):
        return None
    return _Columns(stride, offset, count)


def _pieces(key: fx.Node) -> list[fx.Node] | None:
    """What ``key`` [B, H, S, D] is put together of along its last dimension, first to last."""
    if name_of(key) == "cat":
        pieces: Any = key.args[0]
        dim: Any = key.args[1] if len(key.args) > 1 else key.kwargs.get("dim", 0)
        return list(pieces) if dim in (3, -1) else None
    if name_of(key) not in ("new_empty", "empty"):
        return [key]
    written: list[tuple[int, int, fx.Node]] = []
    for user in key.users:
        if key in written_inputs(user):
            return None
        place: Any = user.args
        if name_of(user) != "slice" or place[1] not in (3, -1):
            continue
        writes = [one for one in user.users if user in written_inputs(one)]
        if len(writes) != 1 or len(user.users) != 1 or name_of(writes[0]) != "copy_":
            return None
        source = writes[0].args[1]
        start = int(place[2] or 0)
        if not isinstance(source, fx.Node):
            return None
        written.append((start, start + int(user.meta["val"].shape[-1]), source))
    written.sort(key=lambda one: one[:2])
    ends = [0, *(stop for _, stop, _ in written)]
    whole = ends[-1] == int(key.meta["val"].shape[-1])
    in_turn = all(start == end for (start, _, _), end in zip(written, ends, strict=False))
    return [source for _, _, source in written] if written and whole and in_turn else None


class _Absorbing:
    """Puts attention over a latent in the place of what a region computes."""

    def __init__(
        self, graph: fx.Graph, copies: dict[fx.Node, fx.Node], region: Region, latent: _Latent
    ) -> None:
        self.graph, self.copies, self.region, self.latent = graph, copies, region, latent
        self.output = copies[region.output]

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call before the output, its value known."""
        node = self.graph.call_function(target, args, kwargs)
        given: Any = (args, kwargs)
        values = fx.node.map_arg(given, lambda ref: ref.meta["val"])
        node.meta = {name: kept for name, kept in self.output.meta.items() if name != "val"}
        node.meta["val"] = _torch.call_on_fakes(self.output.meta["val"], target, *values)
        return node

    def replace(self) -> None:
        """Do so; what made keys and values is read by nobody then."""
        region, latent = self.region, self.latent
        with self.graph.inserting_before(self.output):
            low = self.copies[latent.latent]
            if low.meta["val"].dim() == 3:
                low = self.call(aten.unsqueeze.default, low, 1)
            shared = [self.copies[part.shared] for part in latent.parts if part.shared is not None]
            key = self.call(aten.cat.default, [low, *shared], -1)
            value = self.call(aten.slice.Tensor, key, 3, 0, latent.rank)
            everywhere = [-1, region.heads, -1, -1]
            given = dict(zip(("attn_mask", "dropout_p", "is_causal"), self.output.args[3:], strict=False))
            made = self.call(
                self.output.target,
                self._query(),
                self.call(aten.expand.default, key, everywhere),
                self.call(aten.expand.default, value, everywhere),
                **{**given, **self.output.kwargs, "scale": region.scale, "enable_gqa": False},
            )
            weight = self.call(aten.transpose.int, self._weight(latent.value), 1, 2)
            output = self.call(aten.matmul.default, made, weight)
        self.output.replace_all_uses_with(output)
        self.graph.erase_node(self.output)

    def _query(self) -> fx.Node:
        """Queries [B, H, S, rank + ..] of the latent and of what heads share."""
        query, start = self.copies[self.region.query], 0
        low: fx.Node | None = None
        rest: list[fx.Node] = []
        for part in self.latent.parts:
            asked = self.call(aten.slice.Tensor, query, 3, start, start + part.width)
            start += part.width
            if part.columns is None:
                rest.append(asked)
                continue
            turned = self.call(aten.matmul.default, asked, self._weight(part.columns))
            low = turned if low is None else self.call(aten.add.Tensor, low, turned)
        assert low is not None
        return self.call(aten.cat.default, [low, *rest], -1) if rest else low

    def _weight(self, columns: _Columns) -> fx.Node:
        """Rows [H, count, rank] of the weight, where they are."""
        weight = self.copies[self.latent.weight]
        heads = self.call(aten.view.default, weight, [self.region.heads, columns.stride, self.latent.rank])
        return self.call(aten.slice.Tensor, heads, 1, columns.offset, columns.offset + columns.count)
