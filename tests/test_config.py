from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from prefloop.config import Settings, apply_overrides, parse_settings, read_run_file, settings_hash
from prefloop.records import PrefloopError


class Mode(StrEnum):
    FAST = "fast"
    SAFE = "safe"


class Train(Settings):
    learning_rate: float = Field(1e-3, gt=0)
    num_steps: int = Field(10, ge=1)
    mode: Mode = Mode.FAST
    betas: tuple[float, float] = (0.9, 0.95)

    @model_validator(mode="after")
    def _warm(self) -> "Train":
        if self.num_steps == 13:
            raise ValueError("num_steps should be anything but 13")
        return self


class RulesJudge(Settings):
    kind: Literal["rules"] = "rules"
    noise: float = 0.0


class LLMJudge(Settings):
    kind: Literal["llm"] = "llm"
    model: str


class Run(Settings):
    name: str
    seed: int = 0
    resume: bool = True
    limit: int | Literal["none"] = "none"
    output: Path | None = None
    train: Train = Train()
    judge: Annotated[RulesJudge | LLMJudge, Field(discriminator="kind")] = RulesJudge()
    stages: tuple[Train, ...] = ()


def problem(data: dict, where: str = "run.toml") -> str:
    with pytest.raises(PrefloopError) as caught:
        parse_settings(Run, data, where)
    return str(caught.value)


def test_a_run_file_becomes_settings(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text('name = "a"\noutput = "runs/a"\n[train]\nlearning_rate = 1\nmode = "safe"\nbetas = [0.5, 0.6]\n')
    run = parse_settings(Run, read_run_file(path), str(path))
    assert run.train == Train(learning_rate=1.0, mode=Mode.SAFE, betas=(0.5, 0.6))
    assert run.output == Path("runs/a")
    assert run.judge == RulesJudge()
    with pytest.raises(ValidationError, match="frozen"):
        run.seed = 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"naem": "a", "name": "b"}, "run.toml: unknown key naem; did you mean name?"),
        (
            {"name": "a", "train": {"learnin_rate": 1}},
            "run.toml: unknown key train.learnin_rate; did you mean learning_rate?",
        ),
        (
            {"name": "a", "judge": {"kind": "llm", "model": "m", "modle": 1}},
            "run.toml: unknown key judge.modle; did you mean model?",
        ),
        (
            {"name": "a", "stages": [{}, {"num_stesp": 1}]},
            "run.toml: unknown key stages.1.num_stesp; did you mean num_steps?",
        ),
        (
            {"name": "a", "train": {"zzz": 1}},
            "run.toml: unknown key train.zzz; known keys: betas, learning_rate, mode, num_steps",
        ),
        ({}, "run.toml: the key name is missing"),
        ({"name": "a", "judge": {"kind": "llm"}}, "run.toml: the key judge.model is missing"),
        ({"name": "a", "train": {"num_steps": 0}}, "run.toml: train.num_steps should be greater than or equal to 1"),
        ({"name": "a", "seed": "3"}, 'run.toml: seed should be a valid integer, not "3"'),
        ({"name": "a", "seed": True}, "run.toml: seed should be a valid integer, not true"),
        ({"name": "a", "resume": 1}, "run.toml: resume should be a valid boolean, not 1"),
        ({"name": "a", "train": 3}, "run.toml: train should be a table, not 3"),
        ({"name": "a", "train": {"mode": "slow"}}, "run.toml: train.mode should be 'fast' or 'safe', not \"slow\""),
        ({"name": "a", "limit": 1.5}, "run.toml: limit should be a valid integer or 'none', not 1.5"),
        ({"name": "a", "train": {"learning_rate": float("inf")}}, "run.toml: train.learning_rate should be a finite"),
    ],
)  # fmt: skip
def test_each_problem_is_one_line_that_names_key_expected_and_found(data: dict, message: str):
    assert problem(data).startswith(message)
    assert "\n" not in problem(data)


def test_a_rule_over_several_keys_says_what_it_wants():
    assert problem({"name": "a", "train": {"num_steps": 13}}) == "run.toml: train: num_steps should be anything but 13"
    with pytest.raises(PrefloopError, match=r"^test: num_steps should be anything but 13$"):
        parse_settings(Train, {"num_steps": 13}, "test")


def test_a_discriminated_kind_that_is_unknown_lists_the_known_ones():
    text = problem({"name": "a", "judge": {"kind": "dice"}})
    assert text == "run.toml: judge.kind should be one of 'rules', 'llm', not \"dice\""
    assert problem({"name": "a", "judge": {"model": "m"}}) == "run.toml: the key judge.kind is missing"


def test_several_problems_are_all_told_one_a_line():
    lines = problem({"nmae": "a", "seed": "x", "train": {"num_steps": -1}}).splitlines()
    assert len(lines) == 4
    assert all(line.startswith("run.toml: ") for line in lines)


def test_a_long_value_is_cut():
    assert len(problem({"name": "a", "seed": "x" * 5000})) < 200


def test_a_missing_file_bad_toml_and_bad_bytes_are_clear(tmp_path: Path):
    with pytest.raises(PrefloopError, match=r"there is no run file .*none\.toml"):
        read_run_file(tmp_path / "none.toml")
    with pytest.raises(PrefloopError, match="cannot be read"):
        read_run_file(tmp_path)
    bad = tmp_path / "bad.toml"
    bad.write_text("a = 1\nb 2\n")
    with pytest.raises(PrefloopError, match="line 2"):
        read_run_file(bad)
    bad.write_bytes(b"a = '\xff'")
    with pytest.raises(PrefloopError, match="UTF-8"):
        read_run_file(bad)


def test_overrides_set_nested_values_and_leave_the_original():
    data = {"train": {"num_steps": 3}}
    text = ["train.learning_rate=1e-3", "name=a b", "train.betas=[0.1, 0.2]", "new.deep.key=true", 'quoted="7"']
    assert apply_overrides(data, text) == {
        "train": {"num_steps": 3, "learning_rate": 1e-3, "betas": [0.1, 0.2]},
        "name": "a b",
        "new": {"deep": {"key": True}},
        "quoted": "7",
    }
    assert data == {"train": {"num_steps": 3}}


def test_an_override_by_nothing_takes_the_key_out():
    data = {"name": "a", "train": {"beta": 0.1, "algorithm": "dpo"}, "judge": {"kind": "llm"}}
    taken = apply_overrides(data, ["train.beta=", "judge= ", "rollout.sampling.top_p=", 'name=""'])
    assert taken == {"name": "", "train": {"algorithm": "dpo"}}
    assert data["train"]["beta"] == 0.1
    with pytest.raises(PrefloopError, match="name is a value, not a table"):
        apply_overrides(data, ["name.first="])


def test_an_override_cannot_smuggle_in_a_second_key():
    assert apply_overrides({}, ["a=1\nb=2"]) == {"a": "1\nb=2"}


@pytest.mark.parametrize("override", ["train", "=3", "train..x=3", ".=1"])
def test_a_malformed_override_is_refused(override: str):
    with pytest.raises(PrefloopError, match=r"key\.path=value"):
        apply_overrides({}, [override])


def test_an_override_through_a_value_is_refused():
    with pytest.raises(PrefloopError, match="train is a value, not a table"):
        apply_overrides({"train": 3}, ["train.x=1"])


def test_the_hash_is_of_the_values_and_not_of_how_they_were_written():
    plain = parse_settings(Run, {"name": "a"}, "a")
    spelled = parse_settings(Run, {"train": {"num_steps": 10}, "name": "a", "seed": 0}, "b")
    assert settings_hash(plain) == settings_hash(spelled)
    assert settings_hash(plain) != settings_hash(parse_settings(Run, {"name": "a", "seed": 1}, "a"))


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(["name", "seed", "train", "judge", "stages", "limit"]) | st.text(max_size=5)


@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_whatever_is_in_the_file_the_answer_is_settings_or_a_clear_error(data: dict):
    try:
        parse_settings(Run, data, "f")
        lines = []
    except PrefloopError as error:
        lines = str(error).split("\n")
    assert all(line.startswith("f: ") for line in lines)
