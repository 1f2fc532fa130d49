"""sum-products: products of matrices that are added up are added as they are computed.

Before::

    %1 = aten.mm(%dq, %wq)    %2 = aten.view(%1, [4, 2048, 2048])
    %3 = aten.mm(%dk, %wk)    %4 = aten.view(%3, [4, 2048, 2048])    %5 = aten.add.Tensor(%2, %4)
    %6 = aten.mm(%dv, %wv)    %7 = aten.view(%6, [4, 2048, 2048])    %8 = aten.add.Tensor(%5, %7)

After::

    %1 = graphopt.sum_products([%dq, %dk, %dv], [%wq, %wk, %wv])
    %8 = aten.view(%1, [4, 2048, 2048])

So are the gradients of what several linear layers read. Separately every product is written, all are read and
the sum is written; where a library or an operator of ours reads the sum, no code generator can make it on the
way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.candidate import Candidate, CostDelta, NearMiss, Reason
from graphopt.edit import Edit
from graphopt.emit.fusion import Kind, kind_of
from graphopt.passes import Pass, PassContext, Proposal
from graphopt.plugins import default_host
from graphopt.program import Level, Program

__all__ = ["SumProducts"]

_aten = torch.ops.aten
_VIEWS = (_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default)


@dataclass(frozen=True)
class SumProducts(Pass):
    """Adds up products of matrices as they are computed. No options."""

    name: ClassVar[str] = "sum-products"
    level: ClassVar[Level] = Level.JOINT
    summary: ClassVar[str] = "add up products of matrices as they are computed"
    after: ClassVar[dict[str, str]] = {
        "fuse-norm-gradient": "whether its operators read the sum says what it costs"
    }
    before: ClassVar[dict[str, str]] = {
        "insert-checkpoints": "schedules are of the operators that are there in the end"
    }

    def propose(self, program: Program, ctx: PassContext) -> Iterable[Proposal]:
        inside: set[fx.Node] = set()
        for root in reversed(list(program.nodes(_aten.add.Tensor))):
            if root in inside or not _adds(root):
                continue
            sums, leaves = _tree(root)
            inside |= sums
            found = [(leaf, product) for leaf in leaves if (product := _product(leaf, root)) is not None]
            if len(found) < 2:
                continue
            reason = _reason(root, [product for _, product in found])
            if reason is not None:
                yield NearMiss(self.name, root.name, len(found), len(leaves), reason)
                continue
            names = tuple(leaf.name for leaf, _ in found)
            touched = [node.name for node in (*sums, *(product for _, product in found))]
            yield Candidate(
                f"{self.name}@{root.name}", self.name, tuple(sorted(touched)),
                _delta(root, len(found), len(leaves), ctx), _summing(root.name, names),
                exactness="reassociated",
            )  # fmt: skip


def _adds(node: fx.Node) -> bool:
    """Whether a call is a plain sum of two tensors of its result's kind."""
    if node.target is not _aten.add.Tensor or len(node.args) != 2 or node.kwargs:
        return False
    kinds = [_kind(operand) for operand in node.args if isinstance(operand, fx.Node)]
    return kinds == [_kind(node)] * 2


def _kind(node: fx.Node) -> str:
    value = node.meta.get("val")
    # Text, because comparing symbolic sizes would add guards.
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else ""


def _tree(root: fx.Node) -> tuple[set[fx.Node], list[fx.Node]]:
    """Sums that nothing else reads, and what they add up, in order."""
    sums, leaves, stack = (
        {root},
        [],
        list(reversed(root.all_input_nodes if root.args[0] is not root.args[1] else [])),
    )
    while stack:
        node = stack.pop()
        if _adds(node) and len(node.users) == 1 and node.args[0] is not node.args[1]:
            sums.add(node)
            stack += [operand for operand in reversed(node.args) if isinstance(operand, fx.Node)]
        else:
            leaves.append(node)
    return sums, leaves


def _product(leaf: fx.Node, root: fx.Node) -> fx.Node | None:
    """The product of matrices that a value is, or is a view of, if nothing else reads it."""
    node = leaf
    while node.target in _VIEWS and len(node.users) == 1:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node if node.target is _aten.mm.default and len(node.users) == 1 else None


def _reason(root: fx.Node, products: Sequence[fx.Node]) -> Reason | None:
    here = (root.name, *(product.name for product in products))
    if "sum-products" not in default_host().kernels():
        return Reason("the kernel sum-products is not installed", here)
    if len({_kind(product) for product in products}) > 1:
        return Reason("products are of different shapes", here)
    if any("recompute" in node.meta for node in (root, *products)):
        return Reason("it lies in a region that the model checkpoints itself", here)
    return None


_ADDING = 2.5
"""What reading the sum within a product takes, over copying as many bytes: on an H200 a product with a result
of 32 MiB took 19 to 24 us longer when it was added to that, at any depth from 512 to 16,384
(benchmarks/results/gpu_matmul.json)."""


def _delta(root: fx.Node, count: int, terms: int, ctx: PassContext) -> CostDelta:
    """What is written and read less. Every product but the first reads what it adds to, at a fraction of the
    rate that copying has."""
    device, value = ctx.cost.device, root.meta["val"]
    once = _torch.hint(value.numel()) * value.element_size() / device.copy_bytes_per_second
    more = count - 1
    adding = more * once * (_ADDING if value.is_cuda else 1.0)
    if ctx.emit == "eager":
        return CostDelta(seconds=adding - more * (3 * once + device.launch_seconds))
    alone = terms == count and all(_is_library(reader, value.device.type) for reader in _readers(root))
    # Alone the sum is a kernel that reads all and writes one; else its reader reads fewer.
    saved = (count + 1) * once + device.launch_seconds if alone else more * once
    return CostDelta(seconds=adding - saved)


def _is_library(node: fx.Node, device: str) -> bool:
    return node.op != "output" and kind_of(node, device) is Kind.LIBRARY


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Calls that read a value or a view of it."""
    for user in node.users:
        if user.op == "call_function" and kind_of(user) is Kind.VIEW:
            yield from _readers(user)
        else:
            yield user


def _summing(root_name: str, leaf_names: Sequence[str]) -> Callable[[Edit], None]:
    def apply(edit: Edit) -> None:
        root = edit.node(root_name)
        leaves = [edit.node(name) for name in leaf_names]
        products = [_product(leaf, root) for leaf in leaves]
        operands = [[product.args[k] for product in products if product is not None] for k in (0, 1)]

        def call(target: Any, *args: Any) -> fx.Node:
            return edit.call_before(root, target, args, replaces=(root,))

        total = call(torch.ops.graphopt.sum_products.default, *operands)
        for view in _views(leaves[0]):
            total = call(view.target, total, *view.args[1:])
        for other in _tree(root)[1]:
            if other not in leaves:
                total = call(_aten.add.Tensor, total, other)
        edit.replace(root, total)

    return apply


def _views(leaf: fx.Node) -> list[fx.Node]:
    """The views between a product and a leaf, innermost first."""
    found: list[fx.Node] = []
    node: Any = leaf
    while node.target in _VIEWS:
        found.append(node)
        node = node.args[0]
    return found[::-1]
