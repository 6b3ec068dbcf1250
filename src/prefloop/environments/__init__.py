"""What an agent acts in: a protocol of messages and tools, and the environments that are built in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

from pydantic import Discriminator, Field, Tag

from prefloop.environments.agent import Agent, AgentSettings
from prefloop.environments.agentdojo import AgentDojo, AgentDojoSettings
from prefloop.environments.arithmetic import Arithmetic, ArithmeticSettings
from prefloop.environments.base import TaskSource
from prefloop.environments.booking import Booking, BookingSettings
from prefloop.environments.dialogue import Dialogue, DialogueSettings
from prefloop.environments.mcp import MCP, MCPSettings
from prefloop.environments.own import OwnSettings, make_own
from prefloop.environments.prompts import Prompts, PromptsSettings
from prefloop.environments.reasoning_gym import ReasoningGym, ReasoningGymSettings

BuiltIn: TypeAlias = Annotated[
    AgentSettings
    | AgentDojoSettings
    | ArithmeticSettings
    | BookingSettings
    | DialogueSettings
    | MCPSettings
    | PromptsSettings
    | ReasoningGymSettings,
    Field(discriminator="name"),
]


def _kind(given: Any) -> str:
    name = given.get("name") if isinstance(given, Mapping) else getattr(given, "name", None)
    return "own" if ":" in str(name) else "built in"


EnvironmentSettings: TypeAlias = Annotated[
    Annotated[BuiltIn, Tag("built in")] | Annotated[OwnSettings, Tag("own")], Discriminator(_kind)
]


def make_environment(settings: EnvironmentSettings) -> TaskSource:
    """What these settings describe: an environment, or an agent with its own.

    Raises:
        PrefloopError: it is somebody's own and cannot be made.
    """
    if isinstance(settings, OwnSettings):
        return make_own(settings)
    if isinstance(settings, AgentSettings):
        return Agent(settings)
    if isinstance(settings, AgentDojoSettings):
        return AgentDojo(settings)
    if isinstance(settings, ArithmeticSettings):
        return Arithmetic(settings)
    if isinstance(settings, BookingSettings):
        return Booking(settings)
    if isinstance(settings, DialogueSettings):
        return Dialogue(settings)
    if isinstance(settings, MCPSettings):
        return MCP(settings)
    if isinstance(settings, PromptsSettings):
        return Prompts(settings)
    return ReasoningGym(settings)
