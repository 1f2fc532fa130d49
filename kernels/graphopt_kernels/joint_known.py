"""Stores that join attentions, found by how they are spelled.

An operator of a step that is compiled, or loaded from a file, says ``store="merged{keep=6}"`` and no more.
Classes make themselves known as they are defined.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from graphopt.decoding.assignment import store_named
from graphopt.errors import PluginError

if TYPE_CHECKING:
    from graphopt_kernels.joint_store import JointStore

__all__ = ["joint_store", "make_known"]

_KNOWN: dict[str, type[JointStore]] = {}


def make_known(kind: type[JointStore]) -> None:
    """Let operators find stores of ``kind``. Raises ``PluginError`` for a name that is another's: steps that
    were made would go by the new one."""
    first = _KNOWN.setdefault(kind.name, kind)
    one, other = (f"{each.__module__}.{each.__qualname__}" for each in (first, kind))
    if one != other:
        raise PluginError(
            f"store {kind.name!r} is {one} in this process, and {other} was defined too",
            hint="give one of them another name",
        )
    # One that is defined again where it was replaces what it was.
    _KNOWN[kind.name] = kind
    _made.cache_clear()


def joint_store(text: str) -> JointStore:
    """The store that ``text`` spells. Raises what ``store_named`` raises."""
    if text.partition("{")[0] not in _KNOWN:
        from graphopt.plugins.host import default_host

        default_host().stores()
    return _made(text)


@lru_cache(maxsize=64)
def _made(text: str) -> JointStore:
    made: JointStore = store_named(text, _KNOWN)  # type: ignore[assignment]
    return made
