"""Artefacts that are damaged, foreign or hostile are refused by name, and none of them runs anything."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt import ArtefactError
from graphopt.artefact.folder import Folder, written

MARK = "mark-of-code-that-ran"


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, power: int = 2) -> torch.Tensor:
        return (self.inner(x) ** power).softmax(-1)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        fast = graphopt.optimize(Small().eval(), (torch.randn(2, 4),), emit="eager", cache=False)
    return fast.save(tmp_path_factory.mktemp("artefacts") / "small")


@pytest.fixture
def folder(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(original, tmp_path / "small"))


def rehash(folder: Path, change: Callable[[dict[str, Any]], None] = lambda facts: None) -> None:
    """Make the hashes those of what the files hold now, as whoever means harm would."""
    facts = json.loads((folder / "artefact.json").read_text())
    facts.pop("sha256")
    for name in facts["files"]:
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            facts["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change(facts)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    (folder / "artefact.json").write_text(json.dumps({**facts, "sha256": digest}))


@contextmanager
def edited(folder: Path) -> Iterator[Any]:
    """What ``programs.json`` says, to be changed in the block; hashes are made right afterwards."""
    content = json.loads((folder / "programs.json").read_text())
    yield content
    (folder / "programs.json").write_text(json.dumps(content))
    rehash(folder)


def test_as_it_was_saved_it_loads(folder: Path) -> None:
    rehash(folder)
    assert graphopt.load(folder)(torch.zeros(2, 4)).shape == (2, 4)


# --- hostile ---------------------------------------------------------------------------------------------


def calls(content: Any) -> Any:
    """A call of the program that is compiled."""
    graph = content["graphs"][content["steps"][0]["step"]["codes"][0]["semantic"]]
    return next(node for node in graph["nodes"] if node["op"] == "call_function")


CODE = f"__import__('os').mkdir('{MARK}')"


def target(name: str, *args: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        calls(content).update(target=name, args=list(args), kwargs={})

    return change


def renamed(key: str, text: str) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        calls(content)[key] = text

    return change


def constant(content: Any) -> None:
    calls(content).update(op="get_attr", target=f"x\n    {CODE}", args=[], tensor="inner.weight")


def keyword(content: Any) -> None:
    calls(content)["kwargs"] = {f"a={CODE},b": 1}


def path(text: str) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        content["state"][0].update(path=text, key=text)

    return change


def signature(content: Any) -> None:
    content["signature"][0]["name"] = f"x={CODE}"


def default(content: Any) -> None:
    content["signature"][1]["default"] = {"__reduce__": CODE}


def results(content: Any) -> None:
    content["steps"][0]["results"] = {"class": "subprocess.Popen", "context": [["touch", MARK]], "items": []}


def reference(content: Any) -> None:
    content["steps"][0]["results"] = {"value": 99}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (target("os.system", f"touch {MARK}"), "calls 'os.system', which is no operator"),
        (target("builtins.eval", CODE), "calls 'builtins.eval', which is no operator"),
        (target("os::system.default", f"touch {MARK}"), "namespace 'os' is not one that artefacts may call"),
        (target("aten::from_file.default", "/etc/hostname"), "from_file.default', which reads or writes"),
        (target("aten::__class__.mro"), "'aten::__class__.mro', which is not registered here"),
        (target("aten::mm.__class__"), "'aten::mm.__class__', which is not registered here"),
        (target("load_library::x.y", MARK), "namespace 'load_library' is not one"),
        (target("../../aten::mm.default"), "'../../aten::mm.default', which is no operator"),
        (renamed("name", f"x; {CODE}"), "is no node"),
        (renamed("op", "call_module"), "of kind 'call_module' is no node"),
        (renamed("args", [{"dtype": "serialization"}]), "'serialization' is no dtype"),  # type: ignore[arg-type]
        (renamed("args", [{"device": f"cpu:{CODE}"}]), "is no device"),  # type: ignore[arg-type]
        (renamed("args", [{"ref": "nobody"}]), "reads 'nobody', which no node before it makes"),  # type: ignore[arg-type]
        (renamed("args", [{"pickle": "gASV"}]), "which is no argument"),  # type: ignore[arg-type]
        (renamed("type", {"dtype": "float32"}), "is no type of a tensor"),  # type: ignore[arg-type]
        (constant, "is no name"),
        (keyword, "a keyword argument has no name"),
        (path("inner.__class__.x; y"), "'inner.__class__.x; y' is no name of a parameter or buffer"),
        (path("../../inner.weight"), "'../../inner.weight' is no name of a parameter or buffer"),
        (signature, "the arguments of the step are malformed"),
        (default, "is no structure"),
        (results, "'subprocess.Popen', which is no container that is registered here"),
        (reference, "a structure names value 99, which is not there"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_a_graph_that_would_run_code_is_refused(folder: Path, change: Any, said: str) -> None:
    with edited(folder) as content:
        change(content)
    with pytest.raises(ArtefactError, match=said):
        graphopt.load(folder)
    assert not (folder.parent / MARK).exists()


# --- sizes and steps --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sized_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch._dynamo.reset()
    model, x = Small().eval(), torch.randn(3, 4)
    with torch.no_grad():
        fast = graphopt.optimize(model, (x, 2), emit="eager", cache=False, dynamic_shapes=True)
        with torch.autocast("cpu", torch.bfloat16):
            fast(x, 2)
    return fast.save(tmp_path_factory.mktemp("artefacts") / "sized")


@pytest.fixture
def sized(sized_original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(sized_original, tmp_path / "sized"))


def symbol(**said: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        (size,) = [found for found in content["steps"][1]["symbols"] if found["of"] == "size"]
        size.update(said)

    return change


def guard(form: Any) -> Callable[[Any], None]:
    return lambda content: content["steps"][1]["guards"].append(form)


def look(form: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        shapes = [look["shape"] for look in content["types"] if "shape" in look]
        next(shape for shape in reversed(shapes) if isinstance(shape[0], dict))[0] = {"size": form}

    return change


def step_of(**said: Any) -> Callable[[Any], None]:
    return lambda content: content["steps"][1].update(said)


def twice(content: Any) -> None:
    content["steps"][1]["symbols"] *= 2


def nobody(content: Any) -> None:
    spec = next(spec for spec in content["steps"][1]["step"]["inputs"] if spec["source"] == "symbol")
    spec["name"] = "s999"


def numbered(content: Any) -> None:
    content["steps"][1]["arguments"]["dict"]["power"] = {"constant": 3}


def static(content: Any) -> None:
    for said in content["steps"]:
        said.update(symbols=[], guards=[])


def nested(depth: int) -> Any:
    form: Any = 1
    for _ in range(depth):
        form = ["+", 1, form]
    return form


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (symbol(name=f"s0 or {CODE}"), "is no symbol of a size"),
        (symbol(name="torch"), "step 1: 'torch' is no symbol of a size"),
        (symbol(of="__class__"), "is no symbol of a size"),
        (symbol(input=99), r"no input tells s\d+"),
        (symbol(dim=7), r"no input tells s\d+: \w+ has no dimension 7"),
        (symbol(hint=1 << 70), "is no symbol of a size"),
        (symbol(hint=0), r"s\d+ was 0, which is out of its own bounds"),
        (symbol(low="1"), r"symbols\[\d\]\.low: expected int"),
        (twice, "is no symbol of a size"),
        (nobody, "is symbol 's999', which is not there"),
        (static, "is no size|is symbol .*, which is not there"),
        (guard(["eval", CODE]), "is no size"),
        (guard(["__import__", "os"]), "is no size"),
        (guard([["+"], 1]), "is no size"),
        (guard({"__reduce__": CODE}), "is no size"),
        (guard(["==", "s999", 1]), r"'s999', 1\]. is no size"),
        (guard(["**", 2, 1 << 40]), "is no size: it has a power of 1099511627776"),
        (guard(["**", ["**", 9, 16], 16]), "is no size: it has a power of 16"),
        (guard(["not", 1, 2]), "is no size"),
        (guard(["//", 1, 0]), r"1 // 0 does not hold for the sizes that the program was traced with"),
        (guard(nested(60)), "is no size"),
        (guard(["+", *[1] * 600]), "is no size"),
        (guard(["==", 1, 2]), "1 == 2 does not hold for the sizes that the program was traced with"),
        (look(["eval", CODE]), "is no size"),
        (look(["**", 3, 99]), "is no size: it has a power of 99"),
        (step_of(constants={"a": "../../x"}), "has other constants than it names"),
        (numbered, "numbers of the call are not those of its sizes"),
        (step_of(tensors=-1), "the step takes '-1' tensors"),
        (lambda content: content.update(steps=[]), "it has no step, or not a report of each"),
        (lambda content: content["steps"].pop(), "it has no step, or not a report of each"),
        (lambda content: content.update(steps={"0": 1}), "steps is no list"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_sizes_and_steps_are_looked_up_never_evaluated(sized: Path, change: Any, said: str) -> None:
    with edited(sized) as content:
        change(content)
    with pytest.raises(ArtefactError, match=said):
        graphopt.load(sized)
    assert not (sized.parent / MARK).exists()


def test_other_sizes_than_were_planned_are_another_program(sized: Path) -> None:
    with edited(sized) as content:
        (spec,) = [found for found in content["steps"][1]["symbols"] if found["of"] == "size"]
        text = json.dumps(content).replace(f'"{spec["name"]}"', '"s5"')
        content.clear()
        content.update(json.loads(text))
    with pytest.raises(ArtefactError, match=r"it has fingerprint .*, not"):
        graphopt.load(sized)


def test_as_it_was_saved_a_step_of_sizes_loads(sized: Path) -> None:
    rehash(sized)
    loaded = graphopt.load(sized)
    x = torch.randn(5, 4)
    expected = nn.functional.linear(x, loaded.inner.weight, loaded.inner.bias) ** 3
    assert torch.equal(loaded(x, 3), expected.softmax(-1))
    with torch.autocast("cpu", torch.bfloat16):
        assert loaded(x).shape == (5, 4)


def test_json_that_is_nested_without_end_is_refused(folder: Path) -> None:
    (folder / "programs.json").write_text("[" * 200_000)
    rehash(folder)
    with pytest.raises(ArtefactError, match=r"programs\.json is no JSON: RecursionError"):
        graphopt.load(folder)


def test_files_outside_are_refused(folder: Path) -> None:
    (folder.parent / "outside.json").write_text("{}")
    for name in ("../outside.json", "/etc/hostname", "kernels/../../outside.py"):
        rehash(folder, lambda facts, name=name: facts["files"].update({name: {"bytes": 2, "sha256": "0"}}))  # type: ignore[misc]
        with pytest.raises(ArtefactError, match=f"names the file '{name}', which is of no artefact"):
            graphopt.load(folder)
        rehash(folder, lambda facts, name=name: facts["files"].pop(name))  # type: ignore[misc]
    shutil.move(folder / "report.json", folder.parent / "report.json")
    os.symlink(folder.parent / "report.json", folder / "report.json")
    with pytest.raises(ArtefactError, match=r"report\.json is no plain file"):
        graphopt.load(folder)


def test_sources_of_kernels_are_never_run(folder: Path) -> None:
    (folder / "kernels").mkdir()
    (folder / "kernels" / "bad.py").write_text(CODE)
    rehash(folder, lambda facts: facts["files"].update({"kernels/bad.py": {}}))
    rehash(folder)
    assert graphopt.load(folder)(torch.zeros(2, 4)).shape == (2, 4)
    assert not (folder.parent / MARK).exists()


def test_another_program_than_was_planned_is_refused(folder: Path) -> None:
    with edited(folder) as content:
        content["steps"][0]["step"]["codes"][0]["traced"] = "0" * 16
    with pytest.raises(ArtefactError, match=r"is another program .* than the one that was planned"):
        graphopt.load(folder)


def test_a_graph_that_was_changed_has_another_fingerprint(folder: Path) -> None:
    with edited(folder) as content:
        calls(content)["args"] = list(reversed(calls(content)["args"]))
    with pytest.raises(ArtefactError, match=r"it has fingerprint .*, not"):
        graphopt.load(folder)


# --- damaged ----------------------------------------------------------------------------------------------


def test_truncated_changed_and_missing_files_are_told(folder: Path) -> None:
    weights = folder / "weights.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-4])
    with pytest.raises(ArtefactError, match=r"weights\.safetensors has .* bytes, not the .* truncated"):
        graphopt.load(folder)
    weights.write_bytes(data[:-4] + b"abcd")
    with pytest.raises(ArtefactError, match=r"weights\.safetensors was changed: its hash is another"):
        graphopt.load(folder)
    weights.unlink()
    with pytest.raises(ArtefactError, match=r"weights\.safetensors is missing"):
        graphopt.load(folder)


def test_a_manifest_that_was_changed_or_is_none_is_told(folder: Path) -> None:
    manifest = folder / "artefact.json"
    text = manifest.read_text()
    manifest.write_text(text.replace(f'"{torch.__version__}"', '"9.9"'))
    with pytest.raises(ArtefactError, match=r"artefact\.json was changed: its hash is another"):
        graphopt.load(folder)
    manifest.write_text(text[:40])
    with pytest.raises(ArtefactError, match=r"artefact\.json is no JSON"):
        graphopt.load(folder)
    manifest.unlink()
    with pytest.raises(ArtefactError, match=r"has no artefact\.json: it is no artefact"):
        graphopt.load(folder)
    with pytest.raises(ArtefactError, match="is not there: it is no artefact"):
        graphopt.load(folder / "nowhere")


def said(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda facts: facts.update({key: value})


CUDA = {"kind": "cuda", "capability": "9.0", "vectors": "", "name": "NVIDIA H200"}
ARM = {"kind": "cpu", "capability": "riscv", "vectors": "", "name": ""}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (said("schema", "graphopt/artefact@3"), "has format 'graphopt/artefact@3', this graphopt reads"),
        (said("schema", "other/artefact@1"), "is none of graphopt's"),
        (said("torch", "2.4.1"), r"made with torch 2\.4\.1, this is"),
        (said("device", ARM), "for cpu of riscv, this is"),
        (said("device", {**ARM, "kind": "tpu"}), "for a device 'tpu'"),
        (said("device", None), "is malformed: device: expected an object"),
        pytest.param(
            said("device", CUDA),
            r"for CUDA devices of capability 9\.0 \(NVIDIA H200\), and there is none here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
    ids=["newer", "foreign", "torch", "machine", "kind", "nothing", "cuda"],
)
def test_other_formats_releases_and_machines_are_refused(folder: Path, change: Any, reason: str) -> None:
    rehash(folder, change)
    with pytest.raises(ArtefactError, match=reason):
        graphopt.load(folder)


def test_a_cpu_with_other_vectors_is_noted(folder: Path) -> None:
    rehash(folder, lambda facts: facts["device"].update(vectors="AVX9"))
    notes = graphopt.load(folder).report.diagnostics
    assert any(note.startswith("saved on AVX9, loaded on") for note in notes)


# --- folders ----------------------------------------------------------------------------------------------


def test_only_an_artefact_is_replaced(folder: Path) -> None:
    with written(folder, {"graphopt": "0"}) as made:
        (made / "report.json").write_text("{}")
    assert sorted(file.name for file in folder.iterdir()) == ["artefact.json", "report.json"]
    assert Folder(folder).json("report.json") == {}
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ArtefactError, match=r"holds notes\.txt, which is of no"), written(folder, {}):
        raise AssertionError
    plain = folder.parent / "file"
    plain.write_text("mine")
    with pytest.raises(ArtefactError, match="is there and is no folder"), written(plain, {}):
        raise AssertionError
    (folder.parent / "empty").mkdir()
    with written(folder.parent / "empty", {}):
        pass
    assert plain.read_text() == "mine" and (folder / "notes.txt").read_text() == "mine"


def test_what_fails_halfway_leaves_what_was_there(folder: Path) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(OSError, match="disk is full"), written(folder, {}) as made:
        (made / "report.json").write_text("{")
        raise OSError("disk is full")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [file.name for file in folder.parent.iterdir()] == ["small"]
