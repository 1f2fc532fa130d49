"""A kernel to tune that needs no GPU: it adds one, in as many ways as it has configurations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from graphopt.candidate import Reason
from graphopt.plugins import TunableSpec, hookimpl
from graphopt_kernels.tuning.model import Gpu, Usage

H200 = Gpu.of("NVIDIA H200, 132 multiprocessors, sm_90", (9, 0), 132)


class Sizes(NamedTuple):
    rows: int
    dtype: torch.dtype = torch.float32
    soft: bool = False


class Way(NamedTuple):
    """``us`` is what the meter will say; ``fault`` what goes wrong."""

    us: int
    fault: str = ""


launched: list[Way] = []
"""Every run, in order: how a meter knows which configuration it times."""


def run(kernels: Any, processors: int, problem: Sizes, operands: tuple[Any, ...], way: Way) -> Sequence[Any]:
    (x,) = operands
    if x.device.type == "meta":
        return (x,)
    launched.append(way)
    if way.fault == "raises":
        raise RuntimeError("out of resources\nand more")
    result = torch.empty_like(x)
    if way.fault == "forgets":
        result[1:] = x[1:] + 1
    else:
        torch.add(x, 1.01 if way.fault == "errs" else 1, out=result)
    return (result.double(),) if way.fault == "widens" else (result,)


def reference(problem: Sizes, operands: tuple[Any, ...]) -> Sequence[torch.Tensor]:
    return (operands[0] + 1,)


def tunable(default: Way, *others: Way, name: str = "add-one") -> TunableSpec:
    return TunableSpec(
        name=name,
        sources=("graphopt_kernels.bandwidth_triton",),
        kernels=lambda: None,
        default=lambda problem: default,
        configurations=lambda problem: others,
        check=lambda problem, way: Reason("not this way") if way.fault == "invalid" else None,
        operands=lambda problem, device: (torch.zeros(problem.rows, 2, dtype=problem.dtype, device=device),),
        run=run,
        reference=reference,
        estimate=lambda problem, way: Usage(32, 0, 0),
        predict=lambda problem, way, usage, gpu: float(way.us),
        shipped=lambda: (Sizes(8), Sizes(16)),
        summary="adds one",
    )


def plugin(*specs: TunableSpec, name: str = "acme") -> Any:
    class Plugin:
        graphopt_api = 1

        @hookimpl
        def graphopt_tunables(self) -> list[TunableSpec]:
            return list(specs)

    Plugin.__name__ = name
    return Plugin()


class Meter:
    """Says of each configuration what it says of itself; ``asked`` are those that were timed."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.asked: list[Way] = []

    def __call__(
        self, runs: Sequence[Callable[[tuple[Any, ...]], object]], operands: tuple[Any, ...]
    ) -> list[float]:
        times = []
        for each in runs:
            each(operands)
            self.asked.append(launched[-1])
            times.append(launched[-1].us * 1e-6)
        return times


class Asking(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.graphopt_tests.asks(x)


def target() -> tuple[torch.nn.Module, tuple[torch.Tensor]]:
    return Asking(), (torch.ones(6, 2),)
