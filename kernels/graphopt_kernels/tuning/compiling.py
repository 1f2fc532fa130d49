"""Compile the launches of configurations for a GPU, several at a time; no GPU is needed."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from graphopt.candidate import Reason
from graphopt.errors import brief
from graphopt.plugins import TunableSpec
from graphopt_kernels.tuning.calls import KernelCall, Recorder
from graphopt_kernels.tuning.model import Gpu, Usage

__all__ = ["calls_of", "compiled", "usage_of"]

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


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
        try:
            found.append(_usage(compiled(call, gpu.capability)))
        except Exception as error:  # whatever the compiler or its assembler raises
            return Reason(f"it does not compile: {brief(error)}")
    return Usage(
        max((usage.registers for usage in found), default=0),
        max((usage.spilled for usage in found), default=0),
        max((usage.shared for usage in found), default=0),
    )


def compiled(call: KernelCall, capability: tuple[int, int]) -> Any:
    """What triton makes of a launch for a capability; the launch itself then finds it in triton's cache."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, names = call.signature, call.function.arg_names
    types = {name: signature.types.get(name, "constexpr") for name in names}
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]] if by_16 else []
        for name, by_16 in signature.aligned.items()
    }
    return triton.compile(
        ASTSource(call.function, types, dict(signature.constants), attributes),
        target=GPUTarget("cuda", capability[0] * 10 + capability[1], 32),
        options=dict(call.options),
    )


def _usage(kernel: Any) -> Usage:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        said = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    usage = _USAGE.search(said)
    if usage is None:
        raise ValueError(f"cuobjdump says no usage: {said[:200]!r}")
    registers, stack, local = map(int, usage.groups())
    # What the launch asks for; the code itself states what the device keeps for its own use.
    return Usage(registers, stack + local, int(kernel.metadata.shared))
