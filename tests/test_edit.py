"""Edits: what a commit leaves, and that a roll-back leaves nothing."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

from graphopt.dump.text import program_text
from graphopt.edit import Edit
from graphopt.errors import PassError, VerificationError
from graphopt.program import Program, tensor_leaves
from graphopt.provenance import note_of
from graphopt.values import value_table
from tests.programs import semantic

aten = torch.ops.aten


def step(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.dropout(x @ w, 0.0, True)
    return y.view(-1).cos().sum(), y * 2


@pytest.fixture
def program() -> Program:
    return semantic(step, torch.randn(4, 8), torch.randn(8, 8))


class State:
    """Everything that a roll-back must leave as it was."""

    def __init__(self, program: Program) -> None:
        self.gm, self.signature = program.gm, program.signature
        self.text, self.fingerprint = program_text(program), program.fingerprint
        self.names = [node.name for node in program.graph.nodes]
        self.values = [id(node.meta.get("val")) for node in program.graph.nodes]
        self.metas = [sorted(node.meta) for node in program.graph.nodes]
        self.attributes = sorted(vars(program.gm))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, State) and vars(self) == vars(other)


def test_new_and_changed_nodes_have_values_and_the_rest_keeps_theirs(program: Program) -> None:
    kept = {node.name: node.meta["val"] for node in program.nodes()}
    with program.edit("fuse") as edit:
        cos = edit.node("cos")
        wide = edit.call_before(cos, aten.to.dtype, (cos.args[0], torch.float64))
        sine = edit.call_before(cos, aten.sin.default, (wide,))
        edit.replace(cos, edit.call_before(cos, aten.to.dtype, (sine, torch.float32)))
    values = {node.name: node.meta["val"] for node in program.nodes()}
    assert values["sin_default"].dtype is torch.float64
    assert "cos" not in values
    # The sum reads something else of the same type: its value stands.
    assert all(values[name] is kept[name] for name in ("matmul", "dropout", "view", "sum_1", "mul"))
    x, w = torch.randn(4, 8), torch.randn(8, 8)
    total, _ = program.gm(*(x if tuple(t.shape) == (4, 8) else w for t in _inputs(program)))
    assert torch.equal(total, (x @ w).view(-1).double().sin().float().sum())


def test_a_change_of_type_reaches_as_far_as_it_changes_anything(program: Program) -> None:
    with program.edit("widen") as edit:
        view = edit.node("view")
        wide = edit.call_before(view, aten.to.dtype, (view.args[0], torch.float64))
        view.replace_input_with(view.args[0], wide)
        total = edit.node("sum_1")
        edit.replace(total, edit.call_after(total, aten.to.dtype, (total, torch.float32)))
    dtypes = {node.name: node.meta["val"].dtype for node in program.nodes()}
    assert {name for name, dtype in dtypes.items() if dtype is torch.float64} == {
        "to_dtype", "view", "cos", "sum_1",
    }  # fmt: skip


def test_views_tell_whose_memory_they_show(program: Program) -> None:
    with program.edit("drop") as edit:
        dropout = edit.node("dropout")
        edit.replace(dropout, dropout.args[0])
        edit.erase(dropout)
    assert value_table(program.graph)["view"][0].alias == ("matmul", 0)
    assert value_table(program.graph)["mul"][0].alias is None


def test_values_are_computed_under_the_autocast_region_that_holds() -> None:
    def mixed(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return (x @ w).float()

    program = semantic(mixed, torch.randn(4, 8), torch.randn(8, 8))
    with program.edit("again") as edit:
        old = edit.node("matmul")
        edit.replace(old, edit.call_before(old, aten.matmul.default, old.args))
    assert next(program.nodes(aten.matmul)).meta["val"].dtype is torch.bfloat16


def test_provenance_of_replacements_and_of_steps_to_them() -> None:
    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.tanh()

    program = semantic(torch.nn.Sequential(torch.nn.Linear(8, 8), Net()), torch.randn(4, 8))
    with program.edit("first-pass") as edit:
        edit.rule = "tanh-by-sigmoid"
        tanh = edit.node("tanh")
        double = edit.call_before(tanh, aten.mul.Tensor, (tanh.args[0], 2))
        half = edit.call_before(tanh, aten.sigmoid.default, (double,))
        edit.replace(tanh, half)
    for name in ("mul_tensor", "sigmoid_default"):
        (node,) = program.find([name])
        note = note_of(node)
        assert note is not None
        assert (note.origin, note.pass_id, note.rule) == (("tanh",), "first-pass", "tanh-by-sigmoid")
        assert note.layer.endswith("1") and node.meta["nn_module_stack"] and node.meta["stack_trace"]
    with program.edit("second-pass") as edit:
        old = edit.node("sigmoid_default")
        new = edit.call_after(old, aten.sigmoid.default, old.args, replaces=[old, "mul_tensor"])
        edit.replace(old, new)
    note = note_of(new)
    assert note is not None and note.origin == ("tanh",) and note.pass_id == "second-pass"
    assert "<second-pass>" in program_text(program)


def test_order_is_restored_and_dead_code_goes(program: Program) -> None:
    with program.edit("late") as edit:
        view, last = edit.node("view"), edit.node("mul")
        new = edit.call_after(last, aten.reshape.default, (view.args[0], [32]))
        edit.replace(view, new)
    names = [node.name for node in program.nodes()]
    assert names == ["matmul", "dropout", "mul", "reshape_default", "cos", "sum_1"]
    program.graph.lint()


def test_what_has_an_effect_is_never_dead() -> None:
    norm = torch.nn.BatchNorm1d(8)

    def noisy(x: torch.Tensor) -> torch.Tensor:
        norm(x)
        torch.dropout(x, 0.5, True)
        return x.cos()

    program = semantic(noisy, torch.randn(4, 8))
    effects = [node.name for node in program.nodes() if node.name != "cos"]
    with program.edit("swap") as edit:
        cos = edit.node("cos")
        edit.replace(cos, edit.call_after(cos, aten.sin.default, cos.args))
    assert [node.name for node in program.nodes() if node.name != "sin_default"] == effects
    assert any("batch_norm" in name for name in effects)


def test_what_feels_an_effect_that_moves_goes_with_it() -> None:
    def written(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        y.view(2, 2).mul_(x.cos().view(2, 2))
        y.neg_()
        return x.sin() * y

    program, x = semantic(written, torch.randn(4)), torch.randn(4)
    with program.edit("late") as edit:
        cosine, sine = edit.node("cos"), edit.node("sin")
        edit.replace(cosine, edit.call_after(sine, aten.square.default, (sine,)))
    names = [node.name for node in program.nodes()]
    assert names == ["add", "view", "sin", "square_default", "view_1", "mul_", "neg_", "mul"]
    (found,) = pytree.tree_leaves(program.gm(x))
    assert torch.equal(found, x.sin() * -((x + 1) * x.sin().square()))


def test_a_node_may_not_move_past_an_effect_that_it_feels() -> None:
    def written(x: torch.Tensor) -> torch.Tensor:
        y = x.cos()
        z = y.sin()
        y.add_(1)
        return z + y

    program = semantic(written, torch.randn(4))
    before = State(program)
    message = "node 'sin' would have to move past 'add_', whose effect it feels: rule 'order'"
    with pytest.raises(VerificationError, match=message), program.edit("late") as edit:
        sine, write = edit.node("sin"), edit.node("add_")
        late = edit.call_after(write, aten.alias.default, (sine.args[0],))
        sine.replace_input_with(sine.args[0], late)
    assert State(program) == before


def test_returned_nodes_are_renamed_in_the_signature(program: Program) -> None:
    with program.edit("rename") as edit:
        old = edit.node("mul")
        new = edit.call_after(old, aten.add.Tensor, (old.args[0], old.args[0]))
        edit.replace(old, new)
    assert [spec.node for spec in program.signature.outputs] == ["sum_1", new.name]


def test_no_change_is_no_commit(program: Program) -> None:
    before = State(program)
    nodes = list(program.graph.nodes)
    with program.edit("idle") as edit:
        edit.node("cos")
    assert State(program) == before and list(program.graph.nodes) == nodes and not edit.committed


def _raises(edit: Edit) -> None:
    edit.replace("cos", edit.node("view"))
    raise ValueError("no luck\nsecond line")


def _raises_before_any_change(edit: Edit) -> None:
    edit.node("cos").meta["mine"] = 1
    raise ValueError("no luck")


def _erases_what_is_read(edit: Edit) -> None:
    edit.erase("cos")


def _reads_what_was_erased(edit: Edit) -> None:
    sine = edit.call_before("cos", aten.sin.default, ("cos",))
    dropout = edit.node("dropout")
    edit.replace(dropout, dropout.args[0])
    edit.erase(dropout)
    sine.args = (dropout,)
    edit.replace("cos", sine)


def _narrows(edit: Edit) -> None:
    old = edit.node("mul")
    edit.replace(old, edit.call_after(old, aten.to.dtype, (old, torch.bfloat16)))


def _misses_an_argument(edit: Edit) -> None:
    edit.replace("cos", edit.call_before("cos", aten.mm.default, (edit.node("view"),)))


def _makes_a_circle(edit: Edit) -> None:
    edit.node("view").replace_input_with(edit.node("dropout"), edit.node("cos"))


def _writes_an_input(edit: Edit) -> None:
    first = next(iter(edit.graph.nodes))
    edit.call_before("matmul", aten.add_.Tensor, (first, 1))


def _returns_an_input_alias(edit: Edit) -> None:
    first = next(n for n in edit.graph.nodes if tuple(n.meta["val"].shape) == (4, 8))
    edit.replace("mul", edit.call_before("mul", aten.alias.default, (first,)))


def _adds_an_attribute(edit: Edit) -> None:
    edit.program.gm.register_buffer("table", torch.ones(3))
    edit.replace("cos", edit.node("view"))
    raise ValueError("no luck")


def _drops_an_output(edit: Edit) -> None:
    output = next(n for n in edit.graph.nodes if n.op == "output")
    output.args = ((output.args[0][0],),)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_raises, PassError, "bad: the edit of g0 raised ValueError: no luck$"),
        (_raises_before_any_change, PassError, "bad: the edit of g0 raised ValueError: no luck$"),
        (_erases_what_is_read, PassError, "bad: cannot erase node 'cos': it is still read by 'sum_1'"),
        (
            _reads_what_was_erased,
            VerificationError,
            "node 'sin_default' reads 'dropout', which was erased: rule 'erased'",
        ),
        (
            _narrows,
            VerificationError,
            r"output 1 \('to_dtype'\) was f32\[4,8\] on cpu, is bf16\[4,8\] on cpu: rule 'outputs'",
        ),
        (
            _misses_an_argument,
            PassError,
            r"bad: the value of node 'mm_default' \(aten.mm.default\) cannot be computed",
        ),
        (
            _makes_a_circle,
            VerificationError,
            "nodes read each other in a circle: .*'view', 'cos'.*: rule 'order'",
        ),
        (
            _writes_an_input,
            VerificationError,
            "input 'arg._1' is written in place, which it was not before: rule 'mutation'",
        ),
        (
            _returns_an_input_alias,
            VerificationError,
            "shared memory with nothing, now with input arg._1: rule 'aliasing'",
        ),
        (_adds_an_attribute, PassError, "raised ValueError: no luck"),
        (_drops_an_output, VerificationError, "there were 2 outputs, now there are 1: rule 'outputs'"),
    ],
)
def test_a_failed_edit_leaves_the_program_as_it_was(program: Program, change, error, message: str) -> None:
    before = State(program)
    with pytest.raises(error, match=message), program.edit("bad") as edit:
        change(edit)
    assert State(program) == before
    program.graph.lint()
    assert len(program.gm(*(torch.randn(*t.shape) for t in _inputs(program)))) == 2


def _inputs(program: Program) -> list[torch.Tensor]:
    return [t for n in program.graph.nodes if n.op == "placeholder" for t in tensor_leaves(n.meta["val"])]


def test_interrupts_roll_back_and_pass_through(program: Program) -> None:
    before = State(program)
    with pytest.raises(KeyboardInterrupt), program.edit("bad") as edit:
        edit.replace("cos", edit.node("view"))
        raise KeyboardInterrupt
    assert State(program) == before


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda e, gone: e.node("coss"), "pass-x: program g0 has no node 'coss'; did you mean 'cos'?"),
        (lambda e, gone: e.erase(gone), "pass-x: node 'sin_default' is not in program g0: it was erased, or"),
        (lambda e, gone: e.replace("cos", "cos"), "pass-x: node 'cos' cannot replace itself"),
    ],
)
def test_helpers_name_what_is_wrong(program: Program, use, message: str) -> None:
    with pytest.raises(PassError, match=re.escape(message)), program.edit("pass-x") as edit:
        gone = edit.call_after("view", aten.sin.default, (edit.node("view"),))
        edit.erase(gone)
        use(edit, gone)


def test_sizes_may_be_symbolic() -> None:
    program = semantic(lambda x: x.view(-1, 2).cos(), torch.randn(6, 8), dynamic=True)
    with program.edit("swap") as edit:
        old = edit.node("cos")
        edit.replace(old, edit.call_before(old, aten.sin.default, old.args))
    value = next(program.nodes(aten.sin)).meta["val"]
    assert not isinstance(value.shape[0], int)
    x = torch.randn(4, 8)
    sizes = [n for n in program.graph.nodes if n.op == "placeholder"]
    arguments = [x if isinstance(n.meta["val"], torch.Tensor) else x.shape[i] for i, n in enumerate(sizes)]
    assert torch.equal(program.gm(*arguments)[0], x.view(-1, 2).sin())


def test_attention_goes_as_dead_code_unless_it_drops_something() -> None:
    """Torch's tags say that attention draws random numbers, whatever its dropout."""
    q = torch.randn(1, 2, 8, 4)
    for dropout, stays in ((0.0, False), (0.5, True)):
        program = semantic(lambda x, p=dropout: F.scaled_dot_product_attention(x, x, x, dropout_p=p), q)
        with program.edit("some-pass") as edit:
            (old,) = edit.graph.find_nodes(
                op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default
            )
            edit.replace(old, edit.call_before(old, torch.ops.aten.sin.default, (old.args[0],)))
        assert (old in program.graph.nodes) is stays
