"""Programs and steps for tests and measurements of the HTML dump."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.program import InputSpec, Level, Program, Signature
from tests.browser import Browser

__all__ = ["long_program", "opened"]


def long_program(layers: int, calls: int) -> Program:
    """A chain of ``layers`` layers of ``calls`` calls each, in four modules a layer."""
    graph = fx.Graph()
    with _torch.fake_mode():
        value = torch.empty(4, 64)
    x = graph.placeholder("x")
    x.meta["val"] = value
    for layer in range(layers):
        for number in range(calls):
            op = (torch.ops.aten.sigmoid.default, torch.ops.aten.tanh.default)[number % 2]
            x = graph.call_function(op, (x,))
            path = f"model.layers.{layer}.{('norm', 'attention', 'mlp', 'out')[4 * number // calls]}"
            x.meta |= {"val": value, "nn_module_stack": {path: (path, "")}}
    graph.output((x,))
    spec = InputSpec("x", "input")
    return Program("long", Level.LOWERED, fx.GraphModule({}, graph), Signature((spec,), ()))


def opened(browser: Browser, path: Path, text: str) -> float:
    """Open a page; milliseconds from then until it has been drawn."""
    path.write_text(text, encoding="utf-8")
    browser.open(path)
    until = time.monotonic() + 20
    while not (ready := browser.run("window.graphopt ? window.graphopt.ready : 0")):
        assert time.monotonic() < until, "the page was never drawn"
    return float(ready)
