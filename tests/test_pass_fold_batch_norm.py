"""fold-batch-norm: which norms become part of a convolution, that numbers stay, and what is left alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.candidate import Candidate, CostDelta, NearMiss
from graphopt.passes import PassContext, Proposal
from graphopt.program import Program
from graphopt.testing import CheckedPass, check_pass, semantic_programs
from graphopt_passes import fold_batch_norm
from graphopt_passes.fold_batch_norm import _BIAS_FIRST, _FURTHER, FoldBatchNorm, adds_bias_last
from graphopt_passes.functionalize import Functionalize
from tests.programs import context, host

aten = torch.ops.aten
X = torch.randn(2, 16, 32, 32)


def prepared(model: nn.Module, seed: int = 0) -> nn.Module:
    """In inference, with random statistics."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
    return model.eval().requires_grad_(False)


class Bottleneck(nn.Module):
    """As in ResNet."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        inner = width // 2
        self.conv1, self.bn1 = nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, 2, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)
        self.down = nn.Sequential(nn.Conv2d(width, width, 1, 2, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        y += self.down(x)
        return F.relu(y, inplace=True)


class Inverted(nn.Module):
    """The inverted residual of MobileNetV2."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        wide = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


@dataclass(frozen=True)
class Always(FoldBatchNorm):
    """Folds whatever it gains."""

    bias_first: bool = True

    def propose(self, program: Program, ctx: PassContext) -> Iterator[Proposal]:
        for found in super().propose(program, ctx):
            yield replace(found, delta=CostDelta(seconds=-1.0)) if isinstance(found, Candidate) else found


def norms(model: nn.Module, x: Tensor = X) -> tuple[int, int]:
    """How many norms there are, and how many are left."""
    with torch.no_grad():
        before, after = (
            semantic_programs(model, (x,), steps, allow=(FoldBatchNorm.name,))
            for steps in ([], [Functionalize(), Always()])
        )
    return tuple(len(list(p.nodes(aten.batch_norm.default))) for (p,) in (before, after))  # type: ignore[return-value]


def reasons(model: nn.Module, x: Tensor = X, mode: str = "infer") -> list[str]:
    with torch.no_grad():
        (program,) = semantic_programs(model, (x,))
    found = FoldBatchNorm().propose(program, context(mode))
    return [miss.reason.text for miss in found if isinstance(miss, NearMiss)]


def optimized(model: nn.Module, x: Tensor, step: FoldBatchNorm, emit: str = "eager") -> graphopt.Optimized:
    with torch.no_grad():
        return graphopt.optimize(
            copy.deepcopy(model),
            (x,),
            pipeline=[Functionalize(), step],
            allow=(step.name,),
            emit=emit,
            on_error="raise",
        )


def checked(
    step: FoldBatchNorm,
    model: nn.Module,
    inputs: tuple[Tensor],
    *,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
) -> CheckedPass:
    """``check_pass``, and numbers: those of the model, with other weights loaded as well."""
    for dtype in dtypes:
        own, x = copy.deepcopy(model).to(dtype), inputs[0].to(dtype)
        fast = optimized(own, x, step)
        for scale in (1.0, 0.5):
            state = {k: v * scale if v.is_floating_point() else v for k, v in own.state_dict().items()}
            own.load_state_dict(state)
            fast.load_state_dict(state)
            torch.testing.assert_close(fast(x), own(x))
    return check_pass(step, model, inputs, dtypes=dtypes)


@pytest.mark.parametrize("make", [Bottleneck, Inverted])
def test_norms_of_networks_become_part_of_their_convolutions(make: Callable[[], nn.Module]) -> None:
    model = prepared(make())
    with torch.no_grad():
        checked(Always(), model, (X,), dtypes=(torch.float32, torch.float64))
    before, after = norms(model)
    assert before >= 3 and after == 0


CONVOLUTIONS = {
    "bias": lambda: nn.Conv2d(16, 8, 3, padding=1),
    "padding by name": lambda: nn.Conv2d(16, 8, 3, padding="same", bias=False),
    "groups": lambda: nn.Conv2d(16, 8, 3, groups=4, dilation=2),
    "transposed": lambda: nn.ConvTranspose2d(16, 8, 3, 2, output_padding=1),
    "no weight": lambda: nn.Conv2d(16, 8, 1),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_of_all_kinds_take_a_norm_in(kind: str) -> None:
    norm = nn.BatchNorm2d(8, affine=kind != "no weight")
    model = prepared(nn.Sequential(CONVOLUTIONS[kind](), norm))
    with torch.no_grad():
        checked(Always(), model, (X,))
    assert norms(model) == (1, 0)


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions(dims: int) -> None:
    convolution = {1: nn.Conv1d, 3: nn.Conv3d}[dims](4, 8, 3)
    norm = {1: nn.BatchNorm1d, 3: nn.BatchNorm3d}[dims](8)
    x = torch.randn(2, 4, *[6] * dims)
    model = prepared(nn.Sequential(convolution, norm))
    with torch.no_grad():
        checked(Always(), model, (x,))
    assert norms(model, x) == (1, 0)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def error_ratio(
    model: nn.Module, x: Tensor, train: Callable[[], Tensor], step: FoldBatchNorm | None = None
) -> float:
    """Error of the folded network over that of separate operators, against float64. Statistics are those of
    the values, as in networks that were trained."""
    model.train()
    for _ in range(10):
        model(train())
    model.eval()
    exact = copy.deepcopy(model).double()(x.double())
    ours, theirs = (
        float((result.double() - exact).norm())
        for result in (optimized(model, x, step or Always())(x), model(x))
    )
    return ours / theirs


KINDS = {
    "3 x 3": lambda: nn.Conv2d(32, 32, 3, padding=1, bias=False),
    "3 x 3, strides": lambda: nn.Conv2d(32, 16, 3, 2, 1, bias=False),
    "5": lambda: nn.Conv1d(32, 32, 5, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(32, 16, 3, 2, bias=False),
    "1 x 1": lambda: nn.Conv2d(128, 32, 1, bias=False),
    "1 x 1, strides": lambda: nn.Conv2d(64, 64, 1, 2, bias=False),
    "grouped": lambda: nn.Conv2d(32, 32, 3, padding=1, groups=8, bias=False),
    "depthwise": lambda: nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False),
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_each_kind_are_what_the_pass_says(
    threads: Callable[[int], None], kind: str, count: int
) -> None:
    threads(count)
    ratios, said = [], set()
    for seed in range(4):
        torch.manual_seed(seed)
        convolution = KINDS[kind]()
        flat = isinstance(convolution, nn.Conv1d)
        norm = (nn.BatchNorm1d if flat else nn.BatchNorm2d)(convolution.out_channels)
        model = prepared(nn.Sequential(convolution, norm), seed)
        shape = (4, convolution.in_channels, *[24] * (1 if flat else 2))
        x = torch.randn(shape)
        (program,) = semantic_programs(model, (x,))
        (candidate,) = FoldBatchNorm(bias_first=True).propose(program, context("infer"))
        assert isinstance(candidate, Candidate)
        said.add(candidate.delta.error)
        ratios.append(error_ratio(model, x, lambda shape=shape: torch.randn(shape)))
    (error,) = said
    last = adds_bias_last() and kind in ("3 x 3", "3 x 3, strides", "5", "transposed")
    assert error == (_FURTHER if last else _BIAS_FIRST)
    assert math.prod(ratios) <= (1.0 + error) ** len(ratios)


class Plain(nn.Module):
    """A residual block as in small ResNets."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](self.first(x)).relu()
        return (self.norms[1](self.second(y)) + x).relu()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("make", [Plain, Bottleneck, Inverted])
def test_errors_of_networks_are_those_of_separate_operators(
    threads: Callable[[int], None], make: type[nn.Module], count: int
) -> None:
    """The mean over networks, as single ones scatter."""
    threads(count)
    ratios = []
    for seed in range(4):
        torch.manual_seed(seed)
        model = prepared(make(32), seed)
        x = torch.randn(4, 32, 24, 24)
        step = Always(bias_first=False)
        ratios.append(error_ratio(model, x, lambda: torch.randn(4, 32, 24, 24), step))
    assert math.prod(ratios) <= 1.1 ** len(ratios)


def test_sums_that_begin_with_the_bias_are_folded_where_asked() -> None:
    one, grouped = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 3, groups=4)
    for convolution in (one, grouped):
        model = prepared(nn.Sequential(convolution, nn.BatchNorm2d(8)))
        (reason,) = reasons(model)
        assert reason == "its sums begin with the bias, and would err further (bias_first=true)"
        (program,) = semantic_programs(model, (X,))
        (found,) = FoldBatchNorm(bias_first=True).propose(program, context("infer"))
        assert isinstance(found, Candidate)


def test_without_the_instructions_that_it_was_seen_with_no_sum_is_taken_to_end_with_the_bias(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = prepared(nn.Sequential(nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8)))
    for last, said in ((True, []), (False, ["its sums begin with the bias, and would err further"])):
        monkeypatch.setattr(fold_batch_norm, "adds_bias_last", lambda last=last: last)
        assert [reason.partition(" (")[0] for reason in reasons(model)] == said


def test_it_has_to_be_allowed() -> None:
    model = prepared(nn.Sequential(nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8)))
    with torch.no_grad():
        fast = graphopt.optimize(model, (X,), emit="eager")
        assert torch.equal(fast(X), model(X))
    (step,) = (step for step in fast.report.steps if step.id == "fold-batch-norm")
    assert step.status == "skipped" and "allow=('fold-batch-norm',)" in step.reason


def test_a_residual_network_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="bottleneck", num_labels=4
    )
    model = prepared(transformers.ResNetForImageClassification(config))
    x = torch.randn(2, 3, 32, 32)
    fast = optimized(model, x, Always())
    with torch.no_grad():
        torch.testing.assert_close(fast(x).logits, model(x).logits, rtol=1e-4, atol=1e-4)
    record = fast.report.steps[-1]
    assert record.status == "applied" and not fast.report.near_misses


@pytest.mark.parametrize("emit", ["eager", "inductor"])
def test_what_is_folded_by_default_gains(emit: str) -> None:
    """Between two convolutions a norm is a pass of its own; beside an activation code generators fuse it."""
    model = prepared(
        nn.Sequential(
            nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8),
            nn.Conv2d(8, 16, 1),
        )
    )  # fmt: skip
    x = torch.randn(2, 16, 128, 128)
    fast = optimized(model, x, FoldBatchNorm(bias_first=True), emit)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    (program,) = [p for p in fast.programs if p.level is graphopt.Level.SEMANTIC]
    left = list(program.nodes(aten.batch_norm.default))
    declined = [d.why for d in fast.report.declined]
    assert len(left) == len(declined) == (emit == "inductor")
    assert all(why.startswith("no predicted gain: changes the step by") for why in declined)


def test_on_a_gpu_a_bias_is_a_pass_as_well() -> None:
    model = prepared(nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)))
    with torch.no_grad():
        (program,) = semantic_programs(model, (X,))
    cost = host().cost_model("roofline").build(host().device("h200"))
    (found,) = FoldBatchNorm(bias_first=True).propose(program, PassContext(cost, "infer", "inductor"))
    assert isinstance(found, Candidate) and found.delta.seconds > 0


def test_the_scaled_weight_lives_as_long_as_its_convolution_runs() -> None:
    layers = [part for _ in range(3) for part in (nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64))]
    model = prepared(nn.Sequential(*layers))
    x = torch.randn(1, 64, 16, 16)
    fast = optimized(model, x, Always())
    with torch.no_grad():
        measured = fast.measure((x,), repeats=1).peak_bytes
    assert fast.plan.predicted.peak_bytes == measured


def test_weights_that_are_loaded_later_count_and_what_is_not_finite_comes_through() -> None:
    model = prepared(Bottleneck())
    fast = optimized(model, X, Always())
    other = prepared(Bottleneck())
    nn.init.constant_(other.bn1.running_var, 3.0)
    fast.load_state_dict(other.state_dict())
    x = X.clone()
    x[0, 0, 0, 0], x[1, 3, 4, 4] = torch.nan, torch.inf
    with torch.no_grad():
        torch.testing.assert_close(fast(X), other(X), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fast(x).isfinite(), other(x).isfinite())
        assert fast(X[:0]).shape == other(X[:0]).shape


# --- what stays -----------------------------------------------------------------------------------


class Pair(nn.Module):
    def __init__(self, use: Callable[[Pair, Tensor], Any], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(16, 8, 1), norm or nn.BatchNorm2d(8)
        self.register_buffer("shift", torch.zeros(8))
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x)


def read_twice(m: Pair, x: Tensor) -> Tensor:
    y = m.convolution(x)
    return m.norm(y) + y.sigmoid()


def returned(m: Pair, x: Tensor) -> tuple[Tensor, Tensor]:
    y = m.convolution(x)
    return m.norm(y), y


def computed_after(m: Pair, x: Tensor) -> Tensor:
    y = m.convolution(x)
    return F.batch_norm(y, m.norm.running_mean, m.norm.running_var, m.shift.exp(), m.norm.bias)


def written_between(m: Pair, x: Tensor) -> Tensor:
    y = m.convolution(x)
    m.norm.running_mean.view(-1).add_(1)
    return m.norm(y)


def autocast_between(m: Pair, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        y = m.convolution(x)
    return m.norm(y)


def under_autocast(m: Pair, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m.norm(m.convolution(x))


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (read_twice, "the convolution's result is read by another call as well"),
        (returned, "the convolution's result is an output of the program"),
        (computed_after, "a part of the norm is computed after the convolution"),
        (written_between, "what the norm reads is written in between"),
        (autocast_between, "autocast or the gradient mode changes in between"),
        (under_autocast, "weight and bias would be rounded to bfloat16 once more"),
    ],
)
def test_others_stay_apart(use: Callable[[Pair, Tensor], Any], reason: str) -> None:
    assert reasons(prepared(Pair(use))) == [reason]


def plain(m: Pair, x: Tensor) -> Tensor:
    return m.norm(m.convolution(x))  # type: ignore[no-any-return]


def test_statistics_of_the_batch_stay() -> None:
    model = Pair(plain).requires_grad_(False)
    assert reasons(model.train()) == ["the statistics are those of the batch"]
    assert reasons(prepared(Pair(plain, nn.BatchNorm2d(8, track_running_stats=False)))) == [
        "the statistics are those of the batch"
    ]


def test_frozen_norms_stay_in_training() -> None:
    model = prepared(Pair(plain))
    model.convolution.requires_grad_(True)
    model.training = True
    found = check_pass(FoldBatchNorm(), model, (X,))
    assert [miss.reason.text for miss in found.near_misses] == [
        "gradients flow through both: in training they stay apart"
    ]


def test_types_and_shapes_that_stay() -> None:
    half = prepared(nn.Sequential(nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8))).bfloat16()
    assert reasons(half, X.bfloat16()) == ["weight and bias would be rounded to bfloat16 once more"]
    grouped = prepared(nn.Sequential(nn.ConvTranspose2d(16, 8, 2, groups=2), nn.BatchNorm2d(8)))
    assert reasons(grouped) == ["the convolution is transposed and grouped"]
    single = prepared(nn.Sequential(nn.Conv1d(16, 8, 1), nn.BatchNorm1d(32)))
    single[1] = prepared(nn.BatchNorm1d(20))
    assert reasons(single, torch.randn(16, 20)) == [
        "the convolution is of one sample, and the norm takes its rows for channels"
    ]


def test_what_eager_mode_does_not_allow_stays_as_well() -> None:
    def changed(change: Callable[[torch.fx.Node], None]) -> list[str]:
        with torch.no_grad():
            (program,) = semantic_programs(prepared(Pair(plain)), (X,))
        (norm,) = program.nodes(aten.batch_norm.default)
        change(norm)
        return [miss.reason.text for miss in FoldBatchNorm().propose(program, context("infer"))]

    def other_type(norm: torch.fx.Node) -> None:
        mean = norm.args[3]
        mean.meta["val"] = mean.meta["val"].double()

    def unknown_eps(norm: torch.fx.Node) -> None:
        norm.update_arg(7, norm.args[3])

    assert changed(other_type) == ["statistics and weights are of another type than the result"]
    assert changed(unknown_eps) == ["eps is not a known number"]
