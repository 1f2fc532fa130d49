"""fuse-norm-gradient: what ``fuse-norm`` fused, in the graph of forward and backward.

A residual stream is read by a norm and passes it by, so its gradient is the sum of two. The kernel of
the norm's backward adds the other one while its own is in registers. Before::

    %90 = graphopt.row_norm_backward(%g, %x, %w, None, %mean, %rstd, None, ...)
    %91 = getitem(%90, 0)
    %92 = aten.add.Tensor(%70, %91)

After::

    %90 = graphopt.row_norm_backward(%g, %x, %w, None, %mean, %rstd, %70, ...)
    %92 = getitem(%90, 0)

Where a code generator fuses the forward with what is around it, such as the sum before a norm, it is written
out in operators of ATen again: a call of its own would read that sum once more.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.candidate import Candidate, CostDelta, NearMiss, Reason
from graphopt.edit import Edit
from graphopt.passes import Pass, PassContext, Proposal
from graphopt.plugins import default_host
from graphopt.program import Level, Program
from graphopt.rules import argument
from graphopt_passes.neighbours import is_generated, readers

__all__ = ["FuseNormGradient"]

_aten = torch.ops.aten

_SHORT, _LONG, _LONG_CENTERED = 1024, 6144, 16384
"""Elements of rows between which the forward's kernel beats those that Inductor makes, on an H200."""


@dataclass(frozen=True)
class FuseNormGradient(Pass):
    """Adds gradients that pass a norm by in the kernel of its backward. No options."""

    name: ClassVar[str] = "fuse-norm-gradient"
    level: ClassVar[Level] = Level.JOINT
    summary: ClassVar[str] = "add the gradient that passes a norm by in the kernel of the norm's backward"
    after: ClassVar[dict[str, str]] = {"fuse-norm": "it makes the calls that this looks for"}
    before: ClassVar[dict[str, str]] = {
        "insert-checkpoints": "schedules are of the operators that are there in the end"
    }

    def propose(self, program: Program, ctx: PassContext) -> Iterable[Proposal]:
        forward, backward = "graphopt::row_norm", "graphopt::row_norm_backward"
        for node in program.nodes():
            name = getattr(getattr(node.target, "_schema", None), "name", "")
            if name == backward:
                found = _sum_of(node)
                if isinstance(found, Reason):
                    yield NearMiss(self.name, node.name, 1, 2, found)
                elif found is not None:
                    size = found.meta["val"].numel() * found.meta["val"].element_size()
                    yield Candidate(
                        f"{self.name}@{node.name}", self.name, (node.name, found.name),
                        CostDelta(seconds=-2 * size / ctx.cost.device.copy_bytes_per_second),
                        _absorbing(node.name, found.name), exactness="reassociated",
                    )  # fmt: skip
            elif name == forward and ctx.emit != "eager" and not _is_faster_alone(node):
                yield Candidate(
                    f"{self.name}@{node.name}", self.name, (node.name,), CostDelta(), _writing_out(node.name)
                )


def _is_faster_alone(norm: fx.Node) -> bool:
    """Whether the forward's own kernel beats a code generator's: nothing around it could be fused with it and
    rows are neither so short nor so long that generated kernels are as fast (measured on an H200)."""
    value = norm.args[0].meta["val"]  # type: ignore[union-attr]
    width, centered = value.shape[-1], argument(norm, "centered")
    if not value.is_cuda or not _SHORT < width <= (_LONG_CENTERED if centered else _LONG):
        return False
    result = next((user for user in norm.users if user.args[1] == 0), None)
    around = [norm.args[0], *(() if result is None else readers(result))]
    return not any(isinstance(node, fx.Node) and is_generated(node) for node in around)


def _sum_of(backward: fx.Node) -> fx.Node | Reason | None:
    """The sum that the gradient of the input goes into, or why it stays outside."""
    gradient = next((user for user in backward.users if user.args[1] == 0), None)
    if gradient is None or argument(backward, "passed") is not None:
        return None
    total = next((user for user in gradient.users if user.target is _aten.add.Tensor), None)
    if total is None or len(total.args) != 2 or total.kwargs:
        return None
    if len(gradient.users) > 1:
        return Reason("the gradient of the input has several readers", (gradient.name,))
    other = total.args[1] if total.args[0] is gradient else total.args[0]
    own = gradient.meta["val"]
    beside = other.meta.get("val") if isinstance(other, fx.Node) else None
    if other is gradient or not isinstance(beside, torch.Tensor):
        return Reason("what is added is no other tensor", (total.name,))
    if beside.shape != own.shape or beside.dtype is not own.dtype:
        return Reason("what is added is of another shape or dtype", (total.name,))
    if backward in _sources(other):
        return Reason("what is added comes from the same norm", (total.name,))
    return total


def _sources(node: Any) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                stack.append(source)
    return found


def _absorbing(name: str, total_name: str) -> Callable[[Edit], None]:
    def apply(edit: Edit) -> None:
        old, total = edit.node(name), edit.node(total_name)
        schema = _torch.schema_of(old.target)
        assert schema is not None
        names = [parameter.name for parameter in schema.arguments]
        place = names.index("passed")
        elements = {user.args[1]: user for user in old.users}
        other = total.args[1] if total.args[0] is elements[0] else total.args[0]
        args = tuple(argument(old, given) for given in names)
        new = edit.call_before(
            total, old.target, (*args[:place], other, *args[place + 1 :]), replaces=(old, total)
        )
        for index, element in elements.items():
            replaced = total if index == 0 else element
            edit.replace(
                replaced, edit.call_before(total, operator.getitem, (new, index), replaces=(replaced,))
            )

    return apply


def _writing_out(name: str) -> Callable[[Edit], None]:
    def apply(edit: Edit) -> None:
        old = edit.node(name)
        sources = old.all_input_nodes
        reference = default_host().kernels()["row-norm"].reference

        def computed(*tensors: torch.Tensor) -> Any:
            given = dict(zip(sources, tensors, strict=True))
            return reference(*(given.get(arg, arg) if isinstance(arg, fx.Node) else arg for arg in old.args))

        graph = _torch.traced_like(computed, [source.meta["val"] for source in sources])
        copies: dict[fx.Node, fx.Node] = {}
        inputs = iter(sources)
        for node in graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(inputs)
            elif node.op == "output":
                results = node.args[0]
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: copies[n])
                copies[node] = edit.call_before(old, node.target, args, kwargs, replaces=(old,))
        for element in list(old.users):
            edit.replace(element, copies[results[element.args[1]]])

    return apply
