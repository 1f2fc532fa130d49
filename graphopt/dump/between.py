"""Programs as passes find and leave them, written while passes run."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt.plugins import hookimpl

if TYPE_CHECKING:
    from graphopt.passes import Pass, PassContext
    from graphopt.plugins.records import DumpFormat
    from graphopt.program import Program
    from graphopt.report import PassRecord

__all__ = ["EVERY", "BetweenPasses", "Tree"]

EVERY = "all"
"""Stands for the names of all passes."""


class BetweenPasses:
    """An inline plugin (``optimize(plugins=[...])``) that observes: ``write(when, name, program)`` is called
    with ``"before"`` or ``"after"``, the name of the pass and the program as it is then.

    ``before`` and ``after``: names of passes, or ``EVERY``. ``changes``: after each pass that changed a
    program. Programs that are searched several times (graphs of one step, forms of a program) are seen each
    time.
    """

    graphopt_api = 1

    def __init__(
        self,
        write: Callable[[str, str, Program], None],
        *,
        before: Collection[str] = (),
        after: Collection[str] = (),
        changes: bool = False,
    ) -> None:
        self._write_program, self._before, self._after, self._changes = write, before, after, changes
        self.failure: Exception | None = None
        """What ``write`` raised. Hosts go on without an observer that fails."""

    def _write(self, when: str, name: str, program: Program) -> None:
        try:
            self._write_program(when, name, program)
        except Exception as error:
            self.failure = error
            raise

    @hookimpl
    def graphopt_before_pass(self, ctx: PassContext, step: Pass, program: Program) -> None:
        if EVERY in self._before or step.name in self._before:
            self._write("before", step.name, program)

    @hookimpl
    def graphopt_after_pass(self, ctx: PassContext, step: Pass, program: Program, record: PassRecord) -> None:
        changed = self._changes and record.status == "applied"
        if changed or EVERY in self._after or step.name in self._after:
            self._write("after", step.name, program)


class Tree:
    """A folder of programs in the order in which they were seen: ``017-g0-after-fuse-norm.txt``.

    ``folder`` is made, or is empty. Raises ``OSError`` as ``open`` does.
    """

    def __init__(self, folder: Path, form: DumpFormat) -> None:
        self._folder, self._form = folder, form
        self.count = 0
        folder.mkdir(exist_ok=True)

    def write(self, when: str, name: str, program: Program) -> None:
        self.count += 1
        safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in f"{program.name}-{when}-{name}")
        target = self._folder / f"{self.count:03}-{safe}{self._form.suffix}"
        with open(target, "x", encoding="utf-8") as stream:
            self._form.write(program, stream)
