"""What ``optimize(generate=...)`` is told about decoding."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.errors import InputsError

__all__ = ["Generate"]


@dataclass(frozen=True)
class Generate:
    """How far and how widely an optimized model is to generate.

    ``max_tokens``: positions of a sequence, prompt and answer together. ``max_batch``: sequences at once;
    each beam is one. Stores of keys and values are made once for both and reused by every call.

    ``tokens``, ``mask`` and ``positions`` name arguments of the model's forward: token ids [B, S], 1 where a
    token is no padding [B, S], and position ids [B, S]; ``mask`` and ``positions`` are left out where the
    model has none of that name, and its ``torch.arange`` then says where a token is. Without an argument of
    the name ``tokens``, the first one is taken.

    Of a model that decodes with attention to an encoder's output these are ``decoder_input_ids`` and so on,
    and ``mask`` names that of the source. ``max_source``: rows of an encoder's output that are kept at most;
    without, as many as it gives of the example inputs.
    """

    max_tokens: int
    max_batch: int = 1
    tokens: str = "input_ids"
    mask: str = "attention_mask"
    positions: str = "position_ids"
    max_source: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 2), ("max_batch", 1), ("max_source", 1)):
            value = getattr(self, name)
            if name == "max_source" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputsError(f"Generate({name}={value!r}): expected an int of {least} or more")
