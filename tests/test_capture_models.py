"""Models of transformers with something about them: logging, scans, statistics, checkpoint regions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.steps import budgeted

transformers = pytest.importorskip("transformers")

IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
TEXT = {"input_ids": IDS, "labels": IDS}
IMAGE = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}


def _gpt2() -> nn.Module:
    """Its forward logs."""
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
    config = transformers.GPT2Config(**sizes, use_cache=False)
    return transformers.GPT2LMHeadModel(config).train()


def _mamba() -> nn.Module:
    """Its scan is a ``vmap``."""
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)
    return transformers.MambaForCausalLM(config).train()


def _resnet() -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    return transformers.ResNetForImageClassification(config).train()


def _checkpointed() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, attention_dropout=0.1, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


@pytest.mark.parametrize(
    ("make", "inputs"), [(_gpt2, TEXT), (_mamba, TEXT), (_resnet, IMAGE), (_checkpointed, TEXT)]
)
def test_a_budget_changes_no_number(make: Callable[[], nn.Module], inputs: dict[str, Any]) -> None:
    fast = budgeted(make, inputs, recomputes=make is not _checkpointed, steps=1)
    assert len(fast.plan.choices) == 1
    assert fast.report.diagnostics == ()
