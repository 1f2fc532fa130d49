"""Rotary embeddings into the stores of a step: the operator, its kernel, its launches, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from graphopt_kernels.rotary_stores import (
    rotary_to_stores_reference,
    rotary_to_stores_supports,
    stores_launch,
    stores_rows,
)
from tests.interpreted import interpreted
from tests.rotary_stores_kernels import CASES, drawn, exactly

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
operator = torch.ops.graphopt.rotary_to_stores
DRAWN = {name: {k: v for k, v in case.items() if k != "launch"} for name, case in CASES.items()}


@pytest.mark.parametrize("case", DRAWN)
def test_queries_are_turned_and_keys_and_values_go_where_they_belong(case: str) -> None:
    given = drawn(**DRAWN[case])
    expected = exactly(given)
    found = operator(*given.values())
    assert found.dtype is given["query"].dtype and found.is_contiguous()
    narrow = FP16 in (given["query"].dtype, given["key_store"].dtype)
    for a, b in zip((found, given["key_store"], given["value_store"]), expected, strict=True):
        assert (a.double() - b).norm() <= (5e-4 if narrow else 1e-6) * b.norm()


def test_in_float64_it_is_exact_and_passes_opcheck() -> None:
    given = drawn(dtype=torch.float64, norm=True, width=8)
    given |= {name: given[name].double() for name in ("cos", "sin")}
    expected = exactly(given)
    arguments = {k: v.clone() if isinstance(v, Tensor) else v for k, v in given.items()}
    torch.testing.assert_close(operator(*arguments.values()), expected[0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(arguments["key_store"], expected[1], rtol=1e-13, atol=1e-13)
    check: Any = torch.library.opcheck
    check(operator.default, tuple(given.values()))


@pytest.mark.parametrize(
    "cases",
    [("a part, neighbours", "a ring"), pytest.param((), marks=pytest.mark.slow)],
    ids=["quick", "all"],
)
def test_kernels_compute_in_the_interpreter(cases: tuple[str, ...]) -> None:
    pytest.importorskip("triton")
    errors = interpreted("rotary_stores_kernels.py", *cases)["errors"]
    assert set(errors) == {*(cases or CASES)}
    narrow = ("normed", "stores of another dtype")
    off = {name: e for name, e in errors.items() if max(e) > (5e-4 if name in narrow else 1e-6)}
    assert off == {}


def test_a_place_outside_of_the_stores_raises_on_the_cpu() -> None:
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        operator(*drawn(positions=[7, 2]).values())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"query": torch.ones(2, 4)}, "takes queries [B, H, n, D], got 2 dimensions"),
        ({"key": torch.ones(1, 2, 2, 16)}, "keys have shape [1, 2, 2, 16]: expected [2, heads, 2, elements]"),
        ({"key": torch.ones(2, 2, 2, 8)}, "keys have 8 elements: expected the 16 of queries"),
        (
            {"value": torch.ones(2, 2, 2, 16).half()},
            "values are torch.float16: expected torch.float32, that of queries",
        ),
        ({"key": torch.ones(2, 1, 2, 16)}, "there are 1 heads of keys and 2 of values: expected as many"),
        (
            {"key_store": torch.ones(1, 2, 7, 16)},
            "the store of keys has shape [1, 2, 7, 16]: expected [at least 2, 2, slots, 16]",
        ),
        (
            {"value_store": torch.ones(2, 2, 7, 16, dtype=torch.int8)},
            "takes a floating-point store of values, got torch.int8",
        ),
        ({"value_store": torch.ones(2, 2, 6, 16)}, "stores have 7 and 6 slots: expected as many"),
        (
            {"positions": torch.ones(2, dtype=torch.int32)},
            "positions are torch.int32 [2]: expected torch.int64 [2]",
        ),
        (
            {"ring": True},
            "2 rows of a ring: later ones would take the place of what earlier ones read",
        ),
        ({"width": 5}, "turns an even number of up to 16 elements of a head, got 5"),
        ({"key_weight": torch.ones(16)}, "there is a weight of keys and no norm"),
    ],
)  # fmt: skip
def test_what_it_does_not_take_it_says(change: dict[str, Any], text: str) -> None:
    given = drawn() | change
    assert str(rotary_to_stores_supports(*given.values())) == text
    with pytest.raises(ValueError, match="rotary_to_stores: "), torch._subclasses.FakeTensorMode() as mode:
        operator(*(mode.from_tensor(t) if isinstance(t, Tensor) else t for t in given.values()))


# --- launches ------------------------------------------------------------------------------------

SHAPES = {
    "Llama 3": (32, 8, 128, 128, False, False), "Qwen 3": (32, 8, 128, 128, False, True),
    "GPT-NeoX": (64, 64, 96, 24, False, False), "Cohere": (32, 8, 128, 128, True, False),
    "Gemma 3": (8, 4, 256, 256, False, True), "neighbours, normed, a part": (16, 16, 256, 64, True, True),
}  # fmt: skip


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


QUICK = ("Qwen 3", "neighbours, normed, a part")


@pytest.mark.parametrize("ring", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["full", "ring"])
@pytest.mark.parametrize(
    "shape", [pytest.param(one, marks=[] if one in QUICK else pytest.mark.slow) for one in SHAPES]
)
def test_a_step_is_one_launch_without_spills_on_sm_90(shape: str, ring: bool) -> None:
    pytest.importorskip("triton")
    from graphopt_kernels import rotary_stores_triton
    from graphopt_kernels.emit.machine_code import compile_function_for_sm90
    from graphopt_kernels.tuning.calls import Recorder

    heads, groups, size, width, interleaved, norm = SHAPES[shape]
    recorder = Recorder(rotary_stores_triton)
    packed = meta(1, 1, (heads + 2 * groups) * size).unflatten(-1, (-1, size)).transpose(1, 2)
    query, key, value = packed.split([heads, groups, groups], 1)
    stores = [meta(1, groups, 32768, size) for _ in range(2)]
    weights = [meta(size) if norm else None for _ in range(2)]
    made = stores_rows(
        recorder, query, key, value, *stores, meta(1, dtype=torch.int64), meta(1, 1, width),
        meta(1, 1, width), *weights, width, interleaved, 1e-6 if norm else None, 0.0, ring,
    )  # fmt: skip
    assert made.shape == query.shape
    (call,) = recorder.calls
    launch = stores_launch(groups, size, width)
    assert call.grid == (-(-heads // launch.heads) + 2 * -(-groups // launch.heads),)
    told = call.signature
    code = compile_function_for_sm90(
        call.function, told.types, told.constants, warps=call.options["num_warps"],
        aligned=[n for n, by_16 in told.aligned.items() if by_16],
    )  # fmt: skip
    assert not code.spills, (code.stack, code.local)
    assert code.shared <= 2048
    assert code.widths("LDG")[128] >= 2 and code.widths("STG")[128] >= 1


@pytest.mark.parametrize(
    ("heads", "size", "width", "expected"),
    [(8, 128, 128, (4, 1, 64, 1)), (1, 256, 256, (1, 1, 128, 1)), (8, 96, 24, (4, 1, 16, 128)),
     (4, 1024, 1024, (1, 2, 512, 1)), (32, 64, 64, (8, 1, 32, 1)), (3, 8, 2, (4, 1, 1, 8))],
)  # fmt: skip
def test_a_lane_reads_16_bytes_of_a_half(
    heads: int, size: int, width: int, expected: tuple[int, ...]
) -> None:
    assert stores_launch(heads, size, width) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("case", [*DRAWN, "a step of a large model"])
def test_on_a_gpu_the_kernel_gives_what_the_reference_gives(case: str, dtype: torch.dtype) -> None:
    large: dict[str, Any] = {
        "rows": 1, "size": 128, "value_size": 128, "width": 128, "heads": 32, "groups": 8, "slots": 512,
        "positions": [511], "norm": True,
    }  # fmt: skip
    given = drawn(**{**DRAWN.get(case, large), "dtype": dtype})
    expected = exactly(given)
    moved = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in given.items()}
    for name in ("query", "key", "value"):
        # Moving makes them dense: spread them again, as the parts of a projection are.
        moved[name] = torch.cat([moved[name], moved[name]], -1)[..., : moved[name].shape[-1]]
    limit = {BF16: 4e-3, FP16: 5e-4, FP32: 1e-6}[dtype]
    limit = max(limit, 5e-4) if given["key_store"].dtype is FP16 else limit
    for _ in range(2):
        # A step may be run twice: it writes the same.
        found = operator(*moved.values())
        for a, b in zip((found, moved["key_store"], moved["value_store"]), expected, strict=True):
            assert (a.cpu().double() - b).norm() <= limit * b.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("ring", [False, True], ids=["full", "ring"])
def test_a_cuda_graph_follows_the_position(ring: bool) -> None:
    """Recorded once and replayed at positions that grow, across the end of a ring."""
    given = drawn(rows=1, dtype=BF16, size=64, value_size=64, width=64, ring=ring, slots=40, positions=[0])
    moved = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in given.items()}
    plain = {k: v.clone() if isinstance(v, Tensor) else v for k, v in moved.items()}
    operator(*moved.values())
    recording = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recording):
        turned = operator(*moved.values())
    rotary_to_stores_reference(*plain.values())
    for position in (0, 1, 2, 17, 39, *((40, 41, 79, 80, 1000) if ring else ())):
        for name in ("query", "key", "value", "cos", "sin"):
            moved[name].copy_(torch.randn_like(moved[name]))
            plain[name].copy_(moved[name])
        for held in (moved, plain):
            held["positions"].fill_(position)
        recording.replay()
        expected = rotary_to_stores_reference(*plain.values())
        torch.testing.assert_close(turned, expected, rtol=1e-2, atol=1e-2)
        for name in ("key_store", "value_store"):
            torch.testing.assert_close(moved[name], plain[name], rtol=1e-2, atol=1e-2)
