"""Who keeps what: a store for each attention, and whose store each one reads.

A value like a plan: passes over stores make one (``docs/decoding.md``), ``sites_of`` takes it, reports and
files carry it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, get_type_hints

from graphopt.decoding.stores import CacheStore
from graphopt.errors import InputsError, PipelineError, UnknownNameError
from graphopt.options import OptionError, typed_value
from graphopt.pipeline import parse_items

__all__ = ["FORMAT", "NOTHING", "CacheAssignment", "plan_of", "store_named"]

FORMAT = 3
"""Version of what ``to_json`` writes."""

_PARTS = ("stores", "sources", "streams", "joins")


@dataclass(frozen=True)
class CacheAssignment:
    """Stores and sources of attentions, by their indices in the order in which a program computes them.

    ``stores``: how a store is spelled (``"full"``, ``"ring"``, ``"quantized{bits=4}"``); an attention that is
    not named gets the exact store of least bytes. ``sources``: attention ``consumer`` reads the keys and
    values of attention ``source``, its own projections of them being gone; one that is not named reads what
    it read. ``streams``: attention ``index`` makes its keys and values of what enters attention ``early``.
    ``joins``: attention ``later`` writes what it makes into the store of attention ``first``, which writes
    its own there too.

    Raises ``InputsError`` when made for what is no mapping of ints, a source that is no earlier attention or
    reads another's itself, a stream that is no earlier one's, a store or a stream for an attention that
    keeps nothing of its own, and for attentions that would write into a store that is none.
    """

    stores: Mapping[int, str] = field(default_factory=dict)
    sources: Mapping[int, int] = field(default_factory=dict)
    streams: Mapping[int, int] = field(default_factory=dict)
    joins: Mapping[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stores", dict(_mapping(self.stores, "stores", str)))
        object.__setattr__(self, "sources", dict(_mapping(self.sources, "sources", int)))
        object.__setattr__(self, "streams", dict(_mapping(self.streams, "streams", int)))
        object.__setattr__(self, "joins", dict(_mapping(self.joins, "joins", int)))
        for index, early in self.streams.items():
            if early >= index:
                raise InputsError(
                    f"attention {index} cannot make keys and values of what enters attention {early}, which "
                    "comes no earlier",
                    hint=f"the nearest that does: {index - 1}" if index else "leave attention 0 out",
                )
            if index in self.sources:
                raise InputsError(
                    f"attention {index} is to make keys and values of what enters attention {early}, and "
                    f"reads those of attention {self.sources[index]}",
                    hint="name it once",
                )
        for consumer, source in self.sources.items():
            _check_order(consumer, source, self.sources)
        for index in self.stores:
            if index in self.sources:
                raise InputsError(
                    f"attention {index} is given the store {self.stores[index]!r} and reads that of "
                    f"attention {self.sources[index]}",
                    hint=f"give the store to attention {self.sources[index]}",
                )
        for later, first in self.joins.items():
            _check_join(later, first, self)

    def __hash__(self) -> int:
        return hash(tuple(tuple(part.items()) for part in self._parts().values()))

    def __bool__(self) -> bool:
        return any(map(bool, self._parts().values()))

    def _parts(self) -> dict[str, Mapping[int, Any]]:
        return {name: getattr(self, name) for name in _PARTS}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        parts = {
            name: {str(index): value for index, value in part.items()} for name, part in self._parts().items()
        }
        return {"format": FORMAT, **parts}

    @classmethod
    def from_json(cls, data: object) -> CacheAssignment:
        """What ``to_json`` wrote. Raises ``InputsError`` for another version, other fields, other values."""
        if isinstance(data, Mapping) and data.get("format", FORMAT) != FORMAT:
            raise InputsError(f"an assignment of stores of format {data['format']!r}: expected {FORMAT}")
        if not isinstance(data, Mapping) or set(data) != {"format", *_PARTS}:
            found = sorted(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
            raise InputsError(
                f"no assignment of stores: expected format, stores, sources, streams and joins, got {found}"
            )
        parts = {}
        for name in _PARTS:
            part = data[name]
            if not isinstance(part, Mapping) or not all(str(key).isdecimal() for key in part):
                raise InputsError(f"{name} of an assignment: expected indices of attentions, got {part!r}")
            parts[name] = {int(key): value for key, value in part.items()}
        return cls(**parts)


def _mapping(value: object, name: str, kind: type) -> list[tuple[int, Any]]:
    """Entries in order."""
    if not isinstance(value, Mapping):
        raise InputsError(
            f"{name} is {value!r}: expected a mapping of indices of attentions, such as "
            + ("{1: 0}" if kind is int else "{0: 'full'}")
        )
    for key, item in value.items():
        if isinstance(key, bool) or not isinstance(key, int) or key < 0:
            raise InputsError(f"{name} has the key {key!r}: expected the index of an attention, from 0 on")
        if isinstance(item, bool) or not isinstance(item, kind) or (isinstance(item, int) and item < 0):
            what = "the index of an attention, from 0 on" if kind is int else "the name of a store"
            raise InputsError(f"{name}[{key}] is {item!r}: expected {what}")
    return sorted(value.items())


def plan_of(value: object) -> dict[int, int]:
    """Pairs (consumer, source) of a mapping, in order; a source may come later than its consumers, which
    training programs alone can do.

    Raises ``InputsError`` for what is no mapping of indices, and for a source that makes no keys and values.
    """
    sources: dict[int, int] = dict(_mapping(value, "sources", int))
    for consumer, source in sources.items():
        _check_round(consumer, source, sources)
        _check_chain(consumer, source, sources)
    return sources


def _check_order(consumer: int, source: int, sources: Mapping[int, int]) -> None:
    """Raises ``InputsError`` for a source that is not there yet, or reads another's."""
    _check_round(consumer, source, sources)
    if source > consumer:
        raise InputsError(
            f"attention {consumer} cannot read the keys and values of attention {source}, which come later",
            hint=f"let attention {source} read those of {consumer}"
            + (f", or {consumer} those of {consumer - 1}" if consumer else ""),
        )
    _check_chain(consumer, source, sources)


def _check_round(consumer: int, source: int, sources: Mapping[int, int]) -> None:
    path = _followed(consumer, sources)
    if path[-1] in path[:-1]:
        raise InputsError(
            f"attention {consumer} would read keys and values that none makes: {' -> '.join(map(str, path))}",
            hint="take one attention of the round out of the plan",
        )


def _check_chain(consumer: int, source: int, sources: Mapping[int, int]) -> None:
    if source in sources:
        raise InputsError(
            f"attention {consumer} reads the keys and values of attention {source}, which makes none: it "
            f"reads those of attention {sources[source]}",
            hint=f"name what makes them: {{{consumer}: {_followed(consumer, sources)[-1]}}}",
        )


def _followed(consumer: int, sources: Mapping[int, int]) -> list[int]:
    """``consumer``, what it reads, what that reads, up to what makes its own or was met before."""
    path = [consumer]
    while path[-1] in sources and path[-1] not in path[:-1]:
        path.append(sources[path[-1]])
    return path


def _check_join(later: int, first: int, made: CacheAssignment) -> None:
    """Raises ``InputsError`` for a store that is not there yet, is another's, or is read by others."""
    head = f"attention {later} cannot write into the store of attention {first}, which"
    if first >= later:
        raise InputsError(
            f"{head} comes no earlier",
            hint=f"let attention {first} write into that of {later}: {{{first}: {later}}}"
            if first > later
            else f"name an earlier one, or leave attention {later} out",
        )
    if first in made.joins:
        raise InputsError(
            f"{head} writes into that of attention {made.joins[first]}",
            hint=f"name that: {{{later}: {made.joins[first]}}}",
        )
    for index in (later, first):
        if index in made.sources:
            raise InputsError(
                f"attention {later} cannot write into the store of attention {first}: attention {index} "
                f"makes no keys and values, it reads those of attention {made.sources[index]}",
                hint=f"leave attention {index} out of one of both",
            )
    if later in made.stores:
        raise InputsError(
            f"attention {later} is given the store {made.stores[later]!r} and writes into that of attention "
            f"{first}",
            hint=f"give the store to attention {first}",
        )


def store_named(text: str, known: Mapping[str, type[CacheStore]]) -> CacheStore:
    """The store that ``text`` spells, ``"ring"`` or ``"quantized{bits=4}"``.

    Raises ``UnknownNameError`` for one that nothing registers and for an unknown option, ``PipelineError``
    for a text that cannot be read, and ``InputsError`` for a value that an option cannot hold.
    """
    items = parse_items(text, "store", "store")
    if len(items) != 1:
        raise PipelineError(f"{text!r} names {len(items)} stores: expected one")
    ((name, options),) = items
    if name not in known:
        raise UnknownNameError("store", name, known)
    kind = known[name]
    defaults = {f.name: f.default for f in fields(kind) if f.init}  # type: ignore[arg-type]
    hints = get_type_hints(kind)
    values = {}
    for option, value in options.items():
        if option not in defaults:
            raise UnknownNameError(f"option of store {name}", option, defaults)
        try:
            values[option] = typed_value(value, hints[option])
        except OptionError as error:
            raise InputsError(f"option {option!r} of store {name!r} {error}") from error
    missing = [option for option, default in defaults.items() if default is MISSING and option not in values]
    if missing:
        raise InputsError(f"store {name!r} needs option {missing[0]!r}")
    return kind.named(known, **values)


NOTHING = CacheAssignment()
"""Every attention keeps what it makes, in the exact store of least bytes."""
