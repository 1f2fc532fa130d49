"""Decoders to generate with: tiny models of transformers with random weights, and plain modules."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY, WIDTH, HEADS, POSITIONS = 128, 64, 4, 512
_COMMON = {
    "num_hidden_layers": 2, "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": 2,
    "intermediate_size": 96, "vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_WINDOWS = {"head_dim": 16, "sliding_window": 32}
_LATENT = {
    "num_key_value_heads": HEADS, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_shared_experts": 1, "head_dim": 8,
}  # fmt: skip
_MODERN: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {}, "qwen3": {"head_dim": 16}, "mistral": {"sliding_window": 32}, "phi3": {},
    "gemma2": {**_WINDOWS, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3_text": {**_WINDOWS, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3n_text": {
        **_WINDOWS, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "laurel_rank": 8, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [96] * 4,
    },
    "olmo2": {}, "cohere": {}, "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": 4},
    "mixtral": {**_MIXTURE, "sliding_window": None}, "phimoe": _MIXTURE,
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    "gpt_oss": {**_MIXTURE, **_WINDOWS}, "deepseek_v2": {**_LATENT, "q_lora_rank": None},
    "deepseek_v3": {**_LATENT, "q_lora_rank": 32},
}  # fmt: skip
_SHORT = {"n_layer": 2, "n_head": HEADS, "vocab_size": VOCABULARY, "pad_token_id": 0}
_LONG = {
    "num_hidden_layers": 2, "hidden_size": WIDTH, "num_attention_heads": HEADS, "vocab_size": VOCABULARY,
    "pad_token_id": 0,
}  # fmt: skip
_FALCON = {**_LONG, "multi_query": True, "bias": False, "new_decoder_architecture": False}
FAMILIES: dict[str, dict[str, Any]] = {
    **{name: {**_COMMON, **own} for name, own in _MODERN.items()},
    "gpt2": {**_SHORT, "n_embd": WIDTH, "n_positions": POSITIONS},
    "bloom": {**_SHORT, "hidden_size": WIDTH},
    "gpt_neox": {**_LONG, "intermediate_size": 96, "max_position_embeddings": POSITIONS},
    "opt": {**_LONG, "ffn_dim": 96, "max_position_embeddings": POSITIONS, "word_embed_proj_dim": WIDTH},
    "falcon": {**_FALCON, "alibi": False},
}
"""Model types of transformers and what to build each from."""

HYBRIDS: dict[str, dict[str, Any]] = {
    "lfm2": {**_COMMON, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_ff_dim": 96},
}
"""Decoders that keep what convolutions read last besides keys and values."""

_RECURRENT = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "pad_token_id": 0}
RECURRENT: dict[str, dict[str, Any]] = {
    "mamba": {**_RECURRENT, "state_size": 4},
    "jamba": {
        **_COMMON, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
        "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False,
    },
    "recurrent_gemma": {
        **_LONG, "num_hidden_layers": 3, "intermediate_size": 96, "lru_width": WIDTH,
        "attention_window_size": 32, "num_key_value_heads": 1,
    },
    "rwkv": {**_RECURRENT, "attention_hidden_size": 32},
    "falcon_mamba": {**_RECURRENT, "state_size": 4},
    "xlstm": {**_RECURRENT, "hidden_size": 128, "num_heads": 4, "num_blocks": 2, "chunk_size": 8},
    "zamba": {
        **_COMMON, "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "use_mamba_kernels": False, "n_mamba_heads": 2, "mamba_d_state": 4, "mamba_dt_rank": 4,
        "attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": HEADS,
    },
    "qwen3_next": {
        **_COMMON, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "zamba2": {
        **_COMMON, "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 16, "mamba_d_state": 4, "use_mem_rope": True,
        "attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": HEADS,
        "adapter_rank": 8, "chunk_size": 16,
    },
}  # fmt: skip
"""Decoders that keep states which rows hand on, besides keys and values or instead of them."""


def family(name: str, attention: str | None = None, **changes: Any) -> nn.Module:
    """The model of a family, its weights drawn with one seed; sequences of it have no end."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[name](**{**FAMILIES, **HYBRIDS, **RECURRENT}[name] | changes)
    torch.manual_seed(0)
    kwargs = {} if attention is None else {"attn_implementation": attention}
    model: Any = transformers.AutoModelForCausalLM.from_config(config, **kwargs)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    built: nn.Module = model.eval()
    return built


_SOURCES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96, "max_position_embeddings": POSITIONS, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 3,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": HEADS,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 24, "pad_token_id": 0,
    "decoder_start_token_id": 3,
}  # fmt: skip
ENCODERS: dict[str, dict[str, Any]] = {
    "bart": _SOURCES, "pegasus_x": {**_SOURCES, "block_size": 8, "num_global_tokens": 4},
    "t5": _T5, "longt5": {**_T5, "local_radius": 4, "global_block_size": 4},
    "whisper": {
        **_SOURCES, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": POSITIONS,
    },
    "moonshine": {
        **_COMMON, "encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2,
        "encoder_num_attention_heads": HEADS, "decoder_num_attention_heads": HEADS,
        "decoder_start_token_id": 3,
    },
    "prophetnet": {
        **{name: value for name, value in _COMMON.items() if not name.startswith("num_")},
        "num_encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_attention_heads": HEADS,
        "num_decoder_attention_heads": HEADS, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
        "decoder_start_token_id": 3,
    },
}  # fmt: skip
"""Model types that decode what an encoder gives, of tokens or of sounds."""


def encoder_family(name: str, **changes: Any) -> nn.Module:
    """The model of one of ``ENCODERS``, its weights drawn wide, so that tokens vary."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    given: dict[str, Any] = ENCODERS[name] | changes
    sounds = name in ("whisper", "moonshine")
    kind: Any = transformers.AutoModelForSpeechSeq2Seq if sounds else transformers.AutoModelForSeq2SeqLM
    torch.manual_seed(0)
    model: Any = kind.from_config(CONFIG_MAPPING[name](**given))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    model.generation_config.forced_eos_token_id = None
    built: nn.Module = model.eval()
    return built


def source_inputs(name: str, length: int = 19) -> dict[str, torch.Tensor]:
    """What an encoder of ``ENCODERS`` reads, the second of two sources with padding where it takes a mask,
    and two tokens of the decoder."""
    generator = torch.Generator().manual_seed(2)
    given: dict[str, torch.Tensor] = {"decoder_input_ids": tokens(2, 2)}
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 32, generator=generator), **given}
    if name == "moonshine":
        given["input_values"] = torch.randn(2, 4000, generator=generator)
        given["attention_mask"] = torch.ones(2, 4000, dtype=torch.int64)
        given["attention_mask"][1, 2500:] = 0
        return given
    given["input_ids"] = tokens(2, length, 2)
    given["attention_mask"] = torch.ones(2, length, dtype=torch.int64)
    given["attention_mask"][1, length // 2 :] = 0
    return given


def tokens(batch: int = 2, length: int = 9, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


class Block(nn.Module):
    """A layer whose attention is written in one of several ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 96), nn.GELU(), nn.Linear(96, WIDTH))
        self.whole = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True) if kind == "module" else None
        lower = torch.ones(POSITIONS, POSITIONS, dtype=torch.bool).tril().view(1, 1, POSITIONS, POSITIONS)
        self.register_buffer("lower", lower, persistent=False)
        self.sinks = nn.Parameter(torch.randn(HEADS))
        self.near = nn.Embedding(40, HEADS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        h = self.first(x)
        if self.whole is not None:
            later = torch.ones(length, length, dtype=torch.bool).triu(1)
            x = x + self.whole(h, h, h, attn_mask=later, need_weights=False)[0]
            return x + self.mlp(self.second(x))
        size = WIDTH // HEADS
        q, k, v = (t.view(batch, length, HEADS, size) for t in self.qkv(h).split(WIDTH, -1))
        if self.kind == "einsum":
            i = torch.arange(length)
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * size**-0.5
            scores = torch.where(i[:, None] >= i, scores, torch.finfo(scores.dtype).min)
            made = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
        else:
            made = self.attend(*(t.transpose(1, 2) for t in (q, k, v)), length).transpose(1, 2)
        if self.kind == "rolled":
            x = x + x.roll(1, 1)
        x = x + self.out(made.reshape(batch, length, WIDTH))
        return x + self.mlp(self.second(x))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: int) -> torch.Tensor:
        i = torch.arange(length)
        distance = i[:, None] - i
        scale = q.shape[-1] ** -0.5
        match self.kind:
            case "fused" | "rolled":
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
            case "buffer":
                scores = (q @ k.mT * scale).masked_fill(~self.lower[:, :, :length, :length], float("-inf"))
                return scores.softmax(-1) @ v
            case "added":
                mask = torch.full((length, length), float("-inf")).triu(1)
                return F.softmax((q @ k.mT / q.shape[-1] ** 0.5 + mask).float(), -1).type_as(q) @ v
            case "window":
                mask = (distance >= 0) & (distance < 6)
                return F.scaled_dot_product_attention(q, k, v, mask)
            case "softcap":
                scores = (20.0 * torch.tanh(q @ k.mT * scale / 20.0)).masked_fill(distance < 0, float("-inf"))
                return scores.softmax(-1) @ v
            case "sinks":
                scores = (q @ k.mT * scale).masked_fill(distance < 0, float("-inf"))
                column = self.sinks.view(1, -1, 1, 1).expand(q.shape[0], -1, length, 1)
                return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ v
            case "linear-bias":
                slopes = 2.0 ** -torch.arange(1, HEADS + 1)
                bias = -slopes[:, None, None] * distance
                bias = bias.masked_fill(distance < 0, float("-inf"))
                return F.scaled_dot_product_attention(q, k, v, bias)
            case "both-ways":
                return F.scaled_dot_product_attention(q, k, v)
            case "prefix":
                return F.scaled_dot_product_attention(q, k, v, (distance >= 0) | (i < 4))
            case "blocks":
                return F.scaled_dot_product_attention(q, k, v, (distance >= 0) & (i[:, None] // 8 == i // 8))
            case "logarithmic":
                bias = torch.where(distance >= 0, -(distance.clamp(min=0) + 1.0).log(), float("-inf"))
                return F.scaled_dot_product_attention(q, k, v, bias)
            case "learned-distances":
                bias = self.near.weight[distance.clamp(0, 39)].permute(2, 0, 1)
                return F.scaled_dot_product_attention(q, k, v, bias.masked_fill(distance < 0, float("-inf")))
            case "learned-keys":
                bias = self.near.weight[i.clamp(max=39)].T[:, None].expand(-1, length, -1)
                return F.scaled_dot_product_attention(q, k, v, bias.masked_fill(distance < 0, float("-inf")))
        raise AssertionError(self.kind)


class Plain(nn.Module):
    """A decoder that knows nothing of caches, masks or position ids."""

    def __init__(self, kind: str, positions: str = "table", layers: int = 2) -> None:
        super().__init__()
        self.positions = positions
        self.words, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.blocks = nn.ModuleList(Block(kind) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        length = ids.shape[1]
        if self.positions == "table":
            x = self.words(ids) + self.places.weight[:length]
        else:
            x = self.words(ids) + self.places(torch.arange(length))
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def plain(kind: str, positions: str = "table", layers: int = 2) -> Plain:
    torch.manual_seed(0)
    return Plain(kind, positions, layers).eval()


def greedy(model: nn.Module, ids: torch.Tensor, count: int) -> torch.Tensor:
    """What a model says next, the whole sequence run again for each token."""
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    return ids
