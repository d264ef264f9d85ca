import pytest
import torch
from torch import nn

from scaling.optim.registry import build
from scaling.spec import OptimizerSpec


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_three_steps_are_the_papers_algorithm_in_float64(shape):
    lr, decay, beta1, beta2 = 0.05, 0.5, 0.95, 0.95
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, generator=generator))
    spec = OptimizerSpec(name="normuon", peak_lr=lr, weight_decay=decay, options={"ns_dtype": "fp32"})
    optimizer = build(spec, [("blocks.0.feed_forward.up.weight", weight)])
    expected = weight.detach().double()
    momentum, second_moment = torch.zeros(shape).double(), torch.zeros(shape[0], 1).double()
    for _ in range(3):
        gradient = torch.randn(shape, generator=generator)
        momentum = beta1 * momentum + (1 - beta1) * gradient
        x = momentum / momentum.norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        second_moment = beta2 * second_moment + (1 - beta2) * x.square().mean(dim=1, keepdim=True)
        x = x / (second_moment.sqrt() + 1e-8)
        expected = expected - lr * decay * expected - 0.2 * lr * x.numel() ** 0.5 / x.norm() * x
        weight.grad = gradient
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=1e-5)


def test_rows_of_very_different_gradients_move_alike():
    weight = nn.Parameter(torch.zeros(16, 64))
    optimizer = build(OptimizerSpec(name="normuon", peak_lr=1.0), [("blocks.0.attention.key.weight", weight)])
    weight.grad = torch.randn(16, 64) * torch.logspace(0, -4, 16)[:, None]
    optimizer.step()
    rows = weight.detach().square().mean(dim=1).sqrt()
    torch.testing.assert_close(rows, torch.full((16,), 0.2), rtol=1e-4, atol=0)
