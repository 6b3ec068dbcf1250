"""The page on objectives says what the registry does."""

import json
import re
from pathlib import Path

from loss_makers import PAIR_LOSSES

from prefloop.losses.registry import ADDED, OBJECTIVES

PAGE = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text(encoding="utf-8")


def rows(*cells):
    """The rows of the page's tables of this width, whose first cell is a name."""
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line[:3] == "| `"]
    return [row for row in found if len(row) == len(cells)]


def shown(value):
    return json.dumps(value, ensure_ascii=False)


def test_every_objective_is_on_the_page_once_with_its_knobs_and_their_defaults():
    documented = {}
    for name, _, knobs, _ in rows("objective", "loss", "knobs", "TRL"):
        assert name.strip("`") not in documented
        documented[name.strip("`")] = dict(re.findall(r"`(\w+) = ([^`]+)`", knobs))
    expected = {
        name: {
            key: shown(value)
            for key, value in found.knobs.items()
            if not (name in PAIR_LOSSES and key in ADDED and value == ADDED[key])
        }
        for name, found in OBJECTIVES.items()
        if not found.fresh  # of those docs/algorithms.md speaks
    }
    assert documented == expected


def test_what_is_added_to_pairs_is_on_the_page_with_its_defaults():
    documented = {name.strip("`"): default.strip("`") for name, default, _ in rows("knob", "default", "meaning")}
    assert documented == {key: shown(value) for key, value in ADDED.items()}


def test_the_objectives_that_leave_shared_tokens_alone_are_those_of_the_tests():
    from test_shared_prefix import OF_THE_DIFFERENCE

    (sentence,) = re.findall(r"In (`dpo`, [^.]+) they get no gradient at all", " ".join(PAGE.split()))
    assert set(re.findall(r"`(\w+)`", sentence)) == {label.split()[0] for label in OF_THE_DIFFERENCE} - {"f_dpo"}


def test_every_objective_s_own_file_is_linked():
    for name in PAIR_LOSSES:
        assert f"../src/prefloop/losses/{OBJECTIVES[name].function.split('.')[0]}.py" in PAGE
