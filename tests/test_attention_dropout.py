"""Dropout of attention's weights: one mask for every kernel and tile, exact gradients, the distribution."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

import graphopt_kernels.attention as module
import graphopt_kernels.attention_reference as reference
from graphopt_kernels.philox import drawn_seed, factors_of_scores
from tests.loss_kernels import interpret
from tests.test_attention import CASES, given

ops = torch.ops.graphopt
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def seeded(value: int) -> Tensor:
    return torch.tensor([value])


def written(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, softcap: float,
    left: int | None, right: int | None, p: float, seed: Tensor,
) -> Tensor:  # fmt: skip
    """Attention operator by operator, its weights multiplied by what the seed says."""
    times = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(times, 1).mT * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype is torch.bool else scores + bias
    distance = torch.arange(key.shape[2])[None, :] - torch.arange(query.shape[2])[:, None]
    if left is not None:
        scores = scores.masked_fill(distance < -left, -torch.inf)
    if right is not None:
        scores = scores.masked_fill(distance > right, -torch.inf)
    whole = (scores == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(whole, 0.0), -1).masked_fill(whole, 0.0)
    batch, heads, rows, columns = weights.shape
    factors = factors_of_scores(seed, p, batch * heads, slice(0, rows), slice(0, columns), weights.dtype)
    return weights * factors.view_as(weights) @ value.repeat_interleave(times, 1)


@pytest.mark.parametrize("slice_elements", [2**20, 100], ids=["one slice", "many slices"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_written_out_scores(
    case: str, slice_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "SLICE_ELEMENTS", slice_elements)
    operands, settings = given(**CASES[case])
    dropping = (0.3, seeded(-7))
    leaves = [x for x in operands if x is not None and x.requires_grad]
    found = ops.attention(*operands, *settings, *dropping)[0]
    right = written(*operands, *settings, *dropping)
    torch.testing.assert_close(found, right)
    grad = torch.randn_like(right)
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves, grad), torch.autograd.grad(right, leaves, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("case", ["groups", "bias of heads", "both ways"])
def test_gradients_check_against_finite_differences(case: str) -> None:
    operands, settings = given(**CASES[case])
    leaves = [x for x in operands if x is not None]

    def output(*inputs: Tensor) -> Tensor:
        bias = [None] * (4 - len(inputs))
        return ops.attention(*inputs, *bias, *settings, 0.4, seeded(3))[0]  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(output, leaves, fast_mode=True)


def test_the_log_sum_exp_is_that_without_dropout() -> None:
    operands, settings = given()
    plain = ops.attention(*operands, *settings)[1]
    assert torch.equal(plain, ops.attention(*operands, *settings, 0.5, seeded(1))[1])


def test_nothing_is_dropped_at_zero_and_a_seed_is_not_looked_at() -> None:
    operands, settings = given(right=0)
    plain = ops.attention(*operands, *settings)[0]
    for seed in (None, seeded(1)):
        assert torch.equal(ops.attention(*operands, *settings, 0.0, seed)[0], plain)


def test_over_many_seeds_the_mean_is_the_output_without_dropout() -> None:
    operands, settings = given(rows=24, keys=24, right=0)
    operands = [x if x is None else x.detach() for x in operands]
    plain = ops.attention(*operands, *settings)[0]
    draws = torch.stack([ops.attention(*operands, *settings, 0.25, seeded(n))[0] for n in range(600)])
    error = (draws.mean(0) - plain) / (draws.std(0) / len(draws) ** 0.5).clamp(min=1e-12)
    # Of 1,152 numbers of a normal distribution none is five deviations away.
    assert 0.8 < float(error.std()) < 1.2 and float(error.abs().max()) < 5


def test_rows_heads_batches_and_seeds_draw_apart() -> None:
    whole = slice(0, 128)
    masks = [factors_of_scores(seeded(n), 0.5, 6, whole, whole, torch.float64).flatten(1) - 1 for n in (1, 2)]
    vectors = torch.cat(masks)
    among = vectors @ vectors.T / vectors.shape[1]
    assert float((among - torch.eye(12)).abs().max()) < 5 * vectors.shape[1] ** -0.5
    # Along rows and columns too, by any distance that a counter has structure at.
    square = masks[0].view(6, 128, 128)
    for steps in (1, 2, 4, 8, 16, 32):
        for axis in (1, 2):
            ends = square.narrow(axis, steps, 128 - steps), square.narrow(axis, 0, 128 - steps)
            assert abs(float((ends[0] * ends[1]).mean())) < 5 * ends[0].numel() ** -0.5


@pytest.mark.parametrize("case", ["groups", "bias of heads", "hidden"])
def test_the_operators_pass_opcheck(case: str) -> None:
    operands, settings = given(**CASES[case], dtype=torch.float32)
    check: Any = torch.library.opcheck
    check(ops.attention.default, (*operands, *settings, 0.5, seeded(5)))
    plain = [None if x is None else x.detach() for x in operands]
    output, sums = ops.attention(*plain, *settings, 0.5, seeded(5))
    trained = plain[3] is not None and plain[3].is_floating_point()
    arguments = (torch.randn_like(output), *plain, output, sums, *settings, [True, True, True, trained])
    check(ops.attention_backward.default, (*arguments, 0.5, seeded(5)))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_it_drops_the_same(backend: str) -> None:
    torch._dynamo.reset()
    operands, settings = given(few=2, right=0, dtype=torch.float32)
    leaves = operands[:3]

    def function(seed: Tensor, *inputs: Tensor) -> Tensor:
        return ops.attention(*inputs, None, *settings, 0.3, seed)[0] * 3  # type: ignore[no-any-return]

    seed = seeded(11)
    found = torch.compile(function, backend=backend, fullgraph=True)(seed, *leaves)
    right = function(seed, *leaves)
    torch.testing.assert_close(found, right)
    for a, b in zip(
        torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(right.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_a_checkpoint_that_draws_its_seed_drops_the_same_again() -> None:
    operands, settings = given(right=0)
    leaves = operands[:3]
    drawn = []

    def function(*inputs: Tensor) -> Tensor:
        seed = drawn_seed("cpu")
        drawn.append(int(seed))
        return ops.attention(*inputs, None, *settings, 0.5, seed)[0].sin()  # type: ignore[no-any-return]

    torch.manual_seed(4)
    output = torch.utils.checkpoint.checkpoint(function, *leaves, use_reentrant=False)
    ours = torch.autograd.grad(output.sum(), leaves)
    assert len(drawn) == 2 and drawn[0] == drawn[1]
    torch.manual_seed(4)
    for a, b in zip(ours, torch.autograd.grad(function(*leaves).sum(), leaves), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("batch", "rows", "keys"), [(0, 4, 4), (2, 0, 4), (2, 4, 0), (1, 1, 1)])
def test_nothing_and_one_work(batch: int, rows: int, keys: int) -> None:
    query = torch.randn(batch, 2, rows, 6, requires_grad=True)
    key, value = (torch.randn(batch, 2, keys, 6, requires_grad=True) for _ in range(2))
    output, _ = ops.attention(query, key, value, None, 1.0, 0.0, None, 0, 0.5, seeded(0))
    for leaf, gradient in zip(
        (query, key, value), torch.autograd.grad(output.sum(), [query, key, value]), strict=True
    ):
        assert gradient.shape == leaf.shape and gradient.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_as_in_written_out_scores(value: float) -> None:
    for place in range(3):
        operands, settings = given()
        with torch.no_grad():
            operands[place][0, 1, 5, 2] = value
        found = ops.attention(*operands, *settings, 0.5, seeded(0))[0]
        right = written(*operands, *settings, 0.5, seeded(0))
        torch.testing.assert_close(found, right, equal_nan=True)


@pytest.mark.parametrize(
    ("p", "seed", "reason"),
    [
        (1.0, seeded(0), "takes a probability of at least 0 and below 1, got 1"),
        (-0.1, seeded(0), "takes a probability of at least 0 and below 1, got -0.1"),
        (0.5, None, "dropout takes a seed"),
        (0.5, seeded(0).expand(2), r"takes a seed of one int64 on .*, got torch.int64 \[2\] on .*"),
        (0.5, torch.zeros(1), r"takes a seed of one int64 on .*, got torch.float32 \[1\] on .*"),
    ],
    ids=["one", "below zero", "no seed", "two seeds", "no number"],
)
def test_what_it_does_not_take_it_says(p: float, seed: Tensor | None, reason: str) -> None:
    x = torch.ones(1, 2, 3, 4)
    settings = (1.0, 0.0, None, None)
    with torch._subclasses.FakeTensorMode() as mode:
        fake, number = mode.from_tensor(x), None if seed is None else mode.from_tensor(seed)
        with pytest.raises(ValueError, match=f"attention: {reason}"):
            ops.attention(fake, fake, fake, None, *settings, p, number)
    sums = torch.ones(1, 2, 3)
    found = module.attention_backward_supports(
        x, x, x, x, None, x, sums, *settings, [True] * 4, p, seed
    )
    assert found is not None


# --- kernels ------------------------------------------------------------------------------------


@needs_triton
def test_the_kernels_drop_what_the_references_do_at_any_tile() -> None:
    interpret("""
        import torch
        import graphopt_kernels.attention_launch as launching
        from graphopt_kernels.attention import attention_backward_plain, attention_plain
        from graphopt_kernels.attention_launch import Launch

        torch.manual_seed(0)
        kernels = launching.jitted()
        exact = lambda x: x.double() if x is not None and x.is_floating_point() else x
        f16, f32 = torch.float16, torch.float32
        for dtype, heads, few, rows, keys, width, left, right, softcap, bias, p, tile in (
            (f32, 1, 1, 37, 37, 16, None, None, 0.0, None, 0.5, Launch(32, 16, 1, 1)),
            (f32, 2, 1, 20, 33, 24, None, 0, 3.0, (2, 1, 20, 33), 0.1, Launch(16, 32, 1, 1)),
            (f16, 2, 2, 33, 33, 16, 5, 0, 0.0, (1, 2, 1, 33), 0.9, Launch(16, 16, 1, 1)),
            (f32, 1, 1, 33, 18, 16, -3, None, 0.0, (33, 1), 0.3, Launch(32, 32, 1, 1)),
        ):
            query = torch.randn(2, rows, heads, width, dtype=dtype).transpose(1, 2)
            key, value = (torch.randn(2, few, keys, width, dtype=dtype) for _ in range(2))
            mask = torch.randn(bias, dtype=dtype) if bias else None
            seed = torch.randint(2**63 - 1, (1,))
            operands, settings = (query, key, value, mask), (0.3, softcap, left, right)
            near = dict(atol=2e-2, rtol=2e-2) if dtype is f16 else dict(atol=1e-5, rtol=1e-5)
            found = launching.forward(kernels, *operands, *settings, p, seed, launch=tile)
            right_one = attention_plain(*map(exact, operands), *settings, p, seed)
            for a, b in zip(found, right_one):
                torch.testing.assert_close(a.double(), b, **near)
            grad = torch.randn_like(found[0])
            wanted = [True] * 3 + [bias is not None]
            ours = launching.backward(
                kernels, grad, *operands, *found, *settings, wanted, p, seed, launch=tile
            )
            theirs = attention_backward_plain(
                exact(grad), *map(exact, operands), *right_one, *settings, wanted, p, seed
            )
            for a, b in zip(ours, theirs):
                torch.testing.assert_close(a.double(), b, **near)
    """)


@needs_triton
def test_the_kernels_keep_the_same_scores_one_by_one() -> None:
    """Weights are even, and values or gradients a unit matrix: results show the mask."""
    interpret("""
        import torch
        import graphopt_kernels.attention_launch as launching
        from graphopt_kernels.attention_launch import Launch
        from graphopt_kernels.philox import factors_of_scores

        kernels, seed = launching.jitted(), torch.tensor([2**62 + 11])
        settings, unit = (1.0, 0.0, None, None), torch.eye(32).expand(1, 2, 32, 32)
        for tile in (Launch(32, 16, 1, 1), Launch(16, 32, 1, 1)):
            zeros, few = torch.zeros(1, 2, 37, 32), torch.zeros(1, 2, 32, 32)
            mask = factors_of_scores(seed, 0.5, 2, slice(0, 37), slice(0, 32), torch.float32) > 0
            output, _ = launching.forward(kernels, zeros, few, unit, None, *settings, 0.5, seed, launch=tile)
            assert torch.equal(output > 0, mask.view(1, 2, 37, 32))
            mask = factors_of_scores(seed, 0.5, 2, slice(0, 32), slice(0, 37), torch.float32) > 0
            given = (few, zeros, zeros, None)
            found = launching.forward(kernels, *given, *settings, 0.5, seed, launch=tile)
            wanted = [True, True, True, False]
            _, _, d_value, _ = launching.backward(
                kernels, unit, *given, *found, *settings, wanted, 0.5, seed, launch=tile
            )
            assert torch.equal((d_value > 0).mT, mask.view(1, 2, 32, 37))
            # With keys that are a unit matrix the gradient of queries shows those of weights.
            given = (torch.zeros(1, 2, 37, 32), unit, unit, None)
            found = launching.forward(kernels, *given, *settings, 0.5, seed, launch=tile)
            grad = torch.ones(1, 2, 37, 32)
            d_query, _, _, _ = launching.backward(
                kernels, grad, *given, *found, *settings, wanted, 0.5, seed, launch=tile
            )
            factors = factors_of_scores(seed, 0.5, 2, slice(0, 37), slice(0, 32), torch.float32)
            right = ((factors - factors.mean(-1, keepdim=True)) / 32).view(1, 2, 37, 32)
            torch.testing.assert_close(d_query, right)
    """)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["causal", "groups and a window", "cap", "bias", "hidden", "longer"])
@pytest.mark.parametrize(
    ("dtype", "width"),
    [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float16, 80),
     (torch.float32, 64)],
)  # fmt: skip
def test_on_a_gpu_it_drops_what_the_reference_does(dtype: torch.dtype, width: int, case: str) -> None:
    """Values and gradients beside float64, the same bits in every run."""
    from tests.test_attention import GPU_CASES

    of = GPU_CASES[case]
    rows, keys, few = 333, of.get("keys", 333), of.get("few", 8)
    torch.manual_seed(0)
    shapes = [(2, 8, rows, width), (2, few, keys, width), (2, few, keys, width)]
    if "bias" in of:
        shapes.append(of["bias"])
    narrow = [torch.randn(shape, device="cuda", dtype=dtype).requires_grad_() for shape in shapes]
    fixed = [torch.rand(of["hidden"], device="cuda") > 0.4] if "hidden" in of else []
    seed = drawn_seed("cuda")
    settings = (width**-0.5, of.get("softcap", 0.0), of.get("left"), of.get("right"), 0.2, seed)
    grad = torch.randn(2, 8, rows, width, device="cuda", dtype=dtype)

    def run(leaves: list[Tensor]) -> list[Tensor]:
        output = ops.attention(*leaves[:3], [*leaves[3:], *fixed, None][0], *settings)[0]
        return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(output.dtype))]

    # Float64 has no kernel: the reference.
    truth = run([x.detach().double().requires_grad_() for x in narrow])
    for value, twice, right in zip(run(narrow), run(narrow), truth, strict=True):
        assert torch.equal(value, twice)
        error = float((value.double() - right).norm() / right.norm())
        assert error < {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-4}[dtype]
