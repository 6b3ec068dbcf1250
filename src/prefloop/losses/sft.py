"""Cross-entropy on the tokens of demonstrations."""

from __future__ import annotations

from torch import Tensor


def sft(logprob_U: Tensor) -> Tensor:
    """The negative log-likelihood of each loss token.

        L_u = -log π(y_u | y_<u)

    `logprob_U` [U] in nats. Returns [U], unreduced.
    """
    return -logprob_U
