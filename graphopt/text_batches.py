"""Batches of a language model from a text: windows of ids in the place of those of example inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from graphopt.errors import InputsError

__all__ = ["encoder_of", "text_batches"]

_NAMED = "input_ids"
_COPIES = ("labels",)
_MASKS = ("attention_mask", "token_type_ids", "position_ids")


def encoder_of(tokenizer: Any) -> Callable[[str], list[int]]:
    """What makes ids of a text: the ``encode`` of a tokenizer (transformers, tokenizers, sentencepiece), or a
    function.

    Raises ``InputsError`` for something else, and when called, for a result that holds no ids.
    """
    encode = getattr(tokenizer, "encode", tokenizer)
    if not callable(encode):
        raise InputsError(f"a tokenizer is a function or has encode(), got {type(tokenizer).__name__}")

    def encoded(text: str) -> list[int]:
        found = encode(text)
        found = getattr(found, "ids", found)
        if isinstance(found, torch.Tensor):
            found = found.reshape(-1).tolist()
        if not isinstance(found, (list, tuple)) or not all(isinstance(one, int) for one in found):
            raise InputsError(f"the tokenizer gives {type(found).__name__}: expected a list of ids")
        return list(found)

    return encoded


def text_batches(
    inputs: Any, text: str, encode: Callable[[str], list[int]], tokens: int | None = None
) -> list[Any]:
    """Batches like ``inputs``, a tuple or a dict, with pieces of ``text`` for their ids int64[B, T].

    The ids are ``input_ids`` or, elsewhere, the only int64 tensor of two dimensions; ``labels`` of their
    shape become the ids. Everything else is as in ``inputs``. Windows of T ids do not overlap; at most
    ``tokens`` ids are taken, in windows evenly far from each other, else all.

    Raises ``InputsError`` where no ids are found among ``inputs``, and for a text without a batch of ids.
    """
    place = _place_of_ids(inputs)
    example = inputs[place]
    rows, length = example.shape
    ids = torch.tensor(encode(text), dtype=torch.int64)
    count = len(ids) // (rows * length)
    if not count:
        raise InputsError(
            f"the text has {len(ids)} ids; one batch like the example inputs takes {rows} x {length}"
        )
    if tokens is not None:
        count = max(1, min(count, tokens // (rows * length)))
    windows = count * rows
    last = len(ids) - length
    starts = [last * one // max(1, windows - 1) for one in range(windows)]
    pieces = torch.stack([ids[start : start + length] for start in starts]).to(example.device)
    found: list[Any] = []
    for piece in torch.split(pieces, rows):
        if isinstance(inputs, Mapping):
            copies = {name: piece.clone() for name in _COPIES if _like(inputs.get(name), example)}
            found.append({**inputs, place: piece, **copies})
        else:
            found.append((*inputs[:place], piece, *inputs[place + 1 :]))
    return found


def _like(value: Any, example: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype is torch.int64 and value.shape == example.shape


def _place_of_ids(inputs: Any) -> Any:
    """Name or number of the ids among ``inputs``."""
    if isinstance(inputs, Mapping):
        if _is_ids(inputs.get(_NAMED)):
            return _NAMED
        items = [(name, value) for name, value in inputs.items() if name not in (*_COPIES, *_MASKS)]
    else:
        items = list(enumerate(inputs))
    found = [name for name, value in items if _is_ids(value)]
    if len(found) != 1:
        raise InputsError(
            f"the example inputs hold {len(found)} int64 tensors of two dimensions: expected one, the ids, "
            f"or one that is named {_NAMED!r}"
        )
    return found[0]


def _is_ids(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.dtype is torch.int64
        and value.dim() == 2
        and value.numel() > 0
    )
