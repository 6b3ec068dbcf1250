"""How models write tool calls: one reader for each format, and what is wrong with a call."""

from typing import Final, Literal, TypeAlias

from prefloop.chat.calls.base import CallFormat, Placed, Reading
from prefloop.chat.calls.harmony import Harmony
from prefloop.chat.calls.llama import Llama3
from prefloop.chat.calls.problems import call_problem
from prefloop.chat.calls.tagged import Tagged, read_glm, read_hermes, read_xml

ToolFormat: TypeAlias = Literal["auto", "hermes", "xml", "glm", "harmony", "llama3", "response_template", "text"]

CALL_FORMATS: Final[dict[str, CallFormat]] = {
    "hermes": Tagged(read_hermes, quoted=True),
    "xml": Tagged(read_xml),
    "glm": Tagged(read_glm),
    "harmony": Harmony(),
    "llama3": Llama3(),
}
"""The formats by name, in the order in which `auto` tries them."""

__all__ = ["CALL_FORMATS", "CallFormat", "Placed", "Reading", "ToolFormat", "call_problem"]
