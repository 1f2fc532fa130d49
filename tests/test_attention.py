"""The attention operator: numbers against scores that are written out, gradients, kernels, refusals."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import graphopt_kernels.attention as module
import graphopt_kernels.attention_reference as reference

ops = torch.ops.graphopt
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"right": 0},
    "lower right": {"right": -4, "rows": 13, "keys": 9},
    "groups": {"few": 1, "right": 0},
    "window": {"left": 4, "right": 0},
    "both ways": {"left": 2, "right": 3},
    "ahead": {"left": -2, "right": 5, "keys": 17},
    "cap": {"softcap": 2.0, "right": 0},
    "bias": {"bias": (2, 4, 11, 13), "keys": 13},
    "bias of heads": {"bias": (4, 1, 13), "keys": 13, "softcap": 1.5},
    "bias of rows": {"bias": (1, 1, 11, 1), "few": 2},
    "bias of all": {"bias": (1,), "left": 3, "right": 1},
    "bias of batches": {"bias": (2, 1, 11, 11), "few": 2, "left": 3, "right": 1},
    "hidden": {"hidden": (2, 1, 11, 11)},
    "padding": {"hidden": (2, 1, 1, 11), "right": 0, "softcap": 3.0},
    "narrow values": {"value_width": 5},
}


def given(
    *,
    rows: int = 11,
    keys: int = 11,
    few: int = 4,
    value_width: int = 6,
    bias: tuple[int, ...] | None = None,
    hidden: tuple[int, ...] | None = None,
    softcap: float = 0.0,
    left: int | None = None,
    right: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[list[Any], list[Any]]:
    """Operands and settings; keys lie transposed in memory."""
    torch.manual_seed(0)
    query = torch.randn(2, 4, rows, 6, dtype=dtype)
    key = torch.randn(2, few, 6, keys, dtype=dtype).mT
    value = torch.randn(2, keys, few, value_width, dtype=dtype).transpose(1, 2)
    mask: Tensor | None = None
    if bias is not None:
        mask = torch.randn(bias, dtype=dtype)
    if hidden is not None:
        mask = torch.rand(hidden) > 0.4
    leaves = [query, key, value, *([mask] if bias is not None else [])]
    for leaf in leaves:
        leaf.requires_grad_()
    return [query, key, value, mask], [0.4, softcap, left, right]


def written(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, softcap: float,
    left: int | None, right: int | None,
) -> Tensor:  # fmt: skip
    """Attention operator by operator."""
    times = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(times, 1).mT * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None and bias.dtype is torch.bool:
        scores = scores.masked_fill(~bias, float("-inf"))
    elif bias is not None:
        scores = scores + bias
    distance = torch.arange(key.shape[2])[None, :] - torch.arange(query.shape[2])[:, None]
    distance = distance.to(query.device)
    if left is not None:
        scores = scores.masked_fill(distance < -left, float("-inf"))
    if right is not None:
        scores = scores.masked_fill(distance > right, float("-inf"))
    whole = (scores == float("-inf")).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(whole, 0.0), -1).masked_fill(whole, 0.0)
    return weights @ value.repeat_interleave(times, 1)


@pytest.mark.parametrize("slice_elements", [2**20, 100], ids=["one slice", "many slices"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_written_out_scores(
    case: str, slice_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "SLICE_ELEMENTS", slice_elements)
    operands, settings = given(**CASES[case])
    leaves = [x for x in operands if x is not None and x.requires_grad]
    found, right = ops.attention(*operands, *settings)[0], written(*operands, *settings)
    torch.testing.assert_close(found, right)
    grad = torch.randn_like(right)
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves, grad), torch.autograd.grad(right, leaves, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("case", ["groups", "cap", "bias of heads", "both ways", "lower right"])
def test_gradients_check_against_finite_differences(case: str) -> None:
    operands, settings = given(**CASES[case])
    leaves = [x for x in operands if x is not None]

    def output(*inputs: Tensor) -> Tensor:
        return ops.attention(*inputs, *([None] * (4 - len(inputs))), *settings)[0]  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(output, leaves, fast_mode=True)


def test_it_agrees_with_torch_where_torch_has_it() -> None:
    operands, _ = given(few=2)
    query, key, value, _ = operands
    found, sums = ops.attention(query, key, value, None, 6**-0.5, 0.0, None, 0)
    right = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(found, right)
    scores = query @ key.repeat_interleave(2, 1).mT * 6**-0.5
    scores = scores.masked_fill(torch.ones(11, 11).tril() == 0, float("-inf"))
    torch.testing.assert_close(sums, scores.logsumexp(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_err_no_more_than_separate_operators(dtype: torch.dtype) -> None:
    operands, settings = given(bias=(4, 11, 11), softcap=5.0, right=0)
    narrow = [x.detach().to(dtype).requires_grad_() for x in operands]
    exact = [x.detach().double().requires_grad_() for x in narrow]
    grad = torch.randn(2, 4, 11, 6).to(dtype)

    def run(function: Any, leaves: list[Tensor]) -> list[Tensor]:
        output = function(*leaves, *settings)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(output.dtype))]

    truth = run(written, exact)
    separate, ours = run(written, narrow), run(lambda *x: ops.attention(*x)[0], narrow)
    for value, eager, right in zip(ours, separate, truth, strict=True):
        errors = [float((x.double() - right).norm() / right.norm()) for x in (value, eager)]
        assert value.dtype is dtype and errors[0] <= 1.1 * errors[1]


def test_rows_that_see_nothing_are_zero_and_have_no_gradient() -> None:
    mask = torch.ones(11, 11, dtype=torch.bool)
    mask[3] = False
    operands, settings = given()
    query, key, value, _ = operands
    output, sums = ops.attention(query, key, value, mask, *settings)
    assert not output[:, :, 3].any() and (sums[:, :, 3] == float("-inf")).all()
    gradients = torch.autograd.grad(output.sum(), [query, key, value])
    assert not gradients[0][:, :, 3].any()
    assert all(gradient.isfinite().all() for gradient in gradients)
    # None of the keys is within reach.
    output, sums = ops.attention(query, key, value, None, 0.4, 0.0, None, -11)
    assert not output.any() and (sums == float("-inf")).all()
    assert not any(g.any() for g in torch.autograd.grad(output.sum(), [query, key, value]))


def test_a_low_finite_bias_leaves_rows_even_that_see_nothing_else() -> None:
    """Also in the backward, which knows a row by its log-sum-exp alone."""
    operands, settings = given(softcap=2.0)
    bias = torch.zeros(2, 1, 11, 11, dtype=torch.float64)
    bias[0, :, 4] = torch.finfo(torch.float32).min
    bias[1, :, :, 7:] = -1e30
    leaves = operands[:3]
    found = ops.attention(*leaves, bias, *settings)[0]
    right = written(*leaves, bias, *settings)
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(found[0, :, 4], operands[2][0].mean(1))
    grad = torch.randn_like(right)
    for a, b in zip(
        torch.autograd.grad(found, leaves, grad), torch.autograd.grad(right, leaves, grad), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows_as_in_written_out_scores(value: float) -> None:
    for place in range(3):
        operands, settings = given(softcap=2.0 if value != value else 0.0)
        with torch.no_grad():
            operands[place][0, 1, 5, 2] = value
        found = ops.attention(*operands, *settings)[0]
        torch.testing.assert_close(found, written(*operands, *settings), equal_nan=True)


@pytest.mark.parametrize(("batch", "rows", "keys"), [(0, 4, 4), (2, 0, 4), (2, 4, 0), (1, 1, 1)])
def test_nothing_and_one_work(batch: int, rows: int, keys: int) -> None:
    query = torch.randn(batch, 2, rows, 6, requires_grad=True)
    key, value = (torch.randn(batch, 2, keys, 6, requires_grad=True) for _ in range(2))
    bias = torch.randn(2, rows, keys, requires_grad=True)
    output, _ = ops.attention(query, key, value, bias, 1.0, 0.0, None, 0)
    assert output.shape == (batch, 2, rows, 6)
    torch.testing.assert_close(output, value[:, :, :1].expand_as(output) if keys == 1 else output * 0)
    for leaf, gradient in zip(
        (query, key, value, bias), torch.autograd.grad(output.sum(), [query, key, value, bias]), strict=True
    ):
        assert gradient.shape == leaf.shape and gradient.isfinite().all()


@pytest.mark.parametrize("frozen", range(4))
def test_only_gradients_that_are_needed_are_computed(frozen: int) -> None:
    operands, settings = given(bias=(4, 11, 11))
    operands[frozen] = operands[frozen].detach()
    leaves = [x for x in operands if x.requires_grad]
    ours = torch.autograd.grad(ops.attention(*operands, *settings)[0].sin().sum(), leaves)
    theirs = torch.autograd.grad(written(*operands, *settings).sin().sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", ["groups", "bias of heads", "hidden", "both ways"])
def test_the_operators_pass_opcheck(case: str) -> None:
    operands, settings = given(**CASES[case], dtype=torch.float32)
    check: Any = torch.library.opcheck
    check(ops.attention.default, (*operands, *settings))
    plain = [None if x is None else x.detach() for x in operands]
    output, sums = ops.attention(*plain, *settings)
    trained = plain[3] is not None and plain[3].is_floating_point()
    for mask in ([True, True, True, trained], [False, True, False, False]):
        arguments = (torch.randn_like(output), *plain, output, sums, *settings, mask)
        check(ops.attention_backward.default, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_it_computes_the_same(backend: str) -> None:
    torch._dynamo.reset()
    operands, settings = given(bias=(4, 11, 11), softcap=2.0, left=3, right=0, few=2, dtype=torch.float32)

    def function(*inputs: Tensor) -> Tensor:
        return ops.attention(*inputs, *settings)[0].transpose(1, 2).flatten(2) * 3  # type: ignore[no-any-return]

    found, right = torch.compile(function, backend=backend, fullgraph=True)(*operands), function(*operands)
    torch.testing.assert_close(found, right)
    for a, b in zip(
        torch.autograd.grad(found.sum(), operands), torch.autograd.grad(right.sum(), operands), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_the_scores_are_never_held() -> None:
    """64 MiB of them, in slices of 4 MiB."""
    query = torch.randn(1, 4, 2048, 16)
    with torch.profiler.profile(profile_memory=True) as seen:
        ops.attention(query, query, query, None, 0.25, 0.0, None, None)
    assert max(event.self_cpu_memory_usage for event in seen.events()) <= 2 * 4 * reference.SLICE_ELEMENTS


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"query": torch.ones(2, 3, 4)}, r"the query has shape \[2, 3, 4\]: expected \[B, heads, .*"),
        ({"key": torch.ones(1, 2, 3, 4).double()}, "takes floating-point tensors of one .* for the key"),
        ({"key": torch.ones(1, 2, 3, 5)}, r"keys \[1, 2, 3, 5\] do not fit queries \[1, 2, 3, 4\]"),
        ({"value": torch.ones(1, 2, 5, 4)}, r"values \[1, 2, 5, 4\] do not fit keys \[1, 2, 3, 4\]"),
        ({"query": torch.ones(1, 3, 3, 4)}, "3 heads of queries cannot share 2 of keys evenly"),
        ({"value": torch.ones(1, 2, 3, 0)}, "heads have no elements"),
        ({"scale": -1.0}, "takes a scale above zero, got -1"),
        ({"softcap": -2.0}, "takes a cap above zero, or 0 for none, got -2"),
        ({"bias": torch.ones(3, 3, dtype=torch.int64)}, "takes a boolean or floating-point bias, got .*"),
        ({"bias": torch.ones(2, 3)}, r"a bias of shape \[2, 3\] cannot be broadcast to \[1, 2, 3, 3\]"),
        ({"bias": torch.ones(1, 1, 1, 3, 3)}, r"a bias of shape \[1, 1, 1, 3, 3\] cannot be broadcast .*"),
    ],
)  # fmt: skip
def test_what_it_does_not_take_it_says(change: dict[str, Any], reason: str) -> None:
    like = {name: torch.ones(1, 2, 3, 4) for name in ("query", "key", "value")}
    arguments = {**like, "bias": None, "scale": 1.0, "softcap": 0.0} | change
    assert re.fullmatch(reason, str(module.attention_supports(*arguments.values())))
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments.values()]
        with pytest.raises(ValueError, match=f"attention: {reason}"):
            ops.attention(*fakes, None, None)


def test_the_backward_says_what_does_not_fit() -> None:
    x = torch.ones(1, 2, 3, 4)
    sums = torch.ones(1, 2, 3)
    wrong = module.attention_backward_supports(x[..., :2], x, x, x, None, x, sums, 1.0, 0.0)
    assert str(wrong) == "the gradient has shape [1, 2, 3, 2]: expected [1, 2, 3, 4]"
    assert module.attention_backward_supports(x, x, x, x, None, x, sums, 1.0, 0.0) is None


GPU_CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"right": 0},
    "groups and a window": {"left": 100, "right": 0, "few": 2},
    "cap": {"softcap": 3.0, "right": 0, "few": 1},
    "cap and window": {"softcap": 3.0, "left": 60, "right": 30},
    "bias": {"bias": (1, 8, 333, 333)},
    "bias of keys": {"bias": (2, 1, 1, 333), "softcap": 3.0, "left": 70, "right": 0},
    "hidden": {"hidden": (2, 1, 333, 333), "few": 4},
    "longer": {"keys": 500, "right": 167, "few": 2},
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES)
@pytest.mark.parametrize(
    ("dtype", "width"),
    [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.bfloat16, 80), (torch.bfloat16, 256),
     (torch.float16, 128), (torch.float32, 64), (torch.float32, 128)],
)  # fmt: skip
def test_on_a_gpu_it_errs_no_more_than_separate_operators(dtype: torch.dtype, width: int, case: str) -> None:
    """Values and gradients beside float64, the same bits in every run."""
    given = GPU_CASES[case]
    rows, keys, few = 333, given.get("keys", 333), given.get("few", 8)
    torch.manual_seed(0)
    shapes = [(2, 8, rows, width), (2, few, keys, width), (2, few, keys, width)]
    if "bias" in given:
        shapes.append(given["bias"])
    narrow = [torch.randn(shape, device="cuda", dtype=dtype).requires_grad_() for shape in shapes]
    fixed = [torch.rand(given["hidden"], device="cuda") > 0.4] if "hidden" in given else []
    settings = (width**-0.5, given.get("softcap", 0.0), given.get("left"), given.get("right"))
    grad = torch.randn(2, 8, rows, width, device="cuda", dtype=dtype)

    def run(function: Any, leaves: list[Tensor]) -> list[Tensor]:
        bias = [*leaves[3:], *fixed, None][0]
        output = function(*leaves[:3], bias, *settings)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(output.dtype))]

    def fused(*inputs: Any) -> Tensor:
        return ops.attention(*inputs)[0]  # type: ignore[no-any-return]

    truth = run(written, [x.detach().double().requires_grad_() for x in narrow])
    separate, ours, again = run(written, narrow), run(fused, narrow), run(fused, narrow)
    for value, twice, eager, right in zip(ours, again, separate, truth, strict=True):
        assert torch.equal(value, twice)
        errors = [float((x.double() - right).norm() / right.norm()) for x in (value, eager)]
        # Products of float32 are of three parts of tensor cores, which is not quite float32.
        assert errors[0] <= (1.1 * errors[1] if dtype is not torch.float32 else 4 * errors[1] + 1e-6)


# --- kernels ------------------------------------------------------------------------------------


@needs_triton
def test_the_kernels_compute_what_the_references_do() -> None:
    """In the interpreter, which must be on before triton is imported: in a process of its own."""
    script = """
        import torch
        import graphopt_kernels.attention_launch as launching
        from graphopt_kernels.attention_reference import attention_backward_reference, attention_reference

        torch.manual_seed(0)
        tile = launching.Launch(16, 16, 1, 1)
        for name in ("forward_launch", "keys_launch", "queries_launch", "bias_launch"):
            setattr(launching, name, lambda *_: tile)
        kernels = launching.jitted()
        exact = lambda x: x.double() if x is not None and x.is_floating_point() else x
        f16, f32 = torch.float16, torch.float32
        for dtype, heads, few, rows, keys, width, value_width, left, right, softcap, bias in (
            (f32, 1, 1, 37, 37, 16, 16, None, None, 0.0, None),
            (f32, 2, 1, 20, 33, 24, 8, None, 0, 3.0, (2, 1, 20, 33)),
            (f16, 2, 2, 33, 33, 16, 16, 5, 0, 0.0, (1, 2, 1, 33)),
            (f32, 2, 1, 18, 40, 16, 20, 4, 19, 2.0, (1, 2, 18, 40)),
            (f32, 1, 1, 33, 18, 16, 16, -3, None, 0.0, (33, 1)),
            (f16, 1, 1, 18, 20, 16, 16, None, -5, 0.0, True),
            (f32, 1, 1, 1, 1, 16, 16, None, None, 0.0, (1,)),
        ):
            query = torch.randn(2, rows, heads, width, dtype=dtype).transpose(1, 2)
            key = torch.randn(2, few, keys, width, dtype=dtype)
            value = torch.randn(2, few, value_width, keys, dtype=dtype).mT
            mask = bias if bias is None else torch.rand(2, 1, rows, keys) > 0.4
            if isinstance(bias, tuple):
                mask = torch.randn(bias, dtype=dtype)
            operands, settings = (query, key, value, mask), (0.3, softcap, left, right)
            if bias is True:
                mask[1, 0, 7] = False
            if bias == (1, 2, 18, 40):
                mask[0, 1, :, 5:] = torch.finfo(dtype).min
                mask[0, 0, 6] = -1e30
            # A float32 tells the log-sum-exp of an even row to a thousandth.
            near = dict(atol=4e-3, rtol=4e-3) if dtype is f16 or left == 4 else dict(atol=1e-5, rtol=1e-5)
            found = launching.forward(kernels, *operands, *settings)
            right_one = attention_reference(*map(exact, operands), *settings)
            for a, b in zip(found, right_one):
                torch.testing.assert_close(a.double(), b, **near)
            grad = torch.randn_like(found[0])
            for wanted in ([True] * 3 + [isinstance(bias, tuple)], [False, False, True, False]):
                ours = launching.backward(kernels, grad, *operands, *found, *settings, wanted)
                theirs = attention_backward_reference(
                    exact(grad), *map(exact, operands), *right_one, *settings, wanted
                )
                for a, b in zip(ours, theirs):
                    torch.testing.assert_close(a.double(), b, **near)
        # As long as it is wide: nothing to see, and what is not finite.
        query, key = torch.randn(1, 1, 3, 16), torch.randn(1, 1, 0, 16)
        output, sums = launching.forward(kernels, query, key, key, None, 1.0, 0.0, None, None)
        assert not output.any() and (sums == float("-inf")).all()
        wanted = [True, True, True, False]
        arguments = (output, query, key, key, None, output, sums, 1.0, 0.0, None, None, wanted)
        assert not any(x.any() for x in launching.backward(kernels, *arguments))
        for value in (float("nan"), float("inf")):
            key = torch.randn(1, 1, 20, 16)
            key[0, 0, 3, 2] = value
            settings = (None, 0.3, 0.0, None, None)
            output = launching.forward(kernels, query, key, key, *settings)[0]
            torch.testing.assert_close(
                output, attention_reference(query, key, key, *settings)[0], equal_nan=True
            )
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]


ALL = {"CAPPED": True, "LEFT": True, "RIGHT": True, "BIAS": 1}
FEATURES: dict[str, dict[str, int]] = {
    "causal": {"RIGHT": True},
    "all": ALL,
    "causal, dropout": {"RIGHT": True, "DROPS": True},
    "all, dropout": ALL | {"DROPS": True},
}

SPILLED = {("bf16", 256): 24, ("fp16", 128): 64, ("fp32", 64): 32}
"""Bytes of a thread that lie in memory where a bias and a cap come together without dropout; else none."""


@needs_triton
@pytest.mark.parametrize(
    "features",
    [pytest.param(name, marks=pytest.mark.slow) if name == "causal, dropout" else name for name in FEATURES],
)
@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        ("bf16", 128),
        *(
            pytest.param(dtype, width, marks=pytest.mark.slow)
            for dtype, width in (("bf16", 64), ("bf16", 256), ("fp16", 128), ("fp32", 64))
        ),
    ],
)
def test_the_kernels_compile_for_sm_90_without_spills(dtype: str, width: int, features: str) -> None:
    from graphopt_kernels import attention_launch as launching
    from graphopt_kernels.emit.machine_code import compile_function_for_sm90

    kernels = launching.jitted()
    size = (width, 4 if dtype == "fp32" else 2)
    biased, drops = "BIAS" in FEATURES[features], "DROPS" in FEATURES[features]
    data = ("query", "key", "value", "bias", "grad", "output", "d_query", "d_key", "d_value", "d_bias")
    sums = ("shifts", "along", "log_sum_exp")
    shared = {
        "CAPPED": False, "LEFT": False, "RIGHT": False, "BIAS": 0, "BY_ROW": True, "DROPS": False,
        "APPROXIMATE": dtype == "bf16", "WIDTH": width, "VALUE_WIDTH": width, "BLOCK_D": width,
        "BLOCK_V": width, "PRECISION": "tf32x3", "OVER_BATCHES": True, "OVER_HEADS": False,
        "OVER_ROWS": False, "OVER_COLUMNS": False, "bias_column": 1,
    } | FEATURES[features]  # fmt: skip
    launches = {
        "forward": launching.forward_launch(*size, biased, biased, drops),
        "keys": launching.keys_launch(*size, biased, biased, drops),
        "queries": launching.queries_launch(*size, biased, biased, drops),
        **({"bias": launching.bias_launch(*size)} if biased else {}),
    }
    for name, launch in launches.items():
        kernel = getattr(kernels, name)
        constants = shared | {"ROWS": launch.rows, "COLUMNS": launch.columns}
        types = dict.fromkeys(set(kernel.arg_names) - set(constants), "i32")
        types |= dict.fromkeys(data, f"*{dtype}") | dict.fromkeys(sums, "*fp32")
        types |= {"scale": "fp32", "softcap": "fp32", "kept": "fp32", "seed": "*i64"}
        strides = [n for n in kernel.arg_names if n.endswith(("_batch", "_head", "_row"))]
        code = compile_function_for_sm90(
            kernel, types, constants, warps=launch.warps, stages=launch.stages,
            aligned=(*data, *sums, *strides),
        )  # fmt: skip
        allowed = SPILLED.get((dtype, width), 0) if biased and not drops else 0
        assert code.stack + code.local <= allowed, (name, code.stack, code.local)
        assert 4 * 1024 <= code.asked <= 227 * 1024
        products = {part.partition(".")[0] for part in code.instructions} & {"HGMMA", "HMMA"}
        # All at once leave room for tiles that are too small for groups of warps in the widest heads alone.
        small = dtype == "fp32" or (width == 256 and biased and drops and name in ("keys", "queries"))
        assert products == {"HGMMA"} or small, name
        assert products, name
        assert code.widths("LDG")[128] >= 8
        assert name == "bias" or code.widths("STG")[128] >= 4
