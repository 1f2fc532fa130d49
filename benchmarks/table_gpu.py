"""The sections of docs/benchmarks.md that were measured on a GPU."""

from __future__ import annotations

import math
from typing import Any

from table_cells import good, number, percent, table, verdict


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
            row["at"],
        )
        for row in sorted(record["rows"], key=lambda row: row["ms"])
    ]
    runs = "; ".join(f"at {at} {what}" for at, what in record["pipelines"].items())
    notes = "".join(
        f" {row['act_mib']:.0f} MiB: {row['note']}." for row in record["rows"] if "note" in row
    )
    ours = [row for row in record["rows"] if row["mode"].startswith("graphopt") and row["act_mib"] <= 8000]
    best = min((row["ms"] for row in ours), default=math.inf)
    return (
        "## One training step with fused norms and packed layers\n\n"
        f"The step of the section before, up to {shape['steps']} times, with norms fused, layers packed and "
        "gradients of weights added within their products. "
        f"Target: 108 ms in 8,000 MiB: {verdict(best <= 108)}. Rows of one `at` are of one run, machines "
        f"differ by some percent. Pipelines: {runs}. Not ready in time: "
        f"{', '.join(record['missing']) or 'none'}.{notes}\n\n"
        + table(("mode", "activations, MiB", "ms", "at"), cells)
    )


def gpu_step_kernels(record: dict[str, Any]) -> str:
    alone = record["floor_ms"]
    cells = [
        (name, f"{ms:.1f}", f"{alone[name]:.1f}" if name in alone else "")
        for name, ms in sorted(record["kernels"].items(), key=lambda item: -item[1])
    ]
    text = (
        f"Kernels of the step without a budget, launched one by one: {record['step_ms']:.1f} ms a step, "
        f"{record['busy_ms']:.1f} of them with a kernel running (while a profiler looked on)."
    )
    if alone:
        floor, rest = sum(alone.values()), record["kernels"]["fills"] + record["kernels"]["others"]
        text += (
            f" The same products and attention timed alone, back to back, take {floor:.1f} ms: with "
            "everything else for nothing, the step would take no less; with what that takes now "
            f"({rest:.1f} ms), {floor + rest:.1f} ms."
        )
    return (
        "## Where the time of that step goes\n\n"
        + text
        + "\n\n"
        + table(("kernels", "ms a step", "alone, ms"), cells)
    )


def gpu_rotary(record: dict[str, Any]) -> str:
    kinds = ("graphopt", "compile", "liger")
    cells = [
        (
            row["case"],
            "yes" if row["norm"] else "no",
            *(row.get(f"{kind}_forward", "") for kind in kinds),
            *(row.get(f"{kind}_backward", "") for kind in kinds[:2]),
        )
        for row in record["rows"]
    ]
    return (
        "## Rotary embeddings\n\n"
        "Queries and keys of a packed projection, or alone, 16,384 positions, bf16; percent of the copy "
        "bandwidth of the same run on the least bytes. graphopt's forward copies values out of the "
        "projection as well, which compile's leaves as a view; both backwards put the gradient "
        "of the projection together.\n\n"
        + table(
            ("heads", "norm", *(f"{k} forward" for k in kinds), *(f"{k} backward" for k in kinds[:2])), cells
        )
    )


def gpu_emitted_attention(record: dict[str, Any]) -> str:
    cells = []
    for row in record["rows"]:
        known = {k: v for k, v in row["library"].items() if not isinstance(v, str)}
        fastest = min(known, key=known.__getitem__)
        shape = f"{row['batch']} x {row['heads']}/{row['few']} x {row['length']} x {row['width']}"
        kind = ", ".join(name for name in ("causal", "bias") if row[name])
        cells.append(
            (shape, kind, row["half"], row["emitted"], f"{known[fastest]} ({fastest})", row["share"])
        )
    return (
        "## Attention that is written out\n\n"
        "Microseconds of the emitted kernels and of the fastest library call that takes the case; `share`: "
        "the rate of the former over that of the latter. Backwards are beside FlashAttention alone.\n\n"
        + table(("samples x heads x length x width", "", "half", "emitted", "library", "share"), cells)
    )


def gpu_kernels(record: dict[str, Any]) -> str:
    kinds = ("graphopt", "compile", "liger")
    cells = [
        (
            row["case"],
            row["width"],
            *(row.get(f"{kind}_{way}", "") for way in ("forward", "backward") for kind in kinds),
            row.get("error", ""),
            row.get("date", record["date"]),
        )
        for row in record["rows"]
    ]
    noted = [f"{row['case']} {row['width']}: {row['note']}" for row in record["rows"] if "note" in row]
    notes = f" {'; '.join(noted)}." if noted else ""
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
        "code that held no rows in registers. `error`: how much further from float64 than eager mode the "
        f"results and gradients are.{notes} What was tried and left again is in the file "
        "under `put_back`.\n\n"
        + table(("operator", "width", *head, "error", "date"), cells)
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


def gpu_models(record: dict[str, Any]) -> str:
    times = {(row["model"], row["mode"]): row for row in record["rows"] if "ms" in row}
    cells = []
    for name, ratio in record["faster_than_compile"].items():
        rows = [times.get((name, mode)) for mode in ("graphopt", "compile", "eager")]
        shown = [f"{row['ms']:.1f} / {row['act_mib']:.0f}" if row else "" for row in rows]
        cells.append((name, *shown, f"{ratio:.2f}"))
    met = record["geomean"] >= 1.1 and min(record["faster_than_compile"].values()) >= 1
    return (
        "## Training steps of models that are no Llama\n\n"
        "bf16, forward and backward, no budget; ms / MiB of activations. Target: 1.10 times as fast as "
        f"torch.compile on the geometric mean, and never slower: {verdict(met)}, {record['geomean']:.2f}.\n\n"
        + table(("model", "graphopt", "compile", "eager", "compile : graphopt"), cells)
    )


def gpu_compile_time(record: dict[str, Any]) -> str:
    seconds = {(row["mode"], row["start"]): row.get("seconds") for row in record["rows"]}
    cold = seconds["graphopt", "cold"] / seconds["compile", "cold"]
    more = seconds["graphopt", "warm"] - seconds["compile", "warm"]
    tuning = seconds.get(("tune", "tune_s"))
    tuned = "not measured" if tuning is None else f"{verdict(tuning <= 60)}, {tuning:.1f} s"
    cells = [(start, seconds["graphopt", start], seconds["compile", start]) for start in ("cold", "warm")]
    return (
        "## Seconds to the end of the first training step\n\n"
        "The Llama-3.2-1B shape; caches of generated code empty (cold) or as the cold start left them. "
        f"Targets: 1.2 times torch.compile's cold start: {verdict(cold <= 1.2)}, {cold:.2f}; a warm start "
        f"adds 1 s: {verdict(more <= 1)}, {more:.1f} s; `graphopt tune` for one block in 60 s: "
        f"{tuned}. Both modes at once on {record['cores']} cores.\n\n"
        + table(("start", "graphopt, s", "compile, s"), cells)
    )


def gpu_attention(record: dict[str, Any]) -> str:
    kinds = ("graphopt", "sdpa", "flex", "written")
    rows = {(row["case"], row["width"], row["kind"]): row for row in record["rows"] if "both_ms" in row}
    cells = []
    for case, width in dict.fromkeys((case, width) for case, width, _ in rows):
        found = [rows.get((case, width, kind)) for kind in kinds]
        shown = [
            f"{row['forward_ms']:.2f} / {row['both_ms']:.2f} / {row['extra_mib']}" if row else ""
            for row in found
        ]
        cells.append((case, width, *shown))
    return (
        "## Attention that libraries do not have\n\n"
        "ms forward / ms forward and backward / MiB beside inputs; `width` is that of a head. `sdpa`: "
        "torch's own with what it takes as a mask, `flex`: FlexAttention, compiled, `written`: products and "
        "a softmax under torch.compile. Plain causal attention stays with the library.\n\n"
        + table(("case", "width", *kinds), cells)
    )


def gpu_products(record: dict[str, Any]) -> str:
    cells = [
        (
            row["case"],
            f"{row['rows']} x {row['inner']} x {row['columns']}",
            *(row.get(kind, "") for kind in ("emitted", "compiled", "eager", "library", "share")),
        )
        for row in record["rows"]
    ]
    return (
        "## Products of matrices with what is around them, emitted as Triton\n\n"
        "us; `share`: the emitted product alone, as a part of the rate of the library's. A device's "
        "`emitted_matmul_share` comes from it, and decides which products are emitted.\n\n"
        + table(("case", "shape", "emitted", "compile", "eager", "library's product", "share"), cells)
    )


def gpu_quantized(record: dict[str, Any]) -> str:
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in record["rows"]:
        weight = f"{row['columns']} x {row['inner']}"
        found.setdefault((weight, row["scheme"]), {})[row["rows"]] = row
    counts = sorted({row["rows"] for row in record["rows"]})
    cells = [
        (
            *key,
            *(f"{by_rows[count]['ratio']:.2f}" if count in by_rows else "" for count in counts),
            percent(by_rows[counts[0]]["read"]),
            f"{max(row['error'] for row in by_rows.values()):.2g}",
        )
        for key, by_rows in found.items()
    ]
    dense = max(row["dense_error"] for row in record["rows"])
    return (
        "## Products that read packed weights\n\n"
        "Times as fast as a dense product in bf16, by rows of x, in a CUDA graph, weights from memory. "
        f"`read`: packed bytes a second with {counts[0]} row, as a part of the read bandwidth of the same "
        f"run, {record['read_gb_per_second']:,.0f} GB/s. The error is the largest, relative to float64 with "
        f"unpacked weights; that of dense products is {dense:.2g}.\n\n"
        + table(("weight", "scheme", *map(str, counts), "read", "error"), cells)
    )


def gpu_pack_linears(record: dict[str, Any]) -> str:
    products = [
        (" x ".join(map(str, row["product"])), row["us"], row["predicted_us"])
        for row in record["rows"]
        if "product" in row
    ]
    layers = [
        (row["layers"], row["apart_us"], row["packed_change_us"], sum(row["predicted_change_us"]))
        for row in record["rows"]
        if "packed_us" in row
    ]
    return (
        "## Layers of one value in one product\n\n"
        "us, forward and backward with the norm before and the readers behind: apart, what packing them all "
        "changes, and what is predicted of that.\n\n"
        + table(("layers", "apart", "packed", "predicted"), layers)
        + "\n\nSingle products, rows x columns x depth, us:\n\n"
        + table(("product", "measured", "predicted"), products)
    )


def gpu_convolutions(record: dict[str, Any]) -> str:
    cells = [
        (
            f"{row['channels']} x {row['height']}",
            *(row[f"{kind}_us"] for kind in ("graphopt", "apart", "compile")),
            row["error"],
        )
        for row in record["rows"]
    ]
    return (
        "## Convolutions with the sum and the ReLU behind them\n\n"
        "Three bottleneck blocks of a ResNet-50 in inference, 64 images, bf16, channels last; us. `apart`: "
        "without fuse-convolution. `error`: distance from float64 over that of eager mode.\n\n"
        + table(("channels x height", "graphopt", "apart", "compile", "error"), cells)
    )


def gpu_optimizer(record: dict[str, Any]) -> str:
    cells = [
        (row["case"], row["dtype"], row["peer"], row["ms"], row["host_ms"], row["percent"])
        for row in record["rows"]
    ]
    return (
        "## AdamW over all parameters\n\n"
        "The parameters of the Llama-3.2-1B shape. `clipped`: with the norm of all gradients and clipping by "
        "it. `percent`: of the copy bandwidth, on the bytes of a plain update. `host`: until queued.\n\n"
        + table(("case", "dtype", "who", "ms", "host, ms", "percent"), cells)
    )


def gpu_fsdp(record: dict[str, Any]) -> str:
    shape = record["shape"]
    bounds = {row["mode"]: row for row in record["rows"] if row.get("budget_bytes")}
    cells = []
    for mode, row in record["summary"].items():
        bound = bounds.get(mode, {})
        asked = bound.get("asked_bytes", bound.get("budget_bytes"))
        cells.append((
            mode,
            f"{row['tokens_per_s']:.0f}",
            f"{row['peak_bytes'] / 2**30:.2f}",
            "" if asked is None else f"{asked / 2**30:.2f}",
            "" if "asked_bytes" not in bound else f"refused, least {bound['least_bytes'] / 2**30:.2f}",
            f"{row['of_peer']:.3f}" if "of_peer" in row else "",
        ))  # fmt: skip
    ratios = [row["of_peer"] for row in record["summary"].values() if "of_peer" in row]
    obeyed = all(row["obeyed"] for row in record["summary"].values())
    return (
        f"## A sharded training step on {record['ranks']} x {record['device']}\n\n"
        f"Llama-3.2-1B shape ({shape['layers']} layers, hidden {shape['hidden']}, vocabulary "
        f"{shape['vocab']}), {shape['batch']} x {shape['seq']} tokens on each rank, FSDP2, a step's "
        "forward and backward; GiB, parameters and states of the optimizer with them. `graphopt@MODE`: under "
        "a budget of what that mode took at its peak; where that is refused, under the least that fits.\n\n"
        f"Budgets kept on every rank: {verdict(obeyed)}. At least 1.1 times the tokens a second of the mode "
        f"whose peak was the budget: {verdict(min(ratios) >= 1.1)}.\n\n"
        + table(("mode", "tokens/s", "peak", "asked", "", "of the mode's tokens/s"), cells)
    )
