"""A folder that runs an optimized program with nothing but torch and triton installed.

``program.py`` (see ``program_file``), ``kernels/`` with a file for each distinct kernel,
``weights.safetensors``,
``example.safetensors`` with the inputs and results of one call, and ``ops/`` where operators of graphopt
are called.
"""

from __future__ import annotations

import inspect
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graphopt import __version__
from graphopt.errors import EmitError
from graphopt.optimized import Optimized
from graphopt.plugins import default_host
from graphopt.recorded import ProgramCall, record_call
from graphopt.restored import restored
from graphopt.tensors_file import write_tensors
from graphopt_kernels.emit.aten_code import identifier
from graphopt_kernels.emit.build import NotFusible
from graphopt_kernels.emit.carried_ops import CARRIED, carried_ops
from graphopt_kernels.emit.groups import peak_ungrouped
from graphopt_kernels.emit.halves import Half, half_of, owned_inputs
from graphopt_kernels.emit.product_choice import prices_for
from graphopt_kernels.emit.program_file import Argument, ProgramText, Result

__all__ = ["Emitted", "write_program"]

_SEED = 0


@dataclass(frozen=True)
class Emitted:
    """What was written. ``kernels``: launches in a step; ``files``: distinct kernels; ``calls``: calls of
    ATen
    that move data, views left out."""

    directory: Path
    kernels: int
    files: int
    calls: int


def write_program(optimized: Optimized, inputs: Any, directory: Path, title: str) -> Emitted:
    """Write the program that ``optimized`` runs for ``inputs`` into ``directory``.

    A folder that is there is replaced if it was written by this function. Raises ``EmitError`` for
    programs that
    cannot stand alone: several graphs, operators of plugins, results that are not the program's.
    """
    marker = directory / "program.py"
    if directory.exists() and not (directory.is_dir() and (marker.is_file() or not any(directory.iterdir()))):
        raise EmitError(
            f"{str(directory)!r} exists and holds something else", hint="name an empty or a new folder"
        )
    model = optimized._model
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    with restored(model, parameters):
        for parameter in parameters:
            parameter.grad = None
        torch.manual_seed(_SEED)
        recorded = record_call(optimized, inputs)
        if len(recorded.calls) != 1:
            raise EmitError(
                f"the model runs as {len(recorded.calls)} programs with code of its own between them",
                hint="a model without graph breaks can be written out",
            )
        (call,) = recorded.calls
        text, example, halves = _program(optimized, call, inputs, recorded.output, title)
        written = text.written()
    weights = {name: tensor.detach() for name, tensor in text.parameters.items()} | {
        name: before.get(name, tensor) for name, tensor in text.buffers.items()
    }
    temporary = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.tmp")
    try:
        (temporary / "kernels").mkdir(parents=True)
        (temporary / "program.py").write_text(written, encoding="utf-8")
        kernels = [kernel for half in halves for kernel in half.grouping.kernels]
        layers: dict[str, list[str]] = {}
        for kernel in kernels:
            layers.setdefault(kernel.file.name, []).extend(kernel.layers)
        for kernel in {kernel.file.name: kernel for kernel in kernels}.values():
            path = temporary / "kernels" / f"{kernel.file.name}.py"
            path.write_text(_with_layers(kernel.file.source, layers[kernel.file.name]), encoding="utf-8")
        if text.ops:
            for name, source in carried_ops(_modules(halves))[1].items():
                path = temporary / "ops" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(source, encoding="utf-8")
        write_tensors(temporary / "weights.safetensors", weights)
        write_tensors(temporary / "example.safetensors", example)
        if directory.exists():
            shutil.rmtree(directory)
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    files = len({kernel.file.name for kernel in kernels})
    return Emitted(directory, len(kernels), files, sum(half.calls for half in halves))


def _with_layers(source: str, layers: Sequence[str]) -> str:
    """A kernel's file with the layers of the model that it was made for."""
    names = list(dict.fromkeys(layers))
    if not names:
        return source
    head, rest = source.split("\n\n", 1)
    return f"{head}\n\nlayers  {', '.join(names)}\n{rest}"


def _program(
    optimized: Optimized, call: ProgramCall, inputs: Any, output: Any, title: str
) -> tuple[ProgramText, dict[str, torch.Tensor], list[Half]]:
    model = optimized._model
    names, signature = _parameters_of(model, inputs)
    leaves = list(_leaves(dict(zip(names, _values(inputs), strict=True))))
    given = {id(value): path for path, value in leaves if isinstance(value, torch.Tensor)}
    constants = [(path, value) for path, value in leaves if not isinstance(value, torch.Tensor)]
    for path, value in constants:
        if not isinstance(value, (bool, int, float, str, type(None))):
            raise EmitError(f"{path} is {type(value).__name__}: programs take tensors, numbers and text")
    arguments = _arguments(call, given)
    try:
        called = {
            spec.node: argument.name
            for spec, argument in zip(call.forward.signature.inputs, arguments, strict=True)
        }
        parts = [call.forward] + ([call.backward] if call.backward is not None else [])
        # One limit for both: where the other half holds more, this one may.
        limit = max(peak_ungrouped(part.graph, owned_inputs(part)) for part in parts)
        prices = prices_for(optimized.plan.device)
        forward = half_of(call.forward, "forward", called, limit, prices)
        backward = None
        if call.backward is not None:
            backward = half_of(call.backward, "backward", called, limit, prices)
    except NotFusible as error:
        raise EmitError(f"the program cannot be written out: {error.reason}") from error
    halves = [forward] + ([backward] if backward is not None else [])
    outputs = call.forward.signature.outputs
    written = [(number, spec.target) for number, spec in enumerate(outputs) if spec.role == "mutation"]
    buffers = dict(model.named_buffers())
    for _, target in written:
        if target not in buffers:
            raise EmitError(f"the program writes to {target!r}, which is no buffer of the model")
    mutations = [(number, _at(target)) for number, target in written]
    shown = [spec for spec in outputs if spec.role == "output"]
    if len(shown) != len(call.results):
        raise EmitError(f"the program gives {len(shown)} results, the model's code got {len(call.results)}")
    cut = _cut_off(call)
    results = [
        Result(f"result{number}", value.requires_grad and number not in cut, value)
        for number, value in enumerate(call.results)
    ]
    tangents = len(call.backward.signature.by_role("tangent")) if call.backward is not None else 0
    differentiable = [r for r in results if r.differentiable]
    if call.backward is not None and tangents != len(differentiable):
        raise EmitError(
            f"{len(differentiable)} results can be differentiated, the backward takes {tangents} gradients"
        )
    sources = {id(argument.tensor): argument.source for argument in arguments} | given
    sources |= {id(result.tensor): result.name for result in results}
    expression = _expression(output, sources, "output")
    found = {
        path: value for path, value in _leaves({"output": _plain(output)}) if isinstance(value, torch.Tensor)
    }
    example = {path: value for path, value in leaves if isinstance(value, torch.Tensor)}
    example |= {path: value.detach().clone() for path, value in found.items()}
    loss = ""
    sampled: dict[str, torch.Tensor] = {}
    if call.backward is not None:
        loss, sampled = _gradients(optimized, found)
        example |= {f"gradient {name}": value for name, value in sampled.items()}
    ops = carried_ops(_modules(halves))[0] if _modules(halves) else ""
    device = next((a.tensor.device.type for a in arguments), "cpu")
    own = {a.name: a.tensor for a in arguments if a.role in ("parameter", "buffer")}
    parameters = {n: p for n, p in model.named_parameters() if n in own}
    text = ProgramText(
        title=title,
        signature=signature,
        described=_described(optimized),
        arguments=arguments,
        results=results,
        mutations=mutations,
        output=expression,
        constants=constants,
        parameters=parameters,
        buffers={name: tensor for name, tensor in own.items() if name not in parameters},
        forward=forward,
        backward=backward,
        ops=ops,
        seed=_SEED,
        device=device,
        loss=loss,
        example=_example_call(inputs, names),
        gradients=list(sampled),
    )
    return text, example, halves


def _cut_off(call: ProgramCall) -> set[int]:
    """Numbers of results that the program does not differentiate: those beside a loss (``docs/emit.md``)."""
    outputs = [spec for spec in call.semantic.signature.outputs if spec.role == "output"]
    nodes = call.semantic.find([spec.node for spec in outputs])
    return {i for i, node in enumerate(nodes) if node.target is torch.ops.aten.detach.default}


def _described(optimized: Optimized) -> list[str]:
    plan = optimized.plan
    peak = plan.predicted.peak_bytes
    budget = f", budget {plan.budget:,} bytes" if plan.budget else ""
    return [
        f"Emitted by graphopt {__version__}. Peak of the plan op by op: {peak:,} bytes{budget}.",
    ]


def _parameters_of(model: torch.nn.Module, inputs: Any) -> tuple[list[str], str]:
    """What the inputs of a call are called, and the signature that takes them."""
    if isinstance(inputs, dict):
        names = [str(name) for name in inputs]
    else:
        positional = [
            p.name
            for p in inspect.signature(model.forward).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        names = [positional[i] if i < len(positional) else f"input{i}" for i in range(len(inputs))]
    return [identifier(name) for name in names], ", ".join(identifier(name) for name in names)


def _values(inputs: Any) -> list[Any]:
    return list(inputs.values()) if isinstance(inputs, dict) else list(inputs)


def _example_call(inputs: Any, names: Sequence[str]) -> str:
    """The recorded inputs as arguments of the program."""
    return ", ".join(
        f"{name}={_literal(value, name)}" for name, value in zip(names, _values(inputs), strict=True)
    )


def _literal(value: Any, path: str) -> str:
    if isinstance(value, torch.Tensor):
        return f"recorded[{path!r}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {_literal(v, f'{path}[{k!r}]')}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        inside = [_literal(v, f"{path}[{i}]") for i, v in enumerate(value)]
        return f"[{', '.join(inside)}]" if isinstance(value, list) else f"({', '.join(inside)},)"
    return repr(value)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Whatever is no container, with the expression that leads to it."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}[{key!r}]" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{path}[{number}]")
    else:
        yield path, value


def _arguments(call: ProgramCall, given: Mapping[int, str]) -> list[Argument]:
    specs = call.semantic.signature.inputs
    halves = call.forward.signature.inputs
    if not len(specs) == len(halves) == len(call.arguments):
        raise EmitError(
            f"the program takes {len(halves)} values, the model's code hands over {len(call.arguments)}"
        )
    found = []
    for spec, value in zip(specs, call.arguments, strict=True):
        if not isinstance(value, torch.Tensor):
            raise EmitError(
                f"the program takes a size, {value}, that is known at run time alone",
                hint="optimize with dynamic_shapes=False: programs are written for fixed sizes",
            )
        if spec.role in ("parameter", "buffer"):
            found.append(Argument(spec.fqn, spec.role, _at(spec.fqn), value))
        elif id(value) in given:
            path = given[id(value)]
            found.append(Argument(path, "input", path, value))
        else:
            raise EmitError(
                f"{spec.fqn or spec.node} is neither a parameter, a buffer nor an input of the call"
            )
    return found


def _at(fqn: str) -> str:
    """A parameter or buffer as an expression; parts of its name may be numbers."""
    text = "self"
    for part in fqn.split("."):
        text += f".{part}" if part.isidentifier() else f'.get_submodule("{part}")'
    return text


def _plain(output: Any) -> Any:
    """A result in dicts, lists and tuples."""
    if isinstance(output, Mapping):
        return {key: _plain(value) for key, value in output.items()}
    if isinstance(output, (list, tuple)):
        made = [_plain(value) for value in output]
        return made if isinstance(output, list) else tuple(made)
    return output


def _expression(value: Any, sources: Mapping[int, str], path: str) -> str:
    if isinstance(value, torch.Tensor):
        if id(value) not in sources:
            raise EmitError(f"{path} is made by the model's own code after the program")
        return sources[id(value)]
    if isinstance(value, Mapping):
        inside = (f"{key!r}: {_expression(v, sources, f'{path}[{key!r}]')}" for key, v in value.items())
        return "{" + ", ".join(inside) + "}"
    if isinstance(value, (list, tuple)):
        items = [_expression(v, sources, f"{path}[{i}]") for i, v in enumerate(value)]
        return f"[{', '.join(items)}]" if isinstance(value, list) else f"({', '.join(items)},)"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    raise EmitError(f"{path} is {type(value).__name__}; programs return tensors, numbers and text")


def _gradients(
    optimized: Optimized, found: Mapping[str, torch.Tensor]
) -> tuple[str, dict[str, torch.Tensor]]:
    """The expression that the check differentiates, and up to 1,024 elements of each parameter's gradient."""
    trained = {path: value for path, value in found.items() if value.requires_grad}
    scalars = {path: value for path, value in trained.items() if value.dim() == 0}
    chosen = scalars if len(scalars) == 1 else trained
    sum_of: Callable[[torch.Tensor], torch.Tensor] = lambda t: t.float().sum()  # noqa: E731
    total = torch.stack([sum_of(value) for value in chosen.values()]).sum()
    total.backward()  # type: ignore[no-untyped-call]
    expression = " + ".join(f"{path}.float().sum()" for path in chosen)
    sampled = {}
    for name, parameter in optimized._model.named_parameters():
        if parameter.grad is not None:
            count = parameter.grad.numel()
            at = torch.arange(min(count, 1024), device=parameter.device) * max(1, count // 1024)
            sampled[name] = parameter.grad.reshape(-1)[at].clone()
    return expression, sampled


def _modules(halves: Sequence[Half]) -> list[str]:
    """Modules of the operators that halves call beside torch's. Raises ``EmitError`` for plugins'
    operators."""
    names = sorted({name for half in halves for name in half.operators})
    if not names:
        return []
    specs = {spec.op: spec for spec in default_host().kernels().values()}
    found = set()
    for name in names:
        namespace = name.split("::")[0]
        if namespace != CARRIED:
            raise EmitError(
                f"the program calls {name}, which a plugin registers: its source cannot be carried"
            )
        base = specs.get(name) or specs.get(name.removesuffix("_backward"))
        if base is None:
            raise EmitError(f"the program calls {name}, of which no source is known")
        # One of both registers it.
        found |= {base.reference.__module__, base.supports.__module__}
    return sorted(found)
