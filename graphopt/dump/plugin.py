"""The dump formats that ship, registered like any other plugin's."""

from __future__ import annotations

from collections.abc import Iterable

from graphopt.plugins import DumpFormat, hookimpl

__all__ = ["graphopt_api", "graphopt_formats"]

graphopt_api = 1


@hookimpl
def graphopt_formats() -> Iterable[DumpFormat]:
    # Imported here: the writers need torch, and other hooks of this plugin's host do not.
    from graphopt.dump.formats import FORMATS

    return FORMATS
