"""The value of steps, of real rollouts by a tiny policy that was just trained."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import tiny_settings

from prefloop.chat import StepFinder, StepPlace, steps_of, stop_ids
from prefloop.config import parse_settings
from prefloop.curation.steps import merge_step_labels
from prefloop.environments.booking import BookingEpisode
from prefloop.models.sampler import LocalSampler
from prefloop.records import Ended, Judgement, PrefloopError, Rater, RaterKind, Role, Status, StepLabel
from prefloop.rollout import derived_seed
from prefloop.stages.context import Run, opened
from prefloop.stages.continuing import go_on, prefix_of
from prefloop.stages.rollouts import iteration_rollouts, rollout_stage
from prefloop.stages.settings import RunSettings
from prefloop.stages.start import start_policy
from prefloop.stages.valuing import freeze_steps, judge_steps, up_to, value_stage
from prefloop.store import Store, schema
from prefloop.store.store import logical_rows
from prefloop.training.weights import weights_hash

ARITHMETIC = {
    "environment": {"name": "arithmetic", "num_steps": 2, "modulus": 2, "largest": 1},
    "sft__num_demonstrations": 100,
    "sft__num_steps": 60,
    "rollout__num_tasks": 6,
    "rollout__samples_per_task": 2,
    "rollout__sampling": {"max_new_tokens": 20},
    "value": {
        "step": "separator",
        "num_completions": 4,
        "trajectories_per_unit": 5,
        "sampling": {"max_new_tokens": 20},
    },
}
BOOKING = {
    "sft__num_demonstrations": 100,
    "sft__num_steps": 60,
    "rollout__num_tasks": 3,
    "rollout__samples_per_task": 2,
    "value": {"num_completions": 2, "sampling": {"max_new_tokens": 40}},
}


@contextmanager
def rolled_out(folder: Path, **changes):
    """A run whose first iteration is rolled out."""
    settings = tiny_settings(**changes, directory=str(folder))
    with (
        Store(str(folder / "store.db")) as store,
        opened(Run(parse_settings(RunSettings, settings, "test"), store)) as run,
    ):
        start_policy(run)
        rollout_stage(run, 0)
        yield run


@pytest.fixture(scope="module")
def arithmetic(tmp_path_factory):
    with rolled_out(tmp_path_factory.mktemp("arithmetic"), **ARITHMETIC) as run:
        yield run


@pytest.fixture(scope="module")
def booking(tmp_path_factory):
    with rolled_out(tmp_path_factory.mktemp("booking"), **BOOKING) as run:
        yield run


def with_value(run, **changes):
    """The same run with other settings of the values, and nothing valued."""
    value = run.settings.value.model_copy(update=changes)
    return replace(run, settings=run.settings.model_copy(update={"value": value}))


def continued(run, kind):
    """Each step of each rollout, with one way in which the policy goes on from it."""
    trajectories = iteration_rollouts(run, 0, with_paths=True)
    policy = run.policies.get(run.checkpoint_before(0))
    renderer = run.policies.renderer(policy)
    finder = StepFinder(renderer)
    tasks = run.store.tasks()
    prefixes = [prefix_of(t, t.token_paths, place, finder) for t in trajectories for place in steps_of(t, kind)]
    sampler = LocalSampler(policy.model, stop_ids(renderer))
    sampling = run.settings.value.sampling
    own = [tasks[prefix.trajectory.task_id] for prefix in prefixes]
    rollouts = go_on(run.environment, prefixes, own, sampler, renderer, sampling, 7)
    ends = [finder.end(p.trajectory, p.trajectory.token_paths, p.place) for p in prefixes]
    return list(zip(prefixes, rollouts, ends, strict=True))


@pytest.mark.parametrize(("name", "kind"), [("arithmetic", "separator"), ("booking", "turn"), ("booking", "tool_call")])
def test_attempts_begin_with_the_very_tokens_up_to_the_step(name, kind, request):
    found = continued(request.getfixturevalue(name), kind)
    assert len(found) >= 10
    for prefix, rollout, end in found:
        (before,), (after,) = prefix.trajectory.token_paths, rollout.trajectory.token_paths
        assert after.token[: end.token + 1].tolist() == before.token[: end.token + 1].tolist()
        assert rollout.trajectory.messages[: len(prefix.messages)] == prefix.messages
        if prefix.is_all:
            assert rollout.trajectory.messages == prefix.trajectory.messages
            assert rollout.trajectory.ended is prefix.trajectory.ended
    assert any(rollout.trajectory.messages != prefix.trajectory.messages for prefix, rollout, _ in found)


def test_a_turn_that_was_begun_is_bounded_as_a_whole(arithmetic):
    for _, rollout, _ in continued(arithmetic, "separator"):
        (path,) = rollout.trajectory.token_paths
        assert path.loss_mask.sum() <= arithmetic.settings.value.sampling.max_new_tokens


def test_each_step_has_the_share_of_attempts_that_end_well(arithmetic):
    value_stage(arithmetic, 0)
    detail = arithmetic.found(0, "value")
    rollouts = {t.id: t for t in iteration_rollouts(arithmetic, 0)}
    labels = arithmetic.store.step_labels(rater_id=detail["rater_id"])
    expected = {(t.id, place) for t in rollouts.values() for place in steps_of(t, "separator")}
    assert {(label.trajectory_id, StepPlace(label.message, span=label.span)) for label in labels} == expected
    assert len({label.label for label in labels}) > 2
    verdicts = arithmetic.verdicts(rollouts)
    for label in labels:
        trajectory = rollouts[label.trajectory_id]
        if trajectory.ended is Ended.DONE and label.span == steps_of(trajectory, "separator")[-1].span:
            assert label.label == verdicts[label.trajectory_id].criteria["success"]
        else:
            assert math.isclose(label.label * 4, round(label.label * 4))
    assert detail["num_steps"] == detail["num_kept"] == len(labels)
    assert detail["mean_value"] == pytest.approx(np.mean([label.label for label in labels]))


def test_the_labels_are_those_of_attempts_made_again(arithmetic):
    """Unit by unit, without the stage: the same seeds give the same attempts, and their shares are the labels."""
    value_stage(arithmetic, 0)
    detail = arithmetic.found(0, "value")
    labels = {
        (label.trajectory_id, label.span): label.label
        for label in arithmetic.store.step_labels(rater_id=detail["rater_id"])
    }
    trajectories = iteration_rollouts(arithmetic, 0, with_paths=True)
    policy = arithmetic.policies.get(arithmetic.checkpoint_before(0))
    renderer = arithmetic.policies.renderer(policy)
    unit, tasks = trajectories[:5], arithmetic.store.tasks()
    steps = [(t, place) for t in unit for place in steps_of(t, "separator")]
    prefixes = [prefix_of(t, t.token_paths, place, StepFinder(renderer)) for t, place in steps]
    copies = [prefix for prefix in prefixes for _ in range(1 if prefix.is_all else 4)]
    seed = derived_seed(arithmetic.settings.seed, "value", unit[0].id)
    again = go_on(
        arithmetic.environment,
        copies,
        [tasks[prefix.trajectory.task_id] for prefix in copies],
        LocalSampler(policy.model, stop_ids(renderer)),
        renderer,
        arithmetic.settings.value.sampling,
        seed,
    )
    for prefix in prefixes:
        own = [r.outcome.success for r, copy in zip(again, copies, strict=True) if copy is prefix]
        assert labels[prefix.trajectory.id, prefix.place.span] == np.mean(own)


def test_the_rater_says_how_the_values_came_about(arithmetic):
    value_stage(arithmetic, 0)
    rater = arithmetic.store.raters()[arithmetic.found(0, "value")["rater_id"]]
    checkpoint = arithmetic.store.checkpoint(arithmetic.checkpoint_before(0))
    assert rater.kind is RaterKind.TEST
    assert rater.specification["num_completions"] == 4
    assert rater.specification["policy"] == weights_hash(checkpoint.path)
    assert rater.specification["sampling"] == {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 20}
    assert rater.specification["by"] == arithmetic.verifier.spec_hash


def test_the_frozen_dataset_names_every_label(arithmetic):
    value_stage(arithmetic, 0)
    detail = arithmetic.found(0, "value")
    dataset = arithmetic.store.dataset(detail["dataset_id"])
    labels = arithmetic.store.step_labels(rater_id=detail["rater_id"])
    assert {i for member in dataset.labelled for i in member.evidence} == {label.id for label in labels}
    assert all(member.desirable is None for member in dataset.labelled)


def test_a_killed_stage_goes_on_to_the_same_labels(arithmetic, tmp_path, monkeypatch):
    value_stage(arithmetic, 0)

    class Killed(BaseException):
        pass

    def kill(done, note=""):
        raise Killed

    with rolled_out(tmp_path, **ARITHMETIC) as run:
        with monkeypatch.context() as patch:
            patch.setattr(run.progress, "advance", kill)
            with pytest.raises(Killed):
                value_stage(run, 0)
        num_before = len(run.store.step_labels())
        value_stage(run, 0)
        labels = logical_rows(run.store, schema.step_label)
        assert 0 < num_before < len(labels)
        assert labels == logical_rows(arithmetic.store, schema.step_label)
        assert run.found(0, "value")["dataset_id"] == arithmetic.found(0, "value")["dataset_id"]


def test_a_judge_may_say_how_attempts_end(arithmetic):
    value_stage(arithmetic, 0)
    verified = arithmetic.store.step_labels(rater_id=arithmetic.found(0, "value")["rater_id"])
    judged = Valued(with_value(arithmetic, ended_well="judge", threshold=0.9))
    assert judged.rater.kind is RaterKind.JUDGE
    # The rule judge's score is (value + 2) / 3 of a noisy value: at a threshold of 0.9 hardly anything but a success.
    assert np.mean([label.label for label in judged.labels]) == pytest.approx(
        np.mean([v.label for v in verified]), abs=0.1
    )


class Valued:
    """The labels of a run's first iteration under its settings, without the stage's event."""

    def __init__(self, run):
        from prefloop.stages.valuing import Valuing

        valuing = Valuing(run, run.checkpoint_before(0))
        self.labels = valuing.labels(iteration_rollouts(run, 0, with_paths=True))
        self.rater, self.num_lost = valuing.rater, valuing.num_lost


def test_values_under_other_settings_are_another_raters(arithmetic):
    value_stage(arithmetic, 0)
    other = Valued(with_value(arithmetic, num_completions=2))
    assert other.rater.id != arithmetic.found(0, "value")["rater_id"]
    assert {label.label for label in other.labels} <= {0.0, 0.5, 1.0}


def test_an_environment_with_luck_of_its_own_is_refused(booking, monkeypatch):
    plain = BookingEpisode.flights
    monkeypatch.setattr(BookingEpisode, "flights", lambda self, city: plain(self, city)[::-1])
    with pytest.raises(
        PrefloopError, match=r"trajectory \w+: environment booking does not replay it.* message 2 is another"
    ):
        value_stage(booking, 0)
    assert not booking.store.step_labels()


def test_an_environment_that_verifies_nothing_needs_the_judge(arithmetic, monkeypatch):
    monkeypatch.setattr("prefloop.environments.arithmetic.ArithmeticEpisode.outcome", lambda self: None)
    with pytest.raises(PrefloopError, match=r"arithmetic verifies nothing: set value\.ended_well"):
        Valued(with_value(arithmetic, num_completions=3))


def test_attempts_that_fail_are_neither_good_nor_bad(arithmetic, monkeypatch):
    calls = []

    def step(self, message):
        calls.append(message)
        if len(calls) % 2:
            raise RuntimeError("down")
        return plain(self, message)

    plain = type(arithmetic.environment.reset(next(iter(arithmetic.store.tasks().values())), 0)).step
    monkeypatch.setattr("prefloop.environments.arithmetic.ArithmeticEpisode.step", step, raising=False)
    valued = Valued(with_value(arithmetic, num_completions=5))
    assert valued.num_lost == math.ceil(len(calls) / 2)
    assert all(0 <= label.label <= 1 for label in valued.labels)


def test_an_environment_that_breaks_while_it_is_replayed_loses_the_attempt_only(booking, monkeypatch):
    """It raises in the first call of every second attempt, which the prefix of later steps only says again."""
    plain, opened = BookingEpisode.step, []

    def step(self, message):
        opened[:] = opened if any(one is self for one in opened) else [*opened, self]
        if next(i for i, one in enumerate(opened) if one is self) % 2:
            raise ConnectionError("the airline is closed")
        return plain(self, message)

    monkeypatch.setattr(BookingEpisode, "step", step)
    valued = Valued(with_value(booking, num_completions=4))
    assert valued.num_lost == len(opened) // 2 > 0
    assert valued.labels


# --- the judge's labels -----------------------------------------------------------------------------------------


class SureJudge:
    """Says that a trajectory is good as far as it was shown if it was shown an even number of lines."""

    rater = Rater(RaterKind.JUDGE, "sure", {})

    def __init__(self):
        self.shown = []

    def judge(self, items, replicate=0):
        self.shown += [item.trajectory.messages[-1].content for item in items]
        even = [float(item.trajectory.messages[-1].content.count("\n") % 2) for item in items]
        return [
            Judgement(item.trajectory.id, self.rater.id, Status.OK, score, score)
            for item, score in zip(items, even, strict=True)
        ]


def test_a_judge_labels_a_step_by_what_was_said_up_to_it(arithmetic):
    run = with_value(arithmetic, agree=True)
    run.judge = judge = SureJudge()
    trajectories = iteration_rollouts(run, 0)
    labels = judge_steps(run, trajectories)
    wanted = [t.messages[-1].content[: place.span[1]] for t in trajectories for place in steps_of(t, "separator")]
    assert [shown.rstrip() for shown in judge.shown] == [text.rstrip() for text in wanted]
    assert judge_steps(run, trajectories) == labels
    assert len(judge.shown) == len(wanted)  # not asked again
    values = [replace(label, rater_id="values", label=0.75) for label in labels]
    dataset = freeze_steps(run, 0, values, labels)
    agreed = merge_step_labels([*values, *labels], agree_with=labels[0].rater_id)
    assert sum(len(m.evidence) for m in dataset.labelled) == sum(label.label > 0.5 for label in labels) > 0
    assert agreed.num_not_agreed == sum(label.label < 0.5 for label in labels) > 0


def test_a_judge_that_agrees_with_nothing_leaves_nothing(arithmetic):
    label = StepLabel("t", "values", 1, 0.75)
    with pytest.raises(PrefloopError, match="no labelled step is left to learn from: with 1 nobody agrees"):
        freeze_steps(arithmetic, 0, [label], [replace(label, rater_id="judge", label=0.1)])


def test_a_judge_sees_nothing_of_what_comes_after_the_step(booking):
    trajectory = max(iteration_rollouts(booking, 0), key=lambda t: t.num_turns)
    place = steps_of(trajectory, "turn")[0]
    cut = up_to(trajectory, place)
    assert cut.messages == trajectory.messages[: place.message + 1]
    assert cut.messages[-1].role is Role.ASSISTANT
    assert cut.id not in {t.id for t in booking.store.trajectories()}


def test_a_judge_that_fails_too_often_stops_the_stage(arithmetic):
    run = with_value(arithmetic, agree=True)
    with pytest.raises(PrefloopError, match=r"failed on \d+ of \d+ steps: error nothing was verified"):
        judge_steps(run, iteration_rollouts(run, 0))  # the rule judge cannot judge what has not ended
