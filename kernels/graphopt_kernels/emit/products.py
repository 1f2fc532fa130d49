"""Which operators multiply matrices, and what of their arguments is what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

__all__ = ["Product", "is_product", "product_of", "products_of"]

aten = torch.ops.aten

_PLAIN = (
    aten.mm.default,
    aten.mm.dtype,
    aten.bmm.default,
    aten.bmm.dtype,
    aten._int_mm.default,
)

_ADDED = (aten.addmm.default, aten.baddbmm.default)


@dataclass(frozen=True)
class Product:
    """``alpha * left @ right + beta * added``: ``left`` ([batch,] rows, inner), ``right`` ([batch,] inner,
    columns), ``added`` of the result's shape or broadcast to it, ``None`` where nothing is added."""

    left: fx.Node
    right: fx.Node
    added: fx.Node | None = None
    alpha: float = 1
    beta: float = 1

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(batch, rows, columns, inner); the first is 1 without a batch."""
        left, right = self.left.meta["val"].shape, self.right.meta["val"].shape
        batch = int(left[0]) if len(left) == 3 else 1
        return batch, int(left[-2]), int(right[-1]), int(left[-1])

    @property
    def dtype(self) -> torch.dtype:
        """That of the operands."""
        dtype: torch.dtype = self.left.meta["val"].dtype
        return dtype


def is_product(target: Any) -> bool:
    """Whether an operator multiplies matrices."""
    return target in _PLAIN or target in _ADDED


def product_of(node: fx.Node) -> Product | None:
    """What a node multiplies, ``None`` for one that does not."""
    args: Any = node.args
    if node.target in _PLAIN:
        return Product(args[0], args[1])
    if node.target in _ADDED:
        beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
        return Product(args[1], args[2], args[0], alpha, beta)  # type: ignore[arg-type]
    return None


def products_of(graph: fx.Graph) -> list[fx.Node]:
    """The nodes of a graph that multiply matrices."""
    return [node for node in graph.nodes if is_product(node.target)]
