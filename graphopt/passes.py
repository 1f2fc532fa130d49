"""The pass protocol: a pass is a value that looks at a program and proposes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, ClassVar, get_type_hints

from graphopt.candidate import Candidate, Declined, Frontier, NearMiss
from graphopt.cost import CostModel
from graphopt.errors import PassError, UnknownNameError
from graphopt.options import OptionError, format_value, typed_value
from graphopt.program import Level, Program

__all__ = ["Pass", "PassContext", "Proposal", "pass_options", "pass_text"]

Proposal = Candidate | Frontier | NearMiss | Declined


@dataclass(frozen=True)
class PassContext:
    """What a pass may know besides the program.

    ``mode`` is ``"train"`` or ``"infer"``; ``emit`` is the code generator that the program is for;
    ``room_bytes`` what the program may take at its peak, where one budget is asked for and the program is all
    that is planned for it, else ``None``: schedules far from it will not be chosen. ``curve``: the schedules
    that passes before this one offer for the program, for one that adds to them (``Frontier.extends``).
    ``bounded`` is false where the fastest program alone is asked for: what only frees memory need not be
    looked at.
    ``searching`` is false where a plan that is replayed says which schedule runs: no others are looked for.
    ``only``: the rewrites that may be applied, where not all may; passes need not look at it.
    ``effort``: the share of its usual work that a pass which searches should spend on a large program. It is
    less than 1 for a program that may run instead of another, of which there are several.
    """

    cost: CostModel
    mode: str
    emit: str = "eager"
    room_bytes: int | None = None
    allow: frozenset[str] = frozenset()
    curve: Frontier | None = None
    bounded: bool = True
    searching: bool = True
    only: frozenset[str] | None = None
    effort: float = 1.0


@dataclass(frozen=True)
class Pass:
    """Base of all passes: subclass as a frozen dataclass whose fields are the options.

    A pass keeps no state between runs. ``name`` is kebab-case and unique per plugin.
    ``after``/``before`` map other passes' names to the reason for the order; they constrain only
    passes that are present. ``needs``/``keeps`` are program properties. A pass with ``exact``
    false runs only when ``allow`` names it; ``inexact`` says what it does then.
    """

    name: ClassVar[str]
    level: ClassVar[Level]
    summary: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    keeps: ClassVar[frozenset[str]] = frozenset()
    after: ClassVar[dict[str, str]] = {}
    before: ClassVar[dict[str, str]] = {}
    exact: ClassVar[bool] = True
    inexact: ClassVar[str] = "changes results"
    mandatory: ClassVar[bool] = False

    @property
    def asked(self) -> bool:
        """Whether, with these options, listing it asks for another model than the one that is given. It runs
        without ``allow`` then, what it proposes is applied whatever it costs, and what fails is raised: the
        model as it was would be another one, quietly."""
        return False

    def propose(self, program: Program, ctx: PassContext) -> Iterable[Proposal]:
        """Yield what could be done to ``program``; never change it here."""
        raise NotImplementedError(f"{type(self).__name__} does not define propose()")

    @classmethod
    def configured(cls, **options: Any) -> Pass:
        """The pass with the given options, each checked against its field's annotation.

        Raises ``UnknownNameError`` for an unknown option, ``PassError`` for a value of another
        type and for a required option that is missing.
        """
        known = pass_options(cls)
        for option in options:
            if option not in known:
                raise UnknownNameError(f"option of pass {cls.name}", option, known)
        for option, default in known.items():
            if default is MISSING and option not in options:
                raise PassError(f"pass {cls.name!r} needs option {option!r}")
        hints = get_type_hints(cls)
        values = {}
        for option, value in options.items():
            try:
                values[option] = typed_value(value, hints[option])
            except OptionError as error:
                raise PassError(f"option {option!r} of pass {cls.name!r} {error}") from error
        return cls(**values)


def pass_options(cls: type[Pass]) -> dict[str, Any]:
    """Option names and their defaults, ``dataclasses.MISSING`` where there is none."""
    return {f.name: _default(f) for f in fields(cls)}


def pass_text(instance: Pass) -> str:
    """``insert-checkpoints{effort=2}``: the one spelling of a configured pass.

    Raises ``OptionError`` for an option of a type that has no spelling.
    """
    values = [(f.name, getattr(instance, f.name), _default(f)) for f in fields(instance)]
    options = [f"{name}={format_value(value)}" for name, value, default in values if value != default]
    return instance.name + (f"{{{','.join(options)}}}" if options else "")


def _default(option: Field[Any]) -> Any:
    return option.default if option.default_factory is MISSING else option.default_factory()
