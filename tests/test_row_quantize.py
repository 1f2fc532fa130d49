"""Rows in eight bits, alone and behind a norm: codes and scales of separate operators, kernel, refusals."""

from __future__ import annotations

import itertools
import math
import re
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import graphopt_kernels.row_quantize as module
from graphopt_kernels.emit.machine_code import compile_function_for_sm90
from graphopt_kernels.row_norm_launch import tile
from tests.loss_kernels import interpret

ops = torch.ops.graphopt
FP8, INT8 = torch.float8_e4m3fn, torch.int8
LIMITS = {FP8: 448.0, INT8: 127.0}
LEAST = 1e-12
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
CODES = pytest.mark.parametrize("codes", [FP8, INT8], ids=str)


def expected(y: torch.Tensor, codes: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    limit = LIMITS[codes]
    scale = (y.abs().amax(-1, keepdim=True).float() / limit).clamp(min=LEAST)
    y = y.float() / scale
    return (y.round() if codes is INT8 else y).clamp(-limit, limit).to(codes), scale


def same(found: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(found, right, strict=True):
        assert a.dtype is b.dtype and a.shape == b.shape
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0, equal_nan=True)


@CODES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_and_scales_are_those_of_separate_operators(codes: torch.dtype, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (100 * torch.randn(3, 5, 96)).to(dtype)
    x[0, 1] = 0
    x[0, 2] *= 1e-4
    same(ops.quantize_rows(x, codes, LIMITS[codes], LEAST), expected(x, codes))
    spread = x.transpose(0, 1)
    same(ops.quantize_rows(spread, codes, LIMITS[codes], LEAST), expected(spread, codes))


@CODES
@pytest.mark.parametrize("centered", [False, True])
def test_behind_a_norm_they_are_those_of_the_norm(codes: torch.dtype, centered: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(6, 96).bfloat16(), torch.randn(96).bfloat16(), torch.randn(96).bfloat16()
    if centered:
        y = F.layer_norm(x, (96,), weight, bias, 1e-6)
        norm: tuple[Any, ...] = (weight, bias, 1e-6, True, 0.0, False, torch.bfloat16)
    else:
        wide = x.float()
        y = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()
        norm = (weight, None, 1e-6, False, 0.0, True, torch.bfloat16)
    found, scale = ops.row_norm_quantize(x, *norm, codes, LIMITS[codes], LEAST)
    right, right_scale = expected(y, codes)
    # LayerNorm is rounded from another order of sums: a bfloat16 in a few hundred may be the next one.
    torch.testing.assert_close(scale, right_scale, rtol=2**-8, atol=0)
    torch.testing.assert_close(
        found.float() * scale, right.float() * right_scale, rtol=0.13, atol=float(right_scale.max())
    )
    same(
        ops.row_norm_quantize(x, *norm, codes, LIMITS[codes], LEAST),
        expected(ops.row_norm(x, *norm)[0], codes),
    )


@CODES
def test_nan_infinities_and_no_rows_are_as_in_separate_operators(codes: torch.dtype) -> None:
    for value in (math.nan, math.inf, -math.inf):
        x = torch.randn(3, 9)
        x[1, 4] = value
        found, right = ops.quantize_rows(x, codes, LIMITS[codes], LEAST), expected(x, codes)
        torch.testing.assert_close(found[1], right[1], equal_nan=True)
        # Which integer stands for NaN is not defined.
        rows = [0, 2] if codes is INT8 else [0, 1, 2]
        same((found[0][rows],), (right[0][rows],))
    for shape in ((0, 9), (2, 0, 9)):
        codes_of, scale = ops.quantize_rows(torch.ones(shape), codes, LIMITS[codes], LEAST)
        assert codes_of.shape == shape and scale.shape == (*shape[:-1], 1)


def test_the_operators_pass_opcheck() -> None:
    check: Any = torch.library.opcheck
    x, weight = torch.randn(3, 16), torch.randn(16)
    check(ops.quantize_rows.default, (x, INT8, 127.0, LEAST))
    check(
        ops.row_norm_quantize.default, (x, weight, None, 1e-6, False, 0.0, False, x.dtype, INT8, 127.0, LEAST)
    )
    # opcheck cannot compare float8.
    for shape in ((3, 16), (2, 3, 16)):
        with torch._subclasses.FakeTensorMode() as mode:
            codes, scale = ops.quantize_rows(mode.from_tensor(torch.ones(shape)), FP8, 448.0, LEAST)
        real = ops.quantize_rows(torch.ones(shape), FP8, 448.0, LEAST)
        for fake, made in zip((codes, scale), real, strict=True):
            assert (fake.shape, fake.dtype, fake.stride()) == (made.shape, made.dtype, made.stride())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"input": torch.ones(())}, "takes rows, got a number"),
        ({"input": torch.ones(3, 6, dtype=torch.float64)}, "takes rows of 16 or 32 bits, got torch.float64"),
        ({"codes": torch.uint8}, "quantizes to torch.float8_e4m3fn or torch.int8, got torch.uint8"),
        (
            {"limit": 500.0},
            "torch.float8_e4m3fn holds no numbers up to 500.0: expected a limit .*, up to 448",
        ),
        ({"limit": 0.0}, "torch.float8_e4m3fn holds no numbers up to 0.0: .*"),
        ({"codes": INT8, "limit": 128.0}, "torch.int8 holds no numbers up to 128.0: .*, up to 127"),
        ({"least": -1.0}, "the least scale is -1.0: expected 0 or more"),
    ],
)
def test_what_they_do_not_take_they_say(change: dict[str, Any], reason: str) -> None:
    given = {"input": torch.ones(3, 6), "codes": FP8, "limit": 448.0, "least": LEAST} | change
    assert re.fullmatch(reason, str(module.quantize_supports(**given)))
    settings = (None, None, 1e-6, False, 0.0, False, torch.float32)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(given.pop("input"))
        with pytest.raises(ValueError, match=f"quantize_rows: {reason}"):
            ops.quantize_rows(fake, *given.values())
        with pytest.raises(ValueError, match="row_norm_quantize: "):
            ops.row_norm_quantize(fake, *settings, *given.values())


@needs_triton
def test_the_kernel_computes_what_the_references_do() -> None:
    interpret("""
        import itertools, math
        import torch
        import graphopt_kernels.row_quantize as module

        torch.manual_seed(0)
        kernels = module._kernels()
        for dtype, codes, (rows, width) in itertools.product(
            (torch.float32, torch.float16), module.CODES, ((9, 37), (5, 64))
        ):
            limit = 448.0 if codes is not torch.int8 else 127.0
            x = (3 * torch.randn(rows, width)).to(dtype)
            x[1] = 0
            x[2, 3] = math.inf
            x[3, 3] = math.nan
            if dtype is torch.float32:
                x[4] *= 1e-37
            weight, bias = torch.randn(width).to(dtype), torch.randn(width)
            for norm, (limit, least) in itertools.product(
                (
                    None,
                    (weight, None, 1e-5, False, 1.0, False, dtype),
                    (weight, None, 1e-5, False, 0.0, True, torch.float16),
                    (weight, bias, 1e-5, True, 0.0, False, torch.float32),
                ),
                ((limit, 1e-12), (limit / 2, 0.0)),
            ):
                block = max(16, 1 << (width - 1).bit_length())
                found, scale = module.launch_rows(kernels, x, norm, codes, limit, least, block=block, rows=2)
                if norm is None:
                    right, right_scale = module.quantize_reference(x, codes, limit, least)
                else:
                    right, right_scale = module.row_norm_quantize_reference(x, *norm, codes, limit, least)
                torch.testing.assert_close(scale, right_scale, rtol=2e-3, atol=0, equal_nan=True)
                finite = right_scale.isfinite().squeeze(1)
                if least == 0:
                    # Zero over zero.
                    finite &= (right_scale != 0).squeeze(1)
                if codes is torch.int8:
                    gap = (found[finite].int() - right[finite].int()).abs()
                    assert int(gap.max()) <= 1
                    assert float((gap > 0).float().mean()) <= (0.0 if norm is None else 0.05)
                else:
                    # The interpreter's conversion is wrong for NaN and where rounding carries into the
                    # exponent.
                    differ = found[finite].float() != right[finite].float()
                    assert float(differ.float().mean()) <= (0.05 if norm is None else 0.1)
    """)


@needs_triton
@pytest.mark.parametrize("width", [2048, 5120, 8192, 14336])
def test_the_kernel_compiles_for_sm_90_without_spills(width: int) -> None:
    import triton.language as tl

    from graphopt_kernels.row_quantize_triton import quantize_kernel

    block, rows = tile(width)
    for codes, centered, normalized in itertools.product(("fp8e4nv", "i8"), (False, True), (False, True)):
        if centered and not normalized:
            continue
        launch = module.warps_and_registers(block, normalized and not centered)
        pointers = {
            **dict.fromkeys(("data", "weight", "bias"), "*bf16"),
            "codes": f"*{codes}",
            "scales": "*fp32",
        }
        numbers = {"rows": "i32", **dict.fromkeys(("eps", "offset", "limit", "least"), "fp32")}
        flags = {"NORMALIZED": normalized, "CENTERED": centered, "WEIGHTED": True, "BIASED": centered}
        others = {"ROUNDED": not centered, "OFFSET": False, "DTYPE": tl.bfloat16, "WHOLE": codes == "i8"}
        sizes = {"CLAMPED": False, "TINY": False, "WIDTH": width, "BLOCK": block, "ROWS": rows}
        code = compile_function_for_sm90(
            quantize_kernel,
            {**pointers, **numbers},
            {**flags, **others, **sizes},
            warps=launch["num_warps"],
            aligned=tuple(pointers),
            most_registers=launch.get("maxnreg"),
        )
        assert not code.spills, (codes, centered, code)
        assert code.shared + code.asked <= 4096
        assert code.widths("LDG")[128] and code.widths("STG")[128]
        programs = 65536 // (32 * launch["num_warps"] * -(-code.registers // 8) * 8)
        assert programs >= (2 if block < 16384 or "maxnreg" in launch else 1)
