"""Memory-bound operators and linear + cross entropy on one GPU: graphopt beside torch.compile and Liger.

    python benchmarks/gpu_kernels.py --out benchmarks/results/gpu_kernels.json

Every operator is a module of its own, 128 MiB a tensor, bf16, given to ``graphopt.optimize`` (code by
Inductor), to ``torch.compile`` and, where it has one, Liger's kernel. ``forward`` is a call without
gradients, ``backward`` the gradients of inputs and parameters for a given gradient, where there is one.
``error`` says how much further from float64 results and gradients are than those of eager mode. Percentages
are of the copy bandwidth that the same run measures, on the least bytes: each tensor that must be read or
written, once. The GPU is kept busy while the host gets a call ready, so that host time does not count;
medians after warm-up.

Linear + cross entropy: 8,192 x 4,096 x 128,256, forward and backward; ``extra_mib`` is the peak above input,
weight and targets, both gradients (1,067 MiB) included. ``error`` is the distance of the weight's gradient
from float64 over that of whole bf16 logits, ``input_error`` the same of the input's. Rows of chunks and
blocks call the operators in eager mode. ``graphopt.optimize`` is given what a user has, a module of a
weight and ``F.cross_entropy`` of float logits, with a budget of input, weight, targets, ``budget_mib`` for
all else, and the 72 MiB that a budget sets aside for libraries (a workspace of 32 MiB for each of two
threads) and for the allocator, which ``extra_mib`` leaves out; ``plan`` is what it chose.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
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
BUSY_CYCLES = 6_000_000
"""About three milliseconds: longer than the host takes for a call."""

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


def log_softmax(x: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(x, -1)


def rms_norm_fp8(x: torch.Tensor, weight: torch.Tensor) -> Tensors:
    y = rms_norm(x, weight).float()
    scale = (y.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-12)
    return (y / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def layer_norm_int8(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Tensors:
    y = layer_norm(x, weight, bias).float()
    scale = (y.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-8)
    return torch.round(y / scale).to(torch.int8), scale


def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), target)


def smoothed_cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, target, label_smoothing=0.1)


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
        add("rms_norm_fp8", width, rms_norm_fp8, 1, 1, (1.5, 0))
        add("layer_norm_int8", width, layer_norm_int8, 1, 2, (1.5, 0))
        add("softmax", width, softmax, 1, 0, (2, 3))
    for width in dict.fromkeys((widths[len(widths) // 4], widths[-1])):
        add("swiglu", width, swiglu, 2, 0, (3, 5))
        add("geglu", width, geglu, 2, 0, (3, 5))
        add("log_softmax", width, log_softmax, 1, 0, (2, 3))
    made.append(rope_case)
    made.append(normed_rope_case)
    for columns in (32000, 128256):
        made.append(
            lambda columns=columns: cross_entropy_case("cross_entropy", columns, cross_entropy, liger)
        )
    made.append(lambda: cross_entropy_case("smoothed_cross_entropy", 128256, smoothed_cross_entropy, liger))
    return made


def rope_case() -> Case:
    batch, heads, length, width = 4, 32, 4096, 128
    x = torch.randn(batch, length, heads, width, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    angles = torch.randn(1, 1, length, width, device="cuda", dtype=torch.bfloat16)
    return Case("rope", width, rope, (x, angles.cos(), angles.sin()), (), 2, 2)


def normed_rope_case() -> Case:
    """The norm of heads before the rotation: the backward reads the heads as well."""
    case = rope_case()
    weight = torch.randn(case.width, device="cuda", dtype=torch.bfloat16)

    def function(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rope(rms_norm(x, weight), cos, sin)

    return Case("norm_rope", case.width, function, case.inputs, (weight,), 2, 3)


def cross_entropy_case(
    name: str, columns: int, function: Callable[..., Any], liger: dict[str, Callable[..., Any]]
) -> Case:
    logits = torch.randn(TENSOR // (2 * columns), columns, device="cuda", dtype=torch.bfloat16)
    target = torch.randint(0, columns, (logits.shape[0],), device="cuda")
    return Case(name, columns, function, (logits, target), (), 1, 2, liger.get(name))


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


def milliseconds(run: Callable[[], Any], times: int = 11, busy: int = BUSY_CYCLES) -> float:
    """Median of ``times``, the GPU kept busy for ``busy`` cycles while the host queues the call."""
    for _ in range(3):
        run()
    taken = []
    for _ in range(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(busy)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end))
    return statistics.median(taken)


def backward_share(
    function: Callable[..., Any], leaves: Sequence[Any], wanted: Sequence[Any], moved: float, copy: float
) -> float:
    """Percent of the copy bandwidth that gradients of ``wanted`` reach."""
    result = function(*leaves)
    outputs = [y for y in (result if isinstance(result, tuple) else (result,)) if y.requires_grad]
    grads = [torch.randn_like(y) for y in outputs]
    took = milliseconds(lambda: torch.autograd.grad(outputs, wanted, grads, retain_graph=True))
    return round(100 * moved * TENSOR / took / 1e6 / copy, 1)


def further(
    module: torch.nn.Module, function: Callable[..., Any], leaves: Sequence[Any], wanted: Sequence[Any]
) -> float:
    """How much further from float64 results and gradients of ``function`` are than those of ``module`` in
    eager mode: the largest ratio of distances."""

    def results(run: Callable[..., Any], inputs: Sequence[Any], of: Sequence[Any]) -> list[torch.Tensor]:
        made = run(*inputs)
        outputs = list(made) if isinstance(made, tuple) else [made]
        ends = [y for y in outputs if y.requires_grad]
        torch.manual_seed(0)
        given = [torch.randn(y.shape, device=y.device).to(torch.bfloat16).to(y.dtype) for y in ends]
        return outputs + list(torch.autograd.grad(ends, of, given) if ends else ())

    ours, usual = (results(run, leaves, wanted) for run in (function, module))
    floats = [x for x in leaves if x.is_floating_point()]
    wide = {id(x): x.detach().double().requires_grad_(x.requires_grad) for x in floats}
    exact_module = copy.deepcopy(module).double()
    inputs = [wide.get(id(x), x) for x in leaves]
    of = [*(x for x in inputs if x.requires_grad), *(p for p in exact_module.parameters() if p.requires_grad)]
    ratios = [1.0]
    for one, other, exact in zip(ours, usual, results(exact_module, inputs, of), strict=True):
        distances = [float((x.double() - exact.double()).detach().norm()) for x in (one, other)]
        ratios.append(distances[0] / distances[1] if distances[1] else 1.0 if not distances[0] else math.inf)
    return round(max(ratios), 3)


def measured(case: Case, bandwidth: float) -> dict[str, Any]:
    row: dict[str, Any] = {"case": case.name, "width": case.width}
    module = Module(case)
    trains = case.backward > 0
    leaves = [x.requires_grad_(trains) if x.is_floating_point() else x for x in case.inputs]
    module.requires_grad_(trains)
    if case.name in ("rope", "norm_rope"):
        leaves = [leaves[0], *(x.detach() for x in leaves[1:])]
    wanted = [x for x in (*leaves, *module.parameters()) if x.requires_grad]
    kinds: dict[str, Callable[..., Any]] = {
        "graphopt": graphopt.optimize(module, tuple(leaves), emit="inductor", on_error="raise"),
        "compile": torch.compile(module),
    }
    if case.liger is not None:
        kinds["liger"] = lambda *inputs: case.liger(*inputs, *module.parameters())
    try:
        row["error"] = further(module, kinds["graphopt"], leaves, wanted)
    except Exception as error:  # as below
        row["error_text"] = f"{type(error).__name__}: {error}"[:200]
    for kind, function in kinds.items():
        torch._dynamo.reset() if kind == "compile" else None
        try:
            if trains:
                row[f"{kind}_backward"] = backward_share(function, leaves, wanted, case.backward, bandwidth)
            with torch.no_grad():
                took = milliseconds(lambda: function(*leaves))  # noqa: B023
            row[f"{kind}_forward"] = round(100 * case.forward * TENSOR / took / 1e6 / bandwidth, 1)
        except Exception as error:  # a peer that fails is a row that says so
            row[f"{kind}_error"] = f"{type(error).__name__}: {error}"[:200]
    return row


# --- linear + cross entropy --------------------------------------------------------------------


ROWS, WIDTH, CLASSES = 8192, 4096, 128256
BUDGETS = {"fast": 1400, "least memory": 1132}
"""MiB above input, weight and targets."""
LIBRARIES = 72 * MIB

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def losses() -> dict[str, Loss]:
    from graphopt.plugins import default_host

    default_host().kernels()
    ops = torch.ops.graphopt

    def of(operator: Any, cuts: int, *mask: list[bool]) -> Loss:
        settings = (cuts, "mean", -100, 0.0, 1.0, 0.0, torch.float32, *mask)
        return lambda x, w, t: operator(x, w, None, t, *settings)[0]

    def whole(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy((x @ w.t()).float(), t)

    both = [True, True, False]
    held, blocks_held = (
        ops.linear_cross_entropy_with_gradients,
        ops.linear_cross_entropy_blocks_with_gradients,
    )
    again, blocks_again = ops.linear_cross_entropy, ops.linear_cross_entropy_blocks
    found = {
        "eager": whole,
        "compile": torch.compile(whole),
        **{f"graphopt, {n} chunks": of(held, n, both) for n in (4, 8, 16, 32)},
        **{f"graphopt, {n} chunks, recomputed": of(again, n) for n in (8, 32)},
        **{f"graphopt, blocks of {n}": of(blocks_held, n, both) for n in (2048, 4096, 8192)},
        **{f"graphopt, blocks of {n}, recomputed": of(blocks_again, n) for n in (2048, 4096, 8192)},
    }
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError:
        return found
    return found | {"liger": liger_fused_linear_cross_entropy}


class Head(torch.nn.Module):
    """What a user writes."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(x, self.weight).float(), target)


def exact_gradients(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, rows: int = 1024) -> Tensors:
    """In float64, some rows at a time."""
    wide = weight.detach().double().requires_grad_()
    of_input = torch.empty(x.shape, dtype=torch.float64, device=x.device)
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        leaf = x[part].detach().double().requires_grad_()
        (F.cross_entropy(leaf @ wide.t(), target[part], reduction="sum") / len(x)).backward()
        of_input[part] = leaf.grad
    assert wide.grad is not None
    return of_input, wide.grad


def linear_cross_entropy(report: Callable[[dict[str, Any]], None]) -> None:
    torch.manual_seed(0)
    x = torch.randn(ROWS, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.nn.Parameter(
        torch.randn(CLASSES, WIDTH, device="cuda", dtype=torch.bfloat16) * WIDTH**-0.5
    )
    target = torch.randint(0, CLASSES, (ROWS,), device="cuda")
    truth = exact_gradients(x, weight, target)

    def errors(loss: Loss) -> tuple[float, ...]:
        found = torch.autograd.grad(loss(x, weight, target), (x, weight))
        return tuple(
            float((gradient.double() - exact).norm() / exact.norm())
            for gradient, exact in zip(found, truth, strict=True)
        )

    functions = losses()
    least = errors(functions["eager"])

    def measure(name: str, loss: Loss, **more: Any) -> None:
        def step() -> None:
            torch.autograd.grad(loss(x, weight, target), (x, weight))

        of_input, of_weight = errors(loss)
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before
        report(
            {
                "loss": name,
                "ms": round(milliseconds(step, 7), 2),
                "extra_mib": round(extra / MIB),
                "error": round(of_weight / least[1], 2),
                "input_error": round(of_input / least[0], 2),
                **more,
            }
        )

    def guarded(name: str, run: Callable[[], None]) -> None:
        try:
            run()
        except Exception as problem:
            report({"loss": name, "error_text": f"{type(problem).__name__}: {problem}"[:200]})
        gc.collect()
        torch.cuda.empty_cache()

    for name, loss in functions.items():
        guarded(name, lambda name=name, loss=loss: measure(name, loss))
    held = sum(tensor.numel() * tensor.element_size() for tensor in (x, weight, target))

    def optimized(name: str, mib: int) -> None:
        torch._dynamo.reset()
        budget = held + mib * MIB + LIBRARIES
        # Gradients that are held from forward to backward are multiplied in place.
        with functorch_config.patch(donated_buffer=True):
            fast = graphopt.optimize(
                Head(weight), (x, target), budget=budget, emit="inductor", on_error="raise"
            )
            plan = fast.plan
            more = {"budget_mib": mib, "plan": ", ".join(c.alternative or "whole" for c in plan.choices)}
            measure(name, lambda x, w, t: fast(x, t), **more)

    for kind, mib in BUDGETS.items():
        name = f"graphopt.optimize, {kind}"
        guarded(name, lambda name=name, mib=mib: optimized(name, mib))


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
    options.add_argument("--cases", default="", help="names of rows, one after a comma; all by default")
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
        case = make()
        if not given.cases or case.name in given.cases.split(","):
            note("rows", measured(case, copy))


def known(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
