"""PyTorch's own samples of its own operators through ``optimize``: ``benchmarks/op_db.py``, a part of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("expecttest")

ROOT = Path(__file__).parent.parent
SOME = (
    "_batch_norm_with_update|addmm|cat|copysign|cumsum|einsum|gather|index_put|masked_fill|nn.functional.gelu|"
    "nn.functional.instance_norm|nn.functional.layer_norm|sort|torch._scaled_mm|unfold"
)


def run(folder: Path, *options: str) -> dict[str, Any]:
    """What the script found, in a process of its own: the helpers of torch's tests change global switches."""
    out = folder / "op_db.json"
    script = [sys.executable, str(ROOT / "benchmarks" / "op_db.py"), "--out", str(out), *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(script, env=environment, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.slow  # importing the samples takes seconds
def test_some_operators(tmp_path: Path) -> None:
    found = run(tmp_path, "--only", f"^({SOME})$", "--samples", "2")
    assert found["summary"]["operators"] == len(SOME.split("|"))
    assert found["summary"]["met"], found["rows"]
    assert found["summary"]["samples"]["ok"] >= len(SOME.split("|"))


@pytest.mark.slow
def test_all_operators(tmp_path: Path) -> None:
    found = run(tmp_path, "--samples", "1", "--limit", "60")
    known = {"masked_select", "narrow"}
    failing = {name for word in ("mismatch", "crash") for name in found["summary"].get(word, ())}
    assert failing <= known, {name: found["rows"][name] for name in failing - known}
