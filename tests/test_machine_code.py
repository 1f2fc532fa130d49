"""What emitted kernels become on sm_90: tensor cores, spills, shared memory, and how many instructions.

``tests/data/machine_code.json`` holds the instructions and registers that each kernel had when the file was
written. ``pytest tests/test_machine_code.py --accept`` writes it anew: look at what grew, and why.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from graphopt_kernels.emit.machine_code import MachineCode, compile_attention_for_sm90, compile_for_sm90
from graphopt_kernels.emit.product_build import BuiltProduct
from graphopt_kernels.emit.product_loops import ProductLoops, tilings_for
from tests.attention_cases import (
    EFFICIENT,
    FLASH,
    FLASH_BACKWARD,
    AttentionCase,
    alibi,
    own,
    padded,
)
from tests.attention_cases import kernel_for as attention_for
from tests.emitted_cases import kernel_for
from tests.test_emit_kernels import shaped

triton = pytest.importorskip("triton")

aten = torch.ops.aten
BF16, FP16, FP32, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
LIMITS = Path(__file__).parent / "data" / "machine_code.json"
SLACK = 1.05
"""Of the stored counts, for other releases of the assembler. A loop that is written out whole, or loads that
fall apart into single elements, are multiples."""

M, K, N = 8192, 4096, 14336


def _linear(after: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, w, *rest: after(F.linear(x, w), *rest)


Corpus = dict[str, tuple[Callable[..., Any], list[tuple[tuple[int, ...], torch.dtype]]]]

LARGE: Corpus = {
    "bias, GELU, residual": (
        lambda x, w, b, r: F.gelu(F.linear(x, w, b), approximate="tanh") + r,
        [((M, 1024), BF16), ((K, 1024), BF16), ((K,), BF16), ((M, K), BF16)],
    ),
    "gated": (_linear(lambda y, g: F.silu(g) * y), [((M, K), BF16), ((N, K), BF16), ((M, N), BF16)]),
    "two results": (_linear(lambda y: (F.gelu(y), y)), [((M, K), FP16), ((N, K), FP16)]),
    "gradient of GELU": (
        lambda g, w, x: aten.gelu_backward(g @ w, x),
        [((M, 1024), BF16), ((1024, K), BF16), ((M, K), BF16)],
    ),
    "gradient of a weight": (lambda g, x: (g.t() @ x) * 0.5, [((M, K), BF16), ((M, K), BF16)]),
    "gated operand": (
        lambda g, u, w: (F.silu(g) * u) @ w.t(),
        [((2048, K), BF16), ((2048, K), BF16), ((K, K), BF16)],
    ),
    "dequantized weight": (
        lambda x, w, s: x @ (w.to(BF16) * s).t(),
        [((2048, K), BF16), ((K, K), INT8), ((K, 1), BF16)],
    ),
    "integers": (
        lambda x, w, s: torch._int_mm(x, w.t()).float() * s,
        [((K, K), INT8), ((K, K), INT8), ((K,), FP32)],
    ),
    "batched": (
        lambda q, k: torch.bmm(q, k.transpose(1, 2)) * 0.125,
        [((32, 1024, 64), BF16), ((32, 1024, 64), BF16)],
    ),
    "sixty-four rows in parts": (
        _linear(lambda y, r: y + r),
        [((64, K), BF16), ((K, K), BF16), ((64, K), BF16)],
    ),
}
"""Tiles of 64 rows and more: for HGMMA and IGMMA."""

FEW: Corpus = {
    "sixteen rows": (_linear(lambda y, r: y + r), [((16, K), BF16), ((K, K), BF16), ((16, K), BF16)]),
    "sixteen rows, weight by columns": (
        lambda x, w, r: x @ w + r,
        [((16, K), BF16), ((K, K), BF16), ((16, K), BF16)],
    ),
    "sixteen rows in parts": (
        _linear(lambda y, r: y + r),
        [((16, K), BF16), ((1024, K), BF16), ((16, 1024), BF16)],
    ),
    "sixteen rows, dequantized": (
        lambda x, w, s: x @ (w.to(BF16) * s).t(),
        [((16, K), BF16), ((K, K), INT8), ((K, 1), BF16)],
    ),
}

ROW: Corpus = {
    "a row": (_linear(lambda y, g: F.silu(g) * y), [((1, K), BF16), ((N, K), BF16), ((1, N), BF16)]),
    "a row, dequantized": (
        lambda x, w, s: x @ (w.to(BF16) * s).t(),
        [((1, K), BF16), ((K, K), INT8), ((K, 1), BF16)],
    ),
    "a row, weight by columns": (lambda x, w, r: x @ w + r, [((1, K), BF16), ((K, K), BF16), ((1, K), BF16)]),
    "a column": (lambda w, x: (w @ x) * 2, [((K, K), BF16), ((K, 1), BF16)]),
}

PLAIN: Corpus = {
    "float32": (
        _linear(lambda y, g: F.silu(g) * y),
        [((2048, 1024), FP32), ((K, 1024), FP32), ((2048, K), FP32)],
    ),
    "not aligned": (
        _linear(lambda y, r: y + r),
        [((1000, 1003), BF16), ((2001, 1003), BF16), ((1000, 2001), BF16)],
    ),
}

OTHERS: Corpus = {
    "pointwise": (lambda g, u: F.silu(g) * u, [((M, N), BF16), ((M, N), BF16)]),
    "rows": (lambda x: torch.softmax(x, -1), [((M, K), BF16)]),
    "looped rows": (lambda z: torch.log_softmax(z.float(), -1), [((M, 128256), BF16)]),
    "columns": (lambda g, x: (lambda y: (y, y.sum(0)))(aten.gelu_backward(g, x)), [((M, K), BF16)] * 2),
}

B, H, LONG = 2, 32, 4096
_Q, _KV = ((B, H, LONG, 128), BF16), ((B, 8, LONG, 128), BF16)
_SUMS = ((B, H, LONG), FP32)

Attentions = dict[str, tuple[str, Callable[..., Any], list[tuple[tuple[int, ...], torch.dtype]]]]

ATTENTION: Attentions = {
    "flash attention, causal": ("cuda", lambda q, k, v: FLASH(q, k, v, 0.0, True)[0], [_Q, _KV, _KV]),
    "attention, float32": (
        "cuda",
        lambda q, k, v: EFFICIENT(q, k, v, None, False, 0.0, True)[0],
        [((B, H, LONG, 64), FP32)] * 3,
    ),
    "attention, cap and window": (
        "cpu",
        lambda q, k, v: own.attention(q, k, v, None, 0.1, 50.0, 1023, 0)[0],
        [_Q, _KV, _KV],
    ),
    "attention, computed bias": (
        "cpu",
        lambda q, k, v, s: own.attention(q, k, v, alibi(q, s, LONG, LONG), 0.1, 0.0, None, 0)[0],
        [_Q, _KV, _KV, ((H,), BF16)],
    ),
    "attention, computed mask": (
        "cpu",
        lambda q, k, v, kept: own.attention(q, k, v, padded(q, kept, LONG), 0.1, 0.0, None, None)[0],
        [_Q, _KV, _KV, ((B, LONG), torch.bool)],
    ),
    "flash attention backward, causal": (
        "cuda",
        lambda q, k, v, g, o, s: FLASH_BACKWARD(g, q, k, v, o, s, s, s, LONG, LONG, 0.0, True, s, s),
        [_Q, _KV, _KV, _Q, _Q, _SUMS],
    ),
    "attention backward, bias": (
        "cpu",
        lambda q, k, v, b, g, o, s: own.attention_backward(
            g, q, k, v, b, o, s, 0.1, 0.0, None, 0, [True] * 4
        ),
        [_Q, _KV, _KV, ((H, LONG, LONG), BF16), _Q, _Q, _SUMS],
    ),
}
"""By the device that operators are traced for. Products are for HGMMA, of float32 in three parts."""

CORPUS = LARGE | FEW | ROW | PLAIN | OTHERS


@pytest.fixture(scope="module")
def compiled() -> Callable[[str], MachineCode]:
    known: dict[str, MachineCode] = {}

    def compile_(name: str) -> MachineCode:
        if name not in known:
            function, inputs = CORPUS[name]
            known[name] = compile_for_sm90(shaped(function, *inputs).file)
        return known[name]

    return compile_


def _count(code: MachineCode, *starts: str) -> int:
    return sum(n for name, n in code.instructions.items() if name.startswith(starts))


@pytest.mark.parametrize("name", CORPUS)
def test_nothing_spills_and_no_kernel_grows(
    name: str, compiled: Callable[[str], MachineCode], request: pytest.FixtureRequest
) -> None:
    _within_limits(name, compiled(name), request)


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_multiplied_by_warp_groups(name: str, request: pytest.FixtureRequest) -> None:
    device, function, inputs = ATTENTION[name]
    with FakeTensorMode():
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in inputs]
    case = AttentionCase(function, lambda: tensors, lambda: None, device)
    found = compile_attention_for_sm90(attention_for(case, tensors)[0].file)
    assert len(found) == (4 if "bias" in name else 3) if "backward" in name else 1
    for kernel, code in found.items():
        _within_limits(f"{name}: {kernel}", code, request)
        if kernel != "rows_kernel":
            assert _count(code, "HGMMA") and not _count(code, "HMMA"), code.instructions
            assert code.widths("LDG")[128] >= 8 and code.widths("STG")[128] >= 2


def _within_limits(name: str, code: MachineCode, request: pytest.FixtureRequest) -> None:
    assert not code.spills, code
    assert code.shared + code.asked <= 227 * 1024
    counts = {"instructions": _count(code, ""), "registers": code.registers}
    stored = json.loads(LIMITS.read_text()) if LIMITS.exists() else {"kernels": {}}
    if request.config.getoption("--accept"):
        stored["triton"] = triton.__version__
        stored["kernels"][name] = counts
        known = [*CORPUS, *(key for key in stored["kernels"] if key.partition(": ")[0] in ATTENTION)]
        stored["kernels"] = {key: stored["kernels"][key] for key in known if key in stored["kernels"]}
        LIMITS.write_text(json.dumps(stored, indent=1) + "\n")
    limit = stored["kernels"][name]
    assert counts["instructions"] <= SLACK * limit["instructions"], (counts, limit)
    assert counts["registers"] <= SLACK * limit["registers"] + 8, (counts, limit)


@pytest.mark.parametrize("name", LARGE)
def test_large_tiles_are_multiplied_by_warp_groups(name: str, compiled: Callable[[str], MachineCode]) -> None:
    code = compiled(name)
    assert _count(code, "IGMMA" if name == "integers" else "HGMMA"), code.instructions
    # Copies to shared memory and stores of 16 bytes; nothing is loaded element by element.
    copies = code.widths("LDGSTS")
    assert copies[128] and not copies[64] and not copies[32], copies
    assert code.widths("STG")[128], code.widths("STG")


@pytest.mark.parametrize("name", FEW)
def test_few_rows_are_multiplied_by_tensor_cores(name: str, compiled: Callable[[str], MachineCode]) -> None:
    code = compiled(name)
    assert _count(code, "HMMA") and not _count(code, "HGMMA")
    assert code.widths("LDGSTS")[128], code.widths("LDG")


@pytest.mark.parametrize("name", ROW)
def test_a_matrix_is_read_16_bytes_at_a_time_for_a_vector(
    name: str, compiled: Callable[[str], MachineCode]
) -> None:
    code = compiled(name)
    assert not _count(code, "HMMA", "HGMMA")
    widths = code.widths("LDG")
    assert widths[128] >= 2 and widths[128] > widths[64], widths


def test_the_second_kernel_of_sums_in_parts_compiles(tmp_path: Path) -> None:
    from graphopt_kernels.emit.machine_code import compile_function_for_sm90, import_kernel, pointer_types

    function, inputs = LARGE["sixty-four rows in parts"]
    file = shaped(function, *inputs).file
    assert file.text.finish is not None
    finish = getattr(import_kernel(file, tmp_path), file.text.finish)
    types = {k: v for k, v in pointer_types(file).items() if k in finish.arg_names}
    code = compile_function_for_sm90(
        finish, types, file.launch.constants, warps=file.launch.warps, aligned=tuple(types)
    )
    assert not code.spills and code.widths("LDG")[128] and code.widths("STG")[128]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["gated", "sixteen rows in parts", "a row, dequantized", "not aligned", "float32"]
)
def test_no_tiling_that_is_tried_spills(name: str) -> None:
    function, inputs = CORPUS[name]
    with FakeTensorMode():
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in inputs]
    file = shaped(function, *inputs).file
    assert isinstance(file.built, BuiltProduct) and isinstance(file.text.loops, ProductLoops)
    for tiling in tilings_for(file.built, file.text.loops):
        code = compile_for_sm90(kernel_for(function, tensors, tiling)[0].file)
        assert not code.spills, tiling
        assert code.shared + code.asked <= 227 * 1024, tiling
