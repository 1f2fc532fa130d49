"""The text of ``program.py``: a module with the model's parameters that runs the emitted halves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graphopt_kernels.emit.halves import Half
from graphopt_kernels.emit.tensors_file import READER

__all__ = ["Argument", "ProgramText", "Result"]


@dataclass(frozen=True)
class Argument:
    """An input of the forward half. ``source`` is the expression that gives it: a parameter or buffer by
    name, or a part of the inputs of a call. ``check``: what a user's tensor has to be like."""

    name: str
    role: str
    source: str
    tensor: torch.Tensor


@dataclass(frozen=True)
class Result:
    """An output of the forward half that the caller sees. ``differentiable``: the backward takes a gradient
    of it."""

    name: str
    differentiable: bool
    tensor: torch.Tensor


@dataclass(frozen=True)
class ProgramText:
    """Everything that ``program.py`` says. ``output`` is the expression of the module's result in terms of
    ``results``; ``mutations``: (result number, name of the buffer that it goes to)."""

    title: str
    signature: str
    described: Sequence[str]
    arguments: Sequence[Argument]
    results: Sequence[Result]
    mutations: Sequence[tuple[int, str]]
    output: str
    constants: Sequence[tuple[str, Any]]
    parameters: Mapping[str, torch.Tensor]
    buffers: Mapping[str, torch.Tensor]
    forward: Half
    backward: Half | None
    ops: str
    seed: int
    device: str
    loss: str
    example: str
    gradients: Sequence[str] = field(default_factory=tuple)

    def written(self) -> str:
        parts = [self._head(), READER, self._loading(), self.forward.text]
        if self.backward is not None:
            parts += [self.backward.text, self._step()]
        parts += [self._module(), self._check()]
        return "\n\n".join(part.strip("\n") for part in parts) + "\n"

    def _head(self) -> str:
        kernels = len({k.file.name for k in self._kernels()})
        lines = [
            f'"""{self.title}',
            "",
            *self.described,
            "",
            f"Parameters are in weights.safetensors, {kernels} Triton kernels in kernels/. On CUDA the",
            "kernels run, elsewhere the operators of ATen that they stand for. Use::",
            "",
            '    program = load("cuda")',
            f"    output = program({self.signature})",
            "",
            "or check it on the recorded example: ``python program.py --check``.",
            '"""',
            "",
            "import argparse",
            "import importlib.util",
            "import json",
            "import os",
            "import sys",
            "from pathlib import Path",
            "from types import SimpleNamespace",
            "",
            "import torch",
            "",
            "HERE = Path(__file__).resolve().parent",
        ]
        return "\n".join(lines)

    def _kernels(self) -> list[Any]:
        halves = [self.forward] + ([self.backward] if self.backward is not None else [])
        return [kernel for half in halves for kernel in half.grouping.kernels]

    def _loading(self) -> str:
        names = sorted({kernel.file.name for kernel in self._kernels()})
        lines = ["KERNELS = ("] + [f'    "{name}",' for name in names] + [")"]
        if not names:
            lines = ["KERNELS = ()"]
        text = "\n".join(lines)
        text += '''


def _module(name, path, package=None):
    """Import a file under a name of its own."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=package)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _kernels(device):
    """For a device what runs each kernel: Triton on CUDA (or interpreted), else separate operators."""
    fused = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    found = SimpleNamespace()
    for name in KERNELS:
        module = _module(f"_kernel_{name}", HERE / "kernels" / f"{name}.py")
        setattr(found, name, module.launch if fused else module.reference)
    return found
'''
        if self.ops:
            text += f'''

_OPS = "{self.ops}"
_module(_OPS, HERE / "ops" / "__init__.py", [str(HERE / "ops")])
o = getattr(torch.ops, _OPS)
'''
        if self.forward.replays or (self.backward is not None and self.backward.replays):
            text += '''

def _random_state(device):
    """The state of the device's generator, from which a later call draws the same numbers again."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _with_random_state(state, function, *args, **kwargs):
    """Call ``function`` under a state of the generator; the generator then goes on where it was."""
    device = next(a.device for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
    cuda = device.type == "cuda"
    before = _random_state(device)
    torch.cuda.set_rng_state(state, device) if cuda else torch.set_rng_state(state)
    try:
        return function(*args, **kwargs)
    finally:
        torch.cuda.set_rng_state(before, device) if cuda else torch.set_rng_state(before)
'''
        return text

    def _step(self) -> str:
        """The forward and the backward as one differentiable function."""
        assert self.backward is not None
        mutated = len(self.mutations)
        shown = len(self.results)
        strides = [
            (tuple(r.tensor.shape), tuple(r.tensor.stride())) for r in self.results if r.differentiable
        ]
        trained = [i + mutated for i, r in enumerate(self.results) if r.differentiable]
        fixed = [i + mutated for i, r in enumerate(self.results) if not r.differentiable]
        return f'''
_TANGENTS = {strides!r}


class _Step(torch.autograd.Function):
    """forward() and backward() as one function that autograd can call."""

    @staticmethod
    def forward(ctx, k, device, *values):
        made = forward(k, device, list(values))
        ctx.k, ctx.device = k, device
        ctx.save_for_backward(*made[{mutated + shown}:])
        outputs = made[:{mutated + shown}]
        ctx.mark_non_differentiable(*(outputs[i] for i in {[*range(mutated), *fixed]!r}))
        ctx.set_materialize_grads(True)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *gradients):
        wanted = [gradients[i] for i in {trained!r}]
        tangents = [_laid_out(g, *at) for g, at in zip(wanted, _TANGENTS, strict=True)]
        values = [*ctx.saved_tensors, *tangents]
        ctx.maybe_clear_saved_tensors()
        del gradients, wanted, tangents
        return (None, None, *backward(ctx.k, ctx.device, values))
'''

    def _module(self) -> str:
        lines = [
            "class Program(torch.nn.Module):",
            f'    """Call it as ``program({self.signature})``; parameters have the names of the model\'s."""',
            "",
            "    def __init__(self, weights):",
            "        super().__init__()",
        ]
        for name, tensor in (*self.parameters.items(), *self.buffers.items()):
            trained = tensor.requires_grad if name in self.parameters else None
            at = f"{tuple(tensor.shape)}, {tuple(tensor.stride())}"
            lines.append(f'        self._register("{name}", weights["{name}"], {at}, {trained})')
        lines += ["        self._run = {}", "", *_REGISTER.strip("\n").split("\n"), ""]
        lines.append(
            f"    def forward(self, {self.signature}):" if self.signature else "    def forward(self):"
        )
        first = next((a.source for a in self.arguments if a.role != "input"), None)
        first = first or next((a.source for a in self.arguments), None)
        lines.append(f"        device = {first}.device" if first else '        device = torch.device("cpu")')
        for expression, value in self.constants:
            lines.append(f"        _same({expression!r}, {expression}, {value!r})")
        lines += ["        if device not in self._run:", "            self._run[device] = _kernels(device)"]
        lines += [
            "        values = [",
            *(f"            {_handed_over(a)}," for a in self.arguments),
            "        ]",
        ]
        if self.backward is not None:
            lines.append("        made = _Step.apply(self._run[device], device, *values)")
        else:
            lines.append("        made = forward(self._run[device], device, values)")
        if self.mutations:
            lines.append("        with torch.no_grad():")
            lines += [f"            {target}.copy_(made[{number}])" for number, target in self.mutations]
        for number, result in enumerate(self.results):
            lines.append(f"        {result.name} = made[{number + len(self.mutations)}]")
        lines.append(f"        return {self.output}")
        return "\n".join([_SUPPORT.strip("\n"), "", "", *lines, "", "", _LOAD.strip("\n")])

    def _check_gradients(self) -> str:
        if self.backward is None:
            return ""
        return f"""\
    loss = {self.loss}
    loss.backward()
    parameters = dict(program.named_parameters())
    sizes = [float(v.abs().max()) for n, v in recorded.items() if n.startswith("gradient ")]
    largest = max(sizes, default=0.0)
    for name in {list(self.gradients)!r}:
        gradient = parameters[name].grad
        at = _sampled(gradient.numel())
        expected = recorded[f"gradient {{name}}"]
        rows.append(_compared(f"gradient of {{name}}", gradient.reshape(-1)[at], expected, largest))
"""

    def _check(self) -> str:
        random = self.forward.random or (self.backward is not None and self.backward.random)
        return f'''
def check(device):
    """Run the recorded example on ``device``; lines that say how far results are from the recorded ones, and
    whether all are near enough."""
    recorded = {{name: value.to(device) for name, value in _tensors(HERE / "example.safetensors").items()}}
    program = load(device)
    torch.manual_seed({self.seed})
    with torch.set_grad_enabled({self.backward is not None}):
        output = program({self.example})
    found = {{}}
    _leaves("output", output, found)
    rows, near = [], True
    for name, value in found.items():
        rows.append(_compared(name, value.detach(), recorded[name]))
{self._check_gradients()}    if {random} and torch.device(device).type != {self.device!r}:
        print("random numbers of {self.device} were recorded: results on", device, "differ")
        return rows, True
    return rows, all(error <= allowed for _, error, allowed in rows)


def _sampled(count):
    """Positions of up to 1,024 elements, evenly spread."""
    return torch.arange(min(count, 1024)) * max(1, count // 1024)


def _compared(name, value, expected, largest=0.0):
    """(name, largest error, what is allowed): relative to the largest recorded element, or to a hundredth of
    ``largest`` where that is more: gradients that are 0 but for rounding have no scale of their own."""
    if not value.dtype.is_floating_point:
        return name, float((value != expected).sum()), 0.0
    scale = float(expected.abs().nan_to_num().max()) if expected.numel() else 0.0
    scale = max(scale, largest / 100)
    error = (value.double() - expected.double()).abs()
    same = (value == expected) | (value.isnan() & expected.isnan())
    error = torch.where(same, torch.zeros_like(error), error)
    largest = float(error.max()) / (scale or 1.0) if error.numel() else 0.0
    return name, largest, 256 * torch.finfo(value.dtype).eps


def _leaves(path, value, found):
    """The tensors of a result, by where they are in it."""
    if isinstance(value, torch.Tensor):
        found[path] = value
    elif isinstance(value, dict):
        for key, item in value.items():
            _leaves(f"{{path}}[{{key!r}}]", item, found)
    elif isinstance(value, (tuple, list)):
        for number, item in enumerate(value):
            _leaves(f"{{path}}[{{number}}]", item, found)


def main():
    parser = argparse.ArgumentParser(description={self.title!r})
    parser.add_argument("--check", action="store_true", help="run the recorded example and compare")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if not options.check:
        parser.print_help()
        return 0
    rows, near = check(options.device)
    for name, error, allowed in rows:
        if error > allowed:
            print(f"{{name}}: off by {{error:.3g}} of its largest element, allowed {{allowed:.3g}}")
    name, error, _ = max(rows, key=lambda row: row[1])
    print(f"{{len(rows)}} tensors on {{options.device}}; largest error {{error:.3g}} ({{name}})")
    return 0 if near else 1


if __name__ == "__main__":
    sys.exit(main())
'''


def _handed_over(argument: Argument) -> str:
    """What a call hands to the forward: an input is checked first."""
    if argument.role != "input":
        return argument.source
    tensor = argument.tensor
    at = f"{tuple(tensor.shape)}, {tuple(tensor.stride())}, {tensor.dtype}, device"
    return f"_checked({argument.source!r}, {argument.source}, {at})"


_SUPPORT = '''
def _laid_out(tensor, shape, strides):
    """``tensor`` with the strides that kernels were written for."""
    if tensor.stride() == strides or tensor.numel() < 2:
        return tensor
    made = torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device)
    return made.copy_(tensor)


def _checked(name, tensor, shape, strides, dtype, device):
    """An input as the program takes it; raises ``ValueError`` for one that it does not take."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} is {type(tensor).__name__}; expected a tensor of shape {shape}")
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
        found = f"{tuple(tensor.shape)}, {tensor.dtype}, on {tensor.device}"
        raise ValueError(f"{name} is {found}; this program takes {shape}, {dtype}, on {device}")
    return _laid_out(tensor, shape, strides)


def _same(name, value, expected):
    """Raise ``ValueError`` for a value other than the one that the program was made for."""
    if value != expected:
        raise ValueError(f"{name} is {value!r}; this program was made for {expected!r}")
'''

_REGISTER = '''
    def _register(self, name, tensor, shape, strides, trained):
        """Put a buffer (``trained`` is ``None``) or a parameter in its place."""
        *path, last = name.split(".")
        owner = self
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, torch.nn.Module())
            owner = owner._modules[part]
        tensor = _laid_out(tensor, shape, strides)
        if trained is None:
            owner.register_buffer(last, tensor)
        else:
            owner.register_parameter(last, torch.nn.Parameter(tensor, requires_grad=trained))
'''

_LOAD = '''
def load(device="cpu"):
    """The program as a ``torch.nn.Module`` on ``device``, with the recorded parameters.

    Its parameters and buffers have the names that they have in the model: ``load_state_dict`` takes the
    model's checkpoints (``strict=False`` where the program does not use all of them).
    """
    return Program(_tensors(HERE / "weights.safetensors")).to(device)
'''
