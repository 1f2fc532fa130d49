"""What attention over stores costs: stores read once, rows written, memory beside the output."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphopt import _torch
from graphopt.decoding.masks import MaskSpec
from graphopt.decoding.stores import SiteSpec
from graphopt_cost_model.attend_cost import attend_phases, attend_workspace
from graphopt_cost_model.call import call_of
from graphopt_cost_model.phases import phases_of
from graphopt_cost_model.stated_workspace import stated_workspace
from graphopt_kernels.cache_stores import Full, Ring
from graphopt_kernels.joint_known import joint_store
from tests.cost_graphs import call_node

assert Full.attend_op and Ring.attend_op, "importing them registers the operators"
ops = torch.ops.graphopt
FULL, RING = ops.attend_full.default, ops.attend_ring.default
BATCH, HEADS, FEW, WIDTH = 2, 4, 2, 16


def given(op: Any, rows: int, places: int, **changes: Any) -> tuple[Any, ...]:
    slots = 64 if op is RING else places
    values = {
        "query": torch.randn(BATCH, HEADS, rows, WIDTH), "key": torch.randn(BATCH, FEW, rows, WIDTH),
        "value": torch.randn(BATCH, FEW, rows, WIDTH), "key_store": torch.zeros(3, FEW, slots, WIDTH),
        "value_store": torch.zeros(3, FEW, slots, WIDTH), "positions": torch.arange(places - rows, places),
        "valid": torch.ones(3, places, dtype=torch.bool), "slopes": None, "sinks": None, "scale": 0.25,
        "softcap": 0.0, "window": 64 if op is RING else 0, "length": places,
    }  # fmt: skip
    return tuple((values | changes).values())


def call(op: Any, arguments: tuple[Any, ...]) -> Any:
    output = torch.empty(BATCH, HEADS, arguments[0].shape[2], WIDTH)
    return call_of(call_node(op, arguments, output))


def test_stores_of_these_sequences_are_read_once_and_rows_written() -> None:
    (phase,) = attend_phases(call(FULL, given(FULL, 1, 512)))
    row = BATCH * FEW * 2 * WIDTH * 4
    query = BATCH * HEADS * WIDTH * 4
    assert phase.flops == 2 * BATCH * HEADS * 512 * 2 * WIDTH
    assert phase.read == query + 512 * row + row and phase.written == query + row
    (shared,) = attend_phases(call(FULL, given(FULL, 1, 512, key=None, value=None)))
    assert shared.read == query + 512 * row and shared.written == query
    (short,) = attend_phases(call(FULL, given(FULL, 1, 512, length=100)))
    assert short.read == query + 100 * row + row
    (ring,) = phases_of(call(RING, given(RING, 1, 512)))
    assert ring.read == query + 64 * row + row


def test_on_a_gpu_parts_are_written_and_added_up() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        values = [
            torch.empty_like(x, device="cuda") if isinstance(x, torch.Tensor) else x
            for x in given(FULL, 1, 32768)
        ]
        output = torch.empty(BATCH, HEADS, 1, WIDTH, device="cuda")
        attending, merging = attend_phases(call_of(call_node(FULL, tuple(values), output)))
    parts = 264 // (BATCH * FEW)
    row = BATCH * FEW * 2 * WIDTH * 4
    assert merging.read == BATCH * HEADS * parts * (WIDTH + 1) * 4
    assert attending.written == row + merging.read and merging.written == BATCH * HEADS * WIDTH * 4
    assert attending.read == BATCH * HEADS * WIDTH * 4 + 32769 * row


CASES: dict[str, dict[str, Any]] = {
    "plain": {}, "unpadded": {"valid": None}, "slopes": {"slopes": torch.ones(HEADS)},
    "sinks": {"sinks": torch.ones(HEADS)}, "softcap": {"softcap": 5.0},
}  # fmt: skip


@pytest.mark.parametrize("rows", [1, 200, 512])
@pytest.mark.parametrize("op", [FULL, RING], ids=["full", "ring"])
@pytest.mark.parametrize("case", CASES)
def test_memory_beside_the_output_is_what_is_taken(case: str, op: Any, rows: int) -> None:
    arguments = given(op, rows, 512, **CASES[case])
    op(*arguments)
    live = most = 0
    for change in _torch.record_allocations(lambda: op(*arguments)):
        live += change
        most = max(most, live)
    taken = most - BATCH * HEADS * rows * WIDTH * 4
    predicted = stated_workspace(call(op, arguments))
    assert predicted == attend_workspace(call(op, arguments))
    assert taken <= predicted
    if rows > 1:
        # One row takes next to nothing, and less than is said of the places of keys.
        assert predicted <= 1.5 * taken


JOINT = (
    "merged{block=32,keep=2}", "merged{block=32,keep=2,bits=4}",
    "shared-basis{block=32,key_rank=60,value_rank=60}",
    "shared-basis{block=32,bits=2,key_rank=60,value_rank=60}",
)  # fmt: skip


@pytest.mark.parametrize("member", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize("places", [512, 4096])
@pytest.mark.parametrize("text", JOINT)
def test_joint_stores_take_what_is_said(
    text: str, places: int, rows: int, dtype: torch.dtype, member: int
) -> None:
    store = joint_store(text)
    site = SiteSpec(HEADS, FEW, WIDTH, WIDTH, dtype, MaskSpec(), 0.25, members=2, member=member)
    bases = [torch.randn(shape, dtype=kind) for shape, kind in store.fitted(site).values()] or [None, None]
    held = [torch.zeros(shape, dtype=kind) for shape, kind in store.tensors(site, 3, places).values()]
    query, key, value = (torch.randn(BATCH, n, rows, WIDTH, dtype=dtype) for n in (HEADS, FEW, FEW))
    arguments = (
        query, key, value, *held, torch.arange(places - rows, places),
        torch.ones(3, places, dtype=torch.bool), None, None, 0.25, 0.0, 0, places, *bases, text, member,
    )  # fmt: skip
    op = ops.attend_joint.default
    op(*arguments)
    live = most = 0
    for change in _torch.record_allocations(lambda: op(*arguments)):
        live += change
        most = max(most, live)
    taken = most - query.nbytes
    predicted = stated_workspace(call_of(call_node(op, arguments, torch.empty(query.shape, dtype=dtype))))
    assert predicted is not None and taken <= predicted <= 2.5 * taken
