"""Makes an operator out of its reference, whose signature is the only one.

What the operator takes, and in which order, is what the reference takes: schema, fake and dispatch follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphopt.candidate import Reason

__all__ = ["state_operator"]


def state_operator(
    name: str,
    reference: Callable[..., torch.Tensor],
    *,
    mutates: Sequence[str],
    refuses: Callable[..., Reason | None],
    output: Callable[..., torch.Tensor],
    launch: Callable[..., torch.Tensor | None] | None = None,
) -> Callable[..., torch.Tensor]:
    """Registers ``graphopt::<name>``, without a gradient, and returns what calls it.

    ``mutates`` are the names of arguments that are written in place. The functions take the arguments of
    ``reference``: ``refuses`` gives ``None`` or why the operator does not take them, of which its fake makes
    a ``ValueError``; ``output`` a tensor as the output is; ``launch`` the output by kernels, or ``None``
    where they do not take these.
    """

    def run(*given: Any) -> torch.Tensor:
        made = None if launch is None else launch(*given)
        return reference(*given) if made is None else made

    def fake(*given: Any) -> torch.Tensor:
        if (reason := refuses(*given)) is not None:
            raise ValueError(f"{name}: {reason}")
        return output(*given)

    schema = torch.library.infer_schema(reference, mutates_args=mutates)
    operator = torch.library.custom_op(f"graphopt::{name}", run, mutates_args=mutates, schema=schema)
    operator.register_fake(fake)
    called: Callable[..., torch.Tensor] = operator
    return called
