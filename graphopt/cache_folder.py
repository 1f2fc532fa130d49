"""The folder of everything that graphopt keeps for a user between runs.

``$GRAPHOPT_CACHE_DIR`` if set, else ``graphopt`` in the platform's cache folder (``$XDG_CACHE_HOME``,
``~/.cache``). Nothing here makes it: who writes does.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

__all__ = ["cache_folder", "file_stem", "lend_tuning", "lent_tuning"]

_lent: dict[Path, None] = {}


def cache_folder() -> Path:
    """The folder of everything that graphopt keeps for this user between runs."""
    named = os.environ.get("GRAPHOPT_CACHE_DIR")
    if named:
        return Path(named)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "graphopt"


def file_stem(name: str) -> str:
    """A device's name as that of a file: ``NVIDIA H200`` is ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def lend_tuning(folder: Path) -> None:
    """Let this process find in ``folder``, laid out as ``tuning`` in the cache folder, what tuning found
    elsewhere: between what is shipped and what was found here, which counts more."""
    _lent[folder.resolve()] = None


def lent_tuning() -> tuple[Path, ...]:
    """The folders of ``lend_tuning``."""
    return tuple(_lent)
