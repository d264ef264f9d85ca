import os
import subprocess
import sys

import pytest
import torch

from scaling.optim.newton_schulz.matmul import PANELS_FROM, by_panels, gram, quadratic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(400, 500), (500, 400), (PANELS_FROM, PANELS_FROM), (30, 50), (50, 30)])
def test_both_products_are_those_of_float64_whole_or_by_panels(dtype, rows, columns):
    x = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(0)).div_(columns**0.5).to(dtype)
    side = min(rows, columns)
    assert by_panels(x) == (side >= PANELS_FROM)
    exact = x.double()
    square = exact.mT @ exact if rows > columns else exact @ exact.mT
    tolerance = 2**-8 if dtype == torch.bfloat16 else 2**-18  # one rounding of entries near one, and sums of hundreds
    made = gram(x, torch.empty(2, side, side, dtype=dtype))
    torch.testing.assert_close(made.double(), square, rtol=tolerance, atol=tolerance)
    polynomial = quadratic(made, -4.775, 2.0315, torch.empty_like(made))
    expected = -4.775 * made.double() + 2.0315 * made.double() @ made.double()
    torch.testing.assert_close(polynomial.double(), expected, rtol=8 * tolerance, atol=8 * tolerance)


INTERPRETED = """
import torch
from scaling.optim.newton_schulz.triton_kernel import AVAILABLE, product_with_own_transpose
assert AVAILABLE
for count, side, inner in [(2, 200, 90), (1, 128, 64), (1, 130, 70)]:
    x = torch.randn(count, side, inner)
    out = torch.full((count, side, side), torch.nan)
    product_with_own_transpose(x, out)
    torch.testing.assert_close(out, x @ x.mT, rtol=1e-4, atol=1e-4)
    product_with_own_transpose(x.mT.contiguous().mT, out)
    torch.testing.assert_close(out, x @ x.mT, rtol=1e-4, atol=1e-4)
    square = torch.empty_like(out)
    product_with_own_transpose(out, square, add=out, beta=-2.0, alpha=0.5)
    torch.testing.assert_close(square, 0.5 * out @ out - 2 * out, rtol=1e-3, atol=1e-2)
    assert torch.equal(square, square.mT)
"""


def test_the_gpu_kernel_interpreted_on_the_cpu_makes_the_same_products():
    pytest.importorskip("triton")
    # Triton decides when it is imported whether it compiles or interprets, so this takes a process of its own.
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
