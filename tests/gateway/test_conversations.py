"""Which conversation a request goes on with, and what is recorded of it: with prescribed replies."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
from gateway_runs import FROM

from prefloop.chat import ChatRenderer, steps_of, stop_ids, trajectory_paths
from prefloop.clients.sampling import Sampled
from prefloop.environments.base import Outcome
from prefloop.gateway.episodes import OpenEpisode, Voice
from prefloop.gateway.refusal import RefusedError
from prefloop.gateway.threads import says_the_same
from prefloop.gateway.wire import shown_message
from prefloop.models.initial import CHAT_TEMPLATE, CONTROL, train_tokenizer
from prefloop.records import Ended, Message, Role, Source, Task, ToolCall
from prefloop.rollout import Attempt

TOOL = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {"type": "object"}}}
# As in Qwen 3: the thoughts of turns before the last question are not shown again.
THINKING = CHAT_TEMPLATE.replace(
    "<|assistant|>{{ message.content or '' }}",
    "<|assistant|>{% if message.reasoning_content and loop.index0 > ns.last %}<think>\n{{ message.reasoning_content }}"
    "\n</think>\n\n{% endif %}{{ message.content or '' }}",
).replace(
    "{%- for message in messages -%}",
    "{%- set ns = namespace(last=-1) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}"
    "{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}{%- for message in messages -%}",
    1,
)


@functools.cache
def voice(thinking: bool = False) -> Voice:
    text = "".join(map(chr, range(32, 127)))
    tokenizer = train_tokenizer([([Message(Role.USER, text), Message(Role.ASSISTANT, text)], (TOOL,))], 400)
    return Voice(ChatRenderer(tokenizer, chat_template=THINKING if thinking else CHAT_TEMPLATE))


def user(text: str) -> Message:
    return Message(Role.USER, text)


def sampled(voice: Voice, text: str, *, cut: bool = False) -> Sampled:
    """The tokens of a text as a policy might have sampled them: not as the tokenizer would write it."""
    renderer = voice.renderer
    ids: list[int] = []
    for piece in renderer.encoder.split(text):
        control = piece[1]
        ids += [control] if control >= 0 else [i for c in piece[0] for i in renderer.encoder.encode(c).ids]
    ids += [] if cut else [min(stop_ids(renderer))]
    logprob = -0.01 * np.arange(1, len(ids) + 1, dtype=np.float32)
    return Sampled(np.array(ids, np.int32), logprob, "length" if cut else "stop")


class Talk:
    """An episode that is talked to without a server."""

    def __init__(self, *, thinking: bool = False, max_context: int = 10_000) -> None:
        self.voice = voice(thinking)
        attempt = Attempt(Task("agent", {"task": "t"}), 0, 0)
        self.episode = OpenEpisode(("t", "e"), attempt, "trajectory", self.voice, owned=False)
        self.max_context = max_context

    def begin(self, messages, tools=()):
        return self.episode.begin(tuple(messages), tuple(tools), 0, self.max_context)

    def ask(self, messages, reply, tools=(), **options):
        turn = self.begin(messages, tools)
        return self.episode.finish(turn, sampled(self.voice, reply, **options))

    def close(self, **options):
        return self.episode.close(FROM, None, **options).trajectory


def assert_whole(talk: Talk, trajectory) -> None:
    """The sampled tokens of each own turn are in one path, and say the message."""
    decode = talk.voice.renderer.encoder.decode
    turns = []
    for path in trajectory.token_paths:
        for index in np.unique(path.message[path.loss_mask]):
            turns.append(int(index))
            own = path.loss_mask & (path.message == index)
            content = trajectory.messages[index].content
            assert content in decode(path.token[own].tolist())
            np.testing.assert_allclose(path.logprob[own], -0.01 * np.arange(1, own.sum() + 1), atol=1e-6)
    assert sorted(turns) == sorted(trajectory.own_turns)


def test_what_follows_a_reply_goes_on_with_its_thread():
    talk = Talk()
    first = talk.ask([user("one")], "first")
    talk.ask([user("one"), first, user("two")], "second")
    trajectory = talk.close()
    assert [m.content for m in trajectory.messages] == ["one", "first", "two", "second"]
    assert len(trajectory.token_paths) == 1
    assert_whole(talk, trajectory)
    assert trajectory.threads[0].num_context == trajectory.num_prompt_messages == 1
    assert trajectory.extra == {"stage": "rollout", "episode": "e"}


@pytest.mark.parametrize(
    "echo",
    [
        Message(Role.ASSISTANT, "Let me see.", tool_calls=(ToolCall("look", {"at": [1, {"b": 2}]}, "call_0_0"),)),
        Message(Role.ASSISTANT, "", tool_calls=(ToolCall("look", {"at": [1, {"b": 2}]}, "call_0_0"),)),
        Message(Role.ASSISTANT, " Let me see.\n", tool_calls=(ToolCall("look", {"at": [1, {"b": 2}]}, "call_0_0"),)),
    ],
    ids=["as it was", "content dropped", "space around it"],
)
def test_what_frameworks_do_to_a_turn_does_not_part_it_from_its_tokens(echo):
    talk = Talk()
    call = '<tool_call>{"name": "look", "arguments": {"at": [1, {"b": 2}]}}</tool_call>'
    said = talk.ask([user("one")], f"Let me see.{call}", [TOOL])
    assert said.tool_calls == (ToolCall("look", {"at": [1, {"b": 2}]}, "call_0_0"),)
    talk.ask([user("one"), echo, Message(Role.TOOL, "a wall", tool_call_id="call_0_0")], "A wall.", [TOOL])
    trajectory = talk.close()
    assert len(trajectory.threads) == 1
    assert trajectory.messages[1] == said
    assert_whole(talk, trajectory)


@pytest.mark.parametrize(
    ("theirs", "same"),
    [
        ({"content": "a"}, True),
        ({"content": "b"}, False),
        ({"content": "a", "reasoning_content": "hm"}, True),
        ({"content": "a", "tool_calls": (ToolCall("look", {}, "x"),)}, False),
    ],
)
def test_what_counts_as_the_same_turn(theirs, same):
    ours = Message(Role.ASSISTANT, "a", "thoughts")
    assert says_the_same(Message(Role.ASSISTANT, **theirs), ours) is same


def test_calls_are_the_same_by_what_they_say_and_which_they_are():
    def turn(call):
        return Message(Role.ASSISTANT, "", tool_calls=(call,))

    ours = turn(ToolCall("look", {"a": 1, "b": [2]}, "call_0_0"))
    assert says_the_same(turn(ToolCall("look", {"b": [2], "a": 1}, "call_0_0")), ours)
    assert not says_the_same(turn(ToolCall("look", {"a": 2, "b": [2]}, "call_0_0")), ours)
    assert not says_the_same(turn(ToolCall("look", {"a": 1, "b": [2]}, "call_1_0")), ours)
    assert not says_the_same(Message(Role.USER, ""), ours)


@pytest.mark.parametrize(
    "arguments", ['"arguments": "{\\"a\\": 1}"', '"arguments": null', '"parameters": {"a": 1}', '"arguments": {"a": 1,']
)
def test_a_call_however_it_was_written_comes_back_as_the_same_turn(arguments):
    talk, messages = Talk(), [user("one")]
    for _ in range(3):
        said = talk.ask(messages, f'<tool_call>{{"name": "look", {arguments}}}</tool_call>', [TOOL])
        echo = Message.from_dict(json.loads(json.dumps(shown_message(said))))
        messages += [echo, Message(Role.TOOL, "a wall", tool_call_id=echo.tool_calls[0].id)]
    trajectory = talk.close()
    assert (len(trajectory.threads), len(trajectory.messages)) == (1, 6)
    assert_whole(talk, trajectory)


def test_reasoning_that_a_framework_dropped_is_kept_where_the_template_shows_it():
    talk = Talk(thinking=True)
    call = '<think>\nI must look.\n</think>\n\n<tool_call>{"name": "look", "arguments": {}}</tool_call>'
    said = talk.ask([user("one")], call, [TOOL])
    assert said.reasoning_content == "I must look."
    bare = Message(Role.ASSISTANT, "", tool_calls=said.tool_calls)
    answer = Message(Role.TOOL, "a wall", tool_call_id="call_0_0")
    turn = talk.begin([user("one"), bare, answer], [TOOL])
    assert "I must look." in talk.voice.renderer.encoder.decode(turn.context.tolist())
    talk.episode.finish(turn, sampled(talk.voice, "<think>\nSo.\n</think>\n\nA wall."))
    # The next question makes the template drop the thoughts: the context is another, and a path opens.
    bare_end = Message(Role.ASSISTANT, "A wall.")
    talk.ask([user("one"), bare, answer, bare_end, user("two")], "Done.", [TOOL])
    trajectory = talk.close()
    assert len(trajectory.threads) == 1 and len(trajectory.token_paths) == 2
    assert_whole(talk, trajectory)
    last = talk.voice.renderer.encoder.decode(trajectory.token_paths[1].token.tolist())
    assert "I must look." not in last and "A wall." in last


def test_a_branch_from_the_middle_learns_only_what_is_new():
    talk = Talk()
    first = talk.ask([user("one")], "first")
    second = talk.ask([user("one"), first, user("two")], "second")
    talk.ask([user("one"), first, user("two"), second, user("three")], "third")
    talk.ask([user("one"), first, user("other")], "fourth")
    talk.ask([user("one"), first, user("other"), Message(Role.ASSISTANT, "fourth"), user("more")], "fifth")
    trajectory = talk.close()
    assert [(t.start, t.stop, t.num_context) for t in trajectory.threads] == [(0, 6, 1), (6, 12, 3)]
    assert [trajectory.messages[i].content for i in trajectory.own_turns] == [
        "first", "second", "third", "fourth", "fifth",
    ]  # fmt: skip
    assert_whole(talk, trajectory)
    branch = trajectory.token_paths[1]
    said = branch.token[branch.message == 7]
    np.testing.assert_array_equal(said[: len("first")], sampled(talk.voice, "first").token[:-1])
    assert set(branch.source[branch.message == 7]) == {Source.PROMPT}


def test_a_branch_of_a_branch_still_has_the_tokens_of_both():
    talk = Talk()
    first = talk.ask([user("one")], "first")
    a = [user("one"), first, user("a")]
    talk.ask([user("one"), first, user("z")], "zeroth")
    said = talk.ask(a, "alpha")
    talk.ask([*a, said, user("x")], "xi")
    talk.ask([*a, said, user("y")], "ypsilon")
    trajectory = talk.close()
    assert [t.num_context for t in trajectory.threads] == [1, 3, 5]
    assert_whole(talk, trajectory)
    own = {trajectory.messages[i].content for i in trajectory.own_turns}
    assert own == {"first", "zeroth", "alpha", "xi", "ypsilon"}


def test_turns_of_several_conversations_keep_the_order_in_which_they_were_said():
    talk = Talk()
    first = talk.ask([user("one")], "first")
    talk.ask([user("help")], "second")
    third = talk.ask([user("one"), first, user("two")], "third")
    slow, quick = talk.begin([user("slow")]), talk.begin([user("one"), first, user("two"), third, user("three")])
    talk.episode.finish(quick, sampled(talk.voice, "fourth"))
    talk.episode.finish(slow, sampled(talk.voice, "fifth"))
    trajectory = talk.close()
    assert [thread.times for thread in trajectory.threads] == [(0, 2, 3), (1,), (4,)]
    said = [trajectory.messages[i].content for i in trajectory.own_turns]
    assert said == ["first", "second", "third", "fourth", "fifth"]
    untimed = replace(trajectory, threads=tuple(replace(thread, times=()) for thread in trajectory.threads))
    assert untimed.own_turns == tuple(sorted(trajectory.own_turns))
    assert [place.message for place in steps_of(trajectory, "turn")] == list(trajectory.own_turns)


def test_words_put_into_the_policys_mouth_are_context():
    talk = Talk()
    first = talk.ask([user("one")], "first")
    talk.ask([user("one"), first, user("two"), Message(Role.ASSISTANT, "invented"), user("three")], "third")
    talk.ask([user("one"), Message(Role.ASSISTANT, "rewritten"), user("two")], "other")
    trajectory = talk.close()
    assert [t.num_context for t in trajectory.threads] == [1, 5, 3]
    assert_whole(talk, trajectory)
    assert [trajectory.messages[i].content for i in trajectory.own_turns] == ["first", "third", "other"]


def test_a_reply_that_was_given_up_can_be_asked_for_again():
    talk = Talk()
    first = talk.ask([user("one")], "first")
    follow = [user("one"), first, user("two")]
    talk.episode.give_up(talk.begin(follow))
    again = talk.begin(follow)
    assert again.number == 2
    talk.episode.finish(again, sampled(talk.voice, "second"))
    trajectory = talk.close()
    assert len(trajectory.threads) == 1
    assert_whole(talk, trajectory)


def test_draws_are_functions_of_what_is_asked_and_not_of_who_asks_first():
    a, b, c = [user("a")], [user("b")], [user("b")]
    one, other = Talk(), Talk()
    forward = [one.begin(m) for m in (a, b, c)]
    backward = [other.begin(m) for m in (c, a, b)]
    assert {(t.thread.key, t.seed) for t in forward} == {(t.thread.key, t.seed) for t in backward}
    assert len({t.thread.key for t in forward}) == 3


def test_every_turn_and_every_seed_of_a_request_draws_anew():
    talk = Talk()
    messages, seeds = [user("one")], []
    for number in range(3):
        turn = talk.begin(messages)
        seeds.append(turn.seed)
        messages += [talk.episode.finish(turn, sampled(talk.voice, "said")), user(str(number))]
    assert len(set(seeds)) == 3
    other = Talk()
    assert other.episode.begin((user("one"),), (), 5, 1000).seed not in seeds


def test_a_context_that_is_full_ends_by_length_unless_less_is_asked():
    talk = Talk(max_context=40)
    first = talk.ask([user("one")], "first")
    long = [user("one"), first, user("word " * 40)]
    for _ in range(2):
        with pytest.raises(RefusedError, match="maximum context length is 40 tokens") as refused:
            talk.begin(long)
        assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")
    assert talk.close().ended is Ended.LENGTH
    assert talk.close(ended=Ended.ERROR).ended is Ended.ERROR  # as who closes it says
    for outside in (Ended.ERROR, Ended.DEADLINE, Ended.INTERRUPTED):
        talk.episode.stop(outside)  # it has no room left to go on with
        assert talk.close().ended is Ended.LENGTH
    talk.episode.stop(Ended.MAX_TURNS)
    assert talk.close().ended is Ended.MAX_TURNS
    talk.episode.ended = None
    talk.ask([user("short")], "second")
    trajectory = talk.close()
    assert trajectory.ended is Ended.DONE
    assert [t.stop - t.start for t in trajectory.threads] == [3, 2]
    assert_whole(talk, trajectory)


def test_messages_that_the_template_refuses_are_refused_and_harm_nothing():
    talk = Talk()
    first = talk.ask([user("one")], "first")
    system = Message(Role.SYSTEM, "late")
    for _ in range(2):
        with pytest.raises(RefusedError, match="a system message must come first"):
            talk.begin([user("one"), first, system])
    talk.ask([user("one"), first, user("two")], "second")
    trajectory = talk.close()
    assert [trajectory.messages[i].content for i in trajectory.own_turns] == ["first", "second"]
    assert_whole(talk, trajectory)


def test_nothing_asked_and_nothing_said_are_trajectories_too():
    talk = Talk()
    assert talk.episode.is_empty
    empty = talk.episode.close(FROM, Outcome(0.0, 0.0, False), notes={"error": "it crashed", "reason": ""}).trajectory
    assert (empty.messages, empty.threads, empty.token_paths) == ((), (), ())
    assert empty.extra["error"] == "it crashed" and "reason" not in empty.extra
    talk.episode.give_up(talk.begin([user("one")]))
    unsaid = talk.close()
    assert [m.content for m in unsaid.messages] == ["one"] and unsaid.own_turns == ()


def test_another_model_can_render_all_the_threads_again():
    talk = Talk()
    first = talk.ask([user("one")], "first")
    talk.ask([user("one"), first, user("two")], "second")
    talk.ask([user("one"), first, user("other")], "third")
    trajectory = talk.close()
    assert trajectory_paths(talk.voice.renderer, trajectory) == trajectory.token_paths
    rendered = trajectory_paths(voice(thinking=True).renderer, trajectory)
    learned = {int(i) for path in rendered for i in np.unique(path.message[path.loss_mask])}
    assert learned == set(trajectory.own_turns)


def test_control_words_in_messages_stay_text():
    talk = Talk()
    turn = talk.begin([user("x" + "".join(CONTROL))])
    controls = {talk.voice.renderer.tokenizer.convert_tokens_to_ids(word) for word in CONTROL}
    # Of the template alone: the turn's opening, its end, and the opening of the reply.
    assert sum(int(token) in controls for token in turn.context) == 3
