"""Figure: do decoders generate the tokens that they generate by themselves?

    python benchmarks/decoding.py [--models NAME ...] [--quick]

Tiny models of transformers with random weights, float32. Of two prompts 256 greedy tokens, and 32 each with
padding on the left, in three beams, and drawn, by ``model.generate`` and by ``Optimized.generate``, op by op.
Of models that decode what an encoder gives of two sources the second has padding at its end, and no two
tokens follow each other twice: weights are random, and the likeliest would be one token again and again.
Where the model's own cache gives other tokens than the model without one, or none, that is said, and ours are
compared with those without. Families that are refused are rows with the reason. Target: all tokens equal.
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
from graphopt.errors import InputsError

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.decoders import (
    ENCODERS,
    FAMILIES,
    HYBRIDS,
    RECURRENT,
    encoder_family,
    family,
    source_inputs,
    tokens,
)

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
    differing: dict[str, int] = {}
    own: dict[str, str] = {}
    refused: dict[str, str] = {}
    for way, options in ways.items():
        try:
            found = _generated(fast.generate, options)
        except InputsError as error:
            # What is refused with a reason: padding where the model takes no mask.
            refused[way] = error.message
            continue
        without: torch.Tensor | None = None
        try:
            expected = _generated(model.generate, options)
        except (ValueError, RuntimeError) as error:
            own[way] = str(error)
            expected = without = _generated(model.generate, {**options, "use_cache": False})
        differing[way] = _differing(found, expected)
        if differing[way] and without is None:
            without = _generated(model.generate, {**options, "use_cache": False})
            if off := _differing(expected, without):
                own[way] = f"{off} tokens differ from those without a cache"
                differing[way] = _differing(found, without)
    record = fast.report.decoding
    assert record is not None
    yield {
        "model": name,
        "differing_tokens": differing,
        **({"own_cache": own} if own else {}),
        **({"refused_ways": refused} if refused else {}),
        "logits_off": record.off,
        "cache_bytes": record.cache_bytes,
        "stores": sorted({f"{site.store}: {site.mask}" for site in record.sites}),
        "states": len(record.states),
        "state_bytes": sum(state.bytes for state in record.states),
        "shared": sum(site.source != index for index, site in enumerate(record.sites)),
        "capture_seconds": round(captured, 1),
    }


def _generated(generate: Any, options: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(7)
    made: torch.Tensor = generate(**options)
    return made


def _differing(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many tokens differ."""
    return int((one != other).sum()) if one.shape == other.shape else max(one.numel(), other.numel())


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    good = [row for row in found if "error" not in row]
    equal = [row["model"] for row in good if not any(row["differing_tokens"].values())]
    return {
        "families": len(found),
        "equal": len(equal),
        "differing": [row["model"] for row in good if row["model"] not in equal],
        "refused": [row["model"] for row in found if "error" in row],
        "own_cache_differs": [row["model"] for row in good if "own_cache" in row],
        "met": len(equal) == len(found),
    }


if __name__ == "__main__":
    options = parser(__doc__).parse_args()
    known = [*FAMILIES, *HYBRIDS, *RECURRENT, *ENCODERS]
    figure("decoding", options, rows, summary, options.models or (known[:3] if options.quick else known))
