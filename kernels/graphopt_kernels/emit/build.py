"""From a graph of ATen operators to the values of one kernel.

Values are found backwards from what is stored: to store an element of an output is to ask its node for that
element, which asks its inputs for theirs. Views change the indices on the way and leave nothing behind.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.fx as fx

from graphopt.candidate import Reason
from graphopt_kernels.emit import views
from graphopt_kernels.emit.index import (
    Affine,
    Axis,
    Bounds,
    Indices,
    Split,
    Unindexable,
    flat,
    strides_of,
    unflat,
)
from graphopt_kernels.emit.pointwise import Pointwise, pointwise_of
from graphopt_kernels.emit.products import is_product
from graphopt_kernels.emit.reductions import Reduction, is_reduction, reduction_of
from graphopt_kernels.emit.tile import Condition, Store, Tile, Value, computed_in

__all__ = ["At", "Builder", "Built", "NotFusible", "build", "built_over", "is_supported", "space_of_outputs"]

aten = torch.ops.aten
prims = torch.ops.prims

_SPLITS = 32
"""Axes are split at most so often; each split divides an extent, so this is far beyond what views need."""


class NotFusible(Exception):
    """Why operators do not go into one kernel."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason

    @classmethod
    def because(cls, text: str) -> NotFusible:
        return cls(Reason(text))


_no = NotFusible.because


@dataclass(frozen=True)
class Built:
    """A kernel: its values in order, what it stores, and the tensors (fake) that it reads and writes."""

    tile: Tile
    values: tuple[Value, ...]
    stores: tuple[Store, ...]
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]


def build(graph: fx.Graph) -> Built:
    """The kernel of a graph of placeholders, supported operators and a tuple of outputs, each with a fake
    tensor of static shape in ``meta["val"]``. Raises ``NotFusible``."""
    return built_over(graph, _space(graph), Builder)


def built_over(
    graph: fx.Graph, space: Sequence[tuple[int, bool]], builder: Callable[[fx.Graph, list[Axis]], Builder]
) -> Built:
    """The kernel of a graph over axes of the extents ``space`` (each with whether it is reduced), or over
    finer ones where views ask for them. Raises ``NotFusible``."""
    axes = _named(space)
    for _ in range(_SPLITS):
        try:
            return builder(graph, axes).built()
        except Split as split:
            axes = _split(axes, split)
        except Unindexable as error:
            raise _no(f"a view that no loop follows: {error}") from error
    raise _no(f"axes were split {_SPLITS} times")


def _split(axes: Sequence[Axis], split: Split) -> list[Axis]:
    finer: list[tuple[int, bool]] = []
    for axis in axes:
        if axis == split.axis:
            finer += [(axis.extent // split.inner, axis.reduced), (split.inner, axis.reduced)]
        else:
            finer.append((axis.extent, axis.reduced))
    return _named(finer)


def _named(extents: Sequence[tuple[int, bool]]) -> list[Axis]:
    names = {True: iter(range(len(extents))), False: iter(range(len(extents)))}
    return [Axis(f"{'r' if along else 'x'}{next(names[along])}", n, along) for n, along in extents]


def _value(node: fx.Node) -> torch.Tensor:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        raise _no(f"{node.name} is {type(value).__name__}, not a tensor")
    return value


def _shape(node: fx.Node) -> list[int]:
    shape = _value(node).shape
    if any(not isinstance(n, int) for n in shape):
        raise _no(f"{node.name} has sizes that are known at run time alone")
    return [int(n) for n in shape]


def _space(graph: fx.Graph) -> list[tuple[int, bool]]:
    """Extents that the kernel runs over, each with whether rows run along it, in the order of dimensions.

    Rows run along what is reduced; where leading dimensions are reduced and nothing else, along what is
    kept, and
    the kernel sums over rows. The reduction that reads most decides: one of fewer elements runs along rows of
    its result and is no rival. Of several as large the first that is not of leading dimensions does.
    """
    reductions = []
    for node in graph.nodes:
        found = reduction_of(node)
        if found is not None:
            shape = _shape(found.source)
            gone = {d % len(shape) for d in found.dims if shape and shape[d] > 1}
            if not gone:
                continue  # The only element there is.
            kept = {d for d, n in enumerate(shape) if n > 1 and d not in gone}
            leading = bool(gone) and bool(kept) and max(gone) < min(kept)
            reductions.append((shape, kept if leading else gone, leading))
    if reductions:
        most = max(prod(shape) for shape, *_ in reductions)
        largest = [r for r in reductions if prod(r[0]) == most]
        shape, along, _ = next((r for r in largest if not r[2]), largest[0])
        return [(n, d in along) for d, n in enumerate(shape) if n > 1]
    return space_of_outputs(graph)


def space_of_outputs(graph: fx.Graph) -> list[tuple[int, bool]]:
    """The extents of the largest output, none of them reduced."""
    (output,) = [node for node in graph.nodes if node.op == "output"]
    shapes = [_shape(node) for node in output.args[0]]
    largest_shape = max(shapes, key=lambda s: (prod(s), len(s)))
    return [(n, False) for n in largest_shape if n > 1]


@dataclass(frozen=True)
class At:
    """Which element of a node is asked for, and within which part of a concatenation."""

    indices: Indices
    conditions: tuple[Condition, ...] = ()

    def with_indices(self, indices: Indices) -> At:
        return At(indices, self.conditions)


class Builder:
    def __init__(self, graph: fx.Graph, axes: Sequence[Axis]) -> None:
        self._graph = graph
        self.tile = Tile(axes)
        self._known: dict[tuple[fx.Node, At], Value] = {}
        self._sizes: dict[Value, int] = {}
        self._inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self._number = {node: i for i, node in enumerate(self._inputs)}
        (output,) = [node for node in graph.nodes if node.op == "output"]
        self._outputs: list[fx.Node] = list(output.args[0])

    def built(self) -> Built:
        if any(prod(_shape(node)) == 0 for node in (*self._inputs, *self._outputs)):
            raise _no("an operand has no elements")
        # The largest first: which way smaller ones are looked at shows in what they share with it.
        ordered = sorted(range(len(self._outputs)), key=lambda i: -prod(_shape(self._outputs[i])))
        found = {number: self._stored(number, self._outputs[number]) for number in ordered}
        stores = tuple(found[number] for number in range(len(self._outputs)))
        values = _reached(self.tile, stores)
        if any(a.kind == "column" for value in values for a in value.args):
            raise _no("something is computed from a sum over the rows of the kernel")
        return Built(
            self.tile,
            values,
            stores,
            tuple(_value(node) for node in self._inputs),
            tuple(_value(node) for node in self._outputs),
        )

    def spaces(self) -> list[list[Axis]]:
        """The axes that an output may be stored along, in the order in which they are tried."""
        axes = list(self.tile.axes)
        return [axes, [a for a in axes if not a.reduced], [a for a in axes if a.reduced]]

    def _stored(self, number: int, node: fx.Node) -> Store:
        """What is stored of an output, and where."""
        shape = _shape(node)
        numel = prod(shape)
        spaces = self.spaces()
        refused = _no(f"{tuple(shape)} is not what the loops of the kernel run over")
        best: Store | None = None
        fewest = 0
        for number_of_space, loops in enumerate(spaces):
            extents = [a.extent for a in loops]
            if prod(extents) != numel or (best is not None and number_of_space < 2):
                continue
            position = flat([Affine.atom(a) for a in loops], strides_of(extents))
            indices = unflat(position, shape, self._bounds(()))
            before = len(self.tile)
            try:
                value = self.element(node, At(indices))
            except NotFusible as error:
                refused = error
                continue
            # With as many rows as columns both ways are right, and one of them reads against the grain.
            if best is None or len(self.tile) - before < fewest:
                best, fewest = (
                    Store(number, value, flat(indices, _value(node).stride())),
                    len(self.tile) - before,
                )
        if best is None:
            raise refused
        return best

    def _bounds(self, conditions: Sequence[Condition]) -> Bounds:
        bounds = Bounds({}, self._sizes)
        for condition in conditions:
            bounds = bounds.narrow(condition.axis, condition.low, condition.high)
        return bounds

    def element(self, node: fx.Node, at: At) -> Value:
        """The element of ``node`` at ``at``."""
        # An index along a dimension of one element is 0.
        at = at.with_indices(
            tuple(Affine() if n == 1 else i for i, n in zip(at.indices, _shape(node), strict=True))
        )
        key = node, at
        if key not in self._known:
            self._known[key] = self._element(node, at)
        return self._known[key]

    def _element(self, node: fx.Node, at: At) -> Value:
        if node.op == "placeholder":
            value = _value(node)
            position = flat(at.indices, value.stride())
            return self.tile.load(self._number[node], position, at.conditions, value.dtype)
        view = views.source_indices(node, at.indices, self._bounds(at.conditions))
        if view is not None:
            return self.element(view[0], at.with_indices(view[1]))
        special = _SPECIAL.get(node.target)
        if special is not None:
            return special(self, node, at)
        rule = pointwise_of(node.target)
        if rule is not None:
            return self._pointwise(node, rule, at)
        reduction = reduction_of(node)
        if reduction is not None:
            return self._reduce(node, reduction, at)
        return self.product(node, at)

    def product(self, node: fx.Node, at: At) -> Value:
        """The element of a product of matrices: for builders of kernels that have one."""
        raise _no(f"{node.target} has no Triton expression")

    # --- pointwise ---------------------------------------------------------------------------

    def operand(self, argument: Any, node: fx.Node, at: At, dtype: torch.dtype) -> Value:
        """``argument`` of ``node`` at the element that belongs to ``at``, in ``dtype``."""
        if isinstance(argument, fx.Node):
            indices = views.broadcast(at.indices, _shape(node), _shape(argument))
            return self.converted(self.element(argument, at.with_indices(indices)), dtype, rounds=False)
        if isinstance(argument, (bool, int, float)):
            return self.tile.constant(argument, dtype)
        raise _no(f"{node.name} takes {argument!r}")

    def converted(self, value: Value, dtype: torch.dtype, *, rounds: bool = True) -> Value:
        """``value`` in another dtype. Without ``rounds`` only what it is computed in has to be right."""
        if value.kind == "column":
            # The launcher, which adds up the parts, rounds their sum.
            return value
        wanted = dtype if rounds else computed_in(dtype)
        if value.dtype == wanted or (not rounds and computed_in(value.dtype) == wanted):
            return value
        if rounds and computed_in(value.dtype) == dtype:
            # A 16-bit float is held in float32 already.
            return value if value.dtype == dtype else self.tile.op("to", (value,), dtype)
        return self.tile.op("to", (value,), wanted)

    def _pointwise(self, node: fx.Node, rule: Pointwise, at: At) -> Value:
        result = _value(node).dtype
        arguments = list(node.args)
        dtype = computed_in(result)
        if rule.computed == "arguments":
            dtype = computed_in(_promoted(arguments))
        values = [self.operand(a, node, at, dtype) for a in arguments]
        alpha = node.kwargs.get("alpha", 1)
        if alpha != 1:
            if not isinstance(alpha, (int, float)):
                raise _no(f"{node.name} is scaled by {alpha!r}")
            scale = self.tile.constant(alpha, dtype)
            values[1] = self.tile.op("mul", (values[1], scale), dtype)
        elif set(node.kwargs) - {"alpha"}:
            raise _no(f"{node.name} takes {', '.join(node.kwargs)}")
        if rule.computed == "arguments":
            return self.tile.op(rule.name, values, torch.bool)
        made = self.tile.op(rule.name, values, dtype)
        return self.rounded(made, result) if rule.rounds else made

    def rounded(self, value: Value, dtype: torch.dtype) -> Value:
        return value if value.dtype == dtype else self.tile.op("to", (value,), dtype)

    # --- reductions --------------------------------------------------------------------------

    def along(
        self, node: fx.Node, source: fx.Node, dims: Sequence[int], keepdim: bool, at: At
    ) -> tuple[At, int, bool]:
        """The elements of ``source`` that are reduced to the element ``at`` of ``node``, how many there are,
        and whether they lie across the rows of the kernel."""
        shape = _shape(source)
        along = sorted({d % len(shape) for d in dims}) if shape else []
        kept = [i for d, i in enumerate(at.indices) if not (keepdim and d in along)]
        extents = [shape[d] for d in along]
        if prod(extents) == 1:
            rest = iter(kept)
            only = tuple(Affine() if d in along else next(rest) for d in range(len(shape)))
            return at.with_indices(only), 1, False
        if at.conditions:
            raise _no("a reduction within a part of a concatenation")
        column = self._is_column(kept, extents)
        loops = [a for a in self.tile.axes if a.reduced != column]
        if prod(extents) != prod(a.extent for a in loops):
            raise _no(f"{node.name} reduces {extents}, the kernel {[a.extent for a in loops]}")
        position = flat([Affine.atom(a) for a in loops], strides_of([a.extent for a in loops]))
        gone, rest = iter(unflat(position, extents, self._bounds(()))), iter(kept)
        indices = tuple(next(gone) if d in along else next(rest) for d in range(len(shape)))
        return At(indices), prod(extents), column

    def _is_column(self, kept: Sequence[Affine], extents: Sequence[int]) -> bool:
        if any(isinstance(atom, Value) for index in kept for atom, _ in index.terms):
            raise _no("a reduction of an element that is looked up")
        axes = frozenset().union(*(i.axes for i in kept))
        if axes & self.tile.reduced and axes & self.tile.outer:
            raise _no("a reduction inside of an element that the loops run over")
        if axes:
            return bool(axes & self.tile.reduced)
        # Nothing is kept: along the rows if that is all there is.
        return prod(a.extent for a in self.tile.reduced) != prod(extents)

    def _reduce(self, node: fx.Node, reduction: Reduction, at: At) -> Value:
        dtype = reduction.dtype or _value(node).dtype
        source = reduction.source
        elements, count, column = self.along(node, source, reduction.dims, reduction.keepdim, at)
        held = computed_in(dtype)
        value = self.converted(self.element(source, elements), held, rounds=False)
        name = "sum" if reduction.name == "mean" else reduction.name
        if column and name != reduction.name:
            raise _no(f"{node.name} is a mean over the rows of the kernel")
        made = value if count == 1 else self.tile.reduce(name, value, column=column, dtype=held)
        if column:
            # The launcher adds up the parts and rounds the sum.
            return made
        if reduction.name == "mean":
            made = self.tile.op("div", (made, self.tile.constant(float(count), held)), held)
        return self.rounded(made, dtype)

    def variance(
        self, node: fx.Node, source: fx.Node, dims: Sequence[int], keepdim: bool, correction: float, at: At
    ) -> tuple[Value, Value]:
        """Variance and mean in two passes: as exact as Welford's, and the row is at hand anyway."""
        dtype = computed_in(_value(node).dtype)
        elements, count, column = self.along(node, source, dims, keepdim, at)
        if column:
            raise _no(f"{node.name} is a variance over the rows of the kernel")
        tile = self.tile
        value = self.converted(self.element(source, elements), dtype, rounds=False)

        def total_of(value: Value) -> Value:
            return value if count == 1 else tile.reduce("sum", value, column=False, dtype=dtype)

        total = total_of(value)
        mean = tile.op("div", (total, tile.constant(float(count), dtype)), dtype)
        distance = tile.op("sub", (value, mean), dtype)
        squares = total_of(tile.op("mul", (distance, distance), dtype))
        divisor = tile.constant(float(max(count - correction, 0)), dtype)
        return tile.op("div", (squares, divisor), dtype), mean


def _promoted(arguments: Sequence[Any]) -> torch.dtype:
    """The dtype that operands of a comparison are compared in."""
    examples = [a.meta["val"] if isinstance(a, fx.Node) else a for a in arguments]
    if len(examples) == 1:
        return examples[0].dtype  # type: ignore[no-any-return]
    return torch.result_type(*examples)


def _reached(tile: Tile, stores: Sequence[Store]) -> tuple[Value, ...]:
    """The values that something stored is made from, in the order in which they were made."""
    found: set[Value] = set()
    stack = [store.value for store in stores]
    stack += [atom for store in stores for atom, _ in store.position.terms if isinstance(atom, Value)]
    while stack:
        value = stack.pop()
        if value not in found:
            found.add(value)
            stack += value.args
    return tuple(value for value in tile.values if value in found)


# --- operators of their own -----------------------------------------------------------------

_Special = Callable[[Builder, fx.Node, At], Value]


def _divide(b: Builder, node: fx.Node, at: At) -> Value:
    result = _value(node).dtype
    mode = node.kwargs.get("rounding_mode")
    dtype = computed_in(result)
    left, right = (b.operand(a, node, at, dtype) for a in node.args[:2])
    if mode is None:
        return b.rounded(b.tile.op("div", (left, right), dtype), result)
    if result.is_floating_point:
        name = {"floor": "floor", "trunc": "trunc"}[str(mode)]
        return b.rounded(b.tile.op(name, (b.tile.op("div", (left, right), dtype),), dtype), result)
    if mode != "floor":
        raise _no(f"{node.name} divides integers towards zero")
    return b.tile.op("floordiv", (left, right), dtype)


def _where(b: Builder, node: fx.Node, at: At) -> Value:
    result = _value(node).dtype
    condition = b.operand(node.args[0], node, at, torch.bool)
    branches = [b.operand(a, node, at, result) for a in node.args[1:3]]
    return b.tile.op("where", (condition, *branches), computed_in(result))


def _convert(b: Builder, node: fx.Node, at: At) -> Value:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    wanted = _value(node).dtype
    value = b.element(source, at)
    if value.dtype == wanted or _value(source).dtype == wanted:
        return value
    if wanted == torch.bool:
        return b.tile.op("ne", (value, b.tile.constant(0, value.dtype)), torch.bool)
    return b.converted(value, wanted)


def _clamp(b: Builder, node: fx.Node, at: At) -> Value:
    result = _value(node).dtype
    value = b.operand(node.args[0], node, at, result)
    bounds = list(node.args[1:]) + [None] * (3 - len(node.args))
    low = node.kwargs.get("min", bounds[0])
    high = node.kwargs.get("max", bounds[1])
    for name, bound in (("maximum", low), ("minimum", high)):
        if bound is not None:
            value = b.tile.op(name, (value, b.operand(bound, node, at, result)), computed_in(result))
    return value


def _power(b: Builder, node: fx.Node, at: At) -> Value:
    result, exponent = _value(node).dtype, node.args[1]
    if not isinstance(exponent, (int, float)) or not result.is_floating_point:
        raise _no(f"{node.name}: a power that is not a number")
    dtype = computed_in(result)
    x = b.operand(node.args[0], node, at, dtype)
    if exponent == 0.5:
        return b.rounded(b.tile.op("sqrt", (x,), dtype), result)
    if exponent == -0.5:
        return b.rounded(b.tile.op("rsqrt", (x,), dtype), result)
    count = int(abs(exponent))
    if count != abs(exponent) or not 0 < count <= 4:
        raise _no(f"{node.name}: power {exponent}")
    power = x
    if count >= 2:
        power = b.tile.op("mul", (x, x), dtype)
    if count == 3:
        power = b.tile.op("mul", (power, x), dtype)
    if count == 4:
        power = b.tile.op("mul", (power, power), dtype)
    if exponent < 0:
        power = b.tile.op("reciprocal", (power,), dtype)
    return b.rounded(power, result)


def _fill(number: Callable[[fx.Node], Any]) -> _Special:
    def make(b: Builder, node: fx.Node, at: At) -> Value:
        value = number(node)
        if not isinstance(value, (bool, int, float)):
            raise _no(f"{node.name} is filled with {value!r}")
        return b.rounded(b.tile.constant(value, computed_in(_value(node).dtype)), _value(node).dtype)

    return make


def _arange(b: Builder, node: fx.Node, at: At) -> Value:
    dtype = _value(node).dtype
    if node.target is prims.iota.default:
        start, step = node.kwargs.get("start", 0), node.kwargs.get("step", 1)
    else:
        arguments = list(node.args)
        start = arguments[0] if len(arguments) > 1 else 0
        step = arguments[2] if len(arguments) > 2 else 1
    if not isinstance(start, int) or not isinstance(step, int):
        raise _no(f"{node.name} steps by {step!r} from {start!r}")
    index = b.tile.index(at.indices[0] * step + start, torch.int64)
    return b.converted(index, dtype)


def _concatenate(b: Builder, node: fx.Node, at: At) -> Value:
    parts: Sequence[fx.Node] = node.args[0]  # type: ignore[assignment]
    dim = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    dim %= len(_shape(node))
    index, result = at.indices[dim], _value(node).dtype
    bounds = b._bounds(at.conditions)
    low, high = bounds.of(index)
    pieces: list[tuple[Condition | None, Value]] = []
    start = 0
    for part in parts:
        size = _shape(part)[dim] if len(_shape(part)) == len(at.indices) else 0
        end = start + size
        if size and low < end and high >= start:
            shifted = at.indices[:dim] + (index + -start,) + at.indices[dim + 1 :]
            if start <= low and high < end:
                return b.converted(b.element(part, at.with_indices(shifted)), result)
            condition = _part(index, start, end, bounds, node)
            inside = At(shifted, (*at.conditions, condition))
            pieces.append((condition, b.converted(b.element(part, inside), result, rounds=True)))
        start = end
    value = pieces[-1][1]
    for found, piece in reversed(pieces[:-1]):
        assert found is not None
        value = b.tile.op("where", (b.tile.within(found), piece, value), value.dtype)
    return value


def _part(index: Affine, start: int, end: int, bounds: Bounds, node: fx.Node) -> Condition:
    """The condition under which ``index`` is in [start, end)."""
    axes = [(atom, factor) for atom, factor in index.terms]
    if len(axes) == 1 and isinstance(axes[0][0], Axis) and axes[0][1] == 1:
        return Condition(axes[0][0], start - index.constant, end - index.constant)
    # Several axes: the outermost decides where parts end on its steps.
    atom, factor = max(axes, key=lambda term: abs(term[1]))
    rest = Affine(tuple(t for t in axes if t[0] is not atom))
    low, high = bounds.of(rest)
    first, last = start - index.constant, end - index.constant
    steps = isinstance(atom, Axis) and factor > 0 and low == 0 and high < factor
    if steps and first % factor == 0 and last % factor == 0:
        return Condition(atom, first // factor, last // factor)
    raise _no(f"parts of {node.name} end within an axis")


def _pad(b: Builder, node: fx.Node, at: At) -> Value:
    source, amounts = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    fill = node.args[2] if len(node.args) > 2 else node.kwargs.get("value", 0)
    assert isinstance(source, fx.Node)
    shape, result = _shape(source), _value(node).dtype
    indices, conditions = list(at.indices), list(at.conditions)
    bounds = b._bounds(at.conditions)
    added: list[Condition] = []
    for k in range(len(amounts) // 2):
        dim = len(shape) - 1 - k
        index = indices[dim] + -amounts[2 * k]
        indices[dim] = index
        low, high = bounds.of(index)
        if high < 0 or low >= shape[dim]:
            return b.rounded(b.tile.constant(fill, computed_in(result)), result)  # type: ignore[arg-type]
        if low < 0 or high >= shape[dim]:
            added.append(_part(index, 0, shape[dim], bounds, node))
    inside = b.converted(b.element(source, At(tuple(indices), (*conditions, *added))), result)
    value = inside
    for condition in added:
        outside = b.tile.constant(fill, computed_in(result))  # type: ignore[arg-type]
        value = b.tile.op("where", (b.tile.within(condition), value, outside), inside.dtype)
    return value


def _looked_up(b: Builder, node: fx.Node, source: fx.Node, at: At, dim: int, picked: Value) -> Value:
    """The element of ``source`` whose index along ``dim`` is the value ``picked``."""
    size = _shape(source)[dim]
    zero, count = b.tile.constant(0, picked.dtype), b.tile.constant(size, picked.dtype)
    negative = b.tile.op("lt", (picked, zero), torch.bool)
    if node.target is not aten.embedding.default:
        # Indices may count from the end.
        wrapped = b.tile.op("add", (picked, count), picked.dtype)
        picked = b.tile.op("where", (negative, wrapped, picked), picked.dtype)
    b._sizes[picked] = size
    indices = at.indices[:dim] + (Affine.atom(picked),) + at.indices[dim:]
    return b.element(source, at.with_indices(indices))


def _embedding(b: Builder, node: fx.Node, at: At) -> Value:
    table, where = node.args[0], node.args[1]
    assert isinstance(table, fx.Node) and isinstance(where, fx.Node)
    rank = len(_shape(where))
    picked = b.element(where, at.with_indices(at.indices[:rank]))
    return _looked_up(b, node, table, at.with_indices(at.indices[rank:]), 0, picked)


def _index(b: Builder, node: fx.Node, at: At) -> Value:
    source, lists = node.args[0], node.args[1]
    assert isinstance(source, fx.Node)
    given = [(d, i) for d, i in enumerate(lists) if i is not None]  # type: ignore[arg-type]
    if len(given) != 1 or given[0][1].meta["val"].dtype not in (torch.int64, torch.int32):
        raise _no(f"{node.name} is indexed by {len(given)} tensors or by a mask")
    ((dim, where),) = given
    rank = len(_shape(where))
    picked = b.element(where, at.with_indices(at.indices[dim : dim + rank]))
    rest = at.indices[:dim] + at.indices[dim + rank :]
    return _looked_up(b, node, source, at.with_indices(rest), dim, picked)


def _gather(b: Builder, node: fx.Node, at: At) -> Value:
    source, dim, where = node.args[0], int(node.args[1]), node.args[2]  # type: ignore[arg-type]
    assert isinstance(source, fx.Node) and isinstance(where, fx.Node)
    if not _shape(source):
        raise _no(f"{node.name} looks up in a scalar")
    dim %= len(_shape(source))
    picked = b.element(where, at)
    rest = at.indices[:dim] + at.indices[dim + 1 :]
    return _looked_up(b, node, source, at.with_indices(rest), dim, picked)


def _item(b: Builder, node: fx.Node, at: At) -> Value:
    """One of the results of an operator that gives several."""
    made, number = node.args[0], node.args[1]
    assert isinstance(made, fx.Node)
    if made.target is not aten.var_mean.correction:
        raise _no(f"{made.target} has no Triton expression")
    found = reduction_of(made)
    assert found is not None
    correction = made.kwargs.get("correction")
    correction = 1 if correction is None else correction
    both = b.variance(node, found.source, found.dims, found.keepdim, correction, at)  # type: ignore[arg-type]
    return b.rounded(both[int(number)], _value(node).dtype)  # type: ignore[arg-type]


def _variance(b: Builder, node: fx.Node, at: At) -> Value:
    found = reduction_of(node)
    assert found is not None
    correction = node.args[2] if len(node.args) > 2 else node.kwargs.get("correction", 1)
    variance, _ = b.variance(node, found.source, found.dims, found.keepdim, correction, at)  # type: ignore[arg-type]
    return b.rounded(variance, _value(node).dtype)


_SPECIAL: dict[Any, _Special] = {
    aten.div.Tensor: _divide,
    aten.div.Scalar: _divide,
    aten.div.Tensor_mode: _divide,
    aten.div.Scalar_mode: _divide,
    prims.div.default: _divide,
    aten.where.self: _where,
    prims.where.default: _where,
    aten.where.ScalarSelf: _where,
    aten.where.ScalarOther: _where,
    aten.where.Scalar: _where,
    aten._to_copy.default: _convert,
    prims.convert_element_type.default: _convert,
    aten.clamp.default: _clamp,
    aten.clamp.Tensor: _clamp,
    aten.clamp_min.default: _clamp,
    aten.pow.Tensor_Scalar: _power,
    aten.full.default: _fill(lambda n: n.args[1]),
    aten.full_like.default: _fill(lambda n: n.args[1]),
    aten.scalar_tensor.default: _fill(lambda n: n.args[0]),
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    prims.iota.default: _arange,
    prims.var.default: _variance,
    aten.cat.default: _concatenate,
    aten.constant_pad_nd.default: _pad,
    aten.embedding.default: _embedding,
    aten.index.Tensor: _index,
    aten.gather.default: _gather,
    operator.getitem: _item,
}


def is_supported(target: Any) -> bool:
    """Whether an operator can be part of a kernel at all."""
    known = target in _SPECIAL or views.is_view(target) or is_reduction(target) or is_product(target)
    return known or pointwise_of(target) is not None
