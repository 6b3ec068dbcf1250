"""Tasks whose completions can all be listed, so that an objective's optimum is known in closed form."""

import copy
import itertools
import math

import torch

from packed_examples import VOCAB, path, tiny_model
from prefloop.batch.examples import Demonstration, PreferencePair
from prefloop.batch.packed import pack
from prefloop.models.forward import forward
from prefloop.training.algorithms import make_algorithm
from prefloop.training.logprobs import with_reference
from prefloop.training.step import StepSettings, TrainingStep

PROMPT = [1, 7]
ARMS = range(10, 20)
BANDIT = [[arm] for arm in ARMS]
TREE = [list(tokens) for tokens in itertools.product(range(10, 13), repeat=3)]


def policy(seed=0):
    """A small model with float64 weights; all its probability lies on the arms after a first fit (`only_arms`)."""
    model = tiny_model("llama", dtype=torch.float64, initializer_range=0.4)
    return only_arms(model, seed)


def only_arms(model, seed):
    """Give tokens that no completion has logits of -30, so that the listed completions are all there is."""
    generator = torch.Generator().manual_seed(seed)
    bias = torch.full((VOCAB,), -30.0, dtype=torch.float64)
    bias[list(ARMS)] = torch.randn(len(ARMS), generator=generator, dtype=torch.float64) * 0.5
    model.lm_head = torch.nn.Linear(model.config.hidden_size, VOCAB, bias=True, dtype=torch.float64)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.05, generator=generator)
        model.lm_head.bias.copy_(bias)
    return model


@torch.no_grad()
def probabilities(model, completions):
    """The probability of each completion among those listed."""
    batch = pack([Demonstration((path(PROMPT + c, len(PROMPT)),)) for c in completions])
    logprob_V = forward(model.eval(), batch).logprob_T[batch.visit_token_V]
    return torch.softmax(torch.zeros(len(completions)).double().index_add(0, batch.visit_sample_V, logprob_V), 0)


def all_pairs(completions, preference, weight=None):
    """Every pair of completions, with the probability that the first is better and the weight of each."""
    pairs = []
    for i, j in itertools.combinations(range(len(completions)), 2):
        p, w = float(preference[i, j]), 1.0 if weight is None else float(weight[i] * weight[j])
        chosen, rejected = ((path(PROMPT + completions[k], len(PROMPT)),) for k in (i, j))
        pairs.append(PreferencePair(chosen, rejected, probability=p, weight=w, name=f"{i} over {j}"))
    return pairs


def bradley_terry(rewards):
    """P(i is better than j) under rewards."""
    return torch.sigmoid(rewards[:, None] - rewards[None, :])


def converge(model, objective, pairs, *, steps, learning_rate, **knobs):
    """Train on all pairs at once until the end of a cosine schedule; returns the reference."""
    reference = copy.deepcopy(model)
    algorithm = make_algorithm(objective, **knobs)
    if algorithm.needs_reference:
        pairs = with_reference(reference, pairs)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    step = TrainingStep(model, None, algorithm, optimizer, StepSettings(max_grad_norm=math.inf))
    for number in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * number / steps))
        step(pairs)
    return reference


def total_variation(p, q):
    """Half the sum of absolute differences."""
    return float((p - q).abs().sum() / 2)


def kl(p, q):
    """KL(p ‖ q), nats."""
    return float((p * (p / q).log()).sum())
