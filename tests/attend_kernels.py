"""Kernels of attention over stores, in Triton's interpreter; prints how far they are from float64.

Every case is a launch of ``attend_launch`` on CPU tensors, beside the reference in float64 on the same
numbers. Run by ``tests/test_attend_kernels.py``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt_kernels import attend_triton
from graphopt_kernels.attend_full import attend_full
from graphopt_kernels.attend_launch import AttendLaunch, attend_on_gpu
from graphopt_kernels.attend_ring import attend_ring

FP16, FP32 = torch.float16, torch.float32
TILE = AttendLaunch(16, 16, 3, 1, 1)

CASES: dict[str, dict[str, Any]] = {
    "plain": {"groups": 3},
    "one part": {"launch": TILE._replace(parts=1)},
    "more parts than keys": {"launch": TILE._replace(parts=9), "seen": 20},
    "first token": {"seen": 0},
    "float16": {"dtype": FP16},
    "wider than queries": {"dtype": FP16, "held": FP32},
    "narrower than queries": {"held": FP16},
    "heads of 80": {"width": 80, "value_width": 80, "batch": 1},
    "other values": {"width": 24, "value_width": 40},
    "padding": {"padded": 21, "groups": 2},
    "own key is padding": {"padded": 61},
    "window": {"window": 18},
    "cap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "sinks, one part": {"sinks": True, "launch": TILE._replace(parts=1)},
    "slopes": {"slopes": True},
    "slopes, sinks": {"slopes": True, "sinks": True},
    "slopes, padding": {"slopes": True, "padded": 7},
    "all": {"slopes": True, "padded": 5, "sinks": True, "softcap": 3.0, "window": 33},
    "several rows": {"rows": 3, "seen": 41},
    "several rows, all": {
        "rows": 5, "seen": 41, "slopes": True, "padded": 30, "sinks": True, "softcap": 3.0, "window": 9,
    },
    "several blocks of rows": {"rows": 11, "group": 3, "seen": 30, "window": 20},
    "a prompt": {"rows": 37, "seen": 0, "launch": TILE._replace(parts=1)},
    "more heads than a block": {"group": 20, "seen": 25, "batch": 1},
    "written by others": {"rows": 2, "shares": True, "seen": 40},
    "full to the end": {"seen": 66},
    "strided": {"strided": True},
    "ring": {"ring": 20, "window": 20, "groups": 2},
    "ring, not full": {"ring": 20, "window": 20, "seen": 9},
    "ring, first token": {"ring": 20, "window": 20, "seen": 0},
    "ring, wider than the window": {"ring": 33, "window": 20},
    "ring, all": {
        "ring": 20, "window": 20, "slopes": True, "padded": 50, "sinks": True, "softcap": 3.0, "seen": 58,
    },
    "ring, written by others": {"ring": 20, "window": 19, "shares": True, "seen": 33, "padded": 18},
    "ring, written by others, not full": {"ring": 20, "window": 20, "shares": True, "seen": 9},
    "ring, several rows": {"ring": 20, "window": 19, "rows": 4, "seen": 33, "slopes": True, "padded": 20},
    "ring, more rows than slots": {"ring": 18, "window": 18, "rows": 25, "seen": 30},
    "ring, more heads than a block": {"ring": 20, "window": 20, "group": 20, "batch": 1},
}  # fmt: skip


def drawn(
    batch: int = 2,
    groups: int = 1,
    group: int = 2,
    rows: int = 1,
    seen: int = 60,
    places: int = 67,
    width: int = 32,
    value_width: int = 16,
    dtype: torch.dtype = FP32,
    held: torch.dtype | None = None,
    padded: int = 0,
    window: int = 0,
    softcap: float = 0.0,
    slopes: bool = False,
    sinks: bool = False,
    shares: bool = False,
    ring: int = 0,
    strided: bool = False,
) -> dict[str, Any]:
    """Arguments of the operators, at positions behind ``seen``."""
    heads, held = groups * group, held or dtype

    def numbers(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        if strided:
            return torch.randn(shape[0], shape[2], shape[1], shape[3]).to(kind).transpose(1, 2)
        return torch.randn(shape).to(kind)

    slots = ring or places
    valid = None
    if padded:
        valid = torch.ones(batch + 1, places, dtype=torch.bool)
        valid[1, :padded] = False
    stores = [numbers(batch + 1, groups, slots, size, kind=held) for size in (width, value_width)]
    if not ring:
        # What is not there must not be read: it may be anything.
        for store in stores:
            store[:, :, seen + (rows if shares else 0) :] = float("nan")
    return {
        "query": numbers(batch, heads, rows, width),
        "key": None if shares else numbers(batch, groups, rows, width),
        "value": None if shares else numbers(batch, groups, rows, value_width),
        "key_store": stores[0], "value_store": stores[1],
        "positions": torch.arange(seen, seen + rows), "valid": valid,
        "slopes": torch.rand(heads) / 8 if slopes else None, "sinks": torch.randn(heads) if sinks else None,
        "scale": 0.3, "softcap": softcap, "window": window, "length": places,
    }  # fmt: skip


def exact(arguments: dict[str, Any], ring: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The output in float64, and the stores as they are to be afterwards."""
    given = {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    kinds = given["key_store"].dtype, given["value_store"].dtype
    for name, kind in zip(("key", "value"), kinds, strict=True):
        given[name] = None if given[name] is None else given[name].to(kind)
    for name, value in given.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            given[name] = value.double()
    made = (attend_ring if ring else attend_full).reference(*given.values())
    return made, given["key_store"].to(kinds[0]), given["value_store"].to(kinds[1])


def main(names: Sequence[str]) -> None:
    found = {}
    for number, (name, case) in enumerate(CASES.items()):
        if names and name not in names:
            continue
        torch.manual_seed(number)
        launch = case.pop("launch", TILE)
        arguments, ring = drawn(**case), "ring" in case
        expected, keys, values = exact(arguments, ring)
        asked, stores, _ = attend_full.parted([*arguments.values()])
        made = attend_on_gpu(attend_triton, asked, stores, ring=ring, launch=launch)
        assert made.dtype is arguments["query"].dtype and made.shape == expected.shape
        stored = torch.equal(arguments["key_store"].nan_to_num(7), keys.nan_to_num(7))
        stored &= torch.equal(arguments["value_store"].nan_to_num(7), values.nan_to_num(7))
        found[name] = [float((made.double() - expected).norm() / expected.norm()), stored]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
