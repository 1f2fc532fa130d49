"""Figure: do decoders generate the tokens that they generate by themselves?

    python benchmarks/decoding.py [--models NAME ...] [--quick]

Tiny models of transformers with random weights, float32. Of two prompts 256 greedy tokens, and 32 each with
padding on the left, in three beams, and drawn, by ``model.generate`` and by ``Optimized.generate``, op by op.
Of models that decode what an encoder gives of two sources the second has padding at its end, and no two
tokens follow each other twice: weights are random, and the likeliest would be one token again and again.
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
from tests.decoders import ENCODERS, FAMILIES, OTHERS, encoder_family, family, source_inputs, tokens

TOKENS, FEWER = 256, 32


def of_tokens(name: str) -> tuple[Any, dict[str, Any], dict[str, dict[str, Any]]]:
    """Model, example inputs, and what is generated in each way."""
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return family(name), {"input_ids": ids}, {
        "greedy": {"input_ids": ids, "max_new_tokens": TOKENS, "do_sample": False},
        "padded": {
            "input_ids": ids, "max_new_tokens": FEWER, "do_sample": False, "attention_mask": mask,
        },
        "beams": {"input_ids": ids, "max_new_tokens": FEWER, "num_beams": 3},
        "drawn": {
            "input_ids": ids, "max_new_tokens": FEWER, "do_sample": True, "top_k": 20, "temperature": 1.3,
        },
    }  # fmt: skip


def of_a_source(name: str) -> tuple[Any, dict[str, Any], dict[str, dict[str, Any]]]:
    """The same of a model with an encoder."""
    given = source_inputs(name)
    padded = {key: value for key, value in given.items() if key != "decoder_input_ids"}
    whole = {key: value for key, value in padded.items() if key != "attention_mask"}
    varied = {"do_sample": False, "no_repeat_ngram_size": 2}
    return encoder_family(name), given, {
        "greedy": {**whole, "max_new_tokens": TOKENS, **varied},
        "padded": {**padded, "max_new_tokens": FEWER, **varied},
        "beams": {**padded, "max_new_tokens": FEWER, "num_beams": 3},
        "drawn": {
            **padded, "max_new_tokens": FEWER, "do_sample": True, "top_k": 20, "temperature": 1.3,
        },
    }  # fmt: skip


def rows(name: str) -> Iterator[dict[str, Any]]:
    model, inputs, ways = (of_a_source if name in ENCODERS else of_tokens)(name)
    start = time.perf_counter()
    fast = graphopt.optimize(
        model,
        inputs,
        generate=graphopt.Generate(tokens().shape[1] + TOKENS, 6),
        emit="eager",
        on_error="raise",
    )
    captured = time.perf_counter() - start
    differing = {}
    for way, options in ways.items():
        made = []
        for generate in (model.generate, fast.generate):
            torch.manual_seed(7)
            made.append(generate(**options))
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
    known = [*FAMILIES, *OTHERS, *ENCODERS]
    figure("decoding", options, rows, summary, options.models or (known[:3] if options.quick else known))
