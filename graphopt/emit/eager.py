"""Run a lowered graph op by op, freeing each value right after its last use.

Slow and exact: the allocator's peak is that of the liveness simulation, and every kernel is the
one that eager PyTorch would run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from graphopt import _torch
from graphopt.candidate import NearMiss
from graphopt.collection import uncollected
from graphopt.emit.emitter import NONE, Gradients, Inference, Partition
from graphopt.emit.half_text import half_text
from graphopt.errors import ArtefactError
from graphopt.group_record import GroupRecord
from graphopt.program import copied_module

__all__ = ["EagerEmitter", "eager_callable"]


Boxed = Callable[[list[Any]], list[Any]]


class Around(Protocol):
    """Wraps the code of one half. Of what a forward yields the first ``returned`` are the program's
    outputs, the rest is saved for its backward."""

    def __call__(self, half: fx.GraphModule, run: Boxed, *, backward: bool, returned: int) -> Boxed: ...


def eager_callable(gm: fx.GraphModule) -> Boxed:
    """A boxed callable: takes its argument list over, empties it, returns the outputs as a list."""
    slots: dict[fx.Node, int] = {}
    placeholders: list[int] = []
    constants: dict[int, Any] = {}
    program: list[_Instruction] = []
    frees = _last_uses(gm.graph)
    result: Any = None
    for node in gm.graph.nodes:
        if node.op == "output":
            result = _placed(node.args[0], slots)
            continue
        slot = slots[node] = len(slots)
        if node.op == "placeholder":
            placeholders.append(slot)
        elif node.op == "get_attr":
            constants[slot] = _attribute(gm, str(node.target))
        else:
            program.append(_Instruction(node, slots, [slots[n] for n in frees.get(node, ())]))
    unused = [slots[n] for n in frees.get(None, ())]
    size = len(slots)
    flat, spec = pytree.tree_flatten(result)

    def run(args: list[Any]) -> list[Any]:
        values: list[Any] = [None] * size
        for slot, value in zip(placeholders, args, strict=True):
            values[slot] = value
        args.clear()
        value = None
        for slot in unused:
            values[slot] = None
        for slot, value in constants.items():
            values[slot] = value
        for instruction in program:
            instruction.run(values)
        out = [values[item.index] if isinstance(item, _Slot) else item for item in flat]
        restored = pytree.tree_unflatten(out, spec)
        return list(restored) if isinstance(restored, (list, tuple)) else [restored]

    return _torch.boxed(run)


class _Slot:
    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


class _Instruction:
    """One call. Arguments that are plain values or lists of values are bound without pytrees."""

    __slots__ = ("args", "frees", "kwargs", "nested", "out", "target")

    def __init__(self, node: fx.Node, slots: dict[fx.Node, int], frees: list[int]) -> None:
        self.target = _called(node)
        self.args = tuple(_placed(node.args, slots))
        self.kwargs = dict(_placed(node.kwargs, slots))
        self.nested = any(
            isinstance(a, (tuple, list, dict, slice)) for a in (*self.args, *self.kwargs.values())
        )
        self.out = slots[node]
        self.frees = frees

    def run(self, values: list[Any]) -> None:
        if self.nested:
            bind = lambda a: values[a.index] if isinstance(a, _Slot) else a  # noqa: E731
            args = [_map(a, bind) for a in self.args]
            kwargs = {k: _map(v, bind) for k, v in self.kwargs.items()}
        else:
            args = [values[a.index] if isinstance(a, _Slot) else a for a in self.args]
            kwargs = {k: values[v.index] if isinstance(v, _Slot) else v for k, v in self.kwargs.items()}
        values[self.out] = self.target(*args, **kwargs)
        for slot in self.frees:
            values[slot] = None


def _placed(arguments: Any, slots: dict[fx.Node, int]) -> Any:
    """``arguments`` of a node with the slots of other nodes in their place."""
    place: Any = lambda node: _Slot(slots[node])  # noqa: E731
    return fx.node.map_arg(arguments, place)


def _map(value: Any, bind: Callable[[Any], Any]) -> Any:
    if isinstance(value, (tuple, list)):
        return (
            type(value)(_map(v, bind) for v in value)
            if type(value) in (tuple, list)
            else [_map(v, bind) for v in value]
        )
    if isinstance(value, dict):
        return {k: _map(v, bind) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(bind(value.start), bind(value.stop), bind(value.step))
    return bind(value)


def _called(node: fx.Node) -> Callable[..., Any]:
    """What runs ``node``: a view of a value that lies otherwise than when it was traced becomes a copy.

    Kernels may lay their result out otherwise than torch says when tracing: on the CPU a batch norm of an
    input that is not contiguous returns a contiguous one. Where a view is possible, ``reshape`` is one, and
    a functional graph has no other name for what it copies.
    """
    if isinstance(node.target, str):
        return _method(node.target)
    target: Callable[..., Any] = node.target
    return torch.ops.aten.reshape.default if target in _VIEWS else target


_VIEWS = frozenset({torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default})


def _method(name: str) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: getattr(self, name)(*args, **kwargs)


def _attribute(gm: fx.GraphModule, path: str) -> Any:
    value: Any = gm
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _last_uses(graph: fx.Graph) -> dict[fx.Node | None, list[fx.Node]]:
    """For each node the values that die with it; under ``None`` the inputs that nothing reads."""
    frees: dict[fx.Node | None, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                if node.op != "output":
                    frees.setdefault(node, []).append(source)
        if node not in seen and node.op not in ("output",):
            seen.add(node)
            frees.setdefault(None if node.op in ("placeholder", "get_attr") else node, []).append(node)
    return frees


class EagerEmitter:
    """Runs programs op by op: exact memory, eager's kernels, no compilation.

    ``around`` may wrap what runs the halves of programs.
    """

    name = "eager"
    fuses = False
    by_segments = False
    records = ()
    groups = ()
    near_misses = ()
    slots = ()

    def __init__(self, around: Around | None = None) -> None:
        self._around = around

    def note(self, groups: Sequence[GroupRecord], near_misses: Sequence[NearMiss]) -> None:
        pass

    def compile(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        partition: Partition,
        inference: Inference,
        gradients: Gradients = NONE,
        keep: str = "",
    ) -> Callable[..., Any]:
        # Gradients stay as autograd has them, so that they are eager's to the bit.
        returned = 0

        def split(joint: fx.GraphModule, joint_inputs: Any, *, num_fwd_outputs: int, **unused: Any) -> Any:
            nonlocal returned
            returned = num_fwd_outputs
            halves = partition(joint, num_fwd_outputs)
            # AOTAutograd takes off what is noted on the nodes of what it keeps.
            return tuple(map(copied_module, halves)) if keep else halves

        def run(half: fx.GraphModule, *, backward: bool, returned: int) -> Boxed:
            code = eager_callable(half)
            if self._around:
                return self._around(half, code, backward=backward, returned=returned)
            if keep:
                # What has no text is not kept.
                with suppress(ArtefactError):
                    return _torch.kept_as_text(code, half_text(half))
            return code

        make = _torch.joint_compiler(
            lambda half, half_inputs: run(half, backward=False, returned=returned),
            lambda half, half_inputs: run(half, backward=True, returned=0),
            lambda graph, graph_inputs: run(inference(graph), backward=False, returned=sys.maxsize),
            split,
            None,
            keep,
        )
        # A trace makes many small objects, all of which live as long as it does.
        with _torch.random_calls_kept(), uncollected():
            compiled: Callable[..., Any] = make(gm, inputs)
        return compiled
