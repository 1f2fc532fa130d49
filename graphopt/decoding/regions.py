"""Where a program attends, found by dataflow.

Before, fused::

    scaled_dot_product_attention(q, reshape(expand(unsqueeze(k))), v, mask, scale=s)

or written out, with what models put around it::

    softmax(cat([softcap(q @ k.mT * s) + mask, sinks]) - max) -> dropout -> slice -> @ v

After, either way, a ``Region``: the nodes of q [B, H, S, D], k [B, Hkv, S, D] and v [B, Hkv, S, Dv] with
heads of keys not repeated, how scores are scaled and capped, and what is added to them or hidden from them.

A softmax is attention if its input leads back to a product of two values that depend on the tokens and its
output on to a product with a third. Softmaxes of routers and samplers do not.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.decoding.capture import Uncached
from graphopt.decoding.layouts import (
    base_of_keys,
    heads_first,
    name_of,
    peeled,
    scalar,
    transposed,
)
from graphopt.errors import CaptureError
from graphopt.program import layer_of

__all__ = ["Added", "Region", "attention_regions", "positional_values", "row_values", "token_values"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Added:
    """Something between scores and softmax. ``kind``: ``"bias"``: ``factor * node`` is added; ``"keep"``:
    scores count where ``node`` is true; ``"hide"``: where it is false; ``"causal"``: rows do not read later
    keys."""

    kind: str
    node: fx.Node | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class Region:
    """One place where a program attends. ``output`` is the node whose value the region makes: [B, H, S, Dv],
    or [B * H, S, Dv] with ``flat``. ``query``, ``key``, ``value`` may be flat in the same way. ``crosses``:
    keys and values are made of the source alone, [B, Hkv, T, D].
    """

    index: int
    output: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    heads: int
    kv_heads: int
    scale: float
    softcap: float
    added: tuple[Added, ...]
    sinks: fx.Node | None
    flat: bool = False
    key_transposed: bool = False
    crosses: bool = False

    @property
    def layer(self) -> str:
        """The module that it was captured from: for people, never for decisions."""
        return layer_of(self.output)

    @property
    def fused(self) -> bool:
        return name_of(self.output) == "scaled_dot_product_attention"

    @property
    def is_within(self) -> bool:
        """Whether the values are the first columns of the keys."""
        if name_of(self.value) != "slice" or self.flat or self.key_transposed:
            return False
        names = ("source", "dim", "start", "stop", "step")
        given: dict[str, object] = dict(zip(names, self.value.args, strict=False))
        begins = given.get("dim", 0) in (3, -1) and given.get("start") in (0, None)
        return bool(given["source"] is self.key and begins and given.get("step", 1) == 1)


def token_values(uncached: Uncached) -> set[fx.Node]:
    """Nodes whose numbers depend on the tokens; sizes do not."""
    return _made_of(uncached, [uncached.tokens])


def row_values(uncached: Uncached) -> set[fx.Node]:
    """Nodes whose numbers depend on the tokens or on rows of the source; those of masks do not."""
    read = uncached.source.leaves if uncached.source is not None else ()
    floating = [name for name in read if uncached.placeholder(name).meta["val"].is_floating_point()]
    return _made_of(uncached, [uncached.tokens, *floating])


def _made_of(uncached: Uncached, names: Sequence[str]) -> set[fx.Node]:
    found = {uncached.placeholder(name) for name in names}
    for node in uncached.gm.graph.nodes:
        if node.op != "call_function" or isinstance(node.meta.get("val"), (int, torch.SymInt)):
            continue
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
            # What is written into carries on what is written.
            if name_of(node).endswith("_") and isinstance(node.args[0], fx.Node):
                found.update(_roots(node.args[0]))
    return found


def _roots(node: fx.Node) -> Iterator[fx.Node]:
    while True:
        yield node
        if name_of(node) not in _VIEWS or not isinstance(node.args[0], fx.Node):
            return
        node = node.args[0]


_VIEWS = {"slice", "select", "view", "transpose", "permute", "unsqueeze", "squeeze", "expand", "narrow"}


def positional_values(uncached: Uncached, values: set[fx.Node]) -> set[fx.Node]:
    """Nodes that depend on positions and not on tokens."""
    found: set[fx.Node] = set()
    for node in uncached.gm.graph.nodes:
        if node.name == uncached.positions:
            found.add(node)
        elif (
            node.op == "call_function"
            and node not in values
            and isinstance(node.meta.get("val"), torch.Tensor)
        ):
            counted = name_of(node) == "arange" and uncached.is_length(node.meta["val"].shape[0])
            if (
                counted
                or any(source in found for source in node.all_input_nodes)
                or (name_of(node) == "slice" and any(map(uncached.has_length, node.meta["val"].shape)))
            ):
                found.add(node)
    return found


def attention_regions(uncached: Uncached) -> tuple[Region, ...]:
    """Every place where the program attends, in order.

    Raises ``CaptureError`` for one whose parts were recognised but not their arrangement, naming its layer.
    """
    values, tokens = row_values(uncached), token_values(uncached)
    found: list[Region] = []
    for node in uncached.gm.graph.nodes:
        name = name_of(node)
        region = None
        if name == "scaled_dot_product_attention":
            region = _fused(node, len(found), uncached)
        elif name in ("softmax", "_softmax") and node in values:
            region = _written_out(node, len(found), uncached, values)
        if region is None or (uncached.source is not None and region.query not in tokens):
            # What attends within the source is computed once for it.
            continue
        found.append(replace(region, crosses=_crosses(region, tokens, uncached)))
    return tuple(found)


def _crosses(region: Region, tokens: set[fx.Node], uncached: Uncached) -> bool:
    """Whether keys and values are those of the source."""
    own = [node in tokens for node in (region.key, region.value)]
    if all(own) or uncached.source is None:
        return False
    rows = region.key.meta["val"].shape[-1 if region.key_transposed else -2]
    if any(own) or not uncached.has_rows(rows):
        raise CaptureError(
            f"{_where(region.output)}: keys of {list(map(str, region.key.meta['val'].shape))} are neither "
            "all made of the tokens nor one for each row of the source"
        )
    return True


def _fused(node: fx.Node, index: int, uncached: Uncached) -> Region:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    query, key, value = (given[name] for name in names[:3])
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node)
    shape = query.meta["val"].shape
    if len(shape) != 4:
        raise CaptureError(
            f"{_where(node)}: attention over {len(shape)} dimensions: expected [batch, heads, length, width]"
        )
    heads = int(shape[1])
    key, value = base_of_keys(key, heads), base_of_keys(value, heads)
    kv_heads = _common_heads(node, key, value)
    added: list[Added] = []
    if given.get("is_causal"):
        added.append(Added("causal"))
    mask = given.get("attn_mask")
    if isinstance(mask, fx.Node):
        added.append(Added("keep" if mask.meta["val"].dtype is torch.bool else "bias", mask))
    scale = given.get("scale")
    width = int(shape[-1])
    return Region(
        index, node, query, key, value, heads, kv_heads,
        float(scale) if isinstance(scale, (int, float)) else width**-0.5, 0.0, tuple(added), None,
    )  # fmt: skip


def _where(node: fx.Node) -> str:
    layer = layer_of(node)
    return f"{node.name} of {layer}" if layer else node.name


def _common_heads(node: fx.Node, key: fx.Node, value: fx.Node) -> int:
    """Heads of keys, which are as many as those of values."""
    counts = key.meta["val"].shape[1], value.meta["val"].shape[1]
    if not all(isinstance(count, int) for count in counts) or counts[0] != counts[1]:
        raise CaptureError(f"{_where(node)}: keys have {counts[0]} heads and values {counts[1]}")
    return int(counts[0])


class _Scores:
    """What lies between a softmax and the product of queries and keys, read backwards."""

    def __init__(self, values: set[fx.Node]) -> None:
        self.values = values
        self.added: list[Added] = []
        self.sinks: fx.Node | None = None
        self.outer = 1.0  # what scores are multiplied by after what was met so far
        self.scale = 1.0  # what the product is multiplied by, inside of the cap if there is one
        self.softcap = 0.0

    def product(self, node: fx.Node) -> fx.Node | None:
        """The product that ``node`` is made of, or ``None`` where there is none."""
        while True:
            name = name_of(node)
            if name in ("matmul", "bmm", "baddbmm"):
                return self._ends_at(node, name)
            following = self._step(node, name)
            if following is None:
                return None
            node = following

    def _ends_at(self, node: fx.Node, name: str) -> fx.Node | None:
        one, other = node.args[1:3] if name == "baddbmm" else node.args[:2]
        if one not in self.values or other not in self.values:
            return None
        if name == "baddbmm":
            beta, alpha = (float(node.kwargs.get(k, 1.0)) for k in ("beta", "alpha"))  # type: ignore[arg-type]
            if beta:
                if self.softcap:
                    return None
                self.added.append(Added("bias", _node(node.args[0]), beta * self.scale))
            self.scale *= alpha
        return node

    def _step(self, node: fx.Node, name: str) -> fx.Node | None:
        if name in ("to", "_to_copy", "clone", "contiguous", "view", "reshape", "_unsafe_view", "float"):
            return _node(node.args[0])
        if name in ("add", "sub") and len(node.args) > 1:
            return self._sum(node, name)
        if name in ("masked_fill", "masked_fill_") and isinstance(node.args[0], fx.Node):
            if not self._hides(node.args[2]):
                return None
            self.added.append(Added("hide", _node(node.args[1])))
            return node.args[0]
        if name == "where":
            keep, score, rest = node.args[:3]
            if score in self.values and self._hides(rest):
                self.added.append(Added("keep", _node(keep)))
                return _node(score)
            if rest in self.values and self._hides(score):
                self.added.append(Added("hide", _node(keep)))
                return _node(rest)
            return None
        if name in ("mul", "div"):
            number = scalar(node.args[1])
            score = node.args[0]
            if number is None:
                number, score = scalar(node.args[0]), node.args[1]
            if number is None or not number or (name == "div" and score is not node.args[0]):
                return None
            factor = 1 / number if name == "div" else number
            self.scale *= factor
            return _node(score)
        if name == "tanh" and not self.softcap:
            # What was read so far multiplies the capped score: softcap * tanh(x / softcap).
            self.softcap, self.scale = self.scale, 1.0
            return _node(node.args[0])
        if name == "cat" and self.sinks is None:
            parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
            if isinstance(parts, (list, tuple)) and len(parts) == 2 and dim in (-1, 3):
                scores, column = parts
                assert isinstance(scores, fx.Node) and isinstance(column, fx.Node)
                width = column.meta["val"].shape[-1]
                if type(width) is int and width == 1 and column not in self.values:
                    self.sinks = column
                    return scores
        return None

    def _sum(self, node: fx.Node, name: str) -> fx.Node | None:
        one, other = node.args[:2]
        if name == "sub" and isinstance(other, fx.Node) and _is_maximum(other, one):
            return _node(one)  # a softmax does not see a constant taken off
        if self.softcap or node.kwargs.get("alpha", 1) != 1 or name == "sub":
            return None
        score, mask = (one, other) if one in self.values else (other, one)
        if not isinstance(score, fx.Node) or not isinstance(mask, fx.Node) or mask in self.values:
            return None
        self.added.append(Added("bias", mask, self.scale))
        return score

    def _hides(self, value: object) -> bool:
        number = scalar(value)
        return number is not None and number <= -1e4


def _node(value: object) -> fx.Node | None:
    return value if isinstance(value, fx.Node) else None


def _is_maximum(node: fx.Node, of: object) -> bool:
    if node.op == "call_function" and node.target is operator.getitem:
        node = node.args[0]  # type: ignore[assignment]
    return name_of(node) in ("max", "amax") and node.args[0] is of


def _written_out(softmax: fx.Node, index: int, uncached: Uncached, values: set[fx.Node]) -> Region | None:
    """The region around a softmax, or ``None`` where it is no attention."""
    shape = softmax.meta["val"].shape
    dim = softmax.args[1] if len(softmax.args) > 1 else softmax.kwargs.get("dim")
    if len(shape) not in (3, 4) or dim not in (-1, len(shape) - 1):
        return None
    if not uncached.has_length(shape[-1]) and not uncached.has_rows(shape[-1]):
        return None
    scores = _Scores(values)
    start = softmax.args[0]
    product = scores.product(start) if isinstance(start, fx.Node) else None
    ending = _product_after(softmax, values)
    if product is None or ending is None:
        return None
    query, key = product.args[1:3] if name_of(product) == "baddbmm" else product.args[:2]
    value = ending.args[1]
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node)
    key, is_transposed = transposed(key)
    flat = len(ending.meta["val"].shape) == 3
    heads = heads_first(softmax, uncached) or heads_first(product, uncached)
    if heads is None:
        raise CaptureError(f"{_where(softmax)}: the heads of this attention could not be told from its batch")
    if not flat:
        if not is_transposed:
            key, value = base_of_keys(key, heads), base_of_keys(value, heads)
        else:
            value = value if value.meta["val"].shape[1] == heads else base_of_keys(value, heads)
        kv_heads = _common_heads(softmax, key, value)
    else:
        kv_heads = heads
    sinks = peeled(scores.sinks) if scores.sinks is not None else None
    if sinks is not None and _torch.hint(sinks.meta["val"].numel()) != heads:
        raise CaptureError(
            f"{_where(softmax)}: sinks have {sinks.meta['val'].numel()} numbers for {heads} heads"
        )
    scale = scores.scale
    if scores.softcap and scores.softcap < 0:
        return None
    return Region(
        index, ending, query, key, value, heads, kv_heads,
        scale * scores.softcap if scores.softcap else scale, scores.softcap,
        tuple(scores.added), sinks, flat, is_transposed,
    )  # fmt: skip


def _product_after(softmax: fx.Node, values: set[fx.Node]) -> fx.Node | None:
    """The product of the softmax's weights with values."""
    node = softmax
    while True:
        users = [user for user in node.users if user.op == "call_function"]
        following = None
        for user in users:
            name = name_of(user)
            if name in ("matmul", "bmm") and user.args[0] is node and user.args[1] in values:
                return user
            if name in ("to", "_to_copy", "clone", "contiguous", "view", "reshape", "_unsafe_view", "expand"):
                following = user
            if name in ("dropout", "slice", "nan_to_num", "type_as") and user.args[0] is node:
                following = user
        if following is None:
            return None
        node = following
