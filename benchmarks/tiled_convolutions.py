"""Inference of image models with their first layers in tiles: what it takes off the peak, and what it costs.

    python benchmarks/tiled_convolutions.py [--quick]

Batch 1, float32, op by op on the CPU. ``peak``: of the model as it is, ``least``: of the plan with the least
peak, both measured by the allocations of a step, without weights and input; ``predicted`` is what the plan
said. Milliseconds are medians of five calls, one of either in turn. ``deviation``: largest difference from
results in float64, over the largest of these.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from harness import figure, geomean, parser

import graphopt

SIZES = {"mobilenet-v2": 448, "resnet-50": 512, "efficientnet-b0": 448, "convnext-tiny": 448}
REPEATS = 5


@torch.no_grad()
def build(name: str, size: int) -> torch.nn.Module:
    import transformers as tr

    makers: dict[str, Callable[[], torch.nn.Module]] = {
        "mobilenet-v2": lambda: tr.MobileNetV2ForImageClassification(tr.MobileNetV2Config(image_size=size)),
        "resnet-50": lambda: tr.ResNetForImageClassification(tr.ResNetConfig()),
        "efficientnet-b0": lambda: tr.EfficientNetForImageClassification(
            tr.EfficientNetConfig(
                width_coefficient=1.0, depth_coefficient=1.0, image_size=size, hidden_dim=1280
            )
        ),
        "convnext-tiny": lambda: tr.ConvNextForImageClassification(tr.ConvNextConfig()),
    }
    torch.manual_seed(0)
    model = makers[name]().train()
    # Random weights behind norms that know nothing of them would let the image fade to zeros.
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    model(pixel_values=torch.randn(2, 3, size, size))
    return model.eval()


@torch.no_grad()
def rows(item: str) -> Iterator[dict[str, Any]]:
    size = SIZES[item]
    model, inputs = build(item, size), {"pixel_values": torch.randn(1, 3, size, size)}
    begun = time.process_time()
    free = graphopt.optimize(model, inputs, emit="eager", on_error="raise", cache=False)
    spent = time.process_time() - begun
    tight = graphopt.optimize(
        model, inputs, budget=free.frontier()[0].peak_bytes, emit="eager", on_error="raise", cache=False
    )
    peaks = [fast.measure(repeats=1).peak_bytes for fast in (free, tight)]
    static = free.plan.baseline.weight_bytes + inputs["pixel_values"].nbytes
    taken: list[list[float]] = [[], []]
    for _ in range(REPEATS):
        for times, fast in zip(taken, (free, tight), strict=True):
            start = time.perf_counter()
            fast(**inputs)
            times.append(1e3 * (time.perf_counter() - start))
    results = free(**inputs).logits, tight(**inputs).logits
    exact = model.double()(pixel_values=inputs["pixel_values"].double()).logits
    errors = [float((r - exact).abs().max() / exact.abs().max()) for r in results]
    ms = [statistics.median(times) for times in taken]
    yield {
        "model": item, "size": size, "peak": peaks[0] - static, "least": peaks[1] - static,
        "predicted": tight.plan.predicted.peak_bytes - static,
        "ratio": (peaks[1] - static) / (peaks[0] - static),
        "ms": round(ms[0], 1), "least_ms": round(ms[1], 1), "time_ratio": ms[1] / ms[0],
        "alternative": tight.plan.choices[0].alternative, "plan_cpu_seconds": round(spent, 1),
        "deviation": errors[0], "least_deviation": errors[1],
    }  # fmt: skip


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    good = [row for row in found if "error" not in row]
    return {
        "ratio": geomean([row["ratio"] for row in good]),
        "time_ratio": geomean([row["time_ratio"] for row in good]),
    }


if __name__ == "__main__":
    options = parser(__doc__).parse_args()
    chosen = options.models or list(SIZES)[: 1 if options.quick else None]
    figure("tiled_convolutions", options, rows, summary, chosen)
