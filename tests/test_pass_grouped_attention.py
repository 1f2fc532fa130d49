"""grouped-attention: which repetitions it sees through, that gradients stay, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graphopt.program import Program
from graphopt.testing import check_pass, semantic_programs
from graphopt_passes.grouped_attention import GroupedAttention

GROUPS, TIMES, LENGTH, WIDTH = 2, 3, 10, 8
ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
Spread = Callable[[Tensor], Tensor]


def expanded(x: Tensor) -> Tensor:
    batch, heads, length, width = x.shape
    many = x[:, :, None].expand(batch, heads, TIMES, length, width)
    return many.reshape(batch, heads * TIMES, length, width)


def copied(x: Tensor) -> Tensor:
    batch, heads, length, width = x.shape
    many = x.unsqueeze(-3).expand(batch, heads, TIMES, length, width).contiguous()
    return many.view(batch, heads * TIMES, length, width)


def interleaved(x: Tensor) -> Tensor:
    return x.repeat_interleave(TIMES, dim=1)


def tiled(x: Tensor) -> Tensor:
    batch, heads, length, width = x.shape
    many = x[:, None].expand(batch, TIMES, heads, length, width)
    return many.reshape(batch, heads * TIMES, length, width)


def longer(x: Tensor) -> Tensor:
    return x.repeat_interleave(TIMES, dim=2)


class Grouped(nn.Module):
    def __init__(self, spread: Spread, heads: int = GROUPS * TIMES, **options: object) -> None:
        super().__init__()
        self.spread, self.heads, self.options = spread, heads, options
        self.q = nn.Linear(WIDTH, heads * WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * GROUPS * WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, WIDTH).transpose(1, 2)
        k, v = self.kv(x).view(batch, length, 2, GROUPS, WIDTH).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(
            q, self.spread(k), self.spread(v), mask, **self.options
        )
        return attended.square().mean()


def attention_of(program: Program) -> torch.fx.Node:
    (node,) = program.nodes(ATTENTION)
    return node


X = torch.randn(2, LENGTH, WIDTH)


@pytest.mark.parametrize("spread", [expanded, copied, interleaved])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
def test_heads_that_are_repeated_are_shared(spread: Spread, options: dict[str, object]) -> None:
    model = Grouped(spread, **options)
    check_pass(GroupedAttention(), model, (X,))
    (program,) = semantic_programs(model, (X,), [GroupedAttention()])
    node = attention_of(program)
    assert node.kwargs["enable_gqa"] is True
    assert node.args[1].meta["val"].shape[1] == GROUPS
    assert not list(program.nodes(torch.ops.aten.expand.default))


def test_a_mask_stays() -> None:
    mask = torch.rand(LENGTH, LENGTH) > 0.3
    mask |= torch.eye(LENGTH, dtype=torch.bool)
    check_pass(GroupedAttention(), Grouped(expanded), (X, mask))
    (program,) = semantic_programs(Grouped(expanded), (X, mask), [GroupedAttention()])
    assert attention_of(program).kwargs["enable_gqa"] is True


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Grouped(tiled), "heads are not repeated one by one"),
        (Grouped(longer, heads=GROUPS), "heads are not repeated one by one"),
        (
            Grouped(expanded, dropout_p=0.5),
            "dropout of weights: another kernel may draw other random numbers",
        ),
    ],
    ids=["tiled", "longer", "dropout"],
)
def test_other_repetitions_stay_as_they_are(model: nn.Module, reason: str) -> None:
    checked = check_pass(GroupedAttention(), model, (X,))
    assert [miss.reason.text for miss in checked.near_misses] == [reason]


def test_copies_that_are_read_elsewhere_stay() -> None:
    class Reading(Grouped):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            batch, length, _ = x.shape
            q = self.q(x).view(batch, length, self.heads, WIDTH).transpose(1, 2)
            k, v = self.kv(x).view(batch, length, 2, GROUPS, WIDTH).permute(2, 0, 3, 1, 4)
            keys = self.spread(k)
            attended = nn.functional.scaled_dot_product_attention(q, keys, self.spread(v))
            return attended.square().mean() + keys.sum()

    checked = check_pass(GroupedAttention(), Reading(expanded), (X,))
    assert "is read by another call as well" in checked.near_misses[0].reason.text
