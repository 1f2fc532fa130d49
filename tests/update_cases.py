"""Updates of optimizers in Triton's interpreter: run as a script, prints how far kernels are from references.

TRITON_INTERPRET has to be set before triton is imported, hence a process.
"""

from __future__ import annotations

import json

import torch

import graphopt_kernels.optimizer_update as module
from tests.optimizer_cases import clones, distance, tensors

Kind = tuple[torch.dtype, torch.dtype]


def adam(kind: Kind, numbers: tuple[float, ...], loaded: dict[int, float]) -> float:
    dtype, state = kind
    lists = [tensors(dtype), tensors(dtype), tensors(state), tensors(state, squares=True)]
    ours, theirs = clones(lists), clones(lists)
    scalars, places = [torch.tensor(x) for x in loaded.values()], list(loaded)
    kernel = module._kernels().adam_update_kernel
    module._launch(kernel, ours, module.ADAM_NUMBERS, numbers, scalars, places)
    module.adam_update_reference(*theirs, numbers, scalars, places)
    return max(distance(a, b) for a, b in zip(ours, theirs, strict=True))


def sgd(
    kind: Kind, numbers: tuple[float, ...], loaded: dict[int, float], *, momentum: bool, nesterov: bool
) -> float:
    dtype, state = kind
    lists = [tensors(dtype), tensors(dtype), tensors(state) if momentum else []]
    ours, theirs = clones(lists), clones(lists)
    scalars, places = [torch.tensor(x) for x in loaded.values()], list(loaded)
    kernel, given = module._kernels().sgd_update_kernel, ours if momentum else ours[:2]
    flags = {"MOMENTUM": momentum, "NESTEROV": nesterov}
    module._launch(kernel, given, module.SGD_NUMBERS, numbers, scalars, places, **flags)
    module.sgd_update_reference(*theirs, numbers, scalars, places, nesterov)
    return max(distance(a, b) for a, b in zip(ours, theirs, strict=True))


def special() -> list[str]:
    """A parameter after gradients that are no numbers."""
    gradient = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, 1.0])
    lists = [[torch.ones(5)], [gradient], [torch.zeros(5)], [torch.zeros(5)]]
    numbers = (1.0, 1.0, 0.0, 0.1, 0.999, 0.001, 0.01, 0.0316, 1e-8)
    module._launch(module._kernels().adam_update_kernel, lists, module.ADAM_NUMBERS, numbers, [], [])
    return [str(float(x)) for x in lists[0][0]]


def main() -> None:
    torch.manual_seed(0)
    adamw = (1.0, 0.99, 0.0, 0.1, 0.99, 0.01, 0.02, 0.3, 1e-8)
    coupled = (-0.5, 1.0, 0.1, 0.1, 0.99, 0.01, 0.02, 0.3, 1e-8)
    found = {"float32": 0.0, "float16": 0.0, "special": special()}
    wide, half = torch.float32, torch.float16
    for kind in ((wide, wide), (half, half)):
        name = str(kind[0]).removeprefix("torch.")
        errors = [
            adam(kind, adamw, {}),
            adam(kind, coupled, {}),
            # Those that depend on a count of steps, and a rate that is scheduled.
            adam(kind, adamw, {1: 0.98, 6: 0.03, 7: 0.4}),
            adam(kind, coupled, dict(enumerate(coupled))),
            sgd(kind, (1.0, 1.0, 0.01, 0.9, 0.75, 0.1), {}, momentum=True, nesterov=False),
            sgd(kind, (-1.0, 0.99, 0.0, 0.9, 1.0, 0.1), {}, momentum=True, nesterov=True),
            sgd(kind, (0.5, 1.0, 0.01, 0.9, 1.0, 0.1), {0: 0.25, 5: 0.2}, momentum=True, nesterov=True),
            sgd(kind, (1.0, 1.0, 0.01, 0.0, 1.0, 0.1), {5: 0.3}, momentum=False, nesterov=False),
        ]
        found[name] = max(errors)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
