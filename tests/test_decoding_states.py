"""Recurrences: loops over positions become steps that keep a state, others are refused with what is in the
way."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn

import graphopt
from graphopt.decoding import singles
from graphopt.decoding.capture import Uncached, capture_uncached
from graphopt.decoding.insert import _Insertion
from graphopt.decoding.recurrence import Recurrence, recurrences_in
from graphopt.errors import BudgetError, CaptureError, InputsError, VerificationError
from tests.decoders import HEADS, VOCABULARY, family, greedy, tokens

D, ROOM, BATCH = 8, 32, 3

Mix = Callable[["Mixed", torch.Tensor], torch.Tensor]


class Mixed(nn.Module):
    """``layers`` that mix rows x [B, S, D] as ``mix`` does, with weights ``a``, ``b``, ``c`` [D, D] and
    ``w`` [D]."""

    def __init__(self, mix: Mix, layers: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.layers = mix, layers
        self.embed, self.head = nn.Embedding(VOCABULARY, D), nn.Linear(D, VOCABULARY)
        self.a, self.b, self.c = (nn.Parameter(torch.randn(D, D) / D**0.5) for _ in range(3))
        self.w = nn.Parameter(torch.randn(D))
        self.taps = nn.Parameter(torch.randn(D, 1, 3) / 2)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for _ in range(self.layers):
            x = x + self.mix(self, x)
        logits: torch.Tensor = self.head(x)
        return logits


def start(x: torch.Tensor, number: float = 0.0) -> torch.Tensor:
    return torch.full((x.shape[0], D), number, dtype=x.dtype)


def recurrent(m: Mixed, x: torch.Tensor) -> torch.Tensor:
    h, rows = start(x, 0.5), []
    for t in range(x.shape[1]):
        h = torch.tanh(x[:, t] @ m.a + h @ m.b)
        rows.append(h)
    return torch.stack(rows, 1)


def unbound(m: Mixed, x: torch.Tensor) -> torch.Tensor:
    """What does not change is computed again for each row, the state is added to in place, rows keep their
    dimension."""
    h, rows = torch.zeros_like(x[:, :1]), []
    for row in x.split(1, 1):
        h = h * torch.sigmoid(m.w)
        h += row @ m.a
        rows.append(h)
    return torch.cat(rows, 1)


def sliced(m: Mixed, x: torch.Tensor) -> torch.Tensor:
    """Rows are written into memory that is there before, the sequence is the last dimension."""
    y = x.transpose(1, 2)
    out, h = torch.zeros_like(y), start(x)
    for t in range(y.shape[2]):
        h = m.w.sigmoid() * h + y[:, :, t]
        out[:, :, t] = h
    return out.transpose(1, 2)


def gated(m: Mixed, x: torch.Tensor) -> torch.Tensor:
    """A gated linear recurrence behind a causal convolution."""
    rows = F.conv1d(x.transpose(1, 2), m.taps, padding=2, groups=D)[..., : x.shape[1]].transpose(1, 2)
    gate, h, out = torch.sigmoid(rows @ m.a), start(x), []
    for one, g in zip(rows.unbind(1), gate.unbind(1), strict=True):
        h = g * h + (1 - g) * one
        out.append(h)
    return torch.stack(out, 1) * F.silu(x @ m.b)


def two_loops(m: Mixed, x: torch.Tensor) -> torch.Tensor:
    """A loop behind another, the second with two states, of which one is a matrix."""
    x, rows = recurrent(m, x), []
    c, n = torch.zeros(x.shape[0], D, D, dtype=x.dtype), start(x)
    for t in range(x.shape[1]):
        k, v = x[:, t] @ m.a, x[:, t] @ m.c
        c = 0.9 * c + k[:, :, None] * v[:, None, :]
        n = 0.9 * n + k.abs()
        rows.append((c * x[:, t, :, None]).sum(1) / (1 + n))
    return torch.stack(rows, 1)


def late(m: Mixed, x: torch.Tensor) -> torch.Tensor:
    """What is made of a row is read one row later alone."""
    h, rows = start(x, 1.0), []
    for t in range(x.shape[1]):
        rows.append(h @ m.b)
        h = torch.tanh(x[:, t] @ m.a + h)
    return torch.stack(rows, 1)


def layered(m: Mixed, x: torch.Tensor) -> torch.Tensor:
    """Rows are outermost: two layers of one row, then the next row."""
    one, two, rows = start(x), start(x), []
    for t in range(x.shape[1]):
        one = torch.tanh(x[:, t] @ m.a + one @ m.b)
        two = torch.tanh(one @ m.c + two)
        rows.append(two)
    return torch.stack(rows, 1)


def hybrid(m: Mixed, x: torch.Tensor) -> torch.Tensor:
    """A recurrence, attention to what it makes, a sequence moved by a row."""
    y = recurrent(m, x)
    q, k, v = ((y @ w).unflatten(-1, (HEADS, -1)).transpose(1, 2) for w in (m.a, m.b, m.c))
    made = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    return made + F.pad(x, (0, 0, 1, -1))


def shifted(m: Mixed, x: torch.Tensor) -> torch.Tensor:
    one = F.pad(x, (0, 0, 2, 0), value=0.5)[:, : x.shape[1]]
    other = torch.cat([m.w.expand(x.shape[0], 1, D), x[:, :-1]], 1)
    return one @ m.a + other * torch.sigmoid(F.pad(x, (0, 0, 1, -1)))


def by_blocks(m: Mixed, x: torch.Tensor, within: float = 1.0, block: int = 8) -> torch.Tensor:
    """Linear attention whose state decays, blocks of rows at a time, the last one filled up with zeros."""
    length, heads = x.shape[1], 2
    more = (block - length % block) % block

    def blocks(rows: torch.Tensor) -> torch.Tensor:
        rows = F.pad(rows.unflatten(-1, (heads, -1)), (0, 0, 0, 0, 0, more))
        return rows.reshape(rows.shape[0], -1, block, heads, rows.shape[-1]).transpose(2, 3)

    q, k, v = (blocks(x @ w) for w in (m.a, m.b, m.c))
    log = F.pad(-(x @ m.a[:, :heads]).abs(), (0, 0, 0, more))
    log = log.reshape(log.shape[0], -1, block, heads).transpose(2, 3).cumsum(-1)
    later = torch.ones(block, block, dtype=torch.bool).triu(1)
    decay = (log[..., :, None] - log[..., None, :]).masked_fill(later, float("-inf")).exp()
    read = within * (q @ k.mT) * decay
    state, rows = torch.zeros_like(k[:, 0].mT @ v[:, 0]), []
    for at in range(q.shape[1]):
        seen = q[:, at] * log[:, at, :, :, None].exp()
        rows.append(read[:, at] @ v[:, at] + seen @ state)
        left = (log[:, at, :, -1:] - log[:, at]).exp()[..., None] * k[:, at]
        state = state * log[:, at, :, -1, None, None].exp() + left.mT @ v[:, at]
    made = torch.stack(rows, 1).transpose(2, 3).reshape(x.shape[0], -1, heads, x.shape[2] // heads)
    return made[:, :length].flatten(2)


def half_within(m: Mixed, x: torch.Tensor) -> torch.Tensor:
    """What rows of one block give each other counts half: a row's place in its block matters."""
    return by_blocks(m, x, within=0.5)


def generating(model: nn.Module, **options: Any) -> Any:
    generate = graphopt.Generate(ROOM, max_batch=BATCH)
    return graphopt.optimize(
        model, (tokens(2, 9),), generate=generate, emit="eager", on_error="raise", **options
    )


def captured(mix: Mix) -> Uncached:
    return capture_uncached(Mixed(mix).eval(), (tokens(2, 9),), graphopt.Generate(ROOM))


STATES: dict[Mix, int] = {
    recurrent: D, unbound: D, sliced: D, gated: D, two_loops: 2 * D + D * D, late: D, layered: 2 * D,
    hybrid: 2 * D, shifted: 4 * D, by_blocks: D * D // 2,
}  # fmt: skip
"""Numbers that each layer keeps of a sequence."""


@pytest.mark.parametrize("mix", STATES, ids=lambda mix: mix.__name__)
def test_generation_is_that_of_the_model_without_a_cache(mix: Mix) -> None:
    model = Mixed(mix).double().eval()
    fast = generating(model)
    record = fast.report.decoding
    assert sum(state.bytes for state in record.states) == STATES[mix] * BATCH * 8
    kept = (2 * D if mix is gated else 2 * D * ROOM if mix is hybrid else 0) * BATCH * 8
    assert record.cache_bytes == STATES[mix] * BATCH * 8 + kept == fast.report.predicted.cache_bytes
    # A state of the prompt before is not what the next one begins with.
    for batch, length in ((2, 3), (3, 17), (1, 1), (2, 8)):
        ids = tokens(batch, length, seed=length)
        assert torch.equal(fast.generate(ids, max_new_tokens=9), greedy(model, ids, 9))


def test_a_loop_is_one_node_whose_body_is_one_row() -> None:
    (node,) = recurrences_in(captured(recurrent).gm.graph)
    loop: Any = node.target
    assert isinstance(loop, Recurrence) and (loop.states, loop.rows, loop.made) == (1, (1,), (1,))
    inside = [str(node.target) for node in loop.body.graph.nodes if node.op == "call_function"]
    assert sorted(inside) == [
        "aten.add.Tensor",
        "aten.matmul.default",
        "aten.matmul.default",
        "aten.tanh.default",
    ]


def test_programs_hold_operators_alone_and_prompts_go_in_by_stretches() -> None:
    fast = generating(Mixed(hybrid, layers=2).eval())
    record = fast.report.decoding
    assert record.chunk == 8 and [site.store for site in record.sites] == ["full", "full"]
    programs = fast.programs
    assert [program.name for program in programs] == ["decode", "prompt"]
    for program in programs:
        calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
        assert all(isinstance(call, torch._ops.OpOverload) or call is getitem for call in calls)
    assert re.search(r"state: 4 of recurrences \(-\), 384 B", str(fast.report)), str(fast.report)


def test_states_count_towards_the_bound_on_the_cache() -> None:
    model = Mixed(two_loops).eval()
    bytes_of = STATES[two_loops] * BATCH * 4
    assert generating(model, budget=graphopt.Budget(cache=bytes_of)).report.decoding.budget == bytes_of
    with pytest.raises(
        BudgetError, match=r"the largest is that of recurrence_1.state0: state, 768 B"
    ) as raised:
        generating(model, budget=graphopt.Budget(cache=bytes_of - 1))
    assert raised.value.least_bytes == bytes_of


def test_padding_is_refused_where_the_model_takes_no_mask() -> None:
    fast = generating(Mixed(recurrent).eval())
    ids = tokens(2, 5)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with pytest.raises(InputsError, match="a mask that leaves tokens out: the model takes none"):
        fast.generate(ids, attention_mask=mask, max_new_tokens=2)


def test_sequences_change_places_with_their_states() -> None:
    model = Mixed(two_loops).double().eval()
    fast = generating(model)
    ids = tokens(3, 6)
    fast.generate(ids, max_new_tokens=1)
    decoder = fast._generator.built.decoder
    decoder.reset(3)
    decoder(ids)
    order = torch.tensor([2, 0, 0])
    decoder.reorder(order)
    following = tokens(3, 1, seed=5)
    with torch.no_grad():
        expected = model(torch.cat([ids[order], following], 1))[:, -1:]
    torch.testing.assert_close(decoder(following), expected, rtol=1e-12, atol=1e-12)


class Scaling(Mixed):
    """Scales its weights as it first runs in evaluation, and notes that it did."""

    def __init__(self) -> None:
        super().__init__(recurrent)
        self.scaled = False

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if not self.scaled:
            with torch.no_grad():
                self.a.div_(2)
            self.scaled = True
        return super().forward(input_ids)


def test_weights_that_a_model_scales_once_are_scaled_once() -> None:
    model, ids = Scaling().eval(), tokens(2, 6)
    expected = model.a.detach() / 2
    fast = generating(model)
    assert model.scaled and torch.equal(model.a, expected)
    assert torch.equal(fast.generate(ids, max_new_tokens=4), greedy(model, ids, 4))


def test_compiled_steps_keep_states() -> None:
    model = Mixed(hybrid).eval()
    generate = graphopt.Generate(ROOM, max_batch=BATCH)
    fast = graphopt.optimize(
        model, (tokens(2, 9),), generate=generate, emit="inductor", on_error="raise"
    )
    ids = tokens(2, 5)
    plain = generating(model)
    # Few tokens: states are not to have forgotten that a step was compared with its operators.
    for made in (fast, plain):
        assert torch.equal(made.generate(ids, max_new_tokens=3), greedy(model, ids, 3))
    assert not [text for text in fast.report.diagnostics if "operator by operator" in text]
    states = [made._generator.built.decoder.states for made in (fast, plain)]
    assert states[0] and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*states, strict=True))


def test_compiled_steps_that_leave_other_states_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetting(run: Any, decoder: Any, arguments: Any) -> list[torch.Tensor]:
        made = once(run, decoder, arguments)
        return made if run is decoder.general else [made[0], *(state * 0.5 for state in made[1:])]

    once = singles._once
    monkeypatch.setattr(singles, "_once", forgetting)
    model = Mixed(hybrid).eval()
    fast = graphopt.optimize(
        model, (tokens(2, 9),), generate=graphopt.Generate(ROOM, max_batch=BATCH), emit="inductor"
    )
    ids = tokens(2, 5)
    assert torch.equal(fast.generate(ids, max_new_tokens=3), greedy(model, ids, 3))
    said = [text for text in fast.report.diagnostics if "operator by operator" in text]
    assert said and "the compiled step leaves other states than its operators one by one" in said[0]


# --- what is refused -------------------------------------------------------------------------------------


def begins_otherwise(m: Mixed, x: torch.Tensor) -> torch.Tensor:
    rows = [x[:, 0]]
    for t in range(1, x.shape[1]):
        rows.append(torch.tanh(x[:, t] + rows[-1] @ m.a))
    return torch.stack(rows, 1)


def two_later(m: Mixed, x: torch.Tensor) -> torch.Tensor:
    one, two, rows = start(x, 1.0), start(x, -1.0), []
    for t in range(x.shape[1]):
        rows.append(two + x[:, t])
        one, two = torch.tanh(x[:, t] @ m.a + one), one @ m.b
    return torch.stack(rows, 1)


def two_before(m: Mixed, x: torch.Tensor) -> torch.Tensor:
    rows = [start(x), start(x)]
    for t in range(x.shape[1]):
        rows.append(x[:, t] + rows[-2] @ m.a)
    return torch.stack(rows[2:], 1)


def backwards(m: Mixed, x: torch.Tensor) -> torch.Tensor:
    h, rows = start(x), []
    for t in reversed(range(x.shape[1])):
        h = torch.tanh(x[:, t] + h @ m.a)
        rows.append(h)
    return torch.stack(rows[::-1], 1)


def by_turns(m: Mixed, x: torch.Tensor) -> torch.Tensor:
    h, rows = start(x), []
    for t in range(x.shape[1]):
        h = h + (torch.tanh(x[:, t]) if t % 2 else torch.sigmoid(x[:, t]))
        rows.append(h)
    return torch.stack(rows, 1)


def the_last_for_all(m: Mixed, x: torch.Tensor) -> torch.Tensor:
    h = start(x)
    for t in range(x.shape[1]):
        h = torch.tanh(x[:, t] + h @ m.a)
    return x * h[:, None]


def of_all_sequences(m: Mixed, x: torch.Tensor) -> torch.Tensor:
    h, rows = torch.zeros(D, dtype=x.dtype), []
    for t in range(x.shape[1]):
        h = 0.5 * h + x[:, t].mean(0)
        rows.append(h + x[:, t])
    return torch.stack(rows, 1)


def counting(m: Mixed, x: torch.Tensor) -> torch.Tensor:
    h, rows = start(x), []
    for t in range(x.shape[1]):
        h = h + x[:, t] / (t + 1)
        rows.append(h)
    return torch.stack(rows, 1)


def by_length(m: Mixed, x: torch.Tensor) -> torch.Tensor:
    return recurrent(m, x) / x.shape[1] ** 2


REFUSED: dict[Mix, str] = {
    begins_otherwise: r"row 1 of stack is not made as row 0 is: select \(aten.select.int\) stands where tanh",
    half_within: "no attention was found in the model, and no recurrence",
    two_later: "only what the row right before makes is kept",
    two_before: "is of row 2: only what the row right before makes is kept",
    backwards: "is made of row 4 of a sequence alone, and is laid beside those of the other rows nowhere",
    by_turns: r"row 4 .* is not made as row 3 is: tanh_1 \(aten.tanh.default\) stands where sigmoid_2",
    the_last_for_all: "is laid beside those of the other rows nowhere",
    of_all_sequences: r"the state of .* is \['8'\]: what is kept is one row \[batch, ...\] for each sequence",
    counting: r"row 4 .* is not made as row 3 is: div_3 \(aten.div.Tensor\) stands where div_4",
}


@pytest.mark.parametrize("mix", REFUSED, ids=lambda mix: mix.__name__)
def test_what_no_step_takes_on_is_refused_with_the_value_in_the_way(mix: Mix) -> None:
    with pytest.raises(CaptureError, match=REFUSED[mix]):
        generating(Mixed(mix).eval())


def test_numbers_that_do_not_follow_from_the_length_are_refused() -> None:
    text = "the captured graph gives other logits than the model for "
    with pytest.raises((VerificationError, CaptureError), match=text):
        generating(Mixed(by_length).eval())


class TurningAway(Mixed):
    """Reads something else beyond 20 tokens, which no example shows."""

    def __init__(self) -> None:
        super().__init__(recurrent)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        x = recurrent(self, x if input_ids.shape[1] <= 20 else 2 * x)
        logits: torch.Tensor = self.head(x)
        return logits


def test_models_that_go_another_way_for_longer_sequences_are_refused() -> None:
    with pytest.raises(VerificationError, match=r"other logits than the model for \[1, 32\] tokens"):
        generating(TurningAway().eval())


# --- that the check sees it ------------------------------------------------------------------------------


def _unwritten(self: _Insertion, node: fx.Node, held: Sequence[fx.Node], slots: fx.Node) -> None:
    carry(self, node, held, slots)
    for write in [user for row in held for view in row.users for user in view.users]:
        if write.target is torch.ops.aten.copy_.default:
            self.graph.erase_node(write)


def _one_late(self: _Insertion, node: fx.Node, held: Sequence[fx.Node], slots: fx.Node) -> None:
    carry(self, node, held, slots)
    begun: Any = self.node(node).args[0]
    writes = [
        u
        for row in held
        for view in row.users
        for u in view.users
        if u.target is torch.ops.aten.copy_.default
    ]
    for write, before in zip(writes, begun, strict=True):
        write.update_arg(1, before)


carry = _Insertion._carry


@pytest.mark.parametrize("fault", [_unwritten, _one_late])
def test_a_state_that_is_not_carried_is_seen(monkeypatch: pytest.MonkeyPatch, fault: Any) -> None:
    monkeypatch.setattr(_Insertion, "_carry", fault)
    with pytest.raises(
        VerificationError, match="decoding gives other logits than the model without a cache at position"
    ):
        generating(Mixed(recurrent).eval())


# --- models of a library ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mamba", "jamba"])
def test_models_generate_their_own_tokens(name: str) -> None:
    model: Any = family(name)
    ids = tokens(2, 9)
    fast = graphopt.optimize(
        model,
        {"input_ids": ids},
        generate=graphopt.Generate(48, max_batch=4),
        emit="eager",
        on_error="raise",
    )
    assert fast.report.decoding.states and bool(fast.report.decoding.sites) == (name == "jamba")
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    ways: list[dict[str, Any]] = [
        {"do_sample": False}, {"do_sample": False, "attention_mask": mask}, {"num_beams": 2},
        {"do_sample": True, "top_k": 20},
    ]  # fmt: skip
    for options in ways:
        made = []
        for generate in (model.generate, fast.generate):
            torch.manual_seed(3)
            made.append(generate(ids, max_new_tokens=24, **options))
        assert torch.equal(*made)
    with pytest.raises(InputsError, match="the stores are the cache"):
        fast.generate(ids, cache_params=object())
