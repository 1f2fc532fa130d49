"""What a mask means, found by looking at what it allows.

How masks are written differs from model to model (comparisons of positions, ``tril``, slices of buffers,
minus infinity added, ``where``); what they allow does not. So the part of a captured graph that makes a mask
is run on small sequences, once without padding and once with, and what comes out is compared with what the
known kinds would give. What fits none is refused: dropping a mask that was not understood would be wrong
quietly.

A window of 4,096 does not show in a sequence of 48. Numbers that the graph compares positions with are where
something may change, so the positions around them are looked at as well: every ``arange`` of the sequence's
length then gives chosen positions in place of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from graphopt.errors import CaptureError

__all__ = ["MASKED", "MaskSpec", "distances", "meaning"]

Rows = torch.Tensor
Evaluate = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""``evaluate(positions, mask)``: what is added to scores, float64 [B, H or 1, S, S], -inf where nothing may
be read, for tokens at ``positions`` [S] and ``mask`` [B, S] (``None``: the model takes none)."""

_SMALL = 48
_MANY = 1024
"""Positions that are all looked at where some cannot be chosen: a mask of each with each is made."""

_CHUNK = 128
"""Distances that are looked at together: as many rows for as many keys are made."""

MASKED = -1e4
"""What is added to a score that is not to count: models write the least number of a dtype, or -1e4, or
-inf."""


@dataclass(frozen=True)
class MaskSpec:
    """What rows may read, and what is added to scores.

    Rows read keys up to themselves; with ``window`` w the last w of them, themselves included (0: all).
    ``padding``: keys that the caller's mask leaves out are not read. ``slopes``: ALiBi, a number for each
    head times the place of the key among those that are no padding. ``source``: keys are rows of a source, of
    which all are read, or with ``padding`` those that its mask does not leave out. ``bias``: something is
    added that depends on how far a key is before the query alone: what it is called, to tell two apart.
    """

    window: int = 0
    padding: bool = False
    slopes: tuple[float, ...] = ()
    source: bool = False
    bias: str = ""

    def __str__(self) -> str:
        if self.source:
            return "source, padding" if self.padding else "source"
        parts = [f"window {self.window}" if self.window else "causal"]
        parts += ["padding"] if self.padding else []
        parts += [f"alibi of {len(self.slopes)} heads"] if self.slopes else []
        parts += ["bias of distances"] if self.bias else []
        return ", ".join(parts)


def meaning(
    evaluate: Evaluate,
    numbers: Sequence[int],
    capacity: int,
    device: torch.device,
    *,
    takes_mask: bool,
    bias: str = "bias",
) -> MaskSpec:
    """The spec of what ``evaluate`` gives for sequences of up to ``capacity`` positions.

    ``numbers``: integers that the mask is made with; ``bias``: what a bias of distances is called.
    Raises ``CaptureError`` with what was seen instead of a known kind.
    """
    dense = torch.arange(min(_SMALL, capacity), device=device)
    looks = [_Look(dense, *_parts(_added(evaluate, dense, takes_mask)))]
    window = _window(looks[0].allowed, dense)
    critical = sorted({n for n in numbers if len(dense) - 2 <= n < capacity + 3})
    for number in critical:
        near = {p for k in (number, 2 * number) for p in range(k - 2, k + 3)} | {0, 1, 2, 3, capacity - 1}
        spots = torch.tensor(sorted(p for p in near if 0 <= p < capacity), device=device)
        try:
            added = _added(evaluate, spots, takes_mask, capacity)
        except CaptureError:
            # Made in another way than of positions alone: all of them are looked at, where they are not many.
            if number > _MANY:
                raise
            spots = torch.arange(min(number + 3, capacity), device=device)
            added = _added(evaluate, spots, takes_mask)
        looks.append(_Look(spots, *_parts(added)))
        found = _window(looks[-1].allowed, spots)
        if window and found != window:
            raise CaptureError(f"the mask has a window of {window} positions at first and of {found} later")
        window = found
    slopes, table = _bias(looks, evaluate, capacity, device, takes_mask)
    spec = MaskSpec(window, False, slopes, bias=bias if table is not None else "")
    return spec if not takes_mask else _with_padding(evaluate, dense, spec, table)


@dataclass(frozen=True)
class _Look:
    """At tokens at ``positions`` [S]: what is ``allowed``, bool [B, H or 1, S, S], and what is added
    there."""

    positions: torch.Tensor
    allowed: torch.Tensor
    bias: torch.Tensor


def _bias(
    looks: Sequence[_Look], evaluate: Evaluate, capacity: int, device: torch.device, takes_mask: bool
) -> tuple[tuple[float, ...], torch.Tensor | None]:
    """Slopes of a bias that is one, or the table of what is added by distance [H, capacity]; neither where
    nothing is added. Raises ``CaptureError`` for what is added otherwise."""
    try:
        slopes = _slopes(looks[0].bias, looks[0].allowed, looks[0].positions)
        for look in looks[1:]:
            _same_slopes(slopes, look.bias, look.allowed, look.positions)
        return slopes, None
    except CaptureError as error:
        try:
            table = distances(evaluate, capacity, device, takes_mask=takes_mask)
        except CaptureError:
            raise error from None
    for look in looks:
        _same_table(table, look)
    return (), table


def distances(
    evaluate: Evaluate, capacity: int, device: torch.device, *, takes_mask: bool
) -> torch.Tensor:
    """float64 [H or 1, capacity]: what is added to the score of the first key by a query that is so far
    behind it; 0 where it is not read."""
    parts = []
    for start in range(0, capacity, _CHUNK):
        wanted = torch.arange(start, min(start + _CHUNK, capacity), device=device)
        # The first positions are as a short sequence is, whose mask is as long.
        spots = wanted if start == 0 else torch.cat([wanted.new_zeros(1), wanted])
        try:
            _, bias = _parts(_added(evaluate, spots, takes_mask, capacity if start else None))
        except CaptureError:
            if capacity > _MANY:
                raise
            _, bias = _parts(_added(evaluate, torch.arange(capacity, device=device), takes_mask))
            return bias[0, :, :, 0]
        parts.append(bias[0, :, -len(wanted) :, 0])
    return torch.cat(parts, -1)


def _same_table(table: torch.Tensor, look: _Look) -> None:
    """Whether what is added is what ``table`` [H, capacity] says of the distance."""
    distance = (look.positions[:, None] - look.positions[None, :]).clamp(min=0)
    off = torch.where(look.allowed, (look.bias - table[None][:, :, distance]).abs(), 0.0)
    if float(off.max()) > 1e-5 * max(1.0, float(table.abs().max())):
        _, row, key = (off.amax(0) == off.max()).nonzero()[0].tolist()
        row, key = int(look.positions[row]), int(look.positions[key])
        raise CaptureError(
            "something is added to the scores that is no slope times the position of a key (ALiBi), and no "
            f"function of how far it is before the query: position {row} adds {float(off.max()):.3g} more or "
            f"less to position {key} than to others as far away"
        )


def _added(
    evaluate: Evaluate, positions: torch.Tensor, takes_mask: bool, capacity: int | None = None
) -> torch.Tensor:
    length = len(positions) if capacity is None else capacity
    mask = torch.ones(2, length, dtype=torch.int64, device=positions.device) if takes_mask else None
    return evaluate(positions, mask)


def _parts(added: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What is allowed, bool [B, H or 1, S, S], and what is added there."""
    allowed = added > MASKED
    return allowed, torch.where(allowed, added, 0.0)


def _window(allowed: torch.Tensor, positions: torch.Tensor) -> int:
    """The window of a causal mask; 0 where rows read all before them."""
    distance = positions[:, None] - positions[None, :]
    _check_alike(allowed)
    seen = allowed[0, 0]
    ahead = (seen & (distance < 0)).nonzero()
    if len(ahead):
        row, key = (int(positions[i]) for i in ahead[0])
        raise CaptureError(
            f"the mask lets position {row} read position {key}, which comes later: not a decoder's mask"
        )
    hidden = ~seen & (distance >= 0)
    if not bool(hidden.any()):
        return 0
    window = int(distance[hidden].min())
    expected = (distance >= 0) & (distance < window)
    if window == 0 or not torch.equal(seen, expected):
        unread = [int(positions[i]) for i in (hidden & (distance == window)).nonzero()[0]]
        read = [int(positions[i]) for i in (seen & (distance >= window)).nonzero()[0]]
        raise CaptureError(
            f"the mask is neither causal nor a sliding window: position {unread[0]} does not read position "
            f"{unread[1]}, but position {read[0]} reads position {read[1]}"
        )
    return window


def _check_alike(allowed: torch.Tensor) -> None:
    different = (allowed != allowed[:1, :1]).nonzero()
    if len(different):
        batch, head = different[0][:2].tolist()
        raise CaptureError(
            f"the mask of sequence {batch}, head {head} is another than that of the first, without padding: "
            "it is not made of positions alone"
        )


def _slopes(bias: torch.Tensor, allowed: torch.Tensor, positions: torch.Tensor) -> tuple[float, ...]:
    """What each head adds per position of the key; none where nothing is added."""
    if not bool((bias != 0).any()):
        return ()
    last = bias[0, :, -1, :]
    slope = last[:, 1] - last[:, 0]
    found = tuple(slope.tolist())
    _same_slopes(found, bias, allowed, positions)
    return found


def _same_slopes(
    slopes: tuple[float, ...], bias: torch.Tensor, allowed: torch.Tensor, positions: torch.Tensor
) -> None:
    """Whether ``bias`` is ``slopes`` times the position of the key, up to a constant for each row: a softmax
    does not see those."""
    each = torch.tensor(slopes or (0.0,), dtype=bias.dtype, device=bias.device)
    line = each[None, :, None, None] * positions.to(bias.dtype)
    off = torch.where(allowed, bias - line, 0.0)
    least = torch.where(allowed, off, float("inf")).amin(-1)
    most = torch.where(allowed, off, float("-inf")).amax(-1)
    spread = float(torch.where(torch.isfinite(least), most - least, 0.0).max())
    if spread > 1e-4 * max(1.0, float(bias.abs().max())):
        raise CaptureError(
            "something is added to the scores that is no slope times the position of a key (ALiBi): by up to "
            f"{spread:.3g} another number"
        )


def _with_padding(
    evaluate: Evaluate, positions: torch.Tensor, spec: MaskSpec, table: torch.Tensor | None
) -> MaskSpec:
    """``spec`` with what the caller's mask does: the first tokens of the second sequence are padding."""
    padded = max(1, len(positions) // 8)
    mask = torch.ones(2, len(positions), dtype=torch.int64, device=positions.device)
    mask[1, :padded] = 0
    allowed, bias = _parts(evaluate(positions, mask))
    distance = positions[:, None] - positions[None, :]
    expected = (distance >= 0) & (distance < (spec.window or len(positions)))
    for padding in (True, False):
        keys = mask.bool() if padding else torch.ones_like(mask, dtype=torch.bool)
        wanted = (expected[None] & keys[:, None, :])[:, None].expand_as(allowed)
        if torch.equal(allowed[:, :, padded:], wanted[:, :, padded:]):
            break
    else:
        raise CaptureError("with padding the mask is neither that without it nor one that leaves padding out")
    if spec.slopes:
        places = torch.stack([positions, (positions - padded).clamp(min=0)]) if padding else positions[None]
        for row, place in enumerate(places):
            shown = slice(padded, None)
            _same_slopes(
                spec.slopes, bias[row : row + 1, :, shown, shown], allowed[row : row + 1, :, shown, shown],
                place[shown],
            )  # fmt: skip
    if table is not None:
        behind = allowed.clone()
        behind[:, :, :padded] = False
        _same_table(table, _Look(positions, behind, bias))
    return replace(spec, padding=padding)
