"""Outputs, gradients and buffers of an optimized model against the model's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from graphopt.capture.inputs import bind_inputs
from graphopt.errors import VerificationError
from graphopt.loss import is_differentiable
from graphopt.program import tensor_leaves

if TYPE_CHECKING:
    from graphopt.optimized import Optimized

__all__ = ["TOLERANCES", "verify_numerically"]

TOLERANCES: Mapping[torch.dtype, float] = {
    # Relative to the largest element of a tensor: elements that cancel have no digits of their own.
    # Each is the unit roundoff of the type times about a thousand, what sums of a million terms lose
    # at random in another order; half types, whose sums are kept in float32, lose only what rounding
    # the results of a few dozen layers adds up to.
    torch.float64: 1e-12,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
_PRECISION = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

_ALLOWANCE = 2.0
"""How much further from the float64 result than the model itself is the optimized model may be."""


@dataclass
class _Observed:
    """What one step showed, by name: ``output 0``, ``gradient of layer.weight``, ``buffer mean``."""

    values: dict[str, Any]
    spec: Any
    random: bool


def verify_numerically(
    model: torch.nn.Module, optimized: Optimized, inputs: Any, *, rtol: float | None = None
) -> None:
    """Compare one step of ``optimized`` with one of ``model``, from the same random state.

    Outputs, buffers, parameters that the step writes, and, in training, the gradients of all parameters
    and inputs, unless the step updates parameters and returns nothing to differentiate. What differs by
    more than the tolerance of the least precise type that the programs compute in is held against the same
    step in float64, if the model can run in it and draws no random numbers: it passes if it is about as
    close to that as the model itself. Gradients, buffers, written parameters and random states are put
    back. ``rtol``: allow that share of the largest element instead, whatever float64 says. Raises
    ``VerificationError`` naming what differs, by how much, and the tolerance.
    """
    args, kwargs = bind_inputs(model, inputs)
    training = optimized._driver.training_step()
    updated = optimized._driver.written_parameters()

    def observe(run: Callable[..., Any], owner: torch.nn.Module, arguments: Any) -> _Observed:
        known = dict(owner.named_parameters())
        written = {name: known[name] for name in updated if name in known}
        with _state_kept(owner, arguments, written):
            return _observe(run, owner, arguments, optimized._loss if training else None, written)

    reference = observe(model, model, (args, kwargs))
    found = observe(optimized, model, (args, kwargs))
    _compare_structure(reference, found)
    dtype = _coarsest(optimized)
    precise: _Observed | None = None
    for name, expected in reference.values.items():
        actual = found.values[name]
        wrong = _difference(actual, expected, dtype, rtol)
        if not wrong:
            continue
        if reference.random and optimized._driver.session.emitter.name != "eager":
            raise VerificationError(
                f"{name}: {wrong}; the model draws random numbers, and compiled code draws others",
                hint='verify with emit="eager", or after model.eval()',
            )
        if rtol is not None:
            raise VerificationError(f"{name}: {wrong}")
        if precise is None and not reference.random:
            precise = _in_float64(observe, model, (args, kwargs))
        if precise is None or not _as_close(actual, expected, precise.values.get(name)):
            raise VerificationError(f"{name}: {wrong}")


def _observe(
    run: Callable[..., Any],
    owner: torch.nn.Module,
    arguments: Any,
    loss: Callable[[Any], torch.Tensor] | None,
    written: Mapping[str, torch.Tensor],
) -> _Observed:
    parameters = {name: p for name, p in owner.named_parameters() if p.requires_grad}
    leaves, spec = pytree.tree_flatten(arguments)
    # The step may write its inputs. A tensor that is given twice stays one: a program captured with
    # `labels is input_ids` is another than one captured without.
    fresh = {id(leaf): _fresh(leaf) for leaf in leaves}
    leaves = [fresh[id(leaf)] for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    for parameter in parameters.values():
        parameter.grad = None
    before = _random_states()
    with torch.set_grad_enabled(loss is not None):
        output = run(*args, **kwargs)
        outputs, output_spec = pytree.tree_flatten(output)
        values = {f"output {i}": _detached(leaf) for i, leaf in enumerate(outputs)}
        if loss is not None and not (written and not is_differentiable(output)):
            torch.autograd.backward(loss(output))
    if loss is not None:
        values.update({f"gradient of {name}": p.grad for name, p in parameters.items()})
        inputs = enumerate(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
        values.update({f"gradient of input {i}": leaf.grad for i, leaf in inputs if leaf.requires_grad})
    values.update({f"buffer {name}": buffer.detach().clone() for name, buffer in owner.named_buffers()})
    values.update({f"parameter {name}": p.detach().clone() for name, p in written.items()})
    after = _random_states()
    random = any(not torch.equal(x, y) for x, y in zip(before, after, strict=True))
    return _Observed(values, output_spec, random)


@contextmanager
def _state_kept(
    owner: torch.nn.Module, arguments: Any, written: Mapping[str, torch.Tensor]
) -> Iterator[None]:
    gradients = [(p, p.grad) for p in owner.parameters()]
    buffers = [(tensor, tensor.detach().clone()) for tensor in (*owner.buffers(), *written.values())]
    tensors = [*owner.parameters(), *owner.buffers(), *tensor_leaves(arguments)]
    devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _compare_structure(reference: _Observed, found: _Observed) -> None:
    if reference.spec != found.spec:
        raise VerificationError(
            f"the outputs have another structure: the model returns {reference.spec}, the optimized one "
            f"{found.spec}"
        )


def _difference(actual: Any, expected: Any, coarsest: torch.dtype, rtol: float | None) -> str:
    """What is wrong with ``actual``, or ``""``."""
    if not isinstance(actual, torch.Tensor) or not isinstance(expected, torch.Tensor):
        if actual is None or expected is None:
            owner = "the model" if actual is None else "the optimized model"
            return "" if actual is expected else f"only {owner} has it"
        same = type(actual) is type(expected) and actual == expected
        return "" if same else f"{actual!r}, the model's is {expected!r}"
    for what in ("dtype", "shape", "device"):
        if getattr(actual, what) != getattr(expected, what):
            return f"{what} is {getattr(actual, what)}, the model's is {getattr(expected, what)}"
    if not (expected.is_floating_point() or expected.is_complex()):
        count = int((actual != expected).sum())
        return f"{count} of {expected.numel()} elements differ; none may" if count else ""
    distance, scale = _distance(actual, expected)
    dtype = min(coarsest, _real(expected.dtype), key=_rank)
    share = TOLERANCES[dtype] if rtol is None else rtol
    allowed = share * scale
    if distance <= allowed:
        return ""
    return (
        f"the largest difference is {distance:.3g}, allowed is {allowed:.3g} ({share:g} of the "
        f"largest element, {scale:.3g}, for {str(dtype).removeprefix('torch.')})"
    )


def _distance(actual: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Largest difference, and largest magnitude of ``expected``, in float64. Infinities and NaNs
    differ from everything but themselves."""
    if not expected.numel():
        return 0.0, 0.0
    wide = torch.complex128 if expected.is_complex() else torch.float64
    x, y = actual.detach().to(wide), expected.detach().to(wide)
    same = (x == y) | (x.isnan() & y.isnan())
    finite = x.isfinite() & y.isfinite()
    if bool((~same & ~finite).any()):
        return float("inf"), 0.0
    difference = torch.where(same, torch.zeros_like(x), x - y).abs()
    magnitude = torch.where(finite, y, torch.zeros_like(y)).abs()
    return float(difference.max()), float(magnitude.max())


def _in_float64(
    observe: Callable[[Callable[..., Any], torch.nn.Module, Any], _Observed],
    model: torch.nn.Module,
    arguments: Any,
) -> _Observed | None:
    """The step in float64, or ``None`` where the model cannot run in it."""
    try:
        twin = copy.deepcopy(model).double()
        doubled = pytree.tree_map(_double, arguments)
        return observe(twin, twin, doubled)
    except Exception:
        # Whatever keeps a model from running in another type says nothing of the optimized one.
        return None


def _as_close(actual: Any, expected: Any, precise: Any) -> bool:
    tensors = (actual, expected, precise)
    if not all(isinstance(t, torch.Tensor) and t.is_floating_point() for t in tensors):
        return False
    if actual.shape != precise.shape:
        return False
    return _distance(actual, precise)[0] <= _ALLOWANCE * _distance(expected, precise)[0]


def _coarsest(optimized: Optimized) -> torch.dtype:
    """The least precise type that any program computes in: its rounding may reach every result."""
    found = {torch.float64}
    for program in optimized.programs:
        for node in program.graph.nodes:
            found.update(_real(tensor.dtype) for tensor in tensor_leaves(node.meta.get("val")))
    found &= TOLERANCES.keys()
    return min(found, key=_rank)


def _rank(dtype: torch.dtype) -> int:
    return _PRECISION.index(dtype)


def _real(dtype: torch.dtype) -> torch.dtype:
    """The type of the parts of a complex one; types without a tolerance count as the least precise."""
    real = {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(dtype, dtype)
    return real if real in TOLERANCES or not real.is_floating_point else torch.bfloat16


def _fresh(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf.detach().clone().requires_grad_(leaf.requires_grad)


def _detached(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf


def _double(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
        return leaf
    return leaf.detach().double().requires_grad_(leaf.requires_grad)


def _random_states() -> list[torch.Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]
