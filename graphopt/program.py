"""Program: the only IR. An fx graph at one level, with its signature and provenance."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx

if TYPE_CHECKING:
    from graphopt.edit import Edit

__all__ = [
    "InputSpec",
    "Level",
    "OutputSpec",
    "Program",
    "Signature",
    "copied_module",
    "layer_of",
    "same_names",
    "tensor_leaves",
]


class Level(StrEnum):
    """How far down the way from model to code a program is (see docs/architecture.md)."""

    SEMANTIC = "semantic"
    JOINT = "joint"
    LOWERED = "lowered"


@dataclass(frozen=True)
class InputSpec:
    """One placeholder. ``role``: parameter, buffer, input, activation, constant, tangent, saved or
    symbol. An activation is an input that autograd made: its gradient is handed on, not kept.

    ``fqn`` is the parameter's or buffer's dotted name in the model (the first, if tied).
    """

    node: str
    role: str
    fqn: str = ""


@dataclass(frozen=True)
class OutputSpec:
    """One output. ``role``: output, mutation, gradient or saved; ``target`` is the input that a
    mutation writes or a gradient belongs to, or the text that describes the output."""

    node: str
    role: str
    target: str = ""


@dataclass(frozen=True)
class Signature:
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]

    def by_role(self, *roles: str) -> tuple[InputSpec, ...]:
        return tuple(spec for spec in self.inputs if spec.role in roles)

    def gradients_of(self, *roles: str) -> list[str]:
        """Nodes that are gradients of inputs of the given roles."""
        wanted = {name for spec in self.by_role(*roles) for name in (spec.node, spec.fqn) if name}
        return [spec.node for spec in self.outputs if spec.role == "gradient" and spec.target in wanted]

    def fqn(self, node: str) -> str:
        return next((spec.fqn for spec in self.inputs if spec.node == node), "")


def tensor_leaves(value: Any) -> list[torch.Tensor]:
    """The tensors inside a node's ``meta["val"]``, in pytree order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if value is None:
        return []
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def same_names(one: Program, other: Program) -> bool:
    """Whether the values of two programs have the same names, in order."""
    names = [[node.name for node in program.graph.nodes] for program in (one, other)]
    return names[0] == names[1]


def copied_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A module over a graph of its own, its nodes named alike, and the same attributes: compilation takes its
    module over."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    return fx.GraphModule(gm, graph)


def layer_of(node: fx.Node) -> str:
    """Dotted path of the innermost module that a node came from, or ``""``."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    for key, entry in reversed(list(stack.items())):
        path = entry[0] if isinstance(entry, (tuple, list)) else key
        if path:
            return _clean_path(str(path))
    return ""


def _clean_path(path: str) -> str:
    """Dynamo writes ``L['self'].model.layers['0']``; users know ``model.layers.0``."""
    for prefix in ("L['self']", "L['fn']", "L__self__"):
        path = path.removeprefix(prefix)
    path = path.replace("._modules['", ".").replace("['", ".").replace("']", "")
    path = path.replace("[", ".").replace("]", "")
    return path.strip(".")


@dataclass
class Program:
    """A ``GraphModule`` at one level.

    ``name`` tells programs of one model apart (``"g0"``, ``"g1"`` after a graph break).
    ``symbols`` maps symbolic sizes to the input dimensions that define them.
    """

    name: str
    level: Level
    gm: fx.GraphModule
    signature: Signature
    symbols: dict[str, str] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        return self.gm.graph

    @property
    def has_symbolic_sizes(self) -> bool:
        """Whether a size of some value is known at run time alone."""
        leaves = (leaf for node in self.graph.nodes for leaf in tensor_leaves(node.meta.get("val")))
        return any(isinstance(size, torch.SymInt) for leaf in leaves for size in leaf.shape)

    def nodes(self, target: Any = None) -> Iterator[fx.Node]:
        """Call nodes in order, or those that call ``target`` (an op or one of its overloads)."""
        for node in self.graph.nodes:
            if node.op != "call_function":
                continue
            packet = getattr(node.target, "overloadpacket", None)
            if target is None or node.target is target or packet is target:
                yield node

    @property
    def fingerprint(self) -> str:
        """Hash of ops, wiring, constants, shapes and dtypes; independent of node names."""
        digest = hashlib.sha256()
        number: dict[fx.Node, int] = {}
        for index, node in enumerate(self.graph.nodes):
            number[node] = index
            target = "" if node.op in ("placeholder", "output") else str(node.target)
            args = fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{number[n]}")
            types = [(str(t.dtype), tuple(map(str, t.shape))) for t in tensor_leaves(node.meta.get("val"))]
            digest.update(f"{node.op} {target} {args} {types}\n".encode())
        return digest.hexdigest()[:16]

    @property
    def layers(self) -> dict[str, list[fx.Node]]:
        """Call nodes grouped by the module that they came from."""
        groups: dict[str, list[fx.Node]] = {}
        for node in self.nodes():
            groups.setdefault(layer_of(node), []).append(node)
        return groups

    def find(self, names: Sequence[str]) -> list[fx.Node]:
        by_name = {node.name: node for node in self.graph.nodes}
        return [by_name[name] for name in names]

    def edit(self, origin: str) -> Edit:
        """A transaction, the only way to change the graph: ``with program.edit("fuse-norm") as edit``.

        ``origin`` is the id of the pass at work. Raises ``PassError`` or ``VerificationError`` on
        leaving, the program then being what it was (see ``graphopt.edit``).
        """
        from graphopt.edit import Edit

        return Edit(self, origin)
