"""The section of docs/benchmarks.md on predictions with packed weights."""

from __future__ import annotations

from typing import Any

from table_cells import number, table, verdict

_NAMES = {
    "smollm2": "SmolLM2-135M-Instruct, next token",
    "minilm": "all-MiniLM-L6-v2, which of 64 passages follows",
}


_WHAT = """KL in nats by row of logits against the checkpoint as it is, on topics that calibration did
not see; bits with scales and zeros, embeddings and heads among the weights. Where 128 does not divide the
inputs the last group of a row is shorter, which no scheme stores: that is simulated, and groups of 64 stand
beside it. The weights of SmolLM2 come in four bits themselves, with a scale and a least value for each 32
inputs: groups of 32 whose zeros are searched (`hqq`) come near those, which helps plans that use them, and is
no evidence about weights as they are trained. Those of MiniLM are float32."""


def quality_packed(record: dict[str, Any]) -> str:
    summary = record["summary"]
    bits, share = summary["target_bits"], summary["target_ratio"]
    target = f"plans of {bits} bits a weight have at most {share} of the KL"
    parts = [
        "## What packed weights do to predictions of real checkpoints\n\n"
        f"Target: {target} of `int4` rounded to the nearest in groups of 128: {verdict(summary['met'])}. "
        + _WHAT
    ]
    for model in dict.fromkeys(row["model"] for row in record["rows"] if "divergence" in row):
        own = [row for row in record["rows"] if row["model"] == model and "divergence" in row]
        yard = next(row for row in own if row["what"].startswith("int4{group=128} rtn"))
        parts.append(f"### {_NAMES[model]}, {own[0]['tokens']:,} rows")
        head, cells = _head(own), []
        for row in sorted(own, key=lambda row: ("asked" in row, row.get("asked", 0), row["divergence"])):
            if "asked" not in row:
                cells.append(_cells(row, yard, row["what"]))
        parts.append(f"One scheme for all weights:\n\n{table(head, cells)}")
        plans = [row for row in own if "asked" in row]
        if not plans:
            continue
        cells = [
            _cells(row, yard, f"{row['score']}, {row['asked']}")
            for row in sorted(plans, key=lambda row: (row["asked"], row["divergence"]))
        ]
        parts.append(f"Plans by score, bits asked for:\n\n{table(('score', *head[1:]), cells)}")
        found = summary["models"][model]
        parts.append(
            f"Best at {summary['target_bits']} bits: `{found['best']}`, {number(found['ratio'])} of the "
            "yardstick, "
            f"{number(found['ratio_to_groups_of_64'])} of that in groups of 64. Plans were solved in at most "
            f"{found['slowest_solving_seconds']:.2f} s."
        )
    if "parts" in record:
        parts.append(f"Of the benchmark there is: {record['parts']}.")
    return "\n\n".join(parts)


def _head(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    head = ["scheme", "bits", "KL, mean", "KL, 99 %", "same top", "of the yardstick"]
    if rows[0]["perplexity_before"] is not None:
        head.append(f"perplexity, of {rows[0]['perplexity_before']:.2f}")
        head.append("ratio")
    if "cosine" in rows[0]:
        head.append("1 - cosine of embeddings")
    return tuple(head)


def _cells(row: dict[str, Any], yard: dict[str, Any], what: str) -> list[str]:
    cells = [
        f"`{what}`"
        if "asked" not in row and "bfloat16" not in what and "," not in what.split("}")[-1]
        else what,
        f"{row['bits']:.2f}",
        f"{row['divergence']:.3g}",
        f"{row['divergence_p99']:.3g}",
        f"{100 * row['agreement']:.1f} %",
        f"{row['divergence'] / yard['divergence']:.3f}",
    ]
    if row["perplexity_before"] is not None:
        cells += [
            f"{row['perplexity_after']:.2f}",
            f"{row['perplexity_after'] / row['perplexity_before']:.3f}",
        ]
    if "cosine" in row:
        cells.append(f"{row['cosine']:.2g}")
    return cells
