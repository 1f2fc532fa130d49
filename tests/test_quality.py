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


def test_progress_says_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    given = [(torch.randn(4, 3),), (torch.randn(2, 3),)]
    measure_quality(lambda x: x, lambda x: x, given, progress=True)
    assert "comparing: batch 2 of 2, 6 rows, KL 0 nats so far" in capsys.readouterr().err
    measure_quality(lambda x: x, lambda x: x, iter(given), progress=True)
    assert "comparing: batch 2, 6 rows" in capsys.readouterr().err
    measure_quality(lambda x: x, lambda x: x, given)
    assert not capsys.readouterr().err


@pytest.fixture
def language(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a target, its tokenizer and two texts."""
    (tmp_path / "spoken.py").write_text(
        "import torch\n\n\ndef model():\n    torch.manual_seed(0)\n"
        "    layers = (torch.nn.Embedding(32, 64), torch.nn.Linear(64, 64), torch.nn.Tanh(),\n"
        "              torch.nn.Linear(64, 32))\n"
        "    return torch.nn.Sequential(*layers), (torch.zeros(2, 16, dtype=torch.int64),)\n\n\n"
        "def tokenizer():\n    return lambda text: [ord(letter) % 32 for letter in text]\n\n\n"
        "broken = 3\n"
    )
    (tmp_path / "held_out.txt").write_text("the harbour lay still " * 20)
    (tmp_path / "seen.txt").write_text("a boat came in at dusk " * 20)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 200)
    (tmp_path / "short.txt").write_text("too short")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch._dynamo.reset()
    return tmp_path


def invoked(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["quality", "spoken:model", *arguments])


TEXT = ("--text", "held_out.txt", "--tokenizer", "spoken:tokenizer")


def test_a_text_a_plan_and_its_replay(language: Path) -> None:
    chosen = ("--bits", "6", "--scheme", "int8", "--scheme", "int4{group=64,method=gptq}", "--score", "kl")
    data = ("--calibration-text", "seen.txt", "--save-quantization", "plan.json", "--json")
    done = invoked(*TEXT, *chosen, *data)
    assert done.exit_code == 0, done.output
    first = json.loads(done.stdout)
    # 440 letters: 13 batches of 2 x 16.
    assert first["tokens"] == 13 * 32 and first["perplexity_before"] > 1
    assert 0 < first["divergence"] < first["divergence_p99"] and first["agreement"] > 0.5
    assert {c["scheme"] for c in first["quantization"]["choices"]} == {"int8", "int4{group=64,method=gptq}"}
    assert first["quantization"] == json.loads((language / "plan.json").read_text())
    again = invoked(*TEXT, "--quantization", "plan.json", "--calibration-text", "seen.txt", "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["divergence"] == pytest.approx(first["divergence"], rel=1e-6)
    fewer = invoked(*TEXT, "--scheme", "int8", "--tokens", "64")
    assert fewer.exit_code == 0, fewer.output
    for line in ("rows of logits       64", "KL, mean", "KL, 99th percentile", "same top", "perplexity"):
        assert line in fewer.stdout
    assert "bits a weight" in fewer.stdout


def test_schemes_that_round_inputs_are_compared_as_they_run(language: Path) -> None:
    static, dynamic = (
        json.loads(invoked(*TEXT, "--scheme", scheme, "--json").stdout) for scheme in ("int8", "int8-dynamic")
    )
    assert dynamic["divergence"] > 1.2 * static["divergence"] > 0


def test_a_pipeline_is_compared(language: Path) -> None:
    done = invoked(*TEXT, "--pipeline", "default", "--emit", "eager", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["quantization"] is None and told["divergence"] < 1e-9 and told["agreement"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--text", "held_out.txt"), 2, "a text needs --tokenizer MODULE:FUNCTION"),
        (("--tokenizer", "spoken:tokenizer"), 2, "of no use without --text"),
        ((*TEXT, "--batches", "spoken:model"), 2, "both say what to compare on"),
        ((*TEXT, "--calibration-text", "held_out.txt", "--bits", "4"), 2, "a text that is held out"),
        ((*TEXT, "--calibration-text", "seen.txt"), 2, "is for packing weights"),
        ((*TEXT, "--save-quantization", "plan.json"), 2, "there is no plan to save"),
        ((*TEXT[:3], "spoken:broken"), 1, "tokenizer 'spoken:broken' is int, not a function"),
        ((*TEXT[:3], "spoken:tokeniser"), 1, "did you mean 'tokenizer'"),
        (("--text", "short.txt", *TEXT[2:]), 1, "short.txt: the text has 9 ids"),
        (("--text", "latin.txt", *TEXT[2:]), 1, "latin.txt is no text in UTF-8"),
        ((*TEXT, "--bits", "-1"), 1, "expected a finite number above 0"),
        (
            (*TEXT, "--bits", "6", "--score", "fisher", "--calibration-text", "seen.txt"),
            1,
            "score 'fisher' needs a loss",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else None,
)
def test_bad_arguments_are_named(
    language: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    done = invoked(*arguments)
    assert done.exit_code == (code if code == 2 else done.exit_code) and done.exit_code != 0
    said = done.output if code == 2 else f"{done.output} {done.exception}"
    assert message in " ".join(said.split())
    assert not (language / "plan.json").exists()


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
