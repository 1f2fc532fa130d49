"""A captured program as a Python file that makes the model again, without the code that it came from.

Values of tensors are not kept: floating-point ones are drawn with the mean and the deviation of the real
ones, integers between their least and their largest, booleans with their share.
"""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from graphopt.program import InputSpec, Program

__all__ = ["NotAlone", "model_source", "tensor_notes"]

_HEAD = '''\
"""The captured program, with tensors drawn like those of the model: make() gives model and inputs."""

import json
from math import inf, nan
from pathlib import Path

import torch
from torch import device

HERE = Path(__file__).parent


'''

_MIDDLE = """

class Model(torch.nn.Module):
    def __init__(self, tensors):
        super().__init__()
        self.program, self.held = Program(), torch.nn.Module()
        for note, value in tensors:
            if note["role"] not in ("parameter", "buffer"):
                continue
            owner, names = self.held, note["name"].split(".")
            for name in names[:-1]:
                if not hasattr(owner, name):
                    owner.add_module(name, torch.nn.Module())
                owner = getattr(owner, name)
            if note["role"] == "parameter":
                owner.register_parameter(names[-1], torch.nn.Parameter(value, note["requires_grad"]))
            else:
                owner.register_buffer(names[-1], value)

"""

_TAIL = """

def make():
    notes = json.loads((HERE / "tensors.json").read_text(encoding="utf-8"))
    kept = {}
    if (HERE / "tensors.safetensors").exists():
        from graphopt.tensors_file import read_tensors

        kept = read_tensors(HERE / "tensors.safetensors")[0]
    tensors = [(note, _tensor(index, note, kept)) for index, note in enumerate(notes)]
    model = Model(tensors).train(TRAINING)
    given = [(n, v) for n, v in tensors if n["role"] not in ("parameter", "buffer")]
    return model, tuple(value.requires_grad_(note["requires_grad"]) for note, value in given)


def _tensor(index, note, kept):
    dtype = getattr(torch, note["dtype"])
    if str(index) in kept:
        value = kept[str(index)]
    else:
        draw = torch.Generator().manual_seed(index)
        if dtype is torch.bool:
            value = torch.rand(note["shape"], generator=draw) < note["mean"]
        elif dtype.is_floating_point:
            value = torch.randn(note["shape"], generator=draw) * note["std"] + note["mean"]
        else:
            value = torch.randint(note["low"], note["high"] + 1, note["shape"], generator=draw)
    laid_out = torch.empty_strided(note["shape"], note["stride"], dtype=dtype, device=note["device"])
    return laid_out.copy_(value)
"""


class NotAlone(Exception):
    """The program cannot be written without the code of the model; the message says why."""


def model_source(program: Program, *, training: bool) -> str:
    """The file. Raises ``NotAlone`` for programs that hold constants or bodies, or with symbolic sizes."""
    from graphopt.dump.python import program_python

    if program.has_symbolic_sizes:
        raise NotAlone("sizes of it are symbolic")
    held = [str(node.target) for node in program.graph.nodes if node.op == "get_attr"]
    if held:
        raise NotAlone(f"it holds {held[0]}")
    arguments: list[str] = []
    places: list[str] = []
    for spec in program.signature.inputs:
        if spec.role in ("parameter", "buffer"):
            arguments.append(_reading(_name(spec)))
        else:
            places.append(f"x{len(places)}")
            arguments.append(places[-1])
    forward = f"    def forward({', '.join(['self', *places])}):\n        return self.program(\n"
    forward += "".join(f"            {argument},\n" for argument in arguments) + "        )\n"
    training_line = f"\nTRAINING = {training}\n"
    return _HEAD + program_python(program) + _MIDDLE + forward + training_line + _TAIL


def tensor_notes(
    program: Program, model: torch.nn.Module, inputs: Any
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """What ``tensors.json`` says of each input of the program, and their values by their place in it.

    Raises ``NotAlone`` for an input that is neither the model's nor the caller's.
    """
    import torch

    known: Mapping[str, torch.Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    given = [leaf for leaf in torch.utils._pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    by_node = {node.name: node for node in program.graph.nodes}
    notes, values = [], {}
    for index, spec in enumerate(program.signature.inputs):
        wanted = by_node[spec.node].meta.get("val")
        if not isinstance(wanted, torch.Tensor):
            raise NotAlone(f"its input {spec.node} is a {type(wanted).__name__}")
        found = known.get(spec.fqn)
        if spec.role not in ("parameter", "buffer"):
            found = next((t for t in given if (t.shape, t.dtype) == (wanted.shape, wanted.dtype)), None)
            given = [t for t in given if t is not found]
        if found is None or found.is_complex():
            raise NotAlone(f"its input {spec.fqn or spec.node} is no tensor of the model or the inputs")
        values[str(index)] = found
        notes.append(_note(spec, found))
    return notes, values


def _note(spec: InputSpec, tensor: torch.Tensor) -> dict[str, Any]:
    import torch

    note: dict[str, Any] = {
        "role": spec.role,
        "name": _name(spec),
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "device": str(tensor.device),
        "requires_grad": tensor.requires_grad,
    }
    plain = tensor.detach()
    if tensor.dtype.is_floating_point or tensor.dtype is torch.bool:
        numbers = plain.double()
        numbers = numbers[numbers.isfinite()]
        note["mean"] = float(numbers.mean()) if numbers.numel() else 0.0
        note["std"] = float(numbers.std(correction=0)) if numbers.numel() else 0.0
    else:
        note["low"] = int(plain.min()) if plain.numel() else 0
        note["high"] = int(plain.max()) if plain.numel() else 0
    return note


def _name(spec: InputSpec) -> str:
    return spec.fqn or spec.node


def _reading(name: str) -> str:
    text = "self.held"
    for part in name.split("."):
        plain = part.isidentifier() and not keyword.iskeyword(part)
        text = f"{text}.{part}" if plain else f'getattr({text}, "{part}")'
    return text
