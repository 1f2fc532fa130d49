"""One training step of a Llama-3.2-1B-shaped model on one GPU: graphopt under budgets beside its peers.

    python benchmarks/gpu_train.py --out benchmarks/results/gpu_train.json

Model: transformers' Llama (16 layers, hidden 2048, vocabulary 128,256, bf16, tied embeddings, random
weights), 4 x 2,048 tokens, forward + backward, gradients allocated beforehand and held, loss only. Every
peer, and graphopt with each budget, runs in a process of its own. They compile side by side (so the seconds
of optimizing and of first steps are those of a busy processor) and run one after another. ``act_mib`` is
``max_memory_allocated``, with what CUDA graphs keep, minus parameters and gradients; ``whole_mib`` is all of
it, what a budget bounds. Times are medians after warm-up.

Peers: ``compile`` (torch.compile), ``compile-0.5`` (its ``activation_memory_budget``), ``blocks``
(each layer compiled, head and loss compiled), ``blocks-ckpt`` (the same under
``torch.utils.checkpoint``), ``liger`` and ``liger-ckpt`` where liger-kernel is installed.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from turns import await_turn, in_turns

MIB = 2**20
PEERS = (
    "blocks-ckpt",
    "compile",
    "compile-0.8",
    "compile-0.5",
    "compile-0.3",
    "compile-0.0",
    "blocks",
    "liger-ckpt",
    "liger",
)


class LossOnly(torch.nn.Module):
    """The model with its loss as the only output, as a training loop uses it."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, labels=labels).loss


def build(shape: argparse.Namespace) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden = shape.hidden
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(hidden // 256, 1),
        head_dim=64,
        vocab_size=shape.vocab,
        max_position_embeddings=max(shape.seq, 4096),
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        use_cache=False,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device()):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.train()


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    if device() == "cuda":
        torch.cuda.synchronize()


def timed(step: Any, model: torch.nn.Module, static: int, steps: int) -> dict[str, Any]:
    """One step that compiles and two more, then median milliseconds and peak bytes of ``step``."""
    begun = time.perf_counter()

    def once() -> torch.Tensor:
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.zero_()
        loss = step()
        loss.backward()
        return loss.detach()

    once()
    synchronize()
    first = time.perf_counter() - begun
    for _ in range(2):
        once()
    synchronize()
    await_turn()
    once()
    synchronize()
    if device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken = []
    for _ in range(steps):
        start = time.perf_counter()
        loss = once()
        synchronize()
        taken.append((time.perf_counter() - start) * 1e3)
    peak = torch.cuda.max_memory_allocated() + kept_by_graphs() if device() == "cuda" else 0
    return {
        "ms": round(statistics.median(taken), 2),
        "whole_mib": round(peak / MIB, 1),
        "whole_bytes": peak,
        "act_mib": round((peak - static) / MIB, 1),
        "first_step_s": round(first, 1),
        "loss": round(float(loss), 4),
    }


def kept_by_graphs() -> int:
    """Bytes of the pools of CUDA graphs that the allocator does not count as allocated: a replayed step uses
    them all the same."""
    segments = torch.cuda.memory_snapshot()
    pools = (s for s in segments if tuple(s["segment_pool_id"]) != (0, 0))
    return sum(s["total_size"] - s["allocated_size"] for s in pools)


def prepared(shape: argparse.Namespace) -> tuple[torch.nn.Module, torch.Tensor, int]:
    model = build(shape)
    ids = torch.randint(0, shape.vocab, (shape.batch, shape.seq), device=device())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    static = sum(2 * p.numel() * p.element_size() for p in model.parameters())
    return model, ids, static


def peer(name: str, shape: argparse.Namespace) -> dict[str, Any]:
    model, ids, static, step = peer_step(name, shape)
    return {"mode": name, **timed(lambda: step(ids), model, static, shape.steps)}


def peer_step(name: str, shape: argparse.Namespace) -> tuple[torch.nn.Module, torch.Tensor, int, Any]:
    """A peer's model, tokens, bytes of weights and gradients, and its loss as a function of tokens."""
    if name.startswith("liger"):
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(fused_linear_cross_entropy=True, cross_entropy=False)
    model, ids, static = prepared(shape)
    if name.endswith("ckpt"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    step: Any = lambda ids: model(input_ids=ids, labels=ids).loss  # noqa: E731
    if name.startswith("blocks"):
        for layer in model.model.layers:
            layer.compile(fullgraph=True)
        model.model.norm.compile()

        def head(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            logits = (hidden[:, :-1] @ weight.t()).float().flatten(0, 1)
            return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())

        compiled = torch.compile(head)
        step = lambda ids: compiled(model.model(input_ids=ids).last_hidden_state, model.lm_head.weight, ids)  # noqa: E731
    elif name.startswith("compile"):
        if "-" in name:
            import torch._functorch.config as functorch_config

            functorch_config.activation_memory_budget = float(name.split("-")[1])
        step = torch.compile(step)
    return model, ids, static, step


def ours(name: str, shape: argparse.Namespace) -> dict[str, Any]:
    """graphopt without a budget ("graphopt"), with one in MiB above weights and gradients ("graphopt@MIB"),
    or with a part of the feasible range ("graphopt@P%")."""
    import graphopt

    model, ids, static = prepared(shape)
    whole = LossOnly(model).train()
    inputs = {"input_ids": ids, "labels": ids}
    _, _, asked = name.partition("@")
    budget = None
    if asked.endswith("%"):
        least, most = least_and_most(graphopt.pareto(whole, inputs, emit="inductor"))
        budget = least + (most - least) * int(asked[:-1]) // 100
        torch._dynamo.reset()
        gc.collect()
    elif asked:
        budget = static + int(float(asked) * MIB)
    label = "graphopt-budget" if asked else "graphopt"
    begun = time.perf_counter()
    try:
        fast = graphopt.optimize(whole, inputs, budget=budget, emit="inductor", on_error="raise")
    except graphopt.BudgetError as error:
        return {"mode": label, "budget_mib": round((budget or 0) / MIB, 1), "least_bytes": error.least_bytes}
    optimized = time.perf_counter() - begun
    row = timed(lambda: fast(**inputs), model, static, shape.steps)
    predicted = fast.plan.predicted
    return row | {
        "mode": label,
        "optimize_s": round(optimized, 1),
        "plan_s": round(fast.plan.seconds_to_plan, 2),
        "budget_bytes": budget,
        "predicted_bytes": predicted.peak_bytes,
        "predicted_ms": round((predicted.seconds or 0) * 1e3, 1),
        "prediction_error": round(predicted.peak_bytes / row["whole_bytes"] - 1, 4)
        if row["whole_bytes"]
        else None,
        "obeyed": budget is None or row["whole_bytes"] <= budget,
        "points": [c.label for c in fast.plan.choices],
        "alternatives": sorted({c.alternative for c in fast.plan.choices} - {""}),
        "notes": list(fast.report.diagnostics),
        "moved_mib": round(sum(v.bytes for c in fast.plan.choices for v in c.offloaded) / MIB, 1),
        "lower_bound_s": fast.plan.lower_bound,
    }


def least_and_most(pareto: Any) -> tuple[int, int]:
    """The feasible range of budgets."""
    peaks = [point.peak_bytes for point in pareto.points]
    return min(peaks), max(peaks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="benchmarks/results/gpu_train.json")
    parser.add_argument("--one")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument(
        "--targets",
        type=lambda s: [float(x) for x in s.split(",") if x],
        default=[1832.0, 3147.0, 7460.0, 9151.0, 10000.0, 12585.0],
        help="activation budgets in MiB",
    )
    parser.add_argument(
        "--fractions",
        type=lambda s: [int(x) for x in s.split(",") if x],
        default=[0],
        help="further budgets, in percent of the feasible range",
    )
    parser.add_argument("--at-once", type=int, default=6, help="processes that get ready side by side")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds for everything")
    shape = parser.parse_args()
    if shape.one:
        found = ours(shape.one, shape) if shape.one.startswith("graphopt") else peer(shape.one, shape)
        print("RESULT " + json.dumps(found), flush=True)
        return
    if device() != "cuda":
        print("gpu_train needs a CUDA device")
        return
    rows: list[dict[str, Any]] = []
    modes = ["graphopt", *(m for m in shape.peers.split(",") if m)]
    modes += [f"graphopt@{mib:g}" for mib in shape.targets] + [
        f"graphopt@{part}%" for part in shape.fractions
    ]
    command = [sys.executable, __file__, *sys.argv[1:]]
    children = {mode: [*command, "--one", mode] for mode in modes}
    for mode, lines in in_turns(children, at_once=shape.at_once, seconds=shape.limit):
        found_rows = [json.loads(line[7:]) for line in lines if line.startswith("RESULT ")]
        if not found_rows:
            print(f"{mode}: no result", file=sys.stderr)
        for row in found_rows:
            rows.append(row)
            print(
                json.dumps({k: v for k, v in row.items() if k not in ("points", "whole_bytes")}), flush=True
            )
        save(shape, rows)
    if not rows:
        raise SystemExit("nothing gave a result")


def save(shape: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    import transformers

    document = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": sys.version.split()[0],
        },
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python benchmarks/gpu_train.py",
        "shape": {k: getattr(shape, k) for k in ("hidden", "layers", "batch", "seq", "vocab", "steps")},
        "missing": [peer for peer in shape.peers.split(",") if peer not in {row["mode"] for row in rows}],
        "rows": rows,
    }
    path = Path(shape.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    main()
