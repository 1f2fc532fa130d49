"""What masks mean is told by what they allow, however far from the start that shows."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import pytest
import torch

from graphopt import CaptureError
from graphopt.decoding.masks import MaskSpec, meaning

Tensor = torch.Tensor
Rule = Callable[[Tensor, Tensor], Tensor]


def spec_of(
    rule: Rule,
    numbers: Sequence[int] = (),
    capacity: int = 4096,
    *,
    takes_mask: bool = False,
    padding: Callable[[Tensor], Tensor] | None = None,
    bias: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> MaskSpec:
    """The meaning of a mask that allows ``rule(row, key)`` and keys for which ``padding(mask)`` is true."""

    def evaluate(positions: Tensor, mask: Tensor | None) -> Tensor:
        rows, keys = positions[:, None], positions[None, :]
        allowed = rule(rows, keys).expand(2, 1, len(positions), len(positions))
        if mask is not None and padding is not None:
            allowed = allowed & padding(mask).bool()[:, positions][:, None, None, :]
        added = torch.zeros(allowed.shape, dtype=torch.float64)
        if bias is not None:
            added = added + bias(rows, keys)
        return added.masked_fill(~allowed, float("-inf"))

    return meaning(evaluate, numbers, capacity, torch.device("cpu"), takes_mask=takes_mask)


def causal(rows: Tensor, keys: Tensor) -> Tensor:
    return keys <= rows


def window(size: int) -> Rule:
    return lambda rows, keys: (keys <= rows) & (keys > rows - size)


def test_causal_masks_and_windows_are_told_apart() -> None:
    assert spec_of(causal) == MaskSpec()
    assert spec_of(window(5)) == MaskSpec(window=5)
    assert spec_of(window(1)) == MaskSpec(window=1)


@pytest.mark.parametrize("size", [47, 48, 49, 100, 1000, 4095])
def test_windows_are_found_where_a_number_says_that_something_changes(size: int) -> None:
    assert spec_of(window(size), [size]) == MaskSpec(window=size)
    assert spec_of(window(size), [size - 1]) == MaskSpec(window=size)
    assert spec_of(window(size), [size + 1]) == MaskSpec(window=size)


def test_windows_that_no_sequence_reaches_are_none() -> None:
    assert spec_of(window(5000), [5000], capacity=4096) == MaskSpec()


def test_padding_is_found_where_the_mask_is_used() -> None:
    used = spec_of(window(6), takes_mask=True, padding=lambda mask: mask)
    assert used == MaskSpec(window=6, padding=True)
    assert spec_of(causal, takes_mask=True) == MaskSpec()


def test_slopes_are_found_and_constants_of_rows_are_not_seen() -> None:
    each = torch.tensor([0.5, 0.125], dtype=torch.float64)[None, :, None, None]
    relative = spec_of(causal, bias=lambda rows, keys: each * (keys - rows))
    absolute = spec_of(causal, bias=lambda rows, keys: each * keys)
    assert relative.slopes == pytest.approx((0.5, 0.125)) and absolute.slopes == pytest.approx((0.5, 0.125))
    assert str(absolute) == "causal, alibi of 2 heads"


@pytest.mark.parametrize(
    ("rule", "numbers", "text"),
    [
        (lambda r, k: k == k, [], "lets position 0 read position 1, which comes later"),
        (lambda r, k: (k <= r) | (k < 3), [], "lets position 0 read position 1, which comes later"),
        (lambda r, k: (k <= r) & (r // 10 == k // 10), [], "position 10 does not read position 9, but pos"),
        (lambda r, k: (k <= r) & (r // 512 == k // 512), [512], "does not read position"),
        (lambda r, k: (k <= r) & ((k > r - 9) | (k < 2)), [], "position 11 does not read position 2, but po"),
        (lambda r, k: (k <= r) & ((r - k) % 2 == 0), [], "position 1 does not read position 0, but position"),
    ],
    ids=["all", "prefix", "blocks", "long-blocks", "window-and-first", "strided"],
)
def test_other_masks_are_refused(rule: Rule, numbers: list[int], text: str) -> None:
    with pytest.raises(CaptureError, match=re.escape(text)):
        spec_of(rule, numbers)


def test_other_uses_of_padding_are_refused() -> None:
    with pytest.raises(CaptureError, match="with padding the mask is neither that without it nor"):
        spec_of(causal, takes_mask=True, padding=lambda mask: mask.roll(3, 1))


def test_biases_of_distances_are_told_from_others() -> None:
    found = spec_of(causal, [300], 512, bias=lambda rows, keys: (rows - keys + 1.0).abs().sqrt())
    assert found == MaskSpec(bias="bias") and str(found) == "causal, bias of distances"
    # One that is a slope at first.
    turning = spec_of(window(100), [100], 512, bias=lambda rows, keys: -(rows - keys).clamp(max=60.0))
    assert turning == MaskSpec(window=100, bias="bias")


def test_other_biases_are_refused() -> None:
    with pytest.raises(CaptureError, match="no function of how far it is before the query: position 47 adds"):
        spec_of(causal, bias=lambda r, k: (r - k + 1.0).abs().sqrt() + 0.1 * (r == 47) * (k == 3))
    # A bias that turns where the sequence is long.
    with pytest.raises(CaptureError, match="no slope times the position of a key"):
        spec_of(causal, [300], bias=lambda rows, keys: 0.5 * keys.clamp(max=300).double())


def test_masks_that_cannot_be_looked_at_at_chosen_positions_are_looked_at_whole() -> None:
    def evaluate(positions: Tensor, mask: Tensor | None) -> Tensor:
        if not torch.equal(positions, torch.arange(len(positions))):
            raise CaptureError("made of a table")
        allowed = window(200)(positions[:, None], positions[None, :])
        added = torch.zeros(2, 1, len(positions), len(positions), dtype=torch.float64)
        return added.masked_fill(~allowed, float("-inf"))

    found = meaning(evaluate, [200], 4096, torch.device("cpu"), takes_mask=False)
    assert found == MaskSpec(window=200)
    with pytest.raises(CaptureError, match="made of a table"):
        meaning(evaluate, [2000], 4096, torch.device("cpu"), takes_mask=False)
