"""`prefloop chat` with an environment that fails: it is said, and the conversation goes on."""

from __future__ import annotations

import io
import sys
import threading

import pytest
from tiny_runs import tiny_run

from prefloop.cli import main
from prefloop.environments.booking import Booking, BookingEpisode
from prefloop.records import Message, Role, ToolCall
from prefloop.stages import talking
from prefloop.stages.context import opened
from prefloop.stages.start import start_policy


@pytest.fixture
def chat(tmp_path, monkeypatch, capsys):
    """Say two lines to a policy that calls a tool whenever a person has spoken; gives what was printed."""
    monkeypatch.chdir(tmp_path)
    with tiny_run() as run, opened(run):
        checkpoint = start_policy(run)

    def answer(conversation):
        if conversation._messages[-1].role is Role.TOOL:
            return Message(Role.ASSISTANT, "There are some.")
        call = ToolCall("search_flights", {"city": "Tokyo"}, f"call_{len(conversation._messages)}")
        return Message(Role.ASSISTANT, tool_calls=(call,))

    def talk():
        monkeypatch.setattr(sys, "stdin", io.StringIO("Tokyo?\nTokyo again?\n"))
        assert main(["chat", checkpoint, "--store", "runs/prefloop.db"]) == 0
        return capsys.readouterr().out

    monkeypatch.setattr(talking._Conversation, "_answer", answer)
    return talk


def test_tools_answer(chat):
    printed = chat()
    assert "tools: search_flights" in printed and printed.count("There are some.") == 2
    assert "begun anew" not in printed


def test_what_an_environment_raises_ends_the_conversation_and_not_the_command(chat, monkeypatch):
    monkeypatch.setattr(BookingEpisode, "step", lambda *_: 1 / 0)
    printed = chat()
    assert printed.count("environment raised ZeroDivisionError: division by zero") == 2
    assert printed.count("begun anew") == 2


def test_an_environment_that_hangs_is_left(chat, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(BookingEpisode, "step", lambda *_: gate.wait())
    monkeypatch.setattr(Booking, "step_deadline_s", 0.1)
    try:
        assert chat().count("no answer within 0.1 s") == 2
    finally:
        gate.set()


def test_without_an_environment_there_are_no_tools(chat, monkeypatch):
    monkeypatch.setattr(Booking, "reset", lambda *_: 1 / 0)
    printed = chat()
    assert "no tools: environment raised ZeroDivisionError" in printed
    assert printed.count("search_flights {") == 2 and "There are some" not in printed
