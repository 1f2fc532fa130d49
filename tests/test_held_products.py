"""Products of a backward that add to ``.grad``: equal sums, less memory, and who watches misses none."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from operator import getitem
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import graphopt
from graphopt.candidate import Candidate, CostDelta
from graphopt.emit import held_products
from graphopt.emit.held_products import add_to_held, settled
from graphopt.emit.lowered import LoweredMemory, LoweredStorage
from graphopt.measure import allocator_peak
from graphopt.passes import PassContext
from graphopt.program import Program
from graphopt_passes.linear_cross_entropy import LinearCrossEntropy
from graphopt_passes.pack_linears import PackLinears
from tests.programs import host

IDS = torch.arange(24).view(2, 12) * 7 % 60


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.down = nn.Parameter(torch.randn(3 * width, width) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.up(self.norm(x))) @ self.down


class Model(nn.Module):
    """Blocks between an embedding and a head that share a weight: nine products make gradients of weights."""

    products = 9

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 16)
        self.blocks = nn.ModuleList(Block(16) for _ in range(4))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        logits = F.linear(x, self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def pair(*, held: bool = True) -> tuple[graphopt.Optimized, nn.Module]:
    """A model, compiled, and as it is."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Model().double()
    plain = copy.deepcopy(model)
    if held:
        zero(model)
        zero(plain)
    return graphopt.optimize(model, (IDS,), emit="inductor", on_error="raise"), plain


def zero(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


def assert_same(fast: nn.Module, plain: nn.Module) -> None:
    for ours, theirs in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.fixture(scope="module")
def compiled() -> tuple[graphopt.Optimized, nn.Module]:
    return pair()


@pytest.fixture
def models(compiled: tuple[graphopt.Optimized, nn.Module]) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The model, compiled, and as it is, with gradients of 0."""
    start = copy.deepcopy(compiled[1].state_dict())
    for model in compiled:
        zero(model)
    yield compiled
    for model in compiled:
        for parameter in model.parameters():
            parameter._backward_hooks = None
        model.load_state_dict(start)


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each product that could add to ``.grad``, whether it did."""
    found: list[bool] = []
    usual = held_products._held

    def watched(*args: Any) -> Tensor | None:
        held = usual(*args)
        found.append(held is not None)
        return held

    monkeypatch.setattr(held_products, "_held", watched)
    return found


Models = tuple[nn.Module, nn.Module]


def step(models: Models, ids: Tensor = IDS) -> None:
    for model in models:
        model(ids).backward()


# --- adding -------------------------------------------------------------------------------------------


def test_gradients_of_micro_batches_add_up_in_place(models: Models, added: list[bool]) -> None:
    held = [p.grad for p in models[0].parameters()]
    for k in range(3):
        step(models, (IDS + k) % 60)
        assert_same(*models)
    assert added == [True] * (3 * Model.products)
    assert all(p.grad is before for p, before in zip(models[0].parameters(), held, strict=True))


def test_gradients_that_are_not_there_are_made(models: Models, added: list[bool]) -> None:
    for model in models:
        model.zero_grad(set_to_none=True)
    step(models)
    assert_same(*models)
    # Of the weight that head and embedding share the embedding's share is no product.
    assert added == [False] * Model.products
    added.clear()
    step(models)
    assert_same(*models)
    assert added == [True] * Model.products


def test_gradients_may_go_between_forward_and_backward(models: Models) -> None:
    step(models)
    losses = [model(IDS) for model in models]
    for model, loss in zip(models, losses, strict=True):
        model.zero_grad(set_to_none=True)
        loss.backward()
    assert_same(*models)


def test_gradients_in_one_buffer_are_added_to(models: Models, added: list[bool]) -> None:
    flat = torch.ones(sum(p.numel() for p in models[0].parameters()), dtype=torch.float64)
    parts = flat.split([p.numel() for p in models[0].parameters()])
    for ours, theirs, part in zip(models[0].parameters(), models[1].parameters(), parts, strict=True):
        ours.grad, theirs.grad = part.view_as(ours), torch.ones_like(theirs)
    step(models)
    assert_same(*models)
    assert added == [True] * Model.products


def test_versions_of_gradients_say_that_they_were_written(models: Models) -> None:
    held = models[0].blocks[0].up.weight.grad
    before = held._version
    step(models)
    assert held._version > before


def test_a_scaler_finds_what_it_scaled(models: Models) -> None:
    for model in models:
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler.scale(model(IDS)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
    assert_same(*models)
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """This process as the only one of a group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("views", [False, True], ids=["buckets-apart", "gradients-in-buckets"])
def test_gradients_are_reduced_once_they_are_whole(group: None, views: bool, added: list[bool]) -> None:
    both = pair(held=False)
    added.clear()
    wrapped = [nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=views) for model in both]
    for model in wrapped:
        with model.no_sync():
            model(IDS).backward()
        for k in range(2):
            model((IDS + k) % 60).backward()
    assert_same(*both)
    assert added == [False] * Model.products + [True] * (2 * Model.products)


# --- going autograd's way -----------------------------------------------------------------------------


def _asked_for(model: nn.Module) -> Any:
    return torch.autograd.grad(model(IDS), list(model.parameters()))


def _some_inputs(model: nn.Module) -> Any:
    model(IDS).backward(inputs=[model.blocks[0].up.weight, model.blocks[1].norm.weight])


def _twice(model: nn.Module) -> Any:
    loss = model(IDS)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def _tensor_hook(model: nn.Module) -> Any:
    seen: list[Tensor] = []
    handle = model.blocks[0].up.weight.register_hook(lambda g: seen.append(g.clone()) or 2 * g)
    model(IDS).backward()
    handle.remove()
    return seen


def _hook_after(model: nn.Module) -> Any:
    seen: list[Tensor] = []
    weight = model.blocks[1].down
    handle = weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    model(IDS).backward()
    handle.remove()
    return seen


def _hook_of_the_node(model: nn.Module) -> Any:
    seen: list[Tensor] = []
    node = torch.autograd.graph.get_gradient_edge(model.blocks[1].down).node
    handle = node.register_hook(lambda _, g: seen.append(g[0].clone()))
    model(IDS).backward()
    handle.remove()
    return seen


def _hook_before_the_node(model: nn.Module) -> Any:
    seen: list[Tensor] = []
    node = torch.autograd.graph.get_gradient_edge(model.blocks[1].down).node
    handle = node.register_prehook(lambda g: seen.append(g[0].clone()))
    model(IDS).backward()
    handle.remove()
    return seen


class Named(Tensor):
    """A tensor of another kind."""


def _grad_of_another_kind(model: nn.Module) -> Any:
    weight = model.blocks[0].down
    weight.grad = torch.ones_like(weight).as_subclass(Named)
    model(IDS).backward()
    found, weight.grad = weight.grad.as_subclass(Tensor), torch.zeros_like(weight)
    return found


def _other_strides(model: nn.Module) -> Any:
    weight = model.blocks[0].down
    weight.grad = torch.ones(*reversed(weight.shape), dtype=weight.dtype).t()
    model(IDS).backward()


def _sparse(model: nn.Module) -> Any:
    weight = model.blocks[0].down
    weight.grad = torch.eye(*weight.shape, dtype=weight.dtype).to_sparse()
    model(IDS).backward()


def _of_its_own_memory(model: nn.Module) -> Any:
    weight = model.blocks[0].down
    weight.grad = weight.detach()
    model(IDS).backward()
    return weight.detach()


def _that_requires_grad(model: nn.Module) -> Any:
    weight = model.blocks[0].down
    weight.grad = torch.ones_like(weight).requires_grad_()
    with pytest.raises(RuntimeError, match="leaf"):
        model(IDS).backward()


USES: dict[Callable[[nn.Module], Any], int] = {
    _asked_for: 0,
    _some_inputs: 1,
    _twice: Model.products,
    _tensor_hook: Model.products - 1,
    _hook_after: Model.products - 1,
    _hook_of_the_node: Model.products - 1,
    _hook_before_the_node: Model.products - 1,
    _grad_of_another_kind: Model.products - 1,
    _other_strides: Model.products - 1,
    _sparse: Model.products - 1,
    _of_its_own_memory: Model.products - 1,
}
"""Ways to run a backward, and how many products may then add to ``.grad``."""


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__.lstrip("_"))
def test_who_would_see_it_gets_what_autograd_gives(
    use: Callable[[nn.Module], Any], models: Models, added: list[bool]
) -> None:
    found = [use(model) for model in models]
    torch.testing.assert_close(*found)
    assert_same(*models)
    assert sum(added) == USES[use]


def test_frozen_weights_get_no_gradients() -> None:
    fast, plain = pair()
    for model in (fast, plain):
        model.blocks[0].up.weight.requires_grad_(False)
        zero(model)
        model(IDS).backward()
    assert_same(fast, plain)
    assert not fast.blocks[0].up.weight.grad.any()


# --- memory -------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """Weights far larger than anything else in a step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(256, 512), nn.Linear(512, 256))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()).square().mean()


def wide(*, held: bool, watched: bool = False) -> graphopt.Optimized:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Wide()
    if held:
        zero(model)
    if watched:
        model.first.weight.register_hook(lambda gradient: gradient)
    return graphopt.optimize(model, (torch.randn(8, 256),), emit="inductor", on_error="raise")


LOSS = 64
"""Bytes of the loss and its gradient, as an allocator may round them."""


def peak(fast: graphopt.Optimized, inputs: Tensor) -> int:
    """Bytes that a step takes above what is there before it."""
    return peak_of(lambda: fast(inputs).backward())


def peak_of(step: Callable[[], Any]) -> int:
    return sorted(allocator_peak(step, torch.device("cpu")) for _ in range(3))[1]


def test_no_gradient_is_in_memory_beside_the_held_one() -> None:
    fast, seen = wide(held=True), wide(held=True, watched=True)
    weights = fast.first.weight.nbytes + fast.second.weight.nbytes
    predicted = [model.plan.predicted.peak_bytes for model in (fast, seen)]
    assert predicted[1] - predicted[0] == pytest.approx(weights, rel=0.1)
    for model, expected in zip((fast, seen), predicted, strict=True):
        assert model.measure(repeats=1).peak_bytes <= expected + LOSS
    assert peak(fast, torch.randn(8, 256)) < weights / 4


def test_gradients_that_loops_let_go_of_fit_what_was_predicted_with_them() -> None:
    fast = wide(held=True)
    inputs = torch.randn(8, 256)
    gradients = sum(p.nbytes for p in fast.parameters())
    within = peak(fast, inputs)

    def step() -> None:
        fast.zero_grad(set_to_none=True)
        fast(inputs).backward()

    def anew() -> int:
        fast.zero_grad(set_to_none=True)
        return allocator_peak(step, torch.device("cpu"))

    assert sorted(anew() for _ in range(3))[1] <= within + gradients


def test_gradients_that_are_made_are_predicted() -> None:
    fast = wide(held=False)
    gradients = sum(p.nbytes for p in fast.parameters())
    assert fast.plan.predicted.peak_bytes > 2 * gradients
    inputs = torch.randn(8, 256)
    static = fast.plan.predicted.peak_bytes - sum(p.nbytes for p in fast.parameters()) - inputs.nbytes

    def anew() -> int:
        fast.zero_grad(set_to_none=True)
        return allocator_peak(lambda: fast(inputs).backward(), torch.device("cpu"))

    measured = sorted(anew() for _ in range(3))[1]
    assert gradients < measured <= static + LOSS


# --- graphs -------------------------------------------------------------------------------------------


def backward_graph(build: Callable[..., Any], *values: Tensor) -> fx.GraphModule:
    gm: fx.GraphModule = make_fx(build, tracing_mode="real")(*values)
    return gm


DY, X = torch.randn(6, 4), torch.randn(6, 3)
W = torch.randn(4, 3)


def rewritten(build: Callable[..., Any], parameter: Tensor | None = W) -> tuple[fx.GraphModule, int]:
    """A backward graph of ``build`` once it was rewritten, and how many of its gradients are added."""
    gm = backward_graph(build, DY, X)
    slots, _ = add_to_held(gm, [parameter] * len(gm(DY, X)))
    return gm, len(slots)


@pytest.mark.parametrize(
    "build",
    [lambda dy, x: [dy.t() @ x], lambda dy, x: [(x.t() @ dy).permute(1, 0)]],
    ids=["product", "transpose"],
)
def test_a_product_or_its_transpose_is_added(build: Callable[..., Any]) -> None:
    gm, count = rewritten(build)
    into = torch.ones(4, 3)
    assert list(gm(DY, X, into)) == [None] and count == 1
    torch.testing.assert_close(into, 1 + DY.t() @ X)


@pytest.mark.parametrize(
    ("build", "parameter"),
    [
        (lambda dy, x: [dy.t() @ x], None),
        (lambda dy, x: [dy.t() @ x], W.double()),
        (lambda dy, x: [dy.t() @ x], torch.randn(8, 6)[::2, ::2]),
        (lambda dy, x: [(dy.t() @ x).double()], W.double()),
        (lambda dy, x: [dy.t() @ x + 1], W),
        (lambda dy, x: [(dy.t() @ x).view(12)], torch.randn(12)),
        (lambda dy, x: [dy.sum(0)], torch.randn(4)),
        (lambda dy, x: (lambda p: [p, p])(dy.t() @ x), W),
        (lambda dy, x: (lambda p: [p, p.t()])(dy.t() @ x), W),
        (lambda dy, x: (lambda p: [p, p.exp()])(dy.t() @ x), W),
    ],
    ids=[
        "no-parameter",
        "dtype",
        "strided",
        "cast",
        "sum",
        "view",
        "vector",
        "twice",
        "and-view",
        "and-more",
    ],
)
def test_other_gradients_stay_as_they_are(build: Callable[..., Any], parameter: Tensor | None) -> None:
    gm, count = rewritten(build, parameter)
    assert count == 0
    torch.testing.assert_close(list(gm(DY, X)), build(DY, X))


def both(dy: Tensor, x: Tensor) -> list[Tensor]:
    product = dy.t() @ x
    return [product[:3], product[3:]]


def turned(dy: Tensor, x: Tensor) -> list[Tensor]:
    product = x.t() @ dy
    return [product[:, :3].permute(1, 0), product.permute(1, 0)[3:]]


@pytest.mark.parametrize("build", [both, turned])
def test_products_of_several_layers_are_added_part_by_part(build: Callable[..., Any]) -> None:
    gm = backward_graph(build, DY, X)
    slots, misses = add_to_held(gm, [W[:3], W[3:]], held=True)
    assert [slot.position for slot in slots] == [0, 1] and not misses
    into = [torch.ones(3, 3), torch.ones(1, 3)]
    assert list(gm(DY, X, *into)) == [None, None]
    for held, part in zip(into, (DY.t() @ X).split([3, 1]), strict=True):
        torch.testing.assert_close(held, 1 + part)
    assert sum(node.target is torch.ops.aten.mm.default for node in gm.graph.nodes) == 0


def test_new_gradients_are_rows_of_one_product() -> None:
    gm = backward_graph(both, DY, X)
    slots, (miss,) = add_to_held(gm, [W[:3], W[3:]])
    assert not slots and miss.reason.text == "new gradients are rows of one product"
    torch.testing.assert_close(list(gm(DY, X)), both(DY, X))


def test_a_part_that_is_no_gradient_keeps_the_product_whole() -> None:
    for parameters in ([W[:3], None], [None, W[3:]]):
        gm = backward_graph(both, DY, X)
        assert add_to_held(gm, parameters, held=True) == ([], [])
        torch.testing.assert_close(list(gm(DY, X)), both(DY, X))


@pytest.mark.parametrize(
    ("widths", "apart"), [((2048, 1024, 1024), True), ((8, 8, 8), False)], ids=["wide", "narrow"]
)
def test_one_product_stays_where_adding_its_parts_is_faster(widths: tuple[int, ...], apart: bool) -> None:
    def build(dy: Tensor, x: Tensor) -> list[Tensor]:
        product, ends = dy.t() @ x, list(itertools.accumulate(widths))
        return [product[end - width : end] for width, end in zip(widths, ends, strict=True)]

    with torch._subclasses.FakeTensorMode():
        dy, x = (torch.empty(8192, n, dtype=torch.bfloat16) for n in (sum(widths), 2048))
        gm = make_fx(build)(dy, x)
        parameters = [torch.empty(n, 2048, dtype=torch.bfloat16) for n in widths]
        cost = host().cost_model("roofline").build(host().device("h200"))
        slots, misses = add_to_held(gm, parameters, held=True, cost=cost)
    assert len(slots) == 3 * apart
    text = "one product whose parts are added is predicted to be faster"
    assert [miss.reason.text for miss in misses] == [text] * (not apart)
    assert gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default) == [] or not apart


@pytest.mark.parametrize(
    ("device", "computed", "stored", "reason"),
    [
        ("cuda", torch.bfloat16, torch.float32, None),
        ("cuda", torch.float16, torch.float32, "a product in float16 tells a loss scaler of what overflows"),
        ("cuda", torch.bfloat16, torch.float64, "no product of bfloat16 is added to float64"),
        (
            "cpu",
            torch.bfloat16,
            torch.float32,
            "no product on the cpu has a wider result than its operands",
        ),
    ],
    ids=["bfloat16", "float16", "float64", "cpu"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_products_of_an_autocast_region_are_added_in_float32(
    device: str, computed: torch.dtype, stored: torch.dtype, reason: str | None, packed: bool
) -> None:
    """On a GPU that is not there: nothing is run."""

    def build(dy: Tensor, x: Tensor) -> list[Tensor]:
        wide = torch.ops.prims.convert_element_type.default(dy.t() @ x, stored)
        cut = torch.ops.aten.slice.Tensor
        return [cut(wide, 0, 0, 3), cut(wide, 0, 3, 4)] if packed else [wide]

    with torch._subclasses.FakeTensorMode():
        dy, x = (torch.empty(6, n, dtype=computed, device=device) for n in (4, 3))
        gm = make_fx(build)(dy, x)
        parameters = [torch.empty(n, 3, dtype=stored, device=device) for n in ((3, 1) if packed else (4,))]
        slots, misses = add_to_held(gm, parameters, held=True)
    assert [miss.reason.text for miss in misses] == ([] if reason is None else [reason])
    assert len(slots) == (0 if reason else len(parameters))
    if reason is None:
        assert all(slot.like.dtype is torch.float32 for slot in slots)
        calls = gm.graph.find_nodes(op="call_function", target=torch.ops.graphopt.add_product.default)
        rows = [call.args[1].meta["val"].shape[0] for call in calls]
        assert rows == [parameter.shape[0] for parameter in parameters]


def loss_of(name: str, cuts: int, dtype: torch.dtype) -> tuple[fx.GraphModule, Tensor]:
    """The backward of a loss of a linear layer, and its weight."""
    host().kernels()  # registers the operators
    x, w = torch.randn(9, 3).to(dtype), torch.randn(7, 3).to(dtype)
    target, sums = torch.arange(9) % 7, (x.float() @ w.float().t()).logsumexp(1)

    def build(grad: Tensor, x: Tensor, w: Tensor, target: Tensor, sums: Tensor) -> list[Tensor]:
        settings = (cuts, "mean", -100, 0.0, 1.0, 0.0, [True, True, False])
        op = getattr(torch.ops.graphopt, name)
        return list(op(grad, x, w, None, target, sums, *settings)[:2])

    return make_fx(build, tracing_mode="real")(torch.tensor(0.5), x, w, target, sums), w


CHUNKED = "linear_cross_entropy_backward"
BLOCKED = "linear_cross_entropy_blocks_backward"


@pytest.mark.parametrize(
    ("blocked", "cuts", "dtype", "held", "reason"),
    [
        (False, 2, torch.float32, False, None),
        (False, 1, torch.bfloat16, True, None),
        (False, 2, torch.bfloat16, True, "a sum in bfloat16 would be rounded once a chunk"),
        (True, 3, torch.float32, True, None),
        (True, 3, torch.bfloat16, True, None),
        (True, 3, torch.float32, False, "until it is written a new gradient is room for other sums"),
    ],
)
def test_losses_of_linear_layers_add_their_weights_gradient(
    blocked: bool, cuts: int, dtype: torch.dtype, held: bool, reason: str | None
) -> None:
    gm, weight = loss_of(BLOCKED if blocked else CHUNKED, cuts, dtype)
    x = torch.randn(9, 3).to(dtype)
    sums = (x.float() @ weight.float().t()).logsumexp(1)
    given = (torch.tensor(0.5), x, weight, torch.arange(9) % 7, sums)
    right = gm(*given)
    slots, misses = add_to_held(gm, [None, weight], held=held)
    assert [miss.reason.text for miss in misses] == ([] if reason is None else [reason])
    if reason is not None:
        torch.testing.assert_close(gm(*given), right)
        return
    into = torch.ones_like(weight)
    of_input, nothing = gm(*given, into)
    assert nothing is None and [slot.position for slot in slots] == [1]
    torch.testing.assert_close(of_input, right[0])
    torch.testing.assert_close(into, 1 + right[1])


def test_what_is_rearranged_behind_a_loss_stays() -> None:
    gm, weight = loss_of(CHUNKED, 2, torch.float32)
    (gradient,) = [node for node in gm.graph.nodes if node.target is getitem and node.args[1] == 1]
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        turned = gm.graph.call_function(torch.ops.aten.permute.default, (gradient, [1, 0]))
    turned.meta["val"] = gradient.meta["val"].t()
    output.args = ([output.args[0][0], turned],)
    slots, (miss,) = add_to_held(gm, [None, weight.t()])
    assert not slots and miss.reason.text == "what the loss makes is rearranged"


def test_what_the_code_holds_is_said_of_the_graph_as_it_was() -> None:
    gm = backward_graph(lambda dy, x: [dy @ W, dy.t() @ x], DY, X)
    ((slot,), _) = add_to_held(gm, [None, W])
    taken = LoweredStorage(48, -1, 3, input=slot.name)
    other = LoweredStorage(24, 0, None, outputs=(0,))
    record = LoweredMemory(
        "backward", "cpu", ("a", "b", "c", "d"), (0,) * 4, (taken, other), ("x", slot.name), ("mm", "")
    )
    held, made = settled(record, [slot], held=True), settled(record, [slot], held=False)
    assert held.storages == (other,) and held.output_bytes == 24
    assert made.storages == (LoweredStorage(48, 3, None, outputs=(1,)), other) and made.output_bytes == 72
    assert held.input_names == made.input_names == ("x",) and "" not in held.output_names


class Packed(nn.Module):
    """Layers of one value, whose products are packed, and a loss that is computed piece by piece."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, width, bias=False) for width in (64, 32, 32))
        self.head = nn.Linear(32, 500, bias=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x.tanh()
        q = self.q(x).view(-1, 2, 32).sum(1)
        return F.cross_entropy(self.head(q * self.k(x) + self.v(x)), t)


@dataclass(frozen=True)
class One(LinearCrossEntropy):
    """Of all that it offers the one that ``ends`` so, done without being weighed."""

    ends: str = ""

    def propose(self, program: Program, ctx: PassContext) -> Iterator[Any]:
        for found in super().propose(program, ctx):
            if isinstance(found, Candidate) and found.id.endswith(self.ends):
                yield replace(found, alternative=False, conflicts=(), delta=CostDelta(seconds=-1.0))


@pytest.mark.parametrize("ends", ["/recompute/2", "/blocks/200"])
def test_packed_layers_and_losses_in_pieces_add_to_what_is_there(ends: str, added: list[bool]) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Packed()
    plain = copy.deepcopy(model)
    x, t = torch.randn(40, 64), torch.randint(0, 500, (40,))
    for each in (model, plain):
        zero(each)
    pipeline = [PackLinears(everywhere=True), One(chunks=(2,), blocks=(200,), least_rows=4, ends=ends)]
    fast = graphopt.optimize(model, (x, t), pipeline=pipeline, emit="inductor", on_error="raise")
    steps = {step.id: step.status for step in fast.report.steps}
    assert steps == {"pack-linears": "applied", "linear-cross-entropy": "applied"}
    for each in (fast, plain):
        each(x, t).backward()
    assert_same(fast, plain)
    packed = not any("parts are added" in miss.reason.text for miss in fast.report.near_misses)
    assert added == [True] * (4 if packed else 1)
    held = sum(p.nbytes for p in fast.parameters())
    predicted = fast.plan.predicted.peak_bytes
    found = peak_of(lambda: fast(x, t).backward())
    assert found <= predicted - 2 * held - x.nbytes - t.nbytes + LOSS
    # Gradients that are made anew fit beside it.
    fast.zero_grad(set_to_none=True)
    plain.zero_grad(set_to_none=True)
    for each in (fast, plain):
        each(x, t).backward()
    assert_same(fast, plain)


class Broken(nn.Module):
    """Two graphs, neither of which is cut into calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        torch._dynamo.graph_break()
        return self.second(x).square().mean()


def test_programs_of_several_graphs_add_as_well(added: list[bool]) -> None:
    torch._dynamo.reset()
    model = Broken().double()
    plain = copy.deepcopy(model)
    zero(model)
    zero(plain)
    x = torch.randn(7, 6, dtype=torch.float64)
    fast = graphopt.optimize(model, (x,), emit="inductor", on_error="raise")
    added.clear()
    for each in (fast, plain):
        for _ in range(2):
            each(x).backward()
    assert_same(fast, plain)
    assert added == [True] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("ends", ["/recompute/2", "/blocks/4096"])
def test_on_a_gpu_gradients_add_up_as_in_eager(dtype: torch.dtype, ends: str, added: list[bool]) -> None:
    """Of bfloat16 weights, and of float32 ones in an autocast region."""

    class Wider(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(1024, width, bias=False) for width in (1024, 512, 512))
            self.head = nn.Linear(512, 16384, bias=False)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16, enabled=dtype is torch.float32):
                x = x.tanh()
                q = self.q(x).view(-1, 2, 512).sum(1)
                return F.cross_entropy(self.head(q * self.k(x) + self.v(x)).float(), t)

    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Wider().to("cuda", dtype)
    plain = copy.deepcopy(model)
    x = torch.randn(4096, 1024, device="cuda", dtype=dtype)
    t = torch.randint(0, 16384, (4096,), device="cuda")
    for each in (model, plain):
        zero(each)
    pipeline = ["pack-linears", One(chunks=(2,), blocks=(4096,), ends=ends)]
    fast = graphopt.optimize(model, (x, t), pipeline=pipeline, emit="inductor", on_error="raise")
    added.clear()
    for each in (fast, plain):
        for _ in range(2):
            each(x, t).backward()
    for ours, theirs in zip(fast.parameters(), plain.parameters(), strict=True):
        assert ours.grad.dtype is dtype
        assert float((ours.grad - theirs.grad).float().norm() / theirs.grad.float().norm()) < 2e-2
    # Chunks of rows would round a sum in bfloat16 once each.
    rounds = dtype is torch.bfloat16 and "recompute" in ends
    reasons = [miss.reason.text for miss in fast.report.near_misses]
    assert ("a sum in bfloat16 would be rounded once a chunk" in reasons) is rounds
    assert added and all(added)
    measured, predicted = fast.measure(repeats=1).peak_bytes, fast.plan.predicted.peak_bytes
    assert measured <= predicted
