"""What the benchmark scripts share: options, progress, environment, results on disk, models under budgets."""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import models
import torch

import graphopt
from graphopt.atomic import write_atomically
from graphopt.budget import Budget
from graphopt.optimized import Optimized
from graphopt.step_cost import step_curve

__all__ = ["RESULTS", "Prepared", "budgets_between", "figure", "geomean", "parser", "prepare", "say"]

RESULTS = Path(__file__).parent / "results"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parser(text: str | None) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--models", nargs="*", default=[], metavar="NAME", help="some of the models only")
    options.add_argument("--quick", action="store_true", help="three small models, fewer budgets")
    options.add_argument(
        "--update", action="store_true", help="put the rows of --models into the stored results"
    )
    options.add_argument("--out", type=Path, help="file for the results (default: results/<figure>.json)")
    return options


def figure(
    name: str,
    options: argparse.Namespace,
    rows: Callable[[str], Iterable[dict[str, Any]]],
    summary: Callable[[Sequence[dict[str, Any]]], dict[str, Any]],
    items: Sequence[str] | None = None,
) -> None:
    """Run ``rows`` on every item (model), and store rows and summary.

    Something that fails is a row with ``error``. What was measured is stored after each item, so
    an interrupted run leaves the results that it has. A run on some of the models is stored only
    where ``--out`` says, or with ``--update`` in place of what the stored results say of those.
    """
    chosen = (
        items
        if items is not None
        else models.chosen(options.models or (["unet", "mixer", "mamba"] * options.quick))
    )
    partial = bool(options.models or options.quick) and not options.update
    out = options.out or (None if partial else RESULTS / f"{name}.json")
    start, found = time.time(), []
    stored = json.loads(out.read_text()) if options.update and out is not None and out.exists() else None
    for item in chosen:
        say(f"{name}: {item}")
        began = time.time()
        torch._dynamo.reset()
        gc.collect()
        try:
            for row in rows(item):
                found.append(row)
                say("  " + json.dumps(row))
        except Exception as error:
            found.append(
                {
                    "model": item,
                    "error": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}",
                }
            )
            say(f"  {found[-1]['error']}")
        say(f"  {time.time() - began:.0f} s")
        record = {
            "figure": name, **environment(), "seconds": round(time.time() - start, 1),
            "summary": summary(found), "rows": found,
        }  # fmt: skip
        if stored is not None:
            record = updated(stored, record, summary)
        if out is not None:
            write_atomically(out, json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["summary"], indent=1))


def updated(
    stored: dict[str, Any],
    record: dict[str, Any],
    summary: Callable[[Sequence[dict[str, Any]]], dict[str, Any]],
) -> dict[str, Any]:
    """``stored`` with the rows of ``record`` in place of its own of the same models, and its account
    of the run beside the first one's."""
    own = list(dict.fromkeys(row["model"] for row in record["rows"]))
    known = dict.fromkeys([*models.MODELS, *(r["model"] for r in stored["rows"])])
    rows = {name: [r for r in stored["rows"] if r["model"] == name] for name in known}
    rows |= {name: [r for r in record["rows"] if r["model"] == name] for name in own}
    together = [row for name in rows for row in rows[name]]
    account = {key: value for key, value in record.items() if key not in ("figure", "summary", "rows")}
    updates = [u for u in stored.get("updates", ()) if u["command"] != account["command"]]
    return {
        **stored, "updates": [*updates, {"models": own, **account}], "summary": summary(together),
        "rows": together,
    }  # fmt: skip


def environment() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "device": "cpu",
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "transformers", "graphopt")},
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def geomean(values: Iterable[float]) -> float | None:
    """Geometric mean of positive numbers; ``None`` of none."""
    found = list(values)
    return math.exp(sum(map(math.log, found)) / len(found)) if found else None


@dataclass
class Prepared:
    """A model captured once, to be run op by op under one budget after another."""

    name: str
    model: torch.nn.Module
    inputs: dict[str, torch.Tensor]
    optimized: Optimized

    @property
    def baseline(self) -> int:
        """Peak bytes of the whole step without recomputation, predicted."""
        return self.optimized.plan.baseline.peak_bytes

    @property
    def static(self) -> int:
        """Bytes of parameters, buffers and inputs."""
        return self.optimized._driver.session.static_bytes or 0

    @property
    def least(self) -> int:
        """The least budget that some plan fits."""
        session = self.optimized._driver.session
        return step_curve(session, self.static)[0][0]

    @property
    def graphs(self) -> int:
        return len(self.optimized._driver.session.current)

    @property
    def notes(self) -> list[str]:
        return list(self.optimized._driver.session.diagnostics)

    def under(self, budget: int | None) -> int:
        """Plan again for ``budget`` and compile that; returns the predicted peak.

        The same as ``optimize`` with that budget (frontiers do not depend on it), without capturing
        again.
        """
        session = self.optimized._driver.session
        session.budget = Budget.of(budget)
        for captured in session.current:
            captured.provisional = True
        session.finish()
        return self.optimized.plan.predicted.peak_bytes


def prepare(name: str, **options: Any) -> Prepared:
    """Build and capture one of the models for running op by op; raises what capture raises."""
    model, inputs = models.build(name)
    optimized = graphopt.optimize(model, inputs, emit="eager", on_error="raise", cache=False, **options)
    return Prepared(name, model, inputs, optimized)


def budgets_between(least: int, most: int, count: int) -> list[int]:
    """``count`` budgets from ``least`` to ``most``, both included, evenly spaced."""
    return [least + (most - least) * k // (count - 1) for k in range(count)]
