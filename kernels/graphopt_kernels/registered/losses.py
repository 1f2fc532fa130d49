"""Cross entropy, with the linear layer before it or without."""

from __future__ import annotations

from graphopt_kernels import (
    cross_entropy,
    linear_cross_entropy,
    linear_cross_entropy_add,
    linear_cross_entropy_arguments,
    linear_cross_entropy_blocks,
)
from graphopt_kernels.registered.kernel import kernel

__all__ = ["KERNELS"]

KERNELS = (
    kernel(
        "cross-entropy",
        cross_entropy.cross_entropy_reference,
        cross_entropy.cross_entropy_supports,
        "cross entropy and log-sum-exp of rows of logits, in one reading",
    ),
    kernel(
        "cross-entropy-backward",
        cross_entropy.cross_entropy_backward_reference,
        cross_entropy.cross_entropy_backward_supports,
        "gradient of logits, in one reading",
    ),
    kernel(
        "cross-entropy-row-terms",
        cross_entropy.row_terms_reference,
        cross_entropy.row_terms_supports,
        "what the gradient of logits needs of each row",
    ),
    kernel(
        "linear-cross-entropy",
        linear_cross_entropy.linear_cross_entropy_reference,
        linear_cross_entropy_arguments.linear_cross_entropy_supports,
        "linear layer and cross entropy in chunks of rows, logits computed again in the backward",
    ),
    kernel(
        "linear-cross-entropy-with-gradients",
        linear_cross_entropy.with_gradients_reference,
        linear_cross_entropy_arguments.with_gradients_supports,
        "linear layer and cross entropy in chunks of rows, gradients computed in the forward",
    ),
    kernel(
        "linear-cross-entropy-blocks",
        linear_cross_entropy_blocks.blocks_reference,
        linear_cross_entropy_blocks.blocks_supports,
        "linear layer and cross entropy in blocks of classes, each gradient rounded once",
    ),
    kernel(
        "linear-cross-entropy-blocks-with-gradients",
        linear_cross_entropy_blocks.blocks_with_gradients_reference,
        linear_cross_entropy_blocks.blocks_with_gradients_supports,
        "linear layer and cross entropy in blocks of classes, gradients computed in the forward",
    ),
    kernel(
        "linear-cross-entropy-add-backward",
        linear_cross_entropy_add.add_backward_reference,
        linear_cross_entropy_add.add_backward_supports,
        "backward of linear-cross-entropy that adds the weight's gradient to a matrix",
    ),
    kernel(
        "linear-cross-entropy-blocks-add-backward",
        linear_cross_entropy_add.add_backward_reference,
        linear_cross_entropy_add.blocks_add_backward_supports,
        "backward of linear-cross-entropy-blocks that adds the weight's gradient to a matrix",
    ),
)
