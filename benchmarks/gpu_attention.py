"""Attention with causal masks, caps, windows and biases on one GPU: graphopt beside torch and flex attention.

    python benchmarks/gpu_attention.py --out benchmarks/results/gpu_attention.json
    python benchmarks/gpu_attention.py --tune       # launches of graphopt's kernels, the best of each case

Batch 2, 32 heads of queries and 8 of keys, 4,096 positions, heads of 128 and 64 elements, bf16. ``sdpa`` is
``scaled_dot_product_attention`` where it can say the variant (a window is a mask to it), ``flex``
``flex_attention`` under torch.compile, ``written`` torch.compile of the operators written out.

``tflops`` counts the scores that are seen, two products forward and five backward, whatever a kernel does.
``extra_mib`` is the peak above the operands, results included. ``error`` is the distance of the output, and
of the gradients of queries, keys and values together, from float32 scores written out, in the first group of
heads. The GPU is kept busy while the host gets a call ready; medians after warm-up. To stay within some two
minutes, ``written`` is left out for heads of 64, and two of the variants unless ``--cases`` names them.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import graphopt_kernels.attention  # noqa: F401  (registers the operators)
import graphopt_kernels.attention_launch as launching
from graphopt.atomic import write_atomically
from graphopt_kernels.attention_launch import Launch

MIB = 2**20
BUSY_CYCLES = 2_000_000
"""About a millisecond: longer than the host takes for a call."""

CAP, WINDOW = 50.0, 1024
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Variant:
    """``softcap`` of scores, ``left`` and ``right`` of what a query sees, and whether a ``bias`` [H, M, N] is
    added, which is trained."""

    name: str
    softcap: float = 0.0
    left: int | None = None
    right: int | None = None
    bias: bool = False


VARIANTS = (
    Variant("causal", right=0),
    Variant("full"),
    Variant("softcap", softcap=CAP, right=0),
    Variant("window", left=WINDOW - 1, right=0),
    Variant("softcap+window", softcap=CAP, left=WINDOW - 1, right=0),
    Variant("bias", bias=True),
)


USUAL = ("causal", "softcap", "window", "bias")


def operands(variant: Variant, width: int) -> Tensors:
    """Queries, keys, values and, where there is one, the bias; they lie as projections leave them."""
    batch, heads, few, length = 2, 32, 8, 4096
    torch.manual_seed(0)
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    made = [torch.randn(batch, length, n, width, **options).transpose(1, 2) for n in (heads, few, few)]
    if variant.bias:
        made.append(torch.randn(1, heads, length, length, **options))
    return tuple(x.requires_grad_() for x in made)


def seen(variant: Variant, rows: int) -> torch.Tensor:
    distance = torch.arange(rows, device="cuda")[None, :] - torch.arange(rows, device="cuda")[:, None]
    found = torch.ones_like(distance, dtype=torch.bool)
    if variant.left is not None:
        found &= distance >= -variant.left
    if variant.right is not None:
        found &= distance <= variant.right
    return found


def written(variant: Variant, rows: int) -> Callable[..., torch.Tensor]:
    mask = None if variant.left is variant.right is None else seen(variant, rows)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if variant.softcap:
            scores = torch.tanh(scores / variant.softcap) * variant.softcap
        for each in bias:
            scores = scores + each
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v

    return attend


def kinds(variant: Variant, width: int, rows: int) -> Iterator[tuple[str, Callable[..., torch.Tensor]]]:
    settings = (width**-0.5, variant.softcap, variant.left, variant.right)
    yield "graphopt", lambda q, k, v, b=None: torch.ops.graphopt.attention(q, k, v, b, *settings)[0]
    if not variant.softcap:
        mask = seen(variant, rows) if variant.left is not None else None
        options: dict[str, Any] = {"is_causal": mask is None and variant.right == 0}
        if mask is None and not variant.bias:
            yield "sdpa", lambda *x: F.scaled_dot_product_attention(*x, enable_gqa=True, **options)
        else:
            # No fused kernel takes groups beside a mask.
            def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, b: Any = mask) -> torch.Tensor:
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
                b = b.expand(q.shape[0], -1, -1, -1) if b.dim() == 4 else b
                return F.scaled_dot_product_attention(q, k, v, b)

            yield "sdpa", masked
    yield "flex", flex(variant, rows)
    yield "written", torch.compile(written(variant, rows))


def flex(variant: Variant, rows: int) -> Callable[..., torch.Tensor]:
    bounded = variant.left is not None or variant.right is not None

    def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
        found = j <= i + (rows if variant.right is None else variant.right)
        return found & (j >= i - (rows if variant.left is None else variant.left))

    blocks = create_block_mask(visible, None, None, rows, rows, device="cuda") if bounded else None

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Any = None) -> torch.Tensor:
        def bent(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            if variant.softcap:
                score = torch.tanh(score / variant.softcap) * variant.softcap
            return score if bias is None else score + bias[0, h, i, j]

        change = bent if variant.softcap or bias is not None else None
        return flex_attention(q, k, v, score_mod=change, block_mask=blocks, enable_gqa=True)  # type: ignore[return-value]

    return torch.compile(attend)


def milliseconds(run: Callable[[], Any], times: int = 7) -> float:
    for _ in range(2):
        run()
    taken = []
    for _ in range(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(BUSY_CYCLES)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end))
    return statistics.median(taken)


def work(variant: Variant, width: int, inputs: Tensors) -> float:
    """FLOPs of the forward; the backward has 2.5 times as many."""
    batch, heads, rows, _ = inputs[0].shape
    return 4.0 * batch * heads * width * int(seen(variant, rows).sum())


def measured(variant: Variant, width: int, only: list[str]) -> Iterator[dict[str, Any]]:
    inputs = operands(variant, width)
    dy = torch.randn_like(inputs[0])
    group = [inputs[0].shape[1] // inputs[1].shape[1], 1, 1]
    group += [group[0]] * (len(inputs) - 3)

    def first(tensors: Any) -> torch.Tensor:
        return torch.cat([x[:1, :n].float().flatten() for x, n in zip(tensors, group[:3], strict=True)])

    exact = [x.detach()[:1, :n].float().requires_grad_() for x, n in zip(inputs, group, strict=True)]
    truth = written(variant, inputs[0].shape[2])(*exact)
    truths = [truth.detach(), first(torch.autograd.grad(truth, exact[:3], dy[:1, : group[0]].float()))]
    del truth, exact
    flops = work(variant, width, inputs)
    for name, function in kinds(variant, width, inputs[0].shape[2]):
        if name not in only if only else (name == "written" and width == 64):
            continue
        row: dict[str, Any] = {"case": variant.name, "width": width, "kind": name}
        gc.collect()
        torch.cuda.empty_cache()
        try:
            found = function(*inputs)
            ours = [found.detach()[:1, : group[0]].float(), first(torch.autograd.grad(found, inputs[:3], dy))]
            row["error"] = [
                float(f"{float((a - b).norm() / b.norm()):.2e}") for a, b in zip(ours, truths, strict=True)
            ]
            del found, ours

            def step(function: Callable[..., torch.Tensor] = function) -> None:
                torch.autograd.grad(function(*inputs), inputs, dy)

            step()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            torch.cuda.synchronize()
            row["extra_mib"] = round((torch.cuda.max_memory_allocated() - before) / MIB)
            with torch.no_grad():
                forward = milliseconds(lambda function=function: function(*inputs))
            both = milliseconds(step)
            row |= {
                "forward_ms": round(forward, 3),
                "forward_tflops": round(flops / forward / 1e9),
                "both_ms": round(both, 3),
                "both_tflops": round(3.5 * flops / both / 1e9),
            }
        except Exception as error:  # a peer that fails is a row that says so
            row["error_text"] = f"{type(error).__name__}: {error}"[:200]
        yield row


# --- launches -----------------------------------------------------------------------------------

LAUNCHES: dict[tuple[str, int], list[Launch]] = {
    (kind, width): [Launch(*each) for each in found]
    for kind, by_width in {
        "forward": {
            64: [(128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 4, 3), (128, 128, 8, 2), (64, 64, 4, 4)],
            128: [(128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 8, 2), (64, 64, 4, 3), (128, 32, 8, 4)],
        },
        "keys": {
            64: [(64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 3), (64, 64, 4, 2), (128, 128, 8, 2)],
            128: [(32, 128, 8, 3), (64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 4, 2), (32, 64, 4, 3)],
        },
        "queries": {
            64: [(128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 4, 2)],
            128: [(128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2), (64, 32, 4, 3), (128, 64, 8, 3)],
        },
        "bias": {
            64: [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2)],
            128: [(64, 64, 8, 2), (64, 64, 4, 2), (128, 64, 8, 2)],
        },
    }.items()
    for width, found in by_width.items()
}


def tuned(variant: Variant, width: int) -> Iterator[dict[str, Any]]:
    """Milliseconds of each kernel for each launch; in the backward with the sums of rows before it."""
    inputs = tuple(x.detach() for x in operands(variant, width))
    dy = torch.randn_like(inputs[0])
    query, key, value = inputs[:3]
    bias = inputs[3] if variant.bias else None
    settings = (width**-0.5, variant.softcap, variant.left, variant.right)
    kernels = launching.kernels_for(query, value)
    output, sums = launching.forward(kernels, query, key, value, bias, *settings)
    masks = {
        "keys": [False, True, True, False],
        "queries": [True, False, False, False],
        "bias": [False, False, False, True],
    }
    for kind in ("forward", *masks):
        if kind == "bias" and bias is None:
            continue
        taken: dict[str, float | str] = {}
        for launch in LAUNCHES[kind, width]:
            if kind == "forward":
                given = (query, key, value, bias, *settings)
                run = lambda given=given, way=launch: launching.forward(kernels, *given, launch=way)  # noqa: E731
            else:
                given = (dy, query, key, value, bias, output, sums, *settings, masks[kind])
                run = lambda given=given, way=launch: launching.backward(kernels, *given, launch=way)  # noqa: E731
            try:
                taken[",".join(map(str, launch))] = round(milliseconds(run, 5), 3)
            except Exception as error:  # one that does not fit is a row that says so
                taken[",".join(map(str, launch))] = f"{type(error).__name__}"
        found = {k: v for k, v in taken.items() if isinstance(v, float)}
        best = min(found, key=found.__getitem__) if found else None
        rule = getattr(launching, f"{kind}_launch")
        used = rule(*([width, 2] if kind == "bias" else [width, 2, variant.bias, variant.softcap != 0]))
        yield {
            "case": variant.name, "width": width, "kernel": kind, "best": best,
            "used": ",".join(map(str, used)), "ms": taken,
        }  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_attention.json"))
    options.add_argument("--tune", action="store_true", help="try launches of graphopt's kernels instead")
    options.add_argument("--cases", nargs="*", default=[], choices=[v.name for v in VARIANTS])
    options.add_argument("--kinds", nargs="*", default=[], help="measure these alone")
    options.add_argument("--widths", nargs="*", type=int, default=[128, 64])
    given = options.parse_args()
    if not torch.cuda.is_available():
        print("gpu_attention needs a CUDA device")
        return
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python benchmarks/gpu_attention.py",
        "rows": [],
    }
    chosen = [v for v in VARIANTS if v.name in (given.cases or USUAL)]
    for variant, width in itertools.product(chosen, given.widths):
        torch._dynamo.reset()
        for row in tuned(variant, width) if given.tune else measured(variant, width, given.kinds):
            print(json.dumps(row), flush=True)
            document["rows"].append(row)
            if not given.tune:
                write_atomically(given.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
