"""Products that are cut where whole 16 bytes end give what whole products give."""

from __future__ import annotations

import pytest
import torch

from graphopt_kernels.even_products import even_classes, gradient_of_input, gradient_of_weight, logits


@pytest.mark.parametrize(
    ("classes", "dtype", "device", "even"),
    [
        (50257, torch.bfloat16, "cuda", 50256),
        (50257, torch.float32, "cuda", 50256),
        (50258, torch.float64, "cuda", 50258),
        (50264, torch.float16, "cuda", 50264),
        (7, torch.float16, "cuda", 7),
        (50257, torch.bfloat16, "cpu", 50257),
    ],
)
def test_classes_are_cut_where_kernels_want_it(
    classes: int, dtype: torch.dtype, device: str, even: int
) -> None:
    assert even_classes(classes, dtype, torch.device(device)) == even


@pytest.mark.parametrize("even", [16, 19])
@pytest.mark.parametrize("biased", [False, True])
def test_products_in_two_parts_are_those_of_one(even: int, biased: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 8, dtype=torch.float64), torch.randn(19, 8, dtype=torch.float64)
    bias = torch.randn(19, dtype=torch.float64) if biased else None
    z = torch.full((5, 24), torch.nan, dtype=torch.float64)[:, :19]
    logits(x, weight, bias, z, even)
    torch.testing.assert_close(z, torch.nn.functional.linear(x, weight, bias))
    dx = torch.full((5, 8), torch.nan, dtype=torch.float64)
    gradient_of_input(z, weight, dx, even)
    torch.testing.assert_close(dx, z @ weight)
    dw = torch.full((19, 8), torch.nan, dtype=torch.float64)
    gradient_of_weight(z, x, dw, even, adds=False)
    torch.testing.assert_close(dw, z.t() @ x)
    gradient_of_weight(z, x, dw, even, adds=True)
    torch.testing.assert_close(dw, 2 * (z.t() @ x))
