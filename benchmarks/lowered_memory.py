"""Peak memory of compiled training steps: read from Inductor's generated code, and measured.

    python benchmarks/lowered_memory.py [--device cpu|cuda] [--sources FOLDER] [MODEL ...]

Prints one JSON line a model: predicted and measured bytes of a forward and backward above
parameters and inputs (gradients included), and the error of the prediction.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from graphopt import _torch
from graphopt.emit.fused_memory import fused_live
from graphopt.emit.fusion import fuse
from graphopt.emit.lowered import LoweredCompiler, LoweredMemory, step_memory


class Attention(nn.Module):
    """Pre-norm causal self-attention and a feed-forward of four times the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.dropout(self.out(y.transpose(1, 2).reshape(batch, length, width)), 0.1)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    def __init__(self, vocabulary: int, layers: int, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Attention(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())


def mlp(big: bool) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    k = 8 if big else 1
    net = nn.Sequential(
        nn.Linear(64 * k, 256 * k), nn.GELU(), nn.Linear(256 * k, 256 * k), nn.Tanh(), nn.Linear(256 * k, 10)
    )
    return net, (torch.randn(128 * k, 64 * k),)


def gpt(big: bool) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    vocabulary, layers, width, length = (8192, 4, 512, 512) if big else (256, 2, 64, 64)
    return Gpt(vocabulary, layers, width, 4, length), (torch.randint(0, vocabulary, (4, length)),)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(width, 3 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).float().pow(2).mean()


def attention(big: bool) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Attention and nothing else, so that its backward is where the peak lies."""
    width, length = (256, 2000) if big else (64, 96)
    return SelfAttention(width, 4), (torch.randn(4, length, width),)


def conv(big: bool) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    side = 128 if big else 32
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    return net, (torch.randn(8, 3, side, side),)


def llama(big: bool) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    k = 4 if big else 1
    config = LlamaConfig(
        vocab_size=512 * k, hidden_size=128 * k, intermediate_size=256 * k, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=ids, labels=ids).loss

    return Loss(), (torch.randint(0, 512, (4, 64 * k)),)


MODELS: dict[str, Callable[[bool], tuple[nn.Module, tuple[torch.Tensor, ...]]]] = {
    "mlp": mlp, "gpt": gpt, "attention": attention, "conv": conv, "llama": llama,
}  # fmt: skip


def measured_peak(step: Callable[[], object], device: str) -> tuple[int, int]:
    """Largest bytes that ``step`` holds above what was allocated before it: as the allocator
    counts them, and (CUDA) as they were asked for, without blocks being handed out whole."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()
        step()
        torch.cuda.synchronize()
        after = torch.cuda.memory_stats()
        keys = ("allocated_bytes.all", "requested_bytes.all")
        allocated, requested = (int(after[f"{k}.peak"] - before[f"{k}.current"]) for k in keys)
        return allocated, requested
    now = peak = 0
    for size in _torch.record_allocations(step):
        now += size
        peak = max(peak, now)
    return peak, peak


def guess(gm: Any, record: LoweredMemory, forward: LoweredMemory) -> int:
    """Peak above the inputs that the fusion model expects, before compiling; for a backward, above
    what the forward retains."""
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    owned = []
    if record.phase == "backward":
        users = len(forward.output_names) - sum("tangents" not in name for name in record.input_names)
        owned = [n for n in record.input_names if "tangents" in n]
        for storage in forward.storages:
            if storage.outputs and not storage.input and min(storage.outputs) >= users:
                owned.append(forward.output_names[storage.outputs[0]])
    granularity = 1 if record.device_type == "cpu" else 512
    fused = fuse(calls, record.output_names, device_type=record.device_type)
    live = fused_live(fused, owned, granularity=granularity)
    return max(value for _, value in live)


def run(name: str, device: str, sources: Path | None) -> dict[str, Any]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, inputs = MODELS[name](device == "cuda")
    model.to(device)
    if device == "cuda" and name in ("gpt", "llama", "attention"):
        model.to(torch.bfloat16)
    dtype = next(model.parameters()).dtype
    inputs = tuple(x.to(device, dtype) if x.is_floating_point() else x.to(device) for x in inputs)
    seen: list[tuple[Any, list[Any], Any]] = []

    def keep(gm: Any, example_inputs: Any, **kwargs: Any) -> Any:
        before = copy.deepcopy(gm)
        compiled = _torch.inductor_inner_compile(gm, example_inputs, **kwargs)
        seen.append((compiled, list(example_inputs), before))
        return compiled

    compiler = LoweredCompiler(granularity=512 if device == "cuda" else 1, compile=keep)

    def backend(gm: Any, example_inputs: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        # A hit in AOTAutograd's cache would skip the inner compilation, and with it the records.
        with _torch.functorch_settings(enable_autograd_cache=False):
            return compile_fx(gm, example_inputs, inner_compile=compiler)

    compiled = torch.compile(model, backend=backend, dynamic=False)

    def step() -> torch.Tensor:
        out = compiled(*inputs)
        loss = out if out.ndim == 0 else out.float().pow(2).mean()
        loss.backward()
        return out

    for _ in range(2):
        step()
        model.zero_grad(set_to_none=True)
    measured, requested = measured_peak(step, device)
    predicted = step_memory(*compiler.records)
    guesses = [
        guess(s[2], record, compiler.records[0]) for s, record in zip(seen, compiler.records, strict=True)
    ]
    guessed = max(guesses[0], predicted.retained + guesses[1])
    if sources is not None:
        for (result, examples, _), record in zip(seen, compiler.records, strict=True):
            shapes = [
                (str(x.dtype), tuple(x.shape), x.stride()) if isinstance(x, torch.Tensor) else x
                for x in examples
            ]
            text = _torch.generated_source(result)
            (sources / f"{name}_{device}_{record.phase}.txt").write_text(
                f"# INPUTS {shapes}\n{text[0] if text else ''}"
            )
    return {
        "model": name,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "predicted": predicted.peak_bytes,
        "measured": measured,
        "requested": requested,
        "error_percent": round(100 * (predicted.peak_bytes - measured) / measured, 4),
        "guessed": guessed,
        "guess_error_percent": round(100 * (guessed - predicted.peak_bytes) / predicted.peak_bytes, 4),
        "forward_peak": predicted.forward_peak,
        "retained": predicted.retained,
        "backward_peak": predicted.backward_peak,
        "gradients": predicted.gradients,
        "at": max(predicted.steps, key=lambda s: s[2])[:2],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda")
    )
    parser.add_argument("--sources", type=Path, help="folder for the generated sources")
    options = parser.parse_args()
    for name in options.models:
        print(json.dumps(run(name, options.device, options.sources)), flush=True)


if __name__ == "__main__":
    main()
