"""Memory-bound operators and linear + cross entropy on one GPU: graphopt beside torch.compile and Liger.

    python benchmarks/gpu_kernels.py --out benchmarks/results/gpu_kernels.json

Every operator is a module of its own, 128 MiB a tensor, bf16, given to ``graphopt.optimize`` (code by
Inductor), to ``torch.compile`` and, where it has one, Liger's kernel. ``forward`` is a call without
gradients, ``backward`` the gradients of inputs and parameters for a given gradient. Percentages are of the
copy bandwidth that the same run measures, on the least bytes: each tensor that must be read or written, once.
The GPU is kept busy while the host gets a call ready, so that host time does not count; medians after
warm-up.

Linear + cross entropy: 8,192 x 4,096 x 128,256, forward and backward; ``extra_mib`` is the peak above input
and weight, both gradients (1,067 MiB) included. ``error`` is the distance of the weight's gradient from
float64 over that of whole bf16 logits, on 8,192 x 512 x 4,096.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F

import graphopt
from graphopt.atomic import write_atomically

MIB = 2**20
TENSOR = 128 * MIB
BUSY_CYCLES = 2_000_000
"""About a millisecond: longer than the host takes for a call."""

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Case:
    """``function(*inputs)`` of the ``inputs`` first and the parameters behind them. ``forward`` and
    ``backward`` are the tensors of 128 MiB that each must move."""

    name: str
    width: int
    function: Callable[..., Any]
    inputs: Tensors
    parameters: Tensors
    forward: float
    backward: float
    liger: Callable[..., Any] | None = None


class Module(torch.nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.function = case.function
        self.names = [f"held{number}" for number in range(len(case.parameters))]
        for name, parameter in zip(self.names, case.parameters, strict=True):
            self.register_parameter(name, torch.nn.Parameter(parameter.clone()))

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs, *(getattr(self, name) for name in self.names))


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Tensors:
    total = x + residual
    return rms_norm(total, weight), total


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.gelu(gate, approximate="tanh") * up


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def softmax(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x, -1)


def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), target)


def cases(widths: Sequence[int]) -> list[Callable[[], Case]]:
    """What makes each case: tensors of one at a time are alive."""
    liger = liger_functions()
    made: list[Callable[[], Case]] = []

    def rows(width: int, count: int) -> Tensors:
        shape = (TENSOR // (2 * width), width)
        return tuple(torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(count))

    def vectors(width: int, count: int) -> Tensors:
        return tuple(torch.randn(width, device="cuda", dtype=torch.bfloat16) for _ in range(count))

    def add(
        name: str, width: int, function: Any, inputs: int, parameters: int, moved: tuple[float, float]
    ) -> None:
        made.append(
            lambda: Case(
                name,
                width,
                function,
                rows(width, inputs),
                vectors(width, parameters),
                *moved,
                liger.get(name),
            )
        )

    for width in widths:
        add("rms_norm", width, rms_norm, 1, 1, (2, 3))
        add("add_rms_norm", width, add_rms_norm, 2, 1, (4, 4))
        add("layer_norm", width, layer_norm, 1, 2, (2, 3))
    for width in (widths[1], widths[-1]):
        add("swiglu", width, swiglu, 2, 0, (3, 5))
        add("geglu", width, geglu, 2, 0, (3, 5))
        add("softmax", width, softmax, 1, 0, (2, 3))
    made.append(rope_case)
    made.append(lambda: cross_entropy_case(liger.get("cross_entropy")))
    return made


def rope_case() -> Case:
    batch, heads, length, width = 4, 32, 4096, 128
    x = torch.randn(batch, length, heads, width, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    angles = torch.randn(1, 1, length, width, device="cuda", dtype=torch.bfloat16)
    return Case("rope", width, rope, (x, angles.cos(), angles.sin()), (), 2, 2)


def cross_entropy_case(liger: Callable[..., Any] | None) -> Case:
    columns = 128256
    logits = torch.randn(TENSOR // (2 * columns), columns, device="cuda", dtype=torch.bfloat16)
    target = torch.randint(0, columns, (logits.shape[0],), device="cuda")
    return Case("cross_entropy", columns, cross_entropy, (logits, target), (), 1, 2, liger)


def liger_functions() -> dict[str, Callable[..., Any]]:
    """Liger's kernels by the names of cases; none where it is not installed."""
    try:
        from liger_kernel.ops.geglu import LigerGELUMulFunction
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.softmax import LigerSoftmaxFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
        from liger_kernel.transformers.functional import liger_cross_entropy
    except ImportError:
        return {}
    found: dict[str, Callable[..., Any]] = {
        "rms_norm": lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False),
        "layer_norm": lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, 1e-6),
        "swiglu": LigerSiLUMulFunction.apply,
        "geglu": LigerGELUMulFunction.apply,
        "softmax": LigerSoftmaxFunction.apply,
        "cross_entropy": liger_cross_entropy,
    }
    try:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    except ImportError:
        return found
    found["add_rms_norm"] = lambda x, r, w: LigerFusedAddRMSNormFunction.apply(
        x, r, w, 1e-6, 0.0, "llama", False
    )
    return found


def milliseconds(run: Callable[[], Any], times: int = 11) -> float:
    for _ in range(3):
        run()
    taken = []
    for _ in range(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(BUSY_CYCLES)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end))
    return statistics.median(taken)


def measured(case: Case, copy: float) -> dict[str, Any]:
    row: dict[str, Any] = {"case": case.name, "width": case.width}
    module = Module(case)
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in case.inputs]
    if case.name == "rope":
        leaves = [leaves[0], *(x.detach() for x in leaves[1:])]
    wanted = [x for x in (*leaves, *module.parameters()) if x.requires_grad]
    kinds: dict[str, Callable[..., Any]] = {
        "graphopt": graphopt.optimize(module, tuple(leaves), emit="inductor", on_error="raise"),
        "compile": torch.compile(module),
    }
    if case.liger is not None:
        kinds["liger"] = lambda *inputs: case.liger(*inputs, *module.parameters())
    for kind, function in kinds.items():
        torch._dynamo.reset() if kind == "compile" else None
        try:
            result = function(*leaves)
            outputs = [y for y in (result if isinstance(result, tuple) else (result,)) if y.requires_grad]
            grads = [torch.randn_like(y) for y in outputs]

            def backward(outputs: Any = outputs, grads: Any = grads) -> Any:
                return torch.autograd.grad(outputs, wanted, grads, retain_graph=True)

            took = milliseconds(backward)
            row[f"{kind}_backward"] = round(100 * case.backward * TENSOR / took / 1e6 / copy, 1)
            del result, outputs, grads, backward
            with torch.no_grad():
                took = milliseconds(lambda: function(*leaves))  # noqa: B023
            row[f"{kind}_forward"] = round(100 * case.forward * TENSOR / took / 1e6 / copy, 1)
        except Exception as error:  # a peer that fails is a row that says so
            row[f"{kind}_error"] = f"{type(error).__name__}: {error}"[:200]
    return row


# --- linear + cross entropy --------------------------------------------------------------------


def losses() -> dict[str, Callable[..., torch.Tensor]]:
    from graphopt.plugins import default_host

    default_host().kernels()
    ops = torch.ops.graphopt

    def held(chunks: int) -> Callable[..., torch.Tensor]:
        settings = (chunks, "mean", -100, 0.0, 1.0, 0.0, torch.float32, [True, True, False])
        return lambda x, w, t: ops.linear_cross_entropy_with_gradients(x, w, None, t, *settings)[0]

    def again(chunks: int) -> Callable[..., torch.Tensor]:
        settings = (chunks, "mean", -100, 0.0, 1.0, 0.0, torch.float32)
        return lambda x, w, t: ops.linear_cross_entropy(x, w, None, t, *settings)[0]

    def whole(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy((x @ w.t()).float(), t)

    found = {
        "eager": whole,
        "compile": torch.compile(whole),
        **{f"graphopt, {n} chunks": held(n) for n in (4, 8, 16, 32)},
        **{f"graphopt, {n} chunks, recomputed": again(n) for n in (8, 32)},
    }
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError:
        return found
    return found | {"liger": liger_fused_linear_cross_entropy}


def linear_cross_entropy(report: Callable[[dict[str, Any]], None]) -> None:
    rows, width, columns = 8192, 4096, 128256

    def operands(*sizes: int) -> Tensors:
        rows, width, columns = sizes
        torch.manual_seed(0)
        x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = (
            torch.randn(columns, width, device="cuda", dtype=torch.bfloat16) * width**-0.5
        ).requires_grad_()
        return x, weight, torch.randint(0, columns, (rows,), device="cuda")

    small = operands(8192, 512, 4096)
    exact = [small[0].detach().double().requires_grad_(), small[1].detach().double().requires_grad_()]
    truth = torch.autograd.grad(F.cross_entropy(exact[0] @ exact[1].t(), small[2]), exact[1])[0]

    def error(loss: Callable[..., torch.Tensor]) -> float:
        found = torch.autograd.grad(loss(*small), small[1])[0]
        return float((found.double() - truth).norm() / truth.norm())

    functions = losses()
    least = error(functions["eager"])
    x, weight, target = operands(rows, width, columns)
    for name, loss in functions.items():

        def step(loss: Callable[..., torch.Tensor] = loss) -> None:
            torch.autograd.grad(loss(x, weight, target), (x, weight))

        try:
            off = error(loss)
            step()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            torch.cuda.synchronize()
            extra = torch.cuda.max_memory_allocated() - before
            took = milliseconds(step, 7)
            report(
                {
                    "loss": name,
                    "ms": round(took, 2),
                    "extra_mib": round(extra / MIB),
                    "error": round(off / least, 2),
                }
            )
        except Exception as problem:
            report({"loss": name, "error_text": f"{type(problem).__name__}: {problem}"[:200]})


def copy_bandwidth() -> float:
    """GB/s that copying moves, read and written."""
    source = torch.empty(2 * TENSOR, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e6


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_kernels.json"))
    options.add_argument("--widths", default="2048,4096,5120,8192,14336")
    options.add_argument(
        "--parts",
        nargs="*",
        default=["losses", "rows"],
        help="measure these; the others stay as they are stored",
    )
    given = options.parse_args()
    if not torch.cuda.is_available():
        print("gpu_kernels needs a CUDA device")
        return
    # A backward is timed alone, again and again: what it reads must not become memory of its results.
    functorch_config.donated_buffer = False
    copy = copy_bandwidth()
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "versions": {name: known(name) for name in ("torch", "triton", "liger_kernel")},
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python benchmarks/gpu_kernels.py",
        "copy_gb_per_s": round(copy),
        "rows": [],
        "losses": [],
    }
    if given.out.exists():
        stored = json.loads(given.out.read_text())
        document |= {part: stored[part] for part in ("rows", "losses") if part not in given.parts}

    def note(key: str, row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)
        document[key].append(row)
        write_atomically(given.out, json.dumps(document, indent=1) + "\n")

    print(f"copy {copy:.0f} GB/s", file=sys.stderr)
    if "losses" in given.parts:
        linear_cross_entropy(lambda row: note("losses", row))
    for make in cases([int(width) for width in given.widths.split(",")]) if "rows" in given.parts else ():
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        note("rows", measured(make(), copy))


def known(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
