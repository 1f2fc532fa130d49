"""fuse-cross-entropy: which losses it sees, that numbers stay, what it leaves alone and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

import graphopt
from graphopt.candidate import Candidate, NearMiss
from graphopt.passes import Proposal
from graphopt.program import Level, Program, Signature
from graphopt.testing import check_pass, semantic_programs
from graphopt_passes.fuse_cross_entropy import FuseCrossEntropy
from tests.programs import context, host, semantic

CLASSES = 40
EVERYWHERE = FuseCrossEntropy(everywhere=True)
Loss = Callable[[Tensor, Tensor], Tensor]


def plain(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z.view(-1, CLASSES), t.view(-1))


def cast(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z.float().view(-1, CLASSES), t.view(-1), label_smoothing=0.1)


def shifted(z: Tensor, t: Tensor) -> Tensor:
    z = z.float()[:, :-1].contiguous().view(-1, CLASSES)
    return F.cross_entropy(z, t[:, 1:].reshape(-1), reduction="sum", ignore_index=3)


def capped(z: Tensor, t: Tensor) -> Tensor:
    z = torch.tanh(z * 0.5 / 3.0) * 3.0
    return F.cross_entropy(z.flatten(0, 1).float(), t.flatten(), reduction="none").square().sum()


def with_z_loss(z: Tensor, t: Tensor) -> Tensor:
    z = z.float()
    sums = z.logsumexp(-1)
    return F.cross_entropy(z.view(-1, CLASSES), t.view(-1)) + 1e-2 * sums.square().mean()


def weighted(z: Tensor, t: Tensor) -> Tensor:
    weights = torch.arange(CLASSES) / CLASSES
    z = z.float()
    loss = F.cross_entropy(z.view(-1, CLASSES), t.view(-1), weights, label_smoothing=0.1)
    return loss + 1e-2 * z.logsumexp(-1).square().mean()


def weighted_rows(z: Tensor, t: Tensor) -> Tensor:
    weights, z = torch.arange(CLASSES) / CLASSES, torch.tanh(z / 3.0) * 3.0
    return F.cross_entropy(z.view(-1, CLASSES), t.view(-1), weights, reduction="none", ignore_index=1).sum()


def weighted_twice(z: Tensor, t: Tensor) -> Tensor:
    """The second of rows that are all ignored."""
    return weighted(z, t) + 0 * weighted(z.detach(), t * 0 - 100).nan_to_num()


def returned_too(z: Tensor, t: Tensor) -> Any:
    return F.cross_entropy(z.float().view(-1, CLASSES), t.view(-1)) + z.square().mean(), z


LOSSES: list[Loss] = [plain, cast, shifted, capped, with_z_loss, weighted, weighted_rows, returned_too]


class Model(nn.Module):
    """Logits that are no product's, so that nothing else wants the loss."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss
        self.scale = nn.Parameter(torch.ones(CLASSES))

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return self.loss(torch.sin(x * self.scale), t)


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return 4 * torch.randn(2, 5, CLASSES), torch.randint(0, CLASSES, (2, 5))


def calls(program: Program) -> list[torch.fx.Node]:
    host().kernels()  # registers the operators
    return list(program.nodes(torch.ops.graphopt.cross_entropy.default))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_what_stands_before_the_loss_goes_into_the_operator(loss: Loss) -> None:
    (program,) = semantic_programs(Model(loss), inputs(), [EVERYWHERE])
    (node,) = calls(program)
    expected = {
        plain: ("mean", -100, 0.0, 1.0, 0.0),
        cast: ("mean", -100, 0.1, 1.0, 0.0),
        shifted: ("sum", 3, 0.0, 1.0, 0.0),
        capped: ("none", -100, 0.0, 0.5, 3.0),
        weighted: ("mean", -100, 0.1, 1.0, 0.0),
        weighted_rows: ("none", 1, 0.0, 1.0, 3.0),
    }
    assert tuple(node.args[2:7]) == expected.get(loss, ("mean", -100, 0.0, 1.0, 0.0))
    aten = torch.ops.aten
    assert (len(node.args) == 10) is (loss in (weighted, weighted_rows))
    for gone in (aten.cross_entropy_loss.default, aten.logsumexp.default, aten.tanh.default):
        assert not list(program.nodes(gone))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("emit", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_values_and_gradients_stay(loss: Loss, emit: str) -> None:
    model, given = Model(loss), inputs()
    fast = graphopt.optimize(model, given, pipeline=[EVERYWHERE], emit=emit, on_error="raise")
    found, right = (y[0] if isinstance(y, tuple) else y for y in (fast(*given), model(*given)))
    torch.testing.assert_close(found, right)
    wanted = list(model.parameters())
    for a, b in zip(torch.autograd.grad(found, wanted), torch.autograd.grad(right, wanted), strict=True):
        torch.testing.assert_close(a, b)


def test_the_pass_keeps_what_any_pass_must() -> None:
    for loss in (cast, with_z_loss):
        check_pass(EVERYWHERE, Model(loss), inputs())


def test_for_a_code_generator_the_gradient_is_written_out() -> None:
    model, given = Model(cast), inputs()
    programs = {}
    for emit in ("eager", "inductor"):
        torch._dynamo.reset()
        fast = graphopt.optimize(model, given, pipeline=[EVERYWHERE], emit=emit, on_error="raise")
        (programs[emit],) = (program for program in fast.programs if program.level is Level.JOINT)
    backward = torch.ops.graphopt.cross_entropy_backward.default
    assert len(list(programs["eager"].nodes(backward))) == 1
    assert not list(programs["inductor"].nodes(backward))


def proposals(
    function: Callable[..., Any], *given: Any, step: FuseCrossEntropy = EVERYWHERE
) -> list[Proposal]:
    return list(step.propose(semantic(function, *given), context()))


def probabilities(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z, F.one_hot(t, CLASSES).float())


def pixels(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z.view(2, CLASSES, 5), t.view(2, 5))


def overwritten(z: Tensor, t: Tensor) -> Tensor:
    z = z.sin()
    wide = z.double().float()
    loss = wide.float()
    z.add_(1)
    return F.cross_entropy(loss, t)


def whole(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z, t)


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (probabilities, "the targets are float32, not int64 class numbers"),
        (pixels, "the classes are not the last dimension"),
        (overwritten, "what it reads is written before the loss"),
    ],
)
def test_other_losses_stay_and_the_report_says_why(loss: Loss, reason: str) -> None:
    (found,) = proposals(loss, torch.randn(10, CLASSES), torch.randint(0, CLASSES, (10,)))
    assert isinstance(found, NearMiss) and found.reason.text == reason


@pytest.mark.parametrize(
    ("device", "region", "weights", "reason"),
    [
        ("cuda", False, {"device": "cuda", "dtype": torch.bfloat16}, None),
        ("cpu", True, {}, None),
        ("cpu", True, {"dtype": torch.float64}, "the class weights are float64, the logits bfloat16"),
        ("cuda", False, {"device": "cuda"}, "the class weights are float32, the logits bfloat16"),
        ("cuda", False, {"dtype": torch.bfloat16}, "the class weights are on cpu, the logits on cuda:0"),
        (
            "cpu",
            False,
            {"dtype": torch.bfloat16, "requires_grad": True},
            "the class weights require a gradient, which torch has none of",
        ),
    ],
    ids=["on-a-gpu", "autocast", "double", "wider", "elsewhere", "trained"],
)
def test_weights_of_classes_that_no_operator_takes_stay_with_a_reason(
    device: str, region: bool, weights: dict[str, Any], reason: str | None
) -> None:
    """On a GPU that is not there: nothing is run."""
    with torch._subclasses.FakeTensorMode():
        z = torch.empty(16, 32000, device=device, dtype=torch.bfloat16)
        t, w = torch.empty(16, device=device, dtype=torch.int64), torch.empty(32000, **weights)

        def loss(z: Tensor, t: Tensor, w: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=region):
                return torch.ops.aten.cross_entropy_loss.default(z, t, w)

        gm = make_fx(loss, pre_dispatch=True)(z, t, torch.empty(32000, device=device, dtype=w.dtype))
    # As it stands: some are refused by the trace already.
    [node for node in gm.graph.nodes if node.op == "placeholder"][-1].meta["val"] = w
    (found,) = EVERYWHERE.propose(Program("g0", Level.SEMANTIC, gm, Signature((), ())), context())
    assert (found.reason.text if isinstance(found, NearMiss) else None) == reason


def test_where_it_gains_nothing_it_stays() -> None:
    target = torch.randint(0, CLASSES, (10,))
    (found,) = proposals(whole, torch.randn(10, CLASSES), target, step=FuseCrossEntropy())
    assert isinstance(found, NearMiss)
    assert found.reason.text == "no kernel runs on cpu, where the operator gains nothing"
    (found,) = proposals(whole, torch.randn(10, CLASSES).double(), target)
    assert isinstance(found, NearMiss) and found.reason.text == "no kernel takes float64"


@pytest.mark.parametrize(
    ("classes", "reason"), [(1000, "code generators hold rows of 1000 classes in registers"), (32000, None)]
)
def test_on_a_gpu_long_rows_are_worth_it(classes: int, reason: str | None) -> None:
    """On a GPU that is not there: nothing is run."""
    with torch._subclasses.FakeTensorMode():
        z = torch.empty(16, classes, device="cuda", dtype=torch.bfloat16)
        t = torch.empty(16, device="cuda", dtype=torch.int64)
        gm = make_fx(lambda z, t: F.cross_entropy(z.float(), t), pre_dispatch=True)(z, t)
    program = Program("g0", Level.SEMANTIC, gm, Signature((), ()))
    (found,) = FuseCrossEntropy().propose(program, replace(context(), emit="inductor"))
    if reason is None:
        assert isinstance(found, Candidate) and not found.alternative and found.delta.seconds < 0
    else:
        assert isinstance(found, NearMiss) and found.reason.text == reason


def test_a_loss_of_a_linear_layer_is_an_alternative() -> None:
    def head(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w).float(), t)

    def kept(x: Tensor, w: Tensor, t: Tensor) -> Any:
        z = F.linear(x, w)
        return F.cross_entropy(z.float(), t), z

    given = torch.randn(10, 8), torch.randn(CLASSES, 8), torch.randint(0, CLASSES, (10,))
    for function, alternative in ((head, True), (kept, False)):
        (found,) = proposals(function, *given)
        assert isinstance(found, Candidate) and found.alternative is alternative


def test_the_gradient_is_computed_over_logits_that_nobody_needs() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 300, dtype=torch.bfloat16)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return F.cross_entropy(self.linear(x).float(), t)

    x, t = torch.randn(8, 16).bfloat16(), torch.randint(0, 300, (8,))
    torch._dynamo.reset()
    fast = graphopt.optimize(Head(), (x, t), pipeline=[EVERYWHERE], emit="inductor", on_error="raise")

    def step() -> Tensor:
        loss = fast(x, t)
        loss.backward()
        return loss

    _, codes = run_and_get_code(step)
    (backward,) = [code for code in codes if "tangents_1" in code]
    assert re.search(r"buf\d+ = addmm; del addmm  # reuse", backward)
