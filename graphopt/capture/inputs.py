"""Example inputs: a tuple of positional arguments or a dict of keyword arguments."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from graphopt.errors import InputsError, nearest

__all__ = ["bind_inputs"]


def bind_inputs(model: torch.nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for ``model``; ``InputsError`` if its forward refuses them."""
    if isinstance(inputs, Mapping):
        args, kwargs = (), {str(key): value for key, value in inputs.items()}
    elif isinstance(inputs, (tuple, list)):
        args, kwargs = tuple(inputs), {}
    else:
        raise InputsError(
            f"inputs is a {type(inputs).__name__}: expected a tuple of positional arguments or a dict "
            "of keyword arguments",
            hint="write (x,) for a single tensor",
        )
    signature = inspect.signature(model.forward)
    accepts_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    for name in kwargs:
        if name not in signature.parameters and not accepts_any:
            close = nearest(name, signature.parameters)
            raise InputsError(
                f"{type(model).__name__}.forward has no argument {name!r}"
                + (f"; did you mean {close!r}?" if close else ""),
                hint=f"its arguments: {', '.join(signature.parameters)}",
            )
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputsError(
            f"{type(model).__name__}.forward does not take these inputs: {error}",
            hint=f"its arguments: {', '.join(signature.parameters)}",
        ) from None
    return args, kwargs
