"""Linear and cross entropy in blocks of classes, and the gradient of log-sum-exps: numbers and memory.

What the operators share with those in chunks of rows is in ``test_linear_cross_entropy``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import graphopt_kernels.linear_cross_entropy_blocks as module
from graphopt.emit.scratch import scratch_bytes
from graphopt.measure import allocator_peak
from graphopt_kernels.class_blocks import BlockGradients, ClassBlocks, HeldLogits, front_classes
from tests.loss_kernels import check_machine_code, interpret

ops = torch.ops.graphopt
CHUNKED, BLOCKS = ops.linear_cross_entropy, ops.linear_cross_entropy_blocks
HELD = ops.linear_cross_entropy_blocks_with_gradients
gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

Leaves = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def operands(rows: int, width: int, classes: int, dtype: torch.dtype) -> tuple[Leaves, torch.Tensor]:
    torch.manual_seed(rows)
    x = torch.randn(rows, width).to(dtype).requires_grad_()
    weight = (torch.randn(classes, width) / width**0.5).to(dtype).requires_grad_()
    bias = torch.randn(classes).to(dtype).requires_grad_()
    target = torch.randint(0, classes, (rows,))
    target[1::5] = -100
    return (x, weight, bias), target


def relative(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


# --- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes",
    [(8, 24, 101, 8), (16, 16, 200, 16), (24, 8, 301, 8), (7, 5, 333, 10), (40, 8, 79, 16), (6, 4, 9, 64)],
    ids=str,
)
def test_logits_that_are_held_are_those_that_are_computed_again(
    sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    """A block's logits larger than, as large as and smaller than its rows of the gradient; a sum that fits
    behind them and one that does not; odd sizes; one block."""
    rows, width, classes, block = sizes
    leaves, target = operands(rows, width, classes, dtype)
    settings = (block, "mean", -100, 0.1, 0.5, 3.0, torch.float32)
    found = HELD(*leaves, target, *settings, [True] * 3)
    loss, _ = BLOCKS(*leaves, target, *settings)
    assert torch.equal(found[0], loss)
    for held, again in zip(found[1:], torch.autograd.grad(loss, leaves), strict=True):
        # Blocks that are held may be added in another order.
        rounding = {torch.bfloat16: 2**-7, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
        torch.testing.assert_close(held, again, rtol=rounding, atol=rounding * float(again.abs().max()))


def test_what_is_held_where() -> None:
    """By hand: 8 rows of logits take as much as one row of the gradient, in bfloat16."""
    leaves, _ = operands(32, 4, 1000, torch.bfloat16)
    blocks = ClassBlocks(*leaves, 16)
    gradients = BlockGradients(blocks, *leaves, (True, True, False))
    # 32 x 4 float32 are 64 rows of the gradient; 936 are padded down to 896.
    assert gradients.front == front_classes(32, 1000, torch.bfloat16) == 896
    held = HeldLogits(blocks, gradients, (True, True, False))
    assert held.count == 896 * 4 // (32 * 16) == 7
    parts = held.order()
    assert [held.place(part) is not None for part in parts] == [index < 7 for index in range(56)]
    # They take all rows up to 896, so that no other block could be written before them.
    assert held.at_hand is None and held.arrival(1000)[0] == slice(896, 912)
    # Rows 0 to 15 would be written over their own logits; those of the next block lie before them.
    assert [held.is_in_the_way(part) for part in parts[:3]] == [True, False, False]
    blocks = ClassBlocks(*leaves, 24)
    held = HeldLogits(blocks, BlockGradients(blocks, *leaves, (True, True, False)), (True, True, False))
    # Four blocks of 32 x 24 take 768 rows. The last full block lies behind: it comes last, is written first.
    assert held.count == 4 and held.at_hand == slice(864, 888)
    assert held.arrival(1000)[-1] == held.order()[0] == held.at_hand
    assert sorted(held.order(), key=lambda part: part.start) == blocks.within(0, 896)
    wide, _ = operands(4, 32, 1000, torch.bfloat16)
    gradients = BlockGradients(ClassBlocks(*wide, 16), *wide, (True, True, False))
    held = HeldLogits(ClassBlocks(*wide, 16), gradients, (True, True, False))
    assert gradients.front == 960 and held.count == 960 // 16
    assert held.order() == ClassBlocks(*wide, 16).within(0, 960)[::-1] and held.at_hand is None
    assert front_classes(600, 1000, torch.bfloat16) == 0
    assert front_classes(600, 1000, torch.float32) == 1000


@pytest.mark.parametrize("operator", [BLOCKS, HELD], ids=["again", "held"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("blocks", [1, 2, 8, 31])
def test_gradients_err_no_more_than_with_whole_logits(operator: Any, dtype: torch.dtype, blocks: int) -> None:
    (x, weight, _), target = operands(128, 64, 999, dtype)

    def run(loss: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in (x, weight)]
        return list(torch.autograd.grad(loss(*leaves), leaves))

    settings = (-(-999 // blocks), "mean", -100, 0.0, 1.0, 0.0, torch.float32)
    mask = ([True, True, False],) if operator is HELD else ()
    exact = run(lambda x, w: F.cross_entropy(F.linear(x, w), target), torch.float64)
    eager = run(lambda x, w: F.cross_entropy(F.linear(x, w).float(), target), dtype)
    ours = run(lambda x, w: operator(x, w, None, target, *settings, *mask)[0], dtype)
    for value, reference, truth in zip(ours, eager, exact, strict=True):
        assert relative(value, truth) <= 1.05 * relative(reference, truth)


# --- log-sum-exps ------------------------------------------------------------------------------


def with_sums(operator: Any, leaves: Leaves, target: torch.Tensor, count: int, *settings: Any) -> Any:
    step = -(-leaves[1].shape[0] // count) if operator is BLOCKS else count
    return operator(*leaves, target, step, *settings, leaves[0].dtype)


@pytest.mark.parametrize("operator", [CHUNKED, BLOCKS], ids=["rows", "classes"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_log_sum_exps_have_a_gradient(operator: Any, reduction: str) -> None:
    leaves, target = operands(13, 6, 29, torch.float64)
    weights = torch.randn(13, dtype=torch.float64)
    for smoothing, scale, softcap in itertools.product((0.0, 0.1), (1.0, 0.5), (0.0, 2.0)):
        loss, sums = with_sums(operator, leaves, target, 4, reduction, -100, smoothing, scale, softcap)
        logits = F.linear(*leaves) * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        expected = F.cross_entropy(logits, target, reduction=reduction, label_smoothing=smoothing)
        exact = logits.logsumexp(1)
        # Rows that are ignored have a log-sum-exp all the same.
        torch.testing.assert_close(sums, exact)
        for ours, theirs in (
            ((loss.sum() + (weights * sums.square()).sum()), (expected.sum() + (weights * exact**2).sum())),
            (sums.sum(), exact.sum()),
        ):
            grads = (torch.autograd.grad(value, leaves, retain_graph=True) for value in (ours, theirs))
            for a, b in zip(*grads, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("operator", [CHUNKED, BLOCKS], ids=["rows", "classes"])
def test_both_gradients_check_against_finite_differences(operator: Any) -> None:
    leaves, target = operands(5, 4, 11, torch.float64)

    def loss(*leaves: torch.Tensor) -> torch.Tensor:
        loss, sums = with_sums(operator, leaves, target, 3, "sum", -100, 0.1, 1.0, 0.0)
        return loss + sums.square().mean()

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("operator", [CHUNKED, BLOCKS], ids=["rows", "classes"])
def test_a_nan_in_an_ignored_row_reaches_its_log_sum_exp_alone(operator: Any) -> None:
    (x, weight, bias), target = operands(13, 6, 29, torch.float64)
    with torch.no_grad():
        x[1, 0] = float("nan")
    loss, sums = with_sums(operator, (x, weight, bias), target, 4, "mean", -100, 0.0, 1.0, 0.0)
    assert loss.isfinite() and sums.isnan().tolist() == [row == 1 for row in range(13)]
    plain = torch.autograd.grad(loss, (x, weight, bias), retain_graph=True)
    # That of the weight is a sum over rows of the input, 0 times NaN among them.
    assert plain[0].isfinite().all() and plain[2].isfinite().all() and not plain[0][1].any()
    of_sums = torch.autograd.grad(sums.sum(), (x, weight, bias))
    assert of_sums[0].isnan().any(1).tolist() == [row == 1 for row in range(13)]
    assert of_sums[1].isnan().all() and of_sums[2].isnan().all()


# --- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", [BLOCKS, HELD], ids=["again", "held"])
def test_the_sum_of_the_inputs_gradient_takes_no_memory_of_its_own(operator: Any) -> None:
    """In bfloat16, on the CPU: a block of logits, a block of weights in float32 and vectors of rows."""
    rows, width, classes, block = 512, 64, 4096, 128
    (x, weight, _), target = operands(rows, width, classes, torch.bfloat16)
    settings = (block, "mean", -100, 0.0, 1.0, 0.0, torch.float32)
    mask = ([True, True, False],) if operator is HELD else ()

    def step() -> None:
        results = operator(x, weight, None, target, *settings, *mask)
        if operator is BLOCKS:
            torch.autograd.grad(results[0], (x, weight))

    step()
    gradients = x.nbytes + weight.nbytes
    limit = gradients + rows * block * 2 + block * width * 4 + 5 * rows * 4 + 2**20
    # The profiler that counts loses an event now and then.
    peaks = sorted(allocator_peak(step, torch.device("cpu")) for _ in range(3))
    assert gradients < peaks[1] <= limit
    # Logits are 32 times one block.
    assert limit < gradients + rows * classes * 2


# --- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_the_operators_pass_opcheck(bias: bool) -> None:
    (x, weight, vector), target = operands(9, 6, 29, torch.float32)
    given = (x, weight, vector if bias else None, target)
    settings = (8, "mean", -100, 0.1, 1.0, 0.0)
    mask = [True, True, bias]
    check: Any = torch.library.opcheck
    check(BLOCKS.default, (*given, *settings, torch.float32))
    check(HELD.default, (*given, *settings, torch.float32, mask))
    plain = [None if t is None else t.detach() for t in given]
    for last in ((), (torch.randn(9),)):
        arguments = (torch.ones(()), *plain, torch.randn(9), *settings, mask, *last)
        check(ops.linear_cross_entropy_blocks_backward.default, arguments)
        check(ops.linear_cross_entropy_backward.default, arguments)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"block": 0}, "takes blocks of one class or more, got 0"),
        ({"weight": torch.ones(0, 6)}, "the weight has no classes"),
        ({"weight": torch.ones(9, 7)}, "sizes do not match: input [4, 6], weight [9, 7], target [4]"),
        ({"target": torch.ones(4)}, "takes int64 targets, got torch.float32"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], reason: str) -> None:
    good = {
        "input": torch.ones(4, 6), "weight": torch.ones(9, 6), "bias": None,
        "target": torch.zeros(4, dtype=torch.int64), "block": 2, "reduction": "mean",
    }  # fmt: skip
    assert module.blocks_supports(*good.values()) is None
    assert module.blocks_with_gradients_supports(*good.values()) is None
    assert str(module.blocks_supports(*(good | change).values())) == reason
    assert str(module.blocks_with_gradients_supports(*(good | change).values())) == reason
    rows = good | {"reduction": "none"}
    assert module.blocks_supports(*rows.values()) is None
    assert str(module.blocks_with_gradients_supports(*rows.values())) == (
        "gradients that are computed in the forward need a loss that is one number"
    )


def test_references_compute_the_same() -> None:
    leaves, target = operands(13, 6, 29, torch.float64)
    given = (*(t.detach() for t in leaves), target, 8, "mean", -100, 0.1, 0.5, 3.0, torch.float64)
    for a, b in zip(BLOCKS(*given), module.blocks_reference(*given), strict=True):
        torch.testing.assert_close(a, b)
    mask = [True, False, True]
    found, expected = HELD(*given, mask), module.blocks_with_gradients_reference(*given, mask)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


# --- Triton ------------------------------------------------------------------------------------


@needs_triton
def test_the_triton_kernels_compute_what_the_references_do() -> None:
    """Three blocks of 16, 16 and 5 classes; a block of nothing but -inf; labels that name no class."""
    interpret(
        """
        import itertools
        import torch
        from graphopt_kernels.cross_entropy_blocks import fold_block
        from graphopt_kernels.cross_entropy_blocks_triton import fold_kernel
        from graphopt_kernels.cross_entropy_rows import RowSettings, cross_entropy_rows_reference
        from graphopt_kernels.cross_entropy_rows_triton import rows_kernel

        torch.manual_seed(0)
        rows, classes, padded = 5, 37, 24
        parts = (slice(0, 16), slice(16, 32), slice(32, 37))
        for dtype, smoothing, softcap, scale in itertools.product(
            (torch.float32, torch.float16), (0.0, 0.1), (0.0, 2.0), (1.0, 0.5)
        ):
            # One tile of a block, and two.
            tile = 16 if scale == 1.0 else 8
            logits = (3 * torch.randn(rows, classes)).to(dtype)
            logits[4, 3] = float("-inf")
            if not softcap and not smoothing:
                logits[3, :16] = float("-inf")
            target = torch.tensor([36, 20, -100, 17, 15])
            settings = RowSettings(-100, smoothing, scale, softcap)
            expected, found = ([torch.full((rows,), 7.0) for _ in range(3)] for _ in range(2))
            weights, sums = torch.rand(rows), torch.randn(rows)
            buffer = torch.full((rows, padded), 7.0, dtype=dtype)
            order = parts if scale == 1.0 else (parts[2], *parts[:2])
            for part in order:
                columns = part.stop - part.start
                fold_block(
                    logits[:, part].clone(), target, settings, losses=expected[0], log_sum_exp=expected[1],
                    totals=expected[2], first=part.start, classes=classes,
                    begins=part == order[0], ends=part == order[-1],
                )
                buffer[:, :columns] = logits[:, part]
                fold_kernel[(rows,)](
                    buffer, target, *found, padded, part.start, classes, -100, smoothing, scale, softcap,
                    BEGINS=part == order[0], ENDS=part == order[-1], SMOOTHED=smoothing != 0,
                    SOFTCAPPED=softcap != 0, COLUMNS=columns, BLOCK=tile,
                )
                assert torch.equal(buffer[:, :columns], logits[:, part])
            assert not torch.stack(expected[:2]).isnan().any()
            torch.testing.assert_close(found[:2], expected[:2])
            for part, summed in itertools.product(parts, (False, True)):
                columns = part.stop - part.start
                gradient = logits[:, part].clone()
                buffer.fill_(7.0)
                buffer[:, :columns] = gradient
                cross_entropy_rows_reference(
                    gradient, target, settings, log_sum_exp=expected[1], scale=weights,
                    sum_scale=sums if summed else None, first=part.start, classes=classes,
                )
                rows_kernel[(rows,)](
                    buffer, target, found[0], found[1], weights, sums, padded, 1, 1, part.start, classes,
                    -100, smoothing, scale, softcap, STATISTICS=False, GRADIENT=True, SUMMED=summed,
                    SMOOTHED=smoothing != 0, SOFTCAPPED=softcap != 0, COLUMNS=columns, BLOCK=tile,
                )
                torch.testing.assert_close(buffer[:, :columns], gradient)
                assert (buffer[:, columns:] == 7).all()
        state = [torch.empty(rows) for _ in range(3)]
        for part in parts:
            fold_kernel[(rows,)](
                logits[:, part].contiguous(), torch.tensor([classes, -1, 0, 36, -100]), *state,
                part.stop - part.start, part.start, classes, -100, 0.0, 1.0, 0.0,
                BEGINS=part.start == 0, ENDS=part.stop == classes, SMOOTHED=False, SOFTCAPPED=False,
                COLUMNS=part.stop - part.start, BLOCK=16,
            )
        for result in state[:2]:
            assert result.isnan().tolist() == [True, True, False, False, False]
        """
    )


@pytest.mark.slow
@needs_triton
def test_the_triton_kernel_compiles_for_sm_90_without_spills() -> None:
    from graphopt_kernels.cross_entropy_blocks_triton import fold_kernel

    for dtype, columns in itertools.product(("bf16", "fp32"), (2048, 8192, 1280)):
        for smoothed, softcapped in itertools.product((False, True), repeat=2):
            block = min(2**14 // (2 if dtype == "bf16" else 4), 1 << (columns - 1).bit_length())
            constants = {
                "BEGINS": columns == 1280, "ENDS": columns == 8192, "SMOOTHED": smoothed,
                "SOFTCAPPED": softcapped, "COLUMNS": columns, "BLOCK": block,
            }  # fmt: skip
            check_machine_code(fold_kernel, dtype, constants)


# --- CUDA --------------------------------------------------------------------------------------


@gpu
@needs_cuda
@pytest.mark.parametrize("operator", [BLOCKS, HELD], ids=["again", "held"])
@pytest.mark.parametrize(
    "sizes", [(301, 64, 20011, 2048), (64, 128, 4096, 512), (500, 64, 700, 256)], ids=str
)
def test_on_cuda_the_gradients_err_no_more_than_eager_ones(operator: Any, sizes: tuple[int, ...]) -> None:
    rows, width, classes, block = sizes
    (x, weight, _), target = operands(rows, width, classes, torch.bfloat16)
    target = target.cuda()

    def run(loss: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.detach().to("cuda", dtype, copy=True).requires_grad_() for t in (x, weight)]
        value = loss(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    settings = (block, "mean", -100, 0.0, 1.0, 0.0, torch.float32)
    mask = ([True, True, False],) if operator is HELD else ()

    def ours(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return operator(x, w, None, target, *settings, *mask)[0]

    exact = run(lambda x, w: F.cross_entropy(F.linear(x, w), target), torch.float64)
    eager = run(lambda x, w: F.cross_entropy(F.linear(x, w).float(), target), torch.bfloat16)
    found, again = run(ours, torch.bfloat16), run(ours, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    for value, reference, truth in zip(found, eager, exact, strict=True):
        assert relative(value, truth) <= 1.1 * relative(reference, truth) + 64 * 2**-24


@gpu
@needs_cuda
def test_on_cuda_log_sum_exps_have_a_gradient() -> None:
    leaves, target = operands(301, 64, 5003, torch.float32)
    given = [t.detach().cuda().requires_grad_() for t in leaves]
    logits = F.linear(*given)
    expected = F.cross_entropy(logits, target.cuda()) + logits.logsumexp(1).square().mean()
    for operator in (CHUNKED, BLOCKS):
        loss, sums = with_sums(operator, tuple(given), target.cuda(), 4, "mean", -100, 0.0, 1.0, 0.0)
        grads = [
            torch.autograd.grad(value, given, retain_graph=True)
            for value in (loss + sums.square().mean(), expected)
        ]
        for a, b in zip(*grads, strict=True):
            assert relative(a, b.double()) < 1e-4


@gpu
@needs_cuda
@pytest.mark.parametrize("operator", [BLOCKS, HELD], ids=["again", "held"])
def test_on_cuda_they_take_the_scratch_that_is_stated(operator: Any) -> None:
    rows, width, classes = 4000, 64, 20011
    x, weight = (torch.randn(n, width, device="cuda").bfloat16() for n in (rows, classes))
    target = torch.randint(0, classes, (rows,), device="cuda")
    args = (x, weight, None, target, 2048, "mean", -100, 0.0, 1.0, 0.0, torch.float32)
    calls = [(HELD.default, (*args, [True, True, False]))]
    if operator is BLOCKS:
        sums = torch.ones(rows, device="cuda")
        backward = ops.linear_cross_entropy_blocks_backward.default
        rest = (torch.ones((), device="cuda"), *args[:4], sums, *args[4:-1], [True, True, False])
        calls = [(BLOCKS.default, args), (backward, rest)]
    for call, given in calls:
        call(*given)  # libraries take their workspace, and the kernels are compiled
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = call(*given)
        peak = torch.cuda.max_memory_allocated() - before
        outputs = sum(t.nbytes for t in results)
        # The allocator rounds up to 512 bytes, and gives a cached block whole to leave no less than 1 MiB.
        assert 0 <= peak - outputs - scratch_bytes(call, given) <= 3 * 2**20
