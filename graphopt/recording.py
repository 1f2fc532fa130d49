"""Steps that are replayed from CUDA graphs instead of being launched kernel by kernel.

Before, each step::

    forward:   host queues ~600 kernels, one at a time        GPU waits for the host where kernels are short
    backward:  host queues ~900 kernels, one at a time

After, from the third step on::

    forward:   inputs are copied to where the graph reads them, one launch
    backward:  one launch; gradients are added to ``.grad`` by kernels of the graph

A recorded step reads and writes fixed addresses: those of parameters, buffers and gradients, which belong to
the model, and those of its own pool. ``Recorder`` replays a call where all of them are still right, and runs
it as ever where they are not: other shapes, parameters that moved, gradients that are not there, a second
forward before the backward of the first. A backward that asks for more than adding to ``.grad``
(``torch.autograd.grad``, ``retain_graph``, hooks of parameters) runs the call again, with the random state
that it had, and differentiates that.

A graph keeps its memory from step to step, so steps are recorded only where the host is what holds them up.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from graphopt import _torch
from graphopt.budget import format_bytes
from graphopt.cuda_graph import Graphs, Replayable
from graphopt.hand_over import is_watched

__all__ = ["Recorder", "Roles"]

WARM = 2
"""Calls before one is recorded: kernels are chosen and libraries set up by then."""

RETURNED = 16 << 20
"""Bytes of results beyond which copying them out of the pool would take as much again."""

BESIDE = 1.1
"""What graphs are taken to keep, as a share of a step's peak, as a pool of theirs has gaps of its own: a
judgement, a little above the one graph that was measured and did not fit (docs/benchmarks.md)."""

HOST_BOUND = 0.7
"""Share of a forward's time that the host takes to queue it, from which on replaying is worth its memory."""

MOVES = 3
"""How often a step is recorded again after parameters or gradients have moved."""


@dataclass(frozen=True)
class Roles:
    """What each input of a program is. ``lasting``: positions of parameters and buffers; ``written``:
    positions of what the program writes; ``random``: whether it draws random numbers."""

    lasting: frozenset[int]
    written: frozenset[int] = frozenset()
    random: bool = False


class _Pending:
    """One replayed forward, as long as its graph lives; ``done`` once its backward has run."""

    done = False


@dataclass
class _Step:
    """A recorded call. ``lasting`` and ``gradients``: addresses by position; ``inputs``: where the graph
    reads the others; ``results``: what it returns, gradients of those of ``differentiable`` read from
    ``tangents``."""

    forward: Replayable
    backward: Replayable | None
    lasting: dict[int, int]
    gradients: dict[int, int]
    inputs: dict[int, torch.Tensor]
    others: dict[int, Any]
    results: list[Any]
    structure: Any
    differentiable: tuple[int, ...]
    tangents: list[torch.Tensor]
    pending: weakref.ref[_Pending] | None = None


@dataclass
class Recorder:
    """Calls ``run``, and replays it from CUDA graphs once it has been recorded.

    ``run(*arguments)`` is a compiled program on ``device``, ``roles`` what its inputs are. It is expected to
    take ``expected_bytes`` besides what lasts; ``room`` is what graph and inputs may take, ``None`` without a
    budget. ``note`` is told once that steps are replayed, or why not. Results are copies of those of the
    graph. While ``paused`` every call is launched kernel by kernel. Where recording fails, ``strict`` raises
    what it failed with.
    """

    run: Callable[..., Any]
    roles: Roles
    device: torch.device
    graphs: Callable[[torch.device], Graphs]
    note: Callable[[str], object]
    room: int | None = None
    expected_bytes: int = 0
    strict: bool = False
    paused: bool = False
    _calls: int = 0
    _moved: int = 0
    _share: Callable[[], float] | None = field(default=None, repr=False)
    _step: _Step | None = field(default=None, repr=False)
    _over: bool = False

    def __call__(self, *arguments: Any) -> Any:
        if self._over or self.paused:
            return self.run(*arguments)
        step = self._step
        if step is None:
            self._calls += 1
            if self._calls < WARM:
                return self.run(*arguments)
            if self._calls == WARM:
                made, self._share = self.graphs(self.device).watch(lambda: self.run(*arguments))
                return made
            if not self._may_record(arguments):
                return self.run(*arguments)
            graphs = self.graphs(self.device)
            step = self._record(graphs, arguments)
            if step is None:
                graphs.release()
                return self.run(*arguments)
        elif not self._is_where_it_was(step, arguments):
            return self.run(*arguments)
        return self._play(step, arguments)

    # --- recording ------------------------------------------------------------------------------

    def _may_record(self, arguments: Sequence[Any]) -> bool:
        """Whether the call can be recorded; what never can be is noted."""
        tensors = {k: x for k, x in enumerate(arguments) if isinstance(x, torch.Tensor)}
        if self._share is not None and (share := self._share()) < HOST_BOUND:
            queued = f"queueing them takes {100 * share:.0f} % of their time"
            return self._refuse(f"{queued}, so the GPU never waits")
        if any(x.device != self.device for x in tensors.values()):
            return self._refuse("it reads tensors of another device")
        if any(type(x) not in (torch.Tensor, torch.nn.Parameter) for x in tensors.values()):
            return self._refuse("it reads tensors of another kind than torch's own")
        if self.roles.written - self.roles.lasting:
            return self._refuse("it writes its inputs")
        trained = self._trained(arguments)
        if any(x.requires_grad for k, x in tensors.items() if k not in self.roles.lasting):
            return self._refuse("gradients of its inputs are wanted")
        if not torch.is_grad_enabled() or not trained:
            return True
        if any(not arguments[k].is_leaf or is_watched(arguments[k]) for k in trained):
            return self._refuse("hooks wait for gradients of parameters")
        # Gradients may be there next time: without them nothing is said, and nothing recorded.
        return all(_is_held(arguments[k]) for k in trained)

    def _record(self, graphs: Graphs, arguments: Sequence[Any]) -> _Step | None:
        expected = int(BESIDE * self.expected_bytes)
        if self.room is not None and expected > self.room:
            # Not tried: while it is recorded, it would take the memory.
            self._refuse(
                f"a graph would keep about {format_bytes(expected)}, "
                f"the budget leaves {format_bytes(self.room)}"
            )
            return None
        free = graphs.free_bytes()
        if 2 * self.expected_bytes > free:
            self._refuse(
                f"a graph would keep {format_bytes(self.expected_bytes)} "
                f"of the {format_bytes(free)} that are free"
            )
            return None
        lasting = self.roles.lasting
        with torch.inference_mode(False):
            given = {k: x for k, x in enumerate(arguments) if k not in lasting}
            inputs = {k: x.clone() for k, x in given.items() if isinstance(x, torch.Tensor)}
        trained = self._trained(arguments) if torch.is_grad_enabled() else ()
        passed = self._as_leaves([inputs.get(k, x) for k, x in enumerate(arguments)], trained)
        held = {k: _address(arguments[k].grad) for k in trained}
        try:
            forward, made = graphs.record(lambda: self.run(*passed))
            results, structure = torch.utils._pytree.tree_flatten(made)
            differentiable = tuple(
                k for k, x in enumerate(results) if isinstance(x, torch.Tensor) and x.requires_grad
            )
            tangents = [torch.zeros_like(results[k]) for k in differentiable]
            backward = None
            if differentiable:
                ends = [results[k] for k in differentiable]
                backward, _ = graphs.record(lambda: torch.autograd.backward(ends, tangents))
                del ends
        except Exception as error:
            if self.strict:
                raise
            self._refuse(f"recording it failed ({type(error).__name__}: {str(error).splitlines()[0]})")
            return None
        reason = self._misfit(arguments, inputs, results, held, graphs.pool_bytes())
        if reason:
            self._refuse(reason)
            return None
        for k in differentiable:
            results[k] = results[k].detach()
        self._step = _Step(
            forward,
            backward,
            {k: _address(arguments[k]) for k in lasting if isinstance(arguments[k], torch.Tensor)},
            held,
            inputs,
            {k: x for k, x in enumerate(arguments) if not isinstance(x, torch.Tensor)},
            results,
            structure,
            differentiable,
            tangents,
        )
        if not self._moved:
            self.note(
                f"steps are replayed from a CUDA graph, which keeps {format_bytes(graphs.pool_bytes())}"
            )
        return self._step

    def _misfit(
        self,
        arguments: Sequence[Any],
        inputs: dict[int, torch.Tensor],
        results: Sequence[Any],
        held: dict[int, int],
        pool: int,
    ) -> str:
        """Why what was recorded cannot stand for the call; empty where it can."""
        tensors = [x for x in results if isinstance(x, torch.Tensor)]
        size = _torch.storage_bytes(tensors)
        if size > RETURNED:
            return f"it returns {format_bytes(size)}, of which each call would make a copy"
        keys = [_torch.storage_key(x) for x in tensors]
        given = {_torch.storage_key(x) for x in (*arguments, *inputs.values()) if isinstance(x, torch.Tensor)}
        if given.intersection(keys) or len(set(keys)) < len(keys):
            return "it returns an input, or one tensor twice"
        if any(_address(arguments[k].grad) != address for k, address in held.items()):
            return "gradients do not stay where they are"
        taken = pool + _torch.storage_bytes(list(inputs.values()))
        if self.room is not None and taken > self.room:
            return f"a graph would keep {format_bytes(taken)}, the budget leaves {format_bytes(self.room)}"
        return ""

    def _as_leaves(self, values: list[Any], trained: Sequence[int]) -> list[Any]:
        """Parameters as leaves of their own with the same gradients: autograd ties those of the model to the
        stream that they were first used on."""
        for k in trained:
            leaf = values[k].detach().requires_grad_()
            leaf.grad = values[k].grad
            values[k] = leaf
        return values

    def _trained(self, arguments: Sequence[Any]) -> tuple[int, ...]:
        found = (k for k in sorted(self.roles.lasting) if isinstance(arguments[k], torch.Tensor))
        return tuple(k for k in found if arguments[k].requires_grad)

    def _refuse(self, reason: str) -> bool:
        self._over, self._step = True, None
        self.note(f"steps are launched kernel by kernel: {reason}")
        return False

    # --- replaying ------------------------------------------------------------------------------

    def _is_where_it_was(self, step: _Step, arguments: Sequence[Any]) -> bool:
        """Whether the graph may stand for this call. Where memory has moved, the next one is recorded
        anew."""
        pending = step.pending() if step.pending is not None else None
        if pending is not None and not pending.done:
            return False
        for k, recorded in step.inputs.items():
            x = arguments[k]
            if (x.shape, x.stride(), x.dtype) != (recorded.shape, recorded.stride(), recorded.dtype) or (
                x.requires_grad
            ):
                return False
        if any(arguments[k] != other for k, other in step.others.items()):
            return False
        if bool(step.differentiable) != (torch.is_grad_enabled() and bool(self._trained(arguments))):
            return False
        if any(_address(arguments[k]) != address for k, address in step.lasting.items()):
            return self._record_anew("parameters move from step to step")
        grads = {k: arguments[k].grad for k in step.gradients}
        if any(grad is None for grad in grads.values()):
            return False
        if any(_address(grads[k]) != address for k, address in step.gradients.items()):
            return self._record_anew("gradients move from step to step")
        return not any(is_watched(arguments[k]) for k in step.gradients)

    def _record_anew(self, reason: str) -> bool:
        self._step = None
        self._moved += 1
        if self._moved > MOVES:
            self._refuse(reason)
        return False

    def _play(self, step: _Step, arguments: Sequence[Any]) -> Any:
        before = _Before.of(self, arguments) if step.differentiable else None
        with torch.no_grad():
            for k, recorded in step.inputs.items():
                recorded.copy_(arguments[k])
        if before is None:
            step.forward.replay()
            results = [x.clone() if isinstance(x, torch.Tensor) else x for x in step.results]
        else:
            leaves = [arguments[k] for k in step.gradients]
            made: Sequence[torch.Tensor] = _Replay.apply(step, before, *leaves)  # type: ignore[no-untyped-call]
            tensors = iter(made)
            results = [next(tensors) if isinstance(x, torch.Tensor) else x for x in step.results]
        return torch.utils._pytree.tree_unflatten(results, step.structure)


@dataclass
class _Before:
    """What running a call again takes: its arguments as they were, and the random state."""

    recorder: Recorder
    arguments: tuple[Any, ...]
    versions: tuple[int, ...]
    random: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, recorder: Recorder, arguments: Sequence[Any]) -> _Before:
        states: tuple[torch.Tensor, ...] = ()
        if recorder.roles.random:
            states = (torch.get_rng_state(),)
            if recorder.device.type == "cuda":
                states = (*states, torch.cuda.get_rng_state(recorder.device))
        return cls(recorder, tuple(arguments), _versions(arguments, recorder.roles.written), states)

    def gradients(self, step: _Step, tangents: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Gradients of the trained parameters for those of the results, by running the call again."""
        if self.versions != _versions(self.arguments, self.recorder.roles.written):
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace "
                "operation: a parameter or an input of the optimized module was written between its forward "
                "and its backward"
            )
        recorder, trained = self.recorder, tuple(step.gradients)
        passed = list(self.arguments)
        for k in trained:
            passed[k] = passed[k].detach().requires_grad_()
        # What the call writes was written for good by the first run.
        written = {k: passed[k].clone() for k in recorder.roles.written}
        with _random_as(self.random, recorder.device), torch.enable_grad():
            results, _ = torch.utils._pytree.tree_flatten(recorder.run(*passed))
        with torch.no_grad():
            for k, value in written.items():
                passed[k].copy_(value)
        wanted = [
            (results[k], g) for k, g in zip(step.differentiable, tangents, strict=True) if g is not None
        ]
        leaves = [passed[k] for k in trained]
        if not wanted:
            return [None] * len(leaves)
        found = torch.autograd.grad([x for x, _ in wanted], leaves, [g for _, g in wanted], allow_unused=True)
        return list(found)


class _Replay(torch.autograd.Function):
    """The recorded forward; the recorded backward adds to ``.grad``."""

    @staticmethod
    def forward(ctx: Any, step: _Step, before: _Before, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.step, ctx.before, ctx.leaves, ctx.pending = step, before, leaves, _Pending()
        step.pending = weakref.ref(ctx.pending)
        ctx.set_materialize_grads(False)
        step.forward.replay()
        made = {k: x.clone() for k, x in enumerate(step.results) if isinstance(x, torch.Tensor)}
        ctx.mark_non_differentiable(*(x for k, x in made.items() if k not in step.differentiable))
        ctx.places = [tuple(made).index(k) for k in step.differentiable]
        return tuple(made.values())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        step: _Step = ctx.step
        tangents = [gradients[place] for place in ctx.places]
        addresses = step.gradients.values()
        adds = (
            not ctx.pending.done
            and not torch.is_grad_enabled()
            and not _torch.keeps_graph()
            and all(
                leaf.grad is not None
                and _address(leaf.grad) == address
                and not is_watched(leaf)
                and _torch.adds_to_gradient_of(leaf)
                for leaf, address in zip(ctx.leaves, addresses, strict=True)
            )
        )
        if not adds:
            if any(leaf.grad is None for leaf in ctx.leaves) and not ctx.pending.done:
                # Loops may set gradients to None between forward and backward: running twice never pays.
                ctx.before.recorder._refuse("gradients are not kept from step to step")
            made = ctx.before.gradients(step, tangents)
            ctx.pending.done = ctx.pending.done or not _torch.keeps_graph()
            return (None, None, *made)
        ctx.pending.done = True
        assert step.backward is not None
        for recorded, tangent in zip(step.tangents, tangents, strict=True):
            if tangent is None:
                recorded.zero_()
            else:
                recorded.copy_(tangent)
        step.backward.replay()
        return (None,) * (2 + len(ctx.leaves))


@contextmanager
def _random_as(states: tuple[torch.Tensor, ...], device: torch.device) -> Iterator[None]:
    """Generators stand as ``states`` say, and afterwards as they do now."""
    with torch.random.fork_rng(devices=[device] if len(states) > 1 else [], enabled=bool(states)):
        if states:
            torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1], device)
        yield


def _versions(arguments: Sequence[Any], but: Set[int]) -> tuple[int, ...]:
    """Versions of the tensors that the call reads and does not write."""
    tensors = (x for k, x in enumerate(arguments) if isinstance(x, torch.Tensor) and k not in but)
    return tuple(x._version for x in tensors if not x.is_inference())


def _is_held(parameter: torch.Tensor) -> bool:
    """Whether the gradient is there and looks like its parameter."""
    grad = parameter.grad
    return (
        type(grad) is torch.Tensor
        and not grad.requires_grad
        and (grad.shape, grad.dtype, grad.device) == (parameter.shape, parameter.dtype, parameter.device)
    )


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
