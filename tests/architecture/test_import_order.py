"""Arrows point one way, and what needs no torch does not import it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import PACKAGE, component_of, module_name, shown, source_files, tree_of

# A component imports only those before it; docs/architecture.md tells the same order.
ORDER = (
    "records", "config", "hub", "serving", "stats", "store", "formats", "chat", "clients", "environments", "judges",
    "curation", "feedback", "batch", "models", "rollout", "gateway", "credit", "losses", "training", "evaluation",
    "report", "stages", "planning", "loop", "live", "web", "doctor", "cli",
)  # fmt: skip

HEAVY = ("torch", "transformers", "tokenizers", "peft")
HEAVY_COMPONENTS = ("batch", "models", "losses", "training")
HEAVY_MODULES = ("prefloop.stages.policies", "prefloop.rollout")
# Extras: a command that does without one must start without it.
LAZY = (
    *HEAVY, "jinja2", "matplotlib", "pyarrow", "anthropic", "openai", "reasoning_gym", "fastapi", "uvicorn",
    "datasets", "trl", "mcp", "agentdojo",
)  # fmt: skip


def imported(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "prefloop" else []
            yield from ((node, name) for name in names or [node.module])
        elif isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)


def components() -> set[str]:
    return {component_of(path) for path in source_files()} - {"__init__"}


def test_every_component_has_its_place_in_the_order():
    assert components() == set(ORDER)


def test_the_documented_order_is_this_one():
    text = (PACKAGE.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    found = [name for line in text.splitlines() for name in [line.strip().split(" ")[0].rstrip("/")] if name]
    listed = [name.removesuffix(".py") for name in found if name.removesuffix(".py") in ORDER]
    assert tuple(dict.fromkeys(listed)) == ORDER


@pytest.mark.parametrize("component", ORDER)
def test_a_component_imports_only_those_before_it(component: str):
    allowed = {*ORDER[: ORDER.index(component) + 1], "__version__"}
    wrong = [
        f"{shown(path, node)} imports {name}"
        for path in source_files()
        if component_of(path) == component
        for node, name in imported(tree_of(path))
        if name.startswith("prefloop.") and name.split(".")[1] not in allowed
    ]
    assert not wrong


def test_imports_are_absolute():
    wrong = [
        shown(path, node)
        for path in source_files()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not wrong


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in memory after a statement ran in a fresh interpreter."""
    program = f"import sys\n{statement}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def light_modules(component: str) -> list[str]:
    modules = [module_name(path) for path in source_files() if component_of(path) == component]
    # A migration needs alembic's context, and a settings class may sit in a heavy package but is light itself.
    return [name for name in modules if ".migrations" not in name and name not in HEAVY_MODULES]


@pytest.mark.parametrize("component", [name for name in ORDER if name not in (*HEAVY_COMPONENTS, "rollout")])
def test_light_components_do_without_torch(component: str):
    statement = "\n".join(f"import {module}" for module in light_modules(component))
    assert not loaded_by(statement) & set(HEAVY)


def test_settings_of_heavy_components_do_without_torch():
    assert not loaded_by("import prefloop.models.settings, prefloop.training.settings") & set(HEAVY)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["run", "--help"], ["train", "--help"], ["train", "dpo", "--help"],
     ["status", "--store", ":memory:"]],
)  # fmt: skip
def test_the_command_line_starts_with_no_extra(arguments: list[str]):
    statement = f"from prefloop.cli import main\ntry:\n    main({arguments!r})\nexcept SystemExit:\n    pass"
    assert not loaded_by(statement) & set(LAZY)


def test_torch_is_imported_at_module_level_only_where_it_may_be():
    def heavy_at_top(path: Path) -> list[str]:
        top = ast.Module([node for node in tree_of(path).body if not isinstance(node, ast.If)], [])
        top.body = [node for node in top.body if isinstance(node, ast.Import | ast.ImportFrom)]
        return [f"{shown(path, node)} imports {name}" for node, name in imported(top) if name.split(".")[0] in HEAVY]

    allowed = {*HEAVY_COMPONENTS, "rollout"}
    files = [p for p in source_files() if component_of(p) not in allowed and module_name(p) not in HEAVY_MODULES]
    assert not [found for path in files for found in heavy_at_top(path)]
