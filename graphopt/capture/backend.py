"""``torch.compile(model, backend="graphopt", options={"budget": ...})``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx

from graphopt.conversion import conversion_among
from graphopt.errors import InputsError, UnknownNameError

__all__ = ["graphopt_backend"]

if TYPE_CHECKING:
    from graphopt.session import Session

_SESSIONS: list[tuple[Mapping[str, Any], Session]] = []
"""Sessions by the options object that dynamo hands to every graph of one torch.compile call: the
only thing that those graphs have in common."""

_OPTIONS = (
    "allow", "budget", "cache", "cost_model", "device", "emit", "on_error", "pipeline", "plugins", "policy",
)  # fmt: skip


def graphopt_backend(
    gm: fx.GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The dynamo backend. ``options`` are ``optimize``'s arguments of the same names.

    Each graph of one ``torch.compile`` call joins the same session, so that graph breaks share the
    budget: the first step runs each graph's least plan op by op, and from the second on all of
    them run the plan that was made for all.
    """
    from graphopt.api import make_session

    chosen = dict(options or {})
    for name in chosen:
        if name not in _OPTIONS:
            raise UnknownNameError("option of the graphopt backend", name, _OPTIONS)
    session = next((known for owner, known in _SESSIONS if options is not None and owner is options), None)
    if session is None:
        device = next((x.device for x in inputs if isinstance(x, torch.Tensor)), torch.device("cpu"))
        session = make_session(device, **chosen)
        conversion = conversion_among(session.passes)
        if conversion is not None and conversion.name in session.allow:
            raise InputsError(
                f"pass {conversion.name!r} changes the model, which torch.compile does not hand over: "
                "use graphopt.optimize, or graphopt.quantize before"
            )
        if session.asked:
            raise InputsError(
                f"pass {session.asked!r} makes another model of whole programs, and torch.compile hands over "
                "parts of a model where its graph breaks: use graphopt.optimize"
            )
        if session.budget.weights is not None:
            raise InputsError("Budget(weights=...) needs graphopt.optimize: it changes the model")
        # Without a budget no graph depends on another: each is planned when it comes.
        session.whole = session.budget.memory is None
        session.staged = not session.whole
        if options is not None:
            _SESSIONS.append((options, session))
    return session.backend(gm, inputs)
