"""A model without a cache as one graph whose batch and sequence length are symbols.

The whole sequence goes in and logits of every position come out. Nothing of this knows of caches: models
disagree about them, and about what they do with masks and positions when there is one, while every decoder
can be run without. What is cached is decided afterwards, on the graph (``graphopt.decoding.insert``).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.capture.inputs import bind_inputs
from graphopt.decoding.einsum import write_einsum_out
from graphopt.decoding.options import Generate
from graphopt.errors import CaptureError, InputsError, brief

__all__ = ["Uncached", "capture_uncached", "logits_of"]

_BATCH, _LENGTH = 3, 7
"""Sizes of the example that is captured: unlike each other, unlike 0 and 1, which export takes for
constants."""


@dataclass(frozen=True)
class Uncached:
    """A captured model: placeholders are its weights, then ``inputs``; the output is logits [B, S, V].

    ``eager(tokens, mask, positions)``, those that it takes, is the model itself, in evaluation. ``weights``:
    what the placeholders of weights stand for, by their names; ``names``: their dotted names in the model.
    ``tokens``, ``mask`` and ``positions`` are placeholders, the last two ``None`` where the model takes
    none. ``batch`` and ``length`` are the symbols.
    """

    gm: fx.GraphModule
    eager: Callable[..., torch.Tensor]
    weights: dict[str, torch.Tensor]
    names: dict[str, str]
    tokens: str
    mask: str | None
    positions: str | None
    batch: torch.SymInt
    length: torch.SymInt
    vocabulary: int

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(name for name in (self.tokens, self.mask, self.positions) if name is not None)

    def placeholder(self, name: str) -> fx.Node:
        found: fx.Node = next(node for node in self.gm.graph.nodes if node.name == name)
        return found

    def run(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [B, S, V] of whole sequences, without a cache."""
        given = arguments_of(self, tokens, mask, positions)
        with torch.no_grad():
            (logits,) = self.gm(*self.weights.values(), *(given[name] for name in self.inputs))
        result: torch.Tensor = logits
        return result

    def is_length(self, size: Any) -> bool:
        """Whether a size is that of the sequence, whatever it is."""
        return _torch.is_same_size(size, self.length)

    def has_length(self, size: Any) -> bool:
        """Whether a size depends on that of the sequence."""
        return _torch.depends_on(size, self.length)


class TakesTokens(Protocol):
    """What is called with tokens and, where it has placeholders for them, their mask and positions."""

    @property
    def tokens(self) -> str: ...
    @property
    def mask(self) -> str | None: ...
    @property
    def positions(self) -> str | None: ...


def arguments_of(
    uncached: TakesTokens,
    tokens: torch.Tensor,
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """Inputs by placeholder, those that were not given made: no padding, positions that count it out."""
    given = {uncached.tokens: tokens}
    known = torch.ones_like(tokens) if mask is None else mask
    if uncached.mask is not None:
        given[uncached.mask] = known
    if uncached.positions is not None:
        if positions is None:
            positions = (known.long().cumsum(-1) - 1).masked_fill(known == 0, 0)
        given[uncached.positions] = positions
    return given


class _Logits(torch.nn.Module):
    """The model as a function of tokens, mask and positions alone."""

    def __init__(self, model: torch.nn.Module, names: Sequence[str], fixed: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.names, self.fixed = model, tuple(names), dict(fixed)

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        given = dict(zip(self.names, values, strict=True))
        return logits_of(self.model(**given, **self.fixed))


def logits_of(output: Any) -> torch.Tensor:
    """The logits [B, S, V] of what a model returns: its ``logits``, itself, or its first tensor."""
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if found is None:
        leaves = torch.utils._pytree.tree_leaves(output)
        found = next((leaf for leaf in leaves if isinstance(leaf, torch.Tensor)), None)
    if not isinstance(found, torch.Tensor):
        raise CaptureError(
            f"the model returns a {type(output).__name__} without logits: nothing to decode from"
        )
    return found


def capture_uncached(model: torch.nn.Module, inputs: Any, options: Generate) -> Uncached:
    """Capture ``model`` on an example like ``inputs``.

    Raises ``InputsError`` for inputs that are not tokens, and ``CaptureError``, naming what is in the way,
    for a model that is no decoder over tokens or cannot be captured with a symbolic length.
    """
    with _evaluating(model), _attributes_kept(model):
        names, fixed, example = _example(model, inputs, options)
        wrapped = _Logits(model, names, fixed)
        dynamic = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},) * len(names)
        with torch.no_grad(), _torch.quiet_capture():
            _runs(wrapped, example)
            try:
                program = torch.export.export(
                    wrapped, tuple(example), dynamic_shapes=(dynamic,), strict=False
                )
            except Exception as error:
                why = brief(error)
                if "specialized it to be a constant" in str(error):
                    why = (
                        f"its program is one for {_BATCH} sequences of {_LENGTH} tokens alone, as that of a "
                        "recurrence which is run position by position"
                    )
                raise CaptureError(f"the model could not be captured without a cache: {why}") from error

    def eager(*values: torch.Tensor) -> torch.Tensor:
        with _evaluating(model), torch.no_grad():
            logits: torch.Tensor = wrapped(*values)
        return logits

    return _uncached(program, eager, names, options)


def _runs(wrapped: _Logits, example: Sequence[torch.Tensor]) -> None:
    try:
        logits = wrapped(*example)
    except CaptureError:
        raise
    except Exception as error:
        raise InputsError(f"the model does not run on tokens alone: {brief(error)}") from error
    if logits.dim() != 3 or list(logits.shape[:2]) != list(example[0].shape):
        raise CaptureError(
            f"the model gives {list(logits.shape)} for tokens {list(example[0].shape)}: expected logits "
            f"[batch, length, vocabulary], one row for every token"
        )


@contextmanager
def _attributes_kept(model: torch.nn.Module) -> Iterator[None]:
    """What modules assign to themselves as they are traced (states of recurrences) is taken back."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _example(
    model: torch.nn.Module, inputs: Any, options: Generate
) -> tuple[list[str], dict[str, Any], list[torch.Tensor]]:
    """Names of the arguments that vary, values of those that do not, and an example."""
    args, kwargs = bind_inputs(model, inputs)
    signature = inspect.signature(model.forward)
    bound = signature.bind(*args, **kwargs)
    given = {
        name: value
        for name, value in bound.arguments.items()
        if signature.parameters[name].kind is not inspect.Parameter.VAR_KEYWORD
    }
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given |= bound.arguments.get(name, {})
    first = options.tokens if options.tokens in signature.parameters else next(iter(signature.parameters))
    tokens = given.pop(first, None)
    if not isinstance(tokens, torch.Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
        what = list(tokens.shape) if isinstance(tokens, torch.Tensor) else tokens
        raise InputsError(
            f"argument {first!r} is {what!r}: generation needs example tokens, integers [batch, length]",
            hint="say Generate(tokens=NAME) where the tokens are another argument",
        )
    if "decoder_input_ids" in signature.parameters:
        raise CaptureError(
            "the model decodes with attention to an encoder's output (it takes decoder_input_ids): stores of "
            "such keys and values are not made yet"
        )
    given.pop(options.mask, None)
    given.pop(options.positions, None)
    given = {name: value for name, value in given.items() if value is not None}
    varying = [n for n, v in given.items() if isinstance(v, torch.Tensor)]
    if varying:
        raise InputsError(
            f"argument {varying[0]!r} is a tensor besides the tokens: generation takes tokens, their mask "
            "and positions alone",
            hint=f"leave it out, or name it as Generate(mask={varying[0]!r}) or Generate(positions=...)",
        )
    if "use_cache" in signature.parameters:
        given["use_cache"] = False
    tokens = tokens[:, : max(tokens.shape[1], 1)].repeat(_BATCH, _LENGTH)[:_BATCH, :_LENGTH].contiguous()
    names, example = [first], [tokens]
    if options.mask in signature.parameters:
        names.append(options.mask)
        example.append(torch.ones_like(tokens))
    if options.positions in signature.parameters:
        names.append(options.positions)
        example.append(torch.arange(_LENGTH, device=tokens.device).expand(_BATCH, _LENGTH).contiguous())
    return names, given, example


_CHECKS = ("aten._assert_tensor_metadata", "aten._assert_scalar", "aten.sym_constrain_range")
"""Operators that check what export assumed: they compute nothing and keep dead code alive."""


def _inside(entry: Any) -> Any:
    """An entry of a node's module stack, its path seen from the model rather than from what wraps it."""
    path, *rest = entry
    # A part of a list of layers is named by its slice.
    return (re.sub(r"slice\([^)]*\)\.", "", str(path).removeprefix("model").removeprefix(".")), *rest)


def _uncached(
    program: torch.export.ExportedProgram,
    eager: Callable[..., torch.Tensor],
    names: Sequence[str],
    options: Generate,
) -> Uncached:
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        what = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
        raise CaptureError(f"the model writes {what[0]!r} as it runs: it keeps a state of its own")
    tensors = {**program.state_dict, **program.constants}
    fqns = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    for node in list(graph.nodes):
        if node.op == "call_function" and str(node.target).startswith(_CHECKS):
            graph.erase_node(node)
    for node in graph.nodes:
        if stack := node.meta.get("nn_module_stack"):
            node.meta["nn_module_stack"] = {key: _inside(entry) for key, entry in stack.items()}
    write_einsum_out(graph)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    weights = {node.name: tensors[fqns[node.name]] for node in placeholders if node.name in fqns}
    user = [node for node in placeholders if node.name not in fqns]
    roles = dict(zip(names, (node.name for node in user), strict=True))
    output = next(node for node in graph.nodes if node.op == "output")
    (logits,) = output.args[0]
    batch, length = user[0].meta["val"].shape
    if not isinstance(length, torch.SymInt):
        raise CaptureError(
            f"the model fixes the length of the sequence at {length}: its programs cannot decode"
        )
    gm = fx.GraphModule(torch.nn.Module(), graph)
    first = names[0]
    return Uncached(
        gm,
        eager,
        weights,
        {name: fqns[name].removeprefix("model.") for name in weights},
        roles[first],
        roles.get(options.mask),
        roles.get(options.positions),
        batch,
        length,
        int(logits.meta["val"].shape[-1]),
    )
