"""A trajectory as a judge reads it: readable, and unable to speak with the judge's own voice.

Every line of untrusted text is quoted with `| `, so that it cannot forge a heading; what cannot be seen is made
visible; control tokens of chat templates are broken; and all of it stands between delimiters that hold a nonce.
The nonce is a hash of what is judged and by what: stable, so that the same question has the same hash, and
nothing that a text can contain on purpose.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from prefloop.clients.completion import Question
from prefloop.judges.rubric import Rubric
from prefloop.records import JSONObject, Message, Role, ToolCall, Trajectory, canonical_json, content_hash

NONCE_DIGITS = 16

_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_VARIATION_SUPPLEMENT = range(0xE0100, 0xE01F0)  # can carry arbitrary bytes unseen
_SUSPECT = re.compile(r"[^\n\t\x20-\x7e]")
# Beginnings of the control tokens of the chat templates in use.
_CONTROL_TOKEN = re.compile(
    r"[<\[](?=[|｜]|/?(?:s|bos|eos|pad|unk|mask|think|tool_call|tool_response|tool_calls|available_tools"
    r"|tool_results|start_of_turn|end_of_turn|begin_of_text|end_of_text|start_header_id|end_header_id|eot_id"
    r"|inst|sys)[|｜]?[>\]])|<(?=<\s*/?\s*SYS\s*>)",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")


@dataclass(frozen=True, slots=True)
class Prompts:
    """The templates of the judge's prompt, and their hash."""

    system: str
    user: str

    @property
    def hash(self) -> str:
        """The identity of both templates."""
        return content_hash("judge prompts", self.system, self.user)


@cache
def shipped_prompts() -> Prompts:
    """The templates in `judges/prompts`."""
    folder = files("prefloop.judges") / "prompts"
    return Prompts(*((folder / name).read_text(encoding="utf-8") for name in ("system.md", "user.md")))


def question(
    prompts: Prompts, rubric: Rubric, trajectory: Trajectory, tools: tuple[JSONObject, ...]
) -> tuple[Question, str]:
    """What the judge is asked about a trajectory, and the nonce that its verdict must repeat."""
    material = _material(trajectory, tools)
    nonce = content_hash("judge nonce", prompts.hash, rubric.hash, material)[:NONCE_DIGITS]
    example = ", ".join(f'"{criterion.name}": 0' for criterion in rubric.criteria)
    fields = {
        "nonce": nonce,
        "criteria": "\n".join(criterion.described() for criterion in rubric.criteria),
        "guidance": rubric.guidance,
        "material": material.replace(nonce, "(nonce)"),
        "scores_example": f"{{{example}}}",
    }
    return Question(fill(prompts.system, fields), fill(prompts.user, fields), rubric.verdict_schema()), nonce


def fill(template: str, fields: Mapping[str, str]) -> str:
    """The template with its placeholders replaced, in one pass: what is filled in is never expanded again."""
    return _PLACEHOLDER.sub(lambda match: fields[match[1]], template).strip()


def _material(trajectory: Trajectory, tools: tuple[JSONObject, ...]) -> str:
    sections = []
    conversations = trajectory.conversations(tools)
    for number, thread in enumerate(conversations):
        if len(conversations) > 1:
            sections.append(f"[conversation {number + 1} of {len(conversations)}, by the same agent]")
        if thread.tools:
            listed = "\n".join(quoted(canonical_json(tool)) for tool in thread.tools)
            sections.append(f"[tools the agent may call]\n{listed}")
        for position in range(thread.start, thread.stop):
            given = position < thread.start + thread.num_context
            sections.append(_section(position, trajectory.messages[position], given=given))
    sections.append(f"[end: {trajectory.ended.value}]")
    return "\n\n".join(sections)


def _section(position: int, message: Message, *, given: bool) -> str:
    who = "agent" if message.role is Role.ASSISTANT else message.role.value
    lines = [f"[message {position + 1}: {who}{', given with the task' if given else ''}]"]
    if message.reasoning_content:
        lines += ["[its reasoning]", quoted(message.reasoning_content)]
    if message.content or not message.tool_calls:
        lines += [*(["[its words]"] if message.reasoning_content else []), quoted(message.content)]
    for call in message.tool_calls:
        lines += ["[tool call]", quoted(_call_text(call))]
    return "\n".join(lines)


def _call_text(call: ToolCall) -> str:
    arguments = call.arguments if isinstance(call.arguments, str) else canonical_json(call.arguments)
    return f"{call.name} {arguments}"


def quoted(text: str) -> str:
    """Untrusted text, made visible, each line behind `| `."""
    return "\n".join(f"| {line}" for line in visible(text).split("\n"))


def visible(text: str) -> str:
    """Text without control tokens and with every unseen character written as `<U+hex>`; tab and newline stay."""
    text = _SUSPECT.sub(_shown, text.replace("\r\n", "\n"))
    return _CONTROL_TOKEN.sub(lambda match: f"{match[0]} ", text)


def _shown(match: re.Match[str]) -> str:
    character = match[0]
    unseen = unicodedata.category(character) in _INVISIBLE or ord(character) in _VARIATION_SUPPLEMENT
    return f"<U+{ord(character):04X}>" if unseen else character
