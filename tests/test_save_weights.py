"""Models with packed weights as safetensors and back: bits, ties, shards, and what is refused."""

from __future__ import annotations

import copy
import json
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import CheckpointError
from graphopt.packing import PackedWeight, Scheme, pack_weights, packed_weights, scheme_text
from graphopt.plugins import default_host
from graphopt.tensors_file import TensorsFile, read_tensors, write_tensors
from graphopt_kernels.quantized.int4 import Int4
from graphopt_kernels.quantized.int8 import Int8
from tests.packing_cases import FEW, Few

ROWS = "rows"


class Net(nn.Module):
    """A table tied to the head, a linear, a matrix read by columns, a buffer, a second layer."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.up = nn.Linear(64, 96)
        self.down = nn.Parameter(torch.randn(96, 64) / 5)
        self.more = nn.Linear(64, 64)
        self.norm = nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 50, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.relu(self.up(self.embed(tokens))) @ self.down
        return self.head(self.norm(x + self.more(x)))  # type: ignore[no-any-return]


TOKENS = torch.arange(12)
SCHEMES: dict[str, tuple[Scheme, str]] = {
    "embed.weight": (Int8(), ROWS),
    "up.weight": (Int4(group=32), ROWS),
    "down": (Int4(group=32), "columns"),
}


def packed_net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net().eval()
    model.norm.running_mean.uniform_()  # type: ignore[union-attr,operator]
    pack_weights(model, SCHEMES)
    return model


def on_meta(tied: bool = True) -> Net:
    with torch.device("meta"):
        return Net(tied).eval()


@pytest.mark.parametrize("shard", ["5GiB", 6000])
@pytest.mark.parametrize("meta", [True, False])
def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path, meta: bool, shard: Any) -> None:
    model = packed_net()
    written = graphopt.save_weights(model, tmp_path / "model.safetensors", shard=shard)
    assert written.name == ("model.safetensors" if shard == "5GiB" else "model.safetensors.index.json")
    if shard == 6000:
        files = sorted(tmp_path.glob("*.safetensors"))
        assert len(files) > 2 and not (tmp_path / "model.safetensors").exists()
        largest = max(t.nbytes for t in model.state_dict().values())
        assert all(file.stat().st_size < max(6000, largest) + 3000 for file in files)
    assert not [file.name for file in tmp_path.iterdir() if file.name.endswith(".tmp")]
    fresh = on_meta() if meta else Net().eval()
    found = graphopt.load_weights(fresh, tmp_path)
    assert {weight.names[0]: weight.scheme for weight in found.packed} == {
        name: scheme_text(scheme) for name, (scheme, _) in SCHEMES.items()
    }
    assert ("embed.weight", "head.weight") in {weight.names for weight in found.packed}
    state, loaded = model.state_dict(), fresh.state_dict()
    assert list(state) == list(loaded)
    assert all(
        torch.equal(state[name], loaded[name]) and state[name].dtype is loaded[name].dtype for name in state
    )
    assert fresh.head.parametrizations.weight[0] is fresh.embed.parametrizations.weight[0]  # type: ignore[index,union-attr]
    assert not any(tensor.is_meta for tensor in (*fresh.parameters(), *fresh.buffers()))
    with torch.no_grad():
        assert torch.equal(fresh(TOKENS), model(TOKENS))
    assert isinstance(fresh.more.weight, nn.Parameter) and fresh.more.weight.requires_grad


def test_other_programs_read_the_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = packed_net()
    path = graphopt.save_weights(model, tmp_path / "model.safetensors")
    other = packed_net(1)
    tied = {f"head.weight.{key}": f"embed.weight.{key}" for key in ("codes", "scales")}
    found = load_file(path)
    other.load_state_dict({**found, **{name: found[first] for name, first in tied.items()}})
    with torch.no_grad():
        assert torch.equal(other(TOKENS), model(TOKENS))


def test_dense_checkpoints_still_load_into_what_was_loaded(tmp_path: Path) -> None:
    torch.manual_seed(3)
    dense = Net().eval()
    model = copy.deepcopy(dense)
    pack_weights(model, SCHEMES)
    graphopt.save_weights(model, tmp_path / "packed.safetensors")
    loaded = on_meta()
    graphopt.load_weights(loaded, tmp_path / "packed.safetensors")
    other = packed_net(4)
    path = graphopt.save_weights(dense, tmp_path / "dense.safetensors")
    for target in (loaded, other):
        found = graphopt.load_weights(target, path)
        assert not found.packed and "down" in found.dense
        with torch.no_grad():
            assert torch.equal(target(TOKENS), model(TOKENS))
    loaded.load_state_dict(dense.state_dict())


def test_tied_weights_go_into_a_model_that_does_not_tie_them(tmp_path: Path) -> None:
    model = packed_net()
    path = graphopt.save_weights(model, tmp_path / "packed.safetensors")
    apart = on_meta(tied=False)
    graphopt.load_weights(apart, path)
    with torch.no_grad():
        assert torch.equal(apart(TOKENS), model(TOKENS))
    dense = Net()
    path = graphopt.save_weights(dense, tmp_path / "dense.safetensors")
    assert "head.weight" not in read_tensors(path)[0]
    for apart in (Net(tied=False), on_meta(tied=False)):
        found = graphopt.load_weights(apart, path)
        assert "head.weight" in found.dense
        assert torch.equal(apart.head.weight, dense.head.weight)


@pytest.mark.parametrize(
    "text",
    [
        "int8", "fp8", "int8-dynamic{smooth=0.5}", "fp8-dynamic", "llm-int8", "lossless12", "int4",
        "int4{group=32,method=gptq}", "int4-awq{group=64}", "int4-ordered{group=32}", "int4-offset{group=64}",
        "nf4", "nf4{double=true}", "int2{group=32,outliers=0.5}", "int2{outliers=0.0}", "int3{outliers=0.0}",
        "int3{group=32,method=gptq,outliers=1.0}",
    ],
)  # fmt: skip
def test_every_scheme_comes_back(tmp_path: Path, text: str) -> None:
    torch.manual_seed(0)
    scheme = default_host().scheme(text)
    model = nn.Sequential(nn.Linear(128, 48), nn.Linear(48, 128)).to(torch.bfloat16)
    with torch.no_grad():
        model[0].weight[5] = 0  # type: ignore[index]
    x = torch.randn(300, 128).bfloat16()
    wide = x.float()
    wide[:, 3] *= 30
    found = {"gram": wide.t() @ wide / 300, "largest": wide.abs().amax(0)}
    pack_weights(model, {"0.weight": (scheme, ROWS)}, {"0.weight": found})
    kept = packed_weights(model)["0.weight"]
    assert scheme.refuses_packed(kept.packed(), 48, 128, torch.bfloat16) is None
    layout = scheme.layout(48, 128, torch.bfloat16)
    assert layout is not None and tuple(layout) == kept.names
    path = graphopt.save_weights(model, tmp_path / "model.safetensors")
    fresh = nn.Sequential(nn.Linear(128, 48), nn.Linear(48, 128)).to(device="meta", dtype=torch.bfloat16)
    graphopt.load_weights(fresh, path)
    again = packed_weights(fresh)["0.weight"]
    assert again.scheme == scheme
    assert all(torch.equal(again.packed()[name], tensor) for name, tensor in kept.packed().items())
    assert again.statistics.keys() == kept.statistics.keys() == {"largest"}
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))


def test_schemes_of_plugins_come_back_with_the_plugin(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(10, 8))
    pack_weights(model, {"0.weight": (Few(least=2), ROWS)})
    path = graphopt.save_weights(model, tmp_path / "model.safetensors")
    fresh = nn.Sequential(nn.Linear(10, 8))
    with pytest.raises(CheckpointError, match=r"0\.weight: unknown scheme 'few'"):
        graphopt.load_weights(fresh, path)
    graphopt.load_weights(fresh, path, plugins=(FEW,))
    x = torch.randn(3, 10)
    assert torch.equal(fresh(x), model(x))


def test_plans_and_optimized_models_are_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).eval().requires_grad_(False)
    x = torch.randn(4, 64)
    fresh = copy.deepcopy(model)
    graphopt.quantize(model, (x,), schemes=("int4{group=32}",))
    fast = graphopt.optimize(model, (x,), emit="eager")
    path = graphopt.save_weights(fast, tmp_path / "fast.safetensors")
    with pytest.raises(CheckpointError, match="cannot load packed weights into an optimized model"):
        graphopt.load_weights(fast, path)
    assert len(graphopt.load_weights(fresh, path).packed) == 2
    assert torch.equal(fresh(x), model(x))


def test_one_weight_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    pack_weights(model, {f"{place}.weight": (Int4(group=32), ROWS) for place in range(4)})
    path = graphopt.save_weights(model, tmp_path / "model.safetensors")
    reads: list[tuple[str, weakref.ref[Tensor]]] = []
    read = TensorsFile.read

    def watched(file: TensorsFile, name: str) -> Tensor:
        # Of dense weights nothing is left; packed ones are those that the model keeps.
        alive = [other for other, tensor in reads if tensor() is not None]
        assert not any(other.count(".") == 1 for other in alive), alive
        found = read(file, name)
        reads.append((name, weakref.ref(found)))
        return found

    monkeypatch.setattr(TensorsFile, "read", watched)
    graphopt.load_weights(nn.Sequential(*(nn.Linear(64, 64) for _ in range(8))), path)
    # Packed ones are read twice: their numbers are checked before anything changes.
    assert len(reads) == 2 * 4 * 2 + 4 + 8


# --- what is refused --------------------------------------------------------------------------------


def saved(tmp_path: Path) -> Path:
    return graphopt.save_weights(packed_net(), tmp_path / "model.safetensors")


def changed(path: Path, change: Callable[[dict[str, Tensor], Any], None]) -> None:
    tensors, texts = read_tensors(path)
    metadata = json.loads(texts["graphopt"])
    change(tensors, metadata)
    write_tensors(path, tensors, {**texts, "graphopt": json.dumps(metadata)})


def weight_in(metadata: Any) -> Any:
    return metadata["weights"]["up.weight"]


def nan_scale(tensors: dict[str, Tensor], metadata: Any) -> None:
    tensors["embed.weight.scales"][3] = float("nan")


def words_of_infinity(tensors: dict[str, Tensor], metadata: Any) -> None:
    tensors["up.weight.words"][0, 0] = 0x7F800000


def large_zero(tensors: dict[str, Tensor], metadata: Any) -> None:
    tensors["up.weight.words"][0, 0] |= 128


def lost(tensors: dict[str, Tensor], metadata: Any) -> None:
    del tensors["up.weight.words"]


def cut(tensors: dict[str, Tensor], metadata: Any) -> None:
    tensors["up.weight.codes"] = tensors["up.weight.codes"][:, :16]


def other_dtype(tensors: dict[str, Tensor], metadata: Any) -> None:
    tensors["up.weight.codes"] = tensors["up.weight.codes"].view(torch.int8)


def dense_cut(tensors: dict[str, Tensor], metadata: Any) -> None:
    tensors["more.weight"] = tensors["more.weight"][:, :3]


def dense_whole(tensors: dict[str, Tensor], metadata: Any) -> None:
    tensors["more.weight"] = tensors["more.weight"].to(torch.int32)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda t, m: m.update(schema="graphopt/weights@9"),
            "has schema 'graphopt/weights@9', this graphopt reads",
        ),
        (lambda t, m: m.pop("weights"), "malformed metadata: KeyError('weights')"),
        (lambda t, m: weight_in(m).update(orientation="sideways"), "orientation 'sideways'"),
        (lambda t, m: weight_in(m).update(shape=[96]), "shape [96] of rows"),
        (lambda t, m: weight_in(m).update(dtype="bfloat15"), "dtype 'bfloat15'"),
        (lambda t, m: weight_in(m).update(dtype="float16"), "up.weight was saved as torch.float16 (96, 64)"),
        (lambda t, m: weight_in(m).update(shape=[64, 96]), "(64, 96), the model has torch.float32 (96, 64)"),
        (lambda t, m: weight_in(m).update(scheme="int5"), "up.weight: unknown scheme 'int5'; did you mean"),
        (
            lambda t, m: weight_in(m).update(scheme="int4{group=64}"),
            "its words are torch.int32 (96, 2): expected",
        ),
        (
            lambda t, m: weight_in(m).update(scheme="int8"),
            "its tensors are codes, words: expected codes, scales",
        ),
        (nan_scale, "embed.weight: no weight (50, 64) is packed so as int8: its scales are not finite"),
        (words_of_infinity, "its words hold scales that are not finite"),
        (large_zero, "its words hold zeros of 16 and more"),
        (lost, "holds no tensor 'up.weight.words'; the nearest is 'up.weight.codes'"),
        (cut, "its codes are torch.uint8 (96, 16): expected torch.uint8 (96, 32)"),
        (other_dtype, "its codes are torch.int8 (96, 32): expected torch.uint8 (96, 32)"),
        (dense_cut, "more.weight has shape (64, 3) in the checkpoint and (64, 64) in the model"),
        (dense_whole, "more.weight is torch.int32 in the checkpoint and torch.float32 in the model"),
    ],
)
def test_files_that_do_not_hold_together_are_refused(tmp_path: Path, change: Any, reason: str) -> None:
    path = saved(tmp_path)
    changed(path, change)
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        graphopt.load_weights(on_meta(), path)
    torch.manual_seed(7)
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        graphopt.load_weights(model, path)
    after = model.state_dict()
    assert after.keys() == before.keys(), "no weight was packed"
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    content = path.read_bytes()
    for damaged, reason in (
        (content[:-7], "its bytes are not in the file"),
        (content[:300], "the header is longer than the file"),
        (b"", "the header is longer than the file"),
        (content[:8] + b"[" + content[9:], "the header is no JSON"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=reason):
            graphopt.load_weights(on_meta(), path)
    with pytest.raises(FileNotFoundError):
        graphopt.load_weights(on_meta(), tmp_path / "nothing.safetensors")


def test_files_of_two_saves_are_told_apart(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, seed in ((old, 0), (new, 1)):
        folder.mkdir()
        graphopt.save_weights(packed_net(seed), folder / "model.safetensors", shard=6000)
    names = sorted(file.name for file in old.glob("*.safetensors"))
    assert names == sorted(file.name for file in new.glob("*.safetensors"))
    (new / names[1]).replace(old / names[1])
    with pytest.raises(CheckpointError, match=re.escape(f"{names[1]} is of another save than")):
        graphopt.load_weights(on_meta(), old)
    (old / names[1]).unlink()
    with pytest.raises(CheckpointError, match=re.escape(f"names {names[1]!r}, which is not there")):
        graphopt.load_weights(on_meta(), old)


def test_indices_that_lead_elsewhere_are_refused(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    for content, reason in (
        ("{", "is no JSON"),
        ("[]", "is no JSON object"),
        ("{}", "is no index: expected 'weight_map'"),
        ('{"weight_map": {"x": "../x.safetensors"}}', "names '../x.safetensors': expected a file beside it"),
    ):
        index.write_text(content)
        with pytest.raises(CheckpointError, match=re.escape(reason)):
            graphopt.load_weights(on_meta(), index)
    write_tensors(tmp_path / "x.safetensors", {"y": torch.zeros(2)})
    index.write_text('{"weight_map": {"x": "x.safetensors"}}')
    with pytest.raises(
        CheckpointError, match=re.escape("puts 'x' into x.safetensors, which does not hold it")
    ):
        graphopt.load_weights(on_meta(), index)
    index.unlink()
    write_tensors(tmp_path / "z.safetensors", {"y": torch.zeros(2)})
    with pytest.raises(
        CheckpointError, match=re.escape("several checkpoints, or of none: x.safetensors, z.safe")
    ):
        graphopt.load_weights(on_meta(), tmp_path)


def test_names_that_do_not_fit_are_told_with_the_nearest(tmp_path: Path) -> None:
    path = saved(tmp_path)

    class Other(Net):
        def __init__(self) -> None:
            super().__init__()
            self.moar = nn.Linear(64, 64)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.moar(super().forward(tokens))  # type: ignore[no-any-return]

    model = Other()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        graphopt.load_weights(model, path)
    assert "not in the checkpoint: moar.bias; the nearest is 'more.bias'" in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    found = graphopt.load_weights(model, path, strict=False)
    assert found.missing == ("moar.weight", "moar.bias") and len(found.packed) == 3
    assert "missing: moar.bias" in str(found) and "2 x int4{group=32} (graphopt)" in str(found)
    del model
    fewer = on_meta()
    del fewer.more
    with pytest.raises(CheckpointError, match=re.escape("not in the model: more.weight")):
        graphopt.load_weights(fewer, path)
    del fewer.up
    with pytest.raises(
        CheckpointError, match=re.escape("holds up.weight (graphopt), the model has no parameter")
    ):
        graphopt.load_weights(fewer, path)
    with pytest.raises(CheckpointError, match=re.escape("down is packed already, as int4{group=32}")):
        graphopt.load_weights(packed_net(), path)


def test_buffers_that_no_file_holds_must_not_be_on_meta(tmp_path: Path) -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("turns", torch.ones(4), persistent=False)

    path = graphopt.save_weights(Turned(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = Turned()
    with pytest.raises(CheckpointError, match="turns is on the device meta, and no checkpoint holds it"):
        graphopt.load_weights(model, path)


def test_what_cannot_be_written_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"a": 1}

    complex_one = nn.Linear(2, 2, dtype=torch.complex64)
    for model, name, reason in (
        (packed_net(), "model.bin", "cannot write model.bin: expected a name that ends in .safetensors"),
        (on_meta(), "m.safetensors", "cannot write down: it is on the device meta"),
        (Extra(2, 2), "m.safetensors", "cannot write _extra_state: it is dict, no tensor"),
        (
            complex_one,
            "m.safetensors",
            "cannot write m.safetensors: tensor 'weight': the format has no torch.complex64",
        ),
    ):
        with pytest.raises(CheckpointError, match=re.escape(reason)):
            graphopt.save_weights(model, tmp_path / name)
    with pytest.raises(graphopt.BudgetSyntaxError):
        graphopt.save_weights(packed_net(), tmp_path / "m.safetensors", shard="5 gigs")
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path)
    before = path.read_bytes()
    from graphopt.packing import save

    def fails(path: Path, *rest: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(save, "write_tensors", fails)
    with pytest.raises(OSError, match="no space left"):
        graphopt.save_weights(packed_net(1), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["int2{group=32,outliers=0.25}", "int3{group=32,outliers=1.0}"])
def test_words_that_name_slots_that_are_not_there_are_refused(text: str) -> None:
    torch.manual_seed(0)
    scheme = default_host().scheme(text)
    tensors = scheme.pack(torch.randn(8, 256), {})

    def hold(place: int, word: int) -> None:
        words = tensors["words"].clone()
        words[3, place] = word
        PackedWeight.holding(scheme, {**tensors, "words": words}, (8, 256), torch.float32, ROWS)

    one = 0x3F80 << 16
    hold(0, one | 1 << 7)
    for place, slot in ((0, 2), (0, 511), (1, 1)):
        reason = "its words name others than the 1 slots of a row, or within a unit"
        with pytest.raises(graphopt.QuantizationError, match=reason):
            hold(place, one | slot << 7)
    with pytest.raises(graphopt.QuantizationError, match="its words hold scales that are not finite"):
        hold(0, 0x7F80 << 16)


def test_models_of_two_and_three_bits_come_back_in_several_files(tmp_path: Path) -> None:
    schemes = {
        "embed.weight": (default_host().scheme("int3{group=32,outliers=0.5}"), ROWS),
        "up.weight": (default_host().scheme("int2{outliers=1.0}"), ROWS),
        "down": (default_host().scheme("int2{group=32,outliers=0.0}"), "columns"),
    }
    torch.manual_seed(0)
    model = Net().eval()
    pack_weights(model, schemes)
    graphopt.save_weights(model, tmp_path / "model.safetensors", shard=2500)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    fresh = on_meta()
    found = graphopt.load_weights(fresh, tmp_path)
    assert {weight.names[0]: weight.scheme for weight in found.packed} == {
        name: scheme_text(scheme) for name, (scheme, _) in schemes.items()
    }
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in fresh.state_dict().items())
    with torch.no_grad():
        assert torch.equal(fresh(TOKENS), model(TOKENS))
        fast = graphopt.optimize(fresh, (TOKENS,), emit="eager", on_error="raise")
        read = {str(node.target).partition(".default")[0] for node in fast.programs[0].nodes()}
        assert {"graphopt.linear_int2", "graphopt.linear_int3"} <= read
        torch.testing.assert_close(fast(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)


def test_packed_tensors_that_lead_out_of_range_are_refused() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 64).bfloat16()
    exact = default_host().scheme("lossless12")
    tensors = exact.pack(weight, {})
    tensors["escapes"][0, 0] = 64 << 16
    with pytest.raises(graphopt.QuantizationError, match="its escapes name columns that are not below 64"):
        PackedWeight.holding(exact, tensors, (8, 64), torch.bfloat16, ROWS)
    outliers = default_host().scheme("llm-int8{most=0.1}")
    tensors = outliers.pack(weight, {"largest": torch.arange(64.0)})
    tensors["columns"][0] = 64
    with pytest.raises(graphopt.QuantizationError, match="its columns are not below 64"):
        PackedWeight.holding(outliers, tensors, (8, 64), torch.bfloat16, ROWS)
    ordered = default_host().scheme("int4-ordered{group=32}")
    tensors = ordered.pack(weight, {"gram": torch.eye(64)})
    tensors["order"][0] = tensors["order"][1]
    with pytest.raises(graphopt.QuantizationError, match="its order is no permutation of 64 inputs"):
        PackedWeight.holding(ordered, tensors, (8, 64), torch.bfloat16, ROWS)
    with pytest.raises(graphopt.QuantizationError, match="takes weights of float32, float16 and bfloat16"):
        PackedWeight.holding(ordered, tensors, (8, 64), torch.float64, ROWS)


def test_checkpoints_are_listed_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from graphopt.cli.main import main

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["weights", *arguments])
        said = capsys.readouterr()
        return said.out if not stopped.value.code else said.err

    graphopt.save_weights(packed_net(), tmp_path / "model.safetensors", shard=6000)
    text = run(str(tmp_path))
    assert re.search(r"up\.weight +graphopt +96 +64 +3\.75 KiB", text), text
    assert "3 packed, 8 dense" in text
    found = json.loads(run(str(tmp_path), "--json"))
    assert found["dense"]["tensors"] == 8
    assert {"weight": "down", "format": "graphopt", "n": 64, "k": 96, "bytes": 64 * 76} in found["packed"]
    other = str(Path(__file__).parent / "weights" / "awq.safetensors")
    assert "awq " in run(other) and "0 packed, 4 dense" in run(other, "--format", "bitsandbytes")
    assert "unknown weight format 'gptk'; did you mean 'gptq'" in run(other, "--format", "gptk")
