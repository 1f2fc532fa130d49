"""Watch the first training step that an optimized module runs: what it took, and whether it was the
step that was planned."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphopt import _torch
from graphopt.budget import format_bytes
from graphopt.capture.timeline import AllocatorStatistics

__all__ = ["FirstStep"]


class _Pending:
    """Lives as long as the graph of a call's output, or until its backward has run."""


class FirstStep:
    """Follows calls of a module and their backwards until one step of ``calls`` calls is over.

    ``statistics`` are the counters of the allocator, ``None`` where reading them is not free: then
    nothing is measured. ``base_bytes`` are held before the step; gradients count as held throughout where
    ``held`` says so, else the step that is measured is the first that begins without any.
    Resets the allocator's peak as that step begins. ``peak_bytes`` is the step's, ``None`` before its
    end. ``note`` is told what makes a step take more than the plan counts.

    ``workspace_bytes`` is what libraries hold for each thread from their first call on. It is part of
    ``base_bytes``, so a step in which it may have been taken (one that ends with that much more than it
    began with, gradients aside) would count it twice: the next step is measured in its place.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        statistics: AllocatorStatistics | None,
        *,
        calls: int,
        held: bool,
        note: Callable[[str], object],
        workspace_bytes: int = 0,
    ) -> None:
        self.parameters, self.statistics = parameters, statistics
        self.calls, self.held, self.note = calls, held, note
        self.workspace_bytes = workspace_bytes
        self.peak_bytes: int | None = None
        self.over = False
        self._grew: bool | None = None
        self._made = 0
        self._start: int | None = None
        self._base = self._gradients = 0
        self._backwards = 0
        self._waiting: weakref.WeakSet[_Pending] = weakref.WeakSet()

    def begin(self, base_bytes: int) -> None:
        """The module is about to be called in training; ``base_bytes`` are held whatever the plan."""
        if self._backwards and self._made >= self.calls:
            self._check_gradients()
            if not self._grew:
                self.over = True
                return
            self._grew = False
            self._made = self._backwards = 0
        waiting = len(self._waiting)
        if waiting and self._made >= self.calls:
            self.note(
                f"the module was called {waiting + 1} times before a backward: every call holds what it "
                f"saves, the plan counts {self.calls}; give optimize() the whole step as step="
            )
            self.calls = self._made + 1
        if self._made == 0 and self.statistics is not None and (self.held or not self._gradient_bytes()):
            self.statistics.reset_peak()
            self._start, self._base = self.statistics.allocated(), base_bytes
            self._gradients = self._gradient_bytes()
        self._made += 1

    def returned(self, output: Any) -> None:
        """The module has returned ``output``."""
        leaves: list[Any] = [
            leaf
            for leaf in torch.utils._pytree.tree_leaves(output)
            if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None
        ]
        if not leaves:
            self._made -= 1
            return
        pending = _Pending()
        self._waiting.add(pending)

        def started(gradient: torch.Tensor) -> None:
            if pending in self._waiting:
                self._waiting.discard(pending)
                _torch.after_backward(self._ended)

        for leaf in leaves:
            # The hook belongs to the graph, and so does ``pending``: of a dropped graph nothing is awaited.
            leaf.register_hook(started)

    def _ended(self) -> None:
        if self.over:
            return
        self._backwards += 1
        if self.statistics is None or self._start is None:
            return
        made = self._gradient_bytes() - self._gradients
        kept = self.statistics.allocated() - self._start - made
        if self._grew is None and self.workspace_bytes and kept >= self.workspace_bytes:
            self._grew = True
        if not self._grew:
            self.peak_bytes = self._base + self.statistics.peak() - self._start

    def _gradient_bytes(self) -> int:
        return _torch.storage_bytes([parameter.grad for parameter in self.parameters])

    def _check_gradients(self) -> None:
        size = self._gradient_bytes()
        if size and not self.held:
            self.note(
                f"gradients of {format_bytes(size)} are held as the next step begins, which the plan does "
                "not count: set them to None before, or give optimize() the whole step as step="
            )
