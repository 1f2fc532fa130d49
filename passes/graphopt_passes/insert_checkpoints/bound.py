"""Proven lower bounds, for the backward order given: on the peak, and on the seconds at a budget.

At a slot, whatever the plan, the backward holds its own values and the slot's operands. Everything
else that is alive there under full saving may be given up, but each storage given up has to be
made again at the price of its operator at least. The cheapest way to free the bytes that exceed a
budget is a fractional knapsack (Dantzig 1957): no plan adds less.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from graphopt_passes.insert_checkpoints.model import StepModel

__all__ = ["peak_floor", "seconds_bound"]


def peak_floor(model: StepModel) -> int:
    """Bytes that some slot holds under every plan, above the static base."""
    floor = max((size for size in _operator_floors(model)), default=0)
    for slot in model.slots:
        operands = sum(model.size[b] for b in slot.reads if not model.free[b])
        floor = max(floor, model.output_bytes + operands + slot.during)
    return max(floor, model.opening + model.output_bytes)


def _operator_floors(model: StepModel) -> list[int]:
    return [
        sum(model.size[b] for b in {*model.inputs[i], *model.outputs[i]} if not model.only_saved[b])
        + model.workspace[i]
        for i in range(len(model.operators))
    ]


def seconds_bound(model: StepModel) -> Callable[[int], float]:
    """The bound as a function of the budget (bytes above the static base), in added seconds."""
    readers: dict[int, int] = {}
    for k, slot in enumerate(model.slots):
        for b in slot.reads:
            readers.setdefault(b, k)
    storages = [b for b in readers if not model.free[b] and model.savable[b] and model.again[model.maker[b]]]
    sizes = np.array([model.size[b] for b in storages], dtype=np.float64)
    # Outputs of one operator come back together: its price counts once, spread over its bytes.
    shared = {i: sum(model.size[b] for b in outputs) for i, outputs in enumerate(model.outputs)}
    prices = np.array(
        [model.seconds[model.maker[b]] * model.size[b] / max(shared[model.maker[b]], 1) for b in storages]
    )
    first = np.array([readers[b] for b in storages], dtype=np.int64)
    order = np.argsort(prices / np.maximum(sizes, 1), kind="stable")
    sizes, prices, first = sizes[order], prices[order], first[order]
    points = []
    for k, slot in enumerate(model.slots):
        # Not yet read here, so it could be absent; what the slot itself reads must be present.
        pending = first > k
        own = sum(model.size[b] for b in slot.reads if not model.free[b])
        fixed = model.output_bytes + slot.during + own
        held = fixed + float(sizes[pending].sum())
        points.append((held, pending))
    points.sort(key=lambda pair: -pair[0])
    kept = points[:64]

    def bound(budget: int) -> float:
        best = 0.0
        for held, pending in kept:
            need = held - budget
            if need <= 0:
                break
            pool_sizes, pool_prices = sizes[pending], prices[pending]
            total = np.cumsum(pool_sizes)
            whole = int(np.searchsorted(total, need))
            seconds = float(pool_prices[:whole].sum())
            if whole < len(total):
                before = float(total[whole - 1]) if whole else 0.0
                seconds += float(pool_prices[whole]) * (need - before) / max(float(pool_sizes[whole]), 1.0)
            best = max(best, seconds)
        return best

    return bound
