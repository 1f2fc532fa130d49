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
    from graphopt_kernels.registered import codecs, decoding, layers, losses, optimizers, probes

    groups = (probes, losses, layers, decoding, optimizers, codecs)
    return tuple(spec for group in groups for spec in group.KERNELS)


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
