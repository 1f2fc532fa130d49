"""What launches of packed weights are predicted to take, beside what they took on a GPU."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt_kernels.quantized import byte_launch, exponent_launch, group_launch
from graphopt_kernels.quantized.byte_launch import Launch, Problem
from graphopt_kernels.quantized.exponent_launch import Exponents
from graphopt_kernels.quantized.group_launch import GroupProblem

MEASURED = json.loads((Path(__file__).parent.parent / "benchmarks/results/gpu_quantized.json").read_text())
BF16 = torch.bfloat16
H200 = 132
BYTES = {
    "int8": (torch.int8, False), "fp8": (torch.float8_e4m3fn, False), "int8-dynamic": (torch.int8, True),
    "fp8-dynamic": (torch.float8_e4m3fn, True),
}  # fmt: skip


def launch_of(text: str) -> Launch:
    kind, *numbers = text.split()
    return Launch(kind, *map(int, numbers))


def predicted(scheme: str, row: dict[str, Any]) -> float | None:
    """Seconds, of the launch that was measured where the results name it; ``None`` where they do not and
    another may be chosen today."""
    sizes = row["rows"], row["columns"], row["inner"]
    if scheme in BYTES:
        codes, rounded = BYTES[scheme]
        problem = Problem(*sizes, BF16, codes, rounded)
        return byte_launch.predicted_seconds(problem, launch_of(row["launch"]), H200)
    if 16 < row["rows"] < 256:
        return None
    if scheme == "lossless12":
        packed = Exponents(*sizes, row["inner"] // 2)
        launch = exponent_launch.launch_for(packed, H200)
        return exponent_launch.predicted_seconds(packed, launch, H200)
    group, half, levels = (64, 32, True) if scheme == "nf4" else (128, 64, False)
    grouped = GroupProblem(*sizes, BF16, group, half, levels)
    return group_launch.predicted_seconds(grouped, group_launch.launch_for(grouped, H200), H200)


@pytest.mark.parametrize("scheme", [*BYTES, "lossless12", "int4", "nf4"])
def test_predictions_are_near_what_was_measured(scheme: str) -> None:
    rows = [row for row in MEASURED["rows"] if row["scheme"].partition("{")[0] == scheme]
    answers = [(predicted(scheme, row), row) for row in rows]
    found = [(seconds * 1e6 / row["us"], row) for seconds, row in answers if seconds is not None]
    assert len(found) >= 35
    ratios = sorted(ratio for ratio, _ in found)
    assert 0.88 < statistics.median(ratios) < 1.12
    tenth = len(ratios) // 10
    assert ratios[tenth] > 1 / 1.5 and ratios[-1 - tenth] < 1.25
    for ratio, row in found:
        assert 1 / 2.2 < ratio < 1.4, (ratio, row)


def test_dense_products_are_predicted_as_they_were_measured() -> None:
    for row in MEASURED["rows"]:
        problem = Problem(row["rows"], row["columns"], row["inner"], BF16, torch.int8)
        assert 0.87 < byte_launch.dense_seconds(problem) * 1e6 / row["dense_us"] < 1.16, row


def test_what_is_said_of_packed_weights_was_measured() -> None:
    """docs/quantization.md, on kernels for eight bits."""
    rows = [row for row in MEASURED["rows"] if row["scheme"].partition("{")[0] in BYTES]
    one = [row["ratio"] for row in rows if row["rows"] == 1 and "dynamic" not in row["scheme"]]
    assert min(one) > 1.6 and max(one) < 2.1
    few = [row["ratio"] for row in rows if 2 <= row["rows"] <= 8 and "dynamic" not in row["scheme"]]
    assert min(few) > 1.1 and max(few) < 1.65
    many = [row["ratio"] for row in rows if row["rows"] >= 1024 and "dynamic" in row["scheme"]]
    assert min(many) > 1.25 and max(many) < 2.0
