"""A plugin's graph as a module that stands for the model, with the model's parameters.

``Capture(graph, names={"w": "fc.weight"})`` becomes a module whose ``w`` is the model's ``fc.weight``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from graphopt import _torch
from graphopt.errors import PluginError, brief, nearest
from graphopt.plugins.records import Capture

__all__ = ["keep_layers", "stand_in", "state_of"]


class _Flat(torch.nn.Module):
    """Calls ``graph`` with what its placeholders stand for, and gives its outputs their structure."""

    def __init__(
        self, graph: Callable[..., Any], given: Sequence[torch.Tensor | int] | None, out_tree: Any
    ) -> None:
        super().__init__()
        self.graph, self.given, self.out_tree = graph, given, out_tree

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.given is None:
            found = self.graph(*args, **kwargs)
        else:
            leaves = pytree.tree_leaves((args, kwargs))
            found = self.graph(*(leaves[one] if isinstance(one, int) else one for one in self.given))
        if self.out_tree is None:
            return found
        return pytree.tree_unflatten(pytree.tree_leaves(found), self.out_tree)


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by every dotted name that they have."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def stand_in(model: torch.nn.Module, returned: object, leaves: int) -> torch.nn.Module:
    """What is called in place of ``model``; ``leaves`` is how many leaves its arguments have.

    Raises ``PluginError`` for what is no ``Capture``, or one of another model.
    """
    if not isinstance(returned, Capture):
        shown = " ".join(repr(returned).split())
        raise PluginError(f"expected a Capture or None, got {shown:.80}")
    graph = returned.graph
    if isinstance(graph, ExportedProgram):
        graph = graph.module()
    if not isinstance(graph, fx.GraphModule):
        raise PluginError(f"graph is a {type(graph).__name__}: expected an fx.GraphModule or ExportedProgram")
    try:
        graph.graph.lint()
    except RuntimeError as error:
        raise PluginError(f"its graph does not hold together: {brief(error)}") from error
    own = state_of(model)
    _bind(graph, model, own, returned.names)
    given = _given(graph, returned.placeholders, own, leaves)
    if given is None and returned.out_tree is None:
        return graph
    return _Flat(graph, given, returned.out_tree)


def keep_layers(source: torch.nn.Module, captured: fx.Graph) -> None:
    """Say in dynamo's graph which modules its nodes are of, as the plugin's graph says it.

    Dynamo runs the code of a graph, which does not say. Calls are told apart by their order: where that is
    not the same, as dynamo drops what is not read, nothing is said.
    """
    graph = source.graph if isinstance(source, _Flat) else source
    if not isinstance(graph, fx.GraphModule):
        return
    theirs = [node for node in graph.graph.nodes if node.op in ("call_function", "call_method")]
    ours = [node for node in captured.nodes if node.op in ("call_function", "call_method")]
    if [node.target for node in theirs] != [node.target for node in ours]:
        return
    for node, made in zip(theirs, ours, strict=True):
        if stack := node.meta.get("nn_module_stack"):
            made.meta["nn_module_stack"] = dict(stack)


def _given(
    graph: fx.GraphModule, placeholders: object, own: Mapping[str, torch.Tensor], leaves: int
) -> list[torch.Tensor | int] | None:
    if placeholders is None:
        return None
    if not isinstance(placeholders, (tuple, list)):
        raise PluginError(f"placeholders is {placeholders!r}: expected a tuple of names and positions")
    count = sum(node.op == "placeholder" for node in graph.graph.nodes)
    if count != len(placeholders):
        raise PluginError(f"placeholders has {len(placeholders)} entries, its graph {count} placeholders")
    given: list[torch.Tensor | int] = []
    for index, entry in enumerate(placeholders):
        if isinstance(entry, str):
            given.append(_named(entry, own, f"placeholders[{index}]"))
        elif isinstance(entry, int) and not isinstance(entry, bool) and 0 <= entry < leaves:
            given.append(entry)
        else:
            raise PluginError(
                f"placeholders[{index}] is {entry!r}: expected a name of a parameter or buffer, or the "
                f"position of one of the {leaves} inputs"
            )
    return given


def _named(name: str, own: Mapping[str, torch.Tensor], where: str) -> torch.Tensor:
    if name not in own:
        close = nearest(name, own)
        hint = f"; did you mean {close!r}?" if close else ""
        raise PluginError(f"{where} is {name!r}: the model has no parameter or buffer of that name{hint}")
    return own[name]


def _bind(
    graph: fx.GraphModule, model: torch.nn.Module, own: Mapping[str, torch.Tensor], names: object
) -> None:
    """Put the model's own parameters and buffers in the place of copies; its own modules are not touched."""
    if not isinstance(names, Mapping):
        raise PluginError(f"names is {names!r}: expected a mapping of names in its graph to the model's")
    known = {id(tensor) for tensor in own.values()}
    storages = {_torch.storage_key(t): name for name, t in own.items() if _has_storage(t)}
    modules = {id(module) for module in model.modules()}
    held = list(_held(graph))
    if strange := [name for name in names if name not in {path for path, _, _, _ in held}]:
        raise PluginError(f"names[{strange[0]!r}]: its graph has no tensor of that name")
    for path, owner, key, tensor in held:
        if path in names:
            theirs = _named(str(names[path]), own, f"names[{path!r}]")
            if id(owner) in modules and theirs is not tensor:
                raise PluginError(f"names[{path!r}] is {names[path]!r}: it is of a module of the model's own")
        elif id(tensor) in known or id(owner) in modules:
            continue
        elif path in own:
            theirs = own[path]
        elif isinstance(tensor, torch.nn.Parameter):
            close = nearest(path, own)
            hint = f"; did you mean {close!r}?" if close else ""
            raise PluginError(f"its graph has a parameter {path!r}, which the model has not{hint}")
        elif _has_storage(tensor) and (source := storages.get(_torch.storage_key(tensor))) is not None:
            raise PluginError(f"its constant {path!r} is memory of {source!r}, which the model may replace")
        else:
            continue
        if kinds := _differing(tensor, theirs):
            raise PluginError(f"{path!r} is {kinds[0]} in its graph and {kinds[1]} in the model")
        _put(owner, key, theirs)


def _held(graph: fx.GraphModule) -> Iterator[tuple[str, torch.nn.Module, str, torch.Tensor]]:
    """Path, module, attribute and tensor of everything that a graph may read."""
    for prefix, module in graph.named_modules(remove_duplicate=False):
        tables = (vars(module)["_parameters"], vars(module)["_buffers"], vars(module))
        for table in tables:
            for key, value in list(table.items()):
                if isinstance(value, torch.Tensor):
                    yield f"{prefix}.{key}".strip("."), module, key, value


def _put(owner: torch.nn.Module, key: str, tensor: torch.Tensor) -> None:
    for table in (vars(owner)["_parameters"], vars(owner)["_buffers"], vars(owner)):
        table.pop(key, None)
    if isinstance(tensor, torch.nn.Parameter):
        vars(owner)["_parameters"][key] = tensor
    else:
        vars(owner)["_buffers"][key] = tensor


def _differing(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[str, str] | None:
    kinds = [f"{t.dtype}{list(t.shape)} on {t.device}".removeprefix("torch.") for t in (ours, theirs)]
    return (kinds[0], kinds[1]) if kinds[0] != kinds[1] else None


def _has_storage(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and _torch.plain_tensors(tensor)[0] is tensor and tensor.numel() > 0
