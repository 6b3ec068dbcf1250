"""Messages ↔ tokens, with the source of every token; untrusted text can never forge a control token."""

from prefloop.chat.calls import call_problem
from prefloop.chat.parse import AssistantParser
from prefloop.chat.paths import PathBuilder, render_demonstration, trajectory_paths
from prefloop.chat.render import ChatRenderer, RenderedPrompt
from prefloop.chat.steps import StepFinder, StepKind, StepPlace, own_tokens, steps_of
from prefloop.chat.turns import stop_ids

__all__ = [
    "AssistantParser",
    "ChatRenderer",
    "PathBuilder",
    "RenderedPrompt",
    "StepFinder",
    "StepKind",
    "StepPlace",
    "call_problem",
    "own_tokens",
    "render_demonstration",
    "steps_of",
    "stop_ids",
    "trajectory_paths",
]
