"""Triton kernels of losses without a GPU: in the interpreter, and as machine code for sm_90."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

__all__ = ["check_machine_code", "interpret"]

POINTERS = {
    "logits": "", "target": "*i64", "losses": "*fp32", "log_sum_exps": "*fp32", "totals": "*fp32",
    "scales": "*fp32", "sum_scales": "*fp32",
}  # fmt: skip
INTEGERS = ("row_stride", "scale_stride", "sum_scale_stride", "first", "classes", "ignore_index")


def interpret(script: str) -> None:
    """Run ``script`` with Triton's interpreter, which must be on before triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def check_machine_code(kernel: Any, dtype: str, constants: dict[str, Any]) -> None:
    """No register is spilled, logits are read 16 bytes at a time, and little memory is shared."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [name for name in kernel.arg_names if name not in constants]
    types = {name: f"*{dtype}" if name == "logits" else POINTERS.get(name, "fp32") for name in names}
    types |= {name: "i32" for name in names if name in INTEGERS}
    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name in names
        if name in POINTERS or name == "row_stride"
    }
    source = ASTSource(
        fn=kernel,
        signature={**types, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs=aligned,
    )
    warps = max(1, constants["BLOCK"] // 512)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    text = compiled.asm["ptx"]
    assert "ld.global" in text and ".v4.b32" in text, "loads are not 16 bytes wide"
    assert compiled.metadata.shared <= 1024
    assert _spilled(compiled.asm["cubin"]) == 0, (dtype, constants)


def _spilled(cubin: bytes) -> int:
    """Instructions that store registers to local memory."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True)
    return listing.stdout.count("STL")
