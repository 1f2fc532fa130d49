"""Steps of optimizers over many tensors."""

from __future__ import annotations

from graphopt_kernels import optimizer_step, optimizer_update
from graphopt_kernels.registered.kernel import kernel

__all__ = ["KERNELS"]

KERNELS = (
    kernel(
        "adam-step",
        optimizer_step.adam_step_reference,
        optimizer_step.step_supports,
        "a step of Adam or AdamW over many tensors, gradients clipped and set to 0 on the way",
    ),
    kernel(
        "sgd-step",
        optimizer_step.sgd_step_reference,
        optimizer_step.step_supports,
        "a step of SGD over many tensors, gradients clipped and set to 0 on the way",
    ),
    kernel(
        "adam-update",
        optimizer_update.adam_update_reference,
        optimizer_update.update_supports,
        "an update of Adam or AdamW over many tensors, of numbers that may be on the device",
    ),
    kernel(
        "sgd-update",
        optimizer_update.sgd_update_reference,
        optimizer_update.update_supports,
        "an update of SGD over many tensors, of numbers that may be on the device",
    ),
)
