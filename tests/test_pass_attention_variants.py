"""fuse-attention and window-attention: what goes to graphopt's own attention, and why the rest does not."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import graphopt
from graphopt.candidate import Candidate, NearMiss
from graphopt.capture.aliasing import alias_map
from graphopt.capture.semantic import semantic_program
from graphopt.passes import Pass
from graphopt.program import InputSpec, Level, Program
from graphopt.testing import check_pass, semantic_programs
from graphopt_passes.causal_attention import CausalAttention
from graphopt_passes.functionalize import Functionalize
from graphopt_passes.fuse_attention import FuseAttention
from graphopt_passes.mask_proof import band
from graphopt_passes.normalize import Normalize
from graphopt_passes.window_attention import WindowAttention
from tests.programs import context, host, semantic
from tests.semantic import capture
from tests.steps import run_step

HEADS, LENGTH, WIDTH = 4, 12, 8
Q, K, V = (torch.randn(2, HEADS, LENGTH, WIDTH) for _ in range(3))
FUSE, WINDOW = FuseAttention(everywhere=True), WindowAttention(everywhere=True)
LIBRARY = torch.ops.aten.scaled_dot_product_attention.default
Function = Callable[..., Tensor]


def captured(function: Function, *inputs: Tensor) -> tuple[Program, Sequence[Tensor]]:
    """The program of a function, and its inputs in the order that it takes them in."""
    (found,) = capture(function, *inputs)
    places = [node for node in found.gm.graph.nodes if node.op == "placeholder"]
    return semantic_program("g0", found.gm, [InputSpec(node.name, "input") for node in places]), found.inputs


def apply(step: Pass, program: Program) -> None:
    with program.edit(step.name) as edit:
        for item in step.propose(program, context()):
            if isinstance(item, Candidate):
                assert item.exactness == "reassociated" and item.delta.seconds < 0
                item.apply(edit)


def calls(program: Program) -> list[list[Any]]:
    """Bias, scale, cap, left and right of each call of graphopt's attention."""
    return [
        list(node.args[3:]) for node in program.nodes() if str(node.target) == "graphopt.attention.default"
    ]


def refusals(step: Pass, function: Function, *inputs: Tensor) -> list[str]:
    program = semantic(function, *(inputs or (Q, K, V)))
    before = program.fingerprint
    found = list(step.propose(program, context()))
    assert not any(isinstance(item, Candidate) for item in found)
    assert program.fingerprint == before
    return [item.reason.text for item in found if isinstance(item, NearMiss)]


# --- caps ---------------------------------------------------------------------------------------


def capped(change: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor] = lambda s: s) -> Function:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(after(change(q @ k.mT)), -1) @ v

    return run


def hidden(like: Tensor) -> Tensor:
    return torch.ones(LENGTH, LENGTH, device=like.device).triu(1) == 1


CAPS: dict[str, tuple[Function, tuple[float, float]]] = {
    "gemma": (capped(lambda s: torch.tanh(s * 0.5 / 3.0) * 3.0), (0.5, 3.0)),
    "divided": (capped(lambda s: 3.0 * torch.tanh(s / 2.0 / 3.0)), (0.5, 3.0)),
    "in one": (capped(lambda s: torch.tanh(s / 6.0) * 3.0), (0.5, 3.0)),
    "in one product": (capped(lambda s: 3.0 * torch.tanh(s * 0.25)), (0.75, 3.0)),
    "unscaled": (capped(lambda s: torch.tanh(s) * 2.0), (2.0, 2.0)),
    "constant": (capped(lambda s: torch.tanh(s / torch.full([], 6.0)) * 3.0), (0.5, 3.0)),
    "float32 inside": (capped(lambda s: 3.0 * torch.tanh(s.float() / 6.0)), (0.5, 3.0)),
}
MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda s: s,
    "masked_fill": lambda s: s.masked_fill(hidden(s), float("-inf")),
    "where": lambda s: torch.where(~hidden(s), s, -1e9),
    "added": lambda s: s + torch.full((LENGTH, LENGTH), torch.finfo(torch.float32).min).triu(1),
}


@pytest.mark.parametrize("form", CAPS)
def test_caps_are_told_however_they_are_written(form: str) -> None:
    function, (scale, cap) = CAPS[form]
    program, inputs = captured(function, Q, K, V)
    apply(FUSE, program)
    ((_, *found, left, right),) = calls(program)
    assert found == pytest.approx([scale, cap]) and left is None and right is None
    assert "aten.tanh" not in str(program.graph)
    (result,) = program.gm(*inputs)
    torch.testing.assert_close(result, function(Q, K, V), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("mask", MASKS)
def test_caps_come_with_any_mask(mask: str) -> None:
    function = capped(lambda s: torch.tanh(s / 6.0) * 3.0, MASKS[mask])
    program, inputs = captured(function, Q, K, V)
    apply(FUSE, program)
    ((bias, *_),) = calls(program)
    assert (bias is None) == (mask == "none")
    (result,) = program.gm(*inputs)
    expected = function(Q, K, V)
    torch.testing.assert_close(result, expected, rtol=2e-5, atol=2e-6)
    if mask != "none":
        # What hides is the triangle, and is told so.
        apply(WINDOW, program)
        ((bias, _, _, left, right),) = calls(program)
        assert (bias, left, right) == (None, None, 0)
        torch.testing.assert_close(program.gm(*inputs)[0], expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("low", [torch.finfo(torch.float32).min, float("-inf")])
def test_rows_that_a_mask_of_the_caller_may_hide_stay_as_they_are(low: float) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return torch.softmax((torch.tanh(q @ k.mT / 6.0) * 3.0).masked_fill(mask, low), -1) @ v

    mask = torch.zeros(2, 1, 1, LENGTH, dtype=torch.bool)
    (text,) = refusals(FUSE, run, Q, K, V, mask)
    assert text.startswith(
        "a row may be hidden whole, which is zero when fused: the mask depends on an input"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_a_finite_number_hides_stay_even(dtype: torch.dtype) -> None:
    """As models add it: the second of the batch sees nothing at all."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH, dtype=dtype)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
            bias = torch.where(mask, torch.finfo(x.dtype).min, torch.zeros((), dtype=x.dtype))
            return torch.softmax(torch.tanh(q @ k.mT / 6.0) * 3.0 + bias, -1) @ v

    torch.manual_seed(0)
    plain, x = Padded(), torch.randn(2, LENGTH, WIDTH).to(dtype)
    mask = torch.zeros(2, 1, 1, LENGTH, dtype=torch.bool)
    mask[0, ..., 9:], mask[1] = True, True
    (program,) = semantic_programs(plain, (x, mask), [FUSE])
    assert len(calls(program)) == 1
    torch._dynamo.reset()
    fast = graphopt.optimize(
        copy.deepcopy(plain), (x, mask), emit="eager", on_error="raise", pipeline=[Normalize(), FUSE]
    )
    near = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype]
    grad = torch.randn(2, 2, LENGTH, WIDTH // 2).to(dtype)
    found, expected = fast(x, mask), plain(x, mask)
    close = 1e-5 if dtype is torch.float32 else near
    torch.testing.assert_close(found, expected, rtol=close, atol=close)
    ours = torch.autograd.grad(found, list(fast.parameters()), grad)
    theirs = torch.autograd.grad(expected, list(plain.parameters()), grad)
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).norm()) <= near * float(b.norm())


def test_three_dimensions_work() -> None:
    flat = [x.flatten(0, 1) for x in (Q, K, V)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.tanh(torch.bmm(q, k.transpose(1, 2)) / 6.0) * 3.0
        return torch.bmm(torch.softmax(scores + torch.arange(LENGTH) / 7, -1), v)

    assert refusals(FUSE, run, *flat) == ["what is added to the scores is no mask"]

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.tanh(torch.bmm(q, k.transpose(1, 2)) / 6.0) * 3.0
        return torch.bmm(torch.softmax(scores + torch.full((1, LENGTH, LENGTH), -9.0).triu(1), -1), v)

    program, inputs = captured(masked, *flat)
    apply(FUSE, program)
    assert len(calls(program)) == 1
    torch.testing.assert_close(program.gm(*inputs)[0], masked(*flat), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (capped(lambda s: torch.tanh(s / -6.0) * -3.0), "the cap of the scores is below zero"),
        (capped(lambda s: torch.tanh(s / -6.0) * 3.0), "the scale of the scores is below zero"),
        (
            lambda q, k, v: torch.softmax(torch.tanh(q @ k.mT / 6.0) * v[0, 0, 0, 0], -1) @ v,
            "the cap of the scores is not a known number",
        ),
        (
            lambda q, k, v: nn.functional.dropout(torch.softmax(torch.tanh(q @ k.mT) * 2, -1), 0.1) @ v,
            "dropout of weights: a fused kernel draws other random numbers",
        ),
        (lambda q, k, v: torch.softmax(torch.tanh(q @ k.mT) * 2, -2) @ v, "softmax is not over the keys"),
    ],
)  # fmt: skip
def test_what_is_no_cap(function: Function, reason: str) -> None:
    assert refusals(FUSE, function) == [reason]


def test_devices_and_widths_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    function = CAPS["gemma"][0]
    assert refusals(FuseAttention(), function) == ["no kernel runs on cpu, where the operator gains nothing"]
    wide = [torch.randn(1, 1, 4, 130) for _ in range(3)]
    assert refusals(FUSE, function, *wide) == ["heads of 130 elements do not fit the registers of a program"]
    monkeypatch.setattr(type(host()), "kernels", lambda self: {})
    assert refusals(FUSE, function) == ["the kernel attention is not installed"]


# --- trained biases -----------------------------------------------------------------------------


class Biased(nn.Module):
    """Relative positions that are trained, and a triangle."""

    def __init__(self, *, causal: bool = False, trained: bool = True) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)
        self.near = nn.Embedding(2 * LENGTH, HEADS)
        self.near.requires_grad_(trained)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
        place = torch.arange(x.shape[1])
        bias = self.near(place[None, :] - place[:, None] + LENGTH).permute(2, 0, 1)[None]
        scores = q @ k.mT + bias
        if self.causal:
            scores = scores + torch.full((x.shape[1],) * 2, torch.finfo(x.dtype).min).triu(1)
        return (torch.softmax(scores, -1) @ v).square().mean()


X = torch.randn(2, LENGTH, HEADS * WIDTH)


@pytest.mark.parametrize("causal", [False, True])
def test_trained_biases_keep_their_gradient(causal: bool) -> None:
    model = Biased(causal=causal)
    check_pass(FUSE, model, (X,))
    (program,) = semantic_programs(model, (X,), [FUSE, WINDOW])
    ((bias, scale, cap, left, right),) = calls(program)
    assert (scale, cap, left, right) == (1.0, 0.0, None, 0 if causal else None)
    assert bias.meta["val"].shape == (1, HEADS, LENGTH, LENGTH)


def test_trained_biases_stay_where_no_kernel_takes_them() -> None:
    for model, reason in (
        (Biased(), "the bias is trained, and no fused kernel of a CPU gives its gradient"),
        (Biased(causal=True), "the bias is trained, and no fused kernel of a CPU gives its gradient"),
    ):
        checked = check_pass(FuseAttention(), model, (X,))
        assert [miss.reason.text for miss in checked.near_misses] == [reason]


def test_biases_that_are_not_trained_stay_with_libraries() -> None:
    (program,) = semantic_programs(Biased(causal=True, trained=False), (X,), [FUSE])
    assert calls(program) == [] and len(list(program.nodes(LIBRARY))) == 1


# --- windows ------------------------------------------------------------------------------------


def positions(q: Tensor) -> tuple[Tensor, Tensor]:
    place = torch.arange(q.shape[2], device=q.device)
    return place[:, None], place[None, :]


def near(q: Tensor) -> Tensor:
    row, column = positions(q)
    return (column <= row) & (column > row - 4)


def both_ways(q: Tensor) -> Tensor:
    row, column = positions(q)
    return (row - column).abs() <= 3


def blocks(q: Tensor) -> Tensor:
    row, column = positions(q)
    return row // 4 == column // 4


def attend(mask: Callable[[Tensor], Tensor], **options: Any) -> Function:
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, mask(q), **options)


def as_bias(mask: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda q: torch.where(mask(q), 0.0, torch.finfo(torch.float32).min)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (near, (3, 0)),
        (both_ways, (3, 3)),
        (as_bias(near), (3, 0)),
        (lambda q: near(q)[None, None].expand(q.shape[0], 1, -1, -1), (3, 0)),
        (lambda q: torch.full((LENGTH, LENGTH), float("-inf")).tril(-3), (2, None)),
    ],
)
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}], ids=str)
def test_masks_of_windows_are_told(
    mask: Callable[[Tensor], Tensor], expected: tuple[Any, Any], options: dict[str, Any]
) -> None:
    function = attend(mask, **options)
    program, inputs = captured(function, Q, K, V)
    apply(WINDOW, program)
    assert calls(program) == [[None, pytest.approx(options.get("scale", WIDTH**-0.5)), 0.0, *expected]]
    assert "arange" not in str(program.graph) and not list(program.nodes(LIBRARY))
    torch.testing.assert_close(program.gm(*inputs)[0], function(Q, K, V))


def test_heads_of_a_group_are_read_as_they_are() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for x in (k, v))
        return scaled_dot_product_attention(q, k, v, near(q))

    few = [x[:, :2].contiguous() for x in (K, V)]
    program, inputs = captured(run, Q, *few)
    apply(WINDOW, program)
    (call,) = [node for node in program.nodes() if str(node.target) == "graphopt.attention.default"]
    assert call.args[1].meta["val"].shape[1] == 2
    assert not list(program.nodes(torch.ops.aten.expand.default))
    torch.testing.assert_close(program.gm(*inputs)[0], run(Q, *few))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (attend(blocks), "the mask is constant but no window"),
        (attend(lambda q: torch.arange(8.0 + 4)[:, None] - torch.arange(12.0)), "the mask adds a bias"),
        (attend(lambda q: q[0, 0, :, :1] > q[0, 0, :, 1]), "the mask depends on an input"),
        (attend(lambda q: near(q)[:1]), "the mask is not a matrix of queries and keys"),
        (attend(lambda q: near(q) & (positions(q)[1] > 5)), "the mask is constant but no window"),
        (attend(lambda q: positions(q)[1] < positions(q)[0] - 2), "a row of the mask hides everything"),
        (attend(near, dropout_p=0.5), "dropout of weights: another kernel draws other random numbers"),
        (attend(near, scale=-0.5), "the scale of the scores is not a number above zero"),
        (attend(lambda q: positions(q)[1] <= positions(q)[0]), "libraries know this mask"),
        (
            lambda q, k, v: scaled_dot_product_attention(q.double(), k.double(), v.double(), near(q)),
            "no kernel takes float64 here",
        ),
        (
            lambda q, k, v: scaled_dot_product_attention(q, k[:1], v[:1], near(q)),
            "heads are broadcast",
        ),
        (
            lambda q, k, v: scaled_dot_product_attention(q[0], k[0], v[0], near(q)),
            "queries, keys and values are not batches of heads",
        ),
    ],
)
def test_other_masks_stay_with_a_reason(function: Function, reason: str) -> None:
    assert refusals(WINDOW, function) == [reason]


def test_windows_that_hide_little_stay_with_libraries() -> None:
    def wide(query: torch.Tensor) -> torch.Tensor:
        rows, columns = positions(query)
        return (rows - columns).abs() < 9

    (reason,) = refusals(WindowAttention(), attend(wide))
    assert reason.endswith("% of the scores are seen: the others are too few")


def test_windows_stay_masks_where_no_kernel_takes_them() -> None:
    assert refusals(WindowAttention(), attend(near)) == [
        "no kernel runs on cpu, where the operator gains nothing"
    ]


def test_a_call_without_a_mask_is_left_alone() -> None:
    assert refusals(WINDOW, lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True)) == []


def test_the_pass_keeps_what_every_pass_must_keep() -> None:
    class Windowed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
            return scaled_dot_product_attention(q, k, v, near(q)).square().mean()

    check_pass(WINDOW, Windowed(), (torch.randn(2, LENGTH, WIDTH),))


LONG = 2**17


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (lambda row, column: (column <= row) & (column > row - 1000), (999, 0)),
        (lambda row, column: (row >= column) & (row - 1000 < column), (999, 0)),
        (lambda row, column: column >= row - 5, (5, None)),
        (lambda row, column: column - 7 < row, (None, 6)),
    ],
)
def test_windows_of_any_length_are_known_by_their_positions(
    mask: Callable[[Tensor, Tensor], Tensor], expected: tuple[Any, Any]
) -> None:
    """The mask has 2^34 elements, and is never made."""
    query = torch.empty(1, 1, LONG, 4, device="meta")
    program = semantic(lambda q: scaled_dot_product_attention(q, q, q, mask(*positions(q))), query)
    apply(WINDOW, program)
    ((*_, left, right),) = calls(program)
    assert (left, right) == expected


@pytest.mark.parametrize("seed", range(60))
def test_what_is_proven_of_a_band_is_so(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def vector() -> list[int]:
        size, step = (int(torch.randint(1, n, (1,), generator=generator)) for n in (7, 3))
        start = int(torch.randint(-3, 4, (1,), generator=generator))
        found = torch.arange(size) * step + start
        return (found if torch.rand((), generator=generator) < 0.8 else found.flip(0)).tolist()  # type: ignore[no-any-return]

    keys, queries = vector(), vector()
    compare = (torch.le, torch.lt, torch.ge, torch.gt)[seed % 4]

    def masked() -> Tensor:
        return compare(torch.tensor(keys)[None, :], torch.tensor(queries)[:, None])

    (program,) = [semantic(lambda x: x + masked(), torch.zeros(len(queries), len(keys)))]
    (node,) = [n for n in program.nodes() if n.meta["val"].dtype is torch.bool]
    found = band(node, alias_map(program.graph))
    distance = torch.arange(len(keys))[None, :] - torch.arange(len(queries))[:, None]
    true = masked()
    if found is not None:
        left, right = found
        within = torch.ones_like(true)
        within &= distance >= (-left if left is not None else -99)
        within &= distance <= (right if right is not None else 99)
        assert torch.equal(true, within)
    elif keys == list(range(len(keys))) and queries == list(range(len(queries))):
        assert not (true.any(0) & ~true.all(0)).any(), "one step each: a band"


# --- models -------------------------------------------------------------------------------------


def models() -> dict[str, Callable[[], nn.Module]]:
    shared: dict[str, Any] = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 64, "vocab_size": 128, "use_cache": False,
    }  # fmt: skip

    def gemma() -> nn.Module:
        from transformers import Gemma2Config, Gemma2ForCausalLM

        return Gemma2ForCausalLM(
            Gemma2Config(
                head_dim=16, sliding_window=8, query_pre_attn_scalar=16, attn_logit_softcapping=2.0,
                attn_implementation="eager", **shared,
            )
        )  # fmt: skip

    def mistral(attention: str) -> nn.Module:
        from transformers import MistralConfig, MistralForCausalLM

        return MistralForCausalLM(MistralConfig(sliding_window=8, attn_implementation=attention, **shared))

    def t5() -> nn.Module:
        from transformers import T5Config, T5ForConditionalGeneration

        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=128, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4, dropout_rate=0.0,
                use_cache=False, attn_implementation="eager", decoder_start_token_id=0, pad_token_id=0,
            )
        )  # fmt: skip

    return {
        "gemma2": gemma,
        "mistral eager": lambda: mistral("eager"),
        "mistral sdpa": lambda: mistral("sdpa"),
        "t5": t5,
    }


EXPECTED: dict[str, list[tuple[bool, int | None, int | None]]] = {
    "gemma2": [(False, 7, 0), (False, None, 0)],
    "mistral eager": [(False, 7, 0)] * 2,
    "mistral sdpa": [(False, 7, 0)] * 2,
    "t5": [(True, None, None), (True, None, 0)],
}
"""Whether each call has a bias, and what it sees to the left and to the right."""


@pytest.mark.parametrize("name", EXPECTED)
def test_models_as_transformers_writes_them(name: str) -> None:
    torch.manual_seed(0)
    plain = models()[name]()
    ids = torch.randint(0, 128, (2, 24))
    inputs: Any = {"input_ids": ids, "labels": ids}
    expected = run_step(copy.deepcopy(plain), inputs)
    torch._dynamo.reset()
    steps = [Normalize(), Functionalize(), FUSE, CausalAttention(), WINDOW]
    fast = graphopt.optimize(copy.deepcopy(plain), inputs, emit="eager", on_error="raise", pipeline=steps)
    found = run_step(fast, inputs)
    programs = [program for program in fast.programs if program.level is Level.SEMANTIC]
    seen = [(bias is not None, left, right) for p in programs for bias, _, _, left, right in calls(p)]
    assert seen == EXPECTED[name]
    torch.testing.assert_close(found.outputs[0], expected.outputs[0], rtol=1e-5, atol=1e-6)
    for key, gradient in expected.gradients.items():
        if gradient is None:
            continue
        other = found.gradients[key]
        assert other is not None
        scale = max(float(gradient.abs().max()), 1e-6)
        assert float((other - gradient).abs().max()) <= 2e-5 * scale, key
    assert math.isfinite(float(found.outputs[0]))
