"""Emitted kernels as calls in a graph that something else compiles: ``graphopt::emitted_kernel``.

Kernels are known in this process by the name of their file, which ends in a hash of its text. On CUDA the
kernel runs, elsewhere the operators that it stands for.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from graphopt_kernels.emit.kernel_file import KernelFile

__all__ = ["emitted_kernel", "file_of", "known", "module_of"]

_files: dict[str, KernelFile] = {}
_modules: dict[str, Any] = {}


def known(file: KernelFile) -> str:
    """The name by which ``emitted_kernel`` runs a kernel from now on."""
    _files.setdefault(file.name, file)
    return file.name


def file_of(name: str) -> KernelFile:
    """A kernel by name; raises ``ValueError`` for one that was not made in this process."""
    if name not in _files:
        raise ValueError(f"no kernel {name!r} was made in this process")
    return _files[name]


def module_of(name: str) -> Any:
    """The module of a kernel."""
    if name not in _modules:
        # Triton reads the source of what it compiles from a file.
        path = Path(_folder().name) / f"{name}.py"
        path.write_text(file_of(name).source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(f"graphopt_emitted_{name}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module
        spec.loader.exec_module(module)
        _modules[name] = module
    return _modules[name]


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Where sources lie until the process ends."""
    return tempfile.TemporaryDirectory(prefix="graphopt-")


@torch.library.custom_op("graphopt::emitted_kernel", mutates_args=(), tags=(torch.Tag.needs_exact_strides,))
def emitted_kernel(kernel: str, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The results of a kernel by name, of the layouts that it was made for. Inputs of other strides are
    copied; of other shapes or dtypes they raise ``ValueError``."""
    expected = file_of(kernel).built.inputs
    if len(inputs) != len(expected):
        raise ValueError(f"{kernel} takes {len(expected)} tensors, got {len(inputs)}")
    given = [_laid_out(x, like, kernel) for x, like in zip(inputs, expected, strict=True)]
    module = module_of(kernel)
    if all(x.is_cuda for x in given):
        return list(module.launch(*given))
    made = module.reference(*given)
    # Separate operators may give views of inputs or of each other, which an operator must not.
    return [x.clone() if any(_same(x, y) for y in (*given, *made[:n])) else x for n, x in enumerate(made)]


def _laid_out(x: torch.Tensor, like: torch.Tensor, kernel: str) -> torch.Tensor:
    if x.shape != like.shape or x.dtype != like.dtype:
        raise ValueError(f"{kernel} takes {like.dtype} {list(like.shape)}, got {x.dtype} {list(x.shape)}")
    steps = zip(x.shape, x.stride(), like.stride(), strict=True)
    if all(own == other for size, own, other in steps if size != 1):
        return x
    return torch.empty_strided(like.shape, like.stride(), dtype=x.dtype, device=x.device).copy_(x)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() and one.numel() > 0


@emitted_kernel.register_fake
def _(kernel: str, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    outputs = file_of(kernel).built.outputs
    device = inputs[0].device
    return [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device) for x in outputs]
