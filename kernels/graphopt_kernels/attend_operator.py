"""Makes the operator of a store out of one record.

::

    graphopt::<name>(query, key?, value?, <stores>, positions, valid?, slopes?, sinks?,
                     scale, softcap, window, length, <constants>) -> [B, H, n, Dv]

    <stores>      what the store holds, the fields of one named tuple, written in place
    <constants>   what else the operator goes by, the fields of another

Functions of a record take an argument each for what rows ask (``Asked``), the stores and the constants.
Schema, fake, dispatch to the kernels and registration follow from the record: a new store's operator is its
two tuples, its reference, its conditions, and its launch where there is a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar, get_type_hints

import torch

from graphopt.candidate import Reason
from graphopt.operator_scratch import state_scratch
from graphopt.plugins import KernelSpec

__all__ = ["Asked", "AttendOperator", "NoConstants", "RowStores"]


class Asked(NamedTuple):
    """What every operator over stores is given.

    ``query`` [B, H, n, D], or of the last row alone, [B, H, 1, D], of several new ones. ``key`` [B, Hkv, n,
    D] and ``value`` [B, Hkv, n, Dv] go to ``positions`` int64 [n], which ascend; ``None``: they are there
    already, as where layers share a store. ``valid`` bool [at least B, capacity]: which positions are no
    padding. ``slopes``, ``sinks`` [H]. ``window``: how many positions a row reads, 0 for all. ``length``: no
    position is at or beyond it, so that no more of the store needs to be read.
    """

    query: torch.Tensor
    key: torch.Tensor | None
    value: torch.Tensor | None
    positions: torch.Tensor
    valid: torch.Tensor | None
    slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    scale: float
    softcap: float
    window: int
    length: int


class RowStores(NamedTuple):
    """Stores of rows as they are, [at least B, Hkv, slots, D or Dv]."""

    key_store: torch.Tensor
    value_store: torch.Tensor


class NoConstants(NamedTuple):
    """Of operators that go by nothing else."""


_NEW = 3
"""Fields of ``Asked`` that come before the stores."""

_KINDS = {
    torch.Tensor: "Tensor",
    torch.Tensor | None: "Tensor?",
    Sequence[int]: "SymInt[]",
    float: "float",
    int: "SymInt",
    str: "str",
}

Stores = TypeVar("Stores", bound=tuple[Any, ...])
Constants = TypeVar("Constants", bound=tuple[Any, ...])


class AttendOperator(Generic[Stores, Constants]):
    """``graphopt::<name>``, which is registered as this is made; called, it runs the operator.

    ``stores`` and ``constants`` are named tuples of tensors and of tensors, numbers, text and sequences of
    integers; any other type raises ``TypeError``. ``writes``: every store is written in place, else none is.
    ``reference(asked, stores, constants)`` gives the output with ATen operators; ``refuses`` ``None`` or why
    the operator does not take these, of which its fake makes a ``ValueError``; ``value_width(stores,
    constants)`` the last size of the output; ``launch`` the output by kernels, or ``None`` where they do not
    take these; ``scratch`` the bytes that ``graphopt.operator_scratch`` is told. There is no gradient.
    """

    def __init__(
        self,
        name: str,
        stores: Callable[..., Stores],
        constants: Callable[..., Constants],
        *,
        summary: str,
        reference: Callable[[Asked, Stores, Constants], torch.Tensor],
        refuses: Callable[[Asked, Stores, Constants], Reason | None],
        value_width: Callable[[Stores, Constants], int],
        launch: Callable[[Asked, Stores, Constants], torch.Tensor | None] | None = None,
        scratch: Callable[[Asked, Stores, Constants], int] | None = None,
        writes: bool = True,
    ) -> None:
        self.name, self.summary = name, summary
        self._stores, self._constants = stores, constants
        self._reference, self._refuses, self._launch = reference, refuses, launch
        self._value_width, self._scratch = value_width, scratch
        held, qualified = list(get_type_hints(stores)), f"graphopt::{name}"
        self._held = len(held)
        self._operator = torch.library.custom_op(
            qualified, self._run, mutates_args=held if writes else (), schema=self._schema(writes)
        )
        self._operator.register_fake(self._fake)
        if scratch is not None:
            state_scratch(qualified, self.scratch)

    def __call__(self, *given: Any) -> torch.Tensor:
        made: torch.Tensor = self._operator(*given)
        return made

    def parted(self, given: Sequence[Any]) -> tuple[Asked, Stores, Constants]:
        """Arguments of the operator, in its order, as functions of the record take them."""
        end = _NEW + self._held
        rest = end + len(Asked._fields) - _NEW
        return (
            Asked(*given[:_NEW], *given[end:rest]),
            self._stores(*given[_NEW:end]),
            self._constants(*given[rest:]),
        )

    def reference(self, *given: Any) -> torch.Tensor:
        """What the operator does, with ATen operators, of its arguments."""
        return self._reference(*self.parted(given))

    def supports(self, *given: Any) -> Reason | None:
        """``None``, or why the operator does not take these arguments."""
        return self._refuses(*self.parted(given))

    def scratch(self, *given: Any) -> int:
        """Bytes that a call takes beyond its output, 0 where nothing is said of it."""
        return 0 if self._scratch is None else self._scratch(*self.parted(given))

    @property
    def spec(self) -> KernelSpec:
        """What the package registers of the operator."""
        return KernelSpec(
            self.name.replace("_", "-"), f"graphopt::{self.name}", self.reference, self.supports, self.summary
        )

    def _schema(self, writes: bool) -> str:
        asked = list(get_type_hints(Asked).items())
        held, more = get_type_hints(self._stores), get_type_hints(self._constants)
        fields = []
        for number, (field, kind) in enumerate([*asked[:_NEW], *held.items(), *asked[_NEW:], *more.items()]):
            if kind not in _KINDS:
                raise TypeError(
                    f"{self.name}: {field} is {kind}: expected one of {', '.join(map(str, _KINDS))}"
                )
            # As torch names what functions write when it reads their signatures.
            written = f"(a{number}!)" if writes and field in held else ""
            fields.append(f"{_KINDS[kind][:6]}{written}{_KINDS[kind][6:]} {field}")
        return f"({', '.join(fields)}) -> Tensor"

    def _run(self, *given: Any) -> torch.Tensor:
        made = None if self._launch is None else self._launch(*self.parted(given))
        return self.reference(*given) if made is None else made

    def _fake(self, *given: Any) -> torch.Tensor:
        asked, stores, constants = self.parted(given)
        if (reason := self.supports(*given)) is not None:
            raise ValueError(f"{self.name}: {reason}")
        return asked.query.new_empty((*asked.query.shape[:3], self._value_width(stores, constants)))
