"""The models of the CPU figures: ten public architectures from shrunken configurations, two plain nets.

    python benchmarks/models.py

prints what each is. Weights and inputs are random. Sizes are such that activations outweigh
parameters and one training step takes about a second at most on two CPU cores.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["MODELS", "Built", "build", "chosen"]

Built = tuple[nn.Module, dict[str, torch.Tensor]]


def llama(
    layers: int = 6, width: int = 128, vocabulary: int = 2048, batch: int = 4, length: int = 512
) -> Built:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=vocabulary, max_position_embeddings=length, use_cache=False,
    )  # fmt: skip
    ids = torch.randint(0, vocabulary, (batch, length))
    return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


def gpt2() -> Built:
    """Dropout on, as configured by default."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=128, n_layer=4, n_head=4, vocab_size=1024, n_positions=256, use_cache=False)
    ids = torch.randint(0, 1024, (8, 256))
    return GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}


def bert() -> Built:
    """Dropout on, as configured by default."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512, vocab_size=1024,
        max_position_embeddings=256,
    )  # fmt: skip
    ids = torch.randint(0, 1024, (8, 256))
    return BertForMaskedLM(config), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def t5() -> Built:
    """Dropout on, as configured by default."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=128, d_kv=32, d_ff=512, num_layers=3, num_decoder_layers=3, num_heads=4, vocab_size=1024,
        use_cache=False, decoder_start_token_id=0,
    )  # fmt: skip
    ids = torch.randint(0, 1024, (8, 192))
    return T5ForConditionalGeneration(config), {"input_ids": ids, "labels": ids[:, :128].contiguous()}


def vit() -> Built:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=96, num_hidden_layers=6, num_attention_heads=3, intermediate_size=384, image_size=128,
        patch_size=8, num_labels=100,
    )  # fmt: skip
    return ViTForImageClassification(config), {
        "pixel_values": torch.randn(12, 3, 128, 128), "labels": torch.randint(0, 100, (12,)),
    }  # fmt: skip


def convnext() -> Built:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[24, 48, 96, 192], depths=[2, 2, 4, 2], num_labels=100)
    return ConvNextForImageClassification(config), {
        "pixel_values": torch.randn(12, 3, 128, 128), "labels": torch.randint(0, 100, (12,)),
    }  # fmt: skip


def resnet() -> Built:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[32, 64, 128, 256], depths=[2, 3, 4, 2], num_labels=100
    )
    return ResNetForImageClassification(config), {
        "pixel_values": torch.randn(24, 3, 128, 128), "labels": torch.randint(0, 100, (24,)),
    }  # fmt: skip


def whisper() -> Built:
    """Without LayerDrop: while a stack is in training mode it branches on a random number before each
    layer, even if the rate is 0 as here. The layers are in training mode, and other dropout is off."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        d_model=96, encoder_layers=3, decoder_layers=3, encoder_attention_heads=3, decoder_attention_heads=3,
        encoder_ffn_dim=384, decoder_ffn_dim=384, vocab_size=1024, max_source_positions=300,
        max_target_positions=128, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    for stack in (model.model.encoder, model.model.decoder):
        stack.training = False
    return model, {
        "input_features": torch.randn(6, 80, 600), "labels": torch.randint(3, 1024, (6, 96)),
    }  # fmt: skip


def whisper_layerdrop() -> Built:
    """As configured by default: every layer is a program of its own, called several times a step, and
    the stacks around them run as they did. The rate is 0, so that every step runs every layer."""
    model, inputs = whisper()
    return model.train(), inputs


def mamba() -> Built:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(hidden_size=128, num_hidden_layers=3, vocab_size=1024, use_cache=False)
    ids = torch.randint(0, 1024, (4, 48))
    return MambaForCausalLM(config), {"input_ids": ids, "labels": ids}


def qwen3_moe() -> Built:
    """Experts as batched products: those that loop over the experts or group the tokens by expert
    branch on what the router chose, forwards or backwards, which no graph of the step can hold."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        hidden_size=64, intermediate_size=128, moe_intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
        vocab_size=1024, max_position_embeddings=128, use_cache=False,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("batched_mm")
    ids = torch.randint(0, 1024, (2, 128))
    return model, {"input_ids": ids, "labels": ids}


class _Double(nn.Sequential):
    """Two convolutions, each with batch normalisation and ReLU in place."""

    def __init__(self, inside: int, outside: int) -> None:
        layers: list[nn.Module] = []
        for source in (inside, outside):
            layers += [nn.Conv2d(source, outside, 3, padding=1), nn.BatchNorm2d(outside)]
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)


class UNet(nn.Module):
    """Ronneberger et al. 2015 with padding and batch normalisation; returns the segmentation loss."""

    def __init__(self, width: int, depth: int, classes: int) -> None:
        super().__init__()
        widths = [width << level for level in range(depth + 1)]
        self.down = nn.ModuleList(_Double(a, b) for a, b in zip([3, *widths[:-1]], widths, strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in itertools.pairwise(widths))
        self.join = nn.ModuleList(_Double(2 * a, a) for a in widths[:-1])
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, image: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        skips: list[torch.Tensor] = []
        x = image
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        for level in reversed(range(len(self.up))):
            x = self.join[level](torch.cat([skips[level], self.up[level](x)], 1))
        return F.cross_entropy(self.head(x), labels)


def unet() -> Built:
    image, labels = torch.randn(4, 3, 128, 128), torch.randint(0, 10, (4, 128, 128))
    return UNet(16, 3, 10), {"image": image, "labels": labels}


class _Mixing(nn.Module):
    """One MLP over the tokens, one over the channels."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.across = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.within = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.across(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.within(self.norms[1](x))


class Mixer(nn.Module):
    """MLP-Mixer (Tolstikhin et al. 2021); returns the classification loss."""

    def __init__(self, image: int, patch: int, width: int, layers: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.Sequential(*(_Mixing((image // patch) ** 2, width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, image: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.stem(image).flatten(2).transpose(1, 2)
        return F.cross_entropy(self.head(self.norm(self.blocks(x)).mean(1)), labels)


def mixer() -> Built:
    image, labels = torch.randn(24, 3, 128, 128), torch.randint(0, 100, (24,))
    return Mixer(128, 16, 128, 6, 100), {"image": image, "labels": labels}


MODELS: dict[str, Callable[[], Built]] = {
    "llama": llama, "gpt2": gpt2, "bert": bert, "t5": t5, "vit": vit, "convnext": convnext, "resnet": resnet,
    "whisper": whisper, "whisper-layerdrop": whisper_layerdrop, "mamba": mamba, "qwen3-moe": qwen3_moe,
    "unet": unet, "mixer": mixer,
}  # fmt: skip


def build(name: str) -> Built:
    """The model, in training mode as modules are made, and its keyword arguments; the same on every call."""
    torch.manual_seed(0)
    return MODELS[name]()


def chosen(names: Sequence[str]) -> list[str]:
    """The models asked for, all of them by default; raises ``SystemExit`` on an unknown name."""
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise SystemExit(f"no model {unknown[0]!r}; there are {', '.join(MODELS)}")
    return list(names) or list(MODELS)


def main() -> None:
    parser = argparse.ArgumentParser(description="What the models of the CPU figures are.")
    parser.add_argument("--models", nargs="*", default=[], metavar="NAME")
    for name in chosen(parser.parse_args().models):
        model, inputs = build(name)
        parameters = sum(p.numel() for p in model.parameters())
        shapes: dict[str, Any] = {key: tuple(value.shape) for key, value in inputs.items()}
        print(f"{name:10s} {type(model).__name__:32s} {parameters / 1e6:6.2f} M parameters  {shapes}")


if __name__ == "__main__":
    main()
