"""What a run file may say of its environment."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from prefloop.config import Settings, parse_settings, settings_hash
from prefloop.environments import EnvironmentSettings, make_environment
from prefloop.environments.agent import RUN_LIMITS
from prefloop.environments.arithmetic import Arithmetic, ArithmeticSettings
from prefloop.environments.own import OwnSettings
from prefloop.records import PrefloopError, Split

ANY = TypeAdapter(EnvironmentSettings)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("booking", "max_turns", 0),
        ("booking", "invented_id_penalty", -0.1),
        ("booking", "error_penalty", -0.1),
        ("booking", "extra_turn_penalty", -0.1),
        ("booking", "chatter_penalty", -0.1),
        ("dialogue", "max_turns", 0),
        ("dialogue", "question_penalty", -0.1),
        ("dialogue", "unclear_penalty", -0.1),
        ("arithmetic", "modulus", 10**9 + 1),
    ],
)
def test_what_leaves_nothing_to_do_or_pays_for_mistakes_is_refused(name, key, value):
    ANY.validate_python({"name": name})
    with pytest.raises(ValidationError, match=key):
        ANY.validate_python({"name": name, key: value})


def test_at_the_largest_modulus_the_faultless_succeed():
    environment = Arithmetic(ArithmeticSettings(modulus=10**9, error_rate=0.0))
    assert all(environment.demonstrate(task, 0)[1].success for task in environment.tasks(Split.TRAIN, 20))


OWN = """
from pydantic import Field

from prefloop.config import Settings
from prefloop.environments.base import Environment, Episode


class GameSettings(Settings):
    size: int = Field(default=7, ge=1)
    step_deadline_s: float = 5.0


class Plain(Environment):
    name, max_turns = "plain", 3

    def tasks(self, split, num, *, first=0):
        return []

    def reset(self, task, seed):
        return Episode()


class Game(Plain):
    settings_class = GameSettings

    def __init__(self, settings):
        self.settings = settings
        self.step_deadline_s = settings.step_deadline_s
        if settings.size == 13:
            raise LookupError("an unlucky number")


class Unfinished(Environment):
    pass


class Endless(Plain):
    max_turns = 0


class Named(Plain):
    class settings_class(Settings):
        name: str = "mine"
"""


class File(Settings):
    """As much of a run file as is about environments."""

    environment: EnvironmentSettings


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with modules of somebody's own, in which prefloop was started."""
    (tmp_path / "own_game.py").write_text(OWN)
    (tmp_path / "own_broken.py").write_text("import nothing_like_it\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("own_game", None)


def read(**environment: object) -> File:
    return parse_settings(File, {"environment": environment}, "run.toml")


@pytest.mark.usefixtures("own")
def test_a_class_of_ones_own_gets_its_own_settings_and_a_run_knows_them_all():
    settings = read(name="own_game:Game", size=3)
    environment = make_environment(settings.environment)
    assert (environment.name, environment.settings.size, environment.step_deadline_s) == ("plain", 3, 5.0)
    kept = settings.model_dump(mode="json")
    assert kept == {"environment": {"name": "own_game:Game", "size": 3, "step_deadline_s": 5.0}}
    assert parse_settings(File, kept, "store") == settings
    assert settings_hash(settings) == settings_hash(read(name="own_game:Game", size=3, step_deadline_s=5.0))
    assert settings_hash(settings) != settings_hash(read(name="own_game:Game"))
    assert settings.environment.model_dump(exclude=RUN_LIMITS) == {"name": "own_game:Game", "size": 3}


@pytest.mark.usefixtures("own")
def test_a_class_without_settings_is_made_with_nothing():
    assert make_environment(read(name="own_game:Plain").environment).name == "plain"


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"name": "own_gam:Game"}, "there is no module own_gam, neither installed nor in "),
        ({"name": "own_game.parts:Game"}, "there is no module own_game.parts, neither installed nor in "),
        ({"name": "own_broken:Game"},
         "module own_broken raised ModuleNotFoundError: No module named 'nothing_like_it' ({own}/own_broken.py:1)"),
        ({"name": "own_game:Gam"}, "own_game:Gam should be a subclass of prefloop.environments.base.Environment: "
         "{own}/own_game.py has nothing of that name"),
        ({"name": "own_game:GameSettings"}, "own_game:GameSettings should be a subclass of prefloop.environments.base"),
        ({"name": "own_game:Game", "siez": 3, "step_deadline_s": "5"}, "Game: unknown key siez; did you mean size?; "
         'Game: step_deadline_s should be a valid number, not "5"'),
        ({"name": "own_game:Game", "size": 0}, "Game: size should be greater than or equal to 1, not 0"),
        ({"name": "own_game:Plain", "size": 3}, "Plain has no settings (settings_class): leave out size"),
        ({"name": "own_game:Named"}, "Named: its settings_class should be a subclass of prefloop.config.Settings with"),
    ],
)  # fmt: skip
def test_what_a_run_file_gets_wrong_about_ones_own_is_told_in_one_line(own, environment, problem):
    with pytest.raises(PrefloopError) as failed:
        read(**environment)
    assert str(failed.value).startswith(f"run.toml: environment: {problem.replace('{own}', str(own))}")
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"name": "own_game:Game", "size": 13}, "raised LookupError: an unlucky number ({own}/own_game.py:"),
        ({"name": "own_game:Unfinished"}, "raised TypeError: Can't instantiate abstract class Unfinished"),
        ({"name": "own_game:Endless"}, "it should have a name (text) and max_turns (1 or more)"),
    ],
)
def test_what_cannot_be_made_is_told_in_one_line(own, environment, problem):
    settings = read(**environment)
    assert isinstance(settings.environment, OwnSettings)
    with pytest.raises(PrefloopError) as failed:
        make_environment(settings.environment)
    where = f"environment {environment['name']}"
    assert str(failed.value).removeprefix(where).lstrip(": ").startswith(problem.replace("{own}", str(own)))


def test_a_name_that_is_none_is_told_as_ever():
    with pytest.raises(PrefloopError, match=r"^run.toml: environment.name should be one of 'agent', 'agentdojo', "):
        read(name="bookin")
