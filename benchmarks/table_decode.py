"""The sections of docs/benchmarks.md about decoding."""

from __future__ import annotations

from typing import Any

from table_cells import percent, table, verdict

_WANTED = {"graphopt": 240, "graphopt-int8": 440, "graphopt-fp8": 440, "graphopt-int4": 650}
_ATTENTION = {"graphopt": 0.85, "quant-8": 0.85, "quant-4": 0.75}


def gpu_decode(record: dict[str, Any]) -> str:
    cells = []
    for row in sorted(record["rows"], key=lambda row: row["ms"]):
        wanted = _WANTED.get(row["mode"].partition("+")[0])
        met = "" if wanted is None else f"{wanted}: {verdict(row['tokens_per_s'] >= wanted)}"
        cells.append(
            (
                row["mode"], f"{row['ms']:.2f}", f"{row['tokens_per_s']:.0f}", met, percent(row["floor"]),
                f"{row['prompt_ms']:.1f}" if "prompt_ms" in row else "", f"{row['regret']:.3f}", row["at"],
            )
        )  # fmt: skip
    return (
        "## Decoding one sequence on a GPU\n\n"
        "A Llama-3.1-8B shape with random weights, greedy, 512 tokens before; `graphopt` generates "
        "with `optimize(generate=...)`, `compile` is `torch.compile` of a step with a static cache. *of the "
        "floor*: "
        "the time in which the weights alone are read, over what a token took. *regret*: by how much the "
        "logit of each token is below the largest, in float32, in standard deviations of logits; random "
        "weights suffer more from rounding than trained ones. `+PASS`: with that pass besides the default "
        f"ones. Rows of one `at` are of one run. {record.get('note', '')}\n\n"
        + table(
            ("mode", "ms a token", "tokens/s", "target", "of the floor", "prompt, ms", "regret", "at"), cells
        )
    )


def gpu_decode_large(record: dict[str, Any]) -> str:
    rows = record["rows"]
    places = dict.fromkeys((row["batch"], row["context"], row["capacity"]) for row in rows)
    cells = []
    for place in sorted(places):
        own = [row for row in rows if (row["batch"], row["context"], row["capacity"]) == place]
        peer = next(row for row in own if row["mode"] == "compile")
        for row in sorted(own, key=lambda row: row["ms"]):
            faster, prompts = peer["ms"] / row["ms"], peer["prompt_ms"] / row["prompt_ms"]
            cells.append(
                (
                    *(f"{size:,}" for size in place), row["mode"], f"{row['ms']:.2f}",
                    f"{row['tokens_per_s']:.0f}", f"{faster:.2f}", f"{row['prompt_ms']:.0f}",
                    f"{prompts:.2f}", f"{row['peak_gib']:.1f}", f"{row['regret']:.3f}", row["at"],
                )
            )  # fmt: skip
    early = {row["mode"]: row["prompt_ms"] for row in rows if row["context"] == 16384}
    packed = [row for row in rows if row["batch"] == 16 and row["mode"].endswith("quant-4")]
    whole = {row["capacity"]: row["ms"] for row in rows if row["batch"] == 16 and row["mode"] == "compile"}
    gain, kept = early["graphopt"] / early["graphopt+swiftkv"], whole[32768] / packed[0]["ms"]
    return (
        "## Decoding long contexts and several sequences on a GPU\n\n"
        "The same shape; `x` is how many times as fast as `compile`, which reads all of its static cache, "
        "heads repeated, and runs prompts as transformers does. `quant-4`: keys and values of 4 bits. "
        "`swiftkv`: keys and values of the later half out of one early stream, random weights, no recovery. "
        f"Targets: 16 sequences with 4-bit stores 3 times `compile`: {verdict(kept >= 3)} ({kept:.1f}, a "
        "quarter of the places filled); prompts with the early stream 1.7 times those without: "
        f"{verdict(gain >= 1.7)} ({gain:.2f}). Missing: "
        + "; ".join(record["missing"])
        + ".\n\n"
        + table(
            (
                "sequences", "tokens before", "capacity", "mode", "ms a step", "tokens/s", "x", "prompt, ms",
                "x", "peak, GiB", "regret", "at",
            ),
            cells,
        )
    )  # fmt: skip


def gpu_context(record: dict[str, Any]) -> str:
    rows = {row["mode"]: row for row in record["rows"]}
    peer, own = rows["compile"], rows["graphopt"]
    gib = 1 << 30
    cells = [
        ("compile", f"{peer['tokens']:,}", "", f"{peer['peak'] / gib:.2f} at {peer['measured_at']:,} tokens"),
        ("graphopt", f"{own['tokens']:,}", f"{own['predicted'] / gib:.2f}", f"{own['peak'] / gib:.2f}"),
    ]
    below = own["peak"] <= min(own["predicted"], record["budget"])
    return (
        "## Context within a budget on a GPU\n\n"
        f"The same shape, one sequence, all memory within {record['budget'] / gib:.0f} GiB. `compile` has a "
        "static cache in bf16: how many tokens it has room for beside its peak. `graphopt`: neighbouring "
        f"layers share keys and values, `{own['store']}`. Targets: 7 times as many tokens: "
        f"{verdict(record['times'] >= 7)} ({record['times']:.4f}; the prediction "
        f"leaves {(record['budget'] - own['predicted']) >> 20} MiB); the measured peak within 3 % of the "
        f"predicted one, and never above it: {verdict(below and own['off'] >= -0.03)} "
        f"({percent(own['off'])}). Weights are random: what rounding and sharing lose is not looked at.\n\n"
        + table(("mode", "tokens", "predicted, GiB", "peak, GiB"), cells)
    )


def gpu_decode_attention(record: dict[str, Any]) -> str:
    cells, met = [], {name: [0, 0] for name in _ATTENTION}
    places = dict.fromkeys((row["batch"], row["capacity"], row["filled"]) for row in record["rows"])
    kinds = tuple(dict.fromkeys(row["kind"] for row in record["rows"]))
    for place in places:
        rows = {
            row["kind"]: row
            for row in record["rows"]
            if (row["batch"], row["capacity"], row["filled"]) == place
        }
        for name, (good, count) in met.items():
            if name in rows:
                met[name] = [good + (rows[name]["of_read"] >= _ATTENTION[name]), count + 1]
        texts = (
            f"{rows[kind]['us']:.0f} ({percent(rows[kind]['of_read'])})" if kind in rows else ""
            for kind in kinds
        )
        cells.append((*map(str, place), *texts))
    reached = "; ".join(f"{name} {good} of {count}" for name, (good, count) in met.items())
    faster = {
        name: sum(
            row["us"] < other["us"]
            for row in record["rows"]
            for other in record["rows"]
            if row["kind"] == name and other["kind"] == "graphopt"
            if all(row[size] == other[size] for size in ("batch", "capacity", "filled"))
        )
        for name in ("quant-8", "quant-4")
    }
    sooner = "; ".join(f"{name} {count} of {len(places)}" for name, count in faster.items())
    return (
        "## Attention of one token over what is stored\n\n"
        "32 heads of queries, 8 of keys, of 128 elements, bf16: microseconds, and the share of the bandwidth "
        f"of a sum ({record['read_gb_per_second']:.0f} GB/s) that filled positions are read with. `sdpa` is "
        "`scaled_dot_product_attention` over a static cache with a mask. Targets: 85 % (bf16, 8 bits), 75 % "
        f"(4 bits), reached in: {reached}. Rounded stores take less time than those of bf16 in: {sooner}. "
        f"The token fills a block, which is rounded then: one in 32 does. {record.get('note', '')}\n\n"
        + table(("batch", "capacity", "filled", *kinds), cells)
    )


def kv_stores(record: dict[str, Any]) -> str:
    cells = [
        (
            row["model"], f"`{row['what']}`", f"{row['share']:.3f}x", f"{row['perplexity_ratio']:.3f}",
            f"{row['divergence']:.4f}", f"{row['divergence_p99']:.3f}", percent(row["agreement"]),
        )
        for row in record["rows"]
        if "share" in row and "perplexity_ratio" in row and "divergence" in row
    ]  # fmt: skip
    targets = "; ".join(
        f"{name}x at a perplexity ratio of {found['target']}: {verdict(found['met'])} "
        f"({found['share']:.3f}x at {found['perplexity_ratio']:.3f})"
        for name, found in record["summary"].items()
        if "target" in found
    )
    halves = ", ".join(
        f"{found['kl_of_uniform']:.2f} at {found['share']:.3f}x"
        for found in record["summary"].values()
        if "kl_of_uniform" in found
    )
    return (
        "## Keys and values in fewer bytes, on a real checkpoint\n\n"
        "SmolLM2-135M-Instruct, 2,048 tokens of held-out text; bytes of the stores against those of "
        f"two bytes a number. Targets: {targets}. KL of what is allocated over that of uniform stores of the "
        "same bytes "
        f"(target 0.5): {halves}.\n\n"
        + table(("", "stores", "bytes", "perplexity ratio", "KL", "KL, 99 %", "top-1"), cells)
    )


def share_kv(record: dict[str, Any]) -> str:
    cells = [
        (
            row["what"], str(row["layers"]), f"{row['kv_share']:.3f}x", f"{row['perplexity']:.1f}",
            f"{row['divergence']:.3f}", percent(row["agreement"]), f"{row['fit_seconds']:.0f}",
        )
        for row in record["rows"]
    ]  # fmt: skip
    found = record["summary"]
    before = record["rows"][0]["perplexity_before"]
    told = [
        f"{count} attentions share at a perplexity of at most {target}: "
        f"{verdict(found[f'target_met_{count}'])} "
        f"({found[f'perplexity_{count}']:.1f})"
        for count, target in found["targets"].items()
        if f"target_met_{count}" in found
    ]
    told += [
        f"KL of {count} against that of KVSharer's order, at most a third: "
        f"{verdict(found[f'ratio_met_{count}'])} ({found[f'divergence_ratio_{count}']:.2f})"
        for count in found["targets"]
        if f"ratio_met_{count}" in found
    ]
    missing = ", ".join(record.get("missing", ())) or "nothing"
    return (
        "## Attentions that share keys and values, on a real checkpoint\n\n"
        f"SmolLM2-135M-Instruct (perplexity {before:.1f}), 2,048 tokens of held-out text. `dissimilarity` is "
        "KVSharer's order, `single-kl` the search by KL of single pairs, `local` its plan with queries and "
        f"outputs fitted layer by layer. {'; '.join(told)}. Not measured: {missing}.\n\n"
        + table(("", "attentions", "stores", "perplexity", "KL", "top-1", "fitted, s"), cells)
    )


def page(record: dict[str, Any]) -> str:
    found = record["summary"]
    return (
        "## The page of a program\n\n"
        f"`graphopt dump -f html` of {record['values']} values, {record['bytes'] / 1e6:.1f} MB, in a "
        f"headless browser, medians of {len(record['rows'])}: open after {found['open_ms']:.0f} ms "
        "(target 3,000: "
        f"{verdict(found['open_ms'] <= 3000)}), all layers laid out in {found['all_ms']:.0f} ms, longest "
        f"frame {found['paint_ms']:.1f} ms."
    )
