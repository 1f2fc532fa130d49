"""Never worse: a program that measures slower than the model it was made from is not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from graphopt.budget import format_bytes
from graphopt.duration import format_seconds
from graphopt.errors import brief
from graphopt.hand_over import is_watched
from graphopt.measure import Measurement, measure

__all__ = ["GUARDS", "Guard", "attributes_restored", "obstacle"]

GUARDS = ("measure", "off")
"""What ``optimize(guard=...)`` takes."""

CLEARLY = 1.03
"""How many times as long a step has to take to count as slower: less is the noise of a clock."""

WARM_STEPS = 4
"""Steps before the first that is measured: by then kernels are tuned and steps are recorded."""

ROUNDS = 2
"""How often the two are measured, in turns; the better of each counts."""


class Measurer(Protocol):
    """Runs a step several times; ``graphopt.measure.measure`` is one."""

    def __call__(
        self,
        step: Callable[[], object],
        *,
        device: torch.device,
        static_bytes: int,
        before: Callable[[], object],
    ) -> Measurement: ...


@dataclass
class Guard:
    """Compares a step with the model's own, once for training and once for inference.

    ``note`` is told what was measured, and which of the two runs from then on. While ``paused`` nothing is
    due.
    """

    note: Callable[[str], object]
    measurer: Measurer = measure
    paused: bool = False
    _replaced: dict[bool, bool] = field(default_factory=dict)

    def replaced(self, training: bool) -> bool:
        """Whether the model runs as it did."""
        return self._replaced.get(training, False)

    def due(self, training: bool) -> bool:
        """Whether the first call of this kind is about to run. Later ones may come between a forward and its
        backward, where nothing may be tried."""
        return not self.paused and training not in self._replaced

    def refuse(self, training: bool, reason: str) -> None:
        """Keep the program unmeasured."""
        self._replaced[training] = False
        self.note(f"{_kind(training)} was not measured against the model's own: {reason}")

    def judge(
        self,
        ours: Callable[[], object],
        plain: Callable[[], object],
        *,
        training: bool,
        device: torch.device,
        static_bytes: int,
        budget: int | None,
        before: Callable[[], object],
    ) -> None:
        """Measure a step of both, in turns, and say which one runs from now on.

        The model's own has to be faster and to fit ``budget``; or to fit it where the program does not.
        ``static_bytes`` are held before a step and count. What a step changes is the caller's to put back.
        """
        found: tuple[list[Measurement], list[Measurement]] = [], []
        try:
            for _ in range(WARM_STEPS):
                before()
                ours()
            for _ in range(ROUNDS):
                for step, taken in zip((ours, plain), found, strict=True):
                    taken.append(self.measurer(step, device=device, static_bytes=static_bytes, before=before))
        except Exception as error:
            self.refuse(training, brief(error))
            return
        mine, other = (_best(taken) for taken in found)
        fits = budget is None or other.peak_bytes <= budget
        slower = mine.seconds > CLEARLY * other.seconds
        over = budget is not None and mine.peak_bytes > budget
        replaced = self._replaced[training] = fits and (slower or over)
        told = f"{_figures(mine)} against {_figures(other)} of the model as it was"
        if replaced:
            self.note(f"{_kind(training)} runs as it did: optimized it measured {told}")
        else:
            self.note(f"{_kind(training)} measured {told}")


def obstacle(model: torch.nn.Module, *, training: bool) -> str:
    """Why a step of ``model`` cannot be tried on the side, or ``""``."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "other processes take part in it"
    if training and any(map(is_watched, model.parameters())):
        return "hooks wait for its gradients"
    return ""


@contextmanager
def attributes_restored(model: torch.nn.Module) -> Iterator[Callable[[], None]]:
    """Afterwards modules have the attributes and buffers that they had: counters that plain code keeps,
    buffers that it replaces. Yields what puts them back in between."""
    tables = ("_buffers", "_parameters")
    known = [
        (module, dict(vars(module)), {name: dict(vars(module)[name]) for name in tables})
        for module in model.modules()
    ]

    def reset() -> None:
        for module, attributes, entries in known:
            vars(module).clear()
            vars(module).update(attributes)
            for name, entry in entries.items():
                vars(module)[name].clear()
                vars(module)[name].update(entry)

    try:
        yield reset
    finally:
        reset()


def _kind(training: bool) -> str:
    return "training" if training else "inference"


def _best(taken: Sequence[Measurement]) -> Measurement:
    return Measurement(min(t.peak_bytes for t in taken), min(t.seconds for t in taken))


def _figures(taken: Measurement) -> str:
    return f"{format_seconds(taken.seconds)} and {format_bytes(taken.peak_bytes)}"
