"""Which of the steps of an artefact takes a call, and with which inputs.

Steps are asked from the one that was captured last: where several take a call, that is the one that the saved
module runs. One for the mode of the call, with gradients or without, is asked before the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from graphopt.artefact.calling import taken
from graphopt.artefact.records import Autocast, SavedInput, SavedStep
from graphopt.artefact.sizes import SavedSymbol, Sizes, expression_text, value_of
from graphopt.artefact.values import has_symbols, type_json
from graphopt.errors import ArtefactError, InputsError

__all__ = ["Callee", "Given", "Taken", "pick"]

_MODES = {True: "training", False: "evaluation"}
_ANEW = "save a step for these inputs as well"


@dataclass(frozen=True)
class Given:
    """A call: its ``arguments`` by name, the mode of the module, whether gradients are on, and the tensors of
    the module by path."""

    arguments: Mapping[str, Any]
    training: bool
    grad: bool
    state: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Taken:
    """A call that a step takes: ``tensors`` of its arguments, ``inputs`` of the program."""

    tensors: Sequence[torch.Tensor | None]
    inputs: Sequence[Any]


_ASPECTS = ("dtype", "rank", "shape", "device", "stride", "gradient")
_STAGES = ("mode", "autocast", "structure", "backward", *_ASPECTS, "sizes")
"""What a call is checked for, in order: it comes the nearer the later it is refused."""


class _Refused(Exception):
    """How far a call came (``stage``), and why no further."""

    def __init__(self, stage: str, error: InputsError) -> None:
        super().__init__(error.message)
        self.stage, self.error = _STAGES.index(stage), error


@dataclass(frozen=True)
class Callee:
    """How a step is called. ``looks``: type and whether gradients flow, of inputs by node; ``tensors``: how
    many the arguments have; ``held``: tensors that the model had besides its state; ``said``: what to call
    it."""

    step: SavedStep
    arguments: Any
    tensors: int
    sizes: Sizes
    looks: Mapping[str, tuple[Any, bool]]
    held: Mapping[str, torch.Tensor]
    said: str

    @property
    def trains(self) -> bool:
        return self.step.mode == "train"

    def take(self, given: Given) -> Taken:
        """The inputs of the program. Raises ``_Refused``."""
        step = self.step
        tensors: list[torch.Tensor | None] = [None] * self.tensors
        _checked("mode", lambda: _check_mode(step, given.training))
        _checked("autocast", lambda: _check_autocast(step.autocast))
        given_numbers: dict[int, int] = {}
        _checked(
            "structure",
            lambda: taken(self.arguments, given.arguments, tensors, "the call", given_numbers),
        )
        inputs: list[Any] = []
        for spec, said in zip(step.inputs, self._said, strict=True):
            inputs.append(None if spec.source == "symbol" else self._tensor(spec, given, tensors))
            self._check(spec, inputs[-1], said, ("dtype", "rank"), {})
        numbers = {s.name: _told(s, inputs, given_numbers) for s in self.sizes.symbols}
        for what in ("shape", "device", "stride", "gradient"):
            for spec, value, said in zip(step.inputs, inputs, self._said, strict=True):
                self._check(spec, value, said, (what,), numbers)
        self._check_sizes(numbers)
        pairs = zip(step.inputs, inputs, strict=True)
        return Taken(tensors, [numbers[spec.name] if spec.source == "symbol" else v for spec, v in pairs])

    def _tensor(
        self, spec: SavedInput, given: Given, tensors: Sequence[torch.Tensor | None]
    ) -> torch.Tensor:
        if spec.source == "state":
            return given.state[spec.name]
        value = tensors[int(spec.name)] if spec.source == "argument" else self.held[spec.name]
        assert value is not None
        return value

    @cached_property
    def _said(self) -> list[str]:
        """What inputs of the program are called."""
        return [
            f"tensor {spec.name} of the call" if spec.source == "argument" else spec.name
            for spec in self.step.inputs
        ]

    def _check_sizes(self, numbers: Mapping[str, int]) -> None:
        """Raise ``_Refused`` unless what the program assumes of sizes holds of ``numbers``."""
        said = [f"{s.name}, {s.place(self._said)}, is {numbers[s.name]}" for s in self.sizes.symbols]
        for symbol, told in zip(self.sizes.symbols, said, strict=True):
            if refusal := symbol.refusal(numbers[symbol.name]):
                raise _Refused("sizes", InputsError(f"{told}: {refusal}", hint=_ANEW))
        if failed := self.sizes.failed(numbers):
            message = f"{'; '.join(said)}: the step was saved for sizes with {failed}"
            raise _Refused("sizes", InputsError(message, hint=_ANEW))

    def _check(
        self, spec: SavedInput, tensor: Any, name: str, what: Sequence[str], numbers: Mapping[str, int]
    ) -> None:
        """Raise ``_Refused`` unless ``tensor``, if it is one, looks as the program was compiled for."""
        if spec.node not in self.looks or tensor is None:
            return
        look, trained = self.looks[spec.node]
        found = type_json(tensor)
        for aspect in what:
            if aspect == "gradient":
                if self.trains and tensor.requires_grad != trained:
                    now, was = ("a", "no") if tensor.requires_grad else ("no", "a")
                    message = f"{name} requires {now} gradient; when the step was saved it required {was}"
                    raise _Refused(aspect, InputsError(f"{message} gradient"))
            elif not _same(aspect, found, look, numbers):
                key = "shape" if aspect == "rank" else aspect
                message = f"{name} has {key} {_text(found[key])}, the step was saved for {_text(look[key])}"
                raise _Refused(aspect, InputsError(message, hint=_ANEW))

    def check_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Raise ``ArtefactError`` where parameters or buffers do not look as the program was compiled for."""
        for spec in self.step.inputs:
            look = self.looks.get(spec.node)
            if spec.source == "state" and look is not None and not has_symbols(look[0]):
                try:
                    self._check(spec, state[spec.name], spec.name, _ASPECTS, {})
                except _Refused as refused:
                    raise ArtefactError(refused.error.message) from None


def _told(symbol: SavedSymbol, inputs: Sequence[Any], numbers: Mapping[int, int]) -> int:
    """What a symbol is in a call."""
    if symbol.of == "number":
        return numbers[symbol.input]
    value = inputs[symbol.input]
    numbers = value.shape if symbol.of == "size" else value.stride()
    return int(numbers[symbol.dim])


def _checked(stage: str, check: Callable[[], None]) -> None:
    try:
        check()
    except InputsError as error:
        raise _Refused(stage, error) from None


def _check_mode(step: SavedStep, training: bool) -> None:
    if training != step.training:
        raise InputsError(
            f"the step was saved in {_MODES[step.training]} mode, the module is in {_MODES[training]} mode",
            hint=f"call {'train' if step.training else 'eval'}() first, or save a step of the other mode",
        )


def _check_autocast(casts: Sequence[Autocast]) -> None:
    for cast in casts:
        now = torch.is_autocast_enabled(cast.kind), str(torch.get_autocast_dtype(cast.kind))[6:]
        if now[0] != cast.enabled or (cast.enabled and now[1] != cast.dtype):
            to = f" to {cast.dtype}" if cast.enabled else ""
            was = f"{'' if cast.enabled else 'no '}autocast of {cast.kind}{to}"
            raise InputsError(f"the step was saved under {was}: call it so")


def pick(callees: Sequence[Callee], given: Given) -> tuple[int, Taken]:
    """The step that takes a call, by number, and its inputs.

    Raises ``InputsError`` for a call that none takes: why the one that comes nearest does not, and which
    there are.
    """
    refused: dict[int, _Refused] = {}
    order = sorted(range(len(callees)), key=lambda k: (callees[k].trains != given.grad, -k))
    for number in order:
        try:
            found = callees[number].take(given)
            if _lets_go_of_gradients(callees, number, given):
                raise _Refused("backward", InputsError("it has no backward, and gradients are on"))
            return number, found
        except _Refused as reason:
            refused[number] = reason
    nearest = max(order, key=lambda k: (refused[k].stage, -order.index(k)))
    error = refused[nearest].error
    if len(callees) == 1:
        raise error
    others = "; ".join(callee.said for callee in callees)
    hints = [f"saved are {others}", *filter(None, (error.hint,))]
    backward = _STAGES.index("backward")
    hints += [
        f"under torch.no_grad() {callees[k].said} takes it" for k in order if refused[k].stage == backward
    ]
    raise InputsError(
        f"no saved step takes this call. Nearest is {callees[nearest].said}: {error.message}",
        hint="; ".join(hints),
    )


def _lets_go_of_gradients(callees: Sequence[Callee], number: int, given: Given) -> bool:
    """Whether a step for inference would run in the place of a training step that there is for other
    calls."""
    callee = callees[number]
    if not given.grad or callee.trains or not callee.step.training:
        return False
    return any(other.trains and other.step.training for other in callees)


def _same(what: str, found: Mapping[str, Any], look: Mapping[str, Any], sizes: Mapping[str, int]) -> bool:
    if what == "device":
        # Another device of the same kind is one of the same program.
        return str(found[what]).partition(":")[0] == str(look[what]).partition(":")[0]
    if what == "dtype":
        return bool(found[what] == look[what])
    if what == "rank":
        return len(found["shape"]) == len(look["shape"])
    try:
        wanted = [value_of(n["size"], sizes) if isinstance(n, dict) else n for n in look[what]]
    except ArithmeticError:
        return False
    if what == "stride":
        # Steps along dimensions of one element are nobody's.
        pairs = zip(found["shape"], found["stride"], wanted, strict=True)
        return all(size == 1 or one == other for size, one, other in pairs) or 0 in found["shape"]
    return bool(found[what] == wanted)


def _text(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    parts = [expression_text(n["size"]) if isinstance(n, dict) else str(n) for n in value]
    return ",".join(parts).join("[]")
