"""A plugin with a pass that goes wrong where it is told to, and a model to try it on.

``spoil`` rewrites every ``relu``: to ``clamp_min(x, 0)``, which is the same, or, at the places (counted from
0) that ``bad`` names, to something wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graphopt.plugins import default_host

__all__ = ["faulty_plugin"]

PLUGIN = '''
from dataclasses import dataclass
from typing import ClassVar, Literal
import torch
from graphopt.candidate import Candidate, CostDelta
from graphopt.passes import Pass
from graphopt.plugins import hookimpl
from graphopt.program import Level

graphopt_api = 1

@dataclass(frozen=True)
class Spoil(Pass):
    """Rewrites every relu."""
    name: ClassVar[str] = "spoil"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = "rewrite relu, wrongly where told"
    after: ClassVar[dict[str, str]] = {"normalize": "views of nothing hide what is spoilt"}
    bad: tuple[int, ...] = ()
    how: Literal["value", "raise"] = "value"

    def propose(self, program, ctx):
        for place, node in enumerate(program.nodes(torch.ops.aten.relu)):
            apply = self._applying(place, node.name)
            yield Candidate(f"spoil@{place}", self.name, (node.name,), CostDelta(), apply)

    def _applying(self, place, name):
        def apply(edit):
            node = edit.node(name)
            if place in self.bad and self.how == "raise":
                raise RuntimeError(f"spoilt {place}")
            least = 0.5 if place in self.bad else 0
            new = edit.call_before(node, torch.ops.aten.clamp_min.default, (node.args[0], least))
            edit.replace(node, new)
        return apply

@hookimpl
def graphopt_passes():
    return [Spoil]
'''

MODEL = """
import torch

def small():
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (torch.nn.Linear(8, 8), torch.nn.ReLU())]
    return torch.nn.Sequential(*layers), (torch.randn(4, 8),)
"""


@contextmanager
def faulty_plugin(folder: Path) -> Iterator[None]:
    """Install the plugin and ``faulty_targets:small`` into ``folder`` for this process and those it starts
    with ``folder`` on their path."""
    (folder / "faulty_targets.py").write_text(MODEL)
    (folder / "faulty_plugin.py").write_text(PLUGIN)
    info = folder / "faulty_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[graphopt.plugins]\nfaulty = faulty_plugin\n")
    path = list(sys.path)
    sys.path.insert(0, str(folder))
    default_host.cache_clear()
    try:
        yield
    finally:
        sys.path[:] = path
        for name in ("faulty_plugin", "faulty_targets"):
            sys.modules.pop(name, None)
        default_host.cache_clear()
