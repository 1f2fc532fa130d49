"""Takes away the columns of projections that nobody reads.

Before, keys and values of the attention being read from another one::

    qkv [B, S, 192] = linear(x, w [192, 64], b [192]);  q = view(slice(qkv, 0:64), [B, S, 4, 16])

After::

    q [B, S, 4, 16] = view(linear(x, w' [64, 64], b' [64]), [B, S, 4, 16])

Which columns are read is found by pushing their numbers through what follows the projection, so heads may be
laid out in any way: one after the other, interleaved, in blocks. Where the columns that are left do not come
to be one value, they are put at their old places.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.decoding.capture import Uncached
from graphopt.decoding.columns import PRODUCTS, TURNS, columns_of
from graphopt.decoding.layouts import name_of

__all__ = ["Narrowed", "narrowed"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Narrowed:
    """A weight of which ``columns`` int64[N] are left, in this order, along dimension ``dim``."""

    placeholder: str
    dim: int
    columns: torch.Tensor


def narrowed(uncached: Uncached) -> tuple[Uncached, tuple[Narrowed, ...]]:
    """``uncached`` without the columns of projections that nobody reads, and what is left of which weights.

    Weights that something else reads as well, tied ones among them, stay as they are. The graph is changed in
    place.
    """
    done: list[Narrowed] = []
    weights = dict(uncached.weights)
    graph = uncached.gm.graph
    tokens = uncached.placeholder(uncached.tokens)
    for node in list(graph.nodes):
        if name_of(node) not in PRODUCTS or name_of(node) == "bmm":
            continue
        parts = _parts(node, weights)
        if parts is None:
            continue
        known = columns_of(node)
        live = _live(known)
        if not 0 < len(live) < int(node.meta["val"].shape[-1]):
            continue
        place = _meeting(node, known, live, tokens)
        columns = live if place is None else known[place].flatten()
        for weight, dim in parts:
            weights[weight.name] = _selected(weights[weight.name], dim, columns)
            weight.meta["val"] = _fake(weight, weights[weight.name])
            done.append(Narrowed(weight.name, dim, columns))
        _revalue(graph, [weight for weight, _ in parts], node)
        if place is None:
            _put_back(graph, node, columns, known, weights)
        else:
            _seen_as(graph, node, place, tokens)
        graph.eliminate_dead_code()
    if done:
        graph.lint()
        uncached.gm.recompile()
    return replace(uncached, weights=weights), tuple(done)


def _parts(node: fx.Node, weights: dict[str, torch.Tensor]) -> list[tuple[fx.Node, int]] | None:
    """The weight of a product and its bias, and along which dimension of each the columns are; ``None`` where
    they are not this product's own."""
    name = name_of(node)
    position = {"linear": 1, "addmm": 2}.get(name, 1)
    weight: Any = node.args[position]
    bias: Any = None
    if name == "linear":
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    elif name == "addmm":
        bias = node.args[0]
    if not isinstance(weight, fx.Node) or len(weight.meta["val"].shape) != 2:
        return None
    dim = 0 if name == "linear" else 1
    while weight.op == "call_function" and name_of(weight) in TURNS and len(weight.users) == 1:
        if name_of(weight) not in ("alias", "detach"):
            dim = 1 - dim
        source = weight.args[0]
        assert isinstance(source, fx.Node)
        weight = source
    found = [(weight, dim)]
    if bias is not None:
        found.append((bias, 0))
    for part, _ in found:
        if not isinstance(part, fx.Node) or part.name not in weights or len(part.users) != 1:
            return None
        tensor = weights[part.name]
        if sum(tensor is other for other in weights.values()) != 1:
            return None
    if bias is not None and weights[bias.name].dim() != 1:
        return None
    return found


def _live(known: dict[fx.Node, Any]) -> torch.Tensor:
    """Columns that something reads other than to lay them out, in order."""
    held = [known[node].flatten() for node in _ends(known)]
    return torch.tensor(sorted({int(one) for part in held for one in part}), dtype=torch.int64)


def _ends(known: dict[fx.Node, Any]) -> Iterator[fx.Node]:
    for node, value in known.items():
        if isinstance(value, torch.Tensor) and any(user not in known for user in node.users):
            yield node


def _meeting(
    node: fx.Node, known: dict[fx.Node, Any], live: torch.Tensor, tokens: fx.Node
) -> fx.Node | None:
    """The first value that holds the live columns alone, through which all that is read goes, and whose other
    dimensions are those of the tokens."""
    for place, value in known.items():
        if place is node or not isinstance(value, torch.Tensor) or value.numel() != len(live):
            continue
        if not torch.equal(value.flatten().sort().values, live) or _token_dims(place, tokens) is None:
            continue
        if not any(_reaches(node, end, place) for end in _ends(known)):
            return place
    return None


def _token_dims(place: fx.Node, tokens: fx.Node) -> tuple[int, ...] | None:
    """Which dimensions of a value are those of the tokens [B, S], in this order; ``None`` where it has no
    such or others that are not fixed."""
    shape = place.meta["val"].shape
    loose = [dim for dim, size in enumerate(shape) if not isinstance(size, int)]
    found = [
        next((dim for dim in loose if _torch.is_same_size(shape[dim], size)), None)
        for size in tokens.meta["val"].shape
    ]
    dims = tuple(dim for dim in found if dim is not None)
    return dims if sorted(dims) == loose and len(set(dims)) == len(found) else None


def _seen_as(graph: fx.Graph, node: fx.Node, place: fx.Node, tokens: fx.Node) -> None:
    """``place`` is a view of ``node``, whose columns are its own in its order."""
    dims = _token_dims(place, tokens)
    assert dims is not None
    shape = place.meta["val"].shape
    order = [*dims, *(dim for dim in range(len(shape)) if dim not in dims)]
    back = [order.index(dim) for dim in range(len(shape))]
    sizes: list[Any] = []
    with graph.inserting_before(node):
        for dim, size in enumerate(tokens.meta["val"].shape):
            sizes.append(graph.call_function(aten.sym_size.int, (tokens, dim)))
            sizes[-1].meta["val"] = size
    with graph.inserting_after(node):
        view = graph.call_function(aten.view.default, (node, sizes + [shape[dim] for dim in order[2:]]))
    made = view
    if back != sorted(back):
        with graph.inserting_after(view):
            made = graph.call_function(aten.permute.default, (view, back))
    _set_value(view)
    made.meta = dict(place.meta)
    place.replace_all_uses_with(made)


def _reaches(start: fx.Node, end: fx.Node, but: fx.Node) -> bool:
    """Whether ``end`` is made of ``start`` on a way that leaves ``but`` out."""
    seen: set[fx.Node] = set()
    pending = [end]
    while pending:
        node = pending.pop()
        if node is start:
            return True
        if node in seen or node is but:
            continue
        seen.add(node)
        pending.extend(node.all_input_nodes)
    return False


def _selected(weight: torch.Tensor, dim: int, columns: torch.Tensor) -> torch.Tensor:
    part = weight.detach().index_select(dim, columns.to(weight.device))
    if isinstance(weight, torch.nn.Parameter):
        return torch.nn.Parameter(part, requires_grad=weight.requires_grad)
    return part


def _fake(node: fx.Node, tensor: torch.Tensor) -> torch.Tensor:
    mode = _torch.fake_mode_of([node.meta["val"]])
    with mode:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _revalue(graph: fx.Graph, changed: list[fx.Node], product: fx.Node) -> None:
    """What turned weights and the product come to be."""
    dirty = set(changed)
    for node in graph.nodes:
        if node.op == "call_function" and dirty.intersection(node.all_input_nodes):
            _set_value(node)
            dirty.add(node)
        if node is product:
            return


def _set_value(node: fx.Node) -> None:
    given: Any = fx.node.map_arg((node.args, node.kwargs), lambda ref: ref.meta["val"])
    like = next(ref.meta["val"] for ref in node.all_input_nodes if isinstance(ref.meta["val"], torch.Tensor))
    target: Any = node.target
    node.meta["val"] = _torch.call_on_fakes(like, target, *given)


def _put_back(
    graph: fx.Graph,
    node: fx.Node,
    columns: torch.Tensor,
    known: dict[fx.Node, Any],
    weights: dict[str, torch.Tensor],
) -> None:
    """The columns that are left at their old places; others hold one of them, which nobody reads."""
    width = known[node].numel()
    places = torch.zeros(width, dtype=torch.int64)
    places[columns] = torch.arange(len(columns))
    last = next(n for n in reversed(graph.nodes) if n.op == "placeholder" and n.name in weights)
    with graph.inserting_after(last):
        held = graph.placeholder(f"columns_of_{node.name}")
    weights[held.name] = places.to(weights[last.name].device)
    held.meta["val"] = _fake(node, weights[held.name])
    with graph.inserting_after(node):
        wide = graph.call_function(aten.index_select.default, (node, -1, held))
    _set_value(wide)
    node.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)
