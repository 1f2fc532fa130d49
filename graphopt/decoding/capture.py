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
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.capture.inputs import bind_inputs
from graphopt.decoding.blocks import blocks_as_recurrences
from graphopt.decoding.einsum import write_einsum_out
from graphopt.decoding.encoder import Encoder, decoder_name, encoder_of, evaluating
from graphopt.decoding.lengths import lengths_for, merged
from graphopt.decoding.options import Generate
from graphopt.decoding.roll import roll
from graphopt.decoding.shifts import shifts_as_recurrences
from graphopt.errors import CaptureError, InputsError, brief

__all__ = ["Source", "Uncached", "arguments_of", "capture_uncached", "logits_of", "source_shapes"]

_BATCH, _LENGTH = 3, 7
"""Sizes of the example that is captured: unlike each other, unlike 0 and 1, which export takes for
constants."""


@dataclass(frozen=True)
class Source:
    """What a decoder reads besides its tokens: placeholders of the tensors that ``encoder`` gives, rows [B,
    T, D] first, and of the mask of what it encodes. ``rows`` is T, of which ``most`` are kept.

    ``tokens``, ``mask`` and ``positions`` are the names of the decoder's own arguments.
    """

    encoder: Encoder
    leaves: tuple[str, ...]
    shown: str | None
    rows: torch.SymInt
    most: int
    tokens: str
    mask: str
    positions: str

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.leaves if self.shown is None else (*self.leaves, self.shown)

    def given(self, arguments: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the decoder is given by placeholder where the model's own encoder reads ``arguments``."""
        found = dict(zip(self.leaves, self.encoder(arguments), strict=True))
        if self.shown is not None and self.encoder.mask is not None:
            found[self.shown] = arguments[self.encoder.mask]
        return found


@dataclass(frozen=True)
class Uncached:
    """A captured model: placeholders are its weights, then ``inputs``; the output is logits [B, S, V].

    ``eager(tokens, mask, positions)``, those that it takes, is the model itself, in evaluation. ``weights``:
    what the placeholders of weights stand for, by their names; ``names``: their dotted names in the model.
    ``tokens``, ``mask`` and ``positions`` are placeholders, the last two ``None`` where the model takes
    none. ``batch`` and ``length`` are the symbols. ``source``: what it reads of an encoder, if it does, and
    ``given``: tensors that are read where nothing else is said, by placeholder.
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
    source: Source | None = None
    given: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[str, ...]:
        own = tuple(name for name in (self.tokens, self.mask, self.positions) if name is not None)
        return own if self.source is None else (*own, *self.source.inputs)

    def reading(self, given: Mapping[str, torch.Tensor]) -> Uncached:
        """The same program over the source ``given``, by placeholder."""
        return replace(self, given=given)

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

    def follows_length(self, size: Any) -> bool:
        """Whether a size is some times that of the sequence, as that of rows of all sequences together."""
        return _torch.is_multiple_of(size, self.length)

    def has_rows(self, size: Any) -> bool:
        """Whether a size depends on the number of rows of the source."""
        return self.source is not None and _torch.depends_on(size, self.source.rows)


def source_shapes(uncached: Uncached, batch: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the longest source for ``batch`` sequences, by placeholder."""
    source = uncached.source
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if source is None:
        return shapes
    for name in source.inputs:
        value = uncached.placeholder(name).meta["val"]
        # Masks of sounds are longer than what they say of rows.
        length = -(-_torch.hint(value.shape[1]) * source.most // _torch.hint(source.rows))
        shapes[name] = ((batch, length, *map(_torch.hint, value.shape[2:])), value.dtype)
    return shapes


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
    return {**given, **uncached.given} if isinstance(uncached, Uncached) else given


class _Logits(torch.nn.Module):
    """The model as a function of tokens, mask and positions alone, and of what ``encoder`` gives."""

    def __init__(
        self,
        model: torch.nn.Module,
        names: Sequence[str],
        fixed: Mapping[str, Any],
        encoder: Encoder | None = None,
    ) -> None:
        super().__init__()
        self.model, self.names, self.fixed = model, tuple(names), dict(fixed)
        self.encoder = encoder

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        given: dict[str, Any] = dict(zip(self.names, values, strict=False))
        if self.encoder is not None:
            read = values[len(self.names) :]
            count = len(self.encoder.keys)
            given["encoder_outputs"] = self.encoder.output(read[:count])
            if self.encoder.mask is not None:
                given[self.encoder.mask] = read[count]
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
    with evaluating(model), _attributes_kept(model):
        names, fixed, example, encoder = _example(model, inputs, options)
    wrapped = _Logits(model, names, fixed, encoder)

    def eager(*values: torch.Tensor) -> torch.Tensor:
        with evaluating(model), torch.no_grad():
            logits: torch.Tensor = wrapped(*values)
        return logits

    with evaluating(model), torch.no_grad(), _torch.quiet_capture():
        with _attributes_kept(model, tensors_alone=True):
            _runs(wrapped, example)
        with _attributes_kept(model):
            captured = _of_any_length(wrapped, example)
            if captured is None:
                captured = _by_lengths(wrapped, lambda length: _example(model, inputs, options, length)[2])
    return _uncached(captured, eager, names, options, encoder)


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
def _attributes_kept(model: torch.nn.Module, *, tensors_alone: bool = False) -> Iterator[None]:
    """What modules assign to themselves as they are traced (states of recurrences) is taken back; tensors
    alone where they really run: what else they note (that weights were scaled) goes with what they did."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            noted = {}
            if tensors_alone:
                noted = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str))}
            vars(module).clear()
            vars(module).update(attributes | noted)


def _example(
    model: torch.nn.Module, inputs: Any, options: Generate, length: int = _LENGTH
) -> tuple[list[str], dict[str, Any], list[torch.Tensor], Encoder | None]:
    """Names of the arguments that vary, values of those that do not, an example of ``length`` tokens, what an
    encoder gives behind it, and the encoder."""
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
    if (found := encoder_of(model, given, options)) is not None:
        encoder, tokens, fixed = found
        return *_beside(model, encoder, tokens, fixed, options), encoder
    first = options.tokens if options.tokens in signature.parameters else next(iter(signature.parameters))
    tokens = given.pop(first, None)
    if not isinstance(tokens, torch.Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
        what = list(tokens.shape) if isinstance(tokens, torch.Tensor) else tokens
        raise InputsError(
            f"argument {first!r} is {what!r}: generation needs example tokens, integers [batch, length]",
            hint="say Generate(tokens=NAME) where the tokens are another argument",
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
    names, example = _varying(model, tokens, first, options.mask, options.positions, length)
    return names, given, example, None


def _varying(
    model: torch.nn.Module, tokens: torch.Tensor, first: str, mask: str, positions: str,
    length: int = _LENGTH,
) -> tuple[list[str], list[torch.Tensor]]:
    """Names and an example of tokens, and of mask and positions where the model takes them."""
    parameters = inspect.signature(model.forward).parameters
    tokens = tokens[:, : max(tokens.shape[1], 1)].repeat(_BATCH, length)[:_BATCH, :length].contiguous()
    names, example = [first], [tokens]
    if mask in parameters:
        names.append(mask)
        example.append(torch.ones_like(tokens))
    if positions in parameters:
        names.append(positions)
        example.append(torch.arange(length, device=tokens.device).expand(_BATCH, length).contiguous())
    return names, example


def _beside(
    model: torch.nn.Module, encoder: Encoder, tokens: torch.Tensor, fixed: dict[str, Any], options: Generate
) -> tuple[list[str], dict[str, Any], list[torch.Tensor]]:
    """Names, constants and an example of a decoder, what ``encoder`` gives of its own example included."""
    first, mask, positions = map(decoder_name, (options.tokens, options.mask, options.positions))
    names, example = _varying(model, tokens, first, mask, positions)
    if "use_cache" in inspect.signature(model.forward).parameters:
        fixed["use_cache"] = False
    example += encoder(encoder.example)
    if encoder.mask is not None:
        example.append(encoder.example[encoder.mask])
    return names, fixed, example


_CHECKS = ("aten._assert_tensor_metadata", "aten._assert_scalar", "aten.sym_constrain_range")
"""Operators that check what export assumed: they compute nothing and keep dead code alive."""


def _inside(entry: Any) -> Any:
    """An entry of a node's module stack, its path seen from the model rather than from what wraps it."""
    path, *rest = entry
    # A part of a list of layers is named by its slice.
    return (re.sub(r"slice\([^)]*\)\.", "", str(path).removeprefix("model").removeprefix(".")), *rest)


@dataclass(frozen=True)
class _Captured:
    """A graph, what its placeholders of weights stand for, by name, and their dotted names; ``user``: its
    other placeholders."""

    graph: fx.Graph
    weights: dict[str, torch.Tensor]
    names: dict[str, str]
    user: tuple[str, ...]


def _captured(program: torch.export.ExportedProgram) -> _Captured:
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
    placeholders = [node.name for node in graph.nodes if node.op == "placeholder"]
    weights = {name: tensors[fqns[name]] for name in placeholders if name in fqns}
    dotted = {name: fqns[name].removeprefix("model.") for name in weights}
    return _Captured(graph, weights, dotted, tuple(name for name in placeholders if name not in fqns))


def _uncached(
    captured: _Captured,
    eager: Callable[..., torch.Tensor],
    names: Sequence[str],
    options: Generate,
    encoder: Encoder | None,
) -> Uncached:
    graph = captured.graph
    roles = dict(zip(names, captured.user, strict=False))
    output = next(node for node in graph.nodes if node.op == "output")
    (logits,) = output.args[0]
    tokens = next(node for node in graph.nodes if node.name == roles[names[0]])
    batch, length = tokens.meta["val"].shape
    if not isinstance(length, torch.SymInt):
        raise CaptureError(
            f"the model fixes the length of the sequence at {length}: its programs cannot decode"
        )
    first, mask, positions = names[0], options.mask, options.positions
    source = None
    if encoder is not None:
        mask, positions = decoder_name(mask), decoder_name(positions)
        inputs = {node.name: node for node in graph.nodes if node.op == "placeholder"}
        read = [inputs[name] for name in captured.user[len(names) :]]
        source = _source(encoder, read, options, (first, mask, positions))
        # Weights of the encoder.
        for name, node in inputs.items():
            if name in captured.weights and not node.users:
                del captured.weights[name], captured.names[name]
                graph.erase_node(node)
    shifts_as_recurrences(graph, length)
    blocks_as_recurrences(graph, tokens, captured.weights)
    return Uncached(
        fx.GraphModule(torch.nn.Module(), graph),
        eager,
        captured.weights,
        captured.names,
        roles[first],
        roles.get(mask),
        roles.get(positions),
        batch,
        length,
        int(logits.meta["val"].shape[-1]),
        source,
    )


def _source(
    encoder: Encoder, nodes: Sequence[fx.Node], options: Generate, names: tuple[str, str, str]
) -> Source:
    """What ``nodes``, placeholders behind those of the decoder's own arguments ``names``, are."""
    rows = nodes[0].meta["val"].shape[1]
    if not isinstance(rows, torch.SymInt):
        raise CaptureError(f"the model fixes the length of the source at {rows}")
    read = tuple(node.name for node in nodes)
    count = len(encoder.keys)
    shown = read[count] if encoder.mask is not None else None
    most = options.max_source or encoder.rows
    return Source(encoder, read[:count], shown, rows, most, *names)


def _of_any_length(wrapped: _Logits, example: Sequence[torch.Tensor]) -> _Captured | None:
    """``wrapped`` captured with the length as a symbol; ``None`` where its program is one for the example's
    length alone."""
    dynamic = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},) * len(example)
    try:
        program = torch.export.export(wrapped, tuple(example), dynamic_shapes=(dynamic,), strict=False)
    except Exception as error:
        if _torch.fixes_a_size(error):
            return None
        raise CaptureError(f"the model could not be captured without a cache: {brief(error)}") from error
    return _captured(program)


def _by_lengths(wrapped: _Logits, example: Callable[[int], list[torch.Tensor]]) -> _Captured:
    """``wrapped``, which takes positions one by one, captured for a few lengths, its loops over positions
    rolled up. ``example(length)``: inputs of that length."""
    lengths = lengths_for(wrapped, _BATCH)
    found = []
    try:
        for length in lengths:
            inputs = example(length)
            program = torch.export.export(
                wrapped,
                tuple(inputs),
                dynamic_shapes=(({0: torch.export.Dim.DYNAMIC},) * len(inputs),),
                strict=False,
            )
            captured = _captured(program)
            roll(captured.graph, length)
            found.append(captured)
        last = found[-1]
        for name, tensor in last.weights.items():
            if not all(torch.equal(one.weights[name], tensor) for one in found if name in one.weights):
                raise CaptureError(f"{last.names[name]} is another one for each length")
        graphs = [captured.graph for captured in found]
        merged(graphs, lengths, last.user[0], list(last.weights.values()), inputs)
    except CaptureError as error:
        raise CaptureError(
            f"the model takes positions one by one: {error.message}", hint=error.hint
        ) from error
    except Exception as error:
        raise CaptureError(f"the model could not be captured without a cache: {brief(error)}") from error
    return last

