"""Launches of the rotary kernels on one GPU: which is fastest, and how close to the copy bandwidth it is.

    python benchmarks/sweep_rotary.py --out benchmarks/results/gpu_sweep_rotary.json

Heads and bytes as in gpu_rotary.py, queries, keys and values copied out of a projection or gathered into one.
A launch is ``half rest positions heads warps programs whole`` of ``rotary_launch.Launch``; percentages are of
the copy bandwidth that the same run measures. ``usual`` is the launch that was chosen when it ran.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import copy_bandwidth, known, milliseconds
from gpu_rotary import BATCH, LAYOUTS, LENGTH

from graphopt.atomic import write_atomically
from graphopt.plugins import default_host
from graphopt_kernels import rotary_launch as rotary
from graphopt_kernels.rotary_launch import Launch

MOST_TILES = 10
"""Tiles that one program has after one another: they are written out, and code of more takes minutes."""


def launches(usual: Launch, heads: tuple[int, ...], size: int, sums: bool) -> Iterator[Launch]:
    yield usual
    per_head = 1 << (size - 1).bit_length()
    for whole, tile, count, warps in itertools.product(
        (False,) if sums else (False, True), (1024, 2048, 4096), (4, 8), (4, 8)
    ):
        tiles = sum(-(-heads[0] * n // count) for n in heads[1:])
        if tile < per_head * count or tile < 256 * warps or (whole and tiles > MOST_TILES):
            continue
        for programs in (4, 6, 8) if sums else (usual.programs,):
            yield usual._replace(
                positions=tile // per_head // count, heads=count, warps=warps, programs=programs, whole=whole
            )


def cell(name: str, norm: bool, half: str) -> tuple[Callable[[Launch], Any], Launch, int, bool]:
    """What runs a launch, the usual one, the least bytes, and whether gradients of weights are summed up."""
    heads, size, width = LAYOUTS[name]
    groups, queries, keys, values = heads
    count = groups * (queries + keys + values)
    bf16: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    x = torch.randn(BATCH, LENGTH, count, size, **bf16)
    angles = torch.randn(1, LENGTH, width, device="cuda")
    tables = angles.cos().bfloat16(), angles.sin().bfloat16()
    weights = [torch.rand(size, **bf16) if norm else None for _ in range(2)]
    settings = (*tables, *weights, list(heads), width, False, 1e-6 if norm else None, 0.0)
    kernels = rotary.kernels_for(x, tables[0])
    parts = rotary.forward_rows(kernels, x, *settings, True, torch.bfloat16)
    size_of_head = BATCH * LENGTH * size * 2
    if half == "forward":
        usual = rotary.launch_for(heads, size, width)
        run = lambda launch: rotary.forward_rows(  # noqa: E731
            kernels, x, *settings, True, torch.bfloat16, launch=launch
        )
        return run, usual, 2 * count * size_of_head, False
    grads = [torch.randn_like(part) if part.numel() else None for part in parts]
    usual = rotary.launch_for(heads, size, width, sums=norm)
    run = lambda launch: rotary.backward_rows(  # noqa: E731
        kernels, *grads, x if norm else None, *settings, torch.bfloat16, [True, norm, norm], launch=launch
    )
    read_again = groups * (queries + keys) if norm else 0
    return run, usual, (2 * count + read_again) * size_of_head, norm


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_sweep_rotary.json"))
    options.add_argument("--layouts", default=",".join(LAYOUTS))
    given = options.parse_args()
    if not torch.cuda.is_available():
        print("sweep_rotary needs a CUDA device")
        return
    default_host().kernels()
    copy = copy_bandwidth()
    rows = []
    for name, norm, half in itertools.product(
        given.layouts.split(","), (False, True), ("forward", "backward")
    ):
        run, usual, least, sums = cell(name, norm, half)
        taken: dict[Launch, float] = {}
        failed: dict[str, str] = {}
        for launch in launches(usual, LAYOUTS[name][0], LAYOUTS[name][1], sums):
            if launch in taken:
                continue
            try:
                taken[launch] = milliseconds(lambda: run(launch))  # noqa: B023
            except Exception as error:  # one launch of many
                failed[str(tuple(launch))] = f"{type(error).__name__}: {error}"[:160]
        share = {launch: round(100 * least / took / 1e6 / copy, 1) for launch, took in taken.items()}
        best = sorted(taken, key=taken.__getitem__)[:5]
        rows.append(
            {
                "layout": name, "norm": norm, "half": half, "usual": [share.get(usual), list(usual)],
                "best": [[share[launch], list(launch)] for launch in best], "tried": len(taken),
                "failed": failed,
            }
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    document = {
        "device": torch.cuda.get_device_name(),
        "versions": {package: known(package) for package in ("torch", "triton")},
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python benchmarks/sweep_rotary.py",
        "copy_gb_per_s": round(copy),
        "rows": rows,
    }
    write_atomically(given.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
