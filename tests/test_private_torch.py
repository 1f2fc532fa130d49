"""The private torch APIs that capture and replay rest on, on whatever torch is installed."""

from __future__ import annotations

import inspect
import operator
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.fx as fx
from torch import nn
from torch._functorch import config as functorch_config
from torch._functorch import partitioners
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from graphopt import _torch
from graphopt._torch import choices, dynamo, inductor
from graphopt.emit.lowered import LoweredCompiler


def _retraced(
    function: Any, *args: Any, dynamic: bool | None = None
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Dynamo's graph of one call, and the same traced again."""
    found: list[tuple[fx.GraphModule, fx.GraphModule]] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        found.append((gm, _torch.retrace(gm, inputs)))
        return gm

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    return found[0]


def _calls(gm: fx.GraphModule, target: Any) -> list[fx.Node]:
    return gm.graph.find_nodes(op="call_function", target=target)


def test_retrace_keeps_composite_operators_and_provenance() -> None:
    _, traced = _retraced(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), torch.randn(2, 4))
    (linear,) = _calls(traced, torch.ops.aten.linear.default)
    assert linear.meta["val"].shape == (2, 8)
    assert "Linear" in str(linear.meta["nn_module_stack"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int64, torch.bool])
def test_memory_without_values_is_filled(dtype: torch.dtype) -> None:
    x = torch.zeros(2, 3, dtype=dtype)
    with _torch.FilledMemory():
        made = [
            torch.empty(3, dtype=dtype),
            torch.empty_like(x),
            torch.empty_permuted((2, 3), (1, 0), dtype=dtype),
            torch.empty_strided((2, 3), (1, 2), dtype=dtype),
            x.new_empty(3),
            x.new_empty_strided((2, 3), (1, 2)),
        ]
        kept = x.clone()
    assert all(torch.equal(t, torch.ones_like(t)) for t in made)
    assert torch.equal(kept, x)


def test_after_backward_runs_at_the_end_of_the_whole_pass() -> None:
    order: list[str] = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    z = y.sum()
    z.register_hook(lambda gradient: _torch.after_backward(lambda: order.append("after")))
    y.register_hook(lambda gradient: order.append("y"))
    x.register_hook(lambda gradient: order.append("x"))
    z.backward()
    assert order == ["y", "x", "after"] and x.grad is not None


class _Watched(torch.autograd.Function):
    """Notes what it may know of its gradients' takers while its backward runs."""

    seen: ClassVar[list[Any]] = []

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor, plain: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
        return leaf + plain + made

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        node = _torch.running_node()
        takers = [_torch.takes_gradient(node, k)[0] for k in range(4)]
        leaf = _torch.accumulates_into(takers[0])
        assert _torch.is_backward_of(node, _Watched) and not _torch.is_backward_of(takers[0], _Watched)
        assert leaf is not None
        _Watched.seen.append(
            (
                leaf,
                takers[1],
                _torch.accumulates_into(takers[2]),
                takers[3],
                _torch.adds_unseen_to_gradient_of(leaf),
            )
        )
        return gradient, None, gradient


def test_a_backward_knows_who_takes_its_gradients() -> None:
    assert _torch.running_node() is None
    leaf, other, plain = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True), torch.ones(2)

    def run() -> Any:
        return _Watched.apply(leaf, plain, plain * other).sum()  # type: ignore[no-untyped-call]

    def seen(step: Callable[[], object]) -> bool:
        _Watched.seen.clear()
        step()
        ((found, none, of_made, beyond, adds),) = _Watched.seen
        assert found is leaf and none is None and of_made is None and beyond is None
        return bool(adds)

    assert seen(lambda: run().backward())
    assert not seen(lambda: torch.autograd.grad(run(), [leaf]))
    assert not seen(lambda: run().backward(inputs=[other]))
    loss = run()
    node = torch.autograd.graph.get_gradient_edge(leaf).node
    for register in (node.register_hook, node.register_prehook):
        handle = register(lambda *gradients: None)
        assert not seen(lambda: loss.backward(retain_graph=True))
        handle.remove()
        assert seen(lambda: loss.backward(retain_graph=True))


def test_retrace_keeps_symbolic_sizes() -> None:
    _, traced = _retraced(lambda x: x.sin().view(x.shape[0], 2, -1), torch.randn(6, 4), dynamic=True)
    (sin,) = _calls(traced, torch.ops.aten.sin.default)
    assert all(isinstance(size, torch.SymInt) for size in sin.meta["val"].shape)
    assert [_torch.hint(size) for size in sin.meta["val"].shape] == [6, 4]


def test_retrace_enters_autocast_and_leaves_it() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = x @ w
        return y.float() @ w

    _, traced = _retraced(function, torch.randn(3, 3), torch.randn(3, 3))
    types = [node.meta["val"].dtype for node in _calls(traced, torch.ops.aten.matmul.default)]
    assert types == [torch.bfloat16, torch.float32]
    assert not torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled()


def test_retrace_puts_checkpoint_regions_in_line_and_tags_them() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda y: y.sin().exp(), x, use_reentrant=False).cos()

    _, traced = _retraced(function, torch.randn(3, requires_grad=True))
    tagged = [node.name for node in traced.graph.nodes if "recompute" in node.meta]
    assert tagged == ["sin", "exp"]


@pytest.mark.parametrize("policy", [False, True])
def test_a_captured_graph_draws_the_same_again_where_regions_run_again(policy: bool) -> None:
    def save_products() -> Any:
        return create_selective_checkpoint_contexts([torch.ops.aten.mm.default])

    options: dict[str, Any] = {"context_fn": save_products} if policy else {}
    weight = torch.eye(64)

    def function(x: torch.Tensor) -> torch.Tensor:
        def region(x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(x.mm(weight).sin(), 0.5).exp()

        return checkpoint(region, x, use_reentrant=False, **options)  # type: ignore[no-any-return]

    x = torch.randn(64, 64, requires_grad=True)
    found = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        def run(*args: Any) -> Any:
            return _torch.run_as_captured(gm, args)

        return run

    torch._dynamo.reset()
    for call in (function, torch.compile(function, backend=backend, fullgraph=True)):
        torch.manual_seed(0)
        y = call(x)
        torch.rand(1)
        found.append((y, *torch.autograd.grad(y.sum(), x)))
    assert all(map(torch.equal, *found))


def test_retrace_leaves_the_inputs_of_later_tracing_alone() -> None:
    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        mode = _torch.context_fake_mode()
        before = [mode.from_tensor(x) for x in inputs]
        _torch.retrace(gm, inputs)
        assert [x.requires_grad for x in before] == [x.requires_grad for x in inputs]
        return gm

    def function(buffer: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return buffer.add_(weight.exp()).sum()

    torch._dynamo.reset()
    torch.compile(function, backend=backend)(torch.zeros(3), torch.ones(3, requires_grad=True))


def test_function_transforms_are_told() -> None:
    mapped, _ = _retraced(lambda x: torch.vmap(torch.sin)(x), torch.randn(2, 3))
    plain, _ = _retraced(torch.sin, torch.randn(2, 3))
    assert _torch.transforms_functions(mapped) and not _torch.transforms_functions(plain)


def test_constants_that_are_fake_are_told() -> None:
    gm = fx.symbolic_trace(nn.Identity())
    with _torch.fake_mode():
        gm.found = torch.empty(2)
    gm.kept = torch.empty(2)
    for name in ("found", "kept"):
        gm.graph.get_attr(name)
    assert _torch.traced_constants(gm) == ["found"]


def test_a_random_operator_runs_again_under_its_state() -> None:
    state = torch.get_rng_state()
    assert _torch.random_state_bytes(torch.device("cpu")) == state.numel()
    first = torch.rand(4)
    after = torch.get_rng_state()
    again = _torch.run_with_random_state()(state, torch.ops.aten.rand.default, [4], device="cpu")
    assert torch.equal(first, again) and torch.equal(after, torch.get_rng_state())


def test_inputs_can_be_handed_over_whatever_is_written_to_them() -> None:
    graph = fx.Graph()
    node = graph.placeholder("x")
    _torch.ignore_version(node)
    assert node.meta == {"saved_tensor_with_no_vc_check": True}
    minor = int(torch.__version__.split(".")[1])
    assert _torch.can_ignore_versions() or minor < 13


def test_the_fake_mode_of_values_is_theirs() -> None:
    mode = _torch.fake_mode()
    with mode:
        value = torch.empty(2)
    assert _torch.fake_mode_of([torch.empty(1), value]) is mode


@pytest.mark.parametrize("enabled", [True, False])
def test_the_autocast_cache_is_put_back(enabled: bool) -> None:
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(enabled)
    try:
        _retraced(torch.sin, torch.randn(2))
        assert torch.is_autocast_cache_enabled() is enabled
    finally:
        torch.set_autocast_cache_enabled(before)


@pytest.mark.parametrize(("device", "kept"), [("cuda", True), ("cpu", False)])
def test_the_gradient_of_a_16_bit_embedding_is_a_call_of_the_library_on_gpus(device: str, kept: bool) -> None:
    operator = torch.ops.aten.embedding_dense_backward.default
    with _torch.fake_mode():
        grad = torch.empty(4, 8, dtype=torch.bfloat16, device=device)
        indices = torch.zeros(4, dtype=torch.int64, device=device)
        traced = make_fx(
            lambda g, i: operator(g, i, 100, -1, False),
            decomposition_table=_torch.inductor_decompositions(),
        )(grad, indices)
    assert bool(_calls(traced, operator)) is kept


def test_a_timeline_holds_allocations_releases_and_marks_in_order() -> None:
    def step() -> None:
        x = torch.empty(1024)
        _torch.mark("here")
        with torch.autograd.profiler.record_function("elsewhere"):
            y = torch.empty(16)
        del x
        _torch.mark("here")
        del y

    assert _torch.record_timeline(step, "here") == [4096, None, 64, -4096, None, -64]
    assert _torch.record_allocations(step) == [4096, 64, -4096, -64]


def test_a_weak_tensor_tells_when_autograd_lets_go_of_it() -> None:
    weight = torch.ones(4)
    alias = weight.detach()
    weak = _torch.weak_tensor(alias)
    result = torch.ones(4, requires_grad=True) * alias
    del alias
    assert not weak.expired()
    del result
    assert weak.expired() and bool((weight == 1).all())


def test_a_weak_storage_tells_when_the_memory_is_gone() -> None:
    tensor = torch.empty(8)
    view, weak = tensor[2:], _torch.weak_storage(tensor.untyped_storage())
    del tensor
    assert not weak.expired()
    del view
    assert weak.expired()


def test_a_backward_knows_whether_its_graph_is_kept() -> None:
    seen: list[bool] = []

    def unpack(packed: torch.Tensor) -> torch.Tensor:
        seen.append(_torch.keeps_graph())
        return packed

    with torch.autograd.graph.saved_tensors_hooks(lambda value: value, unpack):
        y = torch.ones(2, requires_grad=True).exp().sum()
    y.backward(retain_graph=True)
    y.backward()
    assert seen == [True, False]


def test_holders_of_a_tensor_and_of_its_memory_are_counted() -> None:
    tensor = torch.ones(3)
    alone = _torch.holders(tensor)
    other = tensor
    assert _torch.holders(tensor) == (alone[0] + 1, *alone[1:])
    del other
    view = tensor[1:]
    assert _torch.holders(tensor)[3] > alone[3]
    del view
    storage = tensor.untyped_storage()
    assert _torch.holders(tensor)[2] > alone[2]
    del storage
    weight = torch.ones(3, requires_grad=True)
    saved = weight * tensor
    assert _torch.holders(tensor)[1] > alone[1]
    del saved
    assert _torch.holders(tensor) == alone


def test_who_sees_operators_run_is_told() -> None:
    plain = torch.ones(2)
    assert _torch.runs_at_once(plain)
    assert not _torch.runs_at_once(nn.Parameter(plain))
    seen: list[bool] = []
    torch.func.grad(lambda x: seen.append(_torch.runs_at_once(plain)) or x.sum())(torch.ones(2))
    with _torch.fake_mode():
        seen += [_torch.runs_at_once(plain), _torch.runs_at_once(torch.ones(2))]
    assert seen == [False, False, False]


def test_a_function_is_traced_on_fakes_of_their_own_mode() -> None:
    mode = _torch.fake_mode()
    x = mode.from_tensor(torch.randn(3, 4))
    graph = _torch.traced_like(lambda t: (t > torch.arange(4, device=t.device)).sum(1), [x])
    calls = [node for node in graph.nodes if node.op == "call_function"]
    assert [str(node.target) for node in calls] == [
        "prims.iota.default",
        "aten.gt.Tensor",
        "aten.sum.dim_IntList",
    ]
    assert all(node.meta["val"].fake_mode is mode for node in calls)


def test_a_call_gives_a_fake_of_the_mode_that_is_named() -> None:
    mode = _torch.fake_mode()
    x = mode.from_tensor(torch.randn(3))
    made = _torch.call_on_fakes(x, torch.ops.aten.full.default, ([2, 2], 1), {"dtype": torch.int64})
    assert made.fake_mode is mode and tuple(made.shape) == (2, 2) and made.dtype is torch.int64


def test_calls_with_symbolic_sizes_give_symbolic_sizes() -> None:
    sizes = ({0: torch.export.Dim.AUTO},)
    exported = torch.export.export(
        torch.nn.Identity(), (torch.randn(3, 5, 8),), dynamic_shapes=sizes, strict=False
    )
    x = next(node for node in exported.graph.nodes if node.op == "placeholder").meta["val"]
    mode = _torch.fake_mode_of([x])
    weight = mode.from_tensor(torch.randn(4, 8))
    assert isinstance(x.shape[0], torch.SymInt)
    for made in (
        _torch.call_on_fakes(x, torch.ops.aten.linear.default, (x, weight), {}),
        _torch.call_on_fakes(x, torch.ops.aten.matmul.default, (x, weight.t()), {}),
    ):
        assert isinstance(made.shape[0], torch.SymInt) and made.shape[1:] == (5, 4)
    with mode, _torch.python_dispatcher():
        assert torch.ops.aten.linear.default(x, weight).shape[1:] == (5, 4)


def test_a_packed_fake_is_of_its_mode_and_in_the_memory_format_of_another() -> None:
    with _torch.fake_mode() as mode:
        value = torch.empty(2, 3, 4, 5).transpose(2, 3)
        last = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)
    packed = _torch.packed_like(value, last)
    assert packed.fake_mode is mode and packed.shape == value.shape
    assert packed.is_contiguous(memory_format=torch.channels_last)
    assert _torch.packed_like(value, value).is_contiguous()
    assert _torch.packed_like(last, None).is_contiguous()


def test_operators_run_for_real_outside_of_a_fake_mode() -> None:
    with _torch.fake_mode():
        assert _torch.is_fake(torch.empty(2))
        with _torch.outside_of_fake_mode():
            assert not _torch.is_fake(torch.empty(2))


def test_decomposed_keeps_what_it_is_told_to_and_no_more() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.silu(x) + 1

    x = torch.randn(3)
    aten = torch.ops.aten
    with _torch.fake_mode() as mode:
        fake = mode.from_tensor(x)
        whole = _torch.decomposed(Layer(), [fake], lambda op: op in (aten.silu.default, aten.add.Tensor))
        apart = _torch.decomposed(Layer(), [fake], lambda op: op in (aten.sigmoid.default, aten.mul.Tensor))
    targets = [
        [node.target for node in graph.nodes if node.op == "call_function"] for graph in (whole, apart)
    ]
    assert targets[0] == [aten.silu.default, aten.add.Tensor]
    assert aten.sigmoid.default in targets[1] and aten.silu.default not in targets[1]
    assert all("val" in node.meta for node in whole.nodes if node.op == "call_function")


def test_an_empty_graph_is_written_as_code_the_way_another_is() -> None:
    class Named(fx.graph.CodeGen):
        pass

    graph = fx.symbolic_trace(nn.Linear(2, 2)).graph
    graph.set_codegen(Named())
    empty = _torch.empty_graph_like(graph)
    assert not list(empty.nodes)
    assert isinstance(empty._codegen, Named)
    assert empty._codegen is not graph._codegen


def test_operators_that_give_other_bits_are_told_by_their_tag() -> None:
    @torch.library.custom_op(
        "graphopt_test::other_bits", mutates_args=(), tags=(torch.Tag.nondeterministic_bitwise,)
    )
    def other_bits(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    assert _torch.gives_other_bits(torch.ops.graphopt_test.other_bits.default)
    assert not _torch.gives_other_bits(torch.ops.aten.add.Tensor)


def test_settings_of_functions_can_be_written_to_the_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo import config, utils

    def as_in_torch_2_11() -> str:
        return str([sorted(value) for value in config.get_config_copy().values() if isinstance(value, set)])

    with _torch.quiet_capture():
        utils._get_dynamo_config_for_logging()
    monkeypatch.setattr(utils, "_get_dynamo_config_for_logging", as_in_torch_2_11)
    dynamo._config_is_loggable.cache_clear()
    try:
        with _torch.quiet_capture():
            assert utils._get_dynamo_config_for_logging() is None
        assert utils._get_dynamo_config_for_logging is as_in_torch_2_11
    finally:
        dynamo._config_is_loggable.cache_clear()


def _softmax(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x, -1)


def _sum(x: torch.Tensor) -> torch.Tensor:
    return x.square().sum(-1)


def _of_many(*x: torch.Tensor) -> torch.Tensor:
    total = sum(x[1:], x[0])
    return torch.softmax(total * total.amax(-1, keepdim=True), -1)


@pytest.mark.parametrize(
    ("function", "width", "inputs", "held"),
    [
        (_softmax, 4096, 1, True),
        (_softmax, 16384, 1, True),
        (_softmax, 16385, 1, False),
        (_sum, 4096, 1, False),
        (_of_many, 4096, 4, True),
        (_of_many, 16384, 4, False),
    ],
)
def test_rows_are_held_where_that_spares_reading_and_registers_reach(
    monkeypatch: pytest.MonkeyPatch,
    function: Callable[..., torch.Tensor],
    width: int,
    inputs: int,
    held: bool,
) -> None:
    from torch._inductor import config

    seen: list[bool] = []
    judge = choices.holds_rows
    monkeypatch.setattr(choices, "holds_rows", lambda features: seen.append(judge(features)) or seen[-1])
    torch._dynamo.reset()
    settings = config.patch(cpu_backend="triton", fx_graph_cache=False)
    # Code is generated; there is no driver to run it.
    with settings, choices.our_choices(), pytest.raises(Exception, match="active drivers"):
        torch.compile(function)(*(torch.randn(64, width) for _ in range(inputs)))
    assert seen and all(found is held for found in seen)


def test_generated_code_is_found_again_under_its_key_alone(tmp_path: Path, monkeypatch: Any) -> None:
    """Inductor's graph cache knows the order of kernels, and graphopt's choices, by the key that is given."""
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    orders = []

    def order(launches: Any, buffers: Any) -> list[int]:
        orders.append(len(launches))
        return list(range(len(launches)))

    def compiled(key: str) -> tuple[str, LoweredCompiler]:
        before = dict(counters["inductor"])
        compiler = LoweredCompiler()

        def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
            return _torch.compile_with_inductor(gm, inputs, None, compiler, 64, order, key)  # type: ignore[arg-type]

        inputs = torch.randn(8, 8), torch.randn(8, 8)
        torch._dynamo.reset()
        with torch.no_grad():
            found = torch.compile(lambda x, y: (x @ y).sin() + 0.123, backend=backend)(*inputs)
            torch.testing.assert_close(found, (inputs[0] @ inputs[1]).sin() + 0.123)
        kinds = ("hit", "miss", "bypass")
        now = counters["inductor"]
        (how,) = [k for k in kinds if now[f"fxgraph_cache_{k}"] > before.get(f"fxgraph_cache_{k}", 0)] or [""]
        return how, compiler

    first, made = compiled("one")
    again, known = compiled("one")
    assert (first, again, compiled("other")[0], compiled("")[0]) == ("miss", "hit", "miss", "")
    assert len(orders) == 3
    assert known.records == made.records


def test_code_is_kept_under_a_name_and_found_again(tmp_path: Path, monkeypatch: Any) -> None:
    """AOTAutograd's cache holds what was compiled with a partition of one's own, and gives it back."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    order = lambda launches, buffers: list(range(len(launches)))  # noqa: E731
    asked: list[int] = []

    def partition(joint: fx.GraphModule, outputs: int) -> Any:
        asked.append(outputs)
        return partitioners.default_partition(joint, None, num_fwd_outputs=outputs)

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        compiler = _torch.inductor_inner_compile
        return _torch.compile_with_inductor(gm, inputs, partition, compiler, 64, order, "key", "own")

    x = torch.randn(8, requires_grad=True)
    calls: list[str] = []

    def around(code: Any) -> Any:
        def call(arguments: list[Any]) -> Any:
            calls.append("backward")
            return code(arguments)

        return _torch.boxed(call)

    assert _torch.keeps_code() and not _torch.is_kept("own") and _torch.kept_code("own") is None
    torch._dynamo.reset()
    torch.compile(lambda x: x.sin().exp(), backend=backend)(x)
    assert asked == [1] and _torch.is_kept("own") and not _torch.is_kept("other")
    run = _torch.kept_code("own", around)
    assert run is not None
    (found,) = run(x)
    found.sum().backward()
    assert asked == [1] and calls == ["backward"]
    torch.testing.assert_close(found, x.sin().exp())
    torch.testing.assert_close(x.grad, x.detach().cos() * x.detach().sin().exp())
    _torch.forget_code("ow")
    assert not _torch.is_kept("own") and _torch.kept_code("own") is None


def test_halves_can_be_kept_as_text(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    texts: list[str] = []

    def half(text: str) -> Any:
        def make(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
            run = _torch.boxed(lambda arguments: list(gm(*arguments)))
            texts.append(gm.code)
            return _torch.kept_as_text(run, f"{text} {len(texts) - 1}")

        return make

    def of_text(text: str) -> Any:
        kind, number = text.split()
        space: dict[str, Any] = {"torch": torch, "device": torch.device, "inf": float("inf")}
        exec(texts[int(number)], space)
        read.append(kind)
        return _torch.boxed(lambda arguments: list(space["forward"](None, *arguments)))

    def partition(joint: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **unused: Any) -> Any:
        return partitioners.default_partition(joint, inputs, num_fwd_outputs=num_fwd_outputs)

    read: list[str] = []
    x = torch.randn(8, requires_grad=True)
    compiler = _torch.joint_compiler(half("forward"), half("backward"), half("infer"), partition, None, "own")
    torch._dynamo.reset()
    found = torch.compile(lambda x: x.sin().exp(), backend=compiler)(x)
    (expected,) = torch.autograd.grad(found.sum(), x)
    assert _torch.is_kept("own")
    run = _torch.kept_code("own", None, of_text)
    assert run is not None and read == ["forward", "backward"]
    (again,) = run(x)
    torch.testing.assert_close(again, found)
    torch.testing.assert_close(torch.autograd.grad(again.sum(), x)[0], expected)
    # Without a name nothing is kept.
    torch._dynamo.reset()
    compiler = _torch.joint_compiler(half("forward"), half("backward"), half("infer"), partition, None)
    torch.compile(lambda x: x.sin().exp(), backend=compiler)(x)
    assert [path.name for path in (tmp_path / "aotautograd").iterdir()] == ["own"]


def test_code_that_dynamo_followed_is_told() -> None:
    def inner(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    def outer(x: torch.Tensor) -> torch.Tensor:
        return inner(x) + 1

    found: list[str] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        found.extend(code.co_name for code in _torch.followed_code())
        return gm

    assert not _torch.followed_code()
    torch._dynamo.reset()
    torch.compile(outer, backend=backend)(torch.randn(2))
    assert {"inner", "outer"} <= set(found)


def donating(keep: str) -> tuple[Any, list[list[bool]], torch.Tensor]:
    """A compiled ``f(x)`` whose backward may write over what was saved, and what it was given in each of its
    runs: of which arguments the memory is that of earlier ones."""
    order = lambda launches, buffers: list(range(len(launches)))  # noqa: E731
    given: list[list[bool]] = []
    seen: set[int] = set()

    def partition(joint: fx.GraphModule, outputs: int) -> Any:
        return partitioners.default_partition(joint, None, num_fwd_outputs=outputs)

    def compiler(graph: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        code = _torch.inductor_inner_compile(graph, inputs, **kwargs)
        if not kwargs.get("is_backward"):
            return code

        def noting(arguments: list[Any]) -> Any:
            places = [x.data_ptr() for x in arguments if isinstance(x, torch.Tensor)]
            given.append([place in seen for place in places])
            seen.update(places)
            held.extend(arguments)
            return code(arguments)

        return _torch.known_to_caches(_torch.boxed(noting), code)

    held: list[Any] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return _torch.compile_with_inductor(gm, inputs, partition, compiler, 64, order, "key", keep)

    torch._dynamo.reset()
    x = torch.randn(8, requires_grad=True)
    return torch.compile(lambda x: (x.sin().exp().tanh() * 2).sum(), backend=backend), given, x


def test_a_backward_that_may_write_over_what_was_saved_gets_copies_where_its_graph_is_kept() -> None:
    run, given, x = donating("")
    (expected,) = torch.autograd.grad((x.sin().exp().tanh() * 2).sum(), x)
    loss = run(x)
    for keep in (True, True, False):
        (found,) = torch.autograd.grad(loss, x, retain_graph=keep)
        torch.testing.assert_close(found, expected)
    # Input and tangent are themselves each time; what was donated is a copy while the graph is kept.
    assert [sum(again) for again in given] == [0, 1, 1] and len(given[0]) > 2
    # A graph that is not kept hands over the memory itself.
    assert given[1] == given[2]


@pytest.mark.parametrize("switch", [True, False])
def test_a_graph_may_be_kept_whatever_was_said_of_donation_when_it_was_compiled(switch: bool) -> None:
    with functorch_config.patch(donated_buffer=switch):
        run, _, x = donating("")
        loss = run(x)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)


def test_code_that_was_kept_spares_what_was_saved_too(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    run, _, x = donating("donating")
    (expected,) = torch.autograd.grad(run(x), x)
    assert _torch.is_kept("donating")
    known = _torch.kept_code("donating")
    assert known is not None
    (loss,) = known(x)
    for keep in (True, True, False):
        (found,) = torch.autograd.grad(loss, x, retain_graph=keep)
        assert torch.equal(found, expected)


def test_copies_lie_as_what_they_are_copies_of() -> None:
    given: list[torch.Tensor] = []

    def code(arguments: list[Any]) -> None:
        given.extend(arguments)

    spares = _torch.sparing(code, [0, 2])
    values = [torch.arange(12.0).reshape(3, 4).t()[1:], torch.ones(2), torch.ones(3, 1).expand(3, 5)]
    y = Spared.apply(torch.ones(1, requires_grad=True), spares, values)
    y.backward(retain_graph=True)
    y.backward()
    kept, gone = given[:3], given[3:]
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(kept, values, strict=True))
    assert [a.data_ptr() == b.data_ptr() for a, b in zip(kept, values, strict=True)] == [False, True, False]
    assert all(a is b for a, b in zip(gone, values, strict=True))
    assert _torch.sparing(code, ()) is code


class Spared(torch.autograd.Function):
    """Its backward calls a boxed callable."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, code: Any, values: list[torch.Tensor]) -> torch.Tensor:
        ctx.code, ctx.values = code, values
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        ctx.code(list(ctx.values))
        return gradients[0], None, None


def test_without_the_code_of_a_half_nothing_is_found(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    order = lambda launches, buffers: list(range(len(launches)))  # noqa: E731

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        compiler = _torch.inductor_inner_compile
        return _torch.compile_with_inductor(gm, inputs, None, compiler, 64, order, "key", "own")  # type: ignore[arg-type]

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(lambda x: x.sin().exp() + 0.25, backend=backend)(torch.randn(8))
    assert _torch.is_kept("own")
    shutil.rmtree(tmp_path / "fxgraph")
    assert _torch.kept_code("own") is None


def test_the_environment_of_code_is_the_same_in_the_same_environment() -> None:
    from torch._inductor import config

    order = lambda launches, buffers: list(range(len(launches)))  # noqa: E731
    own = _torch.code_environment(64, order, "key")
    assert own == _torch.code_environment(64, order, "key") != _torch.code_environment(64, order, "other")
    with config.patch(max_autotune=True):
        assert own != _torch.code_environment(64, order, "key")
    with functorch_config.patch(treat_parameters_as_free_to_save=False):
        assert own != _torch.code_environment(64, order, "key")
    with config.patch(fx_graph_cache=False):
        assert not _torch.keeps_code()


def test_functions_have_names() -> None:
    assert _torch.qualified_name(torch.nn.functional.gelu) == "torch._C._nn.gelu"
    assert _torch.qualified_name(operator.add) == "_operator.add"


def test_what_a_graph_no_longer_returns_is_none_of_what_users_see() -> None:
    from torch._inductor.graph import get_user_visible_output_strides, mark_nodes_dislike_padding

    gm = make_fx(lambda x: (x.t(), x + 1))(torch.randn(2, 3))
    (output,) = gm.graph.find_nodes(op="output")
    output.meta["user_visible_output_idxs"] = [0, 1]
    output.meta["original_output_strides"] = [(1, 3), (3, 1)]
    _torch.return_none(output, 0)
    assert output.args[0][0] is None
    assert list(get_user_visible_output_strides(gm.graph).values()) == [(3, 1)]
    # On GPUs Inductor goes through them.
    mark_nodes_dislike_padding(gm.graph, get_user_visible_output_strides(gm.graph))


def test_what_reads_memory_is_computed_before_a_custom_operator_writes_it() -> None:
    def clear(values: list[torch.Tensor]) -> None:
        torch._foreach_zero_(values)

    with torch.library._scoped_library("graphopt_tests", "FRAGMENT") as library:
        library.define("clear(Tensor(a!)[] values) -> ()")
        library.impl("clear", clear, "CompositeExplicitAutograd")
        library.impl("clear", lambda values: None, "Meta")
        op = torch.ops.graphopt_tests.clear.default
        with torch._subclasses.FakeTensorMode():
            given = [torch.empty(size) for size in (3, 4, 3, 4)]
            gm = make_fx(lambda x, y, to_x, to_y: (x + 1, y * 2))(*given)
        output = next(node for node in gm.graph.nodes if node.op == "output")
        x, y, *targets = (node for node in gm.graph.nodes if node.op == "placeholder")
        with gm.graph.inserting_before(output):
            gm.graph.call_function(op, ([x, y],)).meta["val"] = None
            for target, value in zip(targets, output.args[0], strict=True):
                copy_ = gm.graph.call_function(torch.ops.aten.copy_.default, (target, value))
                copy_.meta["val"] = target.meta["val"]
        output.args = ((),)
        gm.recompile()
        _torch.read_before_writes(gm.graph)
        values = [torch.ones(size) for size in (3, 4, 3, 4)]
        from torch._inductor.compile_fx import compile_fx_inner

        compile_fx_inner(gm, values, is_inference=True)(list(values))
        assert [value.tolist() for value in values] == [[0.0] * 3, [0.0] * 4, [2.0] * 3, [2.0] * 4]
        torch._inductor.lowering.lowerings.pop(op)
        inductor._ordered.discard(op)


def test_products_of_eight_bit_integers_are_exact_and_have_32_bits() -> None:
    x, w = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((3, 40), (24, 40)))
    found = _torch.integer_product(x, w.t())
    assert found.dtype is torch.int32 and torch.equal(found.long(), x.long() @ w.long().t())
    assert isinstance(_torch.multiplies_integers(), bool)


def test_products_of_float8_are_scaled_by_row() -> None:
    x, w = (torch.randn(shape).to(torch.float8_e4m3fn) for shape in ((32, 64), (48, 64)))
    by_row, by_column = torch.rand(32, 1), torch.rand(1, 48)
    try:
        found = _torch.scaled_product(x, w.t(), by_row, by_column, None, torch.bfloat16)
    except RuntimeError as error:
        # The CPU's has scales for whole tensors alone, in some versions.
        pytest.skip(str(error).splitlines()[0])
    expected = (x.float() @ w.float().t()) * by_row * by_column
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)


def _dynamic(function: Callable[..., Any], *args: torch.Tensor) -> fx.GraphModule:
    """``function`` exported with symbolic sizes of its first argument."""

    class Module(nn.Module):
        def forward(self, *values: torch.Tensor) -> Any:
            return function(*values)

    sizes = tuple({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for _ in args)
    return torch.export.export(Module(), args, dynamic_shapes=(sizes,)).graph_module


def test_sizes_are_told_apart_without_guarding_on_them() -> None:
    gm = _dynamic(lambda x: torch.cat([x, x], 1), torch.randn(3, 5))
    (x,) = gm.graph.find_nodes(op="placeholder")
    (doubled,) = _calls(gm, torch.ops.aten.cat.default)
    batch, length = x.meta["val"].shape
    twice = doubled.meta["val"].shape[1]
    assert _torch.depends_on(twice, length) and not _torch.depends_on(twice, batch)
    assert not _torch.depends_on(10, length)
    assert _torch.is_same_size(doubled.meta["val"].shape[0], batch) and not _torch.is_same_size(twice, length)
    assert _torch.is_same_size(4, 4) and not _torch.is_same_size(5, length)


def test_sizes_are_taken_apart_into_sums_of_products() -> None:
    gm = _dynamic(lambda x: x.new_zeros(x.shape[0] * x.shape[1] + 2), torch.randn(3, 5))
    (x,) = gm.graph.find_nodes(op="placeholder")
    (made,) = _calls(gm, torch.ops.aten.new_zeros.default)
    known = dict(zip(map(str, x.meta["val"].shape), (3, 5), strict=True))
    size = made.meta["val"].shape[0]
    assert _torch.size_from(size, lambda s: known[str(s)], lambda f, a, b: f(a, b)) == 17
    half = x.meta["val"].shape[0] // 2
    with pytest.raises(ValueError, match="is no sum of products"):
        _torch.size_from(half, lambda s: known[str(s)], lambda f, a, b: f(a, b))


def test_graphs_are_traced_again_for_other_sizes() -> None:
    gm = _dynamic(lambda x: x.reshape(x.shape[0] * x.shape[1]), torch.randn(3, 5))
    again = _torch.retraced_at(gm, [], [((2, 70_000_000_000), torch.float32)])
    (made,) = [node for node in again.graph.nodes if node.op == "call_function"][-1:]
    assert made.meta["val"].shape == (140_000_000_000,)


def test_a_context_of_ones_own_has_sizes_that_are_numbers() -> None:
    with _torch.within(_torch.static_context()):
        fake = _torch.context_fake_mode().from_tensor(torch.randn(3, 5))
    assert type(fake.shape[0]) is int


def test_operators_that_state_gradients_are_told_from_others() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return 2 * grad

    def hooked(x: torch.Tensor) -> torch.Tensor:
        h = x.sin()
        h.register_hook(lambda grad: 2 * grad)
        return h.cos()

    def stated(x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = Twice.apply(x)  # type: ignore[no-untyped-call]
        return made

    def branching(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))  # type: ignore[no-any-return]

    graphs = []

    def keep(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    for function in (hooked, stated, branching):
        torch._dynamo.reset()
        torch.compile(function, backend=keep, fullgraph=True)(torch.ones(2, requires_grad=True))
    assert [_torch.has_own_gradients(gm) for gm in graphs] == [True, True, False]
    assert [_torch.stays_as_captured(gm) for gm in graphs] == [True, True, False]


def test_a_backend_can_have_a_graph_split() -> None:
    """Dynamo leaves the function as it is, and hands over what that calls."""
    torch._dynamo.reset()
    seen = []

    def inner(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    def outer(x: torch.Tensor) -> torch.Tensor:
        return inner(x).cos()

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        calls = [node.target for node in gm.graph.nodes if node.op == "call_method"]
        seen.append(calls)
        if "cos" in calls:
            raise _torch.splitting(ValueError("no"))
        return gm.forward

    with _torch.quiet_capture():
        found = torch.compile(outer, backend=backend)(torch.ones(2))
    assert torch.equal(found, torch.ones(2).sin().cos())
    assert ["sin"] in seen and any("cos" in calls for calls in seen)


def test_containers_are_taken_apart_and_made_again() -> None:
    assert dict in _torch.container_classes()
    assert not any(kind.__module__.startswith("torch._") for kind in _torch.container_classes())
    assert _torch.container_parts(object()) is None
    parts = _torch.container_parts({"a": 1, "b": (2,)})
    assert parts == ([1, (2,)], ["a", "b"])
    assert _torch.container_of(dict, *parts) == {"a": 1, "b": (2,)}


def test_fakes_are_propagated_through_a_graph_and_views_share_storages() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    view = graph.call_function(torch.ops.aten.view.default, (x, [4]))
    out = graph.output((view,))
    with _torch.fake_mode() as mode:
        value = torch.empty(2, 2)
    x.meta["val"] = value
    _torch.propagate_fakes(torch.fx.GraphModule({}, graph), [value], mode)
    assert view.meta["val"].shape == (4,)
    assert _torch.storage_key(view.meta["val"]) == _torch.storage_key(value)
    assert "val" not in out.meta and x.meta["val"] is value


def test_a_size_that_depends_on_values_counts_as_its_largest() -> None:
    _, retraced = _retraced(lambda x: torch.cat([x[x > 0] * 2, x.flatten()]), torch.randn(3, 4))
    sizes = [
        _torch.hint(node.meta["val"].shape[0])
        for target in (torch.ops.aten.mul.Tensor, torch.ops.aten.cat.default)
        for node in _calls(retraced, target)
    ]
    assert sizes == [12, 24]


def test_a_size_that_nothing_bounds_counts_as_one() -> None:
    with torch._dynamo.config.patch(capture_scalar_outputs=True):  # type: ignore[attr-defined]
        _, retraced = _retraced(lambda x: torch.ones(x.item()) + 1, torch.tensor(3))
    (node,) = _calls(retraced, torch.ops.aten.add.Tensor)
    assert isinstance(node.meta["val"].shape[0], torch.SymInt)
    assert _torch.hint(node.meta["val"].shape[0]) == 1


def test_export_says_that_a_size_is_fixed() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(4, 3) if x.shape[0] == 4 else x

    class Other(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("another error")

    found = []
    for module in (Fixed(), Other()):
        with pytest.raises(Exception) as raised:
            torch.export.export(
                module, (torch.randn(4, 3),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False
            )
        found.append(_torch.fixes_a_size(raised.value))
    assert found == [True, False]


def test_what_dynamo_meant_to_raise_is_found_where_it_fails_to() -> None:
    from torch._dynamo.exc import ShortenTraceback

    def elsewhere() -> Any:
        return inspect.currentframe()

    meant = ShortenTraceback("does not compile", first_useful_frame=elsewhere())
    with pytest.raises(AssertionError) as raised:
        try:
            raise meant
        except ShortenTraceback as error:
            error.remove_dynamo_frames()
    assert _torch.unmasked(raised.value) is meant
    for other in (AssertionError("another"), ValueError("another")):
        assert _torch.unmasked(other) is other


def test_numbers_read_out_of_fake_tensors_are_symbols_where_that_is_asked_for() -> None:
    with _torch.fake_mode(numbers=True):
        read = torch.zeros((), dtype=torch.int64).item()
    assert isinstance(read, torch.SymInt)
    with _torch.fake_mode(), pytest.raises(Exception, match="_local_scalar_dense"):
        torch.zeros((), dtype=torch.int64).item()


def test_a_bound_that_is_the_largest_number_there_is_is_none() -> None:
    _, retraced = _retraced(torch.masked_select, torch.randn(()), torch.tensor(True))
    (node,) = _calls(retraced, torch.ops.aten.masked_select.default)
    assert _torch.hint(node.meta["val"].shape[0]) == 1


def test_composites_that_read_numbers_are_traced_into() -> None:
    with torch._dynamo.config.patch(capture_scalar_outputs=True):  # type: ignore[attr-defined]
        _, retraced = _retraced(lambda x, k: x.narrow(0, k, 2) * 2, torch.randn(5, 3), torch.tensor(1))
        _, split = _retraced(lambda x, k: x.tensor_split(k)[0] * 2, torch.randn(5, 3), torch.tensor([1, 2]))
    assert not _calls(retraced, torch.ops.aten.narrow.Tensor)
    assert len(_calls(retraced, torch.ops.aten.item.default)) == 1
    assert not _calls(split, torch.ops.aten.tensor_split.tensor_indices_or_sections)


def test_programs_are_taken_apart_and_rid_of_writes_to_views_and_inputs() -> None:
    class Step(torch.nn.Module):
        def forward(self, x: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
            count.add_(1)
            y = torch.nn.functional.silu(x) * 2
            y[0].mul_(count)
            return y

    aten = torch.ops.aten
    with _torch.fake_mode() as mode:
        fakes = [mode.from_tensor(torch.randn(3)), mode.from_tensor(torch.zeros(()))]
        table = {aten.silu.default: lambda x: x * x.sigmoid()}
        apart = _torch.taken_apart(make_fx(Step())(*fakes), fakes, table)
        assert aten.silu.default not in {node.target for node in apart.graph.nodes}
        assert sum(map(_torch.writes_in_place, apart.graph.nodes)) == 2
        plain = _torch.without_writes(apart, fakes)
    writes = [node for node in plain.graph.nodes if _torch.writes_in_place(node)]
    assert [node.target for node in writes] == [aten.copy_.default]
    assert writes[0].args[0].op == "placeholder"
    assert all("val" in node.meta for node in plain.graph.nodes if node.op == "call_function")
    x, count = torch.randn(3), torch.zeros(())
    right = Step()(x, torch.zeros(()))
    assert torch.allclose(plain(x, count), right) and count == 1


def test_implementation_of_is_the_function_of_a_custom_operator() -> None:
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    torch.library.custom_op("private_test::twice", twice, mutates_args=())
    assert _torch.implementation_of("private_test::twice") is twice
    assert _torch.implementation_of("aten::mul") is None


def _symbolic_call(function: Any, *inputs: torch.Tensor) -> list[Any]:
    """The values of the graph that dynamo makes of a call, its sizes symbols."""
    found: list[Any] = []

    def backend(gm: torch.fx.GraphModule, example: Any) -> Any:
        found.extend(node.meta.get("example_value") for node in gm.graph.nodes)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=True, fullgraph=True)(*inputs)
    return found


def test_sizes_are_told_by_symbols_bounds_guards_and_sources() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x.view(2, -1) * 2 if x.shape[0] > 10 and x.shape[0] % 6 == 0 else x

    values = _symbolic_call(function, torch.randn(12))
    ((name, symbol),) = _torch.size_symbols(values).items()
    assert (symbol.name, symbol.hint, symbol.low, symbol.high, symbol.positive) == (name, 12, 11, None, True)
    guards = _torch.size_guards(values)
    assert ["==", ["%", name, 6], 0] in guards
    assert _torch.size_sources(values)[name] == ["L['x'].size()[0]"]
    assert _torch.size_symbols([1, torch.ones(2)]) == {} and _torch.size_guards([torch.ones(2)]) == []


def test_symbols_that_are_made_again_print_and_compute_as_they_did() -> None:
    halved = lambda x, y: torch.cat([x, x, y])[: x.shape[0] // 2]  # noqa: E731
    values = _symbolic_call(halved, torch.ones(5), torch.ones(3))
    symbols = _torch.size_symbols(values)
    context = _torch.symbolic_context(symbols.values())
    assert context.fake_mode is not None
    sizes = [size for value in values if isinstance(value, torch.Tensor) for size in value.shape]
    for size in sizes:
        form = _torch.expression_form(size)
        again = _torch.sized(form, symbols, context.fake_mode)
        assert str(again) == str(size) and _torch.hint(again) == _torch.hint(size)
    name = next(iter(symbols))
    made = _torch.sized(["+", ["*", 2, name], 1], symbols, context.fake_mode)
    assert not _torch.context_guards(context)
    assert bool(made > 8)
    ((operator, *_),) = _torch.context_guards(context)
    assert operator in (">", "<", ">=", "<=")
    with pytest.raises(ValueError, match="'s999' is no size"):
        _torch.sized("s999", symbols, context.fake_mode)
    with pytest.raises(ValueError, match=r"\['eval', 1\]. is no size"):
        _torch.sized(["eval", 1], symbols, context.fake_mode)


def test_a_size_that_depends_on_values_has_no_symbol() -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):  # type: ignore[attr-defined]
        values = _symbolic_call(lambda x: x.nonzero(), torch.ones(5))
    with pytest.raises(ValueError, match=r"the size u\d+ depends on values"):
        _torch.size_symbols(values)


def test_fakes_with_symbols_share_those_of_equal_sizes_and_hold_numbers_apart() -> None:
    weight, one, other = torch.zeros(7, 3), torch.zeros(3, 7, dtype=torch.int64), torch.zeros(3, 7)
    fixed, tokens, mask = _torch.symbolic_fakes([weight], [one, other])
    assert list(fixed.shape) == [7, 3] and not any(map(_torch.is_symbol, fixed.shape))
    batch, length = tokens.shape
    assert _torch.is_symbol(batch) and _torch.is_symbol(length) and not _torch.is_same_size(batch, length)
    assert _torch.is_same_size(mask.shape[0], batch) and _torch.is_same_size(mask.shape[1], length)
    wider = _torch.call_on_fakes(tokens, torch.ops.aten.pad.default, (mask, [0, (8 - length % 8) % 8]), {})
    numbers = [(batch, 2), (length, 5)]
    assert [_torch.size_at(size, numbers) for size in wider.shape] == [2, 8]
    with pytest.raises(ValueError, match="is not told by those of the tokens"):
        _torch.size_at(wider.shape[1], numbers[:1])
    if length == 7:
        assert not _torch.is_symbol(length)


def test_a_traced_body_takes_any_first_size() -> None:
    def body(h: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = h * x.exp()[:, :, None]
        return h, h.sum(2)

    gm = _torch.traced_body(body, [torch.zeros(2, 3, 4), torch.zeros(2, 3)])
    assert all(isinstance(n.target, torch._ops.OpOverload) for n in gm.graph.nodes if n.op == "call_function")
    h, x = torch.randn(5, 3, 4), torch.randn(5, 3)
    for found, expected in zip(gm(h, x), body(h, x), strict=True):
        assert torch.equal(found, expected)


def test_sizes_are_multiples_of_a_symbol_or_not() -> None:
    (tokens,) = _torch.symbolic_fakes([], [torch.zeros(3, 7)])
    batch, length = tokens.shape
    flat = _torch.call_on_fakes(tokens, torch.ops.aten.view.default, (tokens, [-1]), {})
    padded = _torch.call_on_fakes(tokens, torch.ops.aten.pad.default, (tokens, [1, 0]), {})
    assert _torch.is_multiple_of(length, length) and not _torch.is_multiple_of(batch, length)
    assert _torch.is_multiple_of(flat.shape[0], length) and _torch.is_multiple_of(flat.shape[0], batch)
    assert not _torch.is_multiple_of(padded.shape[1], length)
    assert not _torch.is_multiple_of(7, length)


@pytest.mark.parametrize(
    "asks",
    [torch.compiler.is_compiling, torch.compiler.is_dynamo_compiling, None],
    ids=["compiling", "dynamo", "capturing"],
)
def test_followed_code_is_told_that_nothing_compiles_while_it_is_said(
    asks: Callable[[], bool] | None,
) -> None:
    plain = torch.cuda.is_current_stream_capturing

    def chosen(x: torch.Tensor) -> torch.Tensor:
        told = torch.cuda.is_current_stream_capturing() if asks is None else asks()
        return x + 1 if told else x + 2

    x = torch.zeros(2)
    if asks is not None:
        assert torch.equal(torch.compile(chosen, backend="eager", fullgraph=True)(x), x + 1)
    torch._dynamo.reset()
    with _torch.told_uncompiled():
        assert torch.equal(torch.compile(chosen, backend="eager", fullgraph=True)(x), x + 2)
    torch._dynamo.reset()
    assert torch.cuda.is_current_stream_capturing is plain
    if asks is not None:
        assert torch.equal(torch.compile(chosen, backend="eager", fullgraph=True)(x), x + 1)


def test_what_code_is_told_is_put_back_by_the_last_block_of_all_threads() -> None:
    def chosen(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if torch.compiler.is_compiling() else x + 2

    def compiled() -> float:
        torch._dynamo.reset()
        return float(torch.compile(chosen, backend="eager", fullgraph=True)(torch.zeros(())))

    one, other = _torch.told_uncompiled(), _torch.told_uncompiled()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert compiled() == 2
    other.__exit__(None, None, None)
    assert compiled() == 1
    with pytest.raises(KeyError), _torch.told_uncompiled():
        raise KeyError
    assert compiled() == 1
