"""From a graph with one product of matrices to the values of its kernel.

The kernel runs over the elements of the result and, for each, along what is multiplied and added up. What is
computed from the result is found as in other kernels, and so is what the operands are computed from::

    out[m, n] = epilogue(sum over k of left(m, k) * right(k, n))

Which axes are rows and which are columns shows when the product is reached: they are the axes in its indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx

from graphopt_kernels.emit.build import At, Builder, Built, NotFusible, built_over, space_of_outputs
from graphopt_kernels.emit.index import Affine, Axis, flat, strides_of
from graphopt_kernels.emit.products import Product, product_of, products_of
from graphopt_kernels.emit.reductions import is_reduction
from graphopt_kernels.emit.tile import Value, computed_in

__all__ = ["BuiltProduct", "Roles", "build_product"]

_ACCUMULATED = {
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.int8: torch.int32,
}
"""What products of a dtype are added up in."""

_no = NotFusible.because


@dataclass(frozen=True)
class Roles:
    """The axes of a kernel by what they are in its product, outermost first."""

    batch: tuple[Axis, ...]
    rows: tuple[Axis, ...]
    columns: tuple[Axis, ...]
    inner: tuple[Axis, ...]


@dataclass(frozen=True)
class BuiltProduct(Built):
    """``dot``: the sum of products, before it is rounded; ``dtype``: that of the operands."""

    dot: Value
    roles: Roles
    dtype: torch.dtype


def build_product(graph: fx.Graph) -> BuiltProduct:
    """The kernel of a graph with one product of matrices (see ``build.build``). Raises ``NotFusible``."""
    found = products_of(graph)
    if len(found) != 1:
        raise _no(f"{len(found)} products of matrices: a kernel computes one")
    if any(is_reduction(node.target) for node in graph.nodes):
        raise _no("a reduction beside a product of matrices")
    product = product_of(found[0])
    assert product is not None
    if any(not isinstance(n, int) for n in (*_shape(product.left), *_shape(product.right))):
        raise _no(f"{found[0].name} has sizes that are known at run time alone")
    dtype = product.dtype
    if dtype not in _ACCUMULATED or product.right.meta["val"].dtype != dtype:
        raise _no(f"products of {str(dtype).removeprefix('torch.')} stay with the library")
    inner = product.sizes[-1]
    built = built_over(graph, [*space_of_outputs(graph), (inner, True)], _ProductBuilder)
    assert isinstance(built, BuiltProduct)
    return built


def _shape(node: fx.Node) -> Sequence[object]:
    return tuple(node.meta["val"].shape)


class _ProductBuilder(Builder):
    def __init__(self, graph: fx.Graph, axes: Sequence[Axis]) -> None:
        super().__init__(graph, axes)
        self._at: At | None = None
        self._roles: Roles | None = None
        self._dot: Value | None = None

    def built(self) -> BuiltProduct:
        built = super().built()
        if self._roles is None or self._dot is None or self._dot not in built.values:
            raise _no("nothing that is stored is made from the product")
        return BuiltProduct(
            built.tile,
            built.values,
            built.stores,
            built.inputs,
            built.outputs,
            self._dot,
            self._roles,
            self._dot.payload,
        )

    def spaces(self) -> list[list[Axis]]:
        # Rows and columns alone: what runs along the inner axis is added up.
        return [[axis for axis in self.tile.axes if not axis.reduced]]

    def product(self, node: fx.Node, at: At) -> Value:
        found = product_of(node)
        if found is None:
            return super().product(node, at)
        if at.conditions:
            raise _no(f"{node.name} is a part of a concatenation")
        if self._at is not None and self._at != at:
            raise _no(f"elements of {node.name} are read in two ways")
        batch, rows, columns, _ = found.sizes
        *of_batch, row, column = at.indices
        roles = Roles(
            tuple(axis for index in of_batch for axis in self._all_of(node, index, batch)),
            self._all_of(node, row, rows),
            self._all_of(node, column, columns),
            tuple(axis for axis in self.tile.axes if axis.reduced),
        )
        if {*roles.batch, *roles.rows, *roles.columns} != self.tile.outer:
            raise _no(f"{node.name} is broadcast by what is computed from it")
        self._at, self._roles = at, roles
        return self._finished(node, found, at, self._summed(found, roles, of_batch, row, column))

    def _all_of(self, node: fx.Node, index: Affine, size: int) -> tuple[Axis, ...]:
        """The axes of an index that runs through all of ``size`` elements, outermost first."""
        axes: list[Axis] = []
        step = 1
        for atom, factor in sorted(index.terms, key=lambda term: term[1]):
            if not isinstance(atom, Axis) or atom.reduced or factor != step:
                raise _no(f"elements of {node.name} are not read in order")
            axes.append(atom)
            step *= atom.extent
        if step != size or index.constant:
            raise _no(f"a part of {node.name} is read")
        return tuple(reversed(axes))

    def _summed(
        self, found: Product, roles: Roles, of_batch: Sequence[Affine], row: Affine, column: Affine
    ) -> Value:
        extents = [axis.extent for axis in roles.inner]
        inner = flat([Affine.atom(axis) for axis in roles.inner], strides_of(extents))
        left = self.element(found.left, At((*of_batch, row, inner)))
        right = self.element(found.right, At((*of_batch, inner, column)))
        self._dot = self.tile.dot(left, right, found.dtype, _ACCUMULATED[found.dtype])
        return self._dot

    def _finished(self, node: fx.Node, found: Product, at: At, total: Value) -> Value:
        """The element that ATen gives: scaled and added to before it is rounded, as the library does."""
        dtype = node.meta["val"].dtype
        held = total.dtype
        if found.alpha != 1:
            total = self.tile.op("mul", (total, self.tile.constant(found.alpha, held)), held)
        if found.added is not None and found.beta != 0:
            added = self.operand(found.added, node, at, computed_in(held))
            if found.beta != 1:
                added = self.tile.op("mul", (added, self.tile.constant(found.beta, held)), held)
            total = self.tile.op("add", (total, added), held)
        return self.rounded(total, dtype)
