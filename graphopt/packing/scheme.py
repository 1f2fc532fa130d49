"""What a way to keep a weight in fewer bytes has to say about itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, ClassVar, get_type_hints

import torch

from graphopt import _torch
from graphopt.candidate import Reason
from graphopt.errors import QuantizationError, UnknownNameError
from graphopt.options import OptionError, format_value, typed_value

__all__ = ["Layout", "Scheme", "packed_names", "reason_of_weight", "scheme_text"]

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""dtype and shape of tensors by name."""


class Scheme:
    """Base of all schemes: subclass as a frozen dataclass whose fields are the options.

    A weight is a matrix [N, K]: N results, each from K inputs. ``unpack_op`` and ``linear_op`` are the
    qualified names of ``torch.library`` operators::

        unpack_op(*packed, *constants(n, k), dtype)      the weight [N, K] of ``dtype``
        linear_op(x, *packed, bias, *constants(n, k))    x [..., K] times it, bias [N] or None added: [..., N]

    with the packed tensors in the order of ``pack``. ``lossless``: unpacking gives the weight back bit for
    bit. ``by_rows``: row i of the weight is what row i of every packed tensor stands for, so that some rows
    can be unpacked alone, as embeddings need. ``exact_bytes``: sizes of packed tensors are known without
    what is packed; else ``stored_bytes`` is an upper bound. Instances are values: they are hashable, and
    print as ``scheme_text`` spells them.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    lossless: ClassVar[bool] = False
    by_rows: ClassVar[bool] = False
    exact_bytes: ClassVar[bool] = True
    unpack_op: ClassVar[str]
    linear_op: ClassVar[str]

    def refuses(self, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Reason | None:
        """``None``, or why no weight [``n``, ``k``] of this kind can be packed, whatever is in it."""
        return None

    def lacks(self, k: int, statistics: Mapping[str, torch.Tensor]) -> Reason | None:
        """``None``, or why ``statistics`` of ``k`` inputs are not enough to pack a weight with."""
        return None

    def refuses_numbers(self, weight: torch.Tensor, statistics: Mapping[str, torch.Tensor]) -> Reason | None:
        """``None``, or why this ``weight`` [N, K] cannot be packed, or not with what ``statistics`` say.

        Asked after ``refuses`` and ``lacks`` and before anything changes; ``weight`` holds finite numbers.
        """
        return None

    def pack(self, weight: torch.Tensor, statistics: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Packed tensors by name, on the device of ``weight`` [N, K], which holds finite numbers.

        ``statistics`` is what calibration found of the inputs of this weight, by name; it may be empty.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define pack()")

    def constants(self, n: int, k: int) -> tuple[Any, ...]:
        """What the operators take besides tensors: numbers, texts."""
        return ()

    def layout(self, n: int, k: int, dtype: torch.dtype) -> Layout | None:
        """dtype and shape of every packed tensor of a weight [``n``, ``k``] of ``dtype``, in the order of
        ``pack``: exactly, or with the largest sizes where not ``exact_bytes``. ``None``: the scheme does not
        say, and packed tensors that come from files are checked by their bytes alone."""
        return None

    def stored_bytes(self, n: int, k: int, dtype: torch.dtype) -> int:
        """Bytes of the packed tensors of a weight [``n``, ``k``] of ``dtype``: exactly, or at most where not
        ``exact_bytes``."""
        layout = self.layout(n, k, dtype)
        if layout is None:
            raise NotImplementedError(f"{type(self).__name__} defines neither layout() nor stored_bytes()")
        return sum(kind.itemsize * math.prod(shape) for kind, shape in layout.values())

    def refuses_packed(
        self, packed: Mapping[str, torch.Tensor], n: int, k: int, dtype: torch.dtype
    ) -> Reason | None:
        """``None``, or why ``packed`` stands for no weight [``n``, ``k``] of ``dtype``: names, dtypes,
        shapes, numbers. Asked of tensors that ``pack`` did not make, such as those of a file. Subclasses add
        what else could be wrong: indices that are out of range, scales that are hidden in other numbers."""
        names = packed_names(self)
        if tuple(packed) != names:
            return Reason(f"its tensors are {', '.join(packed) or 'none'}: expected {', '.join(names)}")
        for name, (kind, shape) in (self.layout(n, k, dtype) or {}).items():
            tensor = packed[name]
            fits = tensor.dim() == len(shape) and all(
                size == most if self.exact_bytes else size <= most
                for size, most in zip(tensor.shape, shape, strict=True)
            )
            if tensor.dtype is not kind or not fits:
                most = "" if self.exact_bytes else "at most "
                return Reason(
                    f"its {name} are {tensor.dtype} {tuple(tensor.shape)}: expected {most}{kind} {shape}"
                )
        stored, expected = sum(tensor.nbytes for tensor in packed.values()), self.stored_bytes(n, k, dtype)
        if stored > expected or (self.exact_bytes and stored != expected):
            return Reason(f"its tensors take {stored} bytes: expected {expected}")
        for name, tensor in packed.items():
            # Numbers of eight bits have no infinity, and not every device asks them whether they are one.
            wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor
            if tensor.is_floating_point() and not bool(torch.isfinite(wide).all()):
                return Reason(f"its {name} are not finite")
        return None

    def unpack(self, packed: Mapping[str, torch.Tensor], n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
        """The weight [N, K] that ``packed`` stands for."""
        unpack = operator_named(self.unpack_op)
        weight: torch.Tensor = unpack(*packed.values(), *self.constants(n, k), dtype)
        return weight

    @classmethod
    def configured(cls, **options: Any) -> Scheme:
        """The scheme with the given options, each checked against its field's annotation.

        Raises ``UnknownNameError`` for an unknown option and ``QuantizationError`` for a value that it
        cannot hold or for one that is missing.
        """
        known = {f.name: f.default for f in fields(cls)}  # type: ignore[arg-type]
        for option in options:
            if option not in known:
                raise UnknownNameError(f"option of scheme {cls.name}", option, known)
        for option, default in known.items():
            if default is MISSING and option not in options:
                raise QuantizationError(f"scheme {cls.name!r} needs option {option!r}")
        hints = get_type_hints(cls)
        values = {}
        for option, value in options.items():
            try:
                values[option] = typed_value(value, hints[option])
            except OptionError as error:
                raise QuantizationError(f"option {option!r} of scheme {cls.name!r} {error}") from error
        return cls(**values)

    def __str__(self) -> str:
        return scheme_text(self)


def scheme_text(scheme: Scheme) -> str:
    """``int4{group=64}``: the one spelling of a configured scheme."""
    values = [(f.name, getattr(scheme, f.name), f.default) for f in fields(scheme)]  # type: ignore[arg-type]
    options = [f"{name}={format_value(value)}" for name, value, default in values if value != default]
    return scheme.name + (f"{{{','.join(options)}}}" if options else "")


def packed_names(scheme: Scheme) -> tuple[str, ...]:
    """The names of packed tensors, in the order of the operators."""
    arguments = _torch.schema_of(operator_named(scheme.unpack_op)).arguments
    return tuple(argument.name for argument in arguments if str(argument.type) == "Tensor")


def operator_named(name: str) -> Any:
    """The operator ``"namespace::name"``."""
    namespace, _, bare = name.partition("::")
    return getattr(getattr(torch.ops, namespace), bare).default


def reason_of_weight(weight: torch.Tensor) -> Reason | None:
    """``None``, or why the numbers of ``weight`` cannot be packed."""
    if weight.device.type == "meta":
        return Reason("it is on the device meta and holds no numbers")
    if not bool(torch.isfinite(weight).all()):
        kind = "NaN" if bool(torch.isnan(weight).any()) else "infinity"
        return Reason(f"it holds {kind}")
    return None
