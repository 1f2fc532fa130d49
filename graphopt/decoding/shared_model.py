"""A model whose attentions read the keys and values of others: the same modules, without what made theirs.

It runs the rewritten program in place of its own forward. Modules, names and memory of parameters are those
of the model that it was made of, except for what is gone and for columns that are left of fused projections.
So ``state_dict`` and everything else that goes by names works, and a checkpoint of the original loads: what
is gone is passed over, of what was narrowed the columns that are left are taken.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from graphopt.decoding.capture import Uncached, arguments_of
from graphopt.decoding.narrow import Narrowed
from graphopt.decoding.options import Generate
from graphopt.decoding.projections import weights_beside
from graphopt.decoding.regions import attention_regions
from graphopt.errors import CaptureError, InputsError
from graphopt.packing.fit import sharing

__all__ = ["SharedModel", "SharedProgram", "program_of", "shared_model"]


@dataclass(frozen=True)
class _Part:
    """One weight of the program: an attribute of the model by its dotted name."""

    placeholder: str
    path: str


@dataclass(frozen=True)
class SharedProgram:
    """What a shared model runs. ``gone``: names of the original that are no more; ``columns``: of which
    weight of the original, and which dimension of it, which columns a weight has. ``attention``: names of
    weights of projections next to attentions. ``returned``: the type that the original returns."""

    gm: fx.GraphModule
    parts: tuple[_Part, ...]
    inputs: tuple[str, ...]
    tokens: str
    mask: str | None
    positions: str | None
    options: Generate
    gone: frozenset[str]
    columns: Mapping[str, tuple[str, int, torch.Tensor]]
    attention: tuple[str, ...]
    returned: type
    signature: inspect.Signature

    def weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The weights of ``model`` as it is now, by placeholder."""
        return {part.placeholder: operator.attrgetter(part.path)(model) for part in self.parts}

    def logits(
        self,
        model: nn.Module,
        tokens: torch.Tensor,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [B, S, V] of ``tokens`` [B, S] with the weights of ``model``."""
        values = arguments_of(self, tokens, mask, positions)
        (logits,) = self.gm(*self.weights(model).values(), *(values[name] for name in self.inputs))
        found: torch.Tensor = logits
        return found


class SharedModel(nn.Module):
    """Mixed into the class of the model, so that it stays one of its kind."""

    _shared: SharedProgram

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives for tokens, their mask and positions; with ``labels``, the loss that the model
        itself makes of logits. Raises ``InputsError`` for other tensors."""
        program = self._shared
        given = _bound(program, self, args, kwargs)
        options = program.options
        tokens = given.pop(next(iter(given)) if options.tokens not in given else options.tokens)
        mask, positions = given.pop(options.mask, None), given.pop(options.positions, None)
        labels = given.pop("labels", None)
        for name, value in given.items():
            if isinstance(value, torch.Tensor) or name == "past_key_values":
                raise InputsError(
                    f"argument {name!r}: a model that shares keys and values takes tokens, their mask and "
                    "positions, and labels"
                )
        if mask is not None and program.mask is None:
            raise InputsError(f"argument {options.mask!r}: the program takes no mask")
        logits = program.logits(self, tokens, mask, positions)
        loss = None
        if labels is not None:
            loss_function: Any = getattr(self, "loss_function", None)
            if loss_function is None:
                raise InputsError("labels: the model makes no loss of logits: use loss_fn=")
            loss = loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        return _returned(program.returned, logits, loss)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name in self._shared.gone:
            state_dict.pop(prefix + name, None)
        columns_of = self._shared.columns
        whole = {source: state_dict.get(prefix + source) for source, _, _ in columns_of.values()}
        for name, (source, dim, columns) in columns_of.items():
            found = state_dict.get(prefix + name, whole[source])
            own = operator.attrgetter(name)(self)
            if isinstance(found, torch.Tensor) and found.dim() == own.dim() and found.shape != own.shape:
                state_dict[prefix + name] = found.index_select(dim, columns.to(found.device))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def program_of(model: nn.Module) -> SharedProgram:
    """What a shared model runs. Raises ``InputsError`` for another model."""
    if not isinstance(model, SharedModel):
        raise InputsError(
            f"the model is a {type(model).__name__} whose attentions read their own keys and values",
            hint='share them first: optimize(..., generate=..., pipeline=[graphopt.use("share-kv", ...)])',
        )
    return model._shared


def shared_model(
    model: nn.Module,
    before: Uncached,
    after: Uncached,
    narrowed: Sequence[Narrowed],
    replaced: Collection[str],
    options: Generate,
) -> nn.Module:
    """A copy of ``model``, which ``before`` was captured of, that runs ``after``.

    It has the parameters of ``model`` in the same memory, those that ``after`` does not read gone,
    ``narrowed`` ones and ``replaced`` ones, by placeholder, its own. ``model`` stays as it is. Raises
    ``CaptureError`` where a weight cannot be found in the model.
    """
    made = sharing(model)
    left = {id(before.weights[name]) for name in after.weights if name in before.weights}
    # What the model has and does not use is no concern of this.
    used = {id(before.weights[n.name]) for n in before.gm.graph.nodes if n.name in before.weights and n.users}
    gone = frozenset(
        name for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in used and id(parameter) not in left
    )  # fmt: skip
    for name in gone:
        owner, attribute = _owner(made, name)
        # ``None``, not absent: modules test whether they have a bias.
        owner._parameters[attribute] = None
    own = {one.placeholder for one in narrowed} | set(replaced)
    known = dict(made.named_parameters(remove_duplicate=False)) | dict(
        made.named_buffers(remove_duplicate=False)
    )
    parts = []
    taken: dict[str, str] = {}
    for index, (placeholder, tensor) in enumerate(after.weights.items()):
        path = after.names.get(placeholder, "")
        if path in taken.values() and placeholder in own:
            # Other columns of what is a weight already.
            source = path
            path = f"{source}_early"
            owner, attribute = _owner(made, path)
            grad = known[source].requires_grad
            owner.register_parameter(attribute, nn.Parameter(tensor.detach(), requires_grad=grad))
        elif path not in known:
            # Constants of the program, and where columns are put back.
            path = f"shared_constant_{index}"
            made.register_buffer(path, tensor, persistent=False)
        elif placeholder in own:
            owner, attribute = _owner(made, path)
            old = known[path]
            value = tensor.detach()
            if isinstance(old, nn.Parameter):
                for name, other in made.named_parameters(remove_duplicate=False):
                    if other is old and name != path:
                        raise CaptureError(f"{path} is tied to {name}: it cannot be replaced alone")
                owner._parameters[attribute] = nn.Parameter(value, requires_grad=old.requires_grad)
            else:
                owner._buffers[attribute] = value
        taken[placeholder] = path
        parts.append(_Part(placeholder, path))
    beside = weights_beside(after, attention_regions(after))
    columns = {
        taken[one.placeholder]: (after.names[one.placeholder], one.dim, one.columns) for one in narrowed
    }
    program = SharedProgram(
        after.gm, tuple(parts), after.inputs, after.tokens, after.mask, after.positions, options, gone,
        columns, tuple(part.path for part in parts if part.placeholder in beside),
        _kind_returned(model, before, options), inspect.signature(type(model).forward),
    )  # fmt: skip
    kind = type(model)
    about = {"__module__": kind.__module__, "__doc__": kind.__doc__}
    made.__class__ = type(f"Shared{kind.__name__}", (SharedModel, kind), about)
    _show_signature(made.__class__, program.signature)
    made._shared = program  # type: ignore[assignment]
    return made


def _show_signature(kind: type, signature: inspect.Signature) -> None:
    """Give ``forward`` the arguments that callers look at."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return SharedModel.forward(self, *args, **kwargs)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.__doc__ = SharedModel.forward.__doc__
    kind.forward = forward  # type: ignore[attr-defined]


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _kind_returned(model: nn.Module, before: Uncached, options: Generate) -> type:
    """The type of what the model returns for two tokens."""
    device = before.placeholder(before.tokens).meta["val"].device
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
    training = model.training
    try:
        with torch.no_grad():
            return type(model.eval()(tokens))
    finally:
        model.train(training)


def _bound(
    program: SharedProgram, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    try:
        bound = program.signature.bind(model, *args, **kwargs)
    except TypeError as error:
        raise InputsError(str(error)) from None
    given: dict[str, Any] = {}
    for index, (name, value) in enumerate(bound.arguments.items()):
        kind = program.signature.parameters[name].kind
        if index == 0:
            continue
        given |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return given


def _returned(kind: type, logits: torch.Tensor, loss: torch.Tensor | None) -> Any:
    """``logits`` as the model returns them."""
    if is_dataclass(kind):
        names = {field.name for field in fields(kind)}
        return kind(**{k: v for k, v in (("loss", loss), ("logits", logits)) if k in names})
    if issubclass(kind, Mapping):
        return {"logits": logits} if loss is None else {"loss": loss, "logits": logits}
    if issubclass(kind, tuple):
        return (logits,) if loss is None else (loss, logits)
    return logits
