"""Products of a backward that add to ``.grad``: equal sums, less memory, and who watches misses none."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import graphopt
from graphopt.emit import held_products
from graphopt.emit.held_products import add_to_held, settled
from graphopt.emit.lowered import LoweredMemory, LoweredStorage
from graphopt.measure import allocator_peak

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
    peaks = sorted(allocator_peak(lambda: fast(inputs).backward(), torch.device("cpu")) for _ in range(3))
    return peaks[1]


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
    count = len(add_to_held(gm, [parameter] * len(gm(DY, X))))
    return gm, count


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


def test_what_the_code_holds_is_said_of_the_graph_as_it_was() -> None:
    gm = backward_graph(lambda dy, x: [dy @ W, dy.t() @ x], DY, X)
    (slot,) = add_to_held(gm, [None, W])
    taken = LoweredStorage(48, -1, 3, input=slot.name)
    other = LoweredStorage(24, 0, None, outputs=(0,))
    record = LoweredMemory(
        "backward", "cpu", ("a", "b", "c", "d"), (0,) * 4, (taken, other), ("x", slot.name), ("mm", "")
    )
    held, made = settled(record, [slot], held=True), settled(record, [slot], held=False)
    assert held.storages == (other,) and held.output_bytes == 24
    assert made.storages == (LoweredStorage(48, 3, None, outputs=(1,)), other) and made.output_bytes == 72
    assert held.input_names == made.input_names == ("x",) and "" not in held.output_names


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
