"""normalize: what goes, what stays and why, bit for bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphopt
from graphopt.program import Program
from graphopt.rewriting import Rewriting, run_passes
from graphopt.testing import check_pass
from graphopt_passes.normalize import Normalize
from tests.programs import context, host, semantic

aten = torch.ops.aten


class Block(nn.Module):
    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(8, 16), nn.Dropout(rate), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.drop(self.up(x)).to(torch.float32).view(4, 16)
        y = F.gelu(y.contiguous()[:, :].expand(4, 16))
        y = self.drop(self.down(y.to("cpu").type_as(x)).transpose(1, 1))
        return (x + y).flatten(1).sum()


def normalized(
    function, *args: object, mode: str = "train", dynamic: bool = False
) -> tuple[Program, Rewriting]:
    program = semantic(function, *args, dynamic=dynamic)
    return program, run_passes(program, [Normalize()], context(mode), host(), on_error="raise")


def ops(program: Program) -> list[str]:
    return [str(node.target).removeprefix("aten.").split(".")[0] for node in program.nodes()]


def reasons(done: Rewriting) -> dict[str, str]:
    return {f"{miss.rule} {miss.at}": miss.reason.text for miss in done.near_misses}


def x() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(4, 8, requires_grad=True)


def test_golden_and_everything_that_a_pass_must_stand(golden) -> None:
    checked = check_pass(Normalize(), Block(), (x(),), dtypes=(torch.float32, torch.float64))
    golden("normalize.txt", checked.text)
    (record,) = checked.records
    assert (record.id, record.status, record.plugin) == ("normalize", "applied", "passes")
    assert not checked.near_misses and not checked.declined


def test_evaluation_and_inference() -> None:
    block = Block(0.5).eval()
    check_pass(Normalize(), block, (x(),))
    program, done = normalized(block, x())
    assert ops(program) == ["linear", "gelu", "linear", "add", "sum"]
    assert not done.near_misses


def test_gradients_are_bitwise_those_of_the_program_that_was_not_normalized() -> None:
    torch.manual_seed(0)
    block, inputs = Block(0.3), (x(),)
    found = []
    for pipeline in ("", "normalize"):
        torch._dynamo.reset()
        passes = graphopt.Pipeline.of(pipeline, host()) if pipeline else graphopt.Pipeline(())
        fast = graphopt.optimize(block, inputs, pipeline=passes, emit="eager")
        torch.manual_seed(1)
        block.zero_grad()
        fast(*inputs).backward()
        found.append([parameter.grad.clone() for parameter in block.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.dropout(x.cos(), 0.5, True).sin(),
        lambda x: x.cos().to(torch.float64).sin(),
        lambda x: x.cos().view(8, 4).sin(),
        lambda x: x.cos()[:, 1:].sin(),
        lambda x: x.cos().unsqueeze(0).expand(3, 4, 8).sin(),
        lambda x: x.cos().t().contiguous().sin(),
        lambda x: x.cos().transpose(0, 1).sin(),
        lambda x: x.cos() + 1,
        lambda x: x.cos() * 0,
        lambda x: x.long() + 0,
    ],
)
def test_what_computes_something_does_not_match(function) -> None:
    program, done = normalized(function, x())
    before = ops(semantic(function, x()))
    assert (ops(program), done.records[0].status) == (before, "no-op")
    assert done.records[0].reason == "nothing to rewrite"


def _writes(x: torch.Tensor) -> torch.Tensor:
    y = x.cos()
    z = torch.dropout(y, 0.0, True)
    y.add_(1)
    return y + z


def _writes_the_result(x: torch.Tensor) -> torch.Tensor:
    y = x.cos()
    z = y.view(4, 8)
    z.mul_(2)
    return y + z


def _returns_two(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = x.cos()
    return y, torch.dropout(y, 0.0, True)


def _returns_two_views(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = x.cos()
    return y[0], torch.dropout(y, 0.0, True)[1]


def _returns_twins(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = x.cos()
    return torch.dropout(y, 0.0, True), torch.dropout(y, 0.0, True)


def _no_grad(x: torch.Tensor) -> torch.Tensor:
    y = x.cos()
    with torch.no_grad():
        z = y.view(4, 8)
    return y * z


def _three_gradients(x: torch.Tensor) -> torch.Tensor:
    y = x.cos()
    z = y.view(4, 8)
    return y.sin() * z.exp() * z.tanh()


def _composite_reader(x: torch.Tensor) -> torch.Tensor:
    y = x.cos()
    return y.sin() + F.linear(y.view(4, 8), torch.ones(8, 8))


@pytest.mark.parametrize(
    ("function", "where", "reason"),
    [
        (lambda x: x.cos() + 0, "drop-neutral add", "adding 0 turns -0.0 into 0.0"),
        (lambda x: x.cos() * 1, "drop-neutral mul", "multiplying by 1 changes the bits of signalling NaNs"),
        (lambda x: x.cos().long() + 0.0, "drop-neutral add", "adding 0 changes the type"),
        (lambda x: x.cos().to(torch.float32, copy=True).sin(), "drop-cast to", "it is asked for a copy"),
        (lambda x: x.cos().detach().sin() + x, "drop-detach detach", "it cuts off a gradient"),
        (_no_grad, "drop-view view", "it cuts off a gradient"),
        (_writes, "drop-dropout dropout", "its memory is written in place"),
        (_writes_the_result, "drop-view view", "its memory is written in place"),
        (lambda x: x.view(4, 8), "drop-view view", "its result is an output and would be an input itself"),
        (
            lambda x: torch.dropout(x, 0.0, True)[0],
            "drop-dropout dropout",
            "its result is an output and would be an input itself",
        ),
        (_returns_two, "drop-dropout dropout", "its result and another output would be one tensor"),
        (_returns_two_views, "drop-dropout dropout", "its result and another output would be one tensor"),
        (_three_gradients, "drop-view view", "gradients would be summed in another order"),
        (_composite_reader, "drop-view view", "gradients would be summed in another order"),
    ],
)
def test_what_is_not_sure_stays_with_a_reason(function, where: str, reason: str) -> None:
    program, done = normalized(function, x())
    assert reasons(done) == {where: reason}
    assert any(node.name == where.split()[1] for node in program.nodes())


def test_of_twins_one_goes() -> None:
    program, done = normalized(_returns_twins, x().detach())
    assert ops(program) == ["cos", "dropout"]
    assert reasons(done) == {
        "drop-dropout dropout": "its result and another output would be one tensor",
    }


def test_gradients_that_are_two_or_not_wanted_do_not_matter() -> None:
    two = normalized(lambda x: (y := x.cos()).sin() * y.view(4, 8).exp(), x())[0]
    assert ops(two) == ["cos", "sin", "exp", "mul"]
    untrained = normalized(_three_gradients, x().detach())[0]
    inference = normalized(_three_gradients, x(), mode="infer")[0]
    assert ops(untrained) == ops(inference) == ["cos", "sin", "exp", "mul", "tanh", "mul"]
    detached = normalized(lambda x: x.cos().detach().sin(), x().detach())[0]
    assert ops(detached) == ["cos", "sin"]


def test_sums_stay_apart_where_several_views_would_join_them() -> None:
    def stacked(x: torch.Tensor) -> torch.Tensor:
        y = x.cos()
        z = y.view(4, 8)
        w = z.view(4, 8)
        return y.sin() * w.exp() * w.tanh()

    program, done = normalized(stacked, x())
    # The outer view may go: the inner one still sums its readers' gradients.
    assert ops(program).count("view") == 1
    assert reasons(done) == {"drop-view view": "gradients would be summed in another order"}


def test_whole_slices_of_symbolic_sizes() -> None:
    program, _ = normalized(lambda x: x.cos()[: x.shape[0]].sin(), x(), dynamic=True)
    assert "slice" not in ops(program)


def test_it_is_on_by_default() -> None:
    names = [step.name for step in graphopt.Pipeline.of("default", host()).steps]
    assert names[0] == "normalize"
