"""What this plugin registers. Nothing here imports torch: ``graphopt --help`` loads this module."""

from __future__ import annotations

from collections.abc import Iterable

from graphopt.plugins import KernelSpec, OperatorCost, hookimpl

__all__ = ["graphopt_api", "graphopt_costs", "graphopt_kernels", "graphopt_passes"]

graphopt_api = 1


@hookimpl
def graphopt_passes() -> Iterable[str]:
    return ["graphopt_causal_conv.fuse:FuseCausalConvolution"]


@hookimpl
def graphopt_kernels() -> Iterable[KernelSpec]:
    from graphopt_causal_conv import operator

    return [
        KernelSpec(
            name="causal-convolution-silu",
            op="causal_conv::forward",
            reference=operator.reference,
            supports=operator.supports,
            summary="causal depthwise convolution along the last dimension, silu included",
        )
    ]


@hookimpl
def graphopt_costs() -> Iterable[OperatorCost]:
    from graphopt_causal_conv.price import price

    return [OperatorCost("causal_conv::forward", price, "every value moves once")]
