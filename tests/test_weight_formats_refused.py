"""Checkpoints of others that do not hold together, or hold what no scheme does: the reason is told."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import CheckpointError
from graphopt.tensors_file import read_tensors, write_tensors
from tests.weight_cases import WEIGHTS, K, N, model_of

Change = Callable[[dict[str, Tensor], dict[str, str]], None]


def put(key: str, make: Callable[[Tensor], Tensor]) -> Change:
    """A tensor of the file is another."""

    def change(tensors: dict[str, Tensor], texts: dict[str, str]) -> None:
        tensors[key] = make(tensors[key].clone())

    return change


def drop(key: str) -> Change:
    def change(tensors: dict[str, Tensor], texts: dict[str, str]) -> None:
        del tensors[key]

    return change


def at(place: Any, value: Any) -> Callable[[Tensor], Tensor]:
    def make(tensor: Tensor) -> Tensor:
        tensor[place] = value
        return tensor

    return make


def described(name: str, **data: Any) -> Change:
    """Attributes of a tensor of torchao are others; ``_type`` its class."""

    def change(tensors: dict[str, Tensor], texts: dict[str, str]) -> None:
        found = json.loads(texts[name])
        found["_type"] = data.pop("_type", found["_type"])
        found["_data"].update(data)
        texts[name] = json.dumps(found)

    return change


def state(**values: Any) -> Change:
    """What bitsandbytes says of a weight is something else."""

    def change(tensors: dict[str, Tensor], texts: dict[str, str]) -> None:
        key = "nested.weight.quant_state.bitsandbytes__nf4"
        found = {**json.loads(bytes(tensors[key].tolist())), **values}
        tensors[key] = torch.tensor([*json.dumps(found).encode()], dtype=torch.uint8)

    return change


def as_fp4(tensors: dict[str, Tensor], texts: dict[str, str]) -> None:
    state(quant_type="fp4")(tensors, texts)
    key = "nested.weight.quant_state.bitsandbytes__"
    tensors[f"{key}fp4"] = tensors.pop(f"{key}nf4")


def groups_of_16(tensors: dict[str, Tensor], texts: dict[str, str]) -> None:
    for key in ("qzeros", "scales"):
        tensors[f"bits4_group32.{key}"] = tensors[f"bits4_group32.{key}"].repeat_interleave(2, 0)
    del tensors["bits4_group32.g_idx"]


def eight_bits_in_groups(tensors: dict[str, Tensor], texts: dict[str, str]) -> None:
    for key in ("qzeros", "scales"):
        tensors[f"bits8_group128.{key}"] = tensors[f"bits8_group128.{key}"].repeat_interleave(4, 0)
    del tensors["bits8_group128.g_idx"]


GPTQ = "bits4_group32"
REFUSED: list[tuple[str, Change, str]] = [
    (
        "gptq",
        put(f"{GPTQ}.scales", at((1, 3), float("nan"))),
        "bits4_group32.weight: its scales are not finite",
    ),
    ("gptq", put(f"{GPTQ}.scales", lambda t: t.float() * 1.0001), "int4 keeps scales of 16 bits of mantissa"),
    ("gptq", put("act_order.g_idx", at(5, 2)), "act_order.g_idx holds 2: expected groups from 0 to 1"),
    ("gptq", put("act_order.g_idx", at(5, -1)), "act_order.g_idx holds -1: expected groups from 0 to 1"),
    (
        "gptq",
        put("act_order.g_idx", at(slice(None), 1)),
        "makes groups of 0 to 128 inputs: schemes keep equal ones",
    ),
    (
        "gptq",
        put("act_order.g_idx", lambda t: t[:100]),
        "act_order.g_idx is torch.int32 (100,): expected int32 (128,)",
    ),
    (
        "gptq",
        put(f"{GPTQ}.qweight", lambda t: t[:, :31]),
        "bits4_group32.qweight has shape (16, 31): expected",
    ),
    (
        "gptq",
        put(f"{GPTQ}.qweight", lambda t: t.long()),
        "bits4_group32.qweight is torch.int64 (16, 32): expected int32",
    ),
    (
        "gptq",
        put(f"{GPTQ}.qzeros", lambda t: t[:3]),
        "bits4_group32.qzeros has shape (3, 4): expected (4, 32 * bits / 32)",
    ),
    (
        "gptq",
        put(f"{GPTQ}.scales", lambda t: t.int()),
        "bits4_group32.scales is torch.int32 (4, 32): expected floating",
    ),
    ("gptq", drop(f"{GPTQ}.scales"), "holds no tensor 'bits4_group32.scales'; the nearest is"),
    ("gptq", groups_of_16, "bits4_group32.weight has groups of 16: no scheme of four bits keeps those"),
    (
        "gptq",
        eight_bits_in_groups,
        "bits8_group128.weight has 8 bits and groups of 32: no scheme keeps those",
    ),
    (
        "gptq",
        put("bits8_group128.qzeros", at((0, 0), 0)),
        "has 8 bits and zeros that are not 128: int8 is symmetric",
    ),
    (
        "gptq",
        put("bits8_group128.scales", at((0, 0), float("inf"))),
        "bits8_group128.weight: its scales are not finite",
    ),
    ("awq", put("linear.scales", at((1, 3), float("nan"))), "linear.weight: its scales are not finite"),
    ("awq", put("linear.qzeros", lambda t: t[:3]), "linear.qzeros has shape (3, 4): expected (4, 4)"),
    (
        "awq",
        put("linear.qweight", lambda t: t[:127]),
        "linear.scales has 4 groups: they do not divide 127 inputs",
    ),
    (
        "awq",
        put("linear.qweight", lambda t: t[:64]),
        "has 32 outputs of 64 inputs in the checkpoint, (32, 128) in the",
    ),
    ("awq", put("linear.qweight", lambda t: t.long()), "linear.qweight is torch.int64: expected int32"),
    ("awq", drop("linear.bias"), "not in the checkpoint: linear.bias"),
    ("bitsandbytes", as_fp4, "nested.weight has quant_type 'fp4': no scheme keeps that, nf4 is read"),
    (
        "bitsandbytes",
        state(blocksize=32),
        "nested.weight (32, 128) has blocks of 32: nf4 keeps multiples of 64",
    ),
    (
        "bitsandbytes",
        state(blocksize=256),
        "nested.weight (32, 128) has blocks of 256: nf4 keeps multiples of 64",
    ),
    (
        "bitsandbytes",
        state(shape=[32, 64]),
        "nested.weight has 2048 bytes of codes: expected 1024 for (32, 64)",
    ),
    ("bitsandbytes", state(shape=[32, 4, 32]), "is of shape (32, 4, 32): expected two dimensions"),
    (
        "bitsandbytes",
        state(shape=None),
        "nested.weight.quant_state.bitsandbytes__nf4 is no description of a weight",
    ),
    ("bitsandbytes", state(nested_blocksize=16), "nested.weight.nested_absmax has shape (1,): expected (4,)"),
    (
        "bitsandbytes",
        put("plain.weight.absmax", at(7, float("nan"))),
        "plain.weight: its scales are not finite",
    ),
    ("bitsandbytes", put("plain.weight.absmax", lambda t: t[:63]), "absmax has shape (63,): expected (64,)"),
    ("bitsandbytes", put("plain.weight.quant_map", at(3, -0.4)), "holds other levels than those of nf4"),
    ("bitsandbytes", drop("nested.weight.nested_absmax"), "holds no tensor 'nested.weight.nested_absmax'"),
    ("torchao", put("int8._weight_scale", at((2, 0), float("nan"))), "int8.weight: its scale is not finite"),
    (
        "torchao",
        put("int8._weight_zero_point", at((2, 0), 1)),
        "int8.weight has zeros that are not 0: int8 is symm",
    ),
    (
        "torchao",
        put("int8._weight_scale", lambda t: t[:30]),
        "its scale has shape (30, 1): eight bits have one an output",
    ),
    (
        "torchao",
        put("int8._weight_qdata", lambda t: t.short()),
        "its qdata is torch.int16: expected torch.int8",
    ),
    (
        "torchao",
        put("groups._weight_zero_point", lambda t: t[:3]),
        "its zero_point has shape (3, 4), scale (32, 4)",
    ),
    (
        "torchao",
        put("groups._weight_scale", lambda t: t[:3]),
        "its scale has shape (3, 4): expected (32, groups)",
    ),
    (
        "torchao",
        put("groups._weight_qdata", at((0, 0), 9)),
        "groups.weight is of int4 in groups of 32: no scheme keeps",
    ),
    (
        "torchao",
        put("int4._weight_scale", lambda t: t[:3]),
        "its scale has shape (3, 32), its zero_point (4, 32): exp",
    ),
    (
        "torchao",
        put("int4._weight_qdata", lambda t: t[:, :50]),
        "is of a weight (32, 100): expected two dimensions",
    ),
    ("torchao", drop("int4._weight_scale"), "holds no tensor 'int4._weight_scale'; the nearest is 'int"),
    (
        "torchao",
        described("int8.weight", _type="MXTensor"),
        "int8.weight is a MXTensor of torchao: no scheme keeps that",
    ),
    (
        "torchao",
        described("int4.weight", activation_dtype={"_type": "torch.dtype", "_data": "float8_e4m3fn"}),
        "int4.weight rounds its inputs to float8_e4m3fn: no scheme of four bits does",
    ),
    (
        "torchao",
        described("groups.weight", activation_quantization="int8_asym_per_token"),
        "groups.weight rounds its inputs to int8 with zeros: no scheme does",
    ),
    (
        "torchao",
        described("int8.weight", act_quant_kwargs={"_data": {"granularity": {"_type": "PerTensor"}}}),
        "int8.weight rounds its inputs PerTensor, SYMMETRIC: schemes do so PerRow, SYMMETRIC",
    ),
]


@pytest.mark.parametrize(("file", "change", "reason"), REFUSED, ids=[f"{f}: {r[:50]}" for f, _, r in REFUSED])
def test_what_no_scheme_holds_is_refused_with_the_reason(
    tmp_path: Path, file: str, change: Change, reason: str
) -> None:
    tensors, texts = read_tensors(WEIGHTS / f"{file}.safetensors")
    change(tensors, texts)
    path = tmp_path / "model.safetensors"
    write_tensors(path, tensors, texts)
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        graphopt.load_weights(model_of(file), path)


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for file in ("gptq", "awq", "bitsandbytes", "torchao"):
        path.write_bytes((WEIGHTS / f"{file}.safetensors").read_bytes()[:-20])
        with pytest.raises(CheckpointError, match="its bytes are not in the file"):
            graphopt.load_weights(model_of(file), path)


def test_names_and_shapes_that_the_model_does_not_have_are_told(tmp_path: Path) -> None:
    path = WEIGHTS / "gptq_v2.safetensors"
    other = nn.ModuleDict({"linaer": nn.Linear(K, N, bias=False)})
    with pytest.raises(CheckpointError) as caught:
        graphopt.load_weights(other, path)
    assert "holds linear.weight (gptq), the model has no parameter of that name" in str(caught.value)
    assert "the nearest is 'linaer.weight'" in str(caught.value)
    small = nn.ModuleDict({"linear": nn.Linear(64, N, bias=False)})
    with pytest.raises(
        CheckpointError, match=re.escape("32 outputs of 128 inputs in the checkpoint, (32, 64) in")
    ):
        graphopt.load_weights(small, path)
    assert isinstance(small.get_submodule("linear").weight, nn.Parameter)


def test_codes_without_a_format_are_no_dense_weights(tmp_path: Path) -> None:
    """bitsandbytes in eight bits: int8 under the name of the parameter."""
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"0.weight": torch.zeros(4, 4, dtype=torch.int8)})
    with pytest.raises(CheckpointError) as caught:
        graphopt.load_weights(nn.Sequential(nn.Linear(4, 4, bias=False)), path)
    assert "0.weight is torch.int8 in the checkpoint and torch.float32 in the model" in str(caught.value)
    assert "packed weights in a format that no plugin reads look so" in str(caught.value)
