"""A bias of attention that its kernels compute instead of loading: the text of ``bias_of_tile`` for it.

    mask = where(j - i > 0, -inf, 0) + padding[b, None, None, j]
        -> the kernels load ``padding`` alone, and make the rest of where a score stands

The element of the bias at (batch, head, row, column) is found backwards like what is stored in other kernels
(``build``). Rows and columns are the caller's tiles, which lie either way; batch and head come as one number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

import torch
import torch.fx as fx

from graphopt_kernels.emit.build import Built, NotFusible, build
from graphopt_kernels.emit.expand import expanded
from graphopt_kernels.emit.index import Affine, Axis
from graphopt_kernels.emit.loops import Loop, Loops
from graphopt_kernels.emit.source import TRITON, Writer
from graphopt_kernels.emit.tile import Condition, Value

__all__ = ["BIAS", "BiasText", "bias_text"]

BIAS = "bias_of_tile"
"""The function of ``graphopt_kernels.attention_triton`` that is replaced."""

_DIMS = ("batch", "head", "row", "column")


class BiasText(Writer):
    """``source`` of the function, ``pointers`` that it reads, ``helpers`` that it calls."""

    loops: Loops

    def __init__(self, built: Built, heads: int, inputs: Sequence[str]) -> None:
        self._dims = _axes_of(built)
        super().__init__(built, BIAS, inputs, ())
        self._dtype = built.outputs[0].dtype
        self._line(f"batch = bias // {heads}")
        self._line(f"head = bias % {heads}")
        if self._wide:
            self._line("row = row.to(tl.int64)")
            self._line("column = column.to(tl.int64)")
        for dim, axes in self._dims.items():
            if len(axes) > 1:
                self._spread([loop for loop in self.loops.outer if loop.innermost in axes], dim)
        self._values(built.values)
        (store,) = built.stores
        text = self._filled(store.value) if store.value.kind == "constant" else self._name_of(store.value)
        if self._dtype in (torch.float16, torch.bfloat16):
            text = f"({text}).to({TRITON[self._dtype]})"
        self._line(f"return {text}")
        read = {value.payload[0] for value in built.values if value.kind == "load"}
        self.pointers = tuple(name for number, name in enumerate(inputs) if number in read)
        self.helpers = tuple(self._helpers)
        self.values = built.values
        head = f"def {BIAS}(bias, row, column, stride_row, stride_column, rows, columns, BY_ROW):"
        said = (
            '    """The bias of queries ``row`` and keys ``column``; ``bias`` counts heads over batches."""'
        )
        self.source = "\n".join([head, said, *self._lines]) + "\n"

    def _loops_of(self, built: Built) -> Loops:
        loops = []
        for dim, axes in self._dims.items():
            names = [dim] if len(axes) == 1 else [f"{dim}{number}" for number in range(len(axes))]
            loops += [Loop(name, (axis,)) for name, axis in zip(names, axes, strict=True)]
        return Loops("attention", tuple(loops), ())

    def _masks(self, conditions: Sequence[Condition], axes: Iterable[object]) -> list[str]:
        across = set(axes)
        masks = [f"({dim} < {dim}s)" for dim in ("row", "column") if across & set(self._dims.get(dim, ()))]
        return masks + [self._within(condition) for condition in conditions]

    def _spanning(self, position: Affine, axes: Iterable[object]) -> str:
        text = self._position(position)
        reached = set(position.axes)
        for atom, _ in position.terms:
            if isinstance(atom, Value):
                reached |= atom.axes
        for dim in ("row", "column"):
            own = set(self._dims.get(dim, ()))
            if own & set(axes) and not own & reached:
                text += f" + 0 * {dim}"
        return text


def bias_text(graph: fx.Graph, heads: int, inputs: Sequence[str]) -> BiasText:
    """The function for a ``graph`` that gives the bias out of its placeholders, which are called ``inputs``.
    Raises ``NotFusible``."""
    built = build(expanded(graph))
    if any(value.kind in ("row", "column") for value in built.values):
        raise NotFusible.because("a reduction beside attention")
    for tensor in (*built.inputs, *built.outputs):
        if tensor.dtype not in TRITON:
            raise NotFusible.because(f"Triton has no {tensor.dtype}")
    return BiasText(built, heads, inputs)


def _axes_of(built: Built) -> dict[str, tuple[Axis, ...]]:
    """The axes of a kernel by the dimension of the bias that they run along, outermost first."""
    (output,) = built.outputs
    sizes = (1,) * (4 - output.dim()) + tuple(output.shape)
    axes = list(built.tile.axes)
    found: dict[str, tuple[Axis, ...]] = {}
    for dim, size in zip(_DIMS, sizes, strict=True):
        own: list[Axis] = []
        while prod(axis.extent for axis in own) < size:
            own.append(axes.pop(0))
        if own:
            found[dim] = tuple(own)
    return found
