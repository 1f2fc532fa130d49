"""Kernels that are emitted: numbers in Triton's interpreter, machine code for sm_90, text, and refusals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from graphopt_kernels.emit.build import NotFusible
from graphopt_kernels.emit.kernel_file import Kernel
from graphopt_kernels.emit.machine_code import MachineCode, compile_for_sm90
from tests.emitted_cases import CASES, kernel_for, random_case
from tests.interpreted import interpreted

pytest.importorskip("triton")

aten = torch.ops.aten
RANDOM = 60
RANDOM_TOLERANCE = 2e-3
"""Of the largest element: float16, of which random functions make values, has units of 1e-3 of that.
A wrong operator is off by the size of an element."""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    return interpreted("emitted_cases.py", 0, RANDOM)


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_gives_what_its_operators_give(name: str, outcomes: dict[str, Any]) -> None:
    found, case = outcomes[name], CASES[name]
    assert "error" in found, found
    assert found["shape"] == case.shape
    assert found["error"] <= case.tolerance


def checked(found: dict[str, Any]) -> int:
    """How many random functions made a kernel, all of them right."""
    wrong = {
        name: outcome
        for name, outcome in found.items()
        if name.startswith("random") and ("failed" in outcome or outcome.get("error", 0.0) > RANDOM_TOLERANCE)
    }
    assert not wrong, wrong
    return sum("error" in outcome for name, outcome in found.items() if name.startswith("random"))


def test_random_functions(outcomes: dict[str, Any]) -> None:
    assert checked(outcomes) >= 0.8 * RANDOM


@pytest.mark.slow
def test_many_random_functions() -> None:
    assert checked(interpreted("emitted_cases.py", RANDOM, 2000)) >= 0.8 * (2000 - RANDOM)


def test_the_same_graph_gives_the_same_bytes() -> None:
    for name in ("rotary embedding", "layer norm backward in one pass", "long rows"):
        case = CASES[name]
        first, second = (kernel_for(case.function, case.inputs())[0].file for _ in range(2))
        assert first.source == second.source and first.name == second.name
    function, inputs = random_case(7)
    assert kernel_for(function, inputs)[0].file.source == kernel_for(function, inputs)[0].file.source


def test_the_text_of_a_kernel(golden: Callable[[str, str], None]) -> None:
    case = CASES["add and RMS norm"]
    golden("kernel_add_rms_norm.py.txt", kernel_for(case.function, case.inputs())[0].file.source)
    case = CASES["layer norm backward in one pass"]
    golden("kernel_layer_norm_backward.py.txt", kernel_for(case.function, case.inputs())[0].file.source)


# --- machine code ---------------------------------------------------------------------------

BF16, FP32 = torch.bfloat16, torch.float32
ROWS = 8192

Shaped = tuple[tuple[int, ...], torch.dtype]


def shaped(function: Callable[..., Any], *inputs: Shaped) -> Kernel:
    """The kernel for inputs of shapes and dtypes: no memory is taken for them."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in inputs]
    return kernel_for(function, tensors)[0]


def _rms(x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    h = x + residual
    wide = h.float()
    return h, (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(BF16) * w


def _rms_backward(
    g: torch.Tensor, h: torch.Tensor, w: torch.Tensor, residual: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    wide = h.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    normal = wide * rstd
    scaled = (g * w).float()
    dx = rstd * (scaled - normal * (scaled * normal).mean(-1, keepdim=True))
    return dx.to(BF16) + residual, (g * normal.to(BF16)).sum(0)


def _wide(width: int) -> dict[str, tuple[Callable[..., Any], Sequence[Shaped]]]:
    row, vector, column = ((ROWS, width), BF16), ((width,), BF16), ((ROWS, 1), FP32)
    return {
        "add and RMS norm": (_rms, (row, row, vector)),
        "RMS norm backward": (_rms_backward, (row, row, vector, row)),
        "layer norm": (lambda x, w, b: aten.native_layer_norm(x, [width], w, b, 1e-5), (row, vector, vector)),
        "layer norm backward": (
            lambda g, x, m, r, w, b: aten.native_layer_norm_backward(
                g, x, [width], m, r, w, b, [True, True, True]
            ),
            (row, row, column, column, vector, vector),
        ),
        "softmax": (lambda x: torch.softmax(x, -1), (row,)),
    }


def well_made(code: MachineCode) -> None:
    assert not code.spills, code
    assert code.shared <= 227 * 1024
    loads, stores = code.widths("LDG"), code.widths("STG")
    assert loads[128] and loads[128] >= loads[64], loads
    assert stores[128], stores


@pytest.mark.parametrize("width", [2048, 3584, 8192])
@pytest.mark.parametrize("name", _wide(1))
def test_row_kernels_fit_registers_and_move_16_bytes(name: str, width: int) -> None:
    function, inputs = _wide(width)[name]
    well_made(compile_for_sm90(shaped(function, *inputs).file))


@pytest.mark.parametrize("name", ["add and RMS norm", "layer norm", "softmax"])
def test_the_longest_rows_that_are_held(name: str) -> None:
    function, inputs = _wide(14336)[name]
    kernel = shaped(function, *inputs)
    assert kernel.file.text.loops.shape == "rows"
    well_made(compile_for_sm90(kernel.file))


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (lambda a, b: F.silu(a) * b, 2),
        (lambda g, a, b: (aten.silu_backward(g * b, a), g * F.silu(a)), 3),
        (lambda g, a, b: (aten.gelu_backward(g * b, a), g * F.gelu(a)), 3),
    ],
    ids=["SwiGLU", "SwiGLU backward", "GeGLU backward"],
)
def test_elementwise_kernels_move_16_bytes(function: Callable[..., Any], count: int) -> None:
    well_made(compile_for_sm90(shaped(function, *[((ROWS, 14336), BF16)] * count).file))


def test_a_row_of_a_vocabulary_is_read_in_pieces() -> None:
    kernel = shaped(
        lambda z, t: F.cross_entropy(z, t, reduction="none"),
        ((ROWS, 128256), BF16),
        ((ROWS,), torch.int64),
    )
    assert kernel.file.text.loops.shape == "looped rows"
    assert not compile_for_sm90(kernel.file).spills


def test_a_bias_gradient_goes_along_with_its_activation() -> None:
    def function(g: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made = aten.gelu_backward(g, x)
        return made, made.sum(0)

    kernel = shaped(function, ((ROWS, 4096), BF16), ((ROWS, 4096), BF16))
    assert kernel.file.text.loops.shape == "columns"
    well_made(compile_for_sm90(kernel.file))


@pytest.mark.parametrize("shape", [(ROWS, ROWS), (ROWS, 4096)])
def test_sums_over_rows_read_along_rows_even_if_square(shape: tuple[int, int]) -> None:
    kernel = shaped(lambda x: (F.relu(x), x.sum(0)), (shape, BF16))
    assert kernel.file.text.loops.shape == "columns"
    assert len([v for v in kernel.file.built.values if v.kind == "load"]) == 1


# --- what makes no kernel -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "inputs", "reason"),
    [
        (lambda x: x.cumsum(0), [(4, 5)], "aten.cumsum.default has no Triton expression"),
        (lambda x: x**2.5, [(4, 5)], "pow_1: power 2.5"),
        (lambda x: x * 2, [(0, 5)], "an operand has no elements"),
        (lambda x: x.sum(0) * 2, [(4, 5)], "something is computed from a sum over the rows of the kernel"),
        (lambda x: x.sum(), [(4, 50000)], "200000 elements are reduced by 1 programs alone"),
        (lambda x, y: (x * 2, y * 2), [(4, 5), (3,)], "(3,) is not what the loops of the kernel run over"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_reasons(function: Callable[..., Any], inputs: list[tuple[int, ...]], reason: str) -> None:
    with pytest.raises(NotFusible) as refused:
        shaped(function, *[(shape, FP32) for shape in inputs])
    assert str(refused.value.reason) == reason


def test_complex_numbers_have_no_kernel() -> None:
    with pytest.raises(NotFusible, match="complex64"):
        shaped(lambda x: x * 2, ((4, 5), torch.complex64))
