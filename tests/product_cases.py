"""Functions of tensors with a product of matrices that each make one kernel, for tests and the interpreter.

Run as a script it runs every case in Triton's interpreter and prints, as JSON, how far the results of its
kernel are from float64, and how far those of separate operators. TRITON_INTERPRET has to be set before triton
is imported, hence a process.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from graphopt_kernels.emit.build import NotFusible
from graphopt_kernels.emit.machine_code import import_kernel
from graphopt_kernels.emit.product_build import BuiltProduct
from graphopt_kernels.emit.product_loops import ProductLoops, Tiling, tilings_for
from tests.emitted_cases import distance, kernel_for

aten = torch.ops.aten


@dataclass(frozen=True)
class ProductCase:
    """``function`` of tensors like ``inputs()``. ``kind`` of its tiling and in how many ``parts`` it adds up.
    ``tolerance``: of a result relative to its largest element."""

    function: Callable[..., Any]
    inputs: Callable[[], Sequence[torch.Tensor]]
    kind: str = "tiles"
    parts: int = 1
    tolerance: float = 2e-6


HALF = 2e-3
"""Of the largest element: float16 has units of 1e-3 of that, and results are rounded once or twice."""


def normal(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Callable[[], list[torch.Tensor]]:
    return lambda: [torch.randn(shape).to(dtype) for shape in shapes]


def halves(*shapes: tuple[int, ...]) -> Callable[[], list[torch.Tensor]]:
    return normal(*shapes, dtype=torch.float16)


def _quantized(rows: int, columns: int, inner: int) -> Callable[[], list[torch.Tensor]]:
    return lambda: [
        torch.randn(rows, inner).half(),
        torch.randint(-127, 128, (columns, inner), dtype=torch.int8),
        (torch.rand(columns, 1) / 100).half(),
    ]


def _special() -> list[torch.Tensor]:
    x, w = torch.randn(33, 40), torch.randn(40, 20)
    x[0, 1], x[5, 2], x[7, 3] = float("nan"), float("inf"), float("-inf")
    return [x, w, torch.randn(20)]


CASES: dict[str, ProductCase] = {
    "bias and activation": ProductCase(
        lambda x, w, b: F.gelu(F.linear(x, w, b)), normal((33, 40), (20, 40), (20,))
    ),
    "residual, several outputs": ProductCase(
        lambda x, w, r: (lambda y: (y, y.relu() + r, y > 0))(x @ w),
        normal((20, 24), (24, 36), (20, 36)),
    ),
    "gated": ProductCase(
        lambda x, w, g: F.silu(g) * (x @ w), halves((48, 64), (64, 32), (48, 32)), tolerance=HALF
    ),
    "scaled and added": ProductCase(
        lambda c, x, w: torch.addmm(c, x, w, beta=0.5, alpha=2.0).tanh(), normal((30,), (18, 19), (19, 30))
    ),
    "nothing of what is scaled by 0": ProductCase(
        lambda c, x, w: torch.addmm(c * float("nan"), x, w, beta=0) * 2, normal((30,), (18, 19), (19, 30))
    ),
    "transposed operands": ProductCase(lambda x, w: torch.sigmoid(x.t() @ w.t()), normal((24, 40), (50, 24))),
    "strided operands": ProductCase(
        lambda x, w: (x[:, ::2] @ w[::3]).exp(), lambda: [torch.randn(20, 48) / 9, torch.randn(72, 17)]
    ),
    "batched": ProductCase(
        lambda x, w, b: torch.bmm(x, w) * 0.125 + b, normal((3, 18, 24), (3, 24, 20), (18, 20))
    ),
    "batched and added": ProductCase(
        lambda c, x, w: torch.baddbmm(c, x, w).relu(), normal((3, 1, 20), (3, 18, 24), (3, 24, 20))
    ),
    "prologue on the left": ProductCase(
        lambda g, u, w: (F.silu(g) * u) @ w, halves((33, 48), (33, 48), (48, 24)), tolerance=HALF
    ),
    "prologue that is not 0 at 0": ProductCase(
        lambda x, y, w: (x.exp() / y) @ (w.cos() + 1), normal((17, 37), (17, 37), (37, 19)), tolerance=1e-5
    ),
    "scales of rows, columns and what is added up": ProductCase(
        lambda x, w, r, c, k: ((x * r) * k) @ (w * c) * c,
        normal((20, 33), (33, 24), (20, 1), (24,), (33,)),
        tolerance=1e-5,
    ),
    "one factor on both sides": ProductCase(
        lambda x, w, k: (x * k) @ (w * k[:, None]), normal((20, 33), (33, 24), (33,)), tolerance=1e-5
    ),
    "operands that are broadcast": ProductCase(
        lambda x, w: x.expand(18, 33) @ w.expand(33, 20) + 1, normal((18, 1), (1, 20)), tolerance=1e-5
    ),
    "dequantized weight": ProductCase(
        lambda x, w, s: x @ (w.half() * s).t(), _quantized(24, 40, 64), tolerance=HALF
    ),
    "heads joined before": ProductCase(
        lambda x, w, r: (x.transpose(1, 2).reshape(10, 32) @ w) + r,
        normal((2, 4, 5, 8), (32, 24), (10, 24)),
    ),
    "heads apart after": ProductCase(
        lambda x, w, s: ((x @ w).view(2, 5, 4, 8).transpose(1, 2) * s).contiguous(),
        normal((10, 24), (24, 32), (2, 4, 5, 8)),
    ),
    "looked up": ProductCase(
        lambda i, t, w: (F.embedding(i, t) * 2) @ w,
        lambda: [torch.randint(0, 9, (21,)), torch.randn(9, 24), torch.randn(24, 20)],
    ),
    "mask of positions": ProductCase(
        lambda q, k: torch.where(
            torch.arange(18)[:, None] >= torch.arange(20)[None], q @ k * 0.3, float("-inf")
        ),
        normal((18, 24), (24, 20)),
    ),
    "special values": ProductCase(lambda x, w, b: (x @ w + b).relu(), _special),
    "large tiles": ProductCase(
        lambda x, w, g: F.silu(g) * (x @ w), halves((70, 136), (136, 72), (70, 72)), tolerance=HALF
    ),
    "products of integers": ProductCase(
        lambda x, w, s: torch._int_mm(x, w).float() * s,
        lambda: [
            torch.randint(-127, 128, (32, 64), dtype=torch.int8),
            torch.randint(-127, 128, (64, 24), dtype=torch.int8),
            torch.rand(24),
        ],
    ),
    "few rows": ProductCase(
        lambda x, w, b: F.relu(F.linear(x, w, b)), halves((5, 600), (70, 600), (70,)), tolerance=HALF
    ),
    "few rows in parts": ProductCase(
        lambda x, w, r: F.linear(x, w) * 2 + r,
        halves((5, 5000), (40, 5000), (5, 40)),
        parts=5,
        tolerance=HALF,
    ),
    "one row": ProductCase(
        lambda x, w, b: F.gelu(F.linear(x, w, b)), normal((1, 300), (70, 300), (70,)), "row"
    ),
    "one row in parts": ProductCase(
        lambda x, w, b: F.linear(x.exp(), w, b).relu(), normal((1, 9000), (10, 9000), (10,)), "row", 6, 1e-5
    ),
    "one row by columns": ProductCase(
        lambda x, w, r: (F.silu(x) @ w) + r, normal((1, 100), (100, 70), (1, 70)), "row", tolerance=1e-5
    ),
    "one row, dequantized": ProductCase(
        lambda x, w, s: x @ (w.half() * s).t(), _quantized(1, 40, 300), "row", tolerance=HALF
    ),
    "one column": ProductCase(
        lambda x, w: (x @ w).exp(), normal((70, 300), (300, 1)), "column", tolerance=1e-5
    ),
    "one row of each matrix": ProductCase(
        lambda x, w: torch.bmm(x, w) * 0.5, normal((3, 1, 30), (3, 30, 20)), "row"
    ),
    "one element": ProductCase(lambda x, w: (x @ w) * 2, normal((1, 700), (700, 1)), "row", tolerance=1e-5),
    "an outer product": ProductCase(lambda x, w: (x @ w) * 2, normal((33, 1), (1, 20))),
    "small in parts": ProductCase(
        lambda x, w: (x @ w).tanh(), normal((20, 1100), (1100, 24)), parts=14, tolerance=1e-5
    ),
}
"""By what they show."""


TILED = (
    "few rows",
    "few rows in parts",
    "large tiles",
    "one row by columns",
    "one column",
    "heads joined before",
)
"""Cases that are run with every tiling that there is for them."""


def outcome(case: ProductCase, folder: Path, tiling: Tiling | None = None) -> dict[str, Any]:
    torch.manual_seed(0)
    inputs = list(case.inputs())
    try:
        kernel, order = kernel_for(case.function, inputs, tiling)
        made = import_kernel(kernel.file, folder).launch(*[inputs[i] for i in order])
    except NotFusible as refused:
        return {"refused": str(refused.reason)}
    except Exception as failed:
        return {"failed": f"{type(failed).__name__}: {failed}"[:600]}
    eager = case.function(*inputs)
    wanted = list(eager) if isinstance(eager, (tuple, list)) else [eager]
    exact = _wide(case, inputs)
    ours = theirs = 0.0
    for value, expected, right in zip(made, wanted, exact, strict=True):
        layout = (value.shape, value.dtype, value.stride())
        if layout != (expected.shape, expected.dtype, expected.stride()):
            return {"failed": f"{layout}, not {(expected.shape, expected.dtype, expected.stride())}"}
        ours, theirs = max(ours, distance(value, right)), max(theirs, distance(expected, right))
    parts = kernel.file.launch.constants.get("PARTS", 1)
    return {"error": ours, "eager": theirs, "kind": kernel.file.tiling.kind, "parts": parts}


def _wide(case: ProductCase, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The results in float64."""
    wide = [x.double() if x.is_floating_point() or x.dtype == torch.int8 else x for x in inputs]
    with _Wide():
        made = case.function(*wide)
    return list(made) if isinstance(made, (tuple, list)) else [made]


class _Wide(torch.overrides.TorchFunctionMode):
    """Conversions to narrower dtypes change nothing; products of integers are products."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.half, torch.Tensor.float):
            return args[0].double() if isinstance(args[0], torch.Tensor) else args[0]
        if func is torch._int_mm:
            return args[0] @ args[1]
        return func(*args, **(kwargs or {}))


def tilings(case: ProductCase) -> list[Tiling]:
    """All tilings that a case may have."""
    file = kernel_for(case.function, case.inputs())[0].file
    assert isinstance(file.built, BuiltProduct) and isinstance(file.text.loops, ProductLoops)
    return tilings_for(file.built, file.text.loops)


def main(names: Sequence[str]) -> None:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            if names and name not in names:
                continue
            found[name] = outcome(case, Path(folder))
            if name in TILED:
                others = tilings(case)[1:]
                found[name]["tilings"] = [outcome(case, Path(folder), tiling) for tiling in others]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
