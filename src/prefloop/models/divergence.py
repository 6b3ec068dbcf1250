"""How far two models are apart at each token: KL over the whole vocabulary.

Both models run over the tokens, and their heads over a few tokens at a time: of values over the vocabulary there are
never more than three chunks in memory, whatever its size (`token_chunks`).

Shape suffixes: T tokens of the forest, U tokens that are read (distinct), D hidden size, W vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prefloop.batch.packed import PackedBatch
from prefloop.models.attention import causal_model, wide
from prefloop.models.forward import hidden_states, layout_for, token_chunks
from prefloop.models.logits import head_of
from prefloop.models.positions import check_positions
from prefloop.models.sparing import chunking


@torch.no_grad()
def divergence(policy: nn.Module, reference: nn.Module, batch: PackedBatch) -> Tensor:
    """KL(policy ‖ reference) [T], nats, of the distributions at temperature 1 that tokens of the loss mask come from.

    0 at other tokens. Its sum over what the policy sampled has the mean of k1's sum, and a smaller variance: what k1
    draws at each position is here replaced by its mean (Amini et al. 2025, arXiv:2504.10637).

    Raises:
        PrefloopError: as `forward`.
    """
    token_U = torch.unique(batch.visit_token_V[batch.loss_mask_V])
    own_UD, other_UD = (_states_before(model, batch, token_U) for model in (policy, reference))
    own_head, other_head = head_of(policy), head_of(reference)
    kl_U = torch.zeros(len(token_U), dtype=wide(own_UD), device=own_UD.device)
    for rows in token_chunks(len(token_U), _vocabulary(policy)):
        kl_U[rows] = _kl(own_head(own_UD[rows]), other_head(other_UD[rows]))
    return kl_U.new_zeros(batch.num_tokens).index_put((token_U,), kl_U)


def _states_before(model: nn.Module, batch: PackedBatch, token_U: Tensor) -> Tensor:
    """The last hidden states [U, D] at tokens' parents, from which they were drawn."""
    check_positions(model, batch)
    layout = layout_for(model, batch)
    parent_U = layout.place_T[batch.parent_T[token_U]]
    with chunking(model):
        return hidden_states(model, layout, parent_U)[parent_U]


def _vocabulary(model: nn.Module) -> int:
    return int(causal_model(model).config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]


def _kl(own_UW: Tensor, other_UW: Tensor) -> Tensor:
    """KL [U] of logits, which are overwritten; a token without any chance adds nothing."""
    own_UW, other_UW = own_UW.to(wide(own_UW)), other_UW.to(wide(other_UW))
    for logit_UW in (own_UW, other_UW):
        logit_UW -= logit_UW.logsumexp(-1, keepdim=True)
    difference_UW = torch.sub(own_UW, other_UW, out=other_UW)
    probability_UW = own_UW.exp_()
    kl_U: Tensor = torch.linalg.vecdot(probability_UW, difference_UW.masked_fill_(probability_UW == 0, 0.0))
    return kl_U
