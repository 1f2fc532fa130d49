"""Predictions before and after a change: against the formulas, bad input, the verb."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from graphopt import InputsError
from graphopt.cli.main import cli
from graphopt.quality import measure_quality

Tensor = torch.Tensor


def table(seed: int, classes: int = 11) -> Any:
    weights = torch.randn(20, classes, generator=torch.Generator().manual_seed(seed))
    return lambda input_ids: {"logits": weights[input_ids]}


def test_numbers_are_those_of_the_formulas() -> None:
    before, after = table(0), table(1)
    ids = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(2))
    found = measure_quality(before, after, [{"input_ids": ids[:2]}, {"input_ids": ids[2:]}])
    p, q = (model(ids)["logits"].log_softmax(-1) for model in (before, after))
    divergence = (p.exp() * (p - q)).sum(-1)
    assert found.tokens == 21
    assert found.divergence == pytest.approx(divergence.mean().item(), rel=1e-5)
    assert found.divergence_p99 == pytest.approx(divergence.max().item(), rel=1e-5)
    assert found.agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item())
    for value, log in ((found.perplexity_before, p), (found.perplexity_after, q)):
        chosen = log[:, :-1].gather(-1, ids[:, 1:, None])
        assert value == pytest.approx((-chosen.mean()).exp().item(), rel=1e-5)


def test_the_same_model_is_the_same() -> None:
    labels = torch.full((2, 5), -100)
    labels[0, 3] = 4
    found = measure_quality(
        lambda input_ids, labels: table(0)(input_ids),
        lambda input_ids, labels: table(0)(input_ids),
        [{"input_ids": torch.arange(10).view(2, 5), "labels": labels}],
    )
    assert (found.divergence, found.divergence_p99, found.agreement) == (0.0, 0.0, 1.0)
    assert found.perplexity_before == found.perplexity_after
    alone = measure_quality(lambda x: x, lambda x: x, [(torch.randn(4, 3),)])
    assert alone.perplexity_before is None and "perplexity" not in str(alone)


def test_bad_input_is_named() -> None:
    def ids(x: Tensor) -> Tensor:
        return x

    cases: list[tuple[Any, list[Any], str]] = [
        (ids, [], "there are no batches to compare on"),
        (ids, [torch.ones(2, 3)], "batch 0 is a Tensor: expected a tuple"),
        (ids, [(torch.arange(3),)], "batch 0: the output holds no logits"),
        (lambda x: x[:1], [(torch.randn(2, 3),)], r"logits have shape \(1, 3\), the reference's \(2, 3\)"),
        (lambda x: x @ x, [(torch.randn(2, 3),)], "batch 0: the model does not run with it"),
    ]
    for changed, batches, message in cases:
        with pytest.raises(InputsError, match=message):
            measure_quality(ids, changed, batches)


def test_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quality_target.py").write_text(
        "import torch\n\n\ndef small():\n    torch.manual_seed(0)\n"
        "    model = torch.nn.Sequential(torch.nn.Embedding(16, 32), torch.nn.Linear(32, 16))\n"
        "    return model, (torch.arange(8).view(1, 8),)\n\n\n"
        "def two():\n    return [(torch.arange(8).view(1, 8),), (torch.arange(16).view(2, 8),)]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch._dynamo.reset()
    runner = CliRunner()
    call = ["quality", "quality_target:small", "--scheme", "int8", "--batches", "quality_target:two"]
    done = runner.invoke(cli, call, catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    assert "rows of logits       24" in done.stdout and "2 weights packed:" in done.stdout
    done = runner.invoke(cli, [*call, "--json"], catch_exceptions=False)
    told = json.loads(done.stdout)
    assert 0 < told["divergence"] < 1e-2 and told["agreement"] > 0.9
    assert told["quantization"]["schemes"] == ["int8"]
