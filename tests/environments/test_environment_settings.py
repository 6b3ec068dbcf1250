"""What a run file may say of its environment."""

import pytest
from pydantic import TypeAdapter, ValidationError

from prefloop.environments import EnvironmentSettings
from prefloop.environments.arithmetic import Arithmetic, ArithmeticSettings
from prefloop.records import Split

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
