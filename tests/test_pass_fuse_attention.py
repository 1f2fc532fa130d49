"""fuse-attention: which forms it recognises, that they compute the same, and why it leaves others alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.candidate import Candidate, NearMiss
from graphopt.capture.semantic import semantic_program
from graphopt.program import InputSpec, Level, Program
from graphopt.testing import check_pass
from graphopt_passes.fuse_attention import FuseAttention
from tests.programs import context, semantic
from tests.semantic import capture
from tests.steps import run_step

HEADS, LENGTH, WIDTH = 3, 12, 8
Q, K, V = (torch.randn(2, HEADS, LENGTH, WIDTH) for _ in range(3))
CAUSAL = torch.ones(LENGTH, LENGTH).tril()

Scores = Callable[[Tensor], Tensor]


def attend(change: Scores = lambda s: s, *, drop: float = 0.0) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(change(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])), -1)
        return nn.functional.dropout(weights, drop, training=drop > 0) @ v

    return run


def hidden(like: Tensor) -> Tensor:
    return torch.ones(LENGTH, LENGTH, device=like.device).tril() == 0


def every_form() -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    low = torch.finfo(torch.float32).min
    flat = tuple(x.flatten(0, 1) for x in (Q, K, V))
    padding = torch.zeros(2, 1, 1, LENGTH, dtype=torch.bool)
    padding[1, ..., 9:] = True
    everything = torch.ones(2, 1, 1, LENGTH, dtype=torch.bool)

    def scaled_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax((q * 0.3) @ k.mT, -1) @ v

    def permuted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(torch.matmul(q, k.permute(0, 1, 3, 2)) * 0.3, dim=3) @ v

    def batched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.bmm(q, k.transpose(1, 2)) * 0.3
        return torch.bmm(torch.softmax(scores.masked_fill(hidden(q), float("-inf")), -1), v)

    def scale_of_the_program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT / torch.full([], 2.5), -1) @ v

    def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = torch.arange(LENGTH, dtype=torch.float32)[None] - torch.arange(LENGTH)[:, None]
        return torch.softmax(q @ k.mT * 0.3 + bias.abs().neg(), -1) @ v

    def padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return torch.softmax((q @ k.mT).masked_fill(mask, low), -1) @ v

    return {
        "plain": (attend(), (Q, K, V)),
        "scaled before": (scaled_first, (Q, K, V)),
        "permuted keys": (permuted, (Q, K, V)),
        "three dimensions": (batched, flat),
        "scale made by the program": (scale_of_the_program, (Q, K, V)),
        "masked_fill with -inf": (attend(lambda s: s.masked_fill(hidden(s), float("-inf"))), (Q, K, V)),
        "masked_fill with -1e9": (attend(lambda s: s.masked_fill(hidden(s), -1e9)), (Q, K, V)),
        "where": (attend(lambda s: torch.where(~hidden(s), s, float("-inf"))), (Q, K, V)),
        "causal bias": (attend(lambda s: s + torch.full((LENGTH, LENGTH), float("-inf")).triu(1)), (Q, K, V)),
        "relative bias": (biased, (Q, K, V)),
        "padding": (padded, (Q, K, V, padding)),
        "rows that see nothing": (padded, (Q, K, V, everything)),
    }


FORMS = every_form()


def fused(program: Program) -> int:
    found = list(FuseAttention().propose(program, context()))
    with program.edit("fuse-attention") as edit:
        for item in found:
            if isinstance(item, Candidate):
                assert item.exactness == "reassociated" and item.delta.seconds < 0
                item.apply(edit)
    return len(list(program.nodes(torch.ops.aten.scaled_dot_product_attention.default)))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_one_call_that_computes_the_same(form: str) -> None:
    function, inputs = FORMS[form]
    (captured,) = capture(function, *inputs)
    places = [node for node in captured.gm.graph.nodes if node.op == "placeholder"]
    program = semantic_program("g0", captured.gm, [InputSpec(node.name, "input") for node in places])
    assert fused(program) == 1
    left = {str(node.target) for node in program.nodes()}
    assert not left & {"aten.softmax.int", "aten.matmul.default", "aten.bmm.default", "aten.dropout.default"}
    (found,) = program.gm(*captured.inputs)
    expected = function(*(x.double() if x.is_floating_point() else x for x in inputs))
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-6)


def refusal(function: Callable[..., Tensor], *inputs: Tensor) -> str:
    program = semantic(function, *(inputs or (Q, K, V)))
    before = program.fingerprint
    found = list(FuseAttention().propose(program, context()))
    assert not any(isinstance(item, Candidate) for item in found)
    assert program.fingerprint == before
    (missed,) = [item for item in found if isinstance(item, NearMiss)]
    return missed.reason.text


def test_dropout_draws_other_numbers() -> None:
    assert refusal(attend(drop=0.1)) == "dropout of weights: a fused kernel draws other random numbers"


def test_weights_that_are_returned_are_needed() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(q @ k.mT, -1)
        return weights @ v, weights

    program = semantic(run, Q, K, V)
    (missed,) = FuseAttention().propose(program, context())
    assert isinstance(missed, NearMiss)
    assert missed.reason.text == "the value of aten.softmax.int is an output of the program as well"


def test_rows_that_may_see_nothing_stay_as_they_are() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return torch.softmax((q @ k.mT).masked_fill(mask, float("-inf")), -1) @ v

    mask = torch.zeros(2, 1, 1, LENGTH, dtype=torch.bool)
    text = refusal(run, Q, K, V, mask)
    why = "a row may be hidden whole, which is zero when fused"
    assert text.startswith(f"{why}: the mask depends on an input")

    def all_hidden(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax((q @ k.mT).masked_fill(hidden(q) | True, float("-inf")), -1) @ v

    assert "a row of the mask hides everything" in refusal(all_hidden)


def test_masks_of_which_nothing_is_known() -> None:
    def added(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT + mask, -1) @ v

    mask = torch.zeros(LENGTH, LENGTH)
    assert refusal(added, Q, K, V, mask) == "the mask comes from an input, which may hide a whole row"
    wide = refusal(added, Q.bfloat16(), K.bfloat16(), V.bfloat16(), mask.bfloat16().expand(2, 1, -1, -1))
    assert wide == "the mask comes from an input, which may hide a whole row"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.masked_fill(hidden(s), -5.0), "hidden scores are set to -5, which may still count"),
        (lambda s: torch.tanh(s / 30) * 30, "no kernel runs on cpu, where the operator gains nothing"),
        (lambda s: s.to(torch.float16).float(), None),
        (lambda s: torch.softmax(s, 1), None),
    ],
)
def test_what_is_not_attention(change: Scores, reason: str | None) -> None:
    text = refusal(attend(change))
    assert text == reason or (reason is None and text.startswith(("expected ", "scores are rounded")))


def test_other_axes_and_dtypes() -> None:
    assert refusal(lambda q, k, v: torch.softmax(q @ k.mT, -2) @ v) == "softmax is not over the keys"
    wide = refusal(lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v, Q.double(), K.double(), V.double())
    assert wide == "no kernel takes float64 here"
    shared = refusal(lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v, Q, K[:, :1], V[:, :1])
    assert shared == "heads are broadcast in the products"
    narrow = refusal(lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v, Q, K, V[..., :4].contiguous())
    assert narrow == "keys and values are of other widths"


def test_products_that_are_no_attention_say_nothing() -> None:
    assert list(FuseAttention().propose(semantic(lambda q, k: q @ k.mT, Q, K), context())) == []


class Attention(nn.Module):
    """As many models write it: one product for queries, keys and values, a triangle of ones."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = split.unbind(0)
        scores = q @ k.transpose(-2, -1) * (1.0 / math.sqrt(k.size(-1)))
        mask = torch.tril(torch.ones(length, length, device=x.device)).view(1, 1, length, length)
        weights = torch.softmax(scores.masked_fill(mask == 0, float("-inf")), dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, width)).square().mean()


def test_the_pass_keeps_what_every_pass_must_keep() -> None:
    check_pass(FuseAttention(), Attention(), (torch.randn(2, 16, 32),))


def test_gradients_are_as_close_to_float64_as_before_and_the_scores_are_gone() -> None:
    torch.manual_seed(0)
    plain, x = Attention(), torch.randn(4, 128, 32)
    exact = run_step(copy.deepcopy(plain).double(), (x.double(),))
    eager = run_step(copy.deepcopy(plain), (x,))
    torch._dynamo.reset()
    model = copy.deepcopy(plain)
    whole = graphopt.optimize(model, (x,), emit="eager", on_error="raise", pipeline=["normalize"])
    torch._dynamo.reset()
    fast = graphopt.optimize(copy.deepcopy(plain), (x,), emit="eager", on_error="raise")
    found = run_step(fast, (x,))
    for name, gradient in exact.gradients.items():
        if gradient is None:
            continue
        before, after = eager.gradients[name], found.gradients[name]
        assert before is not None and after is not None
        reached = (after.double() - gradient).norm() / gradient.norm()
        limit = 3 * (before.double() - gradient).norm() / gradient.norm() + 1e-7
        assert reached <= limit, name
    # Scores are 4 * 4 * 128 * 128 * 4 bytes: one MiB, held at least once for the backward.
    assert fast.report.predicted.peak_bytes < whole.report.predicted.peak_bytes - 2**20
    semantic_program = next(p for p in fast.programs if p.level is Level.SEMANTIC)
    (call,) = semantic_program.nodes(torch.ops.aten.scaled_dot_product_attention.default)
    assert call.args[3:6] == (None, 0.0, True), "causal-attention goes on from here"


def test_models_that_write_attention_out() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, vocab_size=128, use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    ids = torch.randint(0, 128, (2, 16))
    torch.manual_seed(0)
    plain = LlamaForCausalLM(config)
    inputs: Any = {"input_ids": ids, "labels": ids}
    expected = run_step(copy.deepcopy(plain), inputs)
    torch._dynamo.reset()
    fast = graphopt.optimize(plain, inputs, emit="eager", on_error="raise")
    record = next(item for item in fast.report.steps if item.id == "fuse-attention")
    assert record.status == "applied"
    torch.testing.assert_close(run_step(fast, inputs).outputs[0], expected.outputs[0], rtol=1e-5, atol=1e-6)
