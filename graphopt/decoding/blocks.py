"""Scans that take positions in by blocks, as recurrences of single rows.

Before, of q, k [B, S, H, N], v [B, S, H, P] and log decays a [B, S, H], for blocks of c rows::

    pad(q), pad(k), pad(v), pad(a)        to a multiple of c, in blocks [B, S / c, c, ..], sums of decays,
    what the slice(.., 1, 0, S)                    rows of a block give each other, states between blocks: y
    [B, S, H, P]

After::

    h = exp(a) * h + outer(k, v)          y = q h

No row is in such a program, so nothing can be read off it. It is looked at: what lies between sequences
that are padded and the result that is cut to their length is run on random numbers, and compared with each
of a few recurrences (Yang et al. 2024, arXiv 2312.06635, 2406.06484, 2412.06464; Dao and Gu 2024, arXiv
2405.21060), whichever sequence plays which part. The program that comes of it is compared with the model as
any.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.capture.aliasing import alias_map
from graphopt.decoding.closure import closure
from graphopt.decoding.layouts import name_of
from graphopt.decoding.recurrence import Recurrence
from graphopt.order import has_effect
from graphopt.rules import argument

__all__ = ["blocks_as_recurrences"]

aten = torch.ops.aten

_ROWS = 5
"""Rows on which programs are compared: fewer than any block has, enough for what is handed on to be handed
on."""

_OFF = 1e-4
"""By how much of the largest number a recurrence may be off that computes the same in another order, in
float32; another recurrence is off by as much as rows differ."""


def _decayed(
    h: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """h [B, H, N, P]: decays, and takes in what a key is told."""
    h = h * decay.exp()[:, :, None, None] + key[:, :, :, None] * value[:, :, None, :]
    return h, (h * query[:, :, :, None]).sum(2)


def _corrected(
    h: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    rate: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h [B, H, N, P]: decays, and takes in by how much what a key is told differs from what it says."""
    h = h * decay.exp()[:, :, None, None]
    new = (value - (h * key[:, :, :, None]).sum(2)) * rate[:, :, None]
    h = h + key[:, :, :, None] * new[:, :, None, :]
    return h, (h * query[:, :, :, None]).sum(2)


_FORMS = {
    _decayed: ("query", "key", "value", "decay"),
    _corrected: ("query", "key", "value", "decay", "rate"),
}


@dataclass(frozen=True)
class _Scan:
    """``exit`` is cut to the length of ``sources``, whose rows lie along ``dims``, its own along ``dim``;
    ``inside``: what lies between."""

    exit: fx.Node
    dim: int
    sources: tuple[fx.Node, ...]
    dims: tuple[int, ...]
    inside: tuple[fx.Node, ...]


def blocks_as_recurrences(graph: fx.Graph, tokens: fx.Node, weights: Mapping[str, torch.Tensor]) -> None:
    """Write scans by blocks that are understood as recurrences, in place; others stay. ``tokens``: the
    placeholder [batch, length]; ``weights``: what other placeholders stand for."""
    length = tokens.meta["val"].shape[1]
    for node in list(graph.nodes):
        if name_of(node) != "slice" or not _is_cut(node, length):
            continue
        end = _beside(node, length)
        scan = _scan(end, length) if end is not None else None
        if scan is None:
            continue
        for form, order in _understood(scan, tokens, weights):
            _replace(scan, form, order)
            break


def _is_cut(node: fx.Node, length: torch.SymInt) -> bool:
    """Whether ``node`` takes as many rows as the sequence has of more."""
    source = node.args[0]
    if not isinstance(source, fx.Node):
        # Gone with a scan before.
        return False
    dim = int(argument(node, "dim")) % node.meta["val"].dim()
    before, after = source.meta["val"].shape[dim], node.meta["val"].shape[dim]
    starts = argument(node, "start") in (0, None) and argument(node, "step") == 1
    return starts and _torch.is_same_size(after, length) and not _torch.is_same_size(before, length)


def _beside(node: fx.Node, length: torch.SymInt) -> fx.Node | None:
    """The cut ``node``, what is added to the rows of the scan row by row being added behind it."""
    source: Any = node.args[0]
    if name_of(source) != "add" or len(source.args) != 2:
        return node
    graph = node.graph
    for here, other in (source.args, source.args[::-1]):
        row = _unpadded(other, node, length)
        if row is None or not isinstance(here, fx.Node):
            continue
        with graph.inserting_before(node):
            cut = graph.call_function(node.target, (here, *node.args[1:]))  # type: ignore[arg-type]
            made = graph.call_function(source.target, (cut, row))
        cut.meta, made.meta = dict(node.meta), dict(node.meta)
        node.replace_all_uses_with(made)
        graph.erase_node(node)
        return cut
    return node


def _unpadded(node: Any, like: fx.Node, length: torch.SymInt) -> fx.Node | None:
    """A product with a padded sequence as one with the sequence, of as many rows."""
    if name_of(node) == "pad" and _row_dim(node, length) is not None:
        source: Any = node.args[0]
        return source if isinstance(source, fx.Node) else None
    if name_of(node) != "mul" or len(node.all_input_nodes) != 2:
        return None
    inner = [_unpadded(one, like, length) for one in node.args]
    if sum(one is not None for one in inner) != 1:
        return None
    if any(
        _torch.depends_on(s, length)
        for a, o in zip(node.args, inner, strict=True)
        if o is None
        for s in a.meta["val"].shape
    ):
        return None
    args = tuple(a if o is None else o for a, o in zip(node.args, inner, strict=True))
    with node.graph.inserting_before(like):
        made: fx.Node = node.graph.call_function(node.target, args)
    given: Any = fx.node.map_arg(args, lambda ref: ref.meta["val"])
    made.meta = {**node.meta, "val": _torch.call_on_fakes(node.meta["val"], node.target, given, {})}
    return made


def _row_dim(pad: fx.Node, length: torch.SymInt) -> int | None:
    """Along which dimension a sequence is padded behind, with zeros, by a number that its length tells."""
    source, pads = pad.args[0], pad.args[1]
    if (
        not isinstance(source, fx.Node)
        or not isinstance(pads, (list, tuple))
        or argument(pad, "value") not in (None, 0)
    ):
        return None
    value = source.meta["val"]
    dims = [at for at, size in enumerate(value.shape) if _torch.is_same_size(size, length)]
    if len(dims) != 1:
        return None
    place = 2 * (value.dim() - 1 - dims[0]) + 1
    others = [size for at, size in enumerate(pads) if at != place]
    if place >= len(pads) or any(type(size) is not int or size for size in others):
        return None
    return dims[0] if isinstance(pads[place], fx.Node) else None


def _scan(end: fx.Node, length: torch.SymInt) -> _Scan | None:
    graph = end.graph
    pads = {
        node: dim
        for node in graph.nodes
        if name_of(node) == "pad" and (dim := _row_dim(node, length)) is not None
    }
    inside = closure([end], alias_map(graph), stop={pad.args[0] for pad in pads})
    chosen = {pad.args[0]: dim for pad, dim in pads.items() if pad in inside}
    sources = [node for node in inside if node in chosen]
    if len(sources) < 4 or end.meta["val"].dim() != 4:
        return None
    between = tuple(node for node in inside if node not in chosen)
    dim = int(argument(end, "dim")) % 4
    return _Scan(end, dim, tuple(sources), tuple(chosen[node] for node in sources), between)


def _understood(
    scan: _Scan, tokens: fx.Node, weights: Mapping[str, torch.Tensor]
) -> Iterator[tuple[Any, tuple[int, ...]]]:
    """Recurrences that give what ``scan`` does, and which of its sources play their parts."""
    device = tokens.meta["val"].device
    generator = torch.Generator().manual_seed(0)
    given = []
    for source, dim in zip(scan.sources, scan.dims, strict=True):
        value = source.meta["val"]
        shape = [2 if at == 0 else _ROWS if at == dim else size for at, size in enumerate(value.shape)]
        if not all(isinstance(size, int) for size in shape):
            return
        drawn = torch.randn(shape, generator=generator) / 2
        given.append((-drawn.abs() if len(shape) == 3 else drawn).to(device, value.dtype))
    made = _run(scan, given, tokens, weights)
    if made is None:
        return
    rows = [x.movedim(dim, 0).float() for x, dim in zip(given, scan.dims, strict=True)]
    expected = made.movedim(scan.dim, 0).float()
    for form, parts in _FORMS.items():
        if len(parts) != len(rows):
            continue
        for order in itertools.permutations(range(len(rows))):
            found = _loop(form, [rows[at] for at in order], expected)
            if found is not None and float((found - expected).abs().max()) <= _OFF * max(
                1.0, float(expected.abs().max())
            ):
                yield form, order
                return


def _loop(form: Any, rows: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor | None:
    query, key, value, *heads = rows
    fits = query.shape == key.shape and value.shape == like.shape and query.dim() == 4
    if not fits or any(x.shape != value.shape[:3] for x in heads):
        return None
    h = torch.zeros(*value.shape[1:3], key.shape[3], value.shape[3], device=value.device)
    found = []
    for row in zip(*rows, strict=True):
        h, made = form(h, *row)
        found.append(made)
    return torch.stack(found)


def _run(
    scan: _Scan, given: Sequence[torch.Tensor], tokens: fx.Node, weights: Mapping[str, torch.Tensor]
) -> torch.Tensor | None:
    """What lies between, run; ``None`` where it cannot be for so few rows."""
    known: dict[fx.Node, Any] = dict(zip(scan.sources, given, strict=True))
    sizes = [*zip(tokens.meta["val"].shape, (2, _ROWS), strict=True)]
    try:
        with torch.no_grad():
            for node in scan.inside:
                if isinstance(node.meta.get("val"), torch.SymInt):
                    known[node] = _torch.size_at(node.meta["val"], sizes)
                    continue
                if node.op == "placeholder":
                    # Of inputs nothing but their sizes is read here.
                    if node.name in weights:
                        known[node] = weights[node.name]
                    continue
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, IndexError, KeyError, ValueError):
        return None
    made: torch.Tensor = known[scan.exit]
    return made


def _replace(scan: _Scan, form: Any, order: Sequence[int]) -> None:
    end, graph = scan.exit, scan.exit.graph
    sources = [scan.sources[at] for at in order]
    dims = [scan.dims[at] for at in order]
    rows = [
        _torch.call_on_fakes(s.meta["val"], torch.select, (s.meta["val"], d, 0), {})
        for s, d in zip(sources, dims, strict=True)
    ]
    key, value = rows[1], rows[2]
    kind = {"dtype": end.meta["val"].dtype, "device": value.device}
    numbers = [int(value.shape[1]), int(key.shape[2]), int(value.shape[2])]
    body = _body(form, [key.shape[0], *numbers], rows, kind)
    with graph.inserting_before(end):
        size = graph.call_function(aten.sym_size.int, (sources[0], 0))
        size.meta["val"] = value.shape[0]
        begin = graph.call_function(aten.zeros.default, ([size, *numbers],), kind)
        begin.meta["val"] = _torch.call_on_fakes(value, torch.zeros, ([value.shape[0], *numbers],), kind)
        loop = Recurrence(body, 1, tuple(dims), (scan.dim,))
        call = graph.call_function(loop, ([begin], sources, []))
        values = [[begin.meta["val"]], [s.meta["val"] for s in sources], []]
        call.meta["val"] = _torch.call_on_fakes(value, loop.kinds, values, {})
        made = graph.call_function(getitem, (call, 0))
        made.meta["val"] = call.meta["val"][0]
    for node in (begin, call, made):
        node.meta["nn_module_stack"] = end.meta.get("nn_module_stack")
    end.replace_all_uses_with(made)
    inside = set(scan.inside)
    for node in reversed(graph.nodes):
        # What lies between goes, writes into it and what else was made of it, which nobody reads, included.
        if node.op == "call_function" and not node.users and (node in inside or not has_effect(node)):
            graph.erase_node(node)


def _body(
    form: Any, shape: Sequence[Any], rows: Sequence[torch.Tensor], kind: Mapping[str, Any]
) -> fx.GraphModule:
    """``form`` as a graph of operators."""
    example = [torch.zeros([2, *shape[1:]], **kind)]
    example += [torch.zeros([2, *row.shape[1:]], dtype=row.dtype, device=row.device) for row in rows]
    return _torch.traced_body(form, example)
