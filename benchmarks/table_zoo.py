"""The sections of docs/benchmarks.md on any model, from ``results/zoo.json``, ``zoo_torch211.json`` and
``gpu_zoo.json``."""

from __future__ import annotations

from collections import Counter
from typing import Any

import zoo_transformers
from table_cells import table, verdict
from zoo_verdict import verdict as word_for

__all__ = ["gpu_zoo", "zoo"]

WORDS = ("ok", "as it did", "over", "wrong", "failed", "stopped")


def zoo(record: dict[str, Any]) -> str:
    summary, families = record["summary"], zoo_transformers.families()
    found: dict[str, Counter[str]] = {}
    for name, row in record["rows"].items():
        group = f"transformers: {families[name]}" if name in families else name.partition("/")[0]
        found.setdefault(group, Counter())[word_for(row)] += 1
    cells = [
        (group, sum(words[word] for word in WORDS), *(words[word] or "" for word in WORDS))
        for group, words in sorted(found.items())
    ]
    counts = summary["verdicts"]
    cells.append(("all", summary["models"], *(counts.get(word, "") for word in WORDS)))
    budgets = summary["budgets_kept"] + summary["budgets_refused_with_a_floor_that_holds"]
    return (
        f"## Any model, torch {record['versions']['torch']}\n\n"
        "`optimize` on the model types of `zoo_types.txt` (transformers, small configurations) and on nets "
        "of other packages (`zoo_others.py`), op by op on the CPU: inference, two whole steps of training, "
        f"steps under {record['share']:.0%} of the activations, all against the model's own numbers. "
        "Target: nothing is wrong or fails that eager runs, every budget is kept or refused: "
        f"{verdict(summary['met'])}. Budgets kept, or refused with a floor that is: {budgets} of "
        f"{budgets + summary['budgets_exceeded']}. Outputs, gradients and buffers of training are the "
        f"model's own to the bit for {summary['exact_training']} of {summary['models']}; "
        f"{summary['training_in_one_graph']} train in one graph. `as it did`: the model is left alone, "
        f"with the reason. `stopped`: not done within the limit of time{_aside(record)}. "
        f"Of the {len(families)} types of the list {sum(name in families for name in record['rows'])} were "
        "run so far; `python benchmarks/zoo.py` goes on from there.\n\n"
        + table(("models", "tried", *WORDS), cells)
        + _named(record)
    )


def gpu_zoo(record: dict[str, Any]) -> str:
    counts, rows = record["summary"]["verdicts"], record["rows"]
    tried = sum(count for word, count in counts.items() if word not in ("eager fails", "random"))
    others = len([name for name in rows if name not in zoo_transformers.families() and "/" not in name])
    lines = [
        f"- **{word}**: {', '.join(f'`{name}`' for name in names)}"
        for word, names in record["summary"].items()
        if word != "verdicts"
    ]
    for name in record["summary"].get("wrong", ()):
        for part in ("inference", "training"):
            for key, off in rows[name].get(part, {}).get("worst", {}).items():
                if isinstance(off, str) or off > record["tolerance"]:
                    peer = rows[name][part].get("peer", {}).get(key)
                    beside = "" if peer is None else f" (torch.compile: {_off(peer)})"
                    lines.append(f"- `{name}`, {key} of {part}: off by {_off(off)}{beside}")
    return (
        f"## Any model, generated code on a GPU, torch {record['versions']['torch']}\n\n"
        f"The same with what `optimize` does by default on a GPU, and {others} types of transformers that "
        "are not in the list; float32, without dropout, 16 processes at a time: outputs of inference, two "
        f"steps of training. `ok`: nothing is further off than {record['tolerance']:g} of the largest number "
        f"in its tensor: {counts.get('ok', 0)} of {tried}. `stopped`: not done within 150 s (130 s). "
        f"{record['note']}\n\n" + "\n".join(lines) + "\n"
    )


def _off(share: float | str) -> str:
    return share if isinstance(share, str) else f"{share:.3g}"


def _aside(record: dict[str, Any]) -> str:
    return f" ({record['note']})" if "note" in record else ", on a machine that others used"


def _named(record: dict[str, Any]) -> str:
    """What is to be said of models that are not ``ok``, each."""
    lines = []
    for name, row in record["rows"].items():
        word = word_for(row)
        if word in ("ok", "eager fails"):
            continue
        parts = [row[part] for part in ("inference", "training", "budget") if part in row]
        told = [part["error"].splitlines()[0] for part in parts if "error" in part]
        told += [row["stopped"]] if "stopped" in row else []
        told += [note for part in parts for note in part.get("notes", ())][-1:] if not told else []
        lines.append(f"- {name}: {word}{': ' if told else ''}{'; '.join(dict.fromkeys(told))}")
    return "\n\n" + "\n".join(lines) if lines else ""
