"""Programs of a decoder at the semantic level, passes run over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from graphopt.capture.semantic import semantic_program
from graphopt.decoding.capture import Uncached
from graphopt.decoding.insert import StepGraph
from graphopt.decoding.reading import ReadGraph
from graphopt.decoding.sizes import compute_sizes
from graphopt.program import InputSpec, Program

if TYPE_CHECKING:
    from graphopt.session import Session

__all__ = ["rewritten", "roles"]


def rewritten(
    name: str, gm: torch.fx.GraphModule, specs: list[InputSpec], inputs: Sequence[str], session: Session
) -> Program:
    """``gm`` as a program at the semantic level, passes run over it; its sizes are those of ``inputs``."""
    program = semantic_program(name, gm, specs)
    session._rewrite(program, ())
    compute_sizes(program.graph, [node for node in program.graph.nodes if node.name in inputs])
    program.gm.recompile()
    return program


def roles(step: StepGraph | ReadGraph, uncached: Uncached) -> list[InputSpec]:
    """What the placeholders of a program over stores are."""
    specs = []
    for node in step.gm.graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in step.weights:
            is_parameter = isinstance(step.weights[node.name], torch.nn.Parameter)
            fqn = uncached.names.get(node.name, "")
            specs.append(InputSpec(node.name, "parameter" if is_parameter else "buffer", fqn))
        elif node.name in step.stores or node.name == "valid" or node.name in step.lasting:
            specs.append(InputSpec(node.name, "buffer", node.name))
        else:
            specs.append(InputSpec(node.name, "input", node.name))
    return specs
