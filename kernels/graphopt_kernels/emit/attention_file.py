"""Attention as a file of its own: kernels of ``graphopt_kernels.attention`` for one call, written out.

The kernels and how they are started are the package's own. Their launches are written down on tensors
without memory (``tuning.calls.Recorder``), their sources specialized for what the launches say
(``specialized``): strides, heads, scale, cap, bounds and widths become numbers, branches that are not taken
go. Sizes stay arguments: the compiler would write out short loops whole. ::

    query x key^T -> scale, cap -> bias, loaded or computed -> bounds -> running softmax -> x value

``reference()`` is the call itself where ATen has it on a CPU, else ``graphopt_kernels.attention_reference``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from graphopt_kernels import attention_launch
from graphopt_kernels.attention_reference import gradient_buffers, result_buffers
from graphopt_kernels.emit.aten_code import call_text
from graphopt_kernels.emit.attention_bias import BIAS, BiasText, bias_text
from graphopt_kernels.emit.attention_reference_text import reference_lines
from graphopt_kernels.emit.attention_sums import sums_read, sums_written, without_memory
from graphopt_kernels.emit.attentions import Attention, attention_of, attentions_of, parts_of
from graphopt_kernels.emit.build import Built, NotFusible
from graphopt_kernels.emit.expand import group_graph
from graphopt_kernels.emit.launch import Launch
from graphopt_kernels.emit.order import is_free
from graphopt_kernels.emit.specialized import Slot, Wanted, broken, specialized
from graphopt_kernels.emit.tile import Tile
from graphopt_kernels.tuning.calls import KernelCall, Recorder

__all__ = ["AttentionText", "BuiltAttention", "attention_text"]

_no = NotFusible.because

_ROWS_TOGETHER = ("query", "key", "value", "grad", "output")
"""What kernels take with the elements of a row one after the other, copied where they are not."""

_ARGUMENTS = ("rows", "columns", "ROWS", "COLUMNS", "PRECISION")
"""What kernels go on to be told when they are started; the last three are constants of the compiler."""


@dataclass(frozen=True)
class BuiltAttention(Built):
    """``names`` of the inputs, the call, its launches on tensors without memory, and the bias where kernels
    compute it."""

    names: tuple[str, ...]
    attention: Attention
    launches: tuple[KernelCall, ...]
    computed: BiasText | None


@dataclass(frozen=True)
class AttentionText:
    """``functions``: of the kernels; ``launcher``: lines of the body of ``launch()``; ``reference``:
    functions before ``reference()``, and that."""

    built: BuiltAttention
    kernels: tuple[str, ...]
    functions: str
    helpers: tuple[str, ...]
    launcher: tuple[str, ...]
    reference: tuple[str, ...]
    launch: Launch


def attention_text(graph: fx.Graph) -> AttentionText:
    """The parts of the file for the graph of a group (``expand.group_graph``). Raises ``NotFusible``."""
    return _Writer(graph).written()


class _Writer:
    def __init__(self, graph: fx.Graph) -> None:
        found = attentions_of(graph)
        if len(found) != 1:
            raise _no(f"{len(found)} calls of attention: a kernel computes one")
        self._graph = graph
        self._of = attention_of(found[0])
        self._inputs = [node for node in graph.nodes if node.op == "placeholder"]
        (output,) = [node for node in graph.nodes if node.op == "output"]
        self._outputs: list[fx.Node] = list(output.args[0])
        parts = {node: number for number, node in parts_of(found[0])}
        if any(node not in parts for node in self._outputs):
            raise _no("what attention takes in is read by others too")
        self._roles = [self._of.results[parts[node]] for node in self._outputs]
        self._names = self._named()
        self._computed = self._slot()
        # Tensors without memory by role, those that launches read and write.
        self._given = {role: without_memory(self._of.value(role)) for role in self._of.operands}
        self._lines: list[str] = []
        self._known: dict[int, str] = {}
        self._shown: dict[fx.Node, str] = dict(self._names)

    # --- inputs --------------------------------------------------------------------------------

    def _named(self) -> dict[fx.Node, str]:
        """Inputs are called what they are to attention, others by number."""
        uses: dict[fx.Node, list[str]] = {}
        for role, node in self._of.operands.items():
            uses.setdefault(node, []).append(role)
        names = {}
        for number, node in enumerate(self._inputs):
            roles = uses.get(node, [])
            names[node] = roles[0] if len(roles) == 1 else f"in{number}"
        return names

    def _slot(self) -> BiasText | None:
        """The bias as a function, where it is computed in the group."""
        for role, node in self._of.operands.items():
            made = _made_of(node)
            computed = [n for n in made if not is_free(n)]
            if not computed:
                continue
            if role != "bias":
                raise _no(f"the {role} of attention is computed")
            if self._of.backward and self._of.asked_for(self._roles)[3]:
                raise _no("the bias of attention is computed, and has a gradient")
            order = {n: place for place, n in enumerate(self._graph.nodes)}
            inner, inputs = group_graph(sorted(made, key=order.__getitem__), [node])
            value = self._of.value("bias")
            if value.dim() > 4:
                raise _no("a bias of more than four dimensions")
            heads = self._of.value("query").shape[1]
            return bias_text(inner, heads, [self._names[n] for n in inputs])
        return None

    def _variable(self, role: str) -> str:
        """What an operand is called in ``launch()``, after the views that give it."""
        node = self._of.operands[role]
        for view in _made_of(node):
            if view not in self._shown:
                self._shown[view] = role if view is node else view.name
                self._lines.append(f"{self._shown[view]} = {call_text(view, self._shown)}")
        return self._shown[node]

    # --- the whole ---------------------------------------------------------------------------

    def written(self) -> AttentionText:
        self._operands()
        results = self._buffers()
        calls = self._launches(results)
        self._checked_layouts(results)
        text, kernels, launches = self._kernels(calls)
        last, returned = self._returned(results)
        lines = [*self._lines, *launches, *last, *broken(f"return ({', '.join(returned)},)", 0)]
        built = BuiltAttention(
            Tile(()),
            (),
            (),
            tuple(node.meta["val"] for node in self._inputs),
            tuple(node.meta["val"] for node in self._outputs),
            tuple(self._names[node] for node in self._inputs),
            self._of,
            tuple(calls),
            self._computed,
        )
        first = calls[-1]
        launch = Launch({}, int(first.options["num_warps"]), first.grid, first.options.get("num_stages"))
        helpers = self._computed.helpers if self._computed is not None else ()
        return AttentionText(built, kernels, text, helpers, tuple(lines), self._reference(), launch)

    def _operands(self) -> None:
        batch, heads, rows, _ = self._of.value("query").shape
        for role in self._of.operands:
            if role == "bias" and self._computed is not None:
                continue
            variable = self._variable(role)
            if role == "log_sum_exp":
                text = sums_read(variable, self._of.value(role), (batch, heads, rows))
                if text != variable:
                    self._lines.append(f"log_sum_exp = {text}")
                    variable = "log_sum_exp"
                self._given[role] = torch.empty(
                    batch, heads, rows, dtype=self._of.value(role).dtype, device="meta"
                )
            elif role in _ROWS_TOGETHER:
                given = self._given[role]
                together = attention_launch.rows_together(given)
                if together is not given:
                    self._lines.append(f"{role} = {variable}.contiguous()")
                    variable, self._given[role] = role, together
            self._known[id(self._given[role])] = variable

    def _buffers(self) -> dict[str, torch.Tensor]:
        """Tensors for what is computed, those that are asked for and those that are not."""
        of = self._of
        query, key, value, bias = (self._given.get(role) for role in ("query", "key", "value", "bias"))
        assert query is not None and key is not None and value is not None
        if of.backward:
            self._wanted = of.asked_for(self._roles)
            if self._wanted[3] and (bias is None or not bias.is_floating_point()):
                raise _no("there is no bias to give a gradient of")
            made = gradient_buffers(query, key, value, bias, self._wanted)
            found = dict(zip(("d_query", "d_key", "d_value", "d_bias"), made, strict=True))
        else:
            found = dict(zip(("output", "log_sum_exp"), result_buffers(query, value), strict=True))
        device = self._device()
        for number, (node, role) in enumerate(zip(self._outputs, self._roles, strict=True)):
            layout = node.meta["val"]
            at = f"{tuple(layout.shape)}, {tuple(layout.stride())}, dtype={layout.dtype}, device={device}"
            if role == "log_sum_exp":
                continue
            if role and found[role].numel():
                found[role] = without_memory(layout)
                self._known[id(found[role])] = f"out{number}"
                self._lines.append(f"out{number} = torch.empty_strided({at})")
            else:
                # Of random numbers that nobody draws, or a gradient that nobody asked for.
                shape = tuple(layout.shape)
                self._lines.append(
                    f"out{number} = torch.zeros({shape}, dtype={layout.dtype}, device={device})"
                )
        return found

    def _device(self) -> str:
        return f"{self._names[self._inputs[0]]}.device"

    def _checked_layouts(self, results: Mapping[str, torch.Tensor]) -> None:
        for role, tensor in results.items():
            if role == "d_bias" and tensor.numel():
                if not tensor.is_contiguous() or tensor.shape != self._given["bias"].shape:
                    raise _no("the gradient of the bias is not contiguous")
            elif tensor.dim() == 4 and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
                raise _no("a result of attention lies across its rows")

    def _launches(self, results: Mapping[str, torch.Tensor]) -> list[KernelCall]:
        """The launches of the package, written down."""
        kernels = attention_launch.jitted()
        if kernels is None:
            raise _no("attention is written out where triton is installed")
        recorder = Recorder(kernels)
        query, key, value, bias = (self._given.get(role) for role in ("query", "key", "value", "bias"))
        assert query is not None and key is not None and value is not None
        if self._of.backward:
            grad, output, lse = (self._given[role] for role in ("grad", "output", "log_sum_exp"))
            d_query, d_key, d_value, d_bias = (
                results[role] for role in ("d_query", "d_key", "d_value", "d_bias")
            )
            attention_launch.backward_into(
                recorder,
                (d_query, d_key, d_value, d_bias),
                grad,
                query,
                key,
                value,
                bias,
                output,
                lse,
                *self._of.settings,
                self._wanted,
            )
        else:
            pair = results["output"], results["log_sum_exp"]
            attention_launch.forward_into(recorder, pair, query, key, value, bias, *self._of.settings)
        return recorder.calls

    # --- kernels -------------------------------------------------------------------------------

    def _kernels(self, calls: Sequence[KernelCall]) -> tuple[str, tuple[str, ...], list[str]]:
        """The text of all kernels, their names, and the lines that start them."""
        slot = None
        if self._computed is not None:
            slot = Slot(BIAS, self._computed.source, "bias", self._computed.pointers)
        wanted = [Wanted(call.function, self._told(call)) for call in calls]
        made = specialized(wanted, slot)
        lines: list[str] = []
        if self._given["query"].dtype == torch.float32:
            lines.append('precise = torch.get_float32_matmul_precision() == "highest"')
        for call in calls:
            lines += self._started(call, made.parameters[call.function.fn.__name__])
        return made.text, tuple(call.function.fn.__name__ for call in calls), lines

    def _told(self, call: KernelCall) -> dict[str, Any]:
        """What a kernel is told once and for all."""
        told = {
            name: value
            for name, value in call.arguments.items()
            if not isinstance(value, torch.Tensor) and name not in _ARGUMENTS
        }
        if self._given["query"].dtype != torch.float32 and "PRECISION" in call.arguments:
            told["PRECISION"] = None
        if self._computed is not None:
            # Not a place but a number: that of the head, over batches.
            told |= {"bias_batch": self._of.value("query").shape[1], "bias_head": 1}
        return told

    def _started(self, call: KernelCall, parameters: Sequence[str]) -> Iterator[str]:
        name = call.function.fn.__name__
        given, options = [], []
        for parameter in parameters:
            value = call.arguments.get(parameter)
            if parameter == "bias":
                # Broadcast to all scores for the launch, a view of the operand.
                value = self._given["bias"]
            if isinstance(value, torch.Tensor):
                if id(value) not in self._known:
                    # What kernels hand to each other, or write and nobody asked for.
                    self._known[id(value)] = parameter
                    at = f"{tuple(value.shape)}, dtype={value.dtype}, device={self._device()}"
                    yield f"{parameter} = torch.empty({at})"
                given.append(self._known[id(value)])
            elif parameter == "PRECISION":
                options.append('PRECISION="tf32x3" if precise else "tf32"')
            elif parameter in _ARGUMENTS[2:]:
                options.append(f"{parameter}={value}")
            elif parameter in call.arguments:
                given.append(str(value))
            else:
                given.append(parameter)
        options += [f"{key}={value}" for key, value in call.options.items()]
        yield f"{name}[({call.grid[0]},)]("
        yield f"    {', '.join(given)},"
        yield f"    {', '.join(options)},"
        yield ")"

    def _reference(self) -> tuple[str, ...]:
        names = {node: self._names[node] for node in self._inputs}
        calls = [node for node in self._graph.nodes if node.op == "call_function"]
        made = reference_lines(self._of, calls, names, self._outputs, self._roles, self._device())
        return tuple(made)

    def _returned(self, results: Mapping[str, torch.Tensor]) -> tuple[list[str], list[str]]:
        """Lines before the end of ``launch()``, and what it returns."""
        lines: list[str] = []
        found = []
        for number, (node, role) in enumerate(zip(self._outputs, self._roles, strict=True)):
            name = f"out{number}"
            if role == "log_sum_exp":
                plain = results[role]
                made = sums_written(name, self._known[id(plain)], node.meta["val"], tuple(plain.shape))
                lines += made[0]
                name = made[1]
            found.append(name)
        return lines, found


def _made_of(node: fx.Node) -> list[fx.Node]:
    """A node of a group and those that it is made of, in order; nothing for an input."""
    found: dict[fx.Node, None] = {}

    def visit(each: fx.Node) -> None:
        if each.op == "call_function" and each not in found:
            for source in each.all_input_nodes:
                visit(source)
            found[each] = None

    visit(node)
    return list(found)
