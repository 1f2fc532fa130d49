"""Weights of products that read the same value, laid side by side: one product reads them all.

Before::

    %q = aten.linear(%x, %wq)    %k = aten.linear(%x, %wk)    %v = aten.linear(%x, %wv)

After, ``%w`` holding the rows of all three::

    %y = aten.linear(%x, %w)    %p = aten.split_with_sizes(%y, [4096, 1024, 1024], -1)
    %q = %p[0]    %k = %p[1]    %v = %p[2]

A token reads every weight once and little else, and a small product does not fill an accelerator's memory
bus: it is over before all multiprocessors have begun. Weights are only laid together once, as a decoder is
made, where ``pack-linears`` would do it in every step. The model's own tensors become views of the rows that
are theirs, so that nothing is held twice, names stay, and checkpoints load as before.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.capture.structure import Line, line_of
from graphopt.decoding.insert import StepGraph
from graphopt.errors import InputsError
from graphopt.packing import Scheme
from graphopt.rules import argument

__all__ = ["SideBySide"]

_aten = torch.ops.aten
_VIEWS = (_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default, _aten.alias.default)


@dataclass(frozen=True)
class _Product:
    """``node`` is ``source`` times a weight: a placeholder, or what ``unpack`` makes of some. ``between``:
    views of the whole weight, the last one first."""

    node: fx.Node
    source: fx.Node
    unpack: fx.Node | None
    tensors: tuple[fx.Node, ...]
    bias: fx.Node | None
    between: tuple[fx.Node, ...] = ()

    @property
    def kind(self) -> tuple[object, ...]:
        """What is alike in products that can be one."""
        constants: tuple[object, ...] = ()
        if self.unpack is not None:
            given = (arg for arg in self.unpack.args if not isinstance(arg, fx.Node))
            constants = (self.unpack.target, *given)
        shapes = tuple((t.meta["val"].dtype, t.meta["val"].shape[1:]) for t in self._all())
        return (self.source, constants, self.bias is None, shapes)

    def _all(self) -> tuple[fx.Node, ...]:
        return self.tensors if self.bias is None else (*self.tensors, self.bias)

    @property
    def columns(self) -> int:
        return int(self.tensors[0].meta["val"].shape[0])


@dataclass
class SideBySide:
    """``beside(step)``: the step with such products made one. Weights are moved when first asked for; steps
    of other lengths find them there."""

    schemes: Collection[type[Scheme]]
    _laid: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)
    _parts: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    _writes: dict[int, int | None] = field(default_factory=dict)
    count: int = 0
    """Products that were made one with others, in the last step."""

    def __call__(self, step: StepGraph) -> StepGraph:
        graph = step.gm.graph
        line = line_of(graph)
        groups: dict[object, list[_Product]] = {}
        for product in self._products(step, line):
            groups.setdefault(product.kind, []).append(product)
        weights, self.count = dict(step.weights), 0
        for group in groups.values():
            if len(group) > 1 and not _is_written(group, line) and _can_be_split(group):
                self._join(graph, weights, group)
                self.count += len(group)
        if not self.count:
            return step
        graph.lint()
        step.gm.recompile()
        order = [node.name for node in graph.nodes if node.op == "placeholder" and node.name in weights]
        return replace(step, weights={name: weights[name] for name in order})

    def settle(self) -> None:
        """Take over weights that were put in the place of those that were laid out (``parameter.data = ..``),
        and have those that were written count as written where they lie: kernels go by that
        (``graphopt_kernels.quantized.settled``), and the two do not share what torch counts.

        Raises ``InputsError`` where one cannot stand where the other did.
        """
        for index, (part, rows) in enumerate(self._parts):
            written = _torch.writes(part)
            if self._writes.setdefault(index, written) != written:
                self._writes[index] = written
                rows[:0].zero_()
            if part.data_ptr() == rows.data_ptr() and part.dtype is rows.dtype:
                continue
            if part.shape != rows.shape or part.dtype is not rows.dtype or part.device != rows.device:
                raise InputsError(
                    f"a weight is {part.dtype}{list(part.shape)} on {part.device} now, and was "
                    f"{rows.dtype}{list(rows.shape)} on {rows.device} when the model was optimized",
                    hint="optimize again after weights were moved or converted",
                )
            with torch.no_grad():
                rows.copy_(part)
            part.data = rows

    def _products(self, step: StepGraph, line: Line) -> Iterator[_Product]:
        shared = Counter(_torch.storage_key(tensor) for tensor in step.weights.values())
        by_operator = {scheme.unpack_op for scheme in self.schemes if scheme.by_rows}

        def moves(node: object) -> bool:
            """Whether it is a weight that one call reads, and that has its memory for itself."""
            if not isinstance(node, fx.Node) or node.name not in step.weights or len(node.users) != 1:
                return False
            tensor = step.weights[node.name]
            alone = shared[_torch.storage_key(tensor)] == 1 and tensor.is_contiguous() and tensor.dim() > 0
            whole = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
            return self._holds(tensor) or (alone and whole)

        for node in line.nodes:
            if node.target is not _aten.linear.default:
                continue
            source: Any = node.args[0]
            weight: Any = node.args[1]
            bias: Any = argument(node, "bias")
            if not isinstance(source, fx.Node) or not isinstance(weight, fx.Node):
                continue
            if bias is not None and not moves(bias):
                continue
            if moves(weight):
                yield _Product(node, source, None, (weight,), bias)
                continue
            between = []
            while weight.target in _VIEWS and len(weight.users) == 1 and _is_whole(weight):
                between.append(weight)
                weight = weight.args[0]
            name = getattr(getattr(weight.target, "_schema", None), "name", "")
            tensors = tuple(arg for arg in weight.args if isinstance(arg, fx.Node))
            rows = {tensor.meta["val"].shape[0] for tensor in tensors if tensor.meta["val"].dim()}
            if (
                name in by_operator and len(weight.users) == 1 and not weight.kwargs
                and all(map(moves, tensors)) and rows == {weight.meta["val"].shape[0]}
            ):  # fmt: skip
                yield _Product(node, source, weight, tensors, bias, tuple(between))

    def _holds(self, tensor: torch.Tensor) -> bool:
        return any(part is tensor for part, _ in self._parts)

    def _join(self, graph: fx.Graph, weights: dict[str, torch.Tensor], group: Sequence[_Product]) -> None:
        """Make the products of ``group`` one; ``weights`` hold what is laid out in place of its parts."""
        first = group[0]
        columns = zip(*(product.tensors for product in group), strict=True)
        packed = [self._placed(graph, weights, column) for column in columns]
        bias = None
        if first.bias is not None:
            bias = self._placed(graph, weights, [p.bias for p in group if p.bias is not None])
        sizes = [product.columns for product in group]
        fake = first.node.meta["val"]
        with graph.inserting_before(first.node):
            weight = packed[0]
            if first.unpack is not None:
                inner = iter(packed)
                args = tuple(next(inner) if isinstance(arg, fx.Node) else arg for arg in first.unpack.args)
                weight = self._call(graph, fake, first.unpack.target, args)
            whole = self._call(graph, fake, _aten.linear.default, (first.source, weight, bias))
            parts = self._call(graph, fake, _aten.split_with_sizes.default, (whole, sizes, -1))
            pieces = [self._call(graph, fake, operator.getitem, (parts, i)) for i in range(len(sizes))]
        for made in (weight, whole, parts, *pieces):
            if made.op == "call_function" and "nn_module_stack" in first.node.meta:
                made.meta["nn_module_stack"] = first.node.meta["nn_module_stack"]
        for product, piece in zip(group, pieces, strict=True):
            product.node.replace_all_uses_with(piece)
            graph.erase_node(product.node)
            for node in product.between:
                graph.erase_node(node)
            if product.unpack is not None:
                graph.erase_node(product.unpack)
            for old in (*product.tensors, *([] if product.bias is None else [product.bias])):
                del weights[old.name]
                graph.erase_node(old)

    def _placed(self, graph: fx.Graph, weights: dict[str, torch.Tensor], nodes: Sequence[fx.Node]) -> fx.Node:
        """A placeholder for the tensors of ``nodes``, laid out in one."""
        tensors = [weights[node.name] for node in nodes]
        key = tuple(map(id, tensors))
        if key not in self._laid:
            self._laid[key] = self._together(tensors)
        whole = self._laid[key]
        with graph.inserting_before(nodes[0]):
            made = graph.placeholder(f"{nodes[0].name}_beside")
        with _torch.fake_mode_of([nodes[0].meta["val"]]):
            made.meta["val"] = torch.empty(whole.shape, dtype=whole.dtype, device=whole.device)
        weights[made.name] = whole
        return made

    def _together(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            whole = torch.cat([tensor.detach() for tensor in tensors])
            for tensor, rows in zip(
                tensors, torch.split(whole, [len(tensor) for tensor in tensors]), strict=True
            ):
                tensor.data = rows
                self._parts.append((tensor, rows))
        if all(isinstance(tensor, torch.nn.Parameter) for tensor in tensors):
            return torch.nn.Parameter(whole, requires_grad=False)
        return whole

    def _call(self, graph: fx.Graph, like: torch.Tensor, target: Any, args: tuple[Any, ...]) -> fx.Node:
        node = graph.call_function(target, args)
        given = fx.node.map_arg(args, lambda ref: ref.meta["val"])
        node.meta["val"] = _torch.call_on_fakes(like, target, given, {})
        return node


def _is_whole(view: fx.Node) -> bool:
    of = view.args[0]
    return isinstance(of, fx.Node) and of.meta["val"].shape == view.meta["val"].shape


def _is_written(group: Sequence[_Product], line: Line) -> bool:
    """Whether memory that the products read is written by the step: they would read it at another time."""
    read = {root for product in group for node in (product.source, *product.tensors)
            for root in line.aliases.roots.get(node, frozenset((node,)))}  # fmt: skip
    return bool(read & line.aliases.written)


def _can_be_split(group: Sequence[_Product]) -> bool:
    """Whether what reads the results can read columns of a wider one: views that merge columns with rows
    cannot."""
    total = sum(product.columns for product in group)
    for product in group:
        value = product.node.meta["val"]
        with _torch.fake_mode_of([value]):
            wide = value.new_empty((*value.shape[:-1], total))
        part = _torch.call_on_fakes(value, _aten.narrow.default, (wide, -1, 0, product.columns), {})
        for user in product.node.users:
            if user.target not in (_aten.view.default, _aten._unsafe_view.default):
                continue
            sizes = fx.node.map_arg(user.args[1], lambda ref: ref.meta["val"])
            try:
                _torch.call_on_fakes(value, _aten.view.default, (part, sizes), {})
            except RuntimeError:
                return False
    return True
