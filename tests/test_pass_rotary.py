"""rotary and pack-rotary: which rotations they see, that gradients stay, what they leave alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import graphopt
from graphopt.candidate import Candidate, NearMiss
from graphopt.program import Level, Program, Signature
from graphopt.testing import check_pass, semantic_programs
from graphopt_passes.narrow_rotary import NarrowRotary
from graphopt_passes.normalize import Normalize
from graphopt_passes.pack_linears import PackLinears
from graphopt_passes.pack_rotary import PackRotary
from graphopt_passes.rotary import Rotary
from tests.programs import context, host, semantic

EVERYWHERE = Rotary(everywhere=True)
HEADS, FEW, SIZE, LENGTH = 4, 2, 8, 6
WIDTH = HEADS * SIZE
Turn = Callable[[Tensor, Tensor, Tensor], Tensor]


def rotate_half(x: Tensor) -> Tensor:
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)


def rotate_pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def llama(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x * cos.unsqueeze(1)) + (rotate_half(x) * sin.unsqueeze(1))


def chunked(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1) * sin + x * cos


def rounded_last(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.float()
    return (wide * cos + rotate_half(wide) * sin).to(x.dtype)


def neox(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    front, back = x[..., :4], x[..., 4:]
    cos, sin = cos[..., :4].unsqueeze(1), sin[..., :4].unsqueeze(1)
    return torch.cat((front * cos + rotate_half(front) * sin, back), -1)


def phi3(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    front, back = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat(((front * cos) + (rotate_half(front) * sin), back), -1)


def gptj(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads behind positions, a number for each pair."""
    rows = x.transpose(1, 2)
    cos, sin = (t[..., :2].unsqueeze(2).repeat_interleave(2, 3) for t in (cos, sin))
    front, back = rows[..., :4], rows[..., 4:]
    return torch.cat((front * cos + rotate_pairs(front) * sin, back), -1).permute(0, 2, 1, 3)


def cohere(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dtype, x = x.dtype, x.float()
    return ((x * cos.unsqueeze(1)) + (rotate_pairs(x) * sin.unsqueeze(1))).to(dtype=dtype)


def gpt_oss(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[..., : SIZE // 2].unsqueeze(1), sin[..., : SIZE // 2].unsqueeze(1)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def torchtune(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rows = x.transpose(1, 2)
    pairs = rows.float().reshape(*rows.shape[:-1], -1, 2)
    cos, sin = cos[..., : SIZE // 2].unsqueeze(2), sin[..., : SIZE // 2].unsqueeze(2)
    made = torch.stack(
        (
            pairs[..., 0] * cos - pairs[..., 1] * sin,
            pairs[..., 1] * cos + pairs[..., 0] * sin,
        ),
        -1,
    )
    return made.flatten(3).type_as(x).transpose(1, 2)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def gemma_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + weight.float())).type_as(x)


def called_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (SIZE,), weight, 1e-6)


class Attention(nn.Module):
    """Queries, keys and values of one projection or of three, norms of heads, rotations."""

    def __init__(
        self,
        turn: Turn,
        norm: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        packed: bool = False,
        in_turn: bool = False,
        norm_first: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.turn, self.norm, self.norm_first = turn, norm, norm_first
        self.packed, self.in_turn = packed, in_turn
        few = HEADS if in_turn else FEW
        self.counts = (HEADS, few, few)
        self.project = nn.ModuleList(
            nn.Linear(WIDTH, n * SIZE, dtype=dtype)
            for n in ((sum(self.counts),) if packed or in_turn else self.counts)
        )
        self.weights = nn.ParameterList(torch.rand(SIZE, dtype=dtype) + 0.5 for _ in range(2))
        self.out = nn.Linear(WIDTH, WIDTH, dtype=dtype)

    def heads(self, x: Tensor) -> list[Tensor]:
        if self.in_turn:
            made = self.project[0](x).view(*x.shape[:2], HEADS, 3 * SIZE).transpose(1, 2)
            return list(made.chunk(3, -1))
        if self.packed:
            parts = self.project[0](x).split([n * SIZE for n in self.counts], -1)
        else:
            parts = [layer(x) for layer in self.project]
        rows = [part.view(*x.shape[:2], -1, SIZE) for part in parts]
        if self.norm is not None and self.norm_first:
            rows[:2] = [self.norm(t, w) for t, w in zip(rows, self.weights, strict=False)]
        rows = [t.transpose(1, 2) for t in rows]
        if self.norm is not None and not self.norm_first:
            rows[:2] = [self.norm(t, w) for t, w in zip(rows, self.weights, strict=False)]
        return rows

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query, key, value = self.heads(x.tanh())
        query, key = self.turn(query, cos, sin), self.turn(key, cos, sin)
        made = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.out(made.transpose(1, 2).reshape(x.shape)).float().square().mean()


def inputs(dtype: torch.dtype = torch.float32, tables: torch.dtype | None = None) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    angles = torch.randn(1, LENGTH, SIZE // 2)
    angles = torch.cat((angles, angles), -1)
    return (
        torch.randn(2, LENGTH, WIDTH, dtype=dtype, requires_grad=True),
        angles.cos().to(tables or dtype),
        angles.sin().to(tables or dtype),
    )


def calls(program: Program) -> list[torch.fx.Node]:
    host().kernels()  # registers the operators
    return list(program.nodes(torch.ops.graphopt.rotary.default))


FORMS: list[tuple[Turn, int, bool]] = [
    (llama, SIZE, False), (chunked, SIZE, False), (rounded_last, SIZE, False), (neox, 4, False),
    (phi3, SIZE, False), (gptj, 4, True), (cohere, SIZE, True), (gpt_oss, SIZE, False),
    (torchtune, SIZE, True),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("turn", "width", "interleaved"), FORMS, ids=lambda v: getattr(v, "__name__", ""))
def test_rotations_as_models_write_them_are_one_call(
    turn: Turn, width: int, interleaved: bool, dtype: torch.dtype
) -> None:
    (program,) = semantic_programs(Attention(turn, dtype=dtype), inputs(dtype), [Normalize(), EVERYWHERE])
    made = calls(program)
    assert [node.args[5] for node in made] == [[1, HEADS, 0, 0], [1, FEW, 0, 0]]
    for node in made:
        assert node.args[6:] == (width, interleaved, None, 0.0, False, dtype)
        # Out of the projection, without a copy in between.
        assert isinstance(node.args[0], torch.fx.Node)
        assert node.args[0].target is torch.ops.aten.view.default
    assert not list(program.nodes(torch.ops.aten.neg.default))


@pytest.mark.parametrize("norm", [rms_norm, gemma_norm, called_norm], ids=lambda f: f.__name__)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("turn", [llama, chunked, neox, gptj, gpt_oss], ids=lambda f: f.__name__)
def test_the_norm_of_heads_goes_into_the_call(turn: Turn, norm: Any, norm_first: bool) -> None:
    model = Attention(turn, norm, norm_first=norm_first, dtype=torch.bfloat16)
    (program,) = semantic_programs(model, inputs(torch.bfloat16), [Normalize(), EVERYWHERE])
    for node in calls(program):
        assert node.args[8:10] == (1e-6, 1.0 if norm is gemma_norm else 0.0)
        assert node.args[3] is not None
    assert len(calls(program)) == 2
    assert not list(program.nodes(torch.ops.aten.rsqrt.default))


def two_readers(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return llama(x, cos, sin) + x.sum()


def test_a_norm_that_another_call_reads_stays() -> None:
    model = Attention(two_readers, rms_norm)
    (program,) = semantic_programs(model, inputs(), [Normalize(), EVERYWHERE])
    assert [node.args[8] for node in calls(program)] == [None, None]
    assert len(list(program.nodes(torch.ops.aten.rsqrt.default))) == 2


PIPELINE = [Normalize(), PackLinears(everywhere=True), EVERYWHERE, PackRotary()]


@pytest.mark.parametrize("emit", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "model",
    [
        Attention(llama), Attention(llama, rms_norm, packed=True),
        Attention(gptj, gemma_norm, norm_first=False), Attention(neox, in_turn=True),
        Attention(gpt_oss, packed=True), Attention(torchtune),
    ],
    ids=["llama", "qwen3", "normed-gptj", "neox", "gpt-oss", "torchtune"],
)  # fmt: skip
def test_values_and_gradients_stay(model: Attention, emit: str) -> None:
    torch._dynamo.reset()
    given = inputs()
    fast = graphopt.optimize(model, given, pipeline=PIPELINE, emit=emit, on_error="raise")
    expected, found = model(*given), fast(*given)
    torch.testing.assert_close(found, expected)
    leaves = [given[0], *model.parameters()]
    right, ours = (torch.autograd.grad(v, leaves, allow_unused=True) for v in (expected, found))
    for a, b in zip(ours, right, strict=True):
        torch.testing.assert_close(a, b)
    programs = [program for program in fast.programs if program.level is Level.SEMANTIC]
    assert sum(len(calls(program)) for program in programs) == 1


@pytest.mark.parametrize("step", [EVERYWHERE, PackRotary()], ids=lambda step: step.name)
def test_the_passes_keep_what_any_pass_must(step: Any) -> None:
    check_pass(step, Attention(llama), inputs())


@pytest.mark.parametrize(
    ("model", "heads"),
    [
        (Attention(llama, packed=True), [1, HEADS, FEW, FEW]),
        (Attention(llama, rms_norm, packed=True), [1, HEADS, FEW, FEW]),
        (Attention(neox, in_turn=True), [HEADS, 1, 1, 1]),
    ],
)
def test_queries_and_keys_of_one_projection_are_one_call(model: Attention, heads: list[int]) -> None:
    (program,) = semantic_programs(model, inputs(), PIPELINE)
    (node,) = calls(program)
    assert node.args[5] == heads
    assert node.args[10] is True
    # The gradient of the projection is written as a whole: nothing else reads it.
    assert len(node.args[0].args[0].users) == 1  # type: ignore[union-attr]


def joint(model: Attention, given: tuple[Tensor, ...]) -> Program:
    fast = graphopt.optimize(model, given, pipeline=PIPELINE, emit="eager", on_error="raise")
    (program,) = (program for program in fast.programs if program.level is Level.JOINT)
    return program


def test_the_gradient_of_the_projection_is_not_put_together() -> None:
    program = joint(Attention(llama, packed=True), inputs())
    assert not list(program.nodes(torch.ops.aten.cat.default))
    (backward,) = program.nodes(torch.ops.graphopt.rotary_backward.default)
    assert all(isinstance(gradient, torch.fx.Node) for gradient in backward.args[:3])


def copied_out(m: Attention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As pack-linears leaves values that would hold queries and keys."""
    query, key, value = m.project[0](x.tanh()).split([n * SIZE for n in m.counts], -1)
    heads = [t.view(*x.shape[:2], -1, SIZE).transpose(1, 2) for t in (query, key)]
    value = value.clone(memory_format=torch.contiguous_format).view(*x.shape[:2], -1, SIZE).transpose(1, 2)
    query, key = (m.turn(t, cos, sin) for t in heads)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).square().mean()


def test_values_that_are_copied_already_are_copied_once() -> None:
    model = Attention(llama, packed=True)
    model.forward = lambda *given: copied_out(model, *given)  # type: ignore[method-assign]
    (program,) = semantic_programs(model, inputs(), PIPELINE)
    (node,) = calls(program)
    assert node.args[5] == [1, HEADS, FEW, FEW] and node.args[10] is True
    assert not list(program.nodes(torch.ops.aten.clone.default))
    given = inputs()
    fast = graphopt.optimize(model, given, pipeline=PIPELINE, emit="eager", on_error="raise")
    torch.testing.assert_close(fast(*given), model(*given))


class Layers(nn.Module):
    """Two layers of which each reads the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(llama) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.layers[0](x, cos, sin)
        return x.mean() + self.layers[1](x.tanh(), cos, sin)


def test_every_layer_has_its_call() -> None:
    model, given = Layers(), inputs()
    (program,) = semantic_programs(model, given, PIPELINE)
    assert [node.args[5] for node in calls(program)] == [[1, HEADS, FEW, FEW]] * 2
    fast = graphopt.optimize(model, given, pipeline=PIPELINE, emit="eager", on_error="raise")
    torch.testing.assert_close(fast(*given), model(*given))


def test_without_gradients_values_stay_in_the_projection() -> None:
    model, given = Attention(llama, packed=True), [t.detach() for t in inputs()]
    with torch.no_grad():
        fast = graphopt.optimize(
            model.eval(), tuple(given), pipeline=PIPELINE, emit="eager", on_error="raise"
        )
        torch.testing.assert_close(fast(*given), model(*given))
    (program,) = (program for program in fast.programs if program.level is Level.SEMANTIC)
    (node,) = calls(program)
    assert node.args[5] == [1, HEADS, FEW, FEW] and node.args[10] is False


def test_symbolic_lengths_are_turned_as_well() -> None:
    model, (x, cos, sin) = Attention(llama, packed=True), inputs()
    fast = graphopt.optimize(model, pipeline=PIPELINE, emit="eager", on_error="raise")
    for length in (6, 5, 4):
        given = (x[:, :length], cos[:, :length], sin[:, :length])
        torch.testing.assert_close(fast(*given), model(*given))
    made = [node for program in fast.programs if program.level is Level.SEMANTIC for node in calls(program)]
    assert made and all(node.args[5] == [1, HEADS, FEW, FEW] for node in made)


class UnderAutocast(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *given: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(*given)


def autocast_programs(turn: Turn, *steps: Any) -> tuple[Program, ...]:
    return semantic_programs(
        UnderAutocast(Attention(turn, packed=True)), inputs(), [Normalize(), EVERYWHERE, *steps]
    )


def test_under_autocast_turned_heads_are_written_as_attention_reads_them() -> None:
    (before,) = autocast_programs(llama)
    assert [node.args[-1] for node in calls(before)] == [torch.float32] * 2
    (program,) = autocast_programs(llama, NarrowRotary(), PackRotary())
    (node,) = calls(program)
    assert node.args[-1] is torch.bfloat16 and node.args[5] == [1, HEADS, FEW, FEW]


def test_rounded_where_they_are_written_they_are_the_same_to_the_bit() -> None:
    model, given = UnderAutocast(Attention(llama, packed=True)), inputs()
    found = []
    for steps in ([EVERYWHERE, PackRotary()], [EVERYWHERE, NarrowRotary(), PackRotary()]):
        torch._dynamo.reset()
        fast = graphopt.optimize(model, given, pipeline=steps, emit="eager", on_error="raise")
        loss = fast(*given)
        found.append([loss, *torch.autograd.grad(loss, [given[0], *model.inner.project.parameters()])])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_turned_heads_that_are_read_in_float32_stay() -> None:
    class Wide(Attention):
        def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            query, key, value = self.heads(x.tanh())
            query, key = self.turn(query, cos, sin), self.turn(key, cos, sin)
            made = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
            return made.float().square().mean() + query.sum() + key.sum()

    (program,) = semantic_programs(
        UnderAutocast(Wide(llama, packed=True)), inputs(), [Normalize(), EVERYWHERE]
    )
    found = list(NarrowRotary().propose(program, context()))
    assert [item.reason.text for item in found if isinstance(item, NearMiss)] == [
        "turned heads are read in other dtypes as well"
    ] * 2
    assert len(found) == 2


# --- what is left alone -------------------------------------------------------------------------


def thirds(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    other = torch.cat((-x[..., 2:6], x[..., :2], x[..., 6:]), -1)
    return x * cos + torch.cat((-other[..., 4:], other[..., :4]), -1) * sin


def other_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y = x.roll(1, 1)
    return x * cos + rotate_half(y) * sin


def along_positions(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[2] // 2
    return x * cos + torch.cat((-x[:, :, half:], x[:, :, :half]), 2) * sin


def read_inside(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    inside = rotate_half(x)
    return x * cos + inside * sin + inside


def tables_of_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (t.unsqueeze(1).expand(2, x.shape[1], -1, -1) for t in (cos, sin))
    return x * cos + rotate_half(x) * sin


def mixed_tables(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_half(x) * sin.bfloat16()


def rows_alone(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y = x.flatten(0, 1)
    return (y * cos + rotate_half(y) * sin).view(x.shape)


def viewed(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y = x.contiguous()
    return (y * cos + rotate_half(y) * sin).view(x.shape[0], -1, SIZE).view(x.shape)


def written(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y = cos * 2
    z = x * y + rotate_half(x) * sin
    y.zero_()
    return z + y.sum()


def refusals(turn: Turn, given: tuple[Tensor, ...], step: Rotary = EVERYWHERE) -> list[str]:
    model = Attention(turn, dtype=given[0].dtype)
    found = list(step.propose(semantic(model, *given), context()))
    assert found and all(isinstance(item, NearMiss) for item in found), found
    return [item.reason.text for item in found if isinstance(item, NearMiss)]


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        (thirds, "what is multiplied by the sine are no halves of what is turned"),
        (other_heads, "what is multiplied by the sine are no halves of what is turned"),
        (along_positions, "pairs are not along the last dimension"),
        (read_inside, "the value of aten.cat.default is read by another call as well"),
        (tables_of_heads, "a table is not the same for all heads, or not of their positions"),
        (mixed_tables, "cosines and sines are of different dtypes"),
        (rows_alone, "what is turned are no heads [batch, heads, positions, elements]"),
        (viewed, "what reads it depends on where its elements lie"),
        (written, "what it reads is written in place"),
    ],
)
def test_what_is_no_rotation_of_heads_stays_and_the_report_says_why(turn: Turn, reason: str) -> None:
    assert reason in refusals(turn, inputs())


def test_where_it_gains_nothing_it_stays() -> None:
    assert "no kernel runs on cpu, where the operator gains nothing" in refusals(llama, inputs(), Rotary())
    assert "no kernel takes float64" in refusals(llama, inputs(torch.float64))


@pytest.mark.parametrize(
    ("norm", "packed", "mode", "taken"),
    [
        (None, False, "train", False), (called_norm, False, "train", True),
        (None, True, "train", True), (None, True, "infer", False),
    ],
)  # fmt: skip
def test_heads_without_a_norm_stay_with_generated_code_but_for_those_of_a_projection_in_training(
    norm: Any, packed: bool, mode: str, taken: bool
) -> None:
    """On a GPU that is not there: nothing is run."""

    def turn(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> Tensor:
        x = x.narrow(2, 0, HEADS * SIZE).view(2, LENGTH, HEADS, SIZE) if packed else x
        x = x if norm is None else norm(x, weight)
        return chunked(x.transpose(1, 2), cos, sin).exp()

    def projected(x: Tensor, *others: Tensor) -> Tensor:
        return turn(x.neg(), *others)

    whole = (2, LENGTH, 2 * HEADS * SIZE) if packed else (2, LENGTH, HEADS, SIZE)
    with torch._subclasses.FakeTensorMode():
        given = [
            torch.empty(shape, device="cuda", dtype=torch.bfloat16)
            for shape in (whole, (1, LENGTH, SIZE), (1, LENGTH, SIZE), (SIZE,))
        ]
        gm = make_fx(projected, pre_dispatch=True)(*given)
    program = Program("g0", Level.SEMANTIC, gm, Signature((), ()))
    found = list(Rotary().propose(program, context(mode)))
    if taken:
        assert any(isinstance(item, Candidate) for item in found), found
    else:
        (miss,) = found
        assert isinstance(miss, NearMiss)
        assert miss.reason.text == "generated code turns heads as fast where no norm of them goes with it"


def test_tables_that_are_trained_stay() -> None:
    x, cos, sin = inputs()
    assert "the tables are trained" in refusals(llama, (x, cos.requires_grad_(), sin))


def values_between(m: Attention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    query, value, key = m.project[0](x).split([n * SIZE for n in m.counts], -1)
    return attended(m, query, key, value, cos, sin)


def attended(m: Attention, *given: Tensor) -> Tensor:
    *rows, cos, sin = given
    query, key, value = (t.view(*t.shape[:2], -1, SIZE).transpose(1, 2) for t in rows)
    query, key = m.turn(query, cos, sin), m.turn(key, cos, sin)
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True).square().mean()


def read_twice(m: Attention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    packed = m.project[0](x)
    return attended(m, *packed.split([n * SIZE for n in m.counts], -1), cos, sin) + packed.square().mean()


def other_tables(m: Attention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    query, key, value = (
        t.view(*t.shape[:2], -1, SIZE).transpose(1, 2)
        for t in m.project[0](x).split([n * SIZE for n in m.counts], -1)
    )
    query, key = m.turn(query, cos, sin), m.turn(key, cos * 2, sin)
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True).square().mean()


def other_eps(m: Attention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    query, key, value = (
        t.view(*t.shape[:2], -1, SIZE).transpose(1, 2)
        for t in m.project[0](x).split([n * SIZE for n in m.counts], -1)
    )
    query = m.turn(rms_norm(query, m.weights[0]), cos, sin)
    key = m.turn(rms_norm(key, m.weights[1], 1e-3), cos, sin)
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True).square().mean()


def values_unread(m: Attention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    query, key, _ = m.project[0](x).split([n * SIZE for n in m.counts], -1)
    return attended(m, query, key, key, cos, sin)


def gap(m: Attention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    packed = m.project[0](x)
    return attended(m, packed[..., 8:40], packed[..., 40:56], packed[..., 48:], cos, sin)


@pytest.mark.parametrize(
    ("compute", "reason"),
    [
        (values_between, "the projection does not hold queries, keys and values in this order"),
        (gap, "the projection does not hold queries, keys and values in this order"),
        (read_twice, "the projection is read by another call as well"),
        (other_tables, "queries and keys are turned by other tables"),
        (other_eps, "queries and keys differ in eps: 1e-06 and 0.001"),
        (values_unread, "the projection is read by another call as well"),
    ],
)
def test_what_cannot_be_one_call_stays_and_the_report_says_why(compute: Any, reason: str) -> None:
    class Model(Attention):
        def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            return compute(self, x.tanh(), cos, sin)  # type: ignore[no-any-return]

    program, *_ = semantic_programs(Model(llama, packed=True), inputs(), [EVERYWHERE])
    found = list(PackRotary().propose(program, context()))
    assert [item.reason.text for item in found if isinstance(item, NearMiss)] == [reason]
    assert not [item for item in found if isinstance(item, Candidate)]


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_one_call_is_worth_it(mode: str) -> None:
    program, *_ = semantic_programs(Attention(llama, packed=True), inputs(), [EVERYWHERE])
    (found,) = PackRotary().propose(program, context(mode))
    assert isinstance(found, Candidate) and found.delta.seconds < 0
