from dataclasses import replace

import pytest
from synthetic_run import RUN, SyntheticRun

from prefloop.records import AuthorKind, Ended, Message, Role, Thread, ToolCall, Trajectory
from prefloop.report import write_report
from prefloop.report.examples import WANTED, examples
from prefloop.report.messages import MAX_CHARS, MAX_MESSAGES, one_line, said, shown
from prefloop.report.record import read_run, verified_rater


def _tool(content):
    return shown([Message(Role.TOOL, content)])[0]


def test_lists_of_objects_read_as_tables():
    grid = _tool('[{"id": "A1", "price": 300, "direct": true}, {"id": "B2", "price": null}]').grid
    assert grid.columns == ("id", "price", "direct")
    assert grid.rows == (("A1", "300", "true"), ("B2", "null", ""))
    many = _tool(str([{"n": n} for n in range(40)]).replace("'", '"')).grid
    assert (len(many.rows), many.num_hidden) == (12, 28)


@pytest.mark.parametrize("content", ["[]", "[1, 2]", "{}", "plain", '[{"a": 1', "[" * 5000, "[{}]", ""])
def test_everything_else_stays_text(content):
    found = _tool(content)
    assert found.grid is None
    assert found.text.startswith(content[:MAX_CHARS])


def test_calls_keep_what_the_model_wrote():
    message = Message(Role.ASSISTANT, tool_calls=(ToolCall("f", {"a": 1, "b": "x"}), ToolCall("g", "{broken")))
    first, second = shown([message])[0].calls
    assert first.arguments == (("a", "1"), ("b", "x"))
    assert (second.arguments, second.raw) == ((), "{broken")


def test_long_texts_and_long_talks_are_cut_and_say_so():
    assert shown([Message(Role.USER, "x" * (MAX_CHARS + 5))])[0].text.endswith("… (5 characters more in the store)")
    talk = shown([Message(Role.USER, "x")] * (MAX_MESSAGES + 7))
    assert (len(talk), talk[-1].text) == (MAX_MESSAGES + 1, "… 7 messages more in the store")
    assert one_line("a  b\n" * 100, 10) == "a b a b a…"


def test_conversations_of_an_agent_have_headings():
    texts = ["task", "ask", "answer", "task of the helper", "help"]
    roles = [Role.USER, Role.ASSISTANT, Role.ASSISTANT, Role.USER, Role.ASSISTANT]
    messages = tuple(Message(role, text) for role, text in zip(roles, texts, strict=True))
    one = Trajectory("t", "task", messages, 1, Ended.DONE, AuthorKind.IMPORT, "a")
    assert [part.text for part in said(one)] == texts[1:]
    two = replace(one, threads=(Thread(0, 3, 1), Thread(3, 5, 1)))
    found = [part.text for part in said(two)]
    assert found == ["Conversation 1 of 2", "ask", "answer", "Conversation 2 of 2", "task of the helper", "help"]


def test_as_many_of_each_kind_as_wanted(store):
    SyntheticRun(store, num_tasks=96, num_iterations=1).build()
    found = examples(store, read_run(store, RUN), verified_rater(store, RUN))
    kinds = [example.kind for example in found.shown]
    assert {kind: kinds.count(kind) for kind in WANTED} == {k: min(found.counts[k], WANTED[k]) for k in WANTED}
    assert [example.number for example in found.shown] == list(range(1, len(kinds) + 1))
    for example in found.shown:
        start, end = {"won": (0, 1), "lost": (1, 0), "failed": (0, 0), "kept": (1, 1)}[example.kind]
        assert (example.start.success, example.end.success) == (start, end)


def test_long_trajectories_never_make_the_page_too_large(store, tmp_path):
    SyntheticRun(store, num_tasks=64, num_iterations=1, payload="<&" * 20_000).build()
    found = examples(store, read_run(store, RUN), verified_rater(store, RUN))
    assert 1 < len(found.shown) < 40
    assert {"won", "lost"} & {example.kind for example in found.shown}
    assert write_report(store, RUN, tmp_path / "large.html").stat().st_size < 3_000_000


def test_an_update_that_was_never_accepted_is_said(store, tmp_path):
    run = SyntheticRun(store, num_tasks=8, num_iterations=1).begin()
    run.evaluate(0, guard=False)
    run.rollout_to_curate(0)
    refused = {"learning_rate": 1e-4, "accepted": False, "reason": "KL 9.00 nats", "kl": 9.0}
    start = run.checkpoints[0]
    detail = {"checkpoint_id": start, "algorithm": "dpo", "steps": 3, "loss": [0.7, 0.6], "rolled_back": True}
    store.add_event(RUN, 0, "train", {**detail, "attempts": [refused, refused], "seconds": 1.0})
    markup = write_report(store, RUN, tmp_path / "x.html").read_text()
    assert "The guards refused 2 updates, which were rolled back; iteration 1 ended without a new policy." in markup
    assert "No gentler attempt was accepted; the policy stayed as it was." in markup
    assert "1 (rolled back)" in markup
