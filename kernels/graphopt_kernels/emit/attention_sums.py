"""Log-sum-exps of attention as libraries lay them out, and as the kernels do: [B, H, M], contiguous."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphopt_kernels.emit.build import NotFusible

__all__ = ["sums_read", "sums_written", "without_memory"]

_no = NotFusible.because


def without_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same layout without memory."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def sums_read(name: str, tensor: torch.Tensor, shape: Sequence[int]) -> str:
    """A log-sum-exp of a library as the kernels take it: [B, H, M], contiguous."""
    tensor = without_memory(tensor)
    if tensor.dim() == 4:
        name, tensor = f"{name}.squeeze(-1)", tensor.squeeze(-1)
    if tensor.shape[-1] != shape[-1]:
        name, tensor = f"{name}[..., :{shape[-1]}]", tensor[..., : shape[-1]]
    if tuple(tensor.shape) != tuple(shape):
        raise _no(f"the log-sum-exp has shape {list(tensor.shape)}: expected {list(shape)}")
    return name if tensor.is_contiguous() else f"{name}.contiguous()"


def sums_written(made: str, name: str, layout: torch.Tensor, shape: tuple[int, ...]) -> tuple[list[str], str]:
    """A contiguous log-sum-exp ``name`` of a ``shape`` [B, H, M] as a library gives it: lines that make
    ``made`` of it if need be, and what to return."""
    layout, plain = without_memory(layout), torch.empty(shape, device="meta")
    lines: list[str] = []
    if layout.dim() == 4:
        name, plain = f"{name}.unsqueeze(-1)", plain.unsqueeze(-1)
    elif layout.shape[-1] > shape[-1]:
        more = layout.shape[-1] - shape[-1]
        # Beyond the last row the library has infinity.
        lines.append(f'{made} = torch.nn.functional.pad({name}, (0, {more}), value=float("inf"))')
        name, plain = made, plain.new_empty(*shape[:-1], layout.shape[-1])
    if layout.shape != plain.shape:
        raise _no(f"the log-sum-exp is asked for as {list(layout.shape)}")
    if layout.stride() == plain.stride():
        return lines, name
    at = f"{tuple(layout.shape)}, {tuple(layout.stride())}, dtype={layout.dtype}"
    owner = name.partition(".")[0]
    lines.append(f"{made} = torch.empty_strided({at}, device={owner}.device)")
    return lines, f"{made}.copy_({name})"
