"""What is wrong with records that are of the right type: ``graphopt plugins --check`` looks into each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from graphopt.errors import GraphoptError
from graphopt.plugins.loading import GUARDED, describe_error

if TYPE_CHECKING:
    from graphopt.device import DeviceSpec
    from graphopt.passes import Pass
    from graphopt.plugins.host import PluginHost

__all__ = ["diagnosed", "probe_captures"]

_CALLED = {
    "graphopt_commands": ("commands", ("load",)),
    "graphopt_cost_models": ("cost_models", ("build",)),
    "graphopt_costs": ("costs", ("price",)),
    "graphopt_formats": ("formats", ("write",)),
    "graphopt_kernels": ("kernels", ("reference", "supports")),
    "graphopt_policies": ("policies", ("choose",)),
}
"""By hook: where its records are, and what of them is called."""


def diagnosed(host: PluginHost) -> Iterator[tuple[str, str, str]]:
    """Hook, name and what is wrong, for everything that is registered and cannot work."""
    for hook, (facade, called) in _CALLED.items():
        for name, record in getattr(host, facade)().items():
            for part in called:
                if not callable(getattr(record, part)):
                    yield hook, name, f"{part} is {getattr(record, part)!r}: expected a function"
    for name, kernel in host.kernels().items():
        if wrong := _missing_operator(kernel.op):
            yield "graphopt_kernels", name, wrong
    for name in host.costs():
        if name.count("::") != 1:
            yield "graphopt_costs", name, "expected the name of an operator, such as 'acme::gate'"
    for name, device in host.devices().items():
        for wrong in _wrong_figures(device):
            yield "graphopt_devices", name, wrong
    for name, cls in host.passes().items():
        for wrong in _wrong_pass(cls):
            yield "graphopt_passes", name, wrong
    for name in host.pipelines():
        from graphopt.pipeline import Pipeline

        try:
            Pipeline.of(name, host)
        except GUARDED as error:
            said = error.message if isinstance(error, GraphoptError) else describe_error(error)
            yield "graphopt_pipelines", name, said


def probe_captures(host: PluginHost) -> None:
    """Have plugins that capture models capture a small one; what is wrong with what they give is theirs."""
    if not (hooks := host.capture_hooks()):
        return
    import torch

    from graphopt.capture.faithful import stands_for
    from graphopt.capture.plugged import ask
    from graphopt.errors import PluginError
    from graphopt.plugins.records import CaptureOptions

    model, x = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()), torch.ones(4, 3)
    for hook in hooks:
        try:
            if (answer := ask(hook, model, (x,), {}, CaptureOptions("train"))) is None:
                continue
            if said := stands_for(model, answer[0], (x,), {}, training=True).difference:
                raise PluginError(said)
        except GUARDED as error:
            hook.refuse(error)


def _missing_operator(op: Any) -> str:
    import torch

    space, _, name = str(op).partition("::")
    if not (space and name):
        return f"op is {op!r}: expected the name of an operator, such as 'acme::gate'"
    if not hasattr(getattr(torch.ops, space), name):
        return f"there is no operator {op!r}: the hook has to import the module that defines it"
    return ""


def _wrong_figures(device: DeviceSpec) -> Iterator[str]:
    rates = ("memory_bytes", "copy_bytes_per_second", "read_bytes_per_second", "host_link_bytes_per_second")
    figures: dict[str, Any] = {name: getattr(device, name) for name in rates}
    for table in ("matmul_flops", "vector_flops"):
        known = getattr(device, table)
        if not isinstance(known, Mapping) or "float32" not in known:
            yield f"{table} has no 'float32', which stands for the dtypes that it lacks"
        else:
            figures |= {f"{table}[{dtype!r}]": rate for dtype, rate in known.items()}
    for name, value in figures.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            yield f"{name} is {value!r}: expected a positive number"


def _wrong_pass(cls: type[Pass]) -> Iterator[str]:
    from dataclasses import MISSING

    from graphopt.passes import Pass, pass_options

    for order in ("after", "before"):
        reasons = getattr(cls, order)
        texts = [*reasons, *reasons.values()] if isinstance(reasons, Mapping) else [None]
        if not all(isinstance(text, str) for text in texts):
            yield f"{order} is {reasons!r}: expected a mapping of names of passes to reasons"
    if cls.propose is Pass.propose:
        yield "it does not define propose()"
    if MISSING not in pass_options(cls).values():
        try:
            cls.configured()
        except GUARDED as error:
            yield f"it cannot be made with its defaults: {describe_error(error)}"
