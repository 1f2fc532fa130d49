"""The least seconds within a target by going through every state, and random steps to do so on.

An oracle for `graphopt_passes.insert_checkpoints.exact`, which shares nothing with it but the model of a
step: for each slot of the backward, the least seconds in which each *set* of storages can be held, over every
order of running operators again, any number of times, and letting storages go at any moment. Time and
memory grow as 2 to the number of storages; 18 take seconds.
"""

from __future__ import annotations

import math
import random
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from graphopt_passes.insert_checkpoints.model import Slot, StepModel

__all__ = ["least_seconds", "random_step"]

Floats = npt.NDArray[np.float64]
Masks = npt.NDArray[np.int64]


def least_seconds(model: StepModel, target: int) -> float:
    """Seconds added by the best plan whose peak is at most ``target`` bytes above the static base;
    infinite if there is none."""
    places = {b: place for place, b in enumerate(b for b, free in enumerate(model.free) if not free)}
    masks: Masks = np.arange(1 << len(places), dtype=np.int64)
    held = np.full(len(masks), model.output_bytes, dtype=np.int64)
    for b, place in places.items():
        held += model.size[b] * (masks >> place & 1)

    def bits(storages: tuple[int, ...]) -> int:
        return sum(1 << places[b] for b in storages if b in places)

    least = np.where(_forward(model, places, masks, held, target), 0.0, math.inf)
    for slot in model.slots:
        while True:
            before = least.copy()
            _let_go(least, len(places))
            for i in range(len(model.operators)):
                if not model.again[i]:
                    continue
                made = model.workspace_again[i] + sum(model.size[b] for b in model.outputs[i])
                reads = bits(model.inputs[i])
                runs = (masks & reads == reads) & (held + slot.before + made <= target)
                then = masks[runs] | bits(model.outputs[i])
                np.minimum.at(least, then, least[runs] + model.seconds[i])
            if np.array_equal(least, before):
                break
        reads = bits(slot.reads)
        least[(masks & reads != reads) | (held + slot.during > target)] = math.inf
        _let_go(least, len(places))
        least[held + slot.gap > target] = math.inf
    return float(least.min())


def _let_go(least: Floats, count: int) -> None:
    """Whatever is held may be let go at no cost."""
    for place in range(count):
        pairs = least.reshape(-1, 2, 1 << place)
        np.minimum(pairs[:, 0], pairs[:, 1], out=pairs[:, 0])


def _forward(
    model: StepModel, places: dict[int, int], masks: Masks, held: Masks, target: int
) -> npt.NDArray[np.bool_]:
    """The sets that may be handed over."""
    fits = held + model.opening <= target
    for b, place in places.items():
        if not model.savable[b] and model.again[model.maker[b]]:
            fits &= masks >> place & 1 == 0
    for i in range(len(model.operators)):
        level = np.full(len(masks), model.workspace[i], dtype=np.int64)
        for b, size in enumerate(model.size):
            if model.maker[b] > i:
                continue
            if model.free[b] or model.last_read[b] >= i:
                level += size
            else:
                level += size * (masks >> places[b] & 1)
        fits &= level <= target
    return fits


def random_step(seed: int, operators: int, slots: int) -> StepModel:
    """A step of the given numbers of operators in its halves: several results of one operator, operators
    that may not run again, values that may not be handed over or are held anyway, scratch memory."""
    draw = random.Random(seed)
    size: list[int] = []
    maker: list[int] = []
    inputs: list[tuple[int, ...]] = []
    outputs: list[tuple[int, ...]] = []
    for i in range(operators):
        recent = list(range(max(0, len(size) - 4), len(size)))
        near = draw.sample(recent, min(len(recent), draw.choice((1, 1, 2, 2, 3))))
        far = [draw.randrange(len(size))] if size and draw.random() < 0.2 else []
        inputs.append(tuple(sorted({*near, *far})) if i and draw.random() < 0.9 else ())
        made = 2 if draw.random() < 0.1 else 1
        outputs.append(tuple(range(len(size), len(size) + made)))
        size += [draw.choice((1, 2, 4, 4, 8, 16)) * 64 for _ in range(made)]
        maker += [i] * made
    count = len(size)
    last_read = list(maker)
    for i, read in enumerate(inputs):
        for b in read:
            last_read[b] = i
    free = [draw.random() < 0.04 for _ in range(count)]
    row = []
    for k in range(slots):
        at = (slots - 1 - k) * count / slots
        near = [min(count - 1, max(0, round(at + draw.gauss(0, 1.5)))) for _ in range(draw.choice((1, 2, 2)))]
        before, gap = (64 * draw.randrange(6) for _ in range(2))
        row.append(Slot(f"slot{k}", tuple(sorted(set(near))), before, before + 64 * draw.randrange(6), gap))
    workspace = [64 * draw.choice((0, 0, 0, 2)) for _ in range(operators)]
    again = [draw.random() >= 0.06 for _ in range(operators)]
    return StepModel(
        program=cast(Any, None), baseline=cast(Any, None), size=size, scratch=list(size), maker=maker,
        representative=[f"value{b}" for b in range(count)], inputs=inputs, outputs=outputs,
        operators=[f"operator{i}" for i in range(operators)],
        seconds=[draw.choice((1, 1, 2, 3, 5, 10, 30)) * draw.uniform(0.9, 1.1) for _ in range(operators)],
        flops=[1] * operators, workspace=workspace, workspace_again=list(workspace), again=again, free=free,
        savable=[draw.random() >= 0.04 for _ in range(count)], only_saved=[False] * count,
        last_read=last_read, slots=row, opening=row[0].before if row else 0, gradient_bytes=0,
        output_bytes=sum(s for s, held in zip(size, free, strict=True) if held), views=frozenset(),
    )  # fmt: skip
