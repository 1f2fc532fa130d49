"""Which operators are attention, and what of their arguments is what.

``graphopt::attention`` and its backward say all that the kernels know (``graphopt_kernels.attention``);
``scaled_dot_product_attention`` and what it is lowered to say less::

    operator                                   causal          bias           log-sum-exp
    scaled_dot_product_attention               upper left      any            -
    _scaled_dot_product_flash_attention        square only     -              [B, H, M]
    _scaled_dot_product_efficient_attention    upper left      added          [B, H, M rounded up to 32]
    _scaled_dot_product_cudnn_attention        square only     added          [B, H, M, 1]
    _scaled_dot_product_flash_attention_for_cpu  upper left    any            [B, H, M]

All of them give the natural logarithm (torch 2.11 to 2.13).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from graphopt_kernels.attention import attention_supports
from graphopt_kernels.attention_launch import kernels_take
from graphopt_kernels.emit.build import NotFusible

__all__ = ["Attention", "attention_of", "attentions_of", "is_attention", "parts_of"]

aten = torch.ops.aten
_no = NotFusible.because

_SQUARE = ("flash", "cudnn")
"""Libraries that have another causal mask where there are other numbers of keys than of queries."""


@dataclass(frozen=True)
class _Form:
    """``library``: which of torch's it is, ``""`` for graphopt's own. ``names`` of its arguments where they
    are not those of graphopt's operator."""

    library: str
    backward: bool
    names: Mapping[str, str]


_FORWARD = {"bias": "attn_bias", "log_sum_exp": "logsumexp"}
_BACKWARD = {"grad": "grad_out", "output": "out", "log_sum_exp": "logsumexp", "bias": "attn_bias"}


def _forms() -> dict[Any, _Form]:
    # They are registered where `graphopt_kernels.attention` is imported, which is above.
    found = {
        torch.ops.graphopt.attention.default: _Form("", False, {}),
        torch.ops.graphopt.attention_backward.default: _Form("", True, {}),
        aten.scaled_dot_product_attention.default: _Form("composite", False, {"bias": "attn_mask"}),
    }
    for library in ("flash", "efficient", "cudnn", "cpu"):
        name = "flash_attention_for_cpu" if library == "cpu" else f"{library}_attention"
        mask = {"bias": "attn_mask"} if library == "cpu" else {}
        grad = {"grad": "grad_out_"} if library == "efficient" else {}
        forward = getattr(aten, f"_scaled_dot_product_{name}").default
        backward = getattr(aten, f"_scaled_dot_product_{name}_backward").default
        found[forward] = _Form(library, False, _FORWARD | mask)
        found[backward] = _Form(library, True, _BACKWARD | mask | grad)
    return found


_FORMS = _forms()


@dataclass(frozen=True)
class Attention:
    """A call of attention in the words of ``graphopt::attention``.

    ``operands`` by role: ``query``, ``key``, ``value``, ``bias`` where there is one, in the backward
    ``grad``, ``output`` and ``log_sum_exp`` too. ``wanted``: which gradients the backward is asked for.
    ``results``: what each result of the call is, ``""`` where it says something of random numbers, which
    are not drawn.
    """

    node: fx.Node
    library: str
    backward: bool
    operands: Mapping[str, fx.Node]
    scale: float
    softcap: float
    left: int | None
    right: int | None
    wanted: tuple[bool, ...]
    results: tuple[str, ...]

    @property
    def settings(self) -> tuple[float, float, int | None, int | None]:
        return self.scale, self.softcap, self.left, self.right

    def value(self, role: str) -> torch.Tensor:
        """The fake tensor of an operand."""
        found: torch.Tensor = self.operands[role].meta["val"]
        return found

    @property
    def bias(self) -> torch.Tensor | None:
        return self.value("bias") if "bias" in self.operands else None

    def asked_for(self, roles: Sequence[str]) -> list[bool]:
        """Which of the gradients of query, key, value and bias the backward has to give, where ``roles`` of
        its results are read."""
        asked = [role in roles and wanted for role, wanted in zip(self.results, self.wanted, strict=True)]
        return [*asked, False][:4]

    @property
    def scores(self) -> int:
        """How many scores are seen, over batch and heads."""
        batch, heads, rows, _ = self.value("query").shape
        columns = self.value("key").shape[2]
        row = torch.arange(rows)
        first = torch.zeros(rows) if self.left is None else (row - self.left).clamp(min=0)
        last = (
            torch.full((rows,), columns) if self.right is None else (row + self.right + 1).clamp(max=columns)
        )
        return int((last - first).clamp(min=0).sum()) * batch * heads


def is_attention(target: Any) -> bool:
    """Whether an operator is attention in one of the forms above."""
    return target in _FORMS


def attentions_of(graph: fx.Graph) -> list[fx.Node]:
    """The nodes of a graph that are attention."""
    return [node for node in graph.nodes if node.op == "call_function" and is_attention(node.target)]


def attention_of(node: fx.Node) -> Attention:
    """What a node attends to; raises ``NotFusible`` where the kernels do not compute it."""
    form = _FORMS[node.target]
    given = _arguments(node)
    if given.get("dropout_p"):
        whose = "draws the numbers of the library" if form.library else "by a seed stays a call"
        raise _no(f"attention with dropout {whose}")
    if given.get("return_debug_mask"):
        raise _no("attention gives a mask of its dropout")
    roles = ("query", "key", "value", "bias", *(("grad", "output", "log_sum_exp") if form.backward else ()))
    found = {role: given.get(form.names.get(role, role)) for role in roles}
    operands: dict[str, fx.Node] = {role: value for role, value in found.items() if value is not None}
    query, key, value = (operands[role].meta["val"] for role in roles[:3])
    for role, operand in operands.items():
        if any(not isinstance(n, int) for n in operand.meta["val"].shape):
            raise _no(f"the {role} of attention has sizes that are known at run time alone")
    bias = operands["bias"].meta["val"] if "bias" in operands else None
    scale, softcap, left, right = _settings(form, given, query, key)
    grouped = query.dim() == 4 and key.dim() == 4 and query.shape[1] != key.shape[1]
    if form.library == "composite" and grouped and not given.get("enable_gqa"):
        raise _no("attention is broadcast over heads")
    refused = attention_supports(query, key, value, bias, scale, softcap) or kernels_take(query, value)
    if refused is not None:
        raise NotFusible(refused)
    if 0 in (*query.shape, *key.shape, *value.shape):
        raise _no("an operand has no elements")
    wanted = _wanted(form, given)
    return Attention(
        node, form.library, form.backward, operands, scale, softcap, left, right, wanted, _results(node, form)
    )


def _settings(
    form: _Form, given: Mapping[str, Any], query: torch.Tensor, key: torch.Tensor
) -> tuple[float, float, int | None, int | None]:
    """Scale, cap, and how far queries see."""
    if not form.library:
        return given["scale"], given["softcap"], given["left"], given["right"]
    if given["is_causal"] and form.library in _SQUARE and query.shape[-2] != key.shape[-2]:
        raise _no(
            f"the causal mask of {query.shape[-2]} queries and {key.shape[-2]} keys is the library's own"
        )
    scale = given.get("scale")
    scale = query.shape[-1] ** -0.5 if scale is None and query.shape[-1] else scale
    if not isinstance(scale, (int, float)):
        raise _no("attention is scaled by a number that is known at run time alone")
    return float(scale), 0.0, None, 0 if given["is_causal"] else None


def _wanted(form: _Form, given: Mapping[str, Any]) -> tuple[bool, ...]:
    if not form.backward:
        return ()
    if not form.library:
        return tuple(given["output_mask"])
    return tuple(given["grad_input_mask"]) if form.library == "efficient" else (True, True, True)


def _results(node: fx.Node, form: _Form) -> tuple[str, ...]:
    if form.backward:
        return ("d_query", "d_key", "d_value", "d_bias")[: len(node.meta["val"])]
    count = len(node.meta["val"]) if isinstance(node.meta["val"], (tuple, list)) else 1
    return ("output", "log_sum_exp", *("" for _ in range(count - 2)))[:count]


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name, those that are not given as the schema has them."""
    assert isinstance(node.target, torch._ops.OpOverload)
    parameters = node.target._schema.arguments
    found = {p.name: p.default_value for p in parameters if p.has_default_value()}
    found |= dict(zip((p.name for p in parameters), node.args, strict=False))
    return found | node.kwargs


def parts_of(node: fx.Node) -> list[tuple[int, fx.Node]]:
    """The results of a call that are read, by number; a call of one result is its own."""
    if isinstance(node.meta["val"], torch.Tensor):
        return [(0, node)]
    return [(int(user.args[1]), user) for user in node.users if user.target is operator.getitem]  # type: ignore[arg-type]
