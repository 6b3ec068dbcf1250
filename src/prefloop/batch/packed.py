"""The one batch that every algorithm trains on.

Shape suffixes: T tokens of the forest, V visits of paths to tokens, S samples, P pairs, K labelled steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefloop.batch.examples import Example, LabelledSample, PreferencePair, SteppedSample
from prefloop.batch.tree import Forest, build_forest, separate_forest
from prefloop.records import PrefloopError

Unit = Literal["loss token", "chosen token", "chosen sequence token", "sample", "pair", "step"]
"""What a loss gives one value for."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """A forest of token prefixes, the paths that visit it, and one value per visit, sample or pair.

    The forest holds no model: policy and reference are forwards over the same batch. Query q sees key k iff
    `k <= q < end_T[k]`; the position of a token is `depth_T`; the logits that predict token t are those at
    `parent_T[t]` (-1 for roots, which nothing predicts).

    Int64: `token_T`, `parent_T`, `depth_T`, `end_T`, `visit_token_V` (the node visited), `visit_sample_V` (the
    sample on whose behalf), `pair_P2` (the samples chosen and rejected) and `step_visit_K` (the visit at which a
    step ends). Bool: `loss_mask_V` and `tied_P` (neither is better). In nats: `sampled_logprob_V` (the behaviour
    policy's, NaN where not sampled), `ref_logprob_V` (the reference's) and `old_logprob_V` (the trained policy's own
    before its first step on these rollouts), None where they are not known. `advantage_V`: what rollouts' tokens are
    worth; `return_V` and `old_value_V`: what a critic should say before each, and said at first; None where there are
    none. Float64, as the examples give them: `weight_S`, `weight_P`, `weight_K`; `label_S`
    (1 desirable, 0 undesirable, NaN not labelled); `probability_P`, the belief that chosen really is better;
    `margin_P`, by how much; `step_label_K` in [0, 1]; `head_weight_PH`, what a pair weighs for each head of a reward
    model ([P, 1] of ones where all are alike).
    `kl` is the mean log-ratio of policy to reference, nats a sample, where a loss asked for it.
    """

    token_T: Tensor
    parent_T: Tensor
    depth_T: Tensor
    end_T: Tensor
    visit_token_V: Tensor
    visit_sample_V: Tensor
    loss_mask_V: Tensor
    sampled_logprob_V: Tensor
    weight_S: Tensor
    label_S: Tensor
    pair_P2: Tensor
    probability_P: Tensor
    margin_P: Tensor
    tied_P: Tensor
    weight_P: Tensor
    head_weight_PH: Tensor
    step_visit_K: Tensor
    step_label_K: Tensor
    weight_K: Tensor
    ref_logprob_V: Tensor | None = None
    old_logprob_V: Tensor | None = None
    advantage_V: Tensor | None = None
    return_V: Tensor | None = None
    old_value_V: Tensor | None = None
    kl: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """T, the number of distinct tokens."""
        return self.token_T.shape[0]

    @property
    def num_samples(self) -> int:
        """S, the number of samples."""
        return self.weight_S.shape[0]

    @property
    def loss_visits(self) -> Tensor:
        """The visits that enter losses, in order; int64, U loss tokens."""
        return torch.nonzero(self.loss_mask_V)[:, 0]

    @property
    def chosen_visits(self) -> Tensor:
        """The visits of chosen samples that enter losses, in order; int64."""
        return torch.nonzero(self._chosen_V & self.loss_mask_V)[:, 0]

    @property
    def chosen_sequence_visits(self) -> Tensor:
        """The visits of chosen samples to all tokens that something predicts, prompts and tools' too; int64."""
        return torch.nonzero(self._chosen_V & (self.depth_T[self.visit_token_V] > 0))[:, 0]

    @property
    def _chosen_V(self) -> Tensor:
        chosen_S = torch.zeros_like(self.weight_S, dtype=torch.bool)
        chosen_S[self.pair_P2[:, 0]] = True
        return chosen_S[self.visit_sample_V]

    @property
    def last_visit_S(self) -> Tensor:
        """The last visit of each sample, at which a reward model's score is read; int64."""
        return torch.cumsum(torch.bincount(self.visit_sample_V, minlength=self.num_samples), 0) - 1

    def weight(self, unit: Unit) -> Tensor:
        """The weight of each unit; their sum over the optimizer step is the loss's denominator."""
        match unit:
            case "pair":
                return self.weight_P
            case "step":
                return self.weight_K
            case "sample":
                return self.weight_S
            case "loss token":
                visits = self.loss_visits
            case "chosen token":
                visits = self.chosen_visits
            case "chosen sequence token":
                visits = self.chosen_sequence_visits
        return self.weight_S[self.visit_sample_V[visits]]

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on a device."""
        moved: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: t.to(device) for name, t in moved.items() if t is not None})


def pack(examples: Sequence[Example], *, merge: bool = True) -> PackedBatch:
    """The batch of these examples; samples are numbered in order, a pair's chosen before its rejected.

    Without `merge` no prefix is shared: each path is a tree of its own.

    Raises:
        PrefloopError: naming the row: a sample without a loss token, a loss token that nothing predicts (the
            first of a path), or log-probs or advantages of another length.
    """
    samples = [paths for example in examples for paths in example.samples]
    paths = [path for sample in samples for path in sample]
    forest = (build_forest if merge else separate_forest)([path.token for path in paths])
    visit_sample_V = np.repeat(np.arange(len(samples)), [sum(len(path.token) for path in sample) for sample in samples])
    loss_mask_V = np.concatenate([path.loss_mask for path in paths])
    _check_loss_mask(examples, forest, visit_sample_V, loss_mask_V)
    sampled_logprob_V = np.concatenate([path.logprob for path in paths], dtype=np.float32)
    return PackedBatch(
        **_tensors(forest),
        visit_sample_V=torch.from_numpy(visit_sample_V),
        loss_mask_V=torch.from_numpy(loss_mask_V),
        sampled_logprob_V=torch.from_numpy(sampled_logprob_V),
        ref_logprob_V=_stream(examples, "ref_logprob"),
        old_logprob_V=_stream(examples, "old_logprob"),
        advantage_V=_stream(examples, "advantage"),
        return_V=_stream(examples, "ret"),
        old_value_V=_stream(examples, "old_value"),
        **_sample_streams(examples),
    )


def _tensors(forest: Forest) -> dict[str, Tensor]:
    names = ("token_T", "parent_T", "depth_T", "end_T", "visit_token_V")
    return {name: torch.from_numpy(getattr(forest, name)) for name in names}


def _sample_streams(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Weights, labels, pairs and steps of the examples."""
    weight_S: list[float] = []
    label_S: list[float] = []
    pair_P2: list[tuple[int, int]] = []
    for example in examples:
        if isinstance(example, PreferencePair):
            pair_P2.append((len(weight_S), len(weight_S) + 1))
        label = float(example.desirable) if isinstance(example, LabelledSample) else math.nan
        weight_S += [example.weight] * len(example.samples)
        label_S += [label] * len(example.samples)
    pairs = [example for example in examples if isinstance(example, PreferencePair)]
    return {
        "weight_S": torch.tensor(weight_S, dtype=torch.float64),
        "label_S": torch.tensor(label_S, dtype=torch.float64),
        "pair_P2": torch.tensor(pair_P2, dtype=torch.long).reshape(-1, 2),
        "probability_P": torch.tensor([pair.probability for pair in pairs], dtype=torch.float64),
        "margin_P": torch.tensor([pair.margin for pair in pairs], dtype=torch.float64),
        "tied_P": torch.tensor([pair.tied for pair in pairs], dtype=torch.bool),
        "weight_P": torch.tensor([pair.weight for pair in pairs], dtype=torch.float64),
        "head_weight_PH": _head_weights(pairs),
        **_step_streams(examples),
    }


def _head_weights(pairs: Sequence[PreferencePair]) -> Tensor:
    """[P, H], or [P, 1] where no pair has any."""
    num_heads = max((len(pair.head_weight) for pair in pairs), default=0)
    for i, pair in enumerate(pairs):
        if len(pair.head_weight) != num_heads:
            raise PrefloopError(f"{_row(pair, i)}: head_weight has {len(pair.head_weight)} values, not {num_heads}")
    weights = [pair.head_weight or (1.0,) for pair in pairs]
    return torch.tensor(weights, dtype=torch.float64).reshape(len(pairs), num_heads or 1)


def _step_streams(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Where labelled steps end, their labels and weights."""
    visit_K: list[int] = []
    label_K: list[float] = []
    weight_K: list[float] = []
    num_visits = 0
    for i, example in enumerate(examples):
        lengths = [len(path.token) for sample in example.samples for path in sample]
        for step in example.steps if isinstance(example, SteppedSample) else ():
            if not (0 <= step.path < len(lengths) and 0 <= step.token < lengths[step.path]):
                raise PrefloopError(
                    f"{_row(example, i)}: a step ends at token {step.token} of path {step.path}: no such"
                )
            visit_K.append(num_visits + sum(lengths[: step.path]) + step.token)
            label_K.append(step.label)
            weight_K.append(step.weight * example.weight)
        num_visits += sum(lengths)
    return {
        "step_visit_K": torch.tensor(visit_K, dtype=torch.long),
        "step_label_K": torch.tensor(label_K, dtype=torch.float64),
        "weight_K": torch.tensor(weight_K, dtype=torch.float64),
    }


def _stream(examples: Sequence[Example], name: str) -> Tensor | None:
    """What examples hold for each token of each path, or None where one of them does not."""
    if not all(getattr(example, name, ()) for example in examples):
        return None
    for i, example in enumerate(examples):
        lengths = [len(path.token) for sample in example.samples for path in sample]
        if lengths != [len(array) for array in getattr(example, name)]:
            raise PrefloopError(f"{_row(example, i)}: {name} must have one value for each token of each path")
    return torch.from_numpy(np.concatenate([array for example in examples for array in getattr(example, name)]))


def _check_loss_mask(
    examples: Sequence[Example], forest: Forest, visit_sample_V: NDArray[np.int64], loss_mask_V: NDArray[np.bool_]
) -> None:
    row_S = [i for i, example in enumerate(examples) for _ in example.samples]
    num_loss_tokens_S = np.bincount(visit_sample_V[loss_mask_V], minlength=len(row_S))
    if not num_loss_tokens_S.all():
        row = row_S[int(np.argmin(num_loss_tokens_S))]
        raise PrefloopError(
            f"{_row(examples[row], row)}: no token of a sample has the source 'sampled', so it has no loss; "
            "drop the row or render it with its assistant turns"
        )
    unpredicted_V = loss_mask_V & (forest.depth_T[forest.visit_token_V] == 0)
    if unpredicted_V.any():
        row = row_S[int(visit_sample_V[np.argmax(unpredicted_V)])]
        raise PrefloopError(
            f"{_row(examples[row], row)}: the first token of a path has a loss but nothing predicts it; "
            "begin the path with a start token or a prompt"
        )


def _row(example: Example, index: int) -> str:
    return f"row {example.name}" if example.name else f"row {index} of the batch"
