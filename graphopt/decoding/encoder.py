"""The encoder of a model that decodes with attention to what its encoder gives.

    encoder(input_ids [B, T], attention_mask [B, T]) -> last_hidden_state [B, T, D], ..
    model(decoder_input_ids [B, S], encoder_outputs, attention_mask) -> logits [B, S, V]

That is how models of transformers, and those written like them, say that they have one: ``get_encoder`` and
the arguments ``encoder_outputs`` and ``decoder_input_ids`` of ``forward``. Encoder and decoder are captured
apart; the tensors that the one gives and the other takes are all that stands between.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from graphopt.decoding.options import Generate
from graphopt.errors import CaptureError, InputsError, brief

__all__ = ["Encoder", "decoder_name", "encoder_of", "evaluating"]

_EXAMPLE_ROWS = 11
"""Length of a source of tokens that is captured: unlike other sizes of the example."""


@dataclass(frozen=True)
class Encoder:
    """``module`` is what ``get_encoder`` gives; ``kind(**tensors)`` makes an object like the one that it
    returns out of tensors by name, ``keys`` naming those that there are, the first of them [B, T, D].

    ``example``: its arguments by name; ``main``: the one that is encoded; ``mask``: the one that is 0 where
    there is padding, if there is one, which the model's ``forward`` takes as well. ``rows``: how many it
    gives of the inputs that it was told.
    """

    module: torch.nn.Module
    kind: type[Any]
    keys: tuple[str, ...]
    example: Mapping[str, torch.Tensor]
    main: str
    mask: str | None
    rows: int = 0

    def __call__(self, given: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The tensors that the encoder gives, in the order of ``keys``, in evaluation."""
        with evaluating(self.module), torch.no_grad():
            return self.tensors(self.module(**given))

    def tensors(self, made: Any) -> tuple[torch.Tensor, ...]:
        """The tensors of ``made``, which an encoder returned. Raises ``InputsError`` for others."""
        found = _named_tensors(made)
        if tuple(found) != self.keys:
            raise InputsError(
                f"the encoder gave {', '.join(found) or 'no tensors'}: the program was made for "
                f"{', '.join(self.keys)}",
                hint="give optimize the inputs that generate is given, masks included",
            )
        return tuple(found.values())

    def output(self, tensors: tuple[torch.Tensor, ...]) -> Any:
        """``tensors`` as the encoder returns them."""
        return self.kind(**dict(zip(self.keys, tensors, strict=True)))

    def sample(self, batch: int, padded: bool, rows: int | None = None) -> dict[str, torch.Tensor]:
        """Arguments for ``batch`` sequences that differ, the last one with padding at its end where
        ``padded`` asks for it and there is a mask; ``rows``: the length of a source of tokens."""
        generator = torch.Generator().manual_seed(batch)
        given: dict[str, torch.Tensor] = {}
        for name, value in self.example.items():
            tiled = value.repeat(-(-batch // value.shape[0]), *[1] * (value.dim() - 1))[:batch]
            if name == self.mask:
                tiled = torch.ones_like(tiled)
            elif name == self.main:
                drawn = value.flatten()[
                    torch.randint(value.numel(), tiled.shape, generator=generator).to(value.device)
                ]
                tiled = drawn.to(value.dtype)
            if rows is not None and self.is_text and tiled.dim() == 2:
                tiled = tiled.repeat(1, -(-rows // tiled.shape[1]))[:, :rows]
            given[name] = tiled.contiguous()
        if padded and self.mask is not None:
            length = given[self.mask].shape[1]
            given[self.mask][-1, length - max(1, length // 3) :] = 0
        return given

    def nothing_padded(self, main: torch.Tensor) -> torch.Tensor:
        """The mask that says of ``main``, which is encoded, that none of it is padding."""
        assert self.mask is not None
        mask, example = self.example[self.mask], self.example[self.main]
        along = next((dim for dim, size in enumerate(example.shape) if dim and size == mask.shape[1]), None)
        length = mask.shape[1] if along is None else main.shape[along]
        return torch.ones(main.shape[0], length, dtype=mask.dtype, device=main.device)

    @property
    def is_text(self) -> bool:
        """Whether what is encoded are tokens [B, T]."""
        value = self.example[self.main]
        return value.dim() == 2 and not value.is_floating_point()


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """``model`` in evaluation; afterwards each module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def decoder_name(name: str) -> str:
    """What a decoder's argument is called beside an encoder's of that name."""
    return name if name.startswith("decoder_") else f"decoder_{name}"


def encoder_of(
    model: torch.nn.Module, given: Mapping[str, Any], options: Generate
) -> tuple[Encoder, torch.Tensor, dict[str, Any]] | None:
    """The encoder of ``model``, the example's tokens of the decoder and what else is given and is no tensor;
    ``None`` where ``model`` takes no such tokens.

    Raises ``InputsError`` for inputs without tokens for either, and ``CaptureError`` for a model whose
    encoder cannot be told from its decoder.
    """
    parameters = inspect.signature(model.forward).parameters
    tokens_name = decoder_name(options.tokens)
    if tokens_name not in parameters:
        return None
    own = getattr(model, "get_encoder", None)
    encoder = own() if callable(own) else None
    if not isinstance(encoder, torch.nn.Module) or "encoder_outputs" not in parameters:
        raise CaptureError(
            f"the model takes {tokens_name}, but its encoder cannot be told from its decoder: expected a "
            "method get_encoder() and an argument encoder_outputs of forward, as models of transformers have"
        )
    tokens = given.get(tokens_name)
    if not isinstance(tokens, torch.Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
        raise InputsError(
            f"inputs hold no {tokens_name}: a decoder that reads an encoder's output is captured with "
            "example tokens of its own, integers [batch, length], beside what its encoder reads",
            hint=f"give inputs={{'input_ids': .., {tokens_name!r}: ..}}",
        )
    takes = inspect.signature(encoder.forward).parameters
    rest = {name: value for name, value in given.items() if value is not None and name != tokens_name}
    made = {decoder_name(options.mask), decoder_name(options.positions)}
    rest = {name: value for name, value in rest.items() if name not in made}
    tensors = {name: value for name, value in rest.items() if isinstance(value, torch.Tensor)}
    strange = [name for name in tensors if name not in takes]
    if strange:
        raise InputsError(
            f"argument {strange[0]!r} is a tensor that the encoder does not take: generation takes what it "
            f"takes and {tokens_name}",
            hint=f"its encoder's arguments: {', '.join(takes)}",
        )
    main = next((name for name in takes if name in tensors and name != options.mask), None)
    if main is None:
        raise InputsError(
            "inputs hold nothing for the encoder to read",
            hint=f"its arguments: {', '.join(takes)}",
        )
    mask = options.mask if options.mask in takes and options.mask in parameters else None
    if mask is not None and mask not in tensors:
        if tensors[main].dim() == 2 and not tensors[main].is_floating_point():
            tensors[mask] = torch.ones_like(tensors[main])
        else:
            # Where padding of sounds or pictures is said is not known without an example.
            mask = None
    fixed = {name: value for name, value in rest.items() if not isinstance(value, torch.Tensor)}
    bare = Encoder(encoder, dict, (), tensors, main, mask)
    return _looked_at(bare), tokens, fixed


def _looked_at(encoder: Encoder) -> Encoder:
    """``encoder`` with an example of the size that is captured, and what it returns of it."""
    given = encoder.sample(3, False, _EXAMPLE_ROWS if encoder.is_text else None)
    try:
        with evaluating(encoder.module), torch.no_grad():
            told = encoder.module(**{name: value[:1] for name, value in encoder.example.items()})
            made = encoder.module(**given)
    except Exception as error:
        raise InputsError(f"the encoder does not run on its inputs: {brief(error)}") from error
    found = _named_tensors(made)
    first = next(iter(found.values()), None)
    if first is None or first.dim() != 3 or not first.is_floating_point():
        what = list(first.shape) if first is not None else type(made).__name__
        raise CaptureError(f"the encoder gives {what}: expected rows [batch, length, width]")
    short = next((name for name, value in found.items() if value.shape[:2] != first.shape[:2]), None)
    if short is not None:
        raise CaptureError(
            f"the encoder gives {short} {list(found[short].shape)} besides rows {list(first.shape)}: "
            "expected tensors of as many sequences and rows"
        )
    (rows,) = {value.shape[1] for value in _named_tensors(told).values()}
    return replace(encoder, kind=type(made), keys=tuple(found), example=given, rows=rows)


def _named_tensors(made: Any) -> dict[str, torch.Tensor]:
    if not isinstance(made, Mapping):
        raise CaptureError(
            f"the encoder returns a {type(made).__name__}: expected tensors by name, as models of "
            "transformers return"
        )
    return {str(name): value for name, value in made.items() if isinstance(value, torch.Tensor)}
