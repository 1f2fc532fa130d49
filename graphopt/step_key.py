"""What a compiled step depends on, as one text: two processes with the same text make the same step.

Part of it are the captured graph (operators, wiring, constants, what values look like, which module a node
comes from), the inputs, the options of ``optimize`` with the passes and plugins that they stand for, the
device, versions, sources, and what was tuned. Addresses and values of tensors are not. Names of nodes are:
plans name values by them.

Where something cannot be told from outside (a Python function that is no operator, a plugin given as an
object), there is no key, and ``NoKey`` says why.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx

import graphopt
from graphopt import _torch
from graphopt.cache_folder import cache_folder
from graphopt.operator_costs import PricedByPlugins
from graphopt.options import OptionError
from graphopt.passes import pass_text
from graphopt.program import InputSpec, layer_of, tensor_leaves

if TYPE_CHECKING:
    from graphopt.session import Session

__all__ = ["NoKey", "graph_lines", "session_lines", "step_key"]

_LARGEST_CONSTANT = 1 << 20
"""Bytes of a tensor in a graph that are worth reading to know it."""

_OPERATORS = ("aten", "prims", "prim", "graphopt", "_c10d_functional")
"""Namespaces of operators whose versions are known: torch's, and those of the packages that are read."""

_FUNCTIONS = ("torch", "_operator", "operator", "math", "builtins")
"""Modules whose functions are what their names say."""

_TAGS = ("recompute", "custom", "partitioner_tag")
"""What annotations of a model leave on nodes, and compilation goes by."""

_OBSERVERS = ("graphopt_before_pass", "graphopt_after_pass")


class NoKey(Exception):
    """What the step depends on cannot be told; the message is the reason."""


def step_key(
    session: Session,
    name: str,
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    specs: Sequence[InputSpec],
    auxiliary: Sequence[int] = (),
) -> str:
    """The key of the step that ``session`` makes of dynamo's graph ``gm``, of which the outputs ``auxiliary``
    are cut off from autograd. Raises ``NoKey``."""
    digest = hashlib.sha256()
    lines = (*session_lines(session, name), *_input_lines(inputs, specs), *graph_lines(gm))
    for line in (*lines, f"cut off {tuple(auxiliary)}"):
        digest.update(line.encode())
        digest.update(b"\n")
    return digest.hexdigest()


def graph_lines(gm: fx.GraphModule, indent: str = "") -> Iterator[str]:
    """A graph, a line for each node. Raises ``NoKey`` where a node calls or holds what has no text."""
    for node in gm.graph.nodes:
        if node.meta.get("_checkpoint_context_fn") is not None:
            raise NoKey(f"node {node.name} recomputes by a policy of its own")
        args = ", ".join([_text(node.args), _text(node.kwargs)])
        value = node.meta.get("val", node.meta.get("example_value"))
        looks = "; ".join(_look(leaf) for leaf in tensor_leaves(value))
        tags = [f"{tag}={_text(node.meta[tag])}" for tag in _TAGS if node.meta.get(tag) is not None]
        target = node.target if isinstance(node.target, str) else _function(node.target)
        yield f"{indent}{node.op} {node.name} {target} {args} [{looks}] {layer_of(node)} {' '.join(tags)}"
        if node.op in ("get_attr", "call_module"):
            yield from _attribute_lines(gm, str(node.target), indent + "  ")
    if gm.meta.get("_checkpoint_context_fn") is not None:
        raise NoKey("a region recomputes by a policy of its own")


def _attribute_lines(gm: fx.GraphModule, path: str, indent: str) -> Iterator[str]:
    held: Any = gm
    for part in path.split("."):
        held = getattr(held, part)
    if isinstance(held, fx.GraphModule):
        yield from graph_lines(held, indent)
    elif isinstance(held, torch.Tensor):
        yield f"{indent}{_look(held)} {_content(held)}"
    else:
        raise NoKey(f"the graph holds {path}, a {type(held).__name__}")


def _content(tensor: torch.Tensor) -> str:
    """A hash of a constant's elements."""
    size = tensor.numel() * tensor.element_size()
    if _torch.is_fake(tensor) or tensor.layout != torch.strided or size > _LARGEST_CONSTANT:
        raise NoKey("the graph holds a large or unusual constant")
    with _torch.without_modes(), torch.no_grad():
        plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return hashlib.sha256(plain.numpy().tobytes()).hexdigest()


def _function(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        text = str(target)
        if text.partition(".")[0] not in _OPERATORS and text.partition("::")[0] not in _OPERATORS:
            raise NoKey(f"the model calls {text}, an operator of its own")
        return text
    if isinstance(target, torch._ops.HigherOrderOperator):
        if target is not torch.ops.higher_order.tag_activation_checkpoint:
            raise NoKey(f"the model calls {target}, which takes functions")
        return str(target)
    try:
        text = _torch.qualified_name(target)
    except Exception as error:
        raise NoKey(f"the model calls {target!r}, which has no name") from error
    module = str(getattr(target, "__module__", None) or "torch").partition(".")[0]
    if module not in _FUNCTIONS:
        raise NoKey(f"the model calls {text}, a function of its own")
    return text


def _text(value: Any) -> str:
    """An argument of a node."""
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__}({', '.join(map(_text, value))})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(key)}: {_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice({_text(value.start)}, {_text(value.stop)}, {_text(value.step)})"
    if isinstance(value, _PLAIN) or value is None or value is Ellipsis:
        return repr(value)
    raise NoKey(f"the graph holds a {type(value).__name__}")


_PLAIN = (
    bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format,
    torch.utils.checkpoint.CheckpointPolicy,
)  # fmt: skip


def _look(tensor: torch.Tensor) -> str:
    """What a tensor looks like."""
    if not all(type(size) is int for size in (*tensor.shape, *_strides(tensor))):
        raise NoKey("sizes are known at run time alone")
    return (
        f"{tensor.dtype} {tuple(tensor.shape)} {_strides(tensor)} {tensor.device} {tensor.layout} "
        f"{tensor.requires_grad}"
    )


def _strides(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.stride()) if tensor.layout == torch.strided else ()


def _input_lines(inputs: Sequence[Any], specs: Sequence[InputSpec]) -> Iterator[str]:
    storages: dict[int, int] = {}
    for value, spec in zip(inputs, specs, strict=True):
        if not isinstance(value, torch.Tensor):
            raise NoKey("sizes are known at run time alone")
        plain = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
        if type(value) not in plain and not _torch.is_fake(value):
            raise NoKey(f"an input is a {type(value).__name__}")
        if value.layout != torch.strided:
            raise NoKey(f"an input has the layout {value.layout}")
        key = _torch.storage_key(value)
        own = storages.setdefault(key, len(storages))
        kind = "parameter" if isinstance(value, torch.nn.Parameter) else "tensor"
        yield (
            f"input {spec} {kind} {_look(value)} leaf={value.is_leaf} storage={own} "
            f"at={value.storage_offset()} of={value.untyped_storage().nbytes()} "
            f"conj={value.is_conj()} neg={value.is_neg()} inference={value.is_inference()}"
        )


def session_lines(session: Session, name: str) -> Iterator[str]:
    """Options, device, environment: everything but the graph. Raises ``NoKey``."""
    yield f"program {name}"
    yield f"graphopt {graphopt.__version__} python {platform.python_version()} {sys.platform}"
    yield f"torch {torch.__version__} triton {_version('triton')}"
    yield from _plugin_lines(session)
    only = None if session.only is None else sorted(session.only)
    yield f"budget {session.budget!r} allow {sorted(session.allow)} on_error {session.on_error} only {only}"
    yield f"device {session.cost.device!r}"
    base = session.cost.base if isinstance(session.cost, PricedByPlugins) else session.cost
    yield f"cost {type(base).__module__}.{type(base).__qualname__}"
    yield f"emit {session.emitter.name} cuda_graphs {session.cuda_graphs}"
    yield f"bytes {session.static_bytes} {session.weight_bytes} {session.replay_bytes}"
    yield (
        f"gradients {session.held_gradient_bytes} {session.all_gradients_held} {session.watched_gradients} "
        f"{session.trains}"
    )
    yield f"tuned {_folder_digest(cache_folder() / 'tuning')}"
    yield from _ambient_lines()
    if session.emitter.fuses:
        from graphopt.emit.inductor import environment

        yield environment()


def _plugin_lines(session: Session) -> Iterator[str]:
    """Passes with their options, every plugin, and the sources of all of them."""
    modules = {"graphopt", type(session.cost).__module__, type(session.emitter).__module__}
    if isinstance(session.cost, PricedByPlugins):
        modules.add(type(session.cost.base).__module__)
    for step in session.passes:
        try:
            yield f"pass {type(step).__module__}.{type(step).__qualname__} {pass_text(step)}"
        except OptionError as error:
            raise NoKey(f"pass {step.name}: {error}") from error
        modules.add(type(step).__module__)
    if session.policy is not None:
        yield f"policy {session.policy.name}"
        modules.add(getattr(session.policy.choose, "__module__", ""))
    for record, hooked in session.host.sources():
        if record.distribution == "inline":
            raise NoKey(f"plugin {record.name} was given as an object")
        seen = [hook for hook in _OBSERVERS if hook in record.hooks]
        if seen:
            raise NoKey(f"plugin {record.name} watches passes")
        yield f"plugin {record.name} {record.distribution} {record.version} {record.status} {record.error}"
        modules |= hooked
    for package in sorted({module.partition(".")[0] for module in modules}):
        yield f"source {package} {_source_digest(package)}"


def _ambient_lines() -> Iterator[str]:
    """Switches of torch that captured code, or generated code, depends on."""
    for kind in ("cpu", "cuda"):
        yield f"autocast {kind} {torch.is_autocast_enabled(kind)} {torch.get_autocast_dtype(kind)}"
    yield f"grad {torch.is_grad_enabled()} inference {torch.is_inference_mode_enabled()}"
    yield f"default {torch.get_default_dtype()} {torch.get_default_device()}"
    yield f"threads {torch.get_num_threads()}"
    yield f"products {torch.get_float32_matmul_precision()}"
    yield f"deterministic {torch.are_deterministic_algorithms_enabled()}"
    backends = torch.backends
    cuda: Any = backends.cuda
    kinds = (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )
    yield f"attention {kinds} cudnn {backends.cudnn.enabled} mkldnn {backends.mkldnn.enabled}"


@functools.cache
def _source_digest(package: str) -> str:
    """A hash of the files that a top-level module consists of."""
    module = sys.modules.get(package)
    places = _places(module) if module is not None else []
    if not places:
        raise NoKey(f"the source of {package} cannot be read")
    return _digest(places)


def _places(module: ModuleType) -> list[Path]:
    folders = [Path(folder) for folder in getattr(module, "__path__", ())]
    file = getattr(module, "__file__", None)
    return folders or ([Path(file)] if file else [])


def _folder_digest(folder: Path) -> str:
    return _digest([folder]) if folder.is_dir() else "none"


def _digest(places: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    try:
        for place in places:
            for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
                if "__pycache__" not in file.parts and file.is_file():
                    digest.update(f"{file.relative_to(place.parent)} ".encode())
                    digest.update(hashlib.sha256(file.read_bytes()).digest())
    except OSError as error:
        raise NoKey(f"a source cannot be read: {error}") from error
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
