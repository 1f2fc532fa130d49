"""fuse-row-product: a single row's norm, its product with a weight, and what follows it become one call.

Before::

    %28 = aten.to.dtype(%27, bf16)                  the root mean square norm of %2, as models write it
    %29 = aten.mul.Tensor(%weight, %28)
    %30 = aten.linear(%29, %both)                   : bf16[1,1,28672]
    %31 = aten.split_with_sizes(%30, [14336, 14336], -1)
    %32 = aten.silu(%31[0])    %33 = aten.mul.Tensor(%32, %31[1])
    %34 = aten.linear(%33, %down)                   %35 = aten.add.Tensor(%2, %34)

After::

    %33 = graphopt.row_product(%2, %both, None, None, %weight, True, 1e-06, 0.0, None, 'silu')
    %35 = graphopt.row_product(%33, %down, None, None, None, False, 0.0, 0.0, %2, '')

One token of one sequence reads every weight once. A library's product of one row leaves part of the memory's
rate unused, and every norm, gate and residual in between is a kernel during which it idles. Weights of
numbers, of bytes and of int4 are taken (``graphopt.linear_int8``, ``linear_fp8``, ``linear_int4``);
programs of several rows keep what they have.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from graphopt.candidate import Candidate, CostDelta, NearMiss, Reason
from graphopt.capture.structure import Line, line_of
from graphopt.edit import Edit
from graphopt.passes import Pass, PassContext, Proposal
from graphopt.plugins import default_host
from graphopt.program import Level, Program
from graphopt.rules import argument
from graphopt_passes.head_norm import HeadNorm, head_norm
from graphopt_passes.memory_place import value_of

__all__ = ["FuseRowProduct"]

_aten = torch.ops.aten
_DTYPES = (torch.bfloat16, torch.float16)
_PACKED = ("graphopt::linear_int8", "graphopt::linear_fp8", "graphopt::linear_int4")
_START = 1.5e-6
"""Seconds until a kernel gets going and to its end, in a queue of others
(benchmarks/results/gpu_quantized.json)."""

_LEAST = 1 << 20
"""Numbers of a weight that are worth a kernel of their own."""


@dataclass(frozen=True)
class _Place:
    """``node`` multiplies ``x`` by a weight; ``root`` is the last of what is taken with it."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    scales: fx.Node | None
    bias: fx.Node | None
    norm: HeadNorm | None = None
    gate: str = ""
    added: fx.Node | None = None
    beyond: tuple[fx.Node, ...] = ()

    @property
    def root(self) -> fx.Node:
        return self.beyond[-1] if self.beyond else self.node

    @property
    def source(self) -> fx.Node:
        return self.x if self.norm is None else self.norm.input

    def operands(self) -> tuple[Any, ...]:
        """Of the operator."""
        norm = self.norm
        return (
            self.source, self.weight, self.scales, self.bias, None if norm is None else norm.weight,
            norm is not None, 0.0 if norm is None else norm.eps, 0.0 if norm is None else norm.offset,
            self.added, self.gate,
        )  # fmt: skip


@dataclass(frozen=True)
class FuseRowProduct(Pass):
    """Computes products of one row with their norm, gate or residual. ``everywhere``: also on devices that
    the operator has no kernel for, and small weights, where it gains nothing."""

    name: ClassVar[str] = "fuse-row-product"
    level: ClassVar[Level] = Level.SEMANTIC
    summary: ClassVar[str] = (
        "norm, product and gate or residual of a single row, in one reading of the weight"
    )
    after: ClassVar[dict[str, str]] = {
        "normalize": "casts and copies that do nothing hide what reads a product",
        "functionalize": "residuals that are added in place hide who reads them",
        "read-packed": "packed weights are read by products of their own",
    }
    before: ClassVar[dict[str, str]] = {
        "pack-linears": "a product with what is around it is not packed with others",
        "fuse-norm": "norms are taken in as models write them",
        "fuse-quantize": "norms are taken in as models write them",
    }

    everywhere: bool = False

    def propose(self, program: Program, ctx: PassContext) -> Iterable[Proposal]:
        if ctx.mode == "train":
            return
        line: Line | None = None
        for node in program.nodes():
            place = _place_of(node)
            if place is None or not _is_row(place.x):
                continue
            line = line or line_of(program.graph)
            reason = self._refusal(place, line)
            if reason is not None:
                yield NearMiss(self.name, node.name, 1, 1, reason)
                continue
            names = tuple(each.name for each in (place.node, *place.beyond))
            yield Candidate(
                f"{self.name}@{node.name}", self.name, names, _change(place, ctx), _fusing(place),
                exactness="reassociated",
            )  # fmt: skip

    def _refusal(self, place: _Place, line: Line) -> Reason | None:
        here = (place.node.name,)
        if "row-product" not in default_host().kernels():
            return Reason("the kernel row-product is not installed", here)
        x, weight = value_of(place.x), value_of(place.weight)
        if x is None or weight is None or not all(isinstance(size, int) for size in weight.shape):
            return Reason("the size of its weight is known at run time alone", here)
        if x.dtype not in _DTYPES:
            return Reason(f"rows of {str(x.dtype).removeprefix('torch.')} are left to libraries", here)
        if not x.is_cuda and not self.everywhere:
            return Reason(f"no kernel runs on {x.device.type}, where the operator gains nothing", here)
        if weight.numel() < _LEAST and not self.everywhere:
            return Reason(f"a weight of {weight.numel()} numbers is read in no time", here)
        if weight.dtype is torch.uint8 and x.shape[-1] != 2 * weight.shape[1]:
            return Reason(f"rows of {x.shape[-1]} are not whole blocks of codes", here)
        if weight.shape[1] * weight.element_size() % 16:
            return Reason("rows of the weight do not begin on 16 bytes", here)
        if not weight.is_contiguous():
            return Reason("rows of the weight are spread over memory", here)
        if place.node not in line.position:
            return Reason("nobody reads it", here)
        roots = line.aliases.roots
        read = {
            root for node in place.operands() if isinstance(node, fx.Node) for root in roots.get(node, ())
        }
        if read & line.aliases.written:
            return Reason("what it reads is written by the program", here)
        return None


def _is_row(node: fx.Node) -> bool:
    value = value_of(node)
    return value is not None and value.dim() > 0 and all(size == 1 for size in value.shape[:-1])


def _place_of(node: fx.Node) -> _Place | None:
    """The product that ``node`` is, with what is around it; ``None`` where it is no product with a weight."""
    place = _product_of(node)
    if place is None:
        return None
    norm = head_norm(place.x)
    # What a norm is of may be of another dtype, which the kernel does not read.
    if norm is not None and _dtype(norm.input) == _dtype(place.x):
        place = _Place(place.node, place.x, place.weight, place.scales, place.bias, norm)
    return _with_gate(place) or _with_residual(place) or place


def _product_of(node: fx.Node) -> _Place | None:
    packed = getattr(getattr(node.target, "_schema", None), "name", "") in _PACKED
    if not packed and node.target is not _aten.linear.default:
        return None
    x, weight, scales, bias = _arguments(node)
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or value_of(node) is None:
        return None
    if not packed and weight.op not in ("placeholder", "get_attr"):
        return None
    known = value_of(weight)
    if known is None or known.dim() != 2 or (scales is None and _dtype(weight) != _dtype(x)):
        return None
    return _Place(node, x, weight, scales, bias)


def _arguments(node: fx.Node) -> tuple[Any, Any, Any, Any]:
    """What is multiplied, by what, its scales, and the bias."""
    if node.target is _aten.linear.default:
        return node.args[0], node.args[1], None, argument(node, "bias")
    x, weight, scales, bias = node.args[:4]
    return x, weight, scales, bias


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = value_of(node)
    return None if value is None else value.dtype


def _only(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _with_gate(place: _Place) -> _Place | None:
    """With the product's halves, one of which gates the other."""
    split = _only(place.node)
    if split is None or split.target not in (
        _aten.split_with_sizes.default,
        _aten.split.Tensor,
        _aten.chunk.default,
    ):
        return None
    parts = {user.args[1]: user for user in split.users if user.target is operator.getitem}
    if len(parts) != 2 or len(split.users) != 2 or parts.keys() != {0, 1}:
        return None
    value, first, second = value_of(place.node), value_of(parts[0]), value_of(parts[1])
    if value is None or first is None or second is None or first.shape != second.shape:
        return None
    if first.shape[:-1] != value.shape[:-1] or 2 * first.shape[-1] != value.shape[-1]:
        return None
    gated, product = _only(parts[0]), _only(parts[1])
    gate = None if gated is None else _gate_of(gated)
    if gated is None or gate is None or product is None or _only(gated) is not product:
        return None
    if product.target is not _aten.mul.Tensor or {*product.args[:2]} != {gated, parts[1]}:
        return None
    return _Place(
        place.node, place.x, place.weight, place.scales, place.bias, place.norm, gate,
        beyond=(split, parts[0], parts[1], gated, product),
    )  # fmt: skip


def _gate_of(node: fx.Node) -> str | None:
    if node.target is _aten.silu.default:
        return "silu"
    if node.target is _aten.gelu.default:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(argument(node, "approximate"))
    return None


def _with_residual(place: _Place) -> _Place | None:
    """With the sum that the product is one term of."""
    total = _only(place.node)
    if total is None or total.target is not _aten.add.Tensor or argument(total, "alpha") != 1:
        return None
    others = [term for term in total.args[:2] if term is not place.node]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    value, other, result = value_of(place.node), value_of(others[0]), value_of(total)
    if value is None or other is None or result is None:
        return None
    if not value.shape == other.shape == result.shape or not value.dtype == other.dtype == result.dtype:
        return None
    return _Place(
        place.node, place.x, place.weight, place.scales, place.bias, place.norm, added=others[0],
        beyond=(total,),
    )  # fmt: skip


def _change(place: _Place, ctx: PassContext) -> CostDelta:
    """The weight at the rate of memory, against the product and the calls around it as they are priced."""
    weight = place.weight.meta["val"]
    size = math.prod(weight.shape) * weight.element_size()
    fused = size / ctx.cost.device.read_bytes_per_second + _START
    apart = sum(
        ctx.cost.node(node).seconds for node in (place.node, *place.beyond) if value_of(node) is not None
    )
    if place.norm is not None and all(_only(node) is not None for node in place.norm.nodes):
        apart += sum(ctx.cost.node(node).seconds for node in place.norm.nodes)
    return CostDelta(seconds=fused - apart)


def _fusing(place: _Place) -> Callable[[Edit], None]:
    """What is added, or normalized, may be the result of a rewrite before this one: it is read off those that
    read it, when the time has come."""
    product, beyond = place.node.name, tuple(node.name for node in place.beyond)
    norm = place.norm
    reader, argument_at = "", 0
    if norm is not None:
        reader, argument_at = next(
            (node.name, index)
            for node in sorted(norm.nodes, key=lambda node: node.name)
            for index, given in enumerate(node.args)
            if given is norm.input
        )

    def apply(edit: Edit) -> None:
        root = edit.node(beyond[-1] if beyond else product)
        node = edit.node(product)
        _, _, _, _, weights, normed, eps, offset, added, gate = place.operands()
        x, weight, scales, bias = _arguments(node)
        if normed:
            x = edit.node(reader).args[argument_at]
        if added is not None:
            (added,) = (term for term in root.args[:2] if term is not node)
        given = (x, weight, scales, bias, weights, normed, eps, offset, added, gate)
        made = edit.call_before(
            root, torch.ops.graphopt.row_product.default, given, replaces=(node, *map(edit.node, beyond))
        )
        edit.replace(root, made)

    return apply
