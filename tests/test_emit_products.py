"""Kernels of products of matrices: numbers in Triton's interpreter, text, refusals, and what is taken in."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt.plugins import default_host
from graphopt_kernels.emit.build import NotFusible
from graphopt_kernels.emit.groups import Grouping, grouped
from graphopt_kernels.emit.machine_code import import_kernel
from graphopt_kernels.emit.product_choice import Prices, prices_for
from tests.emitted_cases import kernel_for
from tests.interpreted import interpreted
from tests.product_cases import CASES, TILED
from tests.test_emit_kernels import Shaped, shaped

pytest.importorskip("triton")

aten = torch.ops.aten
BF16, FP16, FP32, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.int8

# --- numbers --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    return interpreted("product_cases.py")


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_is_as_near_to_float64_as_its_operators(name: str, outcomes: dict[str, Any]) -> None:
    found, case = outcomes[name], CASES[name]
    assert "error" in found, found
    assert (found["kind"], found["parts"]) == (case.kind, case.parts)
    assert found["error"] <= case.tolerance
    # The order of additions differs: what remains beside rounding is a few units of float32.
    assert found["error"] <= 1.1 * found["eager"] + 4e-6


@pytest.mark.parametrize("name", TILED)
def test_the_result_does_not_depend_on_the_tiles(name: str, outcomes: dict[str, Any]) -> None:
    found = outcomes[name]
    assert len(found["tilings"]) >= 3
    for other in found["tilings"]:
        assert "error" in other, other
        assert other["error"] <= 1.1 * found["eager"] + 4e-6


@pytest.mark.parametrize("name", CASES)
def test_the_reference_gives_what_the_operators_give(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    inputs = list(case.inputs())
    kernel, order = kernel_for(case.function, inputs)
    made = import_kernel(kernel.file, tmp_path).reference(*[inputs[i] for i in order])
    wanted = case.function(*inputs)
    for value, expected in zip(made, wanted if isinstance(wanted, tuple) else [wanted], strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)


def test_the_same_graph_gives_the_same_bytes() -> None:
    for name in ("few rows in parts", "dequantized weight", "one row in parts"):
        case = CASES[name]
        first, second = (kernel_for(case.function, case.inputs())[0].file for _ in range(2))
        assert first.source == second.source and first.name == second.name


def test_the_text_of_a_kernel(golden: Callable[[str, str], None]) -> None:
    linear = shaped(
        lambda x, w, b, r: F.gelu(F.linear(x, w, b), approximate="tanh") + r,
        ((8192, 1024), BF16),
        ((4096, 1024), BF16),
        ((4096,), BF16),
        ((8192, 4096), BF16),
    )
    golden("kernel_addmm_gelu_add.py.txt", linear.file.source)
    case = CASES["few rows in parts"]
    golden("kernel_product_in_parts.py.txt", kernel_for(case.function, case.inputs())[0].file.source)
    row = shaped(
        lambda x, w, s: x @ (w.half() * s).t(), ((1, 4096), FP16), ((4096, 4096), INT8), ((4096, 1), FP16)
    )
    golden("kernel_product_of_a_row.py.txt", row.file.source)


def test_offsets_beyond_31_bits_are_computed_in_64() -> None:
    source = shaped(lambda x, w: (x @ w) * 2, ((2**17, 2**15), BF16), ((2**15, 64), BF16)).file.source
    assert "tl.program_id(0).to(tl.int64)" in source and "tl.arange(0, BLOCK_K)).to(tl.int64)" in source


def test_float32_is_multiplied_as_torch_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = shaped(lambda x, w: (x @ w) * 2, ((64, 64), FP32), ((64, 64), FP32))
    module = import_kernel(kernel.file, tmp_path)
    started: list[dict[str, Any]] = []

    class Started:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **options: started.append(options)

    monkeypatch.setattr(module, kernel.file.text.name, Started())
    x, before = torch.randn(64, 64), torch.backends.cuda.matmul.fp32_precision
    try:
        module.launch(x, x)
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        module.launch(x, x)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert [options["PRECISION"] for options in started] == ["ieee", "tf32"]


# --- what makes no kernel -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "inputs", "reason"),
    [
        (
            lambda x, y: (x @ y) @ y,
            [((4, 5), FP32), ((5, 5), FP32)],
            "2 products of matrices: a kernel computes one",
        ),
        (
            lambda x, y: (x @ y).sum(0),
            [((4, 5), FP32), ((5, 6), FP32)],
            "a reduction beside a product of matrices",
        ),
        (
            lambda x, y: torch.softmax(x, -1) @ y,
            [((4, 5), FP32), ((5, 6), FP32)],
            "a reduction beside a product of matrices",
        ),
        (
            lambda x, y: x @ y + 1,
            [((4, 5), torch.float64), ((5, 6), torch.float64)],
            "products of float64 stay with the library",
        ),
        (
            lambda x, y: x @ y + 1,
            [((4, 5), torch.int64), ((5, 6), torch.int64)],
            "products of int64 stay with the library",
        ),
        (
            lambda x, y: (x @ y)[:, 1:] * 2,
            [((4, 5), FP32), ((5, 6), FP32)],
            "a part of mm is read",
        ),
        (
            lambda x, y: (x @ y).flip(0) * 2,
            [((4, 5), FP32), ((5, 6), FP32)],
            "elements of mm are not read in order",
        ),
        (
            lambda x, y: (lambda z: z + z.t())(x @ y),
            [((6, 5), FP32), ((5, 6), FP32)],
            "elements of mm are read in two ways",
        ),
        (
            lambda x, y: torch.cat((x @ y, x), 1) * 2,
            [((4, 5), FP32), ((5, 6), FP32)],
            "mm is a part of a concatenation",
        ),
        (
            lambda x, y, z: (x @ y) + z,
            [((1, 5), FP32), ((5, 6), FP32), ((4, 6), FP32)],
            "mm is broadcast by what is computed from it",
        ),
        (
            lambda x, y: (x.exp(), x.exp() @ y),
            [((4, 5), FP32), ((5, 6), FP32)],
            "(4, 5) is not what the loops of the kernel run over",
        ),
        (lambda x, y: x @ y + 1, [((4, 0), FP32), ((0, 6), FP32)], "an operand has no elements"),
        (lambda x, y: x @ y + 1, [((0, 5), FP32), ((5, 6), FP32)], "an operand has no elements"),
        (
            lambda x, w, s: x @ (w.to(BF16) * s),
            [((4, 16), BF16), ((16, 16), torch.float8_e4m3fn), ((16,), BF16)],
            "Triton has no torch.float8_e4m3fn",
        ),
        (
            lambda x, w, s: torch._scaled_mm(x, w.t(), s, s, out_dtype=BF16) * 2,
            [((16, 16), torch.float8_e4m3fn), ((16, 16), torch.float8_e4m3fn), ((), FP32)],
            "aten._scaled_mm.default has no Triton expression",
        ),
    ],
)
def test_reasons(function: Callable[..., Any], inputs: list[Shaped], reason: str) -> None:
    with pytest.raises(NotFusible) as refused:
        shaped(function, *inputs)
    assert str(refused.value.reason) == reason


# --- what is taken in -----------------------------------------------------------------------


def traced(function: Callable[..., Any], *shapes: tuple[int, ...], dtype: torch.dtype = BF16) -> fx.Graph:
    with FakeTensorMode():
        inputs = [torch.empty(shape, dtype=dtype) for shape in shapes]
        return make_fx(function, tracing_mode="real")(*inputs).graph


def kernels(grouping: Grouping) -> list[str]:
    return [kernel.file.text.name for kernel in grouping.kernels]


def left(grouping: Grouping) -> dict[str, str]:
    return {name: str(reason) for name, reason in grouping.left}


def _gated(x: torch.Tensor, g: torch.Tensor, u: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    return (F.silu(x @ g.t()) * (x @ u.t())) @ d.t() + x


GATED = ((14336, 4096), (14336, 4096), (4096, 14336))


@pytest.mark.parametrize("rows", [1, 16])
def test_products_of_few_rows_take_in_what_is_around_them(rows: int) -> None:
    grouping = grouped(traced(_gated, (rows, 4096), *GATED))
    assert kernels(grouping) == ["mm_silu_mul", "mm_add"]
    assert left(grouping) == {"mm_1": "its neighbours are in the kernel of another product"}
    assert [name for name, _ in grouping.taken] == ["mm", "mm_2"]


def test_large_products_stay_with_the_library_and_the_arithmetic_is_said() -> None:
    """2 * 8192 * 4096 * 14336 operations take 1,217.8 us at 790e12 a second, 1.43 times that at 0.7 of it."""
    grouping = grouped(traced(_gated, (8192, 4096), *GATED))
    assert kernels(grouping) == ["silu_mul"]
    said = left(grouping)
    assert set(said) == {"mm", "mm_1", "mm_2"}
    assert said["mm"] == (
        "in one kernel with silu, mul 1744.7 us at 0.7 of the library's rate, apart 1392.4 us on h200"
    )


def test_the_share_of_a_device_decides() -> None:
    graph = traced(_gated, (8192, 4096), *GATED)
    h200 = default_host().device("h200")
    fast = Prices(replace(h200, emitted_matmul_share={"bfloat16": 0.95}))
    assert kernels(grouped(graph, prices=fast)) == ["mm_silu_mul"]
    # Nothing is known of a device: half of the library's rate.
    assert (
        Prices(replace(h200, emitted_matmul_share={})).share(
            shaped(lambda x, w: x @ w, ((64, 64), BF16), ((64, 64), BF16)).file
        )
        == 0.5
    )


def test_prices_are_those_of_the_gpu_that_a_program_is_planned_for() -> None:
    assert prices_for().device.name == "h200"
    assert prices_for("cpu").device.name == "h200"
    assert prices_for("a100").device.name == "a100"


def test_an_activation_of_a_long_vector_is_taken_into_a_short_sum() -> None:
    def function(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.gelu(torch.addmm(b, x, w))

    grouping = grouped(traced(function, (8192, 512), (512, 4096), (4096,)))
    assert kernels(grouping) == ["addmm_gelu"]
    ((_, reason),) = grouping.taken
    assert "in one kernel with gelu" in str(reason)
    # A longer sum loses more to the library than the activation gains.
    longer = grouped(traced(function, (8192, 1024), (1024, 4096), (4096,)))
    assert not longer.taken
    assert "in one kernel with gelu 129.3 us at 0.7 of the library's rate, apart" in left(longer)["addmm"]


def test_a_dequantized_weight_is_never_written() -> None:
    def function(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return x @ (w.to(BF16) * s).t()

    with FakeTensorMode():
        inputs = [torch.empty(16, 4096, dtype=BF16), torch.empty(4096, 4096, dtype=INT8)]
        graph = make_fx(function, tracing_mode="real")(*inputs, torch.empty(4096, 1, dtype=BF16)).graph
    (kernel,) = grouped(graph).kernels
    assert [tensor.dtype for tensor in kernel.file.built.inputs].count(INT8) == 1


def test_what_others_read_too_is_not_taken_into_a_product() -> None:
    """``h`` is saved: a kernel that makes tiles of it for each tile of the result does not store it."""

    def function(g: torch.Tensor, u: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = F.silu(g) * u
        return h @ w, h

    grouping = grouped(traced(function, (16, 4096), (16, 4096), (4096, 1024)))
    assert kernels(grouping) == ["silu_mul"]
    assert left(grouping)["mm"] == "(16, 1024) is not what the loops of the kernel run over"


def test_nothing_is_taken_in_around_what_has_to_run_in_between() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = x @ w
        return y.cumsum(0) * y + 1

    grouping = grouped(traced(function, (16, 1024), (1024, 1024)))
    assert kernels(grouping) == ["mul_add"]
    assert left(grouping)["mm"] == "nothing goes into one kernel with this product"


def test_a_product_is_taken_in_only_where_memory_allows() -> None:
    """Run after the cumulative sums, the product with its neighbour holds its operands while they run."""

    def function(a: torch.Tensor, b: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        y = a @ b
        for _ in range(3):
            z = z.cumsum(0).cumsum(1)
        return y.relu() + z

    graph = traced(function, (512, 512), (512, 64), (512, 64))
    owned = [node for node in graph.nodes if node.op == "placeholder"][:2]
    tight = grouped(graph, owned)
    assert kernels(tight) == ["relu_add"]
    assert left(tight)["mm"] == "its kernel would hold more at once than the program may"
    assert kernels(grouped(graph, owned, sys.maxsize)) == ["mm_relu_add"]
