"""What tuning found for this version of a kernel, in memory after the first question.

Programs that are written out have another file in place of this one, with what was known when they were
written (``carried``).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from graphopt.cache_folder import lent_tuning
from graphopt_kernels.tuning.store import Entry, all_entries, code_of, stored_entries, versions

__all__ = ["carried", "forget_table", "found", "measured"]


def found(kernel: str, sources: tuple[str, ...], device: str, problem: str) -> str | None:
    """The configuration that is stored for a problem, or ``None``: nothing is, or the default was best."""
    entry = _entries(device, lent_tuning()).get((kernel, problem))
    if entry is None or entry.code != code_of(sources):
        return None
    return entry.configuration


def measured(kernel: str, device: str, problem: str | None) -> bool:
    """Whether anything is stored for a problem, or for ``None`` for any; also that the default was best."""
    known = _entries(device, lent_tuning())
    if problem is not None:
        return (kernel, problem) in known
    return any(name == kernel for name, _ in known)


@functools.cache
def _entries(device: str, lent: tuple[Path, ...]) -> Mapping[tuple[str, str], Entry]:
    present = versions()
    return {
        (entry.kernel, entry.problem): entry
        for entry in stored_entries(device)
        if (entry.torch, entry.triton) == present
    }


def forget_table() -> None:
    """Read the files again when next asked."""
    _entries.cache_clear()
    code_of.cache_clear()


_SOURCE = '''"""What tuning had found when the program was written."""

from __future__ import annotations

FOUND = {
%s}
"""Configurations by kernel, device and problem."""


def found(kernel, sources, device, problem):
    """The configuration that was found for a problem, or ``None``."""
    return FOUND.get((kernel, device, problem))
'''


def carried(kernels: Mapping[str, tuple[str, ...]]) -> str:
    """The source that a program takes along instead of this module: what is known now of some kernels, given
    with their sources, on every device."""
    code = {kernel: code_of(sources) for kernel, sources in kernels.items()}
    known = {
        (entry.kernel, entry.device, entry.problem): entry.configuration
        for entry in all_entries()
        if entry.code == code.get(entry.kernel) and (entry.torch, entry.triton) == versions()
    }
    lines = [f"    {key!r}: {known[key]!r},\n" for key in sorted(known) if known[key] is not None]
    return _SOURCE % "".join(lines)
