"""What packing saved values takes off a training step, op by op on the CPU.

    python benchmarks/compress_saved.py

``saved``: bytes handed from forward to backward where everything that can be is packed and nothing runs
again; ``peak`` and ``measured``: that step's peak, predicted and measured. ``least``: the least peak that
any plan reaches with the pass beside checkpoints; ``seconds``: the predicted time of the fastest plan within
70 % of the peak without packing or checkpoints.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import models
import torch
from harness import figure, parser

import graphopt
from graphopt.candidate import Candidate
from graphopt.passes import Pass, PassContext, Proposal
from graphopt.program import Program
from graphopt_passes.compress_saved import CompressSaved
from graphopt_passes.compress_saved.lossy import QuantizeSaved

MODELS = ("resnet", "bert", "gpt2", "unet")
PART = 0.7


class AlwaysLossless(CompressSaved):
    """Every candidate, whether it pays or not."""

    name = "always-compress-saved"

    def propose(self, program: Program, ctx: PassContext) -> Iterator[Proposal]:
        yield from map(taken, super().propose(program, ctx))


class AlwaysLossy(QuantizeSaved):
    """Every candidate, whether it pays or not."""

    name = "always-quantize-saved"

    def propose(self, program: Program, ctx: PassContext) -> Iterator[Proposal]:
        yield from map(taken, super().propose(program, ctx))


def taken(item: Proposal) -> Proposal:
    if not isinstance(item, Candidate):
        return item
    return replace(item, delta=replace(item.delta, seconds=-1.0), alternative=False)


# By name: passes that are always applied, those that the planner weighs, what they are allowed.
SETTINGS: dict[str, tuple[list[Pass], list[str]]] = {
    "as it is": ([], []),
    "lossless": ([AlwaysLossless()], ["compress-saved"]),
    "8 bits, unbiased": ([AlwaysLossless(), AlwaysLossy()], ["compress-saved", "quantize-saved"]),
    "4 bits": (
        [AlwaysLossless(), AlwaysLossy(codec="groups-4", unbiased=False)],
        ["compress-saved", "quantize-saved{codec=groups-4,unbiased=false}"],
    ),
}


def rows(name: str) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    model, inputs = models.build(name)
    limit = 0.0
    for setting, (always, weighed) in SETTINGS.items():
        torch._dynamo.reset()
        options: dict[str, Any] = {"emit": "eager", "on_error": "raise"}
        fast = graphopt.optimize(
            copy.deepcopy(model),
            inputs,
            pipeline=["normalize", *always],
            allow=tuple(step.name for step in always if not step.exact),
            **options,
        )
        saved = sum(value.bytes for choice in fast.plan.choices for value in choice.saved)
        peak = fast.plan.predicted.peak_bytes
        measured = fast.measure(inputs, repeats=1).peak_bytes
        limit = limit or PART * peak
        torch._dynamo.reset()
        curve = graphopt.pareto(
            copy.deepcopy(model),
            inputs,
            pipeline=["normalize", *weighed, "insert-checkpoints"],
            allow=("quantize-saved",) if len(weighed) > 1 else (),
            **options,
        )
        within = [point.seconds for point in curve.points if point.peak_bytes <= limit]
        yield {
            "model": name,
            "setting": setting,
            "saved": saved,
            "peak": peak,
            "measured": measured,
            "least": min(point.peak_bytes for point in curve.points),
            "seconds": min(within) if within else None,
        }


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    good = [row for row in found if "error" not in row]
    off = max((abs(row["peak"] - row["measured"]) for row in good), default=0)
    return {"part": PART, "worst_error_bytes": off}


if __name__ == "__main__":
    options = parser(__doc__).parse_args()
    figure("compress_saved", options, rows, summary, options.models or MODELS)
