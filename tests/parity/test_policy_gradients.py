"""Advantages, losses and gradients of GRPO and RLOO against TRL's own trainers, on the same weights and rollouts.

TRL scores and collates the rollouts itself (`_generate_and_score_completions`), then the policy moves, and then TRL
computes its loss (`compute_loss`) on it; only the sampling of tokens is replaced. The models are in float64, but TRL's
head rounds log-probs to float32 and its rewards are float32.
"""

import copy
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_trl import EOS, tokenizer

from packed_examples import VOCAB, gradient, keep_float64, perturbed, relative_error, tiny_model
from prefloop.batch.examples import RolloutGroup
from prefloop.credit.groups import divisor, group_mean, leave_one_out
from prefloop.credit.shaping import penalised, shaped, weighted_sum
from prefloop.losses.kl import corrected_k3, k3
from prefloop.losses.mismatch import sampling_mismatch, sequence_masked, token_masked, token_truncated
from prefloop.losses.policy_gradient import clipped, is_clipped, sequence_clipped
from prefloop.losses.ratios import mean_of_samples, sample_ratio, sum_of_samples, token_ratio
from prefloop.losses.registry import objective
from prefloop.records import Source, TokenPath
from prefloop.stages.rewarding import credit_groups
from prefloop.training.logprobs import logprobs_of, with_reference
from prefloop.training.policy_gradient import PolicyGradient
from prefloop.training.step import StepSettings, TrainingStep

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
trl = pytest.importorskip("trl", reason="the oracle is not installed (pip install 'prefloop[oracle]')")
datasets = pytest.importorskip("datasets")

NUM_PROMPTS, GROUP, LONGEST, TEMPERATURE = 2, 4, 13, 0.8
NUM = NUM_PROMPTS * GROUP
GROUP_S = np.arange(NUM) // GROUP
REWARDS = {"first": [1.0, 0.25, None, -0.5, 0.75, 0.5, 2.0, 0.0], "second": [0.5, 1.0, None, 0.0, 0.25, 1.5, 0.0, 1.0]}
FLAT = {"first": [0.5, 0.5, 0.5, 0.5, *REWARDS["first"][4:]], "second": [0.25] * NUM}
WEIGHTS = {"first": 1.0, "second": 0.5}
CLIP = {"clip_low": 0.2, "clip_high": 0.28}
FLOAT32 = {"rel": 2e-5, "abs": 2e-6}


def rollouts(with_tools):
    """Prompts, completions and which tokens of these are the policy's own; tools answer in the middle."""
    rng = np.random.default_rng(8)
    prompts = [rng.integers(4, VOCAB, 3 + 2 * i).tolist() for i in range(NUM_PROMPTS)]
    completions, own = [], []
    for i in range(NUM):
        turns = [rng.integers(4, VOCAB, rng.integers(1, 5)).tolist() for _ in range(3)]
        turns = turns if with_tools and i % 3 else turns[:1]
        completions.append([*(token for turn in turns for token in turn), EOS])
        own.append([*(int(k != 1) for k, turn in enumerate(turns) for _ in turn), 1])
    return [prompts[i // GROUP] for i in range(NUM)], completions, own


def logprobs(model, prompts, completions, own):
    """log p at the sampling temperature of the policy's own tokens, all samples in a row, from plain padded rows."""
    longest = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    ids, mask = torch.zeros(2, NUM, longest, dtype=torch.long)
    for i, (p, c) in enumerate(zip(prompts, completions, strict=True)):
        ids[i, : len(p) + len(c)], mask[i, : len(p) + len(c)] = torch.tensor(p + c), 1
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    rows = torch.log_softmax(logits / TEMPERATURE, -1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    return torch.cat(
        [
            rows[i, len(p) - 1 : len(p) + len(c) - 1][torch.tensor(marks, dtype=torch.bool)]
            for i, (p, c, marks) in enumerate(zip(prompts, completions, own, strict=True))
        ]
    )


class Oracle:
    """A trainer of TRL whose rollouts and rewards are given, and the policy before and after a step."""

    def __init__(self, trainer_class, config_class, folder, patch, **settings):
        self.start = tiny_model("qwen3", torch.float64).eval()
        keep_float64(patch, self.start)
        self.model, self.reference, self.rewards = copy.deepcopy(self.start), perturbed(self.start, 0.05), REWARDS
        arguments = config_class(
            output_dir=str(folder),
            per_device_train_batch_size=NUM,
            num_generations=GROUP,
            max_completion_length=LONGEST,
            temperature=TEMPERATURE,
            reward_weights=list(WEIGHTS.values()),
            beta=0.0,  # or TRL wants to load the reference from a folder
            num_iterations=2,  # or TRL takes the policy's own log-probs for the old ones
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        prompts = [" ".join(f"w{token}" for token in prompt) for prompt in rollouts(False)[0]]
        self.trainer = trainer_class(
            self.model,
            reward_funcs=[self._reward(name) for name in WEIGHTS],
            args=arguments,
            train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer(),
            **settings,
        )
        trl.trainer.utils.add_fused_lm_head(self.reference, temperature=TEMPERATURE)
        self.trainer.ref_model = self.reference
        self.trainer.current_gradient_accumulation_steps = 1
        self.inputs = [{"prompt": prompt} for prompt in prompts]

    def _reward(self, name):
        def reward(completions, **_):
            return self.rewards[name]

        reward.__name__ = name
        return reward

    def scored(self):
        """TRL's batch, with the policy where it was when it sampled."""
        self.model.load_state_dict(self.start.state_dict())
        self.model.train()
        return self.trainer._generate_and_score_completions(self.inputs)

    def loss(self, batch):
        """TRL's loss, gradient and metrics after the policy has moved."""
        self.model.load_state_dict(perturbed(self.start, 0.015).state_dict())
        self.model.zero_grad()
        self.trainer._metrics["train"].clear()
        loss = self.trainer.compute_loss(self.model, batch)
        loss.backward()
        return loss.item(), gradient(self.model), {k: v[0] for k, v in self.trainer._metrics["train"].items()}

    def ours(self, with_tools=False):
        """The same log-probs of own tokens, from the models themselves."""
        rolled = rollouts(with_tools)
        sample_U = torch.repeat_interleave(torch.arange(NUM), torch.tensor([sum(marks) for marks in rolled[2]]))
        self.model.zero_grad()
        logprob_U = logprobs(self.model, *rolled)
        with torch.no_grad():
            old_U, ref_U = (logprobs(model, *rolled) for model in (self.start, self.reference))
        return SimpleNamespace(sample_U=sample_U, logprob_U=logprob_U, old_U=old_U, ref_U=ref_U)


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def grpo(tmp_path_factory, patch):
    def roll_out(prompts, trainer):
        ids, completions, own = rollouts(with_tools=True)
        return {
            "prompt_ids": ids,
            "completion_ids": completions,
            "logprobs": sampled_logprobs(trainer.model),
            "env_mask": own,
        }

    return Oracle(trl.GRPOTrainer, trl.GRPOConfig, tmp_path_factory.mktemp("grpo"), patch, rollout_func=roll_out)


@pytest.fixture(scope="module")
def rloo(tmp_path_factory, patch):
    found = Oracle(trl.RLOOTrainer, trl.RLOOConfig, tmp_path_factory.mktemp("rloo"), patch)
    ids, completions, _ = rollouts(with_tools=False)
    patch.setattr(found.trainer, "_generate", lambda prompts: (ids, completions, prompts))
    return found


def sampled_logprobs(model):
    """What an engine that is not quite the trainer says of the tokens of completions, tools' included, by row."""
    prompts, completions, own = rollouts(with_tools=True)
    with torch.no_grad():
        exact_N = logprobs(model, prompts, completions, [[1] * len(marks) for marks in own])
    noise_N = 0.3 * torch.randn(exact_N.shape, generator=torch.Generator().manual_seed(3))
    return [row.tolist() for row in (exact_N + noise_N).split([len(marks) for marks in own])]


def our_values(rewards):
    with_nan = {name: np.array(values, dtype=np.float64) for name, values in rewards.items()}
    return weighted_sum(with_nan, WEIGHTS)


@pytest.mark.parametrize("rewards", [REWARDS, FLAT], ids=["one unscored", "one group flat"])
@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_advantages_of_grpo(grpo, monkeypatch, scale, rewards):
    monkeypatch.setattr(grpo, "rewards", rewards)
    monkeypatch.setattr(grpo.trainer, "scale_rewards", scale)
    theirs = grpo.scored()["advantages"]
    value_S = our_values(rewards)
    ours = group_mean(value_S / divisor(value_S, GROUP_S, scale), GROUP_S)
    assert ours.advantage_S == pytest.approx(theirs.double().numpy(), **FLOAT32)
    assert np.abs(ours.advantage_S).max() > 0.3


def reduced(loss_U, sample_U, loss_type):
    """A step's loss from those of its tokens, under the name that TRL gives it."""
    num_S = torch.bincount(sample_U, minlength=NUM)
    if loss_type == "grpo":
        return mean_of_samples(loss_U, sample_U, NUM).mean()
    total = sum_of_samples(loss_U, sample_U, NUM).sum()
    return total / {"dr_grpo": NUM * LONGEST, "bnpo": num_S.sum(), "dapo": num_S.sum()}[loss_type]


def our_loss_U(ours, advantage_U, level, kl, beta):
    """The policy's loss and the KL of each token; that of whole samples goes to each of their tokens, as in TRL."""
    arguments = ours.logprob_U, ours.old_U, advantage_U
    samples = ours.sample_U, NUM
    if level == "token":
        loss_U = clipped(*arguments, **CLIP)
        corrected_U = corrected_k3(ours.logprob_U, ours.old_U, ours.ref_U)
    else:
        loss_U = sequence_clipped(*arguments, *samples, exponent="mean", **CLIP)[ours.sample_U]
        ratio_S = sample_ratio(ours.logprob_U, ours.old_U, *samples, exponent="mean")
        corrected_U = ratio_S[ours.sample_U] * k3(ours.logprob_U, ours.ref_U)
    return loss_U, beta * (corrected_U if kl == "corrected k3" else k3(ours.logprob_U, ours.ref_U))


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kl", ["none", "k3", "corrected k3"])
def test_loss_and_gradient_of_grpo(grpo, monkeypatch, loss_type, level, kl):
    beta = 0.0 if kl == "none" else 0.2
    settings = {"loss_type": loss_type, "importance_sampling_level": level, "beta": beta, "scale_rewards": "none"}
    for name, value in (settings | {"epsilon_low": CLIP["clip_low"], "epsilon_high": CLIP["clip_high"]}).items():
        monkeypatch.setattr(grpo.trainer, name, value)
    monkeypatch.setattr(grpo.trainer.args, "use_bias_correction_kl", kl == "corrected k3")
    loss, theirs, metrics = grpo.loss(grpo.scored())

    ours = grpo.ours(with_tools=True)
    advantage_U = torch.from_numpy(group_mean(our_values(REWARDS), GROUP_S).advantage_S)[ours.sample_U]
    loss_U, pull_U = our_loss_U(ours, advantage_U, level, kl, beta)
    found = reduced(loss_U + pull_U, ours.sample_U, loss_type)
    found.backward()
    assert found.item() == pytest.approx(loss, **FLOAT32)
    assert float(theirs.norm()) > 1e-3
    assert relative_error(gradient(grpo.model), theirs) < 2e-5
    if level == "token":
        share = is_clipped(token_ratio(ours.logprob_U, ours.old_U), advantage_U, **CLIP).double().mean().item()
        assert share == pytest.approx(metrics["clip_ratio/region_mean"])
        assert 0.05 < share < 0.95
    if beta:
        assert (pull_U / beta).mean().item() == pytest.approx(metrics["kl"], **FLOAT32)


WEIGHS = {
    "token_truncate": lambda old, sampled, sample_U: token_truncated(old, sampled, high=1.5),
    "token_mask": lambda old, sampled, sample_U: token_masked(old, sampled, low=0.5, high=1.5),
    "sequence_mask": lambda old, sampled, sample_U: sequence_masked(old, sampled, sample_U, NUM, low=0.0, high=1.5),
}


@pytest.mark.parametrize("mode", WEIGHS)
def test_weights_of_a_sampler_s_mismatch(grpo, monkeypatch, mode):
    """TRL has them for vLLM, whose log-probs come with the rollouts here; KL is not weighed."""
    low = 0.5 if mode == "token_mask" else None
    settings = {
        "use_vllm": True,
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_max": 1.5,
        "vllm_importance_sampling_clip_min": low,
        "_last_loaded_step": grpo.trainer.state.global_step,  # there is no engine to send weights to
        "loss_type": "dapo",
        "beta": 0.1,
        "scale_rewards": "none",
        "epsilon_low": CLIP["clip_low"],
        "epsilon_high": CLIP["clip_high"],
    }
    for name, value in settings.items():
        monkeypatch.setattr(grpo.trainer, name, value, raising=False)
    grpo.trainer._metrics["train"].clear()
    batch = grpo.scored()
    gaps = {k.split("/")[-1]: v[0] for k, v in grpo.trainer._metrics["train"].items() if "logp_difference" in k}
    loss, theirs, _ = grpo.loss(batch)

    rows, own = sampled_logprobs(grpo.start), rollouts(with_tools=True)[2]
    of_all = torch.tensor([logprob for row in rows for logprob in row], dtype=torch.float64)
    sampled_U = of_all[torch.tensor([mark for marks in own for mark in marks], dtype=torch.bool)]
    ours = grpo.ours(with_tools=True)
    advantage_U = torch.from_numpy(group_mean(our_values(REWARDS), GROUP_S).advantage_S)[ours.sample_U]
    loss_U, pull_U = our_loss_U(ours, advantage_U, "token", "corrected k3", 0.1)
    weight_U = WEIGHS[mode](ours.old_U, sampled_U, ours.sample_U)
    assert (weight_U != token_ratio(ours.old_U, sampled_U)).any()
    assert (weight_U > 0).any()
    found = reduced(weight_U * loss_U + pull_U, ours.sample_U, "dapo")
    found.backward()
    assert found.item() == pytest.approx(loss, **FLOAT32)
    assert float(theirs.norm()) > 1e-3
    assert relative_error(gradient(grpo.model), theirs) < 2e-5
    mismatch = sampling_mismatch(ours.old_U, sampled_U).to_dict()
    assert (mismatch["mean"], mismatch["largest"]) == pytest.approx((gaps["mean"], gaps["max"]), **FLOAT32)


@pytest.mark.parametrize("clip", [None, (-0.2, 1.0)], ids=["", "clipped rewards"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_rloo(rloo, monkeypatch, beta, clip):
    """KL as k1 in the value, advantages over the others, the clipped ratio of whole samples."""
    wide = {"clip_low": 0.6, "clip_high": 1.5}  # ratios of whole samples are far from 1
    settings = {"beta": beta, "reward_clip_range": clip, "epsilon_low": 0.6, "epsilon_high": 1.5}
    for name, value in settings.items():
        monkeypatch.setattr(rloo.trainer, name, value)
    batch = rloo.scored()
    loss, theirs, metrics = rloo.loss(batch)

    ours = rloo.ours()
    rows = torch.bincount(ours.sample_U).tolist()
    parts = zip(shaped(our_values(REWARDS), clip=clip), ours.old_U.split(rows), ours.ref_U.split(rows), strict=True)
    value_S = [penalised(value, old, ref, kl_coef=beta).sum() for value, old, ref in parts]
    credit = leave_one_out(value_S, GROUP_S)
    assert credit.advantage_S == pytest.approx(batch["advantages"].double().numpy(), **FLOAT32)
    assert credit.num_without_value == 1
    advantage_U = torch.from_numpy(credit.advantage_S)[ours.sample_U]
    arguments = ours.logprob_U, ours.old_U, advantage_U, ours.sample_U, NUM
    found = sequence_clipped(*arguments, exponent="sum", **wide).mean()
    found.backward()
    assert found.item() == pytest.approx(loss, **FLOAT32)
    assert relative_error(gradient(rloo.model), theirs) < 2e-5
    ratio_S = sample_ratio(ours.logprob_U, ours.old_U, ours.sample_U, NUM, exponent="sum")
    share = is_clipped(ratio_S, torch.from_numpy(credit.advantage_S), **wide).double().mean().item()
    assert share == pytest.approx(metrics["clip_ratio/region_mean"])
    assert 0 < share < 1


# --- the same through prefloop's own step -----------------------------------------------------------------------

SCORED = {name: [0.1 if value is None else value for value in values] for name, values in REWARDS.items()}


def our_groups(oracle, knobs):
    """TRL's rollouts as groups with their credit, and the log-probs of the policies beside the trained one."""
    prompts, completions, own = rollouts(with_tools=True)
    rows = zip(prompts, completions, own, sampled_logprobs(oracle.start), strict=True)
    attempts = [(own_path(*row),) for row in rows]
    groups = [RolloutGroup(tuple(attempts[i : i + GROUP]), ()) for i in range(0, NUM, GROUP)]
    groups = credit_groups(groups, our_values(SCORED), knobs).groups
    olds = logprobs_of(oracle.start, groups, temperature=TEMPERATURE)
    groups = [replace(group, old_logprob=old) for group, old in zip(groups, olds, strict=True)]
    return with_reference(oracle.reference, groups, temperature=TEMPERATURE)


def own_path(prompt, completion, marks, logprob):
    token = np.array(prompt + completion, dtype=np.int32)
    source = np.array([Source.PROMPT] * len(prompt) + [Source.SAMPLED if mark else Source.TOOL for mark in marks])
    sampled = np.full(len(token), np.nan, dtype=np.float32)
    sampled[source == Source.SAMPLED] = np.array(logprob)[np.array(marks, dtype=bool)]
    return TokenPath(token, source.astype(np.uint8), np.zeros_like(token), sampled)


STEPS = {
    "grpo": ({"denominator": "sequences"}, {"loss_type": "grpo"}),
    "dr_grpo": ({"denominator": "constant"}, {"loss_type": "dr_grpo"}),
    "dapo": ({"denominator": "tokens"}, {"loss_type": "dapo"}),
    "bnpo": ({"denominator": "tokens"}, {"loss_type": "bnpo"}),
    "scaled by group": ({"denominator": "tokens", "scale": "group"}, {"loss_type": "dapo", "scale_rewards": "group"}),
    "scaled by batch": ({"denominator": "tokens", "scale": "batch"}, {"loss_type": "dapo", "scale_rewards": "batch"}),
    "k3": (
        {"denominator": "sequences", "kl_as": "k3", "kl_coef": 0.2},
        {"loss_type": "grpo", "beta": 0.2, "bias_correction": True},
    ),
    "gspo": (
        {"denominator": "samples", "ratio": "sequence_mean"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    ),
}
"""Our knobs, and the settings of TRL's trainer that mean the same."""


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_grpo(grpo, monkeypatch, name):
    ours, settings = STEPS[name]
    theirs = {"importance_sampling_level": "token", "beta": 0.0, "scale_rewards": "none", **settings}
    monkeypatch.setattr(grpo.trainer.args, "use_bias_correction_kl", theirs.pop("bias_correction", False))
    for key, value in (theirs | {"epsilon_low": CLIP["clip_low"], "epsilon_high": CLIP["clip_high"]}).items():
        monkeypatch.setattr(grpo.trainer, key, value)
    monkeypatch.setattr(grpo, "rewards", SCORED)
    loss, expected, _ = grpo.loss(grpo.scored())

    knobs = {**objective("grpo").knobs, "kl_coef": 0.0, "mismatch": "none", **CLIP, **ours}
    groups = our_groups(grpo, knobs)
    grpo.model.zero_grad()
    algorithm = PolicyGradient("grpo", knobs, TEMPERATURE, LONGEST)
    optimizer = torch.optim.SGD(grpo.model.parameters())
    metrics = TrainingStep(grpo.model, None, algorithm, optimizer, StepSettings()).gradient(groups)
    assert metrics["loss"] == pytest.approx(loss, **FLOAT32)
    assert float(expected.norm()) > 1e-3
    assert relative_error(gradient(grpo.model), expected) < 2e-5
