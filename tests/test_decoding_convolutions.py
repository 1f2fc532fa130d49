"""Causal convolutions between attentions: what they read last is kept, others are refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphopt
from graphopt.errors import CaptureError
from graphopt_kernels.causal_convolution import causal_convolution, causal_convolution_supports
from tests.decoders import VOCABULARY, WIDTH, family, tokens

CHECK: Any = torch.library.opcheck


def drawn(dilation: int = 1, groups: int = 2, taps: int = 3) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return (
        torch.randn(2, 4, 11, dtype=torch.float64), torch.randn(6, 4 // groups, taps, dtype=torch.float64),
        torch.randn(6, dtype=torch.float64),
    )  # fmt: skip


@pytest.mark.parametrize(("dilation", "groups", "taps"), [(1, 2, 3), (3, 1, 2), (2, 2, 4)])
@pytest.mark.parametrize("parts", [[11], [1] * 11, [5, 1, 1, 4], [8, 3]], ids=str)
def test_rows_in_parts_are_those_of_the_whole(
    parts: list[int], dilation: int, groups: int, taps: int
) -> None:
    x, weight, bias = drawn(dilation, groups, taps)
    reach = dilation * (taps - 1)
    expected = F.conv1d(x, weight, bias, padding=reach, dilation=dilation, groups=groups)[..., :11]
    # What was never written may be anything; other sequences stay as they are.
    history = torch.full((3, 4, reach), float("nan"), dtype=torch.float64)
    found, start = [], 0
    for count in parts:
        at = torch.arange(start, start + count)
        rows = x[:, :, start : start + count]
        found.append(causal_convolution(rows, weight, bias, history, at, dilation, groups))
        start += count
    torch.testing.assert_close(torch.cat(found, 2), expected, rtol=1e-13, atol=1e-13)
    assert history[2].isnan().all() and not history[:2].isnan().any()


def test_it_passes_opcheck() -> None:
    x, weight, bias = drawn()
    history = torch.zeros(2, 4, 2, dtype=torch.float64)
    CHECK(causal_convolution, (x, weight, bias, history, torch.arange(11), 1, 2))


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        (0, torch.ones(4, 11), "takes rows [B, C, n] and a weight [C', C / groups, taps], got 2 and 3"),
        (1, torch.ones(6, 3, 3), "the weight is [6, 3, 3]: it does not fit 4 channels in 2 groups"),
        (1, torch.ones(6, 2, 1), "reads no row but its own: 1 taps, 1 apart"),
        (2, torch.ones(4), "bias is [4]: expected [6]"),
        (3, torch.ones(1, 4, 2), "the history is [1, 4, 2]: expected [at least 2, 4, 2]"),
        (4, torch.arange(3), "positions are torch.int64 [3]: expected torch.int64 [11]"),
    ],
)
def test_other_arguments_are_refused(at: int, value: torch.Tensor, text: str) -> None:
    given: list[Any] = [*drawn(), torch.zeros(2, 4, 2), torch.arange(11), 1, 2]
    given[at] = value
    assert str(causal_convolution_supports(*given)).startswith(text)


class Convolved(nn.Module):
    """Two layers of attention behind convolutions that look back ``before`` rows, ahead ``ahead``."""

    def __init__(self, before: int = 4, ahead: int = 0, dilation: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.ahead, self.dilation = before, ahead, dilation
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        taps = (before + ahead) // dilation + 1
        self.weights = nn.ParameterList(torch.randn(WIDTH, 1, taps) / 2 for _ in range(2))
        self.projections = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        length = x.shape[1]
        for weight, project in zip(self.weights, self.projections, strict=True):
            rows = F.conv1d(
                x.transpose(1, 2), weight, padding=self.before, dilation=self.dilation, groups=WIDTH
            )
            x = x + torch.tanh(rows[..., :length].transpose(1, 2))
            heads = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in project(x).chunk(3, -1))
            made = F.scaled_dot_product_attention(*heads, is_causal=True)
            x = x + made.transpose(1, 2).flatten(2)
        logits: torch.Tensor = self.head(x)
        return logits


def test_what_convolutions_read_last_is_kept() -> None:
    model = Convolved().double().eval()
    fast = graphopt.optimize(
        model, (tokens(2, 9),), generate=graphopt.Generate(32, max_batch=3), emit="eager", on_error="raise"
    )
    record = fast.report.decoding
    # Keys and values, and four rows of two layers.
    assert record.cache_bytes == 2 * (2 * 3 * 32 * WIDTH + 3 * WIDTH * 4) * 8
    for batch, length in ((2, 3), (3, 9), (1, 1)):
        ids = tokens(batch, length, seed=length)
        found = fast.generate(ids, max_new_tokens=12)
        for _ in range(12):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
        assert torch.equal(found, ids)


def test_convolutions_that_look_ahead_are_refused_by_name() -> None:
    model = Convolved(before=2, ahead=2, dilation=1).eval()
    text = "conv1d convolves positions in a way that was not recognised as causal"
    with pytest.raises(CaptureError, match=re.escape(text)):
        graphopt.optimize(
            model, (tokens(2, 9),), generate=graphopt.Generate(32), emit="eager", on_error="raise"
        )


def test_a_model_of_convolutions_and_attention_gives_its_own_tokens() -> None:
    model = family("lfm2")
    fast = graphopt.optimize(
        model, (tokens(2, 9),), generate=graphopt.Generate(64, max_batch=4), emit="eager", on_error="raise"
    )
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    for options in ({}, {"attention_mask": mask}, {"attention_mask": mask, "num_beams": 2}):
        given: Any = {"max_new_tokens": 20, "do_sample": False, **options}
        assert torch.equal(fast.generate(ids, **given), model.generate(ids, **given))  # type: ignore[operator]
