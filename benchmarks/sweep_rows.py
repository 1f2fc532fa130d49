"""Launches of the row kernels on one GPU: which is fastest, and how close to the copy bandwidth it is.

    python benchmarks/sweep_rows.py --out benchmarks/results/gpu_sweep_rows.json --minutes 8

For each cell (a kernel and a width, 128 MiB a tensor, bf16) first a grid of launches is timed, then what else
there is to choose beside the fastest of them. Times are medians, the GPU kept busy while the host gets a call
ready, so that host time does not count; percentages are of the copy bandwidth that the same run measures, on
the least bytes. Each launch's results are compared with those of the usual one. One that fails, or computes
something else, is a row that says so; what there is no time for is counted.

``--check`` runs every launch on tiny tensors without timing it, in Triton's interpreter where
``TRITON_INTERPRET=1`` is set.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import TENSOR, copy_bandwidth, known, milliseconds

from graphopt.atomic import write_atomically
from graphopt_kernels import cross_entropy, cross_entropy_rows, row_norm_launch, row_quantize
from graphopt_kernels.cross_entropy_launch import PartLaunch, gradient_of_rows, losses_of_rows, part_launch
from graphopt_kernels.cross_entropy_rows import RowLaunch, RowSettings
from graphopt_kernels.row_norm_launch import BackwardProblem, ForwardProblem, Launch
from graphopt_kernels.row_norm_reference import row_norm_reference

Results = tuple[torch.Tensor, ...]
Key = Any


@dataclass
class Cell:
    """``run(launch)`` of a kernel that moves ``moved`` bytes. ``grid`` is tried first, then ``beside(best)``.
    ``others`` are calls to compare with, by name."""

    name: str
    width: int
    moved: int
    usual: Key
    run: Callable[[Key], Results]
    grid: Iterable[Key]
    beside: Callable[[Key], Iterable[Key]]
    others: dict[str, Callable[[], Any]]


def text(launch: Key) -> str:
    if hasattr(launch, "_asdict"):
        fields = launch._asdict().items()
        return " ".join(f"{name}={value}" for name, value in fields)
    return " ".join(f"{name}={value}" for name, value in launch.items())


# --- cross entropy -----------------------------------------------------------------------------


def cut(rows: int, columns: int, block: int, warps: int) -> PartLaunch:
    """Rows of 16-bit logits cut into parts of ``block`` columns, finished as ``part_launch`` would."""
    parts = -(-columns // block)
    lanes = 1 << (parts - 1).bit_length()
    together = 1 << (rows - 1).bit_length()
    alone = together * lanes <= 2**14
    together = together if alone else max(1, 2**11 // lanes)
    finishing = min(16, max(1, together * lanes // 512))
    return PartLaunch(block, warps, parts, lanes, together, finishing, alone)


def parts_of(rows: int, columns: int) -> Iterator[PartLaunch]:
    """Parts of 4 to 64 KiB, 32 to 256 bytes a thread."""
    widest = 1 << (columns - 1).bit_length()
    for block, per_thread in itertools.product((2**11, 2**12, 2**13, 2**14, 2**15), (32, 64, 128, 256)):
        warps = 2 * block // (32 * per_thread)
        if block <= widest and 1 <= warps <= 32:
            yield cut(rows, columns, block, warps)


def forward_cell(size: int, columns: int, device: str) -> Cell:
    logits, target = logits_of(size, columns, device)
    rows, settings = logits.shape[0], RowSettings()
    losses, sums = (torch.empty(rows, device=device) for _ in range(2))

    def run(launch: Key) -> Results:
        if isinstance(launch, RowLaunch):
            kernel = cross_entropy_rows._kernel()
            given = (logits, target, settings, sums, losses, None)
            cross_entropy_rows.launch_rows(kernel, *given, launch=launch)
            return losses.mean(), sums
        kernels = cross_entropy._kernels()
        return losses_of_rows(kernels, logits, target, settings, "mean", torch.float32, launch=launch)

    def grid() -> Iterator[Key]:
        for launch in parts_of(rows, columns):
            yield launch
            yield launch._replace(joined=True)
        widest = 1 << (columns - 1).bit_length()
        for block, warps in ((2**12, 8), (2**13, 8), (2**13, 16), (2**14, 16), (2**14, 32), (2**15, 32)):
            if block <= widest:
                yield RowLaunch(block, warps)

    def beside(best: Key) -> Iterator[Key]:
        if isinstance(best, RowLaunch):
            return
        yield best._replace(streams=True)
        if not best.joined:
            for together, warps in itertools.product((1, 4, 16, 64), (1, 4, 8)):
                if together * best.lanes <= 2**14:
                    yield best._replace(rows=together, finish_warps=warps, alone=together >= rows)

    usual = part_launch(rows, columns, 2)
    moved = logits.numel() * 2
    return Cell("cross_entropy forward", columns, moved, usual, run, grid(), beside, {})


def backward_cell(size: int, columns: int, device: str) -> Cell:
    logits, target = logits_of(size, columns, device)
    rows, settings = logits.shape[0], RowSettings()
    sums = logits.float().logsumexp(1)
    one = torch.ones((), device=device)
    scale = (one / rows).expand(rows)
    numbers = ("mean", -100, 0.0, 1.0, 0.0)

    def run(launch: Key) -> Results:
        kernels = cross_entropy._kernels()
        return (gradient_of_rows(kernels, logits, target, sums, scale, None, settings, launch=launch),)

    def beside(best: Key) -> Iterator[Key]:
        yield best._replace(streams=True)

    others: dict[str, Callable[[], Any]] = {}
    if logits.is_cuda:
        given = (one, logits, target, sums, *numbers)
        others["operator"] = lambda: torch.ops.graphopt.cross_entropy_backward(*given)
        written = torch.compile(cross_entropy.written_gradient)
        others["written out, by Inductor"] = lambda: written(*given)
    usual = part_launch(rows, columns, 2)
    moved = 2 * logits.numel() * 2
    return Cell("cross_entropy backward", columns, moved, usual, run, parts_of(rows, columns), beside, others)


def logits_of(size: int, columns: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    rows = max(2, size // (2 * columns))
    logits = torch.randn(rows, columns, device=device).to(row_dtype(device))
    return logits, torch.randint(0, columns, (rows,), device=device)


# --- norms -------------------------------------------------------------------------------------


def row_dtype(device: str) -> torch.dtype:
    """The interpreter rounds bfloat16 another way."""
    return torch.bfloat16 if device == "cuda" else torch.float16


def rows_and_vectors(size: int, width: int, device: str, count: int) -> tuple[list[torch.Tensor], ...]:
    dtype = row_dtype(device)
    rows = max(2, size // (2 * width))
    return (
        [torch.randn(rows, width, device=device).to(dtype) for _ in range(count)],
        [torch.randn(width, device=device).to(dtype) for _ in range(2)],
    )


def processors(device: str) -> int | None:
    return None if device == "cuda" else 2


def norm_backward_cell(size: int, width: int, device: str, centered: bool) -> Cell:
    (grad, x), (weight, bias) = rows_and_vectors(size, width, device, 2)
    shift = bias if centered else None
    _, mean, rstd = row_norm_reference(x, weight, shift, 1e-6, centered, 0.0, False, x.dtype)
    problem = BackwardProblem(x.shape[0], width, x.dtype, weight.dtype, False, centered, True, True, centered)
    usual = row_norm_launch.backward_launch(problem)

    def run(launch: Key) -> Results:
        return row_norm_launch.backward_rows(
            row_norm_launch.norm_kernels(), grad, x, weight, shift, mean, rstd, None, centered, 0.0,
            [True, True, centered], launch=launch, processors=processors(device),
        )  # fmt: skip

    def fits(launch: Launch) -> bool:
        return row_norm_launch.check_launch(problem, launch) is None

    def grid() -> Iterator[Key]:
        for warps, programs in itertools.product((4, 8, 16, 32), (1, 2, 3, 4)):
            elements = launch_elements(usual, warps)
            if 8 <= elements <= 128 and warps * programs <= 64:
                launch = usual._replace(warps=warps, programs=programs)
                if fits(launch):
                    yield launch

    def beside(best: Key) -> Iterator[Key]:
        for (ahead, stages), held in itertools.product(
            ((True, 1), (False, 1), (False, 2), (False, 3), (False, 4)), (True, False)
        ):
            launch = best._replace(ahead=ahead, stages=stages, held=held)
            if fits(launch):
                yield launch

    name = "layer_norm backward" if centered else "rms_norm backward"
    return Cell(name, width, 3 * x.numel() * 2, usual, run, grid(), beside, {})


def launch_elements(launch: Launch, warps: int) -> int:
    """Elements of a group of rows for each thread."""
    return launch.block * launch.rows // (32 * warps)


def add_norm_cell(size: int, width: int, device: str) -> Cell:
    (x, residual), (weight, _) = rows_and_vectors(size, width, device, 2)
    problem = ForwardProblem(x.shape[0], width, x.dtype, x.dtype, weight.dtype, None, True, False, True)
    usual = row_norm_launch.forward_launch(problem)

    def run(launch: Key) -> Results:
        results = row_norm_launch.forward_rows(
            row_norm_launch.norm_kernels(), x, residual, weight, None, 1e-6, False, 0.0, True, x.dtype,
            launch=launch, processors=processors(device),
        )  # fmt: skip
        return results[0], results[1]

    def fits(launch: Launch) -> bool:
        return row_norm_launch.check_launch(problem, launch) is None

    def grid() -> Iterator[Key]:
        for warps, programs in itertools.product((4, 8, 16, 32), (0, 1, 2, 4)):
            launch = usual._replace(warps=warps, programs=programs)
            if fits(launch) and warps * max(programs, 1) <= 64:
                yield launch

    def beside(best: Key) -> Iterator[Key]:
        for ahead, held in itertools.product((True, False), (True, False)):
            yield best._replace(ahead=ahead, held=held)

    return Cell("add_rms_norm forward", width, 4 * x.numel() * 2, usual, run, grid(), beside, {})


def quantize_cell(size: int, width: int, device: str, codes: torch.dtype) -> Cell:
    (x,), (weight, bias) = rows_and_vectors(size, width, device, 1)
    centered = codes is torch.int8
    norm = (weight, bias if centered else None, 1e-6, centered, 0.0, not centered, x.dtype)
    limit, least = (127.0, 1e-8) if centered else (448.0, 1e-12)
    block, rows = row_norm_launch.tile(width)
    chosen = row_quantize.warps_and_registers(block, not centered)
    usual = {"rows": rows, **chosen}

    def run(launch: Key) -> Results:
        started = {name: value for name, value in launch.items() if name != "rows"}
        return row_quantize.launch_rows(
            row_quantize._kernels(), x, norm, codes, limit, least, rows=launch["rows"], started=started
        )

    def grid() -> Iterator[Key]:
        for warps, count in itertools.product((2, 4, 8, 16, 32), (1, 2)):
            if 8 <= block * count // (32 * warps) <= 128:
                yield {"rows": count, "num_warps": warps}

    def beside(best: Key) -> Iterator[Key]:
        for registers in (64, 80, 96, 128, 168):
            if 65536 // registers >= 32 * best["num_warps"]:
                yield best | {"maxnreg": registers}

    name = "layer_norm int8" if centered else "rms_norm fp8"
    return Cell(name, width, x.numel() * 3, usual, run, grid(), beside, {})


# --- sweeping ----------------------------------------------------------------------------------


def cells(size: int, device: str, widths: dict[str, tuple[int, ...]]) -> Iterator[Callable[[], Cell]]:
    """What makes each cell: tensors of one at a time are alive."""
    for columns in widths["classes"]:
        yield lambda columns=columns: forward_cell(size, columns, device)
        yield lambda columns=columns: backward_cell(size, columns, device)
    for width in widths["layer_norm"]:
        yield lambda width=width: norm_backward_cell(size, width, device, True)
    for width in widths["longest"]:
        yield lambda width=width: norm_backward_cell(size, width, device, False)
        yield lambda width=width: add_norm_cell(size, width, device)
    codes = (torch.float8_e4m3fn, torch.int8) if device == "cuda" else (torch.int8,)
    for width, code in itertools.product(widths["quantize"], codes):
        yield lambda width=width, code=code: quantize_cell(size, width, device, code)


def differs(found: Results, right: Results) -> str:
    """Where results are not those of the usual launch; empty where they are."""
    for number, (one, other) in enumerate(zip(found, right, strict=True)):
        if not one.numel() and not other.numel():
            continue
        a, b = one.float(), other.float()
        distance = float((a - b).norm() / b.norm().clamp(min=1e-20))
        if not distance <= 5e-3:
            return f"result {number} is {distance:.2g} away"
    return ""


def tried(
    cell: Cell, launch: Key, right: Results, timing: Callable[[Callable[[], Any]], float] | None
) -> Any:
    """Milliseconds of a launch (0 untimed), or a text that says why there are none."""
    try:
        wrong = differs(cell.run(launch), right)
        if wrong:
            return wrong
        return 0.0 if timing is None else timing(lambda: cell.run(launch))
    except Exception as error:  # one launch of many
        return f"{type(error).__name__}: {error}".replace("\n", " ")[:160]


def swept(
    cell: Cell, timing: Callable[[Callable[[], Any]], float] | None, bandwidth: float, until: float
) -> dict[str, Any]:
    """The launches of a cell, best first, until the clock shows ``until``."""

    def share(milliseconds: float) -> float:
        return round(100 * cell.moved / milliseconds / 1e6 / bandwidth, 1) if milliseconds else 0.0

    row: dict[str, Any] = {"cell": cell.name, "width": cell.width}
    right = tuple(t.clone() for t in cell.run(cell.usual))
    taken: dict[str, tuple[float, Key]] = {}
    failed: dict[str, str] = {}
    left_out = 0

    def sweep(launches: Iterable[Key]) -> None:
        nonlocal left_out
        for launch in launches:
            if text(launch) in taken or text(launch) in failed:
                continue
            if time.monotonic() > until:
                left_out += 1
                continue
            found = tried(cell, launch, right, timing)
            if isinstance(found, str):
                failed[text(launch)] = found
            else:
                taken[text(launch)] = (found, launch)

    sweep([cell.usual])
    sweep(cell.grid)
    if taken:
        sweep(cell.beside(min(taken.values(), key=lambda item: item[0])[1]))
    ranked = sorted((found, name) for name, (found, _) in taken.items())
    usual = taken.get(text(cell.usual))
    row["usual"] = {"launch": text(cell.usual), "percent": share(usual[0]) if usual else None}
    row["best"] = [
        {"launch": name, "percent": share(found), "ms": round(found, 5)} for found, name in ranked[:5]
    ]
    for name, call in cell.others.items():
        try:
            row[name] = share(timing(call)) if timing is not None else None
        except Exception as error:  # as above
            row[name] = f"{type(error).__name__}: {error}".replace("\n", " ")[:160]
    row["tried"], row["failed"], row["no_time_for"] = len(taken), failed, left_out
    return row


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_sweep_rows.json"))
    options.add_argument("--minutes", type=float, default=8.0)
    options.add_argument("--cells", default="", help="only those whose name has this in it")
    options.add_argument("--check", action="store_true")
    given = options.parse_args()
    if given.check:
        check(given.cells)
        return
    if not torch.cuda.is_available():
        print("sweep_rows needs a CUDA device; --check does not")
        return
    begun = time.monotonic()
    ends = begun + 60 * given.minutes
    copy = copy_bandwidth()
    print(f"copy {copy:.0f} GB/s", file=sys.stderr)
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "versions": {name: known(name) for name in ("torch", "triton")},
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python benchmarks/sweep_rows.py",
        "copy_gb_per_s": round(copy),
        "rows": [],
    }
    widths = {
        "classes": (32000, 128256), "layer_norm": (4096, 8192, 14336), "longest": (14336,),
        "quantize": (4096, 8192, 14336),
    }  # fmt: skip
    makers = list(cells(TENSOR, "cuda", widths))
    for number, make in enumerate(makers):
        gc.collect()
        torch.cuda.empty_cache()
        torch._dynamo.reset()
        # What one cell leaves of its share is there for those behind it.
        now = time.monotonic()
        until = now + (ends - now) / (len(makers) - number)
        try:
            cell = make()
            if given.cells not in cell.name:
                continue
            row = swept(cell, lambda run: milliseconds(run, busy=2_000_000), copy, until)
        except Exception as error:  # one cell of many
            row = {"error": f"{type(error).__name__}: {error}".replace("\n", " ")[:300]}
        row["seconds"] = round(time.monotonic() - now, 1)
        document["rows"].append(row)
        write_atomically(given.out, json.dumps(document, indent=1) + "\n")
        print(json.dumps(row | {"failed": len(row.get("failed", ()))}), flush=True)


def check(wanted: str) -> None:
    """Every launch of tiny tensors: what fails says so, and the program fails with it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    widths = {"classes": (37, 300), "layer_norm": (48,), "longest": (96,), "quantize": (40,)}
    failed = 0
    for make in cells(1200, device, widths):
        cell = make()
        if wanted in cell.name:
            row = swept(cell, None, 1.0, float("inf"))
            failed += len(row["failed"])
            print(f"{cell.name} {cell.width}: {row['tried']} launches, failed: {row['failed']}")
    sys.exit(f"{failed} launches failed" if failed else 0)


if __name__ == "__main__":
    main()
