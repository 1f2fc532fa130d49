"""The dump formats that ship: records for the plugin host."""

from __future__ import annotations

from typing import IO

from graphopt.dump.dot import write_dot, write_svg
from graphopt.dump.json import write_json
from graphopt.dump.mlir import write_linalg, write_torch_dialect
from graphopt.dump.page import write_page, write_pages
from graphopt.dump.python import write_python
from graphopt.dump.text import write_text
from graphopt.plugins.host import default_host
from graphopt.plugins.records import DumpFormat
from graphopt.program import Program

__all__ = ["FORMATS"]


def _write_mlir(program: Program, stream: IO[str]) -> None:
    write_torch_dialect(program, default_host().kernels(), stream)


def _write_mlir_linalg(program: Program, stream: IO[str]) -> None:
    write_linalg(program, default_host().kernels(), stream)


FORMATS = (
    DumpFormat("text", ".txt", write_text, "numbered, typed, one call a line (docs/dumps.md)"),
    DumpFormat("json", ".json", write_json, "the same facts, structured for tools"),
    DumpFormat("py", ".py", write_python, "the code that fx runs"),
    DumpFormat("html", ".html", write_page, "a page to open layers and zoom in", write_pages),
    DumpFormat("dot", ".dot", write_dot, "a Graphviz picture, clustered by layer"),
    DumpFormat("svg", ".svg", write_svg, "that picture, drawn by Graphviz"),
    DumpFormat(
        "mlir",
        ".mlir",
        _write_mlir,
        "MLIR's torch dialect, operators of kernels opaque",
        write_with=write_torch_dialect,
    ),
    DumpFormat(
        "mlir-linalg",
        ".mlir",
        _write_mlir_linalg,
        "MLIR as linalg on tensors, kernels taken apart",
        write_with=write_linalg,
    ),
)
