"""An environment of one's own, in a module of one's own: `name = "module:Class"`.

The module is found where Python finds modules, and in the folder that prefloop was started in. Its class is an
`Environment`; what else the table of the run file holds is what its `settings_class` asks for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

from pydantic import ConfigDict, model_validator

from prefloop.config import Settings, parse_settings
from prefloop.environments.base import Environment
from prefloop.environments.guarded import told_of
from prefloop.records import PrefloopError


class OwnSettings(Settings):
    """Settings of an environment of one's own: where its class is, and all that the class's own settings say."""

    model_config = ConfigDict(extra="allow")

    name: str

    @model_validator(mode="before")
    @classmethod
    def _as_its_class_asks(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or ":" not in str(given.get("name")):
            return given
        name, own = str(given["name"]), {key: value for key, value in given.items() if key != "name"}
        try:
            settings = _settings_of(_class_of(name), own)
        except PrefloopError as error:
            raise ValueError("; ".join(str(error).splitlines())) from error
        return {"name": name} if settings is None else {"name": name, **settings.model_dump(mode="json")}


def make_own(settings: OwnSettings) -> Environment:
    """The environment that these settings describe.

    Raises:
        PrefloopError: its class is not there or is no environment, or it cannot be made.
    """
    found = _class_of(settings.name)
    own = _settings_of(found, settings.model_extra or {})
    make: Callable[..., Environment] = found
    where = f"environment {settings.name}"
    environment = told_of(where, make if own is None else partial(make, own))
    name, max_turns = getattr(environment, "name", None), getattr(environment, "max_turns", None)
    if not isinstance(name, str) or not isinstance(max_turns, int) or max_turns < 1:
        raise PrefloopError(f"{where}: it should have a name (text) and max_turns (1 or more)")
    return environment


def _class_of(name: str) -> type[Environment]:
    module_name, _, class_name = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:  # that of a command holds the folder of the command
        sys.path.append(here)
    try:
        module = told_of(f"module {module_name}", partial(import_module, module_name))
    except PrefloopError as error:
        missing = error.__cause__.name if isinstance(error.__cause__, ModuleNotFoundError) else None
        if missing is None or not f"{module_name}.".startswith(f"{missing}."):  # not one that it imports
            raise
        raise PrefloopError(f"there is no module {missing}, neither installed nor in {here}") from None
    found = getattr(module, class_name, None)
    if not isinstance(found, type) or not issubclass(found, Environment):
        kind = "nothing" if found is None else f"{found!r:.60}"
        raise PrefloopError(
            f"{name} should be a subclass of prefloop.environments.base.Environment: "
            f"{getattr(module, '__file__', module_name)} has {kind} of that name"
        )
    return found


def _settings_of(found: type[Environment], given: Mapping[str, Any]) -> Settings | None:
    """The class's own settings, None where it has none."""
    model = found.settings_class
    if model is None:
        if given:
            raise PrefloopError(f"{found.__name__} has no settings (settings_class): leave out {', '.join(given)}")
        return None
    if not isinstance(model, type) or not issubclass(model, Settings) or "name" in model.model_fields:
        raise PrefloopError(
            f"{found.__name__}: its settings_class should be a subclass of prefloop.config.Settings without a name"
        )
    return parse_settings(model, given, found.__name__)
