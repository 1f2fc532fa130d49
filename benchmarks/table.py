"""Write docs/benchmarks.md from the results in benchmarks/results.

python benchmarks/table.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from table_cells import good, mib, number, percent, table, verdict
from table_decode import (
    gpu_context,
    gpu_decode,
    gpu_decode_attention,
    gpu_decode_large,
    kv_stores,
    page,
    share_kv,
)
from table_framework import matcher, optimize_time, overhead, start_up
from table_gpu import (
    gpu_attention,
    gpu_compile_time,
    gpu_convolutions,
    gpu_emitted_attention,
    gpu_fsdp,
    gpu_kernels,
    gpu_longest,
    gpu_models,
    gpu_optimizer,
    gpu_pack_linears,
    gpu_products,
    gpu_quantized,
    gpu_resnet1000,
    gpu_rotary,
    gpu_step,
    gpu_step_kernels,
    gpu_train,
)
from table_op_db import op_db
from table_quality import quality_packed
from table_random_graphs import random_graphs
from table_zoo import gpu_zoo, zoo

from graphopt.atomic import write_atomically

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"

HEAD = """# Benchmarks

Written by `python benchmarks/table.py` from the files in `benchmarks/results`; do not edit. Each
file holds the device, versions, date, command and every row.
"""


def prediction(record: dict[str, Any]) -> str:
    summary, rows = record["summary"], good(record)
    models = dict.fromkeys(row["model"] for row in rows)
    cells = []
    for model in models:
        own = [row for row in rows if row["model"] == model]
        bytes_off = max(abs(row["error_bytes"]) for row in own)
        percent_off = f"{max(row['error_percent'] for row in own):.4f} %"
        cells.append((model, own[0]["graphs"], len(own), mib(own[0]["measured"]), bytes_off, percent_off))
    return (
        "## 1. Predicted against measured peak, op by op\n\n"
        f"Target: error of at most {summary['target_percent']} % at the baseline and three budgets: "
        f"{verdict(summary['met'])}. Exact to the byte at {summary['exact_to_the_byte']} of "
        f"{summary['points']} points.\n\n"
        + table(("model", "graphs", "plans", "baseline peak", "worst error, bytes", "worst error"), cells)
    )


def obedience(record: dict[str, Any]) -> str:
    summary = record["summary"]
    cells = [(row["model"], row["budgets"], row["within"], row["rises"]) for row in good(record)]
    return (
        "## 2. Is the budget kept?\n\n"
        "Target: the measured peak is within every budget, and never rises when the budget falls: "
        f"{verdict(summary['met'])}. {summary['within']} of {summary['budgets']} budgets kept, "
        f"{summary['rises']} rises.\n\n" + table(("model", "budgets", "kept", "rises"), cells)
    )


def torch_budget(record: dict[str, Any]) -> str:
    summary = record["summary"]
    parts = []
    for objective in ("flops", "seconds"):
        cells = []
        for row in good(record):
            part = row[objective]
            cells.append((
                row["model"], number(part["peak_ratio"]), number(part["flops_ratio"]),
                ", ".join(map(str, part["dominated_by"])) or "none",
            ))  # fmt: skip
        whole = summary[objective]
        cells.append(("geometric mean", number(whole["peak_ratio"]), number(whole["flops_ratio"]), ""))
        head = ("model", "peak / torch's least, no more FLOPs", "FLOPs / torch's, at its least peak",
                "settings of torch's that beat every point of ours")  # fmt: skip
        parts.append(f"Searched for the least {objective}:\n\n" + table(head, cells))
    met = summary["met"]
    return (
        "## 3. Against torch's activation_memory_budget, 21 settings, same joint graph\n\n"
        f"Dominated by none: {verdict(met['dominated_by_none'])}. Peak at most 0.75: {verdict(met['peak'])}. "
        f"Recomputed FLOPs at most 0.25: {verdict(met['flops'])}. Peaks are above parameters, buffers and "
        "inputs, gradients included, by the simulation that figure 1 checks; a ratio of FLOPs below "
        f"{summary['flops_floor']} counts as that.\n\n" + "\n\n".join(parts)
    )


def exactness(record: dict[str, Any]) -> str:
    summary = record["summary"]
    cells = [
        (
            row["model"], row["tensors"], ", ".join(row["differing"]) or "none",
            row["differing_from_captured"], row["differing_from_eager"],
        )
        for row in good(record)
    ]  # fmt: skip
    head = ("model", "tensors compared", "differing", "differing from dynamo's graphs", "from plain eager")
    return (
        "## 4. Bitwise equality\n\n"
        "Loss, gradients and buffers of budgeted steps against the step without a budget, op by op, "
        f"deterministic algorithms, dropout on: {verdict(summary['met'])}.\n\n"
        + table(head, cells)
        + "\n\nThe last two columns count tensors in which the step without a budget differs from the graphs "
        "that dynamo makes of the model, run as they are, and from plain eager. Models look at whether they "
        "are being captured: then transformers repeats the keys and values of grouped-query attention "
        "(Llama, Qwen3), where eagerly it leaves that to the attention kernel, and Mamba's scan takes "
        "another form. Rounding differs already between those two, without graphopt. Where several programs "
        "read one value (Whisper's decoder layers the encoder's output, with LayerDrop), each sums its own "
        'gradients of it first, as with `torch.compile(backend="aot_eager")`, of which no tensor differs; '
        "autograd alone adds them one after another."
    )


def planning_time(record: dict[str, Any]) -> str:
    summary = record["summary"]
    cells = [
        (
            row["model"],
            row["joint_nodes"],
            f"{row['plan_cpu_seconds']:.2f}",
            f"{row['plan_seconds']:.2f}",
            f"{row['search_cpu_seconds']:.2f}",
            f"{row['change_ms']:.3f}",
            f"{row['change_ms_recomputing']:.3f}",
            f"{row['total_seconds']:.1f}",
            f"{row['load_average']:.1f}",
        )
        for row in good(record)
    ]

    def against(name: str, key: str, unit: str) -> str:
        part = summary[name]
        found = "not measured" if part[key] is None else f"{part[key]:.3g} {unit}"
        nodes = f"{part['joint_nodes']:,} nodes" if part["joint_nodes"] else "no such program"
        return f"{found} of {part['target']:g} {unit} ({nodes}): {verdict(part['met'])}"

    seconds = {name: against(name, "plan_cpu_seconds", "s") for name in ("small", "large", "deep")}
    return (
        "## 5. Planning time\n\n"
        "A transformers Llama, and a residual net of 1,000 blocks [linear, relu, linear, add], whole and op "
        "by op. Planning, all but tracing, in processor seconds, which other work on the machine does not "
        f"lengthen: {seconds['small']}; {seconds['large']}; 1,000 blocks {seconds['deep']}. One change of a "
        f"plan, with its peak, excess and price, and back: {against('change', 'change_ms', 'ms')}.\n\n"
        + table(
            (
                "program",
                "joint nodes",
                "planning, processor s",
                "planning, wall s",
                "insert-checkpoints, processor s",
                "a change, ms",
                "a change of a plan that recomputes, ms",
                "with capture, s",
                "load average",
            ),
            cells,
        )
    )


def certificate(record: dict[str, Any]) -> str:
    summary = record["summary"]
    cells = []
    measured = [row for row in good(record) if "gap" in row]
    for model in dict.fromkeys(row["model"] for row in measured):
        own = [row for row in measured if row["model"] == model]
        gaps = sorted(row["gap"] for row in own)
        added = sorted(math.inf if row["gap_of_added"] is None else row["gap_of_added"] for row in own)
        cells.append(
            (
                model,
                own[0]["nodes"],
                own[0]["operators"],
                percent(own[0]["gap"]),
                percent(gaps[len(gaps) // 2]),
                f"{sum(gap <= 0.02 for gap in gaps)} of {len(gaps)}",
                percent(added[len(added) // 2]),
            )
        )
    text = (
        "## How far plans are from a proven bound\n\n"
        "Ten budgets for each model, from the least peak that its frontier reaches, op by op, default "
        "options. Targets: a gap of at most 2 % on 90 % of cells up to 200 operators: "
        f"{verdict(summary['met_small'])} ({percent(summary['small_within'])} of {summary['small_cells']}; "
        f"largest gap {percent(summary['largest_gap_small'])}); at most 5 % on 90 % of larger ones up to "
        f"10,000 nodes: {verdict(summary['met_large'])} ({percent(summary['large_within'])} of "
        f"{summary['large_cells']}; largest gap {percent(summary['largest_gap_large'])}). The gap is that of "
        "the whole step; the last column is that of the seconds that recomputation adds, alone: where next "
        "to nothing is added, a large part of next to nothing.\n\n"
        + table(
            (
                "model",
                "joint nodes",
                "operators",
                "gap at the least peak",
                "median gap",
                "cells within 2 %",
                "median gap of added seconds",
            ),
            cells,
        )
    )
    for row in good(record):
        if "equal" in row:
            equal = ", ".join(f"{name} {count}" for name, count in row["equal"].items())
            times = ", ".join(f"{name} {value:.0f} s" for name, value in row["solver_seconds"].items())
            text += (
                f"\n\nRandom steps of up to {row['largest']} operators, {row['steps']} of them, against "
                "going through every state (every set of storages held at every slot): equal optima "
                f"{equal}: {verdict(summary['met_random'])}. {row['without_plan']} of the targets are below "
                "what any plan reaches, and were proven to be. The optimum was within what the evaluator "
                f"runs in {row['run_by_the_evaluator']} of the others. All of them took {times}, going "
                f"through every state {row['oracle_seconds']:.0f} s."
            )
    return text


def chunked_loss(record: dict[str, Any]) -> str:
    sizes = [
        (row["dtype"], row["mode"], mib(row["peak_bytes"]), f"{row['seconds']:.2f}")
        for row in good(record)
        if "mode" in row
    ]
    errors: dict[tuple[str, int], dict[str, float]] = {}
    for row in good(record):
        if "pieces" in row:
            key = (f"{row['spread']:.0f}", row["pieces"])
            errors.setdefault(key, {})[row["cut"]] = row["error_of_whole"]
    cells = [(*key, *(f"{found[cut]:.2f}" for cut in ("rows", "classes"))) for key, found in errors.items()]
    return (
        "## Linear layer and cross entropy in pieces\n\n"
        "One thread of the CPU, 1,024 x 256 x 16,384, 8 chunks of rows or blocks of classes, forward and "
        "backward; peak above the inputs, gradients included:\n\n"
        + table(("dtype", "logits", "peak", "seconds"), sizes)
        + "\n\nRounding of the weight's gradient in bfloat16, 512 x 64 x 997: norm of its error over that of "
        "whole logits:\n\n"
        + table(("deviation of logits", "pieces", "chunks of rows", "blocks of classes"), cells)
    )


def compress_saved(record: dict[str, Any]) -> str:
    part = record["summary"]["part"]
    cells = [
        (
            row["model"],
            row["setting"],
            mib(row["saved"]),
            mib(row["measured"]),
            row["measured"] - row["peak"],
            mib(row["least"]),
            "none fits" if row["seconds"] is None else f"{1e3 * row['seconds']:.1f}",
        )
        for row in good(record)
    ]
    return (
        "## Saved values in fewer bytes\n\n"
        "Op by op. Saved bytes and peak where everything that can be is packed and nothing runs again; "
        "the least peak of any plan, packing beside checkpoints; predicted time of the fastest plan within "
        f"{part:.0%} of the first peak:\n\n"
        + table(("model", "packed", "saved", "peak", "off, bytes", "least peak", "ms"), cells)
    )


def chunked_frontier(record: dict[str, Any]) -> str:
    summary = record["summary"]
    cells = [
        (
            row["model"], number(row["peak_ratio_without_chunks"]), number(row["peak_ratio"]),
            row["peak_form"] or "as it is", number(row["default_ratio"]), row["peak_holders"][0],
        )
        for row in good(record)
    ]  # fmt: skip
    cells.append((
        "geometric mean", number(summary["peak_ratio_without_chunks"]), number(summary["peak_ratio"]), "",
        f"{number(summary['default_ratio_large_vocabulary'])} (32k)", "",
    ))  # fmt: skip
    head = ("model", "peak / torch's least, no more FLOPs", "with chunks", "taken",
            "peak / torch's default, 10 % more FLOPs", "peak held at")  # fmt: skip
    met = summary["met"]
    return (
        "## 5. Chunks beside checkpoints, against torch's activation_memory_budget\n\n"
        f"Peak at most 0.50 of torch's least (geometric mean, 32k models left out): {verdict(met['peak'])}. "
        "At most 0.22 of torch's default partition where the vocabulary is large: "
        f"{verdict(met['large_vocabulary'])}. Models return their loss alone; peaks as in figure 3.\n\n"
        + table(head, cells)
        + "\n\nBatch norms (ResNet, U-Net) and dropout inside attention (GPT-2, BERT, T5) end regions: their "
        "peak stays at one whole operator. Qwen3-MoE gathers weights for each token; Mamba's scan is "
        "captured in a form that passes do not look at."
    )


def backward_order(record: dict[str, Any]) -> str:
    summary = record["summary"]
    cells = [
        (
            row["model"], row["nodes"], "yes" if row["offered"] else "no", number(row["peak_ratio"]),
            number(row["least_ratio"]), f"{row['order_cpu_seconds']:.2f}", f"{row['search_cpu_seconds']:.1f}",
        )
        for row in good(record)
    ]  # fmt: skip
    cells.append(
        ("geometric mean", "", "", number(summary["peak_ratio"]), number(summary["least_ratio"]), "", "")
    )
    head = ("model", "joint nodes", "an order is offered", "peak / in the order of autograd",
            "least peak with checkpoints / the same", "order, s", "checkpoints, s")  # fmt: skip
    return (
        "## The order of the operators\n\n"
        "`order-backward` before `insert-checkpoints`, against `insert-checkpoints` alone; op by op, above "
        "parameters and inputs, processor seconds. On these models the order of autograd is next to the best "
        "there is, and a search from another order finds other plans, better ones and worse ones: therefore "
        "the pass is not part of the default pipeline.\n\n" + table(head, cells)
    )


def folded_norms(record: dict[str, Any]) -> str:
    cells = [
        (row["kind"], row["threads"], len(row["ratios"]), number(row["mean"]), number(row["most"]))
        for row in record["rows"]
    ]
    return (
        "## Batch norms within convolutions\n\n"
        "Distance of the result from float64 over that of separate operators: 8 images of 56 x 56, float32 "
        f"on a CPU with {record['capability']}, `bias_first: true`.\n\n"
        + table(("layers", "threads", "networks", "geometric mean", "most"), cells)
    )


def tiled_convolutions(record: dict[str, Any]) -> str:
    cells = [
        (
            row["model"], f"{row['size']}²", f"{row['peak'] / 2**20:.1f}", f"{row['least'] / 2**20:.1f}",
            f"{row['predicted'] / 2**20:.1f}", number(row["ratio"]), number(row["time_ratio"]),
            f"`{row['alternative']}`", f"{row['least_deviation']:.0e} ({row['deviation']:.0e})",
        )
        for row in good(record)
    ]  # fmt: skip
    summary = record["summary"]
    means = number(summary["ratio"]), number(summary["time_ratio"])
    cells.append(("geometric mean", "", "", "", "", *means, "", ""))
    head = ("model", "image", "peak as it is, MiB", "least, MiB", "predicted", "ratio", "time ratio",
            "what is taken", "deviation (as it is)")  # fmt: skip
    return (
        "## Inference in tiles\n\n"
        "Batch 1, float32, op by op on the CPU; activations without weights and input. The plan with the "
        "least peak, against the model as it is.\n\n" + table(head, cells)
    )


_WARM = ("graphopt", "op-by-op")
"""The starts that are held against torch.compile's."""


def warm_start(record: dict[str, Any]) -> str:
    summary = record["summary"]
    cells = [
        (
            kind,
            *(
                f"{summary[f'{mode}_{kind}_{key}']:.1f}"
                for key in ("seconds", "cpu_s")
                for mode in ("graphopt", "op-by-op", "compile")
            ),
        )
        for kind in ("cold", "warm")
    ]
    repeats = sum((row["mode"], row["start"]) == ("graphopt", "warm") for row in good(record))
    load = max(row["load_average"] for row in good(record))
    columns = ("graphopt", "op by op", "compile")
    head = ("start", *(f"{name}{unit}" for unit in (", s", ", processor s") for name in columns))
    compiled, eager = ([summary[f"{m}_added_{key}"] for key in ("seconds", "cpu_s")] for m in _WARM)
    return (
        "## Seconds to the end of the first training step, on the CPU\n\n"
        "A narrow transformers Llama of 16 layers, `emit=\"inductor\"` without a budget, and "
        f"`emit=\"eager\"` (op by op) within {record['budget']}; each start is a process of its own, "
        "caches empty (cold) or as the cold start left them. Target: a warm start adds "
        f"{summary['target_s']:g} s to torch.compile's: {verdict(summary['met'])}, "
        f"{compiled[0]:.2f} s compiled ({compiled[1]:.2f} s of the processor), {eager[0]:.2f} s op by op "
        f"({eager[1]:.2f} s). "
        f"Medians of {repeats} warm starts, the load of {record['cores']} cores up to {load:.1f}.\n\n"
        + table(head, cells)
    )


def quantized_cpu(record: dict[str, Any]) -> str:
    kinds = ("float32", "bfloat16", "int8", "int8-dynamic")
    cells = [
        (
            f"{row['columns']} x {row['inner']}",
            row["rows"],
            *(row[kind] for kind in kinds),
            f"{row['float32'] / row['int8']:.2f}",
            f"{row['int8_error']:.1e}",
        )
        for row in record["rows"]
    ]
    return (
        "## Linear layers with packed weights on a CPU\n\n"
        f"ms a call, {record['threads']} thread, x in float32, weights from memory; `gain`: float32 over "
        "int8; `error`: of int8, relative to float64 with unpacked weights.\n\n"
        + table(("weight", "rows", *kinds, "gain", "error"), cells)
    )


def failures(record: dict[str, Any]) -> str:
    found = record.get("rows", ())
    if isinstance(found, dict):
        # Rows by model: their section says itself what failed.
        return ""
    rows = [f"- {row['model']}: {row['error']}" for row in found if isinstance(row.get("error"), str)]
    return "\n\nWithout a result:\n\n" + "\n".join(rows) if rows else ""


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "prediction": prediction,
    "obedience": obedience,
    "torch_budget": torch_budget,
    "exactness": exactness,
    "planning_time": planning_time,
    "certificate": certificate,
    "gpu_train": gpu_train,
    "gpu_step": gpu_step,
    "gpu_step_kernels": gpu_step_kernels,
    "gpu_kernels": gpu_kernels,
    "gpu_models": gpu_models,
    "gpu_compile_time": gpu_compile_time,
    "gpu_rotary": gpu_rotary,
    "warm_start": warm_start,
    "gpu_attention": gpu_attention,
    "gpu_emitted_attention": gpu_emitted_attention,
    "gpu_products": gpu_products,
    "gpu_quantized": gpu_quantized,
    "gpu_decode": gpu_decode,
    "gpu_decode_large": gpu_decode_large,
    "gpu_context": gpu_context,
    "gpu_decode_attention": gpu_decode_attention,
    "kv_stores": kv_stores,
    "share_kv": share_kv,
    "gpu_pack_linears": gpu_pack_linears,
    "gpu_convolutions": gpu_convolutions,
    "gpu_optimizer": gpu_optimizer,
    "gpu_fsdp": gpu_fsdp,
    "gpu_longest": gpu_longest,
    "gpu_resnet1000": gpu_resnet1000,
    "chunked_loss": chunked_loss,
    "compress_saved": compress_saved,
    "chunked_frontier": chunked_frontier,
    "backward_order": backward_order,
    "tiled_convolutions": tiled_convolutions,
    "folded_norms_avx512": folded_norms,
    "folded_norms_avx2": folded_norms,
    "quantized_cpu": quantized_cpu,
    "quality_packed": quality_packed,
    "matcher": matcher,
    "optimize_time": optimize_time,
    "overhead": overhead,
    "start_up": start_up,
    "page": page,
    "zoo": zoo,
    "zoo_torch211": zoo,
    "gpu_zoo": gpu_zoo,
    "op_db": op_db,
    "random_graphs": random_graphs,
}


def main() -> None:
    sections = [HEAD]
    for name, section in SECTIONS.items():
        file = RESULTS / f"{name}.json"
        if not file.exists():
            sections.append(f"## {name}\n\nNot measured yet (`python benchmarks/{name}.py`).")
            continue
        record = json.loads(file.read_text())
        where = record.get("cpu") or record.get("device") or record.get("gpu")
        versions = record.get("versions", {})
        stamp = f"\n\n{where}, torch {versions.get('torch', record.get('torch', ''))}, {record['date']}"
        stamp += "".join(f"; {', '.join(u['models'])}: {u['date']}" for u in record.get("updates", ())) + "."
        sections.append(section(record) + failures(record) + stamp)
    write_atomically(PAGE, "\n\n".join(sections) + "\n")


if __name__ == "__main__":
    main()
