"""What packed weights do to the predictions of real checkpoints, scheme by scheme and plan by plan.

    python benchmarks/quality_packed.py [--models smollm2:plans minilm:schemes] [--statistics FOLDER]

Needs the packages that ``checkpoints`` names. Calibration and comparison are on different topics of one text.
``smollm2``: KL by token against the checkpoint as it is. ``minilm``: pieces of one topic are matched with
those that follow them, 64 among 64, as the model was trained: logits are 20 times the cosines; ``cosine`` is
the mean of 1 - cosine between embeddings before and after.

The yardstick of plans is ``int4``, every weight rounded to the nearest in groups of 128. Where 128 does not
divide the inputs the last group of a row is shorter, which costs a scale and a zero as a whole one does; no
scheme stores that, so it is simulated, and ``int4{group=64}`` is beside it. Bits are those of stored bytes,
with scales and zeros, over the number of weights that products and look-ups read, embeddings and heads among
them.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoints
import torch
from harness import figure, parser, say
from torch import nn

import graphopt
from graphopt import Calibration
from graphopt.api import cost_model_for
from graphopt.packing.allocate import Allocation, chosen_schemes, observers_for, pack_by_plan
from graphopt.packing.api import discovered
from graphopt.packing.convert import matrix_of, tensor_of
from graphopt.packing.fit import sharing
from graphopt.packing.scheme import Scheme
from graphopt.plugins import default_host
from graphopt.quality import Quality, measure_quality
from graphopt_kernels.quantized.group_rounding import nearest

UNIFORM = (
    ("int4{group=64,method=gptq}",),
    ("int4{group=32,method=hqq}",),
    ("nf4{double=true}",),
    ("int8",),
    ("int8-dynamic",),
    ("llm-int8", "int8"),
    ("fp8",),
    ("nf4",),
    ("int4{group=64,method=hqq}",),
    ("int4-awq{group=64}", "int4{group=64}"),
    ("int4{group=32}",),
    ("int4{group=32,method=gptq}",),
)
"""The first that takes a weight packs it: tables are looked up, which some schemes cannot be."""

CHOICE = (
    "nf4{double=true}",
    "int4{group=128,method=gptq}",
    "int4{group=64,method=gptq}",
    "int4{group=32,method=hqq}",
    "int8",
)
FIRST = ("kl", "outputs", "fisher", "weights")
REST = ("relevance", "z-score", "embedding-change")
BITS = (4.5, 5.0, 4.25)
PARTS = ("plans", "schemes", "scorers", "hessian")
DYNAMIC = ("int8-dynamic", "fp8-dynamic", "llm-int8")
TARGET_BITS, TARGET_RATIO = 4.5, 0.5


@dataclass
class Case:
    """A checkpoint, what to compare it on and what is known of its inputs."""

    name: str
    model: nn.Module
    held_out: list[Any]
    calibration: list[Any]
    short: list[Any]
    shortest: list[Any]
    embed: Callable[[nn.Module], torch.Tensor] | None = None

    def references(self) -> Callable[..., Any]:
        """The model, its logits computed once for each batch."""
        with torch.no_grad():
            known = {
                id(batch["input_ids"]): {"logits": self.logits(self.model, batch)} for batch in self.held_out
            }
        return lambda **batch: known[id(batch["input_ids"])]

    @staticmethod
    def logits(model: Any, batch: Any) -> torch.Tensor:
        found = model(**{key: value for key, value in batch.items() if key != "labels"})
        return found if isinstance(found, torch.Tensor) else found.logits


def smollm2() -> Case:
    model, tokenizer = checkpoints.smollm2()
    held = checkpoints.batches(tokenizer, 4, 512, held_out=True, rows=4)
    calibration = checkpoints.batches(tokenizer, 16, 512, held_out=False, rows=2)
    short = checkpoints.batches(tokenizer, 1, 128, held_out=False)
    shortest = checkpoints.batches(tokenizer, 1, 64, held_out=False)
    return Case("smollm2", model, held, calibration, short, shortest)


def minilm() -> Case:
    embedder, tokenizer = checkpoints.minilm()
    model = checkpoints.Matcher(embedder)
    held = checkpoints.pairs(tokenizer, 4, 64, 32, held_out=True)
    calibration = checkpoints.pairs(tokenizer, 4, 32, 32, held_out=False)
    short = checkpoints.pairs(tokenizer, 1, 16, 32, held_out=False)

    def embed(one: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([one.embedder(batch["input_ids"]) for batch in held])  # type: ignore[operator]

    return Case("minilm", model, held, calibration, short, short, embed)


CASES = {"smollm2": smollm2, "minilm": minilm}


def statistics(case: Case, folder: Path | None) -> Calibration:
    """All but second derivatives; swaps of single weights on few tokens. ``folder`` keeps them for later
    runs."""
    file = None if folder is None else folder / f"{case.name}.calibration"
    if file is not None and file.exists():
        return Calibration.load(file)
    schemes = chosen_schemes([name for names in UNIFORM for name in names], default_host())
    first = [*observers_for(schemes, None), "gradients", "relevance", "change"]
    rows = graphopt.calibrate(case.model, case.calibration, observers=first, loss_fn=loss)
    found = with_more(rows, case, case.short, "divergence")
    if file is not None:
        found.save(file)
    return found


def with_more(known: Calibration, case: Case, batches: list[Any], observer: str) -> Calibration:
    """``known``, and what another observer finds on other batches."""
    began = time.perf_counter()
    more = graphopt.calibrate(case.model, batches, observers=("moments", observer), loss_fn=loss)
    say(f"  {observer}: {time.perf_counter() - began:.0f} s")
    key = {"curvature": "trace"}.get(observer, observer)
    merged = {
        name: {**found, **({key: more.of(name)[key]} if key in more.of(name) else {})}
        for name, found in known.statistics.items()
    }
    return Calibration(merged, known.batches, (*known.observers, observer))


def loss(output: Any) -> torch.Tensor:
    """The model's own, or that of each query's own passage among all."""
    if not isinstance(output, torch.Tensor):
        found: torch.Tensor = output.loss
        return found
    return nn.functional.cross_entropy(output, torch.arange(len(output)))


class Measured:
    """Packs copies of one checkpoint and compares them; what a scheme makes of a weight is kept."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.calibration: Calibration | None = None
        self.reference = case.references()
        self.embeddings = case.embed(case.model) if case.embed is not None else None
        self.inputs = {key: value for key, value in case.held_out[0].items() if key != "labels"}
        self.discovery = discovered(case.model, self.inputs)
        self.elements = sum(math.prod(weight.shape) for weight in self.discovery.weights)

    def row(self, model: nn.Module, what: str, bits: float, **more: Any) -> dict[str, Any]:
        found: Quality = measure_quality(
            self.reference, lambda **batch: {"logits": Case.logits(model, batch)}, self.case.held_out
        )
        row: dict[str, Any] = {"model": self.case.name, "what": what, "bits": round(bits, 4), **more}
        row |= found.to_json()
        if self.embeddings is not None and self.case.embed is not None:
            other = self.case.embed(model)
            row["cosine"] = float((1 - nn.functional.cosine_similarity(self.embeddings, other)).mean())
        return row

    def simulated(self, group: int) -> dict[str, Any]:
        """Every weight rounded to the nearest in groups, the last of a row as long as it may be."""
        copied, stored = sharing(self.case.model), 0
        parameters = dict(copied.named_parameters())
        for weight in self.discovery.weights:
            parameter = parameters[weight.name]
            matrix = matrix_of(parameter, weight.orientation).float()
            whole = weight.k - weight.k % group
            parts = [matrix[:, :whole]] * (whole > 0) + [matrix[:, whole:]] * (whole < weight.k)
            rounded = torch.cat(
                [nearest(p.contiguous(), min(group, p.shape[1]), False).weight() for p in parts], 1
            )
            parameter.data = tensor_of(rounded, parameter.shape, weight.orientation).to(parameter.dtype)
            stored += weight.n * (weight.k // 2 + 4 * -(-weight.k // group))
        return self.row(copied, f"int4{{group={group}}} rtn, simulated", 8 * stored / self.elements)

    def uniform(self, names: Sequence[str], calibration: Calibration) -> dict[str, Any]:
        began = time.perf_counter()
        copied = sharing(self.case.model)
        left: Sequence[str] = list(names)
        stored = 0
        for name in left:
            plan = graphopt.quantize(
                copied, self.inputs, schemes=(name,), calibration=calibration, score="weights"
            )
            stored += sum(choice.bytes_after for choice in plan.packed)
            dense = [choice for choice in plan.choices if not choice.scheme]
            if not dense:
                break
        else:
            stored += sum(choice.bytes_after for choice in dense)
        packing = time.perf_counter() - began
        runs: Any = copied
        if names[0] in DYNAMIC:
            # Such schemes round inputs too: in programs, not where the weight is unpacked and read.
            runs = graphopt.optimize(copied, self.inputs, pipeline="read-packed", emit="eager")
        bits = 8 * stored / self.elements
        return self.row(runs, " + ".join(names), bits, packing_seconds=round(packing, 1))

    def planned(
        self, score: str, calibration: Calibration, several: Sequence[float]
    ) -> Iterable[dict[str, Any]]:
        host = default_host()
        schemes = chosen_schemes(CHOICE, host)
        began = time.perf_counter()
        cost = cost_model_for(self.case.model, None, host)
        allocation = Allocation.of(self.case.model, self.discovery, schemes, score, calibration, cost, host)
        scoring = time.perf_counter() - began
        for bits in several:
            began = time.perf_counter()
            plan = allocation.plan(allocation.table.bytes_at(bits))
            solving = time.perf_counter() - began
            copied = sharing(self.case.model)
            pack_by_plan(copied, plan, calibration, host, schemes)
            used: dict[str, int] = {}
            for choice in plan.choices:
                used[choice.scheme] = used.get(choice.scheme, 0) + math.prod(choice.shape)
            yield self.row(
                copied, f"{score} at {bits}", plan.bits, score=score, asked=bits, error=plan.error,
                gap=plan.gap, scoring_seconds=round(scoring, 1), solving_seconds=round(solving, 3),
                shares={name: round(count / self.elements, 4) for name, count in used.items()},
            )  # fmt: skip


def remember_packing() -> None:
    """Schemes keep what they made of a weight: plans of one checkpoint pack the same weights again."""
    for kind in {type(scheme) for scheme in chosen_schemes(CHOICE, default_host())}:
        kind.pack = _remembered(kind.pack)  # type: ignore[method-assign]


def _remembered(pack: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[Any, Any] = {}

    def remembered(self: Scheme, weight: torch.Tensor, statistics: Any) -> Any:
        # Copies of the model share its weights, which live as long as it does.
        key = (self, weight.data_ptr(), tuple(weight.shape))
        if key not in known:
            known[key] = pack(self, weight, statistics)
        return dict(known[key])

    return remembered


@functools.cache
def prepared(name: str) -> Measured:
    return Measured(CASES[name]())


def rows(item: str, folder: Path | None) -> Iterable[dict[str, Any]]:
    name, _, part = item.partition(":")
    measured = prepared(name)
    if part == "plans":
        for group in (128, 64):
            yield measured.simulated(group)
    if measured.calibration is None:
        measured.calibration = statistics(measured.case, folder)
    known = measured.calibration
    if part == "plans":
        for score in FIRST:
            yield from measured.planned(score, known, BITS if score == "kl" else BITS[:1])
    elif part == "scorers":
        for score in REST:
            yield from measured.planned(score, known, BITS[:1])
    elif part == "hessian":
        more = with_more(known, measured.case, measured.case.shortest, "curvature")
        yield from measured.planned("hessian", more, BITS[:1])
    else:
        for names in UNIFORM:
            yield measured.uniform(names, known)
        halves = sharing(measured.case.model).bfloat16()
        bits = _lossless_bits(measured, halves)
        yield measured.row(halves.float(), "bfloat16, which lossless12 keeps", bits)


def _lossless_bits(measured: Measured, halves: nn.Module) -> float:
    """Bits of ``lossless12`` of the weights that it takes, 16 of the others."""
    plan = graphopt.quantize(halves, measured.inputs, schemes=("lossless12",), dry_run=True)
    return plan.bits


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    good = [row for row in found if "error" not in row or "divergence" in row]
    models: dict[str, Any] = {}
    for name in dict.fromkeys(row["model"] for row in good):
        own = [row for row in good if row["model"] == name]
        yard = next((r for r in own if r["what"].startswith("int4{group=128} rtn")), None)
        beside = next((r for r in own if r["what"].startswith("int4{group=64} rtn")), None)
        plans = [row for row in own if "asked" in row]
        if yard is None or beside is None or not plans:
            continue
        ratios = {
            score: {
                str(r["asked"]): round(r["divergence"] / yard["divergence"], 4)
                for r in plans if r["score"] == score
            }
            for score in dict.fromkeys(row["score"] for row in plans)
        }  # fmt: skip
        at = {score: found[str(TARGET_BITS)] for score, found in ratios.items() if str(TARGET_BITS) in found}
        best = min(at, key=lambda score: at[score])
        models[name] = {
            "yardstick": yard["divergence"], "yardstick_bits": yard["bits"], "ratios": ratios, "best": best,
            "ratio": at[best], "ratio_to_groups_of_64": round(
                next(r["divergence"] for r in plans if r["score"] == best and r["asked"] == TARGET_BITS)
                / beside["divergence"], 4),
            "slowest_solving_seconds": max(row["solving_seconds"] for row in plans),
        }  # fmt: skip
    return {
        "target_bits": TARGET_BITS, "target_ratio": TARGET_RATIO, "models": models,
        "met": set(models) == set(CASES) and all(m["ratio"] <= TARGET_RATIO for m in models.values()),
    }  # fmt: skip


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--statistics", type=Path, help="folder that keeps calibrations from run to run")
    options = arguments.parse_args()
    everything = [f"{name}:{part}" for part in PARTS for name in CASES]
    unknown = [item for item in options.models if item not in everything]
    if unknown:
        raise SystemExit(f"there is no {unknown[0]!r}: {', '.join(everything)}")
    remember_packing()
    items = options.models or everything
    figure("quality_packed", options, lambda item: rows(item, options.statistics), summary, items)


if __name__ == "__main__":
    main()
