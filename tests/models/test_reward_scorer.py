import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from packed_examples import path
from prefloop.judges import JudgeItem
from prefloop.judges.reward_model import RewardJudgeSettings, outcome_judge
from prefloop.models.reward import load_reward_model, new_reward_model
from prefloop.models.reward_scorer import LocalRewardScorer
from prefloop.records import Message, Role, Status, Task, Trajectory
from reward_examples import conversation, conversations, padded_scores, rendered, saved_policy


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return saved_policy(tmp_path_factory.mktemp("policy") / "sft", max_length=64)


@pytest.fixture
def model(policy):
    return moved(new_reward_model(policy, num_heads=2, seed=1))


def moved(found):
    """Away from its first weights."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in found.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return found


def scored(model, pairs):
    scorer = LocalRewardScorer(model, "small", "abc")
    found = scorer.score([trajectory for _, trajectory in pairs], [task for task, _ in pairs])
    return [one.members or one.failure for one in found]


def test_trajectories_score_as_their_rendered_sequences_in_transformers(model, tmp_path):
    model.save(tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    pairs = conversations()
    paths = [rendered(model.tokenizer, trajectory) for _, trajectory in pairs]
    expected = padded_scores(theirs, paths, model.tokenizer.pad_token_id)
    assert np.array(scored(model, pairs)) == pytest.approx(expected, abs=2e-6)


def test_what_was_sampled_is_read_where_it_holds_for_this_model(model):
    """The stored ids of a policy of the same tokenizer and template; of another one the messages, rendered anew."""
    task, trajectory = conversation("Name a colour.", "Red")
    renderer = LocalRewardScorer(model, "small", "abc").renderer
    sampled = path([9, 10, 11, 12], 2)
    mine = {"tokenizer_hash": renderer.tokenizer_hash, "template_hash": renderer.template_hash}
    found, foreign, anew = scored(
        model,
        [
            (task, trajectory.with_paths([path_with(sampled, **mine)])),
            (task, trajectory.with_paths([path_with(sampled, tokenizer_hash="other")])),
            (task, trajectory),
        ],
    )
    assert found == pytest.approx(tuple(model.sequence_scores([sampled])[0]), abs=2e-6)
    assert foreign == anew != found


def path_with(one, **hashes):
    return replace(one, **hashes)


def test_of_several_contexts_the_last_is_read(model):
    task, trajectory = conversation("Name a colour.", "Red")
    renderer = LocalRewardScorer(model, "small", "abc").renderer
    mine = {"tokenizer_hash": renderer.tokenizer_hash, "template_hash": renderer.template_hash}
    first, last = (path_with(path(tokens, 2), **mine) for tokens in ([9, 10, 11], [9, 30, 31, 32]))
    (found,) = scored(model, [(task, trajectory.with_paths([first, last]))])
    assert found == pytest.approx(tuple(model.sequence_scores([last])[0]), abs=2e-6)


def test_what_cannot_be_read_is_a_failure_that_says_why(model):
    """Nothing is cut to fit, and one failure leaves the others their scores."""
    good = conversation("Name a colour.", "Red")
    task, trajectory = conversation("Name a colour.", "Red " * 80)
    silent = Trajectory("t", task.id, task.messages, 1, *_rest(trajectory))
    found = scored(model, [good, (task, trajectory), (task, silent)])
    assert isinstance(found[0], tuple)
    assert "and small reads no more than 64" in found[1]
    assert "no assistant message" in found[2]
    judge = outcome_judge(LocalRewardScorer(model, "small", "abc"), RewardJudgeSettings(model="m", centre=0, scale=1))
    statuses = [j.status for j in judge.judge([JudgeItem(*good), JudgeItem(task, trajectory)])]
    assert statuses == [Status.OK, Status.ERROR]


def _rest(trajectory):
    return trajectory.ended, trajectory.author_kind, trajectory.author


def test_a_model_of_others_reads_all_that_the_template_makes(policy, tmp_path):
    """As its users do with apply_chat_template; ours ends where the policy's last turn does."""
    model = moved(new_reward_model(policy))
    template = model.tokenizer.chat_template + "\n(end)"
    model.tokenizer.chat_template = template
    pairs = conversations()[:3]
    model.model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    loaded = load_reward_model(str(tmp_path))
    assert loaded.whole_template
    found = scored(loaded, pairs)
    for (_, trajectory), scores in zip(pairs, found, strict=True):
        messages = [message.to_dict() for message in trajectory.messages]
        ids = loaded.tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        with torch.no_grad():
            expected = loaded.model(input_ids=torch.tensor([ids])).logits[0]
        assert scores == pytest.approx(tuple(expected.tolist()), abs=2e-6)
    loaded.whole_template = False
    assert scored(loaded, pairs[:1]) != found[:1]


def test_the_identity_is_of_weights_tokenizer_template_and_what_is_read(model):
    first = LocalRewardScorer(model, "small", "abc").specification
    assert LocalRewardScorer(model, "other name", "abc").specification == first
    assert LocalRewardScorer(model, "small", "def").specification != first
    model.tokenizer.chat_template += " "
    assert LocalRewardScorer(model, "small", "abc").specification != first
    json.dumps(first)


def test_tools_that_the_template_shows_are_read(model):
    tools = ({"type": "function", "function": {"name": "search", "description": "d", "parameters": {}}},)
    message = Message(Role.USER, "Go")
    plain, equipped = (Task("made", {"n": 1}, messages=(message,), tools=shown) for shown in ((), tools))
    _, trajectory = conversation("Go", "Red")
    without, with_tools = scored(model, [(plain, trajectory), (equipped, trajectory)])
    assert without != with_tools
