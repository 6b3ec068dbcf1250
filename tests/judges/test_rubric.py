"""Rubric files: both forms, and what is wrong with a bad one."""

import pytest

from prefloop.judges.rubric import load_rubric
from prefloop.records import PrefloopError

TOML = """
name = "booking"
[[criteria]]
name = "outcome"
weight = 3
question = "Is the right flight booked?"
anchors = { 0 = "none", 5 = "the right one" }
[[criteria]]
name = "tone"
question = "Is it polite?"
anchors = { 0 = "rude", 5 = "kind" }
"""


def load(tmp_path, text, name="rubric.md"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_rubric(str(path))


def test_toml_and_markdown_give_the_same_criteria(tmp_path):
    plain = load(tmp_path, TOML, "rubric.toml")
    fronted = load(tmp_path, f"+++{TOML}+++\n\n# Guidance\n\nBe strict.\n")
    assert plain.criteria == fronted.criteria
    assert (plain.guidance, fronted.guidance) == ("", "# Guidance\n\nBe strict.")
    assert plain.hash != fronted.hash
    assert plain.value({"outcome": 5.0, "tone": 1.0}) == 4.0


def test_rounding_keeps_the_value_in_range(tmp_path):
    text = TOML.replace("weight = 3", "weight = 0.1")
    rubric = load(tmp_path, text)
    for point in range(6):
        assert rubric.value({"outcome": point, "tone": point}) == point


BAD = [
    ("name = ", "neither TOML nor Markdown"),
    ("+++\nname = 'x'\n", "front matter does not end"),
    (b"\xff\xfe", "neither TOML nor Markdown"),
    ("name = 'x'", "criteria is missing"),
    ("name = 'x'\ncriteria = []", "criteria should be"),
    (TOML.replace("weight", "wieght"), "did you mean weight"),
    (TOML.replace("weight = 3", "weight = 0"), "weight should be"),
    (TOML.replace("weight = 3", "weight = nan"), "weight should be"),
    (TOML.replace("weight = 3", "weight = '3'"), "weight should be"),
    (TOML.replace('name = "tone"', 'name = "outcome"'), "names of criteria should differ"),
    (TOML.replace('name = "tone"', 'name = "To ne"'), "name should"),
    (TOML.replace("5 =", "7 ="), "describe 0 and 5"),
    (TOML.replace("5 =", "4 ="), "describe 0 and 5"),
    (TOML.replace('"Is it polite?"', '""'), "question should"),
    (TOML + "hash = 'x'", "unknown key"),
    ("hash = 'x'\n" + TOML, "filled in from the file"),
    ("x" * 200_001, "larger than"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=range(len(BAD)))
def test_what_is_wrong_is_named(tmp_path, text, message):
    with pytest.raises(PrefloopError, match=message) as error:
        load(tmp_path, text)
    assert "rubric.md" in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PrefloopError, match=r"none\.md cannot be read: No such file"):
        load_rubric(str(tmp_path / "none.md"))
