"""Attention over stores: against loops over rows and keys, in parts and whole, and what it refuses."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from graphopt.decoding.masks import MaskSpec
from graphopt.decoding.stores import SiteSpec
from graphopt_kernels.cache_stores import Full, Ring

ops = torch.ops.graphopt
BATCH, HEADS, FEW, WIDTH, VALUE, PLACES = 2, 4, 2, 8, 6, 12


def drawn(rows: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (BATCH, HEADS, rows, WIDTH), (BATCH, FEW, rows, WIDTH), (BATCH, FEW, rows, VALUE)
    query, key, value = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return query, key, value


def stores(places: int = PLACES, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    # More sequences than a call has: the rest must stay as it is.
    return torch.zeros(3, FEW, places, WIDTH, dtype=dtype), torch.zeros(3, FEW, places, VALUE, dtype=dtype)


def by_loops(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, slopes: Tensor | None,
    sinks: Tensor | None, scale: float, softcap: float, window: int,
) -> Tensor:  # fmt: skip
    """Each number by itself, in Python's arithmetic; rows whose own key is padding are left at 0."""
    rows = query.shape[2]
    made = torch.zeros(BATCH, HEADS, rows, VALUE, dtype=torch.float64)
    for b in range(BATCH):
        for h in range(HEADS):
            group = h // (HEADS // FEW)
            for row in range(rows):
                if valid is not None and not valid[b, row]:
                    continue
                terms: list[tuple[float, Tensor]] = []
                for k in range(row + 1):
                    if (window and k <= row - window) or (valid is not None and not valid[b, k]):
                        continue
                    score = scale * float(query[b, h, row].double() @ key[b, group, k].double())
                    score = softcap * math.tanh(score / softcap) if softcap else score
                    if slopes is not None:
                        place = k if valid is None else int(valid[b, :k].sum())
                        score += float(slopes[h]) * place
                    terms.append((math.exp(score), value[b, group, k].double()))
                total = sum(weight for weight, _ in terms)
                total += math.exp(float(sinks[h])) if sinks is not None else 0.0
                made[b, h, row] = sum((weight / total * v for weight, v in terms), torch.zeros(VALUE))
    return made


CASES: dict[str, dict[str, Any]] = {
    "plain": {}, "padding": {"padded": 3}, "window": {"window": 4}, "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True}, "slopes": {"slopes": True}, "slopes-padding": {"slopes": True, "padded": 2},
    "all": {"slopes": True, "padded": 1, "sinks": True, "softcap": 3.0, "window": 5},
}  # fmt: skip


def arguments(case: dict[str, Any]) -> dict[str, Any]:
    valid = None
    if "padded" in case:
        valid = torch.ones(3, PLACES, dtype=torch.bool)
        valid[1, : case["padded"]] = False
    return {
        "valid": valid,
        "slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625]) if "slopes" in case else None,
        "sinks": torch.tensor([0.3, -1.0, 2.0, 0.0]) if "sinks" in case else None,
        "scale": 0.4,
        "softcap": case.get("softcap", 0.0),
        "window": case.get("window", 0),
    }


def in_parts(op: Any, parts: list[int], held: tuple[Tensor, Tensor], given: dict[str, Any]) -> Tensor:
    """Rows taken in a few at a time, as a prompt and the tokens behind it are."""
    query, key, value = drawn(sum(parts))
    made, start = [], 0
    for count in parts:
        rows = slice(start, start + count)
        made.append(
            op(
                query[:, :, rows], key[:, :, rows], value[:, :, rows], *held,
                torch.arange(start, start + count), *given.values(), PLACES,
            )
        )  # fmt: skip
        start += count
    return torch.cat(made, 2)


@pytest.mark.parametrize("parts", [[11], [5, 1, 1, 1, 3]], ids=["whole", "parts"])
@pytest.mark.parametrize("case", CASES)
def test_full_stores_give_what_loops_give(case: str, parts: list[int]) -> None:
    given = arguments(CASES[case])
    held = stores()
    found = in_parts(ops.attend_full, parts, held, given)
    expected = by_loops(*drawn(11), *given.values())
    rows = torch.ones(BATCH, 11, dtype=torch.bool) if given["valid"] is None else given["valid"][:BATCH, :11]
    shown = rows[:, None, :, None]
    torch.testing.assert_close(found.double() * shown, expected * shown, atol=2e-6, rtol=1e-5)
    assert torch.isfinite(found).all()
    for store, new in zip(held, drawn(11)[1:], strict=True):
        assert torch.equal(store[:BATCH, :, :11], new)
    assert not held[0][BATCH:].any() and not held[0][:, :, 11:].any()


@pytest.mark.parametrize("parts", [[11], [2, 6, 1, 1, 1], [1] * 11], ids=["whole", "parts", "single"])
@pytest.mark.parametrize("slots", [4, 6])
@pytest.mark.parametrize(
    "extra",
    [{}, {"padded": 3, "slopes": True}, {"sinks": True, "softcap": 2.0}],
    ids=["plain", "bias", "sinks"],
)
def test_rings_give_what_full_stores_give(extra: dict[str, Any], slots: int, parts: list[int]) -> None:
    given = arguments({**extra, "window": 4})
    expected = in_parts(ops.attend_full, parts, stores(), given)
    found = in_parts(ops.attend_ring, parts, stores(slots), given)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def test_what_is_beyond_the_length_is_not_read() -> None:
    query, key, value = drawn(1)
    held = stores()
    held[0].fill_(float("nan"))
    held[0][:, :, :5] = 0.0
    made = ops.attend_full(query, key, value, *held, torch.tensor([4]), None, None, None, 0.4, 0.0, 0, 5)
    assert torch.isfinite(made).all()


def test_a_site_that_shares_reads_what_another_wrote() -> None:
    query, key, value = drawn(3)
    held = stores()
    positions = torch.arange(3)
    given = (None, None, None, 0.4, 0.0, 0, PLACES)
    first = ops.attend_full(query, key, value, *held, positions, *given)
    before = held[0].clone()
    assert torch.equal(ops.attend_full(query, None, None, *held, positions, *given), first)
    assert torch.equal(held[0], before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_near_loops(dtype: torch.dtype) -> None:
    query, key, value = drawn(6, dtype)
    given = arguments({})
    made = ops.attend_full(query, key, value, *stores(dtype=dtype), torch.arange(6), *given.values(), PLACES)
    assert made.dtype is dtype
    # Weights are rounded to the dtype before they meet values of about 3.
    off = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(made.double(), by_loops(query, key, value, *given.values()), atol=off, rtol=0)


@pytest.mark.parametrize("name", ["attend_full", "attend_ring"])
@pytest.mark.parametrize("rows", [1, 3])
def test_operators_are_what_they_declare(name: str, rows: int) -> None:
    query, key, value = drawn(rows)
    given = arguments({"padded": 1, "slopes": True, "sinks": True, "window": 4})
    opcheck(
        getattr(ops, name).default,
        (query, key, value, *stores(), torch.arange(rows), *given.values(), PLACES),
    )


def _change(name: str, value: Any) -> dict[str, Any]:
    query, key, new = drawn(2)
    held = stores()
    given = {
        "query": query, "key": key, "value": new, "key_store": held[0], "value_store": held[1],
        "positions": torch.arange(2), "valid": None, "slopes": None, "sinks": None, "scale": 0.4,
        "softcap": 0.0, "window": 4, "length": PLACES,
    }  # fmt: skip
    return {**given, name: value}


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("query", torch.zeros(2, 4, 8), "the query has shape [2, 4, 8]: expected [batch, heads, rows, w"),
        ("query", torch.zeros(2, 3, 2, 8), "3 heads of queries do not share 2 heads of keys evenly"),
        ("query", torch.zeros(2, 4, 2, 9), "queries have 9 elements a head, the store of keys 8"),
        ("key", None, "keys and values come together: one of them is missing"),
        ("value", torch.zeros(2, 2, 2, 5), "the new value has shape [2, 2, 2, 5]: expected [2, 2, 2, 6]"),
        ("positions", torch.arange(3), "positions are torch.int64 [3]: expected torch.int64 of shape [2]"),
        ("valid", torch.zeros(3, 12), "valid is torch.float32 [3, 12]: expected torch.bool [batch, pos"),
        ("slopes", torch.zeros(3), "slopes have shape [3]: expected [4]"),
        ("sinks", torch.zeros(2), "sinks have shape [2]: expected [4]"),
    ],
)
def test_what_operators_do_not_take_is_said(name: str, value: Any, text: str) -> None:
    meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in _change(name, value).items()}
    with pytest.raises(ValueError, match=re.escape(f"attend_full: {text}")):
        ops.attend_full(*meta.values())


def test_rings_refuse_other_windows_and_what_is_written_already() -> None:
    for name, value, text in (
        ("window", 0, "the window is 0: expected 1 to 12, what the store holds"),
        ("window", 13, "the window is 13: expected 1 to 12, what the store holds"),
    ):
        meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in _change(name, value).items()}
        with pytest.raises(ValueError, match=re.escape(f"attend_ring: {text}")):
            ops.attend_ring(*meta.values())
    meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in _change("key", None).items()}
    with pytest.raises(ValueError, match="a ring that was written already has lost"):
        ops.attend_ring(*{**meta, "value": None}.values())


def site(**changes: Any) -> SiteSpec:
    given = {"heads": 8, "kv_heads": 2, "key_width": 16, "value_width": 8, "dtype": torch.bfloat16}
    return SiteSpec(**{**given, "mask": MaskSpec(window=64), "scale": 1.0, **changes})


def test_stores_say_what_they_take() -> None:
    assert Full().stored_bytes(site(), 3, 1000) == 3 * 2 * 1000 * (16 + 8) * 2
    assert Ring().stored_bytes(site(), 3, 1000) == 3 * 2 * 64 * (16 + 8) * 2
    assert Full().stored_bytes(site(shares=True), 3, 1000) == 0
    assert str(Full()) == "full" and str(Ring()) == "ring"


def test_rings_say_when_they_do_not_serve() -> None:
    assert Ring().refuses(site(), 1000) is None
    assert "rows of this site read all positions" in str(Ring().refuses(site(mask=MaskSpec()), 1000))
    assert "no less than the 64 positions" in str(Ring().refuses(site(), 64))
    assert "may read what a ring has lost" in str(Ring().refuses(site(shares=True), 1000))
