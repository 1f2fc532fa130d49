"""Kernels of attention over rounded rows, in Triton's interpreter; prints how far they are from float64.

A case is several calls, one after the other, of one row or (``PROMPTS``) of some: after each the stores are
those that the reference leaves, and the output is beside the reference's in float64 on the same stores. Run
by ``tests/test_attend_kernels.py``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.decoding.masks import MaskSpec
from graphopt.decoding.stores import SiteSpec
from graphopt_kernels.attend_launch import AttendLaunch
from graphopt_kernels.attend_quant import ALONE, FIRST, LAST, attend_quant
from graphopt_kernels.attend_quant_launch import jitted, row_on_gpu
from graphopt_kernels.attend_quant_prompts import rows_on_gpu
from graphopt_kernels.quant_store import Quant

FP16, FP32 = torch.float16, torch.float32
TILE = AttendLaunch(8, 32, 3, 1, 1)
KERNELS = jitted()

CASES: dict[str, dict[str, Any]] = {
    "four bits": {},
    "eight bits": {"store": Quant(bits=8)},
    "three bits": {"store": Quant(bits=3), "value_width": 48},
    "two bits": {"store": Quant(key_bits=2, value_bits=4)},
    "one part": {"launch": TILE._replace(parts=1)},
    "float16": {"dtype": FP16},
    "longer blocks": {"store": Quant(block=64, residual=128), "at": (0, 127, 128, 191, 192)},
    "longer rings": {"store": Quant(residual=96), "launch": TILE._replace(columns=32)},
    "other groups": {"store": Quant(group=8, value_bits=3), "width": 24, "value_width": 40},
    "padding": {"padded": 40},
    "window": {"window": 70, "at": (40, 96, 101, 160, 199)},
    "all": {
        "store": Quant(bits=3), "slopes": True, "padded": 40, "sinks": True, "softcap": 3.0, "window": 70,
        "at": (95, 160),
    },
    "two sites": {"turns": (FIRST, LAST), "at": (31, 63, 96)},
    "warps with keys of their own": {"launch": TILE._replace(columns=128, parts=2, warps=2)},
    "wide values": {"value_width": 128, "at": (96, 140)},
    "wide values, three bits, not full": {"store": Quant(bits=3), "value_width": 100, "at": (96, 140)},
    "wide values of one group": {"store": Quant(group=128), "value_width": 128, "at": (96,)},
    "wider values": {"dtype": FP16, "value_width": 256, "at": (96,)},
    "many heads": {"group": 20, "at": (96, 140)},
}  # fmt: skip


PROMPT_TILE = AttendLaunch(16, 32, 1, 1, 1)
PROMPTS: dict[str, dict[str, Any]] = {
    "prompts": {},
    "prompts, eight bits": {"store": Quant(bits=8), "spans": ((0, 70), (70, 100))},
    "prompts, three bits, not full": {"store": Quant(bits=3), "value_width": 48, "width": 24},
    "prompts, two bits, groups of 8": {"store": Quant(key_bits=2, value_bits=3, group=8), "value_width": 40},
    "prompts in parts": {"launch": PROMPT_TILE._replace(parts=3), "spans": ((40, 130),)},
    "prompts, float16": {"dtype": FP16, "spans": ((0, 100),)},
    "prompts, longer blocks": {
        "store": Quant(block=64, residual=128), "spans": ((0, 127), (127, 130), (130, 199)),
    },
    "prompts, longer rings": {"store": Quant(residual=96), "spans": ((0, 100), (100, 180))},
    "prompts, all": {
        "store": Quant(bits=3), "slopes": True, "padded": 40, "sinks": True, "softcap": 3.0,
        "launch": PROMPT_TILE._replace(parts=2), "spans": ((0, 90), (90, 131)),
    },
    "prompts, two sites": {"turns": (FIRST, LAST), "spans": ((0, 64), (64, 97))},
    "prompts, last rows alone": {"asking": 1, "spans": ((0, 97), (97, 140))},
    "prompts, a few last rows": {"asking": 33, "padded": 20, "spans": ((0, 97),)},
    "prompts, sequence by sequence": {"most": 2 * 192 * 64 * 4, "groups": 2, "spans": ((33, 97),)},
    "prompts, head by head": {
        "most": 1, "groups": 2, "spans": ((33, 97),), "slopes": True, "sinks": True, "padded": 20,
    },
}  # fmt: skip
"""``spans``: first row and the one behind the last of each call. ``asking``: how many of them ask."""


def drawn(
    batch: int = 2,
    groups: int = 1,
    group: int = 2,
    places: int = 200,
    width: int = 32,
    value_width: int = 32,
    dtype: torch.dtype = FP32,
    store: Quant = Quant(),  # noqa: B008  (a frozen value)
    padded: int = 0,
    window: int = 0,
    softcap: float = 0.0,
    slopes: bool = False,
    sinks: bool = False,
    seen: int = 0,
) -> dict[str, Any]:
    """Arguments of the operator, but for positions and turn, behind ``seen`` rows."""
    heads = groups * group
    site = SiteSpec(heads, groups, width, value_width, dtype, MaskSpec(window=window), 0.3)
    valid = None
    if padded:
        valid = torch.ones(batch + 1, places, dtype=torch.bool)
        valid[1, :padded] = False
    stores = {n: torch.zeros(s, dtype=d) for n, (s, d) in store.tensors(site, batch + 1, places).items()}
    given = {
        **rows(batch, groups, group, 1, width, value_width, dtype), **stores,
        "positions": torch.zeros(1, dtype=torch.int64), "valid": valid,
        "slopes": torch.rand(heads) / 8 if slopes else None, "sinks": torch.randn(heads) if sinks else None,
        "scale": 0.3, "softcap": softcap, "window": window, "length": places, "key_bits": store.widths[0],
        "value_bits": store.widths[1], "group": store.group, "turn": ALONE,
    }  # fmt: skip
    if seen:
        prompt = {**given, **rows(batch, groups, group, seen, width, value_width, dtype)}
        attend_quant.reference(*{**prompt, "positions": torch.arange(seen)}.values())
    return given


def rows(
    batch: int, groups: int, group: int, count: int, width: int, value_width: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    sizes = {"query": (groups * group, width), "key": (groups, width), "value": (groups, value_width)}
    return {n: torch.randn(batch, heads, count, size).to(dtype) for n, (heads, size) in sizes.items()}


def wide(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same for the reference in float64: packed scales stay what they are."""
    names = ("query", "slopes", "sinks")
    return {
        k: v.double() if k in names and v is not None else v.clone() if isinstance(v, Tensor) else v
        for k, v in arguments.items()
    }


STORES = ("key_codes", "key_scales", "value_codes", "value_scales", "key_ring", "value_ring")


def worst_of(calls: Sequence[dict[str, Any]], turns: Sequence[int], run: Any) -> tuple[float, bool]:
    """How far ``run(asked, stores, bits)`` is off in any call, and whether it leaves what the reference
    does."""
    worst, stored = 0.0, True
    for arguments in calls:
        for turn in turns:
            arguments["turn"] = turn
            reference = wide(arguments)
            expected = attend_quant.reference(*reference.values())
            made = run(*attend_quant.parted([*arguments.values()]))
            assert made.dtype is arguments["query"].dtype and made.shape == expected.shape
            worst = max(worst, float((made.double() - expected).norm() / expected.norm()))
            stored &= all(torch.equal(arguments[name], reference[name]) for name in STORES)
    return worst, stored


def token_by_token(case: dict[str, Any]) -> tuple[float, bool]:
    launch, at = case.pop("launch", TILE), case.pop("at", (0, 31, 32, 95, 96, 140))
    turns = case.pop("turns", (ALONE,))

    def run(asked: Any, stores: Any, bits: Any) -> Tensor:
        return row_on_gpu(KERNELS, asked, stores, bits, takes=bits.turn != LAST, launch=launch)

    calls = ({**drawn(**case, seen=place), "positions": torch.tensor([place])} for place in at)
    return worst_of([*calls], turns, run)


def prompt_by_prompt(case: dict[str, Any]) -> tuple[float, bool]:
    launch, spans = case.pop("launch", PROMPT_TILE), case.pop("spans", ((0, 5), (5, 90), (90, 92), (92, 160)))
    turns, asking, most = case.pop("turns", (ALONE,)), case.pop("asking", 0), case.pop("most", 1 << 30)

    def run(asked: Any, stores: Any, bits: Any) -> Tensor:
        writes = bits.turn in (ALONE, LAST)
        return rows_on_gpu(KERNELS, asked, stores, bits, writes=writes, launch=launch, most_bytes=most)

    def called(begin: int, end: int) -> dict[str, Any]:
        given = drawn(**case, seen=begin)
        sizes = (given[name].shape for name in ("key", "query", "value"))
        (batch, groups, _, width), (_, heads, _, _), (*_, value_width) = sizes
        count, dtype = end - begin, given["query"].dtype
        given |= rows(batch, groups, heads // groups, count, width, value_width, dtype)
        given["query"] = given["query"][:, :, -asking:]
        return {**given, "positions": torch.arange(begin, end)}

    return worst_of([called(*span) for span in spans], turns, run)


def main(names: Sequence[str]) -> None:
    found = {}
    for number, (name, case) in enumerate({**CASES, **PROMPTS}.items()):
        if not names or name in names:
            torch.manual_seed(number)
            found[name] = prompt_by_prompt(case) if name in PROMPTS else token_by_token(case)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
