"""Products of matrices with what is around them on one GPU: emitted kernels beside cuBLAS and torch.compile.

    python benchmarks/gpu_products.py --out benchmarks/results/gpu_products.json

For each case, in microseconds, medians after warm-up, the GPU kept busy while the host gets a call ready and
the cache flushed before each: ``emitted`` (one kernel), ``eager`` (cuBLAS, and a kernel for each operator
around it), ``compiled`` (torch.compile), ``compiled_max`` (the same with ``--max-autotune``), and for the
product by itself ``library`` and ``emitted_product``. ``share`` is the rate of the latter over that of the
former: what ``emitted_matmul_share`` of a device stands for. ``best`` are the fastest of the tiles that
``--tiles`` tries. ``error`` is the distance from float64 over that of eager, on the first 64 rows where there
are as many.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt.atomic import write_atomically
from graphopt_kernels.emit.kernel_file import Kernel, kernel_of
from graphopt_kernels.emit.machine_code import import_kernel
from graphopt_kernels.emit.product_build import BuiltProduct
from graphopt_kernels.emit.product_choice import prices_for
from graphopt_kernels.emit.product_loops import ProductLoops, Tiling, tilings_for

BUSY_CYCLES = 2_000_000
"""About a millisecond: longer than the host takes for a call."""

DEVICE = "cuda"

FLUSHED = 512 * 2**20


@dataclass(frozen=True)
class Case:
    """``function(x, w, *rest)`` with its product ``x @ w.t()``; ``rest``: sizes of the others."""

    name: str
    rows: int
    inner: int
    columns: int
    function: Callable[..., Any]
    rest: tuple[tuple[int, ...], ...] = ()
    weight: torch.dtype = torch.bfloat16

    def inputs(self) -> list[torch.Tensor]:
        torch.manual_seed(0)
        device, dtype = DEVICE, torch.bfloat16
        x = torch.randn(self.rows, self.inner, device=device).to(dtype)
        w = torch.randn(self.columns, self.inner, device=device) / self.inner**0.5
        weight = (w * 40 * self.inner**0.5).clamp(-127, 127) if self.weight == torch.int8 else w
        return [
            x,
            weight.to(self.weight),
            *(torch.randn(size, device=device).to(dtype) for size in self.rest),
        ]


def plain(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w.t()


def gated(x: torch.Tensor, w: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * (x @ w.t())


def added(x: torch.Tensor, w: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return x @ w.t() + residual


def activated(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.gelu(F.linear(x, w, bias), approximate="tanh")


def activated_and_saved(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
    before = F.linear(x, w, bias)
    return F.gelu(before, approximate="tanh"), before


def gradient(g: torch.Tensor, w: torch.Tensor, saved: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.gelu_backward(g @ w.t(), saved, approximate="tanh")


def dequantized(x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x @ (w.to(x.dtype) * scale).t()


def cases() -> list[Case]:
    found = []
    for m in (1, 4, 16, 64, 1024, 8192):
        found += [
            Case("gated", m, 4096, 14336, gated, ((m, 14336),)),
            Case("added", m, 14336, 4096, added, ((m, 4096),)),
            Case("added", m, 4096, 4096, added, ((m, 4096),)),
            Case("dequantized", m, 4096, 14336, dequantized, ((14336, 1),), torch.int8),
        ]
    for m in (1024, 8192):
        found += [
            Case("activated", m, 1024, 4096, activated, ((4096,),)),
            Case("activated and saved", m, 1024, 4096, activated_and_saved, ((4096,),)),
            Case("gradient", m, 1024, 4096, gradient, ((m, 4096),)),
        ]
    return found


def emitted(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor], tiling: Tiling | None = None
) -> Any:
    """(kernel, its inputs) of all operators of ``function``."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in inputs]
        graph = make_fx(function, tracing_mode="real")(*fakes).graph
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    (output,) = [node for node in graph.nodes if node.op == "output"]
    given = output.args[0]
    outputs: list[Any] = list(given) if isinstance(given, (tuple, list)) else [given]
    kernel = kernel_of(nodes, outputs, tiling)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    return kernel, [inputs[placeholders.index(node)] for node in kernel.inputs]


def microseconds(run: Callable[[], Any], flushed: torch.Tensor, times: int = 21) -> float:
    for _ in range(3):
        run()
    taken = []
    for _ in range(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(BUSY_CYCLES)
        flushed.zero_()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end) * 1e3)
    return round(statistics.median(taken), 2)


def measured(case: Case, folder: Path, flushed: torch.Tensor, tiles: bool, autotune: bool) -> dict[str, Any]:
    inputs = case.inputs()
    kernel, taken = emitted(case.function, inputs)
    assert kernel.file.tiling is not None
    launch = import_kernel(kernel.file, folder).launch
    row: dict[str, Any] = {
        "case": case.name,
        "rows": case.rows,
        "inner": case.inner,
        "columns": case.columns,
        "tiling": asdict(kernel.file.tiling),
        "predicted": round(prices_for().emitted(kernel.file) * 1e6, 2),
        "error": error(case, launch(*taken)[0], inputs),
        "emitted": microseconds(lambda: launch(*taken), flushed),
        "eager": microseconds(lambda: case.function(*inputs), flushed),
    }
    torch._dynamo.reset()
    compiled = torch.compile(case.function)
    row["compiled"] = microseconds(lambda: compiled(*inputs), flushed)
    if autotune:
        torch._dynamo.reset()
        tuned = torch.compile(case.function, mode="max-autotune-no-cudagraphs")
        row["compiled_max"] = microseconds(lambda: tuned(*inputs), flushed)
    if case.weight == torch.bfloat16:
        alone, operands = emitted(plain, inputs[:2])
        product = import_kernel(alone.file, folder).launch
        row["library"] = microseconds(lambda: plain(*inputs[:2]), flushed)
        row["emitted_product"] = microseconds(lambda: product(*operands), flushed)
        row["share"] = round(row["library"] / row["emitted_product"], 3)
    if tiles:
        row["best"] = best(case, kernel, inputs, folder, flushed)
    return row


def best(
    case: Case, kernel: Kernel, inputs: Sequence[torch.Tensor], folder: Path, flushed: torch.Tensor
) -> dict[str, Any]:
    """The fastest of other tiles, with its time."""
    built, loops = kernel.file.built, kernel.file.text.loops
    assert isinstance(built, BuiltProduct) and isinstance(loops, ProductLoops)
    found: dict[str, Any] = {}
    for tiling in tilings_for(built, loops):
        try:
            made, taken = emitted(case.function, inputs, tiling)
            launch = import_kernel(made.file, folder).launch
            time = microseconds(lambda launch=launch, taken=taken: launch(*taken), flushed, 11)  # type: ignore[misc]
        except Exception as failed:
            # Tiles that do not fit into shared memory: triton has a class of its own for it.
            if type(failed).__name__ != "OutOfResources":
                raise
            continue
        if not found or time < found["microseconds"]:
            found = {**asdict(tiling), "microseconds": time}
    return found


def error(case: Case, made: torch.Tensor, inputs: Sequence[torch.Tensor]) -> float:
    """How far from float64 the kernel is over how far separate operators are."""
    eager = case.function(*inputs)
    eager = eager[0] if isinstance(eager, tuple) else eager
    count = min(64, case.rows)
    wide = [x.double() for x in inputs]
    by_row = [number for number, x in enumerate(wide) if number != 1 and tuple(x.shape)[:-1] == (case.rows,)]
    wide = [x[:count] if number in by_row else x for number, x in enumerate(wide)]
    right = case.function(*wide)
    right = right[0] if isinstance(right, tuple) else right
    ours, theirs = ((value[:count].double() - right).norm() for value in (made, eager))
    return round(float(ours / theirs), 4)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_products.json"))
    options.add_argument("--rows", default="", help="cases of these numbers of rows alone, by commas")
    options.add_argument("--tiles", action="store_true", help="try other tiles too")
    options.add_argument("--max-autotune", action="store_true", help="torch.compile with its templates too")
    given = options.parse_args()
    if not torch.cuda.is_available():
        print("gpu_products needs a CUDA device")
        return
    wanted = {int(rows) for rows in given.rows.split(",") if rows}
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "triton")},
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python benchmarks/gpu_products.py",
        "rows": [],
    }
    flushed = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
    with tempfile.TemporaryDirectory() as folder:
        for case in cases():
            if wanted and case.rows not in wanted:
                continue
            row = measured(case, Path(folder), flushed, given.tiles, given.max_autotune)
            print(json.dumps(row), flush=True)
            document["rows"].append(row)
            write_atomically(given.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
