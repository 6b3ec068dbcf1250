"""The light protocols: settings are checked, replies hold what their status says, nothing imports torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from prefloop.clients.sampling import Reply, SamplingSettings
from prefloop.records import Message, PrefloopError, Role, Status


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"max_new_tokens": 0},
        {"x": 1},
    ],
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValidationError):
        SamplingSettings(**wrong)


def test_a_failed_reply_has_no_message():
    message = Message(Role.ASSISTANT, "hello")
    assert Reply(Status.OK, message).message is message
    for status, given in ((Status.OK, None), (Status.TIMEOUT, message)):
        with pytest.raises(PrefloopError, match=status.value):
            Reply(status, given)


def test_torch_is_not_imported():
    code = (
        "import sys, prefloop.clients.sampling, prefloop.clients.openai_sampler;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'openai')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
