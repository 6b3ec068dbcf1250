"""Messages ↔ tokens, with the source of every token; untrusted text can never forge a control token."""

from prefloop.chat.paths import PathBuilder, render_demonstration
from prefloop.chat.render import ChatRenderer, RenderedPrompt

__all__ = ["ChatRenderer", "PathBuilder", "RenderedPrompt", "render_demonstration"]
