"""Process against outcome reward models and majority vote: the best of 16 attempts at chains of six sums.

A chain is a digit and six operations (add or take 1 … 5, modulo 10), each followed by the result that the policy says;
it was taught by demonstrations of which every fifth result is wrong. An attempt is right if its last result is, a step
if it follows from the result before. `steps`: a process reward model of 6,000 attempts whose steps were checked;
`rollouts`: one of 20,000 attempts, 4 completions from each step (Monte Carlo); `outcomes`: a model of the outcome
alone, of 60,000 attempts; `few_…`: the same of fewer. An outcome model is taught with the outcome at every step first
(Cobbe et al. 2021, arXiv:2110.14168), then at the last alone, and read there; all start from the policy. Whether one
learns is told by its AUC on attempts at problems that nothing was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification

from _common import Cell, Measured, Options
from _language import train_steps
from prefloop.batch.examples import Demonstration, Step, SteppedSample
from prefloop.clients.sampling import SamplingSettings
from prefloop.judges.reward_model import StepAggregate, aggregate_steps
from prefloop.models.reward import RewardModel
from prefloop.models.sampler import LocalSampler
from prefloop.records import Source, TokenPath
from prefloop.training.algorithms import make_algorithm

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

NUM_SEEDS = 3
NUM_STEPS, MODULUS = 6, 10
OPERANDS = np.array([-5, -4, -3, -2, -1, 1, 2, 3, 4, 5])
# Tokens: the results 0 … 9, the operations, a start, and one that is never said.
FIRST_OPERATION = MODULUS
START = FIRST_OPERATION + len(OPERANDS)
NEVER = START + 1
LENGTH = 2 + 2 * NUM_STEPS
RESULTS = np.arange(3, LENGTH, 2)  # the places of results
SOURCE = np.where(np.isin(np.arange(LENGTH), RESULTS), Source.SAMPLED, Source.PROMPT).astype(np.uint8)
NUM_ATTEMPTS = 16


class Labelled(NamedTuple):
    """How many attempts a model learns from, for how many steps of 256, and how many completions value a step."""

    num: int
    num_steps: tuple[int, ...]
    num_completions: int = 0


@dataclass(frozen=True)
class Size:
    """How many demonstrations and problems there are, for how long the policy is trained, and what verifiers get."""

    demonstrations: int
    sft: int
    problems: int
    verifiers: Mapping[str, Labelled]


AGGREGATES: Sequence[StepAggregate] = ("min", "product", "last")

FULL = Size(
    demonstrations=20_000,
    sft=250,
    problems=400,
    verifiers={
        "steps": Labelled(6_000, (300,)),
        "few_steps": Labelled(2_000, (300,)),
        "rollouts": Labelled(20_000, (900,), 4),
        "few_rollouts": Labelled(2_000, (300,), 8),
        "outcomes": Labelled(60_000, (1100, 700)),
        "few_outcomes": Labelled(6_000, (300, 150)),
    },
)
QUICK = Size(
    demonstrations=1_000,
    sft=20,
    problems=40,
    verifiers={
        "steps": Labelled(300, (10,)),
        "rollouts": Labelled(100, (10,), 4),
        "outcomes": Labelled(600, (10, 10)),
    },
)


def cells(quick: bool) -> dict[str, Cell]:
    """One cell a seed."""
    return {f"chains-{seed}": partial(measure, seed) for seed in range(1 if quick else NUM_SEEDS)}


def measure(seed: int, options: Options) -> Measured:
    """All verifiers on the attempts of one policy."""
    world = World(options.seed + seed, QUICK if options.quick else FULL)
    found: dict[str, float] = {
        "pass1": float(world.right.mean()),
        f"pass{NUM_ATTEMPTS}": float(world.right.any(1).mean()),
        "right_with_wrong_step": 1 - float(world.right_steps.all(2)[world.right].mean()),
    }
    rows = [{"verifier": "none", "best of 4": f"{found['pass1']:.3f}", "best of 16": f"{found['pass1']:.3f}"}]
    rows += _record(found, "majority", world.majority)
    for name, labelled, values in world.verifiers():
        found[f"{name}_step_auc"] = area_under_curve(values.ravel(), world.right_steps.ravel())
        for aggregate in AGGREGATES:
            score = np.array([aggregate_steps(one, aggregate) for one in values.reshape(-1, NUM_STEPS).tolist()])
            chosen = partial(best_of, score.reshape(world.right.shape), world.right)
            key = f"{name}_{aggregate}"
            auc = found[f"{key}_auc"] = area_under_curve(score, world.right.ravel())
            rows += _record(found, key, chosen, labelled=str(labelled), auc=f"{auc:.3f}")
    return Measured({f"chains_{name}_{seed}": value for name, value in found.items()}, rows)


def _record(found: dict[str, float], name: str, chosen: Any, **columns: str) -> list[dict[str, str]]:
    for n in (4, NUM_ATTEMPTS):
        found[f"{name}_bo{n}"] = chosen(n)
    shown = {f"best of {n}": f"{found[f'{name}_bo{n}']:.3f}" for n in (4, NUM_ATTEMPTS)}
    return [{"verifier": name, **columns, **shown}]


# --- chains ----------------------------------------------------------------------------------------------------


def problems(num: int, rng: np.random.Generator) -> Ints:
    """Chains [N, LENGTH] without their results."""
    chain_NL = np.full((num, LENGTH), -1)
    chain_NL[:, 0], chain_NL[:, 1] = START, rng.integers(0, MODULUS, num)
    chain_NL[:, 2::2] = FIRST_OPERATION + rng.integers(0, len(OPERANDS), (num, NUM_STEPS))
    return chain_NL


def result_of(before_N: Ints, operation_N: Ints) -> Ints:
    """What an operation makes of the result before."""
    return (before_N + OPERANDS[operation_N - FIRST_OPERATION]) % MODULUS


def demonstrations(num: int, rng: np.random.Generator, error_rate: float = 0.2) -> Ints:
    """Chains with results, each of which is wrong with probability `error_rate`, by any other digit alike."""
    chain_NL = problems(num, rng)
    for place in RESULTS:
        off_N = np.where(rng.random(num) < error_rate, rng.integers(1, MODULUS, num), 0)
        chain_NL[:, place] = (result_of(chain_NL[:, place - 2], chain_NL[:, place - 1]) + off_N) % MODULUS
    return chain_NL


def right_steps(chain_NL: Ints) -> Bools:
    """Whether each step follows from the result before it [N, NUM_STEPS]; a token that is no digit makes both wrong."""
    before, said = chain_NL[:, RESULTS - 2], chain_NL[:, RESULTS]
    digits = (before < MODULUS) & (said < MODULUS)
    return digits & (said == result_of(before, chain_NL[:, RESULTS - 1]))


def solution(chain_NL: Ints) -> Ints:
    """The right last result [N]."""
    return (chain_NL[:, 1] + OPERANDS[chain_NL[:, 2::2] - FIRST_OPERATION].sum(1)) % MODULUS


def is_right(chain_NL: Ints) -> Bools:
    """Whether the last result is right [N]."""
    return np.asarray(chain_NL[:, -1] == solution(chain_NL))


def path_of(chain_L: Ints) -> TokenPath:
    """A chain's tokens, its results sampled."""
    unknown = np.full(LENGTH, np.nan, np.float32)
    return TokenPath(chain_L.astype(np.int32), SOURCE, np.zeros(LENGTH, np.int32), unknown)


def stepped(chain_NL: Ints, label_NK: NDArray[Any], first: int = 0) -> list[SteppedSample]:
    """Chains with labels of their steps from `first` on."""
    ends = RESULTS[first:].tolist()
    return [
        SteppedSample(
            (path_of(chain),), tuple(Step(0, end, float(label)) for end, label in zip(ends, own, strict=True))
        )
        for chain, own in zip(chain_NL, label_NK[:, first:], strict=True)
    ]


# --- a policy, and who verifies it -----------------------------------------------------------------------------


class World:
    """A policy, its attempts, and the verifiers that learn from them."""

    def __init__(self, seed: int, size: Size) -> None:
        self.seed, self.size = seed, size
        torch.manual_seed(seed)
        self.policy = LlamaForCausalLM(self._config())
        taught = demonstrations(size.demonstrations, self._rng(0))
        examples = [Demonstration((path_of(chain),)) for chain in taught]
        algorithm = make_algorithm("sft")
        train_steps(self.policy, algorithm, examples, num_steps=size.sft, learning_rate=4e-3, batch_size=256, seed=seed)
        asked = np.repeat(problems(size.problems, self._rng(1)), NUM_ATTEMPTS, axis=0)
        self.attempts = self.go_on(asked, 0, draw=1)
        shape = (size.problems, NUM_ATTEMPTS)
        self.right = is_right(self.attempts).reshape(shape)
        self.right_steps = right_steps(self.attempts).reshape(*shape, NUM_STEPS)

    def _rng(self, draw: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, draw])

    def _config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=NEVER + 1,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=None,
            eos_token_id=NEVER,
            pad_token_id=NEVER,
            initializer_range=48**-0.5,
            num_labels=1,
            classifier_dropout=0.0,
        )

    def go_on(self, chain_NL: Ints, first: int, draw: int) -> Ints:
        """The chains with the policy's results from step `first` on."""
        done_NL = chain_NL.copy()
        session = LocalSampler(self.policy, [NEVER]).session()
        seed = 1000 * self.seed + draw
        for place in RESULTS[first:]:
            contexts = [chain[:place] for chain in done_NL]
            sampled = session.generate(contexts, range(len(contexts)), SamplingSettings(max_new_tokens=1), seed)
            done_NL[:, place] = [int(one.token[0]) for one in sampled]
        return done_NL

    @cached_property
    def pool(self) -> Ints:
        """Attempts to learn from, each at a problem of its own."""
        num = max(labelled.num for labelled in self.size.verifiers.values())
        return self.go_on(problems(num, self._rng(2)), 0, draw=2)

    def values(self, chain_NL: Ints, num_completions: int) -> Floats:
        """The value of each step of these attempts by rollouts [N, NUM_STEPS]; that of the last is the outcome."""
        value_NK = np.empty((len(chain_NL), NUM_STEPS))
        value_NK[:, -1] = is_right(chain_NL)
        for step in range(NUM_STEPS - 1):
            copies = np.repeat(chain_NL, num_completions, axis=0)
            ended = self.go_on(copies, step + 1, draw=10 + step)
            value_NK[:, step] = is_right(ended).reshape(-1, num_completions).mean(1)
        return value_NK

    def majority(self, n: int) -> float:
        """The share of problems whose most frequent last result among n attempts is right; ties go to the smaller."""
        said = np.minimum(self.attempts[:, -1], MODULUS).reshape(-1, n)
        counts = np.stack([(said == digit).sum(1) for digit in range(MODULUS)], 1)
        return float((counts.argmax(1) == solution(self.attempts)[::n]).mean())

    def verifiers(self) -> Iterator[tuple[str, int, Floats]]:
        """Name, number of labelled attempts, and probabilities of the steps of all attempts.

        An outcome model first learns each attempt's outcome at every step, which is easier, then at the last alone.
        """
        for name, labelled in self.size.verifiers.items():
            chain_NL = self.pool[: labelled.num]
            if name.endswith("outcomes"):
                label_NK = np.repeat(is_right(chain_NL)[:, None], NUM_STEPS, axis=1)
                firsts = (0, NUM_STEPS - 1)
            else:
                of_rollouts = name.endswith("rollouts")
                label_NK = self.values(chain_NL, labelled.num_completions) if of_rollouts else right_steps(chain_NL)
                firsts = (0,)
            courses = [stepped(chain_NL, label_NK, first) for first in firsts]
            yield name, labelled.num, self.verifier(*zip(courses, labelled.num_steps, strict=True))

    def verifier(self, *courses: tuple[list[SteppedSample], int]) -> Floats:
        """Train one from the policy, course after course; its probabilities for the attempts [P, n, NUM_STEPS]."""
        torch.manual_seed(self.seed)
        model = LlamaForTokenClassification(self._config())
        model.model.load_state_dict(self.policy.model.state_dict())
        for number, (examples, num_steps) in enumerate(courses):
            learning_rate = 3e-3 / (1 + number)
            algorithm, seed = make_algorithm("process_reward"), 10 * self.seed + number
            options = {"learning_rate": learning_rate, "batch_size": 256, "seed": seed}
            train_steps(model, algorithm, examples, num_steps=num_steps, **options)
        paths = [path_of(chain) for chain in self.attempts]
        scores = RewardModel(model, None, "token").scores(paths, [RESULTS.tolist()] * len(paths))
        score_NK = np.stack(scores)[..., 0]
        return np.asarray(1 / (1 + np.exp(-score_NK))).reshape(self.right_steps.shape)


def best_of(score_PN: Floats, right_PN: Bools, n: int) -> float:
    """The share of problems solved by the best-scored of n attempts, over disjoint groups of n."""
    score, right = score_PN.reshape(-1, n), right_PN.reshape(-1, n)
    return float(right[np.arange(len(score)), score.argmax(1)].mean())


def area_under_curve(score_N: Floats, right_N: Bools) -> float:
    """The probability that a right attempt scores above a wrong one, a tie counting half."""
    num_right = int(right_N.sum())
    rank = float(rankdata(score_N)[right_N].sum())
    return (rank - num_right * (num_right + 1) / 2) / (num_right * (len(right_N) - num_right))
