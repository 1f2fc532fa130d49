"""JSON, Python and DOT dumps, and the records that register them."""

from __future__ import annotations

import io
import json
import re
import shutil

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt.dump.dot import program_dot
from graphopt.dump.formats import FORMATS
from graphopt.dump.json import program_json
from graphopt.dump.python import program_python
from graphopt.program import InputSpec, Level, OutputSpec, Program, Signature


def scaled() -> Program:
    def step(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, weight).to(torch.float64) * float("inf")

    gm = make_fx(step, tracing_mode="fake")(torch.empty(8, 4), torch.empty(2, 8))
    weight, x = (n.name for n in gm.graph.nodes if n.op == "placeholder")
    *_, last = (n for n in gm.graph.nodes if n.op == "call_function")
    first = next(n for n in gm.graph.nodes if n.op == "call_function")
    first.meta["nn_module_stack"] = {"0": ('model.layers.0.a"b', torch.nn.Linear)}
    signature = Signature(
        (InputSpec(weight, "parameter", "proj.weight"), InputSpec(x, "input")),
        (OutputSpec(last.name, "output", "0"),),
    )
    return Program("g0", Level.SEMANTIC, gm, signature)


@pytest.mark.parametrize("record", FORMATS, ids=lambda record: record.name)
def test_every_format_is_written_the_same_twice(record) -> None:
    if record.suffix == ".mlir":
        pytest.importorskip("torch_mlir", reason="torch-mlir is not installed")
    if record.suffix == ".svg" and shutil.which("dot") is None:
        pytest.skip("Graphviz is not installed; test_dump_between stands for it")
    texts = []
    for _ in range(2):
        stream = io.StringIO()
        record.write(scaled(), stream)
        texts.append(stream.getvalue())
    assert texts[0] == texts[1]
    assert texts[0].endswith("\n") and scaled().name in texts[0]
    assert record.suffix.startswith(".") and record.summary


def test_format_names() -> None:
    assert [record.name for record in FORMATS] == [
        "text",
        "json",
        "py",
        "html",
        "dot",
        "svg",
        "mlir",
        "mlir-linalg",
    ]


def test_json_holds_the_facts() -> None:
    stream = io.StringIO()
    next(record for record in FORMATS if record.name == "json").write(scaled(), stream)
    data = json.loads(stream.getvalue(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert data == program_json(scaled())
    assert data["schema"] == "graphopt/program@1"
    assert [item["name"] for item in data["inputs"]] == ["proj.weight", "%0"]
    first = data["nodes"][0]
    assert first["op"] == "aten.mm"
    assert first["args"] == [{"ref": "%0"}, {"ref": "proj.weight"}]
    assert first["type"] == {"dtype": "f32", "shape": [2, 4], "stride": [4, 1], "device": "cpu"}
    assert first["layer"] == 'model.layers.0.a"b'
    assert {"text": "inf"} in data["nodes"][-1]["args"]
    assert data["outputs"] == [{"name": data["nodes"][-1]["name"], "role": "output", "note": ""}]


def test_python_compiles_and_has_neither_paths_nor_clutter() -> None:
    text = program_python(scaled())
    compile(text, "dump", "exec")
    assert "def forward(self, proj_weight" in text
    assert 'v1: "f32[2, 4]" = torch.ops.aten.mm.default(v0, proj_weight)\n' in text
    assert '        # model.layers.0.a"b\n' in text
    assert ".py" not in text and "None" not in text


def test_dot_is_balanced_nested_and_quoted() -> None:
    text = program_dot(scaled())
    assert text.count("{") == text.count("}")
    assert 'subgraph "cluster_model.layers.0" {' in text
    assert r'label="model.layers.0.a\"b"' in text
    assert '"proj.weight" -> "%1";' in text
    assert re.search(r'"%\d+" -> "output 0";', text)
