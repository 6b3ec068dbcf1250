"""What the documentation tells people to type exists."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
from cyclopts import CycloptsError
from repository import ROOT, code_blocks, documents

from prefloop.cli import app
from prefloop.config import apply_overrides, parse_settings, read_run_file
from prefloop.stages.settings import RunSettings

SHELLS = ("console", "bash", "sh")


def commands(path: Path) -> list[str]:
    """The lines of a document's shell blocks: after `$ ` in a console, without comments."""
    found = []
    for language in SHELLS:
        for block in code_blocks(path, (language,)):
            lines = [line.strip() for line in block]
            typed = [line[2:] for line in lines if line.startswith("$ ")] if language == "console" else lines
            found += [part.strip() for line in typed for part in line.split("&&")]
    return [line for line in found if line]


def prefloop_commands() -> list[tuple[str, str]]:
    pattern = r"(?:\.venv/bin/)?prefloop\b(.*)"
    return [(p.name, m[1]) for p in documents() if p.exists() for c in commands(p) if (m := re.match(pattern, c))]


@pytest.mark.parametrize(("document", "arguments"), prefloop_commands())
def test_commands_and_options_exist(document: str, arguments: str):
    tokens = shlex.split(arguments, comments=True)
    try:
        app.parse_args(tokens, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        pytest.fail(f"{document}: prefloop{arguments}: {error}")


def runs_of_examples() -> list[tuple[str, list[str]]]:
    words = [(document, shlex.split(arguments, comments=True)) for document, arguments in prefloop_commands()]
    return [(document, tokens) for document, tokens in words if tokens[0] == "run" and (ROOT / tokens[1]).exists()]


@pytest.mark.parametrize(("document", "tokens"), runs_of_examples())
def test_run_files_stand_with_what_the_command_line_sets(document: str, tokens: list[str]):
    sets = [after for option, after in pairwise(tokens) if option == "--set"]
    parse_settings(RunSettings, apply_overrides(read_run_file(ROOT / tokens[1]), sets), document)


def test_a_wrong_option_would_be_found():
    for tokens in (["run", "x.toml", "--bogus"], ["improt", "x"]):
        with pytest.raises(CycloptsError):
            app.parse_args(tokens, exit_on_error=False, print_error=False)


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))


def test_make_targets_exist():
    named = {
        (path.name, target)
        for path in documents()
        for line in commands(path)
        if line.startswith("make ")
        for target in shlex.split(line, comments=True)[1:]
        if "=" not in target
    }
    assert len(named) >= 4
    assert not {found for found in named if found[1] not in make_targets()}
    workflow = set(re.findall(r"^make ([a-z-]+)$", (ROOT / ".ci" / "run").read_text(), re.M))
    assert workflow == {"test", "test-slow"}
    assert workflow <= make_targets()


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path):
    links = re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8"))
    assert not [link for link in links if not link.startswith("http") and not (path.parent / link).exists()]


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_examples_in_python_run(path: Path):
    for block in code_blocks(path, ("python",)):
        exec(compile("\n".join(block), path.name, "exec"), {})


def test_tests_named_in_the_documentation_exist():
    for path in documents():
        for name in re.findall(r"`(tests/[\w/.]+)`", path.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), f"{path.name}: {name}"
