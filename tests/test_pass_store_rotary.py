"""store-rotary: which rotations of a step go with its writes into stores, and what stays and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.candidate import Candidate, NearMiss
from graphopt.testing import check_pass, semantic_programs
from graphopt_passes.functionalize import Functionalize
from graphopt_passes.normalize import Normalize
from graphopt_passes.store_rotary import StoreRotary
from tests.decoders import family, tokens
from tests.programs import context, host, semantic

EVERYWHERE = StoreRotary(everywhere=True)
STEPS = [Normalize(), Functionalize(), EVERYWHERE]
HEADS, FEW, SIZE, SLOTS = 4, 2, 8, 12
ops = torch.ops.graphopt


@dataclass(frozen=True)
class How:
    """How a layer turns its heads, and where it keeps them."""

    normed: bool = False
    neighbours: bool = False
    width: int = SIZE
    window: int = 0
    heads_last: bool = False


def turned(x: Tensor, cos: Tensor, sin: Tensor, how: How) -> Tensor:
    front, rest = x[..., : how.width], x[..., how.width :]
    if how.neighbours:
        other = torch.stack((-front[..., 1::2], front[..., 0::2]), -1).flatten(-2)
    else:
        first, second = front.chunk(2, -1)
        other = torch.cat((-second, first), -1)
    front = front * cos + other * sin
    return front if how.width == SIZE else torch.cat((front, rest), -1)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, how: How) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.project = nn.Linear(16, (HEADS + 2 * FEW) * SIZE)
        self.out = nn.Linear(HEADS * SIZE, 16)
        self.weights = nn.ParameterList(torch.rand(SIZE) for _ in range(2))
        self.register_buffer("keys", torch.zeros(3, FEW, SLOTS, SIZE))
        self.register_buffer("values", torch.zeros(3, FEW, SLOTS, SIZE))

    def forward(self, x: Tensor, at: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        how = self.how
        rows = self.project(x).unflatten(-1, (-1, SIZE))
        query, key, value = rows.split([HEADS, FEW, FEW], 2)
        if how.normed:
            query, key = (normed(part, w) for part, w in zip((query, key), self.weights, strict=True))
        if how.heads_last:
            tables = cos[:, :, None], sin[:, :, None]
            query, key = (turned(part, *tables, how).transpose(1, 2) for part in (query, key))
        else:
            tables = cos[:, None], sin[:, None]
            query, key = (turned(part.transpose(1, 2), *tables, how) for part in (query, key))
        attend = ops.attend_ring if how.window else ops.attend_full
        made = attend(
            query, key, value.transpose(1, 2), self.keys, self.values, at, None, None, None, 0.3, 0.0,
            how.window, 1 << 20 if how.window else SLOTS,
        )  # fmt: skip
        return x + self.out(made.transpose(1, 2).flatten(2))


class Layers(nn.Module):
    def __init__(self, how: How, count: int = 2) -> None:
        super().__init__()
        host().kernels()
        self.layers = nn.ModuleList(Layer(how) for _ in range(count))

    def forward(self, x: Tensor, at: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, at, cos, sin)
        return x


def given(how: How = How(), rows: int = 1, place: int = 5, batch: int = 2) -> tuple[Tensor, ...]:
    torch.manual_seed(place)
    angle = torch.rand(batch, rows, how.width)
    return torch.randn(batch, rows, 16), torch.arange(place, place + rows), angle.cos(), angle.sin()


HOW = {
    "plain": How(), "normed": How(normed=True), "neighbours": How(neighbours=True), "a part": How(width=4),
    "ring": How(window=SLOTS - 2, normed=True), "heads last": How(heads_last=True),
}  # fmt: skip


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_a_step_turns_and_stores_in_one_call(how: How) -> None:
    model = Layers(how).double().eval()
    steps = [given(how, place=place) for place in (5, 6, 11)]
    wide = [tuple(t.double() if t.is_floating_point() else t for t in step) for step in steps]
    with torch.no_grad():
        fast = graphopt.optimize(model, wide[0], pipeline=STEPS, emit="eager", on_error="raise")
        for buffer in model.buffers():
            buffer.zero_()
        expected = [model(*step) for step in wide]
        held = [buffer.clone() for buffer in model.buffers()]
        for buffer in model.buffers():
            buffer.zero_()
        found = [fast(*step) for step in wide]
    # Norms keep their statistics in float32 as the model writes them.
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if how.normed else {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(found, expected, **tolerance)
    torch.testing.assert_close(list(model.buffers()), held, **tolerance)
    assert sum("store-rotary" in rewrite.id for rewrite in fast.report.rewrites) == 2


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_nothing_of_the_rotation_is_left(how: How) -> None:
    (program,) = semantic_programs(Layers(how).eval(), given(how), STEPS)
    calls = list(program.nodes(ops.rotary_to_stores.default))
    assert len(calls) == 2
    for call in calls:
        (attend,) = call.users
        assert attend.args[:3] == (call, None, None) and attend.args[3:6] == call.args[3:6]
        eps = 1e-5 if how.normed else None
        assert call.args[10:] == (how.width, how.neighbours, eps, 0.0, bool(how.window))
    left = {str(node.target) for node in program.nodes()}
    gone = ("aten.neg", "aten.cat", "aten.rsqrt", "aten.stack")
    assert not {name for name in left if name.startswith(gone)}


def test_the_pass_keeps_what_any_pass_must() -> None:
    check_pass(EVERYWHERE, Layers(How()).eval(), given())


def proposed(
    function: Callable[..., Any] | nn.Module, *more: Tensor, mode: str = "infer", rows: int = 1,
    step: StoreRotary = EVERYWHERE, how: How = How(),
) -> list[Any]:  # fmt: skip
    host().kernels()
    with torch.no_grad():
        return list(step.propose(semantic(function, *given(how, rows), *more), context(mode)))


def test_training_and_several_rows_keep_what_they_have() -> None:
    layer = Layers(How(), 1).eval()
    assert [type(item) for item in proposed(layer)] == [Candidate]
    assert proposed(layer, mode="train") == [] and proposed(layer, rows=3) == []
    (found,) = proposed(layer, step=StoreRotary())
    assert isinstance(found, NearMiss)
    assert found.reason.text == "no kernel runs on cpu, where the operator gains nothing"


def parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.cat([x] * 4, -1).unflatten(-1, (HEADS + 2 * FEW, SIZE)).transpose(1, 2)
    query, key, value = wide.split([HEADS, FEW, FEW], 1)
    return query, key, value


def attended(query: Tensor, key: Any, value: Any, at: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    made: Tensor = ops.attend_full(
        query, key, value, keys, values, at, None, None, None, 0.3, 0.0, 0, SLOTS
    )
    return made


def keys_are_not(x: Tensor, at: Tensor, cos: Tensor, sin: Tensor, *held: Tensor) -> Tensor:
    query, key, value = parts(x)
    return attended(turned(query, cos[:, None], sin[:, None], How()), key, value, at, *held)


def by_other_tables(x: Tensor, at: Tensor, cos: Tensor, sin: Tensor, *held: Tensor) -> Tensor:
    query, key, value = parts(x)
    query = turned(query, cos[:, None], sin[:, None], How())
    return attended(query, turned(key, sin[:, None], cos[:, None], How()), value, at, *held)


def otherwise(x: Tensor, at: Tensor, cos: Tensor, sin: Tensor, *held: Tensor) -> Tensor:
    query, key, value = parts(x)
    query = turned(query, cos[:, None], sin[:, None], How(neighbours=True))
    return attended(query, turned(key, cos[:, None], sin[:, None], How()), value, at, *held)


def keys_are_read(x: Tensor, at: Tensor, cos: Tensor, sin: Tensor, *held: Tensor) -> Tensor:
    query, key, value = parts(x)
    query, key = (turned(part, cos[:, None], sin[:, None], How()) for part in (query, key))
    return attended(query, key, value, at, *held) + key.sum()


def one_is_normed(x: Tensor, at: Tensor, cos: Tensor, sin: Tensor, *held: Tensor) -> Tensor:
    query, key, value = parts(x)
    query = turned(normed(query, torch.ones(SIZE)), cos[:, None], sin[:, None], How())
    return attended(query, turned(key, cos[:, None], sin[:, None], How()), value, at, *held)


def widened(x: Tensor, at: Tensor, cos: Tensor, sin: Tensor, *held: Tensor) -> Tensor:
    query, key, value = parts(x)
    tables = cos[:, None].double(), sin[:, None].double()
    query, key = (turned(part, *tables, How()) for part in (query, key))
    return attended(query, key, value.double(), at, *held)


def written(x: Tensor, at: Tensor, cos: Tensor, sin: Tensor, *held: Tensor) -> Tensor:
    query, key, value = parts(x)
    query, key = (turned(part, cos[:, None], sin[:, None], How()) for part in (query, key))
    cos.add_(1)
    return attended(query, key, value, at, *held)


def written_by_another(x: Tensor, at: Tensor, cos: Tensor, sin: Tensor, *held: Tensor) -> Tensor:
    query, _, _ = parts(x)
    return attended(turned(query, cos[:, None], sin[:, None], How()), None, None, at, *held)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (keys_are_not, "queries are turned and keys are not"),
        (by_other_tables, "queries are turned by other tables than keys"),
        (otherwise, "queries are turned otherwise than keys"),
        (keys_are_read, "what is turned is read besides"),
        (one_is_normed, "either queries or keys are normalized, not both"),
        (widened, "torch.float32 is turned into torch.float64"),
        (written, "what it reads is written by the program"),
        (written_by_another, "another attention writes the store that it reads"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_nearly_so_stays_and_the_report_says_why(function: Any, text: str) -> None:
    held = [torch.zeros(2, FEW, SLOTS, SIZE) for _ in range(2)]
    (found,) = proposed(function, *held)
    assert isinstance(found, NearMiss) and found.reason.text == text


def test_attention_without_rotations_is_passed_over() -> None:
    def plain(x: Tensor, at: Tensor, cos: Tensor, sin: Tensor, *held: Tensor) -> Tensor:
        return attended(*parts(x), at, *held)

    assert proposed(plain, *[torch.zeros(2, FEW, SLOTS, SIZE) for _ in range(2)]) == []


def statuses(fast: graphopt.optimized.Optimized) -> list[str]:
    """What became of the pass in each program that was rewritten."""
    return [record.status for record in fast.report.steps if record.id == "store-rotary"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "gpt_neox", "cohere"])
def test_decoders_store_what_they_turn(name: str) -> None:
    model = family(name)
    step = graphopt.use("store-rotary", everywhere=True)
    fast = graphopt.optimize(
        model, (tokens(1, 9),), generate=graphopt.Generate(64, max_batch=2), emit="inductor",
        on_error="raise",
        pipeline=["normalize", "functionalize", "grouped-attention", step, "fuse-norm"],
    )  # fmt: skip
    ids = tokens(2, 9)
    # Across the end of the windows.
    expected = model.generate(ids, max_new_tokens=40, do_sample=False)
    assert torch.equal(fast.generate(ids, max_new_tokens=40, do_sample=False), expected)
    assert "applied" in statuses(fast)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
def test_on_a_gpu_decoders_give_the_models_tokens(name: str) -> None:
    """Compiled and replayed; wide enough that heads fill the kernels."""
    changes = {"hidden_size": 256, "head_dim": 64}
    model = family(name, **changes).cuda()
    ids = tokens(1, 9).cuda()
    fast = graphopt.optimize(
        model, (ids,), generate=graphopt.Generate(128, max_batch=1), emit="inductor", on_error="raise",
        pipeline=["default", "store-rotary"],
    )  # fmt: skip
    expected = model.generate(ids, max_new_tokens=64, do_sample=False)
    assert torch.equal(fast.generate(ids, max_new_tokens=64, do_sample=False), expected)
    assert "applied" in statuses(fast)
