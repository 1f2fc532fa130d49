"""The kernel of ``graphopt_kernels.rotary_stores`` in Triton's interpreter; prints its errors beside float64.

Run by ``tests/test_rotary_stores.py``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt_kernels.rotary_stores import StoresLaunch, stores_rows

FP16, FP32, FP64 = torch.float16, torch.float32, torch.float64
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "normed": {"norm": True, "dtype": FP16},
    "a part, neighbours": {"width": 6, "interleaved": True, "norm": True, "size": 12},
    "a part, other values": {"width": 8, "size": 24, "value_size": 20, "launch": StoresLaunch(4, 1, 4, 16)},
    "tables of pairs, of samples": {"halved": True, "shared": False, "interleaved": True},
    "a ring": {"ring": True, "rows": 1, "positions": [19], "launch": StoresLaunch(1, 1, 8, 1)},
    "stores of another dtype": {"held": FP16, "norm": True},
    "weights of keys alone": {"norm": True, "unweighted": True},
}  # fmt: skip


def drawn(
    *,
    dtype: torch.dtype = FP32,
    held: torch.dtype | None = None,
    rows: int = 2,
    size: int = 16,
    value_size: int = 16,
    width: int = 16,
    interleaved: bool = False,
    norm: bool = False,
    unweighted: bool = False,
    halved: bool = False,
    shared: bool = True,
    ring: bool = False,
    positions: list[int] | None = None,
    heads: int = 3,
    groups: int = 2,
    slots: int = 7,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of the operator: queries, keys and values out of one projection."""
    torch.manual_seed(seed)
    batch, sizes = 2, [heads * size, groups * size, groups * value_size]
    packed = torch.randn(batch, rows, sum(sizes)).to(dtype).split(sizes, -1)
    query, key, value = (
        part.unflatten(-1, (-1, each)).transpose(1, 2)
        for part, each in zip(packed, (size, size, value_size), strict=True)
    )
    table = (*(() if shared else (batch,)), rows, width // 2 if halved else width)
    weights = [torch.randn(size).to(dtype) if norm else None for _ in range(2)]
    return {
        "query": query, "key": key, "value": value,
        "key_store": torch.randn(batch + 1, groups, slots, size).to(held or dtype),
        "value_store": torch.randn(batch + 1, groups, slots, value_size).to(held or dtype),
        "positions": torch.tensor(positions or [5, 0][:rows]),
        "cos": torch.randn(table), "sin": torch.randn(table),
        "query_weight": None if unweighted else weights[0], "key_weight": weights[1], "width": width,
        "interleaved": interleaved, "eps": 1e-5 if norm else None, "weight_offset": 0.5 if norm else 0.0,
        "ring": ring,
    }  # fmt: skip


def exactly(given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Turned queries and both stores as they are to be, in float64."""
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}
    wide["key_store"], wide["value_store"] = wide["key_store"].clone(), wide["value_store"].clone()
    turned = []
    for name in ("query", "key"):
        x = wide[name]
        if given["eps"] is not None:
            x = x / (x.pow(2).mean(-1, keepdim=True) + given["eps"]).sqrt()
            weight = wide[f"{name}_weight"]
            x = x if weight is None else x * (weight + given["weight_offset"])
        width = given["width"]
        front, rest = x[..., :width], x[..., width:]
        tables = [wide[name] for name in ("cos", "sin")]
        tables = [table if table.dim() == 2 else table[:, None] for table in tables]
        if given["interleaved"]:
            if tables[0].shape[-1] != width:
                tables = [table.repeat_interleave(2, -1) for table in tables]
            other = torch.stack((-front[..., 1::2], front[..., 0::2]), -1).flatten(-2)
        else:
            if tables[0].shape[-1] != width:
                tables = [torch.cat((table, table), -1) for table in tables]
            other = torch.cat((-front[..., width // 2 :], front[..., : width // 2]), -1)
        turned.append(torch.cat((front * tables[0] + other * tables[1], rest), -1))
    places = given["positions"] % given["key_store"].shape[2] if given["ring"] else given["positions"]
    batch = given["query"].shape[0]
    for store, rows in (("key_store", turned[1]), ("value_store", wide["value"])):
        for row, place in enumerate(places.tolist()):
            wide[store][:batch, :, place] = rows[:, :, row]
    return turned[0], wide["key_store"], wide["value_store"]


def main(names: Sequence[str]) -> None:
    from graphopt_kernels import rotary_stores_triton as kernels

    errors = {}
    for number, (name, case) in enumerate(CASES.items()):
        if names and name not in names:
            continue
        launch = case.pop("launch", None)
        given = drawn(**case, seed=number)
        expected = exactly(given)
        found = stores_rows(kernels, *given.values(), launch=launch)
        assert found.dtype is given["query"].dtype and found.is_contiguous()
        made = (found, given["key_store"], given["value_store"])
        pairs = zip(made, expected, strict=True)
        errors[name] = [float((found.double() - right).norm() / right.norm()) for found, right in pairs]
    # A position that has no place: nothing is written, and what asks is no number.
    for positions in ([7, 2], [-1, 2]):
        given = drawn(positions=positions)
        stores = [given[name].clone() for name in ("key_store", "value_store")]
        found = stores_rows(kernels, *given.values())
        assert found[:, :, 0].isnan().all() and not found[:, :, 1].isnan().any()
        for before, name in zip(stores, ("key_store", "value_store"), strict=True):
            same = (before == given[name]).flatten(3).all(3)[:2].all(0).all(0)
            assert same.tolist() == [slot != 2 for slot in range(7)], (positions, same)
    print(json.dumps({"errors": errors}))


if __name__ == "__main__":
    main(sys.argv[1:])
