"""compress-saved: the same numbers to the bit in fewer bytes, or the reason why not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.alternatives import joint_alternatives
from graphopt.candidate import Candidate
from graphopt.capture.joint import save_everything
from graphopt.errors import PassError
from graphopt.passes import PassContext, Proposal
from graphopt.program import Level, Program
from graphopt.step_cost import step_curve
from graphopt_passes.compress_saved import CompressSaved
from graphopt_passes.compress_saved.ranges import interval_of, narrowest
from graphopt_passes.compress_saved.saved import SavedValues
from tests.programs import context
from tests.steps import assert_close, assert_same, deterministic, run_step

aten = torch.ops.aten
SMALL = ("compress-saved{least_bytes=0}", "insert-checkpoints")


class Relus(nn.Module):
    """Masks of two kinds, none of whose values is read by anything else."""

    def __init__(self) -> None:
        super().__init__()
        kinds = (nn.ReLU(), nn.LeakyReLU(0.1), nn.ReLU())
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in kinds)
        self.kinds = nn.ModuleList(kinds)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, kind in zip(self.layers, self.kinds, strict=True):
            x = x + kind(layer(x)).sum(1, keepdim=True)
        return x.sum()


class Dropouts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *[m for _ in range(4) for m in (nn.Linear(32, 32), nn.ReLU(), nn.Dropout(0.3))]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).square().mean()


class Pools(nn.Module):
    """The stem of a residual network: a value that pooling and ReLU read, indices of 8 bytes."""

    def __init__(self, layout: torch.memory_format = torch.contiguous_format) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.pools = nn.Sequential(
            nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(3)
        )
        self.layout = layout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pools(self.stem(x.to(memory_format=self.layout))).square().mean()


class Clamps(nn.Module):
    """Comparisons that the backward makes itself, of values that nothing else needs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.clamp(self.first(x), -0.5, 0.5)
        return torch.where(self.second(x) > 0, y, 2 * y).sum() + y.amax(1).sum()


def optimized(model: nn.Module, inputs: Any, *pipeline: str, **options: Any) -> graphopt.Optimized:
    torch._dynamo.reset()
    return graphopt.optimize(
        copy.deepcopy(model),
        inputs,
        pipeline=[*pipeline],
        **{"emit": "eager", "on_error": "raise", **options},
    )


class SplitMasks(nn.Module):
    """A mask of which the backward reads the parts of a split."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        kept = (x > 0).split([16, 16], 1)
        parts = [part.masked_fill(mask, 0.0) for part, mask in zip(y.split(16, 1), kept, strict=True)]
        return torch.cat(parts, 1).square().mean()


class Always(CompressSaved):
    """Every candidate as one to be applied, whether it pays or not."""

    name = "always-compress-saved"

    def propose(self, program: Program, ctx: PassContext) -> Iterator[Proposal]:
        for item in super().propose(program, ctx):
            if isinstance(item, Candidate):
                yield replace(item, delta=replace(item.delta, seconds=0.0), alternative=False)
            else:
                yield item


def all_packed(model: nn.Module, inputs: Any) -> graphopt.Optimized:
    """The model with every candidate applied and nothing recomputed."""
    torch._dynamo.reset()
    step = Always(least_bytes=0)
    return graphopt.optimize(copy.deepcopy(model), inputs, pipeline=[step], emit="eager", on_error="raise")


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor], int]] = {
    "relus": (Relus, lambda: torch.randn(64, 32), 3),
    "dropouts": (Dropouts, lambda: torch.randn(64, 32), 8),
    "pools": (Pools, lambda: torch.randn(4, 3, 16, 16), 3),
    "pools channels-last": (lambda: Pools(torch.channels_last), lambda: torch.randn(4, 3, 16, 16), 3),
    "clamps": (Clamps, lambda: torch.randn(64, 32), 2),
    "split masks": (SplitMasks, lambda: torch.randn(64, 32), 1),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same_to_the_bit(case: str, dtype: torch.dtype) -> None:
    make, sample, least = CASES[case]
    torch.manual_seed(0)
    model, x = make().to(dtype), sample().to(dtype)
    # What a condition must get right: zeros of both signs, infinities, values on the border.
    x.view(-1)[:4] = torch.tensor([0.0, -0.0, float("inf"), 6.0], dtype=dtype)
    with deterministic():
        fast = all_packed(model, (x,))
        (record,) = [r for r in fast.report.steps if r.id == "always-compress-saved"]
        assert record.status == "applied" and int(record.reason.split()[0]) >= least, record.reason
        for seed in range(2):
            plain, ours = optimized(model, (x,)), copy.deepcopy(fast)
            assert_same(run_step(ours, (x,), seed=seed), run_step(plain, (x,), seed=seed))


def test_not_a_number_goes_the_same_way() -> None:
    x = torch.full((64, 32), float("nan"))
    x[::2] = torch.randn(32, 32)
    torch.manual_seed(0)
    model = Relus()
    fast = all_packed(model, (x,))
    ours, theirs = run_step(fast, (x,)), run_step(model, (x,))
    for name, gradient in theirs.gradients.items():
        mine = ours.gradients[name]
        assert (mine is None) == (gradient is None)
        assert mine is None or gradient is None or torch.equal(mine.isnan(), gradient.isnan())


@pytest.mark.parametrize("case", ["relus", "dropouts", "pools"])
def test_what_is_saved_is_a_fraction(case: str) -> None:
    make, sample, _ = CASES[case]
    x = (sample(),)
    plain, fast = optimized(make(), x), all_packed(make(), x)

    def by_kind(module: graphopt.Optimized) -> dict[str, int]:
        (choice,) = module.plan.choices
        return {value.node: value.bytes for value in choice.saved}

    before, after = by_kind(plain), by_kind(fast)
    packed = {name: size for name, size in after.items() if name.startswith(("pack_bits", "_to_copy"))}
    gone = {name: size for name, size in before.items() if name not in after}
    assert packed and sum(packed.values()) <= sum(gone.values()) / 4, (packed, gone)


def tower() -> nn.Module:
    """So shallow that rows of layers that run again do not come below what packing does."""
    return nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(128, 128), nn.ReLU(), nn.Dropout(0.1))])


def test_the_planner_packs_where_it_pays_and_predicts_the_peak() -> None:
    torch.manual_seed(0)
    model, x = tower(), (torch.randn(1024, 128),)
    without = optimized(model, x, "insert-checkpoints")
    fast = optimized(model, x, *SMALL)
    ours = step_curve(fast._driver.session, fast._driver.session.static_bytes or 0)
    theirs = step_curve(without._driver.session, without._driver.session.static_bytes or 0)
    assert ours[0][0] < theirs[0][0], "the least peak is not below that without packing"
    for peak, seconds, *_ in theirs:
        assert any(p <= peak and s <= seconds + 1e-12 for p, s, *_ in ours), "some budget got worse"
    tight = optimized(model, x, *SMALL, budget=ours[0][0])
    (choice,) = tight.plan.choices
    assert choice.alternative == "compress-saved"
    assert abs(tight.plan.predicted.peak_bytes - tight.measure(x, repeats=1).peak_bytes) <= 64
    assert_same(run_step(tight, x), run_step(model, x))


def test_a_plan_that_packs_is_replayed_and_refused_without_the_pass() -> None:
    torch.manual_seed(0)
    model, x = tower(), (torch.randn(1024, 128),)
    fast = optimized(model, x, *SMALL)
    least = step_curve(fast._driver.session, fast._driver.session.static_bytes or 0)[0][0]
    tight = optimized(model, x, *SMALL, budget=least)
    assert tight.plan.choices[0].alternative == "compress-saved"
    again = optimized(model, x, *SMALL, plan=tight.plan)
    assert again.plan.choices[0].schedule == tight.plan.choices[0].schedule
    # Forms that the plan does not name are not looked at.
    assert {*again._driver.session.current[0].forms} == {"", "compress-saved"}
    assert not optimized(model, x, *SMALL, plan=fast.plan)._driver.session.current[0].forms
    with pytest.raises(
        graphopt.StalePlanError, match="runs program 'g0' with 'compress-saved', which no pass"
    ):
        optimized(model, x, "insert-checkpoints", plan=tight.plan)


def reasons(fast: graphopt.Optimized) -> dict[str, str]:
    return {miss.at: miss.reason.text for miss in fast.report.near_misses}


def test_a_value_that_is_read_whole_stays() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    fast = optimized(model, (torch.randn(64, 32),), *SMALL)
    assert reasons(fast) == {"relu": "others need less of it, but it is read whole as well"}


def test_an_output_stays() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x).relu()

    fast = optimized(Both(), (torch.randn(64, 32),), *SMALL)
    assert reasons(fast) == {"relu": "an output of the program holds it"}


def test_numbers_of_unknown_range_stay() -> None:
    class Gather(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(64, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.table(x * 3).sum()

    fast = optimized(Gather(), (torch.randint(0, 20, (64, 32)),), *SMALL)
    assert reasons(fast) == {"mul": "what it can hold is not known"}


def test_a_region_that_the_model_checkpoints_stays() -> None:
    class Region(Relus):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)  # type: ignore[no-any-return]

    fast = optimized(Region(), (torch.randn(64, 32, requires_grad=True),), *SMALL)
    assert set(reasons(fast).values()) == {"it lies in a region that the model checkpoints itself"}


def test_small_values_are_left_alone() -> None:
    fast = optimized(Dropouts(), (torch.randn(64, 32),), "compress-saved", "insert-checkpoints")
    (record, _) = fast.report.steps
    assert record.reason == "nothing to rewrite, nothing to choose in train mode"


def test_a_size_below_nothing_is_refused() -> None:
    with pytest.raises(PassError, match="compress-saved: least_bytes=-1: expected a whole number, 0 or more"):
        CompressSaved(least_bytes=-1)


# --- ranges --------------------------------------------------------------------------------


def intervals(function: Callable[..., Any], *inputs: torch.Tensor) -> list[tuple[int, int] | None]:
    graph = torch.fx.experimental.proxy_tensor.make_fx(function, tracing_mode="fake")(*inputs).graph
    (output,) = [node for node in graph.nodes if node.op == "output"]
    return [interval_of(node) for node in output.args[0]]


def test_ranges_hold_what_is_computed() -> None:
    def made(x: torch.Tensor) -> list[torch.Tensor]:
        mask = x > 0
        place = x.topk(3, dim=1)[1]
        return [
            x.argmax(1), x.argmax(), place, x.sort(0)[1], torch.arange(3, 11), mask.long(), mask.cumsum(1),
            mask.sum(), (torch.arange(5) * -3).clamp(-4, 2), mask.long() * 7 + 1, place.view(-1).remainder(2),
            torch.where(mask, 3, mask.long() * 5), place.to(torch.uint8),
        ]  # fmt: skip

    x = torch.randn(4, 300)
    found = intervals(made, x)
    for value, interval in zip(made(x), found, strict=True):
        if interval is not None:
            assert interval[0] <= int(value.min()) and int(value.max()) <= interval[1]
    assert found[:8] == [
        (0, 299), (0, 1199), (0, 299), (0, 3), (3, 10), (0, 1), (0, 300), (0, 1200),
    ]  # fmt: skip
    assert found[12] is None, "299 does not fit a byte: the cast wraps around"


def test_pooling_points_into_its_plane() -> None:
    def made(x: torch.Tensor) -> list[torch.Tensor]:
        return [nn.functional.max_pool2d(x, 2, return_indices=True)[1]]

    assert intervals(made, torch.randn(1, 2, 10, 12)) == [(0, 119)]


@pytest.mark.parametrize(
    ("interval", "dtype"),
    [
        ((0, 255), torch.uint8), ((0, 256), torch.int16), ((-1, 1), torch.int16), ((0, 2**15), torch.int32),
        ((0, 2**31), None),
    ],
)  # fmt: skip
def test_the_smallest_type_is_taken(interval: tuple[int, int], dtype: torch.dtype | None) -> None:
    assert narrowest(interval) is dtype


def test_what_is_packed_is_computed_by_the_forward() -> None:
    fast = optimized(Dropouts(), (torch.randn(64, 32),), *SMALL)
    (program,) = [p for p in fast.programs if p.level is Level.JOINT]
    found = list(joint_alternatives(program, [CompressSaved(least_bytes=0)], context(), lambda t, e: None))
    assert [name for name, _ in found] == ["compress-saved"]
    changed = found[0][1]
    schedule = save_everything(changed)
    packs = [node.name for node in changed.nodes(torch.ops.graphopt.pack_bits)]
    assert len(packs) >= 8 and set(packs) <= set(schedule.forward) & set(schedule.saved)
    assert not any(value.node.meta["val"].dtype is torch.bool for value in SavedValues(changed))


def test_generated_code_packs_as_operators_do() -> None:
    """Custom operators are written out in ATen, so that the code generator fuses them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.LayerNorm(48), nn.Dropout(0.2), nn.Linear(48, 8))
    x = (torch.randn(65, 32),)
    plain = optimized(model, x, emit="inductor")
    torch._dynamo.reset()
    step = Always(least_bytes=0)
    fast = graphopt.optimize(copy.deepcopy(model), x, pipeline=[step], emit="inductor", on_error="raise")
    joint = next(p for p in fast.programs if p.level is Level.JOINT)
    assert not list(joint.nodes(torch.ops.graphopt.pack_bits))
    (choice,) = fast.plan.choices
    masks = [value for value in choice.saved if value.bytes == 65 * 48 // 8]
    assert len(masks) == 2, choice.saved
    assert not any(value.bytes == 65 * 48 for value in choice.saved)
    # Fused otherwise, a product and a sum may round together.
    assert_close(run_step(fast, x), run_step(plain, x))
