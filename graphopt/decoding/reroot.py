"""Keys and values of later attentions, made of one early stream (SwiftKV, arXiv 2410.03960).

Before, for ``streams`` {3: 2}, ``x2`` and ``x3`` being what enters layers 2 and 3::

    k2, v2 = heads(linear(norm(x2), wk2)), ..;  x3 = layer(x2, attention(q2, k2, v2))
    k3, v3 = heads(linear(norm(x3), wk3)), ..;  y3 = attention(heads(linear(norm(x3), wq3)), k3, v3)

After::

    k2, v2 = heads(linear(norm(x2), wk2)), ..;  x3 = layer(x2, attention(q2, k2, v2))
    k3, v3 = heads(linear(norm(x2), wk3)), ..;  y3 = attention(heads(linear(norm(x3), wq3)), k3, v3)

Norms and projections are the layer's own. Nothing that is kept of a prompt depends on layers behind the early
one then, so they see the last row of a prompt alone (``graphopt.decoding.last_row``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.fx as fx

from graphopt.capture.aliasing import alias_map, written_inputs
from graphopt.decoding.capture import Uncached
from graphopt.decoding.columns import PRODUCTS
from graphopt.decoding.dead import remove_dead
from graphopt.decoding.layouts import name_of
from graphopt.decoding.part import Part, following
from graphopt.decoding.projections import projection_before, weights_of
from graphopt.decoding.regions import Region, attention_regions, token_values
from graphopt.decoding.share import redirected
from graphopt.errors import InputsError

__all__ = ["as_assigned", "check_streams", "made_early", "rerooted", "streams_into"]


def as_assigned(
    uncached: Uncached,
    regions: Sequence[Region],
    sources: Mapping[int, int],
    streams: Mapping[int, int],
    weights: Mapping[str, torch.Tensor] | None = None,
) -> Uncached:
    """The program whose attentions make keys and values of ``streams`` and read those of ``sources``; what
    made others is still there. ``weights``, by the placeholders that it comes to have, take the place of its
    own."""
    if streams:
        uncached = rerooted(uncached, regions, streams)
        regions = attention_regions(uncached)
    if sources:
        uncached = redirected(uncached, regions, sources)
    given = weights or {}
    return replace(uncached, weights={k: given.get(k, v) for k, v in uncached.weights.items()})


def streams_into(uncached: Uncached, regions: Sequence[Region]) -> list[fx.Node | None]:
    """The value that all of an attention and of what follows it is made of, of the tokens, by attention:
    ``None`` where that is no single one."""
    values = token_values(uncached)
    order = [node for node in uncached.gm.graph.nodes if node in values]
    place = {node: number for number, node in enumerate(order)}
    aliases = alias_map(uncached.gm.graph)
    last = [0] * len(order)
    for node, number in place.items():
        # Memory that is written into is read wherever a view of it is.
        for source in (*node.all_input_nodes, *written_inputs(node)):
            for read in (source, *aliases.roots.get(source, ())):
                if read in place:
                    last[place[read]] = max(last[place[read]], number)
    cuts: list[int] = []
    reached = -1
    for number, node in enumerate(order):
        # Nothing before it is read behind it, and it is a row for each token.
        if reached <= number and _has_rows(node, uncached):
            cuts.append(number)
        reached = max(reached, last[number])
    found: list[fx.Node | None] = []
    for region in regions:
        ends = [projection_before(uncached, node) for node in (region.query, region.key, region.value)]
        first = min((place[end] for end in ends if end in place), default=0)
        before = [number for number in cuts if number < first]
        stream = order[before[-1]] if before and None not in ends else None
        if stream is not None:
            # Where it is what an earlier layer begins with, this one has more than one.
            roots = {region.key.name, region.value.name, region.query.name}
            made = set(Part(uncached.gm.graph, roots, {stream.name}).nodes)
            stream = None if any(other.output in made for other in regions) else stream
        found.append(stream)
    return found


def _has_rows(node: fx.Node, uncached: Uncached) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() != 3 or not value.is_floating_point():
        return False
    return node.op == "call_function" and uncached.is_length(value.shape[1])


def check_streams(uncached: Uncached, regions: Sequence[Region], streams: Mapping[int, int]) -> None:
    """Raises ``InputsError`` for an attention whose keys and values cannot be made of another's stream."""
    if not streams:
        return
    entering = streams_into(uncached, regions)
    for index, early in streams.items():
        for one in (early, index):
            if entering[one] is None:
                where = regions[one].layer or regions[one].output.name
                usable = [i for i, node in enumerate(entering) if node is not None]
                raise InputsError(
                    f"{where}: what attention {one} is made of is no single stream [batch, length, width]",
                    hint=f"attentions that have one: {', '.join(map(str, usable)) or 'none'}",
                )
        here, there = (entering[one].meta["val"] for one in (index, early))  # type: ignore[union-attr]
        if here.shape[2] != there.shape[2] or here.dtype is not there.dtype:
            raise InputsError(
                f"attention {index} makes keys and values of a stream of {here.shape[2]} {here.dtype}: the "
                f"one that enters attention {early} has {there.shape[2]} {there.dtype}",
                hint=f"leave attention {index} out, or name an early one whose stream is as wide",
            )


def made_early(
    uncached: Uncached, regions: Sequence[Region], streams: Mapping[int, int]
) -> dict[int, tuple[fx.Node, fx.Node, list[fx.Node]]]:
    """By index of ``streams``: the stream that keys and values are made of, the one that they come to be made
    of, and the nodes between that and them."""
    check_streams(uncached, regions, streams)
    entering = streams_into(uncached, regions)
    graph = uncached.gm.graph
    found = {}
    for index, early in streams.items():
        here, there = entering[index], entering[early]
        assert here is not None and there is not None
        region = regions[index]
        behind = following(graph, [here]) - {here}
        part = Part(graph, {region.key.name, region.value.name}, {here.name})
        found[index] = here, there, [node for node in part.nodes if node in behind]
    return found


def rerooted(uncached: Uncached, regions: Sequence[Region], streams: Mapping[int, int]) -> Uncached:
    """The same program, but region ``index`` makes its keys and values of the stream that enters region
    ``streams[index]``. Of weights that make queries too there are two placeholders then.

    Raises ``InputsError`` as ``check_streams`` does.
    """
    paths = made_early(uncached, regions, streams)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(uncached.gm.graph, copies))
    products: list[tuple[fx.Node, fx.Node]] = []
    for index, (here, there, nodes) in paths.items():
        again: dict[fx.Node, fx.Node] = {copies[here]: copies[there]}
        for node in nodes:
            old = copies[node]
            with graph.inserting_before(old):
                again[old] = graph.node_copy(old, lambda ref, again=again: again.get(ref, ref))  # type: ignore[misc]
            if name_of(old) in PRODUCTS:
                products.append((old, again[old]))
        # What makes the old ones stays as it is, writes into their memory included.
        makers = {copies[node] for node in nodes} | set(again.values())
        for end in {regions[index].key, regions[index].value}:
            for user in list(copies[end].users):
                if user not in makers:
                    user.replace_input_with(copies[end], again[copies[end]])
    remove_dead(graph)
    weights, names = dict(uncached.weights), dict(uncached.names)
    made = replace(uncached, gm=fx.GraphModule(torch.nn.Module(), graph), weights=weights, names=names)
    left = set(graph.nodes)
    for before, after in products:
        if before in left and after in left:
            _part_weights(made, after)
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name in weights and not node.users:
            del weights[node.name]
            graph.erase_node(node)
    graph.lint()
    made.gm.recompile()
    return made


def _part_weights(uncached: Uncached, product: fx.Node) -> None:
    """Placeholders of its own for the weights of a product that another one reads as well, in the same
    memory, so that each may be left with its columns."""
    graph = uncached.gm.graph
    for weight, turns in weights_of(uncached, product):
        last = next(n for n in reversed(graph.nodes) if n.op == "placeholder" and n.name in uncached.weights)
        with graph.inserting_after(last):
            made = graph.placeholder(f"{weight.name}_early")
        made.meta = dict(weight.meta)
        tensor = uncached.weights[weight.name]
        part = tensor.detach()
        if isinstance(tensor, torch.nn.Parameter):
            part = torch.nn.Parameter(part, requires_grad=tensor.requires_grad)
        uncached.weights[made.name] = part
        uncached.names[made.name] = uncached.names.get(weight.name, weight.name)
        again = made
        with graph.inserting_before(product):
            for turn in reversed(turns):
                again = graph.node_copy(turn, lambda ref, source=again: source)  # type: ignore[misc]
        product.replace_input_with(turns[0] if turns else weight, again)
