"""Functions with one call of attention that each make one kernel file, for tests and the interpreter.

Run as a script it runs every case in Triton's interpreter and prints, as JSON, how far the results of its
kernels are from float64, and how far those of the operators themselves. TRITON_INTERPRET has to be set before
triton is imported, hence a process.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import graphopt_kernels.attention  # noqa: F401  (registers the operators)
from graphopt_kernels.attention_reference import attention_backward_reference, attention_reference
from graphopt_kernels.emit.build import NotFusible
from graphopt_kernels.emit.kernel_file import Kernel, kernel_of
from graphopt_kernels.emit.machine_code import import_kernel
from tests.emitted_cases import distance

aten, own = torch.ops.aten, torch.ops.graphopt
FP16, FP32, BF16 = torch.float16, torch.float32, torch.bfloat16
INF = float("inf")


@dataclass(frozen=True)
class AttentionCase:
    """``function`` of operands like ``inputs()``, as ATen or graphopt has it on a ``device``; ``exact``: what
    it computes, in float64. ``whole``: composite operators are not taken apart. ``tolerance``: of a result
    relative to its largest element."""

    function: Callable[..., Any]
    inputs: Callable[[], Sequence[torch.Tensor]]
    exact: Callable[..., Any]
    device: str = "cpu"
    whole: bool = False
    tolerance: float = 2e-5


def operands(
    rows: int = 33,
    columns: int = 33,
    *,
    heads: int = 4,
    few: int = 4,
    width: int = 16,
    value_width: int | None = None,
    dtype: torch.dtype = FP32,
    more: Callable[[], Sequence[torch.Tensor]] = lambda: (),
    backward: bool = False,
) -> Callable[[], list[torch.Tensor]]:
    """Query, key and value as projections lay them, what is ``more``, and for a ``backward`` the gradient."""

    def made() -> list[torch.Tensor]:
        found = [
            torch.randn(2, rows, heads, width).transpose(1, 2),
            torch.randn(2, few, columns, width),
            torch.randn(2, columns, few, value_width or width).transpose(1, 2),
        ]
        grad = [torch.randn(2, heads, rows, value_width or width)] if backward else []
        return [x.to(dtype) for x in found] + list(more()) + [x.to(dtype) for x in grad]

    return made


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None = None,
    *, scale: float | None = None, softcap: float = 0.0, left: int | None = None, right: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return attention_reference(query, key, value, bias, scale, softcap, left, right)


def _gradients(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    grad: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    left: int | None = None,
    right: int | None = None,
) -> tuple[torch.Tensor, ...]:
    settings = (scale, softcap, left, right)
    output, sums = attention_reference(query, key, value, bias, *settings)
    wanted = [True, True, True, bias is not None and bias.is_floating_point()]
    return attention_backward_reference(grad, query, key, value, bias, output, sums, *settings, wanted)


def alibi(query: torch.Tensor, slopes: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A bias that grows with the distance, by a slope for each head."""
    # Not by indexing: a torch without CUDA traces no slices of its tensors.
    key, row = (torch.arange(n, device=slopes.device) for n in (columns, rows))
    distances = key.unsqueeze(0) - row.unsqueeze(1)
    return (slopes.view(-1, 1, 1) * distances).to(query.dtype).unsqueeze(0)


def padded(query: torch.Tensor, kept: torch.Tensor, rows: int) -> torch.Tensor:
    """What a model of text adds: minus infinity where keys are padding or later."""
    batch, columns = kept.shape
    key, row = (torch.arange(n, device=kept.device) for n in (columns, rows))
    late = (key.unsqueeze(0) > row.unsqueeze(1)).view(1, 1, rows, columns)
    hidden = late | ~kept.view(batch, 1, 1, columns)
    return torch.where(hidden, -INF, 0.0).to(query.dtype)


def _kept() -> list[torch.Tensor]:
    kept = torch.rand(2, 33) > 0.3
    kept[:, 0] = True
    return [kept]


def _mask(rows: int, columns: int) -> Callable[[], list[torch.Tensor]]:
    def made() -> list[torch.Tensor]:
        mask = torch.randn(2, 1, rows, columns)
        mask[:, :, 3] = -INF
        mask[:, :, 5, 4:] = -INF
        return [mask]

    return made


CPU = aten._scaled_dot_product_flash_attention_for_cpu
CPU_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward
FLASH = aten._scaled_dot_product_flash_attention
FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_backward
EFFICIENT = aten._scaled_dot_product_efficient_attention
EFFICIENT_BACKWARD = aten._scaled_dot_product_efficient_attention_backward
CUDNN = aten._scaled_dot_product_cudnn_attention
CUDNN_BACKWARD = aten._scaled_dot_product_cudnn_attention_backward


def _padded_sums(made: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return made[0], torch.nn.functional.pad(made[1], (0, 31), value=INF)


def _trained(made: Sequence[Any]) -> list[torch.Tensor]:
    """What a training step keeps of the results of flash attention."""
    return [made[n] for n in (0, 1, 6, 7)]


def _saved(
    inputs: Callable[[], list[torch.Tensor]], *settings: Any, bias: int | None = None, more: int = 0
) -> Callable[[], list[torch.Tensor]]:
    """Operands of a backward: those of the forward, the gradient, output and log-sum-exp."""

    def made() -> list[torch.Tensor]:
        found = inputs()
        added = found[bias] if bias is not None else None
        output, sums = attention_reference(*found[:3], added, *settings)
        return [*found, output, torch.nn.functional.pad(sums, (0, more), value=INF)]

    return made


def _half(case: AttentionCase) -> AttentionCase:
    def inputs() -> list[torch.Tensor]:
        return [x.half() if x.dtype is FP32 else x for x in case.inputs()]

    return AttentionCase(case.function, inputs, case.exact, case.device, case.whole, 4e-3)


SCALE = 0.25
THREE = [True, True, True, False]
CASES: dict[str, AttentionCase] = {
    "own": AttentionCase(
        lambda q, k, v: own.attention(q, k, v, None, 0.3, 0.0, None, None),
        operands(columns=40, value_width=24),
        lambda q, k, v: _attend(q, k, v, scale=0.3),
    ),
    "own, cap and window": AttentionCase(
        lambda q, k, v: own.attention(q, k, v, None, 0.3, 2.0, 9, 3)[0],
        operands(few=2),
        lambda q, k, v: _attend(q, k, v, scale=0.3, softcap=2.0, left=9, right=3)[0],
    ),
    "own, bias": AttentionCase(
        lambda q, k, v, b: own.attention(q, k, v, b, 0.3, 3.0, None, 0)[0],
        operands(40, 33, more=_mask(40, 33)),
        lambda q, k, v, b: _attend(q, k, v, b, scale=0.3, softcap=3.0, right=0)[0],
    ),
    "own, hidden": AttentionCase(
        lambda q, k, v, b: own.attention(q, k, v, b[:, None, None, :], 0.3, 0.0, -2, None),
        operands(40, 33, few=1, more=_kept),
        lambda q, k, v, b: _attend(q, k, v, b[:, None, None, :], scale=0.3, left=-2),
    ),
    "own, computed bias": AttentionCase(
        lambda q, k, v, s: own.attention(q, k, v, alibi(q, s, 33, 40), 0.3, 0.0, None, 7)[0],
        operands(33, 40, more=lambda: [torch.rand(4)]),
        lambda q, k, v, s: _attend(q, k, v, alibi(q, s, 33, 40), scale=0.3, right=7)[0],
    ),
    "composite": AttentionCase(
        lambda q, k, v: aten.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        operands(few=2),
        lambda q, k, v: _attend(q, k, v, right=0)[0],
        whole=True,
    ),
    "on a CPU": AttentionCase(
        lambda q, k, v, b: CPU(q, k, v, attn_mask=b, scale=0.2),
        operands(33, 40, more=_mask(33, 40)),
        lambda q, k, v, b: (_attend(q, k, v, b, scale=0.2)[0], None),
    ),
    "on a CPU, computed mask": AttentionCase(
        lambda q, k, v, kept: CPU(q, k, v, attn_mask=padded(q, kept, 33))[0],
        operands(more=_kept),
        lambda q, k, v, kept: _attend(q, k, v, padded(q, kept, 33))[0],
    ),
    "flash": AttentionCase(
        lambda q, k, v: _trained(FLASH(q, k, v, 0.0, True)),
        operands(few=2),
        lambda q, k, v: (*_attend(q, k, v, right=0), None, None),
        "cuda",
    ),
    "efficient": AttentionCase(
        lambda q, k, v, b: EFFICIENT(q, k, v, b.expand(2, 4, 33, 40), True)[:2],
        operands(33, 40, more=_mask(33, 40)),
        lambda q, k, v, b: _padded_sums(_attend(q, k, v, b)),
        "cuda",
    ),
    "cuDNN": AttentionCase(
        lambda q, k, v: CUDNN(q, k, v, None, True, 0.0, True)[:2],
        operands(),
        lambda q, k, v: (_attend(q, k, v, right=0)[0], _attend(q, k, v, right=0)[1][..., None]),
        "cuda",
    ),
    "own backward": AttentionCase(
        lambda q, k, v, g, o, s: own.attention_backward(
            g, q, k, v, None, o, s, SCALE, 2.0, None, 0, THREE
        )[:3],
        _saved(operands(few=2, backward=True), SCALE, 2.0, None, 0),
        lambda q, k, v, g, *_: _gradients(q, k, v, None, g, scale=SCALE, softcap=2.0, right=0)[:3],
    ),
    "own backward, bias": AttentionCase(
        lambda q, k, v, b, g, o, s: own.attention_backward(
            g, q, k, v, b, o, s, SCALE, 0.0, 12, 0, [True] * 4
        ),
        _saved(operands(33, 33, more=_mask(33, 33), backward=True), SCALE, 0.0, 12, 0, bias=3),
        lambda q, k, v, b, g, *_: _gradients(q, k, v, b, g, scale=SCALE, left=12, right=0),
    ),
    "own backward, of the query alone": AttentionCase(
        lambda q, k, v, g, o, s: own.attention_backward(
            g, q, k, v, None, o, s, SCALE, 0.0, None, None, [True, False, False, False]
        )[0],
        _saved(operands(33, 40, backward=True), SCALE, 0.0, None, None),
        lambda q, k, v, g, *_: _gradients(q, k, v, None, g, scale=SCALE)[0],
    ),
    "backward on a CPU, computed mask": AttentionCase(
        lambda q, k, v, kept, g, o, s: CPU_BACKWARD(
            g, q, k, v, o, s, 0.0, False, attn_mask=padded(q, kept, 33), scale=SCALE
        ),
        lambda: _of_padded(),
        lambda q, k, v, kept, g, *_: _gradients(q, k, v, padded(q, kept, 33), g, scale=SCALE)[:3],
    ),
    "flash backward": AttentionCase(
        lambda q, k, v, g, o, s: FLASH_BACKWARD(
            g, q, k, v, o, s, s, s, 33, 33, 0.0, True, s, s, scale=SCALE
        ),
        _saved(operands(backward=True), SCALE, 0.0, None, 0),
        lambda q, k, v, g, *_: _gradients(q, k, v, None, g, scale=SCALE, right=0)[:3],
        "cuda",
    ),
    "efficient backward": AttentionCase(
        lambda q, k, v, b, g, o, s: EFFICIENT_BACKWARD(
            g, q, k, v, b, o, s, s, s, 0.0, THREE, False, scale=SCALE
        )[:3],
        _saved(
            operands(33, 40, more=_mask(33, 40), backward=True), SCALE, 0.0, None, None, bias=3, more=31
        ),
        lambda q, k, v, b, g, *_: _gradients(q, k, v, b, g, scale=SCALE)[:3],
        "cuda",
    ),
    "cuDNN backward": AttentionCase(
        lambda q, k, v, g, o, s: CUDNN_BACKWARD(
            g, q, k, v, o, s.unsqueeze(-1), s, s, None, s, s, 33, 33, 0.0, True, scale=SCALE
        ),
        _saved(operands(backward=True), SCALE, 0.0, None, 0),
        lambda q, k, v, g, *_: _gradients(q, k, v, None, g, scale=SCALE, right=0)[:3],
        "cuda",
    ),
}  # fmt: skip
"""By what they show."""


def _of_padded() -> list[torch.Tensor]:
    q, k, v, kept, grad = operands(more=_kept, backward=True)()
    output, sums = _attend(q, k, v, padded(q, kept, 33), scale=SCALE)
    return [q, k, v, kept, grad, output, sums]


for _name in ("own", "own, computed bias", "on a CPU", "flash", "own backward", "own backward, bias"):
    CASES[f"{_name}, float16"] = _half(CASES[_name])


def kernel_for(case: AttentionCase, inputs: Sequence[torch.Tensor]) -> tuple[Kernel, list[int]]:
    """The kernel of all operators of a case, and which of ``inputs`` it takes, in order."""
    with FakeTensorMode():
        fakes = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=case.device) for x in inputs]
        graph = make_fx(case.function, tracing_mode="real", pre_dispatch=case.whole)(*fakes).graph
    graph.eliminate_dead_code()
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    (output,) = [node for node in graph.nodes if node.op == "output"]
    outputs = output.args[0]
    results: list[fx.Node] = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    kernel = kernel_of(nodes, results)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    return kernel, [placeholders.index(node) for node in kernel.inputs]


def outcome(case: AttentionCase, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    inputs = list(case.inputs())
    try:
        kernel, order = kernel_for(case, inputs)
        module = import_kernel(kernel.file, folder)
        made = module.launch(*[inputs[i] for i in order])
        plain = module.reference(*[inputs[i] for i in order])
    except NotFusible as refused:
        return {"refused": str(refused.reason)}
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    exact = case.exact(*wide)
    right = list(exact) if isinstance(exact, (tuple, list)) else [exact]
    ours = theirs = 0.0
    for value, other, expected, fake in zip(made, plain, right, kernel.outputs, strict=True):
        layout = fake.meta["val"]
        for found in (value, other):
            if (found.shape, found.dtype, found.stride()) != (layout.shape, layout.dtype, layout.stride()):
                return {
                    "failed": f"{found.shape} {found.dtype} {found.stride()}, not {layout} {layout.stride()}"
                }
        if expected is not None:
            ours, theirs = max(ours, distance(value, expected)), max(theirs, distance(other, expected))
    return {"error": ours, "reference": theirs}


def main(names: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        wanted = names or list(CASES)
        print(json.dumps({name: outcome(CASES[name], Path(folder)) for name in wanted}))


if __name__ == "__main__":
    main(sys.argv[1:])
