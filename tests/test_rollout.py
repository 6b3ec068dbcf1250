from __future__ import annotations

import json
import threading

import numpy as np
import pytest

from prefloop.chat import ChatRenderer, stop_ids
from prefloop.clients.sampling import Reply, Sampled, SamplingSettings
from prefloop.environments.base import Environment, Episode, Outcome, Step
from prefloop.environments.booking import BOOKED, Booking
from prefloop.models.initial import initial_model, train_tokenizer
from prefloop.models.sampler import LocalSampler
from prefloop.models.settings import InitialModelSettings
from prefloop.records import AuthorKind, Ended, Message, PrefloopError, Role, Source, Split, Status, Task, ToolCall
from prefloop.rollout import Attempt, LocalSpeaker, Provenance, RemoteSpeaker, derived_seed, open_episodes, roll_out

ENVIRONMENT = Booking()
FROM = Provenance(AuthorKind.CHECKPOINT, "checkpoint", "run", 0, "rollout")
SETTINGS = SamplingSettings(max_new_tokens=24)


@pytest.fixture(scope="module")
def policy():
    tasks = ENVIRONMENT.tasks(Split.TRAIN, 200)
    tokenizer = train_tokenizer(((ENVIRONMENT.demonstrate(t, 0)[0], t.tools) for t in tasks), 600)
    model = initial_model(tokenizer, InitialModelSettings(hidden_size=32, intermediate_size=32, num_heads=2))
    return model.eval(), ChatRenderer(tokenizer)


def attempts(num_tasks: int, num_samples: int) -> list[Attempt]:
    tasks = ENVIRONMENT.tasks(Split.TRAIN, num_tasks)
    return [Attempt(task, sample, 0) for task in tasks for sample in range(num_samples)]


def local(policy, tried, environment=ENVIRONMENT, seed=1):
    model, renderer = policy
    episodes = open_episodes(environment, tried)
    sampler = LocalSampler(model, stop_ids(renderer))
    return roll_out(environment, tried, episodes, LocalSpeaker(sampler, renderer, episodes, SETTINGS, seed), FROM)


def test_a_unit_rolled_out_again_is_the_same_and_another_seed_is_not(policy):
    first, again, other = (local(policy, attempts(4, 3), seed=seed) for seed in (1, 1, 2))
    assert [r.trajectory.messages for r in first] == [r.trajectory.messages for r in again]
    assert [r.trajectory.id for r in first] == [r.trajectory.id for r in again]
    assert [r.trajectory.messages for r in first] != [r.trajectory.messages for r in other]


def test_stored_log_probs_are_those_of_a_full_forward(policy):
    import torch

    model, _ = policy
    for rollout in local(policy, attempts(2, 2)):
        for path in rollout.trajectory.token_paths:
            ids = torch.from_numpy(path.token.astype(np.int64))[None]
            with torch.no_grad():
                logprobs = model(ids).logits[0].log_softmax(-1)
            own = np.flatnonzero(path.loss_mask)
            assert len(own)
            expected = logprobs[own - 1, ids[0, own]].numpy()
            np.testing.assert_allclose(path.logprob[own], expected, atol=2e-5)


def test_only_what_the_policy_sampled_is_its_own(policy):
    for rollout in local(policy, attempts(3, 2)):
        trajectory = rollout.trajectory
        assistant = {i for i, m in enumerate(trajectory.messages) if m.role is Role.ASSISTANT}
        for path in trajectory.token_paths:
            sampled = path.source == Source.SAMPLED
            assert set(path.message[sampled].tolist()) <= assistant
            assert not np.isnan(path.logprob[sampled]).any()
            assert np.isnan(path.logprob[~sampled]).all()


def test_trajectories_of_a_group_share_the_world_and_have_their_own_ids(policy):
    rollouts = local(policy, attempts(2, 4))
    assert len({r.trajectory.id for r in rollouts}) == 8
    assert {r.trajectory.seed for r in rollouts} == {0}
    assert all(r.trajectory.group_seeded for r in rollouts)


class Dictated:
    """A policy whose turns are given."""

    def __init__(self, renderer, turns):
        self.renderer, self.turns = renderer, list(turns)

    def session(self):
        return self

    def generate(self, contexts, row_keys, settings, seed, budgets=None):
        ids = [*self.renderer.encoder.encode(self.turns.pop(0)).ids, min(stop_ids(self.renderer))]
        return [Sampled(np.array(ids, np.int32), np.full(len(ids), -1.0, np.float32), "stop") for _ in contexts]


def test_a_call_whose_name_cannot_be_read_is_answered_by_its_error_and_the_policy_goes_on(policy):
    _, renderer = policy
    turns = ['<tool_call>{"nam": "search_flights"}</tool_call>', "<tool_call>\nlook around\n</tool_call>", BOOKED]
    tried = attempts(1, 1)
    episodes = open_episodes(ENVIRONMENT, tried)
    speaker = LocalSpeaker(Dictated(renderer, turns), renderer, episodes, SETTINGS, 1)
    (rollout,) = roll_out(ENVIRONMENT, tried, episodes, speaker, FROM)
    _, first, answer, second, again, last = rollout.trajectory.messages
    for said, heard in ((first, answer), (second, again)):
        assert (heard.role, heard.tool_call_id) == (Role.TOOL, said.tool_calls[0].id)
        assert json.loads(heard.content)["error"].startswith("the call cannot be read: it names no tool; the tools are")
    assert rollout.trajectory.ended is Ended.DONE and last.content == BOOKED
    said = [renderer.encoder.decode(path.token[path.loss_mask].tolist()) for path in rollout.trajectory.token_paths]
    assert all(turn in "".join(said) for turn in turns)  # the sampled tokens stay the truth


class Expert:
    """A served policy that books as it should, but fails on one task."""

    def __init__(self, failing: str = "") -> None:
        self.failing = failing

    def reply(self, conversations, settings, seed):
        return [self._reply(c.messages) for c in conversations]

    def _reply(self, messages):
        if messages[0].content == self.failing:
            return Reply(Status.TIMEOUT, detail="no answer within 1 s")
        turn = sum(m.role is Role.ASSISTANT for m in messages)
        calls = [
            lambda: ToolCall("search_flights", {"city": _city(messages[0].content)}),
            lambda: ToolCall("filter_results", {"max_price": _price(messages[0].content), "direct": _direct(messages)}),
            lambda: ToolCall("book_flight", {"flight_id": json.loads(messages[-1].content)[0]["id"]}),
        ]
        if turn == len(calls):
            return Reply(Status.OK, Message(Role.ASSISTANT, BOOKED))
        return Reply(Status.OK, Message(Role.ASSISTANT, tool_calls=(calls[turn](),)))


def _city(text: str) -> str:
    from prefloop.environments.booking import CITIES

    return next(city for city in CITIES if city in text)


def _price(text: str) -> int:
    return int(text.split("$")[1].split(",")[0].rstrip("."))


def _direct(messages) -> bool:
    return "direct only" in messages[0].content


def test_a_served_policy_rolls_out_and_its_failures_are_data():
    tried = attempts(5, 1)
    failing = tried[2].task.messages[0].content
    episodes = open_episodes(ENVIRONMENT, tried)
    speaker = RemoteSpeaker(Expert(failing), episodes, SETTINGS, 0)
    rollouts = roll_out(ENVIRONMENT, tried, episodes, speaker, FROM)
    assert [r.outcome is not None and r.outcome.success for r in rollouts] == [True, True, False, True, True]
    lost = rollouts[2]
    assert lost.outcome is None
    assert lost.trajectory.ended is Ended.ERROR
    assert lost.trajectory.extra["error"] == "timeout: no answer within 1 s"
    assert all(r.trajectory.token_paths == () for r in rollouts)


def test_a_served_policy_is_asked_with_another_seed_each_turn():
    class Seeds(Expert):
        def __init__(self):
            super().__init__()
            self.seeds = []

        def reply(self, conversations, settings, seed):
            self.seeds.append(seed)
            return super().reply(conversations, settings, seed)

    def seeds(seed):
        tried, policy = attempts(2, 1), Seeds()
        episodes = open_episodes(ENVIRONMENT, tried)
        roll_out(ENVIRONMENT, tried, episodes, RemoteSpeaker(policy, episodes, SETTINGS, seed), FROM)
        return policy.seeds

    assert seeds(1) == seeds(1)
    assert len({*seeds(1), *seeds(2)}) == 8


class Moody(Environment):
    """Raises in a step of every second task, cannot say the outcome of every third, and has no task 7."""

    name = "moody"
    max_turns = 2

    def tasks(self, split, num, *, first=0):
        return [Task("moody", {}, i, (Message(Role.USER, f"hello {i}"),)) for i in range(first, first + num)]

    def reset(self, task, seed):
        if task.seed == 7:
            raise LookupError("no such world")
        return MoodyEpisode(task)


class MoodyEpisode(Episode):
    def __init__(self, task):
        self.messages, self.tools, self.seed = task.messages, (), task.seed

    def step(self, message):
        if self.seed % 2:
            raise ValueError("not today")
        return Step(done=True)

    def outcome(self):
        if self.seed % 3 == 2:
            raise KeyError("lost")
        return Outcome(1.0, 1.0, True)


def test_what_an_environment_raises_belongs_to_its_episode(policy):
    environment = Moody()
    tried = [Attempt(task, 0, 0) for task in environment.tasks(Split.TRAIN, 4)]
    episodes = open_episodes(environment, tried)
    speaker = RemoteSpeaker(Talker(), episodes, SETTINGS, 0)
    rollouts = roll_out(environment, tried, episodes, speaker, FROM)
    assert [r.trajectory.ended for r in rollouts] == [Ended.DONE, Ended.ERROR, Ended.ERROR, Ended.ERROR]
    assert [r.outcome is None for r in rollouts] == [False, True, True, True]
    assert rollouts[1].trajectory.extra["error"] == "environment raised ValueError: not today"


def moody_rollouts(policy, tasks, environment):
    tried = [Attempt(task, 0, 0) for task in tasks]
    return local(policy, tried, environment)


def test_an_episode_that_cannot_be_opened_is_data_too_and_the_others_are_played(policy):
    environment = Moody()
    rollouts = moody_rollouts(policy, environment.tasks(Split.TRAIN, 3, first=6), environment)
    first, lost, last = (rollout.trajectory for rollout in rollouts)
    assert lost.ended is Ended.ERROR
    assert lost.extra["error"] == "environment raised LookupError: no such world"
    assert (lost.num_turns, lost.token_paths, rollouts[1].outcome) == (0, (), None)
    assert first.num_turns == last.num_turns == 1
    alone = moody_rollouts(policy, environment.tasks(Split.TRAIN, 1, first=6), environment)[0].trajectory
    assert alone.messages == first.messages


class Hanging(Environment):
    """Every second task hangs in its second step; what it says of the others' is no message now and then."""

    name = "hanging"
    max_turns = 3
    step_deadline_s = 0.05

    def __init__(self, gate) -> None:
        self.gate = gate
        self.closed: list[int] = []

    def tasks(self, split, num, *, first=0):
        return [Task("hanging", {}, i, (Message(Role.USER, f"hello {i}"),)) for i in range(first, first + num)]

    def reset(self, task, seed):
        return HangingEpisode(task, self)


class HangingEpisode(Episode):
    def __init__(self, task, environment):
        self.messages, self.tools, self.seed = task.messages, (), task.seed
        self.environment, self.turn = environment, 0

    def step(self, message):
        self.turn += 1
        if self.turn == 2 and self.seed % 2:
            self.environment.gate.wait()
        if self.turn == 2 and self.seed == 2:
            return Step((Message(Role.TOOL, "17", tool_call_id="call_7"),))
        return Step((Message(Role.USER, "go on"),), done=self.turn == 3)

    def outcome(self):
        return Outcome(float(self.turn), 1.0, True)

    def close(self):
        self.environment.closed.append(self.seed)
        if self.seed == 4:
            raise OSError("still busy")


def test_what_hangs_or_is_malformed_ends_its_own_episode_only():
    gate = threading.Event()
    environment = Hanging(gate)
    tried = [Attempt(task, 0, 0) for task in environment.tasks(Split.TRAIN, 5)]
    episodes = open_episodes(environment, tried)
    rollouts = roll_out(environment, tried, episodes, RemoteSpeaker(Talker(), episodes, SETTINGS, 0), FROM)
    gate.set()
    ended = [rollout.trajectory.ended for rollout in rollouts]
    assert ended == [Ended.DONE, Ended.DEADLINE, Ended.ERROR, Ended.DEADLINE, Ended.DONE]
    assert [rollout.outcome and rollout.outcome.value for rollout in rollouts] == [3.0, None, None, None, 3.0]
    assert [rollout.trajectory.num_turns for rollout in rollouts] == [3, 2, 2, 2, 3]
    late, wrong = rollouts[1].trajectory, rollouts[2].trajectory
    assert late.extra["error"] == "environment gave no answer within 0.05 s (its step_deadline_s)"
    assert wrong.extra["error"] == (
        "environment gave a malformed answer: message 0 answers the tool call 'call_7', which nobody asked for "
        "(to be answered: none)"
    )
    assert wrong.messages[-1].role is Role.ASSISTANT  # what was malformed is not kept
    assert sorted(environment.closed) == [0, 1, 2, 3, 4]
    assert rollouts[4].trajectory.extra["error_at_close"] == "environment raised OSError: still busy"


def test_episodes_are_closed_where_the_policy_fails():
    class Silent:
        def reply(self, conversations, settings, seed):
            raise PrefloopError("no server")

    environment = Hanging(threading.Event())
    tried = [Attempt(task, 0, 0) for task in environment.tasks(Split.TRAIN, 2)]
    episodes = open_episodes(environment, tried)
    with pytest.raises(PrefloopError, match="no server"):
        roll_out(environment, tried, episodes, RemoteSpeaker(Silent(), episodes, SETTINGS, 0), FROM)
    assert environment.closed == [0, 1]


def test_an_agent_is_told_what_is_wrong_with_its_call_and_may_go_on():
    """A call that is no JSON, one of a tool that is not there, then the right way."""

    class Clumsy(Expert):
        def _reply(self, messages):
            wrong = (ToolCall("search_flights", '{"city": "Par', "a"), ToolCall("find_flights", {}, "b"))
            turn = sum(m.role is Role.ASSISTANT for m in messages)
            if turn < len(wrong):
                return Reply(Status.OK, Message(Role.ASSISTANT, tool_calls=(wrong[turn],)))
            return super()._reply([messages[0], *messages[5:]])

    tried = attempts(1, 1)
    episodes = open_episodes(ENVIRONMENT, tried)
    (rollout,) = roll_out(ENVIRONMENT, tried, episodes, RemoteSpeaker(Clumsy(), episodes, SETTINGS, 0), FROM)
    told = [message for message in rollout.trajectory.messages if message.role is Role.TOOL][:2]
    assert [message.tool_call_id for message in told] == ["a", "b"]
    first, second = (json.loads(message.content)["error"] for message in told)
    assert first.startswith("the arguments of search_flights are not a JSON object")
    assert second == "there is no tool find_flights: did you mean search_flights?"
    assert rollout.outcome.success
    assert (rollout.outcome.metrics["malformed"], rollout.outcome.metrics["wrong_tool"]) == (1, 1)


class Talker:
    def reply(self, conversations, settings, seed):
        return [Reply(Status.OK, Message(Role.ASSISTANT, "hi")) for _ in conversations]


def test_a_turn_that_is_cut_ends_the_episode_by_length():
    class Cut(Talker):
        def reply(self, conversations, settings, seed):
            return [Reply(Status.OK, Message(Role.ASSISTANT, "hi"), stopped="length") for _ in conversations]

    environment = Moody()
    tried = [Attempt(task, 0, 0) for task in environment.tasks(Split.TRAIN, 1)]
    episodes = open_episodes(environment, tried)
    (rollout,) = roll_out(environment, tried, episodes, RemoteSpeaker(Cut(), episodes, SETTINGS, 0), FROM)
    assert rollout.trajectory.ended is Ended.LENGTH
    assert rollout.trajectory.num_turns == 1


def test_derived_seeds_differ_by_every_part_and_fit_63_bits():
    seeds = {derived_seed(run, stage, step) for run in range(20) for stage in "ab" for step in range(20)}
    assert len(seeds) == 800
    assert all(0 <= seed < 2**63 for seed in seeds)
