"""The first run of a compiled program: where it fails, the graph that it was made of runs in its place.

Tracing goes by what torch says of operators, and a code generator by what it says of a device. Where either
is wrong, the error comes when the program runs. A model that works goes on working::

    g0 compiled     ->  RuntimeError: no kernel ...        the random state is put back
    g0 as captured  ->  its outputs                        and runs from then on

"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphopt import _torch
from graphopt.errors import GraphoptError, brief

__all__ = ["FirstRun"]


class FirstRun:
    """Calls ``run``, or ``plain``, which computes the same, if the first call of ``run`` fails and that of
    ``plain`` does not. ``note`` is then told why.

    The error is raised after all where more memory is what is missing, where the program has written into
    its arguments before it failed, and where ``plain`` fails as well: its own error then, as the arguments
    are what both refuse.
    """

    def __init__(
        self, run: Callable[..., Any], plain: Callable[..., Any], note: Callable[[str], None]
    ) -> None:
        self._run, self._plain, self._note = run, plain, note
        self._proven = False

    def __call__(self, *args: Any) -> Any:
        if self._proven:
            return self._run(*args)
        devices, states, versions = _devices(args), torch.get_rng_state(), _versions(args)
        on_devices = [torch.cuda.get_rng_state(device) for device in devices]
        try:
            output = self._run(*args)
        except (GraphoptError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if _versions(args) != versions:
                raise
            failed = error
        else:
            self._proven = True
            return output
        torch.set_rng_state(states)
        for device, state in zip(devices, on_devices, strict=True):
            torch.cuda.set_rng_state(state, device)
        output = self._plain(*args)
        self._run, self._proven = self._plain, True
        self._note(f"runs as it was captured, and its plan does not hold: {brief(failed)}")
        return output


def _devices(args: Sequence[Any]) -> list[torch.device]:
    tensors = (value for value in args if isinstance(value, torch.Tensor))
    return list(dict.fromkeys(tensor.device for tensor in tensors if tensor.is_cuda))


def _versions(args: Sequence[Any]) -> list[int | None]:
    """How often each argument was written, of those that count it."""
    return [_torch.writes(value) for value in args if isinstance(value, torch.Tensor)]
