"""How the kernel of a product is started: its constants, its grid and the lines of its launcher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from graphopt_kernels.emit.launch import Launch
from graphopt_kernels.emit.product_build import BuiltProduct
from graphopt_kernels.emit.product_loops import ProductLoops, Tiling
from graphopt_kernels.emit.source import KernelText

__all__ = ["launcher_lines", "product_launch"]


def product_launch(built: BuiltProduct, loops: ProductLoops, tiling: Tiling) -> Launch:
    """The launch of a product's kernel; of one whose sums are in parts that of the first of its two."""
    inner = loops.sizes[-1]
    constants: dict[str, int | str] = {}
    if tiling.kind != "row":
        constants["BLOCK_M"] = tiling.rows
    if tiling.kind != "column":
        constants["BLOCK_N"] = tiling.columns
    constants["BLOCK_K"] = tiling.inner
    if tiling.kind == "tiles" and loops.sizes[1] > tiling.rows:
        constants["GROUP_M"] = tiling.tall
    if tiling.parts > 1:
        constants["PARTS"] = tiling.parts
    if tiling.kind == "tiles" and built.dtype == torch.float32:
        constants["PRECISION"] = "ieee"
    grid = (tiling.programs(loops) * tiling.parts,)
    steps = -(-inner // tiling.inner)
    numbers = {"steps": -(-steps // tiling.parts)} if tiling.parts > 1 else {"inner": inner}
    return Launch(constants, tiling.warps, grid, tiling.stages, numbers)


def launcher_lines(
    names: Sequence[str],
    results: Sequence[str],
    built: BuiltProduct,
    text: KernelText,
    loops: ProductLoops,
    tiling: Tiling,
    launch: Launch,
) -> list[str]:
    """The body of ``launch()`` after its results are there."""
    lines = []
    values = {name: repr(value) for name, value in launch.constants.items()}
    if "PRECISION" in values:
        lines.append('allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"')
        values["PRECISION"] = '"tf32" if allowed else "ieee"'
    numbers = [str(value) for value in launch.numbers.values()]
    taken = _taken(names, text.function, text.name)
    options = {"num_warps": str(launch.warps)}
    staged = options | {"num_stages": str(launch.stages)}
    if text.finish is None:
        return lines + _call(text.name, launch.grid[0], [*taken, *results, *numbers], values | staged)
    batch, rows, columns, _ = loops.sizes
    held = "int32" if built.dot.dtype == torch.int32 else "float32"
    size = f"({tiling.parts}, {batch * rows * columns})"
    lines.append(f"partial = torch.empty({size}, dtype=torch.{held}, device={names[0]}.device)")
    lines += _call(text.name, launch.grid[0], [*taken, "partial", *numbers], values | staged)
    left = {name: value for name, value in values.items() if name not in ("BLOCK_K", "PRECISION")}
    pointers = ["partial", *_taken(names, text.function, text.finish), *results]
    return lines + _call(text.finish, launch.grid[0] // tiling.parts, pointers, left | options)


def _call(name: str, programs: int, arguments: Sequence[str], options: Mapping[str, str]) -> list[str]:
    """The lines that start a kernel."""
    named = [f"{key}={value}" for key, value in options.items()]
    return [
        f"{name}[({programs},)](",
        f"    {', '.join(arguments)},",
        f"    {', '.join(named)},",
        ")",
    ]


def _taken(names: Sequence[str], source: str, function: str) -> list[str]:
    """The inputs that a kernel takes, in order."""
    head = source.split(f"def {function}(", 1)[1].split("):", 1)[0]
    parameters = {line.strip().rstrip(",") for line in head.splitlines()}
    return [name for name in names if f"{name}_ptr" in parameters]
