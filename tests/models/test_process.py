import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForTokenClassification
from transformers import AutoModelForTokenClassification, AutoTokenizer

from prefloop.chat import ChatRenderer, StepFinder, steps_of
from prefloop.judges.base import JudgeItem
from prefloop.judges.reward_model import ProcessJudgeSettings, process_judge
from prefloop.models.process import ProcessRewardScorer
from prefloop.models.reward import load_reward_model, new_reward_model
from prefloop.models.settings import LoraSettings
from prefloop.records import Message, Role, Status
from reward_examples import QUESTIONS, conversation, padded_scores, rendered, saved_policy

ANSWERS = ("2\n3\n5", "I do not know.", "It is\n\nnext to\nthe river.\n")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return saved_policy(tmp_path_factory.mktemp("policy") / "sft")


def asked():
    return [conversation(question, answer) for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]


def trained(policy, **options):
    """A model whose weights are away from where they were made."""
    model = new_reward_model(policy, kind="token", seed=1, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def saved(model, directory):
    directory.mkdir()
    model.save(directory)
    return str(directory)


def step_ends(model, trajectory, kind="separator"):
    """Where its steps end, found in the text: after each run of line breaks, and at the stop token."""
    renderer = ChatRenderer(model.tokenizer)
    path = rendered(model.tokenizer, trajectory)
    finder = StepFinder(renderer)
    return [finder.end(trajectory, (path,), place).token for place in steps_of(trajectory, kind)]


def logits_at_steps(theirs, model, kind="separator"):
    """Scores by transformers at the ends of steps, for right-padded rows."""
    trajectories = [trajectory for _, trajectory in asked()]
    paths = [rendered(model.tokenizer, trajectory) for trajectory in trajectories]
    logits = padded_scores(theirs, paths, AutoTokenizer.from_pretrained(theirs.name_or_path).pad_token_id)
    return [logits[i][step_ends(model, trajectory, kind)] for i, trajectory in enumerate(trajectories)]


def scored(model):
    return ProcessRewardScorer(model, "a model", "hash").score([t for _, t in asked()], [task for task, _ in asked()])


@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("kind", ["separator", "turn"])
def test_transformers_gives_the_same_scores_at_the_ends_of_steps(policy, tmp_path, num_heads, kind):
    model = trained(policy, num_heads=num_heads)
    model.step = kind
    directory = saved(model, tmp_path / "saved")
    expected = logits_at_steps(AutoModelForTokenClassification.from_pretrained(directory).eval(), model, kind)
    for scores, logits in zip(scored(load_reward_model(directory, kind="token")), expected, strict=True):
        assert len(scores.steps) == len(logits)
        assert np.array(scores.steps) == pytest.approx(1 / (1 + np.exp(-logits)), abs=2e-6)
    assert [len(scores.steps) for scores in scored(model)] == ([3, 1, 3] if kind == "separator" else [1, 1, 1])


def test_an_adapter_opens_in_peft_with_the_same_scores(policy, tmp_path):
    model = trained(policy, lora=LoraSettings(rank=2, alpha=4))
    directory = saved(model, tmp_path / "saved")
    theirs = AutoPeftModelForTokenClassification.from_pretrained(directory, num_labels=1).eval()
    theirs.name_or_path = directory
    expected = logits_at_steps(theirs, model)
    for scores, logits in zip(scored(load_reward_model(directory, kind="token")), expected, strict=True):
        assert np.array(scores.steps) == pytest.approx(1 / (1 + np.exp(-logits)), abs=2e-6)


def test_a_model_says_which_steps_it_was_trained_on(policy, tmp_path):
    model = trained(policy)
    model.step, model.separator = "separator", "\n\n"
    again = load_reward_model(saved(model, tmp_path / "saved"), kind="token")
    assert (again.step, again.separator) == ("separator", "\n\n")
    assert [len(scores.steps) for scores in scored(again)] == [1, 1, 2]
    specification = ProcessRewardScorer(again, "a model", "hash").specification
    assert specification["reads"] == {"step": "separator", "separator": "\n\n"}
    assert specification["weights"] == "hash"


def test_a_model_of_two_classes_gives_the_softmax_of_its_second(policy, tmp_path):
    """As TRL trains them: label 1 says that the step is right."""
    model = trained(policy, num_heads=2)
    directory = saved(model, tmp_path / "trl")
    (tmp_path / "trl" / "reward_model.json").unlink()
    theirs = AutoModelForTokenClassification.from_pretrained(directory).eval()
    loaded = load_reward_model(directory, kind="token")
    assert loaded.num_members == 1
    for scores, logits in zip(scored(loaded), logits_at_steps(theirs, model), strict=True):
        expected = torch.softmax(torch.from_numpy(logits), 1)[:, 1:]
        assert np.array(scores.steps) == pytest.approx(expected.numpy(), abs=2e-6)


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [("min", lambda p: p.min(0)), ("product", lambda p: p.prod(0)), ("last", lambda p: p[-1])],
)
def test_as_a_judge_it_gives_the_mean_of_its_heads_aggregates(policy, aggregate, expected):
    model = trained(policy, num_heads=3)
    judge = process_judge(
        ProcessRewardScorer(model, "a model", "hash"), ProcessJudgeSettings(model="x", aggregate=aggregate)
    )
    judgements = judge.judge([JudgeItem(task, trajectory) for task, trajectory in asked()])
    for judgement, scores in zip(judgements, scored(model), strict=True):
        assert judgement.value == judgement.score == pytest.approx(expected(np.array(scores.steps)).mean())
    assert len({judgement.value for judgement in judgements}) == len(judgements)


def test_what_cannot_be_read_is_a_failure_and_no_number(policy):
    model = trained(policy)
    model.model.config.max_position_embeddings = 40
    (task, good), (_, other), _ = asked()
    long = replace(good, messages=(*task.messages, Message(Role.ASSISTANT, "I do not know.\n" * 20)))
    silent = replace(other, messages=task.messages)
    scorer = ProcessRewardScorer(model, "a model", "hash")
    found = scorer.score([long, good, silent], [task] * 3)
    assert "reads no more than 40" in found[0].failure
    assert "no assistant message" in found[2].failure
    assert not found[0].steps
    assert found[1].steps == scorer.score([good], [task])[0].steps
    assert all(math.isfinite(p) for step in found[1].steps for p in step)
    failed = process_judge(scorer, ProcessJudgeSettings(model="x")).judge([JudgeItem(task, long)])
    assert failed[0].status is Status.ERROR
