"""What rounding one weight does to predictions: the probe, the observer, the score, bits as a bound."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt import BudgetSyntaxError, Calibration, InputsError, QuantizationError
from graphopt.packing.allocate import chosen_schemes, observers_for
from graphopt.packing.convert import matrix_of, tensor_of
from graphopt.packing.divergence import probe, swap_divergences
from graphopt.plugins import default_host
from graphopt.quality import measure_quality
from tests.packing_cases import FEW, Chain, batches

Tensor = torch.Tensor
IDS = batches(1)[0]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def logits(model: nn.Module) -> Any:
    return lambda ids: {"logits": model(ids)}


def doubtful(seed: int = 0) -> nn.Module:
    """A layer that matters and one of the same size that hardly does."""
    torch.manual_seed(seed)

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(40, 64)
            self.loud, self.quiet = nn.Linear(64, 64), nn.Linear(64, 64)
            self.head = nn.Linear(64, 40)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            return self.head(x + self.loud(x) + 1e-3 * self.quiet(x))  # type: ignore[no-any-return]

    return Branches().eval()


@pytest.mark.parametrize("inner", [16, 64, 130])
def test_the_probe_rounds_to_sixteen_levels_of_64_neighbours(inner: int) -> None:
    weight = torch.randn(5, inner, generator=torch.Generator().manual_seed(1))
    weight[2] = 3.0
    found = probe(weight)
    assert found.shape == weight.shape and torch.equal(found[2], weight[2])
    for start in range(0, inner, 64):
        part, exact = found[:, start : start + 64], weight[:, start : start + 64]
        step = (exact.amax(1) - exact.amin(1)) / 15
        assert ((part - exact).abs().amax(1) <= step / 2 + 1e-6).all()
        assert all(len(row.unique()) <= 16 for row in part)
    assert not torch.equal(found, weight)


@pytest.mark.parametrize("orientation", ["rows", "columns", "stacked rows", "stacked columns"])
def test_a_matrix_goes_back_into_its_parameter(orientation: str) -> None:
    shape = (2, 3, 4) if "stacked" in orientation else (3, 4)
    parameter = torch.arange(24.0)[: 24 if len(shape) == 3 else 12].view(shape)
    assert torch.equal(tensor_of(matrix_of(parameter, orientation), shape, orientation), parameter)


def test_each_weight_is_rounded_alone_and_put_back() -> None:
    model = Chain().eval()
    before = copy.deepcopy(model.state_dict())
    data = graphopt.calibrate(model, batches(), observers=("moments", "divergence"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name in ("embed.weight", "layers.1.up.weight", "layers.2.down.weight"):
        changed = copy.deepcopy(model)
        parameter = changed.get_parameter(name)
        with torch.no_grad():
            parameter.copy_(probe(parameter))
        expected = measure_quality(logits(model), logits(changed), [IDS]).divergence
        assert expected > 0
        assert data.of(name)["divergence"].item() == pytest.approx(expected, rel=1e-3)


def test_a_failure_puts_the_weight_back() -> None:
    model = Chain().eval()
    kept = copy.deepcopy(model.state_dict())
    calls = []

    def refuse(module: nn.Module, args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no more")

    model.register_forward_pre_hook(refuse)
    with pytest.raises(RuntimeError, match="no more"):
        swap_divergences(model, {"layers.0.up.weight": "rows"}, IDS, {})
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_the_score_of_the_probe_is_what_was_measured_and_grows_with_the_error() -> None:
    model = doubtful()
    data = graphopt.calibrate(model, batches(), observers=("moments", "gram", "divergence"))
    scorer = default_host().scorer("kl")
    for name in ("embed.weight", "loud.weight", "head.weight"):
        weight, known = model.get_parameter(name).detach(), data.of(name)
        rounded = probe(weight)
        assert scorer.score(weight, rounded, known) == pytest.approx(known["divergence"].item(), rel=1e-5)
        twice = scorer.score(weight, weight + 2 * (rounded - weight), known)
        assert twice == pytest.approx(4 * known["divergence"].item(), rel=1e-4)
        assert scorer.score(weight, weight.clone(), known) == 0.0
    loud, quiet = (data.of(f"{name}.weight")["divergence"].item() for name in ("loud", "quiet"))
    # What is left of the quiet one is the rounding of logits.
    assert loud > 1e3 * quiet


def test_the_score_spends_bits_where_predictions_depend_on_them() -> None:
    model = doubtful()
    data = graphopt.calibrate(model, batches(), observers=("moments", "divergence"))
    found = {}
    for score in ("weights", "kl"):
        copied = copy.deepcopy(model)
        plan = graphopt.quantize(
            copied, IDS, bits=7.3, schemes=("int8", "few"), score=score, calibration=data, plugins=[FEW]
        )
        assert plan.bits <= 7.3
        schemes = {choice.weight: choice.scheme for choice in plan.choices}
        found[score] = measure_quality(logits(model), logits(copied), [IDS]).divergence
        if score == "kl":
            assert [name for name, scheme in schemes.items() if scheme == "few"] == ["quiet.weight"]
    assert found["kl"] < found["weights"]


def test_bits_bound_what_is_stored() -> None:
    model = Chain().eval()
    options: dict[str, Any] = {"schemes": ("int8", "few"), "plugins": [FEW], "dry_run": True}
    last = float("inf")
    for bits in (6.0, 8.0, 12.0):
        plan = graphopt.quantize(model, IDS, bits=bits, **options)
        assert plan.bits <= bits and plan.error < last
        assert plan.bits == pytest.approx(
            8
            * sum(c.bytes_after for c in plan.choices)
            / sum(p.numel() for p in model.parameters() if p.dim() > 1)
        )
        assert f"{plan.bits:.2f} bits a weight" in plan.summary
        last = plan.error
    both = graphopt.quantize(model, IDS, bits=12.0, weights="30%", **options)
    assert both.bytes_after <= 0.3 * both.bytes_before
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(BudgetSyntaxError, match=r"expected a finite number above 0"):
            graphopt.quantize(model, IDS, bits=wrong, **options)
    with pytest.raises(InputsError, match="plan= and bits="):
        graphopt.quantize(model, IDS, bits=4.0, plan=both)


def test_what_schemes_and_scores_need_is_observed() -> None:
    host = default_host()

    def needed(schemes: tuple[str, ...], score: str | None) -> tuple[str, ...]:
        scorer = None if score is None else host.scorer(score)
        return observers_for(chosen_schemes(schemes, host), scorer)

    assert needed(("int8", "llm-int8"), None) == ("moments",)
    assert needed(("int8", "int4{method=gptq}"), "outputs") == ("moments", "gram")
    assert needed(("int4-awq",), "kl") == ("moments", "gram", "divergence")
    assert needed(("int8",), "fisher") == ("moments", "gradients")


def test_the_score_without_its_observer_and_models_without_logits_are_refused() -> None:
    model = Chain().eval()
    data = graphopt.calibrate(model, batches(), observers=("moments",))
    with pytest.raises(QuantizationError, match="score 'kl' needs calibration with observer 'divergence'"):
        graphopt.quantize(model, IDS, schemes=("int8",), score="kl", calibration=data, dry_run=True)

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).sum()  # type: ignore[no-any-return]

    with pytest.raises(InputsError, match="the output holds no logits"):
        graphopt.calibrate(Sum().eval(), [(torch.ones(2, 8),)], observers=("moments", "divergence"))


def test_it_is_the_default_where_it_was_observed() -> None:
    model = Chain().eval()
    for observers, score in ((("moments", "divergence"), "kl"), (("moments",), "outputs")):
        data = graphopt.calibrate(model, batches(), observers=observers)
        plan = graphopt.quantize(model, IDS, schemes=("int8",), calibration=data, dry_run=True)
        assert plan.score == score
    assert graphopt.quantize(model, IDS, schemes=("int8",), dry_run=True).score == "weights"


def test_it_is_kept_in_files(tmp_path: Any) -> None:
    data = graphopt.calibrate(Chain().eval(), batches(), observers=("moments", "divergence"))
    data.save(tmp_path / "data")
    again = Calibration.load(tmp_path / "data")
    assert again.observers == ("moments", "divergence")
    assert again.of("embed.weight")["divergence"] == data.of("embed.weight")["divergence"]
