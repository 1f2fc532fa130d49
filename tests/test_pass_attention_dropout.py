"""Passes for attention where weights are dropped: what they call once other numbers are allowed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.functional import dropout, scaled_dot_product_attention

import graphopt
import graphopt_kernels.attention as module
from graphopt.candidate import Candidate, NearMiss
from graphopt.capture.semantic import semantic_program
from graphopt.passes import Pass
from graphopt.program import InputSpec, Level, Program
from graphopt.replay import is_random
from graphopt.testing import semantic_programs
from graphopt_kernels.philox import drawn_seed
from graphopt_passes.fuse_attention import FuseAttention
from graphopt_passes.grouped_attention import GroupedAttention
from graphopt_passes.window_attention import WindowAttention
from tests.programs import context, semantic
from tests.semantic import capture

ALLOW = ("fuse-dropout",)
HEADS, LENGTH, WIDTH = 4, 24, 8
Q, K, V = (torch.randn(2, HEADS, LENGTH, WIDTH) for _ in range(3))
FUSE, WINDOW = FuseAttention(everywhere=True), WindowAttention(everywhere=True)
ops, aten = torch.ops.graphopt, torch.ops.aten
Function = Callable[..., Tensor]
assert module.__all__, "importing it registers the operators"


def captured(function: Function, *inputs: Tensor) -> tuple[Program, Sequence[Tensor]]:
    (found,) = capture(function, *inputs)
    places = [node for node in found.gm.graph.nodes if node.op == "placeholder"]
    return semantic_program("g0", found.gm, [InputSpec(node.name, "input") for node in places]), found.inputs


def apply(step: Pass, program: Program) -> None:
    with program.edit(step.name) as edit:
        for item in step.propose(program, context(allow=ALLOW)):
            if isinstance(item, Candidate):
                assert (item.exactness, item.allowed_by) == ("lossy", "fuse-dropout") or step is WINDOW
                item.apply(edit)


def settings_of(program: Program) -> list[Any]:
    """Scale, cap, left, right and rate of the one call of graphopt's attention, with a seed of its own."""
    (call,) = program.nodes(ops.attention.default)
    seed = call.args[9]
    assert isinstance(seed, torch.fx.Node) and seed.target is aten.randint.low
    assert is_random(seed) and not is_random(call)
    return list(call.args[4:9])


def refusals(step: Pass, function: Function, *inputs: Tensor, allow: Sequence[str] = ALLOW) -> list[str]:
    found = list(step.propose(semantic(function, *(inputs or (Q, K, V))), context(allow=allow)))
    assert not any(isinstance(item, Candidate) for item in found)
    return [item.reason.text for item in found if isinstance(item, NearMiss)]


def same_as_own(function: Function, program: Program, inputs: Sequence[Tensor], **own: Any) -> None:
    """The program gives what the operator does with the seed that is drawn, and what eager mode does on
    average."""
    torch.manual_seed(9)
    (found,) = program.gm(*inputs)
    torch.manual_seed(9)
    seed = drawn_seed("cpu")
    settings = {"bias": None, "scale": WIDTH**-0.5, "softcap": 0.0, "left": None, "right": None} | own
    right = ops.attention(Q, K, V, *settings.values(), seed)[0]
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)
    (other,) = program.gm(*inputs)
    assert not torch.equal(found, other)
    ours = torch.stack([program.gm(*inputs)[0] for _ in range(300)])
    theirs = torch.stack([function(Q, K, V) for _ in range(300)])
    error = (ours.mean(0) - theirs.mean(0)) / ((ours.var(0) + theirs.var(0)) / 300).sqrt().clamp(min=1e-9)
    assert float(error.abs().max()) < 6 and 0.8 < float(error.std()) < 1.2
    assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.05)


def attend(change: Callable[[Tensor], Tensor] = lambda s: s, p: float = 0.25) -> Function:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dropout(torch.softmax(change(q @ k.mT / math.sqrt(WIDTH)), -1), p) @ v

    return run


def hidden(like: Tensor) -> Tensor:
    return torch.ones(LENGTH, LENGTH, device=like.device).triu(1) == 1


FORMS: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, Any]]] = {
    "plain": (lambda s: s, {}),
    "masked_fill": (lambda s: s.masked_fill(hidden(s), float("-inf")), {"right": 0}),
    "where": (lambda s: torch.where(~hidden(s), s, torch.finfo(torch.float32).min), {"right": 0}),
    "cap": (lambda s: torch.tanh(s / 3.0) * 3.0, {"softcap": 3.0}),
}


@pytest.mark.parametrize("form", FORMS)
def test_attention_that_is_written_out_takes_its_dropout_with_it(form: str) -> None:
    change, own = FORMS[form]
    function = attend(change)
    program, inputs = captured(function, Q, K, V)
    apply(FUSE, program)
    apply(WINDOW, program)
    settings = {"scale": WIDTH**-0.5, "softcap": 0.0, "left": None, "right": None} | own
    scale, *others = settings_of(program)
    assert scale == pytest.approx(WIDTH**-0.5) and others == [*list(settings.values())[1:], 0.25]
    assert "aten.softmax" not in str(program.graph) and "aten.dropout" not in str(program.graph)
    same_as_own(function, program, inputs, **own, dropout_p=0.25)


def test_matrices_without_heads_take_it_too() -> None:
    flat = [x.flatten(0, 1) for x in (Q, K, V)]
    program, inputs = captured(attend(), *flat)
    apply(FUSE, program)
    assert settings_of(program)[-1] == 0.25
    assert program.gm(*inputs)[0].shape == flat[0].shape


def near(like: Tensor) -> Tensor:
    rows, columns = (torch.arange(LENGTH, device=like.device) for _ in range(2))
    distance = columns[None, :] - rows[:, None]
    return (distance <= 0) & (distance > -4)


def windowed(q: Tensor, k: Tensor, v: Tensor, p: float = 0.25) -> Tensor:
    return scaled_dot_product_attention(q, k, v, near(q), dropout_p=p)


def test_a_window_takes_the_dropout_of_its_call() -> None:
    program, inputs = captured(windowed, Q, K, V)
    apply(WINDOW, program)
    assert settings_of(program) == [WIDTH**-0.5, 0.0, 3, 0, 0.25]
    same_as_own(windowed, program, inputs, left=3, right=0, dropout_p=0.25)


def test_by_default_they_decline_as_before() -> None:
    why = "dropout of weights: a fused kernel draws other random numbers"
    assert refusals(FUSE, attend(), allow=()) == [why]
    assert refusals(FUSE, attend(FORMS["cap"][0]), allow=()) == [why]
    why = "dropout of weights: another kernel draws other random numbers"
    assert refusals(WINDOW, windowed, allow=()) == [why]


def test_what_is_allowed_and_still_stays_says_why() -> None:
    assert refusals(FUSE, attend(p=1.0)) == [], "a dropout of everything is a product with zero by then"
    assert refusals(WINDOW, lambda q, k, v: windowed(q, k, v, 1.0)) == ["everything is dropped"]
    why = "no kernel runs on cpu, where the operator gains nothing"
    assert refusals(FuseAttention(), attend()) == [why]


    def negative(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dropout(torch.softmax(q @ k.mT * -0.5, -1), 0.25) @ v

    assert refusals(FUSE, negative) == ["the scale of the scores is below zero"]


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.unsqueeze(2).expand(-1, -1, 2, -1, -1).reshape(q.shape) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, dropout_p=0.5)


def test_groups_go_with_dropout_where_a_library_takes_both() -> None:
    few = [x[:, :2].contiguous() for x in (K, V)]
    step = GroupedAttention()
    assert refusals(step, repeated, Q, *few) == ["no kernel takes groups beside dropout here"]
    with FakeTensorMode(allow_non_fake_inputs=True):
        given = [torch.empty(x.shape, dtype=torch.float16, device="cuda") for x in (Q, *few)]
        graph = torch.fx.experimental.proxy_tensor.make_fx(repeated, pre_dispatch=True)(*given)
    places = [node for node in graph.graph.nodes if node.op == "placeholder"]
    program = semantic_program("g0", graph, [InputSpec(node.name, "input") for node in places])
    (miss,) = step.propose(program, context())
    assert isinstance(miss, NearMiss)
    assert miss.reason.text == "dropout of weights: another kernel may draw other random numbers"
    (candidate,) = step.propose(program, context(allow=ALLOW))
    assert isinstance(candidate, Candidate)
    assert (candidate.exactness, candidate.allowed_by) == ("lossy", "fuse-dropout")


class Block(nn.Module):
    """Layers of attention that is written out with dropout, between projections."""

    def __init__(self, own: bool = False, count: int = 2, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.maps = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(count))
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        for layer in self.maps:
            q, k, v = layer(x).view(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
            if self.own:
                seed = drawn_seed(x.device)
                mixed = ops.attention(q, k, v, None, 0.5, 0.0, None, None, 0.3, seed)[0]
            else:
                mixed = dropout(torch.softmax(q @ k.mT * 0.5, -1), 0.3) @ v
            x = x + mixed.transpose(1, 2).reshape(batch, length, width)
        return x.square().mean()


@pytest.mark.parametrize(
    ("budget", "emit"),
    [(None, "eager"), ("80%", "eager"), pytest.param(None, "inductor", marks=pytest.mark.slow)],
)
def test_gradients_are_exactly_those_of_the_masks(budget: str | None, emit: str) -> None:
    shape = (8, 64) if budget else (2, 16)
    x = torch.randn(16, 32, shape[1])
    fast = graphopt.optimize(
        Block(False, *shape), (x,), budget=budget, pipeline=[FUSE, "insert-checkpoints"], allow=ALLOW,
        emit=emit, on_error="raise",
    )  # fmt: skip
    right = Block(True, *shape)
    runs = []
    for model in (fast, right):
        torch.manual_seed(5)
        output = model(x)
        runs.append([output, *torch.autograd.grad(output, list(model.parameters()))])
    if emit == "eager":
        for a, b in zip(*runs, strict=True):
            torch.testing.assert_close(a, b)
    else:
        assert all(gradient.isfinite().all() for gradient in runs[0])
    joints = [p for p in fast.programs if p.level is Level.JOINT]
    for target in (ops.attention.default, ops.attention_backward.default):
        calls = [node for program in joints for node in program.nodes(target)]
        assert len(calls) == shape[0] and not any(is_random(node) for node in calls)


def test_a_model_that_does_not_allow_it_keeps_its_numbers() -> None:
    x = torch.randn(2, 16, 16)
    (program,) = semantic_programs(Block(), (x,), [FUSE])
    assert len(list(program.nodes(aten.dropout.default))) == 2
    assert not list(program.nodes(ops.attention.default))
