"""Where the tensors of a model are: what ``state_dict`` names, and who holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphopt.errors import CheckpointError
from graphopt.packing.convert import PackedWeight, converted

__all__ = ["Place", "places_of", "replace_tensor"]


@dataclass
class Place:
    """``attribute`` of ``owner``, whose value is ``tensor``; ``packed`` where a packed weight stands for it,
    ``tensor`` then being an empty one that is kept in its place."""

    owner: nn.Module
    attribute: str
    tensor: torch.Tensor
    packed: PackedWeight | None = None

    @property
    def same(self) -> int:
        """Equal for names of one tensor."""
        return id(self.tensor if self.packed is None else self.packed)


def places_of(model: nn.Module) -> dict[str, Place]:
    """Parameters and buffers that are saved, by name; tied ones under each of theirs. A packed weight goes by
    the name of its parameter."""
    found: dict[str, Place] = {}
    inner = set()
    for name, owner, attribute, packed in converted(model):
        chain: Any = owner.parametrizations[attribute]  # type: ignore[index]
        found[name] = Place(owner, attribute, chain.original, packed)
        inner |= {f"{name}.{key}" for key in packed.names}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in inner or not isinstance(tensor, torch.Tensor):
            continue
        prefix, _, attribute = name.rpartition(".")
        try:
            owner = model.get_submodule(prefix)
            held = getattr(owner, attribute)
        except AttributeError:
            held = None
        if held is not tensor:
            raise CheckpointError(f"cannot load {name}: the model's state_dict names what no module holds")
        found[name] = Place(owner, attribute, tensor)
    return found


def replace_tensor(places: Mapping[str, Place], name: str, value: torch.Tensor, device: torch.device) -> None:
    """Put ``value`` in the place of that name, as the dtype that is there: copied, packed, or, where the
    model is on the meta device, in a tensor on ``device`` that all of its names share."""
    place = places[name]
    if place.packed is not None:
        like = next(place.packed.buffers())
        place.packed.right_inverse(value.to(device=like.device, dtype=place.packed.dtype))
        return
    old = place.tensor
    if not old.is_meta:
        with torch.no_grad():
            old.copy_(value)
        return
    new: torch.Tensor = value.to(device=device, dtype=old.dtype)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for other in places.values():
        if other.tensor is old:
            setattr(other.owner, other.attribute, new)
            other.tensor = new
