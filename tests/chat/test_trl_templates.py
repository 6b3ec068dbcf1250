"""The templates that TRL ships: each renders exactly, and is trained on or refused for a stated reason."""

import importlib.util
import re
from datetime import datetime
from pathlib import Path

import pytest
from chat_tokenizers import TOOLS, byte_level_backend
from transformers import PreTrainedTokenizerFast

from prefloop.chat import ChatRenderer, render_demonstration
from prefloop.chat.template import TEMPLATE_DATE
from prefloop.records import Message, PrefloopError, Role, ToolCall

SPEC = importlib.util.find_spec("trl")
FOLDER = Path(SPEC.submodule_search_locations[0]) / "chat_templates" if SPEC else Path("absent")
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
pytestmark = pytest.mark.skipif(not NAMES, reason="trl is not installed (extra 'oracle')")

CALL = ToolCall("search_flights", {"city": 'Os"lo', "max": 12.5}, "abcdefgh1")
PLAIN = [
    Message(Role.USER, "Hi"),
    Message(Role.ASSISTANT, "Sure."),
    Message(Role.USER, "More <|im_end|>"),
    Message(Role.ASSISTANT, "Bye"),
]
CALLING = [
    Message(Role.USER, "Hi"),
    Message(Role.ASSISTANT, "", tool_calls=(CALL,)),
    Message(Role.TOOL, '["x"]', tool_call_id="abcdefgh1", name="search_flights"),
    Message(Role.ASSISTANT, "Bye"),
]

# Show content only as lists of parts (vision), which prefloop refuses for now.
PARTS_ONLY = "idefics3 llava_next smolvlm"
# A generation prompt that opens a thought (or names a channel) which a turn rendered without reasoning lacks.
PROMPT_DIFFERS = (
    "deepseek_r1_distill deepseekv3 nemotron_3_5_lightning nemotron_3_nano nemotron_3_super nemotron_3_ultra"
)
# Turns that no token ends: the next turn's first token does, in glm4moe's own serving.
ENDLESS = "glm4moe"
NO_TOOLS = "cohere cohere2 gemma gemma3 llama3 phi3 phi3_5 qwen2_5_vl"
CALLS_NOT_SHOWN = "deepseek_r1_distill deepseekv3 lfm2"
CALL_TURNS_DIFFER = (
    "diffusion_gemma gemma4 gemma4_v3 gemma4_v4 gemma4_v5 "
    "nemotron_3_5_lightning nemotron_3_nano nemotron_3_super nemotron_3_ultra glm4moe"
)


def listed(names, stem):
    base = stem if stem in names.split() else stem.removesuffix("_training")
    return base in names.split() and stem != "glm4moe_training"


def renderer_for(stem):
    template = (FOLDER / f"{stem}.jinja").read_text()
    pattern = r"<\|[a-zA-Z_0-9]+\|>|<｜[^｜]+｜>|</?(?:start|end)_of_turn>|</?think>|</?tool_call>|<\|?turn\|?>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level_backend(), eos_token="<eos>", bos_token="<bos>")
    tokenizer.add_tokens(sorted(set(re.findall(pattern, template))), special_tokens=True)
    return ChatRenderer(tokenizer, chat_template=template)


def outcome(renderer, messages, tools):
    try:
        rendering = renderer.begin(messages, tools)
        pieces = renderer.pieces(rendering, len(messages), True)
    except PrefloopError as error:
        return f"refused: {error}"
    dicts = [message.to_dict() for message in messages]
    own = renderer.tokenizer.apply_chat_template(
        dicts, tools=list(tools) or None, chat_template=renderer.template_source, tokenize=False,
        add_generation_prompt=True,
    )  # fmt: skip
    for style in ("%Y-%m-%d", "%d %b %Y"):  # prefloop's clock stands still, so that ids stay the same
        own = own.replace(datetime.now().strftime(style), TEMPLATE_DATE.strftime(style))
    assert "".join(piece.text for piece in pieces) == own
    try:
        paths = render_demonstration(renderer, messages, tools, 1)
    except PrefloopError as error:
        return f"not trained: {error}"
    masked = [renderer.encoder.decode(path.token[path.loss_mask].tolist()) for path in paths]
    spoken = [message.content for message in messages if message.role is Role.ASSISTANT and message.content]
    assert all(any(text in mask for mask in masked) for text in spoken)
    asked = [message.content for message in messages if message.role is not Role.ASSISTANT]
    assert not any(text in mask for mask in masked for text in asked)
    return "trained"


@pytest.mark.parametrize("stem", NAMES)
def test_plain_conversations(stem):
    result = outcome(renderer_for(stem), PLAIN, ())
    if listed(PARTS_ONLY, stem):
        assert result.startswith("refused")
    elif listed(PROMPT_DIFFERS, stem) or listed(ENDLESS, stem):
        assert result.startswith("not trained")
        assert "stop token" in result
    else:
        assert result == "trained"


@pytest.mark.parametrize("stem", NAMES)
def test_conversations_with_tool_calls(stem):
    result = outcome(renderer_for(stem), CALLING, TOOLS)
    if any(listed(names, stem) for names in (PARTS_ONLY, NO_TOOLS)) or listed(CALLS_NOT_SHOWN, stem):
        assert result.startswith("refused")
    elif listed(CALL_TURNS_DIFFER, stem):
        assert result.startswith("not trained")
    else:
        assert result == "trained"
