"""Memory read from generated code: stored sources, small hand-written wrappers, one real compile."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graphopt import _torch
from graphopt.emit import resolve_emitter
from graphopt.emit.inductor import InductorEmitter
from graphopt.emit.lowered import (
    LoweredCompiler,
    LoweredMemory,
    Owned,
    compile_lowered,
    lowered_memory,
    step_memory,
)
from graphopt.emit.scratch import scratch_bytes
from graphopt.errors import LoweringError
from graphopt_cost_model.devices import resolve
from tests.programs import host

DATA = Path(__file__).parent / "data"

HEADER = """
import torch
from torch._C import _cuda_getCurrentRawStream as get_raw_stream
import a_module_that_is_missing as helper
reinterpret_tensor = torch._C._dynamo.guards._reinterpret_tensor
empty_strided_cpu = torch._C._dynamo.guards._empty_strided_cpu
empty_strided_cuda = torch._C._dynamo.guards._empty_strided_cuda
async_compile = AsyncCompile()
kernel_0 = async_compile.cpp_pybinding(['float*'], '''...''')
kernel_1 = async_compile.triton('kernel_1', '''...''', device_str='cuda')
async_compile.wait(globals())
"""


def read(body: str, *inputs: Any, outputs: int = 1, **options: Any) -> LoweredMemory:
    """Memory of a wrapper whose ``call`` has the given body; inputs are named a, b, c."""
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    options.setdefault("phase", "inference")
    return lowered_memory(
        f"{HEADER}\ndef call(args):\n{lines}",
        inputs,
        input_names=["a", "b", "c"][: len(inputs)],
        output_names=[f"out{i}" for i in range(outputs)],
        **options,
    )


def stored(name: str, phase: str, output_names: list[str] | None = None, **options: Any) -> LoweredMemory:
    """A source that Inductor generated (kernel bodies and asserts removed)."""
    source = (DATA / f"inductor_{name}_{phase}.txt").read_text()
    described = json.loads(source.split("\n", 1)[0].removeprefix("# inputs: "))
    device = "cuda" if "cuda" in name else "cpu"
    with _torch.fake_mode():
        inputs = [
            torch.empty_strided(s, st, dtype=getattr(torch, d), device=device) for d, s, st in described
        ]
    match = re.search(r"^ +(\w+(?:, \w+)*,?) = args$", source, re.M)
    assert match
    names = [n.strip() for n in match[1].strip(",").split(",")]
    outputs = output_names or [f"grad{i}" for i in range(_returned(source))]
    return lowered_memory(source, inputs, input_names=names, output_names=outputs, phase=phase, **options)


def _returned(source: str) -> int:
    """How many values the last ``return`` of the source has."""
    import ast

    returns = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Return)]
    last = max(returns, key=lambda n: n.lineno).value
    assert isinstance(last, ast.Tuple)
    return len(last.elts)


def test_buffers_live_from_allocation_to_del() -> None:
    memory = read(
        """
a, = args
args.clear()
buf0 = empty_strided_cpu((10, ), (1, ), torch.float32)
kernel_0(a, buf0)
buf1 = empty_strided_cpu((20, ), (1, ), torch.float32)
kernel_0(buf0, buf1)
del buf0
buf2 = empty_strided_cpu((5, ), (1, ), torch.float64)
kernel_0(buf1, buf2)
del buf1
return (buf2, )
""",
        torch.empty(10),
    )
    assert memory.steps == ("kernel_0", "kernel_0", "kernel_0")
    assert memory.live() == [40, 120, 120]
    assert (memory.peak_bytes, memory.peak_step, memory.output_bytes) == (120, "kernel_0", 40)


def test_reuse_views_and_inplace_add_no_memory() -> None:
    memory = read(
        """
a, = args
args.clear()
buf0 = empty_strided_cpu((4, 4), (4, 1), torch.float32)
extern_kernels.mm(a, reinterpret_tensor(a, (4, 4), (1, 4), 0), out=buf0)
buf1 = buf0; del buf0  # reuse
buf2 = reinterpret_tensor(buf1, (16, ), (1, ), 0); del buf1  # reuse
kernel_0(buf2)
return (reinterpret_tensor(buf2, (2, ), (1, ), 3), )
""",
        torch.empty(4, 4),
    )
    assert memory.steps == ("extern_kernels.mm", "kernel_0")
    assert memory.live() == [64, 64]
    assert memory.output_bytes == 64, "a view keeps its whole storage"


def test_library_calls_allocate_their_results_and_drop_the_unused_ones() -> None:
    memory = read(
        """
a, = args
args.clear()
buf0 = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(a, a, a)
buf1 = buf0[0]
buf2 = buf0[1]
del buf0
del buf2
kernel_0(buf1)
return (buf1, )
""",
        torch.empty(1, 2, 8, 4),
    )
    logsumexp, attended = 1 * 2 * 8 * 4, 1 * 2 * 8 * 4 * 4
    assert memory.steps[0] == "aten._scaled_dot_product_flash_attention_for_cpu.default"
    assert memory.live() == [attended + logsumexp, attended]


def test_inputs_count_only_where_the_call_owns_them() -> None:
    body = """
a, b = args
args.clear()
buf0 = empty_strided_cpu((8, ), (1, ), torch.float32)
kernel_0(a, b, buf0)
del a
buf1 = empty_strided_cpu((2, ), (1, ), torch.float32)
kernel_0(b, buf0, buf1)
del b
return (buf0, buf1, )
"""
    memory = read(body, torch.empty(100), torch.empty(50), outputs=2, static=[1])
    assert memory.input_releases == {"a": 0}, "b is static"
    assert memory.live() == [32, 40]
    assert memory.live([Owned(("a",), 400)]) == [32, 40 - 400]
    assert memory.live([Owned(("a", "b"), 400)]) == [32, 40], "one storage: free after its last use"


def test_an_input_that_is_reused_as_output_is_not_released() -> None:
    memory = read(
        "a, = args\nargs.clear()\nbuf0 = a; del a  # reuse\nkernel_0(buf0)\nreturn (buf0, )", torch.empty(4)
    )
    assert memory.live([Owned(("a",), 16)]) == [0]
    assert (memory.output_bytes, memory.input_releases) == (0, {})


def test_a_release_after_a_later_allocation_is_never_understated() -> None:
    memory = read(
        """
a, = args
args.clear()
buf0 = empty_strided_cpu((8, ), (1, ), torch.float32)
kernel_0(a, buf0)
buf1 = empty_strided_cpu((8, ), (1, ), torch.float32)
del buf0
kernel_0(a, buf1)
return (buf1, )
""",
        torch.empty(8),
    )
    assert memory.live() == [32, 64]


def test_code_for_a_gpu_is_read_without_one() -> None:
    body = """
a, b = args
args.clear()
with torch.cuda._DeviceGuard(0):
    torch.cuda.set_device(0)
    buf0 = empty_strided_cuda((3, ), (1, ), torch.bfloat16)
    stream0 = get_raw_stream(0)
    kernel_1.run(a, buf0, 3, stream=stream0)
    workspace_0 = empty_strided_cuda((1000, ), (1, ), torch.uint8)
    workspace_0.zero_()
    kernel_1.run(workspace_0, buf0, 3, stream=stream0)
    del workspace_0
    buf1 = empty_strided_cpu((1000, ), (1, ), torch.float32)
    kernel_0(b, buf1)
return (buf0, buf1, )
"""
    with _torch.fake_mode():
        gpu = torch.empty(3, device="cuda")
    memory = read(body, gpu, torch.empty(1000), outputs=2, granularity=512)
    assert memory.device_type == "cuda"
    assert memory.live() == [512, 1536, 1536, 512], "host buffers are another budget"
    assert memory.output_bytes == 512


def test_constants_belong_to_the_program() -> None:
    memory = read(
        "a, = args\nbuf0 = torch.ops.aten.t.default(_tensor_constant0)\nkernel_0(a)\nreturn (buf0, )",
        torch.empty(4),
        constants={"_tensor_constant0": torch.empty(4, 4)},
    )
    assert memory.live() == [0]
    assert memory.output_bytes == 0


def test_partitions_are_followed_into() -> None:
    source = f"""{HEADER}
def partition_0(args):
    a, = args
    args.clear()
    buf0 = empty_strided_cpu((4, ), (1, ), torch.float32)
    kernel_0(a, buf0)
    del a
    return (buf0, )

class Runner:
    def __init__(self, partitions):
        self.partitions = partitions

    def call(self, args):
        a, = args
        args.clear()
        partition0_args = [a]
        del a
        (buf0,) = self.partitions[0](partition0_args)
        buf1 = empty_strided_cpu((4, ), (1, ), torch.float32)
        kernel_0(buf0, buf1)
        return (buf1, )

runner = Runner(partitions=[partition_0,])
call = runner.call
"""
    memory = lowered_memory(
        source, [torch.empty(4)], input_names=["a"], output_names=["b"], phase="inference"
    )
    assert memory.live() == [16, 32]
    assert memory.input_releases == {"a": 0}


def test_a_step_frees_what_only_autograd_holds() -> None:
    forward = lowered_memory(
        f"""{HEADER}
def call(args):
    w, x = args
    args.clear()
    saved = empty_strided_cpu((100, ), (1, ), torch.float32)
    kernel_0(w, x, saved)
    y = empty_strided_cpu((10, ), (1, ), torch.float32)
    kernel_0(saved, y)
    return (y, w, saved, reinterpret_tensor(saved, (50, ), (2, ), 0), y)
""",
        [torch.empty(7), torch.empty(9)],
        input_names=["w", "x"],
        output_names=["y", "w", "saved", "half", "y"],
        phase="forward",
    )
    backward = lowered_memory(
        f"""{HEADER}
def call(args):
    w, saved, half, y, tangents_1 = args
    args.clear()
    buf0 = empty_strided_cpu((100, ), (1, ), torch.float32)
    kernel_0(saved, tangents_1, buf0)
    del saved
    del tangents_1
    buf1 = empty_strided_cpu((7, ), (1, ), torch.float32)
    kernel_0(half, y, buf0, buf1)
    del half
    del y
    del buf0
    buf2 = empty_strided_cpu((9, ), (1, ), torch.float32)
    kernel_0(w, buf2)
    return (buf1, buf2)
""",
        [torch.empty(7), torch.empty(100), torch.empty(50), torch.empty(10), torch.empty(10)],
        input_names=["w", "saved", "half", "y", "tangents_1"],
        output_names=["gw", "gx"],
        phase="backward",
    )
    step = step_memory(forward, backward)
    assert (step.forward_peak, step.retained, step.gradients) == (440, 440, 28 + 36)
    # saved and half lie in one storage, which goes after half; y is the user's; the tangent goes.
    assert [b for phase, _, b in step.steps if phase == "backward"] == [
        440 + 40 + 400,
        440 + 400 + 28,
        40 + 28 + 36,
    ]
    assert step.peak_bytes == 880


def test_the_halves_must_belong_together() -> None:
    body = "a, = args\nargs.clear()\nkernel_0(a)\nreturn (a, )"
    one, other = read(body, torch.empty(4), phase="forward"), read(body, torch.empty(4), phase="backward")
    with pytest.raises(LoweringError, match="takes a, but the forward hands over nothing of that name"):
        step_memory(one, other)
    with pytest.raises(LoweringError, match="cannot compose a 'backward' graph with a 'forward' graph"):
        step_memory(other, one)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def run(args):\n    return ()", "defines no 'call' function"),
        ("def call(args:\n", "generated code is not Python"),
        ("call = CppWrapperCodeCache.load()", "is a C\\+\\+ wrapper"),
        ("def call(args):\n    return (1, 2)", "returns 2 values, the graph 1"),
        (
            "def call(args):\n    a, = args\n    b = a if a.item() > 0 else None\n    return (b,)",
            "does not run without data: GuardOnDataDependentSymNode",
        ),
        (
            "import torch\ndef call(args):\n    a, = args\n    b = torch.empty(a.item())\n    return (b,)",
            "does not run without data",
        ),
    ],
)
def test_unreadable_code_is_refused(source: str, message: str) -> None:
    with pytest.raises(LoweringError, match=message):
        lowered_memory(source, [torch.empty(1)], input_names=["a"], output_names=["b"], phase="inference")


def test_checks_of_numbers_that_are_read_hold_nothing() -> None:
    body = "a, = args\nn = a.item()\nif not (n <= 16):\n    raise RuntimeError('n <= 16')\nreturn (a,)"
    (storage,) = read(body, torch.empty((), dtype=torch.int64)).storages
    assert (storage.input, storage.bytes, storage.outputs) == ("a", 8, (0,))


@pytest.mark.parametrize(
    ("name", "granularity", "measured"),
    # Allocator peaks of a forward and backward: torch 2.13 on a CPU; torch 2.11 on an H100.
    [("gpt_cpu", 1, 2_621_448), ("gpt_cuda", 512, 185_361_408)],
)
def test_stored_sources_agree_with_what_was_measured(name: str, granularity: int, measured: int) -> None:
    backward = stored(name, "backward", granularity=granularity)
    saved = [n for n in backward.input_names if "tangents" not in n]
    forward = stored(name, "forward", ["loss", *saved], granularity=granularity)
    step = step_memory(forward, backward)
    assert step.peak_bytes == pytest.approx(measured, rel=1e-5)
    assert step.backward_peak > step.retained > step.gradients > 0


def test_a_real_compile_states_its_own_peak() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.relu(x @ w)
        return y @ w, y.sum(0)

    x, w = torch.randn(64, 32), torch.randn(32, 32)
    gm = torch.fx.experimental.proxy_tensor.make_fx(function, tracing_mode="fake")(x, w)
    compiled, memory = compile_lowered(gm, [x, w], static_inputs=[1], is_inference=True)
    now = peak = 0
    for size in _torch.record_allocations(lambda: compiled([x, w])):
        now += size
        peak = max(peak, now)
    assert memory.phase == "inference"
    assert (memory.peak_bytes, memory.output_bytes) == (peak, 64 * 32 * 4 + 32 * 4)
    out = compiled([x, w])
    torch.testing.assert_close(out[0], function(x, w)[0])


def test_a_graph_without_calls_has_no_steps() -> None:
    gm = torch.fx.experimental.proxy_tensor.make_fx(lambda x, y: (y, x))(torch.ones(2), torch.ones(2))
    _, memory = compile_lowered(gm, [torch.ones(2), torch.ones(2)], is_inference=True)
    assert (memory.steps, memory.peak_bytes, memory.output_bytes) == ((), 0, 0)


def test_a_graph_must_return_a_tuple() -> None:
    gm = torch.fx.experimental.proxy_tensor.make_fx(lambda x: x + 1)(torch.ones(2))
    with pytest.raises(LoweringError, match="the graph returns add by itself"):
        compile_lowered(gm, [torch.ones(2)], is_inference=True)


@pytest.mark.slow
def test_both_halves_of_a_compiled_module() -> None:
    from torch._inductor.compile_fx import compile_fx

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8))
    x = torch.randn(16, 32)
    compiler = LoweredCompiler()

    def backend(gm: Any, inputs: Any) -> Any:
        with _torch.functorch_settings(enable_autograd_cache=False):
            return compile_fx(gm, inputs, inner_compile=compiler)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)

    def step() -> None:
        out = compiled(x)
        out.pow(2).sum().backward()

    step()
    model.zero_grad(set_to_none=True)
    assert [record.phase for record in compiler.records] == ["forward", "backward"]
    now = peak = 0
    for size in _torch.record_allocations(step):
        now += size
        peak = max(peak, now)
    predicted = step_memory(*compiler.records)
    # The loss and its tangent, one float each, are outside of the compiled graph.
    assert 0 <= peak - predicted.peak_bytes <= 8
    assert predicted.gradients == sum(p.numel() * 4 for p in model.parameters())


def test_attention_backward_on_a_gpu_takes_scratch() -> None:
    with _torch.fake_mode():
        query = torch.empty(2, 4, 200, 40, device="cuda", dtype=torch.bfloat16)
        shared = torch.empty(2, 2, 200, 40, device="cuda", dtype=torch.bfloat16)
    cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default
    flash = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
    assert scratch_bytes(cudnn, [query] * 4) == 4 * 2 * 4 * 200 * (40 + 1)
    whole = 2 * 4 * 200 * 40
    assert scratch_bytes(cudnn, [query, query, shared, shared]) == 4 * whole + 4 * whole // 40 + 2 * 2 * whole
    assert scratch_bytes(flash, [query, query]) == 4 * 2 * 4 * 256 * (64 + 1)
    assert scratch_bytes(torch.ops.aten.mm.default, [query, query]) == 0


def test_gradient_of_an_embedding_on_a_gpu_takes_scratch() -> None:
    operator = torch.ops.aten.embedding_dense_backward.default
    with _torch.fake_mode():
        grad = torch.empty(2, 2048, 32, device="cuda", dtype=torch.bfloat16)
        many, few = (torch.empty(2, n, device="cuda", dtype=torch.int64) for n in (2048, 1536))
    # Partial sums in float32: one row for every ten indices, and one for every row that they can hit.
    partial = 409 + 1000
    assert scratch_bytes(operator, [grad, many, 1000, -1, False]) == partial * (32 * 4 + 8) + 6 * 4096 * 8
    assert scratch_bytes(operator, [grad, few, 1000, -1, False]) == 0


def test_scratch_counts_only_while_its_call_runs() -> None:
    body = """
a, b = args
args.clear()
backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default
buf0 = backward(a, a, a, a, a, b, b, b, None, None, None, 8, 8, 0.0, True)
buf1 = buf0[0]
del buf0
kernel_1.run(buf1, 1)
return (buf1, )
"""
    with _torch.fake_mode():
        tensor = torch.empty(1, 2, 8, 16, device="cuda", dtype=torch.bfloat16)
        row = torch.empty(1, 2, 8, 1, device="cuda")
    memory = read(body, tensor, row)
    one = 2 * 8 * 16 * 2
    assert memory.scratch == (4 * 2 * 8 * 17, 0)
    assert memory.live() == [3 * one + memory.scratch[0], one]
    assert read(body, tensor, row, granularity=512).scratch == (1536, 0), "up to what the allocator gives"


def test_generated_code_is_counted_as_the_allocator_of_its_device_rounds() -> None:
    for name in ("cpu", "h200"):
        device = resolve(name)
        cost = host().cost_model("roofline").build(device)
        emitter = resolve_emitter("inductor", torch.device("cpu"), cost=cost)
        assert isinstance(emitter, InductorEmitter)
        assert emitter.granularity == device.allocation_granularity
