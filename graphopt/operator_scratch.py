"""What operators say of the memory that they take and give back before they return.

    state_scratch("graphopt::linear_int8", bytes_beside)

said where the operator is defined, in graphopt's packages and in plugins alike, so that the numbers stand
beside the launches that they follow from. The planner counts them as it counts what is known of the library's
own operators (``graphopt.emit.scratch``).
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["state_scratch", "stated_scratch"]

Scratch = Callable[..., int]

_stated: dict[str, Scratch] = {}


def state_scratch(operator: str, scratch: Scratch) -> None:
    """``scratch(*args)`` is at most how many bytes ``operator`` (``"namespace::name"``) takes beyond its
    outputs on the device of its arguments, of a call by position: tensors may be without memory and have
    sizes that are symbols. Said again, the last counts."""
    _stated[operator] = scratch


def stated_scratch(operator: str) -> Scratch | None:
    """What was said of ``operator``."""
    return _stated.get(operator)
