"""Calibration on the CPU with tiny sizes, its command, and the kernels that it uses."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from graphopt.plugins import PluginHost
from graphopt_cost_model import calibrate as module
from graphopt_cost_model import plugin
from graphopt_cost_model.calibrate import CalibrationError, CalibrationSizes, calibrate
from graphopt_cost_model.calibrate_command import command
from graphopt_cost_model.calibration_store import CalibrationWarning
from graphopt_cost_model.devices import load_devices
from graphopt_kernels import bandwidth
from graphopt_kernels import plugin as kernels_plugin

TINY = CalibrationSizes(buffer_bytes=1 << 16, matmul_size=32, launches=10, repeats=3)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(CalibrationSizes, "of", classmethod(lambda cls, kind: TINY))
    return tmp_path


def test_it_measures_every_figure_and_says_where_it_was():
    steps = []
    spec = calibrate("cpu", progress=lambda step, done, total: steps.append((step, done, total)))
    assert spec.name == "cpu" and spec.kind == "cpu"
    rates = (spec.copy_bytes_per_second, spec.read_bytes_per_second, spec.host_link_bytes_per_second)
    assert all(1e6 < rate < 1e13 for rate in rates)
    assert 1e6 < spec.matmul_flops["float32"] < 1e14
    assert 1e-8 < spec.launch_seconds < 1e-2
    assert spec.vector_flops == load_devices(calibrated=False)["cpu"].vector_flops
    assert spec.memory_bytes > 2**28
    assert "graphopt calibrate on cpu, torch" in spec.source
    assert steps[0] == ("copy", 0, 6) and steps[-1] == ("done", 6, 6)


def test_the_matmul_switch_is_put_back():
    before = torch.get_float32_matmul_precision()
    calibrate("cpu")
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("toaster", "cannot calibrate 'toaster': no such torch device"),
        ("meta", "cannot calibrate meta: only cpu and cuda devices are supported"),
        ("cuda:99", r"cannot calibrate cuda:99: this machine has \d+ CUDA devices"),
    ],
)
def test_a_device_that_is_not_here_is_named(device, message):
    with pytest.raises(CalibrationError, match=message):
        calibrate(device)


def test_the_command_prints_data_on_stdout_talks_on_stderr_and_keeps_the_figures(cache):
    result = CliRunner().invoke(command, ["--device", "cpu", "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    printed = json.loads(result.stdout)
    assert printed["name"] == "cpu"
    assert "kept in" in result.stderr
    assert load_devices()["cpu"].copy_bytes_per_second == printed["copy_bytes_per_second"]


def test_a_dry_run_keeps_nothing(cache):
    result = CliRunner().invoke(command, ["--device", "cpu", "--dry-run"], catch_exceptions=False)
    assert "matmul float32" in result.stdout
    assert not list(cache.iterdir())


def test_the_plugins_offer_devices_model_command_and_kernels():
    host = PluginHost([plugin, kernels_plugin], entry_points=())
    assert {"cpu", "h200"} <= set(host.devices())
    model = host.cost_model("roofline").build(host.device("h200"))
    assert model.device.name == "h200"
    assert host.commands()["calibrate"].load() is command
    assert {"probe-copy", "probe-read"} <= set(host.kernels())
    assert all(record.status == "active" for record in host.records())


def test_a_kernel_that_takes_the_buffers_is_used_and_another_is_not():
    host = PluginHost([kernels_plugin], entry_points=())
    spec = host.kernels()["probe-read"]
    assert "runs on CUDA, the tensor is on cpu" in str(spec.supports(torch.ones(4)))
    assert module._kernel("probe-read", torch.ones(4)) == []
    assert module._kernel("no such kernel", torch.ones(4)) == []


def test_a_kernel_that_raises_is_left_out_with_a_warning(monkeypatch):
    spec = replace(kernels_plugin.graphopt_kernels()[0], supports=lambda source, target: None)
    broken = SimpleNamespace(kernels=lambda: {"probe-copy": spec})
    monkeypatch.setattr(module, "default_host", lambda: broken)
    with pytest.warns(CalibrationWarning, match="measuring without kernel 'probe-copy': RuntimeError: "):
        assert module._kernel("probe-copy", torch.ones(4), torch.ones(5)) == []


def test_the_probe_operators_equal_their_references():
    source = torch.arange(3 * bandwidth.READ_BLOCK + 5, dtype=torch.float32)
    target = torch.empty_like(source)
    torch.ops.graphopt.probe_copy(source, target)
    assert torch.equal(target, source)
    sums = torch.ops.graphopt.probe_read(source)
    assert sums.shape == (4,)
    assert sums.double().sum() == pytest.approx(source.double().sum().item(), rel=1e-6)


@pytest.mark.parametrize("name", ["probe_copy", "probe_read"])
def test_the_probe_operators_are_sound(name):
    op = getattr(torch.ops.graphopt, name).default
    args = (torch.ones(100), torch.zeros(100)) if name == "probe_copy" else (torch.ones(100),)
    torch.library.opcheck(op, args)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((torch.ones(4), torch.ones(5)), "source and target differ in shape, dtype or device"),
        ((torch.ones(4), torch.ones(4)), "the kernel runs on CUDA, the tensor is on cpu"),
    ],
)
def test_the_copy_kernel_says_why_it_does_not_apply(arguments, reason):
    assert str(bandwidth.copy_supports(*arguments)) == reason


def test_the_read_kernel_takes_floating_point():
    assert "floating-point" in str(bandwidth.read_supports(torch.ones(4, dtype=torch.int32)))


@pytest.mark.gpu
def test_the_kernels_run_on_cuda():
    pytest.importorskip("triton")
    source = torch.randn(1_000_003, device="cuda")
    target = torch.empty_like(source)
    assert bandwidth.copy_supports(source, target) is None
    torch.ops.graphopt.probe_copy(source, target)
    assert torch.equal(target, source)
    expected = bandwidth.read_reference(source)
    # Sums of 8192 float32 in another order.
    torch.testing.assert_close(torch.ops.graphopt.probe_read(source), expected, rtol=1e-4, atol=1e-2)
