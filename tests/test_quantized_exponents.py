"""lossless12: every bfloat16 comes back, kernels in the interpreter and as machine code, what is refused."""

from __future__ import annotations

import math
import re
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.errors import QuantizationError
from graphopt.packing import pack_weights
from graphopt.plugins import default_host
from graphopt_kernels.quantized.byte_launch import LIBRARY, Launch, dense_seconds
from graphopt_kernels.quantized.exponent_launch import (
    Exponents,
    check_launch,
    launch_for,
    launches,
    predicted_seconds,
)
from graphopt_kernels.quantized.exponents import Lossless12
from tests.interpreted import interpreted

BF16 = torch.bfloat16
H200 = 132
ops = torch.ops.graphopt


def random_weight(n: int = 24, k: int = 96) -> Tensor:
    torch.manual_seed(n)
    return (torch.randn(n, k) / k**0.5).to(BF16)


def packed_of(weight: Tensor, **options: Any) -> list[Tensor]:
    return list(Lossless12(**options).pack(weight, {}).values())


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


# --- numbers ------------------------------------------------------------------------------------


def test_every_finite_bfloat16_comes_back_bit_for_bit() -> None:
    words = torch.arange(2**16, dtype=torch.int32)
    finite = words[(words >> 7 & 0xFF) != 0xFF]
    # 16 exponents of either sign fill rows without an escape; others have them at both ends of the list.
    rows = finite.view(2, 255, 128).transpose(0, 1)[:240].reshape(15, 2**12).contiguous()
    for each in (rows, rows.view(15, 4, 1024).transpose(1, 2).reshape(60, 1024)):
        weight = torch.where(each > 0x7FFF, each - 0x10000, each).to(torch.int16).view(BF16)
        assert same_bits(ops.unpack_lossless12(*packed_of(weight), BF16), weight)
    others = finite[(finite >> 7 & 0xFF) >= 240].view(30, 128)
    others = torch.where(others > 0x7FFF, others - 0x10000, others).to(torch.int16).view(BF16)
    for scale in (1.0, 1e-30, 1e38):
        for where in (0, 3, 99):
            weight = (torch.ones(30 * 128, 128) * scale).to(BF16)
            weight[:, where] = others.flatten()
            tensors = packed_of(weight)
            assert same_bits(ops.unpack_lossless12(*tensors, BF16), weight)
            assert bool((tensors[3] != -1).any()) == (scale < 1e37)


def test_signed_zeros_and_denormal_numbers_come_back_beside_others() -> None:
    weight = random_weight()
    weight[0, :4] = torch.tensor([0.0, -0.0, 1e-39, -1e-40])
    weight[1], weight[2] = 0, -0.0
    weight[3] *= 1e-38
    for options in ({"room": 64}, {"room": 128}):
        with pytest.raises(QuantizationError, match=r"4 weights of a row have other exponents than the 16"):
            packed_of(weight, **options)
    weight[0, 2:4] = 1.0
    tensors = packed_of(weight)
    assert same_bits(ops.unpack_lossless12(*tensors, BF16), weight)
    assert (tensors[3] != -1).sum(1).tolist()[:4] == [2, 0, 0, 0]
    assert torch.equal(ops.unpack_lossless12(*tensors, torch.float32), weight.float())


def test_products_on_a_cpu_are_those_of_the_dense_weight_bit_for_bit() -> None:
    weight = random_weight()
    weight[3, 7] = 300.0
    for shape in ((3, 96), (96,), (0, 96), (2, 5, 96)):
        x, bias = torch.randn(shape).to(BF16), torch.randn(24).to(BF16)
        for added in (None, bias):
            found = ops.linear_lossless12(x, *packed_of(weight), added)
            assert torch.equal(found, F.linear(x, weight, added))
    x = torch.randn(4, 96).to(BF16)
    x[0, 7], x[1, 7], x[2, 2] = math.inf, math.nan, -math.inf
    found, dense = ops.linear_lossless12(x, *packed_of(weight), None), F.linear(x, weight)
    torch.testing.assert_close(found, dense, rtol=0, atol=0, equal_nan=True)


def test_operators_are_sound() -> None:
    tensors = packed_of(random_weight())
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for shape in ((3, 96), (0, 96), (2, 1, 96)):
        x = torch.randn(shape).to(BF16).requires_grad_()
        for bias in (None, torch.randn(24).to(BF16).requires_grad_()):
            torch.library.opcheck(ops.linear_lossless12.default, (x, *tensors, bias), test_utils=tests)
    torch.library.opcheck(ops.unpack_lossless12.default, (*tensors, BF16), test_utils=tests)


def test_gradients_are_those_of_the_dense_weight() -> None:
    weight = random_weight()
    x, bias = (torch.randn(shape).to(BF16).requires_grad_() for shape in ((5, 96), (24,)))
    y, other, added = x.detach().clone().requires_grad_(), weight, bias.detach().clone().requires_grad_()
    grad = torch.randn(5, 24).to(BF16)
    ops.linear_lossless12(x, *packed_of(weight), bias).backward(grad)
    F.linear(y, other, added).backward(grad)
    assert torch.equal(x.grad, y.grad)  # type: ignore[arg-type]
    torch.testing.assert_close(bias.grad, added.grad)


class Net(nn.Module):
    """Two linears; a table that is looked up and read by the head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, 64, padding_idx=0)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.head = nn.Linear(64, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.head(self.down(torch.relu(self.up(self.embed(tokens)))))
        return x


def test_a_packed_model_gives_what_the_model_gives_bit_for_bit() -> None:
    model, tokens = Net().to(BF16), torch.arange(12).view(3, 4)
    with torch.no_grad():
        expected, dense = model(tokens), {name: value.clone() for name, value in model.state_dict().items()}
        pack_weights(
            model, {f"{name}.weight": (Lossless12(), "rows") for name in ("embed", "up", "down")}
        )
        assert torch.equal(model(tokens), expected)
        fast = graphopt.optimize(model, (tokens,), emit="eager", on_error="raise")
        assert torch.equal(fast(tokens), expected)
    targets = [str(node.target) for node in fast.programs[0].nodes() if "lossless12" in str(node.target)]
    assert [name.split(".")[1] for name in targets] == ["unpack_lossless12"] + ["linear_lossless12"] * 3
    (rows,) = fast.programs[0].nodes(ops.unpack_lossless12.default)
    assert rows.meta["val"].shape == (12, 64), "rows that are looked up alone are unpacked"
    fast.load_state_dict({name: value * 2 for name, value in dense.items()})
    assert torch.equal(model.up.weight, dense["up.weight"] * 2)


def test_bytes_are_those_that_are_stated_and_about_three_quarters() -> None:
    for n, k in ((24, 96), (5, 1000), (3, 5000)):
        tensors = packed_of(random_weight(n, k))
        assert sum(tensor.nbytes for tensor in tensors) == Lossless12().stored_bytes(n, k, BF16)
    for k in (4096, 14336):
        assert Lossless12().stored_bytes(4096, k, BF16) < 0.756 * 2 * 4096 * k


def test_rows_of_usual_weights_have_room_for_what_escapes() -> None:
    """Of normal ones and of Student's with four degrees of freedom, whose tails are heavy."""
    torch.manual_seed(0)
    normal = torch.randn(64, 4096)
    heavy = torch.randn(64, 4096) / torch.distributions.Chi2(4.0).sample((64, 4096)).div(4).sqrt()
    for weight in (normal, heavy):
        used = (packed_of((weight / 64).to(BF16))[3] != -1).sum(1)
        assert int(used.max()) <= 8


@pytest.mark.parametrize(
    ("weight", "options", "reason"),
    [
        (torch.randn(8, 64), {}, "takes weights of bfloat16, got torch.float32"),
        (torch.randn(8, 64).half(), {}, "takes weights of bfloat16, got torch.float16"),
        (random_weight(8, 33), {}, "it would take 560 bytes, no fewer than the 528 that it has"),
        (random_weight(), {"room": 0}, "room is 0: expected 1 or more"),
        (
            (torch.ones(2, 128) * 2.0 ** torch.arange(-64, 64)).to(BF16), {},
            "112 weights of a row have other exponents than the 16 that most of it have: room=8 has room for",
        ),
    ],
    ids=["float32", "float16", "short", "room", "spread"],
)  # fmt: skip
def test_weights_that_gain_nothing_are_refused(weight: Tensor, options: dict[str, Any], reason: str) -> None:
    model = nn.Linear(*weight.shape[::-1], bias=False)
    model.weight = nn.Parameter(weight)
    with pytest.raises(QuantizationError, match=reason):
        pack_weights(model, {"weight": (Lossless12(**options), "rows")})
    assert torch.equal(model.weight, weight)


def test_rows_that_are_too_long_for_their_columns_are_refused() -> None:
    reason = Lossless12().refuses(4, 2**16 + 1, BF16, torch.device("cpu"))
    assert str(reason) == "takes rows of up to 65536 weights, got 65537"
    assert Lossless12().refuses(4, 2**16, BF16, torch.device("cpu")) is None


# --- kernels ------------------------------------------------------------------------------------


def test_kernels_compute_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    found = interpreted("exponent_kernels.py")
    # Of the sum of sizes: float32 sums, then the dtype of x.
    for name, error in found["errors"].items():
        assert error < (5e-4 if name[0] in "14" else 3e-7), found
    assert all(found["unpacked"])
    assert all(all(kinds) for kinds in found["poisoned"].values()), found["poisoned"]


def run_ptx(text: str, codes: Any, pairs: Any, bases: Any, others: Any) -> list[Any]:
    """Both words of results of the instructions that make weights, for words of each operand; the first two
    weights have ``bases``, the last two ``others``."""
    registers: dict[str, Any] = {"$2": codes, "$3": pairs, "0": np.zeros_like(codes)}
    registers |= {"$4": bases, "$5": bases, "$6": others, "$7": others}
    for statement in text.strip("{} \n").split(";"):
        name, _, rest = statement.strip().partition(" ")
        given = [part.strip() for part in rest.split(",")]
        if not name or name == ".reg":
            continue
        sources = [registers.get(part, part) for part in given[1:]]
        a = sources[0]
        if name.startswith("prmt"):
            result = np.zeros_like(codes)
            for place in range(4):
                chosen = int(given[3], 16) >> (4 * place) & 15
                word = (a, sources[1])[(chosen & 7) // 4]
                byte = word >> np.uint32(8 * (chosen & 3)) & np.uint32(255)
                byte = np.where(byte > 127, 255, 0).astype(np.uint32) if chosen > 7 else byte
                result |= byte << np.uint32(8 * place)
        elif name.startswith("shl"):
            result = a << np.uint32(int(given[2]))
        elif name.startswith("and"):
            result = a & np.uint32(int(given[2], 16))
        elif name.startswith("add"):
            result = a + sources[1]
        else:
            assert name.startswith("lop3") and given[-1] == "0xEA", "a & b | c"
            result = (a & np.uint32(int(given[2], 16))) | sources[2]
        registers[given[0]] = result
    return [registers["$0"], registers["$1"]]


@pytest.mark.parametrize(("name", "shift"), [("_LOW", 0), ("_HIGH", 4)])
def test_instructions_make_the_weights_that_codes_stand_for(name: str, shift: int) -> None:
    """All bytes, with all exponents of windows at either end and in the middle, beside any neighbours."""
    pytest.importorskip("triton")
    from graphopt_kernels.quantized import exponents_triton

    codes = torch.arange(256).repeat_interleave(16)
    index = torch.arange(16).repeat(256)
    order = torch.randperm(4096, generator=torch.Generator().manual_seed(0))
    codes, index = codes[order], index[order]
    pairs = index << shift | (15 - index) << (4 - shift)
    words = [part.to(torch.uint8).numpy().view(np.uint32) for part in (codes, pairs)]
    text = getattr(exponents_triton, name).value
    assert len(re.findall(r";", text)) == 13
    for base in (0, 1, 118, 240):
        for other in (base, base ^ 1):
            # Warp groups take pairs of neighbours from two rows, each with a base of its own.
            both = [np.full_like(words[0], each * 0x00800080) for each in (base, other)]
            first, second = run_ptx(text, *words, *both)
            found = np.stack([first & 0xFFFF, first >> 16, second & 0xFFFF, second >> 16], 1).ravel()
            of = torch.tensor([base, base, other, other]).repeat(len(codes) // 4)
            expected = (codes & 0x80) << 8 | codes & 0x7F | (index + of) << 7
            assert torch.equal(torch.from_numpy(found.astype(np.int64)), expected)


@cache
def compiled(launch: Launch, even: bool = True) -> Any:
    from graphopt_kernels.emit.machine_code import compile_function_for_sm90
    from graphopt_kernels.quantized import exponents_triton as kernels

    types = {
        "x_ptr": "*bf16", "codes_ptr": "*u8", "pairs_ptr": "*u8", "bases_ptr": "*u8", "escapes_ptr": "*i32",
        "bias_ptr": "*bf16", "out_ptr": "*bf16" if launch.parts == 1 else "*fp32", "M": "i32", "N": "i32",
        "K": "i32", "H": "i32", "STEPS": "i32",
    }  # fmt: skip
    constants = {
        "ROOM": 12, "WIDE": 16, "BIASED": True, "PARTS": launch.parts, "EVEN": even, "FAST": True,
        "BLOCK_M": launch.rows, "BLOCK_N": launch.columns, "BLOCK_K": launch.inner, "SLICES": launch.slices,
    }  # fmt: skip
    by_16 = [name for name in types if name.endswith("_ptr") or name == "H" or (even and name in "NK")]
    kernel = kernels.slices_kernel if launch.kind == "slices" else kernels.tile_kernel
    return compile_function_for_sm90(
        kernel, types, constants, warps=launch.warps, stages=launch.stages, aligned=by_16
    )


def problem_of(rows: int, columns: int, inner: int) -> Exponents:
    return Exponents(rows, columns, inner, -(-inner // 32) * 16)


def _count(code: Any, *starts: str) -> int:
    return sum(n for name, n in code.instructions.items() if name.startswith(starts))


def test_launches_become_the_machine_code_that_they_are_predicted_to_be() -> None:
    """No spills; weights 16 bytes at a time; tensor cores; nothing converted."""
    pytest.importorskip("triton")
    chosen = {
        launch._replace(parts=min(launch.parts, 2))
        for rows in (1, 16, 32, 64, 256)
        for n, k in ((4096, 4096), (14336, 4096))
        if (launch := launch_for(problem_of(rows, n, k), H200)) != LIBRARY
    }
    assert {launch.kind for launch in chosen} == {"slices", "tiles"}
    for launch in chosen:
        code = compiled(launch)
        assert not code.spills, launch
        assert code.shared + code.asked <= 227 * 1024, launch
        assert _count(code, "HMMA" if launch.kind == "slices" else "HGMMA"), launch
        assert code.widths("LDGSTS")[128] >= 6, launch
        assert not _count(code, "I2F.S", "I2F.U", "I2F.B", "F2F."), (launch, code.instructions)
        if launch.kind == "slices" and launch.rows == 8:
            # Both halves of a step, twice, as the loop is entered and in it.
            weights = 2 * 2 * launch.columns * launch.inner / 32
            assert code.widths("LDG")[8] == 0 and _count(code, "LOP3", "PRMT", "IMAD", "IADD") < 4 * weights


def test_odd_sizes_compile_without_spills() -> None:
    pytest.importorskip("triton")
    for rows in (1, 16):
        launch = launch_for(problem_of(rows, 4099, 1003), H200)
        assert launch.kind == "slices"
        assert not compiled(launch, even=False).spills, launch
    assert launch_for(problem_of(64, 4099, 1003), H200) == LIBRARY


def test_the_other_kernels_compile() -> None:
    pytest.importorskip("triton")
    from graphopt_kernels.emit.machine_code import compile_function_for_sm90
    from graphopt_kernels.quantized import exponents_triton as kernels

    types = {
        "codes_ptr": "*u8", "pairs_ptr": "*u8", "bases_ptr": "*u8", "escapes_ptr": "*i32", "N": "i32",
        "K": "i32", "H": "i32",
    }  # fmt: skip
    constants = {"ROOM": 12, "WIDE": 16, "FAST": True, "BLOCK_N": 4, "BLOCK_K": 1024}
    code = compile_function_for_sm90(
        kernels.unpack_kernel, types | {"out_ptr": "*i16"}, constants, warps=8, aligned=[*types, "out_ptr"]
    )
    assert not code.spills and code.widths("LDG")[128] >= 3 and code.widths("STG")[128] >= 4
    types = {"partial_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16", "count": "i32", "N": "i32"}
    constants = {"BIASED": True, "PARTS": 4, "BLOCK": 512}
    code = compile_function_for_sm90(kernels.add_kernel, types, constants, warps=4, aligned=types)
    assert not code.spills and code.widths("LDG")[128] >= 4


def test_few_rows_are_predicted_to_be_faster_than_dense_by_the_bytes() -> None:
    for n, k in ((4096, 4096), (14336, 4096), (4096, 14336), (128256, 4096)):
        for rows in (1, 8, 16):
            problem = problem_of(rows, n, k)
            launch = launch_for(problem, H200)
            dense = dense_seconds(problem.steps._replace(inner=k))
            assert dense / predicted_seconds(problem, launch, H200) > (1.02 if rows <= 8 else 0.95)


def test_launches_that_compute_something_else_are_told() -> None:
    problem = problem_of(8, 64, 1024)
    good = Launch("slices", 8, 16, 64, 4, 2, 4, 3)
    assert check_launch(problem, good) is None and check_launch(problem, LIBRARY) is None
    for changes, reason in (
        ({"kind": "row"}, "there is no kernel 'row'"), ({"slices": 2}, "every warp has a slice"),
        ({"parts": 3}, "a part has nothing to add up"),
    ):  # fmt: skip
        assert str(check_launch(problem, good._replace(**changes))) == reason


def test_tuning_tries_launches_that_compile_and_run_as_the_kernels_do() -> None:
    pytest.importorskip("triton")
    from graphopt_kernels.tuning.compiling import calls_of, usage_of
    from graphopt_kernels.tuning.model import Gpu, Usage

    spec, gpu = default_host().tunable("packed-exponents"), Gpu.of("H200", (9, 0), H200)
    for problem in list(spec.shipped())[:2]:
        tried = list(spec.configurations(problem))
        assert spec.default(problem) in tried and len(set(tried)) == len(tried) > 10
        best = min(tried, key=lambda c: spec.predict(problem, c, spec.estimate(problem, c), gpu))
        usage = usage_of(calls_of(spec, problem, best, H200), gpu)
        assert isinstance(usage, Usage) and not usage.spilled
    small = problem_of(2, 32, 128)
    (found,) = spec.reference(small, spec.operands(small, torch.device("cpu")))
    assert found.shape == (2, 32) and found.dtype is BF16


def test_what_is_chosen_is_predicted_to_be_no_slower_than_anything_else() -> None:
    for rows in (1, 7, 33, 100, 1000, 4096):
        problem = problem_of(rows, 14336, 4096)
        found = {launch: predicted_seconds(problem, launch, H200) for launch in launches(problem, H200)}
        assert found[launch_for(problem, H200)] == min(found.values())
    assert launch_for(problem_of(4096, 14336, 4096), H200) == LIBRARY


# --- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
def test_weights_on_a_gpu_come_back_bit_for_bit() -> None:
    for n, k in ((1000, 1024), (77, 250), (129, 1003), (4096, 14336)):
        weight = (torch.randn(n, k, device="cuda") / k**0.5).to(BF16)
        weight[3, 7], weight[5], weight[6, k - 1] = 1e20, 0, -0.0
        tensors = packed_of(weight)
        assert bool((tensors[3] != -1).any())
        assert same_bits(ops.unpack_lossless12(*tensors, BF16), weight)


@pytest.mark.gpu
def test_products_on_a_gpu_are_near_float64_and_the_same_in_every_run() -> None:
    torch.manual_seed(0)
    for n, k in ((1000, 1024), (4096, 4096), (77, 250), (129, 1003)):
        weight = (torch.randn(n, k, device="cuda") / k**0.5).to(BF16)
        weight[3, 7], weight[5], weight[6, k - 1] = 100.0, 0, -0.0
        tensors, bias = packed_of(weight), torch.randn(n, device="cuda").to(BF16)
        for rows in (0, 1, 3, 8, 16, 17, 40, 64, 100, 300):
            x = torch.randn(rows, 2 * k, device="cuda")[:, ::2].to(BF16)
            found = ops.linear_lossless12(x, *tensors, bias)
            exact = x.double() @ weight.double().t() + bias.double()
            assert found.shape == (rows, n) and found.dtype is BF16
            # Where the library multiplies, its sums of rows that are not aligned are rounded more than once.
            dense = torch.nn.functional.linear(x, weight, bias)
            limit = max(0.002 * exact.norm(), 1.01 * (dense - exact).norm())
            assert (found - exact).norm() <= limit, (n, k, rows)
            assert torch.equal(found, ops.linear_lossless12(x, *tensors, bias)), (n, k, rows)


@pytest.mark.gpu
def test_infinities_on_a_gpu_are_those_of_the_dense_product() -> None:
    weight = (torch.randn(64, 256, device="cuda") / 16).to(BF16)
    weight[1, 3], weight[2, 3], weight[4, 3] = 1e20, -1e-30, 0
    tensors = packed_of(weight)
    assert (tensors[3] != -1).sum() >= 3
    for rows in (1, 20, 100):
        x = torch.randn(rows, 256, device="cuda").to(BF16)
        x[0, 3] = math.inf
        found, dense = ops.linear_lossless12(x, *tensors, None)[0], F.linear(x, weight)[0]
        assert torch.equal(found.isnan(), dense.isnan())
        assert torch.equal(found[dense.isinf()], dense[dense.isinf()])


@pytest.mark.gpu
def test_every_launch_computes_the_same_on_a_gpu() -> None:
    spec = default_host().tunable("packed-exponents")
    for rows in (1, 5, 16, 50, 200):
        problem = problem_of(rows, 1000, 2048)
        operands = spec.operands(problem, torch.device("cuda"))
        (expected,) = spec.reference(problem, operands)
        for launch in spec.configurations(problem):
            (found,) = spec.run(spec.kernels(), H200, problem, operands, launch)
            error = (found.float() - expected.float()).norm() / expected.float().norm()
            assert error < 0.01, (launch, error)
