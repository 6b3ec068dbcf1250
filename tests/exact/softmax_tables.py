"""Policies that are tables of logits, one row for each state, on tasks whose completions can all be listed.

Shape suffixes: C completions of D tokens each (or S samples of D), U their tokens in a row, N states, W words.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch

from prefloop.credit.shaping import penalised


@dataclass(frozen=True)
class Task:
    """All completions of `depth` tokens over `words` words: their tokens, and the states these are said in."""

    words: int
    depth: int

    @property
    def token_CD(self):
        return torch.tensor(list(itertools.product(range(self.words), repeat=self.depth)))

    @property
    def state_CD(self):
        """The number of each prefix: 0 is the empty one, those of one token follow, and so on."""
        token_CD = self.token_CD
        states, place = [torch.zeros(len(token_CD), dtype=torch.long)], torch.zeros(len(token_CD), dtype=torch.long)
        for depth in range(1, self.depth):
            place = place * self.words + token_CD[:, depth - 1]
            states.append(sum(self.words**d for d in range(depth)) + place)
        return torch.stack(states, 1)

    @property
    def num_states(self):
        return sum(self.words**depth for depth in range(self.depth))

    def table(self, seed, spread=0.7):
        """Random logits [N, W]."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.num_states, self.words, generator=generator, dtype=torch.float64) * spread

    def rewards(self, seed, spread=0.7):
        """Random rewards [C]."""
        generator = torch.Generator().manual_seed(1000 + seed)
        return torch.randn(self.words**self.depth, generator=generator, dtype=torch.float64) * spread

    def logprobs(self, table_NW):
        """The log-prob [C, D] of each token of each completion."""
        return table_NW.log_softmax(1)[self.state_CD, self.token_CD]

    def probabilities(self, table_NW):
        """The probability [C] of each completion."""
        return self.logprobs(table_NW).sum(1).exp().detach()


BANDIT = Task(words=10, depth=1)
TREE = Task(words=3, depth=3)


def regularised_optimum(task, ref_NW, reward_C, beta):
    """π_ref exp(r / β) / Z [C]."""
    weight_C = task.probabilities(ref_NW) * (reward_C / beta).exp()
    return weight_C / weight_C.sum()


def local_optimum(task, ref_NW, reward_C, improve):
    """The fixed point [C] of a KL that each token pays for itself alone: from the last token backwards, each state's
    distribution is `improve(π_ref(· | s), Q(s, ·))`, Q the expected reward under the distributions after it."""
    value = reward_C.reshape([task.words] * task.depth)
    chosen = []
    for depth in reversed(range(task.depth)):
        first = sum(task.words**d for d in range(depth))
        ref = ref_NW[first : first + task.words**depth].softmax(1)
        policy = improve(ref, value.reshape(-1, task.words))
        chosen.append(policy)
        value = (policy * value.reshape(-1, task.words)).sum(1)
    table_NW = torch.cat(chosen[::-1]).log()
    return task.probabilities(table_NW)


def reverse_improvement(beta):
    """π ∝ π_ref exp(Q / β): the best of E[Q] - β KL(π ‖ π_ref)."""

    def improve(ref, q):
        weight = ref * ((q - q.amax(1, keepdim=True)) / beta).exp()
        return weight / weight.sum(1, keepdim=True)

    return improve


def forward_improvement(beta):
    """π = β π_ref / (β + V - Q): the best of E[Q] - β KL(π_ref ‖ π), with V such that it sums to 1."""

    def improve(ref, q):
        low, high = q.amax(1, keepdim=True) - beta, q.amax(1, keepdim=True) + 1.0
        for _ in range(200):
            middle = (low + high) / 2
            too_much = (beta * ref / (beta + middle - q)).sum(1, keepdim=True) > 1
            low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
        policy = beta * ref / (beta + high - q)
        return policy / policy.sum(1, keepdim=True)

    return improve


def penalised_rewards(reward_S, old_SD, ref_SD, beta):
    """The rewards [S, D] of each token: KL at each, the reward at the last."""
    rows = zip(reward_S.tolist(), old_SD.numpy(), ref_SD.numpy(), strict=True)
    return np.stack([penalised(reward, old, ref, kl_coef=beta) for reward, old, ref in rows])


def descend(table_NW, loss_of_step, *, steps, learning_rate, others=()):
    """Adam to the end of a cosine schedule on `loss_of_step(step)`, which reads the table."""
    parameters = [table_NW.requires_grad_(), *others]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss_of_step(step).backward()
        optimizer.step()
    return table_NW.detach()
