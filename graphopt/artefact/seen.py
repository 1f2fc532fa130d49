"""How arguments and results of a call belong to inputs and outputs of its program.

That is seen, not told: the step runs once on its example inputs, everything put back, and tensors are known
by identity.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from graphopt import _torch
from graphopt.artefact.calling import structure_json
from graphopt.captured import Ran
from graphopt.errors import ArtefactError, GraphoptError, brief
from graphopt.restored import cuda_devices, restored
from graphopt.session import CapturedAnew
from graphopt.unfolding import unfold

if TYPE_CHECKING:
    from graphopt.capture.driver import Driver

__all__ = ["SeenCall", "seen_call", "seen_step"]


@dataclass
class SeenCall:
    """One run of the step: the tensors ``given`` to it, inputs of its program, and what came of them.
    ``bound``: its arguments by name."""

    given: list[torch.Tensor] = field(default_factory=list)
    inputs: Sequence[Any] = ()
    ran: Ran | None = None
    arguments: Any = None
    results: Any = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    state: Mapping[int, str] = field(default_factory=dict)
    bound: Mapping[str, Any] = field(default_factory=dict)


def seen_call(driver: Driver) -> SeenCall:
    """Run the present step on its example inputs, and see where tensors go. Raises ``ArtefactError``."""
    with torch.set_grad_enabled(driver.training_step()):
        return _seen(driver, *driver.bind(None))


def seen_step(driver: Driver, number: int, *, anew: bool = False) -> SeenCall | None:
    """The same of one of the steps that the driver's session has planned, which describes that step: on the
    example inputs, or on others that look like those of the call that it was captured for. ``None`` where the
    module would run another step now, or capture one; with ``anew`` it may, and that one is then the last.

    Raises ``ArtefactError``.
    """
    session = driver.session
    planned = session.steps[number]
    if planned.example is None:
        raise ArtefactError("what the step was called with is not known")
    args, kwargs = driver.bind(None) if not number else planned.example.made()
    session.settled = not anew
    try:
        with planned.example.around(driver.model):
            found = _seen(driver, args, kwargs)
    except CapturedAnew:
        return None
    except GraphoptError:
        raise
    except Exception as error:  # whatever the program makes of zeros
        if not number:
            raise
        raise ArtefactError(
            f"run on zeros of the types that it was captured for, it raises {brief(error)}",
            hint="optimize the model with those inputs, and save an artefact for them alone",
        ) from error
    finally:
        session.settled = False
    wanted = session.steps[-1] if anew else planned
    return found if found.ran is wanted.ran else None


def _seen(driver: Driver, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SeenCall:
    model, session = driver.model, driver.session
    unfold(session)
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    seen = SeenCall(bound=bound.arguments)
    seen.state = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
    places: dict[int, int] = {}

    def argument(tensor: torch.Tensor, path: str) -> Any:
        if id(tensor) in seen.state:
            raise ArtefactError(f"{path} is {seen.state[id(tensor)]} of the model itself")
        if id(tensor) not in places:
            places[id(tensor)] = len(seen.given)
            seen.given.append(tensor)
        return {"argument": places[id(tensor)]}

    seen.arguments = {
        "dict": {name: structure_json(value, argument, name) for name, value in bound.arguments.items()}
    }
    outputs: list[Any] = []

    def watch(run: Callable[..., Any], inputs: Sequence[Any], ran: Ran) -> Any:
        if seen.ran is not None:
            raise ArtefactError("a call of the model runs its program more than once")
        seen.ran, seen.inputs = ran, list(inputs)
        outputs.extend(run(*inputs))
        return list(outputs)

    before = _attributes(model)
    assert driver.call is not None
    session.watching, session.arguments = watch, (args, kwargs)
    try:
        known = dict(model.named_parameters())
        changed = [known[name] for name in driver.written_parameters() if name in known]
        leaves = [p for p in model.parameters() if p.requires_grad]
        with (
            driver.launching(),
            restored(model, leaves, changed),
            torch.random.fork_rng(devices=cuda_devices(model)),
            _torch.quiet_capture(),
        ):
            returned = driver.call(*args, **kwargs)
    except Exception as error:
        inner = _torch.inner_error(error)
        if inner is not error and isinstance(inner, GraphoptError):
            raise inner from None
        raise
    finally:
        session.watching = session.arguments = None
    _check_effects(before, _attributes(model))
    # Written in place by the program, these may be other objects in what is returned: known by position.
    numbers = {
        id(value): k for k, value in reversed(list(enumerate(outputs))) if isinstance(value, torch.Tensor)
    }
    used: set[int] = set()

    def result(tensor: torch.Tensor, path: str) -> Any:
        if id(tensor) in numbers:
            used.add(id(tensor))
            return {"value": numbers[id(tensor)]}
        if id(tensor) in places:
            return {"argument": places[id(tensor)]}
        if id(tensor) in seen.state:
            return {"state": seen.state[id(tensor)]}
        raise ArtefactError(f"{path} is a tensor that is made outside of the program")

    seen.results = structure_json(returned, result, "the result")
    lost = [k for k, value in enumerate(outputs) if id(value) in numbers and id(value) not in used]
    if lost:
        raise ArtefactError(
            f"forward keeps value {lost[0]} of its program without returning it: what it does with that is "
            "code of the model, which an artefact cannot hold"
        )
    tensors = [value for value in seen.inputs if isinstance(value, torch.Tensor)]
    devices = sorted({str(value.device) for value in tensors} - {"cpu"}) or ["cpu"]
    if len(devices) > 1:
        raise ArtefactError(f"the step is on {' and '.join(devices)}: artefacts are of one device")
    seen.device = torch.device(devices[0])
    return seen



def _attributes(model: torch.nn.Module) -> dict[str, Any]:
    """What the modules of a model have as attributes, parameters and buffers among them."""
    return {
        f"{path}.{name}".lstrip("."): value
        for path, module in model.named_modules()
        for name, value in {**vars(module), **module._parameters, **module._buffers}.items()
        if name not in ("_parameters", "_buffers", "_modules")
    }


def _check_effects(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    changed = [name for name, value in after.items() if name not in before or before[name] is not value]
    # Equal numbers and texts may be other objects.
    real = [
        name
        for name in changed
        if name not in before
        or type(before[name]) is not type(after[name])
        or not _equal(before[name], after[name])
    ]
    if real:
        raise ArtefactError(
            f"forward sets {real[0]} of the model, which is code that an artefact cannot hold",
            hint="keep state in buffers that forward writes in place",
        )


def _equal(one: Any, other: Any) -> bool:
    return type(one) in (bool, int, float, str) and one == other
