"""Attention that is written out on one GPU, beside the library's call that it would stand for.

    python benchmarks/gpu_emitted_attention.py --out benchmarks/results/gpu_emitted_attention.json

For each case, in microseconds, medians after warm-up, the GPU kept busy while the host gets a call ready and
the cache flushed before each: ``emitted`` (the kernels of the file) and ``library`` (flash, cuDNN and
memory-efficient attention, each where it takes the case), and what was predicted of the former. ``share`` is
the rate of the former over that of the fastest library: where products bound both, it is what
``emitted_attention_share`` of a device stands for. ``error`` is the distance of the results from those of the
library, relative to their norm. Cases with a computed bias have the library read a bias that is there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gpu_products import DEVICE, FLUSHED, microseconds
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt.atomic import write_atomically
from graphopt_kernels.emit.attention_choice import emitted_attention
from graphopt_kernels.emit.kernel_file import Kernel, kernel_of
from graphopt_kernels.emit.machine_code import import_kernel
from graphopt_kernels.emit.product_choice import prices_for

aten = torch.ops.aten


@dataclass(frozen=True)
class Case:
    """Batch, heads of queries and of keys, positions, elements of a head. ``slopes``: scores have a bias
    that grows with the distance."""

    batch: int
    heads: int
    few: int
    length: int
    width: int
    causal: bool = True
    slopes: bool = False

    def operands(self) -> list[torch.Tensor]:
        torch.manual_seed(0)
        sizes = ((self.length, self.heads), (self.length, self.few), (self.length, self.few))
        made = [torch.randn(self.batch, n, h, self.width, device=DEVICE) for n, h in sizes]
        found = [x.bfloat16().transpose(1, 2) for x in made]
        return [*found, *([torch.rand(self.heads, device=DEVICE).bfloat16()] if self.slopes else [])]


CASES = (
    *(Case(2, 32, 8, length, 128) for length in (512, 1024, 4096)),
    *(Case(2, 32, 32, length, 64) for length in (1024, 4096)),
    Case(32, 16, 16, 197, 64, causal=False),
    *(Case(256, 12, 12, length, 64, causal=False) for length in (16, 64)),
    Case(2, 32, 32, 2048, 128, slopes=True),
)


def bias_of(case: Case, query: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    key, row = (torch.arange(case.length, device=slopes.device) for _ in range(2))
    distances = key.unsqueeze(0) - row.unsqueeze(1)
    return (slopes.view(-1, 1, 1) * distances).to(query.dtype).unsqueeze(0)


def forward_of(case: Case, library: str) -> Callable[..., Any]:
    """The output and the log-sum-exp by a library."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *slopes: torch.Tensor) -> Any:
        bias = None
        if slopes:
            shape = (case.batch, case.heads, case.length, case.length)
            bias = (slopes[0] if slopes[0].dim() == 4 else bias_of(case, q, slopes[0])).expand(shape)
        if library == "flash":
            return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, case.causal)[:2]
        name = f"_scaled_dot_product_{library}_attention"
        return getattr(aten, name)(q, k, v, bias, True, 0.0, case.causal)[:2]

    return run


def backward_of(case: Case) -> Callable[..., Any]:
    """The gradients by flash attention; it is given what its forward saved."""

    def run(*given: torch.Tensor) -> Any:
        q, k, v, grad, out, sums, seed, offset = given
        lengths = (None, None, case.length, case.length)
        return aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, sums, *lengths, 0.0, case.causal, seed, offset
        )

    return run


def written_out(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor]
) -> tuple[Kernel, list[torch.Tensor]]:
    """The kernel of all operators of ``function``, and its inputs."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in inputs]
        graph = make_fx(function, tracing_mode="real")(*fakes).graph
    graph.eliminate_dead_code()
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    (output,) = [node for node in graph.nodes if node.op == "output"]
    kernel = kernel_of(nodes, list(output.args[0]))  # type: ignore[arg-type]
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    return kernel, [inputs[placeholders.index(node)] for node in kernel.inputs]


def distance(found: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    pairs = [(a.double(), b.double()) for a, b in zip(found, right, strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def compared(
    emitting: Callable[..., Any],
    inputs: Sequence[torch.Tensor],
    libraries: dict[str, tuple[Callable[..., Any], Sequence[torch.Tensor]]],
    folder: Path,
    flushed: torch.Tensor,
) -> dict[str, Any]:
    kernel, taken = written_out(emitting, inputs)
    launch = import_kernel(kernel.file, folder).launch
    row: dict[str, Any] = {
        "predicted": round(emitted_attention(prices_for(), kernel.file) * 1e6, 2),
        "emitted": microseconds(lambda: launch(*taken), flushed),
        "library": {},
    }
    for name, (function, given) in libraries.items():
        try:
            right = function(*given)
        except RuntimeError as refused:
            row["library"][name] = str(refused).splitlines()[0][:80]
            continue
        if "error" not in row:
            row["error"] = float(f"{distance(launch(*taken)[:1], right[:1]):.3g}")
        row["library"][name] = microseconds(lambda f=function, g=given: f(*g), flushed)  # type: ignore[misc]
    times = [time for time in row["library"].values() if isinstance(time, float)]
    row["share"] = round(min(times) / row["emitted"], 3) if times else None
    return row


def measured(case: Case, folder: Path, flushed: torch.Tensor) -> list[dict[str, Any]]:
    inputs = case.operands()
    about = {"batch": case.batch, "heads": case.heads, "few": case.few, "length": case.length}
    about |= {"width": case.width, "causal": case.causal, "bias": case.slopes}
    names = ("efficient", "cudnn") if case.slopes else ("flash", "cudnn", "efficient")
    given = inputs
    if case.slopes:
        given = [*inputs[:3], bias_of(case, inputs[0], inputs[3]).contiguous()]
    libraries = {name: (forward_of(case, name), given) for name in names}
    row = compared(forward_of(case, names[0]), inputs, libraries, folder, flushed)
    rows = [about | {"half": "forward"} | row]
    if not case.slopes:
        saved = aten._scaled_dot_product_flash_attention(*inputs, 0.0, case.causal)
        grad = torch.randn_like(saved[0])
        operands = [*inputs, grad, *saved[:2], *saved[6:8]]
        library = {"flash": (backward_of(case), operands)}
        row = compared(backward_of(case), operands, library, folder, flushed)
        rows.append(about | {"half": "backward"} | row)
    return rows


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_emitted_attention.json"))
    given = options.parse_args()
    if not torch.cuda.is_available():
        print("gpu_emitted_attention needs a CUDA device")
        return
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "triton")},
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python benchmarks/gpu_emitted_attention.py",
        "rows": [],
    }
    flushed = torch.empty(FLUSHED, dtype=torch.uint8, device=DEVICE)
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            for row in measured(case, Path(folder), flushed):
                print(json.dumps(row), flush=True)
                document["rows"].append(row)
                write_atomically(given.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
