"""Attention written out: numbers in Triton's interpreter, text, refusals, and where the library stays."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt_kernels import attention_launch
from graphopt_kernels.emit.attention_choice import attention_share, emitted_attention, library_attention
from graphopt_kernels.emit.build import NotFusible
from graphopt_kernels.emit.fold import Folded
from graphopt_kernels.emit.groups import Grouping, grouped
from graphopt_kernels.emit.kernel_file import kernel_of
from graphopt_kernels.emit.product_choice import Prices, prices_for
from graphopt_kernels.emit.specialized import Wanted, specialized
from tests.attention_cases import (
    BF16,
    CASES,
    CPU,
    CUDNN,
    EFFICIENT,
    FLASH,
    FP16,
    FP32,
    alibi,
    kernel_for,
    own,
    padded,
)
from tests.interpreted import interpreted

pytest.importorskip("triton")

aten = torch.ops.aten
Given = Sequence[tuple[tuple[int, ...], torch.dtype]]


def graph_of(
    function: Callable[..., Any],
    *inputs: tuple[tuple[int, ...], torch.dtype],
    device: str,
    whole: bool = False,
) -> fx.Graph:
    with FakeTensorMode():
        tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in inputs]
        graph = make_fx(function, tracing_mode="real", pre_dispatch=whole)(*tensors).graph
    graph.eliminate_dead_code()
    (output,) = [node for node in graph.nodes if node.op == "output"]
    if isinstance(output.args[0], fx.Node):
        output.args = ((output.args[0],),)
    return graph


def groups_of(
    function: Callable[..., Any],
    *inputs: tuple[tuple[int, ...], torch.dtype],
    device: str = "cuda",
    prices: Prices | None = None,
) -> Grouping:
    return grouped(graph_of(function, *inputs, device=device), prices=prices)


# --- numbers --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    return interpreted("attention_cases.py")


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_as_near_to_float64_as_the_operators(name: str, outcomes: dict[str, Any]) -> None:
    found, case = outcomes[name], CASES[name]
    assert "error" in found, found
    assert found["error"] <= case.tolerance
    assert found["reference"] <= case.tolerance
    # Kernels round weights to 16 bits before they multiply, the reference does not.
    assert found["error"] <= 2 * found["reference"] + 1e-6


# --- text -----------------------------------------------------------------------------------


def test_the_same_graph_gives_the_same_bytes() -> None:
    for name in ("own, computed bias", "flash", "own backward, bias"):
        case = CASES[name]
        first, second = (kernel_for(case, case.inputs())[0].file for _ in range(2))
        assert first.source == second.source and first.name == second.name
        assert ast.parse(first.source)
        ours = [line for line in first.source.splitlines()[1:] if "torch.ops.aten" not in line]
        assert max(map(len, ours)) <= 110, "lines are broken"


def test_the_text_of_a_file(golden: Callable[[str, str], None]) -> None:
    for name, stored in (
        ("flash", "kernel_attention.py.txt"),
        ("own, computed bias", "kernel_attention_bias.py.txt"),
    ):
        golden(stored, kernel_for(CASES[name], CASES[name].inputs())[0].file.source)


def test_what_a_call_does_not_need_is_not_in_its_file() -> None:
    plain = kernel_for(CASES["own"], CASES["own"].inputs())[0].file.source
    assert "bias_of_tile" not in plain and "_tanh" not in plain and "only_visible(scores, row" not in plain
    capped = kernel_for(CASES["own, cap and window"], CASES["own, cap and window"].inputs())[0].file.source
    assert "_tanh" in capped and "column >= row - 9" in capped and "column <= row + 3" in capped
    alone = kernel_for(
        CASES["own backward, of the query alone"], CASES["own backward, of the query alone"].inputs()
    )
    assert "def queries_kernel" in alone[0].file.source and "def keys_kernel" not in alone[0].file.source


def test_sizes_are_no_constants_of_the_kernels() -> None:
    """The compiler would write out short loops whole."""
    for name in ("own", "own backward"):
        source = kernel_for(CASES[name], CASES[name].inputs())[0].file.source
        for head in source.split("\ndef ")[1:]:
            if "_kernel(" in head.split(":")[0] and not head.startswith("rows_kernel"):
                assert {"rows", "columns"} <= set(
                    head.split("):")[0].replace("\n", " ").replace(",", " ").split()
                )


def test_products_of_float32_are_as_exact_as_torch_is_told(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphopt_kernels.emit.machine_code import import_kernel

    case = CASES["own"]
    inputs = list(case.inputs())
    module = import_kernel(kernel_for(case, inputs)[0].file, tmp_path)
    started: list[dict[str, Any]] = []

    class Started:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **options: started.append(options)

    monkeypatch.setattr(module, "forward_kernel", Started())
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            module.launch(*inputs)
    finally:
        torch.set_float32_matmul_precision(before)
    assert [options["PRECISION"] for options in started] == ["tf32x3", "tf32"]
    half = kernel_for(CASES["own, float16"], CASES["own, float16"].inputs())[0].file.source
    assert "PRECISION" not in half and "input_precision" not in half


@pytest.mark.parametrize(
    ("expression", "folded"),
    [
        ("a * 2 + 1", "7"),
        ("x * 1 + 0", "x"),
        ("x * 0", "x * 0"),  # It has the shape of x.
        ("a // 2 + -a // 2", "1 + -3 // 2"),  # Triton rounds the second towards zero.
        ("x if a == 3 else y", "x"),
        ("x and a and flag", "x"),
        ("x or flag", "True"),
        ("f(x, how=nothing)", "f(x)"),
    ],
)
def test_expressions_fold(expression: str, folded: str) -> None:
    known = {"a": 3, "flag": True, "nothing": None}
    tree = Folded(known, {}).visit(ast.parse(expression, mode="eval"))
    assert ast.unparse(tree) == folded


def test_parameters_on_which_calls_do_not_agree_stay() -> None:
    kernels = attention_launch.jitted()
    known = {"heads": 4, "VALUE_WIDTH": 16, "BLOCK_V": 16, "grad_row": 16, "output_row": 32}
    made = specialized([Wanted(kernels.rows, known)])
    assert "def tile(base, start, stride, rows, ROWS: tl.constexpr):" in made.text
    assert "grad_batch" in made.parameters["rows_kernel"] and "heads" not in made.parameters["rows_kernel"]
    assert "begin, 16, rows" in made.text and "begin, 32, rows" in made.text
    # Comments go along, branches that are not taken do not.
    assert "# The start may lie beyond what 32 bits can tell" in made.text and "if EDGE" not in made.text


# --- what is not written out -----------------------------------------------------------------

Q, K = ((2, 4, 32, 16), FP16), ((2, 2, 40, 16), FP16)
SAME = [Q, Q, Q]


def _own(q: Any, k: Any, v: Any, bias: Any = None) -> Any:
    return own.attention(q, k, v, bias, 1.0, 0.0, None, None)[0]


def _of_a_computed_bias(q: Any, k: Any, v: Any, bias: Any, sums: Any) -> Any:
    settings = (1.0, 0.0, None, None)
    return own.attention_backward(q, q, k, v, bias * 2, q, sums, *settings, [True] * 4)[:4]


CAUSAL = "the causal mask of 32 queries and 40 keys is the library's own"
REFUSED: list[tuple[Callable[..., Any], Given, str]] = [
    (
        lambda q, k, v: FLASH(q, k, v, 0.5)[0],
        SAME,
        "attention with dropout draws the numbers of the library",
    ),
    (
        lambda q, k, v, n: own.attention(q, k, v, None, 1.0, 0.0, None, None, 0.5, n)[0],
        [*SAME, ((1,), torch.int64)],
        "attention with dropout by a seed stays a call",
    ),
    (lambda q, k, v: FLASH(q, k, v, 0.0, True)[0], [Q, K, K], CAUSAL),
    (lambda q, k, v: CUDNN(q, k, v, None, False, 0.0, True)[0], [Q, K, K], CAUSAL),
    (
        lambda q, k, v: EFFICIENT(q, k, v, None, False, 0.0, False, scale=-1.0)[0],
        SAME,
        "takes a scale above zero, got -1",
    ),
    (
        lambda q, k, v: aten.scaled_dot_product_attention(q, k, v),
        [Q, ((2, 1, 40, 16), FP16), ((2, 1, 40, 16), FP16)],
        "attention is broadcast over heads",
    ),
    (
        lambda q, k, v: _own(q, k, v),
        [((1, 2, 8, 16), torch.float64)] * 3,
        "the kernels of attention do not compute in float64",
    ),
    (
        lambda q, k, v: _own(q, k, v),
        [((1, 2, 8, 160), FP32)] * 3,
        "heads of 160 elements do not fit the registers: at most 128 do",
    ),
    (lambda q, k, v: _own(q, k, v), [((0, 2, 8, 16), FP16)] * 3, "an operand has no elements"),
    (lambda q, k, v: _own(q * 2, k, v), SAME, "the query of attention is computed"),
    (lambda q, k, v: _own(_own(q, k, v), k, v), SAME, "2 calls of attention: a kernel computes one"),
    (
        lambda q, k, v, b: _own(q, k, v, b.sum(0)),
        [*SAME, ((3, 32, 32), FP16)],
        "a reduction beside attention",
    ),
    (lambda q, k, v: _own(q, k, v) + 1, SAME, "what attention takes in is read by others too"),
    (
        _of_a_computed_bias,
        [*SAME, ((32, 32), FP16), ((2, 4, 32), FP32)],
        "the bias of attention is computed, and has a gradient",
    ),
]


@pytest.mark.parametrize(("function", "inputs", "reason"), REFUSED)
def test_what_is_not_written_out_says_why(function: Callable[..., Any], inputs: Given, reason: str) -> None:
    graph = graph_of(
        function, *inputs, device="cpu" if "heads" in reason else "cuda", whole="heads" in reason
    )
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    (output,) = [node for node in graph.nodes if node.op == "output"]
    with pytest.raises(NotFusible) as refused:
        kernel_of(nodes, list(output.args[0]))  # type: ignore[arg-type]
    assert str(refused.value.reason) == reason


# --- where it is used ------------------------------------------------------------------------

LONG, SHORT = ((4, 16, 4096, 128), BF16), ((64, 16, 16, 64), BF16)


@pytest.mark.parametrize("given", [LONG, SHORT], ids=["long", "short"])
def test_plain_attention_stays_with_a_library_that_is_faster(given: Any) -> None:
    causal: Callable[..., Any] = lambda q, k, v: FLASH(q, k, v, 0.0, True)[0]  # noqa: E731
    found = groups_of(causal, given, given, given)
    assert not found.kernels
    ((_, reason),) = found.left
    assert str(reason).startswith("attention ")
    assert "at 0.6 of the library's rate, the library " in str(reason) and str(reason).endswith("on h200")
    h200 = prices_for().device
    as_fast = Prices(replace(h200, emitted_attention_share={"bfloat16": 1.0}))
    found = groups_of(causal, given, given, given, prices=as_fast)
    (kernel,) = found.kernels
    assert kernel.file.attends and not found.left
    assert attention_share(Prices(replace(h200, emitted_attention_share={})), kernel.file) == 0.5
    assert emitted_attention(as_fast, kernel.file) <= library_attention(as_fast, kernel.file)


def test_what_no_library_has_is_written_out() -> None:
    capped: Callable[..., Any] = lambda q, k, v: own.attention(q, k, v, None, 0.1, 50.0, None, 0)[0]  # noqa: E731
    found = groups_of(capped, LONG, LONG, LONG)
    assert len(found.kernels) == 1
    assert [str(reason) for _, reason in found.taken] == ["attention that no library has"]
    here: Callable[..., Any] = lambda q, k, v: CPU(q, k, v)[0]  # noqa: E731
    found = groups_of(here, LONG, LONG, LONG, device="cpu")
    assert len(found.kernels) == 1
    assert [str(reason) for _, reason in found.taken] == ["attention whose call runs on a CPU alone"]


def test_a_bias_is_computed_where_nobody_else_reads_it() -> None:
    slopes = ((16,), BF16)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return own.attention(q, k, v, alibi(q, s, 4096, 4096), 0.1, 0.0, None, 0)[0]  # type: ignore[no-any-return]

    found = groups_of(attend, LONG, LONG, LONG, slopes)
    (kernel,) = found.kernels
    assert [tuple(node.meta["val"].shape) for node in kernel.inputs] == [(16,), *[LONG[0]] * 3]
    ((_, reason),) = found.taken
    assert str(reason) == "attention with arange, sub, mul in it that no library has"

    def shared(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        bias = alibi(q, s, 4096, 4096)
        return own.attention(q, k, v, bias, 0.1, 0.0, None, 0)[0], bias

    found = groups_of(shared, LONG, LONG, LONG, slopes)
    assert [kernel.file.attends for kernel in found.kernels] == [False, True]


def test_a_mask_of_padding_is_read_by_token() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        return CPU(q, k, v, attn_mask=padded(q, kept, 1024))[0]  # type: ignore[no-any-return]

    x = ((4, 2, 1024, 64), FP16)
    (kernel,) = groups_of(attend, x, x, x, ((4, 1024), torch.bool), device="cpu").kernels
    assert kernel.file.bytes == 4 * x[0][0] * x[0][1] * x[0][2] * x[0][3] * 2 + 4 * 1024
