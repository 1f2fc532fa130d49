"""An encoder as a program of its own, which reads each source once.

    encode(weights.., input_ids [B, T], attention_mask [B, T]) -> last_hidden_state [B, T, D], ..

Sizes are symbols as far as the encoder takes any: the batch always, the length of text, that of sounds where
its convolutions allow it. What it was captured for and nothing else is what it runs on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.decoding.check import SHARE
from graphopt.decoding.encoder import Encoder, evaluating
from graphopt.errors import CaptureError, VerificationError, brief

__all__ = ["EncodeGraph", "capture_encoder", "check_encoder"]

_CHECKED = (5, 11, 16, 24)
"""Lengths of text that are encoded and compared, some of which blocks of local attention divide."""


@dataclass(frozen=True)
class EncodeGraph:
    """A graph whose placeholders are weights, then ``inputs``, one for each argument of ``arguments``, and
    which gives the tensors that the encoder gives. ``names``: dotted names of weights."""

    gm: fx.GraphModule
    weights: dict[str, torch.Tensor]
    names: dict[str, str]
    inputs: tuple[str, ...]
    arguments: tuple[str, ...]

    def takes(self, given: Mapping[str, torch.Tensor]) -> bool:
        """Whether it is for arguments of these sizes and kinds."""
        if set(given) != set(self.arguments):
            return False
        for argument, node in zip(self.arguments, self._placeholders(), strict=True):
            like, value = node.meta["val"], given[argument]
            if value.dtype is not like.dtype or value.dim() != like.dim() or value.device != like.device:
                return False
            sizes = zip(like.shape, value.shape, strict=True)
            if any(type(size) is int and size != found for size, found in sizes):
                return False
        return True

    def _placeholders(self) -> list[fx.Node]:
        nodes = {node.name: node for node in self.gm.graph.nodes if node.op == "placeholder"}
        return [nodes[name] for name in self.inputs]

    def shapes(
        self, encoder: Encoder, batch: int, rows: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of inputs of which the encoder gives about ``rows`` rows for ``batch``
        sequences."""
        found = {}
        example = encoder(encoder.example)[0].shape[1]
        for name, node in zip(self.inputs, self._placeholders(), strict=True):
            value = node.meta["val"]
            sizes = [
                -(-_torch.hint(size) * rows // example) if isinstance(size, torch.SymInt) else int(size)
                for size in value.shape
            ]
            found[name] = ((batch, *sizes[1:]), value.dtype)
        return found


class _Tensors(torch.nn.Module):
    """An encoder as a function of its arguments to its tensors."""

    def __init__(self, encoder: Encoder, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.encoder, self.names = encoder.module, encoder, tuple(names)

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = self.module(**dict(zip(self.names, values, strict=True)))
        return self.encoder.tensors(made)


def capture_encoder(encoder: Encoder) -> EncodeGraph:
    """Capture ``encoder`` on its example. Raises ``CaptureError`` where its batch, or the length of text,
    cannot be a symbol."""
    names = tuple(encoder.example)
    values = tuple(encoder.example.values())
    wrapped = _Tensors(encoder, names)
    why: Exception | None = None
    for dynamic in _dynamic(encoder):
        try:
            with evaluating(encoder.module), torch.no_grad(), _torch.quiet_capture():
                program = torch.export.export(wrapped, values, dynamic_shapes=(dynamic,), strict=False)
        except Exception as error:  # what export runs into cannot be listed
            why = why or error
            continue
        graph = _graph_of(program, names)
        if _takes_longer(graph, encoder):
            return graph
    said = brief(why) if why is not None else "its program gives something else for other sizes"
    raise CaptureError(f"the encoder could not be captured: {said}")


def _dynamic(encoder: Encoder) -> Iterator[tuple[dict[int, Any], ...]]:
    """Which sizes are symbols, the most first."""
    some = torch.export.Dim.DYNAMIC
    last = {name: max(1, value.dim() - 1) for name, value in encoder.example.items()}
    if encoder.is_text:
        yield tuple({0: some, 1: some} for _ in last)
        return
    yield tuple({0: some, dim: some} for dim in last.values())
    yield tuple({0: some, 1: some} for _ in last)
    yield tuple({0: some} for _ in last)


def _takes_longer(graph: EncodeGraph, encoder: Encoder) -> bool:
    """Whether sizes that are symbols are any sizes: export lets some be computed with as they were."""
    longer = {}
    for argument, node in zip(graph.arguments, graph._placeholders(), strict=True):
        value = encoder.example[argument]
        for dim, size in enumerate(node.meta["val"].shape):
            if dim and isinstance(size, torch.SymInt):
                count = value.shape[dim] * 3 // 2 + 1
                value = torch.cat([value, value], dim).narrow(dim, 0, count).contiguous()
        longer[argument] = value
    try:
        expected = encoder(longer)
    except (RuntimeError, IndexError):
        return True  # the encoder itself takes no longer ones
    try:
        with torch.no_grad():
            found = graph.gm(*graph.weights.values(), *longer.values())
    except (RuntimeError, IndexError):
        return False
    return all(
        one.shape == other.shape and torch.allclose(one, other, rtol=1e-2, atol=1e-2)
        for one, other in zip(expected, found, strict=True)
    )


def _graph_of(program: torch.export.ExportedProgram, names: tuple[str, ...]) -> EncodeGraph:
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        what = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
        raise CaptureError(f"the encoder writes {what[0]!r} as it runs: it keeps a state of its own")
    fqns = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    tensors = {**program.state_dict, **program.constants}
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    for node in list(graph.nodes):
        if node.op == "call_function" and str(node.target).startswith("aten._assert_tensor_metadata"):
            graph.erase_node(node)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    weights = {node.name: tensors[fqns[node.name]] for node in placeholders if node.name in fqns}
    inputs = tuple(node.name for node in placeholders if node.name not in fqns)
    fqn = {name: fqns[name].removeprefix("module.") for name in weights}
    return EncodeGraph(fx.GraphModule(torch.nn.Module(), graph), weights, fqn, inputs, names)


def check_encoder(graph: EncodeGraph, gm: fx.GraphModule, encoder: Encoder, most: int) -> None:
    """Compare ``gm``, ``graph`` after it was rewritten, with the encoder itself on sources of several lengths
    up to ``most``, the last one of each two padded. Raises ``VerificationError`` where they differ."""
    lengths = sorted({min(rows, most) for rows in _CHECKED})
    for rows in lengths if encoder.is_text else (None,):
        given = encoder.sample(2, True, rows)
        expected = encoder(given)
        arguments = (given[name] for name in graph.arguments)
        try:
            with torch.no_grad():
                found = gm(*graph.weights.values(), *arguments)
        except RuntimeError as error:
            raise VerificationError(
                f"the captured encoder does not run sources of {list(given[encoder.main].shape)}: "
                f"{brief(error)}"
            ) from error
        for name, one, other in zip(encoder.keys, expected, found, strict=True):
            allowed = SHARE.get(one.dtype, 0.0) * max(1.0, float(one.abs().max()))
            off = float((one - other).abs().max()) if one.shape == other.shape else float("inf")
            if not off <= allowed:
                raise VerificationError(
                    f"the captured encoder gives another {name} for {list(given[encoder.main].shape)} than "
                    f"the encoder: off by {off:.3g}, at most {allowed:.3g} is allowed"
                )
