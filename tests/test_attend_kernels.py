"""Kernels of attention over stores: numbers in the interpreter and on a GPU, machine code, launches."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

import graphopt_kernels.attend_launch as launching
import graphopt_kernels.attend_quant_launch as quant_launching
import graphopt_kernels.attend_quant_prompts as quant_prompts
from graphopt.decoding.masks import MaskSpec
from graphopt.decoding.stores import SiteSpec
from graphopt_kernels.attend_full import attend_full
from graphopt_kernels.attend_launch import AttendProblem, kernels_take, launch_for, parts_for
from graphopt_kernels.attend_operator import Asked, RowStores
from graphopt_kernels.attend_quant import ALONE, attend_quant
from graphopt_kernels.attend_quant_launch import QuantBits, QuantStores
from graphopt_kernels.attend_ring import attend_ring
from graphopt_kernels.cache_stores import Full, Ring
from graphopt_kernels.emit.machine_code import MachineCode, compile_function_for_sm90
from graphopt_kernels.quant_store import Quant
from graphopt_kernels.tuning.calls import Recorder
from tests.interpreted import interpreted

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LIMIT = {"float16": 2e-3, "prompts, float16": 2e-3, "wider values": 2e-3, "wider than queries": 2e-3}

QUICK = ("all", "float16", "several rows, all", "ring, all", "ring, written by others")


@needs_triton
@pytest.mark.parametrize("cases", [QUICK, pytest.param((), marks=pytest.mark.slow)], ids=["quick", "all"])
def test_kernels_err_no_more_than_rounding_in_the_interpreter(cases: tuple[str, ...]) -> None:
    found = interpreted("attend_kernels.py", *cases)
    assert len(found) == len(cases) or len(found) > 30
    assert {name: error for name, (error, _) in found.items() if error > LIMIT.get(name, 2e-6)} == {}
    assert [name for name, (_, stored) in found.items() if not stored] == []


QUICK_QUANT = ("all", "prompts, all", "prompts, last rows alone")


@needs_triton
@pytest.mark.parametrize(
    "cases", [QUICK_QUANT, pytest.param((), marks=pytest.mark.slow)], ids=["quick", "all"]
)
def test_kernels_read_and_write_rounded_rows_as_the_reference_does(cases: tuple[str, ...]) -> None:
    found = interpreted("attend_quant_kernels.py", *cases)
    assert len(found) == len(cases) or len(found) > 12
    assert {name: error for name, (error, _) in found.items() if error > LIMIT.get(name, 2e-6)} == {}
    assert [name for name, (_, stored) in found.items() if not stored] == []


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def recorded(
    width: int, *, rows: int = 1, group: int = 4, batch: int = 1, groups: int = 8, slots: int = 32768,
    value_width: int = 0, dtype: torch.dtype = BF16, ring: bool = False, every: bool = False,
) -> Recorder:  # fmt: skip
    """Launches of a step at the sizes of large models; ``every``: with all that scores may have."""
    from graphopt_kernels import attend_triton

    recorder = Recorder(attend_triton)
    heads, value_width = groups * group, value_width or width
    asked = Asked(
        meta(batch, heads, rows, width, dtype=dtype), meta(batch, groups, rows, width, dtype=dtype),
        meta(batch, groups, rows, value_width, dtype=dtype), meta(rows, dtype=torch.int64),
        meta(batch, slots, dtype=torch.bool) if every else None, meta(heads, dtype=FP32) if every else None,
        meta(heads) if every else None, 0.1, 30.0 if every else 0.0, slots if ring else 1024 * every, slots,
    )  # fmt: skip
    stores = RowStores(*(meta(batch, groups, slots, size, dtype=dtype) for size in (width, value_width)))
    launching.attend_on_gpu(recorder, asked, stores, ring=ring, processors=132)
    return recorder


def compiled(recorder: Recorder) -> dict[str, MachineCode]:
    found = {}
    for call in recorder.calls:
        told = call.signature
        found[call.function.fn.__name__] = compile_function_for_sm90(
            call.function, told.types, told.constants, warps=call.options["num_warps"],
            stages=call.options.get("num_stages", 3), most_registers=call.options.get("maxnreg"),
            aligned=[n for n, by_16 in told.aligned.items() if by_16],
        )  # fmt: skip
    return found


SHAPES: dict[str, dict[str, Any]] = {
    "heads of 128": {"width": 128},
    "heads of 128, everything": {"width": 128, "every": True},
    "ring, heads of 64": {"width": 64, "ring": True, "slots": 4096},
    "heads of 80": {"width": 80},
    "heads of 256, values of 128": {"width": 256, "value_width": 128, "group": 2, "every": True},
    "several rows": {"width": 128, "rows": 5},
    "a prompt": {"width": 128, "rows": 1024},
    "a prompt, heads of 256": {"width": 256, "rows": 1024, "every": True},
}


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_machine_code_has_tensor_cores_wide_loads_and_no_spills(shape: str) -> None:
    recorder = recorded(**SHAPES[shape])
    for name, code in compiled(recorder).items():
        assert not code.spills, (name, code)
        # Two programs of a multiprocessor, as launches assume, and one where rows are many.
        assert code.asked <= (113 if "prompt" not in shape else 226) * 1024
        if name == "attend_kernel":
            many = "prompt" in shape
            assert any(opcode.startswith("HGMMA" if many else "HMMA") for opcode in code.instructions)
            wide = {n: bits for n, bits in code.widths("LDGSTS").items() if n == 128}
            assert wide and code.widths("LDGSTS")[128] == code.widths("LDGSTS").total() - (
                code.widths("LDGSTS")[32] if SHAPES[shape].get("every") else 0
            )


def quant_recorded(
    store: Quant, width: int = 128, dtype: torch.dtype = BF16, group: int = 4, every: bool = False,
    takes: bool = True, batch: int = 1, places: int = 32768, rows: int = 1, asking: int = 0,
) -> Recorder:  # fmt: skip
    """The same over rounded rows, of one row or several. ``asking``: how many of these."""
    recorder = Recorder(quant_launching.jitted())
    heads = 8 * group
    window = 1024 * every * (rows == 1)
    site = SiteSpec(heads, 8, width, width, dtype, MaskSpec(window=window), 0.1)
    kinds = store.tensors(site, batch, places).values()
    stores = QuantStores(*(meta(*shape, dtype=kind) for shape, kind in kinds))
    row = meta(batch, 8, rows, width, dtype=dtype)
    asked = Asked(
        meta(batch, heads, asking or rows, width, dtype=dtype), row, row, meta(rows, dtype=torch.int64),
        meta(batch, places, dtype=torch.bool) if every else None, meta(heads, dtype=FP32) if every else None,
        meta(heads) if every else None, 0.1, 30.0 if every else 0.0, window, places,
    )  # fmt: skip
    bits = QuantBits(*store.widths, store.group, ALONE)
    if rows > 1:
        quant_prompts.rows_on_gpu(recorder, asked, stores, bits, writes=takes, processors=132)
    else:
        quant_launching.row_on_gpu(recorder, asked, stores, bits, takes=takes, processors=132)
    return recorder


QUANT_SHAPES: dict[str, dict[str, Any]] = {
    "eight bits": {"store": Quant(bits=8)},
    "four bits": {"store": Quant()},
    "three bits": {"store": Quant(bits=3)},
    "two bits, everything": {"store": Quant(bits=2), "every": True},
    "heads of 64": {"store": Quant(), "width": 64},
    "heads of 256": {"store": Quant(), "width": 256},
    "eight bits, many sequences": {"store": Quant(bits=8), "batch": 16},
    "four bits, many sequences": {"store": Quant(), "batch": 16},
    "sixteen heads share keys": {"store": Quant(), "group": 16},
    "float16": {"store": Quant(bits=3), "dtype": torch.float16},
}


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("shape", QUANT_SHAPES)
def test_codes_become_numbers_in_registers(shape: str) -> None:
    """No spills, numbers go to tensor cores from where they were made, and packed words are on their way
    while others are computed with."""
    for name, code in compiled(quant_recorded(**QUANT_SHAPES[shape])).items():
        assert not code.spills, (name, code)
        assert code.asked <= 113 * 1024
        if name == "attend_kernel":
            assert any(opcode.startswith("HMMA") for opcode in code.instructions)
            assert code.widths("LDGSTS").total() > 0
            # Exact rows and sums of warps go through shared memory; of numbers there would be many hundreds.
            assert code.instructions.get("STS.U16", 0) <= 1
            assert code.widths("STS").total() <= 210


PROMPT_SHAPES: dict[str, dict[str, Any]] = {
    "four bits": {"store": Quant(), "rows": 1024},
    "eight bits, few rows": {"store": Quant(bits=8), "rows": 5},
    "three bits, everything": {"store": Quant(bits=3), "rows": 1024, "every": True},
    "heads of 64, float16": {"store": Quant(), "rows": 1024, "width": 64, "dtype": torch.float16},
    "heads of 256": {"store": Quant(), "rows": 1024, "width": 256},
}


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("shape", PROMPT_SHAPES)
def test_prompts_over_rounded_rows_run_on_tensor_cores_without_spills(shape: str) -> None:
    for name, code in compiled(quant_recorded(**PROMPT_SHAPES[shape])).items():
        assert not code.spills, (name, code)
        assert code.asked <= 226 * 1024
        if name == "prompt_kernel":
            many = PROMPT_SHAPES[shape]["rows"] > 5
            assert any(opcode.startswith("HGMMA" if many else "HMMA") for opcode in code.instructions)
            assert code.widths("LDGSTS")[128] > 0


@needs_triton
def test_a_prompt_over_rounded_rows_goes_by_sequences_whose_numbers_have_room() -> None:
    def names(**options: Any) -> list[str]:
        return [call.function.fn.__name__ for call in quant_recorded(Quant(), **options).calls]

    one = ["read_kernel", "close_rows_kernel", "prompt_kernel"]
    assert names(rows=1024) == [*one, "write_kernel"]
    # Numbers of 32,768 positions take 128 MiB a sequence, of which there may be two.
    assert names(rows=1024, batch=4) == [*one, *one, "write_kernel"]
    assert names(rows=1024, batch=4, places=4096) == [*one, "write_kernel"]
    # Of 131,072 positions those of four heads of eight.
    halves = [*one, "merge_kernel"] * 4
    assert names(rows=1024, batch=2, places=131072) == [*halves, "write_kernel"]
    assert names(rows=1024, takes=False) == one, "another site writes"
    few = quant_recorded(Quant(), rows=1024, asking=1).calls
    assert [call.function.fn.__name__ for call in few] == [*one, "merge_kernel", "write_kernel"]
    assert few[2].arguments["rows"] == 1 and few[2].arguments["splits"] > 8, "the last row alone"
    # Every sequence is taken in once.
    calls = quant_recorded(Quant(), rows=64, batch=3).calls
    for name, blocks in (("read_kernel", 1024), ("close_rows_kernel", 2)):
        grids = [call.grid[0] for call in calls if call.function.fn.__name__ == name]
        assert len(grids) == 2 and sum(grids) == 3 * 8 * blocks * 3


def test_what_a_prompt_takes_beside_its_output_is_what_it_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(batch: int, length: int, window: int = 0) -> tuple[Asked, QuantStores]:
        site = SiteSpec(32, 8, 128, 128, BF16, MaskSpec(window=window), 1.0)
        stores = QuantStores(*(meta(*s, dtype=d) for s, d in Quant().tensors(site, batch, length).values()))
        row = meta(batch, 8, 64, 128)
        more = (meta(64, dtype=torch.int64), None, None, None, 1.0, 0.0, window, length)
        return Asked(meta(batch, 32, 64, 128), row, row, *more), stores

    row = 2 * 8 * 128 * 2
    assert quant_prompts.prompt_scratch(*asked(1, 32768)) >= 32768 * row
    assert quant_prompts.prompt_scratch(*asked(16, 32768)) < 3 * 32768 * row
    refused = quant_prompts.prompts_take(*asked(1, 32768, window=512))
    assert "rows read a window of 512: several of these at a time go by ATen operators" in str(refused)
    assert quant_prompts.prompts_take(*asked(1, 32768)) is None


@needs_triton
def test_a_token_over_rounded_rows_is_three_launches() -> None:
    calls = quant_recorded(Quant()).calls
    assert [call.function.fn.__name__ for call in calls] == ["attend_kernel", "merge_kernel", "close_kernel"]
    # Exact rows have a part of their own.
    assert calls[0].arguments["splits"] == 34 and calls[0].grid == (8 * 34,)
    few = quant_recorded(Quant(), places=4096).calls[0]
    assert few.arguments["splits"] == 17, "every warp has keys"
    alone = quant_recorded(Quant(), batch=16).calls[0]
    assert (alone.options["num_warps"], alone.grid) == (1, (16 * 8 * 25,)), "a warp alone has enough to do"
    many = quant_recorded(Quant(), group=40).calls
    assert many[0].arguments["ROWS"] == 16 and many[0].grid == (8 * 3 * many[0].arguments["splits"],)
    read = quant_recorded(Quant(), takes=False).calls
    assert [call.function.fn.__name__ for call in read] == ["attend_kernel", "merge_kernel"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"query": meta(0, 8, 1, 32)}, "there are no rows"),
        ({"group": 24}, "24 channels are rounded together: expected a power of two up to 128"),
        (
            {"store": Quant(block=96, residual=96)},
            "96 positions are rounded together: expected a power",
        ),
        ({"batch": 2}, "stores are not contiguous"),
        (
            {"dtype": torch.float64},
            "do not take queries in torch.float64",
        ),
    ],
    ids=["rows", "channels", "positions", "gaps", "float64"],
)
def test_what_kernels_of_rounded_rows_do_not_take_is_said(change: dict[str, Any], text: str) -> None:
    dtype, store = change.get("dtype", BF16), change.get("store", Quant())
    site = SiteSpec(8, 2, 32, 32, dtype, MaskSpec(), 1.0)
    kinds = store.tensors(site, change.get("batch", 1), 512).values()
    stores = QuantStores(*(meta(*shape, dtype=kind) for shape, kind in kinds))
    if "batch" in change:
        stores = QuantStores(*(each.transpose(0, 1) for each in stores))
    query = change.get("query", meta(1, 8, 1, 32, dtype=dtype))
    assert text in str(quant_launching.kernels_take(query, stores, change.get("group", 32)))


@needs_triton
def test_a_token_is_two_launches_that_fill_a_gpu() -> None:
    calls = recorded(128).calls
    assert [call.function.fn.__name__ for call in calls] == ["attend_kernel", "merge_kernel"]
    assert calls[0].grid == (264,) and calls[0].arguments["splits"] == 33
    assert calls[0].arguments["WRITES"] and calls[0].arguments["NEW"]
    assert calls[1].grid == (32,)
    several = recorded(128, rows=5).calls
    names = [call.function.fn.__name__ for call in several]
    assert names == ["write_kernel", "attend_kernel", "merge_kernel"]
    assert not several[1].arguments["NEW"]
    ring = recorded(64, rows=5, ring=True, slots=4096).calls
    assert [call.function.fn.__name__ for call in ring] == ["attend_kernel", "merge_kernel", "write_kernel"]
    (many,) = recorded(128, batch=64, groups=16, slots=512).calls
    assert many.arguments["FINAL"] and many.grid == (64 * 16,)


@pytest.mark.parametrize(
    ("programs", "length", "parts"),
    [(8, 32768, 33), (128, 32768, 2), (32, 32768, 8), (8, 300, 4), (1, 64, 1), (264, 32768, 1), (8, 16, 1)],
)
def test_keys_are_shared_out_so_that_programs_run_at_once(programs: int, length: int, parts: int) -> None:
    assert parts_for(programs, length, 132) == parts
    assert parts_for(programs, length, 132) <= max(1, length // 64)


def test_an_odd_number_of_programs_ends_evenly() -> None:
    """300 programs are two turns of 264 places; in parts they are more turns, of which the last is fuller."""
    parts = parts_for(300, 32768, 132)
    assert -(-300 * parts // 264) / parts < 1.3


def test_tiles_hold_the_rows_that_there_are() -> None:
    problem = AttendProblem(1, 8, 4, 4096, 128, 128, BF16)
    assert launch_for(problem, 132).rows == 16
    assert launch_for(problem._replace(rows=20), 132).rows == 32
    assert launch_for(problem._replace(rows=4096), 132)[:3] == (128, 64, 1)
    assert launch_for(problem._replace(rows=4096, dtype=FP32), 132).rows == 32


@pytest.mark.parametrize(
    ("query", "keys", "values", "text"),
    [
        (meta(1, 2, 1, 8).double(), meta(1, 1, 4, 8), meta(1, 1, 4, 8), "queries in torch.float64"),
        (meta(1, 2, 1, 8), meta(1, 1, 4, 8).char(), meta(1, 1, 4, 8), "stored keys in torch.int8"),
        (meta(1, 2, 1, 512), meta(1, 1, 4, 512), meta(1, 1, 4, 8), "heads of 512 elements do not fit"),
        (meta(1, 2, 1, 8), meta(1, 1, 8, 4).mT, meta(1, 1, 4, 8), "stored keys lie 4 apart: expected 1"),
        (meta(0, 2, 1, 8), meta(1, 1, 4, 8), meta(1, 1, 4, 8), "there are no rows"),
    ],
    ids=["float64", "integers", "wide", "transposed", "empty"],
)
def test_what_kernels_do_not_take_is_said(query: Tensor, keys: Tensor, values: Tensor, text: str) -> None:
    assert text in str(kernels_take(query, keys, values))
    assert kernels_take(meta(1, 2, 1, 8), meta(1, 1, 4, 8), meta(1, 1, 4, 8)) is None


@needs_triton
def test_stores_follow_the_position_where_kernels_serve_them() -> None:
    site = SiteSpec(8, 2, 128, 64, BF16, MaskSpec(window=64), 1.0)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert Full().follows(site, gpu) and Full().follows(site, cpu)
    for change in ({"dtype": torch.float64}, {"key_width": 320}, {"dtype": FP32, "value_width": 256}):
        other = replace(site, **change)
        assert not Full().follows(other, gpu) and Full().follows(other, cpu)
        assert Ring().follows(other, gpu)
    assert not Full().follows(site, torch.device("xpu"))
    assert Quant().follows(site, gpu) and not Quant(group=24).follows(site, gpu)
    assert Quant(group=24).follows(site, cpu)


def test_what_a_gpu_needs_beside_the_output_is_that_of_the_launch() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        query, key = (torch.empty(1, n, 1, 128, dtype=BF16, device="cuda") for n in (32, 8))
        store = torch.empty(1, 8, 32768, 128, dtype=BF16, device="cuda")
        positions = torch.empty(1, dtype=torch.int64, device="cuda")
        valid = torch.empty(1, 32768, dtype=torch.bool, device="cuda")
        given = (query, key, key, store, store, positions)
        taken = attend_full.scratch(*given, None, None, None, 0.1, 0.0, 0, 32768)
        counted = attend_full.scratch(*given, valid, query, None, 0.1, 0.0, 0, 32768)
        parts = launch_for(
            launching.problem_of(query, store, store, 32768), launching.processors_for(query.device)
        ).parts
    assert taken == 32 * parts * (128 + 1) * 4
    assert counted == taken + 32768 * 4
    assert (
        attend_full.scratch(torch.zeros(1, 2, 1, 8), *given[1:], None, None, None, 0.1, 0.0, 0, 9) == 0
    )


ON_GPU: dict[str, dict[str, Any]] = {
    "plain": {}, "heads of 80": {"width": 80, "value_width": 96}, "heads of 256": {"width": 256},
    "padding": {"padded": 40}, "window": {"window": 100}, "softcap": {"softcap": 5.0},
    "sinks": {"sinks": True}, "slopes": {"slopes": True}, "slopes, padding": {"slopes": True, "padded": 40},
    "all": {"slopes": True, "padded": 40, "sinks": True, "softcap": 5.0, "window": 700},
    "several rows": {"rows": 5}, "a prompt": {"rows": 333}, "many heads": {"group": 20},
    "shared": {"shares": True, "rows": 2}, "ring": {"ring": 128, "window": 128},
    "ring, shared": {"ring": 128, "window": 128, "shares": True},
    "ring, several rows": {"ring": 128, "window": 128, "rows": 7, "padded": 40, "sinks": True},
    "ring, a prompt": {"ring": 128, "window": 100, "rows": 333},
}  # fmt: skip


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("case", ON_GPU)
def test_on_a_gpu_the_kernels_give_what_the_reference_gives(case: str, dtype: torch.dtype) -> None:
    from tests.attend_kernels import drawn, exact

    given = {"groups": 2, "group": 4, "seen": 1500, "places": 2053, "width": 128, "value_width": 128}
    if dtype is FP32 and ON_GPU[case].get("width") == 256:
        pytest.skip("float32 heads of 256 go by ATen operators")
    torch.manual_seed(0)
    made = drawn(**{**given, **ON_GPU[case], "dtype": dtype})
    ring = "ring" in ON_GPU[case]
    # On the CPU the reference reads no more than is there.
    expected, keys, values = (x.cuda() for x in exact(made, ring))
    arguments = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in made.items()}
    operator = attend_ring if ring else attend_full
    again = {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    found = operator(*arguments.values())
    error = float((found.double() - expected).norm() / expected.norm())
    # Biases of hundreds are added to scores in float32.
    assert error <= {BF16: 1e-2, FP16: 2e-3, FP32: 1e-4 if "slopes" in ON_GPU[case] else 1e-5}[dtype], error
    assert torch.equal(arguments["key_store"].nan_to_num(7), keys.nan_to_num(7))
    assert torch.equal(arguments["value_store"].nan_to_num(7), values.nan_to_num(7))
    assert torch.equal(operator(*again.values()), found), "the same in every run"


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("ring", [False, True], ids=["full", "ring"])
def test_a_cuda_graph_follows_the_position(ring: bool) -> None:
    """Recorded once and replayed at positions that grow, across the end of a ring."""
    from tests.attend_kernels import drawn

    torch.manual_seed(0)
    slots = {"ring": 256, "window": 256} if ring else {}
    sizes = {"groups": 2, "group": 4, "places": 2048, "width": 128, "value_width": 128, "dtype": BF16}
    made = drawn(**sizes, **slots, seen=0)
    arguments = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in made.items()}
    plain = {k: v.double() if isinstance(v, Tensor) and v.dtype is BF16 else v for k, v in arguments.items()}
    plain["positions"] = arguments["positions"].clone()
    operator = attend_ring if ring else attend_full
    if not ring:
        for held in (arguments, plain):
            held["key_store"].zero_()
            held["value_store"].zero_()
    operator(*arguments.values())
    recording = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recording):
        output = operator(*arguments.values())
    for position in (0, 1, 15, 16, 63, 64, 65, 200, 255, 256, 257, 300, 511, 512, 900, 2047):
        for name in ("query", "key", "value"):
            arguments[name].copy_(torch.randn_like(arguments[name]))
            plain[name] = arguments[name].double()
        for held in (arguments, plain):
            held["positions"].fill_(position)
        recording.replay()
        expected = operator.reference(*plain.values())
        error = float((output.double() - expected).norm() / expected.norm())
        assert error <= 1e-2, (position, error)
        assert torch.equal(arguments["key_store"].double(), plain["key_store"])


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_on_a_gpu_rounded_rows_are_read_as_the_reference_does(bits: int, dtype: torch.dtype) -> None:
    from tests.attend_quant_kernels import STORES, drawn, wide

    torch.manual_seed(0)
    sizes = {"groups": 2, "group": 4, "places": 700, "width": 128, "value_width": 64, "padded": 40}
    made = drawn(**sizes, dtype=dtype, store=Quant(bits=bits), seen=608)
    made["positions"] = torch.tensor([608])
    reference = wide(made)
    expected = attend_quant.reference(*reference.values()).cuda()
    arguments = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in made.items()}
    found = attend_quant(*arguments.values())
    error = float((found.double() - expected).norm() / expected.norm())
    assert error <= {BF16: 1e-2, FP16: 2e-3, FP32: 1e-5}[dtype], error
    for name in STORES:
        assert torch.equal(arguments[name].cpu(), reference[name]), name


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_on_a_gpu_prompts_are_rounded_as_the_reference_does(bits: int, dtype: torch.dtype) -> None:
    from tests.attend_quant_kernels import STORES, drawn, rows, wide

    torch.manual_seed(0)
    made = drawn(
        groups=2, group=4, places=700, width=128, value_width=64, padded=40, dtype=dtype,
        store=Quant(bits=bits), seen=70,
    )  # fmt: skip
    made |= rows(2, 2, 4, 500, 128, 64, dtype)
    made["positions"] = torch.arange(70, 570)
    reference = wide(made)
    expected = attend_quant.reference(*reference.values()).cuda()
    arguments = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in made.items()}
    found = attend_quant(*arguments.values())
    error = float((found.double() - expected).norm() / expected.norm())
    assert error <= {BF16: 1e-2, FP16: 2e-3, FP32: 1e-5}[dtype], error
    for name in STORES:
        assert torch.equal(arguments[name].cpu(), reference[name]), name


@pytest.mark.gpu
@needs_triton
def test_a_cuda_graph_rounds_blocks_as_they_fill() -> None:
    """Recorded once, replayed for 200 rows one after the other."""
    from tests.attend_quant_kernels import STORES, drawn, wide

    torch.manual_seed(0)
    made = drawn(groups=2, group=4, places=256, width=128, value_width=128, dtype=BF16)
    arguments = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in made.items()}
    reference = wide(made)
    attend_quant(*arguments.values())
    recording = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recording):
        output = attend_quant(*arguments.values())
    for position in range(200):
        for name in ("query", "key", "value"):
            row = torch.randn(made[name].shape).bfloat16()
            arguments[name].copy_(row)
            reference[name] = row.double() if name == "query" else row
        arguments["positions"].fill_(position)
        reference["positions"] = torch.tensor([position])
        recording.replay()
        expected = attend_quant.reference(*reference.values())
        error = float((output.cpu().double() - expected).norm() / expected.norm())
        assert error <= 1e-2, (position, error)
        for name in STORES:
            assert torch.equal(arguments[name].cpu(), reference[name]), (position, name)
