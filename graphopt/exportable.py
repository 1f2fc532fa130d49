"""``Optimized.exportable``: the rewritten program of an inference step, as a module that exporters take.

``torch.export`` and ``torch.onnx`` trace what a module's forward calls. Of an optimized module that would be
the code of the model, with none of the rewrites. Here it is the program::

    forward(ids, mask)  ->  inputs of the program: arguments, parameters, buffers
                        ->  its operators, one by one
                        ->  the structure that the model returns
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.artefact.calling import filled, taken
from graphopt.artefact.seen import SeenCall, seen_call
from graphopt.captured import Captured
from graphopt.errors import ArtefactError
from graphopt.kernel_references import references_of
from graphopt.stored_step import results_text

if TYPE_CHECKING:
    from graphopt.optimized import Optimized
    from graphopt.plugins.records import KernelSpec
    from graphopt.segmented import SegmentedStep

__all__ = ["Exportable", "exportable"]

_TORCHS_OWN = frozenset({"aten", "prim", "prims"})


class Exportable(torch.nn.Module):
    """A step of ``model``, whose parameters, buffers and names it shares, as calls of operators."""

    def __init__(self, model: torch.nn.Module, seen: SeenCall, run: Callable[..., Sequence[Any]]) -> None:
        super().__init__()
        self._parameters, self._buffers, self._modules = model._parameters, model._buffers, model._modules
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        self.training = model.training
        signature = inspect.signature(model.forward)
        places = {id(tensor): k for k, tensor in enumerate(seen.given)}
        sources: list[Callable[[Mapping[str, Any], Sequence[Any]], Any]] = []
        for value in seen.inputs:
            sources.append(_source(value, seen.state.get(id(value)), places.get(id(value))))

        def forward(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given: list[torch.Tensor | None] = [None] * len(seen.given)
            taken(seen.arguments, bound.arguments, given, "the call")
            state = {
                **dict(self.named_parameters(remove_duplicate=False)),
                **dict(self.named_buffers(remove_duplicate=False)),
            }
            outputs = run(*(source(state, given) for source in sources))
            return filled(seen.results, {"value": list(outputs), "argument": given, "state": state})

        forward.__signature__ = signature  # type: ignore[attr-defined]
        object.__setattr__(self, "forward", forward)


def exportable(optimized: Optimized, *, references: bool = False) -> Exportable:
    """What ``Optimized.exportable`` promises."""
    driver = optimized._driver
    driver.plan()
    session = driver.session
    if optimized._generator is not None:
        raise ArtefactError("generation is several programs and a loop between them: no exporter takes that")
    if not session.whole or session.dry_run:
        several = "is several programs and Python between them"
        what = "was planned, not compiled" if session.dry_run else several
        raise ArtefactError(
            f"the step {what}: no exporter takes that", hint="optimize a model that is one graph"
        )
    if driver.training_step():
        raise ArtefactError(
            "a training step cannot be exported: exporters take forwards alone",
            hint="call eval() and optimize under torch.no_grad()",
        )
    seen = seen_call(driver)
    if any(not isinstance(value, torch.Tensor) for value in seen.inputs):
        raise ArtefactError(
            "sizes of the program are inputs of it, which exporters cannot be given",
            hint="optimize(..., dynamic_shapes=False), and export once for each size",
        )
    assert seen.ran is not None and seen.ran.step is not None
    made, kernels = seen.ran.step, session.host.kernels() if references else None
    if isinstance(made, Captured):
        return Exportable(driver.model, seen, _operators(made.semantic.gm, kernels))
    return Exportable(driver.model, seen, _chain(made, kernels))


def _source(value: Any, state: str | None, place: int | None) -> Callable[..., Any]:
    """Where an input of the program comes from; a tensor that is neither of the two is a constant."""
    if state is not None:
        return lambda tensors, given: tensors[state]
    if place is not None:
        return lambda tensors, given: given[place]
    return lambda tensors, given: value


def _chain(made: SegmentedStep, kernels: Mapping[str, KernelSpec] | None) -> Callable[..., Sequence[Any]]:
    """The segments one after another."""
    chain = made.chain
    runs = [_operators(captured.semantic.gm, kernels) for captured in made.captured]
    results = json.loads(results_text(chain.results))

    def run(*inputs: Any) -> Sequence[Any]:
        values = chain.begin(list(inputs))
        for call, program in zip(chain.calls, runs, strict=True):
            values.update(zip(call.outs, program(*(values[name] for name in call.args)), strict=True))
        returned: Sequence[Any] = filled(results, {"value": values})
        return returned

    return run


def _operators(gm: fx.GraphModule, kernels: Mapping[str, KernelSpec] | None) -> Callable[..., Sequence[Any]]:
    """Calls the operators of a graph; with ``kernels``, what they compute in the place of their operators.

    Raises ``ArtefactError`` for one of which that is not known.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    if kernels is not None:
        ours = [node for node in graph.nodes if node.op == "call_function" and _is_kernel(node.target)]
        known = references_of({node.target.name() for node in ours}, kernels)
        for node in ours:
            if node.target not in known:
                raise ArtefactError(
                    f"{node.target.name()} has neither a reference nor a function that it was made of",
                    hint="with references=False the operator is called, and has to be there on loading",
                )
            node.target = known[node.target]
    return fx.GraphModule(gm, graph).forward


def _is_kernel(target: Any) -> bool:
    """Whether an operator is somebody's kernel."""
    return _torch.schema_of(target) is not None and target.namespace not in _TORCHS_OWN
