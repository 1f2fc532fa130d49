"""Linear layer and cross entropy in pieces, beside whole logits, on one thread of the CPU.

    python benchmarks/chunked_loss.py

Pieces are chunks of rows (``forward``, ``recompute``) or blocks of classes (``forward-blocks``, ``blocks``).
``memory``: peak above the inputs and median time of forward and backward, 1,024 x 256 x 16,384, 8 pieces.
``rounding``: 512 x 64 x 997 in bfloat16, the norm of the difference from float64 in the weight's gradient,
over the one that whole logits in bfloat16 make, for several numbers of ``pieces``; ``spread`` is the standard
deviation of the logits.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from harness import figure, parser

import graphopt_kernels.linear_cross_entropy_blocks  # noqa: F401  (registers the operators)
from graphopt.measure import allocator_peak

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
ITEMS = ("memory", "rounding")
REPEATS = 5
OPERATORS = {
    "forward": "linear_cross_entropy_with_gradients",
    "recompute": "linear_cross_entropy",
    "forward-blocks": "linear_cross_entropy_blocks_with_gradients",
    "blocks": "linear_cross_entropy_blocks",
}


def whole(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(x, weight).to(torch.promote_types(x.dtype, torch.float32)), target)


def pieces(mode: str, count: int) -> Loss:
    """The loss in so many chunks of rows, or blocks of classes."""
    packet = getattr(torch.ops.graphopt, OPERATORS[mode])

    def loss(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        cuts = -(-weight.shape[0] // count) if "blocks" in mode else count
        settings = (cuts, "mean", -100, 0.0, 1.0, 0.0, torch.float32)
        mask = ([True, True, False],) if mode.startswith("forward") else ()
        return packet(x, weight, None, target, *settings, *mask)[0]

    return loss


def operands(rows: int, width: int, classes: int, spread: float = 1.0) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    weight = torch.randn(classes, width, dtype=torch.float64) * spread / width**0.5
    return torch.randn(rows, width, dtype=torch.float64), weight, torch.randint(0, classes, (rows,))


def gradient(loss: Loss, x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    return torch.autograd.grad(loss(*leaves, target), leaves)[1]


def memory() -> Iterator[dict[str, Any]]:
    x, weight, target = operands(1024, 256, 16384)
    for dtype in (torch.float32, torch.bfloat16):
        given = (x.to(dtype), weight.to(dtype), target)
        for name, loss in (("whole", whole), *((mode, pieces(mode, 8)) for mode in OPERATORS)):
            seconds = []
            for _ in range(REPEATS):
                begun = time.perf_counter()
                gradient(loss, *given)
                seconds.append(time.perf_counter() - begun)
            peak = allocator_peak(lambda loss=loss, given=given: gradient(loss, *given), torch.device("cpu"))
            yield {
                "model": "memory", "dtype": str(dtype).split(".")[1], "mode": name, "peak_bytes": peak,
                "seconds": statistics.median(seconds),
            }  # fmt: skip


def rounding() -> Iterator[dict[str, Any]]:
    for spread in (1.0, 3.0, 10.0):
        x, weight, target = operands(512, 64, 997, spread)
        x, weight = x.bfloat16(), weight.bfloat16()
        exact = gradient(whole, x.double(), weight.double(), target)
        error = float((gradient(whole, x, weight, target).double() - exact).norm())
        for cut, mode in (("rows", "recompute"), ("classes", "blocks")):
            for count in (2, 4, 8, 16):
                found = gradient(pieces(mode, count), x, weight, target).double()
                times = float((found - exact).norm()) / error
                yield {
                    "model": "rounding", "spread": spread, "cut": cut, "pieces": count,
                    "error_of_whole": times,
                }  # fmt: skip


def rows(item: str) -> Iterator[dict[str, Any]]:
    return memory() if item == "memory" else rounding()


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    peaks = {(r["dtype"], r["mode"]): r["peak_bytes"] for r in found if r.get("mode")}
    return {
        "failed": [row["model"] for row in found if "error" in row],
        "peak_of_whole": {f"{d} {m}": p / peaks[d, "whole"] for (d, m), p in peaks.items()},
    }


if __name__ == "__main__":
    options = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    figure("chunked_loss", options, rows, summary, ITEMS)
