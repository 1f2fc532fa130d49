"""Tokens a second of decoding on one GPU, a Llama-3.1-8B shape with random weights, beside torch.compile.

    python benchmarks/gpu_decode.py --out benchmarks/results/gpu_decode.json

Greedy, ``--context`` tokens before, bf16 but for packed weights. ``graphopt`` generates with
``optimize(generate=...)``; ``graphopt-SCHEME`` the same with weights packed by ``graphopt.quantize`` before
(the head and the table of embeddings too where the scheme has rows), ``+PASS`` behind either with that pass
besides the default ones: a pass by its name, ``quant-BITS`` (``keep-kv`` with stores of that many bits) or
``swiftkv`` (``share-kv`` with that preset: later keys and values out of one early stream). ``compile`` is
torch.compile (``reduce-overhead``) of a step of transformers with a static cache, ``ao-int8`` and ``ao-int4``
that after torchao's weight-only quantization, where torchao is installed. ``ms`` is of one more token: the
difference of two lengths of generation over the tokens between, median of ``--repeats``, host included;
``prompt_ms`` is what remains of the shorter one, above all the prompt. ``compile`` runs prompts through
transformers as they are. ``floor`` is the part
of that in which the weights alone are read at the read bandwidth of the device table. ``same`` is how many of
the first ``--checked`` tokens are those that the model gives before anything is compiled or packed; with
random weights the best two logits are often alike in bf16, so it says little. ``regret`` says more: by how
much the logit of each generated token is below the largest, both in float32 over the same tokens, in standard
deviations of logits, mean of all. Processes get ready side by side and measure one after another.
``--profile`` writes beside the result what kernels took, a token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from turns import await_turn, in_turns

from graphopt.atomic import write_atomically

MODES = "compile,graphopt,graphopt-int8,graphopt-fp8,graphopt-int4"
READ = 4.28e12
"""Bytes a second, ``graphopt_cost_model/devices/h200.yaml``."""


class Logits(nn.Module):
    """A model that returns logits alone, and has no loop of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def built(given: argparse.Namespace) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=given.hidden, intermediate_size=given.inner, num_hidden_layers=given.layers,
        num_attention_heads=given.heads, num_key_value_heads=given.groups, vocab_size=given.vocab,
        max_position_embeddings=max(8192, given.capacity), attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(given.device):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def weight_bytes(model: nn.Module) -> int:
    """Of what a token reads: all but the table of embeddings."""
    held = {id(t): t for name, t in model.state_dict().items() if "embed_tokens" not in name}
    return sum(t.nbytes for t in held.values())


def static_cache(
    given: argparse.Namespace, model: Any, packed: str
) -> Callable[[torch.Tensor, int], torch.Tensor]:
    from transformers import StaticCache

    if packed:
        from torchao import quantization

        if packed == "int8":
            quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        else:
            layout = "tile_packed_to_4d"
            quantization.quantize_(
                model, quantization.Int4WeightOnlyConfig(group_size=128, int4_packing_format=layout)
            )
    cache = StaticCache(config=model.config, max_cache_len=given.capacity)

    def step(token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        logits = model(
            input_ids=token, past_key_values=cache, cache_position=position,
            position_ids=position[None].expand(len(token), 1), use_cache=True,
        ).logits  # fmt: skip
        chosen: torch.Tensor = logits[:, -1:].argmax(-1)
        return chosen

    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)

    def generate(prompt: torch.Tensor, new: int) -> torch.Tensor:
        cache.reset()
        position = torch.arange(prompt.shape[1], device=prompt.device)
        with torch.no_grad():
            logits = model(
                input_ids=prompt, past_key_values=cache, cache_position=position, use_cache=True,
                logits_to_keep=1,
            ).logits  # fmt: skip
            token, found = logits[:, -1:].argmax(-1), []
            position = position[-1:] + 1
            for _ in range(new - 1):
                found.append(token)
                torch.compiler.cudagraph_mark_step_begin()
                token = compiled(token, position).clone()
                position = position + 1
        return torch.cat([prompt, *found, token], 1)

    return generate


def decoding(given: argparse.Namespace, model: Any, mode: str) -> tuple[Callable[..., torch.Tensor], Any]:
    import graphopt

    kind, *passes = mode.split("+")
    scheme = kind.removeprefix("graphopt").removeprefix("-")

    whole, ids = Logits(model).eval(), torch.randint(0, given.vocab, (1, 32), device=given.device)
    if scheme:
        graphopt.quantize(whole, (ids,), schemes=(scheme,))
    wanted = graphopt.Generate(max_tokens=given.capacity, max_batch=given.batch)
    fast = graphopt.optimize(
        whole, (ids,), generate=wanted, on_error="raise", emit=given.emit, cache=False,
        pipeline=["default", *map(step_named, passes)] if passes else None,
    )  # fmt: skip
    return lambda prompt, new: fast.generate(prompt, max_new_tokens=new), fast


def step_named(name: str) -> Any:
    import graphopt

    kind, _, bits = name.partition("-")
    if kind == "quant":
        return graphopt.use("keep-kv", store=f"quant{{bits={bits}}}")
    return graphopt.use("share-kv", preset="swiftkv") if name == "swiftkv" else name


def same_tokens(found: torch.Tensor, plain: torch.Tensor) -> int:
    """How many come before the first difference."""
    return int((found[:, : plain.shape[1]] == plain).all(0).cumprod(0).sum())


def one(given: argparse.Namespace) -> dict[str, Any]:
    mode, report = given.one, None
    model = built(given)
    prompt = torch.randint(0, given.vocab, (given.batch, given.context), device=given.device)
    plain = prompt
    with torch.no_grad():
        for _ in range(given.checked):
            logits = model(plain, use_cache=False, logits_to_keep=1).logits
            plain = torch.cat([plain, logits[:, -1:].argmax(-1)], 1)
    begun = time.perf_counter()
    if mode in ("compile", "ao-int8", "ao-int4"):
        generate = static_cache(given, model, mode.removeprefix("compile").removeprefix("ao-"))
    else:
        generate, report = decoding(given, model, mode)
    ready = time.perf_counter() - begun
    few, many = 8, 8 + given.tokens
    generate(prompt, few)
    found = generate(prompt, many)
    compiled = time.perf_counter() - begun
    await_turn()
    taken, prompts = [], []
    for _ in range(given.repeats):
        seconds = []
        for new in (few, many):
            _synchronize(given)
            start = time.perf_counter()
            generate(prompt, new)
            _synchronize(given)
            seconds.append(time.perf_counter() - start)
        taken.append((seconds[1] - seconds[0]) / given.tokens)
        prompts.append(seconds[0] - few * taken[-1])
    seconds_each = statistics.median(taken)
    held = weight_bytes(model)
    row = {
        "mode": mode,
        "batch": given.batch,
        "ms": round(seconds_each * 1e3, 3),
        "tokens_per_s": round(given.batch / seconds_each, 1),
        "prompt_ms": round(statistics.median(prompts) * 1e3, 2),
        "context": given.context,
        "capacity": given.capacity,
        "weight_gib": round(held / 2**30, 2),
        "floor": round(held / READ / seconds_each, 3),
        "same": same_tokens(found[:, given.context :], plain[:, given.context :]),
        "ready_s": round(ready, 1),
        "compiled_s": round(compiled, 1),
    }
    if given.device == "cuda":
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    if given.profile:
        profiled(lambda: generate(prompt, many), many, given.out.with_suffix(f".{mode}.txt"))
    del model
    row["regret"] = round(regret(found, given.context, given), 5)
    if report is not None:
        row["off"] = report.report.decoding.off
        row["notes"] = [str(note)[:300] for note in report.report.diagnostics]
    return row


def regret(whole: torch.Tensor, context: int, given: argparse.Namespace) -> float:
    """Of the tokens behind ``context``, by a float32 model; a sequence at a time, one of long ones."""
    model = built(given).float()
    lost = []
    for tokens in whole[: 4 if context < 4096 else 1]:
        with torch.no_grad():
            kept = len(tokens) - context
            logits = model(input_ids=tokens[None, :-1], use_cache=False, logits_to_keep=kept).logits[0]
        chosen = logits.gather(1, tokens[context:, None])[:, 0]
        lost.append(((logits.amax(1) - chosen) / logits.std(1)).mean())
    return float(torch.stack(lost).mean())


def profiled(call: Callable[[], Any], tokens: int, path: Path) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    found_rows = [(e.self_device_time_total, e.count, e.key) for e in found.key_averages()]
    lines = [
        f"{us / tokens:9.1f} us {count / tokens:7.1f} x {us / count:8.2f}  {key[:110]}"
        for us, count, key in sorted(found_rows, reverse=True)
        if us
    ]
    lines.append(f"all {sum(us for us, *_ in found_rows) / tokens:.1f} us a token")
    path.write_text("\n".join(lines) + "\n")


def _synchronize(given: argparse.Namespace) -> None:
    if given.device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_decode.json"))
    parser.add_argument("--modes", default=MODES)
    parser.add_argument("--one")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--emit", default="inductor")
    for name, number in (
        ("batch", 1), ("context", 512), ("capacity", 1024), ("tokens", 128), ("checked", 16), ("repeats", 5),
        ("hidden", 4096), ("inner", 14336), ("layers", 32), ("heads", 32), ("groups", 8), ("vocab", 128256),
        ("at-once", 3), ("seconds", 500),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    if given.one:
        print("RESULT " + json.dumps(one(given)), flush=True)
        return
    commands = {
        mode: [sys.executable, __file__, *sys.argv[1:], "--one", mode] for mode in given.modes.split(",")
    }
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if given.device == "cuda" else "cpu",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python benchmarks/gpu_decode.py" + "".join(
            f" --{name} {getattr(given, name)}"
            for name in ("modes", "batch", "context", "capacity")
            if getattr(given, name) != parser.get_default(name)
        ),
        "rows": [],
        "missing": [],
    }
    for mode, lines in in_turns(commands, at_once=given.at_once, seconds=given.seconds):
        rows = [line[7:] for line in lines if line.startswith("RESULT ")]
        if rows:
            print(rows[0], flush=True)
            document["rows"].append(json.loads(rows[0]))
        else:
            print(f"{mode}: no result", flush=True)
            document["missing"].append(mode)
        write_atomically(given.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
