"""Finds the weights of a model by what its programs do with them.

Before::

    %w = parameter layers.0.q.weight : bf16[4096,4096]
    %t = aten.t(%w)
    %y = aten.mm(%x, %t)

After::

    Weight(name="layers.0.q.weight", orientation="rows", n=4096, k=4096, uses=(product of 8 rows,))

Nothing has to be known of the modules that hold them, whoever wrote those. A parameter that is read in any
other way is refused with a reason that names what reads it: its dense form would still be needed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from graphopt import _torch
from graphopt.candidate import Reason
from graphopt.errors import QuantizationError
from graphopt.packing.convert import matrix_shape, packed_weights
from graphopt.program import Program
from graphopt.rules import argument

__all__ = ["Discovery", "Read", "Refused", "Use", "Weight", "discover", "reads_of", "weights_of"]

_aten = torch.ops.aten
_LIKE = (
    _aten.detach.default, _aten.alias.default, _aten.view.default, _aten.reshape.default,
    _aten._unsafe_view.default, _aten.flatten.using_ints, _aten.t.default, _aten.transpose.int,
    _aten.permute.default, _aten.numpy_T.default,
)  # fmt: skip
_CONVOLUTIONS = (
    _aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default, _aten.conv1d.padding,
    _aten.conv2d.padding, _aten.conv3d.padding, _aten.convolution.default,
)  # fmt: skip
_RIGHT: dict[Any, int] = {
    _aten.mm.default: 1,
    _aten.matmul.default: 1,
    _aten.bmm.default: 1,
    _aten.addmm.default: 2,
    _aten.baddbmm.default: 2,
}
_LEFT = {target: place - 1 for target, place in _RIGHT.items()}

_Axes = tuple[tuple[int, ...], ...]
"""Which axes of the parameter each axis of a view holds, in order."""

_TRAINED = "it is trained"


@dataclass(frozen=True)
class _View:
    """A view of parameters, several where they are put one after the other: their first axes have
    ``sizes``."""

    members: tuple[str, ...]
    axes: _Axes
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Use:
    """One read of a weight: ``kind`` is ``"product"``, ``"convolution"`` or ``"look-up"``; ``rows`` those of
    its input, by the sizes that were captured; ``node`` the name of the reader in ``program``."""

    program: str
    node: str
    kind: str
    rows: int


@dataclass(frozen=True)
class Weight:
    """A parameter that is a weight [N, K] (out, in) wherever it is read.

    ``name`` is the first of its ``names``, which are several where it is tied. ``orientation``: how the
    parameter holds it (``graphopt.packing.convert.Orientation``). Its rows come in ``blocks`` of equal size
    that read inputs of their own (experts, groups of channels). Weights of one ``group`` are read as one.
    """

    name: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    orientation: str
    n: int
    k: int
    blocks: int
    uses: tuple[Use, ...]
    group: str

    @property
    def looked_up(self) -> bool:
        return any(use.kind == "look-up" for use in self.uses)

    @property
    def dense_bytes(self) -> int:
        return self.n * self.k * self.dtype.itemsize


@dataclass(frozen=True)
class Refused:
    """A parameter that is no weight, or none that could be packed, and why."""

    name: str
    reason: Reason


@dataclass(frozen=True)
class Discovery:
    """What the programs of a model say of its parameters of two dimensions and more."""

    weights: tuple[Weight, ...]
    refused: tuple[Refused, ...]

    def weight(self, name: str) -> Weight | None:
        """The weight that goes by ``name``, any of its names."""
        return next((weight for weight in self.weights if name in weight.names), None)

    def groups(self) -> tuple[tuple[Weight, ...], ...]:
        """The weights that share a scheme, in the order of the model."""
        found: dict[str, list[Weight]] = {}
        for weight in self.weights:
            found.setdefault(weight.group, []).append(weight)
        return tuple(map(tuple, found.values()))


@dataclass(frozen=True)
class Read:
    """``node`` reads parameters as its weight: ``members`` are their names, several where they are put
    together on the way, with the outputs from and to which each has; ``x`` is the node of the input."""

    members: tuple[str, ...]
    node: fx.Node
    kind: str
    orientation: str
    blocks: int
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def x(self) -> fx.Node:
        if self.kind == "look-up":
            return _node(argument(self.node, "indices"))
        if self.kind == "convolution" or self.node.target is _aten.linear.default:
            return _node(argument(self.node, "input"))
        return _node(self.node.args[_LEFT[self.node.target]])


def discover(programs: Iterable[Program], model: nn.Module, *, training: bool) -> Discovery:
    """The weights of ``model`` by its captured semantic ``programs``, before passes rewrote them.

    ``training``: whether a step updates the parameters that require gradients; those are refused.
    """
    known = {name: p for name, p in model.named_parameters() if p.dim() >= 2}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    storages: dict[int, list[str]] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.layout is torch.strided:
            storages.setdefault(tensor.untyped_storage()._cdata, []).append(name)
    found: dict[str, list[tuple[Read, str]]] = {}
    refused: dict[str, Reason] = {}
    for program in programs:
        reads, others = reads_of(program)
        for name, reason in others.items():
            refused.setdefault(name, reason)
        for read in reads:
            for name in read.members:
                found.setdefault(name, []).append((read, program.name))
    weights: list[Weight] = []
    group_of = _united(read.members for reads in found.values() for read, _ in reads)
    for name, parameter in known.items():
        own = _reason(name, parameter, found.get(name, ()), training, storages)
        if name in refused or own is not None:
            refused.setdefault(name, own or refused[name])
            continue
        weights.append(_weight(name, parameter, found[name], names[id(parameter)], group_of[name]))
    complete = {weight.name for weight in weights}
    for weight in list(weights):
        missing = [name for name, group in group_of.items() if group == weight.group and name not in complete]
        if missing:
            weights.remove(weight)
            refused[weight.name] = Reason(f"it is read as one with {missing[0]}, which cannot be packed")
    return Discovery(tuple(weights), tuple(Refused(name, refused[name]) for name in known if name in refused))


def weights_of(model: nn.Module, programs: Iterable[Program], *, training: bool) -> Discovery:
    """``discover``; raises ``QuantizationError`` with the reasons where that finds no weight."""
    found = discover(programs, model, training=training)
    if not found.weights:
        why = "; ".join(f"{item.name}: {item.reason}" for item in found.refused[:5])
        if not why:
            done = packed_weights(model)
            why = f"{len(done)} are packed already" if done else "it has no matrices"
        trained = any(item.reason.text == _TRAINED for item in found.refused)
        raise QuantizationError(
            f"no weight of the model can be packed: {why}",
            hint="call model.eval(), or requires_grad_(False) on what is not trained" if trained else "",
        )
    return found


def reads_of(program: Program) -> tuple[list[Read], dict[str, Reason]]:
    """Products, convolutions and look-ups whose weight is made of parameters, with those parameters; and
    parameters that are used in another way."""
    inputs = {spec.node: spec.fqn for spec in program.signature.by_role("parameter")}
    views: dict[fx.Node, _View] = {}
    reads: list[Read] = []
    refused: dict[str, Reason] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            value = node.meta.get("val")
            if node.name in inputs and isinstance(value, torch.Tensor) and value.dim() >= 2:
                axes = tuple((axis,) for axis in range(value.dim()))
                views[node] = _View((inputs[node.name],), axes, (int(value.shape[0]),))
            continue
        given = [views[source] for source in dict.fromkeys(node.all_input_nodes) if source in views]
        if not given:
            continue
        made = _view(node, views)
        if made is not None:
            views[node] = made
            continue
        read = _read(node, views)
        if isinstance(read, Read):
            reads.append(read)
            continue
        for view in given:
            for name in view.members:
                refused.setdefault(name, read)
    return reads, refused


def _view(node: fx.Node, views: Mapping[fx.Node, _View]) -> _View | None:
    """What ``node`` is of parameters if it is another view of one, or several one after the other."""
    given: Any = node.args[0] if node.args else None
    if node.target is _aten.cat.default:
        if argument(node, "dim") != 0 or not all(piece in views for piece in given):
            return None
        if {views[piece].axes for piece in given} != {((0,), (1,))}:
            return None
        return _View(
            tuple(name for piece in given for name in views[piece].members),
            ((0,), (1,)),
            tuple(size for piece in given for size in views[piece].sizes),
        )
    if node.target not in _LIKE or given not in views:
        return None
    view = views[given]
    axes, rank = view.axes, len(view.axes)
    if node.target in (_aten.t.default, _aten.numpy_T.default):
        return replace(view, axes=tuple(reversed(axes)))
    if node.target is _aten.transpose.int:
        order = list(range(rank))
        first, second = argument(node, "dim0") % rank, argument(node, "dim1") % rank
        order[first], order[second] = order[second], order[first]
        return replace(view, axes=tuple(axes[place] for place in order))
    if node.target is _aten.permute.default:
        return replace(view, axes=tuple(axes[place % rank] for place in argument(node, "dims")))
    merged = _merged(given.meta["val"].shape, axes, node.meta["val"].shape)
    return None if merged is None else replace(view, axes=merged)


def _merged(old: Sequence[int], axes: _Axes, new: Sequence[int]) -> _Axes | None:
    """The axes of a view of shape ``new`` where that only puts axes together that follow each other."""
    found, place = [], 0
    for size in new:
        taken: tuple[int, ...] = ()
        product = 1
        while place < len(old) and (not taken or product != size):
            taken, product, place = (*taken, *axes[place]), product * int(old[place]), place + 1
        if product != size or list(taken) != list(range(taken[0], taken[0] + len(taken)) if taken else ()):
            return None
        found.append(taken)
    rest = old[place:]
    return tuple(found) if not rest and all(found) else None


def _read(node: fx.Node, views: Mapping[fx.Node, _View]) -> Read | Reason:
    """The read, or why what ``node`` does with parameters is none."""
    what = Reason(f"it is read by {_named(node)}", (node.name,))
    if node.op == "output":
        return Reason("the program returns it")
    weight, kind = _operand(node)
    if node.target in _LEFT and node.args[_LEFT[node.target]] in views:
        return Reason(f"it is the left-hand side of {_named(node)}", (node.name,))
    given = torch.utils._pytree.tree_leaves((node.args, node.kwargs))
    if weight not in views or sum(isinstance(a, fx.Node) and a in views for a in given) > 1:
        return what
    members, axes = views[weight].members, views[weight].axes
    if kind == "look-up":
        if argument(node, "scale_grad_by_freq") or argument(node, "sparse"):
            return Reason("gradients of what is looked up are scaled or sparse", (node.name,))
        plain = axes == ((0,), (1,)) and len(members) == 1
        return Read(members, node, kind, "rows", 1) if plain else what
    if kind == "convolution":
        if node.target is _aten.convolution.default and argument(node, "transposed"):
            return Reason("a transposed convolution reads it", (node.name,))
        plain = axes == tuple((axis,) for axis in range(len(axes))) and len(members) == 1
        return Read(members, node, kind, "rows", int(argument(node, "groups"))) if plain else what
    scaled = node.target in (_aten.addmm.default, _aten.baddbmm.default)
    if scaled and (argument(node, "beta"), argument(node, "alpha")) != (1, 1):
        return Reason("the product is scaled as it is added", (node.name,))
    by_columns = node.target is not _aten.linear.default
    *batch, first, second = axes
    out, inner = (second, first) if by_columns else (first, second)
    if not batch and out == (0,):
        ends = [*itertools.accumulate(views[weight].sizes)]
        return Read(members, node, kind, "rows", 1, tuple(zip([0, *ends[:-1]], ends, strict=True)))
    if not batch and out == (1,) and inner == (0,) and len(members) == 1:
        return Read(members, node, kind, "columns", 1)
    if batch == [(0,)] and {out, inner} == {(1,), (2,)}:
        blocks = int(weight.meta["val"].shape[0])
        other = node.args[0 if node.target is _aten.linear.default else _LEFT[node.target]]
        given_shape = _node(other).meta["val"].shape
        if len(given_shape) != 3 or given_shape[0] != blocks:
            return Reason("the blocks of a stack read one input, or several", (node.name,))
        return Read(members, node, kind, "stacked rows" if out == (1,) else "stacked columns", blocks)
    return Reason("its axes are read in an order that packed weights do not have", (node.name,))


def _operand(node: fx.Node) -> tuple[Any, str]:
    """The weight of ``node`` and how it is read; ``None`` for operators that have none."""
    if node.target is _aten.embedding.default:
        return argument(node, "weight"), "look-up"
    if node.target in _CONVOLUTIONS:
        return argument(node, "weight"), "convolution"
    if node.target is _aten.linear.default:
        return argument(node, "weight"), "product"
    if node.target in _RIGHT:
        return node.args[_RIGHT[node.target]], "product"
    return None, ""


def _reason(
    name: str,
    parameter: nn.Parameter,
    reads: Sequence[tuple[Read, str]],
    training: bool,
    storages: Mapping[int, Sequence[str]],
) -> Reason | None:
    if training and parameter.requires_grad:
        return Reason(_TRAINED)
    if not parameter.is_floating_point() or parameter.layout is not torch.strided:
        return Reason("it is no dense tensor of floating-point numbers")
    if not reads:
        return Reason("no captured program reads it")
    ways = {(read.orientation, read.blocks) for read, _ in reads}
    if len(ways) > 1:
        spelled = " and ".join(sorted({f"by {orientation}" for orientation, _ in ways}))
        return Reason(f"it is read in two ways: {spelled}", tuple(read.node.name for read, _ in reads))
    others = [other for other in storages[parameter.untyped_storage()._cdata] if other != name]
    if others:
        return Reason(f"it shares its memory with {others[0]}")
    if parameter.untyped_storage().nbytes() != parameter.numel() * parameter.element_size():
        return Reason("its memory is larger than itself")
    return None


def _weight(
    name: str,
    parameter: nn.Parameter,
    reads: Sequence[tuple[Read, str]],
    names: Sequence[str],
    group: str,
) -> Weight:
    first = reads[0][0]
    shape = tuple(parameter.shape)
    n, k = matrix_shape(shape, first.orientation)
    uses = tuple(Use(program, read.node.name, read.kind, _rows(read)) for read, program in reads)
    return Weight(
        name, tuple(names), shape, parameter.dtype, first.orientation, n, k, first.blocks, uses, group
    )  # fmt: skip


def _rows(read: Read) -> int:
    """Rows of the input that each row of the weight meets."""
    value = read.x.meta["val"]
    if read.kind == "look-up":
        return _torch.hint(value.numel())
    if read.kind == "convolution":
        result, weight = read.node.meta["val"], argument(read.node, "weight").meta["val"]
        return _torch.hint(result.numel()) // max(1, _torch.hint(result.shape[1 - weight.dim()]))
    rows = math.prod(_torch.hint(size) for size in value.shape[:-1])
    return rows // read.blocks


def _united(sets: Iterable[tuple[str, ...]]) -> dict[str, str]:
    """Each name with the first of those that are read as one with it."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for members in sets:
        for name in members:
            first, other = root(members[0]), root(name)
            parent[other] = first
    return {name: root(name) for name in list(parent)}


def _node(value: Any) -> fx.Node:
    assert isinstance(value, fx.Node)
    return value


def _named(node: fx.Node) -> str:
    name = _torch.schema_of(node.target)
    return str(name.name).replace("::", ".") if name is not None else str(node.target)
