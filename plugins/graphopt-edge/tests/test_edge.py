"""The device, the cost model and the format, through graphopt's own functions."""

from __future__ import annotations

import csv
import io

import pytest
import torch
from torch import nn

import graphopt
from graphopt.plugins import default_host
from graphopt.testing import semantic_programs
from graphopt_edge.table import COLUMNS


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).relu().sum()


MODEL, X = Model(), torch.randn(128, 64)


def test_the_device_is_known_by_its_names() -> None:
    spec = default_host().device("NVIDIA L4")
    assert spec.name == "l4" and spec.memory_bytes == 24 * 10**9
    assert spec.source
    assert graphopt.plan(MODEL, (X,), device="l4", emit="eager").device == "l4"


def test_memory_bound_steps_take_longer_on_it_than_on_a_larger_one() -> None:
    seconds = {
        name: graphopt.plan(MODEL, (X,), device=name, emit="eager").baseline.seconds
        for name in ("l4", "h100")
    }
    assert seconds["l4"] > seconds["h100"]


def test_without_overlap_every_call_takes_as_long_or_longer_and_no_more_than_twice() -> None:
    device = default_host().device("l4")
    roofline, serial = (default_host().cost_model(name).build(device) for name in ("roofline", "serial"))
    (program,) = semantic_programs(MODEL, (X,))
    for node in program.nodes():
        least, most = roofline.node(node), serial.node(node)
        assert (least.flops, least.bytes_read, least.bytes_written) == (
            most.flops, most.bytes_read, most.bytes_written,
        )  # fmt: skip
        assert least.seconds <= most.seconds * (1 + 1e-9) <= 2 * least.seconds * (1 + 1e-9)
    linear = next(program.nodes(torch.ops.aten.linear))
    moved = 4 * (128 * 64 + 64 * 32 + 32 + 128 * 32)
    assert serial.node(linear).seconds == pytest.approx(
        2 * 128 * 64 * 32 / device.matmul_flops["float32"] + moved / 300e9 + 5e-6
    )


def test_it_can_be_planned_by() -> None:
    usual, serial = (
        graphopt.plan(MODEL, (X,), device="l4", emit="eager", cost_model=name)
        for name in ("roofline", "serial")
    )
    assert serial.baseline.seconds > usual.baseline.seconds
    assert serial.baseline.peak_bytes == usual.baseline.peak_bytes


def test_a_step_as_a_table() -> None:
    text = graphopt.optimize(MODEL, (X,), emit="eager", pipeline=[]).dump(format="csv", stage="semantic")
    header, *rows = csv.reader(io.StringIO(text))
    assert tuple(header) == COLUMNS
    table = [dict(zip(header, row, strict=True)) for row in rows]
    assert [row["operator"] for row in table] == [
        "aten.linear.default",
        "aten.relu.default",
        "aten.sum.default",
    ]
    first, second, last = table
    assert (first["layer"], first["shape"], first["dtype"], first["bytes"]) == (
        "layer", "128x32", "float32", str(4 * 128 * 32),
    )  # fmt: skip
    assert (second["reads"], last["reads"], last["shape"]) == ("0", "1", "scalar")
    assert {row["program"] for row in table} == {"g0"} and {row["level"] for row in table} == {"semantic"}
