"""The Triton source of a kernel: one readable function, the same text for the same graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from graphopt_kernels.emit.build import Built, NotFusible
from graphopt_kernels.emit.index import Affine
from graphopt_kernels.emit.loops import Loop, Loops, loops_of, power_of_two
from graphopt_kernels.emit.pointwise import HELPERS, TEXTS
from graphopt_kernels.emit.tile import Condition, Store, Value, computed_in

__all__ = ["TRITON", "KernelText", "Writer", "kernel_text", "needed"]

TRITON = {
    torch.float64: "tl.float64",
    torch.float32: "tl.float32",
    torch.float16: "tl.float16",
    torch.bfloat16: "tl.bfloat16",
    torch.int64: "tl.int64",
    torch.int32: "tl.int32",
    torch.int16: "tl.int16",
    torch.int8: "tl.int8",
    torch.uint8: "tl.uint8",
    torch.bool: "tl.int1",
}

_COMBINE = {"max": "_max", "min": "_min"}


@dataclass(frozen=True)
class KernelText:
    """``name`` of the kernel, ``function``: its decorated source; ``helpers``: functions that it calls, by
    name; ``loops``: what it runs over; ``partial``: numbers of outputs of which each program writes a part,
    to be added up; ``finish``: the name of a second kernel in ``function`` that adds up what the first
    leaves, if there is one."""

    name: str
    function: str
    helpers: tuple[str, ...]
    loops: Loops
    partial: tuple[int, ...] = ()
    finish: str | None = None


def kernel_text(built: Built, name: str, inputs: Sequence[str], outputs: Sequence[str]) -> KernelText:
    """The source of a kernel. ``inputs`` and ``outputs`` are what its pointers are called. Raises
    ``graphopt_kernels.emit.build.NotFusible`` for what no kernel of these shapes does."""
    for tensor in (*built.inputs, *built.outputs):
        if tensor.dtype not in TRITON:
            raise NotFusible.because(f"Triton has no {tensor.dtype}")
    return Writer(built, name, inputs, outputs).written()


class Writer:
    def __init__(self, built: Built, name: str, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        self._built, self._name = built, name
        self._inputs, self._outputs = inputs, outputs
        self.loops = self._loops_of(built)
        self._lines: list[str] = []
        self._indent = 1
        self._helpers: dict[str, None] = {}
        self._pass = ""
        self._two = self.loops.shape != "pointwise"
        self._wide = any(_reach(t) >= 2**31 for t in (*built.inputs, *built.outputs))

    def _loops_of(self, built: Built) -> Loops:
        return loops_of(built)

    # --- the whole ---------------------------------------------------------------------------

    def written(self) -> KernelText:
        shape = self.loops.shape
        partial: tuple[int, ...] = ()
        if shape == "pointwise":
            self._pointwise()
        elif shape == "rows":
            self._rows()
        elif shape == "looped rows":
            self._looped_rows()
        else:
            partial = self._columns()
        blocks = ["XBLOCK: tl.constexpr"] + (["RBLOCK: tl.constexpr"] if self._two else [])
        arguments = [*self._inputs, *self._outputs, *blocks]
        head = ["@jit", f"def {self._name}("]
        head += [f"    {argument}," for argument in arguments] + ["):"]
        return KernelText(
            self._name,
            "\n".join([*head, *self._lines]) + "\n",
            tuple(name for name in HELPERS if name in self._helpers),
            self.loops,
            partial,
        )

    def _line(self, text: str) -> None:
        self._lines.append("    " * self._indent + text)

    def _pointwise(self) -> None:
        self._line(f"xindex = {self._program(0)} * XBLOCK + tl.arange(0, XBLOCK)")
        self._line(f"xmask = xindex < {self.loops.rows}")
        self._spread(self.loops.outer, "xindex")
        self._values(self._built.values)
        for store in self._built.stores:
            self._store(store)

    def _rows(self) -> None:
        self._line(f"xindex = ({self._program(0)} * XBLOCK + tl.arange(0, XBLOCK))[:, None]")
        self._line(f"xmask = xindex < {self.loops.rows}")
        self._spread(self.loops.outer, "xindex")
        self._line("rindex = tl.arange(0, RBLOCK)[None, :]")
        self._line(f"rmask = rindex < {self.loops.columns}")
        self._spread(self.loops.inner, "rindex")
        self._values(self._built.values)
        for store in self._built.stores:
            self._store(store)

    def _looped_rows(self) -> None:
        """Rows too long to hold: each reduction that others wait for takes a loop of its own."""
        tile = self._built.tile
        self._line(f"xindex = ({self._program(0)} * XBLOCK + tl.arange(0, XBLOCK))[:, None]")
        self._line(f"xmask = xindex < {self.loops.rows}")
        self._spread(self.loops.outer, "xindex")
        stages = self._stages()
        along = {value: bool(value.axes & tile.reduced) for value in self._built.values}
        last = max(stages.values(), default=0)
        for stage in range(last + 1):
            self._pass = ""
            here = [v for v in self._built.values if stages[v] == stage]
            self._values([v for v in here if not along[v] and v.kind != "row"])
            reductions = [v for v in here if v.kind == "row"]
            stores = [s for s in self._built.stores if along[s.value] and stages[s.value] == stage]
            whole = [
                s
                for s in self._built.stores
                if not along[s.value] and stages[s.value] == stage and s.position.axes & tile.reduced
            ]
            if reductions or stores or whole:
                for value in reductions:
                    dtype = TRITON[value.dtype]
                    self._line(
                        f"{self._named(value)}_all = tl.full((XBLOCK, RBLOCK), {_identity(value)}, {dtype})"
                    )
                self._line(f"for start in range(0, {self.loops.columns}, RBLOCK):")
                self._indent += 1
                self._line("rindex = (start + tl.arange(0, RBLOCK))[None, :]")
                self._line(f"rmask = rindex < {self.loops.columns}")
                self._spread(self.loops.inner, "rindex")
                self._pass = f"_{stage}"
                wanted = needed([v.args[0] for v in reductions] + [s.value for s in (*stores, *whole)])
                self._values([v for v in self._built.values if v in wanted and along[v]])
                for value in reductions:
                    running, operand = f"{self._name_of(value)}_all", self._masked(value, "rmask")
                    self._line(f"{running} = {self._combined(value, running, operand)}")
                for store in (*stores, *whole):
                    self._store(store)
                self._indent -= 1
                self._pass = ""
                for value in reductions:
                    name = self._named(value)
                    self._line(f"{name} = {self._across(value, f'{name}_all', 1)}[:, None]")
        for store in self._built.stores:
            if not along[store.value] and not store.position.axes & tile.reduced:
                self._store(store)

    def _columns(self) -> tuple[int, ...]:
        """Sums over rows, beside whatever a row gives: each program adds up the rows that it takes."""
        columns = [v for v in self._built.values if v.kind == "column"]
        partial = tuple(s.output for s in self._built.stores if s.value.kind == "column")
        self._line("rindex = (tl.program_id(1) * RBLOCK + tl.arange(0, RBLOCK))[None, :]")
        self._line(f"rmask = rindex < {self.loops.columns}")
        self._spread(self.loops.inner, "rindex")
        for value in columns:
            if value.payload != "sum":
                raise NotFusible.because(f"a {value.payload} over the rows of the kernel")
            self._line(f"{self._named(value)} = tl.zeros((1, RBLOCK), {TRITON[value.dtype]})")
        self._line(
            f"for start in range(tl.program_id(0) * XBLOCK, {self.loops.rows}, tl.num_programs(0) * XBLOCK):"
        )
        self._indent += 1
        self._line(
            "xindex = (start + tl.arange(0, XBLOCK))[:, None]" + (".to(tl.int64)" if self._wide else "")
        )
        self._line(f"xmask = xindex < {self.loops.rows}")
        self._spread(self.loops.outer, "xindex")
        self._values([v for v in self._built.values if v.kind != "column"])
        for value in columns:
            self._line(f"{self._named(value)} += tl.sum({self._masked(value, 'xmask')}, 0)[None, :]")
        for store in self._built.stores:
            if store.value.kind != "column":
                self._store(store)
        self._indent -= 1
        for store in self._built.stores:
            if store.value.kind == "column":
                at = f"{self._outputs[store.output]} + tl.program_id(0) * {self.loops.columns} + rindex"
                self._line(f"tl.store({at}, {self._named(store.value)}, mask=rmask)")
        return partial

    # --- indices -----------------------------------------------------------------------------

    def _program(self, axis: int) -> str:
        return f"tl.program_id({axis})" + (".to(tl.int64)" if self._wide else "")

    def _spread(self, loops: Sequence[Loop], index: str) -> None:
        """Lines that take a running index apart into the loops that it runs over."""
        rest = 1
        names = []
        for loop in reversed(loops):
            text = index if rest == 1 else f"{index} // {rest}"
            rest *= loop.extent
            if loop is not loops[0]:
                text = f"{text} % {loop.extent}" if text == index else f"({text}) % {loop.extent}"
            names.append(f"{loop.name} = {text}")
        for line in reversed(names):
            self._line(line)

    def _position(self, position: Affine) -> str:
        parts = []
        for atom, factor in self.loops.terms(position):
            name = self._loop_name(atom) if isinstance(atom, Loop) else self._name_of(atom)
            parts.append(name if factor == 1 else f"-{name}" if factor == -1 else f"{name} * {factor}")
        if position.constant or not parts:
            parts.append(str(position.constant))
        return " + ".join(parts).replace("+ -", "- ")

    def _loop_name(self, loop: Loop) -> str:
        return loop.name

    def _masks(self, conditions: Sequence[Condition], axes: Iterable[object]) -> list[str]:
        reduced = self._built.tile.reduced
        across = set(axes)
        masks = []
        if across - reduced:
            masks.append("xmask")
        if across & reduced and not self._full_row:
            masks.append("rmask")
        masks += [self._within(condition) for condition in conditions]
        return masks

    @property
    def _full_row(self) -> bool:
        """Whether a row fills its block, so that nothing has to be masked."""
        return self.loops.shape == "rows" and power_of_two(self.loops.columns) == self.loops.columns

    def _within(self, condition: Condition) -> str:
        loop = next(p for p in (*self.loops.outer, *self.loops.inner) if condition.axis in p.axes)
        low, high = max(condition.low, 0), min(condition.high, condition.axis.extent)
        name = self._loop_name(loop)
        parts = []
        if low > 0:
            parts.append(f"({name} >= {low})")
        if high < condition.axis.extent:
            parts.append(f"({name} < {high})")
        return " & ".join(parts) or f"({name} >= 0)"

    # --- values ------------------------------------------------------------------------------

    def _named(self, value: Value) -> str:
        kind = value.payload if value.kind in ("op", "row", "column") else value.kind
        if value.kind == "load":
            return f"{self._inputs[value.payload[0]].removesuffix('_ptr')}_{value.number}"
        if value.kind in ("row", "column"):
            kind = f"{value.kind}_{kind}"
        return f"{kind}_{value.number}"

    def _name_of(self, value: Value) -> str:
        """What a value is called where it is read; in a loop over a row its copy of this pass."""
        along = bool(value.axes & self._built.tile.reduced)
        return self._named(value) + (self._pass if along else "")

    def _text(self, value: Value) -> str:
        if value.kind == "constant":
            return _number(value.payload)
        return self._name_of(value)

    def _values(self, values: Iterable[Value]) -> None:
        for value in values:
            if value.kind == "constant":
                continue
            self._line(f"{self._name_of(value)} = {self._expression(value)}")

    def _expression(self, value: Value) -> str:
        if value.kind == "load":
            return self._load(value)
        if value.kind == "index":
            return f"({self._position(value.payload)}).to(tl.int64)"
        if value.kind == "within":
            return self._within(value.payload)
        if value.kind == "row":
            return f"{self._across(value, self._masked(value, 'rmask'), 1)}[:, None]"
        if value.payload == "to":
            return self._converted(value)
        return self._operation(value)

    def _operation(self, value: Value) -> str:
        texts = [self._text(argument) for argument in value.args]
        if all(argument.kind == "constant" for argument in value.args):
            texts[0] = self._filled(value.args[0])
        template = TEXTS[value.payload]
        dtype = value.args[-1].dtype if value.payload == "where" else value.args[0].dtype
        text = template(texts, computed_in(dtype))
        for helper in HELPERS:
            if f"{helper}(" in text:
                self._helpers[helper] = None
        return text

    def _filled(self, value: Value) -> str:
        """A constant as a tensor."""
        shape = "(1, 1)" if self._two else "(1,)"
        return f"tl.full({shape}, {_number(value.payload)}, {TRITON[computed_in(value.dtype)]})"

    def _converted(self, value: Value) -> str:
        (source,) = value.args
        text = self._filled(source) if source.kind == "constant" else self._text(source)
        if value.dtype in (torch.float16, torch.bfloat16):
            return f"{text}.to({TRITON[value.dtype]}).to(tl.float32)"
        if computed_in(source.dtype) == value.dtype:
            return text
        return f"{text}.to({TRITON[value.dtype]})"

    def _load(self, value: Value) -> str:
        source, position, conditions = value.payload
        at = self._spanning(position, value.axes)
        masks = self._masks(conditions, value.axes)
        pointer = f"{self._inputs[source]} + {at}"
        text = f"tl.load({pointer}, mask={' & '.join(masks)}, other=0)" if masks else f"tl.load({pointer})"
        if value.dtype in (torch.float16, torch.bfloat16) and not self._as_stored(value):
            text += ".to(tl.float32)"
        return text

    def _as_stored(self, value: Value) -> bool:
        """Whether what is loaded is used in the dtype that it has in memory."""
        return False

    def _spanning(self, position: Affine, axes: Iterable[object]) -> str:
        """The text of a position, in the shape that its masks have."""
        reduced = self._built.tile.reduced
        text = self._position(position)
        kinds = {axis in reduced for axis in axes}
        reached = {axis in reduced for axis in position.axes}
        for atom, _ in position.terms:
            if isinstance(atom, Value):
                reached |= {axis in reduced for axis in atom.axes}
        for kind in sorted(kinds - reached):
            text += " + 0 * rindex" if kind else " + 0 * xindex"
        return text

    def _store(self, store: Store) -> None:
        reduced = self._built.tile.reduced
        axes = set(store.position.axes)
        text = self._position(store.position)
        if not axes - reduced and self.loops.shape != "columns":
            # One element, or one row: the first program writes it.
            text += " + 0 * xindex"
        masks = ["xmask"]
        if axes & reduced and not self._full_row:
            masks.append("rmask")
        value = store.value
        what = self._filled(value) if value.kind == "constant" else self._name_of(value)
        self._line(f"tl.store({self._outputs[store.output]} + {text}, {what}, mask={' & '.join(masks)})")

    # --- reductions --------------------------------------------------------------------------

    def _masked(self, value: Value, mask: str) -> str:
        """The operand of a reduction, elements beyond the end replaced by what changes nothing."""
        (operand,) = value.args
        text = self._filled(operand) if operand.kind == "constant" else self._name_of(operand)
        tile = self._built.tile
        along = tile.reduced if mask == "rmask" else tile.outer
        if not operand.axes & along:
            text = f"tl.broadcast_to({text}, (XBLOCK, RBLOCK))"
        if mask == "rmask" and self._full_row:
            return text
        return f"tl.where({mask}, {text}, {_identity(value)})"

    def _across(self, value: Value, operand: str, axis: int) -> str:
        if value.payload == "sum":
            return f"tl.sum({operand}, {axis})"
        helper = _COMBINE[value.payload]
        if not value.dtype.is_floating_point:
            return f"tl.{value.payload}({operand}, {axis})"
        self._helpers[helper] = None
        return f"tl.reduce({operand}, {axis}, {helper})"

    def _combined(self, value: Value, running: str, operand: str) -> str:
        if value.payload == "sum":
            return f"{running} + {operand}"
        return TEXTS["maximum" if value.payload == "max" else "minimum"]((running, operand), value.dtype)

    def _stages(self) -> dict[Value, int]:
        """The loop over a row in which each value is first at hand."""
        stages: dict[Value, int] = {}
        for value in self._built.values:
            stages[value] = max((stages[a] + (a.kind == "row") for a in value.args), default=0)
        return stages


def _reach(tensor: torch.Tensor) -> int:
    """Elements between the first and the last of a tensor."""
    return sum(s * (n - 1) for s, n in zip(tensor.stride(), tensor.shape, strict=True))


def needed(values: Iterable[Value]) -> set[Value]:
    """Values and what they are made from, row reductions and what is beyond them left out."""
    found: set[Value] = set()
    stack = list(values)
    while stack:
        value = stack.pop()
        if value in found or value.kind == "row":
            continue
        found.add(value)
        stack += value.args
    return found


def _number(number: bool | int | float) -> str:
    if isinstance(number, float) and (number != number or number in (float("inf"), float("-inf"))):
        return f'float("{number}")'
    return repr(number)


def _identity(value: Value) -> str:
    if value.payload == "sum":
        return "0.0" if value.dtype.is_floating_point else "0"
    if value.dtype.is_floating_point:
        return _number(float("-inf") if value.payload == "max" else float("inf"))
    if value.dtype == torch.bool:
        return "False" if value.payload == "max" else "True"
    limits = torch.iinfo(value.dtype)
    return str(limits.min if value.payload == "max" else limits.max)
