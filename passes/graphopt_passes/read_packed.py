"""read-packed: products and look-ups that read an unpacked weight read it packed.

Before::

    %u = graphopt.unpack_int8(%codes, %scales, bf16) : bf16[4096,4096]
    %y = aten.linear(%x, %u, %bias)                  : bf16[8,4096]

After::

    %y = graphopt.linear_int8(%x, %codes, %scales, %bias) : bf16[8,4096]

Convolutions of one place (1 x 1) with few places are products of their channels, which are put last and back
unless they are there already. Others, and those of many places, where moving channels would take longer than
unpacking the weight, read it unpacked: it is there until they have run, or their gradient has.

Look-ups (``embedding``) unpack the rows that they read alone, where rows of packed tensors are rows of the
weight. Schemes are those that plugins register; what each unpacks to, and which operator reads it packed, is
their own word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.candidate import Candidate, CostDelta, NearMiss, Reason
from graphopt.capture.structure import Line, line_of
from graphopt.edit import Edit
from graphopt.packing import Scheme
from graphopt.passes import Pass, PassContext, Proposal
from graphopt.plugins import default_host
from graphopt.program import Level, Program
from graphopt.rules import argument
from graphopt_passes.memory_place import value_of

__all__ = ["ReadPacked"]

_aten = torch.ops.aten
_TURNED = (_aten.t.default, _aten.transpose.int, _aten.permute.default, _aten.numpy_T.default)
_KEPT = (
    _aten.view.default,
    _aten.reshape.default,
    _aten._unsafe_view.default,
    _aten.detach.default,
    _aten.alias.default,
)
_PRODUCTS = (_aten.mm.default, _aten.matmul.default, _aten.addmm.default)
_CONVOLUTIONS = (
    _aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default, _aten.conv1d.padding,
    _aten.conv2d.padding, _aten.conv3d.padding, _aten.convolution.default,
)  # fmt: skip


@dataclass(frozen=True)
class _Read:
    """``node`` reads the weight of ``unpack``: as the right-hand side of a product, or row by row.
    ``moved``: bytes that are read and written to put channels last and back; ``None``: no convolution."""

    node: fx.Node
    unpack: fx.Node
    scheme: type[Scheme]
    looked_up: bool
    moved: int | None = None


@dataclass(frozen=True)
class ReadPacked(Pass):
    """Reads packed weights where they are used. No options."""

    name: ClassVar[str] = "read-packed"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = "read packed weights in products and look-ups, without unpacking them first"
    after: ClassVar[dict[str, str]] = {
        "normalize": "views of the same shape stand between a weight and its reader",
        "functionalize": "results that are written in place hide who reads them",
    }
    before: ClassVar[dict[str, str]] = {
        "pack-linears": "a packed weight is read by a call of its own",
        "linear-cross-entropy": "it reads weights that are there",
        "chunk": "it knows the operators that models write",
    }

    def propose(self, program: Program, ctx: PassContext) -> Iterable[Proposal]:
        by_unpack = {scheme.unpack_op: scheme for scheme in default_host().schemes().values()}
        line: Line | None = None
        for node in program.nodes():
            scheme = by_unpack.get(getattr(getattr(node.target, "_schema", None), "name", ""))
            if scheme is None:
                continue
            line = line or line_of(program.graph)
            for weight, turned in _weights(node):
                for user in weight.users:
                    found = _read(user, weight, turned, node, scheme)
                    if found is None:
                        continue
                    if not isinstance(found, Reason):
                        found = _effect_between(found, line) or found
                    if isinstance(found, Reason):
                        yield NearMiss(self.name, user.name, 1, 2, found)
                    else:
                        yield Candidate(
                            f"{self.name}@{user.name}", self.name, (node.name, user.name), _gain(found, ctx),
                            _reading(found), exactness="reassociated",
                        )  # fmt: skip


def _weights(unpack: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
    """The weight and its views that are whole matrices; ``True`` for those with [K, N] of it."""
    stack = [(unpack, False)]
    while stack:
        node, turned = stack.pop()
        yield node, turned
        for user in node.users:
            shape = getattr(user.meta.get("val"), "shape", None)
            if user.target in _TURNED and len(user.meta["val"].shape) == 2 and _swaps(user):
                stack.append((user, not turned))
            elif user.target in _KEPT and (shape == node.meta["val"].shape or _is_pointwise(user, node)):
                stack.append((user, turned))


def _is_pointwise(view: fx.Node, weight: fx.Node) -> bool:
    """Whether ``view`` [N, K, 1, ...] is the ``weight`` [N, K] of a convolution of one place."""
    shape, matrix = view.meta["val"].shape, weight.meta["val"].shape
    return len(shape) > len(matrix) == 2 and shape[:2] == matrix and all(size == 1 for size in shape[2:])


def _swaps(node: fx.Node) -> bool:
    if node.target in (_aten.t.default, _aten.numpy_T.default):
        return True
    order = argument(node, "dims") if node.target is _aten.permute.default else None
    if order is not None:
        return [axis % 2 for axis in order] == [1, 0]
    return bool((argument(node, "dim0") - argument(node, "dim1")) % 2)


def _read(
    user: fx.Node, weight: fx.Node, turned: bool, unpack: fx.Node, scheme: type[Scheme]
) -> _Read | Reason | None:
    """``None``: it is no use of the weight that this is about."""
    here = (unpack.name, user.name)
    if user.target is _aten.embedding.default:
        if argument(user, "weight") is not weight:
            return None
        if turned:
            return Reason("rows that are looked up are columns of the weight", here)
        if not scheme.by_rows:
            return Reason(f"rows of a weight packed as {scheme.name} cannot be unpacked alone", here)
        if argument(user, "scale_grad_by_freq") or argument(user, "sparse"):
            return Reason("gradients of what is looked up are scaled or sparse", here)
        return _Read(user, unpack, scheme, looked_up=True)
    if user.target in _CONVOLUTIONS:
        return _convolution(user, weight, unpack, scheme)
    if user.target is _aten.linear.default:
        if argument(user, "weight") is not weight:
            return None
        by_columns = False
    elif user.target in _PRODUCTS:
        if user.args[2 if user.target is _aten.addmm.default else 1] is not weight:
            return Reason("the weight is the left-hand side of the product", here)
        by_columns = True
        if user.target is _aten.addmm.default and (argument(user, "beta"), argument(user, "alpha")) != (1, 1):
            return Reason("the product is scaled as it is added", here)
    else:
        return None
    if turned is not by_columns:
        return Reason("rows of the packed weight are not the outputs of the product", here)
    x, bias = _operands(user)
    value, result = value_of(x), value_of(user)
    if value is None or result is None or not value.dim():
        return Reason("its input is no tensor of rows", here)
    dtype = unpack.meta["val"].dtype
    if not value.dtype == result.dtype == dtype:
        return Reason(f"the product is not in the dtype of the weight, {_short(dtype)}", here)
    if bias is not None:
        added = value_of(bias)
        if added is None or added.dim() != 1 or added.dtype is not dtype:
            return Reason("what is added is no bias, one number of the weight's dtype for each output", here)
    return _Read(user, unpack, scheme, looked_up=False)


def _convolution(
    node: fx.Node, weight: fx.Node, unpack: fx.Node, scheme: type[Scheme]
) -> _Read | Reason | None:
    here = (unpack.name, node.name)
    if argument(node, "weight") is not weight:
        return None
    if len(weight.meta["val"].shape) == 2:
        return Reason("a convolution reads its weight unpacked", here)
    steps = [argument(node, "stride"), argument(node, "groups")]
    if _numbers(steps) != {1} or _numbers([argument(node, "padding")]) != {0}:
        return Reason("the convolution steps, pads or has groups: it is no product", here)
    if node.target is _aten.convolution.default and argument(node, "transposed"):
        return Reason("the convolution is transposed: rows of its weight are not its outputs", here)
    x, result, dtype = (value_of(argument(node, "input")), value_of(node), unpack.meta["val"].dtype)
    places = len(weight.meta["val"].shape) - 2
    if x is None or result is None or x.dim() != places + 2 or not x.dtype == result.dtype == dtype:
        return Reason(f"its input is no batch in the dtype of the weight, {_short(dtype)}", here)
    moved = 0
    if not _is_one_place(x):
        for value in (x, result):
            last = value.permute(0, *range(2, places + 2), 1)
            if not last.is_contiguous():
                if value is result and not value.is_contiguous():
                    return Reason("its result lies in an order of its own", here)
                moved += 2 * _torch.hint(value.numel()) * dtype.itemsize
    unpacked = 2 * _torch.hint(unpack.meta["val"].numel()) * dtype.itemsize
    if moved >= unpacked:
        return Reason("moving its channels would take longer than unpacking its weight", here)
    return _Read(node, unpack, scheme, looked_up=False, moved=moved)


def _is_one_place(value: torch.Tensor) -> bool:
    """Whether channels of ``value`` [B, C, ...] are one number each; sizes that are not known are others."""
    return all(isinstance(size, int) and size == 1 for size in value.shape[2:])


def _numbers(given: Any) -> set[Any]:
    """All that are in ``given``, a number or lists of some; no padding is ``0``."""
    if isinstance(given, list | tuple):
        return set().union(*map(_numbers, given))
    return {0} if given in ("valid", "same") else {given}


def _operands(product: fx.Node) -> tuple[Any, Any]:
    """Input and bias of a product with a weight; no bias is ``None``."""
    if product.target is _aten.linear.default or product.target in _CONVOLUTIONS:
        return argument(product, "input"), argument(product, "bias")
    if product.target is _aten.addmm.default:
        return product.args[1], product.args[0]
    return product.args[0], None


def _effect_between(read: _Read, line: Line) -> Reason | None:
    """Packed tensors are read where the product stands, not where the weight was unpacked."""
    first, last = line.position.get(read.unpack), line.position.get(read.node)
    here = (read.unpack.name, read.node.name)
    if first is None or last is None:
        return Reason("part of it is never run", here)
    unknown = line.ambient.unknown
    if (unknown is not None and unknown[0] <= last) or (
        line.ambient.states[first].key != line.ambient.states[last].key
    ):
        return Reason("autocast or the gradient mode changes in between", here)
    roots = line.aliases.roots
    packed = {root for node in read.unpack.all_input_nodes for root in roots.get(node, ())}
    if packed & line.aliases.written:
        return Reason("packed tensors are written by the program", here)
    return None


def _gain(read: _Read, ctx: PassContext) -> CostDelta:
    """The weight is neither written nor read again."""
    value = read.unpack.meta["val"]
    size = _torch.hint(value.numel()) * value.element_size()
    return CostDelta(seconds=((read.moved or 0) - 2 * size) / ctx.cost.device.copy_bytes_per_second)


def _reading(read: _Read) -> Callable[[Edit], None]:
    unpack, node, scheme, looked_up = read.unpack.name, read.node.name, read.scheme, read.looked_up
    channels_last = read.moved is not None

    def apply(edit: Edit) -> None:
        old, packed = edit.node(node), edit.node(unpack)
        tensors = [argument for argument in packed.args if isinstance(argument, fx.Node)]
        constants = [argument for argument in packed.args[:-1] if not isinstance(argument, fx.Node)]
        if looked_up:
            edit.replace(old, _rows(edit, old, packed, tensors, constants))
            return
        x, bias = _operands(old)
        if channels_last:
            order = [0, *range(2, len(old.meta["val"].shape)), 1]
            x = edit.call_before(old, _aten.permute.default, (x, order), replaces=(old,))
        namespace, _, name = scheme.linear_op.partition("::")
        target = getattr(getattr(torch.ops, namespace), name).default
        given = (x, *tensors, bias, *constants)
        result = edit.call_before(old, target, given, replaces=(old,))
        edit.replace(old, _back(edit, old, result) if channels_last else result)

    return apply


def _back(edit: Edit, old: fx.Node, result: fx.Node) -> fx.Node:
    """``result`` [B, ..., N] with channels second, laid out as ``old`` is."""
    value = old.meta["val"]
    if _is_one_place(value):
        return edit.call_before(old, _aten.reshape.default, (result, [*value.shape]), replaces=(old,))
    order = [0, value.dim() - 1, *range(1, value.dim() - 1)]
    turned = edit.call_before(old, _aten.permute.default, (result, order), replaces=(old,))
    if value.permute(0, *range(2, value.dim()), 1).is_contiguous():
        return turned
    layout = {"memory_format": torch.contiguous_format}
    return edit.call_before(old, _aten.clone.default, (turned,), layout, replaces=(old,))


def _rows(edit: Edit, old: fx.Node, packed: fx.Node, tensors: list[fx.Node], constants: list[Any]) -> fx.Node:
    """Rows of packed tensors, unpacked."""

    def call(target: Any, *args: Any) -> fx.Node:
        return edit.call_before(old, target, args, replaces=(old,))

    flat = call(_aten.reshape.default, argument(old, "indices"), [-1])
    chosen = [call(_aten.index_select.default, tensor, 0, flat) for tensor in tensors]
    rows = call(packed.target, *chosen, *constants, packed.args[-1])
    return call(_aten.reshape.default, rows, [*old.meta["val"].shape])


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
