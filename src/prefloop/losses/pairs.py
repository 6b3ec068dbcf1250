"""What a loss of preference pairs is given, and the logistic loss that many of them share."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """P preferences under the policy and the reference; all [P], log-probs in nats.

    Log-probs are sums over a completion's loss tokens, of which there are `num_chosen_P` and `num_rejected_P`; those
    of the reference are 0 for losses that have none. The `tail` is that part of a log-ratio of policy to reference
    that comes from tokens beyond the number that both completions have; it is 0 for the shorter one.
    """

    chosen_logprob_P: Tensor
    rejected_logprob_P: Tensor
    ref_chosen_logprob_P: Tensor
    ref_rejected_logprob_P: Tensor
    num_chosen_P: Tensor
    num_rejected_P: Tensor
    chosen_tail_P: Tensor
    rejected_tail_P: Tensor

    @property
    def chosen_logratio_P(self) -> Tensor:
        """a = log π(y_c) - log π_ref(y_c)."""
        return self.chosen_logprob_P - self.ref_chosen_logprob_P

    @property
    def rejected_logratio_P(self) -> Tensor:
        """b = log π(y_r) - log π_ref(y_r)."""
        return self.rejected_logprob_P - self.ref_rejected_logprob_P

    @property
    def difference_P(self) -> Tensor:
        """d = a - b."""
        return self.chosen_logratio_P - self.rejected_logratio_P

    @property
    def swapped(self) -> Pairs:
        """The same pairs with chosen and rejected exchanged."""
        return replace(
            self,
            chosen_logprob_P=self.rejected_logprob_P,
            rejected_logprob_P=self.chosen_logprob_P,
            ref_chosen_logprob_P=self.ref_rejected_logprob_P,
            ref_rejected_logprob_P=self.ref_chosen_logprob_P,
            num_chosen_P=self.num_rejected_P,
            num_rejected_P=self.num_chosen_P,
            chosen_tail_P=self.rejected_tail_P,
            rejected_tail_P=self.chosen_tail_P,
        )


def logistic(logit_P: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - ε) log σ(x) - ε log σ(-x): the cross-entropy of labels of which a share ε is taken to be flipped."""
    if not label_smoothing:
        return -logsigmoid(logit_P)
    return -(1 - label_smoothing) * logsigmoid(logit_P) - label_smoothing * logsigmoid(-logit_P)
