"""fold-batch-norm: in inference a batch norm becomes part of the convolution before it.

Before::

    %1 = aten.conv2d(%x, %w, None, [1, 1], [1, 1])
    %2 = aten.batch_norm(%1, %gamma, %beta, %mean, %var, False, 0.1, 1e-05, True)

After::

    scale = gamma * rsqrt(var.to(f64) + 1e-05)
    %7 = (%w * scale.view(-1, 1, 1, 1)).to(f32)    %9 = (beta - mean * scale).to(f32)
    %2 = aten.conv2d(%x, %7, %9, [1, 1], [1, 1])

Weights stay where they are and may be loaded anew; the scaled copy is made at every call, right before the
convolution, and lives as long as it runs. That pays where the norm is a pass over the values of its own and
the bias is none.

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.candidate import Candidate, CostDelta, NearMiss, Reason
from graphopt.capture.aliasing import written_inputs
from graphopt.capture.structure import Line, line_of
from graphopt.edit import Edit
from graphopt.passes import Pass, PassContext, Proposal
from graphopt.program import Level, Program
from graphopt.rules import argument

__all__ = ["FoldBatchNorm", "adds_bias_last"]

_aten = torch.ops.aten
_PLAIN = (
    _aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default, _aten.conv1d.padding,
    _aten.conv2d.padding, _aten.conv3d.padding,
)  # fmt: skip
_TRANSPOSED = (_aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.conv_transpose3d.input)
_EXACT = (torch.float32, torch.float64)
_METRIC = "distance from float64 beyond that of separate operators, as a share of theirs"
_FURTHER = 0.1
_BIAS_FIRST = 2.0
"""In that metric, and asserted by the tests for each kind of convolution with one thread and two. On CPUs
sums may begin with the bias, which every later partial sum then carries: those of depthwise convolutions do
everywhere, those of 1 x 1 with several threads or strides, and without AVX-512 all do
(benchmarks/folded_norms.py). Libraries choose by the sizes of groups: all that are grouped count as such."""

_SMALL = 7
"""Kernels over one number for each channel, where each call is one."""


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Folds batch norms with running statistics into the convolutions before them. Not exact: results are
    rounded once, where separate operators round three times.

    Options:
        bias_first: On CPUs, folds into convolutions whose sums begin with the bias as well: 1 x 1 and grouped
            ones, all without AVX-512. They err up to 3 times as far from float64 as separate operators do,
            others 1.1 times.
    """

    bias_first: bool = False

    name: ClassVar[str] = "fold-batch-norm"
    level: ClassVar[Level] = Level.SEMANTIC
    exact: ClassVar[bool] = False
    summary: ClassVar[str] = "make batch norms part of the convolutions before them, in inference"
    after: ClassVar[dict[str, str]] = {
        "normalize": "casts and dropout that do nothing stand between",
        "functionalize": "results that are written in place hide who reads them",
    }

    def propose(self, program: Program, ctx: PassContext) -> Iterable[Proposal]:
        norms = list(program.nodes(_aten.batch_norm.default))
        if not norms:
            return
        line = line_of(program.graph)
        for norm in norms:
            if norm not in line.position:
                continue  # nobody reads it
            convolution = norm.args[0]
            if not isinstance(convolution, fx.Node) or convolution.target not in (*_PLAIN, *_TRANSPOSED):
                continue
            reason = _reason(convolution, norm, line, ctx)
            names = (convolution.name, norm.name)
            first = _bias_first(convolution)
            if reason is None and first and not self.bias_first:
                said = "its sums begin with the bias, and would err further (bias_first=true)"
                reason = Reason(said, names)
            if reason is not None:
                yield NearMiss(self.name, norm.name, 2, 2, reason)
                continue
            error = _BIAS_FIRST if first else _FURTHER
            delta = CostDelta(seconds=_seconds(convolution, norm, ctx), error=error)
            yield Candidate(
                f"{self.name}@{norm.name}", self.name, names, delta, _folding(*names),
                exactness="lossy", metric=_METRIC,
            )  # fmt: skip


def _reason(convolution: fx.Node, norm: fx.Node, line: Line, ctx: PassContext) -> Reason | None:
    here = (convolution.name, norm.name)
    if argument(norm, "training") is not False:
        return Reason("the statistics are those of the batch", here)
    if ctx.mode != "infer":
        return Reason("gradients flow through both: in training they stay apart", here)
    for user in convolution.users:
        if user is not norm:
            what = "an output of the program" if user.op == "output" else "read by another call as well"
            return Reason(f"the convolution's result is {what}", (convolution.name, user.name))
    return _reason_of_kind(convolution, norm) or _reason_of_place(convolution, norm, line)


def _reason_of_kind(convolution: fx.Node, norm: fx.Node) -> Reason | None:
    here = (convolution.name, norm.name)
    result, weight = convolution.meta["val"], argument(convolution, "weight").meta["val"]
    if result.dim() != weight.dim():
        return Reason("the convolution is of one sample, and the norm takes its rows for channels", here)
    if convolution.target in _TRANSPOSED and argument(convolution, "groups") != 1:
        return Reason("the convolution is transposed and grouped", here)
    if result.dtype not in _EXACT or weight.dtype is not result.dtype:
        name = str(result.dtype).removeprefix("torch.")
        return Reason(f"weight and bias would be rounded to {name} once more", here)
    parts = [argument(norm, name) for name in ("weight", "bias", "running_mean", "running_var")]
    parts.append(argument(convolution, "bias"))
    known = [part.meta["val"] for part in parts if isinstance(part, fx.Node)]
    if any(value.dtype is not result.dtype for value in known):
        return Reason("statistics and weights are of another type than the result", here)
    if not isinstance(argument(norm, "eps"), (int, float)):
        return Reason("eps is not a known number", here)
    return None


def _reason_of_place(convolution: fx.Node, norm: fx.Node, line: Line) -> Reason | None:
    """What stands in the way of computing it where the convolution stands."""
    here = (convolution.name, norm.name)
    first, last = line.position[convolution], line.position[norm]
    ambient = line.ambient
    unknown = ambient.unknown is not None and ambient.unknown[0] <= last
    if unknown or ambient.states[first].key != ambient.states[last].key:
        return Reason("autocast or the gradient mode changes in between", here)
    roots = line.aliases.roots
    read = norm.all_input_nodes[1:]
    late = next((node for node in read if line.position.get(node, -1) >= first), None)
    if late is not None:
        return Reason("a part of the norm is computed after the convolution", (norm.name, late.name))
    memory = {root for node in (convolution, *read) for root in roots[node]}
    for node in line.nodes[first:last]:
        if memory & {root for ref in written_inputs(node) for root in roots[ref]}:
            return Reason("what the norm reads is written in between", (norm.name, node.name))
    return None


def _bias_first(convolution: fx.Node) -> bool:
    """Whether the libraries of CPUs begin its sums with the bias."""
    weight = argument(convolution, "weight").meta["val"]
    single = all(size == 1 for size in weight.shape[2:])
    grouped = argument(convolution, "groups") != 1
    return weight.device.type == "cpu" and (single or grouped or not adds_bias_last())


def adds_bias_last() -> bool:
    """Whether this CPU is of a kind on which sums of dense convolutions were seen to take the bias last."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def _seconds(convolution: fx.Node, norm: fx.Node, ctx: PassContext) -> float:
    """Predicted change: the norm's pass over the values, against the scaled weights and the bias."""
    device = ctx.cost.device
    value, weight = norm.meta["val"], argument(convolution, "weight").meta["val"]
    fused = ctx.emit != "eager"
    whole = 2 * _torch.hint(value.numel()) * value.element_size() / device.copy_bytes_per_second
    saved = whole + device.launch_seconds
    if fused and any(_is_pointwise(user) for user in norm.users):
        saved = 0.0  # it is computed in the kernel of its reader anyway
    elif device.kind == "cuda" and argument(convolution, "bias") is None:
        saved = 0.0  # the library leaves the bias to a pass of its own
    size = weight.element_size()
    moved = int(weight.numel()) * (2 * size if fused else 2 * (size + torch.float64.itemsize))
    kernels = 2 if fused else 2 + _SMALL
    change: float = moved / device.copy_bytes_per_second + kernels * device.launch_seconds - saved
    return change


def _is_pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _folding(convolution_name: str, norm_name: str) -> Callable[[Edit], None]:
    def apply(edit: Edit) -> None:
        convolution, norm = edit.node(convolution_name), edit.node(norm_name)

        def call(target: Any, *args: Any) -> fx.Node:
            return edit.call_before(convolution, target, args, replaces=(norm,))

        gamma, beta, mean, variance = (
            argument(norm, name) for name in ("weight", "bias", "running_mean", "running_var")
        )
        weight, bias = argument(convolution, "weight"), argument(convolution, "bias")
        dtype = weight.meta["val"].dtype
        # What is wider than its operands is rounded once, at the end.
        scale = call(_aten.add.Scalar, call(_aten.to.dtype, variance, torch.float64), argument(norm, "eps"))
        scale = call(_aten.rsqrt.default, scale)
        if gamma is not None:
            scale = call(_aten.mul.Tensor, gamma, scale)
        shape = [1] * weight.meta["val"].dim()
        shape[1 if convolution.target in _TRANSPOSED else 0] = -1
        scaled = call(_aten.mul.Tensor, weight, call(_aten.view.default, scale, shape))
        if bias is None:
            moved = call(_aten.mul.Tensor, mean, scale)
            shift = call(_aten.neg.default, moved) if beta is None else call(_aten.sub.Tensor, beta, moved)
        else:
            shift = call(_aten.mul.Tensor, call(_aten.sub.Tensor, bias, mean), scale)
            shift = shift if beta is None else call(_aten.add.Tensor, shift, beta)
        if dtype is not torch.float64:
            scaled, shift = (call(_aten.to.dtype, part, dtype) for part in (scaled, shift))
        new = edit.call_before(
            convolution, convolution.target, _with(convolution, scaled, shift), replaces=(convolution, norm)
        )
        edit.replace(norm, new)

    return apply


def _with(convolution: fx.Node, weight: fx.Node, bias: fx.Node) -> Sequence[Any]:
    """The arguments of a convolution with another weight and bias, all by position."""
    schema = _torch.schema_of(convolution.target)
    assert schema is not None
    given = {"weight": weight, "bias": bias}
    return [given.get(part.name, argument(convolution, part.name)) for part in schema.arguments]
