"""What an agent acts in: a protocol of messages and tools, and the environments that are built in."""

from __future__ import annotations

from prefloop.environments.base import Environment
from prefloop.environments.booking import Booking, BookingSettings

EnvironmentSettings = BookingSettings


def make_environment(settings: EnvironmentSettings) -> Environment:
    """The environment that these settings describe."""
    return Booking(settings)
