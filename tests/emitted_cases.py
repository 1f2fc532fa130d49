"""Functions of tensors that each make one kernel, and random ones; used by tests and in the interpreter.

Run as a script it makes every case into a kernel, runs that in Triton's interpreter and prints, as JSON, what
differs from separate operators. TRITON_INTERPRET has to be set before triton is imported, hence a process.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt_kernels.emit.build import NotFusible
from graphopt_kernels.emit.kernel_file import Kernel, kernel_of
from graphopt_kernels.emit.machine_code import import_kernel
from graphopt_kernels.emit.product_loops import Tiling

aten = torch.ops.aten


@dataclass(frozen=True)
class Case:
    """``function`` of tensors like ``inputs()``; ``shape``: that of the kernel it makes."""

    function: Callable[..., Any]
    inputs: Callable[[], Sequence[torch.Tensor]]
    shape: str
    tolerance: float = 2e-6


def kernel_for(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor], tiling: Tiling | None = None
) -> tuple[Kernel, list[int]]:
    """The kernel of all operators of ``function``, and which of ``inputs`` it takes, in order."""
    mode = FakeTensorMode()
    with mode:
        fakes = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) for x in inputs]
        graph = make_fx(function, tracing_mode="real")(*fakes).graph
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    (output,) = [node for node in graph.nodes if node.op == "output"]
    outputs = output.args[0]
    results = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    kernel = kernel_of(nodes, results, tiling)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    return kernel, [placeholders.index(node) for node in kernel.inputs]


def _normal(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Callable[[], list[torch.Tensor]]:
    return lambda: [torch.randn(shape).to(dtype) for shape in shapes]


def _norm_statistics() -> list[torch.Tensor]:
    x = torch.randn(33, 70)
    mean, rstd = x.mean(-1, keepdim=True), (x.var(-1, keepdim=True, unbiased=False) + 1e-5).rsqrt()
    return [torch.randn(33, 70), x, mean, rstd, torch.randn(70), torch.randn(70)]


def _rotated(h: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    q = h.view(2, 5, 4, 8).transpose(1, 2)
    return q * cos + torch.cat((-q[..., 4:], q[..., :4]), -1) * sin


def _rms_norm(x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    h = x + residual
    wide = h.float()
    return h, (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(h.dtype) * w


def _special() -> list[torch.Tensor]:
    x = torch.randn(6, 40)
    x[0, :4] = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0])
    x[1] = float("-inf")
    x[2, 0] = float("inf")
    return [x]


CASES: dict[str, Case] = {
    "gelu and product": Case(lambda x, y: F.gelu(x) * y + 1, _normal((33, 70), (33, 70)), "pointwise"),
    "gelu by tanh": Case(lambda x: F.gelu(x, approximate="tanh"), _normal((33, 70)), "pointwise"),
    "activations": Case(
        lambda x: F.silu(x) + F.mish(x) + F.softplus(x) + F.elu(x) + F.hardswish(x) + F.leaky_relu(x),
        _normal((9, 65)),
        "pointwise",
        4e-6,
    ),
    "gated product backward": Case(
        lambda g, x, y: (aten.silu_backward(g * y, x), g * F.silu(x)),
        _normal((7, 96), (7, 96), (7, 96)),
        "pointwise",
    ),
    "half precision rounds like eager": Case(
        lambda x, y: (x + y) * y - x,
        _normal((17, 33), (17, 33), dtype=torch.float16),
        "pointwise",
        0.0,
    ),
    "mixed dtypes": Case(
        lambda x, y, m: torch.where(m, x.float() * y, y).to(torch.float16),
        lambda: [torch.randn(8, 20).half(), torch.randn(20), torch.rand(8, 20) > 0.5],
        "pointwise",
        0.0,
    ),
    "integers": Case(
        lambda i, j: (i * j + 3) // 4 - (i % 5 == 2).long(),
        lambda: [torch.randint(-50, 50, (11, 13)), torch.randint(1, 9, (13,))],
        "pointwise",
        0.0,
    ),
    "broadcast of all kinds": Case(
        lambda a, b, c: a[:, None] * b[None] + c, _normal((9,), (14,), ()), "pointwise"
    ),
    "views": Case(
        lambda x, w: F.silu(x.view(33, 7, 10)).transpose(1, 2).contiguous().view(33, 70) * w,
        _normal((33, 70), (70,)),
        "pointwise",
    ),
    "strided input": Case(
        lambda x, y: x.t() * y, lambda: [torch.randn(40, 24), torch.randn(24, 80)[:, ::2]], "pointwise"
    ),
    "rotary embedding": Case(_rotated, _normal((2, 5, 32), (5, 8), (5, 8)), "pointwise"),
    "concatenation of three": Case(
        lambda a, b, c: torch.cat((a, b * 2, c), 1), _normal((6, 5), (6, 9), (6, 2)), "pointwise"
    ),
    "padding": Case(lambda x: F.pad(x, (2, 3, 1, 0), value=7.0) * 2, _normal((5, 6)), "pointwise"),
    "nothing but padding": Case(
        lambda x: F.pad(x, (2, 3), value=7.0)[:, :1] * x, _normal((5, 6)), "pointwise"
    ),
    "lookup": Case(
        lambda i, t: F.embedding(i, t) * 2,
        lambda: [torch.randint(0, 9, (3, 4)), torch.randn(9, 16)],
        "pointwise",
    ),
    "lookup from the end": Case(
        lambda i, t: t[i] + 1, lambda: [torch.randint(-9, 9, (12,)), torch.randn(9, 16)], "pointwise"
    ),
    "layer norm": Case(
        lambda x, w, b: aten.native_layer_norm(x, [70], w, b, 1e-5), _normal((33, 70), (70,), (70,)), "rows"
    ),
    "add and RMS norm": Case(_rms_norm, _normal((10, 128), (10, 128), (128,)), "rows"),
    "group norm": Case(
        lambda x, w, b: aten.native_group_norm(x, w, b, 2, 8, 15, 4, 1e-5),
        _normal((2, 8, 3, 5), (8,), (8,)),
        "rows",
    ),
    "softmax": Case(lambda x: torch.softmax(x * 0.5, -1), _normal((9, 130)), "rows"),
    "softmax of special values": Case(lambda x: torch.softmax(x, -1), _special, "rows"),
    "largest and smallest with special values": Case(
        lambda x: (x.amax(-1), x.amin(-1, keepdim=True), x.tanh()), _special, "rows"
    ),
    "softmax backward": Case(
        lambda g, y: aten._softmax_backward_data(g, y, -1, torch.float32), _normal((9, 64), (9, 64)), "rows"
    ),
    "rows of one element": Case(
        lambda x: (torch.softmax(x * 0.5, -1), x.sum(-1), x.var(-1, unbiased=False)),
        _normal((17, 1)),
        "pointwise",
    ),
    "mean of everything": Case(lambda x: (x * x).mean(), _normal((20, 30)), "rows"),
    "mean along the middle": Case(lambda x: x.exp().mean(1), _normal((4, 33, 5)), "rows"),
    "cross entropy": Case(
        lambda z, t: F.cross_entropy(z, t, reduction="none"),
        lambda: [torch.randn(9, 50), torch.tensor([1, 2, -100, 4, 49, 0, 3, 3, 7])],
        "rows",
    ),
    "long rows": Case(lambda x: torch.log_softmax(x, -1), _normal((16, 20000)), "looped rows", 2e-5),
    "long rows of a norm": Case(
        lambda x, w: aten.native_layer_norm(x, [17000], w, None, 1e-5)[0],
        _normal((16, 17000), (17000,)),
        "looped rows",
        2e-5,
    ),
    "layer norm backward in one pass": Case(
        lambda g, x, m, r, w, b: aten.native_layer_norm_backward(g, x, [70], m, r, w, b, [True, True, True]),
        _norm_statistics,
        "columns",
        1e-5,
    ),
    "sum over rows": Case(lambda x: (x.sum(0), (x * x).sum(0)), _normal((300, 70)), "columns", 1e-5),
    "sum over all but channels": Case(
        lambda x: (F.relu(x), F.relu(x).sum((0, 2, 3))), _normal((4, 6, 5, 5)), "rows", 1e-5
    ),
}
"""By what they show."""


def random_case(seed: int) -> tuple[Callable[..., Any], list[torch.Tensor]]:
    """A random function of 1 to 24 operators, and inputs for it."""
    r = random.Random(seed)
    rows, columns = r.choice([1, 3, 8, 17]), r.choice([2, 4, 12, 33, 64])
    shapes = [(rows, columns), (rows, columns), (columns,), (rows, 1), ()]
    dtypes = [torch.float32, torch.float32, torch.float16, torch.int64, torch.bool]
    picked = [(r.choice(shapes), r.choice(dtypes)) for _ in range(r.randint(1, 4))]
    picked.append(((rows, columns), torch.float32))
    plan = [(r.choice(_STEPS), r.random(), r.random(), r.random()) for _ in range(r.randint(1, 24))]
    torch.manual_seed(seed)
    inputs = [_random_tensor(shape, dtype) for shape, dtype in picked]

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = [t * 1 if t.dtype != torch.bool else ~t for t in tensors]
        for step, a, b, c in plan:
            values.append(step(values[int(a * len(values))], values[int(b * len(values))], c))
        full = [v for v in values[len(tensors) :] if v.shape == (rows, columns)]
        return (full[-1] if full else values[-1] * 1, *(values[-1:] if values[-1].dim() else ()))

    return function, inputs


def _random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.rand(shape) > 0.5
    if dtype == torch.int64:
        return torch.randint(-4, 5, shape)
    return torch.randn(shape).to(dtype)


def _floating(x: torch.Tensor) -> torch.Tensor:
    return x if x.is_floating_point() else x.float()


_Step = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]

_STEPS: list[_Step] = [
    lambda a, b, c: _floating(a) + b,
    lambda a, b, c: _floating(a) - b * c,
    lambda a, b, c: _floating(a) * b,
    lambda a, b, c: _floating(a) / (_floating(b).abs() + 1),
    lambda a, b, c: torch.sigmoid(_floating(a)),
    lambda a, b, c: torch.tanh(_floating(a)),
    lambda a, b, c: F.gelu(_floating(a)),
    lambda a, b, c: torch.exp(-_floating(a).abs()),
    lambda a, b, c: _floating(a).clamp(-c, 1.0),
    lambda a, b, c: torch.where(a > b, _floating(a), _floating(b)),
    lambda a, b, c: torch.maximum(_floating(a), _floating(b)),
    lambda a, b, c: (a > c).to(torch.float32),
    lambda a, b, c: a.to(torch.float16),
    lambda a, b, c: F.relu(_floating(a)) if c < 0.5 else _floating(a).abs().sqrt(),
    lambda a, b, c: _floating(a).sum(-1, keepdim=True) if a.dim() == 2 else _floating(a),
    lambda a, b, c: torch.softmax(_floating(a), -1) if a.dim() == 2 else _floating(a),
    lambda a, b, c: a.flip(0) if a.dim() else a * 1,
    lambda a, b, c: torch.cat((a[:, 1:], a[:, :1]), 1) if a.dim() == 2 else a * 1,
]


def compared(function: Callable[..., Any], inputs: Sequence[torch.Tensor], folder: Path) -> tuple[float, str]:
    """(largest error of a kernel relative to the largest element of eager operators, shape of the kernel)."""
    kernel, order = kernel_for(function, inputs)
    taken = [inputs[i] for i in order]
    made = import_kernel(kernel.file, folder).launch(*taken)
    expected = function(*inputs)
    wanted = list(expected) if isinstance(expected, (tuple, list)) else [expected]
    worst = 0.0
    for value, reference in zip(made, wanted, strict=True):
        layout = (value.shape, value.dtype, value.stride())
        assert layout == (reference.shape, reference.dtype, reference.stride()), (layout, reference.stride())
        worst = max(worst, distance(value, reference))
    return worst, kernel.file.text.loops.shape


def distance(value: torch.Tensor, reference: torch.Tensor) -> float:
    a, b = value.double(), reference.double()
    same = (a == b) | (a.isnan() & b.isnan())
    error = torch.where(same, torch.zeros_like(a), (a - b).abs())
    finite = b[b.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 1.0
    return float(error.nan_to_num(nan=float("inf")).max()) / (scale or 1.0)


def main(first: int, last: int) -> None:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for title, case in CASES.items():
            torch.manual_seed(0)
            found[title] = _outcome(case.function, case.inputs(), folder)
        for seed in range(first, last):
            found[f"random {seed}"] = _outcome(*random_case(seed), folder)
    print(json.dumps(found))


def _outcome(function: Callable[..., Any], inputs: Sequence[torch.Tensor], folder: Path) -> dict[str, Any]:
    try:
        error, shape = compared(function, inputs, folder)
    except NotFusible as refused:
        return {"refused": str(refused.reason)}
    except Exception as failed:
        return {"failed": f"{type(failed).__name__}: {failed}"[:400]}
    return {"error": error, "shape": shape}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
