"""What sharing keys and values does to the predictions of a real checkpoint.

    python benchmarks/share_kv.py [--models single-kl:4 ...] [--singles FILE]

SmolLM2-135M-Instruct (see ``checkpoints``; 30 attentions). Which attentions share is chosen on 8 x 64 tokens
of calibration text by ``dissimilarity`` (KVSharer's order and acceptance, all earlier sources) and by
``single-kl`` (sources within 3); ``local`` is the latter's plan with queries and outputs fitted on 16 x 256
tokens of calibration text, nothing being trained end to end. Predictions are compared on 2,048 held-out ones
with those of the checkpoint as it is. ``--singles`` keeps KL of single pairs from run to run: seconds of a
search are then those of the rest.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import checkpoints
import torch
from harness import figure, parser, say

import graphopt
from graphopt.decoding.capture import Uncached, capture_uncached
from graphopt.decoding.look import Look
from graphopt.decoding.regions import Region, attention_regions
from graphopt.decoding.sites import specs_of
from graphopt.decoding.sources import Fits
from graphopt.plugins import ShareScoreSpec, default_host
from graphopt.quality import row_divergences
from graphopt_passes.share_kv.recover import recovered
from graphopt_passes.share_kv.search import Pair, candidate_pairs, search

POSITIONS = 2048
SCORES = ("dissimilarity", "single-kl", "local")
COUNTS = (4, 8)
STEPS = 150
REACH = 3
TARGETS = {4: 17.0, 8: 22.0}
TARGET_RATIO = 1 / 3


@functools.cache
def captured() -> tuple[Uncached, tuple[Region, ...], Fits, Any]:
    model, tokenizer = checkpoints.smollm2()
    example = {"input_ids": torch.ones(1, 8, dtype=torch.int64)}
    uncached = capture_uncached(model, example, graphopt.Generate(POSITIONS))
    regions = attention_regions(uncached)
    return uncached, regions, Fits(uncached, regions, specs_of(uncached, regions, POSITIONS)), tokenizer


@functools.cache
def calibration() -> Look:
    uncached, regions, _, tokenizer = captured()
    return Look(uncached, regions, checkpoints.windows(tokenizer, 8, 64, held_out=False))


@functools.cache
def held_out() -> Look:
    uncached, regions, _, tokenizer = captured()
    return Look(uncached, regions, checkpoints.windows(tokenizer, 4, 512, held_out=True))


@functools.cache
def chosen(name: str, count: int, singles: Path | None) -> tuple[dict[int, int], float | None, float, float]:
    """The plan, its KL as predicted and as measured on calibration tokens, and seconds."""
    _, regions, fits, _ = captured()
    look, spec = calibration(), default_host().share_score(name)
    reach = REACH if spec.additive else len(regions)
    began = time.perf_counter()
    found = search(
        look, candidate_pairs(len(regions), fits, reach), remembered(spec, singles), count, None, say
    )
    return found.sources, found.predicted, found.measured, time.perf_counter() - began


def remembered(spec: ShareScoreSpec, file: Path | None) -> ShareScoreSpec:
    """The score, what it says of pairs being kept in ``file``."""
    if file is None or not spec.additive:
        return spec

    def score(look: Look, pairs: Sequence[Pair]) -> list[float]:
        if file.exists():
            known = {(c, s): value for c, s, value in json.loads(file.read_text())}
            return [known[pair] for pair in pairs]
        values = list(spec.score(look, pairs))
        file.write_text(json.dumps([[*pair, value] for pair, value in zip(pairs, values, strict=True)]))
        return values

    return ShareScoreSpec(spec.name, score, spec.metric, spec.additive)


def compared(sources: Mapping[int, int], weights: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Perplexities before and after, KL in nats and share of tokens with the same likeliest next one."""
    look = held_out()
    likelihood, divergence, same, predicted = [0.0, 0.0], 0.0, 0, 0
    for part, (before, after) in zip(look.parts, look.logits(sources, weights), strict=True):
        labels = part[:, 1:].reshape(-1)
        pair = [logits[:, :-1].flatten(0, 1) for logits in (before, after)]
        divergence += float(row_divergences(*pair).double().sum())
        same += int((pair[0].argmax(-1) == pair[1].argmax(-1)).sum())
        predicted += len(labels)
        for place, logits in enumerate(pair):
            likelihood[place] += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    base, ppl = (math.exp(total / predicted) for total in likelihood)
    return {
        "perplexity_before": base, "perplexity": ppl, "divergence": divergence / predicted,
        "agreement": same / predicted, "tokens": predicted,
    }  # fmt: skip


def rows(item: str, singles: Path | None) -> Iterable[dict[str, Any]]:
    name, count = item.split(":")[0], int(item.split(":")[1])
    uncached, regions, _, tokenizer = captured()
    sources, predicted, measured, seconds = chosen(
        "single-kl" if name == "local" else name, count, singles
    )
    weights: dict[str, torch.Tensor] = {}
    fitted = 0.0
    if name == "local":
        began = time.perf_counter()
        text = checkpoints.windows(tokenizer, 16, 256, held_out=False)
        weights = recovered(uncached, regions, sources, text, STEPS, say)
        fitted = time.perf_counter() - began
    yield {
        "model": "smollm2", "what": name, "layers": count,
        "sources": {str(consumer): source for consumer, source in sources.items()},
        "kv_share": 1 - count / len(regions), "search_seconds": round(seconds, 1),
        "singles_read": singles is not None, "fit_seconds": round(fitted, 1),
        "calibration_divergence_predicted": predicted, "calibration_divergence": measured,
        **compared(sources, weights),
    }  # fmt: skip


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    by = {(row["what"], row["layers"]): row for row in found if "perplexity" in row}
    body: dict[str, Any] = {"targets": {str(count): ppl for count, ppl in TARGETS.items()}}
    for count in COUNTS:
        theirs, plain, fitted = (by.get((name, count)) for name in SCORES)
        best = min((row["perplexity"] for row in (plain, fitted) if row), default=None)
        if best is not None:
            body[f"perplexity_{count}"] = best
            body[f"target_met_{count}"] = best <= TARGETS[count]
        if theirs and fitted:
            ratio = fitted["divergence"] / theirs["divergence"]
            body[f"divergence_ratio_{count}"] = ratio
            body[f"ratio_met_{count}"] = ratio <= TARGET_RATIO
    return body


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--singles", type=Path, help="file that keeps KL of single pairs")
    options = arguments.parse_args()
    everything = [f"{name}:{count}" for count in COUNTS for name in SCORES]
    unknown = [item for item in options.models if item not in everything]
    if unknown:
        raise SystemExit(f"there is no {unknown[0]!r}: {', '.join(everything)}")
    items = options.models or everything
    figure("share_kv", options, lambda item: rows(item, options.singles), summary, items)


if __name__ == "__main__":
    main()
