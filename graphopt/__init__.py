"""graphopt: give it a PyTorch model and a byte budget; get the fastest program that fits.

    import graphopt

    fast = graphopt.optimize(model, budget="8GiB")
    fast(**batch).loss.backward()
    print(fast.report)

Names are loaded on first use, so that ``import graphopt`` costs nothing and does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.api import explain_memory, optimize, pareto, plan
    from graphopt.artefact.load import load
    from graphopt.budget import Budget
    from graphopt.candidate import Candidate, CostDelta, Declined, Frontier, FrontierPoint, NearMiss, Reason
    from graphopt.decoding.heal import heal
    from graphopt.decoding.options import Generate
    from graphopt.decoding.stores import CacheStore
    from graphopt.decoding.structure import explain_layers
    from graphopt.device import DeviceSpec
    from graphopt.errors import (
        ArtefactError,
        BudgetError,
        BudgetSyntaxError,
        CaptureError,
        CheckpointError,
        GraphoptError,
        InputsError,
        PassError,
        PipelineError,
        PluginError,
        QuantizationError,
        StalePlanError,
        StaleReportError,
        TargetError,
        UnevenRanksError,
        UnknownNameError,
        VerificationError,
    )
    from graphopt.explanation import MemoryExplanation
    from graphopt.measure import Measurement
    from graphopt.optimized import Optimized
    from graphopt.packing import Scheme
    from graphopt.packing.api import quantize, weight_frontier
    from graphopt.packing.calibration import Calibration, calibrate
    from graphopt.packing.formats import WeightFormat
    from graphopt.packing.load import LoadedWeights, load_weights
    from graphopt.packing.plan import QuantizationPlan
    from graphopt.packing.save import save_weights
    from graphopt.pareto_front import Pareto
    from graphopt.passes import Pass, PassContext
    from graphopt.pipeline import Pipeline
    from graphopt.plans import Plan
    from graphopt.plugins import hookimpl
    from graphopt.policy import PolicyQuestion, Selection
    from graphopt.program import Level, Program
    from graphopt.report import Report
    from graphopt.schedule import Schedule
    from graphopt.use import use

__version__ = "0.1.0"

__all__ = [
    "ArtefactError",
    "Budget",
    "BudgetError",
    "BudgetSyntaxError",
    "CacheStore",
    "Calibration",
    "Candidate",
    "CaptureError",
    "CheckpointError",
    "CostDelta",
    "Declined",
    "DeviceSpec",
    "Frontier",
    "FrontierPoint",
    "Generate",
    "GraphoptError",
    "InputsError",
    "Level",
    "LoadedWeights",
    "Measurement",
    "MemoryExplanation",
    "NearMiss",
    "Optimized",
    "Pareto",
    "Pass",
    "PassContext",
    "PassError",
    "Pipeline",
    "PipelineError",
    "Plan",
    "PluginError",
    "PolicyQuestion",
    "Program",
    "QuantizationError",
    "QuantizationPlan",
    "Reason",
    "Report",
    "Schedule",
    "Scheme",
    "Selection",
    "StalePlanError",
    "StaleReportError",
    "TargetError",
    "UnevenRanksError",
    "UnknownNameError",
    "VerificationError",
    "WeightFormat",
    "__version__",
    "calibrate",
    "explain_layers",
    "explain_memory",
    "heal",
    "hookimpl",
    "load",
    "load_weights",
    "optimize",
    "pareto",
    "plan",
    "quantize",
    "save_weights",
    "use",
    "weight_frontier",
]

_HOME = {
    "graphopt.api": ("explain_memory", "optimize", "pareto", "plan"),
    "graphopt.artefact.load": ("load",),
    "graphopt.explanation": ("MemoryExplanation",),
    "graphopt.budget": ("Budget",),
    "graphopt.candidate": (
        "Candidate",
        "CostDelta",
        "Declined",
        "Frontier",
        "FrontierPoint",
        "NearMiss",
        "Reason",
    ),
    "graphopt.decoding.heal": ("heal",),
    "graphopt.decoding.options": ("Generate",),
    "graphopt.decoding.stores": ("CacheStore",),
    "graphopt.decoding.structure": ("explain_layers",),
    "graphopt.device": ("DeviceSpec",),
    "graphopt.errors": (
        "ArtefactError",
        "BudgetError",
        "BudgetSyntaxError",
        "CaptureError",
        "CheckpointError",
        "GraphoptError",
        "InputsError",
        "PassError",
        "PipelineError",
        "PluginError",
        "QuantizationError",
        "StalePlanError",
        "StaleReportError",
        "TargetError",
        "UnevenRanksError",
        "UnknownNameError",
        "VerificationError",
    ),
    "graphopt.measure": ("Measurement",),
    "graphopt.optimized": ("Optimized",),
    "graphopt.pareto_front": ("Pareto",),
    "graphopt.passes": ("Pass", "PassContext"),
    "graphopt.pipeline": ("Pipeline",),
    "graphopt.plans": ("Plan",),
    "graphopt.plugins": ("hookimpl",),
    "graphopt.policy": ("PolicyQuestion", "Selection"),
    "graphopt.program": ("Level", "Program"),
    "graphopt.packing": ("Scheme",),
    "graphopt.packing.api": ("quantize", "weight_frontier"),
    "graphopt.packing.calibration": ("Calibration", "calibrate"),
    "graphopt.packing.formats": ("WeightFormat",),
    "graphopt.packing.load": ("LoadedWeights", "load_weights"),
    "graphopt.packing.plan": ("QuantizationPlan",),
    "graphopt.packing.save": ("save_weights",),
    "graphopt.report": ("Report",),
    "graphopt.schedule": ("Schedule",),
    "graphopt.use": ("use",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'graphopt' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

