"""Programs as MLIR, through torch-mlir: in the torch dialect, and as linalg on tensors.

::

    // program g0 @ semantic  fingerprint=478d108c32054ed6  dialect=torch
    //   %arg0  parameter  norm.weight : f32[8]
    //   %arg1  input      %0 : f32[4,8]
    //   #0     output     %1 : f32[4,8]
    // graphopt::row_norm, 1 x: kept as opaque calls
    module {
      func.func @g0(%arg0: !torch.vtensor<[8],f32>, %arg1: !torch.vtensor<[4,8],f32>) ...

The torch dialect has the calls of the program as they are; operators that it does not know are opaque
(``torch.operator "torch.graphopt.row_norm"``). Below it nothing can be opaque: there,
operators of kernels are taken apart into their references, others into the functions that they were made of,
and writes into new values.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Literal

import torch
import torch.fx as fx

from graphopt import _torch
from graphopt.dump.listing import Listing, listing_of
from graphopt.dump.mlir_operators import operators_apart
from graphopt.errors import DumpError, brief
from graphopt.kernel_references import references_of
from graphopt.plugins.records import KernelSpec
from graphopt.program import Program

__all__ = ["Dialect", "MlirModule", "mlir_module", "program_mlir", "write_linalg", "write_torch_dialect"]

Dialect = Literal["torch", "linalg"]

# Operators of torch itself; those of all other namespaces are somebody's kernels.
_TORCHS_OWN = frozenset({"aten", "prim", "prims"})
_BATCH_NORM = torch.ops.aten.native_batch_norm.default
_TO_LINALG = (
    "builtin.module(func.func(torch-match-quantized-custom-ops),torchdynamo-export-to-torch-backend-pipeline,"
    "torch-backend-to-linalg-on-tensors-backend-pipeline{allow-non-finites=true})"
)


@dataclass(frozen=True)
class MlirModule:
    """A program as a ``torch_mlir.ir.Module`` with one function, named as the program is.

    Arguments of the function are ``inputs``: the placeholders of the program in order, then the constants
    that its graph holds (by the attribute's name). Results are the outputs of the program in order, without
    those that are ``None``, then ``written``: new values of the placeholders of these names, which the
    program writes to in place. ``opaque`` and ``references`` count the calls of operators of kernels that are
    kept and that are taken apart.
    """

    module: Any
    inputs: tuple[str, ...]
    written: tuple[str, ...]
    opaque: Mapping[str, int]
    references: Mapping[str, int]


def program_mlir(program: Program, dialect: Dialect, kernels: Mapping[str, KernelSpec]) -> str:
    """The program as MLIR text, headed by comments: what arguments and results are, by the names of the text
    format, where symbolic sizes come from, and which operators of kernels are opaque or taken apart.

    Raises ``DumpError`` as ``mlir_module`` does.
    """
    made = mlir_module(program, dialect, kernels)
    known = {spec.op for spec in kernels.values()}
    lines = [
        f"program {program.name} @ {program.level}  fingerprint={program.fingerprint}  dialect={dialect}",
        *_legend(listing_of(program), made),
        *(f"{name}, {n} x: kept as opaque calls" for name, n in made.opaque.items()),
        *(
            f"{name}, {n} x: taken apart into its {'reference' if name in known else 'own function'}"
            for name, n in made.references.items()
        ),
    ]
    lines = [f"// {line}" for line in lines] + str(made.module).splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines).rstrip("\n") + "\n"


def write_torch_dialect(program: Program, kernels: Mapping[str, KernelSpec], stream: IO[str]) -> None:
    """Write ``program_mlir(program, "torch", kernels)`` to ``stream``."""
    stream.write(program_mlir(program, "torch", kernels))


def write_linalg(program: Program, kernels: Mapping[str, KernelSpec], stream: IO[str]) -> None:
    """Write ``program_mlir(program, "linalg", kernels)`` to ``stream``."""
    stream.write(program_mlir(program, "linalg", kernels))


def mlir_module(program: Program, dialect: Dialect, kernels: Mapping[str, KernelSpec]) -> MlirModule:
    """The program in a dialect. ``kernels``: those whose references operators are taken apart into.

    Raises ``DumpError`` where torch-mlir is not installed, for an operator that has neither a reference nor
    a function (below the torch dialect), and for what torch-mlir cannot import or lower, with what it said.
    """
    importer = _importer(dialect)
    gm, inputs = _lifted(program)
    called = _custom(gm.graph)
    try:
        references = references_of(called, kernels) if dialect == "linalg" else {}
        gm, written = _functional(gm, inputs, references)
        if dialect == "linalg":
            gm = _taken_apart(gm)
    except Exception as error:
        raise DumpError(f"program {program.name} cannot be taken apart for MLIR: {brief(error)}") from error
    if dialect == "torch":
        return MlirModule(_imported(importer, program, gm), inputs, written, called, {})
    if left := _custom(gm.graph):
        raise DumpError(
            f"program {program.name} calls {next(iter(left))}, which has neither a reference nor a function",
            hint="a plugin gives it through graphopt_kernels; -f mlir keeps it as an opaque call",
        )
    module = _imported(importer, program, gm)
    _lowered(module, program)
    return MlirModule(module, inputs, written, {}, called)


def _importer(dialect: Dialect) -> Any:
    try:
        return importlib.import_module("torch_mlir.extras.fx_importer")
    except ImportError as error:
        raise DumpError(
            f"MLIR ({dialect}) is written through torch-mlir, which cannot be imported: {brief(error)}",
            hint="pip install 'graphopt[mlir]'; it has wheels for Linux on x86-64",
        ) from error


def _lifted(program: Program) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """A copy in which constants are arguments and the output is a flat list, with names of arguments.

    Of metadata it has the values alone: positions in source files tell machines apart, not programs.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    constants: dict[str, fx.Node] = {}
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    held = [node for node in program.graph.nodes if _is_constant(node)]
    for node in placeholders:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta["val"] = node.meta["val"]
    mode = _torch.fake_mode_of([leaf for node in program.graph.nodes for leaf in _tensors(node)])
    for node in held:
        name = str(node.target)
        if name not in constants:
            constants[name] = graph.placeholder(f"constant_{len(constants)}")
            constants[name].meta["val"] = _torch.fake_attribute(node, mode)
        copies[node] = constants[name]
    for node in program.graph.nodes:
        if node in copies or node.target is _torch.set_grad_enabled():
            # What autograd records is nothing to MLIR.
            continue
        if node.op == "output":
            leaves = torch.utils._pytree.tree_leaves(node.args[0])
            kept = [leaf for leaf in leaves if leaf is not None]
            graph.output([copies[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in kept])
            continue
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        copies[node].meta = {"val": node.meta["val"]} if "val" in node.meta else {}
    return fx.GraphModule(program.gm, graph), (*(node.name for node in placeholders), *constants)


def _is_constant(node: fx.Node) -> bool:
    if node.op != "get_attr":
        return False
    value: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return isinstance(value, torch.Tensor)


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    value = node.meta.get("val")
    return [value] if isinstance(value, torch.Tensor) else []


def _custom(graph: fx.Graph) -> dict[str, int]:
    """How often each operator is called that is not torch's own."""
    names = (
        node.target._schema.name for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)
    )
    count = Counter(name for name in names if name.partition("::")[0] not in _TORCHS_OWN)
    return dict(sorted(count.items()))


def _functional(
    gm: fx.GraphModule, inputs: Sequence[str], references: dict[Any, Callable[..., Any]]
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """Without writes, without regions of autocast and without the operators of ``references``; the names of
    the arguments whose new values are results now."""
    used = {node.target for node in gm.graph.nodes}
    writes = any(map(_writes, gm.graph.nodes))
    if writes or used & references.keys() or _torch.enter_autocast() in used:
        gm = _torch.taken_apart(gm, _values(gm), references | {_BATCH_NORM: _batch_norm_that_says_so})
    if any(map(_torch.writes_in_place, gm.graph.nodes)):
        gm = _torch.without_writes(gm, _values(gm))
    return gm, _writes_returned(gm, inputs)


def _writes(node: fx.Node) -> bool:
    if node.target in (torch.ops.aten.batch_norm.default, _BATCH_NORM):
        return bool(node.args[5])
    return _torch.writes_in_place(node)


def _batch_norm_that_says_so(*arguments: Any) -> Any:
    """In training the operator writes to the running statistics, which its schema does not say."""
    if arguments[3] is None or not arguments[5]:
        return NotImplemented
    return torch.ops.aten._native_batch_norm_legit.default(*arguments)


def _taken_apart(gm: fx.GraphModule) -> fx.GraphModule:
    """The operators that torch-mlir lowers."""
    table = importlib.import_module("torch_mlir.extras.fx_decomp_util").get_decomposition_table()
    gm = _torch.taken_apart(gm, _values(gm), table | operators_apart())
    writes = any(map(_torch.writes_in_place, gm.graph.nodes))
    return _torch.without_writes(gm, _values(gm)) if writes else gm


def _values(gm: fx.GraphModule) -> list[Any]:
    return [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]


def _writes_returned(gm: fx.GraphModule, inputs: Sequence[str]) -> tuple[str, ...]:
    """Let what is copied into an argument be a result instead; the names of these arguments."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    names = dict(zip(placeholders, inputs, strict=True))
    latest: dict[fx.Node, fx.Node] = {}
    for node in list(gm.graph.nodes):
        if node.target is torch.ops.aten.copy_.default and node.args[0] in names:
            argument, value = node.args[:2]
            latest[argument] = value
            node.replace_all_uses_with(value)
            gm.graph.erase_node(node)
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    results = [value for value in torch.utils._pytree.tree_leaves(output.args[0]) if value is not None]
    output.args = ([*results, *latest.values()],)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return tuple(names[argument] for argument in latest)


def _imported(importer: Any, program: Program, gm: fx.GraphModule) -> Any:
    ir = importlib.import_module("torch_mlir.ir")
    context = ir.Context()
    importlib.import_module("torch_mlir.dialects.torch").register_dialect(context)
    made = importer.FxImporter(context=context)
    try:
        made.import_stateless_graph(gm.graph, func_name=program.name)
        made.module.operation.verify()
    except Exception as error:
        raise DumpError(f"torch-mlir cannot import program {program.name}: {_why(error)}") from error
    return made.module


def _lowered(module: Any, program: Program) -> None:
    """Lower a module in the torch dialect to linalg on tensors, in place."""
    passmanager = importlib.import_module("torch_mlir.passmanager")
    with module.context as context, _diagnostics(context) as said:
        try:
            passmanager.PassManager.parse(_TO_LINALG).run(module.operation)
        except Exception as error:
            why = said[0] if said else _why(error)
            raise DumpError(f"torch-mlir cannot lower program {program.name} to linalg: {why}") from error


def _why(error: BaseException) -> str:
    """What MLIR complains of, which stands under a line that says no more than that it failed."""
    said = [line for line in str(error).splitlines() if line.startswith("error:")]
    return said[0].removeprefix("error: ").removeprefix("unknown: ") if said else brief(error)


class _diagnostics:
    """The first lines of the errors of a context, which would go to stderr."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._said: list[str] = []

    def __enter__(self) -> list[str]:
        # Passes may say what is wrong without failing themselves; captured errors must be taken by someone.
        self._context.emit_error_diagnostics = True
        self._handler = self._context.attach_diagnostic_handler(self._hear)
        return self._said

    def __exit__(self, *exception: object) -> None:
        self._handler.detach()

    def _hear(self, diagnostic: Any) -> bool:
        self._said.append(str(diagnostic.message).partition("\n")[0])
        return True


def _legend(listing: Listing, made: MlirModule) -> Iterator[str]:
    for name, definition in listing.symbols.items():
        yield f"  symbol {name} = {definition}"
    rows = [
        (f"%arg{k}", line.role, f"{line.name} : {line.type}", line.note) for k, line in _arguments(listing)
    ]
    results = list(listing.outputs)
    rows += [(f"#{k}", line.role, line.name, line.note) for k, line in enumerate(results)]
    names = {line.node.name: line.name for line in listing.inputs}
    rows += [
        (f"#{len(results) + k}", "write", names.get(name, name), "") for k, name in enumerate(made.written)
    ]
    for place, role, what, note in rows:
        yield f"  {place:<6} {role:<9}  {what}" + (f"  # {note}" if note else "")


def _arguments(listing: Listing) -> Iterator[tuple[int, Any]]:
    """Inputs in the order of the function: placeholders, then constants."""
    ordered: list[Any] = [line for line in listing.inputs if line.role != "constant"]
    ordered += [line for line in listing.inputs if line.role == "constant"]
    return enumerate(ordered)
