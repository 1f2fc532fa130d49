"""``graphopt.use``: a pass by its name, with options, for ``optimize(pipeline=[...])``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphopt.passes import Pass
from graphopt.plugins.host import PluginHost, default_host

__all__ = ["use"]


def use(name: str, *, plugins: Sequence[object] = (), **options: Any) -> Pass:
    """The pass ``name`` with ``options``, of those that installed plugins and ``plugins`` register.

    Raises ``UnknownNameError`` for a pass or an option that there is none of, and ``PassError`` for a value
    that the option cannot hold.
    """
    host = PluginHost(tuple(plugins)) if plugins else default_host()
    return host.pass_class(name).configured(**options)
