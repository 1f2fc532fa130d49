"""How a kernel is started: as tuning found best for the device, else by rule.

    problem = ForwardProblem(rows_class(rows, 16384), width, ...)
    launch = FORWARD(problem, input.device)     # a dictionary hit; never tunes, never waits for the device

What was found on disk is used only where the kernel's own ``check`` allows it: a configuration that would
compute something else is left out with a ``TuningWarning``. This file goes with programs that are written out
(``emit.carried_ops``): it imports nothing of graphopt but ``Reason``.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from graphopt.candidate import Reason
from graphopt_kernels.tuning.table import found
from graphopt_kernels.tuning.warning import TuningWarning

__all__ = [
    "Choice",
    "asked_for",
    "device_text",
    "fields_text",
    "forget_choices",
    "is_asking",
    "parsed",
    "processors_of",
    "rows_class",
]

P = TypeVar("P", bound=tuple[Any, ...])
C = TypeVar("C", bound=tuple[Any, ...])

_chosen: dict[tuple[str, torch.device, tuple[Any, ...]], Any] = {}
_asked: dict[tuple[str, tuple[Any, ...]], None] | None = None


@dataclass(frozen=True)
class Choice(Generic[P, C]):
    """The configuration of ``kernel`` for a problem, named tuples both (``graphopt.plugins.TunableSpec``).

    ``sources``: modules whose code the kernel is. ``default`` gives the configuration where nothing was
    found, ``default_on`` the same for a GPU with so many multiprocessors, ``check`` why another one would
    compute something else.
    """

    kernel: str
    sources: tuple[str, ...]
    default: Callable[[P], C]
    check: Callable[[P, C], Reason | None]
    default_on: Callable[[P, int], C] | None = None

    def __call__(self, problem: P, device: torch.device) -> C:
        if _asked is not None:
            _asked[self.kernel, problem] = None
        key = (self.kernel, device, problem)
        chosen: C | None = _chosen.get(key)
        if chosen is None:
            chosen = _chosen[key] = self._look_up(problem, device)
        return chosen

    def _look_up(self, problem: P, device: torch.device) -> C:
        if device.type != "cuda":
            return self.default(problem)
        if self.default_on is None:
            default = self.default(problem)
        else:
            default = self.default_on(problem, processors_of(device))
        stored = found(self.kernel, self.sources, device_text(device), fields_text(problem))
        if stored is None:
            return default
        try:
            configuration = parsed(default, stored)
            reason = self.check(problem, configuration)
        except ValueError as error:
            reason = Reason(str(error))
        if reason is None:
            return configuration
        warnings.warn(
            f"a stored configuration of {self.kernel} for {fields_text(problem)} is not used: {reason.text}",
            TuningWarning,
            stacklevel=3,
        )
        return default


def parsed(default: C, text: str) -> C:
    """The configuration that ``fields_text`` wrote, with the fields of ``default``; raises ``ValueError``."""
    expected = default._asdict()  # type: ignore[attr-defined]
    stored = dict(part.split("=", 1) for part in text.split() if "=" in part)
    if stored.keys() != expected.keys():
        raise ValueError(f"{text!r} has other fields than {', '.join(expected)}")
    values: dict[str, Any] = {}
    for name, value in expected.items():
        if isinstance(value, bool):
            known = {"yes": True, "no": False}
            if stored[name] not in known:
                raise ValueError(f"{name} is {stored[name]!r}: expected yes or no")
            values[name] = known[stored[name]]
        else:
            try:
                values[name] = type(value)(stored[name])
            except ValueError:
                raise ValueError(f"{name} is {stored[name]!r}: expected {type(value).__name__}") from None
    return type(default)(**values)


@contextmanager
def asked_for() -> Iterator[dict[tuple[str, tuple[Any, ...]], None]]:
    """The kernels and problems that are looked up in the block, each once, in order."""
    global _asked
    before, _asked = _asked, {}
    try:
        yield _asked
    finally:
        _asked = before


def is_asking() -> bool:
    """Whether what is looked up is noted (``asked_for``)."""
    return _asked is not None


def forget_choices() -> None:
    """Look everything up again: what is stored has changed."""
    _chosen.clear()


def rows_class(rows: int, most: int) -> int:
    """``rows``, at least one, rounded up to a power of two; ``most``, a power of two, stands for more.

    Launches in between, and those with many rows for every program, are taken for alike."""
    return min(1 << (rows - 1).bit_length(), most)


def fields_text(fields: Any) -> str:
    """A problem or a configuration as it is stored: ``rows=16384 width=4096 dtype=bfloat16 added=no``."""
    return " ".join(f"{name}={_written(value)}" for name, value in fields._asdict().items())


def _written(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value).removeprefix("torch.")


@functools.cache
def processors_of(device: torch.device) -> int:
    """How many multiprocessors a GPU has that is here."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def device_text(device: torch.device) -> str:
    """A GPU as stored results name it: ``NVIDIA H200, 132 multiprocessors, sm_90``."""
    about = torch.cuda.get_device_properties(device)
    return f"{about.name}, {about.multi_processor_count} multiprocessors, sm_{about.major}{about.minor}"
