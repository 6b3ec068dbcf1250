"""Log-probs of a batch under a model: one forward for every algorithm.

Only the log-probs of tokens that enter a loss are computed, each read at its parent. The head works in chunks of
tokens; probabilities are kept for the backward pass where they fit a budget, else computed again, so that values over
the vocabulary are never all in memory beyond it.

Shape suffixes: T tokens of the forest, V visits, U tokens that are read (distinct), D hidden size, W vocabulary, H
score heads.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from prefloop.batch.layout import Layout, forest_layout, rows_layout
from prefloop.batch.packed import PackedBatch
from prefloop.models.attention import causal_model, is_sharing, sharing, why_not_shared, wide
from prefloop.models.last_layer import asking_segments, only_at
from prefloop.models.logits import Head, body_of, head_of
from prefloop.models.positions import check_positions
from prefloop.models.sparing import chunking
from prefloop.records import PrefloopError

Want = Literal["logprob", "entropy", "score", "value"]

LOGIT_BUDGET = 1 << 29
"""Bytes of probabilities over the vocabulary that may be kept for the backward pass."""

CHUNK_TOKENS = 512
"""Tokens whose logits are computed at a time: 4 MB of them at a vocabulary of 2,048, near the caches' size."""

CHUNK_LOGITS = 1 << 24
"""Logits that are computed at a time, 64 MB in float32: of large vocabularies those of fewer tokens."""

SEGMENT_FLOPS = 2e6
"""What the attention of one segment costs in calls: measured 47 µs at about 40 GFLOP/s, one thread."""


@dataclass(frozen=True, slots=True, eq=False)
class Outputs:
    """What a forward gives for each token of the forest, 0 where nothing reads it; None what was not wanted.

    `logprob_T` the log-prob (nats) of the token given its ancestors; `entropy_T` (nats) of the distribution it was
    drawn from; `score_TH` the scores that the model gives at the token; `value_T` the first of those at its parent:
    what a critic expects before the token. Float32, float64 for models in float64.
    """

    logprob_T: Tensor | None = None
    entropy_T: Tensor | None = None
    score_TH: Tensor | None = None
    value_T: Tensor | None = None


def forward(
    model: nn.Module,
    batch: PackedBatch,
    want: Collection[Want] = frozenset({"logprob"}),
    *,
    read_V: Tensor | None = None,
    layout: Layout | None = None,
    logit_budget: int = LOGIT_BUDGET,
    temperature: float = 1.0,
) -> Outputs:
    """Log-probs of tokens under a causal language model of transformers, or scores under one with a scalar head.

    `read_V` (bool) names the visits that are read, by default those of the loss mask; nothing else is computed.
    `layout` says how tokens lie before the model, by default as `layout_for` chooses. The result does not depend
    on it beyond rounding. Logits are divided by `temperature`, at which tokens were sampled. Scores and values may be
    wanted together, log-probs only with entropies.

    Raises:
        PrefloopError: a forest for a model that cannot share, gradient checkpointing outside `sharing`, or no such
            head; and as `head_of` and `check_positions`.
    """
    if layout is None:
        layout = layout_for(model, batch)
    check_positions(model, batch)
    token_U = torch.unique(batch.visit_token_V[batch.loss_mask_V if read_V is None else read_V])
    own_U, parent_U = layout.place_T[token_U], layout.place_T[batch.parent_T[token_U]]
    read_U = own_U if set(want) == {"score"} else torch.cat([own_U, parent_U]) if "score" in want else parent_U
    with nullcontext() if torch.is_grad_enabled() else chunking(model):
        hidden_LD = hidden_states(model, layout, read_U)

    def spread(value_U: Tensor) -> Tensor:
        return value_U.new_zeros(batch.num_tokens, *value_U.shape[1:]).index_put((token_U,), value_U)

    def scored(place_U: Tensor) -> Tensor:
        score_UH: Tensor = score_head(model)(hidden_LD[place_U])
        return spread(score_UH.to(torch.promote_types(score_UH.dtype, torch.float32)))

    if "score" in want or "value" in want:
        return Outputs(
            score_TH=scored(own_U) if "score" in want else None,
            value_T=scored(parent_U)[:, 0] if "value" in want else None,
        )
    hidden_UD = hidden_LD[parent_U]
    head, target_U = _Head(head_of(model), temperature, "entropy" in want), batch.token_T[token_U]
    logprob_U, entropy_U = _scored(hidden_UD, head, target_U, logit_budget)
    return Outputs(spread(logprob_U), spread(entropy_U) if "entropy" in want else None)


def score_head(model: nn.Module) -> nn.Module:
    """The scalar head of a sequence or token classification model of transformers; gives [..., H].

    Raises:
        PrefloopError: the model has none.
    """
    head = getattr(causal_model(model), "score", None)
    if not isinstance(head, nn.Module):
        raise PrefloopError(f"{type(model).__name__} has no score head: load it as a reward model")
    return head


def layout_for(model: nn.Module, batch: PackedBatch) -> Layout:
    """The layout that takes least time: a forest, unless the model cannot share or sharing does not pay.

    The estimate: a token costs 6 floating-point operations for each parameter outside the embeddings, forward and
    backward, and on a CPU a segment costs as much in each layer as `SEGMENT_FLOPS` of them, for the calls of its
    attention. Rows win where many tiny paths share next to nothing and are of nearly equal length.
    """
    if why_not_shared(model):
        return rows_layout(batch)
    forest = forest_layout(batch)
    if batch.token_T.device.type != "cpu" or forest.segments is None:
        return forest
    causal: Any = causal_model(model)
    rows = rows_layout(batch)
    spared = 6 * causal.num_parameters(exclude_embeddings=True) * (rows.num_places - forest.num_places)
    calls = SEGMENT_FLOPS * causal.config.num_hidden_layers * len(forest.segments)
    return forest if spared > calls else rows


def hidden_states(model: nn.Module, layout: Layout, read_R: Tensor | None = None) -> Tensor:
    """The model's last hidden states [places of the layout, D], after its final norm.

    Over a forest they are good only at the places `read_R`, if those are given.

    Raises:
        PrefloopError: as `forward`.
    """
    causal: Any = causal_model(model)
    if layout.segments is None:
        body = body_of(causal)
        states = [body(input_ids=block, use_cache=False).last_hidden_state.flatten(0, 1) for block in layout.blocks]
        return torch.cat(states)
    reason = why_not_shared(model)
    if reason:
        raise PrefloopError(f"this model cannot run over shared prefixes: {reason}; use rows_layout")
    if not is_sharing(model) and _recomputes(causal):
        raise PrefloopError("with gradient checkpointing, forward and backward must run inside `sharing(model)`")
    read_R = None if read_R is None or _recomputes(causal) else torch.unique(read_R)
    last_segments = None
    narrowed: AbstractContextManager[None] = nullcontext()
    if read_R is not None:
        last_segments = asking_segments(layout.segments, read_R)
        narrowed = only_at(causal.base_model.layers[-1], read_R, layout.place_T.shape[0])
    with nullcontext() if is_sharing(model) else sharing(model), narrowed:
        return causal.base_model(  # type: ignore[no-any-return]
            input_ids=layout.blocks[0],
            position_ids=layout.position_ids_BL,
            use_cache=False,
            forest=layout,
            last_segments=last_segments,
        ).last_hidden_state[0]


def _recomputes(causal: nn.Module) -> bool:
    """Whether the backward pass will run layers again."""
    checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in causal.modules())
    return checkpointing and causal.training and torch.is_grad_enabled()


class _Head(NamedTuple):
    """What makes logits of hidden states, what they are divided by, and whether the entropy is wanted, too."""

    logits_of: Head
    temperature: float
    want_entropy: bool


def _scored(hidden_UD: Tensor, head: _Head, token_U: Tensor, logit_budget: int) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy [U] of tokens; the entropy empty unless wanted."""
    linear = head.logits_of
    if not isinstance(linear, nn.Linear):
        return _own_head(hidden_UD, head, token_U)
    weight_WD: Tensor = linear.weight
    bias_W: Tensor | None = linear.bias
    if head.temperature != 1.0:
        hidden_UD = hidden_UD / head.temperature
        bias_W = None if bias_W is None else bias_W / head.temperature
    if torch.is_autocast_enabled(hidden_UD.device.type):
        dtype = torch.get_autocast_dtype(hidden_UD.device.type)
        hidden_UD, weight_WD = hidden_UD.to(dtype), weight_WD.to(dtype)
        bias_W = None if bias_W is None else bias_W.to(dtype)
    num_bytes = token_U.shape[0] * weight_WD.shape[0] * wide(weight_WD).itemsize
    keep = torch.is_grad_enabled() and num_bytes <= logit_budget
    return _LinearHead.apply(hidden_UD, weight_WD, bias_W, token_U, head.want_entropy, keep)  # type: ignore[no-any-return, no-untyped-call]


class _LinearHead(torch.autograd.Function):
    """Log-softmax of a linear head at one token each, in chunks; probabilities kept or computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_UD: Tensor,
        weight_WD: Tensor,
        bias_W: Tensor | None,
        token_U: Tensor,
        want_entropy: bool,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropies, kept = [], [], []
        for rows in token_chunks(token_U.shape[0], weight_WD.shape[0]):
            hidden, token = hidden_UD[rows], token_U[rows]
            logprob, entropy, probability = _score(_logits(hidden, weight_WD, bias_W), token, want_entropy)
            if keep:
                kept.append(probability)
            logprobs.append(logprob)
            entropies.append(entropy)
        ctx.kept = kept
        logprob_U, entropy_U = torch.cat(logprobs), torch.cat(entropies)
        ctx.save_for_backward(hidden_UD, weight_WD, bias_W, token_U, entropy_U)
        ctx.set_materialize_grads(False)
        return logprob_U, entropy_U

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_UD, weight_WD, bias_W, token_U, entropy_U = ctx.saved_tensors
        grad_logprob = torch.zeros_like(hidden_UD[:, 0], dtype=wide(hidden_UD)) if grads[0] is None else grads[0]
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden_UD) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_WD, dtype=wide(weight_WD)) if needs_weight else None
        grad_bias = torch.zeros_like(bias_W) if bias_W is not None and needs_bias else None
        for i, rows in enumerate(token_chunks(token_U.shape[0], weight_WD.shape[0])):
            hidden, token = hidden_UD[rows], token_U[rows]
            if ctx.kept:
                probability = ctx.kept[i]
            else:
                logits = _logits(hidden, weight_WD, bias_W)
                probability = torch.softmax(logits, dim=-1, out=logits)
            grad_logits = _logit_gradient(probability, token, grad_logprob[rows])
            if grads[1] is not None:
                grad_logits += _entropy_gradient(probability, entropy_U[rows], grads[1][rows])
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight_WD, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits.T, hidden)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight_WD.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == right.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def token_chunks(num_tokens: int, num_words: int) -> list[slice]:
    """Tokens whose logits over a vocabulary of `num_words` are computed at a time."""
    step = min(CHUNK_TOKENS, max(1, CHUNK_LOGITS // num_words))
    return [slice(start, start + step) for start in range(0, num_tokens, step)]


def _logits(hidden_UD: Tensor, weight_WD: Tensor, bias_W: Tensor | None) -> Tensor:
    return nn.functional.linear(hidden_UD, weight_WD, bias_W).to(wide(hidden_UD))


def _logit_gradient(probability: Tensor, token: Tensor, grad: Tensor) -> Tensor:
    """d logprob / d logits times the incoming gradient: grad · (1[token] - softmax(logits)).

    Works out of place, so that a graph may be walked twice.
    """
    return (probability * -grad[:, None]).scatter_add_(1, token[:, None], grad[:, None])


def _entropy_gradient(probability: Tensor, entropy: Tensor, grad: Tensor) -> Tensor:
    """d entropy / d logits times the incoming gradient: -grad · p · (log p + entropy)."""
    return -grad[:, None] * (torch.xlogy(probability, probability) + probability * entropy[:, None])


def _score(logits: Tensor, token: Tensor, want_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of each token (nats), the entropy of its distribution if wanted, and the probabilities of all words.

    The probabilities overwrite the logits unless the entropy is wanted. The largest is exp(top logit - norm), which
    gives the norm without another pass of exponentials.
    """
    own, top = logits.gather(1, token[:, None])[:, 0], logits.amax(-1)
    probability = torch.softmax(logits, dim=-1) if want_entropy else torch.softmax(logits, dim=-1, out=logits)
    norm = top - probability.amax(-1).log()
    entropy = norm - (probability * logits).sum(-1) if want_entropy else norm.new_empty(0)
    return own - norm, entropy, probability


def _own_head(hidden_UD: Tensor, head: _Head, token_U: Tensor) -> tuple[Tensor, Tensor]:
    """The same through any function, computed again in the backward pass."""
    from torch.utils.checkpoint import checkpoint

    def chunk(hidden: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        logits = head.logits_of(hidden)
        logprob_UW = torch.log_softmax(logits.to(wide(logits)) / head.temperature, dim=-1)
        entropy = -(logprob_UW.exp() * logprob_UW).sum(-1) if head.want_entropy else logprob_UW.new_empty(0)
        return logprob_UW.gather(1, token[:, None])[:, 0], entropy

    chunks = torch.split(hidden_UD, CHUNK_TOKENS), torch.split(token_U, CHUNK_TOKENS)
    scored = [checkpoint(chunk, *rows, use_reentrant=False) for rows in zip(*chunks, strict=True)]
    return torch.cat([logprob for logprob, _ in scored]), torch.cat([entropy for _, entropy in scored])
