"""The Python code that a model runs, as one hash: what dynamo followed, and whatever lies beside it."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType

import torch

__all__ = ["code_digest"]

_KNOWN = ("torch", "graphopt")
"""Packages whose versions and sources the key of a step has."""


def code_digest(model: torch.nn.Module, followed: Iterable[CodeType]) -> str:
    """A hash of the files of every loaded module of the packages that ``model`` is of, ``""`` where a class
    of it is in no file.

    Packages are those of the classes of its modules, and of the code that dynamo ``followed``: more than the
    model runs, so that code counts as well that it runs op by op alone. Code that was followed and is in no
    file (dataclasses make such) counts by itself.
    """
    loaded = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
    by_file = {file: name for name, file in loaded.items()}
    classes = {kind.__module__ for part in model.modules() for kind in type(part).__mro__}
    outside = [code for code in followed if code.co_filename not in by_file]
    names = classes | {by_file[code.co_filename] for code in followed if code.co_filename in by_file}
    packages = {name.partition(".")[0] for name in names} - {*_KNOWN} - sys.stdlib_module_names
    if any(loaded.get(name) is None for name in classes if name.partition(".")[0] in packages):
        return ""
    digest = hashlib.sha256()
    try:
        for name, file in sorted(loaded.items()):
            if name.partition(".")[0] in packages and file is not None:
                digest.update(f"{name} {hashlib.sha256(Path(file).read_bytes()).hexdigest()}\n".encode())
    except OSError:
        return ""
    for text in sorted("\n".join(_lines(code)) for code in outside):
        digest.update(text.encode())
    return digest.hexdigest()


def _lines(code: CodeType) -> Iterator[str]:
    """What a function does, as text that another process writes alike."""
    yield f"{code.co_qualname} {code.co_code.hex()} {code.co_names} {code.co_varnames} {code.co_freevars}"
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _lines(constant)
        else:
            yield repr(constant)
