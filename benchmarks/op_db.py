"""Does ``optimize`` compute what PyTorch does, on PyTorch's own samples of its own operators?

    python benchmarks/op_db.py [--only PATTERN] [--samples N] [--seconds N] [--limit N] [--again]

Each operator of ``op_db`` (what PyTorch's tests run over) is a model of one call, on the CPU, in float32
or, where the operator has no float32, in its first type. All its samples, or its first ``--samples``, run op
by op under the default pipeline, whatever a pass raises counts. Outputs are compared with eager's, and
gradients of what can be differentiated, twice: the second call runs what the first captured. Each operator
has a process of its own, one at a time, stopped after ``--limit`` seconds. Results are stored after each, and
a later run goes on from there, at the sample after the last one that has a verdict (``--again`` runs what
``--only`` matches from the first one on). A row says how many samples there are (``of``), the summary how
many have no verdict yet (``left``): ``met`` is for whole runs alone.

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
from dataclasses import dataclass, field
from itertools import count, islice
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
    from torch.testing._internal import common_methods_invocations as torch_tests

    # Operators that draw set a seed in each call there, which dynamo cannot trace. ``step`` sets it before.
    torch_tests.wrapper_set_seed = _as_it_is
    return {
        op.name + (f":{op.variant_test_name}" if op.variant_test_name else ""): op for op in torch_tests.op_db
    }


def _as_it_is(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def type_of(op: Any) -> torch.dtype:
    known = op.supported_dtypes("cpu")
    return next((dtype for dtype in TYPES if dtype in known), min(known, key=str, default=torch.float32))


def samples(op: Any) -> Iterator[tuple[Any, bool]]:
    """(sample, whether it is differentiated) of an operator, the same in every run and wherever it begins."""
    dtype = type_of(op)
    trained = op.supports_autograd and dtype in op.supported_backward_dtypes("cpu")
    _seed(0)
    made = iter(op.sample_inputs("cpu", dtype, requires_grad=trained))
    for number in count():
        # What runs between two samples draws as well.
        _seed(number)
        try:
            sample = next(made)
        except StopIteration:
            return
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
            copies[id(tensor)] = _copied(tensor).requires_grad_(tensor.requires_grad)
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


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that lies in its memory as the tensor does: a clone would be a whole tensor of its own."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        return tensor.detach().clone()
    memory = tensor.untyped_storage().clone()
    place = tensor.storage_offset(), tensor.shape, tensor.stride()
    return torch.empty(0, dtype=tensor.dtype).set_(memory, *place)


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


@dataclass
class Optimized:
    """What ``optimize`` made of a sample: ``found`` in the last call, and ``why`` that is not as eager's."""

    why: str = ""
    crashed: bool = False
    found: dict[str, Any] = field(default_factory=dict)
    whole: bool = False
    """Whether all of it runs as one captured graph."""
    programs: int = 0
    diagnostics: tuple[str, ...] = ()


def optimized(op: Any, sample: Any, trained: bool, expected: dict[str, Any], on_error: str) -> Optimized:
    torch._dynamo.reset()
    made = Optimized()
    try:
        fast = graphopt.optimize(Call(op.op), emit="eager", cache=False, on_error=on_error)
        for number in range(2):
            made.found = step(fast, sample, trained)
            why = difference(made.found, expected, values=_has_values(op))
            if why:
                made.why = f"call {number}: {why}"
                break
        made.programs, made.diagnostics = len(fast.report.programs), fast.report.diagnostics
        made.whole = bool(made.programs) and fast._driver.session.whole
    except Exception as error:
        made.why, made.crashed = _said(error), True
    return made


def _has_values(op: Any) -> bool:
    return "empty" not in op.name


def outcome(op: Any, sample: Any, trained: bool) -> tuple[str, str]:
    """(verdict, why) of a sample."""
    try:
        expected = step(Call(op.op), sample, trained)
    except Exception as error:
        return "refused", _said(error)
    made = optimized(op, sample, trained, expected, "raise")
    if made.whole and not made.why:
        # Captured in one graph, which AOTAutograd traced.
        return "ok", ""
    torch._dynamo.reset()
    try:
        traced = step(
            torch.compile(Call(op.op), backend="aot_eager", fullgraph=True, dynamic=False), sample, trained
        )
    except Exception:
        if made.crashed:
            made = optimized(op, sample, trained, expected, "rollback")
        kind = "crash" if made.crashed else "mismatch" if made.why else "ok"
        return f"untraced {kind}", made.why
    if made.crashed:
        return "crash", made.why
    if made.why:
        same = not difference(made.found, traced, values=_has_values(op))
        return "as torch" if same else "mismatch", made.why
    if not made.programs:
        return "crash", f"not captured: {'; '.join(made.diagnostics)}"[:400]
    return "ok", ""


def _said(error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"


def done(row: dict[str, Any]) -> int:
    """How many samples have a verdict."""
    return sum(row["verdicts"].values())


def attempt(op: Any, row: dict[str, Any], most: int | None, out: Path) -> None:
    """Add the verdicts of the samples up to ``most`` that ``row`` lacks, and write it to ``out`` after each.

    ``failed`` says why of those that are not as they should be.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    verdicts: Counter[str] = Counter(row["verdicts"])
    try:
        row["of"] = sum(1 for _ in samples(op))
        for number, (sample, trained) in islice(enumerate(samples(op)), done(row), most):
            verdict, why = outcome(op, sample, trained)
            verdicts[verdict] += 1
            if why:
                row["failed"][str(number)] = f"{verdict}: {why}"
            row["verdicts"] = dict(sorted(verdicts.items()))
            write_atomically(out, json.dumps(row))
    except Exception as error:
        # The samples themselves cannot be made.
        row["no samples"] = _said(error)
    write_atomically(out, json.dumps(row))


def tried(op: Any, row: dict[str, Any], most: int | None, limit: float) -> dict[str, Any]:
    """``row`` with what it lacks up to ``most`` samples, made in a process of its own."""
    out = Path(tempfile.mkdtemp()) / "row.json"
    began = time.time()
    process = multiprocessing.get_context("fork").Process(target=attempt, args=(op, row, most, out))
    process.start()
    process.join(limit)
    over = process.is_alive()
    if over:
        process.kill()
        process.join()
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else row
    shutil.rmtree(out.parent)
    if over:
        found["stopped"] = f"after {limit:g} s, at sample {done(found)}"
    elif process.exitcode:
        code = process.exitcode
        why = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        found["stopped"] = f"{why}, at sample {done(found)}"
    return {**found, "seconds": round(row["seconds"] + time.time() - began, 1)}


def summary(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    verdicts: Counter[str] = Counter()
    for row in rows.values():
        verdicts.update(row["verdicts"])
    left = sum(row["of"] - done(row) for row in rows.values())
    stopped = sorted(name for name, row in rows.items() if "stopped" in row)
    failing = {
        word: sorted(name for name, row in rows.items() if word in row["verdicts"])
        for word in FAILURES
    }
    return {
        "operators": len(rows),
        "samples": dict(sorted(verdicts.items())),
        "left": left,
        **{word.replace(" ", "_"): names for word, names in failing.items() if names},
        "stopped": stopped,
        "no_samples": sorted(name for name, row in rows.items() if "no samples" in row),
        "met": not any(failing.values()) and not stopped and not left,
    }


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--only", default="", metavar="PATTERN", help="operators whose name matches")
    options.add_argument("--samples", type=int, help="no more samples of each operator than that")
    options.add_argument("--seconds", type=float, default=3600, help="start no operator after that long")
    options.add_argument("--limit", type=float, default=90, help="seconds for one operator")
    options.add_argument("--again", action="store_true", help="run from the first sample on")
    options.add_argument("--out", type=Path, default=RESULTS / "op_db.json")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    known = operators()
    # Processes are forked: what every first capture sets up is set up once.
    warmed = outcome(known["add"], *next(samples(known["add"])))
    if warmed[0] != "ok":
        raise SystemExit(f"add: {warmed}")
    rows: dict[str, dict[str, Any]] = (
        json.loads(chosen.out.read_text())["rows"] if chosen.out.exists() else {}
    )
    began = time.time()
    for name, op in known.items():
        if not re.search(chosen.only, name):
            continue
        row = {} if chosen.again else rows.get(name, {})
        settled = row and "stopped" not in row
        if settled and ("no samples" in row or done(row) >= min(row["of"], chosen.samples or row["of"])):
            continue
        if time.time() - began > chosen.seconds:
            break
        kept = {key: value for key, value in row.items() if key != "stopped"} or {
            "dtype": str(type_of(op)).removeprefix("torch."),
            "of": 0, "verdicts": {}, "failed": {}, "seconds": 0.0,
        }  # fmt: skip
        rows[name] = tried(op, kept, chosen.samples, chosen.limit)
        said = rows[name].get("stopped") or rows[name]["verdicts"]
        say(f"{name}: {said}, {rows[name]['seconds']} s")
        ordered = {kind: rows[kind] for kind in known if kind in rows}
        record = {
            "figure": "op_db", **environment(), "threads": 1, "tolerance": TOLERANCE,
            "summary": summary(ordered), "rows": ordered,
        }  # fmt: skip
        write_atomically(chosen.out, json.dumps(record, indent=1) + "\n")
    print(json.dumps(summary(rows), indent=1))


if __name__ == "__main__":
    main()
