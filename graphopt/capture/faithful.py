"""What dynamo captured against the model itself, once, on the inputs of the capture.

A model may compute something else while it is compiled than it does op by op: code that asks
``torch.compiler.is_compiling()`` takes another path, and some of these are not equal (attention masks that
are only left out op by op, for one). No check of a rewrite sees this, as all start from the capture.

Both forwards run without gradients, on copies of the inputs, everything that they change put back. That takes
as much memory as an inference does, and the time of two.

What a plugin captured is held to more (``stands_for``): tracers of others lose regions without gradients, or
bake weights in as constants, which no forward shows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graphopt import _torch
from graphopt.errors import brief
from graphopt.guard import attributes_restored, obstacle
from graphopt.restored import restored
from graphopt.verify_numbers import TOLERANCES

__all__ = [
    "Comparison",
    "chunks",
    "coarsest_of",
    "compared",
    "differences",
    "stands_for",
    "tensors_of",
    "tried",
    "unrunnable",
]

CHUNK = 1 << 24
"""Elements that are compared at a time: a difference of whole logits would double what they take."""

SLACK = 10.0
"""Times the tolerance of a rewrite. The same operators run in the same order: what rounding alone changes is
far below, another path far above."""

SHARE = 0.01
"""Of the elements of an integer or boolean output that may differ: rounding may decide which of two is
larger."""


@dataclass(frozen=True)
class Comparison:
    """``difference``: what is not the same, or ``""``. ``refused``: why nothing was compared, or ``""``."""

    difference: str = ""
    refused: str = ""


def compared(
    model: torch.nn.Module,
    capture: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    written: Sequence[torch.Tensor],
    filled: Callable[..., Any],
) -> Comparison:
    """Run ``capture(*args, **kwargs)``, which computes what was captured, and the model's own forward.

    ``written`` are parameters that either may write. A model that does not give the same twice is not held
    to it, nor to what memory held before the first write to it: ``filled`` is ``capture`` with such memory
    filled.
    """
    tensors = tensors_of(model, args, kwargs)
    if reason := unrunnable(model, tensors):
        return Comparison(refused=reason)

    def plain(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return model(*args, **kwargs)

    def plain_filled(*args: Any, **kwargs: Any) -> Any:
        with _torch.FilledMemory():
            return plain(*args, **kwargs)

    def run(call: Callable[..., Any]) -> list[Any]:
        with tried(model, tensors, written):
            given, named = copy.deepcopy((args, kwargs))
            # What a model returns may be one of its buffers, which are put back.
            return [_kept(leaf) for leaf in pytree.tree_leaves(call(*given, **named))]

    coarsest = coarsest_of(tensors)
    try:
        expected = run(plain)
        if not differences(run(capture), expected, coarsest):
            return Comparison()
        expected = run(plain_filled)
        difference = differences(run(filled), expected, coarsest)
        if difference and differences(run(plain_filled), expected, coarsest):
            return Comparison(refused="the model does not compute the same twice")
    except Exception as error:
        return Comparison(refused=brief(error))
    return Comparison(difference)


def tensors_of(model: torch.nn.Module, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """What a call computes on: parameters, buffers, arguments."""
    held = (*model.parameters(), *model.buffers(), *pytree.tree_leaves((args, kwargs)))
    return [t for t in held if isinstance(t, torch.Tensor)]


def unrunnable(model: torch.nn.Module, tensors: Sequence[torch.Tensor]) -> str:
    """Why a call cannot run on the side, or ``""``."""
    if any(_torch.is_fake(t) or t.is_meta for t in tensors):
        return "tensors have no values"
    return obstacle(model, training=False)


def coarsest_of(
    tensors: Sequence[torch.Tensor], others: Sequence[torch.dtype] = ()
) -> torch.dtype | None:
    """The least precise type of ``tensors`` and of ``others``."""
    kinds = (*(t.dtype for t in tensors), *others)
    return max(kinds, key=lambda kind: TOLERANCES.get(kind, 0.0), default=None)


@contextmanager
def tried(
    model: torch.nn.Module,
    tensors: Sequence[torch.Tensor],
    written: Sequence[torch.Tensor],
    leaves: Sequence[torch.Tensor] = (),
) -> Iterator[None]:
    """A run on ``tensors`` in the block leaves nothing behind: random state, buffers, attributes, what is
    ``written`` and the gradients of ``leaves`` are afterwards what they were."""
    devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    with (
        restored(model, leaves, written),
        attributes_restored(model),
        torch.random.fork_rng(devices=devices),
    ):
        yield


@dataclass
class _Seen:
    """What one run did: ``outputs``, ``buffers`` afterwards, ``read`` the names of the model's state,
    ``gradients`` those of trained leaves, by name, where there is one."""

    outputs: list[Any]
    buffers: dict[str, torch.Tensor]
    read: frozenset[str]
    gradients: dict[str, torch.Tensor]


def stands_for(
    model: torch.nn.Module,
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    training: bool,
) -> Comparison:
    """Whether ``module``, which holds the model's own parameters, is the model in this call: reads the same
    state, gives the same structure of the same numbers, leaves the same buffers and, ``training``, gives the
    same gradients. Takes what two steps take."""
    tensors = tensors_of(model, args, kwargs)
    if reason := unrunnable(model, tensors):
        return Comparison(refused=reason)
    training = training and not obstacle(model, training=True)
    structures: list[Any] = []

    def run(called: torch.nn.Module) -> _Seen:
        with tried(model, tensors, ()), torch.set_grad_enabled(training), _torch.FilledMemory():
            given, named = copy.deepcopy((args, kwargs))
            return _watched(called, model, given, named, structures)

    try:
        expected = run(model)
    except Exception as error:
        return Comparison(refused=brief(error))
    try:
        found = run(module)
    except torch.OutOfMemoryError as error:
        return Comparison(refused=brief(error))
    except Exception as error:
        return Comparison(f"its graph raises {brief(error)}")
    difference = _unlike(found, expected, coarsest_of(tensors))
    if structures[0] != structures[1]:
        return Comparison("its graph returns another structure than the model")
    if difference and _unlike(run(model), expected, coarsest_of(tensors)):
        return Comparison(refused="the model does not compute the same twice")
    return Comparison(difference)


def _watched(
    called: torch.nn.Module, model: torch.nn.Module, args: Any, kwargs: Any, structures: list[Any]
) -> _Seen:
    state = {_torch.storage_key(t): name for name, t in _state(model).items()}
    read: set[str] = set()

    def seen(op: Any, given: tuple[Any, ...], result: Any) -> None:
        for leaf in pytree.tree_leaves(given):
            for part in _torch.plain_tensors(leaf):
                if part.layout is torch.strided and (name := state.get(_torch.storage_key(part))):
                    read.add(name)

    with _torch.CallWatcher(seen):
        outputs = called(*args, **kwargs)
    leaves, structure = pytree.tree_flatten(outputs)
    structures.append(structure)
    gradients: dict[str, torch.Tensor] = {}
    if torch.is_grad_enabled():
        trained: dict[str, torch.Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        for index, leaf in enumerate(pytree.tree_leaves((args, kwargs))):
            if isinstance(leaf, torch.Tensor) and leaf.is_leaf and leaf.requires_grad:
                trained[f"input {index}"] = leaf
        gradients = _gradients(leaves, trained)
    buffers = {name: _kept(buffer) for name, buffer in model.named_buffers()}
    return _Seen([_kept(leaf) for leaf in leaves], buffers, frozenset(read), gradients)


def _state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    named = (*model.named_parameters(), *model.named_buffers())
    return {
        f"{name}": part
        for name, tensor in named
        for part in _torch.plain_tensors(tensor)
        if part.layout is torch.strided and part.numel()
    }


def _gradients(outputs: Sequence[Any], trained: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of a weighted sum of all outputs: equal weights would be blind to what a norm takes out."""
    differentiable = [
        out for out in outputs if isinstance(out, torch.Tensor) and out.requires_grad and out.numel()
    ]
    if not differentiable or not trained:
        return {}
    weights = [
        torch.arange(out.numel(), device=out.device).mul(0.7).cos().reshape(out.shape).to(out.dtype)
        for out in differentiable
    ]
    found = torch.autograd.grad(differentiable, list(trained.values()), weights, allow_unused=True)
    return {name: g for name, g in zip(trained, found, strict=True) if g is not None}


def _unlike(found: _Seen, expected: _Seen, coarsest: torch.dtype | None) -> str:
    if unread := sorted(expected.read - found.read):
        return f"its graph does not read {unread[0]!r}, which the model reads"
    if said := differences(found.outputs, expected.outputs, coarsest):
        return f"its graph computes something else: {said}"
    for name, buffer in expected.buffers.items():
        if differences([found.buffers[name]], [buffer], coarsest):
            return f"its graph leaves another buffer {name!r}"
    odd = sorted(found.gradients.keys() ^ expected.gradients.keys())
    if odd:
        which = "the model alone" if odd[0] in expected.gradients else "its graph alone"
        return f"{which} has a gradient of {odd[0]!r}"
    return _unlike_gradients(found.gradients, expected.gradients, coarsest)


def _unlike_gradients(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], coarsest: torch.dtype | None
) -> str:
    allowed = min(SLACK * TOLERANCES.get(coarsest, 0.0), 0.1) if coarsest is not None else 0.0
    sizes = {name: _worst(g, g)[1] for name, g in expected.items()}
    # A gradient that is zero but for rounding, as of a bias before a norm, is held to the others.
    least = 1e-2 * max(sizes.values(), default=0.0)
    for name, theirs in expected.items():
        if found[name].shape != theirs.shape:
            return f"the gradient of {name!r} has another shape"
        worst, _ = _worst(found[name], theirs)
        scale = max(sizes[name], least)
        if worst > allowed * scale:
            share = worst / scale if scale else worst
            return f"the gradient of {name!r} differs by {share:.2%} of its largest number"
    return ""


def differences(
    found: Sequence[Any], expected: Sequence[Any], coarsest: torch.dtype | None = None
) -> str:
    """How the first of the outputs that differ does so, or ``""``.

    ``coarsest`` is the least precise type that was computed in, by default that of the outputs.
    """
    if len(found) != len(expected):
        return f"{len(found)} outputs instead of {len(expected)}"
    pairs = [
        (index, ours, theirs)
        for index, (ours, theirs) in enumerate(zip(found, expected, strict=True))
        if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor)
    ]
    types = [theirs.dtype for _, _, theirs in pairs] + ([coarsest] if coarsest is not None else [])
    allowed = SLACK * max((TOLERANCES.get(kind, 0.0) for kind in types), default=0.0)
    for index, ours, theirs in pairs:
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            was, now = (f"{t.dtype}{list(t.shape)}".removeprefix("torch.") for t in (theirs, ours))
            return f"output {index} is {now} instead of {was}"
        inexact = theirs.is_floating_point() or theirs.is_complex()
        share = _share_off(ours, theirs) if inexact else _share_unequal(ours, theirs)
        if share > (min(allowed, 0.1) if inexact else SHARE):
            what = "its largest number" if inexact else "its elements"
            return f"output {index} differs by {share:.2%} of {what}"
    return ""


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def chunks(*tensors: torch.Tensor, size: int = CHUNK) -> Iterator[tuple[torch.Tensor, ...]]:
    """Tensors of as many elements side by side, in flat parts of at most ``size`` elements."""
    return zip(*(torch.split(t.detach().reshape(-1), size) for t in tensors), strict=True)


def _share_unequal(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    count = sum(int((a != b).sum()) for a, b in chunks(ours, theirs))
    return count / max(theirs.numel(), 1)


def _share_off(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference as a share of the largest finite number; others have to be the same."""
    worst, largest = _worst(ours, theirs)
    return worst / largest if largest else worst


def _worst(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """The largest difference, infinite where numbers that are not finite differ, and the largest number."""
    worst = largest = 0.0
    for ours_part, theirs_part in chunks(ours, theirs):
        if not ours_part.numel():
            continue
        wide = torch.complex128 if theirs_part.is_complex() else torch.float64
        a, b = ours_part.to(wide), theirs_part.to(wide)
        same = (a == b) | (a.isnan() & b.isnan())
        finite = a.isfinite() & b.isfinite()
        if bool((~same & ~finite).any()):
            return float("inf"), largest
        worst = max(worst, float(torch.where(same, torch.zeros_like(a), a - b).abs().max()))
        largest = max(largest, float(torch.where(finite, b, torch.zeros_like(b)).abs().max()))
    return worst, largest
