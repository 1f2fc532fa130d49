"""Seconds to the end of the first training step, op by op, with and without a budget, beside torch.compile.

    python benchmarks/optimize_time.py

Each is the time from the model to the end of its first forward and backward: ``optimize`` with the default
pipeline and ``emit="eager"``, without a budget, within 60 % of the step's peak and within 150 %, which the
step keeps as it is; and ``torch.compile`` (Inductor, one thread, caches empty). Processor time, that of
compilers that are called included.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import models
import torch
from harness import figure, geomean, parser
from overhead import processor_seconds, step
from torch._inductor import config as inductor_config
from torch._inductor.utils import fresh_cache

import graphopt

MODELS = ("llama", "gpt2", "bert", "t5", "vit", "resnet", "unet", "mixer")


def rows(name: str) -> Iterator[dict[str, Any]]:
    inductor_config.compile_threads = 1
    row: dict[str, Any] = {"model": name}

    def within(budget: str | None) -> Callable[[Any, Any], Any]:
        return lambda model, inputs: graphopt.optimize(
            model, inputs, emit="eager", on_error="raise", cache=False, budget=budget
        )

    ways: dict[str, Callable[[Any, Any], Any]] = {
        "compile": lambda model, inputs: torch.compile(model),
        "none": within(None),
        "roomy": within("150%"),
        "tight": within("60%"),
    }
    for way, made in ways.items():
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, inputs = models.build(name)
        with fresh_cache():
            start = processor_seconds()
            step(made(model.train(), inputs), inputs)
            row[way] = round(processor_seconds() - start, 2)
    yield row


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    good = [row for row in found if "error" not in row]
    return {
        "failed": [row["model"] for row in found if "error" in row],
        **{way: geomean(row[way] / row["compile"] for row in good) for way in ("none", "roomy", "tight")},
    }


if __name__ == "__main__":
    options = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    sys.setrecursionlimit(10_000)
    figure("optimize_time", options, rows, summary, options.models or MODELS)
