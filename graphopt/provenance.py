"""Where a node that a pass made comes from: one frozen note under one key of its metadata."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch.fx as fx

__all__ = ["NodeNote", "note_of", "origin_of", "stamp"]

_KEY = "graphopt"


@dataclass(frozen=True)
class NodeNote:
    """``origin``: names of the captured nodes that this one stands for, ``pass_id`` and ``rule`` what
    made it, ``layer`` the dotted path of the module that they came from."""

    origin: tuple[str, ...]
    pass_id: str
    rule: str = ""
    layer: str = ""


def note_of(node: fx.Node) -> NodeNote | None:
    """The note of a node that a pass made, ``None`` for a captured one."""
    note = node.meta.get(_KEY)
    return note if isinstance(note, NodeNote) else None


def origin_of(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    """Names of the captured nodes behind ``nodes``, through the notes of those that passes made."""
    names: dict[str, None] = {}
    for node in nodes:
        note = note_of(node)
        names.update(dict.fromkeys(note.origin if note is not None else (node.name,)))
    return tuple(names)


def stamp(node: fx.Node, note: NodeNote) -> None:
    """Write the note; nothing else of graphopt's is kept in metadata."""
    node.meta[_KEY] = note
