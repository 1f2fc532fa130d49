"""The folder of steps that were planned and compiled before: one file each; those go, with the names of their
code in torch's cache, that were not asked for longest.

Files are replaced whole, so processes that share the folder never see half of one. A folder that cannot be
read or written is as good as an empty one.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from pathlib import Path

from graphopt import _torch
from graphopt.atomic import write_atomically
from graphopt.cache_folder import cache_folder
from graphopt.errors import brief
from graphopt.plans import Plan
from graphopt.stored_step import StepFormatError, StoredStep, read_step, step_text

__all__ = ["code_prefix", "find_step", "note_compared", "step_folder", "store_step"]

MOST = 256
"""Steps that are kept."""

MOST_BYTES = 256 << 20
"""Bytes that their files may take."""

_ABANDONED = 3600.0
"""Seconds after which a temporary file belongs to a process that was ended."""


def step_folder() -> Path:
    """Where steps are kept: ``steps`` in the folder of everything that graphopt keeps."""
    return cache_folder() / "steps"


def code_prefix(key: str) -> str:
    """What the names begin with that the code of a step has in torch's cache."""
    return f"graphopt-{key[:32]}-"


def find_step(key: str) -> tuple[StoredStep, Plan] | str:
    """The step of that key and its plan, or why there is none."""
    path = _path(key)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return "none was kept"
    except (OSError, UnicodeDecodeError) as error:
        return f"what was kept cannot be read ({brief(error)})"
    try:
        found = read_step(text, key)
    except StepFormatError as error:
        return f"what was kept cannot be used: {error}"
    # Where that is not allowed, its age is when it was written.
    with contextlib.suppress(OSError):
        os.utime(path)
    return found


def store_step(step: StoredStep, plan: Plan) -> str:
    """Keep a step; why not, or ``""``."""
    path = _path(step.key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, step_text(step, plan))
    except OSError as error:
        return f"the folder of what is kept cannot be written ({brief(error)})"
    with contextlib.suppress(OSError):
        _make_room(path)
    return ""


def note_compared(key: str, code: str) -> None:
    """Note of a step that was kept that what was captured computes what the model does whose code has the
    hash ``code``."""
    found = find_step(key)
    if not isinstance(found, str):
        step, plan = found
        store_step(replace(step, compared=code), plan)


def _path(key: str) -> Path:
    return step_folder() / f"{key}.json"


def _make_room(newest: Path) -> None:
    """Remove what was not asked for longest, beyond the limits, and what ended processes left."""
    found: list[tuple[float, int, Path]] = []
    now = time.time()
    for path in newest.parent.iterdir():
        try:
            known = path.stat()
        except OSError:
            continue
        if path.suffix == ".json" and path != newest:
            found.append((known.st_mtime, known.st_size, path))
        elif path.suffix == ".tmp" and now - known.st_mtime > _ABANDONED:
            path.unlink(missing_ok=True)
    count, total = 1, newest.stat().st_size if newest.exists() else 0
    for _, size, path in sorted(found, reverse=True):
        count, total = count + 1, total + size
        if count > MOST or total > MOST_BYTES:
            path.unlink(missing_ok=True)
            _torch.forget_code(code_prefix(path.stem))
