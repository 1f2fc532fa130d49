"""Launches written down instead of made, to compile what they would compile.

    recorder = Recorder(row_norm_triton)
    row_norm_forward(recorder, meta_tensors, ...)     # recorder.forward_kernel[grid](...) notes its arguments
    recorder.calls                                    # a KernelCall each

Arguments are specialized as triton's own launcher specializes them: tensors and whole numbers by whether 16
divides them, ones as constants. What is compiled ahead is then found in triton's cache at launch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["KernelCall", "Recorder", "Signature"]


@dataclass(frozen=True)
class Signature:
    """What a launch compiles: ``types`` of arguments as triton spells them, ``constants`` by name, and of
    tensors and whole numbers whether they are ``aligned``, multiples of 16."""

    types: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: Mapping[str, bool]


@dataclass(frozen=True)
class KernelCall:
    """A launch of the jitted ``function``; ``options`` are the compiler's (``num_warps``)."""

    function: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def signature(self) -> Signature:
        constant = {parameter.name for parameter in self.function.params if parameter.is_constexpr}
        types: dict[str, str] = {}
        constants: dict[str, Any] = {}
        aligned: dict[str, bool] = {}
        for name, value in self.arguments.items():
            if name in constant or value is None or (type(value) is int and value == 1):
                constants[name] = value
            else:
                types[name], by_16 = _specialized(value)
                if by_16 is not None:
                    aligned[name] = by_16
        return Signature(types, constants, aligned)


def _specialized(value: Any) -> tuple[str, bool | None]:
    if isinstance(value, torch.Tensor):
        # Allocations begin on far more than 16 bytes; tensors without memory are taken as if they had some.
        return _pointer(value.dtype), value.storage_offset() * value.element_size() % 16 == 0
    if isinstance(value, bool):
        return "u1", None
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0
    if isinstance(value, float):
        return "fp32", None
    raise TypeError(f"kernels take no {type(value).__name__}")


def _pointer(dtype: torch.dtype) -> str:
    """A tensor of ``dtype`` as triton spells its type."""
    named = {
        torch.bool: "i1",
        torch.uint8: "u8",
        torch.bfloat16: "bf16",
        torch.float8_e4m3fn: "fp8e4nv",
        torch.float8_e5m2: "fp8e5",
    }
    kind = "fp" if dtype.is_floating_point else "i"
    return f"*{named.get(dtype, f'{kind}{8 * dtype.itemsize}')}"


class Recorder:
    """Stands for a module of jitted functions; ``calls`` are the launches that were asked of it."""

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels
        self.calls: list[KernelCall] = []

    def __getattr__(self, name: str) -> _Launcher:
        return _Launcher(getattr(self._kernels, name), self.calls.append)


class _Launcher:
    def __init__(self, function: Any, note: Callable[[KernelCall], None]) -> None:
        self._function, self._note = function, note

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            signature = inspect.signature(self._function.fn)
            own = {name: value for name, value in kwargs.items() if name in signature.parameters}
            options = {name: value for name, value in kwargs.items() if name not in own}
            bound = signature.bind(*args, **own)
            bound.apply_defaults()
            self._note(KernelCall(self._function, grid, dict(bound.arguments), options))

        return launch
