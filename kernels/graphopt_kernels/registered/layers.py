"""What layers are made of: norms, softmax, dropout, products, convolutions, rotary embeddings, attention."""

from __future__ import annotations

from graphopt_kernels import (
    add_product,
    attention,
    convolution_relu,
    dropout_add,
    rotary,
    rotary_reference,
    row_norm,
    row_norm_reference,
    row_product,
    row_quantize,
    softmax,
    sum_products,
)
from graphopt_kernels.registered.kernel import kernel

__all__ = ["KERNELS"]

KERNELS = (
    kernel(
        "row-norm",
        row_norm_reference.row_norm_reference,
        row_norm.row_norm_supports,
        "RMSNorm and LayerNorm of rows",
    ),
    kernel(
        "add-row-norm",
        row_norm_reference.add_row_norm_reference,
        row_norm.add_row_norm_supports,
        "RMSNorm and LayerNorm of the rows of a sum, and the sum",
    ),
    kernel(
        "row-norm-backward",
        row_norm_reference.row_norm_backward_reference,
        row_norm.row_norm_backward_supports,
        "gradients of input, weight and bias of a norm of rows, in one reading",
    ),
    kernel(
        "row-norm-quantize",
        row_quantize.row_norm_quantize_reference,
        row_quantize.row_norm_quantize_supports,
        "RMSNorm and LayerNorm of rows in float8 or int8, a scale for each",
    ),
    kernel(
        "quantize-rows",
        row_quantize.quantize_reference,
        row_quantize.quantize_supports,
        "rows in float8 or int8, a scale for each",
    ),
    kernel(
        "softmax",
        softmax.softmax_reference,
        softmax.softmax_supports,
        "softmax of rows, or its logarithm, in one reading",
    ),
    kernel(
        "dropout-add",
        dropout_add.dropout_add_reference,
        dropout_add.dropout_add_supports,
        "dropout and the sum behind it, of which only a seed is kept",
    ),
    kernel(
        "convolution-relu",
        convolution_relu.convolution_relu_reference,
        convolution_relu.convolution_relu_supports,
        "a convolution with the bias, the residual sum and the ReLU behind it",
    ),
    kernel(
        "row-product",
        row_product.row_product_reference,
        row_product.row_product_supports,
        "a row times a weight of numbers or bytes, with its norm, a gate or a residual",
    ),
    kernel(
        "sum-products",
        sum_products.sum_products_reference,
        sum_products.sum_products_supports,
        "the sum of products of matrices, each added to the one before as it is computed",
    ),
    kernel(
        "add-product",
        add_product.add_product_reference,
        add_product.add_product_supports,
        "a product of matrices that is added to a matrix as it is computed",
    ),
    kernel(
        "rotary",
        rotary_reference.rotary_reference,
        rotary.rotary_supports,
        "rotary embeddings of queries and keys, normed or not, out of one packed projection",
    ),
    kernel(
        "rotary-backward",
        rotary_reference.rotary_backward_reference,
        rotary.rotary_backward_supports,
        "gradients of a packed projection and of norms' weights through rotary embeddings",
    ),
    kernel(
        "attention",
        attention.attention_plain,
        attention.attention_supports,
        "attention without its scores in memory: caps, windows, biases, groups of heads",
    ),
    kernel(
        "attention-backward",
        attention.attention_backward_plain,
        attention.attention_backward_supports,
        "gradients of query, key, value and bias of attention",
    ),
)
