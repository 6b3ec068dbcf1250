"""Proxies of the single-turn task's true reward: reward models of few preferences, trained as `prefloop train reward`.

A proxy's scores are in standard deviations of those that it gives to the start policy's completions, so that a nat of
KL has the same price whatever the number of preferences.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from numpy.typing import NDArray

from _language import NUM_PROMPT, NUM_WORDS, Words, World, path_of
from prefloop.batch.examples import PreferencePair
from prefloop.models.load import Policy
from prefloop.models.reward import RewardModel, new_reward_model
from prefloop.training.algorithms import make_algorithm
from prefloop.training.ensemble import bootstrap_weights, train_reward_model
from prefloop.training.settings import TrainingSettings

Floats = NDArray[np.float64]
KNOWN_DRAW = 40  # of completions without preferences, which say where a proxy's scores lie
NUM_MEMBERS = 4
WIDTH, INIT = 32, 0.02


@dataclass(frozen=True)
class Fitting:
    """How a reward model is trained; of an ensemble each member."""

    learning_rate: float
    num_steps: int
    batch_size: int = 32


@dataclass(frozen=True)
class Proxy:
    """Frozen reward models as a reward: their mean, less `bound_z` standard deviations between them."""

    models: tuple[RewardModel, ...]
    centre: float = 0.0
    scale: float = 1.0
    bound_z: float = 0.0

    def members(self, prompts: Words, completions: Sequence[Words]) -> Floats:
        """The scores of the members, [S, H], each moved by what it gave to the pairs that it was trained on."""
        paths = [path_of(p, c) for p, c in zip(prompts, completions, strict=True)]
        score_SH = np.concatenate([model.sequence_scores(paths) for model in self.models], axis=1)
        centres = np.concatenate([model.centres for model in self.models])
        return (score_SH - (centres - centres.mean()) - self.centre) / self.scale

    def __call__(self, prompts: Words, completions: Sequence[Words]) -> Floats:
        """The reward of each completion, [S]; with a bound that of `judge.reward.aggregate = "lower_bound"`."""
        return self.bounded(self.members(prompts, completions))

    def bounded(self, score_SH: Floats) -> Floats:
        """The reward that follows from members' scores, [..., H] to [...]."""
        mean_S = score_SH.mean(-1)
        return mean_S - self.bound_z * score_SH.std(-1, ddof=1) if self.bound_z else mean_S

    def with_bound(self, z: float) -> Proxy:
        """The same models, trusted less where they disagree."""
        return replace(self, bound_z=z)


def train_proxy(world: World, pairs: Sequence[PreferencePair], fitting: Fitting, *, num_members: int = 1) -> Proxy:
    """A reward model, or several with other first weights that each learn from a bootstrap sample of their own."""
    weight_PH = bootstrap_weights(pairs, num_members, world.seed) if num_members > 1 else np.ones((len(pairs), 1))
    models = []
    for member, weight_P in enumerate(weight_PH.T):
        own = [replace(pair, weight=float(weight)) for pair, weight in zip(pairs, weight_P, strict=True)]
        models.append(_train_member(world, own, fitting, member))
    proxy = Proxy(tuple(models))
    known = proxy(*known_completions(world))
    return replace(proxy, centre=float(known.mean()), scale=float(known.std()))


def _train_member(world: World, pairs: Sequence[PreferencePair], fitting: Fitting, member: int) -> RewardModel:
    settings = TrainingSettings(
        learning_rate=fitting.learning_rate,
        num_steps=fitting.num_steps,
        batch_size=fitting.batch_size,
        schedule="cosine",
        checkpoint_every=fitting.num_steps + 1,
    )
    seed = 100 * world.seed + member
    with tempfile.TemporaryDirectory() as directory:
        start = Path(directory) / "start"
        Policy(_fresh_model(world, seed), _tokenizer()).save(start)
        model = new_reward_model(str(start), seed=seed)
        options = {"seed": seed, "identity": "proxy", "state_directory": Path(directory) / "states"}
        train_reward_model(model, make_algorithm("reward", center_coef=0.01), pairs, settings, **options)
    model.model.requires_grad_(False)
    return model


def known_completions(world: World, num: int = 1024) -> tuple[Words, list[Words]]:
    """Fresh prompts, each with a completion of the start policy."""
    prompts = world.language.sentences(num, KNOWN_DRAW, NUM_PROMPT)
    return prompts, world.sample(world.start, prompts, KNOWN_DRAW)


def quality(world: World, proxy: Proxy, held_out: Sequence[PreferencePair]) -> dict[str, float]:
    """How well a proxy knows the start policy's completions: held-out pairs in their order, correlation with truth."""
    chosen, rejected = (
        proxy(*zip(*((path.token[:NUM_PROMPT], path.token[NUM_PROMPT:]) for (path,) in side), strict=True))
        for side in ([pair.chosen for pair in held_out], [pair.rejected for pair in held_out])
    )
    prompts, completions = known_completions(world)
    correlation = np.corrcoef(proxy(prompts, completions), world.gold(prompts, completions))[0, 1]
    return {"accuracy": float((chosen > rejected).mean()), "correlation": float(correlation)}


def _fresh_model(world: World, seed: int) -> transformers.PreTrainedModel:
    """One layer whose attention is nearly even in the beginning: at the last word there is something of all words.

    The start policy's trunk, which expects the next word of the last ones, makes a worse judge of sentences: on one
    tuning language 1,600 preferences made its scores correlate with the true reward by 0.2, this one's by 0.8.
    """
    config = copy.deepcopy(world.start.config)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = WIDTH, 3 * WIDTH, 1
    config.head_dim, config.initializer_range = WIDTH // config.num_attention_heads, INIT
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config)


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a word, which models of transformers are saved with; the task has no text."""
    words = {f"w{i}": i for i in range(NUM_WORDS)} | {"<stop>": NUM_WORDS, "<pad>": NUM_WORDS + 1}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<stop>", pad_token="<pad>")
