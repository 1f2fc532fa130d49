"""How others write packed weights into checkpoints, and what reads them: plug-ins.

::

    layers.0.q.qweight, .qzeros, .scales, .g_idx        a checkpoint
    StoredWeight("layers.0.q.weight", n, k, {...})      found by the suffixes of names and by shapes
    PackedTensors(Int4(group=128), {codes, words})      the same numbers as a scheme keeps them

A format never rounds: it puts codes, scales and zeros in another order, or refuses with the reason why no
scheme can hold them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, get_type_hints

import torch

from graphopt.errors import CheckpointError, UnknownNameError
from graphopt.options import OptionError, format_value, typed_value
from graphopt.packing.checkpoint import Checkpoint
from graphopt.packing.scheme import Scheme

__all__ = ["PackedTensors", "StoredWeight", "WeightFormat", "format_text"]


@dataclass(frozen=True)
class StoredWeight:
    """A weight [``n``, ``k``] (out, in) that a checkpoint holds packed.

    ``parameter``: the dotted name of what it stands for. ``parts``: names of the tensors that it is made of,
    by what they are to the format; all of them are taken.
    """

    parameter: str
    n: int
    k: int
    parts: Mapping[str, str]


@dataclass(frozen=True)
class PackedTensors:
    """A weight as ``scheme`` keeps it: ``tensors`` by name, in the order of ``Scheme.pack``."""

    scheme: Scheme
    tensors: Mapping[str, torch.Tensor]


class WeightFormat:
    """Base of all formats: subclass as a frozen dataclass whose fields are the options, each with a default.

    Instances are values and print as ``format_text`` spells them: ``gptq{zeros=v2}``.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""

    def find(self, checkpoint: Checkpoint) -> Iterable[StoredWeight]:
        """The weights of this format, by names, shapes and texts alone: no tensor is read.

        Raises ``CheckpointError`` for one that is of this format and does not hold together.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define find()")

    def read(self, stored: StoredWeight, checkpoint: Checkpoint) -> PackedTensors:
        """One of them. Raises ``CheckpointError``, with the reason, where no scheme can hold it as it is."""
        raise NotImplementedError(f"{type(self).__name__} does not define read()")

    @classmethod
    def configured(cls, **options: Any) -> WeightFormat:
        """The format with the given options, each checked against its field's annotation.

        Raises ``UnknownNameError`` for an unknown option, ``CheckpointError`` for a value that it cannot
        hold.
        """
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        hints, values = get_type_hints(cls), {}
        for option, value in options.items():
            if option not in known:
                raise UnknownNameError(f"option of format {cls.name}", option, known)
            try:
                values[option] = typed_value(value, hints[option])
            except OptionError as error:
                raise CheckpointError(f"option {option!r} of format {cls.name!r} {error}") from error
        return cls(**values)

    def __str__(self) -> str:
        return format_text(self)


def format_text(given: WeightFormat) -> str:
    """``gptq{zeros=v2}``: the one spelling of a configured format."""
    values = [(f.name, getattr(given, f.name), f.default) for f in fields(given)]  # type: ignore[arg-type]
    options = [f"{name}={format_value(value)}" for name, value, default in values if value != default]
    return given.name + (f"{{{','.join(options)}}}" if options else "")
