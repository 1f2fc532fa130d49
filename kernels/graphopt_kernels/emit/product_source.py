"""The Triton source of a product of matrices with what is computed before and after it.

What the operands are computed from is loaded and computed a tile at a time inside of the loop that adds up;
what is computed from the result follows the loop. Expressions are those of other kernels (``source.Writer``):
here is only where they stand and which way their tiles lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from graphopt_kernels.emit.build import Built, NotFusible
from graphopt_kernels.emit.index import Affine, Axis
from graphopt_kernels.emit.loops import Loop, Loops
from graphopt_kernels.emit.pointwise import HELPERS
from graphopt_kernels.emit.product_build import BuiltProduct
from graphopt_kernels.emit.product_loops import ProductLoops, Tiling, product_loops
from graphopt_kernels.emit.source import TRITON, KernelText, Writer
from graphopt_kernels.emit.tile import Condition, Store, Value

__all__ = ["product_text"]

_HALF = (torch.float16, torch.bfloat16)


def product_text(
    built: BuiltProduct, tiling: Tiling, name: str, inputs: Sequence[str], outputs: Sequence[str]
) -> KernelText:
    """The source of a product's kernel, and of the one that adds up its parts if it has any. ``inputs`` and
    ``outputs`` are what its pointers are called. Raises ``NotFusible`` for dtypes that Triton has not."""
    for tensor in (*built.inputs, *built.outputs):
        if tensor.dtype not in TRITON:
            raise NotFusible.because(f"Triton has no {tensor.dtype}")
    return _ProductWriter(built, tiling, name, inputs, outputs).written()


class _ProductWriter(Writer):
    loops: ProductLoops

    def __init__(
        self,
        built: BuiltProduct,
        tiling: Tiling,
        name: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
    ) -> None:
        super().__init__(built, name, inputs, outputs)
        self._dot, self._tiling = built.dot, tiling
        self._multiplied = built.dtype
        roles = built.roles
        self._row_axes, self._column_axes, self._inner_axes = map(
            frozenset, (roles.rows, roles.columns, roles.inner)
        )
        self._side = ""
        left, right = (_made_from([operand], self._dot) for operand in self._dot.args)
        self._left = [v for v in built.values if v in left]
        self._right = [v for v in built.values if v in right]
        self._on_both = {v for v in left & right if v.axes & self._inner_axes}
        self._readers: dict[Value, int] = {}
        for value in built.values:
            for argument in value.args:
                self._readers[argument] = self._readers.get(argument, 0) + 1
        for store in built.stores:
            self._readers[store.value] = self._readers.get(store.value, 0) + 1
        _, rows, columns, inner = self.loops.sizes
        steps = -(-inner // tiling.inner)
        self._steps = -(-steps // tiling.parts)
        self._full = {
            "m": rows % tiling.rows == 0,
            "n": columns % tiling.columns == 0,
            "k": self._steps * tiling.parts * tiling.inner == inner,
        }

    def _loops_of(self, built: Built) -> Loops:
        assert isinstance(built, BuiltProduct)
        return product_loops(built)

    # --- the whole ---------------------------------------------------------------------------

    def written(self) -> KernelText:
        split = self._tiling.parts > 1
        results = ["partial_ptr"] if split else list(self._outputs)
        taken = self._taken([*self._left, *self._right] if split else self._built.values)
        text = self._head(self._name, [*taken, *results], loop=True)
        self._place(loop=True)
        if self._full["k"]:
            self._line(f"tl.static_assert({self.loops.sizes[-1]} % BLOCK_K == 0)")
        before = [v for v in self._built.values if v in {*self._left, *self._right} and not self._along(v)]
        self._values(before)
        self._accumulate()
        if split:
            batch, rows, columns, _ = self.loops.sizes
            at = f"part * {batch * rows * columns} + {self._partial()}"
            self._line(
                f"tl.store(partial_ptr + {at}, {self._named(self._dot)}{self._mask_text(self._tile_masks())})"
            )
        else:
            self._after(set(before))
        functions = [text + "\n".join(self._lines) + "\n"]
        finish = None
        if split:
            finish = f"{self._name}_finish"
            functions.append(self._finishing(finish))
        return KernelText(
            self._name,
            "\n\n".join(functions),
            tuple(name for name in HELPERS if name in self._helpers),
            self.loops,
            finish=finish,
        )

    def _taken(self, values: Iterable[Value]) -> list[str]:
        read = {value.payload[0] for value in values if value.kind == "load"}
        return [name for number, name in enumerate(self._inputs) if number in read]

    def _head(self, name: str, pointers: Sequence[str], *, loop: bool) -> str:
        blocks = ["BLOCK_M", "BLOCK_N"] if self._tiling.kind == "tiles" else [self._only_block]
        if loop:
            blocks.append("BLOCK_K")
        if self._tiling.kind == "tiles" and not self._one_row:
            blocks.append("GROUP_M")
        if self._tiling.parts > 1:
            blocks.append("PARTS")
        if loop and self._takes_precision:
            blocks.append("PRECISION")
        # A length that the compiler does not know: it would write out short loops whole, and spill registers.
        length = [] if not loop else ["steps"] if self._tiling.parts > 1 else ["inner"]
        arguments = [*pointers, *length, *(f"{block}: tl.constexpr" for block in blocks)]
        return "\n".join(["@jit", f"def {name}(", *(f"    {a}," for a in arguments), "):"]) + "\n"

    @property
    def _takes_precision(self) -> bool:
        return self._tiling.kind == "tiles" and self._multiplied == torch.float32

    @property
    def _one_row(self) -> bool:
        """Whether tiles lie beside each other alone."""
        return self.loops.sizes[1] <= self._tiling.rows

    @property
    def _only_block(self) -> str:
        return "BLOCK_N" if self._tiling.kind == "row" else "BLOCK_M"

    def _place(self, *, loop: bool) -> None:
        """Lines that say which tile of which matrix a program computes."""
        batch, rows, columns, _ = self.loops.sizes
        tiles = " * ".join(
            f"tl.cdiv({size}, {block})"
            for size, block, kind in ((rows, "BLOCK_M", "row"), (columns, "BLOCK_N", "column"))
            if self._tiling.kind != kind
        )
        self._line(f"program = {self._program(0)}")
        if loop and self._tiling.parts > 1:
            self._line("part = program % PARTS")
            self._line("program = program // PARTS")
        if batch > 1:
            self._line(f"batch = program // ({tiles})")
            self._line(f"program = program % ({tiles})")
            if len(self.loops.batch) > 1:
                self._spread(self.loops.batch, "batch")
        if self._tiling.kind == "tiles":
            if self._one_row:
                self._tile_of("m", "", rows, "[:, None]", self.loops.of_rows)
                self._tile_of("n", "program", columns, "[None, :]", self.loops.of_columns)
                return
            self._line("# GROUP_M rows of tiles go down together: what they read stays in the cache.")
            self._line(f"across = tl.cdiv({columns}, BLOCK_N)")
            self._line("first = program // (GROUP_M * across) * GROUP_M")
            self._line(f"tall = tl.minimum(tl.cdiv({rows}, BLOCK_M) - first, GROUP_M)")
            self._line("mtile = first + program % (GROUP_M * across) % tall")
            self._line("ntile = program % (GROUP_M * across) // tall")
            self._tile_of("m", "mtile", rows, "[:, None]", self.loops.of_rows)
            self._tile_of("n", "ntile", columns, "[None, :]", self.loops.of_columns)
        elif self._tiling.kind == "row":
            self._tile_of("n", "program", columns, "[None, :]", self.loops.of_columns)
        else:
            self._tile_of("m", "program", rows, "[:, None]", self.loops.of_rows)

    def _tile_of(self, letter: str, number: str, size: int, way: str, loops: Sequence[Loop]) -> None:
        block = f"BLOCK_{letter.upper()}"
        index = f"tl.arange(0, {block})"
        if number:
            index = f"({number} * {block} + {index})"
        elif self._wide:
            index += ".to(tl.int64)"
        self._line(f"{letter}index = {index}{way}")
        if self._full[letter]:
            self._line(f"tl.static_assert({size} % {block} == 0)")
        else:
            self._line(f"{letter}mask = {letter}index < {size}")
        if len(loops) > 1:
            self._spread(loops, f"{letter}index")

    def _accumulate(self) -> None:
        """The loop that adds up."""
        tiling, dot = self._tiling, self._named(self._dot)
        left, right = self._dot.args
        shape = {"tiles": "BLOCK_M, BLOCK_N", "row": "BLOCK_K, BLOCK_N", "column": "BLOCK_M, BLOCK_K"}
        total = dot if tiling.kind == "tiles" else f"{dot}_all"
        self._line(f"{total} = tl.zeros(({shape[tiling.kind]}), {TRITON[self._dot.dtype]})")
        if tiling.parts > 1:
            self._line("for step in range(steps):")
            start = "(part * steps + step) * BLOCK_K"
        else:
            self._line("for start in range(0, inner, BLOCK_K):")
            start = "start"
        self._indent += 1
        index = f"{start} + tl.arange(0, BLOCK_K)"
        self._line(f"kindex = ({index}).to(tl.int64)" if self._wide else f"kindex = {index}")
        if tiling.kind == "tiles":
            with self._on("a"):
                self._inner_lines("[None, :]", self._left)
                first = self._operand(left, "BLOCK_M, BLOCK_K", self._row_axes)
            with self._on("b"):
                self._inner_lines("[:, None]", self._right)
                second = self._operand(right, "BLOCK_K, BLOCK_N", self._column_axes)
            how = ", input_precision=PRECISION" if self._takes_precision else ""
            if self._dot.dtype != torch.float32:
                how = f", out_dtype={TRITON[self._dot.dtype]}"
            self._line(f"{total} = tl.dot({first}, {second}, {total}{how})")
            self._indent -= 1
            return
        by_row = tiling.kind == "row"
        both = [v for v in self._built.values if v in {*self._left, *self._right}]
        self._inner_lines("[:, None]" if by_row else "[None, :]", both)
        first, second = (self._factor(operand) for operand in (left, right))
        self._line(f"{total} += {first} * {second}")
        self._indent -= 1
        self._line(f"{dot} = tl.sum({total}, {0 if by_row else 1}){'[None, :]' if by_row else '[:, None]'}")

    def _inner_lines(self, way: str, values: Sequence[Value]) -> None:
        """The indices along the inner axis, the way that they lie in an operand's tile, and its values."""
        self._line(f"{self._side}kindex = kindex{way}" if self._side else f"kindex = kindex{way}")
        if not self._full["k"]:
            self._line(f"{self._side}kmask = {self._side}kindex < {self.loops.sizes[-1]}")
        if len(self.loops.inner) > 1:
            named = [Loop(self._loop_name(loop), loop.axes) for loop in self.loops.inner]
            self._spread(named, f"{self._side}kindex")
        self._values([value for value in values if self._along(value)])

    @contextmanager
    def _on(self, side: str) -> Iterator[None]:
        self._side = side
        yield
        self._side = ""

    def _operand(self, value: Value, shape: str, across: frozenset[Axis]) -> str:
        """A tile that tensor cores multiply: whole, of the operands' dtype, 0 beyond the end."""
        text = self._beyond(value)
        if not (value.axes & across and value.axes & self._inner_axes):
            text = f"tl.broadcast_to({text}, ({shape}))"
        if self._multiplied in _HALF and not self._as_stored(value):
            text += f".to({TRITON[self._multiplied]})"
        return text

    def _factor(self, value: Value) -> str:
        text = self._beyond(value)
        if not self._multiplied.is_floating_point:
            text += f".to({TRITON[self._dot.dtype]})"
        return text

    def _beyond(self, value: Value) -> str:
        """A value with 0 beyond the end of the inner axis. Loads have it there already."""
        text = self._filled(value) if value.kind == "constant" else self._name_of(value)
        if self._full["k"] or (value.kind == "load" and value.axes & self._inner_axes):
            return text
        return f"tl.where({self._side}kmask, {text}, 0)"

    def _after(self, known: set[Value]) -> None:
        """What is computed from the result, and what is stored."""
        wanted = _made_from([store.value for store in self._built.stores], self._dot)
        wanted |= _made_from(
            [a for s in self._built.stores for a, _ in s.position.terms if isinstance(a, Value)], self._dot
        )
        self._values([v for v in self._built.values if v in wanted - known and v is not self._dot])
        for store in self._built.stores:
            self._store(store)

    def _finishing(self, name: str) -> str:
        """A second kernel that adds up the parts, always in the same order."""
        self._lines = []
        wanted = _made_from([store.value for store in self._built.stores], self._dot)
        taken = self._taken([v for v in self._built.values if v in wanted])
        text = self._head(name, ["partial_ptr", *taken, *self._outputs], loop=False)
        self._place(loop=False)
        batch, rows, columns, _ = self.loops.sizes
        dot = self._named(self._dot)
        shape = {"tiles": "BLOCK_M, BLOCK_N", "row": "1, BLOCK_N", "column": "BLOCK_M, 1"}[self._tiling.kind]
        self._line(f"{dot} = tl.zeros(({shape}), {TRITON[self._dot.dtype]})")
        self._line("for part in range(PARTS):")
        self._indent += 1
        at = f"part * {batch * rows * columns} + {self._partial()}"
        masks = self._mask_text(self._tile_masks())
        other = ", other=0" if masks else ""
        self._line(f"{dot} += tl.load(partial_ptr + {at}{masks}{other})")
        self._indent -= 1
        self._after(set())
        return text + "\n".join(self._lines) + "\n"

    def _partial(self) -> str:
        """Where in a part an element of the result lies."""
        batch, rows, columns, _ = self.loops.sizes
        parts = [f"batch * {rows * columns}"] if batch > 1 else []
        if self._tiling.kind != "row":
            parts.append("mindex" if columns == 1 else f"mindex * {columns}")
        if self._tiling.kind != "column":
            parts.append("nindex")
        return " + ".join(parts)

    # --- what differs from other kernels --------------------------------------------------------

    def _along(self, value: Value) -> bool:
        return bool(value.axes & self._inner_axes)

    def _name_of(self, value: Value) -> str:
        both = self._side == "b" and value in self._on_both
        return self._named(value) + ("_b" if both else "")

    def _loop_name(self, loop: Loop) -> str:
        inner = any(axis in self._inner_axes for axis in loop.axes)
        return self._side + loop.name if inner else loop.name

    def _as_stored(self, value: Value) -> bool:
        if self._tiling.kind != "tiles" or value.kind != "load":
            return False
        return value in self._dot.args and self._readers[value] == self._dot.args.count(value)

    def _letters(self, axes: Iterable[object]) -> set[str]:
        across = set(axes)
        roles = (("m", self._row_axes), ("n", self._column_axes), ("k", self._inner_axes))
        return {letter for letter, found in roles if across & found}

    def _mask_of(self, letter: str) -> str:
        return f"{self._side}kmask" if letter == "k" else f"{letter}mask"

    def _masks(self, conditions: Sequence[Condition], axes: Iterable[object]) -> list[str]:
        masks = [self._mask_of(letter) for letter in sorted(self._letters(axes)) if not self._full[letter]]
        return masks + [self._within(condition) for condition in conditions]

    def _tile_masks(self) -> list[str]:
        gone = {"tiles": "", "row": "m", "column": "n"}[self._tiling.kind]
        return [f"{letter}mask" for letter in "mn" if letter != gone and not self._full[letter]]

    def _mask_text(self, masks: Sequence[str]) -> str:
        return f", mask={' & '.join(masks)}" if masks else ""

    def _spanning(self, position: Affine, axes: Iterable[object]) -> str:
        text = self._position(position)
        reached = set(position.axes)
        for atom, _ in position.terms:
            if isinstance(atom, Value):
                reached |= atom.axes
        for letter in sorted(self._letters(axes) - self._letters(reached)):
            text += f" + 0 * {self._side if letter == 'k' else ''}{letter}index"
        return text

    def _store(self, store: Store) -> None:
        text = self._position(store.position)
        gone = {"tiles": "", "row": "m", "column": "n"}[self._tiling.kind]
        for letter in sorted({"m", "n"} - {gone} - self._letters(store.position.axes)):
            text += f" + 0 * {letter}index"
        value = store.value
        what = self._filled(value) if value.kind == "constant" else self._name_of(value)
        masks = self._mask_text(self._tile_masks())
        self._line(f"tl.store({self._outputs[store.output]} + {text}, {what}{masks})")


def _made_from(values: Iterable[Value], dot: Value) -> set[Value]:
    """Values and what they are made from, without what is beyond ``dot``."""
    found: set[Value] = set()
    stack = list(values)
    while stack:
        value = stack.pop()
        if value in found:
            continue
        found.add(value)
        if value is not dot:
            stack += value.args
    return found
