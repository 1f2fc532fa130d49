"""Whether attention is written out or stays a call of the library.

What the library does not have is written out. Else the kernels have to be no slower by the figures of a
device, those of all launches added up::

    max(flops / F + computed, bytes / B) / r + launch  <=  max(flops / F, bytes / B) + neighbours + launch

with ``r`` the share of the library's rate that they reach (``DeviceSpec.emitted_attention_share``),
``computed`` what a computed bias takes and ``neighbours`` what goes along. ``r`` is of bytes too: heads of
short sequences, bound by what they read, are no faster read than multiplied
(benchmarks/results/gpu_emitted_attention.json). So plain attention stays with the library; biases that need
not be read, and neighbours that need not be written, pay for what the kernels are slower.
"""

from __future__ import annotations

import torch

from graphopt.candidate import Reason
from graphopt_kernels.emit.attention_file import BuiltAttention
from graphopt_kernels.emit.kernel_file import KernelFile
from graphopt_kernels.emit.product_choice import Prices, slots_of
from graphopt_kernels.tuning.calls import KernelCall

__all__ = ["attention_decision", "attention_share", "emitted_attention", "library_attention"]

_UNKNOWN_SHARE = 0.5
"""Taken for dtypes of which a device does not say how fast emitted attention is."""

_WIDTHS = {"forward_kernel": (1, 1), "keys_kernel": (2, 2), "queries_kernel": (2, 1), "bias_kernel": (1, 1)}
"""Products over the scores that kernels compute, in widths of queries and of values."""

_BACKWARD_LAUNCHES = 3
"""Of FlashAttention: sums of rows, gradients, those of queries in their dtype."""


def attention_decision(
    prices: Prices, alone: KernelFile, file: KernelFile, taken: str, separate: float
) -> tuple[bool, Reason]:
    """Whether ``file`` is used in place of a call, of which ``alone`` is the kernel by itself, and why.
    ``taken``: operators that it takes in besides, which take ``separate`` seconds by themselves."""
    taking = f"with {taken} in it " if taken else ""
    library = _built(alone).attention.library
    if not library:
        return True, Reason(f"attention {taking}that no library has")
    if library == "cpu":
        return True, Reason(f"attention {taking}whose call runs on a CPU alone")
    emitted, apart = emitted_attention(prices, file), library_attention(prices, alone) + separate
    reason = Reason(
        f"attention {taking}{emitted * 1e6:.1f} us at {attention_share(prices, file):g} of the library's "
        f"rate, the library {apart * 1e6:.1f} us on {prices.device.name}"
    )
    return emitted <= apart, reason


def attention_share(prices: Prices, file: KernelFile) -> float:
    """The share of the library's rate that the kernels are taken to reach."""
    return prices.device.emitted_attention_share.get(_dtype(_built(file)), _UNKNOWN_SHARE)


def library_attention(prices: Prices, file: KernelFile) -> float:
    """Seconds of the library's call of which ``file`` is the kernel by itself."""
    of = _built(file).attention
    width, value_width = of.value("query").shape[-1], of.value("value").shape[-1]
    products = 3 * width + 2 * value_width if of.backward else width + value_width
    multiplied = 2 * of.scores * products / _rate(prices, _built(file))
    if of.backward:
        launches, moved = _BACKWARD_LAUNCHES, file.bytes
    else:
        # It writes the log-sum-exp as well, asked for or not.
        launches, moved = 1, _bytes(_built(file).launches[0], _built(file))
    return max(multiplied, _moved(prices, moved)) + launches * prices.device.launch_seconds


def emitted_attention(prices: Prices, file: KernelFile) -> float:
    """Seconds of the kernels of a file."""
    built = _built(file)
    rate, share = _rate(prices, built), attention_share(prices, file)
    of, computed = built.attention, built.computed
    slots = slots_of(computed.values) if computed is not None else 0
    total = 0.0
    for call in built.launches:
        by_query, by_value = _WIDTHS.get(call.function.fn.__name__, (0, 0))
        products = by_query * of.value("query").shape[-1] + by_value * of.value("value").shape[-1]
        busy = 2 * of.scores * products / rate
        if products:
            busy += slots * of.scores / prices.device.vector_flops["float32"]
        taken = max(busy, _moved(prices, _bytes(call, built)))
        total += (taken / share if products else taken) + prices.device.launch_seconds
    return total


def _bytes(call: KernelCall, built: BuiltAttention) -> int:
    """What a launch reads and writes, each tensor once."""
    tensors = {
        id(t): t for name, t in call.arguments.items() if isinstance(t, torch.Tensor) and name != "bias"
    }
    moved = sum(t.numel() * t.dtype.itemsize for t in tensors.values())
    bias = built.attention.bias
    if bias is not None and "bias" in call.arguments:
        if built.computed is not None:
            names = set(built.computed.pointers)
            moved += sum(
                t.numel() * t.dtype.itemsize
                for n, t in zip(built.names, built.inputs, strict=True)
                if n in names
            )
        else:
            distinct = [n for n, s in zip(bias.shape, bias.stride(), strict=True) if s]
            moved += int(torch.Size(distinct).numel()) * bias.dtype.itemsize
    return moved


def _moved(prices: Prices, count: int) -> float:
    return count / prices.device.copy_bytes_per_second


def _built(file: KernelFile) -> BuiltAttention:
    assert isinstance(file.built, BuiltAttention)
    return file.built


def _dtype(built: BuiltAttention) -> str:
    return str(built.attention.value("query").dtype).removeprefix("torch.")


def _rate(prices: Prices, built: BuiltAttention) -> float:
    rates = prices.device.matmul_flops
    return rates.get(_dtype(built), rates["float32"])
