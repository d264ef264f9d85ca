import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.utils.flop_counter import FlopCounterMode

from scaling.model_config import ModelConfig
from scaling.models.decoder import Decoder
from scaling.optim.newton_schulz.coefficients import (
    COEFFICIENTS,
    newton_schulz_flops,
    polynomials,
)
from scaling.optim.newton_schulz.gram_form import iterate_gram
from scaling.optim.newton_schulz.iteration import CHUNK_BYTES, Workspace, normalise, orthogonalise, resolve_dtype
from scaling.optim.registry import build
from scaling.spec import OptimizerSpec
from tests.scaling.optim.oracle import singular_value_after

STEPS = {"keller": 5, "polar-express": 5, "deepseek": 10}


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(rows: int, columns: int, values: torch.Tensor) -> torch.Tensor:
    left, _, right = torch.linalg.svd(gaussian(rows, columns).double(), full_matrices=False)
    return (left * values.double()) @ right


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (24, 64), (64, 24), (400, 450), (450, 400)])
def test_a_matrix_gets_the_same_result_in_every_stack(dtype, rows, columns):
    stack = gaussian(7 if rows < 100 else 2, rows, columns)
    steps = polynomials("keller", 5)
    together = orthogonalise(stack, steps, dtype=dtype)
    alone = torch.stack([orthogonalise(matrix, steps, dtype=dtype) for matrix in stack])
    assert torch.equal(together, alone)


def test_chunks_and_a_used_workspace_change_nothing():
    length = CHUNK_BYTES // (4 * 96 * 200)
    stack = gaussian(2 * length + 3, 96, 200)
    workspace, steps = Workspace(), polynomials("keller", 2)
    fresh = orthogonalise(stack, steps, dtype=torch.float32)
    orthogonalise(gaussian(3, 80, 50), steps, dtype=torch.float32, workspace=workspace)
    assert torch.equal(orthogonalise(stack, steps, dtype=torch.float32, workspace=workspace), fresh)
    assert torch.equal(orthogonalise(stack[length + 1], steps, dtype=torch.float32), fresh[length + 1])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_input_is_left_as_it_was(count, rows, columns, dtype):
    stack = gaussian(count, rows, columns).to(dtype)
    before = stack.clone()
    orthogonalise(stack, polynomials("keller", 3), dtype=dtype)
    assert torch.equal(stack, before)


def test_a_tall_matrix_is_its_transpose_transposed():
    tall = gaussian(70, 30)
    steps = polynomials("keller", 5)
    wide = orthogonalise(tall.mT, steps, dtype=torch.float32)
    # fp32 sums in another order, amplified by the steepest slope of the set.
    torch.testing.assert_close(orthogonalise(tall, steps, dtype=torch.float32), wide.mT, rtol=0, atol=2e-5)


def test_zeros_stay_zeros():
    assert torch.equal(orthogonalise(torch.zeros(2, 8, 5), polynomials("keller", 5)).float(), torch.zeros(2, 8, 5))


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize(("rows", "columns"), [(40, 40), (24, 64), (64, 24)])
def test_every_singular_value_goes_where_the_polynomials_send_it(name, rows, columns):
    steps = polynomials(name, STEPS[name])
    matrix = with_spectrum(rows, columns, torch.logspace(0, -3, min(rows, columns)))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    sent = torch.tensor([singular_value_after(float(v / matrix.norm()), steps) for v in values], dtype=torch.float64)
    expected = (left * sent) @ right
    made = orthogonalise(matrix.float(), steps, dtype=torch.float32).double()
    # An independent float64 SVD is the oracle; fp32 errors grow by at most the slope of the set at zero.
    assert (made - expected).norm() / expected.norm() < 5e-3


BANDS = {"keller": (0.66, 1.22), "polar-express": (0.80, 1.17), "deepseek": (0.94, 1.06)}


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["gaussian", "power law", "low rank and noise"])
def test_singular_values_end_in_the_band_of_their_set(name, dtype, kind):
    matrix = {
        "gaussian": lambda: gaussian(96, 256),
        "power law": lambda: with_spectrum(96, 256, torch.arange(1, 97).float() ** -1.0),
        "low rank and noise": lambda: with_spectrum(96, 256, torch.ones(96).index_fill(0, torch.arange(8, 96), 0.05)),
    }[kind]()
    made = torch.linalg.svdvals(orthogonalise(matrix.float(), polynomials(name, STEPS[name]), dtype=dtype).float())
    low, high = BANDS[name]
    assert made.max() < high
    if kind != "power law":  # whose smallest values, 0.6 % of the norm, take more than five steps
        assert made.min() > low


def test_the_counted_flops_are_what_torch_counts():
    counter = FlopCounterMode(display=False)
    with counter:
        for rows, columns in [(16, 16), (16, 40), (40, 16)]:
            orthogonalise(gaussian(3, rows, columns), polynomials("keller", 5), dtype=torch.float32)
    assert counter.get_total_flops() == 3 * (
        newton_schulz_flops(16, 16, 5) + newton_schulz_flops(16, 40, 5) + newton_schulz_flops(40, 16, 5)
    )


def test_the_format_follows_option_device_and_shape():
    assert resolve_dtype("auto", "cpu", 64, 4096) == torch.float32
    assert resolve_dtype("auto", "cpu", 128, 4096) == torch.bfloat16
    assert resolve_dtype("auto", "cuda", 8, 8) == torch.bfloat16
    assert resolve_dtype("fp32", "cuda", 8, 8) == torch.float32
    assert resolve_dtype("bf16", "cpu", 8, 8) == torch.bfloat16


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (64, 64)])
def test_the_same_arithmetic_as_torchs_muon_gives_the_same_bits(shape):
    # Entries of one and a power of four of them: the norm is exact in any format, the one thing torch takes in bf16.
    signs = gaussian(*shape).sign()
    coefficients = polynomials("keller", 5)
    theirs = _zeropower_via_newtonschulz(signs, coefficients[0], 5, 1e-7)
    assert torch.equal(orthogonalise(signs, coefficients), theirs)


@pytest.mark.parametrize("shape", [(400, 450), (450, 400)])
def test_panels_equal_torch_within_its_rounding(shape):
    matrix, coefficients = gaussian(*shape), polynomials("keller", 5)
    exact = matrix.double() / matrix.double().norm()
    for a, b, c in coefficients:
        square = exact @ exact.T
        exact = a * exact + (b * square + c * square @ square) @ exact
    theirs = _zeropower_via_newtonschulz(matrix, coefficients[0], 5, 1e-7).double()
    ours = orthogonalise(matrix, coefficients).double()
    # Both round to bf16 on the way; halving the symmetric products must not lose more than they lose.
    assert (ours - exact).norm() < 1.1 * (theirs - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_momenta_of_a_real_run_stay_inside_the_band(name, dtype):
    for momentum in momenta_of_a_run():
        made = torch.linalg.svdvals(orthogonalise(momentum, polynomials(name, STEPS[name]), dtype=dtype).float())
        assert made.max() < BANDS[name][1]
        # Their spectra span six decades, so the smallest values stay small; the larger half must have arrived.
        assert made.sort().values[len(made) // 2] > BANDS[name][0] * 0.9


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_the_gram_form_is_the_standard_form_within_fp32(name):
    steps = polynomials(name, STEPS[name])
    for matrix in [gaussian(2, 24, 64), gaussian(2, 64, 24), with_spectrum(24, 64, torch.logspace(0, -3, 24)).float()]:
        standard = orthogonalise(matrix, steps, dtype=torch.float32)
        by_gram = orthogonalise(matrix, steps, dtype=torch.float32, form="gram")
        assert (standard - by_gram).norm() / standard.norm() < 5e-3


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("inside", [torch.float16, torch.float32])
def test_the_gram_form_stays_in_the_band_where_bf16_would_not(name, inside):
    low_rank = with_spectrum(64, 176, torch.ones(64).index_fill(0, torch.arange(6, 64), 0.01)).float()
    for matrix in [low_rank, *(m for m in momenta_of_a_run() if max(m.shape) >= 2 * min(m.shape))]:
        x = normalise(matrix.bfloat16()[None].contiguous())
        made = iterate_gram(x, polynomials(name, STEPS[name]), Workspace(), inside)
        assert torch.linalg.svdvals(made.float()).max() < BANDS[name][1] * 1.1


def test_the_gram_forms_counted_flops_are_what_torch_counts():
    for steps in (1, 2, 5, 10):
        with FlopCounterMode(display=False) as counter:
            orthogonalise(gaussian(3, 40, 16), polynomials("keller", steps), dtype=torch.float32, form="gram")
        assert counter.get_total_flops() == 3 * newton_schulz_flops(40, 16, steps, "gram")
    assert newton_schulz_flops(40, 40, 5, "gram") == newton_schulz_flops(40, 40, 5)


@functools.cache
def momenta_of_a_run() -> list[torch.Tensor]:
    """Momentum of every matrix of a small decoder after 40 steps of AdamW on a periodic text."""
    shape = ModelConfig(layers=2, width=64, heads=2, vocabulary=32, context=32, ffn_multiple=8)
    model = Decoder(shape)
    model.initialise(0)
    optimizer = build(OptimizerSpec(name="adamw", peak_lr=3e-3), model.named_parameters())
    matrices = {n: p for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2}
    momenta = {name: torch.zeros_like(parameter) for name, parameter in matrices.items()}
    for step in range(40):
        start = torch.randint(97, (8, 1), generator=torch.Generator().manual_seed(step))
        sequences = (start + torch.arange(33)).square() % 97 % 32
        optimizer.zero_grad()
        model.loss(sequences).backward()
        optimizer.step()
        for name, parameter in matrices.items():
            momenta[name].mul_(0.95).add_(parameter.grad)
    return list(momenta.values())
