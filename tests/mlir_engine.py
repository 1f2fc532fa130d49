"""Runs linalg on tensors on the CPU: torch-mlir's reference backend to LLVM, and its execution engine."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

_TO_LLVM = ",".join(
    [
        "func.func(refback-generalize-tensor-pad,refback-generalize-tensor-concat)",
        "func.func(linalg-fuse-elementwise-ops)",
        "convert-shape-to-std",
        "func.func(tm-tensor-bufferize)",
        "one-shot-bufferize{copy-before-write bufferize-function-boundaries"
        " function-boundary-type-conversion=identity-layout-map}",
        "refback-mlprogram-bufferize",
        "buffer-deallocation-pipeline",
        "inline",
        "refback-munge-calling-conventions",
        "func.func(tm-tensor-to-loops,refback-munge-memref-copy,convert-linalg-to-loops,lower-affine)",
        "convert-scf-to-cf",
        "func.func(refback-expand-ops-for-llvm,arith-expand,convert-math-to-llvm)",
        "convert-math-to-libm",
        "expand-strided-metadata",
        "finalize-memref-to-llvm",
        "lower-affine",
        "convert-bufferization-to-memref",
        "finalize-memref-to-llvm",
        "func.func(convert-arith-to-llvm)",
        "convert-vector-to-llvm",
        "convert-func-to-llvm",
        "convert-cf-to-llvm",
        "convert-complex-to-llvm",
        "reconcile-unrealized-casts",
    ]
)
_NUMBERS = {"i1": ctypes.c_bool, "i64": ctypes.c_int64, "f32": ctypes.c_float, "f64": ctypes.c_double}


def run_linalg(module: Any, name: str, inputs: Sequence[torch.Tensor | int]) -> list[torch.Tensor]:
    """What function ``name`` of a module (which is lowered in place) gives for CPU tensors and sizes."""
    runtime = importlib.import_module("torch_mlir.runtime")
    with module.context:
        importlib.import_module("torch_mlir.passmanager").PassManager.parse(
            f"builtin.module({_TO_LLVM})"
        ).run(module.operation)
        engine = importlib.import_module("torch_mlir.execution_engine").ExecutionEngine(module, opt_level=0)
        found: list[torch.Tensor] = []
        heard = []
        for function in _result_callbacks(module):
            kinds = function.removeprefix("refbackend_consume_func_return_").split("_")
            takes = [
                _NUMBERS[kind]
                if kind in _NUMBERS
                else ctypes.POINTER(importlib.import_module("torch_mlir.runtime").UnrankedMemRefDescriptor)
                for kind in kinds
            ]

            def consume(*values: Any, kinds: Sequence[str] = kinds) -> None:
                for kind, value in zip(kinds, values, strict=True):
                    if kind in _NUMBERS:
                        found.append(torch.tensor(value))
                    else:
                        array = runtime.unranked_memref_to_numpy(value, _element(kind))
                        # The buffer is freed when the function returns.
                        found.append(torch.from_numpy(np.array(array)))

            heard.append(ctypes.CFUNCTYPE(None, *takes)(consume))
            engine.register_runtime(function, heard[-1])
        arrays = [one if isinstance(one, int) else one.detach().contiguous().numpy() for one in inputs]
        engine.invoke(name, *(_pointer(runtime, one) for one in arrays))
    return found


def _pointer(runtime: Any, value: Any) -> Any:
    if isinstance(value, int):
        return ctypes.pointer(ctypes.c_int64(value))
    return ctypes.pointer(ctypes.pointer(runtime.get_unranked_memref_descriptor(value)))


def _result_callbacks(module: Any) -> list[str]:
    names = [str(op.attributes["sym_name"]).strip('"') for op in module.body if "sym_name" in op.attributes]
    return [name for name in names if name.startswith("refbackend_consume_func_return_")]


def _element(kind: str) -> Any:
    kinds = {"i1": np.bool_, "i8": np.int8, "ui8": np.uint8, "i32": np.int32, "i64": np.int64}
    return {**kinds, "f32": np.float32, "f64": np.float64}[kind.removeprefix("mr")]
