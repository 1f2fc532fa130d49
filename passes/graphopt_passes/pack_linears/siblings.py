"""Products that read the same value, and which of them may be computed as one.

::

    q = linear(x, Wq)    k = linear(x, Wk)    r = rope(q)    v = linear(x, Wv)        one group of three
    g = linear(x, Wg)    a = attention(...)   h = linear(x, Wh)                       apart: ``h`` would wait

A group stands together: between its products no other product of matrices or attention runs, beside
which the results of later ones would be held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from graphopt.candidate import Reason
from graphopt.capture.aliasing import written_inputs
from graphopt.capture.structure import Line
from graphopt.provenance import note_of
from graphopt.rules import argument
from graphopt_passes.pack_linears.readers import readers_of, spoiled

__all__ = ["Product", "group_key", "products", "refusal", "runs"]

_aten = torch.ops.aten
_ALIGNED = 16
"""Bytes that every result begins on within a row, so that its readers load as wide as they did."""


_LOSSES = frozenset({_aten.cross_entropy_loss.default, _aten.log_softmax.int, _aten._log_softmax.default})


@dataclass(frozen=True)
class Product:
    """``node`` computes ``source @ weight.T (+ bias)``; the weight is [columns, depth]."""

    node: fx.Node
    source: fx.Node
    weight: fx.Node
    bias: fx.Node | None

    @property
    def columns(self) -> int:
        return int(self.weight.meta["val"].shape[0])

    @property
    def depth(self) -> int:
        return int(self.weight.meta["val"].shape[1])


def products(nodes: Iterable[fx.Node]) -> Iterator[Product | tuple[fx.Node, Reason]]:
    """Every product of a value with a weight among the calls, or the value and why one that looks like it
    is none."""
    for node in nodes:
        parts = _parts(node)
        if parts is None:
            continue
        source, weight, bias = parts
        if isinstance(weight, Reason):
            yield source, weight
        elif not all(isinstance(size, int) for size in weight.meta["val"].shape):
            yield source, Reason("the size of its weight is known at run time alone", (node.name,))
        else:
            yield Product(node, source, weight, bias)


def _parts(node: fx.Node) -> tuple[fx.Node, fx.Node | Reason, fx.Node | None] | None:
    source: Any
    weight: Any
    bias: Any = None
    if node.target is _aten.linear.default:
        source, weight, bias = node.args[0], node.args[1], argument(node, "bias")
    elif node.target in (_aten.matmul.default, _aten.mm.default):
        source, turned = node.args[:2]
        weight = _turned_back(node, turned)
    elif node.target is _aten.addmm.default:
        bias, source, turned = node.args[:3]
        if argument(node, "beta") != 1 or argument(node, "alpha") != 1 or _rank(bias) != 1:
            return None
        weight = _turned_back(node, turned)
    else:
        return None
    if not isinstance(source, fx.Node) or _rank(source) < 2 or weight is None:
        return None
    if isinstance(weight, fx.Node) and _rank(weight) != 2:
        return None
    return source, weight, bias


def _turned_back(node: fx.Node, turned: Any) -> fx.Node | Reason | None:
    """The [columns, depth] matrix that ``turned`` is the transpose of."""
    if not isinstance(turned, fx.Node) or _rank(turned) != 2:
        return None
    if turned.target is _aten.t.default:
        return turned.args[0]  # type: ignore[return-value]
    if turned.target is _aten.transpose.int and {d % 2 for d in turned.args[1:3]} == {0, 1}:  # type: ignore[operator]
        return turned.args[0]  # type: ignore[return-value]
    if turned.op in ("placeholder", "get_attr"):
        return Reason(
            "its weight is stored by columns: gradients of weights next to each other would be copied",
            (node.name,),
        )
    return None


def _rank(value: Any) -> int:
    known = value.meta.get("val") if isinstance(value, fx.Node) else None
    return known.dim() if isinstance(known, torch.Tensor) else -1


def group_key(product: Product, line: Line, trained: Set[fx.Node]) -> tuple[Any, ...]:
    """Equal for products that may be one: same operand, kinds of weights, and modes that they run under."""
    weight, result = product.weight.meta["val"], product.node.meta["val"]
    region = product.node.meta.get("ac_graph_id")
    state = line.ambient.states[line.position[product.node]].key
    kinds = (weight.dtype, weight.device, result.dtype, product.depth)
    return (product.source, kinds, product.weight in trained, product.node in trained, state, region)


def difference(one: Product, other: Product, line: Line, trained: Set[fx.Node]) -> Reason:
    """Why two products of one value are of different groups."""
    names = (one.node.name, other.node.name)
    left, right = (group_key(product, line, trained) for product in (one, other))
    if left[1] != right[1]:
        return Reason("its weight is of another type", names)
    if left[2] != right[2]:
        return Reason("one weight is trained and the other frozen", names)
    if left[3:5] != right[3:5]:
        return Reason("autocast or the gradient mode changes in between", names)
    return Reason("they lie in other regions that the model checkpoints itself", names)


def refusal(
    product: Product, first: Product, before: Sequence[Product], width: int, line: Line, pass_id: str
) -> Reason | None:
    """Why a product cannot be part of a pack of ``width`` columns that stands at ``first``."""
    node, weight = product.node, product.weight.meta["val"]
    here = (node.name,)
    unknown = line.ambient.unknown
    if unknown is not None and unknown[0] <= line.position[node]:
        return Reason("the gradient mode is not known", here)
    for known in (note_of(product.node), note_of(first.node)):
        if known is not None and known.pass_id == pass_id:
            return Reason("it is packed already", here)
    if not weight.is_contiguous():
        return Reason("its weight is not laid out by rows", here)
    if product.columns * node.meta["val"].element_size() % _ALIGNED:
        return Reason(f"its {product.columns} columns do not end on {_ALIGNED} bytes", here)
    if product.bias is not None and tuple(product.bias.meta["val"].shape) != (product.columns,):
        return Reason("its bias is not one number for each column", here)
    if any(loss.target in _LOSSES for loss in readers_of(product.node, line, through_casts=True)):
        return Reason("a loss over its columns may be computed in chunks", here)
    if product.weight in [other.weight for other in before]:
        return Reason("it has the weight of another one", here)
    state = line.ambient.states[line.position[node]]
    if state.autocast and weight.dtype not in (torch.float32, node.meta["val"].dtype):
        return Reason("autocast cannot lay its weight beside others", here)
    start = line.position[first.node]
    for part in (product.weight, product.bias):
        if part is not None and line.position.get(part, -1) >= start:
            return Reason("its weight or bias is made after the first of them", (node.name, part.name))
    return _memory(product, start, line) or spoiled(node, width, line)


def _memory(product: Product, start: int, line: Line) -> Reason | None:
    """What would see that the result shares memory, or that it is computed earlier."""
    node, roots = product.node, line.aliases.roots
    if node in line.aliases.written:
        return Reason("its result is written in place", (node.name,))
    output = next(known for known in reversed(line.graph.nodes) if known.op == "output")
    for leaf in output.all_input_nodes:
        if node in roots.get(leaf, ()):
            return Reason("its result is an output, which would share memory with others", (node.name,))
    read = {root for ref in node.all_input_nodes for root in roots[ref]}
    for other in line.nodes[start : line.position[node]]:
        if read & {root for ref in written_inputs(other) for root in roots[ref]}:
            return Reason("what it reads is written in between", (node.name, other.name))
    return None


def runs(
    group: Sequence[Product], siblings: Set[fx.Node], line: Line, is_product: Callable[[fx.Node], bool]
) -> list[list[Product]]:
    """The group cut where a product or attention that is none of the ``siblings`` runs in between."""
    found = [[group[0]]]
    for product in group[1:]:
        last = line.position[found[-1][-1].node]
        between = line.nodes[last + 1 : line.position[product.node]]
        if any(node not in siblings and is_product(node) for node in between):
            found.append([product])
        else:
            found[-1].append(product)
    return found
