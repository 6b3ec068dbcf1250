"""The plumbing of the benchmarks: an interrupted run goes on, a finished one begins anew."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "_common.py"


@pytest.fixture
def common(tmp_path, monkeypatch):
    specification = importlib.util.spec_from_file_location("benchmarks_common", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "benchmarks_common", module)
    specification.loader.exec_module(module)
    monkeypatch.setattr(module, "STATE", tmp_path / "state")
    return module


def interrupted():
    raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_after_its_last_cell(common, tmp_path):
    counted = []

    def cell(name, figure):
        def measure(options):
            counted.append(name)
            return common.Measured({name: figure})

        return measure

    options = common.parse_options("", ["--json", str(tmp_path / "figures.json")])
    broken = {"a": cell("a", 1.0), "b": lambda options: interrupted()}
    with pytest.raises(KeyboardInterrupt):
        common.run_cells("x", broken, options, "caption")
    assert not (tmp_path / "figures.json").exists()
    whole = {"a": cell("a", 2.0), "b": cell("b", 3.0)}
    figures = common.run_cells("x", whole, options, "caption", summary=lambda found: {"sum": sum(found.values())})
    assert figures == {"a": 1.0, "b": 3.0, "sum": 4.0}
    assert counted == ["a", "b"]
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    assert common.run_cells("x", whole, options, "caption") == {"a": 2.0, "b": 3.0}  # anew


def test_cells_of_another_version_are_not_mixed_in(common):
    options = common.parse_options("", [])
    broken = {"a": lambda options: common.Measured({"a": 1.0}), "b": lambda options: interrupted()}
    with pytest.raises(KeyboardInterrupt):
        common.run_cells("x", broken, options, "version 1")
    whole = {name: lambda options, name=name: common.Measured({name: 2.0}) for name in "ab"}
    assert common.run_cells("x", whole, options, "version 2") == {"a": 2.0, "b": 2.0}


def test_cells_that_were_not_asked_for_stay(common):
    def options(*argv):
        return common.parse_options("", list(argv))

    cells = {name: lambda options, name=name: common.Measured({name: 1.0}) for name in "ab"}
    with pytest.raises(KeyboardInterrupt):
        common.run_cells("x", {**cells, "c": lambda options: interrupted()}, options(), "caption")
    again = {name: lambda options, name=name: common.Measured({name: 2.0}) for name in "abc"}
    assert common.run_cells("x", again, options("--only", "a"), "caption") == {"a": 1.0}
    assert common.run_cells("x", again, options(), "caption") == {"a": 2.0, "b": 1.0, "c": 2.0}


def test_a_run_beside_another_one_leaves_its_cells_alone(common):
    options = common.parse_options("", ["--only", "b"])

    def with_other(_):
        common.run_cells("x", {"b": lambda options: common.Measured({"b": 1.0})}, options, "caption")
        return common.Measured({"c": 1.0})

    cells = {"a": lambda options: common.Measured({"a": 1.0}), "c": with_other, "d": lambda options: interrupted()}
    with pytest.raises(KeyboardInterrupt):
        common.run_cells("x", cells, common.parse_options("", []), "caption")
    again = {name: lambda options, name=name: common.Measured({name: 2.0}) for name in "abcd"}
    figures = common.run_cells("x", again, common.parse_options("", []), "caption")
    assert figures == {"a": 1.0, "b": 2.0, "c": 1.0, "d": 2.0}


@pytest.mark.parametrize("left", ['{"caption": "caption", "fig', "[]", "{}", ""])
def test_a_damaged_cell_is_measured_again(common, left):
    cells = {name: lambda options, name=name: common.Measured({name: 1.0}) for name in "a"}
    with pytest.raises(KeyboardInterrupt):
        common.run_cells("x", {**cells, "b": lambda options: interrupted()}, common.parse_options("", []), "caption")
    (saved,) = common.STATE.rglob("a.json")
    saved.write_text(left)
    assert common.run_cells("x", cells, common.parse_options("", []), "caption") == {"a": 1.0}


def test_the_last_one_removes_what_is_shared(common, tmp_path):
    place = tmp_path / "starts"
    with common.shared(place):
        (place / "1").mkdir(parents=True)
        with common.shared(place):
            pass
        assert (place / "1").exists()  # it is in use
    assert not place.exists()
    place.mkdir()
    with pytest.raises(KeyboardInterrupt), common.shared(place):
        interrupted()
    assert place.exists()


def test_a_seed_of_zero_is_a_seed(common):
    assert common.parse_options("", ["--seed", "0"], default_seed=None).first_seed(21) == 0
    assert common.parse_options("", [], default_seed=None).first_seed(21) == 21
    assert common.parse_options("", []).first_seed(21) == 0


def test_a_pattern_without_a_cell_is_said(common):
    with pytest.raises(SystemExit, match="no cell matches 'z'"):
        common.run_cells("x", {"a": None}, common.parse_options("", ["--only", "z"]), "caption")


def test_interleaved_runs_take_turns_after_a_warm_up(common):
    order = []
    timings = common.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3
    assert {name: len(timing.cpu) for name, timing in timings.items()} == {"a": 2, "b": 2}
