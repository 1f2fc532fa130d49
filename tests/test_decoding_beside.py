"""Weights of products that read one value are laid side by side, once, where an accelerator reads them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt import InputsError
from tests.decoders import VOCABULARY, family, greedy, tokens

WIDTH, HEADS, GROUPS = 64, 4, 2


class Block(nn.Module):
    def __init__(self, biased: bool) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH, bias=biased)
        self.k, self.v = (nn.Linear(WIDTH, WIDTH * GROUPS // HEADS, bias=biased) for _ in range(2))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.gate, self.up, self.down = nn.Linear(WIDTH, 128), nn.Linear(WIDTH, 128), nn.Linear(128, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, _ = x.shape
        apart = (rows, length, -1, WIDTH // HEADS)
        q, k, v = (made(x).view(apart).transpose(1, 2) for made in (self.q, self.k, self.v))
        made = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(made.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Apart(nn.Module):
    """Queries, keys and values come out of linear layers of their own."""

    def __init__(self, biased: bool = False, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(biased) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.blocks[1].k.weight = self.blocks[0].k.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(x)
        return logits


def generating(model: nn.Module, device: str = "h200") -> graphopt.Optimized:
    wanted = graphopt.Generate(max_tokens=64, max_batch=2)
    return graphopt.optimize(model, (tokens(1, 6),), generate=wanted, emit="eager", device=device)


def storages(model: nn.Module) -> dict[str, int]:
    return {name: t.untyped_storage().data_ptr() for name, t in model.state_dict().items()}


def beside(fast: graphopt.Optimized) -> int:
    record = fast.report.decoding
    assert record is not None
    return record.beside


@pytest.mark.parametrize("biased", [False, True])
def test_products_of_one_value_become_one_and_nothing_is_held_twice(biased: bool) -> None:
    model = Apart(biased).eval()
    before, size = copy.deepcopy(model), sum(p.nbytes for p in model.parameters())
    fast = generating(model)
    assert beside(fast) == 2 * 5
    ids = tokens(2, 7)
    assert torch.equal(fast.generate(ids, max_new_tokens=40), greedy(before, ids, 40))
    found = storages(model)
    assert found["blocks.0.q.weight"] == found["blocks.0.k.weight"] == found["blocks.0.v.weight"]
    assert found["blocks.0.gate.bias"] == found["blocks.0.up.bias"] != found["blocks.0.down.bias"]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.parameters()}
    assert sum(held.values()) == size
    dumped = str(fast.programs[0].gm.graph)
    assert dumped.count("aten.linear.default") == 2 * 4 + 1


@pytest.mark.parametrize("name", ["xlstm", "recurrent_gemma"])
def test_prompts_of_recurrences_read_weights_of_their_own(name: str) -> None:
    model = family(name).eval()
    fast = graphopt.optimize(
        model, (tokens(1, 6),), generate=graphopt.Generate(64, 2), emit="eager", device="h200",
        on_error="raise",
    )  # fmt: skip
    decoder = fast._generator.built.decoder
    assert beside(fast) and decoder.prompts is not None
    assert decoder.prompts.weights.keys() != decoder.step.weights.keys(), "one token alone reads them as one"
    ids = tokens(2, 19)
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False)
    assert torch.equal(fast.generate(ids, max_new_tokens=12, do_sample=False), expected)


def test_original_checkpoints_load_and_what_takes_a_weights_place_is_read() -> None:
    model, other = Apart().eval(), Apart().eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    fast, ids = generating(model), tokens(1, 5)
    assert fast._generator is not None
    weights = fast._generator.built.decoder.step.weights
    (whole,) = (weight for name, weight in weights.items() if name.endswith("0_gate_weight_beside"))
    counted = whole._version
    model.load_state_dict(other.state_dict())
    assert torch.equal(fast.generate(ids, max_new_tokens=20), greedy(other, ids, 20))
    assert whole._version > counted, "kernels that read early are told"
    with torch.no_grad():
        other.blocks[0].up.weight.mul_(-2)
    model.blocks[0].up.weight.data = other.blocks[0].up.weight.detach().clone()
    assert torch.equal(fast.generate(ids, max_new_tokens=20), greedy(other, ids, 20))
    model.blocks[0].up.weight.data = torch.zeros(128, WIDTH, dtype=torch.float64)
    with pytest.raises(InputsError, match=r"a weight is torch.float64\[128, 64\] on cpu now"):
        fast.generate(ids, max_new_tokens=2)


@pytest.mark.parametrize("scheme", ["int8", pytest.param("int4{group=64}", marks=pytest.mark.slow)])
def test_packed_weights_are_laid_side_by_side_too(scheme: str) -> None:
    model = Apart().eval()
    graphopt.quantize(model, (tokens(1, 6),), schemes=(scheme,))
    before = copy.deepcopy(model)
    fast, ids = generating(model), tokens(2, 7)
    assert beside(fast) == 2 * 5
    name = scheme.partition("{")[0]
    assert str(fast.programs[0].gm.graph).count(f"graphopt.linear_{name}.default") == 2 * 4 + 1
    assert torch.equal(fast.generate(ids, max_new_tokens=20), greedy(before, ids, 20))


def test_weights_that_others_read_too_stay_where_they_are() -> None:
    model = Apart(tied=True).eval()
    before = copy.deepcopy(model)
    fast, ids = generating(model), tokens(1, 5)
    assert beside(fast) == 2 * 4
    assert storages(model)["blocks.0.k.weight"] not in {storages(model)["blocks.0.q.weight"]}
    assert torch.equal(fast.generate(ids, max_new_tokens=20), greedy(before, ids, 20))


def test_on_a_cpu_products_stay_apart_bit_for_bit() -> None:
    model: Any = Apart().eval()
    before = storages(model)
    assert beside(generating(model, "cpu")) == 0
    assert storages(model) == before
