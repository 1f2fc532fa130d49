"""Run a chain of compiled calls, some rows of which keep nothing and run again in the backward.

Autograd hands every value that a call saves to a hook. Within a row that runs again the hook drops it and
leaves a ticket (call, number of the value); the first ticket that the backward asks for makes the row run
forward once more, this time keeping what the tickets stand for::

    forward    x0 -> [c0 c1 c2] -> x3 -> c3            keeps x0, x3 and what c3 saves
    backward   c3;   x0 -> c0 c1 c2, everything saved;   c2, c1, c0

Each call's backward stays a node of its own in autograd's graph, so gradients of parameters are handed
over as they come, and ``torch.autograd.grad`` works as ever. As in torch's non-reentrant checkpoint, but
on compiled calls, nested, and freed as early as the plan says.

Values of single calls may be moved to the host instead (``HostMemory``): away while the next call runs,
back while the backward of the call after runs. One call's values are on their way at a time, so that the
device never holds more than the plan says.

What runs again is the very same function. Inputs that a call writes (running statistics) are replaced by
scratch memory the second time, which is right where its results do not depend on them
(``writes_matter``); random numbers are drawn from the state of the first time.

Gradients of parameters are added to ``.grad`` call by call (``hand_over``).
"""

from __future__ import annotations

import math
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from graphopt import _torch
from graphopt.capture.chain import Segmented
from graphopt.chain_plan import Rerun, items
from graphopt.errors import InputsError, LoweringError
from graphopt.hand_over import handing_over
from graphopt.host_memory import HostMemory, Moved

__all__ = ["ChainRunner", "Layout"]


@dataclass(frozen=True)
class Layout:
    """What a value looks like."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


@dataclass
class _Row:
    """A row that ran without keeping anything: what entered it (with whether gradients flow to it) and
    where the random generators stood."""

    rerun: Rerun
    entering: dict[str, tuple[torch.Tensor, bool]]
    random: tuple[torch.Tensor, ...]


@dataclass
class _Step:
    """One forward run and its backward. ``held``: values that the caller holds anyway. ``rows``: the row
    that each call is in at the moment. ``kept``: what tickets stand for, once it was made again.
    ``away``: what was moved, by call."""

    held: dict[str, Any]
    rows: dict[int, _Row] = field(default_factory=dict)
    kept: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    away: dict[int, list[weakref.ref[Moved]]] = field(default_factory=dict)


class _Away:
    """A saved value that was moved. Goes with autograd's graph, its host memory with it."""

    __slots__ = ("call", "host", "moved", "step")

    def __init__(self, host: HostMemory, moved: Moved, step: _Step, call: int) -> None:
        self.host, self.moved, self.step, self.call = host, moved, step, call

    def __del__(self) -> None:
        self.host.forget(self.moved)


@dataclass(frozen=True)
class _Here:
    """A saved value that stayed, of a call whose backward tells when to bring others back."""

    step: _Step
    call: int
    value: torch.Tensor


@dataclass(frozen=True)
class _Ticket:
    step: _Step
    call: int
    number: int


class ChainRunner:
    """Calls a chain's functions in order: a function of the list of the program's inputs, which it empties.

    ``functions``: one per call, positional. ``written[k]``: positions of inputs that call ``k`` writes in
    place; ``random[k]``: whether it draws random numbers. Both matter for calls in ``reruns`` alone.
    ``moves[k]``: which of the values that call ``k`` saves, counted from 0, go to the ``host``, and what
    they must look like; for calls outside of ``reruns``.
    Raises ``InputsError`` where the number of functions or inputs does not agree.
    """

    def __init__(
        self,
        chain: Segmented,
        functions: Sequence[Callable[..., Any]],
        reruns: Sequence[Rerun] = (),
        written: Sequence[Sequence[int]] = (),
        random: Sequence[bool] = (),
        moves: Mapping[int, Mapping[int, Layout]] | None = None,
        host: HostMemory | None = None,
    ) -> None:
        if len(functions) != len(chain.calls):
            raise InputsError(f"{len(chain.calls)} calls need as many functions, not {len(functions)}")
        self.chain, self.functions, self.reruns = chain, list(functions), tuple(reruns)
        self.written = [tuple(positions) for positions in written] or [()] * len(chain.calls)
        self.random = list(random) or [False] * len(chain.calls)
        self.moves, self.host = dict(moves or {}), host
        self._moving = sorted(self.moves)
        made = {name for call in chain.calls for name in call.outs}
        self._given = [
            tuple(k for k, name in enumerate(call.args) if name not in made) for call in chain.calls
        ]
        self._scratch: dict[tuple[Any, ...], torch.Tensor] = {}

    def __call__(self, arguments: list[Any]) -> Any:
        values = self.chain.begin(arguments)
        reruns = self.reruns if torch.is_grad_enabled() else ()
        # The step outlives the forward: tickets lead to it.
        step = _Step(dict(values) if reruns else {})
        moving = bool(self.moves) and torch.is_grad_enabled()
        leaving: list[Moved] = []
        for item in items(0, len(self.chain.calls), reruns):
            if isinstance(item, Rerun):
                self._pass(item, values, step)
                before, leaving = leaving, []
            elif moving:
                before, leaving = leaving, []
                with self._watching(item, step, leaving):
                    self._call(item, values)
            else:
                self._call(item, values)
                continue
            self._release(before)
        self._release(leaving)
        return self.chain.finish(values)

    def _release(self, moved: Sequence[Moved]) -> None:
        for value in moved:
            assert self.host is not None
            self.host.release(value)

    def _watching(self, number: int, step: _Step, leaving: list[Moved]) -> AbstractContextManager[Any]:
        """Values saved by a call go to the host where they are to; all tell when their backward begins."""
        wanted, held = self.moves.get(number, {}), self._pointers(number, step)
        count = -1

        def pack(value: torch.Tensor) -> torch.Tensor | _Here | _Away:
            nonlocal count
            count += 1
            if count not in wanted:
                return value if value.data_ptr() in held else _Here(step, number, value)
            found = Layout(tuple(value.shape), value.stride(), value.dtype)
            if found != wanted[count]:
                raise LoweringError(
                    f"call {number} saves {found} as value {count}, the plan moves {wanted[count]}"
                )
            assert self.host is not None
            moved = self.host.move(value)
            leaving.append(moved)
            step.away.setdefault(number, []).append(weakref.ref(moved))
            return _Away(self.host, moved, step, number)

        return torch.autograd.graph.saved_tensors_hooks(pack, self._unpack)

    def _bring_back(self, number: int, step: _Step) -> None:
        """The backward of a call begins: what the last moving call before it needs sets off."""
        place = bisect_left(self._moving, number) - 1
        if place < 0 or self.host is None:
            return
        for reference in step.away.pop(self._moving[place], ()):
            moved = reference()
            if moved is not None:
                self.host.prefetch(moved)

    def _call(self, number: int, values: dict[str, Any], *, again: bool = False) -> None:
        call = self.chain.calls[number]
        passed = [values[name] for name in call.args]
        for name in call.drops:
            del values[name]
        if again:
            for position in self.written[number]:
                passed[position] = self._stand_in(position, passed[position])
        # The second time as well: what a call saves may depend on what its inputs are.
        handing_over(passed, self._given[number])
        returned = self.functions[number](*passed)
        passed.clear()
        values.update(zip(call.outs, returned, strict=True))

    def _stand_in(self, position: int, written: torch.Tensor) -> torch.Tensor:
        """Memory for a call to write where its first run has written for good."""
        key = (position, written.shape, written.stride(), written.dtype, written.device)
        found = self._scratch.get(key)
        if found is None:
            found = self._scratch[key] = torch.zeros_like(written)
        return found

    def _pass(self, row: Rerun, values: dict[str, Any], step: _Step, *, again: bool = False) -> None:
        """Run a row forward and keep what enters it alone."""
        entering = {}
        for name in self._entering(row):
            value = values[name]
            if name not in step.held and isinstance(value, torch.Tensor):
                # Without its history: that leads, through tickets, back to this row.
                entering[name] = (value.detach(), value.requires_grad)
            else:
                step.held.setdefault(name, value)
        record = _Row(row, entering, self._random_states(row))
        for number in range(row.start, row.stop):
            step.rows[number] = record
            with self._dropping(number, step):
                self._call(number, values, again=again)

    def _entering(self, row: Rerun) -> list[str]:
        """Values that a row reads and does not make."""
        made: set[str] = set()
        read: dict[str, None] = {}
        for call in self.chain.calls[row.start : row.stop]:
            read.update(dict.fromkeys(name for name in call.args if name not in made))
            made.update(call.outs)
        return list(read)

    def _again(self, record: _Row, step: _Step) -> None:
        """Run a row forward once more and keep what its tickets stand for."""
        row = record.rerun
        values = {name: step.held[name] for name in self._entering(row) if name in step.held}
        for name, (value, trained) in record.entering.items():
            values[name] = value.detach().requires_grad_(trained)
            del value
        if not _torch.keeps_graph():
            # What enters is among what the row's calls save, and goes when that does.
            record.entering = {}
        with torch.enable_grad(), _random_as(record.random):
            for item in items(row.start, row.stop, row.inner):
                if isinstance(item, Rerun):
                    self._pass(item, values, step, again=True)
                else:
                    with self._keeping(item, step):
                        self._call(item, values, again=True)

    def _dropping(self, number: int, step: _Step) -> AbstractContextManager[Any]:
        """Values saved by a call become tickets."""
        held = self._pointers(number, step)
        count = 0

        def pack(value: torch.Tensor) -> torch.Tensor | _Ticket:
            nonlocal count
            count += 1
            return value if value.data_ptr() in held else _Ticket(step, number, count)

        return torch.autograd.graph.saved_tensors_hooks(pack, self._unpack)

    def _keeping(self, number: int, step: _Step) -> AbstractContextManager[Any]:
        """Values saved by a call are kept for its tickets; the graph that is made beside is not used."""
        held = self._pointers(number, step)
        count = 0

        def pack(value: torch.Tensor) -> None:
            nonlocal count
            count += 1
            if value.data_ptr() not in held:
                step.kept[number, count] = value.detach()

        return torch.autograd.graph.saved_tensors_hooks(pack, _unused)

    def _pointers(self, number: int, step: _Step) -> set[int]:
        """Where the memory lies that a call reads and the caller holds."""
        found = (step.held.get(name) for name in self.chain.calls[number].args)
        return {value.data_ptr() for value in found if isinstance(value, torch.Tensor)}

    def _unpack(self, saved: torch.Tensor | _Ticket | _Here | _Away) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        self._bring_back(saved.call, saved.step)
        if isinstance(saved, _Here):
            return saved.value
        if isinstance(saved, _Away):
            return saved.host.fetch(saved.moved, keep=_torch.keeps_graph())
        step, key = saved.step, (saved.call, saved.number)
        while key not in step.kept:
            # The innermost row that the call is in: a row within it takes its place when it runs.
            self._again(step.rows[saved.call], step)
        return step.kept[key] if _torch.keeps_graph() else step.kept.pop(key)

    def _random_states(self, row: Rerun) -> tuple[torch.Tensor, ...]:
        if not any(self.random[row.start : row.stop]):
            return ()
        cuda = (torch.cuda.get_rng_state(),) if torch.cuda.is_available() else ()
        return (torch.get_rng_state(), *cuda)


@contextmanager
def _random_as(states: tuple[torch.Tensor, ...]) -> Iterator[None]:
    """Generators stand as they did then, and afterwards as they do now."""
    if not states:
        yield
        return
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if len(states) > 1 else []):
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1])
        yield


def _unused(packed: None) -> torch.Tensor:
    raise RuntimeError("the graph of a run that only makes saved values again was differentiated")
