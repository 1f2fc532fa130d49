"""Attention over the rows of a source, and with a bias of distances: against loops, what it takes, what it
refuses."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from graphopt import _torch
from graphopt.decoding.masks import MaskSpec
from graphopt.decoding.stores import SiteSpec
from graphopt_cost_model.attend_cost import attend_phases, attend_workspace
from graphopt_cost_model.call import call_of
from graphopt_cost_model.phases import phases_of
from graphopt_cost_model.stated_workspace import stated_workspace
from graphopt_kernels.cache_stores import Cross, Full, Relative
from tests.cost_graphs import call_node

ops = torch.ops.graphopt
BATCH, HEADS, FEW, WIDTH, VALUE, PLACES = 2, 4, 2, 8, 6, 12


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def stores(places: int = PLACES, width: int = VALUE) -> tuple[Tensor, Tensor]:
    return drawn(3, FEW, places, WIDTH), drawn(3, FEW, places, width, seed=1)


def by_loops(query: Tensor, keys: Tensor, values: Tensor, added: Tensor, sinks: Tensor | None) -> Tensor:
    """Each row by itself, ``added`` [B, H, n, L] to scores of half size, -inf where nothing is read."""
    made = torch.zeros(*query.shape[:3], VALUE, dtype=torch.float64)
    for b in range(query.shape[0]):
        for h in range(HEADS):
            group = h // (HEADS // FEW)
            for row in range(query.shape[2]):
                scores = 0.5 * keys[b, group].double() @ query[b, h, row].double() + added[b, h, row]
                weights = scores.exp()
                total = weights.sum() + (math.exp(float(sinks[h])) if sinks is not None else 0.0)
                made[b, h, row] = weights @ values[b, group].double() / total
    return made


def cross(query: Tensor, held: tuple[Tensor, Tensor], end: int, **changes: Any) -> tuple[Any, ...]:
    """Arguments of ``attend_cross`` over a source whose last row is ``end``."""
    values = {
        "query": query, "key": None, "value": None, "key_store": held[0], "value_store": held[1],
        "positions": torch.tensor([end]), "valid": None, "slopes": None, "sinks": None, "scale": 0.5,
        "softcap": 0.0, "window": 0, "length": held[0].shape[2],
    }  # fmt: skip
    return tuple((values | changes).values())


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("case", ["whole", "masked", "sinks"])
def test_all_rows_of_the_source_that_count_are_read(case: str, rows: int) -> None:
    query, held = drawn(BATCH, HEADS, rows, WIDTH), stores()
    valid = torch.ones(3, PLACES, dtype=torch.bool)
    valid[1, 4:] = False
    valid[0, 2] = False
    shown = valid[:BATCH, :8] if case == "masked" else torch.ones(BATCH, 8, dtype=torch.bool)
    sinks = drawn(HEADS) if case == "sinks" else None
    before = [store.clone() for store in held]
    made = ops.attend_cross(
        *cross(query, held, 7, valid=valid if case == "masked" else None, sinks=sinks)
    )
    added = torch.zeros(BATCH, HEADS, rows, 8).masked_fill(~shown[:, None, None], float("-inf"))
    expected = by_loops(query, held[0][:, :, :8], held[1][:, :, :8], added, sinks)
    torch.testing.assert_close(made.double(), expected, atol=1e-6, rtol=1e-5)
    assert all(torch.equal(*pair) for pair in zip(before, held, strict=True))


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("count", [1, 3])
def test_what_is_added_goes_by_how_far_a_key_is(count: int, window: int) -> None:
    query, held, table = drawn(BATCH, HEADS, count, WIDTH), stores(), drawn(HEADS, PLACES)
    key, value = drawn(BATCH, FEW, count, WIDTH), drawn(BATCH, FEW, count, VALUE)
    positions = torch.arange(9 - count, 9)
    valid = torch.ones(3, PLACES, dtype=torch.bool)
    valid[1, :5] = False
    made = ops.attend_relative(
        query, key, value, *held, positions, valid, None, None, 0.5, 0.0, window, PLACES, table
    )
    assert torch.equal(held[0][:BATCH, :, positions], key)
    assert torch.equal(held[1][:BATCH, :, positions], value)
    distance = positions[:, None] - torch.arange(9)
    read = (distance >= 0) & (distance < (window or PLACES)) & valid[:BATCH, None, :9]
    added = table[:, distance.clamp(min=0)].expand(BATCH, -1, -1, -1)
    added = added.masked_fill(~read[:, None], float("-inf"))
    expected = by_loops(query, held[0][:, :, :9], held[1][:, :, :9], added, None)
    torch.testing.assert_close(made.double(), expected, atol=1e-6, rtol=1e-5)


def relative(rows: int, places: int = PLACES, width: int = VALUE, **changes: Any) -> tuple[Any, ...]:
    """Arguments of ``attend_relative`` for the last ``rows`` of ``places`` positions."""
    key_store, value_store = stores(places, width)
    values = {
        "query": drawn(BATCH, HEADS, rows, WIDTH), "key": drawn(BATCH, FEW, rows, WIDTH),
        "value": drawn(BATCH, FEW, rows, width), "key_store": key_store, "value_store": value_store,
        "positions": torch.arange(places - rows, places), "valid": None, "slopes": None, "sinks": None,
        "scale": 0.5, "softcap": 0.0, "window": 0, "length": places, "table": drawn(HEADS, places),
    }  # fmt: skip
    return tuple((values | changes).values())


def test_both_are_operators_as_torch_wants_them() -> None:
    opcheck(ops.attend_cross.default, cross(drawn(BATCH, HEADS, 2, WIDTH), stores(), 5))
    opcheck(ops.attend_relative.default, relative(2))


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("attend_cross", {"key": drawn(2, FEW, 1, WIDTH)}, "keys and values are given: those of a source"),
        ("attend_cross", {"window": 3}, "slopes or a window are given: a source is read whole"),
        ("attend_cross", {"positions": torch.tensor([1, 2])}, "positions are [2]: expected [1], the last"),
        ("attend_relative", {"slopes": drawn(HEADS)}, "slopes are given: what is added by distance"),
        ("attend_relative", {"table": drawn(2, PLACES)}, "the table is torch.float32 [2, 12]: expected"),
        ("attend_relative", {"table": drawn(HEADS, 9)}, "the table has 9 distances, the stores 12 pos"),
    ],
)
def test_other_arguments_are_refused(name: str, changes: dict[str, Any], text: str) -> None:
    if name == "attend_cross":
        given = cross(drawn(BATCH, HEADS, 3, WIDTH), stores(), 5, **changes)
    else:
        given = relative(1, **changes)
    meta = [value.to("meta") if isinstance(value, Tensor) else value for value in given]
    with pytest.raises(ValueError, match=re.escape(f"{name}: ") + ".*" + re.escape(text)):
        getattr(ops, name)(*meta)


@pytest.mark.parametrize("rows", [1, 200, 512])
@pytest.mark.parametrize("name", ["attend_cross", "attend_relative", "masked"])
def test_what_calls_take_is_what_is_said_of_them(name: str, rows: int) -> None:
    if name == "attend_relative":
        arguments = relative(rows, 512, WIDTH, valid=torch.ones(3, 512, dtype=torch.bool))
    else:
        valid = torch.ones(3, 512, dtype=torch.bool) if name == "masked" else None
        arguments = cross(drawn(BATCH, HEADS, rows, WIDTH), stores(512, WIDTH), 511, valid=valid)
        name = "attend_cross"
    op = getattr(ops, name).default
    call = call_of(call_node(op, arguments, torch.empty(BATCH, HEADS, rows, WIDTH)))
    (phase,) = phases_of(call)
    assert (phase,) == attend_phases(call)
    stored = BATCH * FEW * (WIDTH + WIDTH) * 4
    new = stored * rows if name == "attend_relative" else 0
    assert phase.read == BATCH * HEADS * rows * WIDTH * 4 + 512 * stored + new
    op(*arguments)
    live = most = 0
    for change in _torch.record_allocations(lambda: op(*arguments)):
        live += change
        most = max(most, live)
    taken = most - BATCH * HEADS * rows * WIDTH * 4
    predicted = stated_workspace(call)
    assert predicted == attend_workspace(call)
    assert taken <= predicted
    if rows > 1:
        assert predicted <= 1.5 * taken


def test_stores_are_for_the_sites_that_they_say() -> None:
    spec = SiteSpec(HEADS, FEW, WIDTH, VALUE, torch.float32, MaskSpec(), 0.5)
    assert str(Relative().refuses(spec, 64)) == "nothing is added to scores by distance"
    assert (Cross.crosses, Full.crosses, Full.adds_biases, Relative.adds_biases) == (True, False, False, True)
    source = SiteSpec(HEADS, FEW, WIDTH, VALUE, torch.float32, MaskSpec(source=True), 0.5, source=20)
    assert Cross().tensors(source, 3, 64)["key"] == ((3, FEW, 20, WIDTH), torch.float32)
    assert Cross().stored_bytes(source, 3, 64) == 3 * FEW * 20 * (WIDTH + VALUE) * 4
