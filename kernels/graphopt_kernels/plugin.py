"""What this package registers: its kernels, codecs for saved values, and what writes Triton out."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

from graphopt.plugins import (
    CacheScoreSpec,
    CodecSpec,
    Command,
    DumpFormat,
    KernelSpec,
    ReplacementSpec,
    TunableSpec,
    hookimpl,
)

__all__ = [
    "graphopt_api",
    "graphopt_cache_scores",
    "graphopt_codecs",
    "graphopt_commands",
    "graphopt_formats",
    "graphopt_kernels",
    "graphopt_replacements",
    "graphopt_schemes",
    "graphopt_stores",
    "graphopt_tunables",
    "graphopt_weight_formats",
]

graphopt_api = 1


@hookimpl
def graphopt_kernels() -> Iterable[KernelSpec]:
    """The bandwidth probes that ``graphopt calibrate`` uses, linear + cross entropy in chunks, norms, rotary
    embeddings, sums of products, convolutions with what follows, attention."""
    # Imported when asked: they need torch, and `graphopt --help` loads this module.
    from graphopt_kernels import (
        add_product,
        attend_cross,
        attend_evict,
        attend_full,
        attend_joint,
        attend_latent,
        attend_quant,
        attend_relative,
        attend_ring,
        attend_split,
        attention,
        bandwidth,
        causal_convolution,
        convolution_relu,
        cross_entropy,
        dropout_add,
        linear_cross_entropy,
        linear_cross_entropy_add,
        linear_cross_entropy_arguments,
        linear_cross_entropy_blocks,
        optimizer_step,
        optimizer_update,
        rotary,
        rotary_cache,
        rotary_reference,
        rotary_stores,
        row_norm,
        row_product,
        row_quantize,
        softmax,
        sum_products,
    )
    from graphopt_kernels.saved_codecs import codes, groups, levels

    return (
        KernelSpec(
            name="probe-copy",
            op="graphopt::probe_copy",
            reference=bandwidth.copy_reference,
            supports=bandwidth.copy_supports,
            summary="copies a vector, to measure the copy bandwidth",
        ),
        KernelSpec(
            name="probe-read",
            op="graphopt::probe_read",
            reference=bandwidth.read_reference,
            supports=bandwidth.read_supports,
            summary="sums a vector block by block, to measure the read bandwidth",
        ),
        KernelSpec(
            name="cross-entropy",
            op="graphopt::cross_entropy",
            reference=cross_entropy.cross_entropy_reference,
            supports=cross_entropy.cross_entropy_supports,
            summary="cross entropy and log-sum-exp of rows of logits, in one reading",
        ),
        KernelSpec(
            name="cross-entropy-backward",
            op="graphopt::cross_entropy_backward",
            reference=cross_entropy.cross_entropy_backward_reference,
            supports=cross_entropy.cross_entropy_backward_supports,
            summary="gradient of logits, in one reading",
        ),
        KernelSpec(
            name="cross-entropy-row-terms",
            op="graphopt::cross_entropy_row_terms",
            reference=cross_entropy.row_terms_reference,
            supports=cross_entropy.row_terms_supports,
            summary="what the gradient of logits needs of each row",
        ),
        KernelSpec(
            name="linear-cross-entropy",
            op="graphopt::linear_cross_entropy",
            reference=linear_cross_entropy.linear_cross_entropy_reference,
            supports=linear_cross_entropy_arguments.linear_cross_entropy_supports,
            summary="linear layer and cross entropy in chunks of rows, logits computed again in the backward",
        ),
        KernelSpec(
            name="linear-cross-entropy-with-gradients",
            op="graphopt::linear_cross_entropy_with_gradients",
            reference=linear_cross_entropy.with_gradients_reference,
            supports=linear_cross_entropy_arguments.with_gradients_supports,
            summary="linear layer and cross entropy in chunks of rows, gradients computed in the forward",
        ),
        KernelSpec(
            name="linear-cross-entropy-blocks",
            op="graphopt::linear_cross_entropy_blocks",
            reference=linear_cross_entropy_blocks.blocks_reference,
            supports=linear_cross_entropy_blocks.blocks_supports,
            summary="linear layer and cross entropy in blocks of classes, each gradient rounded once",
        ),
        KernelSpec(
            name="linear-cross-entropy-blocks-with-gradients",
            op="graphopt::linear_cross_entropy_blocks_with_gradients",
            reference=linear_cross_entropy_blocks.blocks_with_gradients_reference,
            supports=linear_cross_entropy_blocks.blocks_with_gradients_supports,
            summary="linear layer and cross entropy in blocks of classes, gradients computed in the forward",
        ),
        KernelSpec(
            name="row-norm",
            op="graphopt::row_norm",
            reference=row_norm.row_norm_reference,
            supports=row_norm.row_norm_supports,
            summary="RMSNorm and LayerNorm of rows",
        ),
        KernelSpec(
            name="add-row-norm",
            op="graphopt::add_row_norm",
            reference=row_norm.add_row_norm_reference,
            supports=row_norm.add_row_norm_supports,
            summary="RMSNorm and LayerNorm of the rows of a sum, and the sum",
        ),
        KernelSpec(
            name="row-norm-backward",
            op="graphopt::row_norm_backward",
            reference=row_norm.row_norm_backward_reference,
            supports=row_norm.row_norm_backward_supports,
            summary="gradients of input, weight and bias of a norm of rows, in one reading",
        ),
        KernelSpec(
            name="convolution-relu",
            op="graphopt::convolution_relu",
            reference=convolution_relu.convolution_relu_reference,
            supports=convolution_relu.convolution_relu_supports,
            summary="a convolution with the bias, the residual sum and the ReLU behind it",
        ),
        KernelSpec(
            name="dropout-add",
            op="graphopt::dropout_add",
            reference=dropout_add.dropout_add_reference,
            supports=dropout_add.dropout_add_supports,
            summary="dropout and the sum behind it, of which only a seed is kept",
        ),
        KernelSpec(
            name="quantize-rows",
            op="graphopt::quantize_rows",
            reference=row_quantize.quantize_reference,
            supports=row_quantize.quantize_supports,
            summary="rows in float8 or int8, a scale for each",
        ),
        KernelSpec(
            name="row-norm-quantize",
            op="graphopt::row_norm_quantize",
            reference=row_quantize.row_norm_quantize_reference,
            supports=row_quantize.row_norm_quantize_supports,
            summary="RMSNorm and LayerNorm of rows in float8 or int8, a scale for each",
        ),
        KernelSpec(
            name="softmax",
            op="graphopt::softmax",
            reference=softmax.softmax_reference,
            supports=softmax.softmax_supports,
            summary="softmax of rows, or its logarithm, in one reading",
        ),
        KernelSpec(
            name="rotary",
            op="graphopt::rotary",
            reference=rotary_reference.rotary_reference,
            supports=rotary.rotary_supports,
            summary="rotary embeddings of queries and keys, normed or not, out of one packed projection",
        ),
        KernelSpec(
            name="rotary-backward",
            op="graphopt::rotary_backward",
            reference=rotary_reference.rotary_backward_reference,
            supports=rotary.rotary_backward_supports,
            summary="gradients of a packed projection and of norms' weights through rotary embeddings",
        ),
        KernelSpec(
            name="row-product",
            op="graphopt::row_product",
            reference=row_product.row_product_reference,
            supports=row_product.row_product_supports,
            summary="a row times a weight of numbers or bytes, with its norm, a gate or a residual",
        ),
        KernelSpec(
            name="attend-full",
            op="graphopt::attend_full",
            reference=attend_full.attend_full_reference,
            supports=attend_full.attend_full_supports,
            summary="writes new keys and values into stores of all positions, and attends over them",
        ),
        KernelSpec(
            name="attend-cross",
            op="graphopt::attend_cross",
            reference=attend_cross.attend_cross_reference,
            supports=attend_cross.attend_cross_supports,
            summary="attends over the rows of a source, which stores hold before the first step",
        ),
        KernelSpec(
            name="attend-latent",
            op="graphopt::attend_latent",
            reference=attend_latent.attend_latent_reference,
            supports=attend_latent.attend_latent_supports,
            summary="attends over keys whose first columns are the values",
        ),
        KernelSpec(
            name="attend-relative",
            op="graphopt::attend_relative",
            reference=attend_relative.attend_relative_reference,
            supports=attend_relative.attend_relative_supports,
            summary="attends over stores of all positions with a bias of how far a key is",
        ),
        KernelSpec(
            name="attend-ring",
            op="graphopt::attend_ring",
            reference=attend_ring.attend_ring_reference,
            supports=attend_ring.attend_ring_supports,
            summary="writes new keys and values into stores of a window's positions, and attends over them",
        ),
        KernelSpec(
            name="attend-quant",
            op="graphopt::attend_quant",
            reference=attend_quant.attend_quant_reference,
            supports=attend_quant.attend_quant_supports,
            summary="writes new keys and values into stores that round all but the newest, and attends",
        ),
        KernelSpec(
            name="attend-split",
            op="graphopt::attend_split",
            reference=attend_split.attend_split_reference,
            supports=attend_split.attend_split_supports,
            summary="attends over the first and the newest positions, all positions for some heads",
        ),
        KernelSpec(
            name="attend-evict",
            op="graphopt::attend_evict",
            reference=attend_evict.attend_evict_reference,
            supports=attend_evict.attend_evict_supports,
            summary="attends over as many positions as there are slots, the least important one going",
        ),
        KernelSpec(
            name="attend-joint",
            op="graphopt::attend_joint",
            reference=attend_joint.attend_joint_reference,
            supports=attend_joint.attend_joint_supports,
            summary="attends over what several attentions keep in one store, block by block",
        ),
        KernelSpec(
            name="causal-convolution",
            op="graphopt::causal_convolution",
            reference=causal_convolution.causal_convolution_reference,
            supports=causal_convolution.causal_convolution_supports,
            summary="convolves new rows and the last ones before them, which it keeps",
        ),
        KernelSpec(
            name="rotary-to-cache",
            op="graphopt::rotary_to_cache",
            reference=rotary_cache.rotary_to_cache_reference,
            supports=rotary_cache.rotary_to_cache_supports,
            summary="rotary embeddings of a packed projection, keys and values written into a cache",
        ),
        KernelSpec(
            name="rotary-to-stores",
            op="graphopt::rotary_to_stores",
            reference=rotary_stores.rotary_to_stores_reference,
            supports=rotary_stores.rotary_to_stores_supports,
            summary="rotary embeddings of a step, normed or not, keys and values written into its stores",
        ),
        KernelSpec(
            name="sum-products",
            op="graphopt::sum_products",
            reference=sum_products.sum_products_reference,
            supports=sum_products.sum_products_supports,
            summary="the sum of products of matrices, each added to the one before as it is computed",
        ),
        KernelSpec(
            name="add-product",
            op="graphopt::add_product",
            reference=add_product.add_product_reference,
            supports=add_product.add_product_supports,
            summary="a product of matrices that is added to a matrix as it is computed",
        ),
        KernelSpec(
            name="linear-cross-entropy-add-backward",
            op="graphopt::linear_cross_entropy_add_backward",
            reference=linear_cross_entropy_add.add_backward_reference,
            supports=linear_cross_entropy_add.add_backward_supports,
            summary="backward of linear-cross-entropy that adds the weight's gradient to a matrix",
        ),
        KernelSpec(
            name="linear-cross-entropy-blocks-add-backward",
            op="graphopt::linear_cross_entropy_blocks_add_backward",
            reference=linear_cross_entropy_add.add_backward_reference,
            supports=linear_cross_entropy_add.blocks_add_backward_supports,
            summary="backward of linear-cross-entropy-blocks that adds the weight's gradient to a matrix",
        ),
        KernelSpec(
            name="adam-step",
            op="graphopt::adam_step",
            reference=optimizer_step.adam_step_reference,
            supports=optimizer_step.step_supports,
            summary="a step of Adam or AdamW over many tensors, gradients clipped and set to 0 on the way",
        ),
        KernelSpec(
            name="sgd-step",
            op="graphopt::sgd_step",
            reference=optimizer_step.sgd_step_reference,
            supports=optimizer_step.step_supports,
            summary="a step of SGD over many tensors, gradients clipped and set to 0 on the way",
        ),
        KernelSpec(
            name="adam-update",
            op="graphopt::adam_update",
            reference=optimizer_update.adam_update_reference,
            supports=optimizer_update.update_supports,
            summary="an update of Adam or AdamW over many tensors, of numbers that may be on the device",
        ),
        KernelSpec(
            name="sgd-update",
            op="graphopt::sgd_update",
            reference=optimizer_update.sgd_update_reference,
            supports=optimizer_update.update_supports,
            summary="an update of SGD over many tensors, of numbers that may be on the device",
        ),
        KernelSpec(
            name="attention",
            op="graphopt::attention",
            reference=attention.attention_plain,
            supports=attention.attention_supports,
            summary="attention without its scores in memory: caps, windows, biases, groups of heads",
        ),
        KernelSpec(
            name="attention-backward",
            op="graphopt::attention_backward",
            reference=attention.attention_backward_plain,
            supports=attention.attention_backward_supports,
            summary="gradients of query, key, value and bias of attention",
        ),
        KernelSpec(
            name="pack-bits",
            op="graphopt::pack_bits",
            reference=codes.pack_bits_reference,
            supports=codes.pack_bits_supports,
            summary="booleans as bits",
        ),
        KernelSpec(
            name="unpack-bits",
            op="graphopt::unpack_bits",
            reference=codes.unpack_bits_reference,
            supports=codes.unpack_bits_supports,
            summary="booleans out of bits",
        ),
        KernelSpec(
            name="quantize-groups",
            op="graphopt::quantize_groups",
            reference=groups.quantize_groups_reference,
            supports=groups.quantize_groups_supports,
            summary="floating-point values in a few bits, rounded at random, a range for each group",
        ),
        KernelSpec(
            name="dequantize-groups",
            op="graphopt::dequantize_groups",
            reference=groups.dequantize_groups_reference,
            supports=groups.dequantize_groups_supports,
            summary="floating-point values out of a few bits",
        ),
        KernelSpec(
            name="pack-levels",
            op="graphopt::pack_levels",
            reference=levels.pack_levels_reference,
            supports=levels.pack_levels_supports,
            summary="which of a few intervals each element lies in, in a few bits",
        ),
        KernelSpec(
            name="unpack-levels",
            op="graphopt::unpack_levels",
            reference=levels.unpack_levels_reference,
            supports=levels.unpack_levels_supports,
            summary="a number for each interval that elements lie in",
        ),
    )


@hookimpl
def graphopt_codecs() -> Iterable[CodecSpec]:
    """Groups of neighbours in 8, 4 and 2 bits."""
    from graphopt_kernels.saved_codecs import groups

    return tuple(
        CodecSpec(
            name=f"groups-{bits}",
            pack="quantize-groups",
            unpack="dequantize-groups",
            bits=groups.bits_per_element(bits),
            error=1 / (2**bits - 1),
            metric=f"share of the range of {groups.GROUP} neighbours",
            unbiased=True,
            constants=(bits,),
            summary=f"{bits} bits an element, rounded at random",
        )
        for bits in groups.BITS
    )


@hookimpl
def graphopt_schemes() -> Iterable[str]:
    """Ways to keep weights in fewer bytes."""
    return (
        "graphopt_kernels.quantized.int8:Int8",
        "graphopt_kernels.quantized.fp8:Fp8",
        "graphopt_kernels.quantized.dynamic:Int8Dynamic",
        "graphopt_kernels.quantized.dynamic:Fp8Dynamic",
        "graphopt_kernels.quantized.outliers:LlmInt8",
        "graphopt_kernels.quantized.exponents:Lossless12",
        "graphopt_kernels.quantized.int4:Int4",
        "graphopt_kernels.quantized.int4:Int4Awq",
        "graphopt_kernels.quantized.int4_ordered:Int4Ordered",
        "graphopt_kernels.quantized.int4_offset:Int4Offset",
        "graphopt_kernels.quantized.nf4:Nf4",
        "graphopt_kernels.quantized.lowbits:Int2",
        "graphopt_kernels.quantized.lowbits:Int3",
    )


@hookimpl
def graphopt_weight_formats() -> Iterable[str]:
    """Ways in which others write packed weights into checkpoints."""
    return (
        "graphopt_kernels.formats.gptq:Gptq",
        "graphopt_kernels.formats.awq:Awq",
        "graphopt_kernels.formats.bitsandbytes:BitsAndBytes",
        "graphopt_kernels.formats.torchao:TorchAo",
    )


@hookimpl
def graphopt_stores() -> Iterable[str]:
    """Ways to keep keys and values between steps of decoding."""
    return (
        "graphopt_kernels.cache_stores:Cross",
        "graphopt_kernels.cache_stores:Full",
        "graphopt_kernels.cache_stores:Latent",
        "graphopt_kernels.cache_stores:Relative",
        "graphopt_kernels.cache_stores:Ring",
        "graphopt_kernels.coordinate_stores:KeyChannels",
        "graphopt_kernels.coordinate_stores:LowRank",
        "graphopt_kernels.quant_store:Quant",
        "graphopt_kernels.split_stores:SinkWindow",
        "graphopt_kernels.split_stores:SplitHeads",
        "graphopt_kernels.evict_store:Evict",
        "graphopt_kernels.joined_stores:Merged",
        "graphopt_kernels.joined_stores:SharedBasis",
    )


@hookimpl
def graphopt_cache_scores() -> Iterable[CacheScoreSpec]:
    """By what ``evict`` drops keys."""
    from graphopt_kernels.evict_scores import SCORES

    return SCORES


@hookimpl
def graphopt_tunables() -> Iterable[TunableSpec]:
    """Norms of rows, cross entropy of rows, attention, groups of operators, products with packed weights."""
    from graphopt_kernels.tuning.attention import attention_tunables
    from graphopt_kernels.tuning.cross_entropy import cross_entropy_tunable
    from graphopt_kernels.tuning.groups import group_tunable
    from graphopt_kernels.tuning.packed_bytes import packed_bytes_tunable
    from graphopt_kernels.tuning.packed_exponents import packed_exponents_tunable
    from graphopt_kernels.tuning.packed_groups import packed_groups_tunable
    from graphopt_kernels.tuning.row_norms import row_norm_tunables
    from graphopt_kernels.tuning.row_products import row_product_tunable

    return (
        *row_norm_tunables(),
        cross_entropy_tunable(),
        *attention_tunables(),
        group_tunable(),
        packed_bytes_tunable(),
        packed_exponents_tunable(),
        packed_groups_tunable(),
        row_product_tunable(),
    )


@hookimpl
def graphopt_replacements() -> Iterable[ReplacementSpec]:
    """Emitted kernels, for groups that were measured to be faster so."""

    def propose(gm: Any, cost: Any) -> Any:
        from graphopt_kernels.emit.replace import propose as found

        return found(gm, cost)

    def source(kernel: str) -> str | None:
        from graphopt_kernels.emit.running import file_of

        try:
            return file_of(kernel).source
        except ValueError:
            return None

    return (ReplacementSpec("emitted-kernels", propose, "emitted kernels for groups of operators", source),)


@hookimpl
def graphopt_formats() -> Iterable[DumpFormat]:
    """The kernels of a lowered program, as Triton."""
    from graphopt_kernels.emit.listing import write_triton

    return (DumpFormat("triton", ".py", write_triton, "the Triton kernels of lowered programs"),)


@hookimpl
def graphopt_commands() -> Iterable[Command]:
    """``graphopt emit`` and ``graphopt tune``."""
    return (
        Command(
            "emit",
            "write TARGET, rewritten, as Python and Triton that run without graphopt",
            lambda: importlib.import_module("graphopt_kernels.emit.command").command,
        ),
        Command(
            "tune",
            "find the fastest launches of kernels on this GPU and keep them",
            lambda: importlib.import_module("graphopt_kernels.tuning.command").command,
        ),
    )
