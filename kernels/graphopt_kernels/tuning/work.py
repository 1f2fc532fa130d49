"""What to tune: the usual problems of every kernel, some with other fields, or what a step launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphopt.errors import UnknownNameError
from graphopt.plugins import TunableSpec, default_host
from graphopt_kernels.tuning.lookup import asked_for
from graphopt_kernels.tuning.tuner import TuningError

__all__ = ["Work", "launched_by", "shipped_work"]

Work = list[tuple[TunableSpec, Any]]
"""Kernels, each with a problem."""


def shipped_work(kernels: Sequence[str], shapes: Sequence[str]) -> Work:
    """The problems of ``kernels`` (all, where none are named) that are tuned for a release, those of each
    ``FIELD=VALUE,...`` of ``shapes`` with those fields in place.

    Kernels that have none of the fields are left out, unless they are named. Raises ``UnknownNameError`` for
    kernels and fields, ``TuningError`` for values.
    """
    specs = _named(kernels)
    if not shapes:
        return [(spec, problem) for spec in specs for problem in spec.shipped()]
    changes = [_fields(text) for text in shapes]
    known = {name for spec in specs for problem in spec.shipped() for name in problem._fields}
    work: dict[tuple[str, Any], tuple[TunableSpec, Any]] = {}
    for change in changes:
        for name in change:
            if name not in known:
                raise UnknownNameError("field", name, sorted(known))
        for spec in specs:
            for problem in spec.shipped():
                missing = [name for name in change if name not in problem._fields]
                if missing and kernels:
                    raise UnknownNameError(f"field of {spec.name}", missing[0], problem._fields)
                if not missing:
                    values = {name: _value(problem, name, text) for name, text in change.items()}
                    changed = problem._replace(**values)
                    work[spec.name, changed] = (spec, changed)
    return list(work.values())


def launched_by(step: Callable[[], object], kernels: Sequence[str], target: str) -> Work:
    """The kernels, with the problems, that ``step()`` starts; raises ``TuningError`` where it starts none."""
    wanted = {spec.name: spec for spec in _named(kernels)}
    with asked_for() as asked:
        step()
    work = [(wanted[name], problem) for name, problem in asked if name in wanted]
    if not work:
        others = sorted({name for name, _ in asked})
        rest = f"; it launches {', '.join(others)}" if others else ""
        raise TuningError(
            f"{target} launches no kernel that can be tuned{' of those named' if kernels else ''}{rest}"
        )
    return work


def _named(kernels: Sequence[str]) -> list[TunableSpec]:
    host = default_host()
    return [host.tunable(name) for name in kernels] if kernels else list(host.tunables().values())


def _fields(text: str) -> dict[str, str]:
    found = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not (equals and name.strip() and value.strip()):
            raise TuningError(f"cannot read shapes {text!r}", hint="write FIELD=VALUE,FIELD=VALUE")
        found[name.strip()] = value.strip()
    return found


def _value(problem: Any, name: str, text: str) -> Any:
    """``text`` as a value of the field, which says its type."""
    present = getattr(problem, name)
    if isinstance(present, bool):
        if text not in ("yes", "no"):
            raise TuningError(f"{name} is {text!r}: expected yes or no")
        return text == "yes"
    if isinstance(present, int):
        if not text.isdecimal() or not int(text):
            raise TuningError(f"{name} is {text!r}: expected a whole number above 0")
        return int(text)
    if present is None or isinstance(present, torch.dtype):
        dtype = getattr(torch, text, None)
        if text != "none" and not isinstance(dtype, torch.dtype):
            raise TuningError(f"{name} is {text!r}: expected a dtype of torch or none")
        return dtype
    return text
