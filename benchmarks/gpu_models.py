"""Training steps of models that are no Llama, on one GPU, no budget: graphopt beside torch.compile and eager.

    python benchmarks/gpu_models.py --out benchmarks/results/gpu_models.json

GPT-2 medium (8 x 1,024 tokens, dropout off), ViT-L/16 (64 images of 224 x 224) and ConvNeXt-B (64 images),
from transformers' classes with random weights, bf16, forward + backward, gradients allocated beforehand and
held. Each mode runs in a process of its own; the processes compile side by side and run one after another.
Medians after warm-up; ``act_mib`` is the peak above weights and gradients.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from gpu_train import timed
from turns import in_turns

MODES = ("graphopt", "compile", "eager")


class WithLoss(torch.nn.Module):
    """A classifier with its loss as the only output."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.model(pixel_values=pixel_values).logits
        return torch.nn.functional.cross_entropy(logits.float(), labels)


class TextLoss(torch.nn.Module):
    """A language model with its loss as the only output."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(input_ids=input_ids, labels=labels).loss
        return found


def gpt2_medium(batch: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=1024,
        n_layer=24,
        n_head=16,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    ids = torch.randint(0, config.vocab_size, (batch, 1024))
    return TextLoss(model), {"input_ids": ids, "labels": ids.clone()}


def vit_large(batch: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        num_labels=1000,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return WithLoss(ViTForImageClassification(config)), images(batch)


def convnext_base(batch: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(
        hidden_sizes=[128, 256, 512, 1024], depths=[3, 3, 27, 3], num_labels=1000, drop_path_rate=0.0
    )
    return WithLoss(ConvNextForImageClassification(config)), images(batch)


def images(batch: int) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.randn(batch, 3, 224, 224, dtype=torch.bfloat16),
        "labels": torch.randint(0, 1000, (batch,)),
    }


MODELS: dict[str, tuple[Callable[..., tuple[torch.nn.Module, dict[str, torch.Tensor]]], int]] = {
    "gpt2-medium": (gpt2_medium, 8),
    "vit-large": (vit_large, 64),
    "convnext-base": (convnext_base, 64),
}


def one(name: str, mode: str, steps: int) -> dict[str, Any]:
    build, batch = MODELS[name]
    torch.manual_seed(0)
    model, inputs = build(batch)
    model = model.to("cuda", torch.bfloat16).train()
    inputs = {key: value.cuda() for key, value in inputs.items()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    static = sum(2 * p.numel() * p.element_size() for p in model.parameters())
    called: Any = model
    if mode == "compile":
        called = torch.compile(model)
    elif mode == "graphopt":
        import graphopt

        called = graphopt.optimize(model, inputs, emit="inductor", on_error="raise")
    row = timed(lambda: called(**inputs), model, static, steps)
    return {"model": name, "batch": batch, "mode": mode, **row}


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_models.json"))
    options.add_argument("--models", default=",".join(MODELS))
    options.add_argument("--steps", type=int, default=15)
    options.add_argument("--at-once", type=int, default=9, help="processes that get ready side by side")
    options.add_argument("--limit", type=float, default=400.0, help="seconds for everything")
    options.add_argument("--one", nargs=2, metavar=("MODEL", "MODE"))
    given = options.parse_args()
    if not torch.cuda.is_available():
        print("gpu_models needs a CUDA device")
        return
    if given.one:
        print("RESULT " + json.dumps(one(*given.one, given.steps)), flush=True)
        return
    rows: list[dict[str, Any]] = []
    command = [sys.executable, __file__, "--steps", str(given.steps), "--one"]
    children = {
        f"{name} {mode}": [*command, name, mode] for name in given.models.split(",") for mode in MODES
    }
    for label, lines in in_turns(children, at_once=given.at_once, seconds=given.limit):
        found = [line[7:] for line in lines if line.startswith("RESULT ")]
        name, mode = label.split()
        rows.append(json.loads(found[0]) if found else {"model": name, "mode": mode, "error": "it failed"})
        print(json.dumps(rows[-1]), flush=True)
        save(given.out, rows)


def save(path: Path, rows: list[dict[str, Any]]) -> None:
    import transformers

    times = {(row["model"], row["mode"]): row["ms"] for row in rows if "ms" in row}
    ratios = {
        name: round(times[name, "compile"] / times[name, "graphopt"], 3)
        for name in MODELS
        if (name, "compile") in times and (name, "graphopt") in times
    }
    mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios)) if ratios else None
    document = {
        "device": torch.cuda.get_device_name(),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": sys.version.split()[0],
        },
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python benchmarks/gpu_models.py",
        "faster_than_compile": ratios,
        "geomean": mean and round(mean, 3),
        "rows": rows,
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
