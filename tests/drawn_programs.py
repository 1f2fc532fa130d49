"""Random programs of tensors as Python text, run by emitted kernels and by separate operators.

A program has 1 to 40 lines: pointwise operators, broadcasts, reductions, views, lookups, conversions, and
products of matrices with what comes before and after them. Its lines are drawn one after the other and run
at once, so that values stay finite and shapes are known. What is compared never decides between two values
(no ``>`` of computed ones): rounding shows as a small error, a wrong operator as one of an element's size.

Run as a script it runs programs of the seeds [FIRST, LAST) in Triton's interpreter and prints what it found
as JSON. TRITON_INTERPRET has to be set before triton is imported, hence a process.
"""

from __future__ import annotations

import json
import math
import operator
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt_kernels.emit.groups import grouped
from graphopt_kernels.emit.machine_code import import_kernel
from graphopt_kernels.emit.order import Step, is_free, ordered, root

Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Drawn:
    """``source`` defines ``function`` of the tensors that ``made`` makes, an expression for each."""

    seed: int
    made: tuple[tuple[str, str], ...]
    source: str

    def inputs(self) -> list[torch.Tensor]:
        torch.manual_seed(self.seed)
        return [eval(text, {"torch": torch}) for _, text in self.made]

    def function(self) -> Callable[..., Any]:
        space: dict[str, Any] = {"torch": torch, "F": torch.nn.functional}
        exec(self.source, space)
        made: Callable[..., Any] = space["function"]
        return made

    def script(self) -> str:
        """A file that runs the program."""
        lines = ["import torch", "import torch.nn.functional as F", "", "", self.source, ""]
        lines.append(f"torch.manual_seed({self.seed})")
        lines += [f"{name} = {text}" for name, text in self.made]
        return "\n".join([*lines, f"print(function({', '.join(name for name, _ in self.made)}))"])


@dataclass(frozen=True)
class _Named:
    name: str
    value: torch.Tensor


class _Drawer:
    def __init__(self, seed: int) -> None:
        self.r = random.Random(seed)
        self.seed = seed
        self.rows = self.r.choice([1, 3, 8, 16, 17])
        self.columns = self.r.choice([4, 12, 16, 34, 64])
        self.made: list[tuple[str, str]] = []
        self.lines: list[str] = []
        self.pool: list[_Named] = []
        self.weights: list[str] = []

    def drawn(self) -> Drawn:
        rows, columns = self.rows, self.columns
        self._input("x", f"torch.randn({rows}, {columns})")
        self._input("y", f"torch.randn({rows}, {columns})" + self.r.choice(["", ".half()"]))
        self._input("t", f"torch.randn({columns}, {rows}).t()")
        self._input("v", f"torch.randn({columns})" + self.r.choice(["", ".half()"]))
        self._input("u", f"torch.randn({rows}, 1)")
        self._input("s", "torch.randn(())")
        self._input("m", f"torch.rand({rows}, {columns}) > 0.5", pooled=False)
        self._input("i", f"torch.randint(0, {rows}, ({rows},))", pooled=False)
        self._input("j", f"torch.randint(0, {columns}, ({rows}, {columns}))", pooled=False)
        self._input("q", f"torch.randint(-127, 128, ({columns}, {columns}), dtype=torch.int8)", pooled=False)
        for name, other in (("w", columns), ("z", self.r.choice([8, 20, 32]))):
            for dtype in ("", ".half()"):
                title = f"{name}{'h' if dtype else ''}"
                text = f"(torch.randn({other}, {columns}) / {columns**0.5:.3f}){dtype}"
                self._input(title, text, pooled=False)
        for _ in range(self.r.randint(1, 40)):
            self._step()
        results = self._results()
        used = [(n, text) for n, text in self.made if any(_reads(line, n) for line in self.lines)]
        body = "\n".join(f"    {line}" for line in [*self.lines, f"return ({', '.join(results)},)"])
        source = f"def function({', '.join(n for n, _ in used)}):\n{body}\n"
        return Drawn(self.seed, tuple(used), source)

    def _results(self) -> list[str]:
        made = [n.name for n in self.pool if n.name.startswith("v_")]
        if not made:
            self.lines.append("v_0 = x + y")
            made = ["v_0"]
        read = [n for n in made if any(_reads(line.split(" = ")[1], n) for line in self.lines)]
        ends = [n for n in made if n not in read]
        # What nothing reads, and now and then a value that others read too.
        return ends[-3:] + ([self.r.choice(read)] if read and self.r.random() < 0.3 else [])

    def _input(self, name: str, text: str, *, pooled: bool = True) -> None:
        self.made.append((name, text))
        # Drawn once more with the seed when the program is run: here shapes and sizes matter alone.
        value = eval(text, {"torch": torch})
        self.known = getattr(self, "known", {}) | {name: value}
        if pooled:
            self.pool.append(_Named(name, value))

    def _step(self) -> None:
        step = self.r.choices([s for s, _ in _STEPS], [weight for _, weight in _STEPS])[0]
        text = step(self)
        if text is None:
            return
        name = f"v_{len(self.lines)}"
        space = {"torch": torch, "F": torch.nn.functional, **self.known}
        value = eval(text, space)
        if not bool(value.isfinite().all()) or float(value.abs().max()) > 200:
            return
        self.lines.append(f"{name} = {text}")
        self.known[name] = value
        self.pool.append(_Named(name, value))

    # --- what steps pick ----------------------------------------------------------------------

    def any(self) -> str:
        """A value, late ones more often."""
        late = self.pool[-4:] if self.r.random() < 0.6 else self.pool
        return self.r.choice(late).name

    def whole(self) -> str:
        """A value of the shape of most."""
        found = [n.name for n in self.pool if n.value.shape == (self.rows, self.columns)]
        late = found[-4:] if self.r.random() < 0.6 else found
        return self.r.choice(late)

    def fitting(self, name: str) -> str:
        """A value that goes with another."""
        shape = self.known[name].shape
        found = []
        for other in self.pool:
            try:
                torch.broadcast_shapes(shape, other.value.shape)
            except RuntimeError:
                continue
            if other.value.numel() <= max(self.known[name].numel(), self.rows * self.columns):
                found.append(other.name)
        return self.r.choice(found[-6:] if self.r.random() < 0.6 else found)


def _reads(line: str, name: str) -> bool:
    word = "".join(c if c.isalnum() or c == "_" else " " for c in line)
    return name in word.split()


# --- the lines ------------------------------------------------------------------------------

_Step = Callable[[_Drawer], "str | None"]

_UNARY = (
    "torch.sigmoid({a})",
    "torch.tanh({a})",
    "F.gelu({a})",
    "F.gelu({a}, approximate='tanh')",
    "F.silu({a})",
    "F.relu({a})",
    "{a}.abs().sqrt()",
    "torch.exp(-{a}.abs())",
    "torch.rsqrt({a}.abs() + 1)",
    "torch.log1p({a}.abs())",
    "torch.sin({a})",
    "{a}.clamp(-1.5, 1.0)",
    "-{a} * 0.5",
    "{a} * torch.tanh({a})",
)

_BINARY = (
    "{a} + {b}",
    "{a} - {b} * 0.25",
    "{a} * torch.tanh({b})",
    "{a} / ({b}.abs() + 1)",
    "torch.maximum({a}, {b})",
    "torch.minimum({a}, {b})",
)

_ROWS = (
    "{a}.sum(-1, keepdim=True) * 0.1",
    "{a}.mean(-1, keepdim=True)",
    "{a}.amax(-1, keepdim=True)",
    "torch.softmax({a}, -1)",
    "F.layer_norm({a}, ({c},))",
    "{a} * torch.rsqrt({a}.square().mean(-1, keepdim=True) + 0.1)",
    "{a}.float().var(-1, keepdim=True, unbiased=False)",
    "{a}.float().mean(0)",
)

_VIEWS = (
    "{a}.flip(0)",
    "{a}.t().contiguous().t()",
    "{a}.view({r}, 2, {h}).transpose(1, 2).reshape({r}, {c})",
    "torch.cat((-{a}[:, {h}:], {a}[:, :{h}]), 1)",
    "F.pad({a}[:, 1:], (1, 0))",
    "{a}[:, :1].expand({r}, {c})",
)

_LOOKUPS = ("{a}[i]", "torch.gather({a}, 1, j)", "F.embedding(i, {a})", "torch.where(m, {a}, {b})")


def _unary(d: _Drawer) -> str:
    return d.r.choice(_UNARY).format(a=d.any())


def _binary(d: _Drawer) -> str:
    a = d.any()
    return d.r.choice(_BINARY).format(a=a, b=d.fitting(a))


def _over_rows(d: _Drawer) -> str:
    return d.r.choice(_ROWS).format(a=d.whole(), c=d.columns)


def _viewed(d: _Drawer) -> str:
    return d.r.choice(_VIEWS).format(a=d.whole(), r=d.rows, c=d.columns, h=d.columns // 2)


def _looked_up(d: _Drawer) -> str:
    return d.r.choice(_LOOKUPS).format(a=d.whole(), b=d.whole())


def _converted(d: _Drawer) -> str:
    return f"{d.any()}.to({d.r.choice(('torch.float16', 'torch.float32'))})"


def _product(d: _Drawer) -> str:
    a = d.whole()
    half = d.r.random() < 0.5
    dtype, h = ("torch.float16", "h") if half else ("torch.float32", "")
    weight = d.r.choice((f"w{h}", f"w{h}", f"z{h}"))
    kinds = [f"F.linear({a}.to({dtype}), {weight})"]
    if weight[0] == "w":
        kinds += [
            f"{a}.to({dtype}) @ {weight}",
            f"torch.addmm(v.to({dtype}), {a}.to({dtype}), {weight})",
            f"F.gelu(F.linear({a}.to({dtype}), {weight}, v.to({dtype})))",
            f"F.linear({a}.to({dtype}), {weight}) + {d.whole()}",
            f"F.silu({d.whole()}) * F.linear({a}.to({dtype}), {weight})",
            f"{a}.to({dtype}) @ (q.to({dtype}) * 0.002).t()",
        ]
    return d.r.choice(kinds)


def _batched(d: _Drawer) -> str | None:
    if d.columns % 4:
        return None
    a, b = (
        f"{x}.float().view({d.rows}, 2, {d.columns // 2}).transpose(0, 1)" for x in (d.whole(), d.whole())
    )
    scores = f"torch.bmm({a}, ({b}).transpose(1, 2)) * {1 / math.sqrt(d.columns):.4f}"
    return f"torch.bmm({scores}, {b}).transpose(0, 1).reshape({d.rows}, {d.columns}) * 0.1"


_STEPS: tuple[tuple[_Step, int], ...] = (
    (_unary, 6),
    (_binary, 6),
    (_over_rows, 2),
    (_viewed, 2),
    (_looked_up, 1),
    (_converted, 1),
    (_product, 3),
    (_batched, 1),
)


def drawn(seed: int) -> Drawn:
    """The program of a seed."""
    torch.manual_seed(seed)
    return _Drawer(seed).drawn()


# --- running them -----------------------------------------------------------------------------


class _Wide(torch.overrides.TorchFunctionMode):
    """Conversions to narrower floats change nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.to, torch.Tensor.half, torch.Tensor.float):
            return args[0] if args[0].is_floating_point() else args[0].double()
        return func(*args, **(kwargs or {}))


def exact(program: Drawn) -> list[torch.Tensor]:
    """The results in float64."""
    wide = [x.double() if x.is_floating_point() else x for x in program.inputs()]
    with _Wide():
        return list(program.function()(*wide))


def traced(program: Drawn) -> fx.Graph:
    """The operators of a program."""
    with FakeTensorMode():
        fakes = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) for x in program.inputs()]
        return make_fx(program.function(), tracing_mode="real")(*fakes).graph


def by_kernels(
    graph: fx.Graph, inputs: Tensors, how: str, folder: Path
) -> tuple[list[torch.Tensor], int, int]:
    """(results, kernels, products in kernels) of a program whose groups run as ``how``: ``"launch"`` or
    ``"reference"``; what is in no group runs as an operator of ATen."""
    found = grouped(graph)
    kernels = {kernel.nodes: kernel for kernel in found.kernels}
    (output,) = [node for node in graph.nodes if node.op == "output"]
    results: list[fx.Node] = list(output.args[0])
    calls = [node for node in graph.nodes if node.op == "call_function"]
    groups = [Step(k.nodes, tuple(map(root, k.inputs)), k.outputs) for k in found.kernels]
    known = dict(zip([n for n in graph.nodes if n.op == "placeholder"], inputs, strict=True))

    def value(node: fx.Node) -> Any:
        if node not in known:
            assert node.op == "call_function" and (is_free(node) or node.target is operator.getitem), node
            known[node] = called(node)
        return known[node]

    def called(node: fx.Node) -> Any:
        return node.target(*fx.node.map_arg(node.args, value), **fx.node.map_arg(node.kwargs, value))  # type: ignore[operator]

    for step in ordered(calls, groups, list(dict.fromkeys(results))):
        kernel = kernels.get(step.nodes)
        if kernel is None:
            for node in step.nodes:
                known[node] = called(node)
            continue
        run = getattr(import_kernel(kernel.file, folder), how)
        for node, made in zip(kernel.outputs, run(*[value(n) for n in kernel.inputs]), strict=True):
            assert _layout(made) == _layout(node.meta["val"]), f"{kernel.file.name} gives {_layout(made)}"
            known[node] = made
    return [value(node) for node in results], len(found.kernels), len(found.taken)


def _layout(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]:
    """What other operators see; the stride of a dimension of one element says nothing."""
    shape = tuple(tensor.shape)
    return tensor.dtype, shape, tuple(s for s, n in zip(tensor.stride(), shape, strict=True) if n > 1)


def distances(made: Tensors, right: Tensors) -> float:
    """The largest error, each relative to the largest element of its result."""
    worst = 0.0
    for value, reference in zip(made, right, strict=True):
        a, b = value.double(), reference.double()
        error = float((a - b).abs().nan_to_num(nan=math.inf).max())
        worst = max(worst, error / (float(b.abs().max()) or 1.0))
    return worst


def outcome(seed: int, folder: Path) -> dict[str, Any]:
    """How far from float64 a program is by operators, by references of kernels and by kernels."""
    program = drawn(seed)
    inputs = program.inputs()
    try:
        right = exact(program)
        graph = traced(program)
        by_reference, *_ = by_kernels(graph, inputs, "reference", folder)
        by_launch, kernels, products = by_kernels(graph, inputs, "launch", folder)
        return {
            "eager": distances(program.function()(*inputs), right),
            "reference": distances(by_reference, right),
            "launch": distances(by_launch, right),
            "half": "half" in str(program.made) or "float16" in program.source,
            "kernels": kernels,
            "products": products,
        }
    except Exception as failed:
        return {"failed": f"{type(failed).__name__}: {failed}"[:600]}


def main(first: int, last: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({seed: outcome(seed, Path(folder)) for seed in range(first, last)}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
