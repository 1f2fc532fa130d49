"""The projections next to an attention: of its queries, keys and values, and of what it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch.fx as fx

from graphopt.decoding.capture import Uncached
from graphopt.decoding.columns import PRODUCTS, TURNS
from graphopt.decoding.layouts import name_of
from graphopt.decoding.regions import Region

__all__ = ["projection_before", "projection_behind", "weights_beside", "weights_of"]


def weights_of(uncached: Uncached, node: fx.Node) -> list[tuple[fx.Node, list[fx.Node]]]:
    """Placeholders of the weights that ``node`` reads, and what turns each before it does."""
    found = []
    for source in node.all_input_nodes:
        chain = [source]
        while name_of(chain[-1]) in TURNS and isinstance(chain[-1].args[0], fx.Node):
            chain.append(chain[-1].args[0])
        if chain[-1].name in uncached.weights:
            found.append((chain[-1], chain[:-1]))
    return found


def projection_before(uncached: Uncached, node: fx.Node) -> fx.Node | None:
    """The nearest product with a weight that ``node`` is made of."""
    return _nearest(uncached, node, lambda here: here.all_input_nodes, -1)


def projection_behind(uncached: Uncached, node: fx.Node) -> fx.Node | None:
    """The nearest product of ``node`` with a weight."""
    return _nearest(uncached, node, lambda here: here.users, 1)


def _nearest(
    uncached: Uncached, node: fx.Node, following: Callable[[fx.Node], Iterable[fx.Node]], sign: int
) -> fx.Node | None:
    place = {one: number for number, one in enumerate(node.graph.nodes)}
    pending, seen = [node], set()
    while pending:
        here = min(pending, key=lambda one: sign * place[one])
        pending.remove(here)
        if here in seen or here.op != "call_function":
            continue
        seen.add(here)
        if name_of(here) in PRODUCTS and weights_of(uncached, here) and (sign < 0 or here is not node):
            return here
        pending.extend(following(here))
    return None


def weights_beside(uncached: Uncached, regions: Iterable[Region]) -> tuple[str, ...]:
    """Placeholders of the weights of projections next to ``regions``, each once."""
    found: dict[str, None] = {}
    for region in regions:
        products = [projection_before(uncached, node) for node in (region.query, region.key, region.value)]
        for product in (*products, projection_behind(uncached, region.output)):
            if product is not None:
                found |= {weight.name: None for weight, _ in weights_of(uncached, product)}
    return tuple(found)
