"""``generate``: the model's own loop with our steps in it, or a plain one for models that have none.

transformers' ``generate`` knows about beams, sampling, stopping and streaming, and calls the model's forward
with a cache object. Both are ours here: a copy of the model that shares everything with it but its forward,
and an object that stands for the stores. So all that ``generate`` takes stays what it is.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from graphopt.decoding.capture import Source
from graphopt.decoding.decoder import Decoder
from graphopt.errors import InputsError

__all__ = ["StoredCache", "generate_with", "plain_generate"]

_ALONE = ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size", "cache_implementation")
"""Options of transformers' ``generate`` that bring a cache or a second model of their own."""

_CACHES = ("past_key_values", "cache_params", "state")
"""What forwards of transformers call the argument that a cache is."""


class StoredCache:
    """What ``generate`` takes for a cache: how much is in the stores, and how to move sequences."""

    is_compileable = False
    is_croppable = False
    is_initialized = True
    layers: Sequence[Any] = ()

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.decoder.seen

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self.decoder.options.max_tokens

    @property
    def self_attention_cache(self) -> Any:
        """Read by whisper's ``generate`` where it returns the cache with the tokens: ``InputsError``."""
        raise InputsError(
            "the cache is asked for its keys and values, as where generate returns it "
            "(return_dict_in_generate): the stores are not handed out"
        )

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.decoder.reorder(beam_idx)


class _Output(dict[str, Any]):
    """What a forward returns: by key and by attribute."""

    def __getattr__(self, name: str) -> Any:
        # What transformers' outputs have whether or not it was asked for.
        return self.get(name)


def generate_with(
    model: torch.nn.Module, decoder: Decoder, args: Sequence[Any], options: dict[str, Any]
) -> Any:
    """``model.generate(*args, **options)`` with the steps of ``decoder``.

    Raises ``InputsError`` for options that need another cache, hidden states or attention weights, and for
    more sequences or positions than there are stores for.
    """
    for name in _ALONE:
        if options.get(name) is not None:
            raise InputsError(
                f"generate({name}=...) brings a cache of its own: the stores cannot be used with it"
            )
    for name in ("output_attentions", "output_hidden_states"):
        if options.get(name):
            raise InputsError(f"generate({name}=True): programs that decode give logits alone")
    for name in _CACHES:
        if options.get(name) is not None:
            raise InputsError(f"generate({name}=...): the stores are the cache")
    takes = inspect.signature(model.forward).parameters
    cache = next((name for name in _CACHES if name in takes), _CACHES[0])
    given = {**options, cache: StoredCache(decoder)}
    given.pop("use_cache", None)
    driven = copy.copy(model)
    source = decoder.uncached.source
    if source is None:
        vars(driven)["forward"] = _forward(model, decoder, cache)
    else:
        encoding = _Encoding(decoder, source)
        vars(driven)["forward"] = _source_forward(model, decoder, source, encoding)
        vars(driven)["get_encoder"] = lambda *_, **__: encoding
    decoder.seen = 0
    return driven.generate(*args, use_cache=True, **given)  # type: ignore[operator]


class _Encoding:
    """What ``generate`` takes for the model's encoder: whatever it encodes is decoded from the start."""

    def __init__(self, decoder: Decoder, source: Source) -> None:
        self.decoder, self.source = decoder, source
        self.forward = source.encoder.module.forward  # its signature is looked at
        self.shown: torch.Tensor | None = None

    def __call__(self, **given: Any) -> Any:
        encoder = self.source.encoder
        self.decoder.seen = 0
        if encoder.mask is not None and given.get(encoder.mask) is None:
            given[encoder.mask] = encoder.nothing_padded(given[encoder.main])
        self.shown = given.get(encoder.mask) if encoder.mask is not None else None
        assert self.decoder.once is not None
        return self.decoder.once.encode(given)


def _source_forward(
    model: torch.nn.Module, decoder: Decoder, source: Source, encoding: _Encoding
) -> Callable[..., Any]:
    """A forward with the signature of the model's that reads what was encoded with the first tokens."""
    encoder = source.encoder

    def forward(**given: Any) -> Any:
        cache = given.get("past_key_values")
        if not isinstance(cache, StoredCache):
            # No step, but a look at what the model says, as where a language is told.
            return model(**given)
        del given["past_key_values"]
        encoded = given.pop("encoder_outputs", None)
        shown = given.pop(encoder.mask, None) if encoder.mask is not None else None
        if decoder.seen == 0:
            read = dict(zip(source.leaves, encoder.tensors(encoded), strict=True))
            if source.shown is not None:
                read[source.shown] = _shown(shown, encoding, read[source.leaves[0]])
            decoder.read(read)
        return _step(decoder, cache, given, (source.tokens, source.mask, source.positions))

    forward.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]
    return forward


def _shown(shown: torch.Tensor | None, encoding: _Encoding, rows: torch.Tensor) -> torch.Tensor:
    """The mask of a source whose ``rows`` [B, T, D] are decoded, which may be that of all that was encoded or
    not be said."""
    if shown is None:
        shown = encoding.shown
    if shown is None and encoding.source.encoder.is_text:
        shown = torch.ones(rows.shape[:2], dtype=torch.int64, device=rows.device)
    if shown is None:
        raise InputsError(
            f"generate(encoder_outputs=...) without {encoding.source.encoder.mask}: it was among the inputs "
            "that optimize was given"
        )
    # Beams of a sequence follow each other.
    return shown.repeat_interleave(rows.shape[0] // shown.shape[0], 0)


def _forward(model: torch.nn.Module, decoder: Decoder, cache: str) -> Callable[..., Any]:
    """A forward with the signature of the model's, which ``generate`` looks at; ``cache``: its argument for
    one."""
    names = decoder.options

    def forward(**given: Any) -> Any:
        held = given.pop(cache, None)
        return _step(decoder, held, given, (names.tokens, names.mask, names.positions), cache)

    forward.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]
    return forward


def _step(
    decoder: Decoder,
    held: Any,
    given: dict[str, Any],
    names: tuple[str, str, str],
    cache: str = "past_key_values",
) -> Any:
    """What a forward returns of a step that is ``given`` tokens, mask and positions by ``names``: logits and
    what it ``held``, the argument ``cache``."""
    tokens, mask, positions = (given.pop(name, None) for name in names)
    others = [name for name, value in given.items() if isinstance(value, torch.Tensor)]
    if others:
        beside = " and what an encoder gives" if decoder.uncached.source is not None else " alone"
        raise InputsError(
            f"argument {others[0]!r} of a step: programs that decode take tokens{beside}",
            hint="masks of a source are taken where the inputs that optimize was given hold one"
            if decoder.uncached.source is not None
            else "",
        )
    if not isinstance(tokens, torch.Tensor):
        raise InputsError(f"argument {names[0]!r} is {tokens!r}: programs that decode take tokens")
    if decoder.seen == 0:
        decoder.reset(tokens.shape[0])
    return _Output(logits=decoder(tokens, mask, positions), **{cache: held})


def plain_generate(
    decoder: Decoder,
    tokens: torch.Tensor,
    *,
    source: Mapping[str, torch.Tensor] | None = None,
    max_new_tokens: int | None = None,
    attention_mask: torch.Tensor | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    generator: torch.Generator | None = None,
    streamer: Any = None,
    stopping_criteria: Sequence[Callable[[torch.Tensor, Any], Any]] = (),
) -> torch.Tensor:
    """``tokens`` [B, S] with what follows, greedy or sampled: for models without a ``generate`` of their own.

    It ends after ``max_new_tokens`` (by default when the stores are full), when every sequence had one of
    ``eos_token_id`` (then ``pad_token_id``, by default that, follows), or when one of ``stopping_criteria``,
    called with all tokens and the last logits [B, V], says so for all. ``streamer.put(tokens)`` is called
    for the prompt and for each token, ``streamer.end()`` at the end. Sampling keeps the ``top_k`` likeliest
    tokens and the fewest whose probabilities sum up to ``top_p``. ``source``: what an encoder reads, by the
    names of its arguments, where the model has one.
    """
    if (decoder.uncached.source is None) is not (source is None):
        given = "is given and the model has no encoder" if source is not None else "is not given"
        raise InputsError(f"generate(source=...) {given}: expected the arguments of its encoder, by name")
    room = decoder.options.max_tokens - tokens.shape[1]
    new = room if max_new_tokens is None else max_new_tokens
    if new > room:
        raise InputsError(
            f"a prompt of {tokens.shape[1]} tokens and {new} new ones: the stores are for max_tokens="
            f"{decoder.options.max_tokens}"
        )
    if do_sample and not temperature > 0:
        raise InputsError(f"temperature={temperature!r}: expected a positive number")
    ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
    fill = pad_token_id if pad_token_id is not None else (ends[0] if ends else 0)
    decoder.reset(tokens.shape[0])
    if source is not None:
        _read_plain(decoder, source)
    if streamer is not None:
        streamer.put(tokens)
    running = torch.ones(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    following = tokens
    for count in range(new):
        logits = decoder(following, attention_mask if count == 0 else None)[:, -1].float()
        chosen = (
            _sampled(logits / temperature, top_k, top_p, generator) if do_sample else logits.argmax(-1)
        )
        chosen = torch.where(running, chosen, fill)
        following = chosen[:, None]
        tokens = torch.cat([tokens, following], 1)
        if streamer is not None:
            streamer.put(chosen)
        for end in ends:
            running = running & (chosen != end)
        stops = any(torch.as_tensor(stop(tokens, logits)).all() for stop in stopping_criteria)
        if stops or (ends and not bool(running.any())):
            break
    if streamer is not None:
        streamer.end()
    return tokens


def _read_plain(decoder: Decoder, source: Mapping[str, torch.Tensor]) -> None:
    """Encode and read ``source``."""
    reads, once = decoder.uncached.source, decoder.once
    assert reads is not None and once is not None
    given, encoder = dict(source), reads.encoder
    if encoder.mask is not None and given.get(encoder.mask) is None:
        given[encoder.mask] = encoder.nothing_padded(given[encoder.main])
    read = dict(zip(reads.leaves, encoder.tensors(once.encode(given)), strict=True))
    if reads.shown is not None and encoder.mask is not None:
        read[reads.shown] = given[encoder.mask]
    decoder.read(read)


def _sampled(
    logits: torch.Tensor, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> torch.Tensor:
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1]), -1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= top_p)
        logits = logits.masked_fill(dropped, float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
