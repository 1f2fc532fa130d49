"""What operators of kernels compute, as functions of ATen: for whoever has no such kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from graphopt import _torch
from graphopt.plugins.records import KernelSpec

__all__ = ["references_of"]


def references_of(
    called: Iterable[str], kernels: Mapping[str, KernelSpec]
) -> dict[Any, Callable[..., Any]]:
    """What operators do, by overload: the references of kernels, and of those that are called without being a
    kernel the function that they were made of."""
    found = {_overload(spec.op): spec.reference for spec in kernels.values()}
    for name in called:
        made = _torch.implementation_of(name)
        if made is not None:
            found.setdefault(_overload(name), made)
    return found


def _overload(name: str) -> Any:
    namespace, _, operator = name.partition("::")
    operator, _, overload = operator.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), operator), overload or "default")
