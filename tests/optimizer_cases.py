"""Steps of optimizers in Triton's interpreter: run as a script, prints how far kernels are from references.

TRITON_INTERPRET has to be set before triton is imported, hence a process.
"""

from __future__ import annotations

import json
from typing import Any

import torch

import graphopt_kernels.optimizer_step as module

SIZES = ((5,), (1024,), (3, 700), (0,), (16384 + 100,), (1,))


def tensors(dtype: torch.dtype, *, squares: bool = False) -> list[torch.Tensor]:
    made = [torch.randn(size).to(dtype) for size in SIZES]
    return [x.abs() for x in made] if squares else made


def distance(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """The largest difference of the lists, relative to the largest element."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.numel():
            scale = float(b.double().abs().max()) or 1.0
            worst = max(worst, float((a.double() - b.double()).abs().max()) / scale)
    return worst


def clones(lists: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    return [[x.clone() for x in each] for each in lists]


def adam(dtype: torch.dtype, state: torch.dtype, *, decoupled: bool, zero: bool, scaled: bool) -> float:
    lists = [tensors(dtype), tensors(dtype), tensors(state), tensors(state, squares=True)]
    factor = torch.tensor(0.5) if scaled else None
    ours, theirs = clones(lists), clones(lists)
    lr, beta1, beta2, eps, decay, step = 1e-2, 0.9, 0.99, 1e-8, 0.1, 3
    numbers = (
        lr / (1 - beta1**step), 1 - lr * decay, decay, 1 - beta1, beta2, 1 - beta2, eps,
        (1 - beta2**step) ** -0.5,
    )  # fmt: skip
    flags = {"DECAYED": True, "DECOUPLED": decoupled, "ZERO": zero}
    module._launch(module._kernels().adam_kernel, ours, factor, numbers, None, **flags)
    module.adam_step_reference(*theirs, factor, lr, beta1, beta2, eps, decay, step, decoupled, zero, None)
    return max(distance(a, b) for a, b in zip(ours, theirs, strict=True))


def sgd(dtype: torch.dtype, *, momentum: float, nesterov: bool, first: bool) -> float:
    lists = [tensors(dtype), tensors(dtype), tensors(dtype) if momentum else []]
    ours, theirs = clones(lists), clones(lists)
    flags = {"DECAYED": True, "MOMENTUM": bool(momentum), "FIRST": first, "NESTEROV": nesterov, "ZERO": True}
    given = ours if momentum else ours[:2]
    module._launch(module._kernels().sgd_kernel, given, None, (0.1, momentum, 0.75, 0.01), None, **flags)
    module.sgd_step_reference(*theirs, None, 0.1, momentum, 0.25, 0.01, nesterov, first, True, None)
    return max(distance(a, b) for a, b in zip(ours, theirs, strict=True))


def drawn() -> dict[str, Any]:
    """What rounding at random does to values between two bfloat16, and to those that are none."""
    count = 20000
    value = torch.full((count,), 1.0, dtype=torch.bfloat16)
    special = torch.tensor([float("nan"), float("inf"), float("-inf"), 3e38], dtype=torch.bfloat16)
    gradient = torch.full((count,), 2.0**-9, dtype=torch.bfloat16)
    params, grads = [value.clone(), special.clone()], [gradient, torch.zeros_like(special)]
    again = [x.clone() for x in params]
    flags = {"DECAYED": False, "MOMENTUM": False, "FIRST": False, "NESTEROV": False, "ZERO": False}
    kernel = module._kernels().sgd_kernel
    for each, seed in ((params, 7), (again, 7)):
        module._launch(kernel, [each, grads], None, (-1.0, 0.0, 1.0, 0.0), seed, **flags)
    return {
        "mean": float(params[0].double().mean()),
        "values": sorted({float(x) for x in params[0]}),
        "same": bool(torch.equal(params[0], again[0])),
        "special": [str(float(x)) for x in params[1]],
    }


def main() -> None:
    torch.manual_seed(0)
    found: dict[str, Any] = {"float32": 0.0, "float16": 0.0}
    for dtype, state in (
        (torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float16, torch.float32),
    ):  # fmt: skip
        name = str(dtype).removeprefix("torch.")
        for decoupled, zero, scaled in ((True, True, False), (False, False, True)):
            error = adam(dtype, state, decoupled=decoupled, zero=zero, scaled=scaled)
            found[name] = max(found[name], error)
    for dtype in (torch.float32, torch.float16):
        name = str(dtype).removeprefix("torch.")
        for momentum, nesterov, first in (
            (0.0, False, False), (0.9, False, True), (0.9, False, False), (0.9, True, False),
        ):  # fmt: skip
            error = sgd(dtype, momentum=momentum, nesterov=nesterov, first=first)
            found[name] = max(found[name], error)
    print(json.dumps({**found, "drawn": drawn()}))


if __name__ == "__main__":
    main()
