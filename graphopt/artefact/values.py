"""Arguments and types of nodes as JSON, and back.

    %x, torch.bfloat16, [1, 2]     <->     {"ref": "x"}, {"dtype": "bfloat16"}, [1, 2]

What JSON cannot spell is an object with one key that says what it is. Lists are lists, tuples
``{"tuple": [...]}``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx

from graphopt.artefact.operators import Operators, target_text
from graphopt.errors import ArtefactError
from graphopt.program import tensor_leaves

__all__ = ["argument_json", "argument_of", "dtype_named", "like", "type_json", "type_of"]

_LAYOUTS = {"strided": torch.strided}
_FORMATS = {
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}


def argument_json(value: Any) -> Any:
    """An argument of a node. Raises ``ArtefactError`` for what has no such form."""
    if isinstance(value, fx.Node):
        return {"ref": value.name}
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, complex):
        return {"complex": [argument_json(value.real), argument_json(value.imag)]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for key, known in (("layout", _LAYOUTS), ("memory_format", _FORMATS)):
        for name, member in known.items():
            if value is member:
                return {key: name}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, slice):
        return {"slice": [argument_json(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, tuple):
        return {"tuple": [argument_json(item) for item in value]}
    if isinstance(value, list):
        return [argument_json(item) for item in value]
    if isinstance(value, Mapping) and all(type(key) is str for key in value):
        return {"dict": {key: argument_json(item) for key, item in value.items()}}
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        raise ArtefactError(
            "sizes of the program are known at run time alone, which artefacts cannot hold",
            hint="optimize with dynamic_shapes=False, and save one artefact for each size",
        )
    if isinstance(value, torch._ops.OpOverload):
        return {"operator": target_text(value)}
    raise ArtefactError(f"the program is given a {type(value).__name__}, which an artefact cannot hold")


def argument_of(data: Any, values: Mapping[str, fx.Node], operators: Operators) -> Any:
    """What ``argument_json`` wrote, ``values`` being the nodes before. Raises ``ArtefactError``."""
    if data is None or type(data) in (bool, int, float, str):
        return data
    if isinstance(data, list):
        return [argument_of(item, values, operators) for item in data]
    if not isinstance(data, dict) or len(data) != 1:
        raise ArtefactError(f"a node is given {str(data)[:60]!r}, which is no argument")
    ((kind, inner),) = data.items()
    if kind == "ref":
        if not isinstance(inner, str) or inner not in values:
            raise ArtefactError(f"a node reads {str(inner)[:60]!r}, which no node before it makes")
        return values[inner]
    if kind == "tuple" and isinstance(inner, list):
        return tuple(argument_of(item, values, operators) for item in inner)
    if kind == "dict" and isinstance(inner, dict):
        return {key: argument_of(item, values, operators) for key, item in inner.items()}
    if kind == "slice" and isinstance(inner, list) and len(inner) == 3:
        return slice(*(argument_of(item, values, operators) for item in inner))
    if kind == "complex" and isinstance(inner, list) and len(inner) == 2:
        parts = [argument_of(item, values, operators) for item in inner]
        if all(isinstance(part, (int, float)) for part in parts):
            return complex(*parts)
    if kind == "ellipsis" and inner is True:
        return Ellipsis
    if isinstance(inner, str) and kind in _NAMED:
        return _NAMED[kind](inner)
    if kind == "operator" and isinstance(inner, str):
        return operators.target(inner)
    raise ArtefactError(f"a node is given {str(data)[:60]!r}, which is no argument")


def _member(kind: str, known: Mapping[str, Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if text not in known:
            raise ArtefactError(f"{text[:60]!r} is no {kind}", hint=f"known: {', '.join(known)}")
        return known[text]

    return read


def dtype_named(text: str) -> torch.dtype:
    """``"bfloat16"`` -> ``torch.bfloat16``. Raises ``ArtefactError``."""
    found = getattr(torch, text, None) if text.isidentifier() else None
    if not isinstance(found, torch.dtype):
        raise ArtefactError(f"{text[:60]!r} is no dtype")
    return found


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError:
        raise ArtefactError(f"{text[:60]!r} is no device") from None


_NAMED: Mapping[str, Callable[[str], Any]] = {
    "float": _member("float", {text: float(text) for text in ("inf", "-inf", "nan")}),
    "dtype": dtype_named,
    "device": _device,
    "layout": _member("layout", _LAYOUTS),
    "memory_format": _member("memory format", _FORMATS),
}


def type_json(value: Any) -> Any:
    """What a node's ``meta["val"]`` looks like: a tensor as an object, several as a list, else ``None``."""
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided:
            raise ArtefactError(f"the program has a tensor of layout {value.layout}")
        return {
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": [argument_json(size) for size in value.shape],
            "stride": [argument_json(step) for step in value.stride()],
            "device": str(value.device),
        }
    if isinstance(value, (tuple, list)) and tensor_leaves(value):
        return [type_json(item) for item in value]
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        argument_json(value)
    return None


def type_of(data: Any) -> Any:
    """A tensor, or a list of them, that looks as ``data`` says. Raises ``ArtefactError``."""
    if data is None:
        return None
    if isinstance(data, list):
        return [type_of(item) for item in data]
    return like(data)


def like(data: Any) -> torch.Tensor:
    """An empty tensor that looks as ``type_json`` says of one. Raises ``ArtefactError``."""
    if not isinstance(data, dict) or sorted(data) != ["device", "dtype", "shape", "stride"]:
        raise ArtefactError(f"{str(data)[:60]!r} is no type of a tensor")
    shape, stride = _sizes(data["shape"]), _sizes(data["stride"])
    if len(shape) != len(stride) or not isinstance(data["dtype"], str) or not isinstance(data["device"], str):
        raise ArtefactError(f"{str(data)[:60]!r} is no type of a tensor")
    device = _device(data["device"])
    try:
        return torch.empty_strided(shape, stride, dtype=dtype_named(data["dtype"]), device=device)
    except RuntimeError as error:
        raise ArtefactError(f"a tensor of shape {list(shape)} cannot be made: {error}") from error


def _sizes(data: Any) -> Sequence[int]:
    if not isinstance(data, list) or not all(type(size) is int and 0 <= size < 1 << 62 for size in data):
        raise ArtefactError(f"{str(data)[:60]!r} are no sizes")
    return tuple(data)
