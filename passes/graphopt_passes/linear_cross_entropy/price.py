"""What a loss costs with whole logits and in pieces, by the cost model.

Nodes are made up for the calls, each with its values under ``meta["val"]``, and priced like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from graphopt.candidate import CostDelta
from graphopt.cost import CostModel
from graphopt_passes.linear_cross_entropy.match import Match
from graphopt_passes.linear_cross_entropy.modes import (
    backward_of,
    cuts_classes,
    holds_gradients,
    operator_of,
)

__all__ = ["LossPrices"]

_aten = torch.ops.aten


class LossPrices:
    """Prices of one match. ``output_mask`` says whether input, weight and bias need a gradient."""

    def __init__(self, match: Match, cost: CostModel, emit: str, output_mask: Sequence[bool]) -> None:
        self._match, self._cost, self._mask = match, cost, tuple(output_mask)
        self._fused = emit == "inductor"
        device = match.loss.meta["val"].device
        self._device = device
        n, d, v = match.rows, match.width, match.columns
        self._rows = self._tensor((n, d), match.dtype)
        self._weight = self._tensor((v, d), match.dtype)
        self._bias = None if match.bias is None else self._tensor((v,), match.dtype)
        self._target = self._tensor((n,), torch.int64)
        self._whole = self._whole_seconds()

    def delta(self, mode: str, cuts: int) -> CostDelta:
        """Predicted change of the step by ``mode``, in ``cuts`` chunks of rows or blocks of so many classes.

        Bytes are of the largest moment of the loss, above its gradients: every form has these, if not for
        the backward then in it. Where no code generator multiplies held gradients in place, there are two
        of each.
        """
        match = self._match
        if cuts_classes(mode):
            part = match.rows * min(cuts, match.columns) * match.dtype.itemsize
        else:
            part = -(-match.rows // cuts) * match.columns * match.dtype.itemsize
        twice = 0
        if holds_gradients(mode) and not self._fused:
            twice = sum(
                tensor.numel() * tensor.element_size()
                for tensor, needed in zip((self._rows, self._weight), self._mask, strict=False)
                if needed
            )
        seconds = self._pieces_seconds(mode, cuts) - self._whole
        return CostDelta(peak_bytes=part + twice - self._whole_bytes(), seconds=seconds)

    def _whole_bytes(self) -> int:
        """Logits and what is made of them, tokens by vocabulary, alive at once."""
        match = self._match
        elements = match.rows * match.columns
        if self._fused:
            # Inductor writes the gradient over the logits, and keeps what lies between in registers.
            return elements * match.dtype.itemsize
        # Log-probabilities, their gradient and that of the logits, and what each log-sum-exp adds to that;
        # without gradients, logits and log-probabilities.
        size: int = match.loss.meta["val"].dtype.itemsize
        return (3 + len(match.sums) if any(self._mask) else 2) * elements * size

    def _whole_seconds(self) -> float:
        match = self._match
        loss_dtype = match.loss.meta["val"].dtype
        rows, weight = self._rows, self._weight
        logits = self._tensor((match.rows, match.columns), match.dtype)
        scores = logits.to(loss_dtype)
        seconds = self._seconds(_aten.mm.default, (rows, weight.t()), logits)
        copy = self._seconds(_aten.clone.default, (logits,), logits)
        trains = any(self._mask)
        if self._fused:
            # Maximum and sum in one reading or two, the loss; in the backward, the gradient in place.
            seconds += copy * (2 if trains else 1)
        else:
            row = self._tensor((match.rows,), loss_dtype)
            one = self._tensor((), loss_dtype)
            nll = (one, scores, self._target, None, 1, match.ignore_index)
            if loss_dtype is not match.dtype:
                casts = self._seconds(_aten._to_copy.default, (logits,), scores, dtype=loss_dtype)
                seconds += casts * (2 if trains else 1)
            seconds += self._seconds(_aten._log_softmax.default, (scores, 1, False), scores)
            seconds += self._seconds(_aten.nll_loss_forward.default, (*nll[1:],), (one, row[:1]))
            if trains:
                seconds += self._seconds(_aten.nll_loss_backward.default, (*nll, one), scores)
                softmax = (scores, scores, 1, loss_dtype)
                seconds += self._seconds(_aten._log_softmax_backward_data.default, softmax, scores)
        for _ in match.sums:
            # Logits are read; their share of the gradient is computed and added.
            seconds += copy * (3 if trains else 1)
        if self._mask[0]:
            seconds += self._seconds(_aten.mm.default, (logits, weight), rows)
        if self._mask[1]:
            seconds += self._seconds(_aten.mm.default, (logits.t(), rows), weight)
        return seconds

    def _pieces_seconds(self, mode: str, cuts: int) -> float:
        match = self._match
        one = self._tensor((), match.loss.meta["val"].dtype)
        wide = torch.float64 if match.dtype is torch.float64 else torch.float32
        log_sum_exp = self._tensor((match.rows,), wide)
        operands = (self._rows, self._weight, self._bias, self._target)
        settings = (cuts, match.by_row, match.ignore_index, match.label_smoothing, match.logit_scale)
        settings = (*settings, match.softcap)  # type: ignore[assignment]
        empty = self._tensor((0,), match.dtype)
        gradients = tuple(
            tensor if needed and tensor is not None else empty
            for tensor, needed in zip((self._rows, self._weight, self._bias), self._mask, strict=True)
        )
        op, mask = operator_of(mode), list(self._mask)
        if holds_gradients(mode):
            seconds = self._seconds(op, (*operands, *settings, one.dtype, mask), (one, *gradients))
            scaled = [tensor for tensor, needed in zip(gradients, mask, strict=True) if needed]
            return seconds + sum(self._seconds(_aten.mul.Tensor, (t, one), t) for t in scaled)
        loss = log_sum_exp if match.by_row == "none" else one
        seconds = self._seconds(op, (*operands, *settings, loss.dtype), (loss, log_sum_exp))
        if any(mask):
            arguments = (loss, *operands, log_sum_exp, *settings, mask)
            seconds += self._seconds(backward_of(mode), arguments, gradients)
        return seconds

    def _tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def _seconds(self, op: Any, args: Sequence[Any], value: Any, **kwargs: Any) -> float:
        graph = fx.Graph()

        def place(item: Any) -> Any:
            if not isinstance(item, torch.Tensor):
                return item
            node = graph.placeholder(f"input_{len(graph.nodes)}")
            node.meta["val"] = item
            return node

        node = graph.call_function(op, tuple(place(item) for item in args), kwargs)
        node.meta["val"] = value
        return self._cost.node(node).seconds
