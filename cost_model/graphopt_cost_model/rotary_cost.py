"""What ``graphopt.rotary`` and its backward take: heads once in and once out, tables, and little else.

A view of a projection stands for all of its heads; values that are not copied are not read.
"""

from __future__ import annotations

from graphopt_cost_model.call import Call, TensorSpec
from graphopt_cost_model.phase import Phase

__all__ = ["cached_rotary_phases", "rotary_backward_phases", "rotary_phases", "stored_rotary_phases"]


def rotary_phases(call: Call) -> tuple[Phase, ...]:
    """One kernel."""
    data: TensorSpec = call.argument("input")
    groups, queries, keys, values = call.argument("heads")
    moved = queries + keys + (values if call.argument("copies_values") else 0)
    read = _heads(data, groups * moved) + _beside(call)
    return (Phase(0, data.elements, read, _bytes(*call.outputs), "float32"),)


def cached_rotary_phases(call: Call) -> tuple[Phase, ...]:
    """One kernel; of the caches, the places of these positions are written."""
    data: TensorSpec = call.argument("input")
    groups, _, keys, values = call.argument("heads")
    written = _bytes(*call.outputs)
    for name, count in (("key_cache", keys), ("value_cache", values)):
        batch, length, _, size = data.shape
        written += batch * length * groups * count * size * call.argument(name).dtype.itemsize
    read = data.stored_bytes + _beside(call) + _bytes(call.argument("positions"))
    return (Phase(0, data.elements, read, written, "float32"),)


def stored_rotary_phases(call: Call) -> tuple[Phase, ...]:
    """One kernel; of the stores, the places of these rows are written."""
    query, key, value = (call.argument(name) for name in ("query", "key", "value"))
    read = sum(part.elements * part.dtype.itemsize for part in (query, key, value))
    read += _beside(call) + _bytes(call.argument("positions"))
    written = _bytes(*call.outputs)
    for part, name in ((key, "key_store"), (value, "value_store")):
        written += part.elements * call.argument(name).dtype.itemsize
    return (Phase(0, query.elements + key.elements, read, written, "float32"),)


def rotary_backward_phases(call: Call) -> tuple[Phase, ...]:
    """One kernel for all gradients; those of weights are summed up by a small one each, which does not
    show."""
    data: TensorSpec | None = call.argument("input")
    groups, queries, keys, _ = call.argument("heads")
    gradients = [call.argument(name) for name in ("d_query", "d_key", "d_value")]
    read = _bytes(*gradients) + _beside(call)
    if data is not None:
        read += _heads(data, groups * (queries + keys))
    elements = sum(gradient.elements for gradient in gradients if gradient is not None)
    return (Phase(0, elements, read, _bytes(*call.outputs), "float32"),)


def _heads(data: TensorSpec, count: int) -> int:
    """Bytes of ``count`` heads of [B, S, N, D]."""
    batch, length, _, size = data.shape
    return batch * length * count * size * data.dtype.itemsize


def _beside(call: Call) -> int:
    return _bytes(*(call.argument(name) for name in ("cos", "sin", "query_weight", "key_weight")))


def _bytes(*specs: TensorSpec | None) -> int:
    return sum(spec.stored_bytes for spec in specs if spec is not None)
