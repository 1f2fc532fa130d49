"""fuse-dropout: which dropout it sees, that gradients are those of the mask, what it leaves alone and why."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.candidate import Candidate, NearMiss
from graphopt.pipeline import Pipeline
from graphopt.testing import check_pass, semantic_programs
from graphopt_kernels.philox import drawn_seed
from graphopt_passes.fuse_dropout import FuseDropout
from tests.programs import context, host, semantic

EVERYWHERE = FuseDropout(everywhere=True)
ALLOWED = (FuseDropout.name,)
aten, own = torch.ops.aten, torch.ops.graphopt


class Layers(nn.Module):
    """Residual layers with dropout; ``own`` draws as the pass does, in the same order."""

    def __init__(self, count: int = 2, p: float = 0.3, own: bool = False, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(count))
        self.p, self.own = p, own

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y = F.gelu(layer(x))
            if self.own:
                x = own.dropout_add(y, x, self.p, drawn_seed(x.device))
            else:
                x = F.dropout(y, self.p, self.training) + x
        return x.square().mean()


def seen(
    function: Callable[..., Any], *given: Any, step: FuseDropout = EVERYWHERE, mode: str = "train"
) -> Any:
    host().kernels()
    return list(step.propose(semantic(function, *given), context(mode)))


def refusal(function: Callable[..., Any], *given: Any, **options: Any) -> str:
    (found,) = seen(function, *given, **options)
    assert isinstance(found, NearMiss)
    return found.reason.text


LEFT = "what is left is"
X, R = torch.randn(4, 6), torch.randn(4, 6)


def of_half(x: Tensor, r: Tensor) -> Tensor:
    return r + F.dropout(x.half(), 0.5).float()


FORMS: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "the sum behind it": (lambda x, r: F.dropout(x, 0.5) + r, True),
    "the other order": (lambda x, r: r + F.dropout(x, 0.5), True),
    "a cast between": (of_half, True),
    "rounded between": (lambda x, r: F.dropout(x, 0.5).half() + r.half(), True),
    "native": (lambda x, r: r + torch.native_dropout(x, 0.5, True)[0], True),
    "two": (lambda x, r: F.dropout(x, 0.5) + F.dropout(r, 0.25), True),
    "no sum": (lambda x, r: F.dropout(x, 0.5) * r, False),
}


@pytest.mark.parametrize("form", FORMS)
def test_dropout_becomes_a_seed_and_one_call(form: str) -> None:
    function, adds = FORMS[form]

    class Model(nn.Module):
        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            return function(x.sin(), r.cos()).tanh()

    x = X.clone().requires_grad_()
    (program,) = semantic_programs(Model(), (x, R), [EVERYWHERE], allow=ALLOWED)
    calls = list(program.nodes(own.dropout_add.default))
    assert len(calls) == (2 if form == "two" else 1)
    assert len(list(program.nodes(aten.randint.low))) == len(calls)
    gone = (aten.dropout.default, aten.native_dropout.default, aten.add.Tensor)
    assert not [node for target in gone for node in program.nodes(target)]
    assert (calls[-1].args[1] is not None) == adds
    told = calls[-1].args[4:]
    assert told == ((torch.float16,) if form == "rounded between" else ())


def test_a_cast_that_the_operator_does_goes() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            return of_half(x.sin(), r)

    x = X.clone().requires_grad_()
    (program,) = semantic_programs(Model(), (x, R), [EVERYWHERE], allow=ALLOWED)
    (call,) = program.nodes(own.dropout_add.default)
    assert call.meta["val"].dtype is torch.float32
    assert len(list(program.nodes(aten.to.dtype))) == 1


@pytest.mark.parametrize("emit", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_outputs_and_gradients_are_exactly_those_of_the_masks(emit: str) -> None:
    x = torch.randn(8, 16)
    fast = graphopt.optimize(
        Layers(), (x,), pipeline=[EVERYWHERE], allow=ALLOWED, emit=emit, on_error="raise"
    )
    right = Layers(own=True)
    outputs = []
    for seed in (1, 2, 1):
        runs = []
        for model in (fast, right):
            torch.manual_seed(seed)
            output = model(x)
            runs.append([output, *torch.autograd.grad(output, list(model.parameters()))])
        outputs.append(float(runs[0][0]))
        if emit == "eager":
            for a, b in zip(*runs, strict=True):
                torch.testing.assert_close(a, b)
    # Seeds make it repeat; other calls draw anew.
    assert outputs[0] == outputs[2] != outputs[1]


@pytest.mark.parametrize("emit", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_gradients_are_the_derivative_for_the_mask_that_the_output_shows(emit: str) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            return (F.dropout(x * 1.5, 0.25) + r).flip(0)

    x, r = torch.rand(64, 64).add_(1).requires_grad_(), torch.zeros(64, 64)
    fast = graphopt.optimize(
        Model(), (x, r), pipeline=[EVERYWHERE], allow=ALLOWED, emit=emit, on_error="raise"
    )
    output = fast(x, r)
    kept = output.flip(0) != 0
    (gradient,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(gradient, torch.where(kept, 1.5 / 0.75, 0.0))
    torch.testing.assert_close(output.flip(0), torch.where(kept, x.detach() * 1.5 / 0.75, 0.0))
    assert abs(float(kept.double().mean()) - 0.75) < 5 * math.sqrt(0.25 * 0.75 / kept.numel())


def test_what_is_run_again_under_a_budget_drops_the_same() -> None:
    x = torch.randn(256, 64)
    pipeline = [EVERYWHERE, host().passes()["insert-checkpoints"].configured()]
    fast = graphopt.optimize(
        Layers(6, width=64), (x,), budget="76%", pipeline=pipeline, allow=ALLOWED, emit="eager",
        on_error="raise",
    )  # fmt: skip
    (choice,) = fast.plan.choices
    assert any("dropout_add" in name for name in choice.schedule.recomputed)
    right = Layers(6, own=True, width=64)
    runs = []
    for model in (fast, right):
        torch.manual_seed(5)
        output = model(x)
        runs.append([output, *torch.autograd.grad(output, list(model.parameters()))])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)


def test_no_mask_is_saved() -> None:
    x = torch.randn(32, 16)
    fast = graphopt.optimize(
        Layers(), (x,), pipeline=[EVERYWHERE], allow=ALLOWED, emit="eager", on_error="raise"
    )
    dtypes: list[tuple[torch.dtype, int]] = []

    def pack(tensor: Tensor) -> Tensor:
        dtypes.append((tensor.dtype, tensor.numel()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fast(x)
    assert not [n for dtype, n in dtypes if dtype in (torch.bool, torch.uint8)]
    assert [n for dtype, n in dtypes if dtype is torch.int64] == [1, 1]


def test_it_runs_where_it_is_allowed_alone_and_the_report_says_why() -> None:
    x = torch.randn(8, 16)
    fast = graphopt.optimize(Layers(), (x,), pipeline=[EVERYWHERE], emit="eager", on_error="raise")
    (record,) = fast.report.steps
    assert (record.status, record.reason) == (
        "skipped",
        "draws other random numbers than eager mode; same distribution: runs with allow=('fuse-dropout',)",
    )
    plain = Layers()
    torch.manual_seed(3)
    found = fast(x)
    torch.manual_seed(3)
    assert torch.equal(found, plain(x))


def test_candidates_say_in_which_way_they_are_lossy() -> None:
    found = seen(lambda x, r: F.dropout(x, 0.5) + r, X, R)
    (candidate,) = found
    assert isinstance(candidate, Candidate)
    assert candidate.exactness == "lossy" and candidate.delta.error == 0
    assert candidate.metric == "random numbers: draws others than eager mode, of the same distribution"
    assert candidate.delta.peak_bytes == -X.numel() and candidate.delta.seconds < 0


def test_the_pass_keeps_what_any_pass_must() -> None:
    checked = check_pass(
        EVERYWHERE, Layers(), (torch.randn(8, 16),), dtypes=(torch.float32, torch.bfloat16)
    )
    assert not checked.near_misses


# --- what stays ---------------------------------------------------------------------------------


def test_dropout_that_stays_says_why() -> None:
    def drops(p: float, training: bool = True) -> Callable[..., Tensor]:
        return lambda x, r: torch.dropout(x, p, training) + r

    assert refusal(drops(0.0), X, R) == "nothing is dropped"
    assert not seen(drops(1.0), X, R), "a dropout of everything is a product with zero by then"
    assert refusal(drops(0.5, False), X, R) == "dropout is off"
    assert refusal(drops(0.5), X, R, mode="infer") == "in inference no gradient needs the mask"
    assert refusal(drops(0.5), X.double(), R.double()) == "no kernel takes float64"
    assert refusal(drops(0.5), X.t(), R.t()) == "its elements do not lie one after the other"
    why = "no kernel runs on cpu, where the operator gains nothing"
    assert refusal(drops(0.5), X, R, step=FuseDropout()) == why


def test_a_mask_that_is_read_stays() -> None:
    def function(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        dropped, mask = torch.native_dropout(x, 0.5, True)
        return dropped + r, mask

    assert refusal(function, X, R) == "its mask is read as well"


def test_written_between_stays() -> None:
    def function(x: Tensor, r: Tensor) -> Tensor:
        dropped = F.dropout(x, 0.5)
        r.mul_(2)
        return dropped + r

    miss, candidate = seen(function, X.clone(), R.clone())
    assert miss.reason.text == "what it reads is written within it"
    # Dropout alone stands before the write.
    assert isinstance(candidate, Candidate) and len(candidate.nodes) == 1


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, r: (lambda y: (y + r, y))(F.dropout(x, 0.5)), f"{LEFT} an output of the program"),
        (lambda x, r: (lambda y: (y + r) * y)(F.dropout(x, 0.5)), f"{LEFT} read by another call as well"),
        (lambda x, r: F.dropout(x, 0.5) + r[:1], "the residual is broadcast"),
        (lambda x, r: F.dropout(x[:1], 0.5) + r, "the residual is broadcast"),
        (lambda x, r: F.dropout(x, 0.5) + 1, "what is added to it is a number, or itself"),
        (lambda x, r: (lambda y: y + y)(F.dropout(x, 0.5)), "what is added to it is a number, or itself"),
        (lambda x, r: torch.add(F.dropout(x, 0.5), r, alpha=2), "what is added is scaled"),
        (lambda x, r: F.dropout(x, 0.5) + r.double(), "no kernel adds float64 for float64"),
        (lambda x, r: F.dropout(x, 0.5) + r.int(), "no kernel adds int32 for float32"),
        (
            lambda x, r: F.dropout(x, 0.5) + r.t().contiguous().t(),
            "the elements of the residual do not lie one after the other",
        ),
    ],
    ids=["output", "other readers", "broadcast", "broadcast itself", "number", "itself", "scaled", "wide",
         "integers", "spread"],
)  # fmt: skip
def test_a_sum_that_stays_leaves_dropout_alone_to_draw_a_seed(
    function: Callable[..., Any], reason: str
) -> None:
    miss, candidate = seen(function, X, R)
    assert isinstance(miss, NearMiss) and miss.reason.text == reason
    assert isinstance(candidate, Candidate) and len(candidate.nodes) == 1

    class Model(nn.Module):
        def forward(self, x: Tensor, r: Tensor) -> Any:
            return function(x * 1.0, r)

    x = X.clone().requires_grad_()
    (program,) = semantic_programs(Model(), (x, R), [EVERYWHERE], allow=ALLOWED)
    (call,) = program.nodes(own.dropout_add.default)
    assert call.args[1] is None


def test_no_rows_are_no_rows() -> None:
    model = Layers()
    fast = graphopt.optimize(model, (torch.empty(0, 16),), pipeline=[EVERYWHERE], allow=ALLOWED, emit="eager")
    assert fast(torch.empty(0, 16)).isnan()


def test_it_is_part_of_the_default_pipeline_before_norms_take_the_sum() -> None:
    names = [step.name for step in Pipeline.of("default", host()).steps]
    assert names.index("fuse-attention") < names.index("fuse-dropout") < names.index("fuse-norm")
