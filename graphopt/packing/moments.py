"""Running sums of what a weight reads and gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from graphopt import _torch
from graphopt.packing.discover import Read
from graphopt.rules import argument

__all__ = ["Sums"]

_PIECE = 1 << 22
"""Elements that are converted to float32 at once."""

_aten = torch.ops.aten


class Sums:
    """Sums over the reads of one weight, on the device of its inputs. ``gram``: keep those of pairs too."""

    def __init__(self, *, gram: bool = False) -> None:
        self.keep_gram = gram
        self.tokens = 0
        self.amax: torch.Tensor | None = None
        self.squares: torch.Tensor | None = None
        self.gram: torch.Tensor | None = None
        self.energy: torch.Tensor | None = None
        self.reads: torch.Tensor | None = None
        self.gradients: torch.Tensor | None = None
        self.relevance: torch.Tensor | None = None
        self.gradient_rows = 0

    def add(self, read: Read, x: torch.Tensor, result: torch.Tensor) -> None:
        """Take in one read: ``x`` [..., K], channels and places of a convolution, or indices."""
        self.energy = _plus(self.energy, torch.linalg.vector_norm(result, dtype=torch.float32).double() ** 2)
        if read.kind == "look-up":
            length = int(argument(read.node, "weight").meta["val"].shape[0])
            self.reads = _plus(self.reads, torch.bincount(x.reshape(-1), minlength=length).double())
            self.tokens += x.numel()
            return
        if read.kind == "convolution":
            squares, amax = _of_convolution(read, x)
            weight = argument(read.node, "weight").meta["val"]
            self.tokens += result.numel() // max(1, int(weight.shape[0]))
        else:
            blocks = read.blocks
            rows = x.reshape(blocks, -1, x.shape[-1])
            squares = torch.stack([_squares(block) for block in rows])
            if not rows.shape[1]:
                return
            amax = rows.abs().amax((0, 1)).float()
            self.tokens += rows.shape[1]
            if self.keep_gram:
                for block in rows:
                    for piece in _pieces(block):
                        self.gram = _plus(self.gram, piece.T @ piece)
        self.squares = _plus(self.squares, squares)
        self.amax = amax if self.amax is None else torch.maximum(self.amax, amax)

    def gradient_hook(
        self, read: Read, span: tuple[int, int] | None, result: torch.Tensor | None = None
    ) -> Callable[[torch.Tensor], None]:
        """Called with the gradient of a result, adds its squares, by output; ``span``: outputs that count.
        With the ``result`` itself, the sizes of products of both as well."""

        def by_output(values: torch.Tensor) -> list[torch.Tensor]:
            """Rows of each block of outputs."""
            if read.kind == "convolution":
                values = values.movedim(1 - argument(read.node, "weight").meta["val"].dim(), -1)
            if read.blocks > 1 and read.kind == "product":
                return list(values)
            flat = values.reshape(-1, values.shape[-1])
            return [flat if span is None else flat[:, slice(*span)]]

        def hook(gradient: torch.Tensor) -> None:
            if read.kind == "look-up":
                return
            blocks = by_output(gradient.detach())
            self.gradients = _plus(self.gradients, torch.cat([_squares(block) for block in blocks]))
            self.gradient_rows += blocks[0].shape[0]
            if result is not None:
                pairs = zip(by_output(result), blocks, strict=True)
                sizes = torch.cat([(y.float() * g.float()).abs().sum(0).double() for y, g in pairs])
                self.relevance = _plus(self.relevance, sizes)

        return hook

    def statistics(self) -> dict[str, torch.Tensor]:
        """What was found, by the names of ``Calibration``."""
        count = max(1, self.tokens)
        found = {"tokens": torch.tensor(self.tokens)}
        if self.amax is not None and self.squares is not None:
            found["amax"] = self.amax.cpu()
            found["second-moment"] = (self.squares / count).float().cpu()
        if self.gram is not None:
            found["gram"] = (self.gram / count).float().cpu()
        if self.reads is not None:
            found["reads"] = self.reads.float().cpu()
        if self.energy is not None:
            found["energy"] = (self.energy / count).float().cpu()
        if self.gradients is not None:
            found["output-gradient"] = (self.gradients / max(1, self.gradient_rows)).float().cpu()
        if self.relevance is not None:
            found["relevance"] = (self.relevance / max(1, self.gradient_rows)).float().cpu()
        return found


def _plus(total: torch.Tensor | None, more: torch.Tensor) -> torch.Tensor:
    return more.clone() if total is None else total.add_(more)


def _pieces(rows: torch.Tensor) -> Iterator[torch.Tensor]:
    step = max(1, _PIECE // max(1, rows.shape[-1]))
    for start in range(0, rows.shape[0], step):
        yield rows[start : start + step].detach().float()


def _squares(rows: torch.Tensor) -> torch.Tensor:
    """Sums of squares by column, float64."""
    total = torch.zeros(rows.shape[-1], dtype=torch.float64, device=rows.device)
    for piece in _pieces(rows):
        total += piece.square().sum(0)
    return total


def _of_convolution(read: Read, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of squares [G, K] and largest sizes [K] of what each element of a kernel meets, padding included.

    The gradient of a convolution with respect to its kernel, where all results count alike, is the sum of
    what the kernel meets.
    """
    node = read.node
    groups = read.blocks
    kernel = argument(node, "weight").meta["val"]
    channels = x.shape[1 - kernel.dim()]
    shape = (groups, channels // groups, *kernel.shape[2:])
    with torch.enable_grad():
        ones = torch.zeros(shape, dtype=torch.float32, device=x.device, requires_grad=True)
        squared = x.detach().float().square()
        (sums,) = torch.autograd.grad(_again(read, squared, ones).sum(), ones)
    squares = sums.double().reshape(groups, -1)
    places = tuple(axis for axis in range(x.dim()) if axis != x.dim() + 1 - kernel.dim())
    by_channel = x.detach().abs().float().amax(places).reshape(groups, -1).amax(0)
    count = squares.shape[1] // by_channel.shape[0]
    return squares, by_channel.repeat_interleave(count)


def _again(read: Read, x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """The convolution of ``read`` with another input and kernel, without a bias."""
    names = [parameter.name for parameter in _torch.schema_of(read.node.target).arguments]
    given = {name: argument(read.node, name) for name in names}
    given |= {"input": x, "weight": kernel, "bias": None}
    result: torch.Tensor = read.node.target(**given)  # type: ignore[operator]
    return result
