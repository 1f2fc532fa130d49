"""What graphopt's own passes register: the passes and the preset pipelines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable

from graphopt.plugins import ScorerSpec, ShareScoreSpec, hookimpl

__all__ = [
    "graphopt_api",
    "graphopt_passes",
    "graphopt_pipelines",
    "graphopt_scorers",
    "graphopt_share_scores",
]

graphopt_api = 1


@hookimpl
def graphopt_passes() -> Iterable[str]:
    return [
        "graphopt_passes.cache_rotary:CacheRotary",
        "graphopt_passes.causal_attention:CausalAttention",
        "graphopt_passes.chunk:Chunk",
        "graphopt_passes.compress_saved:CompressSaved",
        "graphopt_passes.compress_saved.lossy:QuantizeSaved",
        "graphopt_passes.fold_batch_norm:FoldBatchNorm",
        "graphopt_passes.fuse_attention:FuseAttention",
        "graphopt_passes.fuse_convolution:FuseConvolution",
        "graphopt_passes.fuse_cross_entropy:FuseCrossEntropy",
        "graphopt_passes.fuse_dropout:FuseDropout",
        "graphopt_passes.fuse_norm:FuseNorm",
        "graphopt_passes.fuse_norm_gradient:FuseNormGradient",
        "graphopt_passes.fuse_optimizer:FuseOptimizer",
        "graphopt_passes.fuse_quantize:FuseQuantize",
        "graphopt_passes.fuse_row_product:FuseRowProduct",
        "graphopt_passes.fuse_softmax:FuseSoftmax",
        "graphopt_passes.functionalize:Functionalize",
        "graphopt_passes.grouped_attention:GroupedAttention",
        "graphopt_passes.insert_checkpoints:InsertCheckpoints",
        "graphopt_passes.linear_cross_entropy:LinearCrossEntropy",
        "graphopt_passes.narrow_rotary:NarrowRotary",
        "graphopt_passes.normalize:Normalize",
        "graphopt_passes.offload:Offload",
        "graphopt_passes.order_backward:OrderBackward",
        "graphopt_passes.pack_linears:PackLinears",
        "graphopt_passes.pack_rotary:PackRotary",
        "graphopt_passes.quantize_linear:QuantizeLinear",
        "graphopt_passes.read_packed:ReadPacked",
        "graphopt_passes.rotary:Rotary",
        "graphopt_passes.share_kv:ShareKv",
        "graphopt_passes.keep_kv:KeepKv",
        "graphopt_passes.join_kv:JoinKv",
        "graphopt_passes.lossy_cache:LossyCache",
        "graphopt_passes.store_rotary:StoreRotary",
        "graphopt_passes.sum_products:SumProducts",
        "graphopt_passes.tile_convolutions:TileConvolutions",
        "graphopt_passes.window_attention:WindowAttention",
    ]


@hookimpl
def graphopt_scorers() -> Iterable[ScorerSpec]:
    # Imported when asked: it needs torch, and `graphopt --help` loads this module.
    from graphopt_passes.scorers import SCORERS

    return SCORERS


@hookimpl
def graphopt_share_scores() -> Iterable[ShareScoreSpec]:
    from graphopt_passes.share_kv.scores import SCORES

    return SCORES


@hookimpl
def graphopt_pipelines() -> Mapping[str, Traversable]:
    presets = (files("graphopt_passes") / "presets").iterdir()
    return {preset.name.removesuffix(".yaml"): preset for preset in presets if preset.name.endswith(".yaml")}
