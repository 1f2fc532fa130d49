"""Dropout with the sum behind it: numbers of its own, the distribution, gradients, kernel, refusals."""

from __future__ import annotations

import math
import re
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import graphopt_kernels.dropout_add as module
from graphopt_kernels.emit.machine_code import compile_function_for_sm90
from graphopt_kernels.philox import ROUNDS, cut_of, drawn_seed, factors_of_elements, philox
from tests.loss_kernels import interpret

ops = torch.ops.graphopt
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def seeded(value: int) -> Tensor:
    return torch.tensor([value])


def kept(seed: Tensor, p: float, count: int) -> Tensor:
    return factors_of_elements(seed, p, 0, count, torch.float64)


@pytest.mark.parametrize(
    ("counter", "key", "rounds", "words"),
    [
        (0, 0, 7, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (0, 0, 10, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (0xFFFFFFFF, -1, 7, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (0xFFFFFFFF, -1, 10, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ],
)
def test_philox_gives_the_known_answers(counter: int, key: int, rounds: int, words: str) -> None:
    """Those that come with Random123 (``kat_vectors``)."""
    number = torch.tensor([counter])
    found = philox(seeded(key), (number, number, number, number), rounds)
    assert " ".join(f"{int(word):08x}" for word in found) == words
    assert ROUNDS == 7


def test_elements_are_the_same_from_any_start_and_beyond_32_bits() -> None:
    seed = seeded(99)
    whole = kept(seed, 0.5, 64)
    assert torch.equal(whole[20:37], factors_of_elements(seed, 0.5, 20, 37, torch.float64))
    far = factors_of_elements(seed, 0.5, 2**34, 2**34 + 64, torch.float64)
    assert not torch.equal(far, whole)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.99])
def test_as_many_are_kept_as_asked_for_and_scaled(p: float) -> None:
    count = 2**18
    factors = kept(seeded(7), p, count)
    assert set(factors.unique().tolist()) <= {0.0, 1.0 / (1.0 - p)}
    share = float((factors > 0).double().mean())
    assert abs(share - (1 - p)) <= 5 * math.sqrt(p * (1 - p) / count)


def test_probabilities_at_the_ends_keep_all_or_next_to_none() -> None:
    assert cut_of(0.0) == -(2**31) and cut_of(0.5) == 0 and cut_of(1 - 1e-16) == 2**31 - 1
    assert bool((kept(seeded(1), 0.0, 4096) == 1.0).all())
    assert not kept(seeded(1), 1 - 1e-12, 4096).any()


def test_seeds_and_neighbours_draw_apart() -> None:
    vectors = torch.stack([kept(seeded(n), 0.5, 2**16) - 1 for n in (0, 1, 2, 2**32, 2**62)])
    among = vectors @ vectors.T / vectors.shape[1]
    assert float((among - torch.eye(5)).abs().max()) < 5 / 2**8
    for steps in (1, 2, 3, 4, 8, 4096):
        assert abs(float((vectors[0, steps:] * vectors[0, :-steps]).mean())) < 5 / 2**8


def test_a_seed_is_drawn_by_the_generator_of_the_device() -> None:
    torch.manual_seed(3)
    first, second = drawn_seed("cpu"), drawn_seed("cpu")
    torch.manual_seed(3)
    assert torch.equal(first, drawn_seed("cpu")) and not torch.equal(first, second)
    assert first.dtype is torch.int64 and first.shape == (1,)


@pytest.mark.parametrize("shape", [(3, 5, 24), (7,), (), (1, 1)])
def test_values_and_gradients_are_those_of_the_mask(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, r = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    seed = seeded(5)
    factors = kept(seed, 0.3, x.numel()).view(shape)
    grad = torch.randn(shape, dtype=torch.float64)
    for residual in (r, None):
        leaves = [x] if residual is None else [x, residual]
        found = ops.dropout_add(x, residual, 0.3, seed)
        right = x * factors if residual is None else x * factors + residual
        torch.testing.assert_close(found, right)
        for a, b in zip(
            torch.autograd.grad(found, leaves, grad), torch.autograd.grad(right, leaves, grad), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_gradients_check_against_finite_differences_twice() -> None:
    x, r = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def function(x: Tensor, r: Tensor) -> Tensor:
        return ops.dropout_add(x.sin(), r, 0.4, seeded(2)) ** 2  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(function, (x, r))
    assert torch.autograd.gradgradcheck(function, (x, r))


@pytest.mark.parametrize(
    ("of_input", "of_residual", "asked", "result"),
    [
        (torch.bfloat16, torch.bfloat16, None, torch.bfloat16),
        (torch.bfloat16, torch.float32, None, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float16, None, None, torch.float16),
        (torch.float16, torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float64, None, torch.float64),
    ],
    ids=str,
)
def test_sums_of_several_dtypes_are_rounded_once(
    of_input: torch.dtype, of_residual: torch.dtype | None, asked: torch.dtype | None, result: torch.dtype
) -> None:
    x = torch.randn(40, dtype=of_input, requires_grad=True)
    r = None if of_residual is None else torch.randn(40, dtype=of_residual, requires_grad=True)
    found = ops.dropout_add(x, r, 0.5, seeded(1), asked)
    right = x.double() * kept(seeded(1), 0.5, 40) + (0 if r is None else r.double())
    assert found.dtype is result
    torch.testing.assert_close(found, right.to(result))
    leaves = [x] if r is None else [x, r]
    assert [g.dtype for g in torch.autograd.grad(found.sum(), leaves)] == [leaf.dtype for leaf in leaves]


def test_no_mask_is_kept_for_the_backward() -> None:
    kept_tensors: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept_tensors.append(tensor)
        return tensor

    x = torch.randn(64, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ops.dropout_add(x, x, 0.5, seeded(1))
    assert [tensor.numel() for tensor in kept_tensors] == [1]


def test_what_is_not_finite_shows_as_in_eager_mode() -> None:
    for value in (math.nan, math.inf, -math.inf):
        x = torch.full((64,), value)
        found = ops.dropout_add(x, None, 0.5, seeded(1))
        right = x * kept(seeded(1), 0.5, 64).float()
        torch.testing.assert_close(found, right, equal_nan=True)
        # What eager mode drops shows as NaN too.
        assert set(F.dropout(x, 0.5).isnan().unique().tolist()) <= set(found.isnan().unique().tolist())


@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 0, 5)])
def test_nothing_is_nothing(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, requires_grad=True)
    y = ops.dropout_add(x, x, 0.5, seeded(1))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.shape == gradient.shape == shape


def test_elements_that_are_spread_over_memory() -> None:
    x, r = torch.randn(6, 5, 9).transpose(0, 2), torch.randn(9, 1, 6).expand(9, 5, 6)
    found = ops.dropout_add(x, r, 0.5, seeded(1))
    assert found.is_contiguous()
    assert torch.equal(found, ops.dropout_add(x.contiguous(), r.contiguous(), 0.5, seeded(1)))


def test_the_operator_passes_opcheck() -> None:
    check: Any = torch.library.opcheck
    x, r = torch.randn(3, 9, requires_grad=True), torch.randn(3, 9, requires_grad=True)
    for residual, dtype in ((r, None), (None, None), (r.detach().bfloat16(), torch.bfloat16)):
        check(ops.dropout_add.default, (x, residual, 0.5, seeded(1), dtype))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_it_draws_anew_and_drops_the_same_in_the_backward(backend: str) -> None:
    torch._dynamo.reset()
    x, r = torch.randn(4, 24, requires_grad=True), torch.randn(4, 24)

    @torch.compile(backend=backend, fullgraph=True)
    def function(x: Tensor, r: Tensor) -> Tensor:
        return ops.dropout_add(x.tanh(), r, 0.5, drawn_seed("cpu")) * 1.0  # type: ignore[no-any-return]

    torch.manual_seed(1)
    found, other = function(x, r), function(x, r)
    torch.manual_seed(1)
    assert torch.equal(found, function(x, r)) and not torch.equal(found, other)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    factor = torch.where((found - r).abs() > 1e-6, 2.0, 0.0)
    torch.testing.assert_close(gradient, factor * (1 - x.detach().tanh() ** 2))


def test_a_checkpoint_drops_the_same_again() -> None:
    x = torch.randn(64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return ops.dropout_add(x.sin(), None, 0.5, drawn_seed("cpu")).exp()  # type: ignore[no-any-return]

    torch.manual_seed(4)
    (ours,) = torch.autograd.grad(
        torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False).sum(), x
    )
    torch.manual_seed(4)
    (right,) = torch.autograd.grad(function(x).sum(), x)
    assert torch.equal(ours, right)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"input": torch.ones(3, dtype=torch.int64)}, "takes floating-point tensors, got torch.int64"),
        ({"residual": torch.ones(3, dtype=torch.bool)}, "takes floating-point tensors, got torch.bool"),
        ({"residual": torch.ones(2, 3)}, r"a residual of shape \[2, 3\] is added to \[3\]"),
        ({"p": 1.0}, "takes a probability of at least 0 and below 1, got 1"),
        ({"p": -0.5}, "takes a probability of at least 0 and below 1, got -0.5"),
        ({"seed": torch.ones(2, dtype=torch.int64)}, r"takes a seed of one int64 on .*, got .* \[2\] on .*"),
        ({"seed": torch.ones(1)}, r"takes a seed of one int64 on .*, got torch.float32 \[1\] on .*"),
        ({"dtype": torch.int32}, "gives floating-point results, not torch.int32"),
    ],
    ids=["integers", "booleans", "broadcast", "one", "below zero", "two seeds", "no number", "rounded"],
)
def test_what_it_does_not_take_it_says(change: dict[str, Any], reason: str) -> None:
    given = {"input": torch.ones(3), "residual": None, "p": 0.5, "seed": seeded(0), "dtype": None}
    arguments = given | change
    assert re.fullmatch(reason, str(module.dropout_add_supports(**arguments)))
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments.values()]
        with pytest.raises(ValueError, match=f"dropout_add: {reason}"):
            ops.dropout_add(*fakes)


@needs_triton
def test_the_kernels_draw_what_the_references_do_bit_for_bit() -> None:
    interpret("""
        import itertools
        import torch, triton
        import triton.language as tl
        import graphopt_kernels.dropout_add as module
        from graphopt_kernels.philox import cut_of, factors_of_elements, factors_of_scores
        from graphopt_kernels.philox_triton import factors_of_block, factors_of_tile

        @triton.jit
        def tile(out, seed, item, row, column, cut, kept, R: tl.constexpr, C: tl.constexpr, T: tl.constexpr):
            found = factors_of_tile(tl.load(seed), item, row, column, cut, kept, R, C, T)
            height: tl.constexpr = C if T else R
            width: tl.constexpr = R if T else C
            tl.store(out + tl.arange(0, height)[:, None] * width + tl.arange(0, width)[None, :], found)

        @triton.jit
        def block(out, seed, start, cut, kept, BLOCK: tl.constexpr):
            tl.store(out + tl.arange(0, BLOCK), factors_of_block(tl.load(seed), start, cut, kept, BLOCK))

        for number, p in itertools.product((0, 2**63 - 2, -5), (0.0, 0.1, 0.97)):
            seed, scale = torch.tensor([number]), 1 / (1 - p)
            whole = factors_of_scores(seed, p, 70, slice(64, 128), slice(32, 96), torch.float32)[69]
            for (R, C), T in itertools.product(((16, 16), (32, 64), (64, 16)), (False, True)):
                out = torch.empty((C, R) if T else (R, C))
                tile[(1,)](out, seed, 69, 64, 32, cut_of(p), scale, R, C, T)
                assert torch.equal(out.mT if T else out, whole[:R, :C]), (number, p, R, C, T)
            for start in (0, 128, 2**35):
                out = torch.empty(64)
                block[(1,)](out, seed, start, cut_of(p), scale, 64)
                assert torch.equal(out, factors_of_elements(seed, p, start, start + 64, torch.float32))

        kernels = module._kernels()
        for shape, (of_input, of_residual, dtype) in itertools.product(
            ((37,), (3, 64), ()),
            ((torch.float32, torch.float32, None), (torch.float16, None, None),
             (torch.float16, torch.float32, torch.float16)),
        ):
            x, seed = torch.randn(shape).to(of_input), torch.randint(2**63 - 1, (1,))
            r = None if of_residual is None else torch.randn(shape).to(of_residual)
            found = module.dropout_add_elements(kernels, x, r, 0.3, seed, dtype, block=32)
            right = module.dropout_add_reference(x, r, 0.3, seed, dtype)
            assert found.dtype is right.dtype
            torch.testing.assert_close(found, right)
    """)


@needs_triton
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_kernel_compiles_for_sm_90_without_spills(dtype: str, adds: bool) -> None:
    from graphopt_kernels.dropout_add_triton import dropout_add_kernel

    pointers = {"data": f"*{dtype}", "residual": f"*{dtype}", "result": f"*{dtype}", "seed": "*i64"}
    types = pointers | {"size": "i32", "cut": "i32", "kept": "fp32"}
    code = compile_function_for_sm90(
        dropout_add_kernel, types, {"ADDS": adds, "BLOCK": module.BLOCK}, warps=4,
        aligned=(*pointers, "size"),
    )  # fmt: skip
    assert not code.spills and not code.asked
    # Words stay with the threads whose elements they are for.
    assert not any(name.startswith(("STS", "SHFL")) for name in code.instructions)
    assert code.widths("LDG")[128] >= 2 * (1 + adds) and code.widths("STG")[128] >= 2
    # 33.5e12 instructions of a lane a second and 4.3e12 bytes leave 46 for the six bytes of an element.
    assert sum(code.instructions.values()) <= 24 * module.BLOCK // 128


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu_it_drops_what_the_reference_does(dtype: torch.dtype) -> None:
    seed = drawn_seed("cuda")
    x, r = (torch.randn(333, 1023, device="cuda", dtype=dtype).requires_grad_() for _ in range(2))
    found = ops.dropout_add(x, r, 0.2, seed)
    right = ops.dropout_add(x.cpu(), r.cpu(), 0.2, seed.cpu())
    torch.testing.assert_close(found.cpu(), right)
    plain = ops.dropout_add(torch.ones_like(x), None, 0.2, seed)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(gradient, plain)


@pytest.mark.gpu
def test_on_a_gpu_a_replayed_graph_draws_anew() -> None:
    x = torch.randn(4096, device="cuda")
    ops.dropout_add(x, None, 0.5, drawn_seed("cuda"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = ops.dropout_add(x, None, 0.5, drawn_seed("cuda"))
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append(output.clone())
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
