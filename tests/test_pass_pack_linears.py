"""pack-linears: which layers become one, what that changes, and what it leaves alone, with the reason."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt import _torch
from graphopt.candidate import Candidate, NearMiss
from graphopt.capture.structure import line_of
from graphopt.capture.trained import trained_values
from graphopt.passes import PassContext
from graphopt.program import Program, Signature
from graphopt.testing import check_pass, semantic_programs
from graphopt_passes.chunk import Chunk
from graphopt_passes.pack_linears import PackLinears
from graphopt_passes.pack_linears.price import Pack, ProductTimes
from graphopt_passes.pack_linears.readers import waits
from tests.programs import context, host, semantic
from tests.steps import assert_close, budgeted, run_step

EVERYWHERE = PackLinears(everywhere=True)
WIDTH = 32
X = torch.randn(2, 8, WIDTH, requires_grad=True)
aten = torch.ops.aten
Forward = Callable[["Siblings", Tensor], Tensor]


class Siblings(nn.Module):
    """Three layers of one value, and what ``forward`` does with them."""

    def __init__(self, forward: Forward, bias: tuple[bool, bool, bool] = (True, False, True)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q = nn.Linear(WIDTH, WIDTH, bias=bias[0])
        self.k = nn.Linear(WIDTH, WIDTH // 2, bias=bias[1])
        self.v = nn.Linear(WIDTH, WIDTH // 2, bias=bias[2])
        self.o = nn.Linear(WIDTH, WIDTH)
        self.compute = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def heads(t: Tensor) -> Tensor:
    return t.view(*t.shape[:2], -1, 8).transpose(1, 2)


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(heads(q), heads(k), heads(v), enable_gqa=True)
    return y.transpose(1, 2).reshape(*q.shape)


def attention(m: Siblings, x: Tensor) -> Tensor:
    x = x.tanh()
    return (m.o(attended(m.q(x), m.k(x), m.v(x))) + x).square().mean()


def rotated(m: Siblings, x: Tensor) -> Tensor:
    def turn(t: Tensor) -> Tensor:
        left, right = t.chunk(2, -1)
        return torch.cat((-right, left), -1) + t

    x = x.tanh()
    q = turn(heads(m.q(x)))
    k = turn(heads(m.k(x)))
    v = heads(m.v(x))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).square().mean()


def copied(m: Siblings, x: Tensor) -> Tensor:
    x = x.tanh()
    q, k, v = (heads(layer(x)).contiguous() for layer in (m.q, m.k, m.v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).square().mean()


def gated(m: Siblings, x: Tensor) -> Tensor:
    x = x.tanh()
    return (F.silu(m.k(x)) * m.v(x) + m.q(x)[..., : WIDTH // 2]).square().mean()


def with_matmul(m: Siblings, x: Tensor) -> Tensor:
    x = x.tanh()
    return (x @ m.k.weight.t() * (x @ m.v.weight.transpose(0, 1))).square().mean() + m.q(x).mean()


def with_wide(m: Siblings, x: Tensor) -> Tensor:
    x = x.tanh()
    wide = F.linear(x, m.q.weight.repeat(256, 1))
    return (m.k(x) * m.v(x)).mean() + wide.mean()


def with_addmm(m: Siblings, x: Tensor) -> Tensor:
    x = x.tanh().view(-1, WIDTH)
    k, v = (torch.addmm(m.v.bias, x, layer.weight.t()) for layer in (m.k, m.v))
    return (k * v).square().mean() + m.q(x).mean()


def packed(program: Program) -> list[list[int]]:
    """Sizes of the parts of every pack."""
    return [node.args[1] for node in program.nodes(aten.split_with_sizes.default)]  # type: ignore[misc]


def reasons(model: nn.Module, x: Tensor = X, step: PackLinears = EVERYWHERE) -> list[str]:
    (program,) = semantic_programs(model, (x,))
    return [found.reason.text for found in step.propose(program, context()) if isinstance(found, NearMiss)]


@pytest.mark.parametrize("forward", [attention, rotated, copied, gated, with_matmul, with_addmm])
def test_layers_of_one_value_are_one_product(forward: Forward) -> None:
    model = Siblings(forward)
    checked = check_pass(EVERYWHERE, model, (X,), dtypes=(torch.float64,))
    assert not checked.near_misses
    (program,) = semantic_programs(model, (X,), [EVERYWHERE])
    ((sizes),) = packed(program)
    assert sorted(sizes) == [16, 16, 32]
    assert not list(program.nodes(aten.matmul.default)) and not list(program.nodes(aten.addmm.default))
    assert len(list(program.nodes(aten.linear.default))) == (2 if forward is attention else 1)


def test_a_small_result_that_waits_is_copied_out_of_the_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ProductTimes, "copies_out", lambda self, pack: any(pack.waits) and not all(pack.waits)
    )
    model = Siblings(rotated)
    check_pass(EVERYWHERE, model, (X,), dtypes=(torch.float64,))
    (program,) = semantic_programs(model, (X,), [EVERYWHERE])
    (copy,) = program.nodes(aten.clone.default)
    (piece,) = copy.all_input_nodes
    assert piece.target is operator.getitem and piece.args[1] == 2
    assert copy.meta["val"].is_contiguous() and copy.meta["val"].shape[-1] == 16


@pytest.mark.parametrize("bias", [(False, False, False), (True, False, True), (True, True, True)], ids=str)
def test_biases_may_be_missing(bias: tuple[bool, bool, bool]) -> None:
    model = Siblings(gated, bias)
    check_pass(EVERYWHERE, model, (X,))
    (program,) = semantic_programs(model, (X,), [EVERYWHERE])
    zeros = [node.args[0] for node in program.nodes(aten.zeros.default)]
    assert zeros == ([[16]] if bias == (True, False, True) else [])
    assert len(list(program.nodes(aten.cat.default))) == 1 + any(bias)


@pytest.mark.parametrize("emit", ["eager", "inductor"])
def test_gradients_are_rows_of_one_and_add_up(emit: str) -> None:
    model = Siblings(attention)
    fast = graphopt.optimize(copy.deepcopy(model), (X,), pipeline=[EVERYWHERE], emit=emit, on_error="raise")
    assert_close(run_step(fast, (X,)), run_step(model, (X,)))
    parameters = dict(fast.named_parameters())
    q, k, v = (parameters[f"{name}.weight"].grad for name in "qkv")
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert all(grad.is_contiguous() for grad in (q, k, v))
    # A second step adds to them, in place, each to its own rows.
    kept = {name: p.grad.clone() for name, p in fast.named_parameters()}
    fast(X).backward()
    for name, p in fast.named_parameters():
        torch.testing.assert_close(p.grad, 2 * kept[name])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attend = nn.LayerNorm(WIDTH), Siblings(lambda m, x: attended(m.q(x), m.k(x), m.v(x)))
        self.up, self.gate = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend.o(self.attend(self.norm(x)))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Stack(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(*[Block() for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).square().mean()


def test_the_peak_is_predicted_and_packs_are_laid_again_under_a_budget() -> None:
    pipeline = [EVERYWHERE, "insert-checkpoints"]
    fast = budgeted(Stack, (torch.randn(2, 16, WIDTH),), pipeline=pipeline)
    again = [item.op for choice in fast.plan.choices for item in choice.recomputed]
    assert "aten.cat.default" in again


@pytest.mark.slow
def test_repeated_blocks_are_compiled_once() -> None:
    model, x = Stack(), torch.randn(2, 16, WIDTH)
    fast = graphopt.optimize(
        copy.deepcopy(model), (x,), pipeline=[EVERYWHERE, "insert-checkpoints"], emit="inductor",
        on_error="raise",
    )  # fmt: skip
    assert_close(run_step(fast, (x,)), run_step(model, (x,)))
    blocks = [program for program in fast.programs if program.name == "g0.block0"]
    assert blocks and all(packed(program) == [[32, 16, 16], [64, 64]] for program in blocks)
    assert fast.plan.predicted.peak_bytes >= fast.measure((x,), repeats=1).peak_bytes


def test_regions_are_cut_through_packs() -> None:
    """What reads the parts of a pack row by row is computed in slices as it would be without."""
    found = []
    for steps in ([], [EVERYWHERE]):
        (program,) = semantic_programs(Stack(1), (X,), steps)
        cuts = Chunk(least_elements=64).propose(program, context())
        found.append({proposal.id for proposal in cuts if isinstance(proposal, Candidate)})
    assert found[0] and len(found[0]) == len(found[1])


def test_autocast_packs_what_it_rounds() -> None:
    def under(m: Siblings, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return attended(m.q(x), m.k(x), m.v(x)).float().square().mean()

    model = Siblings(under)
    fast = graphopt.optimize(
        copy.deepcopy(model), (X,), pipeline=[EVERYWHERE], emit="eager", on_error="raise"
    )
    (program,) = [p for p in fast.programs if p.level is graphopt.Level.SEMANTIC]
    assert packed(program) == [[32, 16, 16]]
    assert_close(run_step(fast, (X,)), run_step(model, (X,)), 2e-2)


def test_empty_batches_and_infinities_come_through() -> None:
    model = Siblings(lambda m, x: F.silu(m.k(x)) * m.v(x) + m.q(x)[..., : WIDTH // 2])
    fast = graphopt.optimize(copy.deepcopy(model), (X,), pipeline=[EVERYWHERE], emit="eager")
    assert fast(X[:0]).shape == (0, 8, WIDTH // 2)
    x = X.detach().clone()
    x[0, 0, 0], x[1, 2, 3] = torch.inf, torch.nan
    torch.testing.assert_close(fast(x), model(x), equal_nan=True)


def test_rows_may_be_known_at_run_time_alone() -> None:
    program = semantic(Siblings(gated), torch.randn(3, 8, WIDTH), dynamic=True)
    (candidate,) = EVERYWHERE.propose(program, context())
    assert isinstance(candidate, Candidate)
    with program.edit("pack-linears") as edit:
        candidate.apply(edit)
    assert packed(program) == [[16, 16, 32]]
    (product,) = program.nodes(aten.linear.default)
    assert isinstance(product.meta["val"].shape[0], torch.SymInt)


# --- what stays apart -----------------------------------------------------------------------------


def written(m: Siblings, x: Tensor) -> Tensor:
    x = x.tanh()
    k = m.k(x)
    k.view(-1).mul_(2)
    return (k * m.v(x)).square().mean()


def writing_between(m: Siblings, x: Tensor) -> Tensor:
    x = x * 2
    k = m.k(x)
    x.view(-1).add_(1)
    return (k * m.v(x)).square().mean()


def flattened(m: Siblings, x: Tensor) -> Tensor:
    x = x.tanh()
    return (m.k(x).view(-1) * m.v(x).view(-1)).square().mean()


def reshaped(m: Siblings, x: Tensor) -> Tensor:
    x = x.tanh()
    return (m.k(x).reshape(2, -1) * m.v(x).reshape(2, -1)).square().mean()


def strided(m: Siblings, x: Tensor) -> Tensor:
    x = x.tanh()
    return (m.k(x).as_strided((4, 4), (4, 1)) * m.v(x).as_strided((4, 4), (4, 1))).mean()


def no_grad_between(m: Siblings, x: Tensor) -> Tensor:
    x = x.tanh()
    k = m.k(x)
    with torch.no_grad():
        v = m.v(x)
    return (k * v).square().mean()


def far_apart(m: Siblings, x: Tensor) -> Tensor:
    x = x.tanh()
    y = m.o(m.q(x).sin())
    return y.mean() + m.v(x).square().mean()


def by_columns(m: Siblings, x: Tensor) -> Tensor:
    x = x.tanh()
    return (x @ m.q.weight + x @ m.o.weight).square().mean()


def same_weight(m: Siblings, x: Tensor) -> Tensor:
    x = x.tanh()
    return (F.linear(x, m.k.weight).sin() * F.linear(x, m.k.weight, m.v.bias)).mean()


def made_between(m: Siblings, x: Tensor) -> Tensor:
    x = x.tanh()
    k = m.k(x)
    return (k * F.linear(x, m.v.weight * k.mean())).mean()


def one_bias(m: Siblings, x: Tensor) -> Tensor:
    x, bias = x.tanh(), m.v.bias[:1].sin()
    return (m.k(x) * F.linear(x, m.v.weight, bias)).mean()


def same_type(m: Siblings, x: Tensor) -> Tensor:
    x = x.tanh()
    return (m.k(x).type_as(x) * m.v(x)).mean()


def two_regions(m: Siblings, x: Tensor) -> Tensor:
    x = x.tanh()
    k, v = (torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False) for f in (m.k, m.v))
    return (k * v).mean()


def loss_of_logits(m: Siblings, x: Tensor) -> Tensor:
    x = x.tanh().view(-1, WIDTH)
    target = torch.zeros(x.shape[0], dtype=torch.int64)
    return F.cross_entropy(m.k(x), target) + F.cross_entropy(m.v(x).double(), target)


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (written, ["its result is written in place"]),
        (
            flattened,
            ["a view of it cannot be taken of rows with gaps: Cannot view"] * 2,
        ),
        (reshaped, ["a reader would copy rows with gaps"] * 2),
        (strided, ["its layout in memory is read"] * 2),
        (no_grad_between, ["autocast or the gradient mode changes in between"]),
        (far_apart, ["other products run in between: results would be held"]),
        (
            by_columns,
            ["its weight is stored by columns: gradients of weights next to each other would be copied"] * 2,
        ),
        (same_weight, ["it has the weight of another one"]),
        (one_bias, ["its bias is not one number for each column"]),
        (same_type, ["it is read as part of a call that may hand it on"]),
        (two_regions, ["they lie in other regions that the model checkpoints itself"]),
        (made_between, ["its weight or bias is made after the first of them"]),
        (loss_of_logits, ["a loss over its columns may be computed in chunks"] * 2),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_others_stay_apart(forward: Forward, expected: list[str]) -> None:
    found = reasons(Siblings(forward))
    assert len(found) == len(expected)
    assert all(text.startswith(start) for text, start in zip(found, expected, strict=True))


def test_a_write_to_what_they_read_keeps_them_apart() -> None:
    model = Siblings(writing_between).requires_grad_(False)
    assert reasons(model) == ["what it reads is written in between"]


def test_results_that_are_returned_keep_memory_of_their_own() -> None:
    def cached(m: Siblings, x: Tensor) -> tuple[Tensor, Tensor]:
        v = m.v(x)
        return attended(m.q(x), m.k(x), v), heads(v)

    model = Siblings(cached)
    checked = check_pass(EVERYWHERE, model, (X,))
    assert [miss.reason.text for miss in checked.near_misses] == [
        "its result is an output, which would share memory with others"
    ]
    (program,) = semantic_programs(model, (X,), [EVERYWHERE])
    assert packed(program) == [[32, 16]]


def test_frozen_and_trained_weights_stay_apart() -> None:
    model = Siblings(gated)
    model.k.requires_grad_(False)
    assert reasons(model) == ["one weight is trained and the other frozen"]
    (program,) = semantic_programs(model, (X,), [EVERYWHERE])
    assert packed(program) == [[16, 32]]


def test_weights_of_other_types_stay_apart() -> None:
    def mixed(m: Siblings, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return (m.k(x) * m.v(x)).float().square().mean()

    model = Siblings(mixed)
    model.v.bfloat16()
    steps = graphopt.optimize(model, (X,), pipeline=[EVERYWHERE], emit="eager").report
    assert [miss.reason.text for miss in steps.near_misses] == ["its weight is of another type"]


def test_autocast_rounds_float32_alone() -> None:
    def rounded(m: Siblings, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return (m.k(x) * m.v(x)).float().mean()

    model = Siblings(rounded)
    model.k.half(), model.v.half()
    assert reasons(model) == ["autocast cannot lay its weight beside others"] * 2


def test_weights_of_unknown_size_stay_apart() -> None:
    def of_inputs(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.linear(x, k).mean() + F.linear(x, v).mean()

    program = semantic(of_inputs, *(torch.randn(n, WIDTH) for n in (3, 4, 8)), dynamic=True)
    found = [miss.reason.text for miss in EVERYWHERE.propose(program, context())]  # type: ignore[union-attr]
    assert found == ["the size of its weight is known at run time alone"] * 2


def test_an_unknown_gradient_mode_keeps_them_apart() -> None:
    graph = torch.fx.Graph()
    x, *weights = (graph.placeholder(name) for name in "xkv")
    switch = graph.call_function(_torch.set_grad_enabled(), (False,))
    made = [graph.call_function(aten.linear.default, (x, weight)) for weight in weights]
    output = graph.output(tuple(graph.call_function(aten.neg.default, (node,)) for node in made))
    with _torch.fake_mode():
        for node in graph.nodes:
            node.meta["val"] = torch.ones(4, 4) if node not in (switch, output) else None
    program = Program("g0", graphopt.Level.SEMANTIC, torch.fx.GraphModule({}, graph), Signature((), ()))
    found = [miss.reason.text for miss in EVERYWHERE.propose(program, context())]  # type: ignore[union-attr]
    assert found == ["the gradient mode is not known"] * 2


def test_a_pack_is_not_packed_again() -> None:
    (program,) = semantic_programs(Siblings(with_wide), (X,), [EVERYWHERE])
    assert packed(program) == [[16, 16]]
    found = EVERYWHERE.propose(program, context())
    texts = [miss.reason.text for miss in found if isinstance(miss, NearMiss)]
    assert texts == ["it is packed already"]


def test_columns_that_do_not_end_on_16_bytes_stay_apart() -> None:
    model = Siblings(lambda m, x: m.k(x).mean() * m.v(x).mean())
    model.k, model.v = nn.Linear(WIDTH, 15), nn.Linear(WIDTH, 16)
    assert reasons(model) == ["its 15 columns do not end on 16 bytes"]


def test_a_weight_that_is_laid_out_by_columns_stays_apart() -> None:
    model = Siblings(gated)
    model.k.weight = nn.Parameter(torch.randn(WIDTH, WIDTH // 2).t())
    checked = check_pass(EVERYWHERE, model, (X,))
    assert [miss.reason.text for miss in checked.near_misses] == ["its weight is not laid out by rows"]


def test_operators_of_others_may_want_whole_rows() -> None:
    host().kernels()

    def custom(m: Siblings, x: Tensor) -> Tensor:
        x = x.tanh()
        normed = torch.ops.graphopt.row_norm(m.k(x), None, None, 1e-6, False, 0.0, False, torch.float32)[0]
        return (normed * m.v(x) + m.q(x)[..., :16]).mean()

    assert reasons(Siblings(custom)) == ["graphopt.row_norm.default may want its rows without gaps"]


def test_regions_that_the_model_checkpoints_stay_regions() -> None:
    def within(m: Siblings, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return F.silu(m.k(x)) * m.v(x)

        return torch.utils.checkpoint.checkpoint(inner, x.tanh(), use_reentrant=False).square().mean()

    (program,) = semantic_programs(Siblings(within), (X,), [EVERYWHERE])
    assert packed(program) == [[16, 16]]
    made = [node for node in program.nodes() if node.target in (aten.cat.default, aten.linear.default)]
    assert made and all(node.meta["recompute"].name == "MUST_RECOMPUTE" for node in made)


def test_devices_without_known_tiles_are_left_alone() -> None:
    assert reasons(Siblings(attention), step=PackLinears()) == ["nothing is known of how products fill cpu"]


# --- what it gains --------------------------------------------------------------------------------


def times() -> ProductTimes:
    model = host().cost_model("roofline")
    return ProductTimes(model.build(host().device("h200")))


def pack(rows: int, depth: int, *columns: int, trained: bool = True, **options: object) -> Pack:
    bf16 = torch.bfloat16
    made = Pack(
        rows,
        depth,
        columns,
        (False,) * len(columns),
        (False,) * len(columns),
        bf16,
        bf16,
        False,
        trained,
        trained,
        fused=True,
    )
    return replace(made, **options)  # type: ignore[arg-type]


def test_a_product_takes_whole_waves_of_tiles() -> None:
    product = times().product
    # 16 x 8 tiles of 128 x 256 are one wave of 132; a row of tiles more begins another.
    assert product(2048, 2048, 65536, torch.bfloat16) == pytest.approx(
        product(1984, 2048, 65536, torch.bfloat16), rel=0.01
    )
    # What fills the device takes what the cost model says.
    assert product(8192, 8192, 8192, torch.bfloat16) == pytest.approx(2 * 8192**3 / 790e12, rel=0.01)
    # 24 x 11 tiles of 128 x 192 are two waves; of 128 x 256 one and a half, which takes as long.
    assert product(3072, 2048, 8192, torch.bfloat16) < 1.55 * product(2048, 2048, 8192, torch.bfloat16)
    assert product(4224, 2048, 8192, torch.bfloat16) < 2.1 * product(2048, 2048, 8192, torch.bfloat16)
    # Small results are cut along the depth: a quarter of the tiles, more than a quarter of the time.
    small, large = (product(n, 2048, 8192, torch.bfloat16) for n in (512, 2048))
    assert 0.25 * large < small < 0.5 * large
    assert product(0, 2048, 8192, torch.bfloat16) == times().device.launch_seconds


def test_packs_gain_by_what_they_read_and_write_less() -> None:
    delta = times().delta
    attention_of_llama = pack(8192, 2048, 2048, 512, 512)
    assert delta(attention_of_llama).seconds < 0
    assert delta(attention_of_llama).peak_bytes == 3072 * 2048 * 2
    # Large weights cost more to lay side by side than one gradient of the input less gains ...
    assert delta(pack(8192, 2048, 8192, 8192)).seconds > 0
    # ... unless autocast writes rounded copies of them anyway, which wait for the backward in any case.
    rounded = delta(pack(8192, 2048, 8192, 8192, stored=torch.float32))
    assert rounded.seconds < 0 and rounded.peak_bytes == 0
    # Few rows read the weights alone, and would read them three times.
    assert delta(pack(1, 4096, 4096, 1024, 1024, trained=False)).seconds > 0
    # Without gradients nothing is summed.
    assert (
        delta(pack(8192, 2048, 512, 512, trained=False)).seconds > delta(pack(8192, 2048, 512, 512)).seconds
    )
    # A result that waits for the backward holds the others, unless it is so small that copying it costs less.
    held = delta(pack(8192, 2048, 2048, 512, 512, waits=(True, False, False)))
    assert held.peak_bytes - delta(attention_of_llama).peak_bytes == 8192 * 1024 * 2
    assert held.seconds == delta(attention_of_llama).seconds
    out = delta(pack(8192, 2048, 2048, 512, 512, waits=(False, False, True)))
    assert out.peak_bytes == delta(attention_of_llama).peak_bytes
    copying = 2 * 8192 * 512 * 2 / times().device.copy_bytes_per_second + times().device.launch_seconds
    assert out.seconds - delta(attention_of_llama).seconds == pytest.approx(copying)
    # A gradient that a library writes has to be copied.
    assert (
        delta(pack(8192, 2048, 512, 512, copied=(False, True))).seconds
        > delta(pack(8192, 2048, 512, 512)).seconds
    )


@pytest.mark.parametrize(
    ("forward", "expected"),
    [(attention, [True] * 3), (rotated, [False, False, True]), (gated, [True, True, False])],
)
def test_what_the_backward_needs_waits(forward: Forward, expected: list[bool]) -> None:
    """Fused attention keeps what it reads; a rotation, a sum or a slice keeps nothing."""
    (program,) = semantic_programs(Siblings(forward), (X,))
    line = line_of(program.graph)
    layers = list(program.nodes(aten.linear.default))[:3]
    assert [waits(layer, line, trained_values(line)) for layer in layers] == expected
    assert not any(waits(layer, line, frozenset()) for layer in layers)


def test_wide_layers_are_left_out_of_a_pack_that_gains_without_them() -> None:
    def three(m: Siblings, x: Tensor) -> Tensor:
        x = x.tanh()
        return m.q(x).mean() + (m.k(x) * m.v(x)).mean()

    model = Siblings(three)
    model.q = nn.Linear(WIDTH, 2**19, bias=False)
    cost = host().cost_model("roofline").build(host().device("h200"))
    (program,) = semantic_programs(model, (X,))
    found = list(PackLinears().propose(program, PassContext(cost, "train", "inductor")))
    assert [candidate.nodes for candidate in found] == [("linear_1", "linear_2")]  # type: ignore[union-attr]


def test_what_does_not_gain_is_declined() -> None:
    model = Siblings(lambda m, x: (m.k(x) * m.v(x)).mean())
    model.k, model.v = (nn.Linear(2048, 2048) for _ in range(2))
    with torch.no_grad():
        fast = graphopt.optimize(model.eval(), (torch.randn(1, 2048),), pipeline=[EVERYWHERE], emit="eager")
        fast(torch.randn(1, 2048))
    assert any("no predicted gain: changes the step by" in declined.why for declined in fast.report.declined)
