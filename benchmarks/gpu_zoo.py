"""Does generated code on a GPU compute what the models of the zoo do? Beside eager and ``torch.compile``.

    python benchmarks/gpu_zoo.py [--only PATTERN] [--workers N] [--seconds N] [--limit N] [--budget]
        [TYPE ...]

The models of ``zoo.py`` and further types of transformers, float32 without TF32, with what ``optimize`` does
by default on a GPU but for the guard (``guard="off"``: times of processes side by side say nothing). Dropout
and layer drop are off: generated code draws other random numbers than eager does. Each model in a process of
its own, ``--workers`` at once.

- inference: outputs of two calls with other inputs, against the model's own.
- training: two whole steps: outputs, gradients, buffers.
- budget (``--budget``): ``optimize`` again with 60 % of what the step held at its peak beyond weights, inputs
  and gradients. Either the measured peak is within it, or it is refused with the least that fits, and that is
  kept in turn. Two steps under the budget are compared as well.

A model agrees where no number is further off than 1e-4 of the largest in its tensor (as in ``zoo.py``). Where
one is, torch.compile runs the same, and ``peer`` is how far that is off: sums in another order, and ties that
a router or a sampler breaks in another way, are in both.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import re
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import zoo_others
import zoo_transformers
from harness import RESULTS, say
from torch import nn
from torch.utils import _pytree as pytree
from zoo import SHARE, Subject, difference, noted, seed, step, subject, worst_of
from zoo_verdict import TOLERANCE, wrong

import graphopt
from graphopt.atomic import write_atomically
from graphopt.errors import BudgetError

PARTS = ("inference", "training", "budget")


def on_device(name: str, device: str) -> Subject:
    """A model there, without what is random in it."""
    of = subject(name)
    model = without_dropout(of.model).to(device)
    move = partial(pytree.tree_map_only, torch.Tensor, lambda t: t.to(device))
    return Subject(model, lambda number: move(of.inputs(number)))


def without_dropout(model: nn.Module) -> nn.Module:
    """Every rate of a module or of a configuration that has ``drop`` in its name is zero."""
    for module in model.modules():
        holders = [module, getattr(module, "config", None)]
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for holder in holders:
            for field, value in list(getattr(holder, "__dict__", {}).items()):
                if "drop" in field and type(value) is float:
                    setattr(holder, field, 0.0)
    return model


def outputs_of(of: Subject, module: nn.Module, number: int) -> dict[str, Any]:
    seed(number)
    with torch.no_grad():
        return {"outputs": of.run(module, number)}


def steps_of(of: Subject, module: nn.Module, number: int) -> dict[str, Any]:
    return {key: value for key, value in step(of, module, number).items() if key != "random"}


def beside(
    of: Subject, fast: nn.Module, plain: Subject, run: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    """How far two calls are off, and how far torch.compile is where that is too much."""
    numbers = (0, 1)
    initial = copy.deepcopy(plain)
    expected = [run(plain, plain.model, number) for number in numbers]
    worst = worst_of([run(of, fast, number) for number in numbers], expected)
    row: dict[str, Any] = {"worst": worst}
    if any(wrong(share) for share in worst.values()):
        torch._dynamo.reset()
        try:
            compiled = torch.compile(initial.model)
            steps = [_unwrapped(run(initial, compiled, number)) for number in numbers]
            row["peer"] = worst_of(steps, expected)
        except Exception as error:
            row["peer"] = f"{type(error).__name__}: {str(error)[:200]}"
    return row


def _unwrapped(results: dict[str, Any]) -> dict[str, Any]:
    """What ``torch.compile`` gave, with the model's own names."""
    return {
        key: {name.removeprefix("_orig_mod."): value for name, value in found.items()}
        if key in ("gradients", "buffers")
        else found
        for key, found in results.items()
    }


def described(fast: graphopt.Optimized) -> dict[str, Any]:
    return {"graphs": len(fast.report.programs), "notes": list(fast.report.diagnostics)}


def inference(name: str, device: str) -> dict[str, Any]:
    of = on_device(name, device)
    plain = Subject(copy.deepcopy(of.model), of.inputs)
    fast = graphopt.optimize(of.model, of.inputs(0), guard="off", cache=False)
    row = beside(of, fast, plain, outputs_of)
    return {**described(fast), **row}


def training(
    name: str, device: str, share: float | None = None, told: dict[str, Any] | None = None
) -> dict[str, Any]:
    of = on_device(name, device)
    of.model.train()
    plain = Subject(copy.deepcopy(of.model), of.inputs)
    make = partial(graphopt.optimize, of.model, of.inputs(0), guard="off", cache=False)
    row: dict[str, Any] = {}
    if share is None:
        fast = make()
    else:
        assert told is not None
        row["budget"] = told["held"] + int(share * (told["baseline"] - told["held"]))
        try:
            fast = make(budget=row["budget"])
        except BudgetError as refused:
            row["floor"] = refused.least_bytes
            fast = make(budget=refused.least_bytes)
    row |= beside(of, fast, plain, steps_of)
    if fast.report.baseline is not None:
        session = fast._driver.session
        memory = fast.measure(repeats=1)
        row["peak"] = memory.peak_bytes
        row["baseline"] = fast.report.baseline.peak_bytes
        row["held"] = min((session.static_bytes or 0) + fast.memory()[0].gradient_bytes, row["baseline"])
        if share is not None:
            row["kept"] = memory.peak_bytes <= row.get("floor", row["budget"])
    return {**described(fast), **row}


def attempt(name: str, out: Path, device: str, budget: bool) -> None:
    """All that is tried with one model, in a process of its own."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    zoo_others.schemas()
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    row: dict[str, Any] = {}

    def note(part: str, make: Callable[[], dict[str, Any]]) -> None:
        torch._dynamo.reset()
        noted(row, out, part, make)

    def eager() -> dict[str, Any]:
        of = on_device(name, device)
        drawn = []
        for number in (0, 1):
            seed(number)
            with torch.no_grad():
                drawn.append(of.run(of.model, 0))
        if wrong(difference(*drawn)):
            return {"random": True}
        of.model.train()
        steps_of(of, of.model, 0)
        return {"parameters": sum(p.numel() for p in of.model.parameters())}

    note("eager", eager)
    if "error" in row["eager"] or "random" in row["eager"]:
        return
    note("inference", lambda: inference(name, device))
    note("training", lambda: training(name, device))
    if budget and "peak" in row["training"]:
        note("budget", lambda: training(name, device, SHARE, row["training"]))


def verdict(row: dict[str, Any]) -> str:
    """``ok``, ``as torch.compile`` (too far off, torch.compile is too), ``wrong``, ``over``, ``failed``,
    ``stopped``, ``eager fails``, or ``random`` (draws numbers without any dropout)."""
    if "error" in row.get("eager", {}):
        return "eager fails"
    if "random" in row.get("eager", {}):
        return "random"
    parts = [row[part] for part in PARTS if part in row]
    words = ["ok"]
    for part in parts:
        if "error" in part:
            words.append("failed")
        if part.get("kept") is False:
            words.append("over")
        for key, share in part.get("worst", {}).items():
            peer = part.get("peer", {})
            if wrong(share):
                alike = isinstance(peer, dict) and wrong(peer.get(key, 0.0))
                words.append("as torch.compile" if alike else "wrong")
    if "stopped" in row:
        words.append("stopped")
    order = ("wrong", "failed", "over", "stopped", "as torch.compile", "ok")
    return min(words, key=order.index)


def tried(name: str, chosen: argparse.Namespace) -> dict[str, Any]:
    out = Path(tempfile.mkdtemp()) / "row.json"
    began = time.time()
    process = multiprocessing.get_context("spawn").Process(
        target=attempt, args=(name, out, chosen.device, chosen.budget)
    )
    process.start()
    process.join(chosen.limit)
    over = process.is_alive()
    if over:
        process.kill()
        process.join()
    row: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    if over:
        row["stopped"] = f"after {chosen.limit:g} s"
    elif process.exitcode:
        row["stopped"] = f"exit code {process.exitcode}"
    return {**row, "seconds": round(time.time() - began, 1)}


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("types", nargs="*", metavar="TYPE", help="of transformers, besides those of the zoo")
    options.add_argument("--only", default="", metavar="PATTERN", help="models of the zoo whose name matches")
    options.add_argument("--workers", type=int, default=14)
    options.add_argument("--seconds", type=float, default=3600, help="start no model after that long")
    options.add_argument("--limit", type=float, default=200, help="seconds for one model")
    options.add_argument("--budget", action="store_true", help="plan for a budget as well")
    options.add_argument("--device", default="cuda")
    options.add_argument("--out", type=Path, default=RESULTS / "gpu_zoo.json")
    chosen = options.parse_args()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    rows: dict[str, dict[str, Any]] = (
        json.loads(chosen.out.read_text())["rows"] if chosen.out.exists() else {}
    )
    order = [*zoo_transformers.families(), *zoo_others.names()]
    asked = [*(name for name in order if re.search(chosen.only, name)), *chosen.types]
    waiting = deque(name for name in asked if name not in rows)
    began, lock = time.time(), threading.Lock()

    def store() -> None:
        verdicts = {name: verdict(row) for name, row in rows.items()}
        found = {
            word: sorted(name for name in rows if verdicts[name] == word)
            for word in sorted(set(verdicts.values()))
        }
        record = {
            "figure": "gpu_zoo",
            "device": torch.cuda.get_device_name() if chosen.device == "cuda" else chosen.device,
            "versions": {name: version(name) for name in ("torch", "triton", "transformers")},
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "command": f"python benchmarks/gpu_zoo.py --workers {chosen.workers} --limit {chosen.limit:g}"
            + " --budget" * chosen.budget,
            "tolerance": TOLERANCE, "share": SHARE,
            "summary": {"verdicts": {word: len(names) for word, names in found.items()},
                        **{word: names for word, names in found.items() if word != "ok"}},
            "rows": {name: rows[name] for name in [*order, *rows] if name in rows},
        }  # fmt: skip
        write_atomically(chosen.out, json.dumps(record, indent=1) + "\n")

    def work() -> None:
        while time.time() - began < chosen.seconds:
            with lock:
                if not waiting:
                    return
                name = waiting.popleft()
            row = tried(name, chosen)
            with lock:
                rows[name] = row
                say(f"{name}: {verdict(row)}, {row['seconds']} s")

    threads = [threading.Thread(target=work) for _ in range(chosen.workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store()
    print(json.dumps(json.loads(chosen.out.read_text())["summary"], indent=1))


if __name__ == "__main__":
    main()
