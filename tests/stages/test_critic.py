"""PPO in the loop: what a critic's credit is, by hand and through the stage, and where critics lie."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import tiny_settings

from packed_examples import of_sources
from prefloop.batch.examples import RolloutGroup
from prefloop.config import parse_settings
from prefloop.loop import run_loop
from prefloop.losses.registry import objective
from prefloop.models.reward import load_reward_model
from prefloop.records import Ended, PrefloopError, Source
from prefloop.stages.context import Run, opened
from prefloop.stages.curating import curate_stage
from prefloop.stages.judging import judge_stage
from prefloop.stages.rewarding import credit_tokens
from prefloop.stages.rollouts import iteration_rollouts, rollout_stage
from prefloop.stages.settings import RunSettings
from prefloop.stages.start import start_policy
from prefloop.stages.update_data import rows_to_learn, update_data
from prefloop.stages.updating import train_stage
from prefloop.store import Store
from prefloop.store.metrics import read_metrics
from prefloop.training.checkpoint import verify
from prefloop.training.logprobs import Values, values_of
from prefloop.training.settings import CriticSettings

SAID, READ = Source.SAMPLED, Source.PROMPT


def settings_of(**changes):
    rules = {"lowest": -2.0, "noise_sd": 0.3}
    given = {"train__algorithm": "ppo", "train__beta": None, "rollout__num_tasks": 4, "judge__rules": rules}
    return parse_settings(
        RunSettings, tiny_settings(**{"iterations": 2, "guard__max_kl": 50.0, **given, **changes}), "t"
    )


# --- by hand ----------------------------------------------------------------------------------------------------


def of_paths(numbers, paths):
    """Numbers of own tokens, path by path, as arrays aligned with the paths."""
    arrays = []
    for own, path in zip(numbers, paths, strict=True):
        array = np.full(len(path.token), 99.0)  # what stands at other tokens is not read
        array[path.loss_mask] = own
        arrays.append(array)
    return tuple(arrays)


def test_credit_bridges_paths_and_only_a_run_that_was_cut_off_is_worth_what_was_to_come():
    finished = of_sources([1, 2, 3, 4], [READ, READ, SAID, SAID]), of_sources([1, 2, 5, 6], [READ, READ, READ, SAID])
    cut = of_sources([1, 2, 7, 8, 9], [READ, READ, SAID, READ, SAID])
    paths = [*finished, cut]
    group = RolloutGroup(
        (finished, (cut,)),
        (),
        old_logprob=of_paths([[-1.0, -2.0], [-1.0], [-1.0, -1.0]], paths),
        ref_logprob=of_paths([[-2.0, -2.0], [-1.5], [-1.0, -3.0]], paths),
    )
    after = of_paths([[9.0, 9.0], [7.0], [9.0, 2.0]], paths)
    values = Values(of_paths([[0.5, 0.25], [1.0], [1.0, 0.5]], paths), after)
    knobs = {**objective("ppo").knobs, "kl_coef": 0.5, "gae_lambda": 0.5, "discount": 0.5, "whiten_advantages": False}
    found = credit_tokens([group], np.array([1.0, -0.5]), [False, True], [values], knobs)
    # Rewards -.5, 0 | 1 - .25 and 0, -.5 - 1;
    # δ = -.5 + .5·.25 - .5, .5·1 - .25 | .75 - 1 and .5·.5 - 1, -1.5 + .5·2 - .5
    expected = [[-0.875 + 0.25 * 0.1875, 0.25 - 0.25 * 0.25], [-0.25], [-0.75 - 0.25, -1.0]]
    own = [array[path.loss_mask].tolist() for array, path in zip(found.groups[0].advantage, paths, strict=True)]
    assert own == expected
    returns = [array[path.loss_mask].tolist() for array, path in zip(found.groups[0].ret, paths, strict=True)]
    assert returns == [[-0.828125 + 0.5, 0.1875 + 0.25], [0.75], [0.0, -0.5]]
    assert not any(array[~path.loss_mask].any() for array, path in zip(found.groups[0].advantage, paths, strict=True))
    assert found.groups[0].old_value is values.before
    flat, gain = np.concatenate(returns), np.concatenate(expected)
    assert found.detail["num_cut_off"] == 1 and found.detail["kl_of_rollouts"] == pytest.approx((1.5 + 2.0) / 2)
    assert found.detail["explained_variance"] == pytest.approx(1 - (gain**2).mean() / flat.var())
    white = credit_tokens([group], np.array([1.0, -0.5]), [False, True], [values], {**knobs, "whiten_advantages": True})
    own = np.concatenate([a[p.loss_mask] for a, p in zip(white.groups[0].advantage, paths, strict=True)])
    np.testing.assert_allclose(own, (gain - gain.mean()) / gain.std(ddof=1), atol=1e-6)


def test_tokens_of_several_conversations_are_steps_in_the_order_in_which_they_were_said():
    """The first path has the first and the third turn, the second path the second and the last."""
    main, helper = (
        of_sources([1, 2, 3, 4], [READ, SAID, READ, SAID]),
        of_sources([1, 5, 6, 7], [READ, SAID, SAID, SAID]),
    )
    paths, order = [main, helper], (np.array([0, 2, 3, 1, 4]),)
    group = RolloutGroup(
        ((main, helper),),
        (),
        old_logprob=of_paths([[-1.0, -1.0], [-1.0, -1.0, -1.0]], paths),
        ref_logprob=of_paths([[-1.0, -1.0], [-4.0, -1.0, -1.0]], paths),  # the second turn alone pays for KL
        order=order,
    )
    values = Values(of_paths([[0.0, 0.5], [0.0, 0.0, 0.25]], paths), of_paths([[9.0, 9.0], [9.0, 9.0, 2.0]], paths))
    knobs = {**objective("ppo").knobs, "kl_coef": 1.0, "gae_lambda": 0.5, "whiten_advantages": False}

    def own(arrays):
        return [array[path.loss_mask].tolist() for array, path in zip(arrays, paths, strict=True)]

    (found,) = credit_tokens([group], np.array([1.0]), [True], [values], {**knobs, "gae_lambda": 1.0}).groups
    assert own(found.ret) == [[0.0, 3.0], [0.0, 3.0, 3.0]]
    assert own(found.advantage) == [[0.0, 2.5], [0.0, 3.0, 2.75]]
    (faded,) = credit_tokens([group], np.array([1.0]), [True], [values], knobs).groups
    # In time δ = 0, -3, ½, ¼ - ½, 3 - ¼; the last but one is the first path's second.
    last = 2.75
    fourth = -0.25 + last / 2
    third = 0.5 + fourth / 2
    second = -3.0 + third / 2
    assert own(faded.advantage) == [[second / 2, fourth], [second, third, last]]
    path_after_path, *_ = credit_tokens([replace(group, order=())], np.array([1.0]), [True], [values], knobs).groups
    assert own(path_after_path.advantage) != own(faded.advantage)


# --- through the stage ------------------------------------------------------------------------------------------


@pytest.fixture
def curated(tmp_path, monkeypatch):
    """A run whose first iteration is curated."""
    monkeypatch.chdir(tmp_path)
    # Some replies are longer, and steps so large that no update is accepted.
    changes = {"guard__max_kl": 1e-9, "train__learning_rate": 0.05, "rollout__sampling": {"max_new_tokens": 8}}
    with Store("runs/prefloop.db") as store, opened(Run(settings_of(**changes), store)) as run:
        start_policy(run)
        rollout_stage(run, 0)
        judge_stage(run, 0)
        curate_stage(run, 0)
        yield run


def credited(run):
    settings, before = run.settings.train, run.checkpoint_before(0)
    dataset = run.store.dataset(run.found(0, "curate")["valued_dataset_id"])
    rows = rows_to_learn(run, dataset, settings)
    data = update_data(run, run.policies.take(before), 0, before, rows, settings)
    return data, {one.trajectory_id: one.value for one in dataset.valued}


def test_returns_are_rewards_and_values_those_of_the_critic_that_was_warmed_up(curated):
    data, reward = credited(curated)
    rollouts = iteration_rollouts(curated, 0)
    by_task = {group.name: [one for one in rollouts if one.task_id == group.name] for group in data.examples}
    cut = {Ended.LENGTH, Ended.MAX_TURNS, Ended.DEADLINE}
    (warm,) = Path("runs/mini/checkpoints").glob("000-critic-*")
    critic = load_reward_model(str(warm), kind="token")
    values = values_of(critic.model, data.examples)
    gains, ends = [], set()
    for group, value in zip(data.examples, values, strict=True):
        assert all(np.array_equal(one, other) for one, other in zip(group.old_value, value.before, strict=True))
        paths = [path for sample in group.samples for path in sample]
        sizes = [sum(int(path.loss_mask.sum()) for path in sample) for sample in group.samples]
        assert [order_U.tolist() for order_U in group.order] == [list(range(size)) for size in sizes]
        owner = [i for i, sample in enumerate(group.samples) for _ in sample]
        for i, path, ret, before, after in zip(owner, paths, group.ret, value.before, value.after, strict=True):
            rollout = by_task[group.name][i]
            bootstrap = after[path.loss_mask][-1] if rollout.ended in cut else 0.0
            ends.add(rollout.ended in cut)
            own = path.loss_mask  # λ and γ are 1, and the policy is its own reference yet: every token has the same
            np.testing.assert_allclose(ret[own], reward[rollout.id] + bootstrap, atol=1e-4)
            gains.append(ret[own] - before[own])
    assert ends == {False, True}
    gain = np.concatenate(gains)
    own = [
        a[p.loss_mask]
        for g in data.examples
        for a, p in zip(g.advantage, (p for s in g.samples for p in s), strict=True)
    ]
    np.testing.assert_allclose(np.concatenate(own), (gain - gain.mean()) / gain.std(ddof=1), atol=1e-4)
    assert data.detail["num_cut_off"] == sum(one.ended in cut for one in rollouts)
    assert data.detail["critic"]["metrics"]["explained_variance"] <= 1


def test_a_refused_update_leaves_one_critic_and_every_try_has_the_same_credit(curated):
    train_stage(curated, 0)
    event = curated.found(0, "train")
    assert event["rolled_back"] and len(event["attempts"]) == 3
    warm, after = sorted(Path("runs/mini/checkpoints").glob("*-critic-*"))
    assert warm.name[:3] == "000" and str(after) == event["credit"]["critic"]["path"]
    assert verify(after) == event["credit"]["critic"]["manifest_hash"]
    again, _ = credited(curated)  # as another process would, after a kill
    assert again.detail == event["credit"]
    (after / "config.json").write_text("{}")
    run = curated
    rollout_stage(run, 1)
    judge_stage(run, 1)
    curate_stage(run, 1)
    with pytest.raises(PrefloopError, match=r"critic.*config\.json is damaged"):
        train_stage(run, 1)


def test_a_critic_may_begin_with_another_model_of_the_same_tokens(curated, model):
    def begin_with(path):
        train = curated.settings.train.model_copy(update={"critic": CriticSettings(model=str(path))})
        curated.settings = curated.settings.model_copy(update={"train": train})

    begin_with(model)
    with pytest.raises(PrefloopError, match="has other tokens than the policy: it cannot read its replies"):
        credited(curated)
    (untrained,) = Path("runs/mini/checkpoints").glob("000-initial-*")
    begin_with(untrained)
    data, _ = credited(curated)
    assert data.detail["critic"]["steps"] == 2 and np.isfinite(data.detail["explained_variance"])


@pytest.mark.parametrize("lora", [None, pytest.param({"rank": 2, "alpha": 4}, marks=pytest.mark.slow)])
def test_two_iterations_of_the_loop(lora, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = {"train__num_epochs": 2, "train__critic": {"num_epochs": 3, "learning_rate": 1e-2, "warmup_epochs": 0}}
    with Store("runs/prefloop.db") as store:
        run = Run(settings_of(policy__lora=lora, rollout__samples_per_task=1, **changes), store)
        run_loop(run)
        first, second = (run.found(number, "train")["credit"] for number in range(2))
        steps = read_metrics(store, run.id, iteration=1, stage="critic")
    places = [Path(found["critic"]["path"]) for found in (first, second)]
    fresh = next(Path("runs/mini/checkpoints").glob("000-critic-*"))
    assert first["critic"]["steps"] == len(steps) == 3  # four tasks in one step, three times
    assert {"loss", "value_loss", "explained_variance", "value_clip_ratio"} <= steps[-1].metrics.keys()
    # The first iteration began with a critic that expects nothing: what is left of the returns is all of them.
    assert first["explained_variance"] <= 0 < first["return_variance"]
    heads = [load_reward_model(str(place), kind="token", frozen=False) for place in (fresh, *places)]
    weights = [{n: p.detach().clone() for n, p in head.model.named_parameters() if p.requires_grad} for head in heads]
    assert bool(lora) == any("lora_" in name for name in weights[0]) and any("score" in name for name in weights[0])
    assert [base.parent for base in fresh.parent.glob("*/base")] == ([fresh] if lora else [])  # below the adapters
    changed = [sum(bool((one[name] != other[name]).any()) for name in one) for one, other in pairwise(weights)]
    assert min(changed) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__algorithm": "grpo", "train__critic": {}}, "'critic' should be left out: grpo has no critic, ppo has"),
        ({"train__baseline": "running"}, "baseline: objective 'ppo' has no such knob"),
        ({"train__gae_lambda": 1.5}, "gae_lambda should be less than or equal to 1"),
        ({"train__critic": {"warmup": 3}}, "warmup.*did you mean.*warmup_epochs"),
    ],
)
def test_what_cannot_be_is_said_before_the_run(changes, message):
    with pytest.raises(PrefloopError, match=message):
        settings_of(**changes)
