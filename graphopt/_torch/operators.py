"""What torch knows of what a node calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

__all__ = [
    "autocast_of",
    "enter_autocast",
    "exit_autocast",
    "gives_other_bits",
    "gives_value",
    "implementation_of",
    "is_composite",
    "is_operator",
    "is_symbolic_function",
    "qualified_name",
    "run_with_random_state",
    "schema_of",
    "set_grad_enabled",
    "writes_in_place",
]


def run_with_random_state() -> Any:
    """The operator ``(state, op, *args)``: ``op(*args)`` under a generator state, put back afterwards."""
    from torch._prims.rng_prims import run_with_rng_state

    return run_with_rng_state


def implementation_of(name: str) -> Callable[..., Any] | None:
    """The function that ``torch.library.custom_op`` made an operator ``"acme::gate"`` of, or ``None``."""
    from torch._library.custom_ops import OPDEFS

    found = OPDEFS.get(name)
    made: Callable[..., Any] | None = None if found is None else found._init_fn
    return made


def writes_in_place(node: fx.Node) -> bool:
    """Whether the schema of what a node calls says that it writes to an argument."""
    return bool(getattr(schema_of(node.target), "is_mutable", False))


def schema_of(target: Any) -> Any:
    """The schema (arguments with alias annotations, returns) of an operator overload, or ``None``."""
    return target._schema if isinstance(target, torch._ops.OpOverload) else None


def gives_value(target: Any) -> bool:
    """Whether a call gives anything: operators that only check something do not."""
    schema = schema_of(target)
    return schema is None or bool(schema.returns)


def gives_other_bits(target: Any) -> bool:
    """Whether an operator says that a second run on the same inputs may round otherwise."""
    tag = getattr(torch.Tag, "nondeterministic_bitwise", None)
    return tag is not None and tag in getattr(target, "tags", ())


def is_composite(target: Any) -> bool:
    """Whether an operator overload is defined by other operators, for every backend alike."""
    return bool(target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd))


def is_operator(target: Any) -> bool:
    """Whether ``target`` goes through torch's dispatcher: an overload, a packet or a higher-order one."""
    kinds = (torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator)
    return isinstance(target, kinds)


def enter_autocast() -> Callable[..., Any]:
    """What dynamo writes into a graph where an autocast region begins; yields the region's handle."""
    return torch.amp.autocast_mode._enter_autocast


def exit_autocast() -> Callable[..., Any]:
    """What dynamo writes where an autocast region ends; takes the region's handle."""
    return torch.amp.autocast_mode._exit_autocast


def set_grad_enabled() -> Callable[..., Any]:
    """What dynamo writes where gradients are switched on or off."""
    return torch._C._set_grad_enabled


def qualified_name(target: Any) -> str:
    """The dotted name of what a node calls. Raises what torch raises for functions without one."""
    name: str = fx.node._get_qualified_name(target)
    return name


def autocast_of(enter: fx.Node) -> torch.autocast:
    """The autocast region that a call of ``enter_autocast()`` in a graph opens."""
    device, dtype, enabled, cache = enter.args
    return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache)  # type: ignore[arg-type]


def is_symbolic_function(target: Any) -> bool:
    """Whether ``target`` is one of torch's functions of symbolic numbers (``torch.sym_max``)."""
    name = getattr(target, "__name__", "")
    return isinstance(name, str) and name.startswith("sym_") and getattr(torch, name, None) is target
