"""Autograd's engine: the backward that runs, its nodes and where they hand gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = [
    "accumulates_into",
    "adds_to_gradient_of",
    "adds_unseen_to_gradient_of",
    "after_backward",
    "has_step_hooks",
    "is_backward_of",
    "keeps_graph",
    "note_step",
    "running_node",
    "runs_at_once",
    "takes_gradient",
]


def after_backward(function: Callable[[], None]) -> None:
    """Call ``function()`` at the end of the backward pass that is running. For hooks of tensors."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(function)


def keeps_graph() -> bool:
    """Whether the backward that runs now was asked to keep the graph for another one."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def runs_at_once(tensor: torch.Tensor) -> bool:
    """Whether operators on ``tensor`` compute and are seen by nobody: it is no subclass, and neither modes
    nor function transforms are in force."""
    return (
        type(tensor) is torch.Tensor
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def adds_to_gradient_of(leaf: torch.Tensor) -> bool:
    """Whether the backward that runs now will add to ``leaf.grad``: not where it only returns gradients
    (``torch.autograd.grad``), nor where its ``inputs`` leave the tensor out."""
    return _will_run(_accumulation(leaf))


def adds_unseen_to_gradient_of(leaf: torch.Tensor) -> bool:
    """Whether the backward that runs now will add to ``leaf.grad``, and no hook of Python waits at the node
    of autograd's graph that does it."""
    node = _accumulation(leaf)
    if not _will_run(node):
        return False
    for register in (node.register_prehook, node.register_hook):
        # Nothing lists hooks, but who registers one is told where they all are.
        handle = register(_unheard)
        hooks = handle.hooks_dict_ref()
        handle.remove()
        if hooks:
            return False
    return True


def _accumulation(leaf: torch.Tensor) -> Any:
    """The node of autograd's graph that adds to ``leaf.grad``."""
    return torch.autograd.graph.get_gradient_edge(leaf).node


def _will_run(node: Any) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:
        # What autograd says where the leaf is one of those whose gradients it returns.
        return False


def _unheard(*gradients: Any) -> None:
    return None


def running_node() -> Any:
    """The node of autograd's graph whose backward runs in this thread; ``None`` outside of backwards."""
    return torch._C._current_autograd_node()


def takes_gradient(node: Any, position: int) -> tuple[Any, int]:
    """The node of autograd's graph, and the number of its input, that a node hands its gradient number
    ``position`` to: one for each tensor that its function was given. ``None`` where nobody takes it."""
    following = node.next_functions
    found: tuple[Any, int] = following[position] if position < len(following) else (None, 0)
    return found


def is_backward_of(node: Any, function: type[torch.autograd.Function]) -> bool:
    """Whether a node of autograd's graph is the backward, and so the context, of a function of Python."""
    return getattr(type(node), "_forward_cls", None) is function


def accumulates_into(node: Any) -> torch.Tensor | None:
    """The leaf to whose gradient a node of autograd's graph adds what it is given; ``None`` for others."""
    leaf = getattr(node, "variable", None)
    return leaf if type(node).__name__ == "AccumulateGrad" and isinstance(leaf, torch.Tensor) else None


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether hooks of an optimizer, or of all optimizers, wait for its steps."""
    from torch.optim import optimizer as module

    own = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    everyone = (module._global_optimizer_pre_hooks, module._global_optimizer_post_hooks)
    return any(map(bool, (*own, *everyone)))


def note_step(optimizer: torch.optim.Optimizer) -> None:
    """Let schedulers of learning rates know that a step was taken: they warn where none was."""
    optimizer._opt_called = True  # type: ignore[attr-defined]
