"""Programs as JSON: the text format's facts, structured for tools."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import IO, Any

import torch
import torch.fx as fx

from graphopt.dump.canonical import Names, dtype_text, op_text
from graphopt.dump.listing import Listing, listing_of
from graphopt.program import Program

__all__ = ["PROGRAM_VERSION", "program_json", "write_json"]

PROGRAM_VERSION = "graphopt/program@1"


def program_json(program: Program, *, marks: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The program as plain JSON values, versioned under ``"schema"``.

    Values have the names of the text format. An argument that is a value is ``{"ref": "%3"}``; one
    that JSON cannot spell (a dtype, a symbolic size, a slice) is ``{"text": "..."}``.
    """
    listing = listing_of(program, marks=marks)
    return {
        "schema": PROGRAM_VERSION,
        "name": program.name,
        "level": str(program.level),
        "fingerprint": program.fingerprint,
        "device": listing.device,
        "symbols": dict(listing.symbols),
        **_graph(listing),
    }


def write_json(program: Program, stream: IO[str]) -> None:
    """Write ``program_json(program)`` to ``stream``, an input, node or output a line."""
    fields = []
    for key, value in program_json(program).items():
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(f"  {json.dumps(item)}" for item in value) + "\n ]"
        else:
            text = json.dumps(value)
        fields.append(f" {json.dumps(key)}: {text}")
    stream.write("{\n" + ",\n".join(fields) + "\n}\n")


def _graph(listing: Listing) -> dict[str, Any]:
    names = listing.names
    return {
        "inputs": [
            {"name": item.name, "role": item.role, "note": item.note, "type": _type(names, item.node)}
            for item in listing.inputs
        ],
        "nodes": [
            {
                "name": item.name,
                "op": op_text(item.node),
                "args": [_argument(names, arg) for arg in item.node.args],
                "kwargs": {key: _argument(names, arg) for key, arg in item.node.kwargs.items()},
                "type": _type(names, item.node),
                "layer": item.layer,
                "mark": item.mark,
            }
            for item in listing.statements
        ],
        "outputs": [{"name": item.name, "role": item.role, "note": item.note} for item in listing.outputs],
        "subgraphs": {name: _graph(inner) for name, inner in listing.subgraphs.items()},
    }


def _argument(names: Names, value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"ref": names.of(value)}
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float and value - value == 0:  # neither infinite nor nan, which JSON cannot spell
        return value
    if isinstance(value, (list, tuple)):
        return [_argument(names, item) for item in value]
    return {"text": names.operand(value)}


def _type(names: Names, node: fx.Node) -> Any:
    return _value_type(names, node.meta.get("val"))


def _value_type(names: Names, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        strides = value.stride() if value.layout is torch.strided else ()
        return {
            "dtype": dtype_text(value.dtype),
            "shape": [_size(names, size) for size in value.shape],
            "stride": [_size(names, stride) for stride in strides],
            "device": str(value.device),
        }
    if isinstance(value, (tuple, list)):
        return [_value_type(names, item) for item in value]
    return {"text": names.type(value)}


def _size(names: Names, size: Any) -> int | str:
    return size if type(size) is int else names.size(size)
