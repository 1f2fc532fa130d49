"""The dump format ``csv``: a row for each call of a program."""

from __future__ import annotations

import csv
from typing import IO

import torch.fx as fx

from graphopt import Program
from graphopt.program import layer_of, tensor_leaves

__all__ = ["COLUMNS", "write"]

COLUMNS = ("program", "level", "call", "operator", "layer", "shape", "dtype", "bytes", "reads")


def write(program: Program, stream: IO[str]) -> None:
    """Calls in order; a call that gives several values has their shapes and dtypes, separated by spaces.

    ``reads`` are the numbers of calls, and the names of inputs.
    """
    rows = csv.writer(stream, lineterminator="\n")
    rows.writerow(COLUMNS)
    numbers: dict[fx.Node, str] = {}
    for number, node in enumerate(program.nodes()):
        numbers[node] = str(number)
        values = tensor_leaves(node.meta.get("val"))
        rows.writerow(
            (
                program.name,
                program.level,
                number,
                str(node.target),
                layer_of(node),
                " ".join("x".join(map(str, value.shape)) or "scalar" for value in values),
                " ".join(str(value.dtype).removeprefix("torch.") for value in values),
                " ".join(str(value.numel() * value.element_size()) for value in values),
                " ".join(numbers.get(read, read.name) for read in node.all_input_nodes),
            )
        )
