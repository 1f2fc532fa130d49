"""The hooks that a plugin may implement.

Registration hooks return records; a hook never changes a registry itself. Observers return
nothing and see the program read-only. ``graphopt_capture`` is asked plugin by plugin until one
answers. A plugin is a module or an object with ``graphopt_api = 1`` and functions marked
``@graphopt.hookimpl``::

    import graphopt

    graphopt_api = 1

    @graphopt.hookimpl
    def graphopt_passes():
        return ["acme_passes.fuse_moe:FuseMoE"]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.resources.abc import Traversable
from typing import TYPE_CHECKING

import pluggy

from graphopt.plugins.records import (
    CacheScoreSpec,
    Capture,
    CaptureInputs,
    CaptureOptions,
    CodecSpec,
    Command,
    CostModelFactory,
    DumpFormat,
    KernelSpec,
    OperatorCost,
    PolicySpec,
    ReplacementSpec,
    ScorerSpec,
    ShareScoreSpec,
    TunableSpec,
)

if TYPE_CHECKING:
    import torch

    from graphopt.decoding.stores import CacheStore
    from graphopt.device import DeviceSpec
    from graphopt.packing import Scheme
    from graphopt.packing.formats import WeightFormat
    from graphopt.passes import Pass, PassContext
    from graphopt.program import Program
    from graphopt.report import PassRecord
    from graphopt.rules import Rule

__all__ = ["API_VERSION", "GROUP", "HookSpecs", "hookimpl"]

GROUP = "graphopt.plugins"
"""The entry-point group that plugins register under."""

API_VERSION = 1
"""What ``graphopt_api`` of a plugin must equal; raised when a hook changes incompatibly."""

hookimpl = pluggy.HookimplMarker("graphopt")
_hookspec = pluggy.HookspecMarker("graphopt")


class HookSpecs:
    """Signatures and meanings; never instantiated."""

    # --- what a program may be turned into -------------------------------------------------

    @_hookspec
    def graphopt_passes(self) -> Iterable[type[Pass] | str]:  # type: ignore[empty-body]
        """Pass classes, or ``"package.module:Class"`` to import one when it is first needed."""

    @_hookspec
    def graphopt_rules(self) -> Iterable[Rule]:  # type: ignore[empty-body]
        """Rules, which become the pass ``PLUGIN-rules`` at the semantic level, PLUGIN the plugin's name."""

    @_hookspec
    def graphopt_kernels(self) -> Iterable[KernelSpec]:  # type: ignore[empty-body]
        """Kernels, each with its reference and the reasons why it would not apply."""

    @_hookspec
    def graphopt_codecs(self) -> Iterable[CodecSpec]:  # type: ignore[empty-body]
        """Codecs for saved values, each with the error that it makes."""

    @_hookspec
    def graphopt_schemes(self) -> Iterable[type[Scheme] | str]:  # type: ignore[empty-body]
        """Ways to keep a weight in fewer bytes: classes, or ``"package.module:Class"``."""

    @_hookspec
    def graphopt_weight_formats(self) -> Iterable[type[WeightFormat] | str]:  # type: ignore[empty-body]
        """Ways in which checkpoints hold packed weights: classes, or ``"package.module:Class"``."""

    @_hookspec
    def graphopt_stores(self) -> Iterable[type[CacheStore] | str]:  # type: ignore[empty-body]
        """Ways to keep keys and values between steps of decoding: classes, or ``"package.module:Class"``."""

    @_hookspec
    def graphopt_scorers(self) -> Iterable[ScorerSpec]:  # type: ignore[empty-body]
        """Ways to say how much a packed weight is off."""

    @_hookspec
    def graphopt_share_scores(self) -> Iterable[ShareScoreSpec]:  # type: ignore[empty-body]
        """Ways to say what it costs to let attentions share keys and values."""

    @_hookspec
    def graphopt_cache_scores(self) -> Iterable[CacheScoreSpec]:  # type: ignore[empty-body]
        """Ways to say which keys a store that drops some is to keep."""

    @_hookspec
    def graphopt_tunables(self) -> Iterable[TunableSpec]:  # type: ignore[empty-body]
        """Kernels that ``graphopt tune`` may choose launches for."""

    @_hookspec
    def graphopt_replacements(self) -> Iterable[ReplacementSpec]:  # type: ignore[empty-body]
        """Kernels for groups of operators of lowered graphs."""

    @_hookspec
    def graphopt_pipelines(self) -> Mapping[str, Traversable]:  # type: ignore[empty-body]
        """Named pipelines: files in the YAML form of ``graphopt.pipeline``."""

    # --- where programs come from ----------------------------------------------------------

    @_hookspec
    def graphopt_capture(
        self, model: torch.nn.Module, inputs: CaptureInputs, options: CaptureOptions
    ) -> Capture | None:
        """One call of a model as a graph, or ``None`` to leave it to the next plugin and at last to graphopt.

        Asked for each kind of call. It must leave the model as it was.
        """

    # --- what things cost ------------------------------------------------------------------

    @_hookspec
    def graphopt_cost_models(self) -> Iterable[CostModelFactory]:  # type: ignore[empty-body]
        """Cost models by name, for ``optimize(cost_model=...)``."""

    @_hookspec
    def graphopt_costs(self) -> Iterable[OperatorCost]:  # type: ignore[empty-body]
        """What operators that a plugin brings take, whichever cost model is used."""

    @_hookspec
    def graphopt_devices(self) -> Iterable[DeviceSpec]:  # type: ignore[empty-body]
        """Devices that a plan can be made for."""

    # --- who decides -----------------------------------------------------------------------

    @_hookspec
    def graphopt_policies(self) -> Iterable[PolicySpec]:  # type: ignore[empty-body]
        """Ways to pick schedules within the budget, for ``optimize(policy=...)``."""

    # --- what a person sees ----------------------------------------------------------------

    @_hookspec
    def graphopt_formats(self) -> Iterable[DumpFormat]:  # type: ignore[empty-body]
        """Formats of ``graphopt dump``."""

    @_hookspec
    def graphopt_commands(self) -> Iterable[Command]:  # type: ignore[empty-body]
        """Verbs of the command line."""

    # --- observers -------------------------------------------------------------------------

    @_hookspec
    def graphopt_before_pass(self, ctx: PassContext, step: Pass, program: Program) -> None:
        """A pass is about to look at a program."""

    @_hookspec
    def graphopt_after_pass(self, ctx: PassContext, step: Pass, program: Program, record: PassRecord) -> None:
        """A pass has looked at a program; ``record`` says what came of it."""
