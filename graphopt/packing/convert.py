"""Puts packed weights in the place of a model's parameters.

Before::

    layers.0.q.weight        Parameter bf16[4096,4096]

After::

    layers.0.q.weight        what the packed tensors stand for, unpacked whenever it is read
    layers.0.q.parametrizations.weight.0.codes, ....scales        buffers

The parametrization is torch's own (``torch.nn.utils.parametrize``), so that eager mode, compilers,
``deepcopy`` and assignment work as with any other. A weight that is assigned, or loaded under the parameter's
own name, is packed as it arrives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from graphopt.errors import QuantizationError, UnknownNameError
from graphopt.packing.scheme import Scheme, operator_named, reason_of_weight, scheme_text

__all__ = [
    "Orientation",
    "PackedWeight",
    "converted",
    "install_packed",
    "matrix_of",
    "matrix_shape",
    "pack_weights",
    "packed_weights",
]

Orientation = str
"""How a parameter holds a weight [N, K]: ``"rows"``: as it is, further dimensions flattened into K
(``linear``, convolutions, embeddings); ``"columns"``: as [K, N] (``mm(x, w)``). Several weights of one shape,
one after the other in N: ``"stacked rows"``: [E, N/E, K] (``bmm(x, w.mT)``); ``"stacked columns"``:
[E, K, N/E] (``bmm(x, w)``)."""


def matrix_shape(shape: Sequence[int], orientation: Orientation) -> tuple[int, int]:
    """N and K of the weight that a parameter of ``shape`` holds."""
    if orientation == "columns":
        return shape[1], shape[0]
    if orientation == "stacked rows":
        return shape[0] * shape[1], shape[2]
    if orientation == "stacked columns":
        return shape[0] * shape[2], shape[1]
    return shape[0], math.prod(shape[1:])


def matrix_of(weight: torch.Tensor, orientation: Orientation) -> torch.Tensor:
    """The weight [N, K] that the tensor of a parameter holds; a view where that can be."""
    if orientation == "columns":
        return weight.detach().t()
    if orientation == "stacked rows":
        return weight.detach().flatten(0, 1)
    if orientation == "stacked columns":
        return weight.detach().transpose(1, 2).flatten(0, 1)
    return weight.detach().flatten(1)


def tensor_of(matrix: torch.Tensor, shape: Sequence[int], orientation: Orientation) -> torch.Tensor:
    """The other way round: a view of ``matrix`` [N, K] as a parameter of ``shape`` holds it."""
    if orientation == "columns":
        return matrix.t()
    if orientation == "stacked columns":
        experts, k, n = shape
        return matrix.view(experts, n, k).transpose(1, 2)
    return matrix.view(tuple(shape))


class PackedWeight(nn.Module):
    """A parametrization without a dense tensor: buffers with the packed tensors, and how to read them.

    ``shape`` and ``dtype`` are those of the parameter that it stands for. Made by ``packing`` a weight, or of
    packed tensors by ``holding`` them.
    """

    def __init__(
        self,
        scheme: Scheme,
        shape: Sequence[int],
        dtype: torch.dtype,
        orientation: Orientation,
        statistics: Mapping[str, torch.Tensor],
    ) -> None:
        super().__init__()
        self.scheme, self.orientation = scheme, orientation
        self.shape, self.dtype = tuple(shape), dtype
        self.statistics = dict(statistics)
        self.names: tuple[str, ...] = ()
        self._installed = False
        self.n, self.k = matrix_shape(self.shape, orientation)

    @classmethod
    def packing(
        cls,
        scheme: Scheme,
        weight: torch.Tensor,
        orientation: Orientation,
        statistics: Mapping[str, torch.Tensor],
    ) -> PackedWeight:
        """``weight``, packed. Raises ``QuantizationError`` where the scheme does not take it."""
        made = cls(scheme, weight.shape, weight.dtype, orientation, statistics)
        made._pack(made._matrix(weight))
        # Those of pairs of inputs are as large as the weight: one that is assigned later does without.
        made.statistics = {name: value for name, value in made.statistics.items() if value.dim() < 2}
        return made

    @classmethod
    def holding(
        cls,
        scheme: Scheme,
        packed: Mapping[str, torch.Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        orientation: Orientation,
        statistics: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> PackedWeight:
        """The weight of ``shape`` and ``dtype`` that ``packed`` tensors stand for, which are kept as they
        are. Raises ``QuantizationError`` where the scheme has no such weights or tensors."""
        made = cls(scheme, shape, dtype, orientation, statistics)
        device = next(iter(packed.values())).device if packed else torch.device("cpu")
        reason = scheme.refuses(made.n, made.k, dtype, device)
        reason = reason or scheme.refuses_packed(packed, made.n, made.k, dtype)
        if reason is not None:
            raise QuantizationError(f"no weight {made.shape} is packed so as {scheme_text(scheme)}: {reason}")
        made._keep(packed)
        return made

    def forward(self, placeholder: torch.Tensor) -> torch.Tensor:
        """The weight; ``placeholder`` is an empty tensor that torch keeps for it."""
        packed = [getattr(self, name) for name in self.names]
        unpack = operator_named(self.scheme.unpack_op)
        matrix: torch.Tensor = unpack(*packed, *self.scheme.constants(self.n, self.k), self.dtype)
        return tensor_of(matrix, self.shape, self.orientation)

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        """Packs ``weight``, which is assigned; gives the empty tensor that is kept in its place."""
        if not self._installed:
            return weight.new_empty(0)  # torch asks once more as it puts this in a module
        if tuple(weight.shape) != self.shape:
            raise QuantizationError(
                f"cannot pack a weight of shape {tuple(weight.shape)} as {scheme_text(self.scheme)}: "
                f"expected {self.shape}"
            )
        self._pack(self._matrix(weight))
        return weight.new_empty(0)

    def packed(self) -> dict[str, torch.Tensor]:
        """The packed tensors by name."""
        return {name: getattr(self, name) for name in self.names}

    def extra_repr(self) -> str:
        return f"{scheme_text(self.scheme)}, shape={self.shape}, dtype={self.dtype}"

    def _matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return matrix_of(weight, self.orientation)

    def _pack(self, matrix: torch.Tensor) -> None:
        """All of it or nothing: what is there stays where the weight cannot be packed."""
        reason = reason_of_weight(matrix) or self.scheme.refuses_numbers(matrix, self.statistics)
        if reason is not None:
            raise QuantizationError(f"cannot pack a weight as {scheme_text(self.scheme)}: {reason}")
        with torch.no_grad():
            packed = self.scheme.pack(matrix, self.statistics)
        self._keep(packed)

    def _keep(self, packed: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in packed.items():
            there = self._buffers.get(name)
            if there is not None and there.shape == tensor.shape and there.dtype is tensor.dtype:
                there.copy_(tensor)
            else:
                self.register_buffer(name, tensor.contiguous())
        self.names = tuple(packed)


@dataclass(frozen=True)
class _Place:
    """A parameter and every attribute that holds it."""

    fqn: str
    parameter: nn.Parameter
    owners: tuple[tuple[str, nn.Module, str], ...]


def pack_weights(
    model: nn.Module,
    schemes: Mapping[str, tuple[Scheme, Orientation]],
    statistics: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
) -> None:
    """Pack the parameters named in ``schemes`` (dotted names of ``model``), in place, and free them.

    Tied parameters are packed once, under any of their names. ``statistics``: what calibration found, by
    parameter. Everything is checked before anything changes.

    Raises ``UnknownNameError`` for a name that is no parameter, and ``QuantizationError``, naming the
    parameter, for one that its scheme does not take.
    """
    places = _places(model, schemes)
    for place in places:
        scheme, orientation = schemes[place.fqn]
        _check(place, scheme, orientation, (statistics or {}).get(place.fqn, {}))
    for place in places:
        scheme, orientation = schemes[place.fqn]
        found = (statistics or {}).get(place.fqn, {})
        try:
            packed = PackedWeight.packing(scheme, place.parameter, orientation, found)
        except QuantizationError as error:
            raise QuantizationError(f"{place.fqn}: {error.message}", hint=error.hint) from None
        place.parameter.requires_grad_(False)
        place.parameter.grad = None
        _install(place, packed)


def install_packed(model: nn.Module, packed: Mapping[str, PackedWeight]) -> None:
    """Put weights that are packed already in the place of the parameters that they stand for, which are
    freed. Raises as ``pack_weights`` does for names."""
    for place in _places(model, packed):
        place.parameter.requires_grad_(False)
        place.parameter.grad = None
        _install(place, packed[place.fqn])


def _install(place: _Place, packed: PackedWeight) -> None:
    packed._installed = False
    # An empty tensor stays where the parameter was: on the device of the packed ones, not on meta.
    empty = torch.empty(0, dtype=packed.dtype, device=next(packed.buffers()).device)
    for _, owner, name in place.owners:
        if place.parameter.is_meta:
            setattr(owner, name, nn.Parameter(empty, requires_grad=False))
        parametrize.register_parametrization(owner, name, packed, unsafe=True)
        owner.register_state_dict_post_hook(_Saved(name))  # type: ignore[no-untyped-call]
        owner.register_load_state_dict_pre_hook(_Loaded(name))  # type: ignore[no-untyped-call]
    packed._installed = True


def converted(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, PackedWeight]]:
    """Every attribute that is packed: dotted name, module, attribute, and the packed weight. Tied ones come
    once for each name."""
    for prefix, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for name, chain in module.parametrizations.items():
            if isinstance(chain[0], PackedWeight):
                yield f"{prefix}.{name}" if prefix else name, module, name, chain[0]


def packed_weights(model: nn.Module) -> dict[str, PackedWeight]:
    """Packed weights by the first of their names."""
    found: dict[int, tuple[str, PackedWeight]] = {}
    for fqn, _, _, packed in converted(model):
        found.setdefault(id(packed), (fqn, packed))
    return dict(found.values())


def _places(model: nn.Module, names: Mapping[str, Any]) -> list[_Place]:
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    by_name: dict[str, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            fqn = f"{prefix}.{name}" if prefix else name
            by_name[fqn] = parameter
            owners.setdefault(id(parameter), []).append((fqn, module, name))
    found: dict[int, _Place] = {}
    done = {fqn: packed for fqn, _, _, packed in converted(model)}
    known = [fqn for fqn in by_name if ".parametrizations." not in f".{fqn}"]
    for fqn in names:
        if fqn in done:
            raise QuantizationError(f"{fqn} is packed already, as {scheme_text(done[fqn].scheme)}")
        if fqn not in by_name:
            raise UnknownNameError("parameter", fqn, known)
        parameter = by_name[fqn]
        first = found.get(id(parameter))
        if first is not None:
            raise QuantizationError(f"{fqn} and {first.fqn} are one parameter: name one of them")
        found[id(parameter)] = _Place(fqn, parameter, tuple(owners[id(parameter)]))
    return list(found.values())


def _check(
    place: _Place, scheme: Scheme, orientation: Orientation, statistics: Mapping[str, torch.Tensor]
) -> None:
    weight = place.parameter
    what = f"{place.fqn} {tuple(weight.shape)} cannot be packed as {scheme_text(scheme)}"
    if not weight.is_floating_point() or weight.dim() < 2:
        raise QuantizationError(f"{what}: it is no matrix of floating-point numbers")
    if orientation == "columns" and weight.dim() != 2:
        raise QuantizationError(f"{what}: only matrices are read by columns")
    if orientation.startswith("stacked") and weight.dim() != 3:
        raise QuantizationError(f"{what}: a stack of matrices has three dimensions")
    if any(parametrize.is_parametrized(owner, name) for _, owner, name in place.owners):
        raise QuantizationError(f"{what}: it is parametrized already")
    n, k = matrix_shape(tuple(weight.shape), orientation)
    reason = scheme.refuses(n, k, weight.dtype, weight.device) or scheme.lacks(k, statistics)
    reason = reason or reason_of_weight(weight.detach())
    reason = reason or scheme.refuses_numbers(matrix_of(weight, orientation), statistics)
    if reason is not None:
        raise QuantizationError(f"{what}: {reason}")


# --- state ------------------------------------------------------------------------------------------


@dataclass
class _Saved:
    """Names packed tensors after the parameter: ``weight.codes``."""

    name: str

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        inner = f"{prefix}parametrizations.{self.name}."
        state.pop(f"{inner}original", None)
        for key in [key for key in state if key.startswith(f"{inner}0.")]:
            state[f"{prefix}{self.name}.{key.removeprefix(f'{inner}0.')}"] = state.pop(key)


@dataclass
class _Loaded:
    """Takes packed tensors by those names, or a dense tensor under the parameter's own."""

    name: str

    def __call__(
        self,
        module: nn.Module,
        state: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        chain: Any = module.parametrizations[self.name]  # type: ignore[index]
        packed: PackedWeight = chain[0]
        inner = f"{prefix}parametrizations.{self.name}."
        dense = state.pop(f"{prefix}{self.name}", None)
        if dense is not None:
            like = next(packed.buffers())
            try:
                packed.right_inverse(dense.to(device=like.device, dtype=packed.dtype))
            except QuantizationError as error:
                errors.append(f"{prefix}{self.name}: {error.message}")
        given = {key: state.pop(f"{prefix}{self.name}.{key}", None) for key in packed.names}
        absent = [f".{key}" for key, value in given.items() if value is None]
        if dense is None and strict and absent:
            whole = len(absent) == len(given)
            missing.extend(f"{prefix}{self.name}{key}" for key in ([""] if whole else absent))
        # What did not come stays; torch copies tensors onto themselves.
        for key, there in packed.packed().items():
            if not packed.scheme.exact_bytes and given[key] is not None:
                # Of another size perhaps: torch copies into what is there.
                there.resize_(given[key].shape)
            state[f"{inner}0.{key}"] = there if given[key] is None else given[key]
        state[f"{inner}original"] = chain.original
