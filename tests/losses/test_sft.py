import torch

from prefloop.losses.sft import sft


def test_value_and_gradient():
    logprob_U = torch.tensor([-0.5, -2.0, 0.0], requires_grad=True)
    loss_U = sft(logprob_U)
    assert loss_U.tolist() == [0.5, 2.0, 0.0]
    loss_U.sum().backward()
    assert logprob_U.grad.tolist() == [-1.0] * 3
