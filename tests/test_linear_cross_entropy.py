"""Linear and cross entropy in chunks: numbers against whole logits, what it must refuse, memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import graphopt_kernels.linear_cross_entropy as module
import graphopt_kernels.linear_cross_entropy_arguments as arguments
import graphopt_kernels.linear_cross_entropy_blocks  # noqa: F401  (registers the operators)
from graphopt.emit.scratch import scratch_bytes
from graphopt.measure import allocator_peak
from tests.loss_kernels import check_machine_code, interpret

ops = torch.ops.graphopt
ROWS, WIDTH, COLUMNS = 13, 6, 29
MODES = ("forward", "recompute", "blocks", "forward-blocks")
OPERATORS = {
    "forward": ops.linear_cross_entropy_with_gradients,
    "recompute": ops.linear_cross_entropy,
    "blocks": ops.linear_cross_entropy_blocks,
    "forward-blocks": ops.linear_cross_entropy_blocks_with_gradients,
}


def chunked(
    mode: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    *,
    chunks: int = 4,
    reduction: str = "mean",
    smoothing: float = 0.0,
    scale: float = 1.0,
    softcap: float = 0.0,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    settings = (chunks, reduction, -100, smoothing, scale, softcap, dtype or x.dtype)
    if "blocks" in mode:
        # As many blocks of classes.
        settings = (max(1, -(-weight.shape[0] // chunks)), *settings[1:])
    if "forward" in mode:
        mask = [t is not None and t.requires_grad for t in (x, weight, bias)]
        return OPERATORS[mode](x, weight, bias, target, *settings, mask)[0]
    return OPERATORS[mode](x, weight, bias, target, *settings)[0]


def whole(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    *,
    reduction: str = "mean",
    smoothing: float = 0.0,
    scale: float = 1.0,
    softcap: float = 0.0,
    **_: Any,
) -> torch.Tensor:
    logits = F.linear(x, weight, bias) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, target, reduction=reduction, label_smoothing=smoothing)


def operands(
    *, bias: bool = False, dtype: torch.dtype = torch.float64, rows: int = ROWS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    torch.manual_seed(rows)
    x = torch.randn(rows, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(COLUMNS, WIDTH, dtype=dtype, requires_grad=True)
    vector = torch.randn(COLUMNS, dtype=dtype, requires_grad=True) if bias else None
    target = torch.randint(0, COLUMNS, (rows,))
    target[1::5] = -100
    return x, weight, vector, target


def compare(mode: str, given: tuple[Any, ...], **settings: Any) -> None:
    """Loss and every gradient, for a gradient of the loss that is not 1."""
    found, expected = chunked(mode, *given, **settings), whole(*given, **settings)
    torch.testing.assert_close(found, expected, equal_nan=True)
    leaves = [t for t in given[:3] if t is not None and t.requires_grad]
    grad = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(loss, leaves, grad) for loss in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("chunks", [1, 4, 13, 20])
@pytest.mark.parametrize("mode", MODES)
def test_loss_and_gradients_are_those_of_whole_logits(mode: str, chunks: int) -> None:
    choices = itertools.product((False, True), ("mean", "sum", "none"), (0.0, 0.1), (0.0, 2.0), (1.0, 0.5))
    for bias, reduction, smoothing, softcap, scale in choices:
        if "forward" in mode and reduction == "none":
            continue
        settings = {"reduction": reduction, "smoothing": smoothing, "softcap": softcap, "scale": scale}
        compare(mode, operands(bias=bias), chunks=chunks, **settings)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_check_against_finite_differences(mode: str) -> None:
    x, weight, bias, target = operands(bias=True)

    def loss(*leaves: torch.Tensor) -> torch.Tensor:
        return chunked(mode, *leaves, target, smoothing=0.1)

    assert torch.autograd.gradcheck(loss, (x, weight, bias))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_where_every_row_is_ignored_the_mean_is_nan_and_gradients_zero(mode: str, smoothing: float) -> None:
    x, weight, bias, target = operands(bias=True)
    given = (x, weight, bias, torch.full_like(target, -100))
    assert chunked(mode, *given, smoothing=smoothing).isnan()
    compare(mode, given, smoothing=smoothing)
    compare(mode, given, smoothing=smoothing, reduction="sum")


@pytest.mark.parametrize("mode", MODES)
def test_no_rows_give_what_whole_logits_give(mode: str) -> None:
    compare(mode, operands(bias=True, rows=0))
    compare(mode, operands(rows=0), reduction="sum")


@pytest.mark.parametrize("mode", MODES)
def test_infinities_and_nan_come_through(mode: str) -> None:
    for value in (float("inf"), float("-inf"), float("nan")):
        x, weight, _, target = operands()
        with torch.no_grad():
            x[0, 0] = value
            x[2] = -value
        found, expected = chunked(mode, x, weight, None, target), whole(x, weight, None, target)
        torch.testing.assert_close(found, expected, equal_nan=True)
    x, weight, bias, target = operands(bias=True)
    with torch.no_grad():
        bias[3] = float("-inf")
    compare(mode, (x, weight, bias, torch.where(target == 3, 4, target)))


@pytest.mark.parametrize("mode", MODES)
def test_a_target_that_is_no_column_raises(mode: str) -> None:
    x, weight, _, target = operands()
    for wrong in (COLUMNS, -1):
        target[2] = wrong
        with pytest.raises(RuntimeError, match="out of bounds"):
            chunked(mode, x, weight, None, target)


@pytest.mark.parametrize("frozen", [0, 1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_only_gradients_that_are_needed_are_computed(mode: str, frozen: int) -> None:
    given = list(operands(bias=True))
    given[frozen] = given[frozen].detach()
    compare(mode, tuple(given))
    mask = [index != frozen for index in range(3)]
    results = ops.linear_cross_entropy_with_gradients(
        *given, 4, "mean", -100, 0.0, 1.0, 0.0, torch.float64, mask
    )
    assert [t.numel() > 0 for t in results[1:]] == mask


def test_a_gradient_that_was_left_out_is_not_silently_zero() -> None:
    x, weight, _, target = operands()
    settings = (4, "mean", -100, 0.0, 1.0, 0.0, torch.float64)
    loss = ops.linear_cross_entropy_with_gradients(x, weight, None, target, *settings, [True, False, False])[
        0
    ]
    with pytest.raises(RuntimeError, match="output_mask lacks weight, which requires a gradient"):
        loss.backward()


@pytest.mark.parametrize("mode", MODES)
def test_a_tied_weight_gets_the_sum_of_its_gradients(mode: str) -> None:
    weight = torch.randn(COLUMNS, WIDTH, dtype=torch.float64, requires_grad=True)
    tokens, target = torch.randint(0, COLUMNS, (ROWS,)), torch.randint(0, COLUMNS, (ROWS,))
    results = [f(F.embedding(tokens, weight), weight) for f in (
        lambda x, w: chunked(mode, x, w, None, target), lambda x, w: whole(x, w, None, target)
    )]  # fmt: skip
    ours, theirs = (torch.autograd.grad(loss, weight)[0] for loss in results)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mode", MODES)
def test_layouts_do_not_matter(mode: str) -> None:
    target = torch.stack([operands()[3]] * 2, 1)[:, 0]
    spread = torch.randn(ROWS, 2 * WIDTH, dtype=torch.float64)[:, ::2].requires_grad_()
    turned = torch.randn(WIDTH, COLUMNS, dtype=torch.float64).t().requires_grad_()
    compare(mode, (spread, turned, None, target))


@pytest.mark.parametrize("mode", MODES)
def test_autocast_leaves_the_operator_alone(mode: str) -> None:
    given = operands(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = chunked(mode, *given)
    assert torch.equal(found, chunked(mode, *given))


def relative(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("mode", "chunks"), [*itertools.product(MODES, (1, 2, 8))])
def test_bfloat16_errs_no_more_than_separate_operators(mode: str, chunks: int) -> None:
    """But for the weight's gradient, which is rounded once a chunk: sqrt((chunks + 1) / 2) as much."""
    torch.manual_seed(0)
    x, weight = torch.randn(256, 64).bfloat16(), (torch.randn(499, 64) / 8).bfloat16()
    target = torch.randint(0, 499, (256,))

    def run(loss: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, weight)]
        value = loss(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    exact = run(lambda x, w: F.cross_entropy(F.linear(x, w), target), torch.float64)
    eager = run(lambda x, w: F.cross_entropy(F.linear(x, w).float(), target), torch.bfloat16)
    ours = run(
        lambda x, w: chunked(mode, x, w, None, target, chunks=chunks, dtype=torch.float32), torch.bfloat16
    )
    assert [t.dtype for t in ours] == [torch.float32, torch.bfloat16, torch.bfloat16]
    limits = (1.1, 1.1, 1.1 * ((chunks + 1) / 2) ** 0.5)
    for value, reference, truth, limit in zip(ours, eager, exact, limits, strict=True):
        # A loss is right to its last bit where both are: eight of them are room for that.
        assert relative(value, truth) <= limit * relative(reference, truth) + 8 * 2**-24


@pytest.mark.parametrize("mode", MODES)
def test_the_whole_logits_are_never_in_memory(mode: str) -> None:
    rows, width, columns, chunks = 1024, 16, 4096, 8
    x, weight = torch.randn(rows, width, requires_grad=True), torch.randn(columns, width, requires_grad=True)
    target = torch.randint(0, columns, (rows,))

    def step(loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            torch.autograd.grad(loss(), (x, weight))

        return run

    # Chunks, both gradients twice at most, and vectors of rows.
    gradients = x.nbytes + weight.nbytes
    limit = rows // chunks * columns * 4 + 2 * gradients + 16 * rows
    if mode == "forward-blocks":
        # Logits that are kept are taken in by copies of 2^18 of them.
        limit += 2**20
    ours = step(lambda: chunked(mode, x, weight, None, target, chunks=chunks))
    theirs = step(lambda: whole(x, weight, None, target))
    ours(), theirs()
    # The profiler that counts loses an event now and then.
    peaks = sorted(allocator_peak(ours, torch.device("cpu")) for _ in range(3))
    assert peaks[1] <= limit
    assert allocator_peak(theirs, torch.device("cpu")) > 3 * rows * columns * 4 > 4 * limit


@pytest.mark.parametrize("bias", [False, True])
def test_the_operators_pass_opcheck(bias: bool) -> None:
    x, weight, vector, target = operands(bias=bias, dtype=torch.float32)
    settings = (4, "mean", -100, 0.1, 1.0, 0.0)
    mask = [True, True, bias]
    check: Any = torch.library.opcheck
    check(ops.linear_cross_entropy.default, (x, weight, vector, target, *settings, torch.float32))
    check(
        ops.linear_cross_entropy_with_gradients.default,
        (x, weight, vector, target, *settings, torch.float32, mask),
    )
    plain = [None if t is None else t.detach() for t in (x, weight, vector)]
    check(
        ops.linear_cross_entropy_backward.default,
        (torch.ones(()), *plain, target, torch.randn(ROWS), *settings, mask),
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_they_compute_the_same(mode: str, backend: str) -> None:
    torch._dynamo.reset()
    x, weight, bias, target = operands(bias=True, dtype=torch.float32)

    def loss(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        # Dynamo does not tell inputs that require gradients: the mask is a constant of the program.
        settings = (4, "mean", -100, 0.0, 1.0, 0.0, torch.float32)
        if "forward" in mode:
            settings = (*settings, [True, True, True])
        return OPERATORS[mode](x.tanh(), weight, bias, target, *settings)[0] * 3

    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    found, expected = compiled(x, weight, bias), loss(x, weight, bias)
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        torch.autograd.grad(found, (x, weight, bias)),
        torch.autograd.grad(expected, (x, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_references_compute_the_same() -> None:
    x, weight, bias, target = operands(bias=True)
    settings = (4, "mean", -100, 0.1, 0.5, 3.0, torch.float64)
    mask = [True, False, True]
    given = [t.detach() for t in (x, weight, bias)]
    for found, expected in (
        (
            ops.linear_cross_entropy(*given, target, *settings),
            module.linear_cross_entropy_reference(*given, target, *settings),
        ),
        (
            ops.linear_cross_entropy_with_gradients(*given, target, *settings, mask),
            module.with_gradients_reference(*given, target, *settings, mask),
        ),
    ):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"input": torch.ones(4, 5, 6)},
            "takes a matrix of inputs, a matrix of weights and a vector of targets",
        ),
        ({"weight": torch.ones(9, 7)}, "sizes do not match: input [4, 6], weight [9, 7], target [4]"),
        ({"bias": torch.ones(8)}, "the bias has shape [8]: expected [9]"),
        ({"weight": torch.ones(9, 6).double()}, "takes input, weight and bias of one floating-point dtype"),
        ({"target": torch.ones(4)}, "takes int64 targets, got torch.float32"),
        ({"chunks": 0}, "takes one chunk or more, got 0"),
        ({"reduction": "max"}, "reduction is 'max': expected one of 'none', 'mean', 'sum'"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], reason: str) -> None:
    good = {
        "input": torch.ones(4, 6), "weight": torch.ones(9, 6), "bias": None,
        "target": torch.zeros(4, dtype=torch.int64), "chunks": 2, "reduction": "mean",
    }  # fmt: skip
    assert arguments.linear_cross_entropy_supports(*good.values()) is None
    assert str(arguments.linear_cross_entropy_supports(*(good | change).values())) == reason
    assert str(arguments.with_gradients_supports(*(good | change).values())) == reason


def test_gradients_in_the_forward_need_one_loss() -> None:
    x, weight, _, target = operands()
    given = (x, weight, None, target, 2, "none")
    reason = "gradients that are computed in the forward need a loss that is one number"
    assert str(arguments.with_gradients_supports(*given)) == reason


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mode", MODES)
def test_on_cuda_they_compute_what_whole_logits_give(mode: str, dtype: torch.dtype) -> None:
    """Errors against float64 beside those of separate operators; every option, rows that are no multiple."""
    torch.manual_seed(0)
    for bias, smoothing, softcap, columns in itertools.product(
        (False, True), (0.0, 0.1), (0.0, 5.0), (37, 20011)
    ):
        x, weight = torch.randn(301, 64), torch.randn(columns, 64) / 8
        vector = torch.randn(columns) if bias else None
        target = torch.randint(0, columns, (301,))
        target[3::7] = -100
        given = [None if t is None else t.to("cuda", dtype) for t in (x, weight, vector)]
        settings = {"smoothing": smoothing, "softcap": softcap}

        def run(
            loss: Callable[..., torch.Tensor],
            dtype: torch.dtype,
            given: list[Any] = given,
            target: Any = target,
        ) -> list[torch.Tensor]:
            leaves = [None if t is None else t.to(dtype, copy=True).requires_grad_() for t in given]
            value = loss(*leaves, target.cuda())
            return [value, *torch.autograd.grad(value, [t for t in leaves if t is not None])]

        exact = run(lambda *args, s=settings: whole(*args, **s), torch.float64)
        eager = run(lambda *args, s=settings: whole(*args, **s), dtype)
        ours = run(lambda *args, s=settings: chunked(mode, *args, dtype=torch.float32, **s), dtype)
        again = run(lambda *args, s=settings: chunked(mode, *args, dtype=torch.float32, **s), dtype)
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
        for value, reference, truth in zip(ours, eager, exact, strict=True):
            # Four chunks: the weight's gradient is rounded four times.
            limit = 1.2 * 2.5**0.5 * relative(reference, truth) + 64 * 2**-24
            assert relative(value, truth) <= limit, (bias, settings, columns)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["forward", "recompute"])
def test_on_cuda_they_take_the_scratch_that_is_stated(mode: str) -> None:
    rows, width, columns = 4000, 64, 20011
    x, weight = (torch.randn(n, width, device="cuda").bfloat16() for n in (rows, columns))
    target = torch.randint(0, columns, (rows,), device="cuda")
    args = (x, weight, None, target, 4, "mean", -100, 0.0, 1.0, 0.0, torch.float32)
    operator = ops.linear_cross_entropy.default
    if mode == "forward":
        operator, args = ops.linear_cross_entropy_with_gradients.default, (*args, [True, True, False])
    operator(*args)  # libraries take their workspace, and the kernel is compiled
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = operator(*args)
    peak = torch.cuda.max_memory_allocated() - before
    outputs = sum(t.nbytes for t in results)
    # The allocator rounds up to 512 bytes, and gives a cached block whole rather than leave less than 1 MiB.
    assert 0 <= peak - outputs - scratch_bytes(operator, args) <= 3 * 2**20


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_triton_kernel_computes_what_the_reference_does() -> None:
    """In the interpreter, which must be on before triton is imported: in a process of its own."""
    script = """
        import itertools
        import torch
        from graphopt_kernels.cross_entropy_rows import RowSettings, cross_entropy_rows_reference
        from graphopt_kernels.cross_entropy_rows_triton import rows_kernel

        torch.manual_seed(0)
        rows, columns, padded = 5, 37, 40
        for dtype, statistics, gradient, smoothing, softcap, scale in itertools.product(
            (torch.float32, torch.float16), (True, False), (True, False), (0.0, 0.1), (0.0, 2.0), (1.0, 0.5)
        ):
            if not statistics and not gradient:
                continue
            buffer = torch.full((rows, padded), 7.0, dtype=dtype)
            buffer[:, :columns] = 3 * torch.randn(rows, columns)
            buffer[4, 3] = float("-inf")
            logits = buffer[:, :columns].clone()
            before = logits.clone()
            target = torch.randint(4, columns, (rows,))
            target[2] = -100
            settings = RowSettings(-100, smoothing, scale, softcap)
            expected = torch.empty(rows), torch.empty(rows)
            weights = torch.rand(rows)
            cross_entropy_rows_reference(
                logits, target, settings, losses=expected[0], log_sum_exp=expected[1],
                scale=weights if gradient else None,
            )
            found = torch.empty(rows), torch.empty(rows) if statistics else expected[1].clone()
            rows_kernel[(rows,)](
                buffer, target, *found, weights, weights, padded, 1, 1, 0, columns, -100,
                smoothing, scale, softcap, STATISTICS=statistics, GRADIENT=gradient, SUMMED=False,
                SMOOTHED=smoothing != 0, SOFTCAPPED=softcap != 0, COLUMNS=columns, BLOCK=16,
            )
            if statistics:
                torch.testing.assert_close(found, expected)
            torch.testing.assert_close(buffer[:, :columns], logits if gradient else before)
            assert (buffer[:, columns:] == 7).all()
        wrong = torch.tensor([columns, -1, 0, 1, 2])
        losses, sums = torch.empty(rows), torch.empty(rows)
        rows_kernel[(rows,)](
            torch.randn(rows, columns), wrong, losses, sums, sums, sums, columns, 1, 1, 0, columns, -100,
            0.0, 1.0, 0.0, STATISTICS=True, GRADIENT=False, SUMMED=False, SMOOTHED=False, SOFTCAPPED=False,
            COLUMNS=columns, BLOCK=16,
        )
        assert losses.isnan().tolist() == [True, True, False, False, False]
    """
    interpret(script)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_triton_kernel_compiles_for_sm_90_without_spills() -> None:
    from graphopt_kernels.cross_entropy_rows_triton import rows_kernel

    kinds = ((True, True, False), (True, False, False), (False, True, False), (False, True, True))
    for dtype, (statistics, gradient, summed) in itertools.product(("bf16", "fp32"), kinds):
        for smoothed, softcapped in itertools.product((False, True), repeat=2):
            block = 2**14 // (2 if dtype == "bf16" else 4)
            constants = {
                "STATISTICS": statistics, "GRADIENT": gradient, "SUMMED": summed, "SMOOTHED": smoothed,
                "SOFTCAPPED": softcapped, "COLUMNS": 128256, "BLOCK": block,
            }  # fmt: skip
            check_machine_code(rows_kernel, dtype, constants)
