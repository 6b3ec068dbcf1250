"""What a loss of preference pairs is given."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """P preferences under the policy and the reference; all [P], log-probs in nats.

    Log-probs are sums over a completion's loss tokens, of which there are `num_chosen_P` and `num_rejected_P`; those
    of the reference are 0 for losses that have none.
    """

    chosen_logprob_P: Tensor
    rejected_logprob_P: Tensor
    ref_chosen_logprob_P: Tensor
    ref_rejected_logprob_P: Tensor
    num_chosen_P: Tensor
    num_rejected_P: Tensor

    @property
    def chosen_logratio_P(self) -> Tensor:
        """log π(y_c) - log π_ref(y_c)."""
        return self.chosen_logprob_P - self.ref_chosen_logprob_P

    @property
    def rejected_logratio_P(self) -> Tensor:
        """log π(y_r) - log π_ref(y_r)."""
        return self.rejected_logprob_P - self.ref_rejected_logprob_P

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
        )
