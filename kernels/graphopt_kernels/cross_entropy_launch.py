"""Launches of the Triton kernels of ``graphopt_kernels.cross_entropy``."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch

from graphopt_kernels.cross_entropy_rows import RowSettings
from graphopt_kernels.linear_cross_entropy_autograd import reduced, weight_of_targets

__all__ = ["PartLaunch", "gradient_of_rows", "losses_of_rows", "part_launch"]

_PART_BYTES, _BYTES_PER_THREAD = 2**14, 128
"""Of a program that reads logits, and of its threads: eight loads of 16 bytes in flight."""

_GRADIENT_BYTES, _GRADIENT_BYTES_PER_THREAD = 2**13, 64
"""Of one that writes their gradient as well."""

_ALONE = 2**14
"""Parts of rows that one program finishes in one go: a sum over programs would be another launch."""

_GROUP = 2**11
"""Parts of rows that each of several programs finishes."""

_GROUPS = 1024


class PartLaunch(NamedTuple):
    """How rows are cut: ``block`` columns a program, a power of two, with so many ``warps``; ``parts`` of a
    row, in ``lanes``, a power of two, of the programs that finish ``rows`` each, ``alone`` if there is one of
    them. ``joined``: rows are finished by the last of their programs to arrive instead, in one launch.
    ``streams``: logits, and their gradients, are the first to leave caches."""

    block: int
    warps: int
    parts: int
    lanes: int
    rows: int
    finish_warps: int
    alone: bool
    joined: bool = False
    streams: bool = False


def part_launch(rows: int, columns: int, itemsize: int, *, writes: bool = False) -> PartLaunch:
    """Parts of 16 KiB, 128 bytes a thread: many small programs hide each other's loads, and their partial
    results are a thousandth of what they read. Half of that where the gradient is written. Measured on an
    H200 (benchmarks/results/gpu_sweep_rows.json)."""
    most, each = (
        (_GRADIENT_BYTES, _GRADIENT_BYTES_PER_THREAD) if writes else (_PART_BYTES, _BYTES_PER_THREAD)
    )
    block = min(most // itemsize, max(64, 1 << (columns - 1).bit_length()))
    parts = -(-columns // block)
    lanes = 1 << (parts - 1).bit_length()
    together = 1 << (rows - 1).bit_length()
    alone = together * lanes <= _ALONE
    if not alone:
        together = max(1, _GROUP // lanes)
    elements = together * lanes
    return PartLaunch(
        block,
        max(1, block * itemsize // (32 * each)),
        parts,
        lanes,
        together,
        min(16, max(1, elements // 512)),
        alone,
    )


def losses_of_rows(
    kernels: Any,
    logits: torch.Tensor,
    target: torch.Tensor,
    settings: RowSettings,
    reduction: str,
    dtype: torch.dtype,
    class_weight: torch.Tensor | None = None,
    *,
    launch: PartLaunch | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``graphopt::cross_entropy`` by ``kernels``, the module of the jitted functions; ``class_weight`` [V] is
    float32."""
    rows, columns = logits.shape
    device = logits.device
    log_sum_exp = torch.empty(rows, dtype=torch.float32, device=device)
    if not rows:
        return reduced(log_sum_exp, target, reduction, settings.ignore_index, dtype), log_sum_exp.clone()
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    launch = launch or part_launch(rows, columns, logits.element_size(), writes=True)
    is_smoothed = settings.label_smoothing != 0
    is_whole = reduction != "none"
    groups = rows if launch.joined else -(-rows // launch.rows)
    partial = torch.empty(3 if is_smoothed else 2, rows, launch.parts, dtype=torch.float32, device=device)
    tops, totals, plains = partial[0], partial[1], partial[-1]
    loss = torch.empty(() if is_whole else (rows,), dtype=dtype, device=device)
    sums = torch.empty(2, groups, dtype=torch.float32, device=device) if is_whole else loss
    weights, weight_sum = _weights(class_weight, log_sum_exp, is_smoothed)
    constants: dict[str, Any] = {
        "SMOOTHED": is_smoothed,
        "SOFTCAPPED": settings.softcap != 0,
        "WEIGHTED": class_weight is not None,
        "COLUMNS": columns,
        "PARTS": launch.parts,
    }
    if launch.joined:
        with _on(device):
            kernels.joined_kernel[(rows * launch.parts,)](
                logits,
                target.contiguous(),
                tops,
                totals,
                plains,
                weights,
                weight_sum,
                sums[0] if is_whole else loss,
                log_sum_exp,
                sums[-1],
                loss,
                torch.zeros(rows + 1, dtype=torch.int32, device=device),
                rows,
                logits.stride(0),
                settings.ignore_index,
                settings.label_smoothing,
                settings.logit_scale,
                settings.softcap,
                **constants,
                SCALED=settings.logit_scale != 1.0,
                STREAMS=launch.streams,
                REDUCED=is_whole,
                MEAN=reduction == "mean",
                LANES=launch.lanes,
                BLOCK=launch.block,
                TOGETHER=_GROUPS,
                num_warps=launch.warps,
            )
        return loss, log_sum_exp
    with _on(device):
        kernels.parts_kernel[(rows * launch.parts,)](
            logits,
            tops,
            totals,
            plains,
            weights,
            logits.stride(0),
            settings.logit_scale,
            settings.softcap,
            **constants,
            SCALED=settings.logit_scale != 1.0,
            STREAMS=launch.streams,
            BLOCK=launch.block,
            num_warps=launch.warps,
        )
        kernels.finish_kernel[(groups,)](
            logits,
            target.contiguous(),
            tops,
            totals,
            plains,
            weights,
            weight_sum,
            sums[0] if is_whole else loss,
            log_sum_exp,
            sums[-1],
            loss,
            rows,
            logits.stride(0),
            settings.ignore_index,
            settings.label_smoothing,
            settings.logit_scale,
            settings.softcap,
            **constants,
            REDUCED=is_whole,
            MEAN=reduction == "mean",
            ALONE=launch.alone,
            LANES=launch.lanes,
            ROWS=launch.rows,
            num_warps=launch.finish_warps,
        )
        if is_whole and not launch.alone:
            kernels.total_kernel[(1,)](
                sums[0],
                sums[1],
                loss,
                groups,
                MEAN=reduction == "mean",
                WEIGHTED=class_weight is not None,
                BLOCK=_GROUPS,
                num_warps=4,
            )
    return loss, log_sum_exp


def gradient_of_rows(
    kernels: Any,
    logits: torch.Tensor,
    target: torch.Tensor,
    log_sum_exp: torch.Tensor,
    scale: torch.Tensor,
    sum_scale: torch.Tensor | None,
    settings: RowSettings,
    class_weight: torch.Tensor | None = None,
    *,
    launch: PartLaunch | None = None,
) -> torch.Tensor:
    """``graphopt::cross_entropy_backward`` by ``kernels``; ``scale`` [N] is what each row's loss is
    multiplied by, ``class_weight`` [V] is float32."""
    rows, columns = logits.shape
    gradient = torch.empty((rows, columns), dtype=logits.dtype, device=logits.device)
    if not rows:
        return gradient
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    launch = launch or part_launch(rows, columns, logits.element_size())
    is_smoothed = settings.label_smoothing != 0
    if class_weight is not None and not is_smoothed:
        scale = scale * weight_of_targets(class_weight, target, settings.ignore_index)
    weights, weight_sum = _weights(class_weight, log_sum_exp, is_smoothed)
    with _on(logits.device):
        kernels.gradient_kernel[(rows * launch.parts,)](
            logits,
            target.contiguous(),
            log_sum_exp.contiguous(),
            scale,
            scale if sum_scale is None else sum_scale,
            weights,
            weight_sum,
            gradient,
            logits.stride(0),
            scale.stride(0),
            0 if sum_scale is None else sum_scale.stride(0),
            settings.ignore_index,
            settings.label_smoothing,
            settings.logit_scale,
            settings.softcap,
            SUMMED=sum_scale is not None,
            SMOOTHED=is_smoothed,
            SOFTCAPPED=settings.softcap != 0,
            WEIGHTED=is_smoothed and class_weight is not None,
            STREAMS=launch.streams,
            COLUMNS=columns,
            PARTS=launch.parts,
            BLOCK=launch.block,
            num_warps=launch.warps,
        )
    return gradient


def _weights(
    class_weight: torch.Tensor | None, unused: torch.Tensor, is_smoothed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of classes, and their sum where losses are smoothed; ``unused`` for what is not read."""
    if class_weight is None:
        return unused, unused
    class_weight = class_weight.contiguous()
    return class_weight, class_weight.sum() if is_smoothed else unused


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the present device of CUDA; elsewhere (the interpreter) there is none."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
