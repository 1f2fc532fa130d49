"""``torch.compile`` of which nothing but small functions outlives its user.

Dynamo keeps what a backend returns in the globals of the code that it compiled, and the backend in the cache
of that code, until ``torch._dynamo.reset()``: for modules of ``torch.nn`` that code is torch's own. What is
kept there holds a weak reference here; programs, plans and tensors go with the module that was optimized.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch

__all__ = ["CompiledApart"]

Backend = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


class CompiledApart:
    """``model`` under ``torch.compile``, its compilations counted apart from those of other calls where torch
    can.

    Calls take what ``model`` takes, and give what it gives. Raises what ``torch.compile`` and ``backend`` do.
    ``uncompiled``: code that asks whether it is compiled is told that it is not.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        backend: Backend,
        *,
        fullgraph: bool = False,
        dynamic: bool | None = None,
        uncompiled: bool = False,
    ) -> None:
        self._backend, self._uncompiled = backend, uncompiled
        self._made: list[Callable[..., Any]] = []
        apart: dict[str, Any] = {"isolate_recompiles": True} if _torch.ISOLATES_RECOMPILES else {}
        found = _weakly(self)
        self._call = torch.compile(model, backend=found, fullgraph=fullgraph, dynamic=dynamic, **apart)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _torch.told_uncompiled() if self._uncompiled else nullcontext():
            return self._call(*args, **kwargs)

    def _compiled(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        run = self._backend(gm, inputs)
        self._made.append(run)
        found = weakref.ref(run)

        def call(*args: Any) -> Any:
            made = found()
            assert made is not None, "compiled code is reached through its owner alone"
            return made(*args)

        return call


def _weakly(owner: CompiledApart) -> Backend:
    """A function, which copies as itself: Lightning puts a copy of these arguments aside, and that of a bound
    method would be one of all that its object holds."""
    found = weakref.ref(owner)

    def compiled(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        present = found()
        assert present is not None, "compiled code is reached through its owner alone"
        return present._compiled(gm, inputs)

    return compiled
