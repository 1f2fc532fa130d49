"""A new plugin as a project: a pass made of a rule, its registration and a test, all of which work."""

from __future__ import annotations

import importlib.util
import keyword
import os
import re
import shutil
import tempfile
from pathlib import Path
from string import Template

from graphopt.errors import InputsError
from graphopt.plugins.hookspecs import API_VERSION, GROUP

__all__ = ["new_plugin", "project_files"]

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")

_PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "$name"
version = "0.1.0"
description = "A plugin of graphopt."
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["graphopt"]

# How graphopt finds it: the name of the plugin, and the module that implements hooks.
[project.entry-points."$group"]
$name = "$package.plugin"

[tool.setuptools]
packages = ["$package"]

[tool.setuptools.package-data]
$package = ["py.typed"]
"""

_README = """\
# $name

A plugin of graphopt. It adds the pass `$name-silu`, which calls `silu` for `x * sigmoid(x)`.

```sh
pip install -e .
graphopt plugins --check
graphopt passes $name-silu
pytest
```

```python
fast = graphopt.optimize(model, inputs, pipeline="$name-silu,insert-checkpoints")
```
"""

_PLUGIN = '''\
"""What this plugin registers. Nothing here imports torch: ``graphopt --help`` loads this module."""

from __future__ import annotations

from collections.abc import Iterable

from graphopt import hookimpl

graphopt_api = $api


@hookimpl
def graphopt_passes() -> Iterable[str]:
    # Imported when it is first needed.
    return ["$package.fuse_silu:FuseSilu"]
'''

_PASS = '''\
"""$name-silu: ``x * sigmoid(x)`` becomes one call.

Before::

    %1 = aten.sigmoid(%0) : f32[4,8]
    %2 = aten.mul.Tensor(%0, %1) : f32[4,8]

After::

    %1 = aten.silu(%0) : f32[4,8]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from graphopt import Level, Reason
from graphopt.rules import RewritePass, Rule, operator

aten = torch.ops.aten
times = operator(aten.mul.Tensor, commutes=True)
sigmoid = operator(aten.sigmoid.default)


def pattern(x: Any) -> Any:
    return times(x, sigmoid(x))


def replacement(x: Any) -> Any:
    return aten.silu.default(x)


def guard(x: Any) -> Reason | None:
    """``None``, or why this place is left alone: the report tells it."""
    if not x.meta["val"].is_floating_point():
        return Reason("silu takes floating-point values", (x.name,))
    return None


@dataclass(frozen=True)
class FuseSilu(RewritePass):
    """Calls silu for ``x * sigmoid(x)``. Fields of this class are options of the pass."""

    name: ClassVar[str] = "$name-silu"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = "call silu for x * sigmoid(x)"
    rules: ClassVar[tuple[Rule, ...]] = (
        # The same mathematics, rounded in another order.
        Rule("silu", pattern, replacement, guard, exactness="reassociated"),
    )
'''

_TEST = '''\
"""What every pass must stand, what this one does, what it leaves alone, and that graphopt finds it."""

from __future__ import annotations

import torch
from $package.fuse_silu import FuseSilu
from torch import nn

from graphopt.plugins import default_host
from graphopt.testing import check_pass, semantic_programs


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            y = layer(x)
            x = y * torch.sigmoid(y)
        return x.square().mean()


def test_the_pass_keeps_what_any_pass_must() -> None:
    checked = check_pass(FuseSilu(), Gate(), (torch.randn(4, 8),))
    after = checked.text.partition("# after")[2]
    assert after.count("aten.silu") == 2 and "aten.sigmoid" not in after


def test_whole_numbers_are_left_alone_and_why() -> None:
    class Whole(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.sigmoid(x)

    checked = check_pass(FuseSilu(), Whole(), (torch.arange(4),))
    assert {miss.reason.text for miss in checked.near_misses} == {"silu takes floating-point values"}


def test_graphopt_finds_the_plugin() -> None:
    record = next(record for record in default_host().check() if record.name == "$name")
    assert (record.status, record.error) == ("active", "")
    (program,) = semantic_programs(Gate(), (torch.randn(4, 8),), [default_host().pass_class("$name-silu")()])
    assert len(list(program.nodes(torch.ops.aten.silu))) == 2
'''


def project_files(name: str) -> dict[str, str]:
    """Text of each file of a new plugin, by its path in the project.

    Raises ``InputsError`` for a name that cannot be one.
    """
    if not _NAME.fullmatch(name):
        raise InputsError(
            f"{name!r} is no name for a plugin: expected lower-case words joined by hyphens, such as "
            "'acme-kernels'"
        )
    package = name.replace("-", "_")
    if keyword.iskeyword(package) or importlib.util.find_spec(package) is not None:
        raise InputsError(
            f"a plugin {name!r} would be the package {package!r}, which Python already has",
            hint=f"name it {name}-passes, for one",
        )
    given = {"name": name, "package": package, "group": GROUP, "api": API_VERSION}
    texts = {
        "pyproject.toml": _PYPROJECT,
        "README.md": _README,
        f"{package}/__init__.py": '"""A plugin of graphopt."""\n',
        f"{package}/py.typed": "",
        f"{package}/plugin.py": _PLUGIN,
        f"{package}/fuse_silu.py": _PASS,
        f"tests/test_{package}.py": _TEST,
    }
    return {path: Template(text).substitute(given) for path, text in texts.items()}


def new_plugin(name: str, folder: Path) -> Path:
    """Write the project ``folder/name``, all of it or nothing.

    Raises ``InputsError`` for a bad name and for a folder that is there already, ``OSError`` where it cannot
    be written.
    """
    files, target = project_files(name), folder / name
    if target.exists():
        raise InputsError(f"there is a {str(target)!r} already: nothing is written over")
    made = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder))
    try:
        made.chmod(0o755)
        for path, text in files.items():
            place = made / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text, encoding="utf-8")
        os.rename(made, target)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return target
