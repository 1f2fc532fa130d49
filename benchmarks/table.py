"""Write docs/benchmarks.md from the results in benchmarks/results.

python benchmarks/table.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from graphopt.atomic import write_atomically

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"

HEAD = """# Benchmarks

Written by `python benchmarks/table.py` from the files in `benchmarks/results`; do not edit. Each
file holds the device, versions, date, command and every row.
"""


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def verdict(met: bool) -> str:
    return "**met**" if met else "**not met**"


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


def gpu_train(record: dict[str, Any]) -> str:
    shape, missing = record["shape"], record.get("missing", [])
    cells = []
    budgeted = [row for row in record["rows"] if row.get("budget_bytes")]
    obeyed = sum(row["obeyed"] for row in budgeted)
    worst = max((abs(row["prediction_error"]) for row in budgeted), default=0.0)
    peers = [row for row in record["rows"] if _is_peer(row)]
    beaten = [f"{row['mode']} ({verdict(_beaten(row, record['rows']))})" for row in peers]
    for row in sorted(record["rows"], key=lambda row: row.get("act_mib", 0.0)):
        if "ms" not in row:
            cells.append((f"graphopt, {row['budget_mib']:.0f} MiB", "no plan found", "", "", ""))
            continue
        budget = row.get("budget_bytes")
        name = row["mode"] if budget is None else f"graphopt, {budget / 2**20:.0f} MiB"
        error = row.get("prediction_error")
        off = "" if error is None else f"{100 * error:+.2f} %"
        kept = "" if budget is None else "yes" if row["obeyed"] else "no"
        cells.append((name, f"{row['act_mib']:.0f}", f"{row['ms']:.1f}", off, kept))
    return (
        f"## 6, 7. One training step on {record['device']}\n\n"
        f"Llama-3.2-1B shape ({shape['layers']} layers, hidden {shape['hidden']}, vocabulary "
        f"{shape['vocab']}, bf16, {shape['batch']} x {shape['seq']} tokens), forward + backward, "
        "gradients held; activations are "
        "`max_memory_allocated` minus parameters and gradients, budgets are of everything.\n\n"
        f"Budgets kept: {obeyed} of {len(budgeted)}. Prediction off by {100 * worst:.2f} % at most "
        f"(target 2 %): {verdict(worst <= 0.02)}. "
        f"Faster than a peer in no more memory: {', '.join(beaten)}.\n\n"
        + (f"Not measured in this run, for want of time: {', '.join(missing)}.\n\n" if missing else "")
        + table(("mode", "activations, MiB", "ms", "peak predicted / measured", "budget kept"), cells)
    )


def gpu_step(record: dict[str, Any]) -> str:
    shape = record["shape"]
    cells = [
        (
            row["mode"]
            if row.get("budget_bytes") is None
            else f"graphopt, {row['budget_bytes'] / 2**20:.0f} MiB",
            f"{row['act_mib']:.0f}",
            f"{row['ms']:.1f}",
        )
        for row in sorted(record["rows"], key=lambda row: row["ms"])
    ]
    ours = [row for row in record["rows"] if row["mode"].startswith("graphopt") and row["act_mib"] <= 8000]
    best = min((row["ms"] for row in ours), default=math.inf)
    return (
        "## One training step with fused norms and packed layers\n\n"
        f"The step of the section before, {shape['steps']} times, after norms were fused. "
        f"Target: 108 ms in 8,000 MiB: {verdict(best <= 108)}. Measured at {record['at']}, with "
        f"{record['pipeline']}. Not ready in time: {', '.join(record['missing']) or 'none'}.\n\n"
        + table(("mode", "activations, MiB", "ms"), cells)
    )


def gpu_kernels(record: dict[str, Any]) -> str:
    kinds = ("graphopt", "compile", "liger")
    cells = [
        (
            row["case"],
            row["width"],
            *(row.get(f"{kind}_{way}", "") for way in ("forward", "backward") for kind in kinds),
            row.get("date", record["date"]),
        )
        for row in record["rows"]
    ]
    head = [f"{way}, {kind}" for way in ("forward", "backward") for kind in kinds]
    losses = [
        (
            row["loss"],
            row["ms"],
            row["extra_mib"],
            row["error"],
            row.get("input_error", ""),
            row.get("plan", "").partition("/")[2],
        )
        for row in record["losses"]
        if "ms" in row
    ]
    fast = next((r for r in record["losses"] if r["loss"] == "graphopt.optimize, fast"), None)
    least = next((r for r in record["losses"] if r["loss"] == "graphopt.optimize, least memory"), None)
    judged = ""
    if fast is not None and least is not None:
        judged = (
            "Targets: 37 ms in 1,400 MiB: "
            f"{verdict(fast['ms'] <= 37 and fast['extra_mib'] <= 1400)}; 50 ms in 1,132 MiB: "
            f"{verdict(least['ms'] <= 50 and least['extra_mib'] <= 1132)}; gradients that err at most 1.1 "
            f"times as much as those of whole logits: {verdict(fast['error'] <= 1.1)} in the first, "
            f"{verdict(least['error'] <= 1.1)} in the second.\n\n"
        )
    return (
        "## Operators that memory bounds, and linear + cross entropy\n\n"
        "bf16, 128 MiB a tensor; percent of the copy bandwidth of the same run, on the least bytes. Targets: "
        "93 % forward, 85 % backward. Each row says when it was measured; those of 24 November are of "
        "code that held no rows in registers.\n\n"
        + table(("operator", "width", *head, "date"), cells)
        + "\n\nLinear + cross entropy, 8,192 x 4,096 x 128,256, forward and backward; the peak above "
        "the operands holds both gradients, 1,067 MiB. `error`: distance of the gradients of weight and "
        "input from float64, over that of whole bf16 logits.\n\n"
        + judged
        + table(("loss", "ms", "MiB", "error, weight", "error, input", "plan"), losses)
    )


def _is_peer(row: dict[str, Any]) -> bool:
    return "ms" in row and not row["mode"].startswith("graphopt")


def _beaten(peer: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Whether some row of graphopt's is faster than a peer and takes no more memory."""
    ours = [row for row in rows if "ms" in row and row["mode"].startswith("graphopt")]
    return any(row["ms"] < peer["ms"] and row["act_mib"] <= peer["act_mib"] for row in ours)


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
        (row["threads"], len(row["ratios"]), number(row["mean"]), number(row["most"]))
        for row in record["rows"]
    ]
    return (
        "## Batch norms within convolutions\n\n"
        "Distance of the result from float64 over that of separate operators: residual and inverted blocks "
        "of 32 channels, 8 images of 56 x 56, float32 on the CPU.\n\n"
        + table(("threads", "networks", "geometric mean", "most"), cells)
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


def gpu_longest(record: dict[str, Any]) -> str:
    cells = []
    for row in record["rows"]:
        measured: tuple[Any, ...] = ("does not fit", "", "")
        if row["fits"]:
            measured = (f"{row['whole_mib']:.0f}", f"{row['ms']:.0f}", row["tokens_per_second"])
        cells.append((row["mode"], f"{row['tokens']:,}", *measured, row.get("commit", "")))
    found = record["longest"]
    ratios = [
        f"{found['graphopt'] / found[peer]:.2f} times that of {peer}"
        for peer in found
        if peer != "graphopt" and found[peer] and "graphopt" in found
    ]
    return (
        f"## The longest sequence on {record['gib']:g} GiB\n\n"
        f"{record['device']}, Llama-3.2-1B shape, batch 1, forward + backward, gradients held. Targets: 4 "
        "times the longest sequence of torch.compile, 1.5 times that of Liger with checkpoints, at no fewer "
        f"tokens per second at the latter's. graphopt's is {', '.join(ratios) or 'not measured'}. One step "
        "is timed, with compile's compilation in it, and that of graphopt's kernels, not of its programs.\n\n"
        + table(("mode", "tokens", "peak, MiB", "ms", "tokens per second", "graphopt at"), cells)
    )


def gpu_resnet1000(record: dict[str, Any]) -> str:
    rows = good(record)
    eager = next(row for row in rows if row["name"] == "eager")
    cells = [
        (
            row["name"], row["act_mib"], row.get("predicted_act_mib", ""), row.get("pool_mib", ""), row["ms"],
            number(row["ms"] / eager["ms"]), row.get("moved_mib", ""), row["first_step_s"],
        )
        for row in rows
    ]  # fmt: skip
    head = ("case", "activations MiB", "predicted", "graph's pool MiB", "ms", "/ eager", "moved MiB",
            "first step s")  # fmt: skip
    return (
        "## A residual net of 1,001 layers on one GPU\n\n"
        "83 + 83 + 83 + 84 bottleneck blocks, batch 32 of 224 x 224, bfloat16 autocast, channels last. "
        "`graphopt@N` was given N MiB above parameters, gradients and input. `+graph`: the whole step "
        "captured in a CUDA graph by hand; its pool is what the step then occupies, and activations count "
        "workspaces of the capturing stream besides. Without a graph every case waits for the processor, "
        "which launches about ten thousand kernels a step.\n\n" + table(head, cells)
    )


def good(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in record["rows"] if "error" not in row]


def failures(record: dict[str, Any]) -> str:
    rows = [f"- {row['model']}: {row['error']}" for row in record["rows"] if "error" in row]
    return "\n\nWithout a result:\n\n" + "\n".join(rows) if rows else ""


def mib(count: float) -> str:
    return f"{count / 2**20:.1f} MiB"


def percent(part: float | None) -> str:
    return "" if part is None else f"{100 * part:.2f} %" if math.isfinite(part) else "no bound"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "prediction": prediction,
    "obedience": obedience,
    "torch_budget": torch_budget,
    "exactness": exactness,
    "planning_time": planning_time,
    "certificate": certificate,
    "gpu_train": gpu_train,
    "gpu_step": gpu_step,
    "gpu_kernels": gpu_kernels,
    "gpu_longest": gpu_longest,
    "gpu_resnet1000": gpu_resnet1000,
    "chunked_loss": chunked_loss,
    "compress_saved": compress_saved,
    "chunked_frontier": chunked_frontier,
    "backward_order": backward_order,
    "tiled_convolutions": tiled_convolutions,
    "folded_norms": folded_norms,
}


def main() -> None:
    page = [HEAD]
    for name, section in SECTIONS.items():
        file = RESULTS / f"{name}.json"
        if not file.exists():
            page.append(f"## {name}\n\nNot measured yet (`python benchmarks/{name}.py`).")
            continue
        record = json.loads(file.read_text())
        where = record.get("cpu") or record.get("device")
        versions = record.get("versions", {})
        stamp = f"\n\n{where}, torch {versions.get('torch', record.get('torch', ''))}, {record['date']}"
        stamp += "".join(f"; {', '.join(u['models'])}: {u['date']}" for u in record.get("updates", ())) + "."
        page.append(section(record) + failures(record) + stamp)
    write_atomically(PAGE, "\n\n".join(page) + "\n")


if __name__ == "__main__":
    main()
