"""Batch norms under torch versions that check what is handed to a backward, and those that need not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphopt import _torch
from tests.steps import budgeted


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        parts = [(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU()) for _ in range(3)]
        self.body = nn.Sequential(*[layer for part in parts for layer in part])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).square().mean()


@pytest.mark.parametrize("unchecked", [True, False])
def test_norms_run_again_only_where_statistics_can_be_handed_over(
    unchecked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not unchecked:
        monkeypatch.setattr(_torch, "can_ignore_versions", lambda: False)
    elif not _torch.can_ignore_versions():
        pytest.skip("this torch checks every value that is handed over")
    fast = budgeted(Norms, (torch.randn(4, 4, 16, 16),))
    again = {item.op for choice in fast.plan.choices for item in choice.recomputed}
    assert ("aten._native_batch_norm_legit_functional.default" in again) is unchecked
    marked = [
        node.name
        for program in fast.programs
        for node in program.graph.nodes
        if node.meta.get("saved_tensor_with_no_vc_check")
    ]
    assert bool(marked) is unchecked
