"""What an operator does to a dimension that is cut into slices: does it treat the slices apart?

A value that is cut has one dimension whose entries fall into ``extent`` groups of neighbours, such as
the samples of a batch, or the tokens of a sequence. An operator treats them apart if each group of its
result depends on the same group of the values that are cut, and on all of those that are not::

    linear([4 | 512, 128], w)        the first dimension passes on; so would the second, not the third
    view([4 | 512, 128], [2048, 128]) -> [4 * 512 | 128]: each group is 512 rows now
    softmax([4 | 8, 512, 512], -1)   passes on; over dimension 0 it would mix the groups
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.candidate import Reason
from graphopt.rules import argument

__all__ = ["Followed", "follow", "is_view", "shape_of"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class Followed:
    """The dimension of the result that is cut; ``sliced`` are whole operands that have to be cut too, with
    the dimension; ``sizes``: the argument that states the shape of the result, where there is one."""

    dim: int
    sliced: Mapping[fx.Node, int] = field(default_factory=dict)


def follow(node: fx.Node, cut: Mapping[fx.Node, int], extent: int) -> Followed | Reason:
    """How ``node`` passes on the cuts of what it reads, or why it does not."""
    if node.target is operator.getitem:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return Followed(cut[source])
    # Of other norms with running statistics there is no rule.
    of_a_batch = _has(node, "running_mean") and _has(node, "training")
    if of_a_batch and argument(node, "training") is not False:
        return Reason("the statistics of a batch norm are of the whole batch", (node.name,))
    rule = _RULES.get(node.target)
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        rule = _pointwise
    if rule is None:
        return Reason(_KNOWN.get(node.target, "it may mix the rows"), (node.name,))
    if torch.Tag.nondeterministic_seeded in node.target.tags:  # type: ignore[union-attr]
        drawn = _draws(node)
        if drawn:
            return Reason(drawn, (node.name,))
    found = rule(node, _Cut(cut, extent))
    return Reason("it mixes the rows", (node.name,)) if found is None else found


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        value = next((leaf for leaf in value if isinstance(leaf, torch.Tensor)), None)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def is_view(node: fx.Node) -> bool:
    """Whether a call only looks at the memory of what it reads in another way."""
    return node.target in _VIEWS or node.target is operator.getitem


@dataclass(frozen=True)
class _Cut:
    dims: Mapping[fx.Node, int]
    extent: int

    def of(self, value: Any) -> int | None:
        return self.dims.get(value) if isinstance(value, fx.Node) else None


_Rule = Callable[[fx.Node, _Cut], Followed | None]


def _draws(node: fx.Node) -> str:
    """Why the random numbers of a call keep it from being cut; empty where it draws none."""
    if _has(node, "dropout_p"):
        off = argument(node, "dropout_p") == 0
    else:
        off = _has(node, "train") and (argument(node, "p") == 0 or argument(node, "train") is False)
    return "" if off else "it draws random numbers, slice by slice in another order"


def _aligned(node: fx.Node, operands: Sequence[Any], cut: _Cut, rank: int) -> Followed | None:
    """Operands that are broadcast against each other, their last dimensions under one another."""
    places = {len(shape_of(o)) - d for o in operands if (d := cut.of(o)) is not None}
    if len(places) != 1:
        return None
    from_end = places.pop()
    return Followed(rank - from_end, _beside(operands, cut, from_end))


def _beside(operands: Sequence[Any], cut: _Cut, from_end: int) -> dict[fx.Node, int]:
    """Operands that are whole and have the cut dimension in full."""
    sliced = {}
    for other in operands:
        if isinstance(other, fx.Node) and other not in cut.dims:
            shape = shape_of(other)
            if len(shape) >= from_end and shape[-from_end] != 1:
                sliced[other] = len(shape) - from_end
    return sliced


def _pointwise(node: fx.Node, cut: _Cut) -> Followed | None:
    return _aligned(node, node.all_input_nodes, cut, len(shape_of(node)))


def _first_alone(node: fx.Node, cut: _Cut) -> int | None:
    """The cut dimension of the first argument, where no other argument is cut."""
    first = node.args[0]
    others = [source for source in node.all_input_nodes if source is not first]
    return None if any(other in cut.dims for other in others) else cut.of(first)


def _linear(node: fx.Node, cut: _Cut) -> Followed | None:
    dim = _first_alone(node, cut)
    return None if dim is None or dim == len(shape_of(node.args[0])) - 1 else Followed(dim)  # type: ignore[arg-type]


def _addmm(node: fx.Node, cut: _Cut) -> Followed | None:
    bias, rows, weight = node.args[:3]
    whole = cut.of(bias) is None and cut.of(weight) is None and cut.of(rows) == 0
    return Followed(0) if whole and len(shape_of(bias)) == 1 else None  # type: ignore[arg-type]


def _matmul(node: fx.Node, cut: _Cut) -> Followed | None:
    left, right = node.args[:2]
    ranks = [len(shape_of(left)), len(shape_of(right))]  # type: ignore[arg-type]
    places = [cut.of(left), cut.of(right)]
    if min(ranks) < 2:
        only = places[0] is not None and places[1] is None and places[0] < ranks[0] - 1
        return Followed(places[0]) if only and ranks[0] >= 2 else None  # type: ignore[arg-type]
    rank = len(shape_of(node))
    from_end = {r - p for r, p in zip(ranks, places, strict=True) if p is not None}
    if len(from_end) != 1:
        return None
    place = from_end.pop()
    if place > 2:
        return Followed(rank - place, _beside((left, right), cut, place))
    # Rows of the left operand are rows of the result; all else is summed over or a column.
    return Followed(rank - 2) if place == 2 and places[1] is None else None


def _attention(node: fx.Node, cut: _Cut) -> Followed | None:
    operands = [argument(node, name) for name in ("query", "key", "value")]
    rank = len(shape_of(node))
    if {cut.of(o) for o in operands} - {0, None} or rank < 4:
        return None
    mask = argument(node, "attn_mask")
    found = _aligned(node, [*operands, mask], cut, rank)
    return found if found is not None and found.dim == 0 else None


def _norm_last(node: fx.Node, cut: _Cut) -> Followed | None:
    dim = _first_alone(node, cut)
    kept = len(shape_of(node.args[0])) - len(argument(node, "normalized_shape"))  # type: ignore[arg-type]
    return Followed(dim) if dim is not None and dim < kept else None


def _samples(node: fx.Node, cut: _Cut) -> Followed | None:
    """Operators on samples: the first dimension of the first argument is the batch."""
    batched = len(shape_of(node)) == len(shape_of(node.args[0])) > 2  # type: ignore[arg-type]
    return Followed(0) if batched and _first_alone(node, cut) == 0 else None


def _batch_norm(node: fx.Node, cut: _Cut) -> Followed | None:
    return Followed(0) if _first_alone(node, cut) == 0 else None


def _over(names: Sequence[str], *, reduces: bool) -> _Rule:
    """Operators over some dimensions of the first argument, which go where ``reduces``."""

    def rule(node: fx.Node, cut: _Cut) -> Followed | None:
        dim = _first_alone(node, cut)
        rank = len(shape_of(node.args[0]))  # type: ignore[arg-type]
        over = next((argument(node, name) for name in names if _has(node, name)), None)
        if dim is None or over is None or over == []:
            return None
        dims = {d % rank for d in (over if isinstance(over, (list, tuple)) else [over])}
        if dim in dims:
            return None
        gone = reduces and not (_has(node, "keepdim") and argument(node, "keepdim"))
        return Followed(dim - sum(d < dim for d in dims) if gone else dim)

    return rule


def _has(node: fx.Node, name: str) -> bool:
    schema = _torch.schema_of(node.target)
    return schema is not None and any(parameter.name == name for parameter in schema.arguments)


def _same(node: fx.Node, cut: _Cut) -> Followed | None:
    dim = cut.of(node.args[0])
    return None if dim is None else Followed(dim)


def _reshape(node: fx.Node, cut: _Cut) -> Followed | None:
    source = node.args[0]
    dim = cut.of(source)
    if dim is None:
        return None
    before, after = shape_of(source), shape_of(node)  # type: ignore[arg-type]
    ahead = math.prod(before[:dim])
    passed = 1
    for place, size in enumerate(after):
        if passed == ahead and size % cut.extent == 0:
            return Followed(place)
        passed *= size
    return None


def _expand(node: fx.Node, cut: _Cut) -> Followed | None:
    dim = cut.of(node.args[0])
    if dim is None:
        return None
    return Followed(dim + len(shape_of(node)) - len(shape_of(node.args[0])))  # type: ignore[arg-type]


def _transpose(node: fx.Node, cut: _Cut) -> Followed | None:
    dim, rank = cut.of(node.args[0]), len(shape_of(node))
    swapped = [argument(node, name) % rank for name in ("dim0", "dim1")] if _has(node, "dim0") else [0, 1]
    if dim is None:
        return None
    return Followed(swapped[1 - swapped.index(dim)] if dim in swapped else dim)


def _permute(node: fx.Node, cut: _Cut) -> Followed | None:
    dim, rank = cut.of(node.args[0]), len(shape_of(node))
    return None if dim is None else Followed([d % rank for d in argument(node, "dims")].index(dim))


def _unsqueeze(node: fx.Node, cut: _Cut) -> Followed | None:
    dim, rank = cut.of(node.args[0]), len(shape_of(node))
    return None if dim is None else Followed(dim + (argument(node, "dim") % rank <= dim))


def _along(node: fx.Node, cut: _Cut) -> Followed | None:
    """Parts along another dimension."""
    dim, rank = cut.of(node.args[0]), len(shape_of(node.args[0]))  # type: ignore[arg-type]
    return None if dim is None or argument(node, "dim") % rank == dim else Followed(dim)


def _select(node: fx.Node, cut: _Cut) -> Followed | None:
    found, rank = _along(node, cut), len(shape_of(node.args[0]))  # type: ignore[arg-type]
    return None if found is None else Followed(found.dim - (argument(node, "dim") % rank < found.dim))


def _cat(node: fx.Node, cut: _Cut) -> Followed | None:
    parts = [part for part in node.args[0] if isinstance(part, fx.Node)]  # type: ignore[union-attr]
    rank = len(shape_of(node))
    places = {cut.of(part) for part in parts} - {None}
    if len(places) != 1 or any(len(shape_of(part)) != rank for part in parts):
        return None
    (dim,) = places
    assert dim is not None
    if argument(node, "dim") % rank == dim:
        return None
    return Followed(dim, {part: dim for part in parts if part not in cut.dims})


def _stack(node: fx.Node, cut: _Cut) -> Followed | None:
    parts = [part for part in node.args[0] if isinstance(part, fx.Node)]  # type: ignore[union-attr]
    places = {cut.of(part) for part in parts} - {None}
    if len(places) != 1:
        return None
    (dim,) = places
    assert dim is not None
    new = argument(node, "dim") % len(shape_of(node))
    return Followed(dim + (new <= dim), {part: dim for part in parts if part not in cut.dims})


def _pad(node: fx.Node, cut: _Cut) -> Followed | None:
    dim, rank = cut.of(node.args[0]), len(shape_of(node))
    padding = argument(node, "pad")
    return None if dim is None or dim >= rank - len(padding) // 2 else Followed(dim)


def _rules() -> dict[Any, _Rule]:
    last = {_aten.linear.default: _linear, _aten.addmm.default: _addmm}
    products = dict.fromkeys((_aten.matmul.default, _aten.mm.default, _aten.bmm.default), _matmul)
    norms = dict.fromkeys((_aten.layer_norm.default, _aten.rms_norm.default), _norm_last)
    samples = (
        _aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default, _aten.conv1d.padding,
        _aten.conv2d.padding, _aten.conv3d.padding, _aten.convolution.default,
        _aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.conv_transpose3d.input,
        _aten.max_pool1d.default, _aten.max_pool2d.default, _aten.max_pool3d.default,
        _aten.avg_pool1d.default, _aten.avg_pool2d.default, _aten.avg_pool3d.default,
        _aten.adaptive_avg_pool1d.default, _aten.adaptive_avg_pool2d.default,
        _aten.adaptive_avg_pool3d.default, _aten.group_norm.default, _aten.pixel_shuffle.default,
        _aten.pixel_unshuffle.default, _aten.upsample_nearest2d.vec, _aten.upsample_bilinear2d.vec,
    )  # fmt: skip
    over = _over(("dim", "axis"), reduces=False)
    kept = (
        _aten.softmax.int, _aten.log_softmax.int, _aten._softmax.default, _aten._log_softmax.default,
        _aten.cumsum.default, _aten.flip.default, _aten.glu.default,
    )  # fmt: skip
    reducing = (
        _aten.sum.dim_IntList, _aten.mean.dim, _aten.amax.default, _aten.amin.default, _aten.argmax.default,
        _aten.argmin.default, _aten.var.correction, _aten.var.dim, _aten.std.correction, _aten.std.dim,
        _aten.logsumexp.default, _aten.norm.ScalarOpt_dim, _aten.linalg_vector_norm.default,
        _aten.prod.dim_int, _aten.max.dim, _aten.min.dim,
    )  # fmt: skip
    same = (
        _aten.contiguous.default, _aten.clone.default, _aten.detach.default, _aten.alias.default,
        _aten.dropout.default, _aten.to.dtype, _aten.to.dtype_layout, _aten.to.device,
        _aten._to_copy.default, _aten.zeros_like.default, _aten.ones_like.default,
    )  # fmt: skip
    reshapes = (
        _aten.view.default, _aten.reshape.default, _aten._unsafe_view.default, _aten.flatten.using_ints,
        _aten.unflatten.int, _aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims,
    )  # fmt: skip
    along = (
        _aten.slice.Tensor, _aten.narrow.default, _aten.split.Tensor, _aten.split_with_sizes.default,
        _aten.split.sizes, _aten.chunk.default,
    )  # fmt: skip
    return {
        **last,
        **products,
        **norms,
        **dict.fromkeys(samples, _samples),
        **dict.fromkeys(kept, over),
        **dict.fromkeys(reducing, _over(("dim", "axis"), reduces=True)),
        **dict.fromkeys(same, _same),
        **dict.fromkeys(reshapes, _reshape),
        **dict.fromkeys(along, _along),
        **dict.fromkeys((_aten.type_as.default, _aten.to.other), _pointwise),
        _aten.batch_norm.default: _batch_norm,
        _aten.expand.default: _expand,
        _aten.scaled_dot_product_attention.default: _attention,
        _aten.transpose.int: _transpose,
        _aten.t.default: _transpose,
        _aten.permute.default: _permute,
        _aten.unsqueeze.default: _unsqueeze,
        _aten.select.int: _select,
        _aten.unbind.int: _select,
        _aten.cat.default: _cat,
        _aten.stack.default: _stack,
        _aten.pad.default: _pad,
        _aten.constant_pad_nd.default: _pad,
    }


_RULES = _rules()

_KNOWN: dict[Any, str] = {
    _aten.embedding.default: "the gradient of a table is as large as the table, slice by slice",
}

_VIEWS = frozenset(
    {
        _aten.view.default, _aten.reshape.default, _aten._unsafe_view.default, _aten.flatten.using_ints,
        _aten.unflatten.int, _aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims,
        _aten.unsqueeze.default, _aten.transpose.int, _aten.t.default, _aten.permute.default,
        _aten.expand.default, _aten.select.int, _aten.unbind.int, _aten.slice.Tensor, _aten.narrow.default,
        _aten.split.Tensor, _aten.split_with_sizes.default, _aten.split.sizes, _aten.chunk.default,
        _aten.detach.default, _aten.alias.default, _aten.contiguous.default,
    }
)  # fmt: skip
