"""A model's semantic programs, captured as its calls come, run operator by operator where they are
watched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from graphopt import _torch
from graphopt.apart import CompiledApart
from graphopt.capture.semantic import input_specs, semantic_graph, semantic_program
from graphopt.errors import CaptureError, GraphoptError, InputsError, brief
from graphopt.packing.discover import Read, reads_of
from graphopt.program import Program
from graphopt.restored import cuda_devices, restored

__all__ = ["Tracer", "captured_programs"]

Watch = Callable[[Read, torch.Tensor, torch.Tensor], torch.Tensor]
"""Sees a read of a weight, its input and its result, and gives the result to go on with."""


class Tracer:
    """Runs ``model`` by its captured programs, as plain operators in their order.

    ``watch`` sees every read of a weight. ``programs`` are those captured so far: one for each graph, and
    again for inputs of other kinds. What cannot be captured runs as it did and is not seen.
    """

    def __init__(self, model: nn.Module, watch: Watch | None = None) -> None:
        self.model, self.watch = model, watch
        self.programs: list[Program] = []
        self.diagnostics: list[str] = []
        self._names = {
            **{id(b): ("buffer", name) for name, b in model.named_buffers()},
            **{id(p): ("parameter", name) for name, p in model.named_parameters()},
        }
        self._running = True
        self._call = CompiledApart(model, self._backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own result. Raises what the model raises."""
        try:
            with _torch.quiet_capture():
                return self._call(*args, **kwargs)
        except Exception as error:
            inner = _torch.inner_error(error)
            if inner is error:
                raise
            raise inner from None

    def capture(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The programs of one call, without running it where one graph holds it all."""
        self._running = False
        whole = CompiledApart(self.model, self._backend, fullgraph=True)
        try:
            with _torch.quiet_capture():
                whole(*args, **kwargs)
            return
        except _Seen:
            return
        except Exception as error:
            inner = _torch.inner_error(error)
            if isinstance(inner, GraphoptError):
                raise inner from None
            if not isinstance(error, _torch.graph_break_errors()):
                raise CaptureError(f"the model could not be captured: {brief(inner)}") from error
        finally:
            self._running = True
        self.programs.clear()
        with restored(self.model, []), torch.random.fork_rng(devices=cuda_devices(self.model)):
            self(*args, **kwargs)

    def _backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        specs = input_specs(gm, inputs, self._names)
        name = f"g{len(self.programs)}"
        try:
            graph = semantic_graph(gm, inputs)
        except Exception as error:
            self.diagnostics.append(f"{name}: the semantic level could not be traced ({brief(error)})")
            return gm.forward
        program = semantic_program(name, graph, specs)
        self.programs.append(program)
        reads = {read.node: read for read in reads_of(program)[0]} if self.watch is not None else {}

        def call(*arguments: Any) -> Any:
            if not self._running:
                raise _Seen
            return _Watching(graph, reads, self.watch).run(*arguments)

        return call


def captured_programs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Program, ...]:
    """The semantic programs of one call of ``model`` as they are captured, before any pass.

    Raises ``InputsError`` for inputs that the model refuses and ``CaptureError`` where nothing of it can be
    captured.
    """
    tracer = Tracer(model)
    with torch.no_grad():
        try:
            tracer.capture(args, kwargs)
        except Exception as error:
            with restored(model, []), torch.random.fork_rng(devices=cuda_devices(model)):
                try:
                    model(*args, **kwargs)
                except Exception as refused:
                    raise InputsError(
                        f"the model does not run with these inputs: {brief(refused)}"
                    ) from refused
            if isinstance(error, GraphoptError):
                raise
            raise CaptureError(f"the model could not be captured: {brief(error)}") from error
    if not tracer.programs:
        why = "; ".join(tracer.diagnostics) or "dynamo captured no graph of the model"
        raise CaptureError(f"the model could not be captured: {why}")
    return tuple(tracer.programs)


class _Seen(BaseException):
    """In place of running a program whose capture alone was asked for. No ``Exception``: a model's own
    handlers do not catch it."""


class _Watching(fx.Interpreter):
    """Runs a program, values released after their last use."""

    def __init__(self, graph: fx.GraphModule, reads: dict[fx.Node, Read], watch: Watch | None) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self.reads, self.watch = reads, watch

    def run_node(self, n: fx.Node) -> Any:
        read = self.reads.get(n)
        if read is None or self.watch is None:
            return super().run_node(n)
        x = self.env[read.x]
        return self.watch(read, x, super().run_node(n))
