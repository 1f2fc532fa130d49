"""One call of an optimized module as its programs saw it: what went in where, and what came out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graphopt.program import Level, Program

if TYPE_CHECKING:
    from graphopt.captured import Captured
    from graphopt.optimized import Optimized

__all__ = ["ProgramCall", "RecordedCall", "record_call"]


@dataclass(frozen=True)
class ProgramCall:
    """A call of one captured program.

    ``forward`` and ``backward`` (``None`` in inference) are its lowered halves. ``arguments`` belong to the
    inputs of the semantic program, ``signature`` says which those are; ``results`` are what the model's
    own code got back.
    """

    name: str
    semantic: Program
    forward: Program
    backward: Program | None
    arguments: tuple[Any, ...]
    results: tuple[Any, ...]


@dataclass(frozen=True)
class RecordedCall:
    """All programs that one call of a module ran, in order, and what the module returned."""

    calls: tuple[ProgramCall, ...]
    output: Any


def record_call(optimized: Optimized, inputs: Any = None) -> RecordedCall:
    """Call ``optimized`` and record what its programs see.

    ``inputs``: a tuple of positional or a dict of keyword arguments; without them the example inputs. The
    call counts: buffers that a step updates are updated. Raises ``CaptureError`` where nothing was captured.
    """
    driver = optimized._driver
    args, kwargs = driver.bind(inputs)
    driver.prepare(args, kwargs)
    driver.plan()
    driver.session.finish()
    halves = {program.name: program for program in driver.programs() if program.level is Level.LOWERED}
    calls: list[ProgramCall] = []
    undo = [_recording(captured, halves, calls) for captured in driver.session.current]
    try:
        output = optimized(*args, **kwargs)
    finally:
        for take_back in undo:
            take_back()
    return RecordedCall(tuple(calls), output)


def _recording(
    captured: Captured, halves: dict[str, Program], calls: list[ProgramCall]
) -> Callable[[], None]:
    run = captured.run

    def recorded(*args: Any) -> Any:
        assert run is not None
        results = run(*args)
        calls.append(
            ProgramCall(
                captured.name,
                captured.semantic,
                halves[f"{captured.name}.forward"],
                halves.get(f"{captured.name}.backward"),
                args,
                tuple(results),
            )
        )
        return results

    def take_back() -> None:
        captured.run = run

    captured.run = recorded
    return take_back
