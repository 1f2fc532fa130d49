"""What the machinery of passes takes, beside what torch.compile takes to compile the same model.

    python benchmarks/overhead.py

The machinery is what any pass costs whatever it does: opening and closing a transaction (snapshot, order,
dead code, values of new nodes, names), the check of structure before and after, observers, and the report
with its text, JSON and HTML. What passes and the planner work out is theirs and not part of it. Each model
takes one training step, or a forward where it has no loss, first under ``torch.compile`` and then optimized,
each with empty caches of its own in this process. Times are processor time, compilers that are called
included. Target: the machinery takes at most 5 % of ``torch.compile``'s first step.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
import zoo_transformers
from harness import figure, parser
from torch import nn
from torch._inductor import config as inductor_config
from torch._inductor.utils import fresh_cache

import graphopt
from graphopt import rewriting
from graphopt.edit import Edit
from graphopt.plugins.host import PluginHost

MODELS = ("llama", "gpt2", "bert", "t5", "vit", "convnext", "whisper", "mamba")
TARGET_PERCENT = 5.0


def processor_seconds() -> float:
    """Of this process and of those that it waited for."""
    return sum(os.times()[:4])


class MachineryClock:
    """Processor seconds and calls of functions, nested calls counted once."""

    def __init__(self) -> None:
        self.seconds, self.calls, self._depth = 0.0, 0, 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._depth:
                return function(*args, **kwargs)
            self._depth, start = 1, time.process_time()
            self.calls += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._depth = 0
                self.seconds += time.process_time() - start

        return timed

    def watch(self, stack: ExitStack) -> None:
        for owner, name in (
            (Edit, "__init__"), (Edit, "__enter__"), (Edit, "__exit__"), (rewriting, "verify_values"),
            (PluginHost, "notify_before"), (PluginHost, "notify_after"),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, self.around(getattr(owner, name))))
        differs = property(self.around(Edit.differs.fget))
        stack.enter_context(mock.patch.object(Edit, "differs", differs))


def step(model: nn.Module, inputs: dict[str, Any]) -> None:
    """One training step where the model makes a loss, else a forward."""
    made = model(**inputs)
    loss = getattr(made, "loss", None)
    if loss is not None:
        loss.backward()


def rows(name: str) -> Iterator[dict[str, Any]]:
    inductor_config.compile_threads = 1
    model, inputs = zoo_transformers.build(name)
    trained = "labels" in inputs
    with fresh_cache(), torch.set_grad_enabled(trained):
        start = processor_seconds()
        step(torch.compile(model.train(trained)), inputs)
        compiled = processor_seconds() - start
    torch._dynamo.reset()
    model, inputs = zoo_transformers.build(name)
    clock = MachineryClock()
    with fresh_cache(), torch.set_grad_enabled(trained), ExitStack() as stack:
        clock.watch(stack)
        start = processor_seconds()
        optimized = graphopt.optimize(model.train(trained), on_error="raise")
        step(optimized, inputs)
        whole = processor_seconds() - start
        transactions = clock.seconds
        read = clock.around(lambda: [(r := optimized.report), str(r), r.to_json(), r._repr_html_()])
        read()
    yield {
        "model": name,
        "trained": trained,
        "programs": len(optimized.programs),
        "nodes": sum(len(program.graph.nodes) for program in optimized.programs),
        "compile_seconds": round(compiled, 2),
        "optimize_seconds": round(whole, 2),
        "transactions_seconds": round(transactions, 3),
        "report_seconds": round(clock.seconds - transactions, 3),
        "calls": clock.calls,
        "percent": round(100 * clock.seconds / compiled, 2),
    }


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    good = [row for row in found if "error" not in row]
    worst = max((row["percent"] for row in good), default=None)
    return {
        "failed": [row["model"] for row in found if "error" in row],
        "models": len(good),
        "worst_percent": worst,
        "target_percent": TARGET_PERCENT,
        "met": worst is not None and worst <= TARGET_PERCENT,
    }


if __name__ == "__main__":
    options = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    sys.setrecursionlimit(10_000)
    figure("overhead", options, rows, summary, options.models or MODELS)
