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
