"""Rows of token ids to search with: from batches, or from a file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from graphopt.decoding.site_pass import SitePass
from graphopt.errors import InputsError
from graphopt.passes import Pass
from graphopt.tensors_file import TensorsFileError, read_tensors

__all__ = ["CalibratedPass", "rows_from_batches", "rows_of", "save_rows"]

_NAME = "input_ids"

Rows = tuple[tuple[int, ...], ...]


class CalibratedPass(SitePass):
    """Base of passes that are told rows of token ids: ``calibration``, in Python also batches. Which place
    the option has among others they say themselves."""

    calibration: str | Rows

    @classmethod
    def configured(cls, **options: Any) -> Pass:
        given = options.get("calibration", ())
        if not isinstance(given, str):
            options["calibration"] = rows_from_batches(given)
        return super().configured(**options)

    def spelled(self) -> str:
        if not self.calibration or isinstance(self.calibration, str):
            return super().spelled()
        rows = f"[{len(self.calibration)} rows of token ids]"
        told: Any = self
        text: str = replace(told, calibration=rows).spelled()
        return text.replace(f'"{rows}"', rows)


def rows_from_batches(batches: Any) -> Rows:
    """Rows of the token ids int[B, S] that are the batches or that they hold, as ``input_ids`` or as the
    first integers of two dimensions. Raises ``InputsError`` for something else."""
    if isinstance(batches, (torch.Tensor, Mapping)):
        batches = [batches]
    if isinstance(batches, str) or not isinstance(batches, Iterable):
        raise InputsError(f"calibration is {batches!r}: expected batches of token ids, or a file of them")
    found: list[tuple[int, ...]] = []
    for number, batch in enumerate(batches):
        if isinstance(batch, (list, tuple)) and batch and all(isinstance(one, int) for one in batch):
            found.append(tuple(batch))
            continue
        ids = _ids(batch)
        if ids is None:
            raise InputsError(
                f"batch {number} of calibration is a {type(batch).__name__} without token ids [B, S]"
            )
        found += [tuple(row) for row in ids.tolist()]
    return tuple(found)


def _ids(batch: Any) -> torch.Tensor | None:
    if isinstance(batch, Mapping):
        batch = batch.get(_NAME, list(batch.values()))
    leaves = torch.utils._pytree.tree_leaves(batch)
    tensors = (leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
    return next((t for t in tensors if t.dim() == 2 and not t.is_floating_point()), None)


def save_rows(path: str | os.PathLike[str], batches: Any) -> None:
    """Write the token ids of ``batches`` to a safetensors file, which the option ``calibration`` can name."""
    from graphopt.tensors_file import write_tensors

    write_tensors(Path(path), {_NAME: rows_of(rows_from_batches(batches))})


def rows_of(calibration: str | Rows) -> torch.Tensor:
    """int64[N, S]. Raises ``InputsError`` for no rows, rows of several lengths, and a file without them."""
    if isinstance(calibration, str):
        try:
            tensors, _ = read_tensors(Path(calibration))
        except (TensorsFileError, OSError) as error:
            raise InputsError(f"calibration {calibration!r} is no file of token ids: {error}") from None
        if _NAME not in tensors or tensors[_NAME].dim() != 2:
            raise InputsError(f"calibration {calibration!r} holds {sorted(tensors)}: expected {_NAME} [N, S]")
        return tensors[_NAME].long()
    lengths = sorted({len(row) for row in calibration})
    if len(lengths) != 1:
        raise InputsError(
            f"calibration has rows of lengths {lengths}: expected rows of one length",
            hint="cut them to the shortest" if lengths else "give calibration=batches of token ids",
        )
    return torch.tensor(calibration, dtype=torch.int64)
