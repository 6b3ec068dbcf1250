"""Trajectories, stores and settings that the tests of judges share."""

from __future__ import annotations

from pathlib import Path

from prefloop.clients.retry import RetrySettings
from prefloop.judges.base import JudgeItem
from prefloop.judges.llm import LLMJudgeSettings
from prefloop.records import AuthorKind, Ended, Message, Role, Task, ToolCall, Trajectory, content_hash
from prefloop.store.store import Store

MODEL = "claude-test-20260101"
QUICK = RetrySettings(num_attempts=3, base_wait_s=0.01, max_wait_s=0.3, timeout_s=5.0, deadline_s=20.0)


def make_item(text: str = "Booked.", *, sample: int = 0) -> JudgeItem:
    """A short booking run whose last words are `text`."""
    prompt = (Message(Role.SYSTEM, "You book flights."), Message(Role.USER, "Oslo, under $600, direct."))
    task = Task("booking", {"city": "Oslo"}, 7, prompt, ({"type": "function", "function": {"name": "book_flight"}},))
    call = ToolCall("book_flight", {"flight_id": "KE17"}, "c1")
    messages = (
        *prompt,
        Message(Role.ASSISTANT, tool_calls=(call,)),
        Message(Role.TOOL, '{"status": "booked"}', tool_call_id="c1"),
        Message(Role.ASSISTANT, text),
    )
    key = content_hash("test trajectory", text, sample)
    return JudgeItem(task, Trajectory(key, task.id, messages, 2, Ended.DONE, AuthorKind.DEMONSTRATOR, "d"))


def make_items(*texts: str) -> list[JudgeItem]:
    return [make_item(text) for text in texts]


def open_store(folder: Path, items: list[JudgeItem]) -> Store:
    """A store that holds the items' tasks and trajectories."""
    store = Store(str(folder / "store.db"))
    with store.transaction():
        store.add_tasks(item.task for item in items)
        store.add_trajectories(item.trajectory for item in items)
    return store


def settings(url: str, **changes: object) -> LLMJudgeSettings:
    """Settings of an Anthropic judge on a fake server."""
    base = {"provider": "anthropic", "model": MODEL, "base_url": url, "retry": QUICK, "num_asks": 1}
    return LLMJudgeSettings(**{**base, **changes})
