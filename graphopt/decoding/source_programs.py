"""What runs once for each source: the encoder, and what is made of its output and kept.

    encode   input_ids [B, T] -> last_hidden_state [B, T, D]
    read     last_hidden_state -> keys and values of each attention to it, in stores
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx

from graphopt.decoding.arithmetic import Before
from graphopt.decoding.capture import Uncached, source_shapes
from graphopt.decoding.encode import EncodeGraph, capture_encoder, check_encoder
from graphopt.decoding.encoder import Encoder
from graphopt.decoding.options import Generate
from graphopt.decoding.reading import ReadGraph, read_graph, shown_tensors
from graphopt.decoding.rewritten import rewritten, roles
from graphopt.decoding.sites import Site, tensors_of
from graphopt.errors import CaptureError, InputsError, VerificationError, brief
from graphopt.program import InputSpec, Program

if TYPE_CHECKING:
    from graphopt.session import Session

__all__ = ["SourcePrograms", "source_programs"]


@dataclass
class SourcePrograms:
    """``reading`` and ``reads``, what runs it; ``encoding`` and ``encodes`` for the encoder, ``None`` where
    it runs as it did; ``before``: what the planner is to know of them."""

    encoder: Encoder
    reading: ReadGraph
    reads: fx.GraphModule
    programs: tuple[Program, ...]
    before: tuple[Before, ...]
    encoding: EncodeGraph | None
    encodes: fx.GraphModule | None
    session: Session

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """By placeholder."""
        return {**self.reading.weights, **(self.encoding.weights if self.encoding is not None else {})}

    @property
    def names(self) -> dict[str, str]:
        """Dotted names of the encoder's weights, by placeholder."""
        return self.encoding.names if self.encoding is not None else {}

    def read(self, values: Mapping[str, torch.Tensor]) -> None:
        """Write what is made of a source into the stores; ``values`` by placeholder, stores included."""
        reading = self.reading
        with torch.no_grad():
            self.reads(*reading.weights.values(), *(values[name] for name in reading.inputs))

    def encode(self, given: Mapping[str, Any]) -> Any:
        """What the encoder returns of its arguments.

        What its program is not for runs as it did, and the report says so; raises ``InputsError`` where there
        is a budget, which that is not accounted for in.
        """
        tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        graph, why = self.encoding, ""
        if graph is not None and self.encodes is not None:
            if graph.takes(tensors):
                arguments = (tensors[name] for name in graph.arguments)
                try:
                    with torch.no_grad():
                        made = self.encodes(*graph.weights.values(), *arguments)
                    return self.encoder.output(tuple(made))
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:  # what was assumed of sizes as it was captured
                    why = f": {brief(error)}"
            self._tell(f"sources like {_kinds(tensors)} are encoded as the model does{why}")
        with torch.no_grad():
            return self.encoder.module(**given)

    def _tell(self, what: str) -> None:
        if self.session.budget.memory is not None:
            raise InputsError(f"{what}: the budget was planned for those that the program is for")
        if what not in self.session.diagnostics:
            self.session.diagnostics.append(what)


def source_programs(
    uncached: Uncached, sites: Sequence[Site], options: Generate, session: Session
) -> SourcePrograms | None:
    """The programs of a decoder that reads a source; ``None`` for one that reads none.

    An encoder that cannot be captured runs as it did, and a diagnostic says why; with ``on_error="raise"``,
    and where there is a budget of memory, the reason is raised.
    """
    source = uncached.source
    if source is None:
        return None
    batch, capacity = options.max_batch, options.max_tokens
    reading = read_graph(uncached, sites, batch, capacity)
    read = rewritten("read", reading.gm, roles(reading, uncached), uncached.inputs, session)
    shapes = {
        **dict.fromkeys(uncached.inputs, ((batch, 1), torch.int64)),
        **source_shapes(uncached, batch),
        **{name: (shape, torch.bool) for name, shape in shown_tensors(sites, batch).items()},
    }
    kinds = tensors_of(sites, batch, capacity)
    shapes |= {name: kinds[key] for name, key in reading.stores.items()}
    before = [
        Before(
            "read", "reading a source", read.gm, reading.weights, {n: shapes[n] for n in reading.inputs}
        )
    ]
    programs = [read]
    encoding = encodes = None
    try:
        encoding = capture_encoder(source.encoder)
        encode = rewritten("encode", encoding.gm, _roles(encoding), encoding.inputs, session)
        encodes = encode.gm
        check_encoder(encoding, encodes, source.encoder, source.most)
        at_most = encoding.shapes(source.encoder, batch, source.most)
        before.append(Before("encode", "encoding a source", encodes, encoding.weights, at_most, True))
        programs.append(encode)
    except (CaptureError, VerificationError) as error:
        if session.on_error == "raise" or session.budget.memory is not None:
            raise
        session.diagnostics.append(f"the encoder runs as it did: {error.message}")
        encoding = encodes = None
    return SourcePrograms(
        source.encoder, reading, read.gm, tuple(programs), tuple(before), encoding, encodes, session
    )


def _roles(graph: EncodeGraph) -> list[InputSpec]:
    specs = []
    for node in graph.gm.graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in graph.weights:
            is_parameter = isinstance(graph.weights[node.name], torch.nn.Parameter)
            role = "parameter" if is_parameter else "buffer"
            specs.append(InputSpec(node.name, role, graph.names.get(node.name, "")))
        else:
            specs.append(InputSpec(node.name, "input", node.name))
    return specs


def _kinds(tensors: Mapping[str, torch.Tensor]) -> str:
    return ", ".join(f"{name} {value.dtype} {list(value.shape)}" for name, value in tensors.items())
