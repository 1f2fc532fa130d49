"""The text format: golden files, determinism, and what it does with unusual values."""

from __future__ import annotations

import pytest
import torch
import torch.fx as fx
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt.dump.text import COLUMNS, dump_joint_with_schedule, program_text
from graphopt.errors import UnknownNameError
from graphopt.program import InputSpec, Level, OutputSpec, Program, Signature
from graphopt.schedule import Schedule


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(8) for _ in range(2)])
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x * self.scale


_ROLES = {"PARAMETER": "parameter", "BUFFER": "buffer", "USER_INPUT": "input", "CONSTANT_TENSOR": "constant"}


def exported(
    model: nn.Module, *inputs: torch.Tensor, symbols: dict[str, str] | None = None, dynamic: bool = False
) -> Program:
    shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs) if dynamic else None
    program = torch.export.export(model, inputs, dynamic_shapes=shapes)
    signature = program.graph_signature
    specs = tuple(
        InputSpec(spec.arg.name, _ROLES[spec.kind.name], spec.target or "") for spec in signature.input_specs
    )
    outputs = tuple(
        OutputSpec(spec.arg.name, "output", str(i)) for i, spec in enumerate(signature.output_specs)
    )
    return Program("g0", Level.SEMANTIC, program.graph_module, Signature(specs, outputs), symbols or {})


def joint() -> tuple[Program, Schedule]:
    """tanh(x @ w1) @ w2 with its backward; the tanh is saved, a cosine of it runs again."""

    def step(
        w1: torch.Tensor, w2: torch.Tensor, x: torch.Tensor, tangent: torch.Tensor
    ) -> list[torch.Tensor]:
        a = torch.mm(x, w1)
        b = torch.tanh(a)
        c = torch.cos(b)
        y = torch.mm(c, w2)
        grad_w2 = torch.mm(c.t(), tangent)
        grad_c = torch.mm(tangent, w2.t())
        grad_b = -grad_c * torch.sin(b)
        grad_a = grad_b * (1 - b * b)
        return [y, torch.mm(x.t(), grad_a), grad_w2]

    shapes = ((8, 16), (16, 4), (2, 8), (2, 4))
    gm = make_fx(step, tracing_mode="fake")(*(torch.empty(shape) for shape in shapes))
    nodes = list(gm.graph.nodes)
    places = [node.name for node in nodes if node.op == "placeholder"]
    calls = [node for node in nodes if node.op == "call_function"]
    for node in calls[:2]:
        node.meta["nn_module_stack"] = {"0": ("L['self'].first", nn.Linear)}
    for node in calls[2:4]:
        node.meta["nn_module_stack"] = {"0": ("L['self'].second", nn.Linear)}
    results = [node.name for node in next(n for n in nodes if n.op == "output").args[0]]
    signature = Signature(
        (
            InputSpec(places[0], "parameter", "first.weight"),
            InputSpec(places[1], "parameter", "second.weight"),
            InputSpec(places[2], "input"),
            InputSpec(places[3], "tangent"),
        ),
        (
            OutputSpec(results[0], "output", "0"),
            OutputSpec(results[1], "gradient", places[0]),
            OutputSpec(results[2], "gradient", places[1]),
        ),
    )
    names = [node.name for node in calls]
    schedule = Schedule(tuple(names[:4]), (names[1],), (names[2], *names[4:]))
    return Program("g0", Level.JOINT, gm, signature), schedule


def renamed(program: Program) -> Program:
    """The same program with every fx node under another name."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for index, node in enumerate(program.graph.nodes):
        args = fx.node.map_arg(node.args, lambda n: copies[n])
        kwargs = fx.node.map_arg(node.kwargs, lambda n: copies[n])
        name = None if node.op == "output" else f"other_{index}"
        target = name if node.op == "placeholder" else node.target
        copies[node] = graph.create_node(node.op, target, args, kwargs, name=name)
        copies[node].meta = dict(node.meta)
    names = {node.name: copy.name for node, copy in copies.items()}
    signature = Signature(
        tuple(InputSpec(names[s.node], s.role, s.fqn) for s in program.signature.inputs),
        tuple(
            OutputSpec(names[s.node], s.role, names.get(s.target, s.target))
            for s in program.signature.outputs
        ),
    )
    return Program(program.name, program.level, fx.GraphModule(program.gm, graph), signature, program.symbols)


def test_semantic_text(golden) -> None:
    golden("semantic.txt", program_text(exported(Net(), torch.randn(4, 8))))


def test_joint_text_with_schedule(golden) -> None:
    program, schedule = joint()
    golden("joint_schedule.txt", dump_joint_with_schedule(program, schedule, pass_id="insert-checkpoints"))


def test_joint_text(golden) -> None:
    program, _ = joint()
    golden("joint.txt", program_text(program))


def test_two_captures_give_the_same_text() -> None:
    one, two = (program_text(exported(Net(), torch.randn(4, 8))) for _ in range(2))
    assert one == two


@pytest.mark.parametrize("make", [lambda: exported(Net(), torch.randn(4, 8)), lambda: joint()[0]])
def test_node_names_change_nothing(make) -> None:
    program = make()
    other = renamed(program)
    assert {n.name for n in other.graph.nodes}.isdisjoint(
        n.name for n in program.graph.nodes if n.op != "output"
    )
    assert program_text(other) == program_text(program)


def test_sizes_go_by_the_input_dimension_that_defines_them() -> None:
    plain = exported(Net(), torch.randn(4, 8), dynamic=True)
    text = program_text(plain)
    assert "  symbol     s0 = %0[0]\n" in text
    assert "  input      %0 : f32[s0,8]\n" in text
    (symbol,) = {str(n.meta["val"].shape[0]) for n in plain.graph.nodes if n.name == "x"}
    plain.symbols = {symbol: "batch"}
    text = program_text(plain)
    assert "  symbol     batch = %0[0]\n" in text
    assert "aten.gelu(%2) : f32[batch,16]" in text
    plain.symbols = {symbol: "x dim 0"}
    assert "  symbol     s0 = x dim 0\n" in program_text(plain)


def test_sizes_passed_as_inputs_go_by_their_symbol() -> None:
    def step(n: int, m: int, x: torch.Tensor) -> torch.Tensor:
        return x.view(n * 2, -1) + m

    gm = make_fx(step, tracing_mode="symbolic")(3, 5, torch.empty(3, 8))
    rows = next(node for node in gm.graph.nodes if node.op == "placeholder" and "x" in node.name)
    first, second, _ = (node for node in gm.graph.nodes if node.op == "placeholder")
    size = rows.meta["val"].shape[0]
    first.meta["val"], second.meta["val"] = size, size + 1
    specs = (InputSpec(first.name, "symbol"), InputSpec(second.name, "symbol"), InputSpec(rows.name, "input"))
    lines = program_text(Program("g0", Level.SEMANTIC, gm, Signature(specs, ()))).splitlines()
    assert lines[1:5] == [
        "  symbol     s1 = %1[1]",
        "  symbol     s0 = %1[0]",
        "  symbol     %0 : int = s0 + 1",
        "  input      %1 : f32[s0,s1]",
    ]
    assert any("= operator.mul(s0, 2) : int = 2*s0" in line for line in lines)


def test_lines_fit_and_break_after_commas() -> None:
    def wide(*xs: torch.Tensor) -> torch.Tensor:
        return torch.cat(xs)

    gm = make_fx(wide, tracing_mode="fake")(*(torch.empty(2, 3) for _ in range(60)))
    program = Program("g0", Level.SEMANTIC, gm, Signature((), ()))
    call = next(program.nodes())
    call.meta["nn_module_stack"] = {"0": ("a.layer.with.quite.a.long.path.to.its.module", nn.Module)}
    lines = program_text(program).splitlines()
    assert max(map(len, lines)) <= COLUMNS
    start = next(i for i, line in enumerate(lines) if "aten.cat" in line)
    assert lines[start].endswith(",")
    assert lines[start + 1].startswith("      %")
    joined = " ".join(line.strip() for line in lines[start:])
    assert "%58, %59]) : f32[120,3]" in joined
    assert "# a.layer.with.quite.a.long.path.to.its.module" in joined


def test_marks_and_passes_stand_beside_the_layer() -> None:
    program, _ = joint()
    first, second, *_ = program.nodes()
    text = program_text(program, marks={first.name: "recompute insert-checkpoints"})
    line = next(line for line in text.splitlines() if line.startswith("%2 ="))
    assert line.endswith("# first  <recompute insert-checkpoints>")
    second.meta["graphopt"] = type("Note", (), {"pass_id": "fuse-tanh"})()
    line = next(line for line in program_text(program).splitlines() if line.startswith("%3 ="))
    assert line.endswith("# first  <fuse-tanh>")


def test_a_shared_name_is_used_once_and_told_for_the_other() -> None:
    gm = make_fx(lambda a, b: a + b, tracing_mode="fake")(torch.empty(2), torch.empty(2))
    one, two = (n.name for n in gm.graph.nodes if n.op == "placeholder")
    specs = (InputSpec(one, "parameter", "tied"), InputSpec(two, "parameter", "tied"))
    text = program_text(Program("g0", Level.SEMANTIC, gm, Signature(specs, ())))
    assert "  parameter  tied : f32[2]\n" in text
    assert "  parameter  %0 : f32[2]                                # tied\n" in text
    assert "aten.add.Tensor(tied, %0)" in text


def test_constants_subgraphs_and_other_operands() -> None:
    class Cond(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.cond(
                x.sum() > 0, lambda a: a.to(torch.bfloat16), lambda a: a.cos().to(torch.bfloat16), (x,)
            )
            return y.max(dim=0)[0]

    text = program_text(exported(Cond(), torch.randn(3, 2)))
    assert "subgraph @true_graph_0\n" in text
    assert "cond(" in text and "@true_graph_0, @false_graph_0" in text
    assert "bf16" in text
    assert "] : bf16[2]" in text  # one of several values: %4[0]
    assert "0x" not in text


def test_values_off_the_main_device_say_so() -> None:
    gm = make_fx(lambda a, b: (a + 1, b + 1), tracing_mode="fake")(
        torch.empty(2), torch.empty(2, device="meta")
    )
    gm.graph.call_function(torch.ops.aten.neg.default, (next(iter(gm.graph.nodes)),)).meta["val"] = (
        torch.empty(2)
    )
    text = program_text(Program("g0", Level.SEMANTIC, gm, Signature((), ())))
    assert "device=cpu" in text
    assert "%1 : f32[2] @ meta" in text


def test_saved_values_that_share_a_storage_are_counted_once() -> None:
    gm = make_fx(lambda x: (torch.sin(x).view(4), torch.neg(x)), tracing_mode="fake")(torch.empty(2, 2))
    calls = [n.name for n in gm.graph.nodes if n.op == "call_function"]
    place = next(n.name for n in gm.graph.nodes if n.op == "placeholder")
    program = Program("g0", Level.JOINT, gm, Signature((InputSpec(place, "input"),), ()))
    text = dump_joint_with_schedule(program, Schedule(tuple(calls), tuple(calls[:2]), ()))
    assert "saved: 2 values, 16 B\n" in text
    assert "        16 B  %1 : f32[2,2]\n" in text
    assert "      shared  %2 : f32[4]\n" in text


def test_a_schedule_of_another_program_is_refused() -> None:
    program, schedule = joint()
    name = next(iter(program.nodes())).name
    with pytest.raises(
        UnknownNameError, match=f"unknown node of program g0 '{name}x'; did you mean '{name}'?"
    ):
        dump_joint_with_schedule(program, Schedule((f"{name}x",), (), schedule.backward))
