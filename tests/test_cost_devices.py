"""The device table, names, and calibrated figures that survive whatever is in the cache folder."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from importlib.resources import files

import pytest
import torch
import yaml

from graphopt.errors import UnknownNameError
from graphopt_cost_model.calibration_store import (
    CalibrationWarning,
    cache_folder,
    store_calibration,
    stored_calibrations,
)
from graphopt_cost_model.devices import DeviceFileError, load_devices, read_device, resolve


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "devices"


def test_the_table_has_the_devices_that_it_promises():
    assert {"h200", "h100", "a100", "rtx4090", "cpu"} <= set(load_devices())


@pytest.mark.parametrize("name", ["h200", "h100", "a100", "rtx4090", "cpu"])
def test_every_figure_is_plausible_and_has_a_source(name):
    spec = load_devices()[name]
    assert spec.name == name
    assert spec.kind == ("cpu" if name == "cpu" else "cuda")
    assert 1e9 < spec.copy_bytes_per_second < 1e13
    assert spec.host_link_bytes_per_second < spec.copy_bytes_per_second
    assert 1e-7 < spec.launch_seconds < 1e-4
    assert spec.matmul_flops["bfloat16"] > 1e11
    assert spec.allocation_granularity == (1 if name == "cpu" else 512)
    assert spec.multiprocessors == 0 if name == "cpu" else 100 <= spec.multiprocessors <= 200
    figures = ("copy_bytes_per_second", "matmul_flops", "launch_seconds", "workspace_bytes")
    for figure in (*figures, "multiprocessors"):
        assert f"{figure}: " in spec.source


def test_hopper_holds_a_larger_library_workspace():
    table = load_devices()
    assert table["h200"].workspace_bytes == table["h100"].workspace_bytes == 32 * 2**20
    assert table["a100"].workspace_bytes == 8320 * 1024


def test_names_and_aliases_resolve_in_any_case():
    assert resolve("H200").name == "h200"
    assert resolve("NVIDIA GeForce RTX 4090").name == "rtx4090"
    assert resolve(torch.device("cpu")).name == "cpu"


def test_an_unknown_name_gets_the_nearest_one():
    with pytest.raises(UnknownNameError, match=r"unknown device 'h20'; did you mean 'h200'\?") as raised:
        resolve("h20")
    assert "known: a100, cpu, h100, h200, rtx4090" in str(raised.value)


def test_the_present_device_is_recognised_by_its_reported_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    assert resolve().name == "h100"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 PCIe")
    with pytest.raises(UnknownNameError, match="unknown device 'NVIDIA H100 PCIe'"):
        resolve()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve().name == "cpu"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "other@1"}, "expected schema 'graphopt/device@1', got 'other@1'"),
        ({"lanch_seconds": 1}, "unknown entry 'lanch_seconds'; did you mean 'launch_seconds'?"),
        ({"copy_bytes_per_second": None}, "'copy_bytes_per_second' is no number: None"),
        ({"launch_seconds": -1}, "'launch_seconds' must be positive, got -1"),
        ({"matmul_flops": {"bfloat16": 1e12}}, "'matmul_flops' needs at least a rate for 'float32'"),
        ({"sources": {}}, "'memory_bytes' has no source"),
        ({"emitted_matmul_share": 0.5}, "'emitted_matmul_share' needs a share for each dtype"),
        ({"emitted_matmul_share": {"float16": 75}}, "a share in 'emitted_matmul_share' is above 1"),
        ({"emitted_attention_share": {"float16": 1.2}}, "a share in 'emitted_attention_share' is above 1"),
        ({"emitted_matmul_share": {"float16": 0}}, "'emitted_matmul_share' must be positive, got 0"),
    ],
)
def test_a_bad_device_file_says_what_is_wrong(tmp_path, change, message):
    good = (files("graphopt_cost_model") / "devices" / "h200.yaml").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(good) | change))
    with pytest.raises(DeviceFileError) as raised:
        read_device(path)
    assert f"mine.yaml: {message}" in str(raised.value)


def test_a_device_file_that_lacks_an_entry_names_it(tmp_path):
    good = yaml.safe_load((files("graphopt_cost_model") / "devices" / "h200.yaml").read_text())
    del good["launch_seconds"]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(good))
    with pytest.raises(DeviceFileError, match="entry 'launch_seconds' is missing"):
        read_device(path)


def test_devices_may_leave_out_how_fast_emitted_products_are(cache):
    table = load_devices()
    assert table["a100"].emitted_matmul_share == {}
    assert table["h200"].emitted_matmul_share["bfloat16"] == 0.7
    assert "emitted_matmul_share: " in table["h200"].source
    # A calibration does not measure it.
    store_calibration(replace(table["h200"], copy_bytes_per_second=123.0, emitted_matmul_share={}))
    found = load_devices()["h200"]
    assert (found.copy_bytes_per_second, found.emitted_matmul_share["bfloat16"]) == (123.0, 0.7)


def test_calibrated_figures_replace_the_table_and_add_to_it(cache):
    spec = load_devices()["cpu"]
    store_calibration(replace(spec, copy_bytes_per_second=123.0))
    path = store_calibration(replace(spec, name="NVIDIA L4", aliases=("nvidia l4",)))
    assert path == cache / "nvidia-l4.json"
    assert load_devices()["cpu"].copy_bytes_per_second == 123.0
    assert load_devices(calibrated=False)["cpu"] == spec
    assert resolve("nvidia l4").name == "NVIDIA L4"
    assert sorted(file.name for file in cache.iterdir()) == ["cpu.json", "nvidia-l4.json"]


def damaged(text):
    data = json.loads(text)
    yield "", "Expecting value"
    yield text[: len(text) // 2], "ignoring calibrated figures"
    yield "[]", "expected schema 'graphopt/calibration@1'"
    yield json.dumps(data | {"schema": "graphopt/calibration@0"}), "expected schema"
    yield json.dumps(data | {"device": {"name": "cpu"}}), "field 'kind' is missing"
    yield json.dumps(data | {"device": data["device"] | {"extra": 1}}), "unknown field 'extra'"
    wrong = data["device"] | {"copy_bytes_per_second": 0.0}
    yield json.dumps(data | {"device": wrong}), "the copy rate is 0.0"
    wrong = data["device"] | {"matmul_flops": {}}
    yield json.dumps(data | {"device": wrong}), "the matmul rates lack float32"
    yield "\udcff".encode("utf-8", "surrogateescape"), "utf-8"


def test_what_cannot_be_read_from_the_cache_is_left_out_with_a_reason():
    spec = load_devices()["cpu"]
    path = store_calibration(replace(spec, copy_bytes_per_second=123.0))
    for content, reason in damaged(path.read_text()):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.warns(CalibrationWarning, match="run 'graphopt calibrate' again") as caught:
            assert load_devices()["cpu"] == spec
        assert reason in str(caught[0].message)
        assert str(path) in str(caught[0].message)


def test_an_empty_or_missing_cache_is_no_news():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stored_calibrations() == {}


def test_the_cache_folder_follows_the_platform(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("GRAPHOPT_CACHE_DIR")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "graphopt"
