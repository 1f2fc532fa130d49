"""llm-int8: outliers are exact, kernels in the interpreter and as machine code, state, what is refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.errors import QuantizationError
from graphopt.packing import pack_weights
from graphopt_kernels.quantized.byte_launch import LIBRARY, Problem, launch_for
from graphopt_kernels.quantized.dynamic import Int8Dynamic
from graphopt_kernels.quantized.outliers import LlmInt8
from tests.interpreted import interpreted
from tests.test_quantized_bytes import compiled

BF16, FP16, FP32, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
LARGE = [3, 11, 39]
ops = torch.ops.graphopt


def case(n: int = 24, k: int = 40, dtype: torch.dtype = FP32, rows: int = 5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    weight, x = (torch.randn(n, k) / k**0.5).to(dtype), torch.randn(rows, k).to(dtype)
    x[:, LARGE] *= 30
    return weight, x


def packed_of(weight: Tensor, x: Tensor, **options: Any) -> list[Tensor]:
    scheme = LlmInt8(**{"most": 0.1, **options})
    return list(scheme.pack(weight, {"largest": x.abs().amax(0)}).values())


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_products_are_those_of_the_arithmetic_that_is_stated(dtype: torch.dtype) -> None:
    weight, x = case(dtype=dtype)
    codes, scales, kept, columns, outliers = tensors = packed_of(weight, x)
    assert columns.tolist() == LARGE and kept.sum() == 37
    assert torch.equal(outliers, weight[:, LARGE].t())
    bias = torch.randn(24).to(dtype)
    found = ops.linear_llm_int8(x, *tensors, bias)
    inner = x.float().index_fill(1, columns.long(), 0)
    by_row = inner.abs().amax(1, keepdim=True) / 127
    exact = (inner / by_row).round().double() @ codes.double().t() * by_row * scales
    exact = exact + x[:, LARGE].double() @ outliers.double() + bias
    assert found.dtype is dtype and found.is_contiguous()
    torch.testing.assert_close(found.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=3e-5)
    unpacked = ops.unpack_llm_int8(*tensors, dtype)
    assert torch.equal(unpacked[:, LARGE], weight[:, LARGE])
    assert (unpacked - weight).norm() < 0.01 * weight.norm()


def test_errors_are_far_below_those_of_int8_dynamic_where_channels_are_large() -> None:
    weight, x = case(48, 400, rows=50)
    exact = x.double() @ weight.double().t()
    found = ops.linear_llm_int8(x, *packed_of(weight, x, most=0.01), None)
    dynamic = ops.linear_int8_dynamic(x, *Int8Dynamic().pack(weight, {}).values(), None)
    assert (found - exact).norm() < 0.2 * (dynamic - exact).norm()


def test_without_outliers_it_is_int8_dynamic() -> None:
    weight, x = case()
    dynamic = ops.linear_int8_dynamic(x, *Int8Dynamic().pack(weight, {}).values(), None)
    for options in ({"threshold": 1e6}, {"most": 0.0}, {"most": 0.02}):
        tensors = packed_of(weight, x, **options)
        assert not tensors[3].numel()
        assert torch.equal(ops.linear_llm_int8(x, *tensors, None), dynamic)


def test_the_largest_channels_are_outliers_where_there_is_no_room_for_all() -> None:
    weight, x = case()
    largest = x.abs().amax(0)
    (expected,) = largest.topk(1).indices.tolist()
    assert packed_of(weight, x, most=0.025)[3].tolist() == [expected]
    equal = LlmInt8(most=0.1).pack(weight, {"largest": torch.full((40,), 7.0)})
    assert equal["columns"].tolist() == [0, 1, 2, 3]


def test_operators_are_sound() -> None:
    weight, x = case()
    tensors = packed_of(weight, x)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for shape in ((3, 40), (40,), (0, 40), (2, 1, 40)):
        given = torch.randn(shape, requires_grad=True)
        for bias in (None, torch.randn(24, requires_grad=True)):
            torch.library.opcheck(ops.linear_llm_int8.default, (given, *tensors, bias), test_utils=tests)
    torch.library.opcheck(ops.unpack_llm_int8.default, (*tensors, BF16), test_utils=tests)


def test_gradients_are_those_of_the_unpacked_weight() -> None:
    weight, x = case()
    tensors = packed_of(weight, x)
    x.requires_grad_()
    grad = torch.randn(5, 24)
    ops.linear_llm_int8(x, *tensors, None).backward(grad)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, grad @ ops.unpack_llm_int8(*tensors, FP32))


def test_a_nan_and_an_infinity_stay_in_their_row() -> None:
    weight, x = case()
    tensors = packed_of(weight, x)
    clean = ops.linear_llm_int8(x, *tensors, None)
    x[1, 5], x[2, 7], x[3, 11], x[4, 11] = math.nan, math.inf, math.inf, math.nan
    found = ops.linear_llm_int8(x, *tensors, None)
    assert torch.equal(found[0], clean[0])
    assert found[1].isnan().all() and not found[2].isfinite().any() and found[4].isnan().all()
    assert torch.equal(found[3], F.linear(x, weight)[3]), "infinite of the sign of the outlier's weight"


def test_bytes_are_at_most_what_is_stated() -> None:
    weight, x = case(24, 400)
    for options, columns in (({}, 3), ({"most": 0.005}, 2)):
        tensors = packed_of(weight, x, **{"most": 0.01, **options})
        scheme = LlmInt8(**options)
        most = scheme.stored_bytes(24, 400, FP32)
        stored = sum(tensor.nbytes for tensor in tensors)
        assert len(tensors[3]) == columns and not scheme.exact_bytes
        left = int(scheme.most * 400) - columns
        assert stored == most - left * (4 + 24 * 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(40, 200), nn.Linear(200, 40)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(x)))
        return y


SCHEMES = {"up.weight": (LlmInt8(most=0.1), "rows"), "down.weight": (LlmInt8(), "rows")}


def statistics(up: int, down: int) -> dict[str, dict[str, Tensor]]:
    def largest(k: int, count: int) -> dict[str, Tensor]:
        return {"largest": torch.where(torch.arange(k) % (k // 4) < count, 8.0, 1.0)}

    return {"up.weight": largest(40, up), "down.weight": largest(200, down)}


def test_a_model_reads_packed_weights_and_loads_states_with_other_outliers() -> None:
    x, model, other = torch.randn(6, 40), Net(), Net()
    dense = copy.deepcopy(model.state_dict())
    pack_weights(model, SCHEMES, statistics(1, 0))
    fast = graphopt.optimize(model, (x,), emit="eager", on_error="raise")
    assert len(list(fast.programs[0].nodes(ops.linear_llm_int8.default))) == 2
    torch.testing.assert_close(fast(x), Net()(x), rtol=0.05, atol=0.05)
    nn.init.normal_(other.up.weight)
    pack_weights(other, SCHEMES, statistics(1, 1))
    assert other.state_dict()["down.weight.columns"].shape == (2,)
    with torch.no_grad():
        other.load_state_dict(model.state_dict())
        assert other.state_dict()["down.weight.columns"].shape == (0,)
        assert torch.equal(other(x), model(x))
        other.load_state_dict(dense)
        # Its own statistics say which columns are outliers.
        assert other.state_dict()["down.weight.columns"].shape == (2,)
        assert torch.equal(other.up.weight, model.up.weight)


@pytest.mark.parametrize(
    ("options", "found", "reason"),
    [
        ({}, {}, "cannot be packed as llm-int8: it needs calibration: statistics have no 'largest'"),
        ({}, {"largest": torch.ones(8)}, r"of other inputs: 'largest' is \[8\], expected \[16\]"),
        ({}, {"largest": torch.full((16,), math.nan)}, "calibration met NaN: 'largest' holds it"),
        ({"most": 1.5}, {"largest": torch.ones(16)}, r"most is 1\.5: expected 0 to 1"),
        ({"threshold": -1.0}, {"largest": torch.ones(16)}, "threshold is -1: expected 0 or more"),
    ],
    ids=["none", "other", "nan", "most", "threshold"],
)
def test_what_cannot_be_packed_is_refused_before_anything_changes(
    options: dict[str, Any], found: dict[str, Tensor], reason: str
) -> None:
    model = nn.Linear(16, 8)
    before = model.weight
    with pytest.raises(QuantizationError, match=reason):
        pack_weights(model, {"weight": (LlmInt8(**options), "rows")}, {"weight": found})
    assert model.weight is before
    with pytest.raises(QuantizationError, match="needs calibration"):
        LlmInt8().pack(before.detach(), {})
    wide = nn.Linear(16, 8, dtype=torch.float64)
    with pytest.raises(QuantizationError, match="takes weights of float32, float16 and bfloat16, got"):
        pack_weights(wide, {"weight": (LlmInt8(), "rows")}, {"weight": {"largest": torch.ones(16)}})


# --- kernels ------------------------------------------------------------------------------------


def test_kernels_compute_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    found = interpreted("outlier_kernels.py")
    for name, error in found["errors"].items():
        assert error < (3e-7 if name[0] == "2" else 4e-4), found
    assert all(all(same) for same in found["split"]), "rows are rounded as others are"
    assert all(found["poisoned"])


def test_products_with_outliers_become_machine_code_without_spills() -> None:
    """int8 on tensor cores, weights 16 bytes at a time, outliers on tensor cores in the end."""
    pytest.importorskip("triton")
    for rows in (1, 16, 64):
        problem = Problem(rows, 4096, 4096, BF16, INT8, True)
        launch = launch_for(problem, 132, library=False)
        assert launch != LIBRARY
        for parts in (1, 2):
            code = compiled(problem, launch._replace(parts=parts), tail=True)
            assert not code.spills and code.shared + code.asked <= 227 * 1024, launch
            assert code.widths("LDGSTS")[128]
            assert any(name.startswith(("IMMA", "IGMMA")) for name in code.instructions)
            assert any(name.startswith(("HMMA", "HGMMA")) for name in code.instructions)


def test_rounding_rows_beside_outliers_becomes_machine_code_without_spills() -> None:
    pytest.importorskip("triton")
    from graphopt_kernels.emit.machine_code import compile_function_for_sm90
    from graphopt_kernels.quantized.outliers_triton import split_kernel
    from graphopt_kernels.row_norm_launch import tile
    from graphopt_kernels.row_quantize import warps_and_registers

    types = {
        "data": "*bf16", "kept": "*u8", "columns": "*i32", "codes": "*i8", "scales": "*fp32",
        "beside": "*bf16", "rows": "i32", "limit": "fp32", "least": "fp32", "COUNT": "i32",
    }  # fmt: skip
    for width in (4096, 14336):
        block, rows = tile(width)
        constants = {"WIDTH": width, "BLOCK": block, "ROWS": rows, "WIDE": 64}
        code = compile_function_for_sm90(
            split_kernel, types, constants, warps=warps_and_registers(block, False)["num_warps"],
            aligned=[name for name, kind in types.items() if kind[0] == "*"],
        )  # fmt: skip
        assert not code.spills and code.widths("LDG")[128]


# --- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_products_on_a_gpu_are_those_of_a_cpu(dtype: torch.dtype) -> None:
    for n, k in ((1000, 1024), (4096, 4096), (77, 250), (129, 1003)):
        weight, x = case(n, k, dtype, rows=300)
        tensors, bias = packed_of(weight, x, most=0.02), torch.randn(n).to(dtype)
        given = [tensor.cuda() for tensor in (*tensors, bias)]
        for rows in (0, 1, 3, 8, 16, 17, 40, 64, 100, 300):
            found = ops.linear_llm_int8(x[:rows].cuda(), *given)
            expected = ops.linear_llm_int8(x[:rows], *tensors, bias)
            limit = 1e-5 + 2 * torch.finfo(dtype).eps
            assert (found.cpu().double() - expected.double()).norm() <= limit * expected.double().norm()
            assert torch.equal(found, ops.linear_llm_int8(x[:rows].cuda(), *given)), (n, k, rows)


@pytest.mark.gpu
def test_a_graph_of_calls_is_captured_without_waiting_for_the_device() -> None:
    weight, x = (tensor.cuda() for tensor in case(256, 512, BF16, rows=16))
    tensors = packed_of(weight, x)
    for rows in (1, 16):
        expected = ops.linear_llm_int8(x[:rows], *tensors, None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = ops.linear_llm_int8(x[:rows], *tensors, None)
        graph.replay()
        assert torch.equal(found, expected)
