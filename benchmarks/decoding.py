"""Figure: do decoders generate the tokens that they generate by themselves?

    python benchmarks/decoding.py [--models NAME ...] [--quick]

Tiny models of transformers with random weights, float32. Of two prompts 256 greedy tokens, and 32 each with
padding on the left, in three beams, and drawn, by ``model.generate`` and by ``Optimized.generate``, op by op.
Families that are refused are rows with the reason. Target: all tokens equal.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import figure, parser

import graphopt

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.decoders import FAMILIES, OTHERS, family, tokens

TOKENS, FEWER = 256, 32


def rows(name: str) -> Iterator[dict[str, Any]]:
    model: Any = family(name)
    ids = tokens()
    start = time.perf_counter()
    fast = graphopt.optimize(
        model,
        {"input_ids": ids},
        generate=graphopt.Generate(ids.shape[1] + TOKENS, 6),
        emit="eager",
        on_error="raise",
    )
    captured = time.perf_counter() - start
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    ways: dict[str, dict[str, Any]] = {
        "greedy": {"max_new_tokens": TOKENS, "do_sample": False},
        "padded": {"max_new_tokens": FEWER, "do_sample": False, "attention_mask": mask},
        "beams": {"max_new_tokens": FEWER, "num_beams": 3},
        "drawn": {"max_new_tokens": FEWER, "do_sample": True, "top_k": 20, "temperature": 1.3},
    }
    differing = {}
    for way, options in ways.items():
        made = []
        for generate in (model.generate, fast.generate):
            torch.manual_seed(7)
            made.append(generate(ids, **options))
        same = made[0].shape == made[1].shape
        differing[way] = int((made[0] != made[1]).sum()) if same else max(m.numel() for m in made)
    record = fast.report.decoding
    assert record is not None
    yield {
        "model": name,
        "differing_tokens": differing,
        "logits_off": record.off,
        "cache_bytes": record.cache_bytes,
        "stores": sorted({f"{site.store}: {site.mask}" for site in record.sites}),
        "shared": sum(site.source != index for index, site in enumerate(record.sites)),
        "capture_seconds": round(captured, 1),
    }


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    good = [row for row in found if "error" not in row]
    equal = [row["model"] for row in good if not any(row["differing_tokens"].values())]
    return {
        "families": len(found),
        "equal": len(equal),
        "differing": [row["model"] for row in good if row["model"] not in equal],
        "refused": [row["model"] for row in found if "error" in row],
        "met": len(equal) == len(found),
    }


if __name__ == "__main__":
    options = parser(__doc__).parse_args()
    known = [*FAMILIES, *OTHERS]
    figure("decoding", options, rows, summary, options.models or (known[:3] if options.quick else known))
