"""Models of transformers of any type, made small by the fields of their configuration.

    python benchmarks/zoo_transformers.py TYPE ...

prints what is built for each type. Every field of a configuration that says how wide or how deep is
lowered, sub-configurations alike; ``FIELDS`` has what the types need besides. Weights and inputs are
random. A model keeps its dropout and its layer drop: random numbers are part of what is tried.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import zoo_others
from torch import nn

__all__ = ["TYPES", "build", "families", "inputs_of"]

TYPES = Path(__file__).parent / "zoo_types.txt"

WIDTHS = {
    64: (
        "hidden_size d_model embed_dim n_embd encoder_hidden_size decoder_hidden_size lru_width dim "
        "hidden_size_per_layer_input feature_size mask_feature_size image_size"
    ),
    128: (
        "intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim mlp_dim dim_feedforward "
        "encoder_feedforward_dim num_position max_2d_position_embeddings context_length"
    ),
    32: "embedding_size projection_dim hidden_dim expert_ffn_hidden_size moe_intermediate_size qk_head_dim",
    16: (
        "head_dim d_kv qk_rope_head_dim qk_nope_head_dim v_head_dim mamba_headdim q_lora_rank kv_lora_rank "
        "num_conv_pos_embeddings num_mel_bins position_buckets max_relative_positions"
    ),
    8: (
        "state_size mamba_d_state time_step_rank num_queries sliding_window attention_window_size "
        "adapter_rank"
    ),
    4: (
        "num_attention_heads encoder_attention_heads decoder_attention_heads n_head num_heads "
        "num_experts num_local_experts n_routed_experts num_conv_pos_embedding_groups num_frames"
    ),
    2: (
        "num_hidden_layers encoder_layers decoder_layers n_layer num_layers num_decoder_layers "
        "num_encoder_layers encoder_num_hidden_layers decoder_num_hidden_layers num_experts_per_tok "
        "first_k_dense_replace"
    ),
    1: "n_group topk_group",
    512: "vocab_size max_source_positions max_target_positions n_positions n_ctx max_position_embeddings",
}
SMALL = {name: size for size, names in WIDTHS.items() for name in names.split()}
LENGTH = 64
"""Tokens of a sequence: activations are to outweigh weights."""


def _stages(kind: str, **fields: Any) -> dict[str, Any]:
    return {"model_type": kind, "out_features": [f"stage{k}" for k in range(1, 5)], **fields}


_RESNET = _stages("resnet", embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1])
_SWIN = _stages(
    "swin",
    embed_dim=16,
    depths=[1, 1, 1, 1],
    num_heads=[2, 2, 4, 4],
    window_size=4,
    image_size=64,
    patch_size=4,
)
_DINO = _stages(
    "dinov2",
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=2,
    image_size=64,
    patch_size=16,
    reshape_hidden_states=False,
)
_CONVOLUTIONS = {"conv_dim": [16] * 3, "conv_stride": [5, 4, 4], "conv_kernel": [10, 3, 3]}

FIELDS: dict[str, dict[str, Any]] = {
    "convnext": {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]},
    "deepseek_v3": {"first_k_dense_replace": 1, "num_key_value_heads": 4},
    "depth_anything": {
        "backbone_config": _DINO,
        "patch_size": 16,
        "reassemble_hidden_size": 32,
        "neck_hidden_sizes": [8, 16, 32, 32],
        "fusion_hidden_size": 16,
        "head_hidden_size": 8,
    },
    "detr": {
        "backbone_config": _RESNET,
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "encoder_layers": 1,
    },
    "efficientnet": {"width_coefficient": 0.5, "depth_coefficient": 0.3, "hidden_dim": 640},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32, "position_embedding_type": "rotary"},
    "gemma2": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]},
    "hubert": _CONVOLUTIONS,
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "use_mamba_kernels": False,
        "expert_layer_offset": 1,
        "mamba_dt_rank": 8,
    },
    "levit": {
        "hidden_sizes": [32, 48, 64],
        "num_attention_heads": [2, 3, 4],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
    },
    "longformer": {"attention_window": 4},
    "longt5": {"local_radius": 4, "global_block_size": 4},
    "mask2former": {
        "backbone_config": _SWIN,
        "feature_size": 32,
        "mask_feature_size": 32,
        "encoder_feedforward_dim": 64,
        "dim_feedforward": 64,
    },
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "paligemma": {"projection_dim": 64},
    "qwen2_5_vl_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    },
    "qwen2_5_vl_vision": {"depth": 2, "out_hidden_size": 64, "fullatt_block_indexes": [1]},
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
    "resnet": {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]},
    "rwkv": {"attention_hidden_size": 64, "context_length": 64},
    "sam_mask_decoder": {"hidden_size": 64, "iou_head_hidden_dim": 32},
    "sam_prompt_encoder": {"image_size": 64, "hidden_size": 64, "mask_input_channels": 8},
    "sam_vision_model": {
        "output_channels": 64,
        "num_pos_feats": 32,
        "global_attn_indexes": [1],
        "window_size": 2,
    },
    "sam": {
        "prompt_encoder_config": {"hidden_size": 64, "image_size": 64, "mask_input_channels": 8},
        "mask_decoder_config": {
            "hidden_size": 64,
            "mlp_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": 32,
        },
    },
    "swin": {"embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "image_size": 32},
    "time_series_transformer": {
        "prediction_length": 4,
        "context_length": 16,
        "lags_sequence": [1, 2, 3],
        "d_model": 32,
    },
    "timesfm": {"patch_length": 8, "horizon_length": 8, "context_length": 64},
    "timesformer": {"num_frames": 2, "image_size": 32, "patch_size": 8},
    "upernet": {
        "backbone_config": _RESNET,
        "hidden_size": 32,
        "auxiliary_in_channels": 48,
        "auxiliary_channels": 16,
    },
    "wavlm": _CONVOLUTIONS,
    "whisper": {"max_source_positions": 32},
    "xlstm": {"num_blocks": 2, "chunk_size": 8},
    "yolos": {"image_size": [64, 64], "num_detection_tokens": 4},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
    },
}
"""What some types need besides the rules: lists that must agree with each other, backbones."""

HEADS = (
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "MASKED_LM",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "IMAGE_CLASSIFICATION",
    "SEMANTIC_SEGMENTATION",
    "OBJECT_DETECTION",
    "UNIVERSAL_SEGMENTATION",
    "DEPTH_ESTIMATION",
    "CTC",
    "SPEECH_SEQ_2_SEQ",
    "VIDEO_CLASSIFICATION",
    "TIME_SERIES_PREDICTION",
    "IMAGE_TEXT_TO_TEXT",
    "MASK_GENERATION",
)
"""Tasks whose model is taken, the first that a type has; else the model without a head."""

ENCODERS = ("bert", "roberta", "esm")
SEQUENCES = ("bart", "prophetnet", "whisper")
"""Types that have a causal model too, which is not what they are known for."""

UNLISTED = {"time_series_transformer": "TimeSeriesTransformerForPrediction"}
"""Models that no task lists."""


def families() -> dict[str, str]:
    """Every type of the list and its family."""
    lines = (line.split() for line in TYPES.read_text().splitlines() if not line.startswith("#"))
    return {line[0]: line[1] for line in lines if line}


def build(kind: str, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """A small model of a type, and inputs that its forward takes by keyword. Raises ``ValueError`` for a
    type without a model."""
    import transformers

    config = _config(kind)
    torch.manual_seed(seed)
    model: nn.Module = getattr(transformers, _class_name(kind))(config)
    return model.eval(), inputs_of(model, seed)


def _class_name(kind: str) -> str:
    from transformers.models.auto import modeling_auto

    if kind in UNLISTED:
        return UNLISTED[kind]
    order = HEADS
    if kind in ENCODERS:
        order = ("MASKED_LM", *HEADS)
    elif kind in SEQUENCES:
        order = ("SPEECH_SEQ_2_SEQ", "SEQ_TO_SEQ_CAUSAL_LM", *HEADS)
    names = [f"MODEL_FOR_{head}_MAPPING_NAMES" for head in order] + ["MODEL_MAPPING_NAMES"]
    for name in names:
        found = getattr(modeling_auto, name, {}).get(kind)
        if found is not None:
            return str(found if isinstance(found, str) else found[0])
    raise ValueError(f"transformers has no model of type {kind!r}")


def _config(kind: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[kind](**_fields(CONFIG_MAPPING[kind]))


def _fields(cls: Any) -> dict[str, Any]:
    """Arguments that make a configuration small: its own fields, lowered, and those of its parts."""
    own = FIELDS.get(cls.model_type, {})
    default = cls()
    renamed = set(getattr(cls, "attribute_map", {}) or {})
    fields: dict[str, Any] = {}
    for name, value in vars(default).items():
        if name.startswith("_") or name in renamed or name in own:
            continue
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            fields[name] = {**_fields(type(value)), "model_type": value.model_type}
        elif name == "num_key_value_heads" and isinstance(value, int):
            heads = getattr(default, "num_attention_heads", value)
            fields[name] = SMALL["num_attention_heads"] if value == heads else 2
        elif name in SMALL and type(value) is int and value > SMALL[name]:
            fields[name] = SMALL[name]
        elif name == "use_cache":
            fields[name] = False
    fields |= own
    text = default.get_text_config()
    words = min(getattr(text, "vocab_size", None) or SMALL["vocab_size"], SMALL["vocab_size"])
    words = fields.get("vocab_size", words)
    last = words
    for name, value in vars(default).items():
        special = name.endswith(("_token_id", "_token_index")) and type(value) is int
        if special and not 0 <= value < words and name not in own:
            last -= 1
            fields[name] = 0 if name == "pad_token_id" else last
    return fields


def inputs_of(model: nn.Module, seed: int = 0, batch: int = 4) -> dict[str, Any]:
    """Inputs by what the signature of the forward asks for, with labels where it makes a loss of them."""
    draw = torch.Generator().manual_seed(1000 + seed)
    return dict(_inputs(model, model.config, draw, batch))


def _inputs(model: Any, config: Any, draw: torch.Generator, batch: int) -> Iterator[tuple[str, Any]]:
    takes = inspect.signature(model.forward).parameters
    main = model.main_input_name
    text = config.get_text_config()
    words = getattr(text, "vocab_size", None) or getattr(config, "vocab_size", 64)
    vision = getattr(config, "vision_config", None) or config
    longest = getattr(text, "max_position_embeddings", None) or LENGTH
    tokens = torch.randint(5, max(6, words - 12), (batch, min(LENGTH, longest)), generator=draw)

    if "past_values" in takes:
        yield from _series(config, takes, draw, batch)
        return
    if "input_ids" in takes:
        if getattr(config, "image_token_id", None) is not None and "pixel_values" in takes:
            tokens = _with_images(config, tokens)
        yield "input_ids", tokens
        if "attention_mask" in takes:
            yield "attention_mask", torch.ones_like(tokens)
        if "mm_token_type_ids" in takes:
            yield "mm_token_type_ids", (tokens == config.image_token_id).long()
        if "token_type_ids" in takes and "image_token_id" in vars(config) and "labels" in takes:
            yield "token_type_ids", torch.zeros_like(tokens)
    if "pixel_values" in takes:
        yield from _image(model, vision, takes, draw, batch)
    if main == "input_values":
        yield main, torch.randn(batch, 6400, generator=draw)
    if main == "input_features":
        yield main, torch.randn(batch, config.num_mel_bins, 2 * config.max_source_positions, generator=draw)
    if "input_points" in takes:
        yield "input_points", 30 * torch.rand(batch, 1, 2, 2, generator=draw)
    if "decoder_input_ids" in takes:
        yield "decoder_input_ids", tokens.clone()
    if "labels" in takes and (labels := _labels(model, config, tokens, draw, batch)) is not None:
        yield "labels", labels
    if "return_loss" in takes:
        yield "return_loss", True
    if "use_cache" in takes:
        yield "use_cache", False


def _side(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", 64) or 64
    found = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    return (min(found[0], 64), min(found[1], 64))


def _image(
    model: Any, config: Any, takes: Any, draw: torch.Generator, batch: int
) -> Iterator[tuple[str, Any]]:
    channels = getattr(config, "num_channels", 3)
    patch = getattr(config, "patch_size", 16)
    if "image_grid_thw" in takes:
        row = config.in_channels * config.temporal_patch_size * patch**2
        yield "pixel_values", torch.randn(16 * batch, row, generator=draw)
        yield "image_grid_thw", torch.tensor([[1, 4, 4]] * batch)
    elif "spatial_shapes" in takes:
        yield "pixel_values", torch.randn(batch, 16, channels * patch**2, generator=draw)
        yield "pixel_attention_mask", torch.ones(batch, 16, dtype=torch.long)
        yield "spatial_shapes", torch.tensor([[4, 4]] * batch)
    else:
        frames = (config.num_frames,) if "Video" in type(model).__name__ else ()
        yield "pixel_values", torch.randn(batch, *frames, channels, *_side(config), generator=draw)


def _with_images(config: Any, tokens: torch.Tensor) -> torch.Tensor:
    """A placeholder for each patch of the image, as a processor puts them there."""
    vision = config.vision_config
    merged = getattr(vision, "spatial_merge_size", None)
    count = 16 // merged**2 if merged else (_side(vision)[0] // vision.patch_size) ** 2
    image = torch.full((tokens.shape[0], count), config.image_token_id)
    start = getattr(config, "vision_start_token_id", None)
    if start is not None:
        image = torch.cat([torch.full((tokens.shape[0], 1), start), image], 1)
    return torch.cat([tokens[:, :2], image, tokens[:, 2:]], 1)


def _series(config: Any, takes: Any, draw: torch.Generator, batch: int) -> Iterator[tuple[str, Any]]:
    lags = max(getattr(config, "lags_sequence", None) or [0])
    past = config.context_length + lags
    ahead = getattr(config, "prediction_length", None) or config.horizon_length
    yield "past_values", torch.randn(batch, past, generator=draw)
    if "past_time_features" in takes:
        features = config.num_time_features
        yield "past_time_features", torch.zeros(batch, past, features)
        yield "past_observed_mask", torch.ones(batch, past)
        yield "future_time_features", torch.zeros(batch, ahead, features)
    yield "future_values", torch.randn(batch, ahead, generator=draw)


def _labels(
    model: Any, config: Any, tokens: torch.Tensor, draw: torch.Generator, batch: int
) -> torch.Tensor | None:
    name = type(model).__name__
    if name.endswith(("CausalLM", "LMHeadModel", "MaskedLM", "ConditionalGeneration", "MTModel")):
        return tokens.clone()
    if name.endswith("CTC"):
        return torch.randint(1, 20, (batch, 4), generator=draw)
    if name.endswith("SemanticSegmentation"):
        return torch.randint(0, config.num_labels, (batch, *_side(config)), generator=draw)
    if name.endswith("Classification"):
        return torch.randint(0, config.num_labels, (batch,), generator=draw)
    return None


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    zoo_others.schemas()
    options.add_argument("types", nargs="*", metavar="TYPE", help="default: all of the list")
    for kind in options.parse_args().types or families():
        try:
            model, inputs = build(kind)
            count = sum(parameter.numel() for parameter in model.parameters())
            with torch.no_grad():
                model(**inputs)
            print(
                f"{kind}: {type(model).__name__}, {count:,} parameters, takes {', '.join(inputs)}", flush=True
            )
        except Exception as error:
            print(f"{kind}: {type(error).__name__}: {str(error)[:300]}", flush=True)


if __name__ == "__main__":
    main()
