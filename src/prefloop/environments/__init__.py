"""What an agent acts in: a protocol of messages and tools, and the environments that are built in."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

from prefloop.environments.agent import Agent, AgentSettings
from prefloop.environments.agentdojo import AgentDojo, AgentDojoSettings
from prefloop.environments.arithmetic import Arithmetic, ArithmeticSettings
from prefloop.environments.base import TaskSource
from prefloop.environments.booking import Booking, BookingSettings
from prefloop.environments.dialogue import Dialogue, DialogueSettings
from prefloop.environments.mcp import MCP, MCPSettings
from prefloop.environments.prompts import Prompts, PromptsSettings
from prefloop.environments.reasoning_gym import ReasoningGym, ReasoningGymSettings

EnvironmentSettings: TypeAlias = Annotated[
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


def make_environment(settings: EnvironmentSettings) -> TaskSource:
    """What these settings describe: an environment, or an agent with its own."""
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
