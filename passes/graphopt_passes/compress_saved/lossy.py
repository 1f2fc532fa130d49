"""quantize-saved: hold floating-point values in a few bits for the backward. Results change.

Before::

    forward:   %y = aten.mm(%x, %w) : f32[N]                                      saves %y, 4 N bytes
    backward:  %d = aten.mm(%g, %y)

After, with 8 bits::

    forward:   %c, %r = graphopt.quantize_groups(%y, 3, 8) : u8[N], f32[N / 256, 2]     saves both
    backward:  %z = graphopt.dequantize_groups(%c, %r, ...) : f32[N]
               %d = aten.mm(%g, %z)

==========  ===========================================  ===========================================
rule        holds                                        error
==========  ===========================================  ===========================================
``groups``  codes of a codec, ``groups-8`` by default    the codec's; none in the mean if it is unbiased
``levels``  which piece of an activation's derivative    the derivative is a level of its piece: the most
            an input lies in                             that it is off is in the candidate
==========  ===========================================  ===========================================

A gradient that is linear in a value has the right mean if what is read in its place has (ActNN, Chen et
al. 2021); where a reader is not linear, or rounding is not random, gradients are biased in the second
order. By default, therefore, only values are packed that products with a gradient alone read. Forward
results never change: the forward reads what it computed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.candidate import Declined, NearMiss, Reason
from graphopt.errors import PassError
from graphopt.passes import Pass, PassContext, Proposal
from graphopt.plugins import CodecSpec, default_host
from graphopt.program import Level, Program
from graphopt_passes.compress_saved.levels import levels_of
from graphopt_passes.compress_saved.packing import Packing, needs_less, operator_of, reduce_reads
from graphopt_passes.compress_saved.price import candidate_of
from graphopt_passes.compress_saved.rewrite import Rewriter
from graphopt_passes.compress_saved.saved import Read, SavedValue, SavedValues

__all__ = ["QuantizeSaved"]

_aten = torch.ops.aten

# Products of a gradient with a value, and which arguments they are linear in one by one.
_LINEAR: dict[object, tuple[int, ...]] = {
    _aten.mm.default: (0, 1),
    _aten.bmm.default: (0, 1),
    _aten.mul.Tensor: (0, 1),
    _aten.convolution_backward.default: (1, 2),
}

# Backwards of elementwise activations, ``op(grad, x, ...)``, that read the activation's input.
_ACTIVATIONS = frozenset(
    {
        _aten.gelu_backward.default, _aten.silu_backward.default, _aten.mish_backward.default,
        _aten.softplus_backward.default, _aten.hardswish_backward.default,
    }
)  # fmt: skip


@dataclass(frozen=True)
class QuantizeSaved(Pass):
    """``codec`` holds values, see ``graphopt_codecs``; ``activation_bits`` (1, 2 or 4) the inputs of
    activations, 0 leaves those to the codec. ``unbiased``: pack only where gradients keep their mean, which
    leaves out activations. ``least_bytes``: smaller values are left as they are."""

    name: ClassVar[str] = "quantize-saved"
    level: ClassVar[Level] = Level.JOINT
    summary: ClassVar[str] = "hold floating-point values in a few bits for the backward"
    exact: ClassVar[bool] = False
    before: ClassVar[dict[str, str]] = {
        "insert-checkpoints": "schedules are chosen for what is there to be saved"
    }

    codec: str = "groups-8"
    activation_bits: int = 4
    unbiased: bool = True
    least_bytes: int = 65536

    def __post_init__(self) -> None:
        if self.activation_bits not in (0, 1, 2, 4):
            raise PassError(
                f"quantize-saved: activation_bits={self.activation_bits!r}: expected 0, 1, 2 or 4"
            )
        if not isinstance(self.least_bytes, int) or self.least_bytes < 0:
            raise PassError(
                f"quantize-saved: least_bytes={self.least_bytes!r}: expected a whole number, 0 or more"
            )

    def propose(self, program: Program, ctx: PassContext) -> Iterable[Proposal]:
        if ctx.mode != "train":
            return
        if program.has_symbolic_sizes:
            # Asking how large a value is would bind the program to the present sizes.
            why = "sizes are symbolic: packed values have a fixed length"
            yield Declined(f"{self.name}@{program.name}", why)
            return
        values, codec = SavedValues(program), default_host().codec(self.codec)
        for stream, value in enumerate(values):
            tensor: torch.Tensor = value.node.meta["val"]
            if value.bytes < self.least_bytes or not tensor.is_floating_point():
                continue
            found = self._packing(value, values, codec, stream)
            if isinstance(found, Reason):
                yield NearMiss(self.name, value.node.name, 1, 2, found)
            else:
                yield candidate_of(self.name, found, values, ctx)

    def _packing(
        self, value: SavedValue, values: SavedValues, codec: CodecSpec, stream: int
    ) -> Packing | Reason:
        obstacle = values.obstacle(value)
        if obstacle is not None:
            return obstacle
        if not self.unbiased and self.activation_bits and all(map(_is_activation, value.reads)):
            return _levels(value, self.activation_bits)
        # ReLU's backward reads the sign of a value alone: that is held as it is, beside the codes.
        less = tuple(read for read in value.reads if needs_less(read, values))
        rest = tuple(read for read in value.reads if read not in less)
        if not rest:
            return Reason("its readers need less than the value: compress-saved packs it", (value.node.name,))
        if self.unbiased:
            if not codec.unbiased:
                return Reason(f"codec {codec.name!r} is biased: unbiased=False takes it", (value.node.name,))
            bent = next((read.reader for read in rest if not _is_linear(read, values)), None)
            if bent is not None:
                return Reason(f"{bent.target} is not a product: unbiased=False packs it", (bent.name,))
        return _groups(value, codec, stream, less, rest)


def _is_linear(read: Read, values: SavedValues) -> bool:
    """Whether the reader is a product of a gradient with the value, once."""
    reader = read.reader
    places = [index for index, arg in enumerate(reader.args) if arg is read.view]
    same = [arg for arg in reader.all_input_nodes if values.root(arg) == values.root(read.view)]
    return (
        reader in values.driven
        and len(places) == 1
        and len(same) == 1
        and places[0] in _LINEAR.get(reader.target, ())
    )


def _is_activation(read: Read) -> bool:
    """Whether the reader multiplies a gradient with the derivative at the value, and the product lies in
    memory as the reader's result does."""
    reader = read.reader
    if reader.target not in _ACTIVATIONS or reader.args[1] is not read.view or reader.args[0] is read.view:
        return False
    grad, x = (node.meta["val"] for node in reader.args[:2] if isinstance(node, fx.Node))
    made, result = _torch.call_on_fakes(x, _aten.mul.Tensor, (grad, x), {}), reader.meta["val"]
    same: bool = (
        made.stride() == result.stride() and made.shape == result.shape and made.dtype == result.dtype
    )
    return same


def _groups(
    value: SavedValue, codec: CodecSpec, stream: int, less: tuple[Read, ...], rest: tuple[Read, ...]
) -> Packing | Reason:
    """``rest`` read what the codec gives back, ``less`` conditions that are held in bits."""
    kernels = default_host().kernels()
    missing = [name for name in (codec.pack, codec.unpack) if name not in kernels]
    if missing:
        return Reason(f"no plugin offers kernel {missing[0]!r}")
    pack, unpack = kernels[codec.pack], kernels[codec.unpack]
    tensor: torch.Tensor = value.node.meta["val"]
    reason: Reason | None = pack.supports(tensor, stream, *codec.constants)
    if reason is not None:
        return Reason(reason.text, (value.node.name,))
    packed = -(-int(tensor.numel() * codec.bits) // 8) + len(less) * -(-tensor.numel() // 8)
    if packed >= value.bytes:
        return Reason(f"codec {codec.name!r} would take as many bytes", (value.node.name,))

    def hold(rewriter: Rewriter, value: SavedValue) -> None:
        node = value.node
        reduce_reads(rewriter, replace(value, reads=less))
        held = rewriter.pack(node, node, operator_of(pack.op), pack.reference, stream, *codec.constants)
        layout = (list(tensor.shape), list(tensor.stride()), tensor.dtype, *codec.constants)
        rewriter.feed(
            node,
            rest,
            lambda reader: rewriter.unpack(held, reader, operator_of(unpack.op), unpack.reference, *layout),
        )

    return Packing("groups", value, packed, 2 * (value.bytes + packed), 2, hold, codec.error, codec.metric)


def _levels(value: SavedValue, bits: int) -> Packing | Reason:
    kernels = default_host().kernels()
    missing = [name for name in ("pack-levels", "unpack-levels") if name not in kernels]
    if missing:
        return Reason(f"no plugin offers kernel {missing[0]!r}")
    pack, unpack = operator_of(kernels["pack-levels"].op), operator_of(kernels["unpack-levels"].op)
    packed = sum(-(-_count(read) * bits // 8) for read in value.reads)
    if packed >= value.bytes:
        return Reason("packed it would take as many bytes", (value.node.name,))

    def hold(rewriter: Rewriter, value: SavedValue) -> None:
        for read in value.reads:
            reader, view = read.reader, rewriter.viewed_ahead(read.view, value.node)
            tensor: torch.Tensor = read.view.meta["val"]
            found = levels_of(reader.target, *_constants(reader), bits)
            held = rewriter.hold(view, value.node, pack, list(found.thresholds), bits)
            layout = (list(tensor.shape), list(tensor.stride()), tensor.dtype)
            slope = rewriter.edit.call_before(reader, unpack, (held, *layout, list(found.levels), bits))
            product = rewriter.edit.call_before(
                reader, _aten.mul.Tensor, (reader.args[0], slope), replaces=(reader,)
            )
            rewriter.edit.replace(reader, product)

    error = max(levels_of(read.reader.target, *_constants(read.reader), bits).error for read in value.reads)
    traffic = 2 * (value.bytes + packed)
    return Packing("levels", value, packed, traffic, 3, hold, error, "difference of the derivative")


def _constants(reader: fx.Node) -> tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]:
    """What an activation's backward takes beside gradient and input."""
    return reader.args[2:], tuple(sorted(reader.kwargs.items()))


def _count(read: Read) -> int:
    tensor: torch.Tensor = read.view.meta["val"]
    return tensor.numel()
