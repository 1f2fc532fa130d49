"""Operators of this package that a program calls, as source files that go with it.

The files are copied with two changes: they import each other from the folder that they lie in, and register
their operators under a namespace of their own, made from a hash of the files, so that neither graphopt nor a
second program in the same process is in the way. What they use of the core, a record and functions that touch
private torch APIs, comes with them; what tuning found for their kernels goes with them as constants.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterable
from importlib.resources import files

from graphopt import _torch
from graphopt.errors import EmitError
from graphopt.plugins import default_host
from graphopt_kernels.tuning.table import carried

__all__ = ["CARRIED", "carried_ops"]

CARRIED = "graphopt"
"""The namespace of operators whose sources can be carried."""

_REASON = '''"""Why something does not apply."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """A sentence, and the nodes that it is about."""

    text: str
    nodes: tuple[str, ...] = ()
'''

_TABLE = "graphopt_kernels.tuning.table"

_PRIVATE = '''"""Private torch APIs that the operators touch."""

from __future__ import annotations

import sys

import torch
'''

_IMPORTED = re.compile(r"^\s*from (graphopt_kernels[\w.]*) import (\([^)]*\)|[^\n]*)", re.MULTILINE)


def carried_ops(modules: Iterable[str]) -> tuple[str, dict[str, str]]:
    """The namespace of the operators that the given modules register, and the files that do so by path.

    ``modules`` are modules of this package. Raises ``EmitError`` for one of another.
    """
    sources = _closure(modules)
    digest = hashlib.sha256("".join(f"{k}\n{v}" for k, v in sorted(sources.items())).encode()).hexdigest()
    name = f"graphopt_ops_{digest[:8]}"
    rewritten = {path: _rewritten(text, name) for path, text in sources.items()}
    first = "\n".join(
        f"import {name}.{path.removesuffix('.py').replace('/', '.')}"
        for path in sorted(rewritten)
        if not path.endswith(("__init__.py", "_triton.py"))
    )
    rewritten["__init__.py"] = f'"""Operators that the program calls."""\n\n{first}\n'
    rewritten["reason.py"] = _REASON
    used = sorted({use for text in sources.values() for use in re.findall(r"\b_torch\.(\w+)", text)})
    if used:
        functions = [inspect.getsource(getattr(_torch, use)) for use in used]
        rewritten["private_torch.py"] = "\n\n".join([_PRIVATE, *functions])
    return name, rewritten


def _closure(modules: Iterable[str]) -> dict[str, str]:
    sources: dict[str, str] = {}
    stack = list(modules)
    tuned = False
    while stack:
        module = stack.pop()
        package, _, rest = module.partition(".")
        if package != "graphopt_kernels" or not rest:
            raise EmitError(
                f"operators of {module!r} cannot be written out: its source is not part of graphopt"
            )
        if module == _TABLE:
            tuned = True
            continue
        path, text = _source(rest)
        if path in sources:
            continue
        sources[path] = text
        if path.count("/") and f"{path.rsplit('/', 1)[0]}/__init__.py" not in sources:
            sources[f"{path.rsplit('/', 1)[0]}/__init__.py"] = ""
        for match in _IMPORTED.finditer(text):
            base, names = match.groups()
            for name in re.findall(r"\w+", names):
                stack.append(f"{base}.{name}" if _is_module(f"{base}.{name}") else base)
    if tuned:
        present = {f"graphopt_kernels.{path.removesuffix('.py').replace('/', '.')}" for path in sources}
        kernels = default_host().tunables().items()
        sources[_source(_TABLE.partition(".")[2])[0]] = carried(
            {name: spec.sources for name, spec in kernels if present.issuperset(spec.sources)}
        )
    return sources


def _is_module(dotted: str) -> bool:
    _, _, rest = dotted.partition(".")
    return files("graphopt_kernels").joinpath(*rest.split(".")[:-1], f"{rest.split('.')[-1]}.py").is_file()


def _source(rest: str) -> tuple[str, str]:
    *folders, last = rest.split(".")
    path = "/".join([*folders, f"{last}.py"])
    return path, files("graphopt_kernels").joinpath(path).read_text(encoding="utf-8")


def _rewritten(text: str, name: str) -> str:
    text = text.replace("from graphopt.candidate import Reason", f"from {name}.reason import Reason")
    text = text.replace("from graphopt import _torch", f"from {name} import private_torch as _torch")
    text = re.sub(r"\bgraphopt_kernels\b", name, text)
    return text.replace('"graphopt::', f'"{name}::').replace("torch.ops.graphopt.", f"torch.ops.{name}.")
