"""Steps of optimizers in one launch: torch's numbers, groups and states, and what is declined."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.errors import InputsError
from graphopt_kernels.fused_optimizer import FusedStep, fused_step_supports
from graphopt_kernels.optimizer_step import adam_step, sgd_step, step_supports
from tests.interpreted import interpreted

triton = pytest.importorskip("triton")


def model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5), nn.Linear(5, 2)
    ).to(dtype)  # fmt: skip


def groups(net: nn.Module) -> list[dict[str, Any]]:
    """Weights decay, the rest does not and learns more slowly."""
    decayed = [p for p in net.parameters() if p.dim() > 1]
    rest = [p for p in net.parameters() if p.dim() <= 1]
    return [{"params": decayed}, {"params": rest, "weight_decay": 0.0, "lr": 3e-3}]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "AdamW, other betas": lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.95), eps=1e-5),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, weight_decay=0.1),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "SGD, Nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
}


def backward(net: nn.Module, k: int) -> None:
    torch.manual_seed(k)
    dtype = next(net.parameters()).dtype
    net(torch.randn(6, 3, 6, 6).to(dtype)).square().mean().backward()


def pair(name: str, **settings: Any) -> tuple[nn.Module, FusedStep, nn.Module, torch.optim.Optimizer]:
    ours = model()
    theirs = copy.deepcopy(ours)
    fused = FusedStep(OPTIMIZERS[name](groups(ours)), **settings)
    return ours, fused, theirs, OPTIMIZERS[name](groups(theirs))


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_torch(name: str) -> None:
    ours, fused, theirs, optimizer = pair(name)
    for k in range(5):
        for net in (ours, theirs):
            net.zero_grad()
            backward(net, k)
        fused()
        optimizer.step()
        assert_same(ours, theirs)
    states = fused.optimizer.state_dict(), optimizer.state_dict()
    torch.testing.assert_close(states[0]["state"], states[1]["state"])
    assert states[0]["param_groups"] == states[1]["param_groups"]


@pytest.mark.parametrize("name", ["AdamW", "SGD, momentum"])
def test_either_goes_on_where_the_other_stopped(name: str) -> None:
    ours, fused, theirs, optimizer = pair(name)
    for k in range(4):
        for net in (ours, theirs):
            net.zero_grad()
            backward(net, k)
        # By turns one step of ours and one of torch's, on either side.
        (fused if k % 2 else fused.optimizer.step)()
        (optimizer.step if k % 2 else FusedStep(optimizer))()
        assert_same(ours, theirs)
    again = OPTIMIZERS[name](groups(ours))
    again.load_state_dict(fused.optimizer.state_dict())
    backward(ours, 9)
    backward(theirs, 9)
    FusedStep(again)()
    optimizer.step()
    assert_same(ours, theirs)


def test_parameters_without_gradients_stay_and_count_their_own_steps() -> None:
    ours, fused, theirs, optimizer = pair("AdamW")
    for k in range(4):
        for net in (ours, theirs):
            net.zero_grad()
            backward(net, k)
            if k in (0, 2):
                net[3].weight.grad = None
        fused()
        optimizer.step()
        assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize("max_norm", [0.05, 1e6])
def test_gradients_are_clipped_and_cleared_on_the_way(name: str, max_norm: float) -> None:
    ours, fused, theirs, optimizer = pair(name, max_norm=max_norm, zero_gradients=True)
    for k in range(3):
        backward(ours, k)
        backward(theirs, k)
        places = [p.grad.data_ptr() for p in ours.parameters()]
        fused()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        # The norm and what follows from it are float32.
        torch.testing.assert_close(fused.norm, norm.float(), rtol=1e-5, atol=0)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert [p.grad.data_ptr() for p in ours.parameters()] == places
        assert not any(p.grad.any() for p in ours.parameters())


def test_schedulers_change_rates_and_see_that_steps_were_taken() -> None:
    ours, fused, theirs, optimizer = pair("AdamW")
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (fused.optimizer, optimizer)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in range(3):
            for net in (ours, theirs):
                net.zero_grad()
                backward(net, k)
            fused()
            optimizer.step()
            for schedule in schedules:
                schedule.step()
            assert_same(ours, theirs)


def test_versions_say_that_parameters_were_written() -> None:
    ours, fused, _, _ = pair("AdamW")
    backward(ours, 0)
    before = [p._version for p in ours.parameters()]
    fused()
    assert all(p._version > b for p, b in zip(ours.parameters(), before, strict=True))


# --- bfloat16 -----------------------------------------------------------------------------------


def test_bfloat16_is_rounded_once() -> None:
    """Closer to float64 than torch, which rounds at each operator on the CPU."""
    exact, ours = model(), model(torch.bfloat16)
    exact.load_state_dict({k: v.double() for k, v in ours.state_dict().items()})
    theirs = copy.deepcopy(ours)
    nets = (exact, ours, theirs)
    steps = [torch.optim.AdamW(n.parameters(), lr=1e-2, foreach=False) for n in nets]
    fused = FusedStep(steps[1])
    for k in range(3):
        torch.manual_seed(k)
        for wide, *narrow in zip(*(n.parameters() for n in nets), strict=True):
            gradient = torch.randn(wide.shape).bfloat16()
            wide.grad = gradient.double()
            for p in narrow:
                p.grad = gradient.clone()
        steps[0].step()
        fused()
        steps[2].step()

    def error(net: nn.Module) -> float:
        pairs = zip(net.parameters(), exact.parameters(), strict=True)
        return sum(float((a.double() - b).square().sum()) for a, b in pairs)

    assert error(ours) <= 1.1 * error(theirs)


def test_rounding_at_random_keeps_updates_that_rounding_to_the_nearest_loses() -> None:
    def after(random: bool) -> Tensor:
        torch.manual_seed(0)
        weight = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        step = FusedStep(torch.optim.SGD([weight], lr=1.0), random_rounding=random)
        for _ in range(20):
            weight.grad = torch.full_like(weight, -(2.0**-10))
            step()
        return weight.detach()

    assert after(False).eq(1).all()
    drawn = after(True)
    assert float(drawn.double().mean()) == pytest.approx(1 + 20 * 2.0**-10, abs=1e-3)
    assert torch.equal(drawn, after(True))


# --- what is declined -----------------------------------------------------------------------------


def _hooked(p: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(p, lr=0.1)
    optimizer.register_step_post_hook(lambda *args: None)
    return optimizer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "largest squares"),
        (lambda p: torch.optim.AdamW(p, maximize=True), "it maximizes"),
        (lambda p: torch.optim.AdamW(p, fused=True), "counts of steps are on the device"),
        (lambda p: torch.optim.SGD(p, lr=0.1, differentiable=True), "to be differentiated"),
        (lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1), foreach=False), "a rate is a tensor"),
        (lambda p: torch.optim.RMSprop(p), "it is a RMSprop"),
        (_hooked, "hooks wait"),
    ],
    ids=["amsgrad", "maximize", "fused", "differentiable", "rate", "kind", "hooks"],
)
def test_optimizers_that_do_more_are_declined(make: Callable[[Any], Any], reason: str) -> None:
    optimizer = make(model(torch.float32).parameters())
    assert reason in str(fused_step_supports(optimizer))
    with pytest.raises(InputsError, match=reason):
        FusedStep(optimizer)


def test_parameters_that_do_not_fit_are_declined() -> None:
    gaps = nn.Parameter(torch.randn(4, 6)[:, ::2])
    whole = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    for parameter, reason in ((gaps, "gaps in memory"), (whole, "no floating-point type")):
        with pytest.raises(InputsError, match=reason):
            FusedStep(torch.optim.SGD([parameter], lr=0.1))
    with pytest.raises(InputsError, match="bfloat16 alone"):
        FusedStep(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1), random_rounding=True)


def test_sparse_gradients_are_declined_and_nothing_has_moved() -> None:
    table, plain = nn.Embedding(5, 3, sparse=True), nn.Linear(3, 3)
    step = FusedStep(torch.optim.Adam([*plain.parameters(), *table.parameters()]))
    before = [p.detach().clone() for p in (plain.weight, table.weight)]
    plain(table(torch.tensor([1, 2]))).sum().backward()
    with pytest.raises(InputsError, match="a tensor is sparse"):
        step()
    assert torch.equal(plain.weight, before[0]) and torch.equal(table.weight, before[1])
    assert not step.optimizer.state


@pytest.mark.parametrize(
    ("lists", "reason"),
    [
        ([[torch.ones(2)], []], "lists of 1, 0 tensors"),
        ([[torch.ones(2), torch.ones(2).half()]], "2 dtypes or devices"),
        ([[torch.ones(2, 3)], [torch.ones(3, 2).t()]], "laid out"),
        ([[torch.ones(2)], [torch.ones(3)]], "laid out"),
        ([[torch.ones(2)], [torch.ones(2, device="meta")]], "on meta"),
    ],
    ids=["lengths", "dtypes", "strides", "shape", "device"],
)
def test_lists_that_do_not_fit_together_are_refused(lists: Any, reason: str) -> None:
    assert reason in str(step_supports(*lists))


# --- the operators --------------------------------------------------------------------------------


def test_they_are_operators_like_others() -> None:
    def lists(count: int) -> list[list[Tensor]]:
        return [[torch.rand(3, 2), torch.rand(4)] for _ in range(count)]

    adam = (*lists(4), torch.tensor(0.5), 0.1, 0.9, 0.99, 1e-8, 0.1, 2, True, True, None)
    torch.library.opcheck(adam_step, adam)
    sgd = (*lists(3), None, 0.1, 0.9, 0.0, 0.1, False, False, False, None)
    torch.library.opcheck(sgd_step, sgd)
    adam_step([], [], [], [], None, *adam[5:])
    with pytest.raises(ValueError, match="expected one float32"):
        adam_step(*adam[:4], torch.ones(2), *adam[5:])


def test_special_values_go_where_they_go_in_torch() -> None:
    ours = nn.Parameter(torch.ones(5))
    theirs = nn.Parameter(torch.ones(5))
    special = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, 1.0])
    fused, optimizer = FusedStep(torch.optim.AdamW([ours])), torch.optim.AdamW([theirs])
    for _ in range(2):
        ours.grad, theirs.grad = special.clone(), special.clone()
        fused()
        optimizer.step()
    torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_the_kernels_compute_what_the_references_do() -> None:
    found = interpreted("optimizer_cases.py")
    assert found["float32"] < 1e-6 and found["float16"] < 1e-3
    drawn = found["drawn"]
    assert drawn["values"] == [1.0, 1.0078125] and drawn["same"]
    assert drawn["mean"] == pytest.approx(1 + 2.0**-9, abs=3e-4)
    assert drawn["special"][:3] == ["nan", "inf", "-inf"]


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize(
    ("dtypes", "drawn"),
    [
        (("bfloat16",) * 3, False),
        (("bfloat16",) * 3, True),
        (("bfloat16", "bfloat16", "float32"), True),
        (("float32",) * 3, False),
    ],
    ids=["bfloat16", "bfloat16-drawn", "wide-states-drawn", "float32"],
)
def test_the_kernels_compile_for_sm_90_without_spills(
    kind: str, dtypes: tuple[str, str, str], drawn: bool
) -> None:
    import triton.language as tl

    from graphopt_kernels import optimizer_step, optimizer_step_triton
    from graphopt_kernels.emit.machine_code import compile_function_for_sm90

    kernel = getattr(optimizer_step_triton, f"{kind}_kernel")
    numbers = (
        "step_size", "keep", "decay", "rate_1", "beta_2", "rate_2", "eps", "root", "rate", "momentum",
        "share",
    )  # fmt: skip
    types = {"table": "*i64", "owner": "*i32", "factor": "*fp32", "tensors": "i32", "seed": "i32"}
    types |= dict.fromkeys(numbers, "fp32")
    constants = {
        "DECAYED": True, "DECOUPLED": True, "MOMENTUM": True, "FIRST": False, "NESTEROV": False, "ZERO": True,
        "DRAWN": drawn, "DRAWN_STATES": drawn and dtypes[2] == "bfloat16", "SCALED": True, "ALIGNED": True,
        **{name: getattr(tl, dtype) for name, dtype in zip("PGS", dtypes, strict=True)},
        "BLOCK": optimizer_step._BLOCK, "CHUNK": optimizer_step._CHUNK,
    }  # fmt: skip
    code = compile_function_for_sm90(
        kernel, types, constants, warps=optimizer_step._WARPS, aligned=("table", "owner")
    )
    assert not code.spills and code.shared <= 2048 and code.registers <= 160
    # Each array is read 16 bytes at a time where a block is whole: twice where it has float32.
    arrays = [*dtypes[:2], dtypes[2]] + ([dtypes[2]] if kind == "adam" else [])
    assert code.instructions["LDG.E.128"] >= sum(2 if dtype == "float32" else 1 for dtype in arrays)
