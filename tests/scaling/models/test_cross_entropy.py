"""The loss in chunks is the loss, and nothing of the size of all logits ever exists."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from scaling.models.loss import next_token_loss


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 40), vocabulary=st.integers(2, 60), rows=st.integers(1, 12), seed=st.integers(0, 99))
def test_loss_and_gradients_are_those_of_the_whole_in_float64(
    tokens: int, vocabulary: int, rows: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 8, generator=generator, requires_grad=True)
    head = torch.randn(vocabulary, 8, generator=generator, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    loss = next_token_loss(hidden, head, targets, elements=rows * vocabulary)
    (3 * loss).backward()
    exact_hidden, exact_head = (tensor.detach().double().requires_grad_() for tensor in (hidden, head))
    exact = F.cross_entropy(exact_hidden @ exact_head.T, targets)
    (3 * exact).backward()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    for ours, theirs in ((hidden.grad, exact_hidden.grad), (head.grad, exact_head.grad)):
        assert ours is not None
        assert theirs is not None
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


class Largest(TorchDispatchMode):
    """The most elements that any tensor had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("autocast", [False, True])
def test_no_tensor_is_larger_than_a_chunk_forward_or_backward(autocast: bool) -> None:
    tokens, vocabulary, width = 64, 1000, 4
    hidden, head = torch.randn(tokens, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens,))
    with Largest() as seen:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = next_token_loss(hidden, head, targets, elements=8 * vocabulary)
        loss.backward()
    assert loss.dtype == torch.float32
    assert seen.elements == 8 * vocabulary  # of 64 * vocabulary


def test_chunks_under_autocast_equal_the_plain_loss() -> None:
    torch.manual_seed(0)
    hidden, head, targets = torch.randn(32, 16), torch.randn(50, 16), torch.randint(0, 50, (32,))
    losses, gradients = [], []
    for elements in (50 * 4, 50 * 32):
        states = hidden.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = next_token_loss(states, head, targets, elements=elements)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(states.grad)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=2e-2, atol=1e-3)  # the gradient's own rounding to bf16


def test_an_evaluation_computes_no_gradient() -> None:
    hidden, head, targets = torch.randn(32, 4), torch.randn(50, 4), torch.randint(0, 50, (32,))
    with torch.no_grad():
        loss = next_token_loss(hidden, head, targets, elements=100)
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ head.T, targets))
