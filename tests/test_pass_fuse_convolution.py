"""fuse-convolution: ReLUs and sums within convolutions, that numbers stay, and what is left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.candidate import NearMiss
from graphopt.testing import check_pass, semantic_programs
from graphopt_cost_model.flops import flops
from graphopt_cost_model.traffic import traffic
from graphopt_kernels.convolution_relu import (
    convolution_relu,
    convolution_relu_reference,
    convolution_relu_supports,
)
from graphopt_passes.fold_batch_norm import FoldBatchNorm
from graphopt_passes.functionalize import Functionalize
from graphopt_passes.fuse_convolution import FuseConvolution
from tests.cost_graphs import call_node
from tests.programs import context, host
from tests.test_pass_fold_batch_norm import Bottleneck, prepared

aten = torch.ops.aten
EVERYWHERE = FuseConvolution(everywhere=True)
X = torch.randn(2, 16, 12, 12)
OP = torch.ops.graphopt.convolution_relu.default
WHERE = ([1, 1], [1, 1], [1, 1], 1)


def operands(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (2, 8, 9, 7), (16, 8, 3, 3), (16,), (2, 16, 9, 7)
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


# --- the operator ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_computes_separate_operators(bias: bool, residual: bool, dtype: torch.dtype) -> None:
    x, w, b, r = operands(dtype)
    made = convolution_relu(x, w, b if bias else None, r if residual else None, *WHERE)
    apart = F.conv2d(x, w, b if bias else None, padding=1)
    apart = F.relu(apart + r if residual else apart)
    assert torch.equal(made, apart) and made.stride() == apart.stride()


def test_it_is_an_operator_like_others() -> None:
    x, w, b, r = operands()
    for given in (
        (x, w, b, r),
        (x, w, None, None),
        (x.contiguous(memory_format=torch.channels_last), w, b, r),
    ):
        torch.library.opcheck(OP, (*given, [2, 1] if given[3] is None else [1, 1], [1, 1], [1, 1], 1))
    spec = host().kernels()["convolution-relu"]
    assert spec.reference is convolution_relu_reference and spec.supports is convolution_relu_supports


def test_results_are_laid_out_as_those_of_convolutions() -> None:
    x, w, b, _ = operands()
    for image in (x, x.contiguous(memory_format=torch.channels_last)):
        for filters in (w, w.contiguous(memory_format=torch.channels_last)):
            made = convolution_relu(image, filters, b, None, *WHERE)
            assert made.stride() == F.conv2d(image, filters, b, padding=1).stride()


def test_nan_and_infinity_come_through() -> None:
    x, w, b, r = operands()
    x[0, 0, 0, 0], x[1, 3, 5, 5], r[0, 0, 8, 6] = float("nan"), float("inf"), float("nan")
    made = convolution_relu(x, w, b, r, *WHERE)
    apart = F.relu(F.conv2d(x, w, b, padding=1) + r)
    assert torch.equal(made.isnan(), apart.isnan()) and made.isnan().any()
    torch.testing.assert_close(made, apart, equal_nan=True)


def test_empty_batches() -> None:
    _, w, b, _ = operands()
    assert convolution_relu(torch.randn(0, 8, 9, 7), w, b, None, *WHERE).shape == (0, 16, 9, 7)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({0: torch.randn(8, 9, 7)}, "an input of 3 and a weight of 4 dimensions: expected 4 and 4"),
        ({0: torch.randn(2, 8, 9, 7, dtype=torch.float64)}, "no kernel takes float64"),
        ({1: torch.randn(16, 8, 3, 3).half()}, "operands are of several dtypes"),
        ({4: [1]}, "stride, padding and dilation are two numbers each"),
        ({3: torch.randn(2, 16, 1, 1)}, r"the residual \[2, 16, 1, 1\] does not look like the result"),
    ],
)
def test_operands_that_do_not_fit_are_named(changed: dict[int, Any], message: str) -> None:
    given: list[Any] = [*operands(), *WHERE]
    for position, value in changed.items():
        given[position] = value
    with pytest.raises(ValueError, match=f"convolution_relu: {message}"):
        convolution_relu(*given)


def test_cost_by_hand() -> None:
    x, w, b, r = (t.to("meta") for t in operands(torch.bfloat16))
    node = call_node(OP, (x, w, b, r, *WHERE), torch.empty_like(r))
    assert flops(node) == 2 * 2 * 16 * 9 * 7 * 8 * 9
    moved = traffic(node)
    assert moved.read == 2 * (x.numel() + w.numel() + 16 + r.numel()) and moved.written == 2 * r.numel()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("last", [False, True])
def test_the_library_computes_it(dtype: torch.dtype, last: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    layout = torch.channels_last if last else torch.contiguous_format
    x, w, b, r = operands(dtype, "cuda")
    x = x.contiguous(memory_format=layout)
    for residual in (None, r):
        made = convolution_relu(x, w, b, residual, *WHERE)
        exact = convolution_relu_reference(
            *(None if t is None else t.double() for t in (x, w, b, residual)),
            *WHERE,  # type: ignore[arg-type]
        )
        apart = convolution_relu_reference(x, w, b, residual, *WHERE)
        assert made.stride() == apart.stride()
        error, usual = ((t.double() - exact).norm() / exact.norm() for t in (made, apart))
        assert error <= 1.1 * usual + 1e-7
        x[0, 0, 0, 0], x[1, 3, 5, 5] = float("nan"), float("inf")
        made, apart = (f(x, w, b, residual, *WHERE) for f in (convolution_relu, convolution_relu_reference))
        assert torch.equal(made.isnan(), apart.isnan()) and torch.equal(made.isinf(), apart.isinf())
        x[0, 0, 0, 0] = x[1, 3, 5, 5] = 1.0


# --- the pass -------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, kind: str = "plain", **options: Any) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(16, 16, 3, padding=1, **options)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.kind == "read twice":
            return F.relu(y) + y
        if self.kind == "rows":
            return F.relu(y + x.mean((2, 3), keepdim=True))
        if self.kind == "sum":
            return F.relu(y + x)
        if self.kind == "sum first":
            return F.relu(x + y, inplace=True)
        if self.kind == "scaled":
            return F.relu(torch.add(y, x, alpha=2))
        if self.kind == "gelu":
            return F.gelu(y)
        return F.relu(y)


def calls(model: nn.Module, steps: Any, x: Tensor = X, allow: tuple[str, ...] = ()) -> list[Any]:
    with torch.no_grad():
        (program,) = semantic_programs(model, (x,), steps, allow=allow)
    return list(program.nodes(OP))


def reasons(
    model: nn.Module, x: Tensor = X, step: FuseConvolution = EVERYWHERE, mode: str = "infer"
) -> list[str]:
    with torch.no_grad():
        (program,) = semantic_programs(model, (x,), [Functionalize()])
    return [m.reason.text for m in step.propose(program, context(mode)) if isinstance(m, NearMiss)]


@pytest.mark.parametrize("kind", ["plain", "sum", "sum first"])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"stride": 1, "dilation": 1}], ids=str)
def test_one_call_and_the_same_numbers(kind: str, options: dict[str, Any]) -> None:
    model = Net(kind, **options).eval().requires_grad_(False)
    with torch.no_grad():
        check_pass(EVERYWHERE, model, (X,)) if kind != "sum first" else None
        (node,) = calls(model, [Functionalize(), EVERYWHERE])
    assert (node.args[3] is None) == (kind == "plain")


def test_blocks_of_a_resnet_are_three_convolutions_once_norms_are_folded() -> None:
    model = prepared(Bottleneck())
    steps = [Functionalize(), FoldBatchNorm(), EVERYWHERE]
    with torch.no_grad():
        (program,) = semantic_programs(
            model, (torch.randn(2, 16, 32, 32),), steps, allow=("fold-batch-norm",)
        )
    folded = len(list(program.nodes(aten.batch_norm.default))) == 0
    assert len(list(program.nodes(OP))) == (3 if folded else 0)


def test_the_default_pipeline_leaves_the_cpu_alone() -> None:
    model = Net("sum").eval().requires_grad_(False)
    with torch.no_grad():
        fast = graphopt.optimize(copy.deepcopy(model), (X,), emit="eager", on_error="raise")
        assert torch.equal(fast(X), model(X))
    (record,) = (step for step in fast.report.steps if step.id == "fuse-convolution")
    assert record.status == "no-op"
    assert any(m.reason.text == "no kernel runs on cpu" for m in fast.report.near_misses)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (Net("read twice"), "read by another call as well"),
        (Net("rows"), "what is added does not look like the result"),
        (Net(groups=4), "the convolution is grouped: the library has no such kernel that is fast"),
    ],
    ids=lambda x: x if isinstance(x, str) else x.kind,
)
def test_what_is_left_alone_says_why(model: nn.Module, text: str) -> None:
    found = reasons(model.eval().requires_grad_(False))
    assert any(text in reason for reason in found), found


@pytest.mark.parametrize("kind", ["scaled", "gelu"])
def test_other_calls_are_not_taken(kind: str) -> None:
    model = Net(kind).eval().requires_grad_(False)
    assert not calls(model, [EVERYWHERE])


def test_training_devices_dtypes_and_layouts() -> None:
    model = Net().eval().requires_grad_(False)
    assert reasons(model, mode="train") == ["gradients flow through both: in training they stay apart"]
    assert reasons(model, step=FuseConvolution()) == ["no kernel runs on cpu"]
    wide = copy.deepcopy(model).double()
    assert reasons(wide, X.double()) == ["operands are of several dtypes, or of one that no kernel takes"]
    assert reasons(model, X[0]) == ["the convolution is of one sample"]
