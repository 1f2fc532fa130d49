"""Is ``optimize`` safe on anything: does it compute what the model does, and keep budgets or refuse them?

    python benchmarks/zoo.py [--only PATTERN] [--seconds N] [--limit N] [--again]

Every type of ``zoo_types.txt`` (transformers) and every net of ``zoo_others.py`` whose package is there, op
by op on the CPU. Each in a process of its own, one at a time, stopped after ``--limit`` seconds. Results are
stored after each, and a later run goes on from there (``--again`` runs what ``--only`` matches once more).

- inference: outputs of two calls with other inputs, against the model's own.
- training: two whole steps, each with the random state of its own: outputs, gradients, buffers.
- budget: 60 % of what the baseline holds at its peak beyond weights, inputs and gradients. Either the
  measured peak of the step that was planned, its random state included, is within it, or it is refused with
  the least that fits, and that is kept in turn. Steps under the budget are compared as well.

Two results agree where no number is further off than 1e-4 of the largest in its tensor, or than 1e-6 of the
largest in all that is compared with it (a gradient that is zero in theory is what rounding leaves): sums may
be taken in another order, nothing else. Target: nothing is wrong, nothing fails that eager runs, every budget
is kept or refused.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import multiprocessing
import random
import re
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zoo_others
import zoo_transformers
from harness import RESULTS, environment, say
from torch.utils import _pytree as pytree
from zoo_verdict import TOLERANCE, verdict, wrong

import graphopt
from graphopt.atomic import write_atomically
from graphopt.budget import Budget
from graphopt.errors import BudgetError, GraphoptError
from graphopt.loss import is_differentiable, loss_of

LEAST_SCALE = 1e-2
"""Of the largest number among all tensors that are compared together."""
SHARE = 0.6
"""Of the baseline's activations that the budget leaves."""


@dataclass(frozen=True)
class Subject:
    """A model and how it is called: ``inputs(seed)`` are a tuple or a dict of arguments."""

    model: torch.nn.Module
    inputs: Callable[[int], Any]

    def run(self, module: torch.nn.Module, seed: int) -> Any:
        given = pytree.tree_map_only(torch.Tensor, torch.clone, self.inputs(seed))
        return module(**given) if isinstance(given, dict) else module(*given)


def subject(name: str) -> Subject:
    if "/" in name:
        model, _ = zoo_others.build(name)
        return Subject(model, partial(zoo_others.inputs_of, name))
    model, _ = zoo_transformers.build(name)
    return Subject(model, partial(zoo_transformers.inputs_of, model))


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def difference(ours: Any, theirs: Any) -> float | str:
    """Largest difference of two results as a share of the largest number in its tensor, or what else is
    different about them."""
    found, expected = (pytree.tree_flatten(value) for value in (ours, theirs))
    if found[1] != expected[1]:
        return f"structure {found[1]} instead of {expected[1]}"[:300]
    worst = 0.0
    least = max([LEAST_SCALE * _largest(b) for b in expected[0] if isinstance(b, torch.Tensor)], default=0.0)
    for a, b in zip(found[0], expected[0], strict=True):
        if not isinstance(b, torch.Tensor):
            if type(a) is not type(b) or (isinstance(b, (int, float, str, bool)) and a != b):
                return f"{a!r} instead of {b!r}"[:300]
            continue
        if not isinstance(a, torch.Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            return f"{_kind(a)} instead of {_kind(b)}"
        a, b = (x.detach().to(torch.complex128 if b.is_complex() else torch.float64) for x in (a, b))
        off = torch.where(
            (a == b) | (a.isnan() & b.isnan()), torch.zeros((), dtype=torch.float64), (a - b).abs()
        )
        if off.numel() and bool(off.any()):
            share = off.max().item() / max(_largest(b), least, 1e-30)
            worst = max(worst, share if share == share else float("inf"))
    return worst


def _largest(value: torch.Tensor) -> float:
    """The largest finite magnitude."""
    if not value.is_floating_point() and not value.is_complex():
        return 0.0
    sizes = value.detach().abs()
    sizes = sizes[sizes.isfinite()]
    return float(sizes.max()) if sizes.numel() else 0.0


def _kind(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def step(of: Subject, module: torch.nn.Module, number: int) -> dict[str, Any]:
    """One whole step: outputs, and what it leaves behind in gradients and buffers."""
    for parameter in of.model.parameters():
        parameter.grad = None
    module.zero_grad()
    seed(number)
    output = of.run(module, number)
    if is_differentiable(output):
        loss_of(output).backward()
    return {
        "outputs": pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), output),
        "gradients": {
            name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()
        },
        "buffers": {name: buffer.clone() for name, buffer in module.named_buffers()},
        "random": torch.randn(1),
    }


def worst_of(found: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> dict[str, float | str]:
    worst: dict[str, float | str] = {}
    for ours, theirs in zip(found, expected, strict=True):
        for what in theirs:
            share = difference(ours[what], theirs[what])
            known = worst.get(what, 0.0)
            if isinstance(share, str) or (not isinstance(known, str) and share > known):
                worst[what] = share
            worst.setdefault(what, 0.0)
    return worst


def inference(name: str) -> dict[str, Any]:
    of = subject(name)
    plain = copy.deepcopy(of.model)
    fast = graphopt.optimize(of.model, of.inputs(0), emit="eager", cache=False)
    found, expected = [], []
    with torch.no_grad():
        for number in (0, 1):
            for module, kept in ((fast, found), (plain, expected)):
                seed(number)
                kept.append({"outputs": of.run(module, number), "random": torch.randn(1)})
    return {**_described(fast), "worst": worst_of(found, expected)}


def training(name: str) -> tuple[dict[str, Any], Callable[[], dict[str, Any]] | None]:
    """The row of whole steps, and what makes the one of steps under a budget, where there is a plan."""
    of = subject(name)
    of.model.train()
    plain = Subject(copy.deepcopy(of.model), of.inputs)
    expected = [step(plain, plain.model, number) for number in range(6)]
    before = {name: value.clone() for name, value in of.model.state_dict().items()}
    seed(0)
    fast = graphopt.optimize(of.model, of.inputs(0), emit="eager", cache=False)
    touched = [
        name for name, value in of.model.state_dict().items() if wrong(difference(value, before[name]))
    ]
    found = [step(of, fast, number) for number in (0, 1)]
    row = {**_described(fast), "worst": worst_of(found, expected[:2])}
    if touched:
        row["touched"] = touched
    return row, None if fast.report.baseline is None else partial(_budgeted, of, fast, expected[2:])


def _budgeted(of: Subject, fast: graphopt.Optimized, expected: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Plan again for the budget, which is the same as ``optimize`` with it without capturing again."""
    assert fast.report.baseline is not None
    session = fast._driver.session
    baseline, static = fast.report.baseline.peak_bytes, session.static_bytes or 0
    held = min(static + fast.memory()[0].gradient_bytes, baseline)
    budget = int(held + SHARE * (baseline - held))
    row: dict[str, Any] = {"baseline": baseline, "held": held, "budget": budget}

    def under(bound: int) -> int:
        session.budget = Budget.of(bound)
        for captured in session.current:
            captured.provisional = True
        session.finish()
        # Of the step that was planned: what a step drops or masks at random decides what it holds.
        seed(0)
        return fast.measure(repeats=1).peak_bytes

    try:
        row["peak"] = under(budget)
        row["kept"] = row["peak"] <= budget
    except BudgetError as refused:
        row["floor"] = refused.least_bytes
        row["peak"] = under(refused.least_bytes)
        row["kept"] = row["peak"] <= refused.least_bytes
    found = [step(of, fast, number) for number in range(2, 2 + len(expected))]
    row["worst"] = worst_of(found, expected)
    row["notes"] = list(fast.report.diagnostics)
    return row


def _described(fast: graphopt.Optimized) -> dict[str, Any]:
    report = fast.report
    return {"graphs": len(report.programs), "notes": list(report.diagnostics)}


def noted(row: dict[str, Any], out: Path, part: str, make: Callable[[], dict[str, Any]]) -> None:
    """Put what ``make`` gives into ``row`` as ``part``, or what it raises, and ``row`` into ``out``."""
    began = time.time()
    try:
        found = make()
    except Exception as error:
        trace = traceback.extract_tb(error.__traceback__)
        own = [f"{Path(f.filename).name}:{f.lineno}" for f in trace]
        found = {"error": f"{type(error).__name__}: {str(error)[:400]}", "at": own[-6:]}
        found["refused"] = isinstance(error, GraphoptError)
    row[part] = {**found, "seconds": round(time.time() - began, 1)}
    out.write_text(json.dumps(row))


def attempt(name: str, out: Path) -> None:
    """All that is tried with one model, in a process of its own. What is known is written as it comes."""
    torch.set_num_threads(1)
    row: dict[str, Any] = {}

    note = partial(noted, row, out)

    def eager() -> dict[str, Any]:
        of = subject(name)
        with torch.no_grad():
            of.run(of.model, 0)
        of.model.train()
        trained = any(isinstance(p.grad, torch.Tensor) for p in of.model.parameters()) or step(
            of, of.model, 0
        )
        return {"parameters": sum(p.numel() for p in of.model.parameters()), "trained": bool(trained)}

    note("eager", eager)
    if "error" in row["eager"]:
        return
    note("inference", lambda: inference(name))
    torch._dynamo.reset()
    further: list[Callable[[], dict[str, Any]] | None] = []

    def steps() -> dict[str, Any]:
        found, budgeted = training(name)
        further.append(budgeted)
        return found

    note("training", steps)
    for budgeted in further:
        if budgeted is not None:
            note("budget", budgeted)


def tried(name: str, limit: float) -> dict[str, Any]:
    """The row of one model."""
    out = Path(tempfile.mkdtemp()) / "row.json"
    began = time.time()
    process = multiprocessing.get_context("fork").Process(target=attempt, args=(name, out))
    process.start()
    process.join(limit)
    over = process.is_alive()
    if over:
        process.kill()
        process.join()
    row: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    shutil.rmtree(out.parent)
    if over:
        row["stopped"] = f"after {limit:g} s"
    elif process.exitcode:
        code = process.exitcode
        row["stopped"] = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return {**row, "seconds": round(time.time() - began, 1)}


def summary(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    verdicts = {name: verdict(row) for name, row in rows.items()}
    run = {name: row for name, row in rows.items() if verdicts[name] != "eager fails"}
    by = {
        word: sorted(name for name in run if verdicts[name] == word)
        for word in sorted(set(verdicts.values()))
    }
    training = [row["training"] for row in run.values() if "graphs" in row.get("training", {})]
    budgets = [row["budget"] for row in run.values() if "kept" in row.get("budget", {})]
    return {
        "models": len(run),
        "verdicts": {word: len(names) for word, names in by.items() if names},
        **{word.replace(" ", "_"): names for word, names in by.items() if word != "ok" and names},
        "training_in_one_graph": sum(part["graphs"] == 1 for part in training),
        "budgets_kept": sum(part["kept"] and "floor" not in part for part in budgets),
        "budgets_refused_with_a_floor_that_holds": sum(part["kept"] and "floor" in part for part in budgets),
        "budgets_exceeded": sum(not part["kept"] for part in budgets),
        "exact_training": sum(not any(part["worst"].values()) for part in training),
        "met": set(verdicts.values()) <= {"ok", "as it did", "eager fails"},
    }


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--only", default="", metavar="PATTERN", help="models whose name matches")
    options.add_argument("--seconds", type=float, default=3600, help="start no model after that long")
    options.add_argument("--limit", type=float, default=150, help="seconds for one model")
    options.add_argument("--again", action="store_true", help="run also what there is a result of")
    options.add_argument("--out", type=Path, default=RESULTS / "zoo.json")
    chosen = options.parse_args()
    # Processes are forked: what they all need is imported once.
    importlib.import_module("torch._dynamo")
    transformers = importlib.import_module("transformers")
    zoo_others.schemas()
    transformers.utils.logging.set_verbosity_error()
    rows: dict[str, dict[str, Any]] = (
        json.loads(chosen.out.read_text())["rows"] if chosen.out.exists() else {}
    )
    order = [*zoo_transformers.families(), *zoo_others.names()]
    began = time.time()
    for name in order:
        if not re.search(chosen.only, name) or (name in rows and not chosen.again):
            continue
        if time.time() - began > chosen.seconds:
            break
        rows[name] = tried(name, chosen.limit)
        say(f"{name}: {verdict(rows[name])}, {rows[name]['seconds']} s")
        known = {kind: rows[kind] for kind in [*order, *rows] if kind in rows}
        about = environment()
        about["versions"] |= zoo_others.installed()
        record = {
            "figure": "zoo", **about, "threads": 1,
            "tolerance": TOLERANCE, "least_scale": LEAST_SCALE, "share": SHARE,
            "summary": summary(known), "rows": known,
        }  # fmt: skip
        write_atomically(chosen.out, json.dumps(record, indent=1) + "\n")
    print(json.dumps(summary(rows), indent=1))


if __name__ == "__main__":
    main()
