"""Writes the files in this folder with the packages that made the formats. Not run by the tests.

    pip download --no-deps torchao==0.18.0 bitsandbytes==0.50.2 auto-gptq==0.7.1 autoawq==0.2.9
    unpack the four of them into PEERS/torchao, PEERS/bitsandbytes, PEERS/auto_gptq and PEERS/autoawq
    python tests/weights/make.py PEERS        (torch 2.13.0, safetensors 0.8.0, on a CPU)

Each file is what the package writes; ``expected.safetensors`` is every third row of what the package itself
takes the weights for.
auto-gptq and autoawq do not import beside a present transformers: the files with their layers are run alone.
Layers of the first compute ``x @ weight``: the weight is what comes of an identity. The convention v2 is made
of the packer's words, one added to all zeros.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
N, K, GROUP = 32, 128, 32
expected: dict[str, torch.Tensor] = {}


def weight(seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


def file_alone(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gptq(peers: Path) -> None:
    layers = file_alone(peers / "auto_gptq/auto_gptq/nn_modules/qlinear/qlinear_cuda.py", "qlinear_cuda")
    found: dict[str, torch.Tensor] = {}
    for bits, group in ((2, GROUP), (3, GROUP), (4, GROUP), (4, K), (8, K), (4, 64)):
        name = f"bits{bits}_group{group}"
        linear = torch.nn.Linear(K, N, bias=False, dtype=torch.float16)
        linear.weight.data = weight(bits, torch.float16)
        g_idx = torch.arange(K) // group
        if group == 64:
            # act-order: a permutation of the inputs, every group in all of the weight.
            g_idx = g_idx[torch.randperm(K, generator=torch.Generator().manual_seed(7))]
            name = "act_order"
        wide = torch.stack([linear.weight[:, g_idx == g].float() for g in range(K // group)], 1)
        top = 2**bits - 1
        scales = ((wide.amax(-1) - wide.amin(-1)) / top).half().float()
        zeros = (-wide.amin(-1) / scales).round().clamp(1, top)
        if bits == 8:
            scales = (wide.abs().amax(-1) / 127).half().float()
            zeros = torch.full_like(scales, 128)
        layer = layers.QuantLinear(bits, group, K, N, bias=False, weight_dtype=torch.float16)
        layer.pack(linear, scales.clone(), zeros.clone(), g_idx.int())
        state = layer.state_dict()
        found |= {f"{name}.{key}": tensor.clone() for key, tensor in state.items()}
        expected[f"gptq.{name}"] = layer(torch.eye(K, dtype=torch.float16)).t().contiguous()
        if name == f"bits4_group{GROUP}":
            v2 = {**state, "qzeros": state["qzeros"] + 0x11111111}
            save_file({f"linear.{k}": t.clone() for k, t in v2.items()}, HERE / "gptq_v2.safetensors")
    save_file(found, HERE / "gptq.safetensors")


def awq(peers: Path) -> None:
    # The layer imports three functions of the package, and nothing else of it.
    folder = peers / "autoawq/awq"
    for name in ("awq", "awq.utils", "awq.modules"):
        sys.modules[name] = types.ModuleType(name)
    helpers = file_alone(folder / "utils/packing_utils.py", "awq.utils.packing_utils")
    sys.modules["awq.utils.packing_utils"] = helpers
    for name, members in (
        ("awq.utils.module", {"try_import": lambda name: (None, "")}),
        ("awq.utils.utils", {"get_best_device": lambda: "cpu"}),
    ):
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(members)
    layers = file_alone(folder / "modules/linear/gemm.py", "gemm")
    linear = torch.nn.Linear(K, N, bias=True, dtype=torch.float16)
    linear.weight.data, linear.bias.data = weight(20, torch.float16), torch.arange(N).half() / 8
    wide = linear.weight.float().view(N, K // GROUP, GROUP)
    scales = ((wide.amax(-1) - wide.amin(-1)) / 15).half().float()
    zeros = (-wide.amin(-1) / scales).round().clamp(0, 15)
    layer = layers.WQLinear_GEMM.from_linear(
        linear, 4, GROUP, scales=scales.t().contiguous(), zeros=zeros.t().contiguous()
    )
    found = {f"linear.{key}": tensor.contiguous() for key, tensor in layer.state_dict().items()}
    save_file(found, HERE / "awq.safetensors")
    dense = helpers.dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, GROUP)
    expected["awq.linear"] = dense.half().t().contiguous()


def bitsandbytes(peers: Path) -> None:
    sys.path.insert(0, str(peers / "bitsandbytes"))
    import bitsandbytes as bnb

    found: dict[str, torch.Tensor] = {}
    for name, nested, block in (("plain", False, 64), ("nested", True, 64), ("wide", False, 128)):
        layer = bnb.nn.Linear4bit(K, N, bias=False, compress_statistics=nested, quant_type="nf4")
        made = bnb.nn.Params4bit(
            weight(30, torch.bfloat16), requires_grad=False, blocksize=block, compress_statistics=nested,
            quant_type="nf4", module=layer,
        )  # fmt: skip
        layer.weight = made.to("cpu")
        found |= {f"{name}.{key}": tensor.clone() for key, tensor in layer.state_dict().items()}
        state = layer.weight.quant_state
        state.dtype = torch.float32
        expected[f"bitsandbytes.{name}"] = bnb.functional.dequantize_4bit(
            layer.weight.data, state
        ).contiguous()
    save_file(found, HERE / "bitsandbytes.safetensors")


def torchao(peers: Path) -> None:
    sys.path.insert(0, str(peers / "torchao"))
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int4Tensor,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerAxis,
        PerGroup,
        quantize_,
    )  # fmt: skip

    model = torch.nn.ModuleDict({
        name: torch.nn.Linear(K, N, bias=name == "int8", dtype=torch.bfloat16)
        for name in ("int8", "dynamic", "float8", "int4", "groups", "axis")
    })  # fmt: skip
    for number, layer in enumerate(model.values()):
        layer.weight.data = weight(40 + number, torch.bfloat16)
    model["int8"].bias.data = torch.arange(N).bfloat16() / 8
    configs = {
        "int8": Int8WeightOnlyConfig(version=2),
        "dynamic": Int8DynamicActivationInt8WeightConfig(version=2),
        "float8": Float8WeightOnlyConfig(),
        "groups": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP)),
        "axis": IntxWeightOnlyConfig(weight_dtype=torch.int6, granularity=PerAxis(0)),
    }
    for name, config in configs.items():
        quantize_(model[name], config)
        expected[f"torchao.{name}"] = model[name].weight.dequantize().contiguous()
    # Its own rounding is in a package for GPUs (int4_row_quantize_zp of mslk); this is what it does.
    wide = model["int4"].weight.detach().float().view(N, K // GROUP, GROUP)
    low, high = wide.amin(-1), wide.amax(-1)
    scales = (high - low).clamp(min=1e-6) / 15
    codes = ((wide - low[..., None]) / scales[..., None]).round().clamp(0, 15).to(torch.int8) - 8
    zeros, scales = (low + 8 * scales).bfloat16(), scales.bfloat16()
    flat = codes.view(N, K)
    packed = (flat[:, ::2] & 15) | (flat[:, 1::2] << 4)
    made = Int4Tensor(packed, scales.t().contiguous(), zeros.t().contiguous(), [1, GROUP], torch.Size([N, K]))
    model["int4"].weight = torch.nn.Parameter(made, requires_grad=False)
    dense = codes.float() * scales.float()[..., None] + zeros.float()[..., None]
    expected["torchao.int4"] = dense.view(N, K)
    tensors, texts = flatten_tensor_state_dict(model.state_dict())
    save_file({k: t.contiguous() for k, t in tensors.items()}, HERE / "torchao.safetensors", metadata=texts)


@torch.no_grad()
def main() -> None:
    peers = Path(sys.argv[1])
    for make in (gptq, awq, bitsandbytes, torchao):
        make(peers)
    rows = {name: tensor.detach()[::3].contiguous() for name, tensor in expected.items()}
    save_file(rows, HERE / "expected.safetensors")
    print(json.dumps({name: str(tensor.dtype) for name, tensor in expected.items()}, indent=1))


if __name__ == "__main__":
    main()
