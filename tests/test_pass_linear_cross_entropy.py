"""linear-cross-entropy: what it finds in real models, what it offers, and why it says no."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import graphopt
from graphopt._torch import quiet_capture
from graphopt.candidate import Candidate, NearMiss
from graphopt.capture.semantic import semantic_program
from graphopt.measure import allocator_peak
from graphopt.passes import Proposal
from graphopt.plugins import PluginHost
from graphopt.program import InputSpec, Level, Program, Signature
from graphopt_passes import linear_cross_entropy as module
from graphopt_passes.linear_cross_entropy import LinearCrossEntropy
from tests.programs import context
from tests.semantic import capture

PASS = LinearCrossEntropy(chunks=(2, 3), blocks=(20,), least_rows=4)
CUTS = {"forward": 3, "recompute": 3, "forward-blocks": 20, "blocks": 20}
VOCABULARY = 61
ops = torch.ops.graphopt


def captured(
    function: Callable[..., Any], *args: Any, dynamic: bool | None = None
) -> tuple[Program, list[Any]]:
    with quiet_capture():
        (graph,) = capture(function, *args, dynamic=dynamic)
    places = [node for node in graph.gm.graph.nodes if node.op == "placeholder"]
    specs = [InputSpec(node.name, "input") for node in places]
    return semantic_program("g0", graph.gm, specs), graph.inputs


def offers(program: Program, mode: str = "train", step: LinearCrossEntropy = PASS) -> dict[str, Candidate]:
    found: list[Proposal] = list(step.propose(program, context(mode)))
    assert not [item for item in found if isinstance(item, NearMiss)]
    return {item.id: item for item in found if isinstance(item, Candidate)}


def refusal(program: Program, mode: str = "train", step: LinearCrossEntropy = PASS) -> NearMiss:
    (found,) = step.propose(program, context(mode))
    assert isinstance(found, NearMiss)
    return found


def run(program: Program, inputs: list[Any]) -> tuple[Any, list[Any]]:
    """Outputs, and gradients of what requires one."""
    torch.manual_seed(3)
    outputs = [t for t in torch.utils._pytree.tree_leaves(program.gm(*inputs)) if isinstance(t, torch.Tensor)]
    leaves = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    trained = [t for t in outputs if t.requires_grad]
    if not trained:
        return outputs, []
    return outputs, list(torch.autograd.grad([t.sum() for t in trained], leaves, allow_unused=True))


def rewritten(
    function: Callable[..., Any], *args: Any, mode: str, tolerance: float = 1e-5, dynamic: bool | None = None
) -> Program:
    """The program with its loss in three chunks or four blocks, its numbers compared with those of before."""
    program, inputs = captured(function, *args, dynamic=dynamic)
    before = run(program, inputs)
    candidate = next(c for id_, c in offers(program).items() if id_.endswith(f"/{mode}/{CUTS[mode]}"))
    with program.edit("linear-cross-entropy") as edit:
        candidate.apply(edit)
    found = run(program, inputs)
    torch.testing.assert_close(found, before, rtol=tolerance, atol=tolerance)
    targets = {str(node.target) for node in program.nodes()}
    gone = {"aten.cross_entropy_loss.default", "aten._log_softmax.default", "aten.logsumexp.default"}
    assert not targets & gone
    assert any("graphopt.linear_cross_entropy" in target for target in targets)
    return program


def fused(program: Program) -> Any:
    (node,) = [n for n in program.nodes() if str(n.target).startswith("graphopt.")]
    return node


# --- real models -------------------------------------------------------------------------------


class LossOnly(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_ids=tokens, labels=tokens).loss
        return loss


def transformer(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    decoder = {**small, "intermediate_size": 32, "num_key_value_heads": 2, "use_cache": False}
    makers: dict[str, Callable[[], nn.Module]] = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**decoder)),
        "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(head_dim=8, **decoder)),
        "granite": lambda: transformers.GraniteForCausalLM(
            transformers.GraniteConfig(logits_scaling=4.0, **decoder)
        ),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=16, use_cache=False,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
            )
        ),
        "bert": lambda: transformers.BertForMaskedLM(
            transformers.BertConfig(
                intermediate_size=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **small
            )
        ),
        "t5": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                dropout_rate=0.0, decoder_start_token_id=0, use_cache=False,
            )
        ),
    }  # fmt: skip
    return makers[name]().train()


def tokens() -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *itertools.product(("llama", "gemma2", "granite", "gpt2", "bert", "t5"), ("forward", "recompute")),
        ("gemma2", "blocks"),
        ("bert", "forward-blocks"),
    ],
)
def test_losses_of_transformers_are_found_and_keep_their_numbers(name: str, mode: str) -> None:
    program = rewritten(LossOnly(transformer(name)), tokens(), mode=mode)
    node = fused(program)
    assert node.args[4:8] == (CUTS[mode], "mean", -100, 0.0)
    scale, softcap = node.args[8:10]
    assert (scale, softcap) == {"gemma2": (1.0, 30.0), "granite": (0.25, 0.0)}.get(name, (1.0, 0.0))
    assert (node.args[2] is not None) == (name == "bert")


def test_a_step_in_bfloat16_computes_its_loss_in_float32() -> None:
    program = rewritten(LossOnly(transformer("llama").bfloat16()), tokens(), mode="recompute", tolerance=2e-2)
    assert [t.dtype for t in fused(program).meta["val"]] == [torch.float32, torch.float32]
    assert fused(program).args[0].meta["val"].dtype is torch.bfloat16


def test_the_logits_of_a_model_output_are_needed_whole() -> None:
    model = transformer("llama")
    program, _ = captured(lambda t: tuple(model(input_ids=t, labels=t).values()), tokens())
    found = refusal(program)
    assert found.reason.text == "the logits are an output of the program as well"
    assert found.rule == "linear-cross-entropy" and found.at == "cross_entropy_loss"
    assert (found.matched, found.total) == (2, 4)


# --- what it sees through ----------------------------------------------------------------------

X = torch.randn(2, 7, 8, requires_grad=True)
W = torch.randn(VOCABULARY, 8, requires_grad=True)
T = torch.randint(0, VOCABULARY, (2, 7))


def sliced(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    logits = F.linear(x, w)[:, :-1].contiguous().float()
    return F.cross_entropy(logits.view(-1, VOCABULARY), t[:, 1:].reshape(-1))


def classes_second(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(x, w).transpose(1, 2), t, label_smoothing=0.1)


def classes_permuted(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(x, w).permute(0, 2, 1), t, ignore_index=0)


def each_row(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    losses = F.cross_entropy(F.linear(x, w).transpose(1, 2), t, reduction="none")
    return losses * torch.arange(7.0)


def product(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((x @ w.t()).flatten(0, 1), t.flatten(), reduction="sum") / t.numel()


def turned(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((x @ w.reshape(8, VOCABULARY)).view(-1, VOCABULARY), t.view(-1))


def softcapped(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    logits = torch.tanh(F.linear(x, w) * 0.5 / 5.0) * 5.0
    return F.cross_entropy(logits.view(-1, VOCABULARY), t.view(-1))


def one_step(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(
        F.linear(x.transpose(0, 1).repeat(3, 1, 1), w)[:, 1, :], t.repeat(2, 2)[0, :14].repeat(2)[:21]
    )


def weights_of_classes(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(VOCABULARY, dtype=dtype) / VOCABULARY


def weighted_mean(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    logits = F.linear(x, w)[:, :-1].float()
    loss = F.cross_entropy(logits.transpose(1, 2), t[:, 1:], weights_of_classes(), ignore_index=3)
    return loss + 0.01 * logits.logsumexp(-1).square().mean()


def weighted_rows(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    losses = F.cross_entropy(F.linear(x, w).transpose(1, 2), t, weights_of_classes(), reduction="none")
    return losses * torch.arange(7.0)


def weighted_sum(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    logits = torch.tanh(F.linear(x, w) / 5.0).flatten(0, 1) * 5.0
    return F.cross_entropy(logits, t.flatten(), weights_of_classes(), reduction="sum", ignore_index=3)


@pytest.mark.parametrize("loss", [weighted_mean, weighted_rows, weighted_sum])
def test_weights_of_classes_multiply_losses_of_rows(loss: Callable[..., torch.Tensor]) -> None:
    for mode in ("recompute", "blocks"):
        program = rewritten(loss, X, W, T, mode=mode)
        assert fused(program).args[5] == "none"
    program, _ = captured(loss, X, W, T)
    assert {id_.split("/")[1] for id_ in offers(program)} == {"recompute", "blocks"}


def test_two_weighted_losses_and_none_that_counts() -> None:
    def ignored(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        logits = F.linear(x, w)
        return F.cross_entropy(logits.flatten(0, 1), t.flatten() * 0 - 100, weights_of_classes())

    def both(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return weighted_mean(x, w, t), ignored(x.detach(), w.detach(), t)

    program, inputs = captured(both, X, W, T)
    right, gradients = run(program, inputs)
    chosen = [c for id_, c in offers(program).items() if id_.endswith("/recompute/3")]
    with program.edit("linear-cross-entropy") as edit:
        for candidate in chosen:
            candidate.apply(edit)
    assert len(chosen) == 2
    found, of_inputs = run(program, inputs)
    torch.testing.assert_close(found, right, equal_nan=True)
    torch.testing.assert_close(of_inputs, gradients)
    assert found[1].isnan()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "loss", [sliced, classes_second, classes_permuted, product, turned, softcapped, one_step]
)
def test_forms_of_a_loss(loss: Callable[..., torch.Tensor], dynamic: bool) -> None:
    for mode in ("forward", "blocks") if dynamic else CUTS:
        rewritten(loss, X, W, T, mode=mode, dynamic=dynamic)


def test_losses_of_single_rows_are_computed_again_only() -> None:
    program, _ = captured(each_row, X, W, T)
    assert {id_.split("/")[1] for id_ in offers(program)} == {"recompute", "blocks"}
    assert tuple(fused(rewritten(each_row, X, W, T, mode="recompute")).meta["val"][0].shape) == (14,)


def test_float16_is_not_scaled_after_it_was_rounded() -> None:
    program, _ = captured(classes_second, X.detach().half().requires_grad_(), W.half(), T)
    assert {id_.split("/")[1] for id_ in offers(program)} == {"recompute", "blocks"}


def test_slices_of_the_logits_become_slices_of_the_input() -> None:
    node = fused(rewritten(sliced, X, W, T, mode="recompute"))
    assert tuple(node.args[0].meta["val"].shape) == (12, 8)


def test_autocast_casts_what_the_operator_reads() -> None:
    def loss(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return classes_second(x, w, t)

    node = fused(rewritten(loss, X, W, T, mode="forward", tolerance=1e-2))
    assert [node.args[i].meta["val"].dtype for i in (0, 1)] == [torch.bfloat16] * 2
    assert node.meta["val"][0].dtype is torch.float32


@pytest.mark.parametrize(
    ("x", "w", "mask"),
    [(X, W.detach(), [True, False, False]), (X.detach(), W, [False, True, False])],
    ids=["frozen-weight", "frozen-input"],
)
def test_gradients_that_nobody_needs_are_not_asked_for(
    x: torch.Tensor, w: torch.Tensor, mask: list[bool]
) -> None:
    node = fused(rewritten(classes_second, x, w, T, mode="forward"))
    assert list(node.args[-1]) == mask


def test_without_gradients_the_loss_alone_is_computed() -> None:
    with torch.no_grad():
        program, inputs = captured(classes_second, X, W, T)
    expected = program.gm(*inputs)
    found = offers(program, mode="infer")
    assert {id_.split("/")[1] for id_ in found} == {"recompute", "blocks"}
    with program.edit("linear-cross-entropy") as edit:
        next(iter(found.values())).apply(edit)
    torch.testing.assert_close(program.gm(*inputs), expected)


# --- log-sum-exps ------------------------------------------------------------------------------


def z_loss(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    logits = F.linear(x, w).float()
    loss = F.cross_entropy(logits.view(-1, VOCABULARY), t.view(-1), ignore_index=3)
    return loss + 0.01 * torch.logsumexp(logits, -1).square().mean()


def z_loss_first(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    logits = F.linear(x, w).view(-1, VOCABULARY)
    penalty = 0.01 * torch.logsumexp(logits, 1, keepdim=True).square().mean()
    return penalty + F.cross_entropy(logits, t.view(-1) * 1, label_smoothing=0.1)


def z_loss_of_rows(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    logits = torch.tanh(F.linear(x, w)[:, :-1] / 5.0) * 5.0
    sums = torch.logsumexp(logits, 2)
    losses = F.cross_entropy(logits.transpose(1, 2), t[:, 1:], reduction="none")
    return (losses + sums * sums * torch.arange(6.0)).sum()


def z_loss_of_columns(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    logits = F.linear(x, w).transpose(1, 2)
    sums = torch.logsumexp(logits, 1, keepdim=True)
    return F.cross_entropy(logits, t) + (sums.sum(2) ** 2).mean() + torch.logsumexp(logits, 1).amax()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("loss", [z_loss, z_loss_first, z_loss_of_rows, z_loss_of_columns])
def test_forms_of_a_z_loss(loss: Callable[..., torch.Tensor], dynamic: bool) -> None:
    assert {id_.split("/")[1] for id_ in offers(captured(loss, X, W, T)[0])} == {"recompute", "blocks"}
    for mode in ("recompute", "blocks"):
        rewritten(loss, X, W, T, mode=mode, dynamic=dynamic)


def test_log_sum_exps_of_bfloat16_logits_stay_bfloat16() -> None:
    def loss(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        logits = F.linear(x, w)
        return classes_last(logits.float(), t) + logits.logsumexp(-1).float().square().mean()

    x, w = X.detach().bfloat16().requires_grad_(), W.detach().bfloat16().requires_grad_()
    program = rewritten(loss, x, w, T, mode="blocks", tolerance=5e-2)
    casts = [node for node in program.nodes(torch.ops.aten.to.dtype) if node.args[1] is torch.bfloat16]
    assert len(casts) == 1


def test_a_z_loss_of_a_model_is_in_its_gradients() -> None:
    """Without it they would be others."""
    program, inputs = captured(z_loss, X, W, T)
    plain, plain_inputs = captured(lambda x, w, t: z_loss(x, w, t).detach() + sliced(x, w, t), X, W, T)
    assert not torch.allclose(run(program, inputs)[1][0], run(plain, plain_inputs)[1][0])


# --- what it offers ----------------------------------------------------------------------------


def test_each_number_of_chunks_and_each_mode_is_an_alternative() -> None:
    program, _ = captured(classes_second, X, W, T)
    found = offers(program)
    assert list(found) == [
        f"linear-cross-entropy@cross_entropy_loss/{mode}/{cuts}"
        for mode, offered in (
            ("forward", (2, 3)),
            ("recompute", (2, 3)),
            ("forward-blocks", (20,)),
            ("blocks", (20,)),
        )
        for cuts in offered
    ]
    for id_, candidate in found.items():
        assert candidate.alternative and candidate.exactness == "reassociated"
        assert set(candidate.conflicts) == set(found) - {id_}
        assert candidate.nodes[-1] == "cross_entropy_loss" and len(candidate.nodes) == 3
    assert list(offers(captured(classes_second, X, W, T)[0])) == list(found)


def test_more_chunks_leave_less_and_holding_gradients_takes_more() -> None:
    x, w = torch.randn(1, 64, 8, requires_grad=True), torch.randn(997, 8, requires_grad=True)
    program, _ = captured(classes_second, x, w, torch.zeros(1, 64, dtype=torch.int64))
    deltas = {
        tuple(id_.split("/")[1:]): candidate.delta
        for id_, candidate in offers(program, step=LinearCrossEntropy(chunks=(2, 4), least_rows=1)).items()
    }
    logits, gradients = 64 * 997 * 4, (64 * 8 + 997 * 8) * 4
    assert deltas["recompute", "2"].peak_bytes == logits // 2 - 3 * logits
    assert deltas["recompute", "4"].peak_bytes == logits // 4 - 3 * logits
    assert deltas["forward", "4"].peak_bytes == logits // 4 + gradients - 3 * logits


def test_a_block_is_offered_where_there_are_two_or_more() -> None:
    program, _ = captured(classes_second, X, W, T)
    step = LinearCrossEntropy(chunks=(2,), blocks=(30, 31), least_rows=4)
    assert [id_ for id_ in offers(program, step=step) if "blocks" in id_] == [
        f"linear-cross-entropy@cross_entropy_loss/{mode}/30" for mode in ("forward-blocks", "blocks")
    ]
    assert not any("blocks" in id_ for id_ in offers(program, step=LinearCrossEntropy(least_rows=4)))


def test_blocks_leave_a_block_and_holding_gradients_takes_more() -> None:
    x, w = torch.randn(1, 64, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    program, _ = captured(classes_second, x, w, torch.zeros(1, 64, dtype=torch.int64))
    step = LinearCrossEntropy(chunks=(2,), blocks=(100,), least_rows=1)
    deltas = {id_.split("/")[1]: candidate.delta for id_, candidate in offers(program, step=step).items()}
    logits, gradients = 64 * 1000 * 4, (64 * 8 + 1000 * 8) * 4
    assert deltas["blocks"].peak_bytes == logits // 10 - 3 * logits
    assert deltas["forward-blocks"].peak_bytes == logits // 10 + gradients - 3 * logits
    # Generated code multiplies in place what is held.
    found = list(step.propose(program, replace(context(), emit="inductor")))
    fused = {item.id.split("/")[1]: item.delta for item in found if isinstance(item, Candidate)}
    assert {mode: delta.peak_bytes for mode, delta in fused.items()} == {
        "forward": logits // 2 - logits,
        "recompute": logits // 2 - logits,
        "forward-blocks": logits // 10 - logits,
        "blocks": logits // 10 - logits,
    }


def test_recomputing_costs_a_product_more_where_arithmetic_counts() -> None:
    x, w = torch.randn(1, 512, 512, requires_grad=True), torch.randn(2048, 512, requires_grad=True)
    program, _ = captured(classes_second, x, w, torch.zeros(1, 512, dtype=torch.int64))
    ctx = context()
    (forward,) = [c for c in LinearCrossEntropy(chunks=(2,)).propose(program, ctx) if "/forward/" in c.id]
    (recompute,) = [c for c in LinearCrossEntropy(chunks=(2,)).propose(program, ctx) if "/recompute/" in c.id]
    linear = next(n for n in program.nodes() if n.name == "linear")
    more = recompute.delta.seconds - forward.delta.seconds
    assert 0.7 * ctx.cost.node(linear).seconds < more < 1.3 * ctx.cost.node(linear).seconds


def test_the_second_of_two_losses_is_named_apart() -> None:
    program, _ = captured(lambda x, w, t: classes_second(x, w, t) + sliced(x, w, t), X, W, T)
    assert {id_.split("/")[0] for id_ in offers(program)} == {
        "linear-cross-entropy@cross_entropy_loss",
        "linear-cross-entropy@cross_entropy_loss_1",
    }


# --- why it says no ----------------------------------------------------------------------------


def flat(logits: torch.Tensor) -> torch.Tensor:
    return logits.reshape(-1, VOCABULARY)


def clipped(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    logits = F.linear(x, w)
    return F.cross_entropy(flat(logits), t.view(-1)) + logits.square().mean()


def weighted_and_smoothed(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(flat(F.linear(x, w)), t.view(-1), weights_of_classes(), label_smoothing=0.1)


def probabilities(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(flat(F.linear(x, w)), F.one_hot(t.view(-1), VOCABULARY).float())


def rounded(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(flat(F.linear(x, w)).bfloat16(), t.view(-1))


def column_slice(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(x, w)[..., : VOCABULARY - 1].flatten(0, 1), t.view(-1) % 60)


def learnt_scale(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(flat(F.linear(x, w) * w.mean()), t.view(-1))


def plain_tanh(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(flat(F.linear(x, w).tanh()), t.view(-1))


def scaled_softcap(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(flat((F.linear(x, w).tanh() * 2.0) / 3.0), t.view(-1))


def batched(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((x @ w.t().expand(2, 8, VOCABULARY)).flatten(0, 1), t.view(-1))


def rows_first(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(x, w), t.repeat(1, 9)[:, :VOCABULARY] % 7)


def swapped(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(flat(F.linear(x, w).transpose(0, 1)), t.t().reshape(-1))


def late_slice(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(flat(F.linear(x, w))[1:], t.view(-1)[1:])


def joined(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(x, w).reshape(1, -1), t[:1, 0])


def classes_last(logits: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(flat(logits), t.view(-1))


def sums_of_unscaled(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    logits = F.linear(x, w)
    return classes_last(logits * 0.5, t) + logits.logsumexp(-1).mean()


def sums_of_more_rows(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    logits = F.linear(x, w)
    return classes_last(logits[:, 1:], t[:, 1:].contiguous()) + logits.logsumexp(-1).mean()


def sums_over_rows(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    logits = F.linear(x, w)
    return classes_last(logits, t) + logits.logsumexp(1).mean()


def sums_of_another_shape(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    logits = F.linear(x, w).view(7, 2, VOCABULARY)
    return classes_last(logits, t) + logits.logsumexp(2).mean()


def sums_in_the_targets(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    logits = F.linear(x, w)
    return classes_last(logits, t * (logits.logsumexp(-1) > 4).long())


def sums_that_are_written(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    logits = F.linear(x, w)
    return classes_last(logits, t) + logits.logsumexp(-1).mul_(2).sum()


def sums_without_gradient(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    logits = F.linear(x, w)
    loss = classes_last(logits, t)
    with torch.no_grad():
        sums = logits.logsumexp(-1)
    return loss + sums.mean()


def sums_before_an_effect(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    logits, held = F.linear(x, w), t * 1
    penalty = (logits.logsumexp(-1) * held).mean()
    held.zero_()
    return classes_last(logits, t) + penalty


def cut_off(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = F.linear(x, w)
    return F.cross_entropy(flat(logits), t.view(-1)) + x.sum()


def overwritten(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    hidden = x * 2
    logits = F.linear(hidden.detach(), w)
    hidden.detach().zero_()
    return F.cross_entropy(flat(logits), t.view(-1)) + hidden.sum()


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (clipped, "the logits are read by another call as well"),
        (weighted_and_smoothed, "smoothed labels take the weights of all classes for every row"),
        (probabilities, "the targets are float32, not int64 class numbers"),
        (rounded, "the logits are rounded before the loss"),
        (column_slice, "the loss reads some of the columns only"),
        (learnt_scale, "the logits are scaled by something else than a constant"),
        (plain_tanh, "the logits go through a tanh that is no softcap"),
        (scaled_softcap, "the logits are scaled after their softcap"),
        (batched, "the product is not of rows with one matrix"),
        (rows_first, "the classes are not the columns of the product"),
        (swapped, "the logits are rearranged before the loss"),
        (late_slice, "rows are taken of logits that were reshaped"),
        (joined, "a view cuts or joins rows of the logits"),
        (sums_of_unscaled, "the log-sum-exps are of other logits than those of the loss"),
        (sums_of_more_rows, "the log-sum-exps are of other logits than those of the loss"),
        (sums_over_rows, "the log-sum-exps are not over the classes"),
        (sums_of_another_shape, "the log-sum-exps have another shape than the rows of the product"),
        (sums_in_the_targets, "the targets are computed from the log-sum-exps"),
        (sums_that_are_written, "the log-sum-exps are written in place"),
        (sums_without_gradient, "it cuts off a gradient"),
        (
            sums_before_an_effect,
            "the log-sum-exps are read before the loss, and a call between has an effect",
        ),
        (cut_off, "it cuts off a gradient"),
        (overwritten, "what it reads is written before the loss"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_does_not_match_stays_with_a_reason(loss: Callable[..., torch.Tensor], reason: str) -> None:
    program, _ = captured(loss, X, W, T)
    before = program.fingerprint
    found = refusal(program)
    assert found.reason.text == reason
    assert found.reason.nodes and 0 < found.matched <= found.total
    assert program.fingerprint == before


def test_weights_of_another_dtype_raise_where_they_did() -> None:
    def loss(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(flat(F.linear(x, w)), t.view(-1), weights_of_classes(torch.float64))

    given = [each.detach() for each in (X, W, T)]
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(each) for each in given]
        graph = make_fx(loss, pre_dispatch=True)(*fakes)
    found = refusal(Program("g0", Level.SEMANTIC, graph, Signature((), ())))
    assert found.reason.text == "the class weights are float64, the logits float32"


def test_few_rows_stay_whole() -> None:
    program, _ = captured(classes_second, X, W, T)
    found = refusal(program, step=LinearCrossEntropy())
    assert str(found.reason) == "it has 14 rows: cutting them takes 512 or more (cross_entropy_loss)"
    assert found.matched == found.total == 3


def test_losses_of_other_things_are_not_mentioned() -> None:
    program, _ = captured(lambda x, t: F.cross_entropy(x.flatten(0, 1), t.view(-1) % 8), X, T)
    assert list(PASS.propose(program, context())) == []


def test_without_the_kernels_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "default_host", lambda: PluginHost(entry_points=()))
    program, _ = captured(classes_second, X, W, T)
    assert str(refusal(program).reason) == "no plugin offers kernel 'linear-cross-entropy'"


# --- under a budget ----------------------------------------------------------------------------


class Head(nn.Module):
    """A z-loss too, where ``z``."""

    def __init__(self, z: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.z, self.linear = z, nn.Linear(32, 16384, bias=False)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = self.linear(x)
        loss = F.cross_entropy(logits, target)
        return loss + 0.01 * logits.logsumexp(-1).square().mean() if self.z else loss


@pytest.mark.parametrize(
    ("emit", "z", "mode"),
    [
        ("eager", True, "blocks"),
        pytest.param("inductor", False, "forward-blocks", marks=pytest.mark.slow),
    ],
)
def test_blocks_are_what_fits_the_least_memory(emit: str, z: bool, mode: str) -> None:
    """Half of the rows of logits are 16 MiB, a block of 4,096 classes 8; gradients 2 and a little."""
    x, target = torch.randn(512, 32, requires_grad=True), torch.randint(0, 16384, (512,))
    model = Head(z)
    static = 2 * (x.nbytes + model.linear.weight.nbytes) + target.nbytes
    fast = graphopt.optimize(model, (x, target), budget=static + 10 * 2**20, emit=emit, on_error="raise")
    assert fast.plan.choices[0].alternative == f"linear-cross-entropy@cross_entropy_loss/{mode}/4096"

    def step(loss: Any) -> tuple[torch.Tensor, ...]:
        value = loss(x, target)
        return value.detach(), *torch.autograd.grad(value, (x, model.linear.weight))

    torch.testing.assert_close(step(fast), step(model), rtol=1e-4, atol=1e-7)
    # Inputs and weights are there before.
    held = x.nbytes + model.linear.weight.nbytes + target.nbytes
    peaks = sorted(allocator_peak(lambda: step(fast), torch.device("cpu")) for _ in range(3))
    assert static < peaks[1] + held <= fast.plan.predicted.peak_bytes <= fast.plan.budget
