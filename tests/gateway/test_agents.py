"""Unmodified agents on OpenAI's SDK against a real gateway: what is recorded is what was sampled."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from gateway_runs import ToolLoop, assert_exact, policy, served, tasks

from prefloop.clients.sampling import SamplingSettings
from prefloop.environments.booking import TOOLS
from prefloop.gateway.threads import says_the_same
from prefloop.records import Ended, Message, Role


@pytest.fixture(scope="module")
def gateway():
    with served() as found:
        yield found


def ask(client, messages, **options):
    reply = client.chat.completions.create(model="policy", messages=messages, **options)
    return reply.choices[0].message.model_dump(exclude_none=True)


def test_a_tool_loop_becomes_one_trajectory_with_exact_masks_and_log_probs(gateway):
    for number, task in enumerate(tasks(6)):
        name = f"loop-{number}"
        messages = ToolLoop(gateway.client(name), task).run()
        trajectory = gateway.close(name, score=0.25, metrics={"steps": 3})
        assert len(trajectory.threads) == 1
        thread = trajectory.threads[0]
        assert (thread.start, thread.stop, thread.num_context) == (0, len(messages), 1)
        assert list(thread.tools) == list(TOOLS)
        for held, recorded in zip(messages, trajectory.messages, strict=True):
            assert says_the_same(Message.from_dict(held), recorded)
        assert trajectory.num_turns == sum(message["role"] == "assistant" for message in messages)
        assert assert_exact(trajectory) > 0
    outcome = gateway.recorded[-1].outcome
    assert (outcome.value, outcome.score, outcome.success, outcome.metrics) == (0.25, 0.25, False, {"steps": 3.0})


def test_what_the_client_is_told_is_what_is_recorded(gateway):
    reply = gateway.client("told").chat.completions.create(
        model="any", messages=[{"role": "user", "content": "Find me a seat to Oslo"}], tools=list(TOOLS), logprobs=True
    )
    trajectory = gateway.close("told")
    (path,) = trajectory.token_paths
    told = reply.choices[0].logprobs.content
    np.testing.assert_allclose([token.logprob for token in told], path.logprob[path.loss_mask], atol=1e-6)
    assert reply.usage.completion_tokens == path.loss_mask.sum() == len(told)
    assert reply.usage.prompt_tokens == np.flatnonzero(path.loss_mask)[0]
    assert reply.id.startswith(f"chatcmpl-{trajectory.id[:16]}")
    assert gateway.recorded[-1].outcome is None


def assembled(events):
    """Content, calls, reason, count of tokens and log-probs of a streamed reply, and how many pieces had content."""
    content, calls, reason, total, logprobs, pieces = "", [], None, 0, [], 0
    for event in events:
        if not event.choices:
            total = event.usage.total_tokens
            continue
        choice = event.choices[0]
        content += choice.delta.content or ""
        pieces += bool(choice.delta.content)
        calls += [(c.id, c.function.name, c.function.arguments) for c in choice.delta.tool_calls or ()]
        logprobs += [token.logprob for token in choice.logprobs.content] if choice.logprobs else []
        reason = reason or choice.finish_reason
    return (content, calls, reason, total, logprobs), pieces


def whole(reply):
    """The same of a reply that came at once."""
    choice = reply.choices[0]
    calls = [(c.id, c.function.name, c.function.arguments) for c in choice.message.tool_calls or ()]
    logprobs = [token.logprob for token in choice.logprobs.content]
    return choice.message.content or "", calls, choice.finish_reason, reply.usage.total_tokens, logprobs


def test_streaming_says_the_same_as_one_reply():
    prompts = [task.messages[0].content for task in tasks(12)]
    said = []
    most_pieces = 0
    for stream in (False, True):
        # So hot that some replies begin with words. A gateway anew: the same attempts, the same draws.
        with served(chunk_tokens=2, sampling=SamplingSettings(temperature=1.8, max_new_tokens=24)) as gateway:
            for number, prompt in enumerate(prompts):
                client = gateway.client(str(number), f"task-{number}")
                options = {"messages": [{"role": "user", "content": prompt}], "model": "m", "logprobs": True}
                options |= {"tools": list(TOOLS)} if number % 2 else {}
                options |= {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
                reply = client.chat.completions.create(**options)
                found, pieces = assembled(reply) if stream else (whole(reply), 0)
                said.append(found)
                most_pieces = max(most_pieces, pieces)
    assert said[:12] == said[12:]
    assert any(calls for _, calls, *_ in said) and any(content for content, *_ in said)
    assert most_pieces > 3


def test_sub_agents_in_parallel_are_threads_of_one_trajectory(gateway):
    system = "You book flights and hand work on."

    def sub_agent(number: int) -> list[dict]:
        loop = ToolLoop(gateway.client("team"), tasks(8)[number % 4])  # the second four ask the same as the first
        loop.messages.insert(0, {"role": "system", "content": f"{system} You are number {number}."})
        return loop.run()

    with ThreadPoolExecutor(8) as pool:
        held = list(pool.map(sub_agent, range(8)))
    trajectory = gateway.close("team", success=True)
    assert len(trajectory.threads) == 8
    assert_exact(trajectory)
    cut = [trajectory.messages[thread.start : thread.stop] for thread in trajectory.threads]
    by_system = {messages[0].content: messages for messages in cut}
    for messages in held:
        mine = by_system[messages[0]["content"]]
        assert all(says_the_same(Message.from_dict(a), b) for a, b in zip(messages, mine, strict=True))
    ids = [call.id for message in trajectory.messages for call in message.tool_calls]
    assert len(ids) == len(set(ids))


def test_equal_requests_at_once_get_replies_of_their_own(gateway):
    question = [{"role": "user", "content": "Please get me to Lima"}]
    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda _: ask(gateway.client("twins"), question), range(6)))
    trajectory = gateway.close("twins")
    assert len(trajectory.threads) == 6
    assert_exact(trajectory)
    assert len({json.dumps(reply.get("content")) for reply in replies}) > 1


def test_a_branch_sees_what_was_said_and_learns_only_its_own(gateway):
    client = gateway.client("branch")
    question = {"role": "user", "content": "I need to fly to Paris"}
    first = ask(client, [question])
    ways = [ask(client, [question, first, {"role": "user", "content": text}]) for text in ("at night", "by day")]
    trajectory = gateway.close("branch")
    main, branch = trajectory.threads
    assert (main.num_context, main.stop) == (1, 4)
    assert (branch.start, branch.num_context, branch.stop) == (4, 3, 8)
    assert trajectory.messages[1].content == first["content"]
    assert [trajectory.messages[i].content for i in trajectory.own_turns] == [
        first["content"], ways[0]["content"], ways[1]["content"],
    ]  # fmt: skip
    assert_exact(trajectory)
    # The branch begins with the very tokens of the first turn, not with its text encoded again.
    first_path, branch_path = trajectory.token_paths[0], trajectory.token_paths[-1]
    start = int(np.flatnonzero(first_path.message == 1)[0])
    said = first_path.token[first_path.loss_mask & (first_path.message == 1)]
    np.testing.assert_array_equal(branch_path.token[: start + len(said)], first_path.token[: start + len(said)])
    assert not branch_path.loss_mask[: start + len(said)].any()


def test_a_compacted_history_is_a_thread_of_its_own(gateway):
    client = gateway.client("compact")
    question = {"role": "user", "content": "Book me a flight to Cairo"}
    first = ask(client, [question])
    ask(client, [question, first, {"role": "user", "content": "go on"}])
    ask(client, [{"role": "user", "content": "Summary: a flight to Cairo. Go on."}])
    trajectory = gateway.close("compact")
    assert [(t.start, t.stop, t.num_context) for t in trajectory.threads] == [(0, 4, 1), (4, 6, 1)]
    assert_exact(trajectory)


def test_other_tools_open_another_thread(gateway):
    client = gateway.client("tools")
    question = [{"role": "user", "content": "Find me a seat to Delhi"}]
    ask(client, question, tools=list(TOOLS))
    ask(client, question, tools=list(TOOLS)[:1])
    said = ask(client, question, tools=list(TOOLS), tool_choice="none")
    assert "tool_calls" not in said
    trajectory = gateway.close("tools")
    assert [len(thread.tools) for thread in trajectory.threads] == [3, 1, 0]
    assert_exact(trajectory)


def test_a_reply_cut_off_by_its_budget_is_recorded_as_that(gateway):
    reply = gateway.client("cut").chat.completions.create(
        model="m", messages=[{"role": "user", "content": "Book me a flight to Lima"}], max_tokens=2
    )
    assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == 2
    trajectory = gateway.close("cut")
    assert trajectory.ended is Ended.LENGTH
    assert trajectory.extra["cut"] == [1]
    assert assert_exact(trajectory) == 2


def test_draws_are_the_runs_unless_the_request_may_choose():
    question = [{"role": "user", "content": "Book me a flight to Lima"}]
    for chooser, differ in (("run", True), ("request", False)):
        with served(chooser=chooser) as gateway:
            said = [ask(gateway.client(str(i)), question, temperature=0) for i in range(8)]
            assert (len({message.get("content") for message in said}) > 1) is differ


def test_a_seed_changes_the_draws_and_attempts_at_a_task_differ_under_one():
    question = [{"role": "user", "content": "Book me a flight to Lima"}]

    def contents(seed):
        with served() as gateway:
            return [ask(gateway.client(str(i)), question, seed=seed).get("content") for i in range(6)]

    assert contents(1) == contents(1) != contents(2)
    assert len(set(contents(1))) > 1


def test_a_developer_message_is_the_systems(gateway):
    ask(gateway.client("dev"), [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "hello"}])
    assert gateway.close("dev").messages[0] == Message(Role.SYSTEM, "Be brief.")


def test_thirty_two_agents_at_once_are_kept_apart(gateway):
    # The same seeds one after another and all at once: what an agent is told does not depend on the others.
    def play(name: str, number: int) -> list[dict]:
        return ToolLoop(gateway.client(name, f"many-{number}"), tasks(32)[number]).run()

    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda n: play("a", n), range(32)))
    for number, messages in enumerate(together):
        trajectory = gateway.close("a", f"many-{number}")
        assert all(says_the_same(Message.from_dict(m), r) for m, r in zip(messages, trajectory.messages, strict=True))
        assert_exact(trajectory)
    assert not gateway.gateway.states()


def test_temperature_and_top_p_are_part_of_the_log_prob():
    sampling = SamplingSettings(temperature=0.7, max_new_tokens=48)
    with served(sampling=sampling) as gateway:
        ToolLoop(gateway.client(), tasks(1)[0]).run()
        assert_exact(gateway.close(), temperature=0.7)
    assert policy()[0].training is False
