"""Whether gradients and autocast are on, to be gone back to later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

__all__ = ["AmbientState", "CastState"]

_KINDS = ("cpu", "cuda")


@dataclass(frozen=True)
class CastState:
    """Autocast on a ``kind`` of device."""

    kind: str
    enabled: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class AmbientState:
    """``grad``: whether gradients were on; ``casts``: autocast by kind of device."""

    grad: bool
    casts: tuple[CastState, ...]

    @classmethod
    def now(cls) -> AmbientState:
        casts = [CastState(k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in _KINDS]
        return cls(torch.is_grad_enabled(), tuple(casts))

    @contextmanager
    def again(self) -> Iterator[None]:
        """In the block they are as they were."""
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for cast in self.casts:
                # Switched off where it is off already, autocast may still warn of a dtype that it does not
                # know.
                if cast.enabled or torch.is_autocast_enabled(cast.kind):
                    stack.enter_context(torch.autocast(cast.kind, dtype=cast.dtype, enabled=cast.enabled))
            yield
