"""Rules that hold in every file."""

import ast
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from repository import PACKAGE, ROOT, shown, source_files, tracked_files, tree_of

MAX_FILE = 500
MAX_FUNCTION = 60

UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_NAMES = {"eval", "exec", "compile", "__import__"}
UNSAFE_ATTRIBUTES = {
    ("torch", "load"), ("torch", "save"), ("yaml", "load"), ("yaml", "unsafe_load"), ("os", "system"), ("os", "popen"),
    ("pandas", "read_pickle"), ("numpy", "load"), ("np", "load"),
}  # fmt: skip
UNSAFE_KEYWORDS = {"shell", "trust_remote_code", "allow_pickle"}  # unless they are plainly switched off
SQL = re.compile(r"\b(SELECT\b.+\bFROM|INSERT\s+INTO|UPDATE\b.+\bSET|DELETE\s+FROM|CREATE\s+TABLE)\b", re.S | re.I)

# Written in two parts, so that this file does not hold what it looks for.
MACHINE_PATH = re.compile(
    r"(?<![\w.~*)\]}/-])/(?:" + "|".join(("work", "root", "home", "tmp", "opt", "Users")) + r")/\w"
)
REGISTRY_HOST = re.compile("|".join(("py" + r"pi\.org", "python" + r"hosted\.org", "download" + r"\.pytorch\.org")))


def test_files_are_short():
    folders = [ROOT / name for name in ("src", "tests", "benchmarks")]
    lengths = {path: len(path.read_text().splitlines()) for folder in folders for path in source_files(folder)}
    assert not [f"{shown(path)} has {length} lines" for path, length in lengths.items() if length >= MAX_FILE]


def test_names_of_test_files_differ():
    """Folders of tests are no packages: pytest cannot tell two modules of one name apart."""
    names = Counter(path.name for path in source_files(ROOT / "tests") if path.name != "conftest.py")
    assert not [name for name, number in names.items() if number > 1]


def test_functions_are_short():
    wrong = [
        f"{shown(path, node)} {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for path in source_files()
        if "migrations" not in path.parts
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= MAX_FUNCTION
    ]
    assert not wrong


def unsafe(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.split(".")[0] in UNSAFE_MODULES)
    elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in UNSAFE_MODULES:
        yield node.module
    elif isinstance(node, ast.Call):
        yield from unsafe_call(node)


def unsafe_call(node: ast.Call) -> Iterator[str]:
    called = node.func
    if isinstance(called, ast.Name) and called.id in UNSAFE_NAMES:
        yield called.id
    if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
        name = (called.value.id, called.attr)
        if name in UNSAFE_ATTRIBUTES:
            yield ".".join(name)
    for keyword in node.keywords:
        off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        if keyword.arg in UNSAFE_KEYWORDS and not off:
            yield keyword.arg


def test_nothing_runs_what_it_reads():
    wrong = [
        f"{shown(p, node)}: {what}" for p in source_files() for node in ast.walk(tree_of(p)) for what in unsafe(node)
    ]
    assert not wrong


def test_the_search_for_unsafe_code_finds_it():
    planted = {
        "import pickle": "pickle",
        "from pickle import loads": "pickle",
        "eval('1')": "eval",
        "torch.load('x')": "torch.load",
        "run('ls', shell=True)": "shell",
        "f(trust_remote_code=ask)": "trust_remote_code",
    }
    for source, name in planted.items():
        assert [what for node in ast.walk(ast.parse(source)) for what in unsafe(node)] == [name]
    harmless = "model.eval()\nsafetensors.load('x')\nrun(['ls'], shell=False)\nf(trust_remote_code=False)"
    assert not [what for node in ast.walk(ast.parse(harmless)) for what in unsafe(node)]


def test_no_values_in_the_text_of_sql():
    wrong = [
        shown(path, node)
        for path in source_files()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.JoinedStr) and SQL.search(ast.unparse(node))
    ]
    assert not wrong


def test_no_unfinished_code():
    marks = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X")) + r")\b")
    wrong = [
        shown(p) for p in source_files() if marks.search(p.read_text()) or "raise NotImplementedError" in p.read_text()
    ]
    assert not wrong


def texts() -> Iterator[tuple[Path, str]]:
    for path in tracked_files():
        try:
            yield path, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture


def test_no_paths_of_a_machine_and_no_registry_hosts():
    wrong = [
        f"{shown(path)}:{number}: {line.strip()[:100]}"
        for path, text in texts()
        for number, line in enumerate(text.splitlines(), start=1)
        if MACHINE_PATH.search(line) or REGISTRY_HOST.search(line)
    ]
    assert not wrong


def test_pins_are_versions_alone():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert not [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", pin)]
    assert "torch==2.13.0" in pins


def test_every_dependency_is_pinned_and_every_import_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    names = {normal(re.split(r"[\[<>=! ]", requirement)[0]) for requirement in requirements} - {"prefloop"}
    pinned = {
        normal(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    assert not names - pinned
    assert not third_party_imports() - names - {"starlette"}  # fastapi's own base


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def third_party_imports() -> set[str]:
    found = set()
    for path in source_files(PACKAGE):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    return {normal(name) for name in found - set(sys.stdlib_module_names) - {"prefloop"}}
