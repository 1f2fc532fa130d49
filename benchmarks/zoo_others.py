"""Nets of other packages than transformers, and plain ones with something about them.

    python benchmarks/zoo_others.py

prints what is built. Packages are optional: a net whose package is missing is left out, and the results
say so. Weights and inputs are random.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["PACKAGES", "build", "inputs_of", "installed", "names", "schemas"]

PACKAGES = (
    "vit-pytorch",
    "x-transformers",
    "timm",
    "torchvision",
    "segmentation-models-pytorch",
    "torch-geometric",
    "monai",
    "linformer",
    "local-attention",
    "conformer",
    "soft-moe-pytorch",
    "siren-pytorch",
    "tab-transformer-pytorch",
    "egnn-pytorch",
    "pytorch-tcn",
    "mambapy",
    "efficientnet-pytorch",
)
"""Distributions that nets come from; what they need besides is einops, einx, loguru and pillow."""

Draw = torch.Generator
Inputs = Callable[[Draw], tuple[Any, ...]]


def _floats(*shape: int) -> Inputs:
    return lambda draw: (torch.randn(*shape, generator=draw),)


def _tokens(words: int, *shape: int) -> Inputs:
    return lambda draw: (torch.randint(0, words, shape, generator=draw),)


def _of(module: str, name: str, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made: nn.Module = getattr(importlib.import_module(module), name)(*args, **options)
        return made

    return make


_VIT = {
    "image_size": 64,
    "patch_size": 16,
    "num_classes": 10,
    "dim": 64,
    "depth": 2,
    "heads": 4,
    "mlp_dim": 128,
}


def _x_decoder(**attention: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        package = importlib.import_module("x_transformers")
        layers = package.Decoder(dim=64, depth=2, heads=4, attn_dim_head=16, **attention)
        made: nn.Module = package.TransformerWrapper(num_tokens=64, max_seq_len=32, attn_layers=layers)
        return made

    return make


class Recurrent(nn.Module):
    """Embedding, a recurrent net, a classifier of its last state."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(64, 32)
        self.net = getattr(nn, kind)(32, 32, num_layers=2, batch_first=True, **options)
        self.head = nn.Linear(64 if options.get("bidirectional") else 32, 10)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        out, _ = self.net(self.words(tokens))
        return self.head(out[:, -1])


class Packed(nn.Module):
    """A recurrent net over sequences of several lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.GRU(8, 16, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        out, _ = self.net(packed)
        padded, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True)
        return self.head(padded).sum(1)


class Cells(nn.Module):
    """A loop over time in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(8, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state: Any = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0])


class Branching(nn.Module):
    """Takes one of two ways by what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.a(x))
        return self.b(h) if h.mean().item() > 0.1 else self.c(h)


class Chosen(nn.Module):
    """Sizes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        return self.b(h[h.sum(1) > 0]).sum() + h.sum()


class Counting(nn.Module):
    """Buffers that a step writes: a counter, an average, one that is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("last", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        h = self.net(x)
        self.mean.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
        self.last = h.detach().sum(0)
        return h - self.mean * self.steps


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 2 * grad * x


class OwnBackward(nn.Module):
    """An ``autograd.Function``, and a region that is checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from torch.utils.checkpoint import checkpoint

        squared: torch.Tensor = Square.apply(self.a(x))  # type: ignore[no-untyped-call]
        return checkpoint(lambda h: torch.tanh(self.b(h)), squared, use_reentrant=False)


class Nested(nn.Module):
    """Takes and returns nested dictionaries; embedding and head share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(32, 16), nn.Linear(16, 32, bias=False)
        self.head.weight = self.words.weight

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        h = self.words(batch["ids"]) * batch["scale"]
        return {"logits": self.head(h), "parts": [h.mean(), (h.std(), "text")]}


class Spectral(nn.Module):
    """Complex numbers inside, weight normalisation around the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.b = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))
        self.filter = nn.Parameter(torch.randn(9, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.fft.irfft(torch.fft.rfft(self.a(x)) * self.filter, n=16))


class Writing(nn.Module):
    """Writes into what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, store: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        store.add_(h.detach())
        return (h * store).sum()


class Noisy(nn.Module):
    """Random numbers of every kind: dropout, noise, a permutation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.dropout(self.a(x), 0.3, self.training)
        h = h + 0.1 * torch.randn_like(h)
        return self.b(h[torch.randperm(h.shape[0])] * torch.bernoulli(torch.full_like(h, 0.5)))


class Inner(nn.Module):
    """Differentiates inside its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (force,) = torch.autograd.grad(self.a(x).sum(), x, create_graph=True)
        return force


class NumPy(nn.Module):
    """Leaves torch in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        import numpy as np

        h = self.a(x)
        scale = float(np.percentile(h.detach().numpy(), 75))
        return self.b(h) * scale


class Graphs(nn.Module):
    """Two layers over a graph given by its edges."""

    def __init__(self, layer: str, **options: Any) -> None:
        super().__init__()
        kind = getattr(importlib.import_module("torch_geometric.nn"), layer)
        self.a, self.b = kind(8, 16, **options), kind(16, 4, **options)

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x, edges)), edges)


def _edges(draw: Draw) -> tuple[Any, ...]:
    return torch.randn(12, 8, generator=draw), torch.randint(0, 12, (2, 40), generator=draw)


def _batch(draw: Draw) -> tuple[Any, ...]:
    return ({"ids": torch.randint(0, 32, (2, 8), generator=draw), "scale": torch.tensor(0.5)},)


IMAGE = _floats(2, 3, 64, 64)
ROWS = _floats(4, 8)

NETS: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "plain/rnn": (lambda: Recurrent("RNN"), _tokens(64, 2, 12)),
    "plain/lstm": (lambda: Recurrent("LSTM", bidirectional=True, dropout=0.1), _tokens(64, 2, 12)),
    "plain/gru": (lambda: Recurrent("GRU"), _tokens(64, 2, 12)),
    "plain/packed": (Packed, lambda draw: (torch.randn(3, 6, 8, generator=draw), torch.tensor([6, 4, 2]))),
    "plain/cells": (Cells, _floats(2, 6, 8)),
    "plain/branching": (Branching, ROWS),
    "plain/chosen": (Chosen, ROWS),
    "plain/counting": (Counting, ROWS),
    "plain/own_backward": (OwnBackward, ROWS),
    "plain/nested": (Nested, _batch),
    "plain/spectral": (Spectral, _floats(4, 16)),
    "plain/writing": (
        Writing,
        lambda draw: (torch.randn(4, 8, generator=draw), torch.randn(4, 8, generator=draw)),
    ),
    "plain/noisy": (Noisy, _floats(4, 16)),
    "plain/inner": (Inner, ROWS),
    "plain/numpy": (NumPy, ROWS),
    "plain/transformer": (
        lambda: nn.Transformer(32, 4, 1, 1, 64, batch_first=True),
        lambda draw: (torch.randn(2, 8, 32, generator=draw), torch.randn(2, 6, 32, generator=draw)),
    ),
    "vit-pytorch/vit": (_of("vit_pytorch", "ViT", dropout=0.1, emb_dropout=0.1, **_VIT), IMAGE),
    "vit-pytorch/deepvit": (_of("vit_pytorch.deepvit", "DeepViT", **_VIT), IMAGE),
    "vit-pytorch/cait": (_of("vit_pytorch.cait", "CaiT", cls_depth=1, layer_dropout=0.05, **_VIT), IMAGE),
    "vit-pytorch/ats": (_of("vit_pytorch.ats_vit", "ViT", max_tokens_per_depth=(12, 8), **_VIT), IMAGE),
    "vit-pytorch/navit": (
        _of("vit_pytorch.na_vit", "NaViT", **_VIT),
        lambda draw: ([[torch.randn(3, 64, 32, generator=draw), torch.randn(3, 32, 32, generator=draw)]],),
    ),
    "vit-pytorch/max_vit": (
        _of(
            "vit_pytorch.max_vit",
            "MaxViT",
            num_classes=10,
            dim_conv_stem=16,
            dim=16,
            dim_head=8,
            depth=(1, 1),
            window_size=4,
        ),
        IMAGE,
    ),
    "vit-pytorch/xcit": (_of("vit_pytorch.xcit", "XCiT", cls_depth=1, dropout=0.1, **_VIT), IMAGE),
    "x-transformers/rotary": (_x_decoder(rotary_pos_emb=True), _tokens(64, 2, 16)),
    "x-transformers/glu": (
        _x_decoder(use_rmsnorm=True, ff_glu=True, ff_swish=True, attn_kv_heads=2),
        _tokens(64, 2, 16),
    ),
    "x-transformers/alibi": (_x_decoder(alibi_pos_bias=True, attn_flash=True), _tokens(64, 2, 16)),
    "x-transformers/gated": (
        _x_decoder(gate_residual=True, shift_tokens=1, residual_attn=True),
        _tokens(64, 2, 16),
    ),
    "timm/mixer": (_of("timm", "create_model", "mixer_s32_224", num_classes=10), _floats(1, 3, 224, 224)),
    "timm/convnextv2": (_of("timm", "create_model", "convnextv2_atto", num_classes=10), IMAGE),
    "timm/ghostnet": (_of("timm", "create_model", "ghostnet_100", num_classes=10), IMAGE),
    "timm/repvgg": (_of("timm", "create_model", "repvgg_a0", num_classes=10), IMAGE),
    "torchvision/resnet18": (_of("torchvision.models", "resnet18", num_classes=10), IMAGE),
    "torchvision/densenet121": (_of("torchvision.models", "densenet121", num_classes=10), IMAGE),
    "torchvision/mobilenet_v3": (_of("torchvision.models", "mobilenet_v3_small", num_classes=10), IMAGE),
    "torchvision/swin_v2_t": (_of("torchvision.models", "swin_v2_t", num_classes=10), IMAGE),
    "torchvision/googlenet": (_of("torchvision.models", "googlenet", init_weights=True), IMAGE),
    "torchvision/lraspp": (
        _of(
            "torchvision.models.segmentation",
            "lraspp_mobilenet_v3_large",
            weights_backbone=None,
            num_classes=4,
        ),
        IMAGE,
    ),
    "segmentation-models-pytorch/unet": (
        _of("segmentation_models_pytorch", "Unet", encoder_name="resnet18", encoder_weights=None),
        IMAGE,
    ),
    "segmentation-models-pytorch/fpn": (
        _of("segmentation_models_pytorch", "FPN", encoder_name="resnet18", encoder_weights=None),
        IMAGE,
    ),
    "segmentation-models-pytorch/deeplab": (
        _of("segmentation_models_pytorch", "DeepLabV3Plus", encoder_name="resnet18", encoder_weights=None),
        IMAGE,
    ),
    "torch-geometric/gcn": (lambda: Graphs("GCNConv"), _edges),
    "torch-geometric/gat": (lambda: Graphs("GATConv", heads=2, concat=False), _edges),
    "torch-geometric/sage": (lambda: Graphs("SAGEConv"), _edges),
    "monai/unet": (
        _of(
            "monai.networks.nets",
            "UNet",
            spatial_dims=2,
            in_channels=1,
            out_channels=2,
            channels=(8, 16, 32),
            strides=(2, 2),
            num_res_units=1,
        ),
        _floats(2, 1, 32, 32),
    ),
    "monai/segresnet": (
        _of(
            "monai.networks.nets", "SegResNet", spatial_dims=3, init_filters=8, in_channels=1, out_channels=2
        ),
        _floats(1, 1, 16, 16, 16),
    ),
    "linformer/lm": (
        _of("linformer", "LinformerLM", num_tokens=64, dim=64, seq_len=32, depth=2, heads=4, k=8),
        _tokens(64, 2, 32),
    ),
    "local-attention/lm": (
        _of(
            "local_attention",
            "LocalTransformer",
            num_tokens=64,
            dim=64,
            depth=2,
            max_seq_len=32,
            causal=True,
            local_attn_window_size=8,
        ),
        _tokens(64, 2, 32),
    ),
    "conformer/conformer": (
        _of("conformer", "Conformer", dim=64, depth=2, dim_head=16, heads=4, ff_mult=2, conv_kernel_size=7),
        _floats(2, 32, 64),
    ),
    "soft-moe-pytorch/soft_moe": (
        _of("soft_moe_pytorch", "SoftMoE", dim=64, seq_len=32, num_experts=4),
        _floats(2, 32, 64),
    ),
    "siren-pytorch/siren": (
        _of("siren_pytorch", "SirenNet", dim_in=2, dim_hidden=64, dim_out=3, num_layers=3),
        _floats(64, 2),
    ),
    "tab-transformer-pytorch/ft": (
        _of(
            "tab_transformer_pytorch",
            "FTTransformer",
            categories=(10, 5, 6),
            num_continuous=4,
            dim=32,
            dim_out=1,
            depth=2,
            heads=4,
        ),
        lambda draw: (torch.randint(0, 5, (4, 3), generator=draw), torch.randn(4, 4, generator=draw)),
    ),
    "egnn-pytorch/egnn": (
        _of("egnn_pytorch", "EGNN_Network", num_tokens=21, dim=32, depth=2),
        lambda draw: (torch.randint(0, 21, (2, 16), generator=draw), torch.randn(2, 16, 3, generator=draw)),
    ),
    "pytorch-tcn/tcn": (_of("pytorch_tcn", "TCN", num_inputs=8, num_channels=[16, 16]), _floats(2, 8, 32)),
    "mambapy/mamba": (
        lambda: _of(
            "mambapy.mamba", "Mamba", _of("mambapy.mamba", "MambaConfig", d_model=32, n_layers=2)()
        )(),
        _floats(2, 16, 32),
    ),
    "efficientnet-pytorch/b0": (
        lambda: importlib.import_module("efficientnet_pytorch").EfficientNet.from_name("efficientnet-b0"),
        IMAGE,
    ),
}


@functools.cache
def schemas() -> torch.library.Library | None:
    """Let torchvision be imported where it was built for another torch: its Python half, which is all that
    nets here are made of, asks for the schemas of two operators that are missing then."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return None
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


def installed() -> dict[str, str]:
    """Versions of the packages that are there."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def names() -> list[str]:
    """Nets whose package is there."""
    known = {"plain", *installed()}
    return [name for name in NETS if name.partition("/")[0] in known]


def build(name: str, seed: int = 0) -> tuple[nn.Module, tuple[Any, ...]]:
    """A net and one call's positional arguments. Raises ``KeyError`` for a name that is not there."""
    schemas()
    make, _ = NETS[name]
    torch.manual_seed(seed)
    return make().eval(), inputs_of(name, seed)


def inputs_of(name: str, seed: int = 0) -> tuple[Any, ...]:
    return NETS[name][1](torch.Generator().manual_seed(1000 + seed))


def main() -> None:
    for name in names():
        try:
            model, inputs = build(name)
            with torch.no_grad():
                model(*inputs)
            print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)


if __name__ == "__main__":
    main()
