"""Small stores to vote on, and the annotation page served from a thread: shared by the tests of the page."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from prefloop.feedback.queue import QueueSettings
from prefloop.records import AuthorKind, Ended, Message, Role, Task, ToolCall, Trajectory
from prefloop.store import Store
from prefloop.web.app import PageServer, open_server

CHROMIUM = Path("/usr/bin/chromium")
CHROMIUM_FLAGS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
KEY_OF = {"left": "a", "right": "b", "tie": "t", "both_bad": "x", "skip": "s"}


def attempt(task: Task, name: str, messages: Sequence[Message], *, author: str = "secret-author") -> Trajectory:
    """A trajectory of a task: its prompt and these messages."""
    return Trajectory(
        id=name,
        task_id=task.id,
        messages=(*task.messages, *messages),
        num_prompt_messages=len(task.messages),
        ended=Ended.DONE,
        author_kind=AuthorKind.CHECKPOINT,
        author=author,
    )


def prompt_task(seed: int, prompt: str = "Book me a flight to Tokyo.") -> Task:
    messages = (Message(Role.SYSTEM, "You book flights."), Message(Role.USER, f"{prompt} (request {seed})"))
    return Task("booking", {}, seed, messages)


def booking_attempt(task: Task, name: str, *, price: int, comment: str) -> Trajectory:
    """An attempt with two tool calls, one shared by all attempts of the task, then one that differs."""
    flights = [{"flight": f"NH{100 + i}", "price": 300 + 40 * i, "direct": i % 2 == 0} for i in range(4)]
    return attempt(
        task,
        name,
        [
            Message(Role.ASSISTANT, tool_calls=(ToolCall("search_flights", {"city": "Tokyo"}, f"{name}-1"),)),
            Message(Role.TOOL, json.dumps(flights), tool_call_id=f"{name}-1"),
            Message(
                Role.ASSISTANT,
                tool_calls=(ToolCall("filter_results", {"max_price": price, "direct": True}, f"{name}-2"),),
            ),
            Message(Role.TOOL, json.dumps(flights[: price // 200]), tool_call_id=f"{name}-2"),
            Message(Role.ASSISTANT, comment),
        ],
    )


def fill(store: Store, *, num_tasks: int, num_attempts: int = 2) -> list[Task]:
    """Put booking tasks with different attempts into the store."""
    tasks = [prompt_task(seed) for seed in range(num_tasks)]
    store.add_tasks(tasks)
    store.add_trajectories(
        booking_attempt(task, f"t{task.seed}-{i}", price=200 + 100 * i, comment=f"Booked flight number {i} for you.")
        for task in tasks
        for i in range(num_attempts)
    )
    return tasks


@contextmanager
def running_page(store: Store, settings: QueueSettings | None = None, rater: str = "tester") -> Iterator[PageServer]:
    """The annotation page on a free port, served from a thread; its address is `.url`."""
    page = open_server(store, settings or QueueSettings(), rater, port=0)
    thread = threading.Thread(target=page.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not page.server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    assert page.server.started
    try:
        yield page
    finally:
        page.stop()
        thread.join(20)
        assert not thread.is_alive()


@contextmanager
def chromium(**context_options: object) -> Iterator[object]:
    """A playwright browser context in headless Chromium; skips the test where either is not installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip("there is no Chromium at /usr/bin/chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=CHROMIUM_FLAGS, chromium_sandbox=False)
        try:
            yield browser.new_context(**context_options)
        finally:
            browser.close()


def wait_ready(page) -> None:
    """Wait until the page takes votes."""
    page.wait_for_selector("body[data-state=ready]")


def press(page, key: str) -> None:
    """Press a key and wait until what it did is saved and the next pair is there."""
    wait_ready(page)
    before = page.inner_text("#num-voted")
    page.keyboard.press(key)
    page.wait_for_function(
        "before => document.body.dataset.state === 'ready'"
        " && document.getElementById('num-voted').textContent !== before",
        arg=before,
    )


def side_text(page, side: str) -> str:
    """What a side of the pair reads, folded parts included; `side` is "left" or "right"."""
    return page.eval_on_selector(f"section[data-side={side}]", "element => element.textContent")


def vote_by_taste(page, prefers_left: Callable[[str, str], bool], num: int) -> int:
    """Vote on up to `num` pairs by a planted taste; returns how many there were.

    `page` is a playwright page on the annotation page; `prefers_left(left, right)` is given the text of both sides
    from the first difference on, and says whether the left is better.
    """
    for voted in range(num):
        wait_ready(page)
        if page.query_selector("#pair") is None:
            return voted
        left, right = side_text(page, "left"), side_text(page, "right")
        press(page, KEY_OF["left" if prefers_left(left, right) else "right"])
    return num
