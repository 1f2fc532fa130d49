"""Random programs: emitted kernels, their references and Inductor against separate operators in float64."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.drawn_programs import by_kernels, distances, drawn, exact, traced
from tests.interpreted import interpreted

pytest.importorskip("triton")

HALF, SINGLE = 1e-3, 4e-6
"""Beside the error of eager operators, of the largest element: a unit of float16, which values are rounded to
between operators in another order of additions; and some of float32. A wrong operator is off by far more."""


def check(found: dict[str, Any]) -> None:
    for seed, outcome in found.items():
        said = f"\n{outcome}\n\n{drawn(int(seed)).script()}"
        assert "failed" not in outcome, said
        allowed = 1.5 * outcome["eager"] + (HALF if outcome["half"] else SINGLE)
        assert outcome["reference"] <= allowed and outcome["launch"] <= allowed, said


def test_random_programs() -> None:
    found = interpreted("drawn_programs.py", 0, 10)
    check(found)
    # The programs are worth something: kernels of several operators, products among them.
    assert sum(outcome["kernels"] for outcome in found.values()) >= 30
    assert sum(outcome["products"] for outcome in found.values()) >= 15


@pytest.mark.slow
def test_many_random_programs() -> None:
    check(interpreted("drawn_programs.py", 10, 400))


def inductor_and_references(seed: int, folder: Path) -> None:
    """Inductor's and the references' results on the CPU are no further from float64 than eager ones."""
    program = drawn(seed)
    inputs = program.inputs()
    right = exact(program)
    eager = distances(program.function()(*inputs), right)
    half = any(x.dtype == torch.float16 for x in inputs) or "float16" in program.source
    allowed = 1.5 * eager + (HALF if half else SINGLE)
    torch._dynamo.reset()
    compiled = torch.compile(program.function(), options={"emulate_precision_casts": True})
    assert distances(compiled(*inputs), right) <= allowed, program.script()
    made, *_ = by_kernels(traced(program), inputs, "reference", folder)
    assert distances(made, right) <= allowed, program.script()


def test_inductor_agrees(tmp_path: Path) -> None:
    inductor_and_references(4, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(14, 54))
def test_inductor_agrees_on_many(seed: int, tmp_path: Path) -> None:
    inductor_and_references(seed, tmp_path)


def test_a_wrong_kernel_is_found(tmp_path: Path) -> None:
    """One sign in one kernel shows: the check can fail."""
    program = drawn(9)
    inputs, right = program.inputs(), exact(program)
    made, kernels, _ = by_kernels(traced(program), inputs, "reference", tmp_path)
    assert kernels
    broken = program.source.replace(" + ", " - ", 1)
    assert broken != program.source
    space: dict[str, Any] = {"torch": torch, "F": torch.nn.functional}
    exec(broken, space)
    outcome = {
        "eager": distances(program.function()(*inputs), right),
        "reference": distances(made, right),
        "launch": distances(space["function"](*inputs), right),
        "half": True,
    }
    with pytest.raises(AssertionError, match="def function"):
        check({"9": outcome})


def test_a_script_runs_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(drawn(3).script())
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "tensor(" in done.stdout, done.stderr
