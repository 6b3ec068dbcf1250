"""Every key of a run file is documented as it is, and somebody reads it."""

import ast
import json
import re
from collections import defaultdict
from collections.abc import Iterator

import pytest
from pydantic import BaseModel
from repository import ROOT, source_files, tree_of

from prefloop.config import BY_RECIPE, _models
from prefloop.environments.own import OwnSettings
from prefloop.losses.registry import OBJECTIVES
from prefloop.stages.settings import RunSettings

RUN_FILES = ROOT / "docs" / "run-files.md"
Tables = dict[str, dict[str, str]]


def shown_default(value: object) -> str:
    return "–" if value is None else f"`{json.dumps(value, ensure_ascii=False)}`"


def tables_of(model: type[BaseModel], path: str = "", tag: str = "") -> Iterator[tuple[str, dict[str, str]]]:
    """Each table of the run file with the defaults of its keys; tables of a union are told apart by their name."""
    keys = {}
    for name, field in model.model_fields.items():
        below = sorted(_models(field.annotation), key=lambda found: found.__name__)
        inner = f"{path}.{name}".strip(".")
        for child in below:
            child_tag = tag_of(child) if len(below) > 1 else ""
            yield from tables_of(child, inner, child_tag)
        if not below:
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            by_recipe = field.json_schema_extra == BY_RECIPE
            keys[name] = "required" if field.is_required() and not by_recipe else shown_default(default)
            if by_recipe:
                keys[name] = "–"
    yield (f"{path}:{tag}" if tag else path), keys


def tag_of(model: type[BaseModel]) -> str:
    """The name of a table of a union; who names an environment of one's own, says where its class is."""
    return "module:Class" if model is OwnSettings else str(model.model_fields["name"].default)


def documented() -> Tables:
    found: Tables = defaultdict(dict)
    current: list[str] = []
    for line in RUN_FILES.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            tag = re.search(r'name = "([^"]+)"', line)
            current = [f"{name}:{tag[1]}" if tag else name for name in re.findall(r"\[([a-z_.]+)\]", line)] or [""]
        row = re.match(r"\| `(\w+)` \| (.+?) \| .*\|$", line)
        for table in current if row else ():
            assert row[1] not in found[table], f"{table}: {row[1]} is documented twice"
            found[table][row[1]] = row[2]
    return found


def test_the_page_on_run_files_says_what_the_code_does():
    expected = dict(tables_of(RunSettings))
    found = documented()
    assert set(found) == set(expected)
    for table, keys in expected.items():
        assert found[table] == keys, f"[{table}]"


def reads_of_attributes() -> set[str]:
    """Names read as attributes anywhere but in the settings' own checks."""
    found = set()
    for path in source_files():
        tree = tree_of(path)
        own = {
            id(node)
            for settings in ast.walk(tree)
            if isinstance(settings, ast.ClassDef) and settings.name.endswith("Settings")
            for function in settings.body
            if isinstance(function, ast.FunctionDef) and function.name.startswith("_")
            for node in ast.walk(function)
        }
        found |= {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in own
        }
    return found


@pytest.mark.parametrize("table", sorted(dict(tables_of(RunSettings))))
def test_no_key_is_a_dead_knob(table: str):
    knobs = {knob for objective in OBJECTIVES.values() for knob in objective.knobs}  # read by name
    unread = set(dict(tables_of(RunSettings))[table]) - reads_of_attributes() - knobs
    assert not unread
