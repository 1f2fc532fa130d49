"""No pass stumbles over sizes that stay symbols: each rewrites, or says why it does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt

WIDTH, HEADS, WORDS = 32, 4, 48


class Attention(nn.Module):
    """Rotary embeddings, repeated heads, a window or a bias, dropout, norms and a loss over a vocabulary."""

    def __init__(self, mask: Callable[[int], Tensor] | None) -> None:
        super().__init__()
        self.mask = mask
        self.embed, self.norm = nn.Embedding(WORDS, WIDTH), nn.RMSNorm(WIDTH)
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, WIDTH // 2) for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        rows, length = tokens.shape
        x = self.norm(self.embed(tokens))
        q = self.q(x).view(rows, length, HEADS, -1).transpose(1, 2)
        k, v = (
            part(x).view(rows, length, HEADS // 2, -1).transpose(1, 2).repeat_interleave(2, dim=1)
            for part in (self.k, self.v)
        )
        angle = torch.arange(length)[:, None] * 10.0 ** -torch.arange(4.0)
        cos, sin = (torch.cat([part, part], -1) for part in (angle.cos(), angle.sin()))
        q, k = (t * cos + torch.cat([-t[..., 4:], t[..., :4]], -1) * sin for t in (q, k))
        if self.mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(length))
        x = x + F.dropout(y.transpose(1, 2).reshape(rows, length, WIDTH), 0.1, self.training)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), tokens.flatten())


class WrittenOut(Attention):
    """Attention and norm as models spell them."""

    def __init__(self) -> None:
        super().__init__(None)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.norm.weight
        scores = self.q(x) @ self.q(x).transpose(1, 2) / 4.0
        hidden = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        y = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ x
        return F.cross_entropy(self.head(F.layer_norm(y + x, (WIDTH,))).flatten(0, 1), tokens.flatten())


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.max_pool2d(self.norm(self.first(x)).relu(), 2)).mean()


def window(length: int) -> Tensor:
    at = torch.arange(length)
    return (at[:, None] >= at) & (at[:, None] - at < 4)


def bias(length: int) -> Tensor:
    return -(torch.arange(length)[:, None] - torch.arange(length)).abs() * 0.1


TOKENS = [torch.randint(WORDS, (rows, length)) for rows, length in ((2, 8), (3, 12))]
IMAGES = [torch.randn(rows, 3, size, size) for rows, size in ((2, 16), (3, 20))]
MODELS = {
    "causal": (lambda: Attention(None), TOKENS),
    "window": (lambda: Attention(window), TOKENS),
    "bias": (lambda: Attention(bias), TOKENS),
    "written out": (WrittenOut, TOKENS),
    "convolutions": (Convolutions, IMAGES),
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "infer"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_default_pipeline_takes_symbols(kind: str, train: bool) -> None:
    make, inputs = MODELS[kind]
    torch.manual_seed(0)
    model = make().train(train)
    allow = ("fold-batch-norm", "fuse-dropout", "quantize-saved")
    with torch.set_grad_enabled(train):
        fast = graphopt.optimize(
            model, (inputs[0],), dynamic_shapes=True, allow=allow if not train else (), emit="eager",
            on_error="raise", cache=False,
        )  # fmt: skip
        for x in inputs:
            torch.manual_seed(1)
            found = fast(x)
            torch.manual_seed(1)
            torch.testing.assert_close(found, model(x))
    assert {program.name.partition(".")[0] for program in fast.programs} == {"g0"}


def test_a_window_of_unknown_length_is_left_to_its_mask() -> None:
    model = Attention(window).eval()
    with torch.no_grad():
        fast = graphopt.optimize(model, (TOKENS[0],), dynamic_shapes=True, emit="eager", on_error="raise")
    said = [miss.reason.text for miss in fast.report.near_misses if miss.rule == "window-attention"]
    assert said == ["how many queries and keys there are is known at run time alone"]
