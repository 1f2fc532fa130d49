"""Stores of rounded keys and values: codes by hand, steps against whole sequences, what is refused."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from graphopt.decoding.masks import MaskSpec
from graphopt.decoding.stores import SiteSpec
from graphopt_kernels.attend_quant import FIRST, LAST, MIDDLE
from graphopt_kernels.cache_codes import (
    pack_codes,
    read_keys,
    read_values,
    round_keys,
    round_values,
    rounded_keys,
    rounded_values,
    unpack_codes,
    words_of,
)
from graphopt_kernels.quant_store import Quant

attend = torch.ops.graphopt.attend_quant
BATCH, HEADS, FEW, WIDTH, VALUE, PLACES = 2, 4, 2, 8, 12, 170

SITE = SiteSpec(HEADS, FEW, WIDTH, VALUE, torch.float32, MaskSpec(padding=True), 0.4)


def drawn(rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (BATCH, HEADS, rows, WIDTH), (BATCH, FEW, rows, WIDTH), (BATCH, FEW, rows, VALUE)
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


def stores(store: Quant, site: SiteSpec = SITE, places: int = PLACES) -> list[Tensor]:
    # More sequences than a call has: the rest must stay as it is.
    return [torch.zeros(shape, dtype=dtype) for shape, dtype in store.tensors(site, 3, places).values()]


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("count", [32, 12, 80])
def test_codes_come_back_from_words(bits: int, count: int) -> None:
    codes = torch.randint(1 << bits, (3, count), generator=torch.Generator().manual_seed(bits))
    words = pack_codes(codes, bits)
    assert words.dtype is torch.int32 and words.shape == (3, words_of(bits, count))
    assert torch.equal(unpack_codes(words, bits, count).long(), codes)
    number = sum(
        int(word) % (1 << 32) << (32 * i) for i, word in enumerate(words[0, : -(-count // (32 // 4))])
    )
    if bits == 4:
        assert [number >> (4 * i) & 15 for i in range(count)] == codes[0].tolist()


def test_words_are_no_more_than_bits() -> None:
    assert [words_of(bits, 32) for bits in (8, 4, 3, 2)] == [8, 4, 3, 2]
    assert [words_of(bits, 64) for bits in (8, 4, 3, 2)] == [16, 8, 6, 4]


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_rounding_is_within_half_a_step(bits: int) -> None:
    _, keys, values = drawn(64, bits)
    words, scales = round_keys(keys.unflatten(2, (2, 32)), bits)
    read = read_keys(words, scales, bits, 32, torch.float32).flatten(2, 3)
    assert torch.equal(read, rounded_keys(keys, bits, 32))
    step = scales[:, :, :, :1].float().expand(-1, -1, -1, 32, -1).flatten(2, 3)
    assert ((read - keys).abs() <= 0.51 * step + 2e-3).all()
    words, scales = round_values(values, bits, 8)
    read = read_values(words, scales, bits, VALUE, 8, torch.float32)
    assert torch.equal(read, rounded_values(values, bits, 8))
    assert (
        (read - values).abs()
        <= 0.51 * scales[..., :1, :].float().repeat_interleave(8, -1)[..., 0, :VALUE] + 2e-3
    ).all()


def test_equal_numbers_are_kept_as_they_are() -> None:
    keys = torch.full((1, 1, 32, 4), -2.5)
    assert torch.equal(rounded_keys(keys, 2, 32), keys)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"padded": 3},
    "window": {"window": 70},
    "short-window": {"window": 40, "padded": 1},
    "all": {"slopes": True, "padded": 5, "sinks": True, "softcap": 3.0, "window": 90},
}
STORES = {
    "4": Quant(group=8),
    "3-2": Quant(key_bits=3, value_bits=2, residual=64),
    "8-64": Quant(bits=8, block=64, residual=64, group=12),
}
PARTS = {
    "whole": [PLACES],
    "parts": [7, 60, 1, 1, 40, 33, 28],
    "prompt": [90, *[1] * 80],
}


def extras(case: dict[str, Any]) -> tuple[SiteSpec, Tensor | None, Tensor | None, Tensor | None]:
    valid = None
    if "padded" in case:
        valid = torch.ones(3, PLACES, dtype=torch.bool)
        valid[1, : case["padded"]] = False
    slopes = torch.tensor([0.05, 0.025, 0.0125, 0.00625]) if "slopes" in case else None
    sinks = torch.tensor([0.3, -1.0, 2.0, 0.0]) if "sinks" in case else None
    site = replace(SITE, mask=MaskSpec(window=case.get("window", 0)), softcap=case.get("softcap", 0.0))
    return site, valid, slopes, sinks


def in_parts(store: Quant, parts: list[int], held: list[Tensor], case: dict[str, Any]) -> Tensor:
    """Rows taken in a few at a time, as a prompt and the tokens behind it are."""
    site, valid, slopes, sinks = extras(case)
    query, key, value = drawn(sum(parts))
    made, start = [], 0
    for count in parts:
        rows = slice(start, start + count)
        made.append(
            attend(
                query[:, :, rows], key[:, :, rows], value[:, :, rows], *held,
                torch.arange(start, start + count), valid, slopes, sinks, site.scale, site.softcap,
                site.mask.window, PLACES, *store.constants(site),
            )
        )  # fmt: skip
        start += count
    return torch.cat(made, 2)


QUICK = (("plain", "8-64"), ("padding", "3-2"), ("short-window", "4"), ("all", "4"))


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, marks=() if (case, name) in QUICK else pytest.mark.slow)
        for case, name in itertools.product(CASES, STORES)
        if (case, name) != ("short-window", "3-2") and (case, name) != ("short-window", "8-64")
    ],
)
def test_rows_in_parts_give_what_whole_sequences_give(case: str, name: str) -> None:
    store, given = STORES[name], CASES[case]
    site, valid, slopes, sinks = extras(given)
    assert store.refuses(site, PLACES) is None
    known = None if valid is None else valid[:BATCH]
    expected = store.whole(site, *drawn(PLACES), known, slopes, sinks)
    left: list[Tensor] = []
    for parts in PARTS.values():
        held = stores(store, site)
        found = in_parts(store, parts, held, given)
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found, expected, atol=3e-6, rtol=1e-5)
        assert not any(tensor[BATCH:].any() for tensor in held)
        assert all(map(torch.equal, held, left or held))
        left = held


def test_the_newest_are_exact_and_others_rounded_by_row() -> None:
    store = Quant(bits=2, residual=64)
    query, key, value = drawn(PLACES)
    made = store.whole(SITE, query, key, value, None, None, None)
    plain = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.4, enable_gqa=True
    )
    off = (made - plain).abs().amax((0, 1, 3))
    assert off[:64].max() < 1e-5 and off[64:].min() > 1e-3


def test_sites_that_share_read_the_same_and_write_once() -> None:
    store, window = Quant(group=8), {"window": 50}
    site, *_ = extras(window)
    query, key, value = drawn(PLACES)
    alone, shared = stores(store, site), stores(store, site)
    start = 0
    for count in PARTS["parts"]:
        rows = slice(start, start + count)
        given = query[:, :, rows], key[:, :, rows], value[:, :, rows]
        rest = torch.arange(start, start + count), None, None, None, 0.4, 0.0, 50, PLACES
        expected = attend(*given, *alone, *rest, *store.constants(site))
        for turn in (FIRST, MIDDLE, LAST):
            made = attend(*given, *shared, *rest, *store.constants(replace(site, turn=turn)))
            torch.testing.assert_close(made, expected, atol=1e-6, rtol=1e-5)
        assert all(map(torch.equal, shared, alone))
        start += count


@pytest.mark.parametrize("rows", [1, 40])
def test_the_operator_is_what_it_declares(rows: int) -> None:
    site, valid, slopes, sinks = extras(CASES["all"])
    store = STORES["4"]
    opcheck(
        attend.default,
        (
            *drawn(rows), *stores(store, site), torch.arange(rows), valid, slopes, sinks, site.scale,
            site.softcap, site.mask.window, PLACES, *store.constants(site),
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("index", "value", "text"),
    [
        (1, None, "rows that were rounded already"),
        (3, torch.zeros(3, 2, 4, 8), "codes have shapes [3, 2, 4, 8]"),
        (4, torch.zeros(3, 2, 5, 2, 9), "key_scales has shape [3, 2, 5, 2, 9]: expected [3, 2, 5, 2, 8]"),
        (6, torch.zeros(3, 2, 160, 2, 1), "value_scales has shape [3, 2, 160, 2, 1]: expected [3, 2, 160,"),
        (7, torch.zeros(3, 2, 30, 8), "rings have 30 rows: expected a multiple of the 32"),
        (17, 5, "5 bits for keys: expected one of 2, 3, 4, 8"),
    ],
)  # fmt: skip
def test_what_the_operator_does_not_take_is_said(index: int, value: Any, text: str) -> None:
    store = STORES["4"]
    given = [
        *drawn(2), *stores(store), torch.arange(2), None, None, None, 0.4, 0.0, 0, PLACES,
        *store.constants(SITE),
    ]  # fmt: skip
    given[index] = value
    if index == 1:
        given[2] = None
    meta = [v.to("meta") if isinstance(v, Tensor) else v for v in given]
    with pytest.raises(ValueError, match=re.escape(f"attend_quant: {text}")):
        attend(*meta)


def test_a_row_that_is_taken_in_twice_changes_nothing() -> None:
    store, held = Quant(group=8), stores(Quant(group=8))
    query, key, value = drawn(PLACES)
    for row in range(100):
        at = slice(row, row + 1)
        given = query[:, :, at], key[:, :, at], value[:, :, at]
        rest = torch.tensor([row]), None, None, None, 0.4, 0.0, 0, PLACES, *store.constants(SITE)
        first = attend(*given, *held, *rest)
        if row < 60:
            continue
        before = [tensor.clone() for tensor in held]
        assert torch.equal(attend(*given, *held, *rest), first)
        assert all(map(torch.equal, held, before))


def test_bytes_are_counted() -> None:
    # Position 191 is the last of block 5, with 32 exact ones.
    shapes = Quant().tensors(SITE, 1, 191)
    assert shapes["key_codes"][0] == (1, 2, 5, 4, 8) and shapes["value_codes"][0] == (1, 2, 160, 2)
    assert Quant().tensors(SITE, 1, 192)["key_codes"][0][2] == 6
    wide = replace(SITE, key_width=64, value_width=64, dtype=torch.bfloat16, mask=MaskSpec())
    dense = 2 * 2 * 4096 * 64 * 2
    share = {
        bits: Quant(bits=bits).stored_bytes(wide, 1, 4096) / dense
        for bits in (8, 4, 3, 2)
    }  # fmt: skip
    # bits / 16, one scale and zero in 4 bytes for 32 codes of 2 bytes, 32 exact rows of 4096.
    for bits, found in share.items():
        assert found == pytest.approx(bits / 16 + 1 / 16 + 32 / 4096)
    assert Quant().stored_bytes(replace(SITE, shares=True), 1, 192) == 0


@pytest.mark.parametrize(
    ("store", "mask", "text"),
    [
        (Quant(bits=5), MaskSpec(), "5 bits: expected 2, 3, 4, 8"),
        (Quant(block=48), MaskSpec(), "block=48, group=32: expected a multiple of 32 positions"),
        (Quant(residual=48), MaskSpec(), "residual=48: expected a multiple of block=32"),
        (Quant(residual=256), MaskSpec(), "the newest 256 positions are kept as they are, and 170 are read"),
        (Quant(residual=128), MaskSpec(window=90), "the newest 128 positions are kept as they are, and 90"),
    ],
)
def test_stores_say_when_they_do_not_serve(store: Quant, mask: MaskSpec, text: str) -> None:
    assert text in str(store.refuses(replace(SITE, mask=mask), PLACES))


def test_windows_keep_the_blocks_that_they_reach() -> None:
    store = Quant()
    for window, capacity in itertools.product((60, 96, 97, 500), (170, 4096)):
        site = replace(SITE, mask=MaskSpec(window=window))
        blocks = store.tensors(site, 1, capacity)["key_codes"][0][2]
        needed = max(
            row // 32 - 1 - max(row - window + 1, 0) // 32 + 1 for row in range(32, min(capacity, 1200))
        )
        assert needed <= blocks <= needed + 1, (window, capacity)
