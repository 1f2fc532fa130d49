"""Trainers of others drive optimized modules: transformers, accelerate, Lightning.

Losses are compared bit for bit with the same loop over the model itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphopt

WAYS = ("optimize", "optimize on the first call", "backend")


def small() -> nn.Module:
    torch.manual_seed(0)
    blocks = [(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16), nn.LayerNorm(16)) for _ in range(4)]
    return nn.Sequential(*(layer for block in blocks for layer in block))


def rows() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randn(2, 16, generator=generator)) for _ in range(128)]  # type: ignore[misc]


def made(way: str, model: nn.Module, inputs: Any, budget: str = "85%") -> nn.Module:
    """``model``, to be trained within ``budget``."""
    torch._dynamo.reset()
    if way == "backend":
        model.compile(backend="graphopt", options={"budget": budget, "on_error": "raise"})
        return model
    return graphopt.optimize(model, inputs if way == "optimize" else None, budget=budget, on_error="raise")


def recomputes(module: nn.Module) -> bool:
    """Whether the budget made a difference."""
    return not isinstance(module, graphopt.Optimized) or any(c.recomputed for c in module.plan.choices)


# --- accelerate --------------------------------------------------------------------------------


@pytest.fixture
def accelerated() -> Any:
    """Makes an ``Accelerator``, its process-wide state put back."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    def make(**options: Any) -> Any:
        AcceleratorState._reset_state(True)
        return Accelerator(cpu=True, **options)

    yield make
    AcceleratorState._reset_state(True)


def accelerated_losses(accelerator: Any, model: nn.Module) -> tuple[list[float], nn.Module]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = torch.utils.data.DataLoader(rows(), batch_size=64)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for x, y in [batch for _ in range(2) for batch in loader]:
        with accelerator.accumulate(model):
            loss = nn.functional.mse_loss(model(x), y)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses, model


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"mixed_precision": "bf16"}, {"gradient_accumulation_steps": 2}])
@pytest.mark.parametrize("way", WAYS)
def test_accelerate_trains_as_it_does_the_model(
    way: str, options: dict[str, Any], accelerated: Callable[..., Any], tmp_path: Path
) -> None:
    expected, _ = accelerated_losses(accelerated(**options), small())
    accelerator = accelerated(**options)
    module = made(way, small(), (torch.randn(64, 16),))
    found, prepared = accelerated_losses(accelerator, module)
    assert found == expected and expected[-1] < expected[0]
    assert recomputes(module)
    assert accelerator.unwrap_model(prepared) is module
    before = copy.deepcopy(module.state_dict())
    accelerator.save_state(str(tmp_path))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    accelerator.load_state(str(tmp_path))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.slow
def test_accelerate_takes_the_backend_from_a_plugin_of_its_own(accelerated: Callable[..., Any]) -> None:
    """Its list of backend names is closed (docs/integrations.md says so); its plugin's arguments are not."""
    from accelerate.utils import TorchDynamoPlugin

    with pytest.raises(ValueError, match=r"'GRAPHOPT' is not a valid DynamoBackend"):
        accelerated(dynamo_backend="graphopt")

    class Backend(TorchDynamoPlugin):  # type: ignore[misc]
        def to_kwargs(self) -> dict[str, Any]:
            return {**super().to_kwargs(), "backend": "graphopt"}

    expected, _ = accelerated_losses(accelerated(), small())
    torch._dynamo.reset()
    plugin = Backend(backend="eager", options={"budget": "85%", "on_error": "raise"})
    accelerator = accelerated(dynamo_plugin=plugin)
    found, prepared = accelerated_losses(accelerator, small())
    assert found == expected
    assert isinstance(prepared, torch._dynamo.OptimizedModule)


# --- transformers ------------------------------------------------------------------------------


def trained(module: nn.Module, folder: Path, **options: Any) -> tuple[list[float], Any]:
    from transformers import Trainer, TrainingArguments

    ids = (torch.arange(32) + 5 * torch.arange(24)[:, None]) % 128
    settings = TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, logging_steps=1, **options,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(module, settings, train_dataset=data)  # type: ignore[arg-type]
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, use_cache=False,
            num_attention_heads=2, num_key_value_heads=2, attn_implementation="sdpa",
        )
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "gradient_accumulation_steps": 2}])
@pytest.mark.parametrize("way", WAYS)
def test_trainer_trains_as_it_does_the_model(way: str, options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    expected, _ = trained(llama(), tmp_path, **options)
    example = torch.zeros(4, 32, dtype=torch.long)
    # Passes that fuse cross entropy and norms sum in another order; the log has five digits.
    module = made(way, llama(), {"input_ids": example, "labels": example}, budget="90%")
    found, trainer = trained(module, tmp_path, **options)
    assert found == pytest.approx(expected, rel=2e-4) and expected[-1] < expected[0]
    trainer.save_model(str(tmp_path / "saved"))
    from transformers import LlamaForCausalLM

    saved = LlamaForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in module.state_dict().items())


@pytest.mark.slow
def test_training_arguments_refuse_the_name(tmp_path: Path) -> None:
    """accelerate's list, again: where this passes one day, docs/integrations.md is to be changed."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    with pytest.raises(ValueError, match=r"'GRAPHOPT' is not a valid DynamoBackend"):
        trained(llama(), tmp_path, torch_compile=True, torch_compile_backend="graphopt")


# --- Lightning ---------------------------------------------------------------------------------


def fitted(net: nn.Module, folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    import lightning

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net, self.losses = net, []

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            x, y = batch
            loss = nn.functional.mse_loss(self.net(x), y)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(rows(), batch_size=64))  # type: ignore[arg-type]
    trainer.save_checkpoint(folder / "last.ckpt", weights_only=True)
    return module.losses, torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_lightning_trains_as_it_does_the_model(way: str, tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="lightning is not installed")
    expected, plain = fitted(small(), tmp_path)
    module = made(way, small(), (torch.randn(64, 16),))
    found, saved = fitted(module, tmp_path)
    assert found == expected and expected[-1] < expected[0]
    assert recomputes(module)
    assert saved.keys() == plain.keys() and all(torch.equal(saved[name], plain[name]) for name in plain)
