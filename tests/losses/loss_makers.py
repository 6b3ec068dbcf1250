"""Pairs for the tests of losses, and the losses of the registry with their default arguments."""

from functools import partial

import numpy as np
import torch

from prefloop.config import parse_settings
from prefloop.losses.pairs import Pairs
from prefloop.losses.registry import losses_of_pairs, objective, resolve_parts
from prefloop.losses.settings import LossSettings

PAIR_LOSSES = losses_of_pairs()
FIELDS = (
    "chosen",
    "rejected",
    "ref_chosen",
    "ref_rejected",
    "num_chosen",
    "num_rejected",
    "chosen_tail",
    "rejected_tail",
)


def tensor(values):
    return torch.as_tensor(values, dtype=torch.float64).reshape(-1)


def pairs_of(chosen, rejected, ref_chosen=0.0, ref_rejected=0.0, num_chosen=1, num_rejected=1, tails=(0.0, 0.0)):
    """Pairs from numbers or tensors."""
    sides = (chosen, rejected, ref_chosen, ref_rejected, num_chosen, num_rejected, *tails)
    width = max(len(tensor(side)) for side in sides)
    return Pairs(*(tensor(side).expand(width) for side in sides))


def random_numbers(num, seed=0):
    """Summed log-probs and token counts of `num` pairs, as arrays by `FIELDS`."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 9, (2, num)).astype(float)
    logprobs = -rng.gamma(2.0, 1.0, (4, num)) * counts[[0, 1, 0, 1]]
    tails = rng.normal(0, 1, (2, num)) * (counts > counts[::-1])
    return dict(zip(FIELDS, (*logprobs, *counts, *tails), strict=True))


def loss_of(name, **knobs):
    """The function of an objective with its arguments, as functions of pairs alone."""
    part = resolve_parts(name, parse_settings(LossSettings, knobs, name))[name]
    return partial(objective(name).load(), **part.arguments)


def value_of(name, *numbers, **knobs):
    """The loss of the one pair that `pairs_of` makes of the numbers."""
    (value,) = loss_of(name, **knobs)(pairs_of(*numbers)).tolist()
    return value
