"""Does ``optimize`` compute what PyTorch does, on PyTorch's own samples of its own operators?

    python benchmarks/op_db.py [--only PATTERN] [--samples N] [--seconds N] [--limit N] [--again]

Each operator of ``op_db`` (what PyTorch's tests run over) is a model of one call, on the CPU, in float32
or, where the operator has no float32, in its first type. Its first ``--samples`` samples run op by op under
the default pipeline, whatever a pass raises counts. Outputs are compared with eager's, and gradients of
what can be differentiated, twice: the second call runs what the first captured. Each operator has a process
of its own, one at a time, stopped after ``--limit`` seconds. Results are stored after each, and a later run
goes on from there (``--again`` runs what ``--only`` matches once more).

Verdicts of a sample:

- ``ok``: same structure, types, shapes, strides, and numbers within 1e-5 (sums may be in another
  order).
- ``mismatch`` and ``crash``: what this is about. Target: none.
- ``as torch``: other than eager, and the same as AOTAutograd without graphopt (``backend="aot_eager"``).
- ``untraced ok``, ``untraced mismatch``, ``untraced crash``: AOTAutograd itself cannot trace the sample
  in one graph. ``optimize`` has to run it as it did.
- ``refused``: eager raises as well.

``expecttest`` has to be installed (extra ``dev``), as PyTorch's test helpers import it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import re
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import RESULTS, environment, say
from torch.utils import _pytree as pytree

import graphopt
from graphopt.atomic import write_atomically

TOLERANCE = 1e-5
TYPES = (torch.float32, torch.complex64, torch.int64, torch.bool)
FAILURES = ("mismatch", "crash", "untraced mismatch", "untraced crash")


class Call(torch.nn.Module):
    """One operator as a model."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def operators() -> dict[str, Any]:
    """All of ``op_db`` by name."""
    from torch.testing._internal.common_methods_invocations import op_db

    return {op.name + (f":{op.variant_test_name}" if op.variant_test_name else ""): op for op in op_db}


def type_of(op: Any) -> torch.dtype:
    known = op.supported_dtypes("cpu")
    return next((dtype for dtype in TYPES if dtype in known), min(known, key=str, default=torch.float32))


def samples(op: Any, count: int) -> Iterator[tuple[Any, bool]]:
    """(sample, whether it is differentiated) of an operator, the same in every run."""
    dtype = type_of(op)
    trained = op.supports_autograd and dtype in op.supported_backward_dtypes("cpu")
    _seed(0)
    for sample in islice(op.sample_inputs("cpu", dtype, requires_grad=trained), count):
        yield sample, trained


def _seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def step(module: Callable[..., Any], sample: Any, trained: bool) -> dict[str, Any]:
    """Outputs and gradients of one call on copies of the sample's tensors, and the next random number."""
    copies: dict[int, torch.Tensor] = {}

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        return copies[id(tensor)]

    args, kwargs = pytree.tree_map_only(
        torch.Tensor, copy, ((sample.input, *sample.args), dict(sample.kwargs))
    )
    _seed(1)
    with torch.set_grad_enabled(trained):
        output = module(*args, **kwargs)
    found: dict[str, Any] = {"outputs": pytree.tree_map_only(torch.Tensor, _settled, output)}
    found["random"] = torch.randn(1)
    differentiated = sample.output_process_fn_grad(output) if trained else ()
    ends = [t for t in pytree.tree_leaves(differentiated) if isinstance(t, torch.Tensor) and t.requires_grad]
    leaves = [t for t in copies.values() if t.requires_grad]
    if ends and leaves:
        _seed(2)
        tangents = [torch.randn_like(t) for t in ends]
        found["gradients"] = torch.autograd.grad(ends, leaves, tangents, allow_unused=True)
    found["inputs"] = [t.detach() for t in copies.values()]
    return found


def _settled(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().resolve_conj().resolve_neg()


def difference(ours: dict[str, Any], theirs: dict[str, Any], *, values: bool = True) -> str:
    """What differs, or ``""``. Without ``values`` outputs are what their memory held before."""
    if ours.keys() != theirs.keys():
        return f"{sorted(ours)} instead of {sorted(theirs)}"
    for part in theirs:
        (found, shape), (expected, wanted) = (
            pytree.tree_flatten(ours[part]),
            pytree.tree_flatten(theirs[part]),
        )
        if shape != wanted:
            return f"{part}: structure {shape} instead of {wanted}"[:300]
        for index, (a, b) in enumerate(zip(found, expected, strict=True)):
            if not values and part == "outputs" and isinstance(a, torch.Tensor):
                a, b = torch.zeros_like(a), torch.zeros_like(b)
            said = _leaf_difference(a, b, strides=part == "outputs")
            if said:
                return f"{part} {index}: {said}"[:300]
    return ""


def _leaf_difference(a: Any, b: Any, *, strides: bool) -> str:
    if not isinstance(b, torch.Tensor):
        return "" if type(a) is type(b) and (a == b or a != a) else f"{a!r} instead of {b!r}"
    if b.is_quantized:
        a, b = a.dequantize(), b.dequantize()
    if b.is_floating_point() and b.element_size() < 2:
        # What torch compares bit for bit alone.
        same = a.dtype == b.dtype and torch.equal(a.float().nan_to_num(), b.float().nan_to_num())
        return "" if same else f"{a} instead of {b}"
    try:
        torch.testing.assert_close(
            a, b, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True, check_stride=strides and not b.is_sparse
        )
    except AssertionError as error:
        return " ".join(str(error).split())
    return ""


def outcome(op: Any, sample: Any, trained: bool) -> tuple[str, str]:
    """(verdict, why) of a sample."""
    model = Call(op.op)
    try:
        expected = step(model, sample, trained)
    except Exception as error:
        return "refused", _said(error)
    torch._dynamo.reset()
    traced: dict[str, Any] | None
    try:
        traced = step(
            torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False), sample, trained
        )
    except Exception:
        traced = None
    torch._dynamo.reset()
    prefix = "" if traced is not None else "untraced "
    on_error = "raise" if traced is not None else "rollback"
    try:
        fast = graphopt.optimize(Call(op.op), emit="eager", cache=False, on_error=on_error)
        for number in range(2):
            found = step(fast, sample, trained)
            values = "empty" not in op.name
            why = difference(found, expected, values=values)
            if why and traced is not None and not difference(found, traced, values=values):
                return "as torch", why
            if why:
                return f"{prefix}mismatch", f"call {number}: {why}"
    except Exception as error:
        return f"{prefix}crash", _said(error)
    if traced is not None and not fast.report.programs:
        return "crash", f"not captured: {'; '.join(fast.report.diagnostics)}"[:400]
    return f"{prefix}ok", ""


def _said(error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"


def row_of(op: Any, count: int) -> dict[str, Any]:
    """The verdicts of an operator's samples; ``failed`` says why of those that are not as they should be."""
    verdicts: Counter[str] = Counter()
    failed: dict[str, str] = {}
    for number, (sample, trained) in enumerate(samples(op, count)):
        verdict, why = outcome(op, sample, trained)
        verdicts[verdict] += 1
        if why:
            failed[str(number)] = f"{verdict}: {why}"
    return {"dtype": str(type_of(op)).removeprefix("torch."), "verdicts": dict(verdicts), "failed": failed}


def attempt(op: Any, count: int, out: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        row = row_of(op, count)
    except Exception as error:
        # The samples themselves cannot be made.
        row = {"no samples": _said(error)}
    out.write_text(json.dumps(row))


def tried(op: Any, count: int, limit: float) -> dict[str, Any]:
    """The row of one operator, made in a process of its own."""
    out = Path(tempfile.mkdtemp()) / "row.json"
    began = time.time()
    process = multiprocessing.get_context("fork").Process(target=attempt, args=(op, count, out))
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
    verdicts: Counter[str] = Counter()
    for row in rows.values():
        verdicts.update(row.get("verdicts", {}))
    failing = {
        word: sorted(name for name, row in rows.items() if word in row.get("verdicts", {}))
        for word in FAILURES
    }
    return {
        "operators": len(rows),
        "samples": dict(sorted(verdicts.items())),
        **{word.replace(" ", "_"): names for word, names in failing.items() if names},
        "stopped": sorted(name for name, row in rows.items() if "stopped" in row),
        "no_samples": sorted(name for name, row in rows.items() if "no samples" in row),
        "met": not any(failing.values()) and not any("stopped" in row for row in rows.values()),
    }


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--only", default="", metavar="PATTERN", help="operators whose name matches")
    options.add_argument("--samples", type=int, default=3, help="samples of each operator")
    options.add_argument("--seconds", type=float, default=3600, help="start no operator after that long")
    options.add_argument("--limit", type=float, default=90, help="seconds for one operator")
    options.add_argument("--again", action="store_true", help="run also what there is a result of")
    options.add_argument("--out", type=Path, default=RESULTS / "op_db.json")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    known = operators()
    # Processes are forked: what every first capture sets up is set up once.
    warmed = outcome(known["add"], *next(samples(known["add"], 1)))
    if warmed[0] != "ok":
        raise SystemExit(f"add: {warmed}")
    rows: dict[str, dict[str, Any]] = (
        json.loads(chosen.out.read_text())["rows"] if chosen.out.exists() else {}
    )
    began = time.time()
    for name, op in known.items():
        if not re.search(chosen.only, name) or (name in rows and not chosen.again):
            continue
        if time.time() - began > chosen.seconds:
            break
        rows[name] = tried(op, chosen.samples, chosen.limit)
        said = rows[name].get("stopped") or rows[name].get("verdicts")
        say(f"{name}: {said}, {rows[name]['seconds']} s")
        ordered = {kind: rows[kind] for kind in known if kind in rows}
        record = {
            "figure": "op_db", **environment(), "threads": 1, "tolerance": TOLERANCE,
            "samples_each": chosen.samples, "summary": summary(ordered), "rows": ordered,
        }  # fmt: skip
        write_atomically(chosen.out, json.dumps(record, indent=1) + "\n")
    print(json.dumps(summary(rows), indent=1))


if __name__ == "__main__":
    main()
