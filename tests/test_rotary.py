"""Rotary embeddings of heads: numbers against float64 and what models write, gradients, kernels, refusals."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

import graphopt_kernels.rotary as module
from graphopt_kernels.emit.machine_code import compile_function_for_sm90
from graphopt_kernels.rotary_launch import launch_for

ops = torch.ops.graphopt
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
BATCH, LENGTH = 2, 5
LAYOUTS = [(1, 4, 2, 2), (2, 1, 1, 1), (1, 3, 0, 0), (1, 2, 2, 0)]
EPS = 1e-5


def turned(x: Tensor, cos: Tensor, sin: Tensor, width: int, interleaved: bool) -> Tensor:
    """As models write it; ``x`` [B, S, H, D], tables of ``width`` numbers."""
    front, back = x[..., :width], x[..., width:]
    if interleaved:
        other = torch.stack((-front[..., 1::2], front[..., 0::2]), -1).flatten(-2)
    else:
        first, second = front.chunk(2, -1)
        other = torch.cat((-second, first), -1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((front * cos + other * sin, back), -1)


def normed(x: Tensor, weight: Tensor | None, offset: float) -> Tensor:
    wide = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    return wide if weight is None else wide * (weight + offset)


def separate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weights: Sequence[Tensor | None],
    heads: Sequence[int],
    width: int,
    interleaved: bool,
    norm: bool,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values by operators of their own."""
    groups, *counts = heads
    parts = x.unflatten(2, (groups, sum(counts))).split(counts, 3)
    query, key, value = (part.flatten(2, 3) for part in parts)
    if cos.shape[-1] != width:
        cos, sin = (t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1) for t in (cos, sin))
    made = [
        turned(normed(t, weight, offset) if norm else t, cos, sin, width, interleaved)
        for t, weight in zip((query, key), weights, strict=True)
    ]
    return made[0], made[1], value


def fused(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weights: Sequence[Tensor | None],
    heads: Sequence[int],
    width: int,
    interleaved: bool,
    norm: bool,
    offset: float = 0.0,
    copies_values: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = ops.rotary(
        x, cos, sin, *weights, list(heads), width, interleaved, EPS if norm else None, offset, copies_values,
        x.dtype,
    )  # fmt: skip
    return found


def operands(
    heads: Sequence[int],
    size: int = 8,
    width: int = 8,
    *,
    halved: bool = False,
    norm: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    torch.manual_seed(0)
    count = heads[0] * sum(heads[1:])
    x = torch.randn(BATCH, LENGTH, count, size, dtype=dtype, requires_grad=True)
    angles = torch.randn(BATCH, LENGTH, width // 2 if halved else width, dtype=dtype)
    weights: list[Tensor | None] = [None, None]
    if norm:
        weights = [torch.randn(size, dtype=dtype, requires_grad=True) for _ in range(2)]
    return x, angles.cos(), angles[:1].sin(), weights


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [8, 6])
@pytest.mark.parametrize("heads", LAYOUTS)
def test_values_and_gradients_are_those_of_separate_operators(
    heads: tuple[int, ...], width: int, interleaved: bool, halved: bool, norm: bool
) -> None:
    x, cos, sin, weights = operands(heads, width=width, halved=halved, norm=norm)
    leaves = [t for t in (x, *weights) if t is not None]
    settings: Any = (heads, width, interleaved, norm, 0.5 if norm else 0.0)
    found, right = fused(x, cos, sin, weights, *settings), separate(x, cos, sin, weights, *settings)
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b)
        assert a.is_contiguous()
    grads = [torch.randn_like(t) for t in right]
    ours = torch.autograd.grad(found, leaves, grads, allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad(right, leaves, grads, allow_unused=True, materialize_grads=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_check_against_finite_differences(interleaved: bool, norm: bool) -> None:
    x, cos, sin, weights = operands((1, 2, 1, 1), width=6, norm=norm)
    leaves = [t for t in (x, *weights) if t is not None]

    def run(x: Tensor, *weights: Tensor) -> Any:
        return fused(x, cos, sin, weights or (None, None), (1, 2, 1, 1), 6, interleaved, norm)

    assert torch.autograd.gradcheck(run, leaves)


def test_gradients_that_are_not_there_are_zero() -> None:
    heads = (1, 4, 2, 2)
    x, cos, sin, weights = operands(heads, norm=True)
    leaves = [x, *weights]
    for parts in ((0,), (1,), (2,), (0, 2)):
        ours = [fused(x, cos, sin, weights, heads, 8, False, True)[n].sin().sum() for n in parts]
        theirs = [separate(x, cos, sin, weights, heads, 8, False, True)[n].sin().sum() for n in parts]
        found, right = (
            torch.autograd.grad(sum(t), leaves, allow_unused=True, materialize_grads=True)  # type: ignore[arg-type]
            for t in (ours, theirs)
        )
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b)


def test_values_stay_where_they_are_without_being_asked_for() -> None:
    heads = (1, 4, 2, 2)
    x, cos, sin, weights = operands(heads)
    query, key, value = fused(x, cos, sin, weights, heads, 8, False, False, copies_values=False)
    assert value.shape == (BATCH, LENGTH, 0, 8)
    (found,) = torch.autograd.grad(query.sum() + key.sum(), [x])
    assert torch.equal(found[:, :, 6:], torch.zeros_like(found[:, :, 6:]))
    right = separate(x, cos, sin, weights, heads, 8, False, False)
    (expected,) = torch.autograd.grad(right[0].sum() + right[1].sum(), [x])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("norm", [False, True])
def test_rows_of_any_strides_are_read(norm: bool) -> None:
    """Heads are views of a projection, and gradients come as attention writes them."""
    heads = (1, 3, 0, 0)
    _, cos, sin, weights = operands(heads, norm=norm)
    packed = torch.randn(BATCH, LENGTH, 7 * 8, dtype=torch.float64, requires_grad=True)
    for view in (
        packed[..., 8:32].unflatten(-1, (3, 8)),
        packed.unflatten(-1, (7, 8))[:, :, ::2][:, :, :3],
        packed.unflatten(-1, (7, 8))[:, :, :3].transpose(0, 1).contiguous().transpose(0, 1),
    ):
        found = fused(view, cos, sin, weights, heads, 8, False, norm)[0]
        right = separate(view, cos, sin, weights, heads, 8, False, norm)[0]
        torch.testing.assert_close(found, right)
        for grad in (
            torch.randn(BATCH, 3, LENGTH, 8, dtype=torch.float64).transpose(1, 2),
            torch.ones((), dtype=torch.float64).expand(right.shape),
        ):
            (a,) = torch.autograd.grad(found, [packed], grad, retain_graph=True)
            (b,) = torch.autograd.grad(right, [packed], grad, retain_graph=True)
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [False, True])
def test_narrow_dtypes_err_no_more_than_separate_operators(norm: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    heads = (1, 8, 4, 4)
    x = torch.randn(2, 64, 16, 64).to(dtype)
    angles = torch.randn(64, 64)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    weights: list[Tensor | None] = [torch.randn(64).to(dtype) if norm else None for _ in range(2)]
    grads = [torch.randn(2, 64, n, 64).to(dtype) for n in (8, 4, 4)]

    def run(function: Any, kind: torch.dtype) -> list[Tensor]:
        leaves = [t.to(kind).requires_grad_() for t in (x, *weights) if t is not None]
        given = leaves[1:] if norm else [None, None]
        made = function(leaves[0], cos.to(kind), sin.to(kind), given, heads, 64, False, norm)
        return [*made, *torch.autograd.grad(made, leaves, [g.to(kind) for g in grads])]

    truth, eager, ours = run(separate, torch.float64), run(separate, dtype), run(fused, dtype)
    for value, reference, right in zip(ours, eager, truth, strict=True):
        errors = [float((t.double() - right).norm()) for t in (value, reference)]
        assert errors[0] <= 1.1 * errors[1]


def test_tables_of_float32_turn_narrow_heads_into_what_is_asked_for() -> None:
    x, cos, sin, _ = operands((1, 3, 0, 0), dtype=torch.float32)
    narrow = x.detach().bfloat16()
    for dtype in (torch.float32, torch.bfloat16):
        found = ops.rotary(narrow, cos, sin, None, None, [1, 3, 0, 0], 8, False, None, 0.0, True, dtype)[0]
        assert torch.equal(found, turned(narrow.float(), cos, sin, 8, False).to(dtype))


def test_no_rows_nan_and_infinities_are_as_in_separate_operators() -> None:
    heads = (1, 4, 2, 2)
    x, cos, sin, weights = operands(heads, norm=True, dtype=torch.float32)
    empty = x.detach()[:0].requires_grad_()
    made = fused(empty, cos[:0], sin, weights, heads, 8, False, True)
    assert [t.shape[2] for t in made] == [4, 2, 2]
    for gradient in torch.autograd.grad(sum(t.sum() for t in made), [w for w in weights if w is not None]):  # type: ignore[arg-type]
        assert torch.equal(gradient, torch.zeros(8))
    for norm, value in itertools.product((False, True), (float("inf"), float("-inf"), float("nan"))):
        given = x.detach().clone()
        given[1, 2, 3, 1] = value
        settings: Any = (given, cos, sin, weights if norm else (None, None), heads, 8, False, norm)
        for a, b in zip(fused(*settings), separate(*settings), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


def test_the_operators_pass_opcheck() -> None:
    heads = [1, 4, 2, 2]
    check: Any = torch.library.opcheck
    for norm, copies in ((True, True), (False, False)):
        x, cos, sin, weights = operands(heads, norm=norm, dtype=torch.float32)
        eps = EPS if norm else None
        settings = (heads, 8, False, eps, 0.5 if norm else 0.0)
        check(ops.rotary.default, (x, cos, sin, *weights, *settings, copies, torch.float32))
        grads = [torch.randn(BATCH, LENGTH, n, 8) for n in (4, 2, 2)]
        plain = [None if w is None else w.detach() for w in weights]
        data = x.detach() if norm else None
        for mask in ([True, norm, norm], [True, False, False]):
            check(
                ops.rotary_backward.default,
                (
                    *grads[:2],
                    grads[2] if copies else None,
                    data,
                    cos,
                    sin,
                    *plain,
                    *settings,
                    torch.float32,
                    mask,
                ),
            )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_they_compute_the_same(backend: str) -> None:
    torch._dynamo.reset()
    heads = (1, 4, 2, 2)
    x, cos, sin, weights = operands(heads, norm=True, dtype=torch.float32)

    def function(x: Tensor, *weights: Tensor) -> Tensor:
        query, key, value = fused(x.tanh(), cos, sin, weights, heads, 8, False, True)
        return (query * 3).sum() + (key.sin() * value).sum()

    leaves = [x, *weights]
    found = torch.compile(function, backend=backend, fullgraph=True)(*leaves)
    right = function(*leaves)  # type: ignore[arg-type]
    torch.testing.assert_close(found, right)
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(right, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_tables_that_want_a_gradient_are_told() -> None:
    x, cos, sin, weights = operands((1, 3, 0, 0))
    query = fused(x, cos.requires_grad_(), sin, weights, (1, 3, 0, 0), 8, False, False)[0]
    with pytest.raises(NotImplementedError, match="tables without a gradient, got tables that require one"):
        query.sum().backward()


GIVEN: dict[str, Any] = {
    "input": torch.ones(2, 5, 8, 8), "cos": torch.ones(5, 8), "sin": torch.ones(5, 8),
    "query_weight": torch.ones(8), "key_weight": None, "heads": [1, 4, 2, 2], "width": 8,
    "interleaved": False, "eps": 1e-5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"input": torch.ones(2, 5, 64)}, "takes heads [B, S, N, D], got 3 dimensions"),
        ({"input": torch.ones(2, 5, 8, 8, dtype=torch.int64)}, "takes floating-point heads, got torch.int64"),
        (
            {"heads": [1, 4, 2, 1]},
            "groups, queries, keys and values [1, 4, 2, 1] are not the 8 heads of the input",
        ),
        ({"width": 7}, "turns an even number of up to 8 elements of a head, got 7"),
        ({"width": 10}, "turns an even number of up to 8 elements of a head, got 10"),
        ({"cos": torch.ones(5, 8, dtype=torch.int64)}, "takes floating-point tables, got cos of torch.int64"),
        (
            {"sin": torch.ones(4, 8)},
            "sin has shape [4, 8]: expected [5, 8] or [5, 4], for each sample or for all",
        ),
        ({"cos": torch.ones(3, 5, 8)}, "cos is of 3 samples: expected 2 or 1"),
        (
            {"cos": torch.ones(5, 4)},
            "cos and sin differ: torch.float32 [5, 4] and torch.float32 [5, 8]",
        ),
        ({"eps": None}, "there is a weight of queries and no norm"),
        ({"key_weight": torch.ones(7)}, "the weight of keys has shape [7]: expected [8]"),
        (
            {"key_weight": torch.ones(8, dtype=torch.int64)},
            "takes a floating-point weight of keys, got torch.int64",
        ),
    ],
)
def test_what_it_does_not_take_it_says(change: dict[str, Any], reason: str) -> None:
    given = GIVEN | change
    assert str(module.rotary_supports(**given)) == reason
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in given.values()]
        with pytest.raises(ValueError, match=re.escape(f"rotary: {reason}")):
            ops.rotary(*fakes, 0.0, True, torch.float32)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"d_query": None}, "takes one gradient or more, got none"),
        ({"d_query": torch.ones(2, 5, 32)}, "takes gradients [B, S, heads, D], got 3 dimensions"),
        (
            {"d_key": torch.ones(2, 5, 3, 8)},
            "the gradient of keys has shape [2, 5, 3, 8]: expected [2, 5, 2, 8]",
        ),
        ({"input": None}, "the gradient of a norm takes its input, got none"),
    ],
)
def test_gradients_that_it_does_not_take_it_says(change: dict[str, Any], reason: str) -> None:
    gradients = {"d_query": torch.ones(2, 5, 4, 8), "d_key": None, "d_value": None}
    assert str(module.rotary_backward_supports(**(gradients | GIVEN | change))) == reason


def test_tiles_leave_few_lanes_idle() -> None:
    llama, few, odd = (launch_for(heads, 128, 128) for heads in ((1, 32, 8, 8), (1, 32, 0, 0), (1, 12, 4, 0)))
    assert (llama.positions, llama.heads, llama.whole) == (2, 8, True)
    assert (few.positions, few.heads, few.whole) == (2, 8, True)
    assert (odd.positions, odd.heads, odd.whole) == (4, 4, True)
    assert launch_for((1, 96, 0, 0), 128, 128).whole is False, "code of many tiles is long"
    assert launch_for((1, 32, 8, 8), 128, 128, sums=True).whole is False
    part = launch_for((32, 1, 1, 1), 96, 24)
    assert (part.half, part.rest) == (16, 128)


@needs_triton
def test_the_kernels_compute_what_the_references_do() -> None:
    """In the interpreter, which must be on before triton is imported: in a process of its own."""
    script = """
        import itertools
        import torch
        from graphopt_kernels import rotary_launch as launches, rotary_reference as references

        torch.manual_seed(0)
        kernels = launches._kernels()
        cases = (
            # heads, elements and those turned, interleaved, halved tables, norm, dtype
            ((1, 4, 2, 2), (16, 16), False, False, False, torch.float32),
            ((1, 3, 1, 1), (24, 12), False, True, True, torch.float32),
            ((2, 1, 1, 1), (16, 16), True, False, True, torch.float32),
            ((2, 1, 1, 0), (24, 12), True, True, False, torch.float16),
            ((1, 3, 0, 0), (16, 16), False, False, True, torch.float16),
            ((1, 0, 3, 0), (10, 6), False, False, True, torch.float32),
        )
        for heads, (size, width), interleaved, halved, norm, dtype in cases:
            near = dict(atol=3e-3, rtol=3e-3) if dtype is torch.float16 else {}
            count, batch, length = heads[0] * sum(heads[1:]), 2, 3
            # A part of a wider projection.
            packed = torch.randn(batch, length, count * size + 8, dtype=dtype)
            x = packed[..., 4 : 4 + count * size].view(batch, length, count, size)
            numbers = width // 2 if halved else width
            cos, sin = torch.randn(length, numbers), torch.randn(batch, length, numbers)
            weights = [torch.randn(size, dtype=dtype) if norm else None for _ in range(2)]
            eps = 1e-5 if norm else None
            launch = launches.launch_for(heads, size, width)._replace(positions=2, heads=2, warps=1)
            settings = (heads, width, interleaved, eps, 1.0 if norm else 0.0)
            for copies, whole in itertools.product((True, False), (True, False)):
                given = (x, cos, sin, *weights, *settings, copies, dtype)
                found = launches.forward_rows(kernels, *given, launch=launch._replace(whole=whole))
                for a, b in zip(found, references.rotary_reference(*given), strict=True):
                    torch.testing.assert_close(a, b, **near)
            grads = [torch.randn(batch, heads[0] * n, length, size).to(dtype) for n in heads[1:]]
            grads = [grad.transpose(1, 2) for grad in grads]
            here = next(n for n in (0, 1) if heads[1 + n])
            alone = [grad if n == here else None for n, grad in enumerate(grads)]
            asked = ((grads, [True] * 3), (alone, [True, True, False]), (grads, [False, False, True]))
            for (parts, mask), whole in itertools.product(asked, (True, False)):
                given = (*parts, x if norm else None, cos, sin, *weights, *settings, dtype, mask)
                cut = launch._replace(whole=whole)
                found = launches.backward_rows(kernels, *given, launch=cut, processors=1)
                for a, b in zip(found, references.rotary_backward_reference(*given), strict=True):
                    torch.testing.assert_close(a, b, **near)
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]


MODELS = [
    ((1, 32, 8, 8), 64, 64, False),
    ((1, 32, 8, 8), 128, 128, False),
    ((1, 32, 0, 0), 128, 128, False),
    ((1, 16, 8, 8), 256, 256, False),
    ((1, 32, 8, 8), 128, 128, True),
    ((32, 1, 1, 1), 96, 24, False),
    ((1, 16, 2, 2), 256, 64, False),
]


@needs_triton
@pytest.mark.parametrize(
    ("heads", "size", "width", "interleaved", "norm", "whole"),
    [
        (*model, norm, whole)
        for model, norm, whole in itertools.product(MODELS, (False, True), (False, True))
        if not (whole and norm and model[3])
    ],
)
def test_the_kernels_compile_for_sm_90_without_spills(
    heads: tuple[int, ...], size: int, width: int, interleaved: bool, norm: bool, whole: bool
) -> None:
    from graphopt_kernels import rotary_norm_triton, rotary_triton

    groups, queries, keys, values = heads
    constants: dict[str, Any] = {
        "GROUPS": groups, "QUERIES": queries, "KEYS": keys, "VALUES": values, "VALUES_MOVED": 1,
        "QUERY_GIVEN": True, "KEY_GIVEN": True, "VALUE_GIVEN": True, "NORMED": norm,
        "QUERY_WEIGHTED": norm, "KEY_WEIGHTED": norm, "QUERY_SUMMED": True, "KEY_SUMMED": True,
        "D_DATA": True, "INTERLEAVED": interleaved, "HALVED": False, "SIZE": size, "WIDTH": width,
    }  # fmt: skip
    back = rotary_norm_triton.norm_backward_kernel if norm else rotary_triton.turn_kernel
    forward = rotary_triton.turn_kernel
    for kernel, backward, cached in ((forward, False, False), (back, True, False), (forward, False, True)):
        launch = launch_for(heads, size, width, sums=norm and backward, whole=whole)
        names = kernel.arg_names
        types = {
            name: "i32" if name.endswith(("_batch", "_position", "_head")) else "*bf16"
            for name in names[: names.index("positions")]
        }
        types |= {name: "*fp32" for name in types if name.endswith("_sums")} | {"places": "*i64"}
        numbers = {"positions": "i32", "length": "i32", "capacity": "i32", "eps": "fp32", "offset": "fp32"}
        code = compile_function_for_sm90(
            kernel,
            types | numbers,
            constants
            | {"BACK": backward, "CACHED": cached, "HALF": launch.half, "REST": launch.rest}
            | {"POSITIONS": launch.positions, "HEADS": launch.heads, "WHOLE": launch.whole},
            warps=launch.warps,
            aligned=tuple(types),
        )
        assert not code.spills, (kernel, code.stack, code.local)
        assert code.shared <= 2048
        assert code.widths("LDG")[128] >= 2 and code.widths("STG")[128] >= 1
        if norm and backward:
            # As many programs as are asked for fit the registers of a multiprocessor.
            assert launch.programs * 32 * launch.warps * -(-code.registers // 8) * 8 <= 65536
