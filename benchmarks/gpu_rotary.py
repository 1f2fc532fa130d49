"""Rotary embeddings on one GPU, as operators: queries and keys of a packed projection or alone.

    python benchmarks/gpu_rotary.py --out benchmarks/results/gpu_rotary.json

Percentages are of the copy bandwidth that the same run measures, on the least bytes: heads in and heads out,
once, and with a norm the heads again in the backward; tables not counted. ``compile`` is what models write,
compiled; its backward puts the gradient of the projection together from those of its parts. ``liger`` turns
queries and keys in place, without values. Heads are bf16, 16,384 positions in 4 samples; host time does not
count; medians after warm-up.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import copy_bandwidth, known, milliseconds, rms_norm

from graphopt.atomic import write_atomically
from graphopt.plugins import default_host

BATCH, LENGTH = 4, 4096
LAYOUTS = {
    "alone": ((1, 32, 0, 0), 128, 128),
    "llama-3-8b": ((1, 32, 8, 8), 128, 128),
    "llama-3.2-1b": ((1, 32, 8, 8), 64, 64),
    "gemma": ((1, 16, 8, 8), 256, 256),
    "pythia-6.9b": ((32, 1, 1, 1), 128, 32),
}
"""Groups, queries, keys and values; elements of a head; elements that are turned."""

Parts = tuple[torch.Tensor, ...]


def written(
    packed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: Any, width: int, weights: Any
) -> Parts:
    """What models write; values are a view of the projection."""
    groups, *counts = heads
    parts = packed.unflatten(2, (groups, sum(counts))).split(counts, 3)
    query, key, value = (part.flatten(2, 3) for part in parts)

    def turn(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        x = x if weight is None else rms_norm(x, weight)
        front, back = x[..., :width], x[..., width:]
        first, second = front.chunk(2, -1)
        other = torch.cat((-second, first), -1)
        turned = front * cos.unsqueeze(-2) + other * sin.unsqueeze(-2)
        return torch.cat((turned, back), -1) if width < x.shape[-1] else turned

    return turn(query, weights[0]), turn(key, weights[1]), value


def liger() -> Callable[..., Any] | None:
    try:
        from liger_kernel.ops.rope import LigerRopeFunction
    except ImportError:
        return None
    function: Callable[..., Any] = LigerRopeFunction.apply
    return function


def measured(name: str, norm: bool, copy: float) -> dict[str, Any]:
    heads, size, width = LAYOUTS[name]
    groups, queries, keys, values = heads
    count = groups * (queries + keys + values)
    packed = torch.randn(BATCH, LENGTH, count, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    angles = torch.randn(1, LENGTH, width, device="cuda")
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    weights: list[Any] = [
        torch.rand(size, device="cuda", dtype=torch.bfloat16, requires_grad=True) if norm else None
        for _ in range(2)
    ]
    leaves = [packed, *(w for w in weights[: 1 if not keys else 2] if w is not None)]
    bytes_of_head = BATCH * LENGTH * size * 2
    turned = groups * (queries + keys)
    settings = (list(heads), width, False, 1e-6 if norm else None, 0.0, True, torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: written(x, cos, sin, heads, width, weights))
    kinds: dict[str, tuple[Callable[[torch.Tensor], Any], bool]] = {
        "graphopt": (lambda x: torch.ops.graphopt.rotary(x, cos, sin, *weights, *settings), True),
        "compile": (compiled, False),
    }
    row: dict[str, Any] = {"case": name, "norm": norm}
    for kind, (function, copies) in kinds.items():
        outputs = [y for y in function(packed) if y.numel()]
        grads = [torch.randn_like(y) for y in outputs]

        def backward(outputs: Any = outputs, grads: Any = grads) -> Any:
            return torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

        least = (2 * count + (turned if norm else 0)) * bytes_of_head
        took = milliseconds(backward)
        row[f"{kind}_backward"] = round(100 * least / took / 1e6 / copy, 1)
        with torch.no_grad():
            took = milliseconds(lambda: function(packed))  # noqa: B023
        row[f"{kind}_forward"] = round(
            100 * 2 * (count if copies else turned) * bytes_of_head / took / 1e6 / copy, 1
        )
        row[f"{kind}_forward_ms"] = round(took, 4)
    if (peer := liger()) is not None and not norm and groups == 1 and keys and width == size:
        q, k = (
            torch.randn(BATCH, LENGTH, n, size, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
            for n in (queries, keys)
        )
        least = 2 * turned * bytes_of_head
        with torch.no_grad():
            took = milliseconds(lambda: peer(q, k, cos, sin))
        # The backward is the same kernel with the sine negated.
        row["liger_forward"] = round(100 * least / took / 1e6 / copy, 1)
    return row


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_rotary.json"))
    given = options.parse_args()
    if not torch.cuda.is_available():
        print("gpu_rotary needs a CUDA device")
        return
    default_host().kernels()
    copy = copy_bandwidth()
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "versions": {name: known(name) for name in ("torch", "triton", "liger_kernel")},
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python benchmarks/gpu_rotary.py",
        "copy_gb_per_s": round(copy),
        "rows": [],
    }
    for name, norm in itertools.product(LAYOUTS, (False, True)):
        torch.cuda.empty_cache()
        row = measured(name, norm, copy)
        print(json.dumps(row), flush=True)
        document["rows"].append(row)
        write_atomically(given.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
