"""Checkpoints of others: files that the packages themselves wrote (tests/weights), read without rounding."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import CheckpointError, UnknownNameError
from graphopt.packing import packed_weights
from graphopt.packing.formats import PackedTensors, StoredWeight
from graphopt.plugins import default_host
from graphopt.tensors_file import read_tensors, write_tensors
from graphopt_kernels.formats.int32_codes import codes_of
from graphopt_kernels.quantized.int8 import Int8
from graphopt_kernels.quantized.lowbits import Int2, Int3
from tests.packing_cases import Chain, batches
from tests.weight_cases import EXPECTED, KEPT, ROWS, WEIGHTS, K, N, model_of, weight_of


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("file", ["gptq", "awq", "bitsandbytes", "torchao"])
def test_weights_are_those_that_the_package_takes_them_for(file: str, device: str) -> None:
    model = model_of(file, device)
    found = graphopt.load_weights(model, WEIGHTS / f"{file}.safetensors")
    kept = {weight.names[0].removesuffix(".weight"): weight for weight in found.packed}
    assert {name: weight.scheme for name, weight in kept.items()} == {
        name.partition(".")[2]: scheme for name, scheme in KEPT.items() if name.startswith(f"{file}.")
    }
    assert {weight.format for weight in found.packed} == {file}
    assert not found.missing and not found.unexpected
    for name in kept:
        expected = EXPECTED[f"{file}.{name}"]
        # Bit for bit in the dtype that the package computed in.
        assert torch.equal(weight_of(model, name)[ROWS].to(expected.dtype), expected), name
        assert model.get_submodule(name).weight.dtype is torch.float32
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert len(packed_weights(model)) == len(kept)


def test_products_are_those_of_what_the_package_wrote() -> None:
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(0))

    class All(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict()

        def forward(self, x: Tensor) -> list[Tensor]:
            return [layer(x) for layer in self.layers.values()]

    model = All().eval()
    for file in ("gptq", "awq", "bitsandbytes", "torchao"):
        some = model_of(file)
        graphopt.load_weights(some, WEIGHTS / f"{file}.safetensors")
        kinds = ("act_order", "bits3_group32", "bits8_group128", "linear", "nested", "float8", "int4")
        model.layers.update({name: layer for name, layer in some.named_children() if name in kinds})
    fast = graphopt.optimize(model, (x,), emit="eager", on_error="raise")
    read = [str(node.target) for node in fast.programs[0].nodes()]
    assert sum("graphopt.linear_" in target for target in read) == len(model.layers) == 7
    for found, layer in zip(fast(x), model.layers.values(), strict=True):
        expected = torch.nn.functional.linear(x, layer.weight, layer.bias)  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_zeros_are_read_by_either_convention(tmp_path: Path) -> None:
    """``gptq_v2`` holds the words of ``bits4_group32`` with one added to all zeros."""
    expected = EXPECTED["gptq.bits4_group32"]

    def read(path: Path, *formats: str) -> bool:
        model = model_of("gptq_v2")
        found = graphopt.load_weights(model, path, formats=formats or None)
        assert not formats or found.packed[0].format == formats[0]
        return torch.equal(weight_of(model, "linear")[ROWS].half(), expected)

    path = WEIGHTS / "gptq_v2.safetensors"
    assert read(path, "gptq{zeros=v2}") and not read(path) and not read(path, "gptq{zeros=v1}")
    copied = tmp_path / "model.safetensors"
    copied.write_bytes(path.read_bytes())
    for file, content, right in (
        ("quantize_config.json", {"bits": 4, "checkpoint_format": "gptq_v2"}, True),
        ("quantize_config.json", {"bits": 4, "checkpoint_format": "gptq"}, False),
        (
            "config.json",
            {"quantization_config": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}},
            True,
        ),
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}, False),
    ):
        (tmp_path / file).write_text(json.dumps(content))
        assert read(copied) is right, content
        (tmp_path / file).unlink()
    (tmp_path / "quantize_config.json").write_text('{"checkpoint_format": "marlin"}')
    with pytest.raises(CheckpointError, match="says 'marlin': gptq reads gptq, gptq_v2"):
        read(copied)
    assert read(copied, "gptq{zeros=v2}")


def test_a_zero_of_nought_takes_from_the_next_code_and_gives_back(tmp_path: Path) -> None:
    """What GPTQModel writes as v1: 0x11111111 off the words of v2, as they are."""
    tensors, _ = read_tensors(WEIGHTS / "gptq_v2.safetensors")
    tensors["linear.qzeros"][1, 2] &= ~0xF
    one, other = tmp_path / "v1.safetensors", tmp_path / "v2.safetensors"
    write_tensors(other, tensors)
    write_tensors(one, {**tensors, "linear.qzeros": tensors["linear.qzeros"] - 0x11111111})
    models = [model_of("gptq_v2") for _ in range(2)]
    graphopt.load_weights(models[0], one, formats=("gptq{zeros=v1}",))
    graphopt.load_weights(models[1], other, formats=("gptq{zeros=v2}",))
    assert torch.equal(*(weight_of(model, "linear") for model in models))


def bits_of(codes: list[int], bits: int) -> list[int]:
    """Words of 32 bits of a string of bits, the first code in the last bits: in whole numbers."""
    whole = sum(code << (bits * place) for place, code in enumerate(codes))
    words = [whole >> (32 * place) & 0xFFFFFFFF for place in range(len(codes) * bits // 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_come_out_of_words_as_they_went_in(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (96, 5), generator=generator)
    words = torch.tensor([bits_of(column.tolist(), bits) for column in codes.t()], dtype=torch.int32).t()
    assert torch.equal(codes_of(words.contiguous(), bits, 96), codes.to(torch.uint8))


def tiles_of(codes: Tensor, inner: int = 8) -> Tensor:
    """Words of tensor cores, lane by lane and code by code as ``matrix_to_m16n8k16_Bint4_layout`` of torch's
    ``aten/src/ATen/native/cuda/int4mm.cu`` says."""
    n, k = codes.shape
    words = torch.zeros(n // 8, k // (16 * inner), 32, inner // 2, dtype=torch.int64)
    for tile, outer, lane, pair in itertools.product(*map(range, words.shape)):
        first = (outer * inner + 2 * pair) * 16 + lane % 4 * 2
        columns = [first + more for more in (0, 1, 8, 9, 16, 17, 24, 25)]
        v = [int(codes[tile * 8 + lane // 4, column]) for column in columns]
        word = v[7] << 28 | v[5] << 24 | v[3] << 20 | v[1] << 16 | v[6] << 12 | v[4] << 8 | v[2] << 4 | v[0]
        words[tile, outer, lane, pair] = word - 2**32 if word >= 2**31 else word
    return words.to(torch.int32)


@pytest.mark.parametrize("zeros", [True, False])
def test_tiles_of_tensor_cores_are_put_in_rows(tmp_path: Path, zeros: bool) -> None:
    """12 outputs of 192 inputs, filled up to 16 and 1024 as torchao does."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (16, 1024), generator=generator)
    scales, offsets = torch.rand((2, 16, 16), generator=generator).bfloat16().float()
    offsets *= zeros
    tensors = {
        "a._weight_qdata": tiles_of(codes),
        "a._weight_scale_and_zero": torch.stack((scales, offsets), -1).bfloat16(),
    }
    text: dict[str, Any] = {
        "_type": "Int4TilePackedTo4dTensor",
        "_data": {"block_size": [1, 64], "shape": [12, 192]},
        "_tensor_data_names": ["qdata", "scale_and_zero"],
    }

    def load(**changes: Tensor) -> nn.Module:
        texts = {"a.weight": json.dumps(text), "tensor_names": '["a.weight"]'}
        write_tensors(tmp_path / "x.safetensors", tensors | changes, texts)
        model = nn.ModuleDict({"a": nn.Linear(192, 12, bias=False, device="meta")})
        found = graphopt.load_weights(model, tmp_path / "x.safetensors")
        symmetric = "int4{group=64,symmetric=true}"
        assert found.packed[0].scheme == ("int4-offset{group=64}" if zeros else symmetric)
        return model

    wide = [tensor.t().repeat_interleave(64, 1) for tensor in (scales, offsets)]
    expected = (codes - 8) * wide[0] + wide[1]
    assert torch.equal(weight_of(load(), "a"), expected[:12, :192])
    with pytest.raises(CheckpointError, match=re.escape("has shape (15, 16, 2): expected (16, 16, 2)")):
        load(**{"a._weight_scale_and_zero": tensors["a._weight_scale_and_zero"][:15]})
    with pytest.raises(
        CheckpointError, match=re.escape("is of a weight (1, 8, 32, 4): expected two dimensions")
    ):
        load(**{"a._weight_qdata": tensors["a._weight_qdata"][:1]})
    text["_data"]["block_size"] = [1, 80]
    with pytest.raises(
        CheckpointError, match=re.escape("groups are of 80: expected int32, and groups that")
    ):
        load()


def test_groups_become_those_that_schemes_keep(tmp_path: Path) -> None:
    """Groups of 192: parts of 64 with one scale; of all inputs."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (384, 8), generator=generator)
    for groups, scheme in ((2, "int4{group=64}"), (1, "int4"), (12, "int4{group=32}")):
        zeros = torch.randint(0, 16, (groups, 8), generator=generator)
        scales = torch.rand((groups, 8), generator=generator).half()
        tensors = {
            "a.qweight": torch.tensor([bits_of(c.tolist(), 4) for c in codes.t()], dtype=torch.int32).t(),
            "a.qzeros": torch.tensor([bits_of(row.tolist(), 4) for row in zeros], dtype=torch.int32),
            "a.scales": scales,
        }
        write_tensors(tmp_path / "x.safetensors", tensors)
        model = nn.ModuleDict({"a": nn.Linear(384, 8, bias=False, device="meta")})
        found = graphopt.load_weights(model, tmp_path / "x.safetensors", formats=("gptq{zeros=v2}",))
        assert found.packed[0].scheme == scheme
        size = 384 // groups
        wide = [tensor.repeat_interleave(size, 0) for tensor in (zeros, scales.float())]
        assert torch.equal(weight_of(model, "a"), ((codes - wide[0]) * wide[1]).t())


LOW: list[tuple[int, int, int, bool, str]] = [
    (2, 384, 2, False, "int2{outliers=0.0}"),
    (2, 384, 3, False, "int2{group=128,outliers=0.0}"),
    (2, 96, 3, False, "int2{group=32,outliers=0.0}"),
    (2, 96, 3, True, "int4-ordered{group=32}"),
    (3, 256, 1, False, "int3{group=128,outliers=0.0}"),
    (3, 384, 12, False, "int3{group=32,outliers=0.0}"),
    (3, 384, 6, True, "int4-ordered{group=64}"),
    # A row of 32 would be filled up to 128: four bits take less.
    (3, 32, 1, False, "int4{group=32}"),
]


@pytest.mark.parametrize(("bits", "k", "groups", "moved", "scheme"), LOW)
def test_two_and_three_bits_stay_so_where_they_take_less(
    tmp_path: Path, bits: int, k: int, groups: int, moved: bool, scheme: str
) -> None:
    """Scales are of float16, the least that it has among them, and not of bfloat16."""
    generator = torch.Generator().manual_seed(0)
    n = 32
    codes = torch.randint(0, 2**bits, (k, n), generator=generator)
    zeros = torch.randint(0, 2**bits, (groups, n), generator=generator)
    scales = torch.rand((groups, n), generator=generator).half()
    scales[0, :3] = torch.tensor([2.0**-24, 65504.0, -0.333])
    assert not torch.equal(scales.bfloat16().half(), scales)
    g_idx = torch.arange(k) // (k // groups)
    if moved:
        g_idx = g_idx[torch.randperm(k, generator=generator)]
    words = partial(torch.tensor, dtype=torch.int32)
    tensors = {
        "a.qweight": words([bits_of(column, bits) for column in codes.t().tolist()]).t(),
        "a.qzeros": words([bits_of(row, bits) for row in zeros.tolist()]),
        "a.scales": scales,
        "a.g_idx": g_idx.int(),
    }
    write_tensors(tmp_path / "x.safetensors", tensors)
    model = nn.ModuleDict({"a": nn.Linear(k, n, bias=False, device="meta")})
    found = graphopt.load_weights(model, tmp_path / "x.safetensors", formats=("gptq{zeros=v2}",))
    assert found.packed[0].scheme == scheme
    kept = packed_weights(model)["a.weight"]
    assert found.packed[0].bytes == kept.scheme.stored_bytes(n, k, torch.float32)
    if scheme.startswith(f"int{bits}"):
        four = default_host().scheme("int4{group=32}").stored_bytes(n, k, torch.float32)
        assert found.packed[0].bytes < four
    exact = ((codes - zeros[g_idx]) * scales.float()[g_idx]).t()
    assert torch.equal(weight_of(model, "a"), exact)
    x = torch.randn(3, k, generator=generator)
    product = kept.scheme.linear_op.partition("::")[2]
    args = (*kept.packed().values(), None, *kept.scheme.constants(n, k))
    read = getattr(torch.ops.graphopt, product)(x, *args)
    # Sums of K products in float32, in whatever order.
    off = (read.double() - x.double() @ exact.double().t()).abs()
    assert bool((off <= k * 2.0**-24 * (x.double().abs() @ exact.double().abs().t())).all())


@pytest.mark.parametrize("kind", [Int2, Int3])
def test_what_two_and_three_bits_cannot_hold_is_told(kind: Any) -> None:
    scheme = kind(group=32, outliers=0.0)
    codes, ones = torch.zeros((2, 256), dtype=torch.uint8), torch.ones(2, 8)
    most, step = 15.875 * 2**scheme.bits / 16, 2 ** (7 - scheme.bits)
    assert isinstance(scheme.exact(codes, ones, ones * most), dict)
    for scales, zeros, reason in (
        (ones * 1.00001, ones, f"{scheme.name} keeps scales of 16 bits of mantissa, its scales have more"),
        (ones * 2.0**-149, ones, f"{scheme.name} keeps scales of 16 bits of mantissa, its scales have more"),
        (ones * float("nan"), ones, "its scales are not finite"),
        (
            ones,
            ones * 2**scheme.bits,
            f"{scheme.name} keeps zeros from 0 to {most:g} in steps of 1/{step}, its zeros are others",
        ),
    ):
        assert str(scheme.exact(codes, scales, zeros)) == reason
    found = kind(group=32, outliers=1.0).exact(codes, ones, ones)
    assert str(found) == "outliers=1 have codes of four bits: expected 0"


def test_models_of_several_layers_run_as_their_dense_weights_do(tmp_path: Path) -> None:
    """The linears of two layers in GPTQ, one of them in act-order; a table tied to the head, dense."""
    dense = Chain(2).eval()
    tensors: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(1)
    words = partial(torch.tensor, dtype=torch.int32)
    for name, tensor in dense.state_dict().items():
        prefix, _, kind = name.rpartition(".")
        if kind != "weight" or not isinstance(dense.get_submodule(prefix), nn.Linear) or prefix == "head":
            tensors[name] = tensor
            continue
        n, k = tensor.shape
        codes = torch.randint(0, 16, (n, k), generator=generator)
        zeros = torch.randint(1, 16, (n, k // 32), generator=generator)
        scales = (torch.rand((n, k // 32), generator=generator) / 30).half()
        g_idx = torch.arange(k) // 32
        if "1.down" in name:
            g_idx = g_idx[torch.randperm(k, generator=generator)]
        tensors |= {
            f"{prefix}.qweight": words([bits_of(row, 4) for row in codes.tolist()]).t(),
            f"{prefix}.qzeros": words([bits_of(row, 4) for row in (zeros - 1).t().tolist()]),
            f"{prefix}.scales": scales.t(),
            f"{prefix}.g_idx": g_idx.int(),
        }
        with torch.no_grad():
            tensor.copy_((codes - zeros[:, g_idx]) * scales.float()[:, g_idx])
    del tensors["head.weight"]
    write_tensors(tmp_path / "model.safetensors", tensors)
    with torch.device("meta"):
        model = Chain(2).eval()
    found = graphopt.load_weights(model, tmp_path)
    assert [weight.scheme for weight in found.packed].count("int4-ordered{group=32}") == 1
    assert len(found.packed) == 4 and model.head.weight is model.embed.weight
    (ids,) = batches(1)[0]
    with torch.no_grad():
        assert torch.equal(model(ids), dense(ids))
        fast = graphopt.optimize(model, (ids,), emit="eager", on_error="raise")
        torch.testing.assert_close(fast(ids), dense(ids))
        read = [
            str(node.target) for node in fast.programs[0].nodes() if "graphopt.linear" in str(node.target)
        ]
        assert len(read) == 4


class Columns(nn.Module):
    """A layer that holds its weight as [K, N]."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(k, n))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_a_parameter_may_be_held_by_columns(tmp_path: Path) -> None:
    model = nn.ModuleDict({"linear": Columns(K, N)})
    graphopt.load_weights(model, WEIGHTS / "gptq_v2.safetensors", formats=("gptq{zeros=v2}",))
    assert torch.equal(weight_of(model, "linear").t()[ROWS].half(), EXPECTED["gptq.bits4_group32"])
    square = {name: tensor.clone() for name, tensor in square_gptq().items()}
    write_tensors(tmp_path / "x.safetensors", square)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Columns(32, 32), nn.Linear(32, 32, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))  # type: ignore[no-any-return]

    with pytest.raises(CheckpointError) as caught:
        graphopt.load_weights(Two(), tmp_path / "x.safetensors")
    assert "a.weight is square, and Columns does not say which side its outputs are" in str(caught.value)
    assert "give example inputs: load_weights(model, path, inputs=...)" in str(caught.value)
    found = Two().eval()
    graphopt.load_weights(found, tmp_path / "x.safetensors", inputs=(torch.randn(3, 32),))
    assert torch.equal(weight_of(found, "a").t(), weight_of(found, "b"))
    kept = packed_weights(found)
    assert {name: weight.orientation for name, weight in kept.items()} == {
        "a.weight": "columns",
        "b.weight": "rows",
    }


def square_gptq() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    one = {
        "qweight": torch.randint(-(2**31), 2**31, (4, 32), generator=generator).int(),
        "qzeros": torch.full((1, 4), 0x77777777, dtype=torch.int32),
        "scales": torch.rand((1, 32), generator=generator).half(),
    }
    return {f"{name}.{key}": tensor for name in ("a", "b") for key, tensor in one.items()}


def test_weights_in_several_files_are_read_one_by_one(tmp_path: Path) -> None:
    tensors, _ = read_tensors(WEIGHTS / "gptq.safetensors")
    places = {}
    for number, name in enumerate(tensors):
        places[name] = f"part-{number % 3}.safetensors"
    for file in set(places.values()):
        write_tensors(tmp_path / file, {n: t for n, t in tensors.items() if places[n] == file})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    one, other = model_of("gptq"), model_of("gptq")
    graphopt.load_weights(one, tmp_path)
    graphopt.load_weights(other, WEIGHTS / "gptq.safetensors")
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


def test_loaded_weights_are_saved_and_come_back(tmp_path: Path) -> None:
    model = model_of("torchao", dtype=torch.bfloat16)
    graphopt.load_weights(model, WEIGHTS / "torchao.safetensors")
    path = graphopt.save_weights(model, tmp_path / "model.safetensors")
    again = model_of("torchao", dtype=torch.bfloat16)
    found = graphopt.load_weights(again, path)
    assert {weight.format for weight in found.packed} == {"graphopt"}
    for name in ("int8", "int4", "groups"):
        assert torch.equal(weight_of(again, name), weight_of(model, name))


def test_formats_of_plugins_are_found(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Halves(graphopt.WeightFormat):
        name: ClassVar[str] = "halves"
        factor: float = 1.0

        def find(self, checkpoint: Any) -> Any:
            for key in checkpoint.names:
                if key.endswith(".halves"):
                    shape = checkpoint.entry(key).shape
                    yield StoredWeight(key.replace(".halves", ".weight"), *shape, {"codes": key})

        def read(self, stored: Any, checkpoint: Any) -> Any:
            codes = checkpoint.read(stored.parts["codes"])
            scales = torch.full((stored.n,), self.factor / 2)
            return PackedTensors(Int8(), {"codes": codes, "scales": scales})

    class Plugin:
        graphopt_api = 1

        @graphopt.hookimpl
        def graphopt_weight_formats(self) -> Any:
            return (Halves,)

    codes = torch.arange(-8, 8, dtype=torch.int8).view(4, 4)
    write_tensors(tmp_path / "x.safetensors", {"0.halves": codes, "0.bias": torch.ones(4)})
    for formats, factor in ((None, 1.0), (("halves{factor=3.0}",), 3.0), ((Halves(5.0),), 5.0)):
        model = nn.Sequential(nn.Linear(4, 4))
        graphopt.load_weights(model, tmp_path / "x.safetensors", plugins=(Plugin(),), formats=formats)
        assert torch.equal(model[0].weight, codes * factor / 2)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"not in the model: 0\.halves"):
        graphopt.load_weights(nn.Sequential(nn.Linear(4, 4)), tmp_path / "x.safetensors", strict=True)


def test_formats_are_spelled() -> None:
    host = default_host()
    assert {*host.weight_formats()} == {"gptq", "awq", "bitsandbytes", "torchao"}
    assert (
        str(host.weight_format("gptq{zeros=v2}")) == "gptq{zeros=v2}"
        and str(host.weight_format("awq")) == "awq"
    )
    with pytest.raises(UnknownNameError, match="unknown weight format 'gptk'; did you mean 'gptq'"):
        host.weight_format("gptk")
    with pytest.raises(UnknownNameError, match="unknown option of format gptq 'zero'; did you mean 'zeros'"):
        host.weight_format("gptq{zero=v2}")
    with pytest.raises(CheckpointError, match="must be one of 'auto', 'v1', 'v2', got 'v3'"):
        host.weight_format("gptq{zeros=v3}")
