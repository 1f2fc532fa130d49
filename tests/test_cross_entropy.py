"""Cross entropy of logits that exist: numbers against torch and float64, gradients, kernels, refusals."""

from __future__ import annotations

import itertools
import math
import re
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import graphopt_kernels.cross_entropy as module
from graphopt_kernels.cross_entropy_launch import losses_of_rows, part_launch
from graphopt_kernels.cross_entropy_rows import RowSettings
from graphopt_kernels.emit.machine_code import compile_function_for_sm90
from tests.loss_kernels import interpret

ops = torch.ops.graphopt
ROWS, CLASSES = 9, 37
IGNORED = -100
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
SETTINGS = [(0.0, 1.0, 0.0), (0.1, 0.5, 0.0), (0.2, -1.5, 3.0)]
"""Label smoothing, scale, softcap."""


def drawn(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    target = torch.randint(0, CLASSES, (ROWS,))
    target[2] = IGNORED
    return (3 * torch.randn(ROWS, CLASSES, dtype=torch.float64)).to(dtype).requires_grad_(), target


def expected(
    logits: torch.Tensor, target: torch.Tensor, reduction: str, smoothing: float, scale: float, cap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    z = logits * scale
    z = cap * torch.tanh(z / cap) if cap else z
    loss = F.cross_entropy(z, target, reduction=reduction, label_smoothing=smoothing)
    return loss, z.logsumexp(1)


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_values_and_gradients_are_those_of_torch(
    reduction: str, settings: tuple[float, float, float], written: bool
) -> None:
    logits, target = drawn()
    found = ops.cross_entropy(logits, target, reduction, IGNORED, *settings, torch.float64, written)
    right = expected(logits, target, reduction, *settings)
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b)
    weight = torch.randn_like(right[0])
    for mix in (
        lambda loss, sums: (loss * weight).sum(),
        lambda loss, sums: sums.square().mean(),
        lambda loss, sums: (loss * weight).sum() + 1e-2 * sums.square().mean(),
    ):
        (a,), (b,) = (
            torch.autograd.grad(mix(*values), logits, retain_graph=True) for values in (found, right)
        )
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_classes_weigh_as_in_torch(
    reduction: str, settings: tuple[float, float, float], written: bool
) -> None:
    logits, target = drawn()
    weights = torch.rand(CLASSES, dtype=torch.float64)
    weights[target[0]] = 0
    smoothing, scale, cap = settings
    z = logits * scale
    z = cap * torch.tanh(z / cap) if cap else z
    loss = F.cross_entropy(z, target, weights, reduction=reduction, label_smoothing=smoothing)
    right = (loss, z.logsumexp(1))
    found = ops.cross_entropy(
        logits, target, reduction, IGNORED, *settings, torch.float64, written, class_weight=weights
    )
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b)
    beside = torch.randn_like(loss)
    for mix in (
        lambda loss, sums: (loss * beside).sum(),
        lambda loss, sums: (loss * beside).sum() + 1e-2 * sums.square().mean(),
    ):
        (a,), (b,) = (
            torch.autograd.grad(mix(*values), logits, retain_graph=True) for values in (found, right)
        )
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_where_nothing_weighs_and_where_logits_are_infinite_it_is_as_in_torch(
    smoothing: float, written: bool
) -> None:
    weights = torch.rand(CLASSES)
    weights[:9] = 0
    numbers = (IGNORED, smoothing, 1.0, 0.0, torch.float32, written)
    nothing, none = torch.arange(9), torch.full((9,), IGNORED)
    logits, usual = drawn(torch.float32)
    wild = logits.detach().clone()
    wild[4] = -math.inf
    for row, column, value in ((1, 3, math.nan), (2, 5, math.inf), (5, 20, math.inf), (6, 2, -math.inf)):
        wild[row, column] = value
    for target, reduction in itertools.product((nothing, none, usual), ("none", "mean", "sum")):
        for given in (logits, wild.requires_grad_()):
            found, _ = ops.cross_entropy(given, target, reduction, *numbers, class_weight=weights)
            right = F.cross_entropy(given, target, weights, reduction=reduction, label_smoothing=smoothing)
            torch.testing.assert_close(found, right, equal_nan=True)
            (a,), (b,) = (torch.autograd.grad(loss.sum(), given) for loss in (found, right))
            if given is logits:
                torch.testing.assert_close(a, b, equal_nan=True)
            counted = (target != IGNORED) & given.isfinite().all(1)
            torch.testing.assert_close(a[counted], b[counted], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("written", [False, True])
def test_it_errs_no_more_than_separate_operators(dtype: torch.dtype, written: bool) -> None:
    torch.manual_seed(0)
    narrow, target = torch.randn(64, 1000).to(dtype), torch.randint(0, 1000, (64,))

    def run(function: Any, given: torch.dtype) -> list[torch.Tensor]:
        leaf = narrow.to(given).requires_grad_()
        loss = function(leaf)
        return [loss.detach(), *torch.autograd.grad(loss, leaf)]

    truth = run(lambda z: F.cross_entropy(z, target), torch.float64)
    eager = run(lambda z: F.cross_entropy(z.float(), target), dtype)
    ours = run(
        lambda z: ops.cross_entropy(z, target, "mean", IGNORED, 0.0, 1.0, 0.0, torch.float32, written)[0],
        dtype,
    )
    for value, reference, right in zip(ours, eager, truth, strict=True):
        errors = [float((t.double() - right).norm() / right.norm()) for t in (value, reference)]
        assert errors[0] <= 1.1 * errors[1] + 1e-7


@pytest.mark.parametrize("written", [False, True])
def test_nan_and_infinities_come_through_and_ignored_rows_are_zero(written: bool) -> None:
    for value in (math.nan, math.inf, -math.inf):
        logits, target = drawn(torch.float32)
        with torch.no_grad():
            logits[1, 3] = value
            logits[2] = value
            logits[4] = -math.inf
        found, _ = ops.cross_entropy(logits, target, "none", IGNORED, 0.0, 1.0, 0.0, torch.float32, written)
        right = F.cross_entropy(logits, target, reduction="none")
        torch.testing.assert_close(found, right, equal_nan=True)
        kept = [row for row in range(ROWS) if row != 2]
        (a,), (b,) = (torch.autograd.grad(loss.sum(), logits, retain_graph=True) for loss in (found, right))
        torch.testing.assert_close(a[kept], b[kept], equal_nan=True)
        assert torch.equal(a[2], torch.zeros(CLASSES))


@pytest.mark.parametrize("written", [False, True])
def test_no_rows_and_no_row_that_counts_are_as_in_torch(written: bool) -> None:
    settings = (IGNORED, 0.0, 1.0, 0.0, torch.float32, written)
    for rows, reduction in itertools.product((0, 3), ("none", "mean", "sum")):
        logits = torch.randn(rows, CLASSES, requires_grad=True)
        target = torch.full((rows,), IGNORED)
        found, sums = ops.cross_entropy(logits, target, reduction, *settings)
        torch.testing.assert_close(
            found, F.cross_entropy(logits, target, reduction=reduction), equal_nan=True
        )
        assert sums.shape == (rows,)
        (gradient,) = torch.autograd.grad(found.sum(), logits)
        assert torch.equal(gradient, torch.zeros(rows, CLASSES))


def test_logits_with_gaps_between_rows_and_by_columns() -> None:
    logits, target = drawn()
    for given in (
        torch.cat([logits, logits], 1).detach()[:, :CLASSES].requires_grad_(),
        logits.detach().t().contiguous().t().requires_grad_(),
    ):
        assert not given.is_contiguous()
        found, _ = ops.cross_entropy(given, target, "mean", IGNORED, 0.0, 1.0, 0.0, torch.float64)
        right = F.cross_entropy(given, target)
        torch.testing.assert_close(found, right)
        (a,), (b,) = (torch.autograd.grad(loss, given) for loss in (found, right))
        torch.testing.assert_close(a, b)


def test_logits_are_left_as_they_are() -> None:
    logits, target = drawn(torch.float32)
    before = logits.detach().clone()
    ops.cross_entropy(logits, target, "sum", IGNORED, 0.1, 2.0, 3.0, torch.float32)[0].backward()
    assert torch.equal(logits, before)


def test_the_operators_pass_opcheck() -> None:
    check: Any = torch.library.opcheck
    logits, target = drawn(torch.float32)
    for reduction, written in itertools.product(("none", "mean"), (False, True)):
        settings = (reduction, IGNORED, 0.1, 1.0, 2.0)
        check(ops.cross_entropy.default, (logits, target, *settings, torch.float32, written))
    plain, weights = logits.detach(), torch.rand(CLASSES)
    check(ops.cross_entropy.default, (logits, target, *settings, torch.float32, True, weights))
    check(ops.cross_entropy.default, (logits, target, *settings, torch.float32, False, weights))
    _, sums = ops.cross_entropy(plain, target, *settings, torch.float32)
    for beside, weight in ((None, None), (torch.randn(ROWS), None), (None, weights)):
        given = (torch.tensor(2.0), plain, target, sums, *settings, beside, weight)
        check(ops.cross_entropy_backward.default, given)
    for smoothing, beside, weight in ((0.0, None, None), (0.1, torch.randn(ROWS), weights)):
        asked = (target, CLASSES, "mean", IGNORED, smoothing, torch.float32, beside, weight)
        check(ops.cross_entropy_row_terms.default, (torch.tensor(2.0), *asked))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_what_rows_give_is_that_of_the_loss(dtype: torch.dtype) -> None:
    """By hand: shares, what targets have less, what every class has less; ignored rows give nothing."""
    target = torch.tensor([2, IGNORED, 0], dtype=dtype)
    found = ops.cross_entropy_row_terms(torch.tensor(6.0), target, 4, "mean", IGNORED, 0.2, torch.float64)
    expected = ([3.0, 0.0, 3.0], [2.4, 0.0, 2.4], [0.15, 0.0, 0.15], [2, -1, 0])
    for values, right in zip(found, expected, strict=True):
        torch.testing.assert_close(values, torch.tensor(right, dtype=values.dtype))
    assert found[3].dtype is torch.int32 and target.tolist() == [2, IGNORED, 0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"target": torch.zeros(2, 3, dtype=torch.int64)}, "takes targets [N], got [2, 3]"),
        ({"classes": 2**31}, "counts classes in 32 bits, got 2147483648"),
        ({"reduction": "total"}, "knows the reductions none, mean, sum, got 'total'"),
    ],
    ids=["rows", "classes", "reduction"],
)
def test_what_rows_are_not_given_is_said(change: dict[str, Any], reason: str) -> None:
    given: dict[str, Any] = {"target": torch.zeros(3, dtype=torch.int64), "classes": 4, "reduction": "mean"}
    given |= change
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        ops.cross_entropy_row_terms(torch.tensor(1.0), *given.values(), IGNORED, 0.0, torch.float32)


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_they_compute_the_same(backend: str, written: bool) -> None:
    torch._dynamo.reset()
    logits, target = drawn(torch.float32)

    def function(logits: torch.Tensor) -> torch.Tensor:
        return ops.cross_entropy(logits, target, "mean", IGNORED, 0.1, 1.0, 0.0, torch.float32, written)[0]

    found, right = torch.compile(function, backend=backend, fullgraph=True)(logits), function(logits)
    torch.testing.assert_close(found, right)
    (a,), (b,) = (torch.autograd.grad(loss, logits) for loss in (found, right))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("logits", "target", "reduction", "reason"),
    [
        (
            (3, 4, 5),
            torch.zeros(3, dtype=torch.int64),
            "mean",
            r"takes logits \[N, V\] and targets \[N\], got .*",
        ),
        (
            (3, 5),
            torch.zeros(4, dtype=torch.int64),
            "mean",
            r"takes logits \[N, V\] and .*, got \[3, 5\] and \[4\]",
        ),
        ((3, 5), torch.zeros(3), "mean", "takes int64 targets, got torch.float32"),
        ((3, 0), torch.zeros(3, dtype=torch.int64), "mean", "takes one class or more, got none"),
        ((3, 5), torch.zeros(3, dtype=torch.int64), "max", "reduction is 'max': expected one of 'none', .*"),
    ],
)
def test_what_it_does_not_take_it_says(
    logits: tuple[int, ...], target: torch.Tensor, reduction: str, reason: str
) -> None:
    given = torch.ones(logits)
    assert re.fullmatch(reason, str(module.cross_entropy_supports(given, target, reduction)))
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (given, target)]
        with pytest.raises(ValueError, match=f"cross_entropy: {reason}"):
            ops.cross_entropy(*fakes, reduction, IGNORED, 0.0, 1.0, 0.0, torch.float32)


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (torch.ones(4), "the class weights have shape [4]: expected [5]"),
        (torch.ones(5, 1), "the class weights have shape [5, 1]: expected [5]"),
        (torch.ones(5, dtype=torch.int64), "takes floating-point class weights, got torch.int64"),
        (torch.ones(5, device="meta"), "the class weights are on meta, the logits on cpu"),
    ],
    ids=["too-few", "a-matrix", "integers", "elsewhere"],
)
def test_weights_that_it_does_not_take(weights: torch.Tensor, reason: str) -> None:
    logits, target = torch.ones(3, 5), torch.zeros(3, dtype=torch.int64)
    numbers = (IGNORED, 0.0, 1.0, 0.0)
    found = module.cross_entropy_supports(logits, target, "mean", *numbers, torch.float32, False, weights)
    assert str(found) == reason
    given = (torch.ones(()), logits, target, torch.ones(3), "mean", *numbers, None, weights)
    assert str(module.cross_entropy_backward_supports(*given)) == reason


def test_integers_and_other_sums_are_refused() -> None:
    target = torch.zeros(3, dtype=torch.int64)
    logits = torch.ones(3, 5, dtype=torch.int32)
    reason = module.cross_entropy_supports(logits, target, "mean")
    assert str(reason) == "takes floating-point logits, got torch.int32"
    reason = module.cross_entropy_backward_supports(
        torch.ones(()), logits.float(), target, torch.ones(4), "mean"
    )
    assert str(reason) == "log-sum-exps have shape [4]: expected [3]"


@needs_triton
def test_the_kernels_compute_what_the_references_do() -> None:
    interpret("""
        import itertools, math
        import torch
        import graphopt_kernels.cross_entropy as module
        from graphopt_kernels.cross_entropy_launch import PartLaunch, gradient_of_rows, losses_of_rows
        from graphopt_kernels.cross_entropy_rows import RowSettings

        torch.manual_seed(0)
        kernels = module._kernels()
        several = PartLaunch(16, 1, 3, 4, 4, 1, False)
        alone = PartLaunch(64, 1, 1, 1, 16, 1, True)
        joined = several._replace(joined=True, streams=True)
        cases = [
            (torch.float32, several, True, (7, 8, 11)),
            (torch.float32, alone, False, (7, 8, 11)),
            (torch.float32, joined, True, (11,)),
            (torch.float16, several, False, (11,)),
            (torch.float16, alone, False, (8,)),
        ]
        for (dtype, launch, weighs, counts), (smoothing, scale, cap) in itertools.product(
            cases, ((0.0, 1.0, 0.0), (0.1, -0.5, 0.0), (0.2, 2.0, 3.0))
        ):
            # Rows with gaps, ignored ones, NaN, and infinities.
            logits = (3 * torch.randn(11, 48)).to(dtype)[:, :37]
            logits[7, :20] = -math.inf
            logits[8] = -math.inf
            logits[9, 5] = math.inf
            logits[10, 5] = math.nan
            target = torch.randint(0, 37, (11,))
            target[2] = -100
            target[7] = 30
            near = dict(atol=2e-3, rtol=2e-3) if dtype is torch.float16 else dict(atol=2e-6, rtol=2e-6)
            settings = RowSettings(-100, smoothing, scale, cap)
            weights = torch.rand(37)
            weights[target[0]] = 0
            drawn = (None, weights) if weighs else (None,)
            for reduction, rows, weight in itertools.product(("none", "mean", "sum"), counts, drawn):
                given = (logits[:rows], target[:rows])
                numbers = (-100, smoothing, scale, cap)
                wanted = (settings, reduction, torch.float32, weight)
                found = losses_of_rows(kernels, *given, *wanted, launch=launch)
                right = module.cross_entropy_reference(
                    *given, reduction, *numbers, torch.float32, class_weight=weight
                )
                torch.testing.assert_close(found[0], right[0], equal_nan=True, **near)
                sums = right[1]
                finite = torch.isfinite(sums)
                torch.testing.assert_close(found[1][finite], sums[finite], **near)
            weight, beside = torch.rand(11), torch.rand(11)
            sums = module.cross_entropy_reference(logits, target, "none", *numbers, torch.float32)[1]
            for sum_grad, of_class in itertools.product((None, beside), drawn):
                found = gradient_of_rows(
                    kernels, logits, target, sums, weight, sum_grad, settings, of_class, launch=launch
                )
                right = module.cross_entropy_backward_reference(
                    weight, logits, target, sums, "none", *numbers, sum_grad, of_class
                )
                torch.testing.assert_close(found, right, equal_nan=True, **near)
        # A label that names no class spoils its row alone.
        target[0] = 37
        given = (kernels, logits[:7], target[:7], RowSettings(), "none", torch.float32)
        for launch in (alone, joined):
            loss, sums = losses_of_rows(*given, launch=launch)
            assert loss.isnan().tolist() == sums.isnan().tolist() == [True] + 6 * [False]
    """)


@needs_triton
@pytest.mark.parametrize(
    ("rows", "columns", "dtype", "plain", "weighted"),
    [
        (523, 128256, "bf16", True, False),
        (523, 128256, "bf16", False, False),
        (8192, 128256, "fp16", True, False),
        (8192, 128256, "fp16", False, False),
        (8192, 128256, "fp16", False, True),
        (8192, 32000, "fp32", True, False),
        (8192, 32000, "fp32", False, True),
    ],
)
def test_the_kernels_compile_for_sm_90_without_spills(
    rows: int, columns: int, dtype: str, plain: bool, weighted: bool
) -> None:
    from graphopt_kernels import cross_entropy_parts_triton as kernels

    itemsize = 4 if dtype == "fp32" else 2
    launch, writes = (part_launch(rows, columns, itemsize, writes=writes) for writes in (False, True))
    halves = dict.fromkeys(("logits", "gradients"), f"*{dtype}")
    floats = ("tops", "totals", "plains", "losses", "log_sum_exps", "counts", "loss", "scales", "sum_scales")
    floats = (*floats, "class_weights", "weight_sum")
    pointers = {**halves, **dict.fromkeys(floats, "*fp32"), "target": "*i64"}
    pointers["arrivals"] = "*i32"
    integers = ("row_stride", "scale_stride", "sum_scale_stride", "ignore_index", "rows", "groups")
    numbers = dict.fromkeys(integers, "i32") | dict.fromkeys(("smoothing", "logit_scale", "softcap"), "fp32")
    constants = {
        **dict.fromkeys(("SMOOTHED", "SOFTCAPPED", "SCALED", "SUMMED"), not plain),
        "WEIGHTED": weighted,
        "STREAMS": not plain,
        "REDUCED": True,
        "MEAN": True,
        "ALONE": launch.alone,
        "COLUMNS": columns,
        "PARTS": launch.parts,
        "BLOCK": launch.block,
        "LANES": launch.lanes,
        "ROWS": launch.rows,
    }
    assert launch.alone is (rows == 523)
    for name, warps in (
        ("parts_kernel", launch.warps),
        ("finish_kernel", launch.finish_warps),
        ("gradient_kernel", writes.warps),
        ("joined_kernel", launch.warps),
        ("total_kernel", 4),
    ):
        given = constants | ({"BLOCK": 1024} if name == "total_kernel" else {}) | {"TOGETHER": 1024}
        if name == "gradient_kernel":
            given |= {"PARTS": writes.parts, "BLOCK": writes.block}
        code = compile_function_for_sm90(
            getattr(kernels, name),
            {**pointers, **numbers},
            given,
            warps=warps,
            aligned=(*pointers, "row_stride"),
        )
        assert not code.spills, (name, code)
        assert code.shared + code.asked <= 8192
        if name in ("parts_kernel", "gradient_kernel"):
            # Loads of 16 bytes in flight for each thread, beside those of float32 weights.
            elements = given["BLOCK"] // (32 * warps)
            assert code.widths("LDG")[128] == elements * (itemsize + 4 * weighted) // 16
            most = 12 if name == "parts_kernel" else 18
            assert not plain or sum(code.instructions.values()) <= most * elements + 64
        if name == "gradient_kernel":
            assert code.widths("STG")[128] == elements * itemsize // 16


@pytest.mark.gpu
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("rows", "columns"), [(523, 128256), (2097, 32000), (8192, 5000)])
def test_on_a_gpu_weighted_and_joined_losses_are_those_of_torch(
    rows: int, columns: int, smoothing: float
) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(rows, columns, device="cuda")).bfloat16().requires_grad_()
    target = torch.randint(0, columns, (rows,), device="cuda")
    target[::7] = IGNORED
    weights = torch.rand(columns, device="cuda")
    settings = (IGNORED, smoothing, 1.0, 0.0)
    for given in (None, weights):
        wide = logits.detach().double().requires_grad_()
        of_class = None if given is None else given.double()
        right = F.cross_entropy(wide, target, of_class, label_smoothing=smoothing)
        found, _ = ops.cross_entropy(logits, target, "mean", *settings, torch.float32, class_weight=given)
        torch.testing.assert_close(found.double(), right, atol=1e-5, rtol=1e-5)
        (a,), (b,) = (torch.autograd.grad(*pair) for pair in ((found, logits), (right, wide)))
        assert float((a.double() - b).norm() / b.norm()) < 4e-3
        kernels, numbers = module._kernels(), RowSettings(IGNORED, smoothing)
        launch = part_launch(rows, columns, 2)._replace(joined=True)
        wanted = (kernels, logits.detach(), target, numbers, "mean", torch.float32, given)
        # Whoever comes last, over and over.
        joined = {float(losses_of_rows(*wanted, launch=launch)[0]) for _ in range(50)}
        assert len(joined) == 1
        assert joined.pop() == pytest.approx(float(right), rel=1e-5)
