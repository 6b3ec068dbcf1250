"""Messages ↔ tokens, with the source of every token; untrusted text can never forge a control token."""

from prefloop.chat.parse import AssistantParser
from prefloop.chat.paths import PathBuilder, render_demonstration, stop_ids
from prefloop.chat.render import ChatRenderer, RenderedPrompt

__all__ = ["AssistantParser", "ChatRenderer", "PathBuilder", "RenderedPrompt", "render_demonstration", "stop_ids"]
