"""Runs random models through every pass, and compares what they compute with what they compute eagerly."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.utils import _pytree as pytree

import graphopt
from graphopt.budget import Budget
from graphopt.passes import Pass
from graphopt.pipeline import Pipeline
from graphopt.plugins import default_host
from graphopt.step_cost import step_curve
from tests.drawn_models import DrawnModel, drawn_model

__all__ = ["ANOTHER_RESULT", "WIDE", "check_seed", "compare", "forced_passes", "run_once"]

WIDE, SINGLE, HALF = 1e-9, 2e-5, 2e-2
"""Allowed beside twice eager's own error, of the largest element: of float64; of float32; of models
that round to sixteen bits on their way, where a last bit decides about one of those."""

ANOTHER_RESULT = ("join-kv", "keep-kv", "lossy-cache", "quantize-linear", "quantize-saved", "share-kv")
"""Passes that change results by design."""

FORCED = {
    "everywhere": True,
    "least_bytes": 1,
    "least_elements": 1,
    "least_rows": 1,
    "least_gain": 0.0,
    "ratio": 0.0,
    "chunks": (2,),
    "tiles": (2,),
}
"""Options that let a pass rewrite what is too small to be worth it."""


ALTERNATIVES = ("chunk", "linear-cross-entropy", "tile-convolutions")
"""Passes whose rewrites are weighed one by one, each with schedules of its own."""


def forced_passes(alternatives: bool) -> tuple[Pass, ...]:
    """Every registered pass that keeps results, with options that let it rewrite the smallest graphs.

    Those of ``ALTERNATIVES`` are among them where asked for.
    """
    found = []
    for name, kind in default_host().passes().items():
        if name not in ANOTHER_RESULT and (alternatives or name not in ALTERNATIVES):
            options = {field.name: FORCED[field.name] for field in fields(kind) if field.name in FORCED}
            found.append(kind(**options))
    return tuple(found)


@dataclass
class Seen:
    """What one call left behind."""

    values: dict[str, Any]
    spec: pytree.TreeSpec


def run_once(module: torch.nn.Module, owner: torch.nn.Module, inputs: Iterable[Any], train: bool) -> Seen:
    """One call on copies of ``inputs``, in training with a backward."""
    given = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)
    for parameter in owner.parameters():
        parameter.grad = None
    with torch.set_grad_enabled(train):
        output = module(*given)
    leaves, spec = pytree.tree_flatten(output)
    values: dict[str, Any] = {f"output {k}": x.detach().clone() for k, x in enumerate(leaves)}
    ends = [x for x in leaves if x.requires_grad]
    # Where there are scalars, they are the loss: other outputs carry no gradients then.
    ends = [x for x in ends if not x.dim()] or ends
    if train and ends:
        # Each element counts by another weight, in the backward as well.
        sum(((0.3 + x.double()) * _weights(x)).mean() for x in ends).backward()
    values |= {f"gradient of {name}": p.grad for name, p in owner.named_parameters()}
    values |= {f"gradient of input {k}": x.grad for k, x in enumerate(given) if x.is_leaf}
    values |= {f"buffer {name}": b.detach().clone() for name, b in owner.named_buffers()}
    values |= {f"input {k}": x.detach() for k, x in enumerate(given)}
    return Seen(values, spec)


def _weights(x: torch.Tensor) -> torch.Tensor:
    return torch.linspace(0.5, 1.5, x.numel(), dtype=torch.float64).reshape(x.shape)


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference as a share of the largest element of ``expected``, or of 1."""
    if not expected.numel():
        return 0.0
    a, b = found.double(), expected.double()
    same = (a == b) | (a.isnan() & b.isnan())
    off = torch.where(same, torch.zeros_like(a), (a - b).abs()).nan_to_num(nan=float("inf"))
    return float(off.max()) / max(float(b.abs().nan_to_num(0.0, 0.0, 0.0).max()), 1.0)


def compare(found: Seen, expected: Seen, precise: Seen, allowed: float) -> None:
    assert found.spec == expected.spec, f"{found.spec} instead of {expected.spec}"
    for name, right in expected.values.items():
        value, best = found.values[name], precise.values[name]
        assert (value is None) == (right is None), f"{name} is {value} instead of {right}"
        if right is None:
            continue
        said = f"{name} is {value.dtype}{list(value.shape)}, not {right.dtype}{list(right.shape)}"
        assert (value.dtype, value.shape) == (right.dtype, right.shape), said
        if not right.is_floating_point():
            assert torch.equal(value, right), f"{name} differs: {value} instead of {right}"
            continue
        off, own = _distance(value, best), _distance(right, best)
        assert off <= 2 * own + allowed, f"{name} is off by {off:.3g}, eager by {own:.3g}"


def check_seed(seed: int) -> graphopt.Optimized:
    """Run the model of ``seed`` eagerly and optimized: two steps, in training one more under a random budget.

    Raises ``AssertionError`` that has the whole example.
    """
    drawn = drawn_model(seed)
    try:
        return _checked(drawn, seed)
    except Exception as error:
        raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}\n\n{drawn.script()}") from error


def check_untraced(seed: int) -> bool:
    """Whether AOTAutograd itself fails on the model of ``seed`` (``backend="aot_eager"``): optimized under
    default options it is held to eager then."""
    drawn = drawn_model(seed)
    plain, inputs = drawn.model(torch.float32), drawn.inputs(torch.float32)
    torch._dynamo.reset()
    try:
        run_once(torch.compile(plain, backend="aot_eager"), plain, inputs, True)
    except Exception:
        _checked(drawn, seed, strict=False)
        return True
    return False


def _checked(drawn: DrawnModel, seed: int, strict: bool = True) -> graphopt.Optimized:
    draw = random.Random(seed)
    dtype = draw.choice((torch.float32, torch.float64))
    train = draw.random() < 0.8
    part = draw.choice((0.0, draw.random()))
    alternatives = draw.random() < 0.1
    allowed = HALF if drawn.rounds else WIDE if dtype == torch.float64 else SINGLE
    plain, wide = drawn.model(dtype), drawn.model(torch.float32).double()
    plain.train(train), wide.train(train)
    model, inputs = copy.deepcopy(plain), drawn.inputs(dtype)
    precise_inputs = tuple(
        x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs
    )
    torch._dynamo.reset()
    forced = {
        "pipeline": Pipeline(forced_passes(alternatives)),
        "allow": ("fold-batch-norm", "fuse-dropout"),
        "on_error": "raise",
    }
    fast = graphopt.optimize(model, inputs, emit="eager", cache=False, **(forced if strict else {}))
    assert not strict or not fast.report.diagnostics or fast.report.programs, fast.report.diagnostics

    def step() -> None:
        expected = run_once(plain, plain, inputs, train)
        precise = run_once(wide, wide, precise_inputs, train)
        compare(run_once(fast, model, inputs, train), expected, precise, allowed)

    step()
    step()
    if strict and train and fast.report.baseline is not None:
        session = fast._driver.session
        front = step_curve(session, session.static_bytes or 0)
        least, most = front[0][0], session.plan.baseline.peak_bytes
        session.plan_again(Budget.of(int(least + part * max(most - least, 0))))
        step()
    return fast
