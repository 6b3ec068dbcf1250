import pytest
import torch

from prefloop.losses.sft import sft


def test_value_and_gradient():
    logprob_U = torch.tensor([-0.5, -2.0, 0.0], requires_grad=True)
    loss_U = sft(logprob_U, dft=False)
    assert loss_U.tolist() == [0.5, 2.0, 0.0]
    loss_U.sum().backward()
    assert logprob_U.grad.tolist() == [-1.0] * 3


def test_dynamic_fine_tuning_weighs_by_the_probability_without_gradient_through_it():
    logprob_U = torch.tensor([0.5, 0.1], dtype=torch.float64).log().requires_grad_()
    loss_U = sft(logprob_U, dft=True)
    assert loss_U.tolist() == pytest.approx([0.5 * 0.6931471805599453, 0.1 * 2.302585092994046])
    loss_U.sum().backward()
    assert logprob_U.grad.tolist() == pytest.approx([-0.5, -0.1])
