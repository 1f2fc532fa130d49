"""Updates by their numbers: torch's bits on the CPU, the kernels' numbers, what is refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt_kernels.optimizer_update import (
    ADAM_NUMBERS,
    SGD_NUMBERS,
    adam_update,
    sgd_update,
    update_supports,
)
from tests.interpreted import interpreted

pytest.importorskip("triton")

SHAPES = ((5, 3), (7,), (0, 2), (1,))


def lists(count: int) -> list[list[Tensor]]:
    torch.manual_seed(0)
    return [[torch.randn(shape) for shape in SHAPES] for _ in range(count)]


def stepped(make: Any, steps: int = 3) -> tuple[list[Tensor], list[list[Tensor]], list[dict[str, Tensor]]]:
    """Parameters before, gradients of each step, parameters and states after steps of ``torch.optim``."""
    (params,) = lists(1)
    mine = [nn.Parameter(p.clone()) for p in params]
    optimizer = make(mine)
    gradients = []
    for _ in range(steps):
        gradients.append([torch.randn_like(p) for p in mine])
        for p, g in zip(mine, gradients[-1], strict=True):
            p.grad = g.clone()
        optimizer.step()
    return params, gradients, [{"p": p.detach(), **optimizer.state[p]} for p in mine]


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("maximize", [True, False])
def test_adam_has_the_bits_of_torch(decoupled: bool, maximize: bool) -> None:
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    lr, (b1, b2), eps, wd = 1e-2, (0.9, 0.99), 1e-8, 0.1
    params, gradients, right = stepped(
        lambda p: kind(p, lr, (b1, b2), eps, wd, foreach=False, maximize=maximize)
    )
    m, v = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    for count, grads in enumerate(gradients, 1):
        keep, decay = (1 - lr * wd, 0.0) if decoupled else (1.0, wd)
        rate, correction = lr / (1 - b1**count), (1 - b2**count) ** 0.5
        numbers = (-1.0 if maximize else 1.0, keep, decay, 1 - b1, b2, 1 - b2, rate, correction, eps)
        adam_update(params, grads, m, v, numbers, [], [])
    for k, state in enumerate(right):
        for ours, name in ((params[k], "p"), (m[k], "exp_avg"), (v[k], "exp_avg_sq")):
            assert torch.equal(ours, state[name]), name


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_sgd_has_the_bits_of_torch(nesterov: bool, momentum: float) -> None:
    nesterov = nesterov and momentum > 0
    params, gradients, right = stepped(
        lambda p: torch.optim.SGD(p, 0.1, momentum, 0.0, 0.01, nesterov, foreach=False)
    )
    momenta = [torch.zeros_like(p) for p in params] if momentum else []
    for grads in gradients:
        sgd_update(params, grads, momenta, (1.0, 1.0, 0.01, momentum, 1.0, 0.1), [], [], nesterov)
    for k, state in enumerate(right):
        assert torch.equal(params[k], state["p"])
        assert not momentum or torch.equal(momenta[k], state["momentum_buffer"])


ADAMW = (1.0, 0.99, 0.0, 0.1, 0.99, 0.01, 0.02, 0.3, 1e-8)
SGD = (1.0, 1.0, 0.01, 0.9, 1.0, 0.1)


def test_a_scalar_takes_the_place_of_a_number() -> None:
    given, same = lists(4), lists(4)
    for each in (given, same):
        each[3] = [x.abs() for x in each[3]]
    wrong = tuple(math.nan if k in (1, 6, 7) else x for k, x in enumerate(ADAMW))
    scalars = [torch.tensor(ADAMW[6]), torch.tensor([ADAMW[1]]), torch.tensor(ADAMW[7], dtype=torch.float64)]
    adam_update(*given, wrong, scalars, [6, 1, 7])
    adam_update(*same, ADAMW, [], [])
    torch.testing.assert_close(given, same)
    given, same = lists(3), lists(3)
    sgd_update(*given, (*SGD[:5], math.nan), [torch.tensor(SGD[5])], [5], True)
    sgd_update(*same, SGD, [], [], True)
    torch.testing.assert_close(given, same)


def test_they_are_operators_like_others() -> None:
    adam = (*lists(4), ADAMW, [torch.tensor(0.5), torch.tensor(0.02)], [0, 6])
    torch.library.opcheck(adam_update, adam)
    torch.library.opcheck(sgd_update, (*lists(3), SGD, [torch.tensor(0.1)], [5], True))
    torch.library.opcheck(sgd_update, (*lists(2), [], SGD, [], [], False))
    adam_update([], [], [], [], ADAMW, [], [])
    sgd_update([], [], [], SGD, [], [], False)


class Updated(nn.Module):
    """A module that calls an operator itself."""

    def __init__(self) -> None:
        super().__init__()
        params, _, averages, squares = lists(4)
        self.params = nn.ParameterList(params[:2]).requires_grad_(False)
        self.averages = nn.ParameterList(averages[:2]).requires_grad_(False)
        self.squares = nn.ParameterList([x.abs() for x in squares[:2]]).requires_grad_(False)

    def forward(self, grads: list[Tensor], rate: Tensor) -> Tensor:
        given = [list(self.params), [2 * g for g in grads], list(self.averages), list(self.squares)]
        adam_update(*given, ADAMW, [rate], [6])
        return self.params[0].sum()


def test_they_are_exported_and_compiled() -> None:
    grads, rate = lists(2)[1][:2], torch.tensor(0.02)
    plain = Updated()
    exported, compiled = copy.deepcopy(plain), copy.deepcopy(plain)
    program = torch.export.export(exported, (grads, rate))
    right = plain(grads, rate)
    made = program.module()
    torch.testing.assert_close(made(grads, rate), right)
    run = torch.compile(compiled, backend="inductor", fullgraph=True)
    torch.testing.assert_close(run(grads, rate), right)
    for other in (made, compiled):
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], value)


def test_versions_say_what_was_written() -> None:
    given = lists(4)
    before = [[x._version for x in each] for each in given]
    adam_update(*given, ADAMW, [], [])
    rose = [[x._version > b for x, b in zip(*pair, strict=True)] for pair in zip(given, before, strict=True)]
    assert rose == [[True] * 4, [False] * 4, [True] * 4, [True] * 4]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"numbers": ADAMW[:4]}, "4 numbers: expected scale, keep"),
        ({"places": [1]}, "0 scalars for the places"),
        ({"scalars": [torch.ones(1)], "places": [9]}, "of 9 numbers"),
        ({"scalars": [torch.ones(2)], "places": [1]}, "expected one number"),
        ({"scalars": [torch.ones((), dtype=torch.int64)], "places": [1]}, "expected one number"),
        ({"squares": []}, "lists of 4, 4, 4, 0 tensors"),
        ({"averages": [torch.ones(3, 5).t(), *lists(1)[0][1:]]}, "laid out"),
    ],
    ids=["numbers", "places", "place", "sizes", "integer", "lengths", "layout"],
)
def test_what_does_not_fit_together_is_refused(change: dict[str, Any], reason: str) -> None:
    names = ("params", "grads", "averages", "squares")
    given = dict(zip(names, lists(4), strict=True)) | {"numbers": ADAMW, "scalars": [], "places": []}
    before = [p.clone() for p in given["params"]]
    with pytest.raises(ValueError, match=f"adam_update: .*{reason}"):
        adam_update(**given | change)
    assert all(map(torch.equal, before, given["params"]))


def test_the_numbers_are_named() -> None:
    assert len(ADAM_NUMBERS) == len(ADAMW) and len(SGD_NUMBERS) == len(SGD)
    assert update_supports([torch.ones(2)], [torch.ones(2)]) is None


def test_the_kernels_compute_what_the_references_do() -> None:
    found = interpreted("update_cases.py")
    assert found["float32"] < 1e-6 and found["float16"] < 2e-3
    assert found["special"][:3] == ["nan", "nan", "nan"]


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize(
    ("dtypes", "loaded"),
    [
        (("bfloat16",) * 3, False),
        (("bfloat16", "bfloat16", "float32"), True),
        (("float32",) * 3, True),
        (("float32", "bfloat16", "float32"), False),
    ],
    ids=["bfloat16", "wide-states-loaded", "float32-loaded", "narrow-gradients"],
)
def test_the_kernels_compile_for_sm_90_without_spills(
    kind: str, dtypes: tuple[str, str, str], loaded: bool
) -> None:
    import triton.language as tl

    from graphopt_kernels import optimizer_step, optimizer_update_triton
    from graphopt_kernels.emit.machine_code import compile_function_for_sm90

    kernel = getattr(optimizer_update_triton, f"{kind}_update_kernel")
    numbers = ADAM_NUMBERS if kind == "adam" else SGD_NUMBERS
    types = {"table": "*i64", "owner": "*i32", "tensors": "i32"}
    types |= dict.fromkeys(numbers, "*fp32" if loaded else "fp32")
    constants = {
        "LOADED": (1 << len(numbers)) - 1 if loaded else 0, "KEPT": True, "DECAYED": True, "ALIGNED": True,
        **{name: getattr(tl, dtype) for name, dtype in zip("PGS", dtypes, strict=True)},
        "BLOCK": optimizer_step._BLOCK, "CHUNK": optimizer_step._CHUNK,
    }  # fmt: skip
    if kind == "sgd":
        constants |= {"MOMENTUM": True, "NESTEROV": True}
    code = compile_function_for_sm90(
        kernel, types, constants, warps=optimizer_step._WARPS, aligned=("table", "owner")
    )
    assert not code.spills and code.shared <= 2048 and code.registers <= 160
    # Each array is read 16 bytes at a time where a block is whole: twice where it has float32.
    arrays = [*dtypes, *(dtypes[2:] if kind == "adam" else ())]
    assert code.instructions["LDG.E.128"] >= sum(2 if dtype == "float32" else 1 for dtype in arrays)
