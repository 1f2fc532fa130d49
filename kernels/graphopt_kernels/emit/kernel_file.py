"""A kernel as a Python file of its own: the Triton function, its launcher and what it computes in ATen."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.fx as fx

from graphopt.program import layer_of
from graphopt_kernels.emit.aten_code import identifier, statements
from graphopt_kernels.emit.attention_file import BuiltAttention, attention_text
from graphopt_kernels.emit.attentions import attentions_of
from graphopt_kernels.emit.build import Built, NotFusible, build
from graphopt_kernels.emit.expand import expanded, group_graph
from graphopt_kernels.emit.launch import Launch
from graphopt_kernels.emit.loops import Loops, power_of_two
from graphopt_kernels.emit.pointwise import HELPERS
from graphopt_kernels.emit.product_build import build_product
from graphopt_kernels.emit.product_file import launcher_lines, product_launch
from graphopt_kernels.emit.product_loops import Tiling, product_loops, tiling_of
from graphopt_kernels.emit.product_source import product_text
from graphopt_kernels.emit.products import products_of
from graphopt_kernels.emit.source import KernelText, kernel_text

__all__ = ["Kernel", "KernelFile", "kernel_of"]

_PROGRAMS = 528
"""Programs of a kernel that adds up over rows: four for each of the 132 processors of an H100 or H200. Fixed,
so that sums do not depend on the device."""


@dataclass(frozen=True)
class KernelFile:
    """``source`` is the text of the file, ``name`` that of the file without ``.py``: what the kernel does and
    a hash of the source. ``inputs``: what its inputs are called there. ``bytes``: what it reads and writes,
    each tensor once. ``tiling``: of a product of matrices."""

    name: str
    source: str
    inputs: tuple[str, ...]
    built: Built
    text: KernelText
    launch: Launch
    bytes: int
    tiling: Tiling | None = None

    @property
    def attends(self) -> bool:
        """Whether it is attention."""
        return isinstance(self.built, BuiltAttention)


@dataclass(frozen=True)
class Kernel:
    """A group of nodes in one kernel. ``inputs`` are nodes outside of it in the order of the launcher's
    parameters, ``outputs`` nodes of it in the order of its results."""

    file: KernelFile
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Layers of the model that the nodes come from."""
        return tuple(dict.fromkeys(layer for node in self.nodes if (layer := layer_of(node))))


def kernel_of(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node], tiling: Tiling | None = None) -> Kernel:
    """The kernel that computes ``outputs`` of a group of nodes, in order. ``tiling``: that of its product of
    matrices, in place of the one that its sizes suggest. Raises ``NotFusible``."""
    graph, inputs = group_graph(nodes, outputs)
    file = _file_of(graph, tiling)
    return Kernel(file, tuple(nodes), tuple(inputs), tuple(outputs))


def _file_of(graph: fx.Graph, wanted: Tiling | None = None) -> KernelFile:
    if attentions_of(graph):
        return _attention_file(graph)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    calls = [node for node in graph.nodes if node.op == "call_function"]
    (output,) = [node for node in graph.nodes if node.op == "output"]
    outputs: list[fx.Node] = list(output.args[0])
    names = [identifier(node.name) for node in inputs]
    results = [f"out{number}" for number in range(len(outputs))]
    title = _title(calls)
    pointers = [f"{n}_ptr" for n in names], [f"{n}_ptr" for n in results]
    whole = expanded(graph)
    built: Built
    tiling = None
    if products_of(whole):
        built = product = build_product(whole)
        loops = product_loops(product)
        tiling = wanted or tiling_of(product, loops)
        text = product_text(product, tiling, title, *pointers)
        launch = product_launch(product, loops, tiling)
        started = launcher_lines(names, results, product, text, loops, tiling, launch)
        lines = _launcher(names, results, built, text, launch, started)
    else:
        built = build(whole)
        text = kernel_text(built, title, *pointers)
        launch = _launch(text.loops)
        for number in text.partial:
            if not built.outputs[number].is_contiguous():
                raise NotFusible.because(f"{outputs[number].name} is a sum over rows and not contiguous")
        lines = _launcher(names, results, built, text, launch, [_started(names, results, text, launch)])
    reference = _reference(calls, inputs, names, outputs)
    source = _body(calls, names, results, built, text, lines, reference)
    return _hashed(title, source, names, built, text, launch, tiling)


def _attention_file(graph: fx.Graph) -> KernelFile:
    """The file of attention, which has several kernels or takes no part in loops of others."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    made = attention_text(graph)
    built, names = made.built, made.built.names
    results = [f"out{number}" for number in range(len(built.outputs))]
    text = KernelText(made.kernels[-1], made.functions, made.helpers, Loops("attention", (), ()))
    lines = [f"def launch({', '.join(names)}):", '    """Run the kernels on tensors of the layouts above."""']
    lines += [f"    {line}" for line in made.launcher]
    reference = list(made.reference)
    above = [
        "# The kernels of graphopt::attention for this call: what they are told is written into them.",
        "",
        "",
    ]
    source = _body(calls, names, results, built, text, lines, reference, above)
    return _hashed(_title([built.attention.node]), source, names, built, text, made.launch, None)


def _hashed(
    title: str,
    source: str,
    names: Sequence[str],
    built: Built,
    text: KernelText,
    launch: Launch,
    tiling: Tiling | None,
) -> KernelFile:
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    bytes_moved = sum(_bytes(tensor) for tensor in (*built.inputs, *built.outputs))
    return KernelFile(f"{title}_{digest}", source, tuple(names), built, text, launch, bytes_moved, tiling)


def _title(nodes: Sequence[fx.Node]) -> str:
    """Up to four different operators, in order."""
    words = dict.fromkeys(
        str(getattr(node.target, "_opname", "")).strip("_") for node in nodes if node.op == "call_function"
    )
    plain = [word for word in words if word and word not in ("view", "getitem", "expand", "t", "to_copy")]
    return "_".join(plain[:4]) or "copy"


def _bytes(tensor: torch.Tensor) -> int:
    # An expanded tensor is read once where it lies.
    distinct = prod(n for n, s in zip(tensor.shape, tensor.stride(), strict=True) if s)
    return distinct * tensor.dtype.itemsize


def _launch(loops: Loops) -> Launch:
    rows, columns = loops.rows, loops.columns
    if loops.shape == "pointwise":
        block = min(1024, max(64, power_of_two(rows)))
        return Launch({"XBLOCK": block}, 4, (-(-rows // block),))
    if loops.shape == "looped rows":
        return Launch(_blocks(1, 4096), 8, (rows,))
    if loops.shape == "rows":
        width = power_of_two(columns)
        block = max(1, min(power_of_two(rows), 1024 // width))
        return Launch(_blocks(block, width), _warps(block * width), (-(-rows // block),))
    width = power_of_two(columns)
    if loops.whole_rows:
        block = max(1, min(power_of_two(rows), 1024 // width))
        programs = min(_PROGRAMS, -(-rows // block))
        return Launch(_blocks(block, width), _warps(block * width), (programs, 1))
    width = min(width, 128)
    block = min(power_of_two(rows), 32)
    across = -(-columns // width)
    programs = max(1, min(-(-_PROGRAMS // across), -(-rows // block)))
    return Launch(_blocks(block, width), 4, (programs, across))


def _blocks(rows: int, columns: int) -> dict[str, int]:
    return {"XBLOCK": rows, "RBLOCK": columns}


def _warps(elements: int) -> int:
    return max(1, min(16, power_of_two(elements) // 512))


def _body(
    nodes: Sequence[fx.Node],
    names: Sequence[str],
    results: Sequence[str],
    built: Built,
    text: KernelText,
    launcher: Sequence[str],
    reference: Sequence[str],
    above: Sequence[str] = (),
) -> str:
    lines = [f'"""{_summary(nodes)}', ""]
    lines += [f"reads   {_described(name, t)}" for name, t in zip(names, built.inputs, strict=True)]
    lines += [f"writes  {_described(name, t)}" for name, t in zip(results, built.outputs, strict=True)]
    lines += ['"""', "", "from __future__ import annotations", ""]
    if any("math." in line for line in reference):
        lines.append("import math")
        lines.append("")
    lines += ["import torch", "", "try:"]
    lines += [
        "    import triton",
        "    import triton.language as tl",
        "except ImportError:  # reference() runs",
    ]
    lines += [
        "    triton = None",
        "",
        "jit = triton.jit if triton is not None else lambda function: function",
        "",
    ]
    for helper in text.helpers:
        lines += ["", HELPERS[helper].rstrip(), ""]
    lines += ["", *above, text.function.rstrip(), "", ""]
    lines += [*launcher, "", ""]
    lines += reference
    return "\n".join(lines) + "\n"


def _summary(nodes: Sequence[fx.Node]) -> str:
    words = [str(getattr(node.target, "_opname", "")) for node in nodes]
    plain = [word for word in words if word]
    return f"{', '.join(plain)} in one kernel."


def _described(name: str, tensor: torch.Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = " x ".join(str(n) for n in tensor.shape) or "scalar"
    layout = "" if tensor.is_contiguous() else f", strides {tuple(tensor.stride())}"
    return f"{name}: {dtype}, {shape}{layout}"


def _launcher(
    names: Sequence[str],
    results: Sequence[str],
    built: Built,
    text: KernelText,
    launch: Launch,
    started: Sequence[str],
) -> list[str]:
    # Without inputs nothing but the caller knows on which device.
    lines = [f"def launch({', '.join(names) or 'device'}):"]
    lines += ['    """Run the kernel on tensors of the layouts above."""']
    device = f"{names[0]}.device" if names else "device"
    made = []
    for number, (name, tensor) in enumerate(zip(results, built.outputs, strict=True)):
        shape, stride = tuple(tensor.shape), tuple(tensor.stride())
        if number in text.partial:
            held = "float64" if tensor.dtype == torch.float64 else "float32"
            if not tensor.dtype.is_floating_point:
                held = "int64"
            size = f"({launch.grid[0]}, {text.loops.columns})"
            lines.append(f"    {name} = torch.empty({size}, dtype=torch.{held}, device={device})")
            made.append(f"{name}.sum(0).to({tensor.dtype}).view({shape})")
        else:
            call = f"torch.empty_strided({shape}, {stride}, dtype={tensor.dtype}, device={device})"
            lines.append(f"    {name} = {call}")
            made.append(name)
    lines += [f"    {line}" for line in started]
    lines.append(f"    return ({', '.join(made)}{',' if len(made) == 1 else ''})")
    return lines


def _started(names: Sequence[str], results: Sequence[str], text: KernelText, launch: Launch) -> str:
    """The line that starts a kernel."""
    grid = ", ".join(str(n) for n in launch.grid) + ("," if len(launch.grid) == 1 else "")
    blocks = ", ".join(f"{name}={value}" for name, value in launch.constants.items())
    arguments = ", ".join([*names, *results])
    return f"{text.name}[({grid})]({arguments}, {blocks}, num_warps={launch.warps})"


def _reference(
    nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], names: Sequence[str], outputs: Sequence[fx.Node]
) -> list[str]:
    known = dict(zip(inputs, names, strict=True))
    body = statements(nodes, known, outputs)
    head = [f"def reference({', '.join(names) or 'device'}):", '    """The same by separate operators."""']
    if names and any("device=device" in line for line in body):
        head.append(f"    device = {names[0]}.device")
    return head + [f"    {line}" for line in body]
