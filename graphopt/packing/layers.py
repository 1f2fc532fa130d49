"""How much layers change what goes through them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["LayerChanges"]


class LayerChanges:
    """Watches the layers of a model: modules of a list or a sequence, whose results have the shape of what
    enters them. A weight belongs to the innermost one that holds it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = {
            name: module
            for name, module in model.named_modules()
            if name and name.rpartition(".")[2].isdigit()
        }
        self.totals: dict[str, tuple[float, int]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While this lasts calls of the model are watched."""
        handles = [
            module.register_forward_hook(self._hook(name), with_kwargs=True)
            for name, module in self.layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def of(self, weight: str) -> float | None:
        """Mean of 1 - cosine over the rows of the layer of ``weight``; ``None`` where it is in no layer."""
        parts = weight.split(".")
        for end in range(len(parts) - 1, 0, -1):
            total, rows = self.totals.get(".".join(parts[:end]), (0.0, 0))
            if rows:
                return total / rows
        return None

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before, after = _first((args, kwargs)), _first(output)
            if before is None or after is None or before.shape != after.shape or before.dim() < 2:
                return
            cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
            total, rows = self.totals.get(name, (0.0, 0))
            self.totals[name] = total + float((1 - cosine).double().sum()), rows + cosine.numel()

        return hook


def _first(values: Any) -> torch.Tensor | None:
    leaves = torch.utils._pytree.tree_leaves(values)
    return next(
        (leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()), None
    )
