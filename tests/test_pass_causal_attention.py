"""causal-attention: which masks it sees through, and what it says of the others."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as attention

from graphopt.candidate import Candidate, NearMiss
from graphopt.capture.aliasing import alias_map
from graphopt.program import Program
from graphopt_passes.causal_attention import CausalAttention
from graphopt_passes.mask_proof import proven
from tests.programs import context, semantic

Mask = Callable[[torch.Tensor], torch.Tensor]
QUERY = torch.randn(2, 3, 8, 4)


def program_with(mask: Mask) -> Program:
    return semantic(lambda q: attention(q, q, q, mask(q)), QUERY)


def apply_all(program: Program) -> list[str]:
    with program.edit("causal-attention") as edit:
        for found in CausalAttention().propose(program, context()):
            if isinstance(found, Candidate):
                found.apply(edit)
    return [str(n.args[3:6]) for n in program.nodes(torch.ops.aten.scaled_dot_product_attention)]


def lower(q: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(q.shape[2])
    return (rows[:, None] >= rows[None, :])[None, None].expand(q.shape[0], 1, -1, -1)


def biased(value: float) -> Mask:
    return lambda q: torch.full((8, 8), value).triu(1)


@pytest.mark.parametrize("mask", [lower, lambda q: lower(q)[0, 0], biased(float("-inf")), biased(-3.4e38)])
def test_constant_causal_masks_are_seen_through(mask: Mask) -> None:
    program = program_with(mask)
    q = torch.randn(2, 3, 8, 4)
    before = program.gm(q)
    assert apply_all(program) == ["(None, 0.0, True)"]
    torch.testing.assert_close(program.gm(q), before)
    left = {str(node.target) for node in program.nodes()}
    assert not any("arange" in target or "triu" in target for target in left)


def test_a_mask_that_masks_nothing_goes() -> None:
    program = program_with(lambda q: q.new_ones(8, 8, dtype=torch.bool))
    assert apply_all(program) == ["(None, 0.0, False)"]


def banded(q: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(8)
    return (rows[:, None] >= rows[None, :]) & (rows[:, None] - rows[None, :] < 3)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (banded, "the mask is constant but not causal"),
        (lambda q: torch.arange(8.0)[:, None] - torch.arange(8.0), "the mask adds a bias"),
        (lambda q: lower(q).triu(1), "the mask is constant but not causal"),
        (lambda q: q[0, 0, :, :1] > q[0, 0, :, 1], "the mask depends on an input"),
        (lambda q: torch.rand(8, 8) > 0.5, "the mask is random"),
    ],
)
def test_other_masks_stay_with_a_reason(mask: Mask, reason: str) -> None:
    program = program_with(mask)
    before = program.fingerprint
    found = list(CausalAttention().propose(program, context()))
    assert [f.reason.text for f in found if isinstance(f, NearMiss)] == [reason]
    assert not any(isinstance(f, Candidate) for f in found)
    assert program.fingerprint == before


LENGTH = 2**17


def _compared(q: torch.Tensor, compare: Mask) -> torch.Tensor:
    """A mask of 2^34 elements, which is never made."""
    return attention(q, q, q, compare(torch.arange(q.shape[2], device=q.device)))


def _documents(at: int) -> Mask:
    def mask(rows: torch.Tensor) -> torch.Tensor:
        document = (rows >= at).cumsum(0).clamp(max=1)
        return (rows[None, :] <= rows[:, None]) & (document[:, None] == document[None, :])

    return mask


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (lambda rows: rows[None, :] <= rows[:, None], "(None, 0.0, True)"),
        (lambda rows: rows[None, :] < rows[:, None] + 1, "(None, 0.0, True)"),
        (lambda rows: rows[:, None] >= rows[None, :], "(None, 0.0, True)"),
        (lambda rows: rows[:, None] + 1 > rows[None, :], "(None, 0.0, True)"),
        (lambda rows: -rows[:, None] <= -rows[None, :], "(None, 0.0, True)"),
        (_documents(LENGTH), "(None, 0.0, True)"),
        (lambda rows: rows[None, :] <= 0 * rows[:, None] + LENGTH, "(None, 0.0, False)"),
    ],
)
def test_masks_of_any_size_are_known_by_their_positions(mask: Mask, expected: str) -> None:
    query = torch.empty(1, 1, LENGTH, 4, device="meta")
    program = semantic(lambda q: _compared(q, mask), query)
    assert apply_all(program) == [expected]


@pytest.mark.parametrize(
    "mask",
    [
        lambda rows: rows[None, :] < rows[:, None],
        lambda rows: rows[None, :] <= rows[:, None] + 1,
        lambda rows: rows[None, :] >= rows[:, None],
        lambda rows: rows[None, :] <= rows.flip(0)[:, None],
        lambda rows: (rows[None, :] <= rows[:, None]) & (rows[:, None] - rows[None, :] < 3),
        _documents(LENGTH - 1),
        _documents(1),
    ],
)
def test_other_masks_of_any_size_stay(mask: Mask) -> None:
    query = torch.empty(1, 1, LENGTH, 4, device="meta")
    program = semantic(lambda q: _compared(q, mask), query)
    (missed,) = CausalAttention().propose(program, context())
    assert isinstance(missed, NearMiss)
    assert missed.reason.text == f"the mask has {2**34} elements, more than {2**28}"


@pytest.mark.parametrize("seed", range(40))
def test_what_is_proven_of_a_mask_is_so(seed: int) -> None:
    chosen = random.Random(seed)
    keys, queries = (sorted(chosen.choices(range(6), k=chosen.randint(2, 5))) for _ in range(2))
    if chosen.random() < 0.5:
        keys, queries = (list(range(chosen.randint(2, 5))) for _ in range(2))
    compare = chosen.choice([torch.le, torch.lt, torch.ge, torch.gt, torch.eq])
    turned = chosen.random() < 0.5

    def masked() -> torch.Tensor:
        k, q = torch.tensor(keys)[None, :], torch.tensor(queries)[:, None]
        return compare(q, k) if turned else compare(k, q)

    made = masked()
    program = semantic(lambda x: (x, masked()), torch.ones(1))
    output = next(n for n in reversed(program.graph.nodes) if n.op == "output")
    verdict = proven(output.args[0][-1], alias_map(program.graph))
    triangle = torch.ones(made.shape, dtype=torch.bool).tril()
    expected = "empty" if bool(made.all()) else "causal" if torch.equal(made, triangle) else ""
    assert verdict == expected


def test_masks_of_unknown_size_stay() -> None:
    def masked(q: torch.Tensor) -> torch.Tensor:
        return attention(q, q, q, lower(q))

    program = semantic(masked, QUERY, dynamic=True)
    found = [f for f in CausalAttention().propose(program, context()) if isinstance(f, NearMiss)]
    assert [f.reason.text for f in found] == ["the size of the mask is not fixed"]


def test_attention_without_a_mask_is_no_candidate() -> None:
    assert list(CausalAttention().propose(semantic(lambda q: attention(q, q, q), QUERY), context())) == []


def test_a_mask_that_is_written_through_a_view_stays() -> None:
    def written(q: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(8, 8, dtype=torch.bool)
        mask[:, 3:].fill_(False)
        return mask

    program = program_with(written)
    (missed,) = CausalAttention().propose(program, context())
    assert isinstance(missed, NearMiss)
    assert missed.reason.text == "the mask is written in place"
