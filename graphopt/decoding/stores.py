"""What a way to keep keys and values between steps has to say about itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch

from graphopt.candidate import Reason
from graphopt.decoding.masks import MaskSpec
from graphopt.options import format_value

__all__ = ["CacheStore", "Call", "SiteSpec", "called", "store_text"]

Call = Callable[..., Any]
"""``call(operator, *arguments)``: what it gives, or the node of a program that will."""


def called(operator: Callable[..., Any], *arguments: Any) -> Any:
    """A ``Call`` on tensors."""
    return operator(*arguments)


@dataclass(frozen=True)
class SiteSpec:
    """One place where a program attends, as far as a store needs to know it.

    ``heads`` of queries share ``kv_heads`` of keys [.., ``key_width``] and values [.., ``value_width``].
    ``softcap`` 0: none. ``shares``: the site reads the store of an earlier one and writes nothing. ``turn``:
    0 where no other site reads the store, else 1 for the first, 3 for the last and 2 for those between.
    ``within``: values are the first ``value_width`` columns of keys. ``source``: where keys and values are
    those of an encoder's output, how many rows of it there are at most; they are written once, before the
    first step. ``bias``: the table of a mask that has one, float32 [heads, capacity], or the node of a
    program that holds it. ``members``: how many sites write into the store, ``member`` which of them this one
    is, in the order of the program. ``fitted``: what the store made of calibration tokens, by name
    (``CacheStore.fit``): tensors, or the nodes of a program that hold them.
    """

    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    mask: MaskSpec
    scale: float
    softcap: float = 0.0
    sinks: bool = False
    shares: bool = False
    turn: int = 0
    within: bool = False
    source: int = 0
    bias: Any = field(default=None, compare=False)
    members: int = 1
    member: int = 0
    fitted: Mapping[str, Any] = field(default_factory=dict, compare=False)


class CacheStore:
    """Base of all stores: subclass as a frozen dataclass whose fields are the options.

    A store is a few tensors for a site, made once for ``batch`` sequences of ``capacity`` positions, the
    first dimension of each being the batch. ``attend_op`` is the qualified name of a ``torch.library``
    operator that writes new rows into them, in place, and attends::

        attend_op(query, key, value, *tensors, positions, valid, slopes, sinks, scale, softcap, window,
        length,
                  *constants(site))

    ``query`` [B, H, n, D], ``key`` [B, Hkv, n, D] and ``value`` [B, Hkv, n, Dv] of the rows at ``positions``
    int64 [n], or both ``None`` where the site shares a store; ``valid`` bool [at least B, capacity] or
    ``None``: what is no padding; ``slopes``, ``sinks`` [H] or ``None``; ``window`` 0 where there is none;
    ``length``: no position is at or beyond it. It gives [B, H, n, Dv], declares which tensors it writes, and
    never looks at the numbers of ``positions`` from the host on an accelerator.

    ``last_alone``: the operator takes queries of the last of several new rows alone, [B, H, 1, D], beside the
    keys and values of all. ``exact``: it gives what the program gives without a cache. A store that does not
    says with ``whole`` what it gives instead: decoders are compared with that, and what it costs is measured
    by it. ``takes_turns``: all sites that read the store are given the new rows, and ``site.turn`` says who
    is to write them. ``joins``: several sites write into the store, each rows of its own, ``site.member`` of
    ``site.members``. ``note``: what the report says besides, of a store that serves some uses badly.
    ``needs_fit``: it has tensors of its own at each site, which ``fit`` makes of calibration tokens.
    ``adds_biases``: it serves sites whose mask has a ``bias``, which it is to add (``site.bias``).
    ``crosses``: it keeps the rows of a source (``site.source``) and nothing else; ``write`` puts them there,
    and ``attend_op`` is given ``positions`` int64 [1], the source's last row, ``valid``, which of its rows
    count, and as ``length`` how many there are at most. ``repeats``: a step that runs twice leaves in the
    tensors what it leaves when it runs once; others are copied to the host where compiled steps are compared.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    exact: ClassVar[bool] = False
    last_alone: ClassVar[bool] = False
    attend_op: ClassVar[str]
    takes_turns: ClassVar[bool] = False
    joins: ClassVar[bool] = False
    note: ClassVar[str] = ""
    needs_fit: ClassVar[bool] = False
    crosses: ClassVar[bool] = False
    adds_biases: ClassVar[bool] = False
    repeats: ClassVar[bool] = False

    @classmethod
    def named(cls, known: Mapping[str, type[CacheStore]], **options: Any) -> CacheStore:
        """The store with these ``options``; other stores that they name are among ``known``."""
        return cls(**options)

    def refuses(self, site: SiteSpec, capacity: int) -> Reason | None:
        """``None``, or why this store cannot serve a site whose sequences have up to ``capacity``
        positions."""
        return None

    def tensors(
        self, site: SiteSpec, batch: int, capacity: int
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor, in the order in which the operator takes them."""
        raise NotImplementedError(f"{type(self).__name__} does not define tensors()")

    def constants(self, site: SiteSpec) -> tuple[Any, ...]:
        """What the operator takes besides what all take."""
        return ()

    def whole(
        self,
        site: SiteSpec,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        valid: torch.Tensor | None,
        slopes: torch.Tensor | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """[B, H, S, Dv]: what the rows of whole sequences give, ``query`` [B, H, S, D], ``key`` [B, Hkv, S,
        D] and ``value`` [B, Hkv, S, Dv], as if they had come one by one; ``valid`` bool [B, S]. Of a store
        that ``joins``, ``key`` and ``value`` are those of all M sites that write into it, [M, B, Hkv, S, ..],
        and ``query`` is that of ``site.member``. Without stores and without packing, so that it tells what
        ``attend_op`` does wrong."""
        raise NotImplementedError(f"{type(self).__name__} does not define whole()")

    def fitted(self, site: SiteSpec) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor that ``fit`` makes."""
        return {}

    def fit_rows(self, site: SiteSpec) -> int:
        """Of how many calibration tokens at least ``fit`` is to be told."""
        return 1

    def fit(
        self, site: SiteSpec, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> Mapping[str, torch.Tensor]:
        """Tensors of its own for a site, which come to be ``site.fitted``, made of what it attends with on R
        calibration tokens, by head of keys: ``key`` [Hkv, R, D], ``value`` [Hkv, R, Dv], and ``query`` [Hkv,
        Q, D], those of all heads and attentions that read the head. All are finite, in ``site.dtype``. Of a
        store that ``joins`` they are those of all M sites, [M, Hkv, ..]."""
        return {}

    def inside(self, site: SiteSpec) -> tuple[CacheStore, SiteSpec]:
        """The store that keeps rows and what it is to know, where this one keeps them as something else
        (``enter``); itself where it does not."""
        return self, site

    def enter(self, call: Call, site: SiteSpec, query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
        """What ``attend_op`` is given of the rows that the program makes, by operators that are called with
        ``call`` alone: it is run on tensors as well as written into programs. ``key`` and ``value`` may be
        ``None``."""
        return query, key, value

    def leave(self, call: Call, site: SiteSpec, made: Any) -> Any:
        """What the program is given of what ``attend_op`` made."""
        return made

    def write(self, call: Call, site: SiteSpec, key: Any, value: Any, tensors: Sequence[Any]) -> None:
        """Put ``key`` [B, Hkv, T, D] and ``value`` [B, Hkv, T, Dv] of a source into the first rows of
        ``tensors``, those of this store in order, by operators that are called with ``call`` alone."""
        raise NotImplementedError(f"{type(self).__name__} does not define write()")

    @classmethod
    def choices(cls) -> tuple[CacheStore, ...]:
        """What is tried of it where the stores of a decoder are to take fewer bytes, most bytes first."""
        return ()

    def step_bound(self, site: SiteSpec) -> int:
        """New rows of a step lie between two multiples of as many positions: prompts go in by parts. 0: they
        may lie anywhere."""
        return 0

    def crossed(self, site: SiteSpec) -> int:
        """Positions after which all that the store does has happened: as many are checked."""
        return 2 * site.mask.window + 3 if site.mask.window else 0

    def follows(self, site: SiteSpec, device: torch.device) -> bool:
        """Whether a step on ``device`` reads no more than what its position says is there. Where it does not,
        programs of several ``length`` are made. By default it does on the CPU, where positions may be looked
        at."""
        return device.type == "cpu"

    def stored_bytes(self, site: SiteSpec, batch: int, capacity: int) -> int:
        """Bytes of all tensors, fitted ones included; none for a site that shares, nor for those behind the
        first that writes into the store."""
        if site.shares or site.member:
            return 0
        kinds = [*self.tensors(site, batch, capacity).values(), *self.fitted(site).values()]
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in kinds)

    def __str__(self) -> str:
        return store_text(self)


def store_text(store: CacheStore) -> str:
    """``ring{slots=64}``: the one spelling of a configured store."""
    options_of = (f for f in fields(store) if f.init)  # type: ignore[arg-type]
    values = [(f.name, getattr(store, f.name), f.default) for f in options_of]
    options = [f"{name}={format_value(value)}" for name, value, default in values if value != default]
    return store.name + (f"{{{','.join(options)}}}" if options else "")
