"""Training steps of a sharded Llama-3.2-1B shape on every GPU here: graphopt beside its peers under FSDP2.

    python benchmarks/gpu_fsdp.py --out benchmarks/results/gpu_fsdp.json

Model: transformers' Llama (16 layers, hidden 2048, vocabulary 128,256, random weights), each layer and the
root under ``fully_shard``, weights gathered in bf16, gradients reduced in float32, 4 x 2,048 tokens on each
GPU, forward + backward + AdamW. One process for each GPU, made here; NCCL between them. Every mode runs in
processes of its own.

``compile``: each layer, norm and head with loss under ``torch.compile``; ``compile-ckpt``: layers under
``torch.utils.checkpoint`` besides (everything in them runs again). ``graphopt@MODE``: the whole sharded model
under a budget of what that mode's forward and backward took at its peak, on the rank that it took most on,
or, where that is refused (``asked_bytes``), of the least that fits;
``graphopt``: without a budget. Figures are of forward and backward: ``peak_bytes`` is
``max_memory_allocated`` of each rank, parameters and states of the optimizer with it, ``tokens_per_s`` sums
over ranks, at the median step of the slowest. A mode that is not done within ``--mode-limit`` is ended, and
the results say so.

``--quick``: four layers, fewer steps. ``--tiny``: a few kilobytes, two processes, Gloo and CPU, no code
generated: that it runs, not what it takes (peaks are then those of ``Optimized.measure``, tokens a second
mean nothing).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from graphopt.atomic import write_atomically

MODES = ("compile-ckpt", "compile", "graphopt@compile-ckpt", "graphopt@compile", "graphopt")
SHAPE = ("hidden", "intermediate", "layers", "heads", "kv_heads", "vocab", "batch", "seq", "steps")


class LossOnly(torch.nn.Module):
    """Layers, norm, head and loss, laid out so that each part can be compiled."""

    def __init__(self, shape: argparse.Namespace) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.hidden // shape.heads,
            vocab_size=shape.vocab,
            max_position_embeddings=max(shape.seq, 4096),
            tie_word_embeddings=True,
            attn_implementation="sdpa",
            use_cache=False,
        )
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(config)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.model.model(input_ids=ids).last_hidden_state
        return self.loss(hidden, self.model.lm_head.weight, ids)

    def loss(self, hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        logits = (hidden[:, :-1] @ weight.t()).float().flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())


def sharded(shape: argparse.Namespace, device: torch.device) -> LossOnly:
    with torch.device(device):
        made = LossOnly(shape)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in made.model.model.layers:
        fully_shard(layer, mp_policy=policy)
    return fully_shard(made, mp_policy=policy).train()


def compiled(made: LossOnly, *, checkpoints: bool, backend: str) -> LossOnly:
    """The peer: each part under ``torch.compile``."""
    if checkpoints:
        made.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in made.model.model.layers:
        layer.compile(backend=backend)
    made.model.model.norm.compile(backend=backend)
    made.loss = torch.compile(made.loss, backend=backend)  # type: ignore[method-assign]
    return made


def run(rank: int, shape: argparse.Namespace, mode: str, budget: int | None, folder: str) -> None:
    """One mode on one rank; the result goes to a file of its own in ``folder``."""
    world = shape.world
    device = torch.device("cpu") if shape.tiny else torch.device("cuda", rank)
    if not shape.tiny:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo" if shape.tiny else "nccl",
        init_method=f"file://{folder}/store-{mode.replace('@', '-')}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=shape.mode_limit),
    )
    row = measured(rank, shape, mode, budget, device)
    write_atomically(Path(folder) / f"{rank}.json", json.dumps(row))
    dist.barrier()
    dist.destroy_process_group()


def measured(
    rank: int, shape: argparse.Namespace, mode: str, budget: int | None, device: torch.device
) -> dict[str, Any]:
    made = sharded(shape, device)
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-5, foreach=not shape.tiny)
    generator = torch.Generator(device).manual_seed(rank)
    ids = torch.randint(0, shape.vocab, (shape.batch, shape.seq), device=device, generator=generator)
    # States of the optimizer are there before the first step: budgets bound what comes on top of them too.
    for parameter in made.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    states = sum(
        getattr(t, "_local_tensor", t).untyped_storage().nbytes()
        for state in optimizer.state.values()
        for t in state.values()
        if isinstance(t, torch.Tensor) and t.device.type == device.type
    )
    row: dict[str, Any] = {"mode": mode, "rank": rank, "state_bytes": states}
    begun = time.perf_counter()
    if mode.startswith("graphopt"):
        import graphopt

        emit, passes = ("eager", "insert-checkpoints") if shape.tiny else ("auto", None)

        def optimized(limit: int | None) -> torch.nn.Module:
            bound = None if limit is None else graphopt.Budget(limit, reserve=states)
            return graphopt.optimize(
                made, (ids,), budget=bound, emit=emit, pipeline=passes, on_error="raise"
            )

        module: torch.nn.Module
        try:
            module = optimized(budget)
        except graphopt.BudgetError as error:
            # Refused; what the least that fits takes is measured all the same.
            row |= {"asked_bytes": budget, "least_bytes": error.least_bytes + states}
            budget = error.least_bytes + states
            module = optimized(budget)
        row |= {"optimize_s": round(time.perf_counter() - begun, 1), "budget_bytes": budget}
    else:
        backend = "aot_eager" if shape.tiny else "inductor"
        module = compiled(made, checkpoints=mode.endswith("ckpt"), backend=backend)

    seconds, peak = timed(lambda: module(ids), optimizer, shape.steps, device)
    if shape.tiny and mode.startswith("graphopt"):
        peak = module.measure((ids,), repeats=1).peak_bytes + states  # type: ignore[operator]
    row |= {"step_ms": round(statistics.median(seconds) * 1e3, 2), "peak_bytes": peak}
    if mode.startswith("graphopt"):
        plan, report = module.plan, module.report
        row |= {
            "predicted_bytes": plan.predicted.peak_bytes + states,  # type: ignore[union-attr]
            "obeyed": budget is None or peak <= budget,
            "plan_s": round(plan.seconds_to_plan, 1),  # type: ignore[union-attr, arg-type]
            "points": [choice.label for choice in plan.choices],  # type: ignore[union-attr]
            "notes": list(report.diagnostics),  # type: ignore[union-attr]
        }
    return row


def timed(
    forward: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer, steps: int, device: torch.device
) -> tuple[list[float], int]:
    """Seconds of the forwards and backwards of ``steps`` steps, after three, and their peak in bytes."""
    seconds, peak = [], 0
    for number in range(3 + steps):
        dist.barrier()
        _synchronize(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        forward().backward()
        _synchronize(device)
        if number >= 3:
            seconds.append(time.perf_counter() - start)
            peak = max(peak, torch.cuda.max_memory_allocated() if device.type == "cuda" else 0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return seconds, peak


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def in_processes(shape: argparse.Namespace, mode: str, budget: int | None) -> list[dict[str, Any]]:
    """The rows of all ranks; one row that says why where there are none."""
    with tempfile.TemporaryDirectory() as folder:
        running = multiprocessing.spawn(
            run, args=(shape, mode, budget, folder), nprocs=shape.world, join=False
        )
        end = time.monotonic() + shape.mode_limit
        try:
            while not running.join(timeout=1.0):
                if time.monotonic() > end:
                    return [{"mode": mode, "error": f"not done within {shape.mode_limit:g} s"}]
        except Exception as error:
            return [{"mode": mode, "error": str(error).strip().splitlines()[-1][:300]}]
        finally:
            for process in running.processes:
                if process.is_alive():
                    process.kill()
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(shape.world)]


def budget_of(mode: str, rows: list[dict[str, Any]], shape: argparse.Namespace) -> int | str | None:
    """The peak of the peer that ``mode`` is to match, ``None`` for a mode without a budget, or why there is
    none to match."""
    _, _, peer = mode.partition("@")
    if not peer:
        return None
    peaks = [row["peak_bytes"] for row in rows if row["mode"] == peer and "peak_bytes" in row]
    if shape.tiny:
        # Nothing counts the peers' memory on a CPU: a part of what graphopt measured without a budget.
        free = [row["peak_bytes"] for row in rows if row["mode"] == "graphopt" and "peak_bytes" in row]
        return int(0.95 * max(free)) if free else "graphopt did not run"
    return max(peaks) if peaks else f"{peer} did not run"


def summary(rows: list[dict[str, Any]], shape: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of each mode over all ranks, beside the mode that it was to match."""
    tokens = shape.batch * shape.seq * shape.world
    found: dict[str, Any] = {}
    for mode in dict.fromkeys(row["mode"] for row in rows):
        own = [row for row in rows if row["mode"] == mode and "step_ms" in row]
        if own:
            found[mode] = {
                "tokens_per_s": round(tokens / max(row["step_ms"] for row in own) * 1e3, 1),
                "peak_bytes": max(row["peak_bytes"] for row in own),
                "obeyed": all(row.get("obeyed", True) for row in own),
            }
    for mode, row in found.items():
        peer = mode.partition("@")[2]
        if peer in found:
            row["of_peer"] = round(row["tokens_per_s"] / found[peer]["tokens_per_s"], 3)
    return found


def save(shape: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    import transformers

    document = {
        "device": "cpu" if shape.tiny else torch.cuda.get_device_name(),
        "ranks": shape.world,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": sys.version.split()[0],
        },
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", "benchmarks/gpu_fsdp.py", *sys.argv[1:]]),
        "shape": {name: getattr(shape, name) for name in SHAPE},
        "summary": summary(rows, shape),
        "rows": rows,
    }
    path = Path(shape.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(document, indent=1) + "\n")


def main() -> None:
    folder = os.environ.get("OUT", "benchmarks/results")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", default=f"{folder}/gpu_fsdp.json")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--batch", type=int, default=4, help="sequences on each GPU")
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--mode-limit", type=float, default=300.0, help="seconds for one mode")
    parser.add_argument("--quick", action="store_true", help="four layers, three steps")
    parser.add_argument("--tiny", action="store_true", help="two processes on the CPU, to see that it runs")
    shape = parser.parse_args()
    if shape.quick:
        shape.layers, shape.steps = 4, 3
    if shape.tiny:
        shape.hidden, shape.intermediate, shape.heads, shape.kv_heads = 64, 128, 4, 2
        shape.layers, shape.vocab, shape.batch, shape.seq, shape.steps = 2, 256, 2, 64, 2
    elif not torch.cuda.is_available():
        raise SystemExit("gpu_fsdp needs CUDA devices, or --tiny")
    shape.world = 2 if shape.tiny else torch.cuda.device_count()
    modes = [mode for mode in shape.modes.split(",") if mode]
    if shape.tiny:
        modes.sort(key=lambda mode: "@" in mode)
    rows: list[dict[str, Any]] = []
    for mode in modes:
        budget = budget_of(mode, rows, shape)
        if isinstance(budget, str):
            found = [{"mode": mode, "error": budget}]
        else:
            found = in_processes(shape, mode, budget)
        for row in found:
            print(json.dumps({key: value for key, value in row.items() if key != "points"}), flush=True)
        rows += found
        save(shape, rows)
    if not any("step_ms" in row for row in rows):
        raise SystemExit("nothing gave a result")


if __name__ == "__main__":
    main()
