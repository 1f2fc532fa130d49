"""Which rows of a source a decoder reads, looked at as ``graphopt.decoding.masks`` looks at its own masks.

How the mask of a source is made is the model's business (padding, rows that were pooled): the part of the
graph that makes it is run once for each source and says which rows count. That can be done where all rows of
the decoder read the same rows of the source, and nothing else is added to their scores: looked at here, on
sources of different lengths, with padding and without.
"""

from __future__ import annotations

import torch

from graphopt.capture.aliasing import Aliases
from graphopt.decoding.capture import Uncached, arguments_of
from graphopt.decoding.evaluate import added_values, values_of
from graphopt.decoding.masks import MASKED, MaskSpec
from graphopt.decoding.regions import Region
from graphopt.errors import CaptureError, brief

__all__ = ["source_mask"]

_TOKENS = 4
"""Tokens of the decoder that are looked at."""

_SHORT = 5
"""Rows of a shorter source."""


def source_mask(uncached: Uncached, region: Region, aliases: Aliases) -> MaskSpec:
    """The spec of a region that reads a source. Raises ``CaptureError`` with what was seen where rows of the
    decoder do not all read the same."""
    source = uncached.source
    assert source is not None
    if not region.added:
        return MaskSpec(source=True)
    if any(entry.node is None for entry in region.added):
        raise CaptureError("rows of the decoder read no rows of the source that come later: a causal mask")
    device = uncached.placeholder(uncached.tokens).meta["val"].device
    tokens = torch.zeros(2, _TOKENS, dtype=torch.int64, device=device)
    nodes = [entry.node for entry in region.added if entry.node is not None]
    for padded, rows in ((False, None), (True, None), (True, _SHORT if source.encoder.is_text else None)):
        given = source.given(source.encoder.sample(2, padded, rows))
        arguments = arguments_of(uncached.reading(given), tokens, None, None)
        try:
            values = values_of(uncached, nodes, aliases, arguments)
        except Exception as error:
            raise CaptureError(f"the mask of the source could not be looked at: {brief(error)}") from error
        found = dict(zip(nodes, values, strict=True))
        size = (_TOKENS, given[source.leaves[0]].shape[1])
        _check(added_values(region, found, size, device).expand(2, -1, *size))
    return MaskSpec(padding=True, source=True)


def _check(added: torch.Tensor) -> None:
    """Raises ``CaptureError`` unless ``added`` [2, H or 1, S, T] hides the same rows of the source from all
    heads and rows of the decoder, and adds nothing to the others."""
    allowed = added > MASKED
    different = (allowed != allowed[:, :1, :1]).nonzero()
    if len(different):
        _, head, position, row = different[0].tolist()
        raise CaptureError(
            f"position {position} of head {head} reads other rows of the source than position 0 of head 0: "
            f"they differ in row {row}"
        )
    bias = torch.where(allowed, added, 0.0)
    most = torch.where(allowed, bias, float("-inf")).amax(-1)
    least = torch.where(allowed, bias, float("inf")).amin(-1)
    # A softmax does not see the same number added to all.
    spread = float(torch.where(torch.isfinite(most), most - least, 0.0).max())
    if spread > 1e-4 * max(1.0, float(bias.abs().max())):
        raise CaptureError(
            "something is added to the scores of rows of the source that differs from row to row, by up to "
            f"{spread:.3g}"
        )
