"""Where turns begin is found by comparing texts: it must be where the layouts of all the prompts say."""

import pytest

pytest.importorskip("trl", reason="the extra 'test' is not installed")

from families import CASES, STEMS, renderer_for

from prefloop.chat.breaks import PromptEnds, UnclearError
from prefloop.chat.template import StoppedError, stoppable
from prefloop.records import Message, PrefloopError, Role


def _all_pieces(renderer, messages, tools):
    rendering = renderer.begin(messages, tools)
    found = []
    for prompt in (True, False):
        try:
            found.append(renderer.pieces(rendering, len(messages), prompt))
        except PrefloopError as error:
            found.append(str(error))
    return found


def _unclear(self, turn):
    raise UnclearError


@pytest.mark.parametrize("stem", STEMS)
def test_texts_and_layouts_agree_on_where_turns_begin(stem, monkeypatch):
    more = (Message(Role.USER, "And?"), Message(Role.ASSISTANT, "\n Done "), Message(Role.USER, " So?\n"))
    for messages, tools in CASES.values():
        renderer = renderer_for(stem)
        renderer._layouts.clear()
        quick = _all_pieces(renderer, (*messages, *more), tools)
        with monkeypatch.context() as patch:
            patch.setattr(PromptEnds, "place", _unclear)
            renderer._layouts.clear()
            assert _all_pieces(renderer, (*messages, *more), tools) == quick
        renderer._layouts.clear()


def test_a_long_conversation_takes_a_few_runs_of_the_template_for_each_turn(monkeypatch):
    """And no memory that grows with the square of its length, nor a stack that does with its length."""
    renderer = renderer_for("qwen2_5")
    renderer._layouts.clear()
    messages = [Message(role, f"{index}") for index in range(120) for role in (Role.USER, Role.ASSISTANT)]
    runs = []
    monkeypatch.setattr(renderer, "_template", _Counted(renderer._template, runs))
    pieces = renderer.pieces(renderer.begin(messages), len(messages), True)
    assert sum(piece.breaks for piece in pieces) == 120
    assert len(runs) <= 2 * 120 + 2 and len(renderer._layouts) == 1


class _Counted:
    def __init__(self, template, runs):
        self._template, self._runs = template, runs

    def __getattr__(self, name):
        return getattr(self._template, name)

    def render(self, *data):
        self._runs.append(len(data[0]))
        return self._template.render(*data)


def test_a_rendering_can_be_stopped_and_leaves_nothing_behind():
    renderer = renderer_for("qwen2_5")
    messages = [Message(Role.USER, "stop"), Message(Role.ASSISTANT, "it", "now"), Message(Role.USER, "")]
    with pytest.raises(StoppedError), stoppable(lambda: True):
        renderer.render_prompt(messages)
    assert len(renderer.render_prompt(messages).token)
