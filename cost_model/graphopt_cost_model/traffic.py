"""Bytes of device memory that one operator call reads and writes.

The rule: each distinct input is read once and each output written once, counted in elements that
are stored (an expanded tensor has as many as before it was expanded); views, ``getitem`` and size
arithmetic move nothing. Operators that touch only rows of a tensor, overwrite one without reading
it, or only look at its shape are listed here as exceptions.

Caches are not modelled: a tensor that one kernel reads several times counts once, which is what a
kernel that tiles for its cache comes to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from graphopt_cost_model.call import Call, TensorSpec, call_of
from graphopt_cost_model.phases import phases_of

__all__ = ["Traffic", "traffic", "traffic_of"]

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes read and written."""

    read: int = 0
    written: int = 0


def traffic(node: fx.Node) -> Traffic:
    """Bytes that a node moves; nothing for placeholders and views."""
    return traffic_of(call_of(node)) if node.op == "call_function" else Traffic()


def traffic_of(call: Call) -> Traffic:
    """Bytes that a call moves."""
    if call.is_view:
        return Traffic()
    if phases := phases_of(call):
        return Traffic(sum(phase.read for phase in phases), sum(phase.written for phase in phases))
    special = _SPECIAL.get(call.packet)
    if special is not None:
        return special(call)
    return Traffic(_stored(call.inputs), _written(call))


def _stored(specs: Iterable[TensorSpec]) -> int:
    """Stored bytes, the same memory once."""
    return sum({spec.place: spec.stored_bytes for spec in specs}.values())


def _written(call: Call) -> int:
    """Outputs, and arguments written in place that are not returned."""
    places = {spec.place: spec.stored_bytes for spec in call.outputs}
    if call.mutates:
        for index, parameter in enumerate(call.target._schema.arguments):
            if parameter.alias_info is None or not parameter.alias_info.is_write:
                continue
            value = call.args[index] if index < len(call.args) else dict(call.kwargs).get(parameter.name)
            for spec in value if isinstance(value, tuple) else (value,):
                if isinstance(spec, TensorSpec):
                    places[spec.place] = spec.stored_bytes
    return sum(places.values())


def _unread(call: Call) -> Traffic:
    """Filled, not computed: the tensor argument only says which shape."""
    return Traffic(0, _written(call))


def _untouched(call: Call) -> Traffic:
    """Allocated and left as it is."""
    return Traffic()


def _overwritten(call: Call) -> Traffic:
    """copy: the first argument is overwritten, not read."""
    return Traffic(_stored(call.inputs[1:]), _written(call))


def _rows_read(call: Call) -> Traffic:
    """Gathers: of the first tensor, only what ends up in the output is read."""
    source, *indices = call.inputs
    out = _stored(call.outputs)
    return Traffic(min(source.stored_bytes, out) + _stored(indices), out)


def _embedding_backward(call: Call) -> Traffic:
    """The table is zeroed, then the rows that occur are read, added to and written again."""
    grad, indices = call.inputs[:2]
    table = _stored(call.outputs)
    rows = min(table, indices.elements * grad.shape[-1] * grad.dtype.itemsize)
    return Traffic(grad.stored_bytes + indices.stored_bytes + rows, table + rows)


def _scattered(call: Call) -> Traffic:
    """Scatters: copy the first tensor unless in place, then write the rows that are named."""
    base, *others = call.inputs
    indices = [spec for spec in others if not spec.dtype.is_floating_point and not spec.dtype.is_complex]
    values = [spec for spec in others if spec not in indices]
    # A scalar, or one value for all rows, is written as often as there are places for it.
    places = max((spec.elements for spec in (*values, *indices)), default=0)
    rows = min(places * base.dtype.itemsize, base.stored_bytes)
    accumulates = call.packet in _ACCUMULATING or bool(_accumulate_flag(call))
    copied = 0 if call.mutates else base.stored_bytes
    read = copied + _stored(others) + (rows if accumulates else 0)
    return Traffic(read, copied + rows)


def _accumulate_flag(call: Call) -> Any:
    if call.packet not in (aten.index_put, aten.index_put_, aten._unsafe_index_put):
        return False
    return call.argument("accumulate", False)


def _nll(call: Call) -> Traffic:
    """Of each row of log-probabilities, only the target's is read."""
    scores, target, *rest = call.inputs
    picked = min(scores.stored_bytes, target.elements * scores.dtype.itemsize)
    return Traffic(picked + target.stored_bytes + _stored(rest), _written(call))


def _nll_backward(call: Call) -> Traffic:
    """The gradient is zeroed and one place of each row is set; the scores are not read."""
    grad, scores, target, *rest = call.inputs
    picked = min(scores.stored_bytes, target.elements * scores.dtype.itemsize)
    return Traffic(_stored((grad, target, *rest)), _written(call) + picked)


_ACCUMULATING = frozenset(
    {
        aten.scatter_add,
        aten.scatter_add_,
        aten.scatter_reduce,
        aten.scatter_reduce_,
        aten.index_add,
        aten.index_add_,
        aten.index_reduce,
        aten.index_reduce_,
        aten._unsafe_masked_index_put_accumulate,
    }
)


def _table(rule: Callable[[Call], Traffic], *packets: Any) -> dict[Any, Callable[[Call], Traffic]]:
    return dict.fromkeys(packets, rule)


_SPECIAL: dict[Any, Callable[[Call], Traffic]] = {
    **_table(
        _untouched,
        aten.empty,
        aten.empty_like,
        aten.empty_strided,
        aten.empty_permuted,
        aten.new_empty,
        aten.new_empty_strided,
    ),
    **_table(
        _unread,
        aten.zeros_like,
        aten.ones_like,
        aten.full_like,
        aten.rand_like,
        aten.randn_like,
        aten.randint_like,
        aten.new_zeros,
        aten.new_ones,
        aten.new_full,
        aten.fill,
        aten.fill_,
        aten.zero,
        aten.zero_,
        aten.uniform,
        aten.uniform_,
        aten.normal_,
        aten.bernoulli_,
        aten.exponential_,
    ),
    **_table(_overwritten, aten.copy, aten.copy_),
    **_table(
        _rows_read,
        aten.embedding,
        aten.index,
        aten._unsafe_index,
        aten.index_select,
        aten.gather,
        aten.take,
        aten.take_along_dim,
    ),
    **_table(_embedding_backward, aten.embedding_dense_backward),
    **_table(
        _scattered,
        aten.scatter,
        aten.scatter_,
        aten.index_put,
        aten.index_put_,
        aten._unsafe_index_put,
        aten.index_copy,
        aten.index_copy_,
        aten.index_fill,
        aten.index_fill_,
        *_ACCUMULATING,
    ),
    **_table(_nll, aten.nll_loss_forward, aten.nll_loss2d_forward),
    **_table(_nll_backward, aten.nll_loss_backward, aten.nll_loss2d_backward),
}
