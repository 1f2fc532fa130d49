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


def failing(found: dict[str, Any]) -> set[str]:
    summary = found["summary"]
    kinds = ("mismatch", "crash", "untraced_mismatch", "untraced_crash", "stopped")
    return {name for kind in kinds for name in summary.get(kind, ())}


@pytest.mark.slow  # importing the samples takes seconds
def test_some_operators(tmp_path: Path) -> None:
    found = run(tmp_path, "--only", f"^({SOME})$", "--samples", "2")
    assert found["summary"]["operators"] == len(SOME.split("|"))
    assert not failing(found), found["rows"]
    assert found["summary"]["samples"]["ok"] >= len(SOME.split("|"))


@pytest.mark.slow
def test_a_run_goes_on_from_the_last_sample_and_only_a_whole_one_meets_the_target(tmp_path: Path) -> None:
    some = ("--only", "^(cat|outer)$")
    first = run(tmp_path, *some, "--samples", "1")
    assert [sum(row["verdicts"].values()) for row in first["rows"].values()] == [1, 1]
    assert first["summary"]["left"] == sum(row["of"] - 1 for row in first["rows"].values()) > 0
    assert not failing(first)
    assert not first["summary"]["met"]

    whole = run(tmp_path, *some)
    assert whole["summary"]["left"] == 0
    assert whole["summary"]["met"], whole["rows"]
    assert run(tmp_path, *some)["rows"] == whole["rows"]

    again = run(tmp_path, "--only", "^cat$", "--samples", "1", "--again")
    assert again["rows"]["outer"] == whole["rows"]["outer"]
    assert again["summary"]["left"] == first["rows"]["cat"]["of"] - 1
    assert not again["summary"]["met"]


@pytest.mark.slow
def test_all_operators(tmp_path: Path) -> None:
    found = run(tmp_path, "--samples", "1", "--limit", "60")
    assert not failing(found), {name: found["rows"][name] for name in failing(found)}
