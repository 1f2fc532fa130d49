"""A convolution over new rows and the last ones before them.

``graphopt::causal_convolution`` is what a causal convolution of a whole sequence gives for some of its rows:
what it reads of earlier ones comes from ``history``, in which position p is in slot ``p % reach`` until
position ``p + reach`` takes its place. Positions are in a tensor, so a step of decoding is the same launches
at every position. It is ATen operators on every device.
"""

from __future__ import annotations

import torch

from graphopt.candidate import Reason
from graphopt_kernels.stated_operator import state_operator

__all__ = ["causal_convolution", "causal_convolution_reference", "causal_convolution_supports"]


def causal_convolution_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    history: torch.Tensor,
    positions: torch.Tensor,
    dilation: int,
    groups: int,
) -> torch.Tensor:
    """[B, C', n] of ``x`` [B, C, n], the rows at consecutive ``positions`` int64 [n] right behind those that
    ``history`` [at least B, C, reach] holds, with ``weight`` [C', C / groups, taps] and ``bias`` [C'];
    ``reach`` is ``dilation * (taps - 1)``. Rows before position 0 are zeros. There is no gradient.
    """
    batch, reach = x.shape[0], history.shape[2]
    held = history[:batch]
    before = positions[0] - reach + torch.arange(reach, device=x.device)
    rows = held.index_select(2, before.remainder(reach))
    # Not a product: what was never written may be anything.
    rows = torch.where(before < 0, torch.zeros((), dtype=rows.dtype, device=x.device), rows)
    whole = torch.cat([rows.to(x.dtype), x], 2)
    output = torch.nn.functional.conv1d(whole, weight, bias, dilation=dilation, groups=groups)
    kept = min(x.shape[2], reach)
    last = positions[x.shape[2] - kept :].remainder(reach)
    held.index_copy_(2, last, x[:, :, x.shape[2] - kept :].to(held.dtype))
    return output.contiguous()


def causal_convolution_supports(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    history: torch.Tensor,
    positions: torch.Tensor,
    dilation: int,
    groups: int,
) -> Reason | None:
    """``None``, or why the operator does not take these arguments."""
    if x.dim() != 3 or weight.dim() != 3:
        return Reason(
            f"takes rows [B, C, n] and a weight [C', C / groups, taps], got {x.dim()} and {weight.dim()} "
            "dimensions"
        )
    if weight.shape[1] * groups != x.shape[1] or weight.shape[0] % groups:
        return Reason(
            f"the weight is {list(weight.shape)}: it does not fit {x.shape[1]} channels in {groups} groups"
        )
    reach = dilation * (weight.shape[2] - 1)
    if reach < 1:
        return Reason(f"reads no row but its own: {weight.shape[2]} taps, {dilation} apart")
    if history.dim() != 3 or history.shape[0] < x.shape[0] or list(history.shape[1:]) != [x.shape[1], reach]:
        return Reason(
            f"the history is {list(history.shape)}: expected [at least {x.shape[0]}, {x.shape[1]}, {reach}]"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        return Reason(f"bias is {list(bias.shape)}: expected [{weight.shape[0]}]")
    if positions.dtype is not torch.int64 or tuple(positions.shape) != (x.shape[2],):
        return Reason(
            f"positions are {positions.dtype} {list(positions.shape)}: expected torch.int64 [{x.shape[2]}]"
        )
    return None


causal_convolution = state_operator(
    "causal_convolution",
    causal_convolution_reference,
    mutates=("history",),
    refuses=causal_convolution_supports,
    output=lambda x, weight, *_: x.new_empty((x.shape[0], weight.shape[0], x.shape[2])),
)
