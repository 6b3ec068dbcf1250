"""Cross-entropy on the tokens of demonstrations."""

from __future__ import annotations

from torch import Tensor


def sft(logprob_U: Tensor, *, dft: bool) -> Tensor:
    """The negative log-likelihood of each loss token.

        L_u = -w_u log π(y_u | y_<u),    w_u = 1, or with dft π(y_u | y_<u) without gradient

    Dynamic fine-tuning (Wu et al. 2025, arXiv:2508.05629), eq. 9, weighs tokens by their own probability.
    `logprob_U` [U] in nats. Returns [U], unreduced.
    """
    return -logprob_U * logprob_U.detach().exp() if dft else -logprob_U
