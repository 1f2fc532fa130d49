"""Small models to try the command line on: ``graphopt run examples.targets:llama --budget 60%``.

Each factory returns a model and the inputs of one step, as every target does. The weights are
random and the same every time; ``llama`` and ``gpt2`` need transformers.
"""

from __future__ import annotations

import torch

__all__ = ["cnn", "gpt2", "llama", "squared_mean"]


def llama() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A Llama of two layers, 0.2 million parameters, with labels: its output has a loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return LlamaForCausalLM(config), _text_batch(rows=4, length=64)


def gpt2() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A GPT-2 of two layers with dropout and labels."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256,
        n_positions=64,
        n_embd=64,
        n_layer=2,
        n_head=4,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # what transformers takes anyway, after a warning
    return model, _text_batch(rows=4, length=64)


def cnn() -> tuple[torch.nn.Module, tuple[torch.Tensor]]:
    """A convolutional classifier and 8 images; it returns scores, so a loss helps: ``squared_mean``."""
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for channels, wider in ((3, 16), (16, 16), (16, 16), (16, 16), (16, 16), (16, 16)):
        layers += [
            torch.nn.Conv2d(channels, wider, 3, padding=1),
            torch.nn.BatchNorm2d(wider),
            torch.nn.ReLU(),
        ]
    head = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 10)]
    return torch.nn.Sequential(*layers, *head), (torch.randn(8, 3, 32, 32),)


def squared_mean(scores: torch.Tensor) -> torch.Tensor:
    """A loss for ``--loss examples.targets:squared_mean``."""
    return scores.square().mean()


def _text_batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 256, (rows, length))
    return {"input_ids": tokens, "labels": tokens.clone()}
