"""Whether a program that decodes gives what the model gives without a cache: looked at, token by token.

A prompt goes in, then one token after another, and each row of logits is compared with the one that the model
itself makes of the whole sequence. Where they differ, both graphs are run side by side until a value differs:
that node does not work row by row, or reads something that was not told apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx

from graphopt.decoding.capture import Uncached, arguments_of
from graphopt.decoding.decoder import Decoder
from graphopt.errors import VerificationError
from graphopt.program import layer_of

__all__ = [
    "SHARE",
    "check_captured",
    "check_rows",
    "first_difference",
    "padding_text",
    "place_of",
    "steps_of",
    "tolerance",
]

SHARE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""By how much of the largest logit rows may be off: products of other shapes add in another order, at each of
many layers; what reads a wrong position is off by as much as logits differ."""


def tolerance(logits: torch.Tensor) -> float:
    """By how much logits may be off."""
    return SHARE.get(logits.dtype, 1e-4) * max(1.0, float(logits.abs().max()))


def check_captured(uncached: Uncached, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The logits [B, S, V] of the captured graph, those of the model being the same.

    Raises ``VerificationError`` where they differ.
    """
    expected = uncached.eager(*arguments_of(uncached, tokens, mask, None).values())
    found = uncached.run(tokens, mask)
    off = float(_shown(found - expected, mask).abs().max())
    if not off <= tolerance(expected):
        raise VerificationError(
            f"the captured graph gives other logits than the model for {list(tokens.shape)} tokens: off by "
            f"{off:.3g}, at most {tolerance(expected):.3g} is allowed"
        )
    return found


def _shown(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """``values`` [B, S, V], 0 where a token is padding."""
    return values if mask is None else values.masked_fill((mask == 0)[..., None], 0.0)


def steps_of(
    decoder: Decoder, tokens: torch.Tensor, mask: torch.Tensor | None, prompt: int
) -> dict[int, torch.Tensor]:
    """Logits [B, 1, V] that ``decoder`` gives at each position from that of the last token of the prompt on:
    ``prompt`` tokens at once, then one after another."""
    decoder.reset(tokens.shape[0])
    start, rows = 0, {}
    for stop in range(prompt, tokens.shape[1] + 1):
        shown = mask[:, start:stop] if mask is not None else None
        rows[stop - 1] = decoder(tokens[:, start:stop], shown)
        start = stop
    return rows


def check_rows(
    rows: Mapping[int, torch.Tensor],
    expected: torch.Tensor,
    decoder: Decoder,
    tokens: torch.Tensor,
    mask: torch.Tensor | None,
    reference: Uncached,
) -> float:
    """Compare ``rows`` of logits by position (``steps_of``) with those of ``expected`` [B, S, V], which
    ``reference`` gives; the largest difference. Raises ``VerificationError`` for the first row that is off by
    more than ``tolerance`` allows."""
    start, worst, allowed = 0, 0.0, tolerance(expected)
    for position, found in rows.items():
        off = float((found[:, -1] - expected[:, position]).abs().max())
        worst = max(worst, off)
        if not off <= allowed:
            place = _first_off(decoder, reference, tokens, mask, start, position + 1)
            raise VerificationError(
                f"decoding gives other logits than {_what(decoder)} at position {position}"
                f"{padding_text(mask)}: off by {off:.3g}, at most {allowed:.3g} is allowed{place}"
            )
        start = position + 1
    return worst


def padding_text(mask: torch.Tensor | None) -> str:
    """``" with padding"`` where there is some."""
    return " with padding" if mask is not None and bool((mask == 0).any()) else ""


def _what(decoder: Decoder) -> str:
    """What a decoder is compared with."""
    exact = all(site.store.exact for site in decoder.sites)
    return "the model without a cache" if exact else "the model with what its stores say that they give"


def _first_off(
    decoder: Decoder,
    uncached: Uncached,
    tokens: torch.Tensor,
    mask: torch.Tensor | None,
    start: int,
    stop: int,
) -> str:
    """Where the values of a step come to differ from those without a cache, as a half-sentence."""
    step = decoder.step
    if step.rows:
        # A program for one row: those before go in as they do.
        start = max(start, stop - step.rows)
    whole = arguments_of(uncached, tokens[:, :stop], mask[:, :stop] if mask is not None else None, None)
    decoder.reset(tokens.shape[0])
    if start:
        decoder(tokens[:, :start], mask[:, :start] if mask is not None else None)
    given = {name: value[:, start:] for name, value in whole.items() if name not in uncached.given}
    slots = torch.arange(start, stop, device=tokens.device)
    held = {**given, "slots": slots, "source_end": decoder.end, **decoder.tables, **decoder.held}
    node = first_difference(
        uncached.gm,
        [*uncached.weights.values(), *(whole[name] for name in uncached.inputs)],
        step.gm,
        [*step.weights.values(), *(held[name] for name in step.inputs)],
        start,
    )
    return f"; the first value that differs is {place_of(node)}" if node is not None else ""


class _Recording(fx.Interpreter):
    """Keeps the value of every node."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n.name] = value.clone() if isinstance(value, torch.Tensor) else value
        return value


def first_difference(
    whole: fx.GraphModule, whole_inputs: list[Any], step: fx.GraphModule, step_inputs: list[Any], start: int
) -> fx.Node | None:
    """The first node of ``step`` whose rows are not those from ``start`` on of the node of that name in
    ``whole``; ``None`` where all are."""
    one, other = _Recording(whole), _Recording(step)
    with torch.no_grad():
        one.run(*whole_inputs)
        other.run(*step_inputs)
    for node in step.graph.nodes:
        before, after = one.values.get(node.name), other.values.get(node.name)
        if not isinstance(node, fx.Node) or node.op != "call_function" or not isinstance(after, torch.Tensor):
            continue
        if (
            not isinstance(before, torch.Tensor)
            or before.dim() != after.dim()
            or not before.is_floating_point()
        ):
            continue
        rows = _rows(before, after, start)
        if rows is not None and not torch.allclose(rows, after, rtol=1e-2, atol=1e-3):
            return node
    return None


def _rows(before: torch.Tensor, after: torch.Tensor, start: int) -> torch.Tensor | None:
    """``before`` from row ``start`` on, or its last row where ``after`` has no other, in the one dimension in
    which its size is another."""
    different = [d for d in range(before.dim()) if before.shape[d] != after.shape[d]]
    if len(different) != 1:
        return before if not different else None
    (dim,) = different
    if after.shape[dim] == 1:
        return before.narrow(dim, before.shape[dim] - 1, 1)
    if before.shape[dim] != after.shape[dim] + start:
        return None
    return before.narrow(dim, start, after.shape[dim])


def place_of(node: fx.Node | None) -> str:
    """``"cumsum_1 (aten.cumsum.default) of model.layers.0"``."""
    if node is None:
        return ""
    layer = layer_of(node)
    return f"{node.name} ({node.target})" + (f" of {layer}" if layer else "")
