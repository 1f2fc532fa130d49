"""What a kernel becomes on an H100 or H200, found out without one: triton compiles for sm_90 anywhere.

Registers, spills and shared memory are what the assembler reports; which loads and stores the code has is
counted
in its disassembly. Both tools come with triton.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graphopt_kernels.emit.attention_file import BuiltAttention
from graphopt_kernels.emit.kernel_file import KernelFile
from graphopt_kernels.emit.product_build import BuiltProduct
from graphopt_kernels.tuning.calls import KernelCall

__all__ = [
    "MachineCode",
    "compile_attention_for_sm90",
    "compile_for_sm90",
    "compile_function_for_sm90",
    "import_kernel",
    "pointer_types",
]

_TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class MachineCode:
    """``registers`` of a thread; ``stack`` and ``local``: bytes of a thread that do not fit into them;
    ``shared``:
    bytes of a program. ``instructions``: how many of each opcode, with its widths (``LDG.E.128``)."""

    registers: int
    stack: int
    shared: int
    local: int
    instructions: Mapping[str, int]
    asked: int = 0
    """Bytes of shared memory that a launch asks for, which the assembler does not see."""

    @property
    def spills(self) -> bool:
        return bool(self.stack or self.local)

    def widths(self, opcode: str) -> Counter[int]:
        """How many loads or stores of a kind (``"LDG"``, ``"STG"``) move how many bits a thread."""
        found: Counter[int] = Counter()
        for name, count in self.instructions.items():
            if name.startswith(opcode):
                sizes = [int(part) for part in name.split(".") if part in ("64", "128")]
                found[sizes[0] if sizes else 32] += count
        return found


def import_kernel(file: KernelFile, folder: Path) -> Any:
    """The kernel's module, written to ``folder`` first."""
    path = folder / f"{file.name}.py"
    path.write_text(file.source, encoding="utf-8")
    name = f"graphopt_kernel_{file.name}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def compile_for_sm90(file: KernelFile) -> MachineCode:
    """Compile a kernel as its launcher starts it, for tensors that begin on 16 bytes. Needs triton, no
    GPU."""
    with tempfile.TemporaryDirectory() as folder:
        module = import_kernel(file, Path(folder))
        function = getattr(module, file.text.name)
        types = pointer_types(file)
        numbers = dict.fromkeys(file.launch.numbers, "i32")
        return compile_function_for_sm90(
            function,
            {name: types[name] for name in function.arg_names if name in types} | numbers,
            file.launch.constants,
            warps=file.launch.warps,
            stages=file.launch.stages or 3,
            aligned=tuple(types),
        )


def compile_attention_for_sm90(file: KernelFile) -> dict[str, MachineCode]:
    """Compile each kernel of a file of attention as its launcher starts it."""
    assert isinstance(file.built, BuiltAttention)
    inputs = dict(zip(file.inputs, file.built.inputs, strict=True))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        module = import_kernel(file, Path(folder))
        for call in file.built.launches:
            name = call.function.fn.__name__
            function = getattr(module, name)
            # Pointers that a computed bias reads are inputs of the file.
            given = {n: call.arguments[n] if n in call.arguments else inputs[n] for n in function.arg_names}
            told = KernelCall(function, call.grid, given, call.options).signature
            found[name] = compile_function_for_sm90(
                function,
                told.types,
                told.constants,
                warps=call.options["num_warps"],
                stages=call.options.get("num_stages", 3),
                aligned=[n for n, by_16 in told.aligned.items() if by_16],
            )
    return found


def pointer_types(file: KernelFile) -> dict[str, str]:
    """The types of what a kernel's pointers point to, as triton spells them, by the names of parameters."""
    types = {f"{name}_ptr": _TYPES[t.dtype] for name, t in zip(file.inputs, file.built.inputs, strict=True)}
    for number, tensor in enumerate(file.built.outputs):
        dtype = tensor.dtype
        if number in file.text.partial and dtype in (torch.float16, torch.bfloat16):
            dtype = torch.float32
        types[f"out{number}_ptr"] = _TYPES[dtype]
    if isinstance(file.built, BuiltProduct):
        types["partial_ptr"] = _TYPES[file.built.dot.dtype]
    return types


def compile_function_for_sm90(
    function: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    warps: int,
    aligned: Collection[str] = (),
    stages: int = 3,
    most_registers: int | None = None,
) -> MachineCode:
    """Compile a jitted ``function`` for sm_90: ``types`` of arguments by name, as triton spells them (more
    than it has do no harm), values of those that are ``constants``, which begin on 16 bytes, or are a
    multiple of 16, how many ``stages`` loops are pipelined in, and a bound on the registers of a thread."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in names if name in aligned}
    compiled = triton.compile(
        ASTSource(function, signature, {k: v for k, v in constants.items() if k in names}, attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "num_stages": stages, "maxnreg": most_registers},
    )
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = _USAGE.search(_output(tool, "-res-usage", binary))
        assert usage is not None
        code = _output(tool, "-sass", binary)
    registers, stack, shared, local = map(int, usage.groups())
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", code, re.MULTILINE)
    return MachineCode(registers, stack, shared, local, Counter(opcodes), int(compiled.metadata.shared))


def _output(tool: Path, flag: str, binary: Path) -> str:
    return subprocess.run([str(tool), flag, str(binary)], capture_output=True, text=True, check=True).stdout
