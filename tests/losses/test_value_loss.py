import math

import pytest
import torch

from prefloop.losses.value import clipped_value


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "grad"),
    [
        (1.1, 1.0, 2.0, 0.5 * 0.9**2, -0.9),  # within the clip: plain regression
        (1.5, 1.0, 2.0, 0.5 * 0.8**2, 0.0),  # has come near enough
        (0.5, 1.0, 2.0, 0.5 * 1.5**2, -1.5),  # moved away: drawn back
        (3.0, 1.0, 2.0, 0.5, 1.0),  # beyond the target: (3 - 2)² is the larger one
    ],
)
def test_by_hand(value, old, target, loss, grad):
    value = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    found = clipped_value(value, torch.tensor([old]).double(), torch.tensor([target]).double(), clip=0.2)
    found.sum().backward()
    assert found.item() == pytest.approx(loss)
    assert value.grad.item() == pytest.approx(grad)


def test_without_a_clip_it_is_regression():
    value, old, target = torch.randn(3, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = clipped_value(value, old, target, clip=math.inf)
    torch.testing.assert_close(found, (value - target) ** 2 / 2)
    assert (clipped_value(value, old, target, clip=0.2) >= found).all()
