"""Compile the launches of configurations for a GPU, several at a time; no GPU is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphopt.candidate import Reason
from graphopt.errors import brief
from graphopt.plugins import TunableSpec
from graphopt_kernels.emit.machine_code import compiled_usage
from graphopt_kernels.tuning.calls import KernelCall, Recorder
from graphopt_kernels.tuning.model import Gpu, Usage

__all__ = ["calls_of", "usage_of"]


def calls_of(spec: TunableSpec, problem: Any, configuration: Any, processors: int) -> list[KernelCall]:
    """The launches that ``configuration`` makes, by running on tensors without memory."""
    recorder = Recorder(spec.kernels())
    operands = spec.operands(problem, torch.device("meta"))
    spec.run(recorder, processors, problem, operands, configuration)
    return recorder.calls


def usage_of(calls: Sequence[KernelCall], gpu: Gpu) -> Usage | Reason:
    """The largest usage of some launches, or why one cannot be compiled."""
    found: list[Usage] = []
    for call in calls:
        signature = call.signature
        try:
            registers, spilled, shared = compiled_usage(
                call.function,
                signature.types,
                signature.constants,
                options=call.options,
                aligned=signature.aligned,
                capability=gpu.capability,
            )
        except Exception as error:  # whatever the compiler or its assembler raises
            return Reason(f"it does not compile: {brief(error)}")
        found.append(Usage(registers, spilled, shared))
    return Usage(
        max((usage.registers for usage in found), default=0),
        max((usage.spilled for usage in found), default=0),
        max((usage.shared for usage in found), default=0),
    )
