"""The first run of a compiled program: where it fails, the graph that it was made of runs in its place.

Tracing goes by what torch says of operators, and a code generator by what it says of a device. Where either
is wrong, the error comes when the program runs. A model that works goes on working::

    g0 compiled     ->  RuntimeError: no kernel ...        the random state is put back, and what it wrote
    g0 as captured  ->  its outputs                        and runs from then on
    g0 as captured  ->  RuntimeError: assertion ...        the random state is put back
    the model       ->  its outputs                        nothing that was captured runs from then on

"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from graphopt import _torch
from graphopt.errors import GraphoptError, brief

__all__ = ["FirstRun", "Untouched"]


KEPT = 64 << 20
"""Bytes of buffers that are copied: statistics and counters, not caches of gigabytes."""


class FirstRun:
    """Calls ``run``, or ``plain``, which computes the same, if the first call of ``run`` fails and that of
    ``plain`` does not. ``note`` is then told why. ``buffers``: positions of arguments that may be written, of
    which the host keeps copies during the first call, ``KEPT`` bytes at most and smaller ones first.

    The error is raised after all where more memory is what is missing, where the program has written into
    other arguments before it failed, and where ``plain`` fails as well: its own error then, as the arguments
    are what both refuse.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        plain: Callable[..., Any],
        note: Callable[[str], None],
        buffers: Sequence[int] = (),
    ) -> None:
        self._run, self._plain, self._note, self._buffers = run, plain, note, buffers
        self._proven = False

    def __call__(self, *args: Any) -> Any:
        if self._proven:
            return self._run(*args)
        before = Untouched(args, [args[k] for k in self._buffers])
        try:
            output = self._run(*args)
        except (GraphoptError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if not before.put_back():
                raise
            failed = error
        else:
            self._proven = True
            return output
        output = self._plain(*args)
        self._run, self._proven = self._plain, True
        self._note(f"runs as it was captured, and its plan does not hold: {brief(failed)}")
        return output


class Untouched:
    """The random state, and how often each of ``tensors`` was written, before something that may fail.
    Values of those that are ``kept`` too are copied to the host, as many as ``KEPT`` allows."""

    def __init__(self, tensors: Iterable[Any], kept: Iterable[Any] = ()) -> None:
        self._tensors = [value for value in tensors if isinstance(value, torch.Tensor)]
        self._kept: dict[int, torch.Tensor] = {}
        room = KEPT
        for tensor in sorted(filter(_is_plain, kept), key=_bytes):
            room -= _bytes(tensor)
            if room >= 0:
                self._kept[id(tensor)] = tensor.detach().to("cpu", copy=True)
        self._devices = list(dict.fromkeys(tensor.device for tensor in self._tensors if tensor.is_cuda))
        self._state = torch.get_rng_state()
        self._on_devices = [torch.cuda.get_rng_state(device) for device in self._devices]
        self._writes = self._counted()

    def put_back(self) -> bool:
        """Put the random state and what is kept back, unless other tensors were written: whether none was,
        of those that count it."""
        counts = zip(self._tensors, self._counted(), self._writes, strict=True)
        touched = [tensor for tensor, now, then in counts if now != then]
        if any(id(tensor) not in self._kept for tensor in touched):
            return False
        with torch.no_grad():
            for tensor in touched:
                tensor.copy_(self._kept[id(tensor)])
        torch.set_rng_state(self._state)
        for device, state in zip(self._devices, self._on_devices, strict=True):
            torch.cuda.set_rng_state(state, device)
        return True

    def _counted(self) -> list[int | None]:
        return [_torch.writes(value) for value in self._tensors]


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor of torch's own with memory that can be copied and written as a whole."""
    kinds = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
    return type(value) in kinds and value.layout is torch.strided and not value.is_meta


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
