"""A planned and compiled step as it is kept for later processes: all that was decided, as JSON.

Generated code is not in it. That lies in torch's own caches, under the names that ``StoredCode.name`` has.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.candidate import Declined, NearMiss
from graphopt.capture.chain import Call, Name, Segmented
from graphopt.chain_plan import Rerun
from graphopt.emit.held_products import Slot
from graphopt.errors import StalePlanError
from graphopt.group_record import GroupRecord
from graphopt.plans import Plan
from graphopt.record_json import RecordFormatError, decode, encode
from graphopt.report import PassRecord, ProgramSummary
from graphopt.rewrites import Rewrite

__all__ = [
    "StepFormatError",
    "StoredCall",
    "StoredCode",
    "StoredLayout",
    "StoredMove",
    "StoredSlot",
    "StoredStep",
    "check_calls",
    "read_step",
    "results_of_text",
    "results_text",
    "step_text",
    "stored_code",
]

SCHEMA = "graphopt/step@4"


class StepFormatError(ValueError):
    """A text that is no step, or none that could run; the message says what is wrong with it."""


@dataclass(frozen=True)
class StoredLayout:
    """What a tensor looks like. ``dtype`` as torch writes it: ``"torch.float32"``."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    device: str = "cpu"


@dataclass(frozen=True)
class StoredSlot:
    """A gradient that a backward adds to the one held (``graphopt.emit.held_products.Slot``)."""

    position: int
    name: str
    like: StoredLayout


@dataclass(frozen=True)
class StoredCode:
    """Compiled code of one segment: its name in torch's cache."""

    name: str
    slots: tuple[StoredSlot, ...] = ()


@dataclass(frozen=True)
class StoredMove:
    """Saved value number ``number`` of a call waits in the memory of the host."""

    number: int
    layout: StoredLayout


@dataclass(frozen=True)
class StoredCall:
    """One call of the chain: code number ``code`` on ``args``. ``written``, ``random``, ``moves``: see
    ``graphopt.chain_run.ChainRunner``."""

    code: int
    args: tuple[str, ...]
    outs: tuple[str, ...]
    drops: tuple[str, ...]
    written: tuple[int, ...]
    random: bool
    moves: tuple[StoredMove, ...] = ()


@dataclass(frozen=True)
class StoredStep:
    """Everything that ``optimize`` decided about one graph. ``whole``: it is one program that runs op by op,
    the only code, which takes the graph's inputs and gives its results; there are no calls. ``results``: what
    it returns, as ``results_text`` writes it. ``operators``: operators besides torch's that the code calls.
    ``roles``: why the step cannot be replayed from a CUDA graph, or else, ``""``, which inputs are
    ``lasting`` and ``rewritten`` and whether it is ``random``. ``digests``: of the programs, by which ranks
    compare them (``graphopt.agreement``); ``collective``: one of them holds operators that ranks run
    together. ``programs`` and what follows is for the report: ``left`` is what the code generator left as
    it was. ``compared``: the hash of the model's code (``graphopt.model_code``) with which outputs and
    gradients of what was captured were compared and held, ``""`` where they were not."""

    key: str
    whole: bool
    inputs: tuple[str, ...]
    calls: tuple[StoredCall, ...]
    codes: tuple[StoredCode, ...]
    results: str
    reruns: tuple[Rerun, ...]
    operators: tuple[str, ...]
    roles: str
    lasting: tuple[int, ...]
    rewritten: tuple[int, ...]
    random: bool
    digests: tuple[str, ...]
    collective: bool
    programs: tuple[ProgramSummary, ...]
    steps: tuple[PassRecord, ...]
    declined: tuple[Declined, ...]
    near_misses: tuple[NearMiss, ...]
    rewrites: tuple[Rewrite, ...]
    diagnostics: tuple[str, ...]
    groups: tuple[GroupRecord, ...]
    left: tuple[NearMiss, ...]
    compared: str = ""

    def chain(self) -> Segmented:
        """The calls for a ``ChainRunner``, without the programs of its segments."""
        calls = tuple(Call(call.code, call.args, call.outs, call.drops) for call in self.calls)
        return Segmented((), calls, self.inputs, {}, results_of_text(self.results), ())


def stored_code(name: str, slots: Sequence[Slot]) -> StoredCode:
    """Code of a segment as it is written down."""
    found = [
        StoredSlot(
            slot.position,
            slot.name,
            StoredLayout(
                tuple(slot.like.shape), tuple(slot.like.stride()), str(slot.like.dtype), str(slot.like.device)
            ),
        )
        for slot in slots
    ]
    return StoredCode(name, tuple(found))


def step_text(step: StoredStep, plan: Plan) -> str:
    """What ``read_step`` reads."""
    body = json.dumps({"step": encode(step), "plan": plan.to_json()}, separators=(",", ":"))
    return json.dumps({"schema": SCHEMA, "key": step.key, "sha256": _hash(body)}) + "\n" + body + "\n"


def read_step(text: str, key: str) -> tuple[StoredStep, Plan]:
    """The step of that key and its plan. Raises ``StepFormatError`` for anything else: another version, a
    part of a file, calls that could not run."""
    head, _, body = text.partition("\n")
    try:
        header = json.loads(head)
        if not isinstance(header, Mapping) or header.get("schema") != SCHEMA:
            raise StepFormatError("it is of another version")
        if header.get("key") != key:
            raise StepFormatError("it is of another step")
        if header.get("sha256") != _hash(body.rstrip("\n")):
            raise StepFormatError("it is damaged")
        data = json.loads(body)
        step = decode(StoredStep, data["step"], where="step")
        plan = Plan.from_json(data["plan"])
        _check(step, key)
    except (KeyError, TypeError, RecordFormatError, StalePlanError, json.JSONDecodeError) as error:
        raise StepFormatError(f"it is malformed: {error}") from error
    return step, plan


def check_calls(
    inputs: Sequence[str], calls: Sequence[StoredCall], codes: int, results: Any, reruns: tuple[Rerun, ...]
) -> None:
    """Raise ``StepFormatError`` unless every value is there when it is read. ``codes``: how many there are;
    ``results`` as ``results_of_text`` reads them."""
    there = set(inputs)
    for number, call in enumerate(calls):
        if not 0 <= call.code < codes:
            raise StepFormatError(f"call {number} runs code that it does not have")
        if not there.issuperset(call.args) or not there.issuperset(call.drops):
            raise StepFormatError(f"call {number} reads a value that is not there")
        if not set(call.drops) <= set(call.args):
            raise StepFormatError(f"call {number} lets go of a value that it does not read")
        if any(not 0 <= position < len(call.args) for position in call.written):
            raise StepFormatError(f"call {number} writes an input that it does not have")
        there = (there - set(call.drops)) | set(call.outs)
    if not Segmented((), (), (), {}, results, ()).returned() <= there:
        raise StepFormatError("it returns a value that is not there")
    _check_rows(reruns, 0, len(calls))


def _check(step: StoredStep, key: str) -> None:
    check_calls(step.inputs, step.calls, len(step.codes), results_of_text(step.results), step.reruns)
    parts = len(step.codes) == len(step.programs) == 1 and not step.calls
    parts = parts if step.whole else len(step.programs) == len(step.calls)
    if not parts or len(step.digests) != len(step.programs) or step.key != key:
        raise StepFormatError("its parts do not belong together")


def _check_rows(rows: tuple[Rerun, ...], start: int, stop: int) -> None:
    for row in rows:
        if not start <= row.start < row.stop <= stop:
            raise StepFormatError(f"a row of calls from {row.start} to {row.stop} is not in it")
        _check_rows(row.inner, row.start, row.stop)
        start = row.stop


def results_text(results: Any) -> str:
    """The structure that a program returns (``Segmented.results``). Raises ``TypeError`` for what has no
    text."""
    return json.dumps(_encoded(results), separators=(",", ":"))


def results_of_text(text: str) -> Any:
    """What ``results_text`` wrote. Raises ``StepFormatError``, and ``ValueError`` for what is no JSON."""
    return _results(json.loads(text))


def _encoded(results: Any) -> Any:
    if isinstance(results, Name):
        return {"value": results.name}
    if type(results) in (tuple, list):
        return {type(results).__name__: [_encoded(item) for item in results]}
    if isinstance(results, dict) and all(type(key) is str for key in results):
        return {"dict": {key: _encoded(item) for key, item in results.items()}}
    if results is None or type(results) in (bool, int, float, str):
        return {"constant": results}
    raise TypeError(f"the program returns a {type(results).__name__}")


def _results(data: Any) -> Any:
    if not isinstance(data, Mapping) or len(data) != 1:
        raise StepFormatError("what it returns cannot be read")
    ((kind, value),) = data.items()
    if kind == "value" and isinstance(value, str):
        return Name(value)
    if kind in ("tuple", "list") and isinstance(value, list):
        found = [_results(item) for item in value]
        return tuple(found) if kind == "tuple" else found
    if kind == "dict" and isinstance(value, Mapping):
        return {key: _results(item) for key, item in value.items()}
    if kind == "constant":
        return value
    raise StepFormatError("what it returns cannot be read")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
